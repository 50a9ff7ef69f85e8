"""Losses through the frozen language-model head, without ever holding all logits.

A stage 1 loss is a sum over rows of hidden states (R, D) of a term that needs their logits (R, V):
with V = 32,000 and a few thousand rows, gigabytes. `ThroughHead` computes them a chunk of rows at a
time. Notation as in model.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime import cpu


class ThroughHead(torch.autograd.Function):
    """Sum of row_loss(hidden @ head^T) over chunks of rows; the (rows, V) logits are never kept.

    The head is frozen, so a chunk's gradient with respect to its hidden states is computed while
    its logits exist: nothing of size V outlives the chunk.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, head: Tensor, row_loss, chunk_rows: int) -> Tensor:
        """hidden (R, D), head (V, D), row_loss(logits, rows) -> scalar, for each chunk of rows."""
        total, gradients = hidden.new_zeros(()), [hidden[:0]]  # a rank's texts may have no rows
        for start in range(0, len(hidden), chunk_rows):
            rows = slice(start, start + chunk_rows)
            with torch.enable_grad():
                chunk = hidden[rows].detach().requires_grad_()
                loss = row_loss(logits_of(chunk, head), rows)
            gradients.append(torch.autograd.grad(loss, chunk)[0])
            total = total + loss.detach()
        ctx.save_for_backward(torch.cat(gradients))
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return ctx.saved_tensors[0] * gradient, None, None, None


def logits_of(hidden: Tensor, head: Tensor) -> Tensor:
    """hidden (R, D), head (V, D) -> (R, V)."""
    return F.linear(cpu.pad_rows(hidden), head)[: len(hidden)]


def log_probabilities(logits: Tensor) -> Tensor:
    """log softmax over V in at least fp32: finite where a probability underflows."""
    return F.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def nll_loss(hidden: Tensor, targets: Tensor, head: Tensor, chunk_rows: int = 256) -> Tensor:
    """Sum over rows of -log p(target); hidden (R, D), targets (R,) ids, head (V, D)."""

    def cross_entropy(logits: Tensor, rows: slice) -> Tensor:
        return F.nll_loss(log_probabilities(logits), targets[rows], reduction="sum")

    return ThroughHead.apply(hidden, head, cross_entropy, chunk_rows)

"""Attention of packed sequences as one FlashAttention call: nested tensors through SDPA."""

from functools import lru_cache
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.devices import to_device


def takes_any_lengths(q: Tensor) -> bool:
    """Whether a fused kernel takes q's heads (T, H, head_dim) for sequences of any lengths."""
    # SDPA is told by nested tensors, which cannot be made in inference mode (but under no_grad)
    if q.device.type != "cuda" or q.dtype == torch.float64 or torch.is_inference_mode_enabled():
        return False
    if q.dtype == torch.float32:
        return q.shape[-1] % 4 == 0
    ampere = torch.cuda.get_device_capability(q.device) >= (8, 0)
    return ampere and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256


def attend(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], causal: bool, dropout):
    """Softmax attention within each sequence, q, k, v (T, H, head_dim) -> (T, H, head_dim).

    One call of FlashAttention, in fp32 of PyTorch's memory-efficient kernel.
    """
    # the extremes are known here; torch would ask the device for them, and wait
    jagged = {"offsets": offsets_of(tuple(lengths), q.device), "min_seqlen": min(lengths),
              "max_seqlen": max(lengths)}
    nested = [torch.nested.nested_tensor_from_jagged(t, **jagged).transpose(1, 2)
              for t in (q, k, v)]
    out = F.scaled_dot_product_attention(*nested, dropout_p=dropout, is_causal=causal)
    return out.transpose(1, 2).values()


@lru_cache(maxsize=4096)
def offsets_of(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Where the sequences begin and end (N + 1,).

    To torch each offsets tensor is another jagged size, and a recomputed forward pass must repeat
    its sizes: equal lengths have the same tensor.
    """
    return to_device(torch.tensor([0, *accumulate(lengths)]), device)

"""Attention of packed sequences as one FlashAttention call, whatever their lengths."""

from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from runtime.devices import to_device


def takes_any_lengths(q: Tensor) -> bool:
    """Whether FlashAttention supports q (T, H, head_dim); if not, there is a call per length."""
    if q.device.type != "cuda" or q.dtype not in (torch.bfloat16, torch.float16):
        return False
    ampere = torch.cuda.get_device_capability(q.device) >= (8, 0)
    return ampere and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256


def attend(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], causal: bool, dropout: float):
    """Softmax attention within each sequence, q (T, H, head_dim), k and v (T, G, head_dim) -> as q.

    This is the operation that SDPA calls for nested tensors. Called that way, it kept the CPU busy
    for 6.8 ms, a hundred times as long (docs/measured.md); torch.nn.attention.varlen, its public
    API since torch 2.10, supports no dropout and, up to 2.11, no grouped heads.
    """
    offsets, longest = offsets_of(tuple(lengths), q.device), max(lengths)
    return torch.ops.aten._flash_attention_forward(
        q, k, v, offsets, offsets, longest, longest, dropout, causal, False)[0]


@lru_cache(maxsize=8)  # shared by the layers of a pass
def offsets_of(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Where the sequences begin and end, int32 (N + 1,)."""
    return to_device(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), device)

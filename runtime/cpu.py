"""What makes PyTorch fast on a CPU; on other devices each function does the plain thing.

Measured in docs/measured.md. The network reads the same without these functions: `dropout` is
F.dropout, `pad_rows` adds nothing, `attend` is softmax attention, `keep_freed_memory` changes only
where memory comes from.
"""

import ctypes
import math
import os
import sys
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

LONGEST_BF16 = 512  # tokens of a sequence; above, fp32 attention is as fast


def keep_freed_memory():
    """Let glibc keep the memory that tensors free, for the next ones.

    By default it hands large blocks back to the system, and faulting them in again takes a fifth of
    a CPU's time. A threshold set in the environment takes precedence.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    given = "MALLOC_MMAP_THRESHOLD_" in os.environ or "malloc" in tunables
    if sys.platform != "linux" or given:
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # not in every C library
    mmap_threshold, trim_threshold = -3, -1  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD in malloc.h
    # 2^25 is what older versions of glibc allow
    if mallopt and any(mallopt(mmap_threshold, size) for size in (2**30, 2**25)):
        mallopt(trim_threshold, 2**31 - 1)


def dropout(x: Tensor, p: float) -> Tensor:
    """x with each element zero with probability p, or else divided by 1 - p.

    On the CPU torch draws a number per element, one after another, which takes longer than the
    matrix product beside it. Here four elements share the 64 bits of one number: p is rounded to a
    multiple of 2^-16.
    """
    dropped = min(round(p * 2**16), 2**16 - 1)
    if x.device.type != "cpu" or not dropped:
        return F.dropout(x, p)
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    bits = words.view(torch.int16)[: x.numel()].view(x.shape)
    return x * ((bits >= dropped - 2**15).to(x.dtype) / (1 - dropped / 2**16))


def is_cpu_bf16(x: Tensor) -> bool:
    """Whether x is in bf16 on the CPU, where oneDNN compiles a product for each new shape."""
    return x.device.type == "cpu" and x.dtype == torch.bfloat16


def pad_rows(x: Tensor) -> Tensor:
    """x (T, D), in bf16 on the CPU with rows of zeros up to a multiple of 64: few shapes."""
    missing = -len(x) % 64 if is_cpu_bf16(x) else 0
    return F.pad(x, (0, 0, 0, missing)) if missing else x


def pad_pass(
    x: Tensor, lengths: list[int], last: list[int] | None
) -> tuple[Tensor, list[int], list[int] | None]:
    """`pad_rows` for a packed row: the zeros are one more sequence, of which no state is kept."""
    padded = pad_rows(x)
    if len(padded) > len(x):
        lengths, last = [*lengths, len(padded) - len(x)], last and [*last, 0]
    return padded, lengths, last


def length_groups(lengths: list[int]) -> list[list[int]]:
    """Neighbours that share a product, by their lengths.

    8 short ones that are padded to the same multiple of 32, where there are so many; else each
    alone, as the shapes of the products must be few.
    """
    groups = []
    for blocks, same in groupby(lengths, key=lambda length: -(-length // 32)):
        same = list(same)
        whole = len(same) - len(same) % 8 if blocks <= 2 else 0
        groups += [same[i : i + 8] for i in range(0, whole, 8)] + [[n] for n in same[whole:]]
    return groups


def attend(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], causal: bool, p: float) -> Tensor:
    """Softmax attention of packed bf16 sequences, q, k, v (T, H, head_dim) -> (T, H, head_dim).

    PyTorch's fused kernel gains nothing from bf16 on a CPU, two matrix products do.
    """
    groups = length_groups(lengths)
    sizes, outputs = [sum(group) for group in groups], []
    for group, *part in zip(groups, q.split(sizes), k.split(sizes), v.split(sizes)):
        if group[0] <= LONGEST_BF16:
            outputs.append(attend_by_products(*part, group, causal, p))
        else:  # one sequence, in fp32
            part = [t.float().transpose(0, 1)[None] for t in part]
            out = F.scaled_dot_product_attention(*part, dropout_p=p, is_causal=causal)
            outputs.append(out[0].transpose(0, 1).to(q.dtype))
    return torch.cat(outputs)


def attend_by_products(
    q: Tensor, k: Tensor, v: Tensor, lengths: list[int], causal: bool, p: float
) -> Tensor:
    """Attention of a few sequences of similar length as two bf16 products.

    Lengths are padded to a multiple of 32; the first product also adds the mask that hides the
    padding, or the future. Its scores are rounded to bf16, as in transformers' eager attention.
    Keeps H L^2 weights per sequence for backward (with dropout three times that).
    """
    heads, size = q.shape[1], max(lengths) + -max(lengths) % 32

    def padded(t: Tensor) -> Tensor:
        """(T, H, head_dim) -> (n H, size, head_dim)."""
        rows = [F.pad(rows, (0, 0, 0, 0, 0, size - len(rows))) for rows in t.split(lengths)]
        return torch.stack(rows).transpose(1, 2).flatten(0, 1)

    if causal:
        mask = torch.full((size, size), -math.inf, dtype=q.dtype).triu(1)
    else:
        outside = torch.arange(size) >= torch.tensor(lengths)[:, None]
        mask = torch.zeros(outside.shape, dtype=q.dtype).masked_fill(outside, -math.inf)
        mask = mask.repeat_interleave(heads, dim=0)[:, None]
    scores = torch.baddbmm(mask, padded(q), padded(k).mT, alpha=q.shape[-1] ** -0.5)
    out = dropout(scores.softmax(dim=-1), p) @ padded(v)
    sequences = out.unflatten(0, (-1, heads)).transpose(1, 2)  # (n, size, H, head_dim)
    return torch.cat([rows[:length] for rows, length in zip(sequences, lengths)])

"""What makes PyTorch fast on a CPU; elsewhere this file or its caller does the plain thing.

Measured in docs/measured.md. The network reads the same without these functions: `normalise` is
F.rms_norm, `swiglu` silu(gate) * up, `dropout` F.dropout, `pad_rows` the identity, `attend` softmax
attention; `keep_freed_memory`, `keep_few_products` and `give_back_freed_memory` change only how
much memory is held.
"""

import ctypes
import math
import os
import sys
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from runtime.devices import at_least_fp32

LONGEST_BF16 = 512  # tokens of a sequence; above that, fp32 attention is as fast


def is_cpu(x: Tensor) -> bool:
    """Whether x is on the CPU."""
    return x.device.type == "cpu"


def keep_freed_memory():
    """Let glibc keep the memory that tensors free, for the next ones.

    By default it returns large blocks to the system, and faulting them in again takes a fifth of
    the CPU time. A threshold set in the environment takes precedence.
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


def keep_few_products():
    """Let oneDNN keep 64 compiled bf16 products instead of 1,024 of each kind: one per shape, of up
    to 0.6 MB each. Call it before the first product; the environment takes precedence."""
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "64")


def give_back_freed_memory():
    """Return the memory that glibc keeps between the tensors in use; it grows with new shapes.

    To be called now and then in a loop that runs for hours.
    """
    trim = sys.platform == "linux" and getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)


# ---------------------------------------------------------------------------------------------
# Operations that take fewer passes over memory, and keep less for backward
# ---------------------------------------------------------------------------------------------


class Normalise(Function):
    """x / rms(x) over the last dimension, in at least fp32: PyTorch takes twice as many passes over
    memory, and keeps an fp32 copy of x for backward."""

    @staticmethod
    def forward(ctx, x: Tensor, eps: float) -> Tensor:
        wide = at_least_fp32(x)
        square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
        inverse = square.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, inverse)
        return (wide * inverse if wide is x else wide.mul_(inverse)).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        x, inverse = ctx.saved_tensors
        normed, wide = at_least_fp32(x) * inverse, at_least_fp32(gradient)
        along = torch.linalg.vecdot(wide, normed).unsqueeze(-1).div_(x.shape[-1])
        return torch.addcmul(wide, normed, along, value=-1).mul_(inverse).to(x.dtype), None


def normalise(x: Tensor, eps: float) -> Tensor:
    """x / rms(x) over the last dimension, computed in at least fp32."""
    if is_cpu(x):
        return Normalise.apply(x, eps)
    return F.rms_norm(x, x.shape[-1:], eps=eps)  # on CUDA it accumulates in fp32 itself


class SwiGLU(Function):
    """silu(gate) * up, keeping only gate and up for backward."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        gate, up = ctx.saved_tensors
        of_gate = torch.ops.aten.silu_backward(gradient * up, gate)
        return of_gate, F.silu(gate).mul_(gradient)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020)."""
    return SwiGLU.apply(gate, up) if is_cpu(gate) else F.silu(gate) * up


# ---------------------------------------------------------------------------------------------
# Adapters and dropout
# ---------------------------------------------------------------------------------------------


def dropped(x: Tensor, p: float) -> Tensor:
    """Which elements of x to drop, each independently with probability p: on the CPU their places,
    some of them repeated; elsewhere a mask.

    PyTorch draws a number per element, one after another, which on a CPU takes longer than the
    matrix product next to it. Here darts are thrown at random elements: Poisson(a n) darts hit each
    of the n elements Poisson(a) times, independently, and miss it with probability e^-a = 1 - p.
    """
    if not is_cpu(x):
        return torch.empty_like(x, dtype=torch.bool).bernoulli_(p)
    n = x.numel()
    darts = torch.poisson(torch.tensor(-math.log1p(-p) * n, dtype=torch.float64))
    return torch.randint(n, (int(darts),))


def zero(x: Tensor, where: Tensor) -> Tensor:
    """x (contiguous) with zeros where `dropped` says, in place."""
    if where.dtype == torch.bool:
        return x.masked_fill_(where, 0)
    x.view(-1).index_fill_(0, where, 0)
    return x


def dropout(x: Tensor, p: float) -> Tensor:
    """x with each element zero with probability p, or else divided by 1 - p."""
    if not is_cpu(x) or not 0 < p < 1:
        return F.dropout(x, p)
    return (x.flatten() / (1 - p)).index_fill_(0, dropped(x, p), 0).view(x.shape)


# ---------------------------------------------------------------------------------------------
# Few shapes: oneDNN compiles a bf16 product for each new one
# ---------------------------------------------------------------------------------------------


def is_cpu_bf16(x: Tensor) -> bool:
    """Whether x is in bf16 on the CPU, where oneDNN compiles a product for each new shape."""
    return is_cpu(x) and x.dtype == torch.bfloat16


def pad_rows(x: Tensor) -> Tensor:
    """x (T, D), in bf16 on the CPU zero-padded to a multiple of 64 rows, for few shapes."""
    missing = -len(x) % 64 if is_cpu_bf16(x) else 0
    return F.pad(x, (0, 0, 0, missing)) if missing else x


def pad_pass(
    x: Tensor, lengths: list[int], last: list[int] | None
) -> tuple[Tensor, list[int], list[int] | None]:
    """`pad_rows` for a packed row: the zeros form one more sequence, whose states are dropped."""
    padded = pad_rows(x)
    if len(padded) > len(x):
        lengths, last = [*lengths, len(padded) - len(x)], last and [*last, 0]
    return padded, lengths, last


# ---------------------------------------------------------------------------------------------
# Attention in bf16
# ---------------------------------------------------------------------------------------------


def attend(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], causal: bool, p: float) -> Tensor:
    """Softmax attention of packed bf16 sequences, q (T, H, head_dim), k and v (T, G, head_dim).

    PyTorch's fused kernel gains nothing from bf16 on a CPU, but two matrix products do: the first
    also adds the mask, and the H / G query heads of a key head are rows of one product. Scores are
    rounded to bf16, as in transformers' eager attention. Keeps H L^2 weights per sequence for
    backward (with dropout twice that).
    """
    lengths, (_, heads, width), kv_heads = tuple(lengths), q.shape, k.shape[1]
    repeats, outputs, parts = heads // kv_heads, [], []
    batches, masks = padded_batches(lengths), masks_of(lengths, repeats, kv_heads, causal)
    for t in (q, k, v):
        rows = Spread.apply(t.flatten(0, 1), places_of(lengths, t.shape[1]))
        parts.append(rows.split([size * len(same) * t.shape[1] for size, same in batches]))
    for (size, _), mask, q, k, v in zip(batches, masks, *parts):
        k, v = (t.view(-1, size, width) for t in (k, v))
        if size <= LONGEST_BF16:
            scores = torch.baddbmm(mask, q.view(len(k), -1, width), k.mT, alpha=width**-0.5)
            out = dropout(scores.softmax(dim=-1), p) @ v
        else:  # one sequence, in fp32
            k, v = (t.repeat_interleave(repeats, dim=0) for t in (k, v))
            part = [t.view(1, heads, size, width).float() for t in (q, k, v)]
            out = F.scaled_dot_product_attention(*part, dropout_p=p, is_causal=causal).to(q.dtype)
        outputs.append(out.reshape(-1, width))
    out = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
    return Collect.apply(out, places_of(lengths, heads)).unflatten(0, (-1, heads))


@lru_cache(maxsize=8)  # shared by a pass's layers; more would fragment free memory
def padded_batches(lengths: tuple[int, ...]) -> list[tuple[int, list[int]]]:
    """(padded size, which sequences) of each batch: those padded to the same multiple of 32.

    Batches have 1, 2, 4, 8 ... sequences, again for few shapes: what oneDNN keeps for each is small
    but lies between large tensors, whose memory glibc then cannot reuse for larger ones. Sequences
    above LONGEST_BF16 are batches of their own, without padding.
    """
    def key(i: int) -> tuple[int, int]:
        n = lengths[i]
        return (n + -n % 32, 0) if n <= LONGEST_BF16 else (n, i)

    batches = []
    for (size, _), same in groupby(sorted(range(len(lengths)), key=key), key):
        same = list(same)
        while same:
            n = 2 ** (len(same).bit_length() - 1)  # the largest power of two that fits
            batches.append((size, same[:n]))
            same = same[n:]
    return batches


@lru_cache(maxsize=8)
def masks_of(lengths: tuple[int, ...], repeats: int, kv_heads: int, causal: bool) -> list:
    """What is added to each batch's scores: -inf on the future (which hides the padding, too), or
    on the padding; None for a long sequence.

    A product's rows are the positions of the `repeats` query heads of a key head, head by head.
    """
    masks = []
    for size, same in padded_batches(lengths):
        if causal:
            hidden = torch.ones(size, size, dtype=torch.bool).triu(1).repeat(repeats, 1)
        else:
            inside = torch.tensor([lengths[i] for i in same]).repeat_interleave(kv_heads)
            hidden = (torch.arange(size) >= inside[:, None])[:, None]
        masks.append(torch.zeros(hidden.shape, dtype=torch.bfloat16).masked_fill(hidden, -math.inf)
                     if size <= LONGEST_BF16 else None)
    return masks


class Places(NamedTuple):
    """Where the heads of packed tokens lie in padded batches, one head after another."""

    of: Tensor  # (T * heads,): the place of each head of each token
    source: Tensor  # (places,): which head of which token lies there; 0 where there is none
    empty: Tensor  # the places of the padding


@lru_cache(maxsize=8)
def places_of(lengths: tuple[int, ...], heads: int) -> Places:
    """Where `heads` heads of each token go, and where they come from."""
    start, sizes, total = [0] * len(lengths), [0] * len(lengths), 0
    for size, same in padded_batches(lengths):
        for i in same:
            start[i], sizes[i], total = total, size, total + heads * size
    positions = np.concatenate([np.arange(n) for n in lengths])
    first, step = (np.repeat(x, lengths)[:, None] for x in (start, sizes))
    places = (first + positions[:, None] + step * np.arange(heads)).ravel()
    source = np.full(total, -1)
    source[places] = np.arange(len(places))
    return Places(*map(torch.from_numpy, (places, source.clip(0), np.flatnonzero(source < 0))))


def spread(x: Tensor, places: Places) -> Tensor:
    """x (T * heads, head_dim) -> (places, head_dim), zeros in the empty ones."""
    return x.index_select(0, places.source).index_fill_(0, places.empty, 0)


class Spread(Function):
    """`spread`, with a plain gather as its backward pass, where PyTorch would add up rows."""

    @staticmethod
    def forward(ctx, x: Tensor, places: Places) -> Tensor:
        ctx.places = places
        return spread(x, places)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient.index_select(0, ctx.places.of), None


class Collect(Function):
    """The reverse of Spread."""

    @staticmethod
    def forward(ctx, x: Tensor, places: Places) -> Tensor:
        ctx.places = places
        return x.index_select(0, places.of)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return spread(gradient, ctx.places), None

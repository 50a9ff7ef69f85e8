"""Devices, dtypes, asynchronous copies, and texts packed in one row."""

import re

import numpy as np
import torch
from torch import Tensor

from runtime.errors import UserError


def find_device(name: str) -> torch.device:
    """The device of a --device flag: `auto` is cuda where there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if re.fullmatch(r"mps(:\d+)?", name):
        raise UserError(f"--device {name}: is not supported: losses are summed in float64, which "
                        f"Apple's GPUs do not have; use cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UserError(f"--device {name}: unknown; auto, cpu or cuda")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {name}: this machine or this torch has no CUDA; use cpu")
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto`: bf16 where matrix products in bf16 are fast (CUDA, AVX512-BF16, AMX), else fp32."""
    if name != "auto":
        return getattr(torch, name)
    cpu = torch.cpu.get_capabilities()
    fast = device.type == "cuda" or cpu.get("avx512_bf16") or cpu.get("amx_bf16")
    return torch.bfloat16 if fast else torch.float32


def scoring_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The dtype in which encoders are evaluated: bf16 on CUDA, fp32 elsewhere, unless named."""
    return getattr(torch, name or ("bfloat16" if device.type == "cuda" else "float32"))


def at_least_fp32(x: Tensor) -> Tensor:
    """x in fp32, or unchanged if its dtype is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def to_device(tensor: Tensor, device) -> Tensor:
    """The tensor on the device; on CUDA copied asynchronously, from pinned memory."""
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def flat_ids(arrays: list[np.ndarray], device) -> Tensor:
    """Arrays of token ids -> one row (T,) int64 on the device."""
    return to_device(torch.from_numpy(np.concatenate(arrays)).long(), device)


def pack(*parts: tuple[Tensor, list[int]]) -> tuple[Tensor, list[int]]:
    """Lay N sequences in one row, each made of one segment of every part in turn.

    A part is (rows, lengths): all its N segments, one after another, and their N lengths.
    """
    segments = [rows.split(lengths) for rows, lengths in parts]
    row = torch.cat([segment for sequence in zip(*segments) for segment in sequence])
    return row, [sum(n) for n in zip(*(lengths for _, lengths in parts))]

"""runtime/devices.py: which device, which dtype, and copies between devices."""

import numpy as np
import pytest
import torch
from helpers import refused

from runtime.devices import at_least_fp32, find_device, flat_ids, pick_dtype, scoring_dtype
from runtime.devices import to_device

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("there", [True, False], ids=["cuda", "no cuda"])
def test_auto_is_cuda_where_there_is_one(there, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert find_device("auto") == (CUDA if there else CPU)
    assert find_device("cpu") == CPU
    for name in ("cuda", "cuda:1"):
        if there:
            assert find_device(name) == torch.device(name)
        else:
            refused(lambda: find_device(name), f"--device {name}", "no CUDA", "use cpu")


@pytest.mark.parametrize("name", ["banana", "", "cuda:", "cuda:x", "tpu", "mps:x", "cpu:0", "CPU"])
def test_an_unknown_device_is_refused_by_name(name):
    refused(lambda: find_device(name), f"--device {name}: unknown", "auto, cpu or cuda")


@pytest.mark.parametrize("name", ["mps", "mps:0"])
@pytest.mark.parametrize("there", [True, False])
def test_apples_gpu_is_refused_by_name_and_auto_is_the_cpu_there(name, there, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: there)
    refused(lambda: find_device(name), f"--device {name}: is not supported", "float64", "use cpu")
    assert find_device("auto") == (CUDA if torch.cuda.is_available() else CPU)


@pytest.mark.parametrize("able, expected", [
    ({}, torch.float32), ({"avx2": True}, torch.float32), ({"avx512_bf16": True}, torch.bfloat16),
    ({"amx_bf16": True}, torch.bfloat16), ({"amx_bf16": False}, torch.float32),
], ids=str)
def test_auto_is_bf16_where_products_in_bf16_are_fast(able, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    assert pick_dtype("auto", CPU) == expected and pick_dtype("auto", CUDA) == torch.bfloat16
    for device in (CPU, CUDA):
        assert pick_dtype("float64", device) == torch.float64


def test_encoders_are_scored_in_bf16_on_cuda_and_in_fp32_elsewhere_unless_named():
    assert scoring_dtype(None, CUDA) == torch.bfloat16
    assert scoring_dtype(None, CPU) == torch.float32
    assert scoring_dtype("float64", CUDA) == scoring_dtype("float64", CPU) == torch.float64


@pytest.mark.parametrize("dtype, wide", [
    (torch.bfloat16, torch.float32), (torch.float16, torch.float32),
    (torch.float32, torch.float32), (torch.float64, torch.float64),
], ids=str)
def test_at_least_fp32_widens_only_what_is_narrower(dtype, wide):
    x = torch.tensor([1.5, -2.0], dtype=dtype)
    assert at_least_fp32(x).dtype == wide and torch.equal(at_least_fp32(x), x.to(wide))


def test_flat_ids_are_one_row_of_int64():
    row = flat_ids([np.array([1, 2], np.int32), np.array([3], np.int32)], CPU)
    assert row.dtype == torch.int64 and row.tolist() == [1, 2, 3]


def test_a_tensor_that_is_on_the_cpu_already_is_not_copied():
    x = torch.arange(3)
    assert to_device(x, CPU) is x and to_device(x, "cpu") is x


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_copy_to_cuda_holds_the_same_values():
    x = torch.arange(1000)
    assert to_device(x, CUDA).is_cuda and torch.equal(to_device(x, CUDA).cpu(), x)

"""runtime/cuda.py: attention of nested tensors, on a CUDA device or imitated on the CPU."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import random_qkv, slow_attention
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from model import attend
from runtime import cuda

# ---------------------------------------------------------------------------------------------
# Imitated on the CPU
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads, groups", [(4, 4), (4, 2)])
def test_nested_attention_equals_the_explicit_loop(heads, groups):
    """Bidirectional only: the kernel that torch uses for it on the CPU has no causal mask."""
    lengths = [2, 9, 1, 2]
    q, k, v = inputs = [t.requires_grad_() for t in random_qkv(lengths, heads, groups)]
    k, v = (t.repeat_interleave(heads // groups, dim=1) for t in (k, v))
    ours = cuda.attend(q, k, v, lengths, False, 0.0)
    slow = slow_attention(*inputs, lengths, False)
    torch.testing.assert_close(ours, slow, rtol=0, atol=1e-12)
    weights = torch.randn_like(slow)
    gradients = (torch.autograd.grad((out * weights).sum(), inputs) for out in (ours, slow))
    for our_gradient, slow_gradient in zip(*gradients):
        torch.testing.assert_close(our_gradient, slow_gradient, rtol=0, atol=1e-11)


def test_nested_attention_can_be_recomputed(monkeypatch):
    """Its sizes are the same again. The kernel is a stand-in: the CPU's cannot be recomputed."""
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, **_: q * k + v.square())
    lengths, inputs = [2, 9, 1, 2], [t.requires_grad_() for t in random_qkv([2, 9, 1, 2], 4, 4)]
    with torch.no_grad():  # an evaluation before
        cuda.attend(*(t.detach() for t in inputs), lengths, False, 0.0)
    outputs = [cuda.attend(*inputs, lengths, False, 0.0),
               checkpoint(cuda.attend, *inputs, lengths, False, 0.0, use_reentrant=False)]
    gradients = [torch.autograd.grad(out.square().sum(), inputs) for out in outputs]
    for kept, recomputed in zip(*gradients):
        assert torch.equal(kept, recomputed)


def test_equal_lengths_share_one_offsets_tensor():
    device = torch.device("cpu")
    offsets = cuda.offsets_of((2, 9, 1), device)
    assert offsets.tolist() == [0, 2, 11, 12]
    assert cuda.offsets_of((2, 9, 1), device) is offsets
    assert cuda.offsets_of((9, 2, 1), device) is not offsets


@pytest.mark.parametrize("dtype, capability, head_dim, fits", [
    (torch.bfloat16, (9, 0), 64, True), (torch.float16, (8, 0), 256, True),
    (torch.bfloat16, (7, 5), 64, False), (torch.bfloat16, (8, 0), 100, False),
    (torch.bfloat16, (8, 0), 264, False), (torch.float32, (7, 5), 100, True),
    (torch.float32, (9, 0), 6, False), (torch.float64, (9, 0), 64, False),
], ids=str)
def test_heads_go_to_the_fused_kernel_only_if_it_takes_them(
    dtype, capability, head_dim, fits, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    q = SimpleNamespace(device=torch.device("cuda"), dtype=dtype, shape=(5, 2, head_dim))
    assert cuda.takes_any_lengths(q) == fits
    with torch.inference_mode():  # in which nested tensors cannot be made
        assert not cuda.takes_any_lengths(q)
    q.device = torch.device("cpu")
    assert not cuda.takes_any_lengths(q)

# ---------------------------------------------------------------------------------------------
# On a CUDA device
# ---------------------------------------------------------------------------------------------


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@needs_cuda
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("heads, groups", [(8, 8), (8, 2)])
def test_flash_attention_equals_fp64_to_rounding(heads, groups, causal):
    lengths = [1, 300, 17, 128, 129, 5]
    random = torch.Generator().manual_seed(3)
    rounded = [torch.randn(sum(lengths), n, 64, generator=random).bfloat16()
               for n in (heads, groups, groups)]
    ours = [t.cuda().requires_grad_() for t in rounded]
    exact = [t.double().requires_grad_() for t in rounded]
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        outputs = attend(*ours, lengths, causal), attend(*exact, lengths, causal)
    for out in outputs:
        out.square().sum().backward()
    pairs = [outputs, *zip((t.grad for t in ours), (t.grad for t in exact))]
    for found, expected in pairs:
        assert (found.cpu() - expected).norm() <= 0.01 * expected.norm()


@needs_cuda
@pytest.mark.parametrize("size", [6, 100])
def test_heads_that_flash_attention_refuses_are_attended_all_the_same(size):
    q = torch.randn(70, 2, size, device="cuda").bfloat16()
    ours = attend(q, q, q, [50, 20], True)
    exact = attend(*[q.cpu().double()] * 3, [50, 20], True)
    assert (ours.cpu() - exact).norm() <= 0.02 * exact.norm()


@needs_cuda
def test_flash_attention_drops_its_weights_reproducibly():
    q = torch.zeros(2048, 4, 64, dtype=torch.bfloat16, device="cuda")
    rows = []
    for _ in range(2):
        torch.manual_seed(0)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            rows.append(attend(q, q, torch.ones_like(q), [256] * 8, False, dropout=0.25))
    assert torch.equal(*rows)
    values = rows[0].double()[:, :, 0]
    assert values.mean().item() == pytest.approx(1, abs=0.005)
    assert values.var().item() == pytest.approx(0.25 / 0.75 / 256, rel=0.1)

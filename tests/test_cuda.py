"""runtime/cuda.py and the rest on a CUDA device; without one, how FlashAttention is called."""

from types import SimpleNamespace

import pytest
import torch
from helpers import random_qkv
from torch.utils.checkpoint import checkpoint

import lora
from data.batches import SplitTexts
from model import EncoderConfig, attend, plain_encoder
from pretrain_ctkd import Config, ctkd
from runtime import cpu, cuda

LENGTHS = [1, 300, 17, 128, 129, 5]

# ---------------------------------------------------------------------------------------------
# Without a CUDA device
# ---------------------------------------------------------------------------------------------


def test_flash_attention_is_called_as_this_torch_declares_it():
    """It is no public function: another torch may have it with other arguments."""
    operation = torch.ops.aten._flash_attention_forward.default
    names = [argument.name for argument in operation._schema.arguments]
    assert names[:10] == ["query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k",
                          "dropout_p", "is_causal", "return_debug_mask"]
    assert all(argument.kwarg_only for argument in operation._schema.arguments[10:])
    q, k, v = (torch.empty(12, heads, 8, device="meta") for heads in (4, 2, 2))
    assert cuda.attend(q, k, v, [2, 9, 1], True, 0.0).shape == q.shape


def test_equal_lengths_share_one_offsets_tensor():
    device = torch.device("cpu")
    offsets = cuda.offsets_of((2, 9, 1), device)
    assert offsets.tolist() == [0, 2, 11, 12] and offsets.dtype == torch.int32
    assert cuda.offsets_of((2, 9, 1), device) is offsets
    assert cuda.offsets_of((9, 2, 1), device) is not offsets


@pytest.mark.parametrize("dtype, capability, head_dim, fits", [
    (torch.bfloat16, (9, 0), 64, True), (torch.float16, (8, 0), 256, True),
    (torch.bfloat16, (7, 5), 64, False), (torch.bfloat16, (8, 0), 100, False),
    (torch.bfloat16, (8, 0), 264, False), (torch.float32, (9, 0), 64, False),
    (torch.float64, (9, 0), 64, False),
], ids=str)
def test_heads_go_to_flash_attention_only_if_it_takes_them(
    dtype, capability, head_dim, fits, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    q = SimpleNamespace(device=torch.device("cuda"), dtype=dtype, shape=(5, 2, head_dim))
    assert cuda.takes_any_lengths(q) == fits
    q.device = torch.device("cpu")
    assert not cuda.takes_any_lengths(q)


# ---------------------------------------------------------------------------------------------
# On a CUDA device
# ---------------------------------------------------------------------------------------------


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@needs_cuda
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("heads, groups", [(8, 8), (8, 2)])
@pytest.mark.parametrize("recompute", [False, True])
def test_flash_attention_equals_fp64_to_rounding(heads, groups, causal, recompute):
    rounded = [t.bfloat16() for t in random_qkv(LENGTHS, heads, groups, size=64)]
    ours = [t.cuda().requires_grad_() for t in rounded]
    exact = [t.double().requires_grad_() for t in rounded]
    assert cuda.takes_any_lengths(ours[0])
    found = (checkpoint(attend, *ours, LENGTHS, causal, use_reentrant=False) if recompute else
             attend(*ours, LENGTHS, causal))
    outputs = found, attend(*exact, LENGTHS, causal)
    for out in outputs:
        out.square().sum().backward()
    pairs = [outputs, *zip((t.grad for t in ours), (t.grad for t in exact))]
    for found, expected in pairs:
        assert (found.cpu() - expected).norm() <= 0.01 * expected.norm()


@needs_cuda
@pytest.mark.parametrize("size, dtype, limit", [
    (6, torch.bfloat16, 0.02), (100, torch.bfloat16, 0.02), (64, torch.float32, 1e-4)])
def test_heads_that_flash_attention_refuses_are_attended_all_the_same(size, dtype, limit):
    q = torch.randn(70, 2, size, device="cuda").to(dtype)
    ours = attend(q, q, q, [50, 20], True)
    exact = attend(*[q.cpu().double()] * 3, [50, 20], True)
    assert (ours.cpu() - exact).norm() <= limit * exact.norm()


@needs_cuda
def test_flash_attention_drops_its_weights_reproducibly():
    q = torch.zeros(2048, 4, 64, dtype=torch.bfloat16, device="cuda")
    rows = []
    for _ in range(2):
        torch.manual_seed(0)
        rows.append(attend(q, q, torch.ones_like(q), [256] * 8, False, dropout=0.25))
    assert torch.equal(*rows)
    values = rows[0].double()[:, :, 0]
    assert values.mean().item() == pytest.approx(1, abs=0.005)
    assert values.var().item() == pytest.approx(0.25 / 0.75 / 256, rel=0.1)


@needs_cuda
def test_a_layers_dropout_has_its_share_and_is_repeated_in_the_backward_pass():
    x = torch.ones(1000, 300, device="cuda", requires_grad=True)
    weight, a = torch.zeros(300, 300, device="cuda"), torch.eye(300, device="cuda")
    y = lora.AdaptedLinear.apply(x, weight, None, a, a.clone().requires_grad_(), 1.0, 0.25)
    assert (y == 0).double().mean().item() == pytest.approx(0.25, abs=0.01)
    y.sum().backward()
    torch.testing.assert_close(y.unique(), torch.tensor([0, 4 / 3], device="cuda"))
    assert torch.equal(x.grad, y.detach())


@needs_cuda
@pytest.mark.parametrize("dtype, limit", [("float32", 1e-3), ("bfloat16", 0.2)])
def test_a_step_on_cuda_has_the_loss_and_gradients_of_fp64_on_the_cpu(dtype, limit):
    results = []
    for device, kind in (("cpu", torch.float64), ("cuda", getattr(torch, dtype))):
        config = EncoderConfig(num_memory_tokens=3)
        encoder = plain_encoder("demo", config, dtype=kind, device=device)
        lora.add_lora(encoder.llama, lora.LoraConfig(r=2))
        encoder.add_memory("mean", train_table=True)
        random = torch.Generator().manual_seed(0)  # its fp32 numbers, whatever the dtype
        for layer in lora.lora_layers(encoder.llama).values():
            for p in (layer.lora_A, layer.lora_B):
                p.data.copy_(0.05 * torch.randn(p.shape, generator=random))
        memory = encoder.memory_tokens.data
        memory.copy_(0.05 * torch.randn(memory.shape, generator=random))
        encoder.adapters = True
        batch = SplitTexts.read("demo", encoder.tokenizer, 4).read_batch(0, 0, 4)
        loss = ctkd(encoder, batch, Config())
        trained = [p for p in encoder.parameters() if p.requires_grad]
        results.append([loss.detach(), *torch.autograd.grad(loss, trained)])
    for expected, found in zip(*results):
        assert (found.cpu() - expected).norm() <= limit * expected.norm()


@needs_cuda
def test_bf16_norms_on_cuda_add_up_in_fp32():
    x = torch.randn(64, 2048, device="cuda").bfloat16()
    exact = cpu.normalise(x.cpu().double(), 1e-5)
    assert (cpu.normalise(x, 1e-5).cpu() - exact).norm() <= 3e-3 * exact.norm()

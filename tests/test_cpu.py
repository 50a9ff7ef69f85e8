"""runtime/cpu.py: dropout, gradients by hand, rows padded for oneDNN, bf16 attention, memory."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, random_qkv

import lora
from data.batches import SplitTexts
from model import EncoderConfig, attend, load_llama, plain_encoder
from pretrain_ctkd import Config, ctkd
from runtime import cpu

# ---------------------------------------------------------------------------------------------
# Dropout
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9, 1e-4])
@pytest.mark.parametrize("shape", [(999, 501), (1000, 500)])
def test_dropout_has_the_distribution_of_torchs_dropout(shape, p):
    """Zeros and the scale of the rest; no dependence between neighbours."""
    torch.manual_seed(0)
    x = torch.full(shape, 3.0, dtype=torch.float64).requires_grad_()
    y = cpu.dropout(x, p)
    kept = (y != 0).double()
    n = kept.numel()
    assert abs(kept.mean() - (1 - p)) < 5 * (p * (1 - p) / n) ** 0.5 + 2**-16
    assert y.unique().tolist() == pytest.approx([0, 3 / (1 - p)], rel=1e-4)
    for step in (1, 2, 3, 4, shape[1]):
        a, b = kept.flatten()[:-step], kept.flatten()[step:]
        both, alone = (a * b).mean(), kept.mean()
        assert abs(both - alone**2) < 5 * (alone * (1 - alone) / n) ** 0.5 + 1e-9
    y.sum().backward()
    assert torch.equal(x.grad, (y / 3).detach())


def test_dropout_of_nearly_everything_stays_finite():
    assert cpu.dropout(torch.ones(1000, 100), 0.9999999).isfinite().all()


def test_dropout_of_zero_draws_no_random_numbers():
    state = torch.get_rng_state()
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(cpu.dropout(x, 0.0), x)
    assert torch.equal(torch.get_rng_state(), state)


def test_other_devices_drop_by_a_mask_of_the_elements_shape(monkeypatch):
    monkeypatch.setattr(cpu, "is_cpu", lambda x: False)
    x = torch.ones(1000, 500)
    where = cpu.dropped(x, 0.3)
    assert where.shape == x.shape and where.dtype == torch.bool
    assert abs(where.double().mean() - 0.3) < 5 * (0.3 * 0.7 / x.numel()) ** 0.5
    assert torch.equal(cpu.zero(x, where) == 0, where)


# ---------------------------------------------------------------------------------------------
# Padded rows
# ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("rows, padded", [(1, 64), (64, 64), (65, 128), (200, 256)])
def test_bf16_rows_are_padded_with_zeros_to_a_multiple_of_64(rows, padded):
    x = torch.randn(rows, 3).bfloat16()
    found = cpu.pad_rows(x)
    assert len(found) == padded and torch.equal(found[:rows], x)
    assert found[rows:].count_nonzero() == 0
    for wider in (x.float(), x.double()):
        assert cpu.pad_rows(wider) is wider


def test_the_padding_of_a_pass_is_one_more_sequence_of_which_nothing_is_kept():
    x = torch.ones(70, 3, dtype=torch.bfloat16)
    padded, lengths, last = cpu.pad_pass(x, [60, 10], [2, 3])
    assert (len(padded), lengths, last) == (128, [60, 10, 58], [2, 3, 0])
    padded, lengths, last = cpu.pad_pass(x, [60, 10], None)
    assert (len(padded), lengths, last) == (128, [60, 10, 58], None)
    for whole in (x[:64], x.float()):
        assert cpu.pad_pass(whole, [60, 4], [1, 1]) == (whole, [60, 4], [1, 1])


@torch.no_grad()
def test_a_padded_bf16_pass_returns_the_states_of_its_own_rows(tiny):
    llama, lengths = load_llama(tiny, dtype=torch.bfloat16), [30, 7]
    x = llama.embed(torch.arange(37))
    states = llama(x, lengths, False)
    assert states.shape == (37, 32)
    exact = load_llama(tiny, dtype=torch.float64)(x.double(), lengths, False)
    assert (states - exact).norm() <= 0.02 * exact.norm()


@pytest.mark.parametrize("lengths, sizes, batches", [
    ([1], [32], [[0]]), ([32, 33, 31], [32, 64], [[0, 2], [1]]),
    ([512] * 3, [512, 512], [[0, 1], [2]]), ([9] * 7, [32] * 3, [[0, 1, 2, 3], [4, 5], [6]]),
    ([513, 7, 513], [32, 513, 513], [[1], [0], [2]]), ([600, 550], [550, 600], [[1], [0]]),
], ids=str)
def test_batches_of_1_2_4_have_sequences_padded_to_the_same_multiple_of_32(
    lengths, sizes, batches
):
    assert cpu.padded_batches(tuple(lengths)) == list(zip(sizes, batches))


@pytest.mark.parametrize("heads", [1, 3])
def test_heads_are_spread_over_padded_batches_and_collected_again(heads):
    """By hand: the second sequence (7 tokens) is in the first batch, as it is shorter."""
    places = cpu.places_of((40, 7), heads)
    x = torch.arange(1.0, 47 * heads + 1)[:, None].requires_grad_()
    found = cpu.Spread.apply(x, places)
    short, long = (t.view(heads, -1) for t in found.flatten().split([32 * heads, 64 * heads]))
    rows = x.detach().view(47, heads).T
    assert torch.equal(short, F.pad(rows[:, 40:], (0, 25)))
    assert torch.equal(long, F.pad(rows[:, :40], (0, 24)))
    assert torch.equal(cpu.Collect.apply(found, places), x)
    random = torch.Generator().manual_seed(0)
    weights, back = (torch.randn(len(t), 1, generator=random) for t in (found, x))
    assert torch.equal(torch.autograd.grad((found * weights).sum(), x)[0], weights[places.of])
    padded = found.detach().requires_grad_()
    (cpu.Collect.apply(padded, places) * back).sum().backward()
    assert torch.equal(padded.grad[places.of], back)
    assert padded.grad[places.empty].count_nonzero() == 0


# ---------------------------------------------------------------------------------------------
# Gradients by hand
# ---------------------------------------------------------------------------------------------


def doubles(*shape: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=random, dtype=torch.float64).requires_grad_()


def test_the_gradients_written_by_hand_are_those_of_finite_differences():
    assert torch.autograd.gradcheck(lambda x: cpu.normalise(x, 0.1), doubles(3, 5))
    assert torch.autograd.gradcheck(cpu.swiglu, (doubles(3, 5), 2 * doubles(3, 5)))


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("bias", [None, torch.arange(4.0, dtype=torch.float64)])
@pytest.mark.parametrize("on_cpu", [True, False], ids=["darts", "mask"])
def test_the_gradients_of_an_adapted_layer_are_those_of_finite_differences(
    p, bias, on_cpu, monkeypatch
):
    monkeypatch.setattr(cpu, "is_cpu", lambda x: on_cpu)
    weight = doubles(4, 6).detach()

    def layer(x, a, b):
        torch.manual_seed(1)  # finite differences need the same dropout
        return lora.AdaptedLinear.apply(x, weight, bias, a, b, 1.5, p)

    x, a, b = doubles(5, 6), doubles(2, 6), doubles(4, 2)
    assert torch.autograd.gradcheck(layer, (x, a, b))
    x = x.detach().T.contiguous().T
    found = layer(x, a, b)
    torch.manual_seed(1)
    kept = cpu.zero(x.clone(memory_format=torch.contiguous_format), cpu.dropped(x, p)) if p else x
    low = kept / (1 - p) @ a.T
    torch.testing.assert_close(found, F.linear(x, weight, bias) + 1.5 * low @ b.T)


def test_the_plain_forms_of_other_devices_compute_the_same(monkeypatch):
    """Loss and gradients of a CTKD step in fp64, with adapters that are not zero."""
    encoder = plain_encoder("demo", EncoderConfig(num_memory_tokens=3), dtype=torch.float64)
    random = torch.Generator().manual_seed(0)
    lora.add_lora(encoder.llama, lora.LoraConfig(r=2), random)
    for layer in lora.lora_layers(encoder.llama).values():
        torch.nn.init.normal_(layer.lora_B, std=0.02, generator=random)
    encoder.add_memory("normal", train_table=True, generator=random)
    encoder.adapters, results = True, []
    batch = SplitTexts.read("demo", encoder.tokenizer, 2).read_batch(0, 0, 2)
    for on_cpu in (True, False):
        monkeypatch.setattr(cpu, "is_cpu", lambda x: on_cpu)  # what cpu.py asks before each trick
        loss = ctkd(encoder, batch, Config())
        trained = [p for p in encoder.parameters() if p.requires_grad]
        results.append([loss.detach(), *torch.autograd.grad(loss, trained)])
    assert len(results[0]) > 70 and all(found.norm() > 0 for found in results[0])
    for found, expected in zip(*results):
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("ours, theirs", [
    (lambda x, up: cpu.normalise(x, 1e-5) * up, lambda x, up: F.rms_norm(x, (48,), eps=1e-5) * up),
    (cpu.swiglu, lambda gate, up: F.silu(gate) * up),
], ids=["norm", "SwiGLU"])
def test_bf16_norms_and_gates_and_their_gradients_equal_fp64_to_rounding(ours, theirs):
    rounded = [doubles(64, 48).detach().bfloat16(), doubles(48, 64).detach().T.bfloat16()]
    results = []
    for f, dtype in ((ours, torch.bfloat16), (theirs, torch.float64)):
        inputs = [t.to(dtype, copy=True).requires_grad_() for t in rounded]
        y = f(*inputs)
        results.append([y, *torch.autograd.grad(y, inputs, rounded[1].to(dtype))])
    for found, expected in zip(*results):
        assert found.dtype == torch.bfloat16
        assert (found - expected).norm() <= 5e-3 * expected.norm()


# ---------------------------------------------------------------------------------------------
# Attention in bf16
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("lengths", [[1], [32], [31, 33], [5, 5, 64, 2], [512], [513, 3],
                                     [3, 9, 1, 32, 5, 30, 7, 7, 2], [40] * 17], ids=str)
@pytest.mark.parametrize("heads, groups", [(4, 4), (4, 2)])
def test_bf16_attention_and_its_gradients_equal_fp64_to_rounding(lengths, heads, groups, causal):
    rounded = [t.bfloat16() for t in random_qkv(lengths, heads, groups)]
    ours, exact = ([t.to(dtype, copy=True).requires_grad_() for t in rounded]
                   for dtype in (torch.bfloat16, torch.float64))
    outputs = attend(*ours, lengths, causal), attend(*exact, lengths, causal)
    weights = torch.randn_like(outputs[1]).bfloat16()
    for out in outputs:
        (out * weights.to(out.dtype)).sum().backward()
    assert outputs[0].dtype == torch.bfloat16 and outputs[0].shape == outputs[1].shape
    pairs = [outputs, *zip((t.grad for t in ours), (t.grad for t in exact))]
    for found, expected in pairs:
        assert (found - expected).norm() <= 0.01 * expected.norm()


@pytest.mark.parametrize("lengths", [[20, 40], [20, *range(1, 8)]], ids=["apart", "in a group"])
def test_bf16_attention_ignores_the_next_sequence(lengths):
    q, k, v = (t.bfloat16() for t in random_qkv(lengths, 4, 4))
    before = attend(q, k, v, lengths, False)
    for t in (q, k, v):
        t[20:] = torch.nan
    after = attend(q, k, v, lengths, False)
    assert torch.equal(before[:20], after[:20]) and after[20:].isnan().all()


def test_bf16_attention_drops_its_weights():
    """With all weights 1 / L and v = 1, a row is the mean of L dropped ones."""
    lengths = [256] * 8
    q = torch.zeros(sum(lengths), 4, 8, dtype=torch.bfloat16)
    torch.manual_seed(0)
    rows = attend(q, q, torch.ones_like(q), lengths, False, dropout=0.25).double()[:, :, 0]
    assert rows.mean().item() == pytest.approx(1, abs=0.005)
    assert rows.var().item() == pytest.approx(0.25 / 0.75 / 256, rel=0.1)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("spread", [1, 4])
def test_bf16_attention_with_large_scores_stays_close_to_the_fused_kernel(spread, causal):
    """Scores of deviation `spread`^2; theirs are kept in fp32, ours rounded to bf16."""
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(200, 4, 64, generator=random) for _ in range(3))
    q, k, v = (spread * q).bfloat16(), (spread * k).bfloat16(), v.bfloat16()
    batch = [t.transpose(0, 1)[None] for t in (q, k, v)]
    fused = F.scaled_dot_product_attention(*batch, is_causal=causal)[0].transpose(0, 1)
    exact = attend(q.double(), k.double(), v.double(), [200], causal)
    off = [(out - exact).norm() / exact.norm() for out in (attend(q, k, v, [200], causal), fused)]
    assert max(off) <= (0.01 if spread == 1 else 0.05)


def test_bf16_attention_does_not_depend_on_a_long_neighbour():
    q, k, v = (t.bfloat16() for t in random_qkv([40, 600], 4, 4))
    beside = attend(q, k, v, [40, 600], False)[:40]
    assert torch.equal(beside, attend(q[:40], k[:40], v[:40], [40], False))


# ---------------------------------------------------------------------------------------------
# Memory that the allocator keeps
# ---------------------------------------------------------------------------------------------

FAULTS = """
import resource, sys, torch
from runtime.cpu import give_back_freed_memory, keep_freed_memory
keep_freed_memory()
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() >> 20
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for turn in range(6):
    before = faults()
    for mebibytes in (20, 60, 40):
        torch.ones(mebibytes << 18)
print(faults() - before)
held = [torch.ones(1 << 18) for _ in range(200)][::2]  # every other MiB is free
before = resident()
give_back_freed_memory()
print(before - resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc's allocator")
@pytest.mark.parametrize(
    "environment, kept", [({}, True), ({"MALLOC_MMAP_THRESHOLD_": "65536"}, False)]
)
def test_freed_memory_is_kept_until_given_back_unless_the_environment_says_otherwise(
        environment, kept):
    """120 MiB are 30,720 pages: as many faults if the system has to map them again."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    done = subprocess.run([sys.executable, "-c", FAULTS], cwd=ROOT, env={**clean, **environment},
                          capture_output=True, text=True, check=True)
    faults, given_back = map(int, done.stdout.split())
    assert (faults < 30) == kept  # 60 where pages are of 2 MiB
    assert (given_back > 90) == kept  # of 100 MiB in holes

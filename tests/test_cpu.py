"""runtime/cpu.py: dropout, rows padded for oneDNN, bf16 attention, the allocator's settings."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, random_qkv

from model import attend, load_llama
from runtime import cpu

# ---------------------------------------------------------------------------------------------
# Dropout
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9, 1e-4])
@pytest.mark.parametrize("shape", [(999, 501), (1000, 500)])
def test_dropout_has_the_distribution_of_torchs_dropout(shape, p):
    """Zeros and the scale of the rest; no dependence between the elements that share a number."""
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


@pytest.mark.parametrize("lengths, sizes", [
    ([1], [1]), ([600] * 9, [1] * 9), ([65] * 8, [1] * 8), ([32] * 16, [8, 8]),
    ([5] * 20, [8, 8, 1, 1, 1, 1]), ([33, 64, 40, 50] * 2 + [40], [8, 1]),
    ([7, 32, 1] * 3 + [33] * 8, [8, 1, 8]), ([5, 40] * 8, [1] * 16),
], ids=lambda values: f"{len(values)} {values[:2]}")
def test_short_neighbours_of_similar_length_share_a_product_by_eights(lengths, sizes):
    groups = cpu.length_groups(lengths)
    assert [len(group) for group in groups] == sizes
    assert [n for group in groups for n in group] == lengths


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
    assert off[1] <= off[0] <= (0.01 if spread == 1 else 0.05)


def test_bf16_attention_does_not_depend_on_a_long_neighbour():
    q, k, v = (t.bfloat16() for t in random_qkv([40, 600], 4, 4))
    beside = attend(q, k, v, [40, 600], False)[:40]
    assert torch.equal(beside, attend(q[:40], k[:40], v[:40], [40], False))


# ---------------------------------------------------------------------------------------------
# Memory that the allocator keeps
# ---------------------------------------------------------------------------------------------

FAULTS = """
import resource, sys, torch
from runtime.cpu import keep_freed_memory
keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for turn in range(6):
    before = faults()
    for mebibytes in (20, 60, 40):
        torch.ones(mebibytes << 18)
print(faults() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc's allocator")
@pytest.mark.parametrize(
    "environment, kept", [({}, True), ({"MALLOC_MMAP_THRESHOLD_": "65536"}, False)]
)
def test_freed_memory_is_kept_unless_the_environment_says_otherwise(environment, kept):
    """120 MiB are 30,720 pages: as many faults if the system has to map them again."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    done = subprocess.run([sys.executable, "-c", FAULTS], cwd=ROOT, env={**clean, **environment},
                          capture_output=True, text=True, check=True)
    assert (int(done.stdout) < 30) == kept  # 60 where pages are of 2 MiB

"""The fast path against paper.py, the paper's equations written out for one text at a time."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import CTKD, ROOT, ctkd_step, gradients, run_of, worst

import paper
import pretrain_ctkd
from collapse import correlation
from contrastive import info_nce
from data.batches import SplitBatch
from lora import lora_layers


@pytest.fixture(scope="module")
def causal_encoder(ctkd_encoder):
    """The same encoder, whose memory tokens see what stands before them only."""
    encoder = pretrain_ctkd.new_encoder(CTKD, run_of(CTKD))
    encoder.load_state_dict(ctkd_encoder.state_dict())
    encoder.config = replace(encoder.config, attention="causal")
    return encoder


@pytest.fixture(params=["bidirectional", "causal"])
def encoder(request, ctkd_encoder, causal_encoder):
    return ctkd_encoder if request.param == "bidirectional" else causal_encoder


def as_tensors(texts: list) -> list[torch.Tensor]:
    return [torch.from_numpy(ids).long() for ids in texts]


def test_the_adapters_of_these_tests_are_at_work(ctkd_encoder):
    layers = lora_layers(ctkd_encoder.llama).values()
    assert all(layer.lora_B.abs().max() > 0.01 for layer in layers) and len(layers) > 10


@pytest.mark.parametrize("chunk_rows", [1, 7, 100_000])
@pytest.mark.parametrize("objective", ["ctkd", "nll", "rc", "ctkd-window"])
def test_an_objective_has_the_papers_loss_and_gradient(encoder, id_texts, objective, chunk_rows):
    config = replace(CTKD, objective=objective, chunk_rows=chunk_rows)
    if chunk_rows == 1:
        config = replace(config, batch_size=2)
    losses, batch = ctkd_step(encoder, id_texts, config, step=1)
    ours = gradients(encoder)
    loss = paper.batch_loss(encoder, encoder.llama, as_tensors(batch.texts), batch.splits,
                            objective)
    loss.backward()
    assert losses.sum().item() == pytest.approx(loss.item(), rel=1e-10)
    assert worst(ours, gradients(encoder)) < 1e-10


# continuations of 10 to 14 tokens have at most half of their rows left out, from 15 on 8 of them;
# 41 and 60 are cut
LENGTHS = [10, 13, 14, 15, 16, 39, 40, 41, 60]


def window_batch(texts: list) -> SplitBatch:
    """`texts` whose continuations have LENGTHS, in a global batch of 11."""
    splits = [len(ids) - size for ids, size in zip(texts, LENGTHS)]
    places = list(range(len(texts)))
    return SplitBatch(texts, splits, places, places, 11, 0, 0)


def window_texts() -> list[np.ndarray]:
    draw = np.random.default_rng(1)
    return [np.concatenate(([1], draw.integers(3, 8192, 12 + size))).astype(np.int32)
            for size in LENGTHS]


def test_ctkd_window_at_every_length_of_a_continuation(encoder):
    batch = window_batch(window_texts())
    loss = pretrain_ctkd.ctkd_window(encoder, batch, CTKD)
    loss.backward()
    ours = gradients(encoder)
    by_paper = [paper.ours_ctkd_window(encoder, encoder.llama, n, a)
                for n, a in zip(as_tensors(batch.texts), batch.splits)]
    assert [len(rows) for rows in by_paper] == [6, 7, 8, 8, 9, 32, 33, 33, 33]
    whole = sum(rows.mean() for rows in by_paper) / 11
    whole.backward()
    assert loss.item() == pytest.approx(whole.item(), rel=1e-10)
    assert worst(ours, gradients(encoder)) < 1e-10


@torch.no_grad()
def test_ctkd_window_reads_40_tokens_of_a_continuation(encoder):
    def loss(place: int | None = None) -> float:
        texts = window_texts()
        if place is not None:
            texts[-1][13 + place] += 1  # the text whose continuation has 60 tokens
        return pretrain_ctkd.ctkd_window(encoder, window_batch(texts), CTKD).item()

    assert loss(40) == loss(59) == loss() and loss(39) != loss() and loss(0) != loss()


@torch.no_grad()
def test_eq_1_memories_of_packed_texts_are_those_of_each_text_alone(encoder, id_texts):
    texts = as_tensors(id_texts.texts[:5])
    fast = encoder.memory(torch.cat(texts), [len(n) for n in texts])
    by_paper = torch.stack([paper.eq1_memory(encoder, n) for n in texts])
    assert fast.shape == (5, 3, encoder.table.shape[1])
    assert (fast - by_paper).abs().max() < 1e-12 * by_paper.abs().max()


@torch.no_grad()
def test_causal_and_bidirectional_memories_differ(ctkd_encoder, causal_encoder, id_texts):
    (n,) = as_tensors(id_texts.texts[:1])
    both, before = (paper.eq1_memory(encoder, n) for encoder in (ctkd_encoder, causal_encoder))
    assert (both - before).abs().max() > 0.01


@torch.no_grad()
def test_eq_6_the_embedding_is_the_mean_of_the_memories(encoder, id_texts):
    texts = as_tensors(id_texts.texts[:5])
    z = encoder.embed(torch.cat(texts), [len(n) for n in texts])
    by_paper = torch.stack([paper.eq6_embedding(paper.eq1_memory(encoder, n)) for n in texts])
    assert (z - by_paper).abs().max() < 1e-12 * by_paper.abs().max()


def test_eq_7_correlation_of_memory_rows():
    memories = torch.randn(6, 4, 16, generator=torch.Generator().manual_seed(0)).double()
    total, _ = correlation(memories.numpy())
    by_paper = paper.eq7_correlation(memories)
    assert by_paper.shape == (4, 4)
    assert (torch.tensor(total) / 6 - by_paper).abs().max() < 1e-12 * by_paper.abs().max()


@pytest.mark.parametrize("rows, keys, tau", [(8, 8, 0.05), (8, 16, 0.05), (2, 2, 0.02),
                                             (5, 10, 1.0)])
def test_eq_8_info_nce_and_its_gradient(rows, keys, tau):
    draw = torch.Generator().manual_seed(rows + keys)
    z, k = (torch.randn(n, 7, generator=draw, dtype=torch.float64, requires_grad=True)
            for n in (rows, keys))
    ours = info_nce(z, k, tau, torch.zeros(rows, keys, dtype=torch.bool))
    by_paper = paper.eq8_info_nce(z, k, tau)
    assert abs(ours - by_paper) <= 1e-12 * by_paper.abs().clamp_min(1)
    for a, b in zip(torch.autograd.grad(ours, (z, k)), torch.autograd.grad(by_paper, (z, k))):
        assert (a - b).abs().max() <= 1e-10


def test_as_a_command_paper_py_prints_differences_of_rounding_only():
    done = subprocess.run([sys.executable, "paper.py"], cwd=ROOT, capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0, done.stderr
    head, *lines = done.stdout.splitlines()
    assert head.split() == ["first", "entry", "paper.py", "fast", "path"]
    assert [line[:11].strip() for line in lines] == [
        "ctkd", "nll", "rc", "ctkd-window", "memory", "z", "Eq. 7", "InfoNCE"]
    for line in lines:
        *_, by_paper, by_fast, _, _, difference = line.split()
        assert float(difference) < 1e-9
        assert float(by_paper) == pytest.approx(float(by_fast), abs=1e-9) and float(by_paper) != 0

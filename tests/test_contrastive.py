"""Stages 2 and 3: the loss and its gradient, however the batch is split; the diagnostics."""

import multiprocessing
import os
import random
import socket
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TEXT
from safetensors.torch import load_file, save_file

import contrastive
from contrastive import Batch, Config, batch_gradient, diagnostics, effective_dimension
from contrastive import info_nce, same_texts
from lora import LoraConfig, add_lora, lora_layers
from model import EncoderConfig, flat_ids, plain_encoder
from training import Ranks, leave_ranks, reduce_gradients, start_ranks, trained_of

ALONE = Ranks(0, 1, torch.device("cpu"))


def words(count: int, seed: int, low=3, high=30) -> list[str]:
    """Random texts of `low` to `high` words."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(TEXT.split(), k=draw.randint(low, high))) for _ in range(count)]


def tiny_encoder(folder: Path, dropout=0.0):
    """A float64 encoder with memory tokens and an adapter whose B is not zero, in training mode."""
    encoder = plain_encoder(folder, EncoderConfig(num_memory_tokens=2, max_tokens=64),
                            dtype=torch.float64)
    draw = torch.Generator().manual_seed(1)
    encoder.add_memory("normal", train_table=False, generator=draw)
    encoder.requires_grad_(False)
    add_lora(encoder.llama, LoraConfig(r=4, alpha=8, dropout=dropout), draw)
    for layer in lora_layers(encoder.llama).values():
        layer.lora_B.data.normal_(generator=draw).mul_(0.3)
    encoder.adapters = True
    return encoder.train()


def make_batch(encoder, stage: str, rows: int) -> Batch:
    """A batch of random texts; two rows of it share their positive."""
    queries = encoder.tokenize(words(rows, 0))[0]
    keys = queries
    if stage == "scl":
        positives = words(rows, 1)
        positives[1] = positives[0]
        negatives = words(rows, 2)
        negatives[2] = positives[4]
        keys = encoder.tokenize(positives + negatives)[0]
    else:
        queries[1] = queries[0]
    return Batch(queries, keys, same_texts(keys, rows), list(range(rows)), list(range(len(keys))))


def gradient(encoder, batch, config, ranks=ALONE) -> dict[str, torch.Tensor]:
    """Name -> summed gradient of every trained tensor, and the loss."""
    loss, *_ = batch_gradient(encoder, batch, config, 3, ranks)
    trained = trained_of(encoder)
    reduce_gradients(list(trained.values()), ranks)
    found = {name: p.grad.clone() for name, p in trained.items()}
    encoder.zero_grad()
    return {**found, "loss": loss.reshape(1)}


def assert_equal(left: dict, right: dict, tolerance=1e-10):
    """Every tensor alike, in value and in norm, and none of them zero."""
    assert left.keys() == right.keys() and len(left) > 10
    for name in left:
        assert left[name].norm() > 1e-6, name
        assert (left[name] - right[name]).abs().max() <= tolerance, name
        assert abs(left[name].norm() / right[name].norm() - 1) <= tolerance, name


def plain_loss(queries, keys, temperature: float, texts: list) -> torch.Tensor:
    """InfoNCE by loops: key j is left out for row i where it has the text of i's positive."""
    total = 0.0
    for i, query in enumerate(queries):
        shares = {}
        for j, key in enumerate(keys):
            if j == i or texts[j] != texts[i]:
                cosine = (query @ key) / (query.norm() * key.norm())
                shares[j] = (cosine / temperature).exp()
        total = total - (shares[i] / sum(shares.values())).log()
    return total / len(queries)


# ---------------------------------------------------------------------------------------------
# The loss
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows, extra, temperature", [(8, 0, 0.05), (8, 8, 0.05), (5, 9, 1.0),
                                                      (2, 0, 0.02), (6, 3, 0.5)])
def test_info_nce_is_the_plain_sum(rows, extra, temperature):
    draw = torch.Generator().manual_seed(rows + extra)
    queries = torch.randn(rows, 7, generator=draw, dtype=torch.float64, requires_grad=True)
    keys = torch.randn(rows + extra, 7, generator=draw, dtype=torch.float64, requires_grad=True)
    names = torch.randint(0, rows + 1, (rows + extra,), generator=draw).tolist()
    ids = [np.array([1, name], dtype=np.int32) for name in names]
    excluded = same_texts(ids, rows)
    ours = info_nce(queries, keys, temperature, excluded)
    plain = plain_loss(queries, keys, temperature, names)
    assert abs(ours - plain) <= 1e-12 * plain.abs().clamp_min(1)
    for a, b in zip(torch.autograd.grad(ours, (queries, keys)),
                    torch.autograd.grad(plain, (queries, keys))):
        assert (a - b).abs().max() <= 1e-10
    assert excluded.sum() == sum(names[i] == names[j] for i in range(rows)
                                 for j in range(rows + extra) if i != j)


def test_lengths_of_embeddings_do_not_count():
    draw = torch.Generator().manual_seed(0)
    q, k = torch.randn(4, 5, generator=draw), torch.randn(8, 5, generator=draw)
    none = torch.zeros(4, 8, dtype=torch.bool)
    scale = torch.tensor([0.1, 1, 10, 100]).unsqueeze(1)
    assert torch.allclose(info_nce(q, k, 0.05, none), info_nce(q * scale, k * 3, 0.05, none))


def test_a_key_with_the_text_of_a_rows_positive_is_masked_for_that_row_only():
    keys = [np.array(ids, dtype=np.int32) for ids in ([1, 5], [1, 6], [1, 5], [1, 7], [1, 6],
                                                      [1, 8])]
    excluded = same_texts(keys, 3)  # three positives, three hard negatives
    assert excluded.nonzero().tolist() == [[0, 2], [1, 4], [2, 0]]


# ---------------------------------------------------------------------------------------------
# The gradient, however the batch is split
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["ucl", "scl"])
def test_micro_batches_of_any_size_give_the_gradient_of_the_batch_in_one_piece(tiny, stage):
    encoder = tiny_encoder(tiny)
    batch = make_batch(encoder, stage, 64)
    config = Config(attention_dropout=0.0, temperature=0.05)
    z = [encoder.embed(flat_ids([ids], "cpu"), [len(ids)])[0]
         for ids in batch.queries + batch.keys]
    texts = [ids.tobytes() for ids in batch.keys]
    loss = plain_loss(z[:64], z[64:], 0.05, texts)  # texts one by one, the loss by loops
    loss.backward()
    expected = {name: p.grad.clone() for name, p in trained_of(encoder).items()}
    expected["loss"] = loss.detach().reshape(1)
    encoder.zero_grad()
    assert batch.excluded.sum() >= 2
    for micro_tokens in (10**6, 2048, 333, 64, 1):
        found = gradient(encoder, batch, replace(config, micro_tokens=micro_tokens))
        assert_equal(found, expected)


def test_with_dropout_a_recomputed_micro_batch_repeats_its_forward(tiny, monkeypatch):
    encoder = tiny_encoder(tiny, dropout=0.1)
    batch = make_batch(encoder, "ucl", 16)
    config = Config(attention_dropout=0.2, micro_tokens=128)
    found = gradient(encoder, batch, config)
    monkeypatch.setattr(contrastive, "checkpoint", lambda function, *inputs, **_: function(*inputs))
    assert_equal(found, gradient(encoder, batch, config))
    monkeypatch.undo()
    other = gradient(encoder, batch, replace(config, seed=1))
    assert abs(other["loss"] - found["loss"]) > 1e-4  # the dropout is another one


def test_only_the_last_micro_batch_keeps_its_activations(tiny, monkeypatch):
    encoder, calls = tiny_encoder(tiny), []
    batch = make_batch(encoder, "scl", 16)
    original = contrastive.checkpoint

    def count(*inputs, **options):
        calls.append(options)
        return original(*inputs, **options)

    monkeypatch.setattr(contrastive, "checkpoint", count)
    forwards = []
    hook = encoder.llama.model["layers"][0].register_forward_pre_hook(
        lambda *_: forwards.append(1))
    gradient(encoder, batch, Config(micro_tokens=256, attention_dropout=0.0))
    assert calls and all(options == {"use_reentrant": False} for options in calls)
    assert len(forwards) == 2 * len(calls) + 1
    hook.remove()


def test_ucl_sees_two_dropout_masks_of_the_same_text(tiny):
    encoder = tiny_encoder(tiny, dropout=0.1)
    batch = make_batch(encoder, "ucl", 8)
    for lora, attention, differ in ((0.0, 0.0, False), (0.1, 0.0, True), (0.0, 0.2, True)):
        for layer in lora_layers(encoder.llama).values():
            layer.dropout = lora
        _, queries, keys = batch_gradient(
            encoder, batch, Config(attention_dropout=attention, micro_tokens=10**6), 0, ALONE)
        distance = (queries - keys).norm(dim=1)
        assert (distance > 1e-3).all() if differ else (distance < 1e-12).all()


def rank_gradient(rank, size, port, folder, stage, rows, dropout, settings, out):
    """The work of one process: its part of the gradient, summed; rank 0 writes it down."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
    ranks = start_ranks("cpu", 1, 2)
    encoder = tiny_encoder(folder, dropout)
    found = gradient(encoder, make_batch(encoder, stage, rows), Config(**settings), ranks)
    if rank == 0:
        save_file(found, out)
    leave_ranks(ranks)
    threads = [Path(task, "comm").read_text() for task in Path("/proc/self/task").glob("*")]
    assert not any("gloo" in name for name in threads)  # one that is left may abort the exit


def over_processes(size: int, *arguments) -> dict[str, torch.Tensor]:
    """The gradient that `size` processes make together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn = multiprocessing.get_context("spawn")
    workers = [spawn.Process(target=rank_gradient, args=(rank, size, port, *arguments))
               for rank in range(size)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    return load_file(arguments[-1])


@pytest.mark.parametrize("size, stage, rows, dropout, micro_tokens", [
    (2, "scl", 64, 0.0, 300), (3, "ucl", 64, 0.0, 300), (3, "scl", 7, 0.0, 200),
    (3, "scl", 5, 0.0, 10**6),  # one micro-batch: two ranks have nothing to embed
    (2, "ucl", 24, 0.1, 200), (3, "scl", 16, 0.1, 150),  # dropout on, the same micro-batches
])
def test_any_number_of_processes_gives_the_gradient_of_one(
    tiny, tmp_path, size, stage, rows, dropout, micro_tokens
):
    settings = {"attention_dropout": 2 * dropout, "micro_tokens": micro_tokens}
    encoder = tiny_encoder(tiny, dropout)
    expected = gradient(encoder, make_batch(encoder, stage, rows), Config(**settings))
    found = over_processes(size, tiny, stage, rows, dropout, settings, tmp_path / "gradient")
    assert_equal(found, expected)


# ---------------------------------------------------------------------------------------------
# What is logged of a batch
# ---------------------------------------------------------------------------------------------


def test_the_effective_dimension_is_the_participation_ratio_of_the_eigenvalues():
    draw = np.random.default_rng(0)
    for n, d in ((50, 8), (8, 50), (200, 20)):
        x = draw.normal(size=(n, d)) * draw.exponential(size=d)
        eigenvalues = np.linalg.eigvalsh(np.cov(x.T))
        expected = eigenvalues.sum() ** 2 / (eigenvalues**2).sum()
        assert abs(effective_dimension(torch.from_numpy(x)) - expected) < 1e-9 * expected
    line = torch.outer(torch.arange(5.0), torch.tensor([1.0, -2.0, 3.0]))
    assert abs(effective_dimension(line + 7) - 1) < 1e-5
    assert effective_dimension(torch.ones(4, 3)) == 0
    axes = torch.cat((torch.eye(6), -torch.eye(6)))
    assert abs(effective_dimension(axes) - 6) < 1e-5


def test_alignment_uniformity_and_accuracy_are_the_plain_loops():
    draw = torch.Generator().manual_seed(5)
    queries = torch.randn(9, 4, generator=draw, dtype=torch.float64)
    keys = torch.randn(14, 4, generator=draw, dtype=torch.float64)
    keys[:5] = 3 * queries[:5] + 0.1 * keys[:5]  # five pairs are near
    excluded = torch.zeros(9, 14, dtype=torch.bool)
    found = diagnostics(queries, keys, 0.05, excluded)
    q = [x / x.norm() for x in queries]
    k = [x / x.norm() for x in keys]
    assert abs(found["alignment"] - sum((q[i] - k[i]).norm() ** 2 for i in range(9)) / 9) < 1e-12
    pairs = [(-2 * (k[i] - k[j]).norm() ** 2).exp() for i in range(9) for j in range(i)]
    assert abs(found["uniformity"] - (sum(pairs) / len(pairs)).log()) < 1e-12
    hits = [max(range(14), key=lambda j: q[i] @ k[j]) == i for i in range(9)]
    assert 5 / 9 <= found["accuracy"] == sum(hits) / 9 < 1
    for i in range(9):  # whatever else is nearest is left out: now all are right
        for j in range(14):
            excluded[i, j] = j != i and q[i] @ k[j] > q[i] @ k[i]
    assert diagnostics(queries, keys, 0.05, excluded)["accuracy"] == 1

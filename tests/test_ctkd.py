"""The three objectives against plain float64 loops, and gradients over any split of a batch."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import pretrain_ctkd as stage1
import readable
from lora import lora_layers
from training import Ranks, generator, global_batch, learning_rate

ROOT = Path(__file__).parent.parent
ONE = Ranks(0, 1, torch.device("cpu"))
CONFIG = stage1.Config(
    **{**stage1.PRESETS["demo"], "batch_size": 8, "dtype": "float64", "lora_dropout": 0.0}
)


@pytest.fixture(scope="module")
def encoder():
    """The demo Llama in float64 with adapters whose B is not zero."""
    encoder = stage1.new_encoder(replace(CONFIG, memory_tokens=3), ONE)
    random = torch.Generator().manual_seed(1)
    for layer in lora_layers(encoder.llama).values():
        layer.lora_B.data.normal_(std=0.02, generator=random)
    return encoder


@pytest.fixture(scope="module")
def corpus():
    """32 rows of random token ids with BOS, of unequal lengths."""
    random = np.random.default_rng(0)
    return [np.concatenate(([1], random.integers(3, 8192, n))).astype(np.int32)
            for n in random.integers(20, 70, 32)]


def gradient(encoder):
    out = {n: p.grad.clone() for n, p in encoder.named_parameters() if p.grad is not None}
    encoder.zero_grad(set_to_none=True)
    return out


def step_gradient(encoder, corpus, config, step=1):
    losses, _ = stage1.batch_gradient(encoder, corpus, config, step, ONE)
    return losses.sum().item(), gradient(encoder)


def worst(left, right):
    """Largest difference relative to the largest entry of each tensor."""
    assert left.keys() == right.keys() and len(left) > 10
    return max(((left[n] - right[n]).abs().max() / right[n].abs().max()).item() for n in left)


@pytest.mark.parametrize("chunk_rows", [1, 7, 100_000])
@pytest.mark.parametrize("objective", ["ctkd", "nll", "rc"])
def test_objective_equals_the_plain_loop(encoder, corpus, objective, chunk_rows):
    config = replace(CONFIG, objective=objective, chunk_rows=chunk_rows, memory_tokens=3)
    if chunk_rows == 1:
        config = replace(config, batch_size=2)
    value, ours = step_gradient(encoder, corpus, config)
    places = range(config.batch_size, 2 * config.batch_size)  # those of step 1
    batch = [corpus[i] for i in global_batch(config.seed, 1, config.batch_size, len(corpus))]
    splits = [stage1.split_point(config, p, len(ids)) for p, ids in zip(places, batch)]
    loss = readable.stage1_loss(encoder, batch, splits, objective)
    loss.backward()
    assert value == pytest.approx(loss.item(), rel=1e-10)
    assert worst(ours, gradient(encoder)) < 1e-10


def test_nll_weight_adds_the_token_mean_of_the_cross_entropy(encoder, corpus):
    kl, nll, both = (step_gradient(encoder, corpus, replace(CONFIG, memory_tokens=3, **change))[0]
                     for change in ({}, {"objective": "nll"}, {"nll_weight": 0.25}))
    assert both == pytest.approx(kl + 0.25 * nll, rel=1e-12)


def test_recomputed_activations_give_the_same_gradient_dropout_included(encoder, corpus):
    config = replace(CONFIG, memory_tokens=3)
    for layer in lora_layers(encoder.llama).values():
        layer.dropout = 0.5
    calls, block = [], encoder.llama.model.layers[0]
    handle = block.register_forward_pre_hook(lambda *_: calls.append(1))
    value, kept = step_gradient(encoder, corpus, config)
    assert len(calls) == 3  # encoder, student, teacher
    encoder.llama.recompute = True
    again, recomputed = step_gradient(encoder, corpus, config)
    assert len(calls) == 3 + 5  # all but the teacher twice
    encoder.llama.recompute = False
    handle.remove()
    for layer in lora_layers(encoder.llama).values():
        layer.dropout = 0.0
    assert again == value and all(torch.equal(kept[n], recomputed[n]) for n in kept)
    assert value != step_gradient(encoder, corpus, config)[0]


@pytest.mark.parametrize("objective", ["ctkd", "nll", "rc"])
@pytest.mark.parametrize("micro_batch", [1, 2, 3])
def test_micro_batches_do_not_change_the_gradient(encoder, corpus, objective, micro_batch):
    config = replace(CONFIG, objective=objective, memory_tokens=3)
    value, whole = step_gradient(encoder, corpus, config)
    parts_value, parts = step_gradient(encoder, corpus, replace(config, micro_batch=micro_batch))
    assert parts_value == pytest.approx(value, rel=1e-12)
    assert worst(parts, whole) < 1e-10


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("objective", ["ctkd", "nll", "rc"])
def test_a_gradient_on_cuda_never_waits_for_the_device(corpus, objective):
    ranks = Ranks(0, 1, torch.device("cuda"))
    config = replace(CONFIG, objective=objective, dtype="bfloat16", lora_dropout=0.05)
    encoder = stage1.new_encoder(config, ranks)
    stage1.batch_gradient(encoder, corpus, config, 0, ranks)  # compiles, allocates
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses, _ = stage1.batch_gradient(encoder, corpus, config, 1, ranks)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert losses.isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_recomputation_and_encoding_on_cuda(corpus):
    config = replace(CONFIG, dtype="bfloat16", lora_dropout=0.05)
    ranks, gradients = Ranks(0, 1, torch.device("cuda")), []
    for recompute in (False, True):
        encoder = stage1.new_encoder(replace(config, recompute=recompute), ranks)
        stage1.batch_gradient(encoder, corpus, config, 1, ranks)
        gradients.append(gradient(encoder))
    assert worst(*gradients) < 1e-2
    on_cpu = stage1.new_encoder(config, ONE)
    texts = ["A bird sings.", "", "Rain falls on the hills all night. " * 20]
    there, here = encoder.encode(texts), on_cpu.encode(texts)
    cosines = (there * here).sum(1) / np.linalg.norm(there, axis=1) / np.linalg.norm(here, axis=1)
    assert cosines.min() > 0.999


RANK_PROGRAM = """
import json, sys, torch
sys.path.insert(0, sys.argv[1])
import pretrain_ctkd as stage1
from safetensors.torch import load_file, save_file
from training import reduce_gradients, start_ranks
folder, micro_batch = sys.argv[2], int(sys.argv[3])
ranks = start_ranks("cpu", 1, 2.0)
for objective in ("ctkd", "nll", "rc"):
    config = stage1.Config(**{**json.load(open(folder + "/config.json")), "objective": objective,
                              "micro_batch": micro_batch})
    encoder = stage1.new_encoder(config, ranks)
    start = load_file(folder + "/start.safetensors")
    parameters = {n: p for n, p in encoder.named_parameters() if p.requires_grad}
    for name, p in parameters.items():
        p.data.copy_(start[name])
    flat, lengths = (t.numpy() for t in map(load_file(folder + "/corpus.safetensors").get,
                                            ("ids", "lengths")))
    corpus = [flat[e - n : e] for e, n in zip(lengths.cumsum(), lengths)]
    losses, _ = stage1.batch_gradient(encoder, corpus, config, 1, ranks)
    reduce_gradients(list(parameters.values()), ranks)
    if ranks.rank == 0:
        save_file({n: p.grad for n, p in parameters.items()},
                  f"{folder}/{objective}-{ranks.size}-{micro_batch}.safetensors")
"""


@pytest.mark.parametrize("processes, micro_batch", [(2, 0), (3, 2)])
def test_ranks_do_not_change_the_gradient(encoder, corpus, tmp_path, processes, micro_batch):
    """One rank x 8 = two ranks x 4 = three ranks with uneven shares, in micro-batches of 2."""
    (tmp_path / "config.json").write_text(json.dumps(vars(replace(CONFIG, memory_tokens=3))))
    save_file({n: p.data for n, p in encoder.named_parameters() if p.requires_grad},
              tmp_path / "start.safetensors")
    save_file({"ids": torch.from_numpy(np.concatenate(corpus)),
               "lengths": torch.tensor([len(c) for c in corpus])},
              tmp_path / "corpus.safetensors")
    (tmp_path / "program.py").write_text(RANK_PROGRAM)
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
         str(processes), str(tmp_path / "program.py"), str(ROOT), str(tmp_path), str(micro_batch)],
        check=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    for objective in ("ctkd", "nll", "rc"):
        config = replace(CONFIG, memory_tokens=3, objective=objective)
        _, whole = step_gradient(encoder, corpus, config)
        ranks = load_file(tmp_path / f"{objective}-{processes}-{micro_batch}.safetensors")
        assert worst(ranks, whole) < 1e-10


def random_rows(rows=9, size=16, vocabulary=40, scale=1.0):
    random = torch.Generator().manual_seed(0)
    shapes = (rows, size), (rows, size), (vocabulary, size)
    return [scale * torch.randn(s, generator=random, dtype=torch.float64) for s in shapes]


def test_ctkd_is_zero_when_the_student_is_the_teacher():
    student, _, head = random_rows()
    student.requires_grad_()
    loss = stage1.ctkd_loss(student, student.detach(), torch.ones(9), head)
    loss.backward()
    assert loss.item() == 0 and student.grad.abs().max() < 1e-14


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ctkd_is_finite_where_probabilities_underflow(dtype):
    student, teacher, head = (t.to(dtype) for t in random_rows(scale=20.0))
    student.requires_grad_()
    assert (F := (student @ head.T).float().softmax(-1)).min() == 0 and F.max() == 1
    loss = stage1.ctkd_loss(student, teacher, torch.ones(9), head)
    loss.backward()
    assert loss.isfinite() and loss > 0 and student.grad.isfinite().all()


def test_teacher_gets_no_gradient():
    student, teacher, head = (t.requires_grad_() for t in random_rows())
    stage1.ctkd_loss(student, teacher, torch.ones(9), head).backward()
    assert teacher.grad is None and head.grad is None and student.grad.abs().max() > 0


def test_only_adapters_table_and_memory_get_gradients(encoder, corpus):
    _, gradients = step_gradient(encoder, corpus, replace(CONFIG, memory_tokens=3))
    kinds = {n.rpartition(".")[2] for n in gradients}
    assert kinds == {"lora_A", "lora_B", "table", "memory_tokens"}
    assert not any("k_proj" in n for n in gradients)
    assert all(g.abs().max() > 0 for g in gradients.values())


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_every_sample_once_an_epoch_whatever_the_batch(batch):
    n = 16
    steps = n // batch
    seen = [i for step in range(steps) for i in global_batch(5, step, batch, n)]
    assert len(set(seen)) == len(seen) == steps * batch
    again = [i for step in range(steps, 2 * steps) for i in global_batch(5, step, batch, n)]
    assert again != seen


def test_order_and_splits_do_not_depend_on_the_batch_size():
    whole = global_batch(7, 0, 8, 16)
    assert [i for step in range(4) for i in global_batch(7, step, 2, 16)] == whole
    assert generator(7, 1, 3).integers(100) == generator(7, 1, 3).integers(100)


def test_split_point_is_uniform_between_ten_and_length_minus_ten():
    splits = [stage1.split_point(CONFIG, p, 24) for p in range(4000)]
    counts = np.bincount(splits, minlength=15)
    assert set(splits) == set(range(10, 15)) and counts[10:].min() > 700
    assert stage1.split_point(CONFIG, 0, 20) == 10


def test_learning_rate_is_deepspeeds_warmup_decay():
    rates = [learning_rate(s, 100, 10, 1e-5, 1e-4) for s in range(101)]
    assert rates[0] == 1e-5 and rates[10] == 1e-4 and rates[100] == 1e-5
    assert rates[4] == pytest.approx(1e-5 + 9e-5 * np.log(5) / np.log(10))
    assert rates[55] == pytest.approx(1e-5 + 9e-5 * 0.5)

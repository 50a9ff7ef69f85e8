"""Stages 2 and 3: the objective, its gradient however a batch is split, and their runs."""

import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import FAST2, LONG, ONE, ROOT, WEIGHTS, contents, contrastive_step, edit_json
from helpers import error_line, files, gradients, history, losses, metrics, names, run_of
from helpers import same_tensors, scores, settings_of, signal_after, words, write_llama
from helpers import write_triples
from safetensors.torch import load_file, save_file

import contrastive
import evaluate
import pretrain_ctkd
from contrastive import Config, diagnostics, info_nce
from data.batches import Batch, TripleRows, same_texts
from data.tokenizer import INSTRUCTED, Tokenizer
from data.triples import INSTRUCTIONS
from lora import LoraConfig, add_lora, lora_layers
from model import EncoderConfig, load_encoder, plain_encoder
from runtime.devices import flat_ids
from runtime.ranks import join_ranks
from runtime.schedule import learning_rate


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
    queries = encoder.tokenize(words(rows, 0)).ids
    keys = queries
    if stage == "scl":
        positives = words(rows, 1)
        positives[1] = positives[0]
        negatives = words(rows, 2)
        negatives[2] = positives[4]
        keys = encoder.tokenize(positives + negatives).ids
    else:
        queries[1] = queries[0]
    return Batch(queries, keys, same_texts(keys, rows), list(range(rows)), list(range(len(keys))),
                 cut=0)


def gradient(encoder, batch, config, ranks=ONE) -> dict[str, torch.Tensor]:
    """Name -> summed gradient of every trained tensor, and the loss."""
    loss, *_ = contrastive_step(encoder, batch, config, 3, ranks)
    ranks.sum_gradients([p for p in encoder.parameters() if p.requires_grad])
    return {**gradients(encoder), "loss": loss.reshape(1)}


def assert_equal(left: dict, right: dict, tolerance=1e-10):
    """All tensors are equal, in value and in norm, and none of them is zero."""
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
# The objective; without excluded keys it is checked in test_paper.py, too
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows, extra, temperature", [(8, 0, 0.05), (8, 8, 0.05), (5, 9, 1.0),
                                                      (2, 0, 0.02), (6, 3, 0.5)])
def test_info_nce_is_the_plain_sum_without_excluded_keys(rows, extra, temperature):
    draw = torch.Generator().manual_seed(rows + extra)
    queries = torch.randn(rows, 7, generator=draw, dtype=torch.float64, requires_grad=True)
    keys = torch.randn(rows + extra, 7, generator=draw, dtype=torch.float64, requires_grad=True)
    texts = torch.randint(0, rows + 1, (rows + extra,), generator=draw).tolist()
    ids = [np.array([1, text], dtype=np.int32) for text in texts]
    excluded = same_texts(ids, rows)
    ours = info_nce(queries, keys, temperature, excluded)
    plain = plain_loss(queries, keys, temperature, texts)
    assert abs(ours - plain) <= 1e-12 * plain.abs().clamp_min(1)
    for a, b in zip(torch.autograd.grad(ours, (queries, keys)),
                    torch.autograd.grad(plain, (queries, keys))):
        assert (a - b).abs().max() <= 1e-10
    assert excluded.sum() == sum(texts[i] == texts[j] for i in range(rows)
                                 for j in range(rows + extra) if i != j)


def test_the_lengths_of_embeddings_do_not_count():
    draw = torch.Generator().manual_seed(0)
    q, k = torch.randn(4, 5, generator=draw), torch.randn(8, 5, generator=draw)
    none = torch.zeros(4, 8, dtype=torch.bool)
    scale = torch.tensor([0.1, 1, 10, 100]).unsqueeze(1)
    assert torch.allclose(info_nce(q, k, 0.05, none), info_nce(q * scale, k * 3, 0.05, none))


# ---------------------------------------------------------------------------------------------
# The gradient, however the batch is split
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["ucl", "scl"])
def test_micro_batches_of_any_size_give_the_gradient_of_the_whole_batch(tiny, stage):
    encoder = tiny_encoder(tiny)
    batch = make_batch(encoder, stage, 64)
    config = Config(attention_dropout=0.0, temperature=0.05)
    z = [encoder.embed(flat_ids([ids], "cpu"), [len(ids)])[0]
         for ids in batch.queries + batch.keys]
    texts = [ids.tobytes() for ids in batch.keys]
    loss = plain_loss(z[:64], z[64:], 0.05, texts)  # texts one by one, the loss by loops
    loss.backward()
    expected = {**gradients(encoder), "loss": loss.detach().reshape(1)}
    assert batch.excluded.sum() >= 2
    for micro_tokens in (10**6, 2048, 333, 64, 1):
        found = gradient(encoder, batch, replace(config, micro_tokens=micro_tokens))
        assert_equal(found, expected)


def test_with_dropout_a_recomputed_micro_batch_repeats_its_forward(tiny):
    encoder = tiny_encoder(tiny, dropout=0.1)
    batch = make_batch(encoder, "ucl", 16)
    config = Config(attention_dropout=0.2, micro_tokens=128)
    every = contrastive.GlobalBatch(encoder, batch.queries + batch.keys, config, 3, ONE)
    kept = [every.embed(part) for part in every.parts]  # the graphs of all at once
    z = torch.empty_like(every.embeddings).index_copy(
        0, torch.tensor(sum(every.parts, [])), torch.cat(kept))
    assert len(kept) > 3 and torch.equal(z, every.embeddings)
    loss = info_nce(z[:16], z[16:], config.temperature, batch.excluded)
    loss.backward()
    expected = {**gradients(encoder), "loss": loss.detach().reshape(1)}
    found = gradient(encoder, batch, config)
    assert_equal(found, expected)
    other = gradient(encoder, batch, replace(config, seed=1))
    assert abs(other["loss"] - found["loss"]) > 1e-4  # another seed, another dropout


def test_only_the_last_micro_batch_keeps_its_activations(tiny):
    encoder, graphs = tiny_encoder(tiny), []
    batch = make_batch(encoder, "scl", 16)
    hook = encoder.llama.model["layers"][0].register_forward_pre_hook(
        lambda *_: graphs.append(torch.is_grad_enabled()))
    gradient(encoder, batch, Config(micro_tokens=256, attention_dropout=0.0))
    hook.remove()
    parts = (len(graphs) + 1) // 2
    assert parts > 2 and graphs == [False] * (parts - 1) + [True] * parts


def test_ucl_sees_two_dropout_masks_of_the_same_text(tiny):
    encoder = tiny_encoder(tiny, dropout=0.1)
    batch = make_batch(encoder, "ucl", 8)
    for lora, attention, differ in ((0.0, 0.0, False), (0.1, 0.0, True), (0.0, 0.2, True)):
        for layer in lora_layers(encoder.llama).values():
            layer.dropout = lora
        config = Config(attention_dropout=attention, micro_tokens=10**6)
        _, queries, keys = contrastive_step(encoder, batch, config, 0)
        distance = (queries - keys).norm(dim=1)
        assert (distance > 1e-3).all() if differ else (distance < 1e-12).all()


def test_ucl_sees_two_dropout_masks_also_in_micro_batches_of_their_own(tiny):
    encoder = tiny_encoder(tiny, dropout=0.1)
    config = Config(attention_dropout=0.2, micro_tokens=1)
    _, queries, keys = contrastive_step(encoder, make_batch(encoder, "ucl", 8), config, 0)
    assert ((queries - keys).norm(dim=1) > 1e-3).all()


def test_the_dropout_of_a_batch_is_another_one_in_the_next_step(tiny):
    encoder = tiny_encoder(tiny, dropout=0.1)
    batch, config = make_batch(encoder, "ucl", 8), Config(attention_dropout=0.2)
    first, again, other = (contrastive_step(encoder, batch, config, step)[1] for step in (0, 0, 1))
    assert torch.equal(first, again) and ((first - other).norm(dim=1) > 1e-3).all()


def rank_gradient(rank, size, port, folder, stage, rows, dropout, settings, out):
    """The work of one process: its part of the gradient, summed; rank 0 writes it to a file."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
    with join_ranks("cpu", 1, 10) as ranks:
        encoder = tiny_encoder(folder, dropout)
        found = gradient(encoder, make_batch(encoder, stage, rows), Config(**settings), ranks)
        if rank == 0:
            save_file(found, out)
    threads = [Path(task, "comm").read_text() for task in Path("/proc/self/task").glob("*")]
    assert not any("gloo" in name for name in threads)  # one that is left may abort the exit


def gradient_of_processes(size: int, *arguments) -> dict[str, torch.Tensor]:
    """The gradient that `size` processes compute together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn = multiprocessing.get_context("spawn")
    workers = [spawn.Process(target=rank_gradient, args=(rank, size, port, *arguments))
               for rank in range(size)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(600)
        worker.kill()
        worker.join()
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
    found = gradient_of_processes(size, tiny, stage, rows, dropout, settings,
                                  tmp_path / "gradient")
    assert_equal(found, expected)


# ---------------------------------------------------------------------------------------------
# What is logged of a batch
# ---------------------------------------------------------------------------------------------


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
    for i in range(9):  # whatever else is nearest is excluded: now all are right
        for j in range(14):
            excluded[i, j] = j != i and q[i] @ k[j] > q[i] @ k[i]
    assert diagnostics(queries, keys, 0.05, excluded)["accuracy"] == 1


# ---------------------------------------------------------------------------------------------
# Runs, one after another
# ---------------------------------------------------------------------------------------------

RUN = ["checkpoints", "config.json", "encoder", "environment.json", "metrics.jsonl"]
FIELDS = {"step", "loss", "accuracy", "alignment", "uniformity", "effective_dimension", "masked",
          "cut", "learning_rate", "grad_norm", "real_tokens", "tokens_per_second"}


@pytest.fixture
def run(run):
    """run(name, flags..., stage=, model=): as in conftest.py, but ucl, and after what one likes."""

    def main(name: str, *flags, stage="ucl", model=None) -> int:
        return run(name, *(["--model", model] if model else []), *flags, stage=stage)

    return main


def test_ucl_after_ctkd_leaves_everything_in_its_folder(ucl):
    assert names(ucl) == sorted([*RUN, "best", "scores.jsonl"])
    assert names(ucl / "checkpoints") == ["step-0000002", "step-0000003"]  # one was scored
    assert names(ucl / "encoder") == names(ucl / "best") == [
        "ctkd", "embeddings.safetensors", "encoder.json", "ucl"]
    config = json.loads((ucl / "config.json").read_text())
    assert (config["stage"], config["lr"], config["temperature"]) == ("ucl", 0.003, 0.05)
    assert json.loads((ucl / "environment.json").read_text())["processes"] == 1
    assert [row["step"] for row in scores(ucl)] == [0, 2, 3]
    for row in scores(ucl):
        assert row.keys() == {"step", "demo-sts", "mean"} and row["mean"] == row["demo-sts"]
        assert -100 < row["mean"] < 100


def test_scl_after_ucl_leaves_everything_in_its_folder(scl):
    assert names(scl) == RUN  # no scores.jsonl, no best: --eval-tasks was not given
    assert names(scl / "checkpoints") == ["step-0000002", "step-0000003"]
    assert names(scl / "encoder") == [
        "ctkd", "embeddings.safetensors", "encoder.json", "scl", "ucl"]


def test_metrics_have_every_step_once_and_are_finite(ucl, scl):
    for out, keys, schedule in ((ucl, 8, 3), (scl, 16, 2000)):
        rows = metrics(out)
        assert [row["step"] for row in rows] == [0, 1, 2]
        for row in rows:
            assert row.keys() == FIELDS and np.isfinite(list(row.values())).all()
            assert row["loss"] > 0 and row["grad_norm"] > 0 and row["masked"] == 0
            assert 0 <= row["accuracy"] <= 1 and 0 <= row["alignment"] <= 4
            assert -8 <= row["uniformity"] <= 0 and 1 <= row["effective_dimension"] <= 7
            assert row["real_tokens"] > 3 * (8 + keys)
        assert [row["learning_rate"] for row in rows] == [
            learning_rate(step, schedule, schedule // 10, 1e-5, 0.003) for step in range(3)]


@pytest.mark.parametrize("temperature", [0.05, 0.5])
def test_the_loss_of_a_step_has_the_temperature_asked_for(
    temperature, run, tmp_path, monkeypatch
):
    seen, backward = [], contrastive.GlobalBatch.backward

    def note(batch, loss):
        seen.append((batch.embeddings.detach(), [ids.tobytes() for ids in batch.texts]))
        backward(batch, loss)

    monkeypatch.setattr(contrastive.GlobalBatch, "backward", note)
    flags = ["--steps", 1, "--temperature", temperature, "--dtype", "float64"]
    assert run("run", *flags, stage="scl") == 0
    [(z, texts)] = seen
    expected = plain_loss(z[:8], z[8:], temperature, texts[8:])
    assert losses(tmp_path / "run") == [pytest.approx(expected.item(), rel=1e-9)]


def test_the_history_names_all_stages_and_their_adapters_are_copied(ctkd, ucl, scl):
    assert history(ctkd) == ["ctkd"] and history(ucl) == ["ctkd", "ucl"]
    assert history(scl) == ["ctkd", "ucl", "scl"]
    first = json.loads((ctkd / "encoder/encoder.json").read_text())
    for out in (ucl, scl):
        about = json.loads((out / "encoder/encoder.json").read_text())
        assert about["base"] == first["base"] and about["history"][0] == first["history"][0]
        assert about["history"][-1] == {**settings_of(out), "trained_steps": 3}
        assert contents(out / "encoder/ctkd") == contents(ctkd / "encoder/ctkd")
    assert contents(scl / "encoder/ucl") == contents(ucl / "encoder/ucl")
    assert contents(scl / "encoder/ucl").keys() == {"adapter_config.json", WEIGHTS}
    assert not same_tensors(scl / "encoder/scl" / WEIGHTS, scl / "encoder/ucl" / WEIGHTS)


def test_memory_tokens_and_table_of_the_earlier_stage_are_frozen(ctkd, ucl, scl):
    name = "encoder/embeddings.safetensors"
    assert load_file(ctkd / name).keys() == {"memory_tokens", "embed_tokens"}
    assert same_tensors(ctkd / name, ucl / name) and same_tensors(ctkd / name, scl / name)
    trained = load_file(scl / "checkpoints/step-0000003/weights.safetensors")
    assert len(trained) == 24 and all("lora_" in key for key in trained)


def test_the_encoder_of_a_run_loads_and_differs_from_the_one_before(ctkd, ucl, scl):
    texts = words(6, 9)
    before, *after = (load_encoder(out / "encoder").encode(texts) for out in (ctkd, ucl, scl))
    for rows in after:
        assert rows.shape == (6, 32) and np.isfinite(rows).all()
        assert np.abs(rows - before).max() > 1e-3
        before = rows
    encoder = load_encoder(scl / "encoder")
    assert encoder.config.template == "{text}" and encoder.config.num_memory_tokens == 2
    assert encoder.encode(texts, document=True) == pytest.approx(before, abs=1e-6)


@pytest.mark.parametrize("stage", ["ucl", "scl"])
def test_before_its_first_step_a_stage_has_the_earlier_encoder(stage, ctkd, ucl):
    texts = [*words(6, 9), ""]
    for folder in (ctkd, ucl, ucl / "encoder"):
        config = Config(stage=stage, model=str(folder), max_tokens=40, dtype="float32")
        encoder, earlier = contrastive.new_encoder(config, run_of(config))
        expected = load_encoder(folder if folder.name == "encoder" else folder / "encoder")
        assert encoder.training and earlier.name == "encoder"
        assert np.abs(encoder.encode(texts) - expected.encode(texts)).max() <= 1e-5
        assert all("lora_" in name for name, p in encoder.named_parameters() if p.requires_grad)


def test_the_scores_before_the_first_step_are_those_of_the_earlier_encoder(ctkd, ucl):
    expected = evaluate.demo_sts(load_encoder(ctkd / "encoder"))
    assert scores(ucl)[0]["demo-sts"] == pytest.approx(expected, abs=0.01)
    last = evaluate.demo_sts(load_encoder(ucl / "encoder"))
    assert scores(ucl)[-1]["demo-sts"] == pytest.approx(last, abs=0.01)


def test_the_adapter_of_each_stage_starts_from_its_own_draw(ctkd, ucl, tiny):
    """An adapter that began like the merged one of the same seed would repeat its directions."""
    draws = []
    for folder in (tiny, ctkd, ucl):
        config = Config(model=str(folder), max_tokens=40, dtype="float32")
        encoder, _ = contrastive.new_encoder(config, run_of(config))
        draws.append(encoder.llama.model["layers"][0].self_attn.q_proj.lora_A.detach().flatten())
    config = pretrain_ctkd.Config(model=str(tiny), lora_r=16)
    first = pretrain_ctkd.new_encoder(config, run_of(config))
    draws.append(first.llama.model["layers"][0].self_attn.q_proj.lora_A.detach().flatten())
    cosines = np.corrcoef(torch.stack(draws))
    assert np.abs(cosines - np.eye(4)).max() < 0.2


@pytest.mark.parametrize("stage", ["ucl", "scl"])
def test_the_loss_falls(stage, run, tmp_path):
    flags = ["--steps", 20, "--lr", 0.02, "--micro-tokens", 2000]
    flags += ["--num-texts", 8] if stage == "ucl" else []
    assert run("run", *flags, stage=stage) == 0
    values = losses(tmp_path / "run")
    assert np.mean(values[-4:]) < 0.7 * np.mean(values[:2])


def test_what_a_run_prints(argv, home, ctkd, tmp_path, capsys):
    out = tmp_path / "run"
    assert contrastive.main(argv("ucl", out, "--eval-tasks", "demo-sts", "--steps", 2)) == 0
    printed = capsys.readouterr().out
    for fragment in [
        f"torch {torch.__version__}, 1 process(es) on cpu, 1 thread(s) each, float32",
        f"model  {ctkd}: ", "; ucl, memory pooling, bidirectional",
        f"data   {home}/texts.txt: 40 texts, ", f"steps  2 of 8 -> {out}",
        "bundled STS set (325 pairs)", "before      ctkd ", "ucl         ctkd + ucl ",
        "ucl, best   ctkd + ucl ", f"torchrun contrastive.py --stage scl --model {out} "
        "--triples FOLDER --out FOLDER\n",
    ]:
        assert fragment in printed
    assert "note:" not in printed
    name, *flags = printed.splitlines()[-1].split()[1:]
    assert name == "evaluate.py"
    flags = [flag.replace("sts17", "demo-sts") for flag in flags]
    assert evaluate.main([*flags, "--threads", "1", "--results", str(tmp_path / "results")]) == 0


def test_without_steps_single_dataset_reads_each_full_batch_once(run, home, tmp_path):
    flags = ["--triples", home / "folder", "--batches", "single-dataset", "--batch-size", 7,
             *LONG]
    assert run("run", *flags, "--steps", 0, stage="scl") == 0
    assert len(losses(tmp_path / "run")) == 20 // 7 + 10 // 7 + 9 // 7


# ---------------------------------------------------------------------------------------------
# --eval-tasks: the best encoder
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def scripted_scores(monkeypatch):
    """scripted_scores(values): what the next evaluations find; the trained tensors at each."""

    def script(values: list[float]) -> list[dict]:
        waiting, seen = iter(values), []

        def score(name, encoder, data_dir, ranks, wanted) -> float:
            assert (name, wanted) == ("demo-sts", "auto")
            seen.append({name: p.detach().clone() for name, p in encoder.named_parameters()
                         if p.requires_grad})
            return next(waiting)

        monkeypatch.setattr(evaluate, "score_on_ranks", score)
        return seen

    return script


def test_the_best_encoder_is_kept_and_not_the_last(run, tmp_path, scripted_scores):
    seen = scripted_scores([90.0, 40.0, 70.0, 50.0, 70.0])
    flags = ["--steps", 4, "--eval-tasks", "demo-sts", "--eval-every", 1]
    assert run("run", *flags) == 0
    out = tmp_path / "run"
    assert [row["mean"] for row in scores(out)] == [90.0, 40.0, 70.0, 50.0, 70.0]
    best = load_file(out / "best/ucl" / WEIGHTS)
    assert len(best) == len(seen[0]) == 24
    steps = [step for step, tensors in enumerate(seen) if all(
        torch.equal(tensor, best[f"base_model.model.{name.removeprefix('llama.')}.weight"])
        for name, tensor in tensors.items())]
    assert steps == [2]
    for name, trained in (("best", 2), ("encoder", 4)):
        *before, last = json.loads((out / name / "encoder.json").read_text())["history"]
        assert last == {**settings_of(out), "trained_steps": trained}
        assert [entry["trained_steps"] for entry in before] == [2]  # as the fixture ctkd


def test_what_is_scored_has_been_saved(run, tmp_path, monkeypatch):
    """Or OUT/best could be of steps that a resume makes anew, with other bits on a GPU."""
    saved = []
    monkeypatch.setattr(evaluate, "score_on_ranks", lambda *_: saved.extend(
        sorted(tmp_path.glob("run/checkpoints/*"))[-1:]) or 50.0)
    flags = ["--eval-tasks", "demo-sts", "--eval-every", 2, "--save-every", 100]
    assert run("run", "--steps", 5, *flags) == 0
    assert [path.name for path in saved] == [f"step-000000{step}" for step in (2, 4, 5)]


def test_the_best_encoder_is_the_same_after_an_interruption(run, tmp_path, scripted_scores):
    flags = ["--steps", 4, "--eval-tasks", "demo-sts", "--eval-every", 1]
    for name in ("whole", "parts"):
        scripted_scores([3.0, 5.0, 4.0, 2.0, 1.0])  # the best is that of step 1
        if name == "whole":
            assert run(name, *flags) == 0
        else:
            with signal_after(2, signal.SIGTERM):
                assert run(name, *flags) == 143
            assert run(name, *flags, "--resume") == 0
        assert [row["mean"] for row in scores(tmp_path / name)] == [3.0, 5.0, 4.0, 2.0, 1.0]
    assert (tmp_path / "parts/scores.jsonl").read_bytes() == (
        tmp_path / "whole/scores.jsonl").read_bytes()
    assert same_tensors(*(tmp_path / name / "best/ucl" / WEIGHTS for name in ("parts", "whole")))
    assert not same_tensors(*(tmp_path / "whole" / name / "ucl" / WEIGHTS
                              for name in ("best", "encoder")))


def test_before_the_first_step_an_encoder_is_not_asked_what_it_has_never_seen(
    run, home, ctkd, tmp_path, encoded
):
    """It is scored without instructions, unless it has been trained with some; later with them."""
    wanted = "Retrieve semantically similar text"
    flags = ["--triples", home / "folder", *LONG, "--eval-tasks", "demo-sts", "--eval-every", 1]

    def asked() -> list[str]:
        found = [instruction for texts, instruction in encoded if len(texts) > 99]
        encoded.clear()
        return found

    with signal_after(1, signal.SIGTERM):
        assert run("run", *flags, "--steps", 3, stage="scl") == 143
    assert asked() == [""]
    assert run("run", *flags, "--steps", 3, "--resume", stage="scl") == 0
    assert asked() == [wanted] * 3
    encoder = load_encoder(ctkd / "encoder")
    encoder.config = replace(encoder.config, max_tokens=120)
    before = scores(tmp_path / "run")
    assert before[0]["demo-sts"] == pytest.approx(evaluate.demo_sts(encoder), abs=0.01)
    encoded.clear()
    assert run("again", *flags, "--steps", 1, stage="scl", model=tmp_path / "run") == 0
    assert asked() == [wanted] * 2
    assert scores(tmp_path / "again")[0]["demo-sts"] == pytest.approx(before[-1]["demo-sts"],
                                                                      abs=0.01)


def test_without_instructions_in_its_data_a_stage_is_scored_without(run, encoded):
    flags = ["--eval-tasks", "demo-sts", "--eval-every", 1, "--steps", 1]
    assert run("run", *flags, stage="scl") == 0
    assert {instruction for _, instruction in encoded} == {""} and len(encoded) == 2


# ---------------------------------------------------------------------------------------------
# A stage for the second time
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage, folder", [("scl", "scl_2"), ("ucl", "ucl_2")])
def test_a_stage_may_be_run_again_after_scl(stage, folder, scl, run, tmp_path, capsys):
    assert run("again", stage=stage, model=scl) == 0
    out = tmp_path / "again"
    (note,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("note: ")]
    assert "ctkd, ucl, scl" in note and "merged" in note and f"{stage} trains a new one" in note
    assert history(out) == ["ctkd", "ucl", "scl", folder]
    assert names(out / "encoder") == sorted(
        ["ctkd", "ucl", "scl", folder, "embeddings.safetensors", "encoder.json"])
    for earlier in ("ctkd", "ucl", "scl"):
        assert contents(out / "encoder" / earlier) == contents(scl / "encoder" / earlier)
    moved = load_encoder(out / "encoder").encode(words(4, 9))
    moved -= load_encoder(scl / "encoder").encode(words(4, 9))
    assert np.isfinite(moved).all() and np.abs(moved).max() > 1e-4


def test_a_stage_may_be_run_a_third_time_and_needs_no_earlier_folder(run, scl, tmp_path, capsys):
    assert run("b", "--steps", 1, stage="scl", model=scl) == 0
    assert run("c", "--steps", 1, stage="scl", model=tmp_path / "b") == 0
    assert history(tmp_path / "c") == ["ctkd", "ucl", "scl", "scl_2", "scl_3"]
    assert "ctkd, ucl, scl, scl_2;" in capsys.readouterr().out
    before = load_encoder(tmp_path / "c/encoder").encode(words(4, 9))
    shutil.rmtree(tmp_path / "b")
    moved = shutil.move(tmp_path / "c/encoder", tmp_path / "elsewhere")
    assert (load_encoder(moved).encode(words(4, 9)) == before).all()


def test_ucl_after_ctkd_and_scl_after_ucl_need_no_note(run, ucl, capsys):
    assert run("a", "--steps", 1) == 0
    assert run("b", "--steps", 1, stage="scl", model=ucl) == 0
    assert "note:" not in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------
# From a plain Llama
# ---------------------------------------------------------------------------------------------


def test_fresh_memory_tokens_of_a_plain_llama_are_trained(run, tiny, tmp_path):
    flags = ["--memory-tokens", 3, "--min-lr", 0.003, "--lr", 0.003]
    config = Config(model=str(tiny), memory_tokens=3, dtype="float32", lora_r=4, max_tokens=40)
    encoder, earlier = contrastive.new_encoder(config, run_of(config))
    assert earlier is None and encoder.memory_tokens.requires_grad
    before = encoder.memory_tokens.detach()
    base = files(tiny)
    assert run("run", *flags, model=tiny) == 0
    assert history(tmp_path / "run") == ["ucl"] and files(tiny) == base
    stored = load_file(tmp_path / "run/encoder/embeddings.safetensors")
    assert stored.keys() == {"memory_tokens"} and before.shape == (3, 32)
    moved = (stored["memory_tokens"] - before).abs()
    assert (moved.max(dim=1).values > 1e-4).all() and moved.max() < 0.02
    encoder = load_encoder(tmp_path / "run/encoder")
    assert encoder.config.pooling == "memory" and encoder.config.attention == "bidirectional"
    assert np.isfinite(encoder.encode(["A text."])).all()


def test_the_rows_of_fresh_memory_tokens_are_drawn_as_asked_for(tiny):
    rows = {}
    for init in ("auto", "mean", "normal", "rows"):
        config = Config(model=str(tiny), memory_tokens=6, memory_init=init, dtype="float32")
        rows[init] = contrastive.new_encoder(config, run_of(config))[0].memory_tokens.detach()
    table = load_file(tiny / "model.safetensors")["model.embed_tokens.weight"]
    mean, spread = table.mean(0), table.std(0)
    assert torch.equal(rows["auto"], rows["mean"]) and rows["mean"].shape == (6, 32)
    assert all(torch.equal(x, x.bfloat16().float()) for x in rows.values())
    near = 5 * 1e-9**0.5 * spread + 2**-8 * mean.abs()  # five deviations and a rounding
    assert ((rows["mean"] - mean).abs() <= near).all()
    assert 0.8 < ((rows["normal"] - mean) / spread).std() < 1.2
    same = (rows["rows"][:, None] == table.bfloat16().float()).all(-1)
    assert (same.sum(1) == 1).all() and same.any(0).sum() == 6  # of six tokens


def test_memory_tokens_take_no_room_from_a_text(tiny, home):
    read = []
    for k in (2, 12):
        config = Config(stage="scl", model=str(tiny), memory_tokens=k, dtype="float32",
                        triples=str(home / "triples.jsonl"), batch_size=8, max_tokens=14,
                        document_tokens=12)
        encoder, _ = contrastive.new_encoder(config, run_of(config))
        batch = contrastive.open_data(config, encoder, False).read_batch(0, 0, 8)
        assert max(map(len, batch.queries)) == 14 and max(map(len, batch.keys)) == 12
        texts = batch.queries + batch.keys
        z = contrastive.GlobalBatch(encoder, texts, config, 0, ONE).embeddings
        assert z.shape == (24, 32) and z.isfinite().all()
        read.append([ids.tolist() for ids in batch.queries + batch.keys])
    assert read[0] == read[1]


# ---------------------------------------------------------------------------------------------
# Presets
# ---------------------------------------------------------------------------------------------

# enough of each to tell it from the others; all values stand in settings_elsewhere.json
@pytest.fixture
def repllama(run, home, tiny, tmp_path):
    """A run of the preset repllama on the tiny Llama; the preset says the stage."""
    flags = ["--model", tiny, "--triples", home / "triples.jsonl", *FAST2, "--document-tokens", 40,
             "--encoder-tokens", 60, "--out", tmp_path / "repllama", "--warmup", 0.5]
    assert contrastive.main(["--preset", "repllama", *map(str, flags)]) == 0
    return tmp_path / "repllama"


def test_a_preset_with_templates_stores_them_and_reads_texts_in_them(repllama):
    encoder = load_encoder(repllama / "encoder")
    config = encoder.config
    assert (config.pooling, config.attention, config.num_memory_tokens) == ("last", "causal", 0)
    assert config.template == "query: {text}</s>"
    assert config.document_template == "passage: {text}</s>"
    assert history(repllama) == ["scl"]
    texts = ["A model", "", "the embedding of the text " * 30]
    parsing = Tokenizer(encoder.tokenizer.file.parent, 320, special_tokens="parsed")
    for document, start in ((False, "query: "), (True, "passage: ")):
        prefix = parsing.encode([start])[0].tolist()
        ids, tails, cut = encoder.tokenize(texts, document=document)
        assert [len(i) for i in ids][2] == 60 and len(ids[0]) < 40
        assert cut == [False, False, True] and tails[1] == 1
        for one in ids:
            assert one[-1] == 2 and list(one).count(2) == 1 and one[0] == 1
            assert one[:4].tolist() == prefix[:4]
        plain = [parsing.encode([f"{start}{text}</s>"])[0] for text in texts[:2]]
        assert [i.tolist() for i in ids[:2]] == [i.tolist() for i in plain]
        rows = encoder.encode(texts, document=document)
        for one, row in zip(ids, rows):
            alone = encoder.embed(torch.tensor(one, dtype=torch.int64), [len(one)])
            assert row == pytest.approx(alone[0].numpy(), abs=1e-5)
    assert np.abs(encoder.encode(texts[:1]) - encoder.encode(texts[:1], document=True)).max() > 0.01


def test_a_batch_is_read_in_the_templates_too(repllama):
    config = Config(**settings_of(repllama))
    encoder, earlier = contrastive.new_encoder(config, run_of(config))
    assert earlier is None
    data = contrastive.open_data(config, encoder, False)
    assert encoder.config.max_tokens == 60  # afterwards; in the training as its settings say
    assert len(data.tokenize(["a long text " * 30]).ids[0]) == config.max_tokens == 40
    batch = data.read_batch(config.seed, 0, config.batch_size)
    triples = [data.triples[i] for i in batch.rows]
    parsing = Tokenizer(encoder.tokenizer.file.parent, 320, special_tokens="parsed")
    assert [i.tolist() for i in batch.queries] == [i.tolist() for i in parsing.encode(
        [f"query: {t.query}</s>" for t in triples])]
    assert [i.tolist() for i in batch.keys[:8]] == [i.tolist() for i in parsing.encode(
        [f"passage: {t.positive}</s>" for t in triples])]
    assert len(batch.keys) == 8 + 2 * 8  # both negatives of each: the preset takes up to 15
    for i, triple in enumerate(triples):
        found = [encoder.tokenizer.decode(key) for key in batch.keys[8 + 2 * i : 10 + 2 * i]]
        assert sorted(found) == sorted(f"passage: {text}" for text in triple.negatives)


def test_a_document_about_the_end_token_has_one_at_its_end(repllama):
    encoder, _ = evaluate.open_model(str(repllama))
    assert encoder.config.special_tokens == "literal"
    for text in ("It writes </s> at the end.", "</s>", "</s></s> " * 30):
        for document in (False, True):
            (ids,) = encoder.tokenize([text], document=document).ids
            assert ids.tolist().count(2) == 1 and ids[-1] == 2 and len(ids) <= 60
    whole = encoder.tokenizer.decode(encoder.tokenize(["a </s> b"], document=True).ids[0])
    assert whole == "passage: a </s> b"


def test_a_run_from_before_special_tokens_were_letters_keeps_parsing_them(
    home, tiny, tmp_path, monkeypatch, capsys
):
    """The texts of stage 3 are no part of what a resumed run checks by their ids."""
    monkeypatch.setattr(contrastive, "report", lambda *_: None)
    path = write_triples(tmp_path / "about.jsonl", 40, 3)
    path.write_text(path.read_text().replace(" the ", " </s> "))
    flags = ["--preset", "repllama", "--model", tiny, "--triples", path, *FAST2,
             "--document-tokens", 40, "--warmup", 0.5, "--save-every", 1]

    def run(name, *more):
        return contrastive.main([*map(str, flags), "--out", str(tmp_path / name), *more])

    assert run("whole", "--special-tokens", "parsed") == 0
    assert run("letters") == 0
    with signal_after(1, signal.SIGTERM):
        assert run("old", "--special-tokens", "parsed") == 143
    edit_json(tmp_path / "old/config.json", drop=["special_tokens"])
    capsys.readouterr()
    assert run("old", "--resume") == 0
    assert "is from before special_tokens parsed, and goes on so" in capsys.readouterr().out
    whole, old, letters = (tmp_path / name / "encoder/scl" / WEIGHTS
                           for name in ("whole", "old", "letters"))
    assert same_tensors(old, whole) and not same_tensors(letters, whole)
    assert settings_of(tmp_path / "old")["special_tokens"] == "parsed"
    assert load_encoder(tmp_path / "old/encoder").config.special_tokens == "parsed"


def test_documents_are_scored_in_their_template(repllama):
    encoder, method = evaluate.open_model(str(repllama))
    assert method == "last"
    asked = []

    def encode(texts, instruction="", document=False):
        asked.append((instruction, document, len(texts)))
        return encoder.encode(texts, instruction, document)

    task = evaluate.find_task("demo-retrieval")
    evaluate.evaluate_on_ranks(task, encoder, encode, "", None, ONE)
    assert asked == [("", False, 76), ("", True, 98)]


# ---------------------------------------------------------------------------------------------
# Files of triples and their instructions
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, template, wanted", [
    ([], INSTRUCTED, [*INSTRUCTIONS["allnli"], "", *INSTRUCTIONS["squad"]]),
    (["--instruction", "Find it"], INSTRUCTED,
     [*INSTRUCTIONS["allnli"], "Find it", *INSTRUCTIONS["squad"]]),
    (["--instruction", "none"], "{text}", [""]),
], ids=["E5", "E5 and another", "none"])
def test_instructions_stand_before_queries_and_in_the_encoders_folder(
    flags, template, wanted, run, home, tmp_path, monkeypatch, capsys
):
    batches, read_batch = [], TripleRows.read_batch

    def note(data, *arguments):
        batches.append((data, read_batch(data, *arguments)))
        return batches[-1][-1]

    monkeypatch.setattr(TripleRows, "read_batch", note)
    flags = ["--triples", home / "folder", "--batch-size", 18, *LONG, *flags]
    assert run("run", *flags, "--steps", 2, stage="scl") == 0
    encoder = load_encoder(tmp_path / "run/encoder")
    assert encoder.config.template == template and encoder.config.document_template == ""
    instruction = evaluate.instruction_for("scifact", "auto", encoder)
    assert instruction == ("" if template == "{text}" else
                           "Given a scientific claim, retrieve documents that support or refute "
                           "the claim")
    assert np.isfinite(encoder.encode(["A text."], instruction)).all()
    printed, seen = capsys.readouterr().out, set()
    assert all(f"{text}\n" in printed for text in wanted[2:] if len(wanted) > 1)
    assert len(batches) == 2
    for data, batch in batches:
        for row, query, key in zip(batch.rows, batch.queries, batch.keys):
            triple = data.triples[row]
            text = f"{triple.instruction}:{triple.query}\n" if triple.instruction else triple.query
            seen.add(triple.instruction)
            expected = encoder.tokenizer.encode([text])[0]
            assert query.tolist() == expected.tolist()
            assert encoder.tokenizer.decode(key) == triple.positive
    assert seen == set(wanted)


def test_a_template_without_a_place_for_an_instruction_is_not_replaced(
    run, home, tiny, tmp_path, capsys
):
    flags = ["--triples", home / "folder/squad.jsonl", "--pooling", "last", *LONG,
             "--template", "query: {text}</s>"]
    code = run("run", *flags, stage="scl", model=tiny)
    assert not (tmp_path / "run/encoder").exists()
    error_line(code, capsys, "query: {text}</s>", "instruction", "--instruction none")
    assert run("run", *flags, "--instruction", "none", stage="scl", model=tiny) == 0
    assert load_encoder(tmp_path / "run/encoder").config.template == "query: {text}</s>"


def test_a_template_with_its_own_place_for_an_instruction_is_kept(run, home, tiny, tmp_path):
    template = "Do: {instruction}. Text: {text}"
    flags = ["--triples", home / "folder/squad.jsonl", "--pooling", "last", *LONG]
    assert run("run", *flags, "--template", template, stage="scl", model=tiny) == 0
    assert load_encoder(tmp_path / "run/encoder").config.template == template


# ---------------------------------------------------------------------------------------------
# Errors of stages 2 and 3; those of all stages are in test_stages.py
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage, flags, fragments", [
    ("scl", ["--triples", "HOME/folder", "--batch-size", 10, "--batches", "single-dataset",
             "--instruction", "none"],
     ["squad.jsonl", "9 rows", "--batch-size 10", "lower it"]),
    ("scl", ["--triples", ""], ["needs --triples", ".jsonl", "demo"]),
    ("ucl", ["--text", "HERE/same.txt"], ["same.txt: all 30 texts are the same", "different"]),
    ("scl", ["--triples", "HERE/none"], ["none: no .jsonl", "put the triples there"]),
    ("scl", ["--triples", "HOME/missing"], ["missing: no such file or folder", "--triples"]),
    ("scl", ["--triples", "HERE/keys.jsonl"], ["keys.jsonl, line 3: has no positive", "a row"]),
    ("scl", ["--triples", "HERE/same.jsonl"], ["same.jsonl: all 9 rows have the same positive"]),
    ("ucl", ["--pooling", "mean"], ["--pooling mean", "ctkd/encoder", "'memory'", "leave it out"]),
    ("ucl", ["--attention", "causal"], ["--attention causal", "'bidirectional'", "leave it out"]),
    ("scl", ["--template", "q: {text}"], ["--template q: {text}", "'{text}'", "leave it out"]),
    ("scl", ["--document-template", "d: {text}"], ["--document-template d:", "leave it out"]),
    ("ucl", ["--memory-tokens", 8], ["--memory-tokens 8", "trained with 2", "leave it out"]),
    ("ucl", ["--special-tokens", "parsed"], ["--special-tokens parsed", "'literal'", "leave it"]),
    ("ucl", ["--memory-init", "mean"], ["--memory-init mean", "rows of its own", "leave it"]),
    ("scl", ["--memory-init", "normal"], ["--memory-init normal", "rows of its own", "leave it"]),
    ("ucl", ["--model", "runs/nowhere"], ["--model runs/nowhere", "no encoder there", "the stage "
                                          "before"]),
    ("scl", ["--model", "HOME/folder"], ["folder/config.json: missing"]),
], ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else value)
def test_bad_data_or_a_bad_model_is_a_clear_line(
    stage, flags, fragments, run, home, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    here = tmp_path / "here"
    (here / "none").mkdir(parents=True)
    (here / "same.txt").write_text("one text\n" * 30)
    lines = (home / "triples.jsonl").read_text().splitlines()
    (here / "keys.jsonl").write_text("\n".join([*lines[:2], '{"query": "a"}', *lines[2:]]))
    (here / "same.jsonl").write_text('{"query": "a", "positive": "b"}\n' * 9)
    before = files(home), files(tmp_path)
    flags = [str(value).replace("HOME", str(home)).replace("HERE", str(here)) for value in flags]
    error_line(run("run", *flags, stage=stage), capsys, *fragments)
    assert (files(home), files(tmp_path)) == before
    assert run("run", "--steps", 1, stage=stage) == 0  # the fixed command


@pytest.mark.parametrize("flags, fragments", [
    (["--template", "{text}<eos>"], ["<eos> is no token", "tokenizer.json", "end-of-text"]),
    (["--document-template", "{text}<|end|>"], ["<|end|> is no token", "tokenizer.json"]),
    (["--template", "a text</s>"], ["must contain {text}"]),
    (["--document-template", "</s>"], ["must contain {text}"]),
])
def test_a_template_that_the_tokenizer_cannot_read_is_refused(
    flags, fragments, run, tiny, tmp_path, capsys
):
    error_line(run("run", "--pooling", "last", *flags, model=tiny), capsys, flags[1], *fragments)
    assert files(tmp_path) == {}


def test_an_encoder_without_its_base_is_one_line_that_names_base(
    run, ctkd, tiny_copy, tmp_path, capsys
):
    copy, lost = shutil.copytree(ctkd, tmp_path / "earlier"), tmp_path / "lost"
    base = json.loads((copy / "encoder/encoder.json").read_text())["base"]
    edit_json(copy / "encoder/encoder.json", base={**base, "name": str(lost)})
    before = files(tmp_path)
    code = run("run", model=copy)
    assert files(tmp_path) == before
    error_line(code, capsys, copy / "encoder", lost, "--base")
    assert run("run", "--steps", 1, "--base", tiny_copy, model=copy) == 0


def test_an_encoder_of_another_base_is_refused(run, ctkd, tiny_copy, tmp_path, capsys):
    write_llama(tiny_copy, seed=7)
    before = files(tmp_path)
    error_line(run("run", "--base", tiny_copy), capsys, ctkd / "encoder", "another base",
               tiny_copy, "sha256", "--base")
    assert files(tmp_path) == before


@pytest.mark.parametrize("stage, folder", [("ucl", "ctkd-demo"), ("scl", "ucl-demo")])
def test_a_stage_needs_the_stage_before_it(stage, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = contrastive.main(["--stage", stage, "--device", "cpu", "--threads", "1"])
    error_line(code, capsys, f"--model runs/{folder}: no encoder there", "pretrain_ctkd.py")
    assert files(tmp_path) == {}


def test_the_run_before_must_have_ended(run, tmp_path, capsys):
    with signal_after(1, signal.SIGTERM):
        assert run("stopped") == 143
    capsys.readouterr()
    error_line(run("run", stage="scl", model=tmp_path / "stopped"), capsys, tmp_path / "stopped",
               "encoder", "--resume")


def test_as_a_command_bad_input_is_one_line_on_stderr(ctkd, tmp_path):
    command = [sys.executable, ROOT / "contrastive.py", "--stage", "scl", "--model", ctkd,
               "--out", "run", *FAST2, "--document-tokens", 40]
    done = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True,
                          timeout=100, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and "--triples" in done.stderr
    assert len(done.stderr.splitlines()) == 1

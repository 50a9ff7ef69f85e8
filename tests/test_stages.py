"""What holds for all stages alike, from their command lines: what a run prints and logs, how it is
interrupted and resumed, several processes, and the line that ends a run after a mistake."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from helpers import LONG, ROOT, STAGES, WEIGHTS, edit_json, error_line, files, history, losses
from helpers import metrics, names, run_of, same_tensors, scores, signal_after, without_speed, words
from helpers import write_llama
from safetensors.torch import load_file, save_file

import contrastive
import evaluate
import pretrain_ctkd
from lora import lora_layers
from model import load_encoder
from runtime.schedule import learning_rate

ALL = ["ctkd", "ucl", "scl"]
EVALUATED = ["--eval-tasks", "demo-sts", "--eval-every"]


@pytest.fixture(params=ALL)
def stage(request) -> str:
    return request.param


@pytest.fixture
def run(run, texts):
    """run(name, flags..., stage=): as in conftest.py; stage 1 reads longer texts."""

    def main(name: str, *flags, stage: str) -> int:
        return run(name, *(["--text", texts] if stage == "ctkd" else []), *flags, stage=stage)

    return main


# ---------------------------------------------------------------------------------------------
# What a run prints and logs
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage, batch, about, data", [
    ("ctkd", 4, "K = 2, bidirectional, objective ctkd",
     r"\S+/texts.txt: 40 texts, \d+ tokens each\n"),
    ("ucl", 8, "ucl, memory pooling, bidirectional",
     r"\S+/texts.txt: 40 texts, \d+ tokens each\n"),
    ("scl", 8, "scl, memory pooling, bidirectional",
     r"\S+/triples.jsonl: 24 rows, mixed; 24 of 24 rows have negatives\n  "),
], ids=ALL)
def test_a_run_prints_what_it_depends_on(
    stage, batch, about, data, run, tiny, ctkd, tmp_path, capsys
):
    assert run("run", "--steps", 2, stage=stage) == 0
    printed, python = capsys.readouterr().out, ".".join(map(str, sys.version_info[:3]))
    model = tiny if stage == "ctkd" else ctkd
    assert re.match(
        re.escape(f"python {python}, torch {torch.__version__}, 1 process(es) on cpu, 1 thread(s) "
                  f"each, float32\nmodel  {model}: ")
        + rf"\d+\.\d\d M frozen, \d+\.\d\d M trained; {re.escape(about)}\n"
        rf"memory 2 rows, mean cosine [01]\.\d{{4}}\ndata   {data}", printed)
    assert f"\nsteps  2 of {batch} -> {tmp_path}/run\n" in printed


def mean_cosine(rows: torch.Tensor) -> float:
    """The mean cosine of all pairs of rows, one pair at a time."""
    rows = rows.double().numpy()
    return np.mean([a @ b / np.sqrt(a @ a * (b @ b))
                    for i, a in enumerate(rows) for b in rows[:i]])


@pytest.mark.parametrize("stage", ["ctkd", "ucl"])
def test_the_header_says_how_alike_the_memory_rows_are(stage, run, tiny, tmp_path, capsys):
    """At a rate of 0 the rows at the end are those of the start."""
    flags = ["--model", tiny, "--steps", 1, "--lr", 0, "--min-lr", 0, "--memory-tokens", 3]
    shown = {}
    for init in ("mean", "normal"):
        assert run(init, *flags, "--memory-init", init, stage=stage) == 0
        rows = load_file(tmp_path / init / "encoder/embeddings.safetensors")["memory_tokens"]
        (shown[init],) = re.findall(r"^memory 3 rows, mean cosine (.*)$", capsys.readouterr().out,
                                    re.MULTILINE)
        assert shown[init] == f"{mean_cosine(rows):.4f}"
    assert float(shown["mean"]) > 0.999 and float(shown["normal"]) < 0.9


def token_counts(texts: list[str], model: Path) -> list[int]:
    """Tokens of each text with BOS, by the library alone."""
    tokenizer = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
    return [len(tokenizer.encode(text).ids) for text in texts]


@pytest.mark.parametrize("stage", ["ctkd", "ucl"])
def test_texts_that_are_cut_are_counted(stage, run, tiny, tmp_path, capsys):
    """K takes no room from a text: the count is the same for any."""
    texts, path = words(40, 14, 14, 24), tmp_path / "mixed.txt"
    path.write_text("\n".join(texts))
    counts = np.array(token_counts(texts, tiny))
    cut, mean = (counts > 40).sum(), counts.clip(max=40).mean()
    assert 5 < cut < 35 and counts.min() >= 20 and (counts == 40).any() and (counts == 41).any()
    for k in (1, 16):
        flags = ["--model", tiny, "--text", path, "--max-tokens", 40, "--memory-tokens", k]
        assert run(f"run-{k}", *flags, "--steps", 0, "--batch-size", 8, stage=stage) == 0
        assert (f"data   {path}: 40 texts, {mean:.0f} tokens each, {cut} of them cut\n"
                in capsys.readouterr().out)
        rows = metrics(tmp_path / f"run-{k}")
        assert len(rows) == 5  # once through the texts
        assert stage == "ctkd" or sum(row["cut"] for row in rows) == cut
        total = counts.clip(max=40).sum() * (1 if stage == "ctkd" else 2)  # a query and a key
        assert sum(row["real_tokens"] for row in rows) == total


def test_queries_and_documents_of_triples_that_are_cut_are_counted(run, tmp_path, ctkd, tiny):
    queries, positives = words(16, 6, 2, 12), words(16, 7, 2, 12)
    negatives = words(16, 8, 2, 12)  # two of the same length, whichever is taken
    path = tmp_path / "triples.jsonl"
    path.write_text("".join(
        json.dumps({"query": q, "positive": p, "negative": [n, n[:-1] + n[-1].upper()]}) + "\n"
        for q, p, n in zip(queries, positives, negatives)))
    flags = ["--triples", path, "--max-tokens", 20, "--document-tokens", 16, "--batch-size", 8]
    assert run("run", *flags, "--steps", 2, stage="scl") == 0
    long = [sum(n > limit for n in token_counts(texts, tiny))
            for texts, limit in ((queries, 20), (positives, 16), (negatives, 16))]
    rows = metrics(tmp_path / "run")
    assert min(long) > 0 and sum(row["cut"] for row in rows) == sum(long) < 3 * 16


def test_a_run_logs_every_step_once_and_leaves_everything_in_its_folder(stage, run, tmp_path):
    out, schedule = tmp_path / "run", 8 if stage == "scl" else 5
    flags = ["--schedule-steps", schedule] if stage == "scl" else []
    flags += ["--steps", 5, "--warmup", 0.4, "--save-every", 2]
    assert run("run", *flags, stage=stage) == 0
    assert names(out) == ["checkpoints", "config.json", "encoder", "environment.json",
                          "metrics.jsonl"]
    assert names(out / "checkpoints") == ["step-0000004", "step-0000005"]
    rows, config = metrics(out), json.loads((out / "config.json").read_text())
    assert [row["step"] for row in rows] == list(range(5))
    for row in rows:
        assert row.keys() >= {"step", "loss", "learning_rate", "grad_norm", "real_tokens",
                              "tokens_per_second"}
        assert np.isfinite(list(row.values())).all()
        assert row["loss"] > 0 and row["grad_norm"] > 0 and row["real_tokens"] > 0
    assert [row["learning_rate"] for row in rows] == [
        learning_rate(step, schedule, int(0.4 * schedule), 1e-5, config["lr"])
        for step in range(5)]
    environment = json.loads((out / "environment.json").read_text())
    assert environment.items() >= {"processes": 1, "threads": 1, "device": "cpu",
                                   "dtype": "torch.float32", "launch": None}.items()


def test_the_gradient_is_clipped_to_the_norm_asked_for(stage, run, tmp_path):
    """After one step the first moments are a tenth of the gradient that AdamW was given."""
    for clip in (0.01, 0):
        out = tmp_path / f"run-{clip}"
        assert run(out.name, "--steps", 1, "--clip", clip, stage=stage) == 0
        moments = load_file(out / "checkpoints/step-0000001/optimizer.safetensors")
        squares = [t.square().sum() for name, t in moments.items() if name.endswith("/exp_avg")]
        [row] = metrics(out)
        assert len(squares) > 10 and row["grad_norm"] > 0.02
        given = 10 * sum(squares).sqrt().item()
        assert given == pytest.approx(clip or row["grad_norm"], rel=1e-3)


def test_weights_decay_as_asked_for(stage, run, tmp_path):
    """One step takes rate x decay of each weight more than without, and else at most the rate."""
    flags = ["--steps", 1, "--lr", 0.01, "--min-lr", 0.01]
    for decay in (0, 5):
        assert run(f"run-{decay}", *flags, "--weight-decay", decay, stage=stage) == 0
    plain, decayed = (load_file(tmp_path / f"run-{decay}" / "checkpoints/step-0000001" /
                                "weights.safetensors") for decay in (0, 5))
    for name, weight in plain.items():
        start = (weight - decayed[name]) / (0.01 * 5)
        assert (start - weight).abs().max() < 0.011, name


@pytest.mark.parametrize("warmup, expected", [  # by hand: ln(t) / ln(4), then down in quarters
    (0.5, [0, 0, 0.005, 0.01 * np.log(3) / np.log(4), 0.01, 0.01, 0.0075, 0.005]),
    (4, [0, 0, 0.005, 0.01 * np.log(3) / np.log(4), 0.01, 0.01, 0.0075, 0.005]),
    (1, [0, 0, 0.01, 0.01, 0.05 / 6, 0.04 / 6, 0.03 / 6, 0.02 / 6]),
    (0, [0, 0, 0.01, 0.01, 0.05 / 6, 0.04 / 6, 0.03 / 6, 0.02 / 6]),
], ids=["a share", "steps", "one step", "none"])
def test_the_rate_rises_for_the_share_or_number_of_steps_asked_for(
    warmup, expected, stage, run, tmp_path
):
    flags = ["--steps", 8, "--schedule-steps", 8] if stage == "scl" else ["--steps", 8]
    flags += ["--warmup", warmup, "--lr", 0.01, "--min-lr", 0]
    assert run("run", *flags, stage=stage) == 0
    assert [row["learning_rate"] for row in metrics(tmp_path / "run")] == pytest.approx(expected)


def test_adapters_are_scaled_by_the_alpha_asked_for(stage, tiny):
    settings = {"stage": stage} if stage != "ctkd" else {}
    config = STAGES[stage].Config(model=str(tiny), lora_r=4, lora_alpha=6.0, dtype="float32",
                                  **settings)
    encoder = STAGES[stage].new_encoder(config, run_of(config))
    encoder = (encoder if stage == "ctkd" else encoder[0]).eval()
    torch.manual_seed(0)
    layers = lora_layers(encoder.llama).values()
    assert len(layers) == 12
    for layer in layers:
        layer.lora_B.data.normal_()
        x = torch.randn(5, layer.in_features)
        adapted = layer(x, adapters=True) - layer(x, adapters=False)
        by_hand = 6 / 4 * x @ layer.lora_A.T @ layer.lora_B.T
        torch.testing.assert_close(adapted, by_hand, rtol=0, atol=1e-4)


@pytest.mark.parametrize("stage, after", [("ctkd", "ucl"), ("ucl", "scl")])
def test_after_a_demo_run_the_next_stages_demo_is_named(stage, after, argv, tmp_path, capsys):
    """The bundled data in another folder than the demo's: its settings still come from there."""
    out = tmp_path / "run"
    assert STAGES[stage].main(argv(stage, out, "--text", "demo", "--steps", 1)) == 0
    (command,) = [line.split() for line in capsys.readouterr().out.splitlines()
                  if line.startswith("  torchrun ")]
    assert command[:2] == ["torchrun", "contrastive.py"]
    expected = contrastive.PRESETS[after]["demo"] | {"model": str(out), "out": "FOLDER"}
    assert contrastive.parse_arguments(command[2:]) == contrastive.Config(**expected)


@pytest.mark.parametrize("stage", ["ctkd", "ucl"])
@pytest.mark.parametrize("text, out", [("demo", "DEFAULT"), ("demo", "mine"), ("TEXTS", "mine")])
def test_the_commands_named_at_the_end_are_accepted(
    text, out, stage, argv, home, tmp_path, monkeypatch, capsys
):
    """And they are those of the next stage: its demo's after a demo, else the paper's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "demo_sts", lambda _: 0.0)
    presets = pretrain_ctkd.PRESETS if stage == "ctkd" else contrastive.PRESETS[stage]
    out = presets["demo"]["out"] if out == "DEFAULT" else out
    text, given = text.replace("TEXTS", str(home / "texts.txt")), Path(out)
    assert STAGES[stage].main(argv(stage, given, "--text", text, "--steps", 1)) == 0
    printed = capsys.readouterr().out.partition("; next")[2]
    train, score = [line.split() for line in printed.splitlines()[1:]]
    assert train[:2] == ["torchrun", "contrastive.py"] and score[:2] == ["python", "evaluate.py"]
    config = contrastive.parse_arguments(train[2:])
    following = {"ctkd": "ucl", "ucl": "scl"}[stage]
    changed = {"model": out} if given != Path(presets["demo"]["out"]) else {}
    changed |= {"out": "FOLDER"} if changed else {}
    changed |= {"triples": "FOLDER"} if (stage, text != "demo") == ("ucl", True) else {}
    preset = contrastive.PRESETS[following]["demo" if text == "demo" else "paper"]
    assert config == contrastive.Config(**preset | changed) and config.stage == following
    encoder, _ = evaluate.open_model(evaluate.parse_arguments(score[2:]).model)
    assert [entry["stage"] for entry in encoder.history][-1] == stage


@pytest.mark.parametrize("stage, steps", [("ctkd", 40 // 12), ("ucl", 40 // 12), ("scl", 24 // 12)])
def test_without_steps_a_run_reads_each_full_batch_once(stage, steps, run, tmp_path, capsys):
    assert run("run", "--batch-size", 12, "--steps", 0, stage=stage) == 0
    assert len(losses(tmp_path / "run")) == steps
    assert f"steps  {steps} of 12 -> " in capsys.readouterr().out


@pytest.mark.parametrize("stage", ["ctkd", "ucl"])
def test_which_texts_are_read_is_the_text_seeds_choice_alone(stage, tiny, texts, tmp_path):
    """Ten texts of forty with empty lines among them, which are shuffled, too: in stage 1 by
    numpy's permutation, as the library datasets does, in stage 2 by Python's random."""
    path = tmp_path / "texts.txt"
    path.write_text(texts.read_text().replace("\n", "\n\n", 15).replace("\n\n", "\n \n\n", 2))

    def read(**settings) -> list[str]:
        config = STAGES[stage].Config(model=str(tiny), text=str(path), num_texts=10,
                                      batch_size=4, dtype="float32", **settings)
        encoder = STAGES[stage].new_encoder(config, run_of(config))
        if stage == "ctkd":
            data = pretrain_ctkd.open_texts(config, encoder.tokenizer, config.num_texts)
        else:
            data = contrastive.open_data(config, encoder[0], False)
        tokenizer = tokenizers.Tokenizer.from_file(str(tiny / "tokenizer.json"))
        assert len(data.texts) == 10
        assert [data.name(i) for i in range(10)] == [
            f"{path}, text {lines.index(tokenizer.decode(ids.tolist())) + 1}"
            for ids in data.texts]
        return [tokenizer.decode(ids.tolist()) for ids in data.texts]

    lines = [line.strip() for line in path.read_text().splitlines()]
    assert len(lines) == 57 and len(set(lines)) == 41

    def first(seed: int) -> list[str]:
        order = list(range(57))
        if stage == "ctkd":
            order = np.random.default_rng(seed).permutation(57)
        else:
            random.Random(seed).shuffle(order)
        return [lines[i] for i in order if lines[i]][:10]

    in_order = [line for line in lines if line][:10]
    assert read() == read(seed=1) == read(text_seed=42) == first(42)
    assert read(text_seed=0) == first(0) and read(text_seed=43, seed=42) == first(43)
    assert read(text_seed=-1) == read(text_seed=-1, seed=3) == in_order
    assert len({tuple(x) for x in (first(42), first(43), first(0), in_order)}) == 4


@pytest.mark.parametrize("stage", ["ctkd", "ucl"])
def test_the_text_seed_of_a_run_may_not_change(stage, run, tmp_path, capsys):
    with signal_after(1, signal.SIGTERM):
        assert run("run", "--steps", 3, stage=stage) == 143
    capsys.readouterr()
    error_line(run("run", "--steps", 3, "--text-seed", 7, "--resume", stage=stage), capsys,
               "text_seed: 42 -> 7")


@pytest.mark.parametrize("stage", ["ctkd", "ucl"])
def test_k_does_not_change_what_is_read(stage, run, tiny, tmp_path):
    for k in (1, 16):
        flags = ["--model", tiny, "--memory-tokens", k, "--max-tokens", 30, "--steps", 1]
        assert run(f"run-{k}", *flags, stage=stage) == 0
    found = [json.loads((tmp_path / f"run-{k}/checkpoints/step-0000001/state.json").read_text())
             for k in (1, 16)]
    assert found[0]["texts"] == found[1]["texts"] and len(found[0]["texts"]) == 64


def test_equal_seeds_give_equal_bits_and_other_seeds_do_not(stage, run, tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert run(name, "--steps", 3, "--seed", seed, stage=stage) == 0
    weights = [tmp_path / name / "checkpoints/step-0000003/weights.safetensors" for name in "abc"]
    assert same_tensors(*weights[:2]) and not same_tensors(*weights[1:])


# ---------------------------------------------------------------------------------------------
# Interruptions
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage, number, dtype", [
    ("ctkd", signal.SIGTERM, "float32"), ("ctkd", signal.SIGINT, "float32"),
    ("ctkd", signal.SIGTERM, "bfloat16"), ("ucl", signal.SIGTERM, "float32"),
    ("ucl", signal.SIGTERM, "bfloat16"), ("scl", signal.SIGTERM, "float32"),
    ("scl", signal.SIGTERM, "bfloat16"),
])
def test_a_stopped_run_is_resumed_bit_for_bit(stage, number, dtype, run, tmp_path, capsys):
    flags = ["--dtype", dtype, "--lora-dropout", 0.3]
    if stage == "ctkd":
        steps, stop = 10, 4
        flags += ["--micro-batch", 3]
    else:
        steps, stop = 5, 3
        flags += ["--attention-dropout", 0.2, *EVALUATED, 2]
    flags += ["--steps", steps]
    assert run("whole", *flags, stage=stage) == 0
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    capsys.readouterr()
    with signal_after(stop, number):
        assert run("parts", *flags, stage=stage) == 128 + number
    assert handlers == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"stopped by signal {int(number)}, saved; continue with the same command and --resume")
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    saved = [stop] if stage == "ctkd" else [2, stop]  # one for the evaluation
    assert names(parts / "checkpoints") == [f"step-{step:07d}" for step in saved]
    assert len(losses(parts)) == stop and not (parts / "encoder").exists()
    if stage != "ctkd":
        assert [row["step"] for row in scores(parts)] == [0, 2]

    assert run("parts", *flags, "--resume", stage=stage) == 0
    assert without_speed(parts) == without_speed(whole) and len(losses(parts)) == steps
    assert [row.keys() for row in metrics(parts)] == [row.keys() for row in metrics(whole)]
    last = f"checkpoints/step-{steps:07d}"
    same = [f"{last}/weights", f"{last}/optimizer", f"encoder/{stage}/adapter_model",
            "encoder/embeddings"]
    if stage != "ctkd":
        assert scores(parts) == scores(whole)
        assert [row["step"] for row in scores(parts)] == [0, 2, 4, 5]
        same += [f"best/{stage}/adapter_model", "best/embeddings", "best/ctkd/adapter_model"]
    for name in same:
        assert same_tensors(parts / f"{name}.safetensors", whole / f"{name}.safetensors")
    assert history(parts) == list(dict.fromkeys(["ctkd", stage]))
    moments = load_file(parts / last / "optimizer.safetensors")
    assert {name.rpartition("/")[2] for name in moments} == {"step", "exp_avg", "exp_avg_sq"}
    assert all(value == steps for name, value in moments.items() if name.endswith("/step"))
    assert all(value.abs().max() > 0 for name, value in moments.items() if name.endswith("_sq"))
    assert ("table/step" in moments) == (stage == "ctkd")


@pytest.mark.parametrize("stage, steps, every, flags", [
    ("ctkd", 10, 4, []), ("ucl", 5, 2, []), ("scl", 5, 2, [*EVALUATED, 1]),
])
def test_a_crashed_run_is_resumed_from_its_last_checkpoint(
    stage, steps, every, flags, run, tmp_path
):
    flags = ["--steps", steps, "--save-every", every, *flags]
    assert run("run", *flags, stage=stage) == 0
    out = tmp_path / "run"
    last, before = (f"step-{step:07d}" for step in (steps, (steps - 1) // every * every))
    wanted, logs = without_speed(out), sorted(path.name for path in out.glob("*.jsonl"))
    assert names(out / "checkpoints") == [before, last]
    scored = scores(out) if "scores.jsonl" in logs else None
    kept = shutil.copytree(out, tmp_path / "kept")
    shutil.rmtree(out / "encoder")  # as if the power had failed in the last step, while saving
    shutil.rmtree(out / "checkpoints" / last)
    (out / f"checkpoints/.{last}.writing").mkdir()
    for name in logs:
        (out / name).write_text((out / name).read_text()[:-20])
    assert run("run", *flags, "--resume", stage=stage) == 0
    assert without_speed(out) == wanted
    assert [row["step"] for row in metrics(out)] == list(range(steps))
    assert scored is None or scores(out) == scored
    assert names(out / "checkpoints") == [before, last]
    weights = [path.relative_to(kept) for path in kept.rglob("*.safetensors")]
    assert len(weights) > 5
    assert all(same_tensors(kept / path, out / path) for path in weights)
    assert {Path("encoder", name, WEIGHTS) for name in {"ctkd", stage}} < set(weights)


def test_a_run_without_a_checkpoint_starts_again(stage, run, tmp_path):
    assert run("run", "--steps", 4, stage=stage) == 0
    wanted = losses(tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints")
    assert run("run", "--steps", 4, "--resume", stage=stage) == 0
    assert losses(tmp_path / "run") == wanted


def test_a_finished_run_that_is_resumed_changes_nothing(stage, run, tmp_path):
    assert run("run", "--steps", 3, stage=stage) == 0
    before = files(tmp_path)
    flags = ["--steps", 3, "--resume", "--save-every", 7, "--timeout", 9]
    assert run("run", *flags, stage=stage) == 0
    changed = {path.name for path, content in files(tmp_path).items() if before[path] != content}
    assert changed <= {"config.json"}


# ---------------------------------------------------------------------------------------------
# Resuming with something changed
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def stopped(argv, home, texts, tiny, ctkd, tmp_path, run, capsys):
    """stopped(stage): a run on copies of its model and data, stopped at step 2 of 4; returns
    resume(flags..., out="run"), which runs its command again."""
    model, folder, file = tmp_path / "model", tmp_path / "folder", tmp_path / "texts.txt"

    def make(stage: str):
        shutil.copytree(tiny if stage == "ctkd" else ctkd, model)
        shutil.copytree(home / "folder", folder)
        shutil.copy(texts if stage == "ctkd" else home / "texts.txt", file)
        data = ["--triples", folder, *LONG] if stage == "scl" else ["--text", file]

        def resume(*flags, out="run") -> int:
            return run(out, "--model", model, *data, "--steps", 4, *flags, stage=stage)

        with signal_after(2, signal.SIGTERM):
            assert resume() == 143
        capsys.readouterr()
        return resume

    return make


def test_a_resume_with_changed_settings_names_them(stage, stopped, tmp_path, capsys):
    resume = stopped(stage)
    before = files(tmp_path)
    own, said = {"ctkd": (["--objective", "nll"], "objective: 'ctkd' -> 'nll'")}.get(
        stage, (["--temperature", 0.1], "temperature: 0.05 -> 0.1"))
    lr = 0.01 if stage == "ctkd" else 0.003
    code = resume("--resume", "--lr", 0.5, "--steps", 5, *own)
    error_line(code, capsys, tmp_path / "run/config.json", f"lr: {lr} -> 0.5", "steps: 4 -> 5",
               said, "another --out")
    assert files(tmp_path) == before


@pytest.mark.parametrize("written", [{}, {"format": 1}, {"format": 3}], ids=str)
def test_a_run_of_another_format_is_not_resumed(written, stage, stopped, tmp_path, capsys):
    """In format 1, which was not written down, lengths, order of texts and rates were others."""
    resume = stopped(stage)
    edit_json(tmp_path / "run/config.json", drop=["format"], **written)
    before = files(tmp_path)
    error_line(resume("--resume"), capsys, tmp_path / "run/config.json",
               f"format={written.get('format', 1)}", "resumes 2", "another --out")
    assert files(tmp_path) == before
    edit_json(tmp_path / "run/config.json", format=2)
    assert resume("--resume") == 0


def test_how_often_to_save_and_how_long_to_wait_may_change(stage, stopped, tmp_path):
    resume = stopped(stage)
    assert resume("--resume", "--save-every", 1, "--timeout", 7, "--save-minutes", 5) == 0
    assert len(losses(tmp_path / "run")) == 4
    assert names(tmp_path / "run/checkpoints") == ["step-0000003", "step-0000004"]


@pytest.mark.parametrize("name", ["nowhere", "empty", "other"])
def test_a_resume_with_nothing_there_is_refused(name, stage, run, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").write_text("mine")
    code = run(name, "--resume", stage=stage)
    error_line(code, capsys, tmp_path / name / "config.json", "nothing to resume",
               "leave --resume out")
    assert not (tmp_path / "nowhere").exists() and not any((tmp_path / "empty").iterdir())
    assert files(tmp_path) == {tmp_path / "other/notes.txt": b"mine"}


@pytest.mark.parametrize("stage, change, said", [
    ("ctkd", "text", "texts"), ("ucl", "text", "texts"), ("scl", "row", "texts"),
    ("scl", "name", "texts"), ("ctkd", "shape", "base"), ("ctkd", "weights", "base"),
    ("ucl", "encoder", "base"), ("scl", "encoder", "base"),
])
def test_a_resume_over_other_data_or_another_model_is_refused(
    stage, change, said, stopped, tmp_path, capsys
):
    resume, folder, model = stopped(stage), tmp_path / "folder", tmp_path / "model"
    if change == "text":
        with open(tmp_path / "texts.txt", "a") as file:
            file.write("\n" + "one more text of the same kind " * 9)
    elif change == "row":
        path = folder / "mine.jsonl"
        path.write_text(path.read_text().replace('"query": "', '"query": "so ', 1))
    elif change == "name":  # its rows get an instruction
        (folder / "mine.jsonl").rename(folder / "nq.jsonl")
    elif change == "encoder":
        path = model / "encoder/embeddings.safetensors"
        tensors = load_file(path)
        tensors["memory_tokens"][0, 0] += 0.5
        save_file(tensors, path)
    else:
        write_llama(model, **({"hidden_size": 16} if change == "shape" else {"seed": 1}))
    before = files(tmp_path)
    error_line(resume("--resume"), capsys, tmp_path / "run/checkpoints/step-0000002",
               f"the {said} of this run changed", f"bring the first {said} back", "another --out")
    assert files(tmp_path) == before


# ---------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag, value, fragment", [
    ("--lora-r", 0, "at least 1"), ("--save-every", 0, "at least 1"),
    ("--steps", -1, "at least 0"), ("--seed", -1, "at least 0"), ("--threads", -1, "at least 0"),
    ("--timeout", 0.0, "at least 0.01"),
    ("--lr", "nan", "finite"), ("--lr", -0.1, "at least 0"), ("--lr", 1e-09, "--min-lr"),
    ("--min-lr", "nan", "finite"), ("--weight-decay", -1.0, "at least 0"),
    ("--clip", "nan", "finite"), ("--warmup", -0.1, "at least 0"), ("--warmup", "nan", "finite"),
    ("--lora-dropout", 1.0, "below 1"), ("--lora-dropout", "nan", "finite"),
    ("--lr", "inf", "finite"), ("--min-lr", "inf", "finite"), ("--lora-alpha", "nan", "finite"),
    ("--seed", 2**70, "below 2^63"), ("--threads", 5000, "at most 1024"),
    ("--device", "banana", "cpu"),
])
def test_a_setting_that_no_run_can_have_is_refused(
    flag, value, fragment, stage, run, tmp_path, capsys
):
    error_line(run("run", f"{flag}={value}", stage=stage), capsys, f"{flag} {value}: ", fragment)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("stage, flags, fragments", [
    ("ctkd", ["--num-texts=-1"], ["--num-texts -1: must be at least 0"]),
    ("ucl", ["--num-texts=-1"], ["--num-texts -1: must be at least 0"]),
    ("ctkd", ["--memory-tokens", 0], ["--memory-tokens 0: must be at least 1"]),
    ("ctkd", ["--memory-tokens=-2"], ["--memory-tokens -2: must be at least 0"]),
    ("ctkd", ["--batch-size", 0], ["--batch-size 0: must be at least 1"]),
    ("ctkd", ["--chunk-rows", 0], ["--chunk-rows 0: must be at least 1"]),
    ("ctkd", ["--nll-weight=-inf"], ["--nll-weight -inf: must be finite"]),
    ("ctkd", ["--nll-weight", "inf"], ["--nll-weight inf: must be finite"]),
    ("ctkd", ["--nll-weight", 0.5, "--objective", "rc"], ["--nll-weight 0.5", "--objective ctkd"]),
    ("ctkd", ["--nll-weight", 0.5, "--objective", "ctkd-window"], [
        "--nll-weight 0.5", "--objective ctkd"]),
    ("ctkd", ["--max-tokens", 19], ["--max-tokens 19: must be at least 20, 10 for a context"]),
    ("ucl", ["--temperature", 0], ["--temperature 0.0", "above 0"]),
    ("ucl", ["--data-dir", "x"], ["--data-dir x", "--eval-tasks"]),
    ("ucl", ["--encoder-tokens", 11], ["--encoder-tokens 11", "below --max-tokens"]),
    ("scl", ["--temperature=-0.1"], ["--temperature -0.1", "above 0"]),
    ("ucl", ["--temperature", "nan"], ["--temperature nan", "finite"]),
    ("ucl", ["--micro-tokens", 39], ["--micro-tokens 39", "40 tokens", "raise it", "--max-tokens"]),
    ("scl", ["--document-tokens", 161], ["--micro-tokens 160", "161 tokens", "--document-tokens"]),
    ("ucl", ["--batch-size", 1], ["--batch-size 1", "at least 2"]),
    ("scl", ["--batch-size", 0], ["--batch-size 0", "at least 2"]),
    ("ucl", ["--max-tokens", 9], ["--max-tokens 9", "at least 10"]),
    ("scl", ["--negatives=-1"], ["--negatives -1", "at least 0"]),
    ("ucl", ["--eval-every", 0], ["--eval-every 0", "at least 1"]),
    ("ucl", ["--attention-dropout", 1.0], ["--attention-dropout 1.0", "below 1"]),
    ("ucl", ["--attention-dropout=-0.1"], ["--attention-dropout -0.1", "at least 0"]),
    ("ucl", ["--eval-tasks", "demo-sts demo-stss"], ["--eval-tasks", "demo-stss", "demo-sts"]),
    ("scl", ["--eval-tasks", "sts"], ["--eval-tasks", "sts: unknown"]),
])
def test_a_setting_that_no_run_of_this_stage_can_have_is_refused(
    stage, flags, fragments, run, tmp_path, capsys
):
    error_line(run("run", *flags, stage=stage), capsys, *fragments)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("stages, flags, fragments", [
    (ALL, ["--model", "HERE/nowhere"], ["HERE/nowhere", "no such folder"]),
    (["ctkd"], ["--model", "nowhere"], ["nowhere: no such folder"]),
    (ALL, ["--model", "HERE/other"], ["HERE/other/config.json: missing"]),
    (["ctkd", "ucl"], ["--text", "nowhere.txt"], ["nowhere.txt: no such file", "--text"]),
    (["ctkd", "ucl"], ["--text", "HERE/bad.jsonl"], ["HERE/bad.jsonl, line 1: not JSON", "fix"]),
    (["scl"], ["--triples", "HERE/nowhere"], ["nowhere: no such file or folder", "--triples"]),
    (["ctkd", "ucl"], ["--batch-size", 41], ["texts.txt", "40 rows", "--batch-size 41", "lower"]),
    (["scl"], ["--batch-size", 25], ["triples.jsonl", "24 rows", "--batch-size 25", "lower it"]),
    (["ctkd", "ucl"], ["--batch-size", 8, "--num-texts", 7],
     ["texts.txt", "7 rows", "--batch-size 8", "lower it"]),
    (["ctkd"], ["--min-characters", 10_000], ["no text left of 40", "--min-characters"]),
], ids=lambda value: " ".join(map(str, value)))
def test_bad_data_or_a_bad_model_is_a_clear_line_and_the_fixed_command_runs(
    stages, flags, fragments, run, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text("{\n")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").write_text("mine")
    before = files(tmp_path)
    flags, fragments = ([str(value).replace("HERE", str(tmp_path)) for value in values]
                        for values in (flags, fragments))
    for stage in stages:
        error_line(run(f"run-{stage}", *flags, stage=stage), capsys, *fragments)
        assert files(tmp_path) == before
        assert run(f"run-{stage}", "--steps", 1, stage=stage) == 0
        shutil.rmtree(tmp_path / f"run-{stage}")
        capsys.readouterr()


@pytest.mark.parametrize("name, fragments", [
    ("full", ["full: exists and is not an empty folder", "--resume", "--out"]),
    ("file", ["file: exists and is not an empty folder", "--out"]),
    ("file/below", ["below: cannot be written", "--out"]),
])
def test_an_output_folder_that_is_taken_is_refused(name, fragments, stage, run, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    for mine in ("full/notes.txt", "file"):
        (tmp_path / mine).write_text("mine")
    error_line(run(name, stage=stage), capsys, tmp_path / name, *fragments)
    assert files(tmp_path) == {tmp_path / "full/notes.txt": b"mine", tmp_path / "file": b"mine"}


def test_a_loss_that_is_not_finite_stops_the_run_before_the_update(stage, run, tmp_path, capsys):
    flags = ["--lr", 1e30, "--steps", 6, "--save-every", 1]
    code, out = run("run", *flags, stage=stage), tmp_path / "run"
    step = len(losses(out))
    source = "triples.jsonl" if stage == "scl" else "texts.txt"
    error_line(code, capsys, f"error: step {step}: the loss (", "is not finite",
               "nothing was updated", f"{source}, {'row' if stage == 'scl' else 'text'} ",
               "Lower --lr", "--dtype float32", out / "checkpoints", bar=True)
    assert step == (4 if stage == "ctkd" else 3) and np.isfinite(losses(out)).all()
    assert names(out / "checkpoints") == [f"step-{step - 1:07d}", f"step-{step:07d}"]
    assert not (out / "encoder").exists()


# ---------------------------------------------------------------------------------------------
# Several processes
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def torchrun(argv, texts, tmp_path):
    """torchrun(stage, name, flags...): two processes that run a stage into tmp_path / name; what
    they print goes to name.stdout and name.stderr beside it."""
    started = []

    def start(stage: str, name: str, *flags) -> subprocess.Popen:
        out = tmp_path / name
        script = "pretrain_ctkd.py" if stage == "ctkd" else "contrastive.py"
        own = ["--text", texts] if stage == "ctkd" else []
        command = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", script,
                   *argv(stage, out, *own, *flags)]
        with open(f"{out}.stdout", "w") as stdout, open(f"{out}.stderr", "w") as stderr:
            started.append(subprocess.Popen(
                [sys.executable, "-m", *command], cwd=ROOT, stdout=stdout, stderr=stderr,
                env={**os.environ, "OMP_NUM_THREADS": "1"}))
        return started[-1]

    yield start
    for process in started:
        process.kill()


@pytest.mark.parametrize("stage, flags, precision", [
    ("ctkd", ["--steps", 8, "--batch-size", 5, "--dtype", "float64", "--lora-dropout", 0], 1e-9),
    ("scl", ["--steps", 4, "--batch-size", 7, "--micro-tokens", 64, "--lora-dropout", 0.2,
             "--attention-dropout", 0.2, *EVALUATED, 2], 1e-5),
], ids=["ctkd", "scl with dropout"])
def test_two_processes_have_the_losses_of_one(stage, flags, precision, run, torchrun, tmp_path):
    process = torchrun(stage, "two", *flags)
    assert run("one", *flags, stage=stage) == 0
    assert process.wait(timeout=300) == 0, (tmp_path / "two.stderr").read_text()
    one, two = tmp_path / "one", tmp_path / "two"
    assert losses(two) == pytest.approx(losses(one), rel=precision)
    exact = {"step", "learning_rate", "real_tokens", "masked"}
    for row, other in zip(metrics(two), metrics(one), strict=True):
        assert row.keys() == other.keys() and len(row) >= 6
        for key in row.keys() - {"tokens_per_second"}:
            wanted = other[key] if key in exact else pytest.approx(other[key], rel=1e-3)
            assert row[key] == wanted, key
    if stage == "scl":
        assert [row["step"] for row in scores(two)] == [0, 2, 4]
        assert [row["mean"] for row in scores(two)] == pytest.approx(
            [row["mean"] for row in scores(one)], abs=0.05)
    printed = (tmp_path / "two.stdout").read_text()
    assert "2 process(es) on cpu" in printed and printed.count("; next (") == 1
    assert history(two) == list(dict.fromkeys(["ctkd", stage]))
    rows, expected = (load_encoder(out / "encoder").encode(words(5, 9)) for out in (two, one))
    assert np.isfinite(rows).all() and np.abs(rows - expected).max() < 1e-3


@pytest.mark.parametrize("flags, said", [
    (["--batch-size", 1], ["--batch-size 1: 2 processes need at least one text each"]),
    (["--num-texts", 3], ["--batch-size 4 is larger than the 3 rows", "rank 1: another rank has "
                          "stopped"]),
])
def test_an_error_ends_all_ranks_with_a_line_each(flags, said, torchrun, tmp_path):
    process = torchrun("ctkd", "out", *flags)
    assert process.wait(timeout=200) == 1  # torchrun's own code
    printed = (tmp_path / "out.stderr").read_text()
    assert all(fragment in printed for fragment in said)
    assert printed.count("Traceback") == 1 and "Connection closed" not in printed  # torchrun's own


def worker(process: subprocess.Popen, rank: int) -> int:
    """The process id of a rank below torchrun."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for child in children:
        if f"RANK={rank}" in Path(f"/proc/{child}/environ").read_text().split("\0"):
            return int(child)
    raise AssertionError(f"no rank {rank} among {children}")


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs /proc")
@pytest.mark.parametrize("whom", ["rank 1", "torchrun"])
def test_sigterm_to_one_or_all_processes_stops_all_and_saves(whom, torchrun, tmp_path):
    out, process = tmp_path / "run", torchrun("ctkd", "run", "--steps", 100_000)
    while process.poll() is None and not (
        (out / "metrics.jsonl").is_file() and len(losses(out)) >= 3
    ):
        time.sleep(0.1)
    os.kill(process.pid if whom == "torchrun" else worker(process, 1), signal.SIGTERM)
    assert process.wait(timeout=100) != 0
    steps = len(losses(out))
    assert 3 <= steps < 100_000
    assert names(out / "checkpoints") == [f"step-{steps:07d}"]
    assert load_file(out / f"checkpoints/step-{steps:07d}/weights.safetensors")
    assert "stopped by signal 15, saved" in Path(f"{out}.stdout").read_text()
    assert 'pretrain_ctkd.py", line' not in Path(f"{out}.stderr").read_text()  # no traceback

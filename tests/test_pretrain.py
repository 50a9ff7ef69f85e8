"""Stage 1 from its command line: runs, resumes, ranks, signals, and what it says to bad input."""

import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TEXT
from safetensors.torch import load_file, save_file
from test_data import dead_url, hub_environment
from torch.optim.optimizer import register_optimizer_step_post_hook

import pretrain_ctkd as stage1
from data import corpora
from data.tokenizer import Tokenizer
from model import load_encoder
from training import global_batch, seal, unseal

ROOT = Path(__file__).parent.parent
FAST = ["--memory-tokens", "2", "--max-tokens", "96", "--threads", "1", "--dtype", "float32",
        "--lr", "0.01", "--device", "cpu"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """40 texts of about 75 tokens."""
    draw, path = random.Random(0), tmp_path_factory.mktemp("texts") / "texts.txt"
    path.write_text("\n".join(" ".join(draw.choices(TEXT.split(), k=30)) for _ in range(40)))
    return path


@pytest.fixture
def run(tiny, texts, tmp_path):
    """run(name, flags...): stage 1 in this process into tmp_path / name; returns the exit code."""

    def main(name: str, *flags) -> int:
        arguments = ["--model", tiny, "--text", texts, "--out", tmp_path / name, *FAST, *flags]
        return stage1.main(list(map(str, arguments)))

    return main


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in metrics(out)]


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same_tensors(left: Path, right: Path) -> bool:
    """Whether two safetensors files hold the same tensors bit for bit (and more than one)."""
    a, b = load_file(left), load_file(right)
    return a.keys() == b.keys() and len(a) > 1 and all(torch.equal(a[k], b[k]) for k in a)


# ---------------------------------------------------------------------------------------------
# A run
# ---------------------------------------------------------------------------------------------


def test_a_run_learns_and_leaves_everything_in_its_folder(run, tiny, texts, tmp_path, capsys):
    flags = ["--steps", 30, "--num-texts", 16, "--batch-size", 8, "--save-every", 20]
    assert run("run", *flags) == 0
    out = tmp_path / "run"
    values = losses(out)
    assert np.mean(values[-6:]) < 0.7 * np.mean(values[:2])
    assert [row["step"] for row in metrics(out)] == list(range(30))
    assert all(row["grad_norm"] > 0 and row["real_tokens"] > 300 for row in metrics(out))
    assert sorted(p.name for p in out.iterdir()) == [
        "checkpoints", "config.json", "encoder", "environment.json", "metrics.jsonl"]
    assert [p.name for p in sorted((out / "checkpoints").iterdir())] == [
        "step-0000020", "step-0000030"]
    config = json.loads((out / "config.json").read_text())
    assert (config["lr"], config["steps"], config["memory_tokens"]) == (0.01, 30, 2)

    encoder = load_encoder(out / "encoder")
    rows = encoder.encode(["A model reads a text.", "", "Memory tokens stand at the end."])
    assert rows.shape == (3, 32) and np.isfinite(rows).all() and np.ptp(rows, axis=0).max() > 0.1
    assert (encoder.config.num_memory_tokens, encoder.config.attention) == (2, "bidirectional")
    assert encoder.history[0] == {"stage": "ctkd", **config}

    printed = capsys.readouterr().out
    for fragment in [
        f"torch {torch.__version__}, 1 process(es) on cpu, 1 thread(s) each, float32",
        f"model  {tiny}: ", "K = 2, bidirectional, objective ctkd",
        f"text   {texts}: 16 texts, ", f"30 steps of 8 -> {out}",
        "untrained, weighted-mean", "ctkd, 2 memory tokens", "from 2 memories",
        f"python evaluate.py --task sts17 --model {out}/encoder",
    ]:
        assert fragment in printed


def test_the_command_named_at_the_end_works(run, tmp_path, capsys):
    assert run("run", "--steps", 1) == 0
    name, *flags = capsys.readouterr().out.splitlines()[-1].split()[1:]
    assert name == "evaluate.py"
    flags = [flag.replace("sts17", "demo-sts") for flag in flags]
    assert stage1.evaluate.main([*flags, "--results", str(tmp_path / "results")]) == 0


@pytest.mark.parametrize("flags", [
    {"objective": "nll"}, {"objective": "rc", "dtype": "bfloat16"},
    {"attention": "causal", "clip": 0.0, "warmup": 0.0}, {"train_embeddings": "memory"},
    {"memory_init": "mean", "dtype": "float64"}, {"nll_weight": 0.5, "micro_batch": 3},
    {"batch_size": 1, "memory_tokens": 1, "lora_r": 1, "lora_dropout": 0.0, "chunk_rows": 5},
], ids=lambda flags: ", ".join(map(str, flags.items())))
def test_every_setting_runs_and_stands_in_the_encoders_history(flags, run, tmp_path):
    words = [w for key, value in flags.items() for w in (f"--{key.replace('_', '-')}", value)]
    assert run("run", "--steps", 3, *words) == 0
    assert len(losses(tmp_path / "run")) == 3 and np.isfinite(losses(tmp_path / "run")).all()
    encoder = load_encoder(tmp_path / "run" / "encoder")
    assert flags.items() <= encoder.history[0].items()
    assert np.isfinite(encoder.encode(["A model reads."])).all()
    assert encoder.config.attention == flags.get("attention", "bidirectional")
    stored = load_file(tmp_path / "run/encoder/embeddings.safetensors")
    assert ("embed_tokens" in stored) == ("train_embeddings" not in flags)
    distance = (stored["memory_tokens"][0] - stored["memory_tokens"][-1]).abs().max()
    assert (distance > 0.1) == ("memory_init" not in flags and flags.get("memory_tokens") != 1)


def test_a_micro_batch_changes_no_loss_but_dropout_does(run, tmp_path):
    values = []
    for name, size, dropout in (("whole", 0, 0), ("micro", 1, 0), ("dropout", 0, 0.5)):
        flags = ["--micro-batch", size, "--lora-dropout", dropout]
        assert run(name, "--steps", 3, "--dtype", "float64", *flags) == 0
        values.append(losses(tmp_path / name))
    whole, micro, dropout = values
    assert micro == pytest.approx(whole, rel=1e-9)
    assert dropout[1:] != pytest.approx(whole[1:], rel=1e-4)  # at first B is zero


def test_frozen_weights_are_those_of_the_folder_after_a_run(run, tiny):
    before = files(tiny)
    assert run("run", "--steps", 3, "--lr", 1.0) == 0
    assert files(tiny) == before


def test_the_first_step_has_the_lowest_rate_and_the_schedule_is_applied(run, tmp_path):
    assert run("run", "--steps", 2, "--min-lr", 0, "--save-every", 1) == 0
    rates = [row["learning_rate"] for row in metrics(tmp_path / "run")]
    assert rates == [0, 0.01]
    for step, moved in ((1, False), (2, True)):
        weights = load_file(tmp_path / f"run/checkpoints/step-000000{step}/weights.safetensors")
        up = [tensor for name, tensor in weights.items() if name.endswith("lora_B")]
        assert len(up) == 12 and all(bool(tensor.any()) == moved for tensor in up)


def test_equal_seeds_give_equal_bits_and_other_seeds_do_not(run, tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert run(name, "--steps", 3, "--seed", seed) == 0
    weights = [tmp_path / name / "checkpoints/step-0000003/weights.safetensors" for name in "abc"]
    assert same_tensors(*weights[:2]) and not same_tensors(*weights[1:])


# ---------------------------------------------------------------------------------------------
# Presets and data
# ---------------------------------------------------------------------------------------------


def test_the_paper_preset_is_the_papers():
    config = stage1.Config(**stage1.PRESETS["paper"])
    expected = {
        "model": "meta-llama/Llama-2-7b-chat-hf", "text": "wikitext103", "num_texts": 32000,
        "batch_size": 4, "lr": 1e-4, "min_lr": 1e-5, "warmup": 0.1, "weight_decay": 1e-5,
        "clip": 2.0, "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "max_tokens": 512,
        "memory_tokens": 8, "objective": "ctkd", "nll_weight": 0.0, "attention": "bidirectional",
        "train_embeddings": "all", "steps": 0,
    }
    assert expected.items() <= vars(config).items()
    assert config.num_texts // config.batch_size == 8000  # steps = 0 is once through the texts


def test_without_steps_a_run_goes_once_through_the_texts(run, tmp_path, capsys):
    assert run("run", "--batch-size", 12) == 0
    assert len(losses(tmp_path / "run")) == 3  # 40 // 12
    assert "3 steps of 12 -> " in capsys.readouterr().out


def test_the_preset_is_demo_unless_a_model_or_a_preset_is_named(run, tmp_path, capsys):
    cases = [([], 256), (["--model", "x"], 512), (["--preset", "paper"], 512),
             (["--model", "x", "--preset", "demo"], 256)]
    for flags, max_tokens in cases:
        assert stage1.main([*flags, "--memory-tokens", "999", "--out", str(tmp_path / "x")]) == 2
        assert f"--max-tokens {max_tokens}: must be at least" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    assert run("run", "--steps", 1) == 0
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert (config["num_texts"], config["batch_size"], config["save_every"]) == (32000, 4, 500)


def test_wikitext_keeps_texts_of_1000_characters_and_less_than_512_tokens(
    tiny, tmp_path, monkeypatch
):
    tokenizer = Tokenizer(tiny, 320)
    texts = [("an encoder reads the whole of it " * 60)[:n] for n in range(1700)]
    by_tokens = {len(ids): text for ids, text in zip(tokenizer.encode(texts), texts)}
    kept = [texts[1000], by_tokens[511]]
    assert len(by_tokens[511]) > 1010
    lines = [texts[999], kept[0], by_tokens[512], kept[1] + "   ", texts[1600]]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "llm2comp").mkdir()
    with zipfile.ZipFile(tmp_path / "llm2comp" / corpora.WIKITEXT_MIRROR[1], "w") as archive:
        archive.writestr(corpora.WIKITEXT_MEMBER, "".join(f" {line} \n" for line in lines))
    rows = stage1.prepare_texts(stage1.Config(batch_size=2, max_tokens=520), tokenizer)
    expected = tokenizer.encode([text.strip() for text in kept])
    assert [ids.tolist() for ids in rows] == [ids.tolist() for ids in expected]


def test_texts_are_cut_so_that_bos_text_and_memory_fit_in_max_tokens(tiny, texts):
    config = stage1.Config(text=str(texts), max_tokens=40, memory_tokens=8, num_texts=7)
    rows = stage1.prepare_texts(config, Tokenizer(tiny, 320))
    assert [len(ids) for ids in rows] == [32] * 7 and all(ids[0] == 1 for ids in rows)


# ---------------------------------------------------------------------------------------------
# Interruptions
# ---------------------------------------------------------------------------------------------


@contextmanager
def signal_after(steps: int, number: int):
    """A signal to this process after so many optimiser steps; the run ends one step later."""
    counter = itertools.count(1)
    handle = register_optimizer_step_post_hook(
        lambda *_: next(counter) == steps and signal.raise_signal(number)
    )
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("number, dtype", [
    (signal.SIGTERM, "float32"), (signal.SIGINT, "float32"), (signal.SIGTERM, "bfloat16"),
])
def test_a_stopped_run_goes_on_bit_for_bit(number, dtype, run, tmp_path, capsys):
    flags = ["--steps", 10, "--dtype", dtype, "--lora-dropout", 0.3, "--micro-batch", 3]
    assert run("whole", *flags) == 0
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    capsys.readouterr()
    with signal_after(3, number):
        assert run("parts", *flags) == 128 + number
    assert handlers == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))
    said, advice = capsys.readouterr().out.splitlines()[-1].split("; ")
    assert said == f"stopped by signal {int(number)}, saved"
    assert advice == "go on with the same command and --resume"
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    assert [p.name for p in (parts / "checkpoints").iterdir()] == ["step-0000004"]
    assert len(losses(parts)) == 4 and not (parts / "encoder").exists()

    assert run("parts", *flags, "--resume") == 0
    for ours, theirs in zip(metrics(parts), metrics(whole), strict=True):
        assert ours.keys() == theirs.keys() and len(ours) == 6
        assert all(ours[key] == theirs[key] for key in ours if key != "tokens_per_second")
    last = "checkpoints/step-0000010"
    for name in (f"{last}/weights", f"{last}/optimizer", "encoder/ctkd/adapter_model",
                 "encoder/embeddings"):
        assert same_tensors(parts / f"{name}.safetensors", whole / f"{name}.safetensors")
    moments = load_file(parts / last / "optimizer.safetensors")
    assert {name.rpartition("/")[2] for name in moments} == {"step", "exp_avg", "exp_avg_sq"}
    assert moments["table/step"] == 10 and moments["table/exp_avg_sq"].abs().max() > 0


def test_a_crashed_run_goes_on_from_its_last_checkpoint(run, tmp_path):
    flags = ["--steps", 10, "--save-every", 4]
    assert run("run", *flags) == 0
    out = tmp_path / "run"
    wanted = losses(out)
    final = shutil.copytree(out / "checkpoints/step-0000010", tmp_path / "final")
    shutil.rmtree(out / "encoder")  # as if the power had failed in step 9, while saving
    shutil.rmtree(out / "checkpoints/step-0000010")
    (out / "checkpoints/.step-0000010.writing").mkdir()
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(lines[:9]) + lines[9][:20])
    assert run("run", *flags, "--resume") == 0
    assert losses(out) == wanted and [row["step"] for row in metrics(out)] == list(range(10))
    for name in ("weights", "optimizer"):
        assert same_tensors(final / f"{name}.safetensors",
                            out / f"checkpoints/step-0000010/{name}.safetensors")
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == [
        "step-0000008", "step-0000010"]


def test_a_run_stopped_before_its_first_checkpoint_starts_again(run, tmp_path):
    assert run("run", "--steps", 4) == 0
    wanted = losses(tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints")
    assert run("run", "--steps", 4, "--resume") == 0
    assert losses(tmp_path / "run") == wanted


def test_a_finished_run_that_is_resumed_only_reports(run, tmp_path, capsys):
    assert run("run", "--steps", 4) == 0
    before, first = files(tmp_path), capsys.readouterr().out
    assert run("run", "--steps", 4, "--resume") == 0
    after, about = files(tmp_path), tmp_path / "run/encoder/encoder.json"
    assert after.pop(about) == before.pop(about).replace(b'"resume": false', b'"resume": true')
    assert after == before
    reports = [text.partition("embedded STS")[2] for text in (first, capsys.readouterr().out)]
    assert reports[0] == reports[1] and "; next" in reports[0]


def test_saving_more_often_is_no_other_configuration(run, tmp_path):
    with signal_after(1, signal.SIGTERM):
        assert run("run", "--steps", 6) == 143
    assert run("run", "--steps", 6, "--resume", "--save-every", 3, "--timeout", 7) == 0
    assert len(losses(tmp_path / "run")) == 6


# ---------------------------------------------------------------------------------------------
# Several processes
# ---------------------------------------------------------------------------------------------


def torchrun(tiny: Path, texts: Path, out: Path, *flags) -> subprocess.Popen:
    """Two processes; what they print goes to out.stdout and out.stderr beside `out`."""
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", 2, "pretrain_ctkd.py",
               "--model", tiny, "--text", texts, "--out", out, *FAST, *flags]
    with open(f"{out}.stdout", "w") as stdout, open(f"{out}.stderr", "w") as stderr:
        return subprocess.Popen(
            [sys.executable, "-m", *map(str, command)], cwd=ROOT, stdout=stdout, stderr=stderr,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )


@pytest.mark.parametrize("flags, said", [
    (["--batch-size", 1], ["--batch-size 1: 2 processes need at least one text each"]),
    (["--num-texts", 3], ["is larger than the 3 texts", "rank 1: another rank has stopped"]),
])
def test_an_error_ends_all_ranks_with_a_line_each(flags, said, tiny, texts, tmp_path):
    process = torchrun(tiny, texts, tmp_path / "out", *flags)
    assert process.wait(timeout=200) == 1  # torchrun's own code
    printed = (tmp_path / "out.stderr").read_text()
    assert all(words in printed for words in said)
    assert printed.count("Traceback") == 1 and "Connection closed" not in printed  # torchrun's own


def test_two_processes_have_the_losses_of_one(run, tiny, texts, tmp_path):
    flags = ["--steps", 8, "--batch-size", 5, "--dtype", "float64", "--lora-dropout", 0]
    process = torchrun(tiny, texts, tmp_path / "two", *flags)
    assert run("one", *flags) == 0
    assert process.wait(timeout=300) == 0, Path(f"{tmp_path}/two.stderr").read_text()
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-9)
    for key in ("step", "learning_rate", "real_tokens"):
        one, two = ([row[key] for row in metrics(tmp_path / name)] for name in ("one", "two"))
        assert one == two
    printed = Path(f"{tmp_path}/two.stdout").read_text()
    assert "2 process(es) on cpu" in printed and printed.count("; next") == 1
    assert np.isfinite(load_encoder(tmp_path / "two/encoder").encode(["A text."])).all()


def worker(process: subprocess.Popen, rank: int) -> int:
    """The process id of a rank below torchrun."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for child in children:
        if f"RANK={rank}" in Path(f"/proc/{child}/environ").read_text().split("\0"):
            return int(child)
    raise AssertionError(f"no rank {rank} among {children}")


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs /proc")
@pytest.mark.parametrize("whom", ["rank 1", "torchrun"])
def test_sigterm_to_one_or_all_processes_stops_all_and_saves(whom, tiny, texts, tmp_path):
    out = tmp_path / "run"
    process = torchrun(tiny, texts, out, "--steps", 100_000)
    try:
        while process.poll() is None and not (
            (out / "metrics.jsonl").is_file() and len(losses(out)) >= 3
        ):
            time.sleep(0.1)
        os.kill(process.pid if whom == "torchrun" else worker(process, 1), signal.SIGTERM)
        assert process.wait(timeout=100) != 0
    finally:
        process.kill()
    steps = len(losses(out))
    assert 3 <= steps < 100_000
    assert [p.name for p in (out / "checkpoints").iterdir()] == [f"step-{steps:07d}"]
    assert load_file(out / f"checkpoints/step-{steps:07d}/weights.safetensors")
    assert "stopped by signal 15, saved" in Path(f"{out}.stdout").read_text()
    assert 'pretrain_ctkd.py", line' not in Path(f"{out}.stderr").read_text()  # no traceback


# ---------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------


def refused(code: int, capsys, *fragments) -> str:
    """The last line on stderr of a run that ended with exit code 2; it holds the fragments."""
    message = capsys.readouterr().err.splitlines()[-1]
    assert code == 2 and message.startswith("error: ")
    for fragment in fragments:
        assert str(fragment) in message
    return message


def test_resume_with_a_changed_configuration_names_what_changed(run, tmp_path, capsys):
    assert run("run", "--steps", 2) == 0
    before = files(tmp_path)
    code = run("run", "--steps", 3, "--resume", "--objective", "nll", "--lr", 0.5)
    refused(code, capsys, tmp_path / "run/config.json", "lr: 0.01 -> 0.5", "steps: 2 -> 3",
            "objective: 'ctkd' -> 'nll'", "another --out")
    assert files(tmp_path) == before


@pytest.mark.parametrize("name", ["nowhere", "empty", "other"])
def test_resume_with_nothing_there_is_refused(name, run, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").write_text("mine")
    missing = tmp_path / name / "config.json"
    refused(run(name, "--resume"), capsys, missing, "nothing to resume", "leave --resume out")
    assert not (tmp_path / "nowhere").exists() and not any((tmp_path / "empty").iterdir())
    assert files(tmp_path) == {tmp_path / "other/notes.txt": b"mine"}


@pytest.mark.parametrize("name, fragments", [
    ("full", ["full: exists and is not an empty folder", "--resume", "--out"]),
    ("file", ["file: exists and is not an empty folder", "--out"]),
    ("file/below", ["below: cannot be written", "--out"]),
])
def test_an_output_folder_that_is_taken_is_refused(name, fragments, run, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    for mine in ("full/notes.txt", "file"):
        (tmp_path / mine).write_text("mine")
    refused(run(name), capsys, tmp_path / name, *fragments)
    assert files(tmp_path) == {tmp_path / "full/notes.txt": b"mine", tmp_path / "file": b"mine"}


@pytest.mark.parametrize("flags, fragments", [
    (["--min-characters", 10_000], ["no text left of 43", "43 under 10000 characters"]),
    (["--max-text-tokens", 20], ["no text left of 43", "3 under 20 tokens", "40 20 tokens or more",
                                 "--max-text-tokens"]),
    (["--min-characters", 30, "--max-text-tokens", 30],
     ["no text left of 43", "2 under 30 characters", "1 under 20 tokens", "40 30 tokens or more"]),
    (["--batch-size", 41], ["--batch-size 41", "the 40 texts", "3 under 20 tokens", "lower it"]),
    (["--batch-size", 4, "--num-texts", 3], ["--batch-size 4", "the 3 texts", "lower it"]),
])
def test_too_few_texts_are_told_with_the_count_of_each_rule(
    flags, fragments, run, texts, tmp_path, capsys
):
    path = tmp_path / "more.txt"
    path.write_text("short\nsmall\nthe embedding of the text is here\n" + texts.read_text())
    content = path.read_bytes()
    refused(run("run", "--text", path, *flags), capsys, path, *fragments)
    assert path.read_bytes() == content


@pytest.mark.parametrize("flag, value, fragment", [
    ("--memory-tokens", 0, "must be at least 1"), ("--memory-tokens", -2, "must be at least 1"),
    ("--batch-size", 0, "must be at least 1"), ("--lora-r", 0, "must be at least 1"),
    ("--chunk-rows", 0, "must be at least 1"), ("--save-every", 0, "must be at least 1"),
    ("--steps", -1, "must be at least 0"), ("--seed", -1, "must be at least 0"),
    ("--lr", "nan", "must be at least 0"), ("--lr", -0.1, "must be at least 0"),
    ("--min-lr", "nan", "must be at least 0"), ("--weight-decay", -1.0, "must be at least 0"),
    ("--clip", "nan", "must be at least 0"), ("--nll-weight", "-inf", "must be at least 0"),
    ("--warmup", 1.0, "must be below 1"), ("--lora-dropout", 1.0, "must be below 1"),
    ("--lora-dropout", "nan", "must be at least 0"),
    ("--max-tokens", 21, "must be at least --memory-tokens + 20 = 22"),
])
def test_a_setting_that_no_run_can_have_is_refused(flag, value, fragment, run, tmp_path, capsys):
    refused(run("run", f"{flag}={value}"), capsys, f"{flag} {value}: {fragment}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flag, value", [
    ("--lr", "inf"), ("--min-lr", "inf"), ("--lora-alpha", "nan"), ("--nll-weight", "inf"),
    ("--device", "banana"), ("--seed", 2**70),
])
def test_a_setting_that_is_not_finite_or_unknown_is_refused_too(flag, value, run, tmp_path, capsys):
    refused(run("run", "--steps", 1, flag, value), capsys, f"{flag} {value}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags", [
    ["--model", "nowhere"], ["--text", "nowhere.txt"], ["--min-characters", 10_000],
], ids=lambda flags: flags[0])
def test_after_a_mistake_the_mended_command_runs(flags, run, tmp_path):
    assert run("run", "--steps", 1, *flags) == 2
    assert run("run", "--steps", 1) == 0


@pytest.mark.parametrize("flags, fragments", [
    (["--model", "nowhere"], ["nowhere: no such folder"]),
    (["--model", "."], ["config.json: missing"]),
    (["--text", "nowhere.txt"], ["nowhere.txt: no such file", "--text"]),
    (["--text", "bad.jsonl"], ["bad.jsonl, line 1: not JSON"]),
])
def test_a_missing_model_or_text_is_named(flags, fragments, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text("{\n")
    refused(run("run", *flags), capsys, *fragments)
    assert not (tmp_path / "run/checkpoints").exists()


@pytest.mark.parametrize("other", [{"hidden_size": 16}, {"seed": 1}], ids=["shape", "weights"])
def test_a_checkpoint_of_another_base_is_refused(other, run, checkpoint, tmp_path, capsys):
    base = checkpoint("base")
    with signal_after(1, signal.SIGTERM):
        assert run("run", "--steps", 4, "--model", base) == 143
    shutil.rmtree(base)
    checkpoint("base", **other)
    capsys.readouterr()
    refused(run("run", "--steps", 4, "--model", base, "--resume"), capsys, "the base of this run")


def test_a_resume_over_other_texts_is_refused(run, texts, tmp_path, capsys):
    path = tmp_path / "texts.txt"
    path.write_text(texts.read_text())
    with signal_after(1, signal.SIGTERM):
        assert run("run", "--steps", 4, "--text", path) == 143
    path.write_text(texts.read_text() + "\n" + "one more text of the same kind " * 9)
    flags = ["--steps", 4, "--text", path, "--resume"]
    refused(run("run", *flags), capsys, "the texts of this run changed", "another --out")


@pytest.mark.parametrize("micro_batch", [
    pytest.param(1, id="texts one by one"),
    pytest.param(0, id="whole batch"),
])
def test_a_loss_that_is_not_finite_stops_the_run_before_the_update(
    micro_batch, run, tiny, texts, tmp_path, capsys
):
    """A checkpoint whose row for `~` is infinite, and one text with a `~`, the third of step 5."""
    bad = global_batch(0, 5, 4, 40)[2]
    lines, path, out = texts.read_text().splitlines(), tmp_path / "texts.txt", tmp_path / "run"
    lines[bad] = "~" * 60  # wherever this is split, the context has one
    path.write_text("\n".join(lines))
    flags = ["--text", path, "--steps", 10, "--save-every", 2, "--micro-batch", micro_batch]
    with signal_after(1, signal.SIGTERM):
        assert run("run", *flags) == 143
    last = out / "checkpoints/step-0000002"
    weights, about = last / "weights.safetensors", unseal(last)
    tensors = load_file(weights)
    vocabulary = json.loads((tiny / "tokenizer.json").read_text())["model"]["vocab"]
    tensors["table"][vocabulary["~"]] = float("inf")
    save_file(tensors, weights)
    seal(last, about)

    capsys.readouterr()
    message = refused(run("run", *flags, "--resume"), capsys, "step 5: the loss (nan)",
                      "nothing was updated", "Lower --lr", out / "checkpoints")
    named = re.search(r"the filters of .*?\): ([\d, ]+)\.", message)[1].split(", ")
    assert str(bad) in named
    assert named == [str(bad)] or micro_batch == 0
    assert len(losses(out)) == 5 and np.isfinite(losses(out)).all()
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == [
        "step-0000002", "step-0000004"]
    assert not (out / "encoder").exists()
    before = files(out)
    assert run("run", *flags, "--resume") == 2
    unlike = {path.name for path, content in files(out).items() if before.get(path) != content}
    assert unlike <= {"metrics.jsonl"}  # its speeds


def test_a_gradient_that_is_not_finite_stops_the_run_too(run, tmp_path, capsys):
    code = run("run", "--steps", 2, "--nll-weight", 1e30)
    message = refused(code, capsys, "step 0: the loss (", "gradient's norm (inf)", "nothing was")
    assert float(re.search(r"the loss \((.*?)\)", message)[1]) < 1e32
    assert not (tmp_path / "run/checkpoints").exists() and metrics(tmp_path / "run") == []


# the hub's client sleeps for 23 seconds in all before it gives up
IMPATIENT = """
import sys, time
time.sleep = lambda _: None
import pretrain_ctkd
sys.exit(pretrain_ctkd.main())
"""


@pytest.mark.parametrize("name, arguments, length", [
    ("resume", ["--resume"], 1),
    ("text", ["--text", "nowhere.txt"], 1),
    ("hub", ["--model", "owner/name"], 3),  # what is wrong, what to look at, the way round it
])
def test_as_a_command_bad_input_is_a_clear_line_on_stderr(
    name, arguments, length, tiny, texts, tmp_path
):
    program = ["-c", IMPATIENT] if name == "hub" else [str(ROOT / "pretrain_ctkd.py")]
    done = subprocess.run(
        [sys.executable, *program, "--model", str(tiny), "--text", str(texts), "--out", "run",
         *FAST, *arguments],
        cwd=tmp_path, env=hub_environment(tmp_path, dead_url()), capture_output=True, text=True,
        timeout=100,
    )
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    lines = [x for x in done.stderr.splitlines() if "thrown while" not in x and "Retrying" not in x]
    assert lines[0].startswith("error: ") and len(lines) == length


FAULTS = """
import resource, sys, torch
from training import keep_freed_memory
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
    """120 MiB are 30,720 pages: as many faults if the system has to give them again."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    done = subprocess.run([sys.executable, "-c", FAULTS], cwd=ROOT, env={**clean, **environment},
                          capture_output=True, text=True, check=True)
    assert (int(done.stdout) < 30) == kept  # 60 where pages are of 2 MiB

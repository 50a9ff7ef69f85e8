"""Interruptions of every kind: the same numbers afterwards, or a clear end with nothing lost."""

import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from test_contrastive_runs import FAST as FAST2
from test_contrastive_runs import ctkd, home  # noqa: F401  fixtures
from test_pretrain import FAST, ROOT, files, losses, metrics, same_tensors, signal_after
from torch.optim.optimizer import register_optimizer_step_post_hook

import contrastive
import pretrain_ctkd
import training
from data import UserError
from model import finish_renaming, write_folder
from training import Metrics, Ranks, open_run, seal, unseal

ALONE = Ranks(0, 1, torch.device("cpu"))
STAGES = {"ctkd": pretrain_ctkd, "ucl": contrastive, "scl": contrastive}


@pytest.fixture(scope="module")
def argv(home, ctkd, tiny):  # noqa: F811
    """argv(stage, out, flags...): a stage's command line on tiny data."""

    def words(stage: str, out: Path, *flags) -> list[str]:
        if stage == "ctkd":
            own = ["--model", tiny, "--text", home / "texts.txt", *FAST]
        else:
            data = ["--text", home / "texts.txt"] if stage == "ucl" else [
                "--triples", home / "triples.jsonl", "--document-tokens", 40]
            own = ["--stage", stage, "--model", ctkd, *data, *FAST2]
        return [str(word) for word in (*own, "--out", out, *flags)]

    return words


@pytest.fixture
def run(argv, tmp_path, monkeypatch):
    """run(name, flags..., stage=): a stage in this process into tmp_path / name."""
    for stage in STAGES.values():
        monkeypatch.setattr(stage, "report", lambda *_: None)  # it takes longer than the run

    def main(name: str, *flags, stage="ctkd") -> int:
        return STAGES[stage].main(argv(stage, tmp_path / name, *flags))

    return main


@pytest.fixture(scope="module")
def pair(argv):
    """pair(stage, out, flags..., fault=(kind, rank, step)): two processes, a result for each.

    All their jobs meet over one store, as those do that torchrun starts again and again.
    """
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes = [
        subprocess.Popen(
            [sys.executable, ROOT / "tests/pair.py"], text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, env={
                **os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "RANK": str(rank),
                "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"})
        for rank in range(2)]

    def job(stage: str, out: Path, *flags, fault=None) -> list[SimpleNamespace]:
        words = {"stage": stage, "argv": argv(stage, out, *flags), "fault": fault}
        timer = threading.Timer(120, end_all, [processes])
        timer.start()
        for process in processes:
            process.stdin.write(json.dumps(words) + "\n")
            process.stdin.flush()
        answers = [process.stdout.readline() for process in processes]
        timer.cancel()
        return [SimpleNamespace(**json.loads(answer)) for answer in answers]

    yield job
    for process in processes:
        process.stdin.close()
        assert process.wait(60) == 0


def end_all(processes: list[subprocess.Popen]):
    """What hangs shall fail, not stall."""
    for process in processes:
        process.kill()


def codes(results) -> list[int]:
    return [result.code for result in results]


def numbers(out: Path) -> list[dict]:
    """metrics.jsonl without the one entry that no two runs share."""
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in metrics(out)]


def assert_same_run(left: Path, right: Path, last: int):
    """Equal metrics, every step once; equal weights, moments and encoder, bit for bit."""
    assert numbers(left) == numbers(right)
    assert [row["step"] for row in metrics(left)] == list(range(last))
    for name in ("weights", "optimizer"):
        path = f"checkpoints/step-{last:07d}/{name}.safetensors"
        assert same_tensors(left / path, right / path)
    encoders = [sorted(p.relative_to(out) for p in (out / "encoder").rglob("*.safetensors"))
                for out in (left, right)]
    assert encoders[0] == encoders[1] and len(encoders[0]) >= 2
    for path in encoders[0]:
        a, b = load_file(left / path), load_file(right / path)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def checkpoints(out: Path) -> list[str]:
    return sorted(p.name for p in (out / "checkpoints").iterdir())


# ---------------------------------------------------------------------------------------------
# 10 steps are 4 and 6, on one process and on two
# ---------------------------------------------------------------------------------------------

DROPOUT = {"ctkd": ["--lora-dropout", 0.3, "--micro-batch", 1],
           "ucl": ["--lora-dropout", 0.3, "--attention-dropout", 0.2, "--micro-tokens", 64],
           "scl": ["--lora-dropout", 0.3, "--attention-dropout", 0.2, "--micro-tokens", 64]}


@pytest.mark.parametrize("stage", list(STAGES))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [1, 2])
def test_ten_steps_are_four_and_six_bit_for_bit(size, dtype, stage, run, pair, tmp_path):
    flags = ["--steps", 10, "--dtype", dtype, *DROPOUT[stage]]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    if size == 1:
        assert run("whole", *flags, stage=stage) == 0
        with signal_after(3, signal.SIGTERM):
            assert run("parts", *flags, stage=stage) == 143
        assert checkpoints(parts) == ["step-0000004"] and len(losses(parts)) == 4
        assert run("parts", *flags, "--resume", stage=stage) == 0
    else:
        assert codes(pair(stage, whole, *flags)) == [0, 0]
        assert codes(pair(stage, parts, *flags, fault=("SIGTERM", 1, 3))) == [143, 143]
        assert checkpoints(parts) == ["step-0000004"] and len(losses(parts)) == 4
        assert codes(pair(stage, parts, *flags, "--resume")) == [0, 0]
    assert_same_run(parts, whole, 10)


@pytest.mark.parametrize("stage, dropout", [("ctkd", 0.0), ("ucl", 0.2), ("scl", 0.2)])
@pytest.mark.parametrize("before", [1, 2])
def test_another_number_of_processes_goes_on_with_the_same_samples(
    before, stage, dropout, run, pair, tmp_path, capsys
):
    """Stage 1's dropout depends on the micro-batches of a rank, that of the others does not."""
    flags = ["--steps", 10, "--dtype", "float64", "--lora-dropout", dropout]
    assert run("whole", *flags, stage=stage) == 0
    parts = tmp_path / "parts"
    if before == 1:
        with signal_after(3, signal.SIGTERM):
            assert run("parts", *flags, stage=stage) == 143
        printed = pair(stage, parts, *flags, "--resume")[0].out
    else:
        assert codes(pair(stage, parts, *flags, fault=("SIGINT", 0, 3))) == [130, 130]
        capsys.readouterr()
        assert run("parts", *flags, "--resume", stage=stage) == 0
        printed = capsys.readouterr().out
    assert f"note: processes {before} -> {3 - before}: the same samples" in printed
    for ours, theirs in zip(metrics(parts), metrics(tmp_path / "whole"), strict=True):
        assert all(ours[key] == theirs[key] for key in ("step", "learning_rate", "real_tokens"))
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-9)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-7)


def test_deterministic_algorithms_are_asked_for_and_change_nothing_on_the_cpu(run, tmp_path):
    assert run("plain", "--steps", 3) == 0 and not torch.are_deterministic_algorithms_enabled()
    try:
        assert run("strict", "--steps", 3, "--deterministic") == 0
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same_run(tmp_path / "strict", tmp_path / "plain", 3)


def test_a_checkpoint_is_written_when_the_last_one_is_old(run, tmp_path, monkeypatch):
    """A clock that advances by a minute whenever it is read (once a step, and when saving)."""
    minutes = iter(range(1000))
    monkeypatch.setattr(training.time, "monotonic", lambda: 60.0 * next(minutes))
    saved, save = [], training.Checkpoints.save
    monkeypatch.setattr(training.Checkpoints, "save",
                        lambda self, step: (saved.append(step), save(self, step)))
    assert run("run", "--steps", 10, "--save-minutes", 3) == 0
    assert saved == [3, 6, 9, 10]
    saved.clear()
    assert run("off", "--steps", 10) == 0
    assert saved == [10]


# ---------------------------------------------------------------------------------------------
# Damaged checkpoints
# ---------------------------------------------------------------------------------------------


def truncate(path: Path, draw: random.Random):
    os.truncate(path, draw.randrange(path.stat().st_size))


def flip(path: Path, draw: random.Random):
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def delete(path: Path, draw: random.Random):
    path.unlink()


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", [truncate, flip, delete])
def test_a_damaged_checkpoint_is_passed_over(damage, name, run, tmp_path, capsys):
    flags = ["--steps", 6, "--save-every", 2]
    assert run("whole", *flags) == 0
    out = shutil.copytree(tmp_path / "whole", tmp_path / "run")
    shutil.rmtree(out / "encoder")
    last = out / "checkpoints/step-0000006"
    damage(last / name, random.Random(1))
    shutil.copy(tmp_path / "whole/config.json", out)
    (out / "config.json").write_text(
        (out / "config.json").read_text().replace(str(tmp_path / "whole"), str(out)))
    capsys.readouterr()
    assert run("run", *flags, "--resume") == 0
    printed = capsys.readouterr().out
    note = next(line for line in printed.splitlines() if line.startswith("note: "))
    assert str(last / name) in note and "going on from the checkpoint before it" in note
    assert_same_run(out, tmp_path / "whole", 6)
    assert checkpoints(out) == ["step-0000004", "step-0000006"]
    assert unseal(last)["step"] == 6


def test_when_all_checkpoints_are_damaged_nothing_is_touched(run, tmp_path, capsys):
    assert run("run", "--steps", 4, "--save-every", 2) == 0
    out = tmp_path / "run"
    for step in (2, 4):
        truncate(out / f"checkpoints/step-000000{step}/weights.safetensors", random.Random(0))
    before = files(out)
    capsys.readouterr()
    assert run("run", "--steps", 4, "--save-every", 2, "--resume") == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "step-0000002/weights.safetensors: damaged" in message
    assert f"remove {out / 'checkpoints'} to start" in message
    assert files(out) == before
    shutil.rmtree(out / "checkpoints")
    assert run("run", "--steps", 4, "--save-every", 2, "--resume") == 0
    assert [row["step"] for row in metrics(out)] == [0, 1, 2, 3]


def test_a_damaged_checkpoint_of_a_later_step_does_not_push_a_whole_one_out(run, tmp_path):
    assert run("run", "--steps", 8, "--save-every", 4) == 0
    out = tmp_path / "run"
    (out / "checkpoints/step-0000008/state.json").unlink()
    with signal_after(1, signal.SIGTERM):
        assert run("run", "--steps", 8, "--save-every", 4, "--resume") == 143
    assert checkpoints(out) == ["step-0000004", "step-0000006"]


def test_every_flipped_bit_of_a_state_is_noticed_or_has_no_meaning(tmp_path):
    (tmp_path / "weights.safetensors").write_bytes(b"some weights")
    about = {"step": 14, "base": "a1" * 4, "texts": "b2" * 4}
    seal(tmp_path, about)
    path = tmp_path / "state.json"
    whole, noticed, state = path.read_bytes(), 0, unseal(tmp_path)
    assert about.items() <= state.items() and list(state["files"]) == ["weights.safetensors"]
    for place in range(8 * len(whole)):
        content = bytearray(whole)
        content[place // 8] ^= 1 << place % 8
        path.write_bytes(content)
        try:
            assert unseal(tmp_path) == state
        except UserError:
            noticed += 1
    assert noticed > 0.9 * 8 * len(whole)  # the rest is white space


@pytest.mark.parametrize("content", [
    b"", b"[]", b"{}", b"[" * 100_000, b'{"step": 3}', b"\xff\xfe",
])
def test_something_else_in_place_of_a_state_is_told(content, tmp_path):
    (tmp_path / "state.json").write_bytes(content)
    with pytest.raises(UserError, match="state.json"):
        unseal(tmp_path)


def test_lines_that_are_no_metrics_are_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 0}\n\xff\xfe\n[1]\n{"a": 1}\n{"step": "x"}\n{"step": 1}\n'
                     b'{"step": 2}\n{"st')
    log = Metrics(path, 2)
    log.write(step=2, loss=1.0)
    assert metrics(tmp_path) == log.rows == [
        {"step": 0}, {"step": 1}, {"step": 2, "loss": 1.0}]


# ---------------------------------------------------------------------------------------------
# Disks that fail
# ---------------------------------------------------------------------------------------------


def after(step: int, action):
    """Do something after so many optimiser steps; returns what undoes the hook."""
    steps = iter(range(1, 1000))
    return register_optimizer_step_post_hook(lambda *_: next(steps) == step and action())


def refused_resumable(run, tmp_path, capsys, code: int, *fragments):
    """The run ended with a line; its checkpoint of step 4 is whole; it can go on to the end."""
    message = capsys.readouterr().err.splitlines()[-1]
    assert code == 2 and message.startswith("error: ")
    assert all(fragment in message for fragment in fragments), message
    out = tmp_path / "run"
    assert unseal(out / "checkpoints/step-0000004")["step"] == 4
    assert list(out.rglob(".*")) == [] and not (out / "encoder").exists()
    assert run("run", "--steps", 9, "--save-every", 4, "--resume") == 0
    assert run("whole", "--steps", 9, "--save-every", 4) == 0
    assert_same_run(out, tmp_path / "whole", 9)


@pytest.mark.parametrize("size, name", [(4000, "step-0000008"), (800, "metrics.jsonl")])
def test_a_disk_that_fills_is_told_and_the_checkpoint_before_serves(
    size, name, run, tmp_path, capsys
):
    """From step 5 on no file can grow beyond `size` bytes: the kernel cuts the writes off."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handle = after(5, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard)))
    try:
        code = run("run", "--steps", 9, "--save-every", 4)
    finally:
        handle.remove()
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    refused_resumable(run, tmp_path, capsys, code, name, "cannot be written", "File too large")


@pytest.mark.parametrize("name", ["weights", "optimizer", "state"])
def test_a_writer_that_fails_halfway_leaves_the_checkpoint_before(
    name, run, tmp_path, capsys, monkeypatch
):
    original, original_seal = training.save_file, training.seal

    def fails(path: Path):
        if path.parent.name == ".step-0000008.writing" and path.stem == name:
            path.write_bytes(path.read_bytes()[:-99])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(training, "save_file",
                        lambda tensors, path: (original(tensors, path), fails(path)))
    monkeypatch.setattr(training, "seal", lambda folder, about: (
        original_seal(folder, about), fails(folder / "state.json")))
    code = run("run", "--steps", 9, "--save-every", 4)
    monkeypatch.setattr(training, "save_file", original)
    monkeypatch.setattr(training, "seal", original_seal)
    refused_resumable(run, tmp_path, capsys, code, "step-0000008: cannot be written",
                      "No space left", "intact")


def test_a_folder_that_can_no_longer_be_written_is_told(run, tmp_path, capsys):
    """A file where the checkpoints were: unlike a read-only folder it stops root too."""
    folder, aside = tmp_path / "run/checkpoints", tmp_path / "aside"

    def swap():
        folder.rename(aside)
        folder.write_text("")

    handle = after(5, swap)
    code = run("run", "--steps", 9, "--save-every", 4)
    handle.remove()
    folder.unlink()
    aside.rename(folder)
    refused_resumable(run, tmp_path, capsys, code, "step-0000008: cannot be written")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes where it likes")
def test_a_folder_that_turns_read_only_is_told(run, tmp_path, capsys):
    folder = tmp_path / "run/checkpoints"
    handle = after(5, lambda: folder.chmod(0o555))
    code = run("run", "--steps", 9, "--save-every", 4)
    handle.remove()
    folder.chmod(0o755)
    refused_resumable(run, tmp_path, capsys, code, "step-0000008", "Permission denied")


@pytest.mark.parametrize("moment", ["while writing", "between the renames", "before the removal"])
def test_a_folder_is_old_or_new_at_every_moment(moment, tmp_path, monkeypatch):
    """Killed at any moment of a second writing, the folder has the first or the second content."""
    target = tmp_path / "best"
    with write_folder(target) as folder:
        (folder / "content").write_text("first")

    class Killed(BaseException):
        pass

    def killed(*_):
        raise Killed

    if moment == "while writing":
        monkeypatch.setattr("model.sync", killed)
    else:
        steps, original = iter(range(2)), os.rename
        monkeypatch.setattr(os, "rename", lambda *a: (
            original(*a), next(steps) == (moment == "before the removal") and killed()))
    monkeypatch.setattr("model.finish_renaming", lambda _: None)  # a killed process mends nothing
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    with pytest.raises(Killed):
        with write_folder(target) as folder:
            (folder / "content").write_text("second")
    monkeypatch.undo()
    finish_renaming(target)
    assert (target / "content").read_text() == (
        "second" if moment == "before the removal" else "first")
    with write_folder(target) as folder:
        (folder / "content").write_text("third")
    assert [p.name for p in tmp_path.iterdir()] == ["best"]


# ---------------------------------------------------------------------------------------------
# One rank of two
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["ctkd", "scl"])
@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_what_is_not_finite_on_one_rank_stops_both_before_the_update(kind, stage, pair, tmp_path):
    out = tmp_path / "run"
    flags = ["--steps", 6, "--save-every", 2, "--batch-size", 6, "--micro-tokens", 64]
    flags = flags[:6] if stage == "ctkd" else flags
    results = pair(stage, out, *flags, fault=(kind, 1, 3))
    assert codes(results) == [2, 2]
    for rank, result in enumerate(results):
        line = result.err.splitlines()[-1]
        assert line.startswith("error on rank 1: step 3: " if rank else "error: step 3: ")
        assert "not finite; nothing was updated" in line and str(out / "checkpoints") in line
    named = line.split("): " if stage == "ctkd" else "(from 0): ")[1].split(". Lower")[0]
    if stage == "scl":
        assert all(name.startswith("triples.jsonl ") for name in named.split(", "))
    if kind == "gradient" or stage == "ctkd":  # in scl each row may have a text that rank 1 reads
        assert len(named.split(", ")) == (6 if kind == "gradient" else 3)
    assert checkpoints(out) == ["step-0000002"] and not (out / "encoder").exists()
    assert [row["step"] for row in metrics(out)] == [0, 1, 2]
    assert codes(pair(stage, out, *flags, "--resume")) == [0, 0]  # the fault does not come again
    assert [row["step"] for row in metrics(out)] == list(range(6))


@pytest.mark.parametrize("stage", ["ctkd", "ucl"])
def test_an_exception_on_one_rank_ends_the_other_with_a_line(stage, pair, tmp_path):
    out = tmp_path / "run"
    flags = ["--steps", 6, "--save-every", 2]
    first, second = pair(stage, out, *flags, fault=("raise", 1, 3))
    assert second.code == 1 and second.err.count("Traceback") == 1
    assert "RuntimeError: injected" in second.err
    assert first.code == 1 and "Traceback" not in first.err
    assert first.err.splitlines()[-1].startswith("error: another rank has died")
    assert checkpoints(out) == ["step-0000002"]
    assert codes(pair(stage, out, *flags, "--resume")) == [0, 0]
    assert codes(pair(stage, tmp_path / "whole", *flags)) == [0, 0]
    assert_same_run(out, tmp_path / "whole", 6)


@pytest.mark.parametrize("stage, kind, code", [("scl", "SIGTERM", 143), ("ctkd", "SIGINT", 130)])
def test_a_signal_to_one_rank_stops_both_after_the_step(stage, kind, code, pair, tmp_path):
    out = tmp_path / "run"
    results = pair(stage, out, "--steps", 6, fault=(kind, 1, 2))
    assert codes(results) == [code, code] and "Traceback" not in results[0].err + results[1].err
    assert "stopped by signal" in results[0].out and results[1].out == ""
    assert checkpoints(out) == ["step-0000003"] and len(losses(out)) == 3


def test_a_silent_rank_is_given_up_after_the_timeout(pair, tmp_path):
    results = pair("ctkd", tmp_path / "run", "--steps", 6, "--timeout", 0.05,
                   fault=("hang", 1, 2))
    assert codes(results) == [1, 1]
    assert "within --timeout: Timed out" in results[0].err.splitlines()[-1]


def test_the_others_wait_for_rank_0_to_save_longer_than_the_timeout(pair, tmp_path):
    results = pair("ctkd", tmp_path / "run", "--steps", 2, "--timeout", 0.05,
                   fault=("slow save", 0, 0))
    assert codes(results) == [0, 0]


def test_ranks_that_read_other_files_are_told(pair, argv, tmp_path, home):  # noqa: F811
    """Two folders under one name, as on two machines: rank 1 finds another text at --text."""
    text = tmp_path / "texts.txt"
    text.write_text((home / "texts.txt").read_text())
    first, second = pair("ctkd", tmp_path / "run", "--text", text, "--steps", 2,
                         fault=("other text", 1, 0))
    assert codes([first, second]) == [2, 2]
    assert "rank 1 has read another base, other data or another checkpoint" in second.err
    assert "another rank has stopped" in first.err


def test_an_incomplete_batch_is_dropped_on_every_rank(pair, run, tmp_path):
    flags = ["--num-texts", 20, "--batch-size", 7, "--dtype", "float64", "--lora-dropout", 0]
    assert codes(pair("ctkd", tmp_path / "two", *flags)) == [0, 0]
    assert run("one", *flags) == 0
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-9)
    assert len(losses(tmp_path / "two")) == 2  # 20 // 7


# ---------------------------------------------------------------------------------------------
# torchrun
# ---------------------------------------------------------------------------------------------


def test_killed_at_drawn_moments_a_run_ends_with_the_undisturbed_bits(tmp_path):
    """bench/crash.py, short: one SIGKILL in each phase, to a rank or to the whole job."""
    done = subprocess.run(
        [sys.executable, ROOT / "bench/crash.py", "--kills", "4", "--steps-per-kill", "3",
         "--stretch", "0.1", "--seed", "2", "--out", tmp_path / "crash"],
        capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "crash/crash.json").read_text())
    assert result["hits"].keys() >= {"forward", "backward", "save", "rename"}
    assert {"job", "rank 0"} <= {kill["whom"] for kill in result["kills"]}
    assert result["differences"] == [] and len(losses(tmp_path / "crash/crashed")) == 12


def test_torchrun_tells_the_traceback_of_the_rank_that_died(argv, tmp_path):
    program = tmp_path / "fails.py"
    program.write_text(
        f"import sys\nsys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
        "from unittest import mock\nimport pretrain_ctkd\nfrom pair import faulty\n"
        "with faulty(pretrain_ctkd, 'raise', 1, 1):\n"
        "    sys.exit(pretrain_ctkd.record(pretrain_ctkd.main)())\n")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         program, *argv("ctkd", tmp_path / "run", "--steps", 4)], stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 1
    record = done.stderr.split("Root Cause")[1]
    assert "rank      : 1" in record and "RuntimeError: injected" in record
    assert "error: another rank has died" in done.stderr and "terminate" not in done.stderr


@pytest.fixture
def torchrun(monkeypatch):
    """torchrun(): the environment of the workers of a new torchrun, which keeps its store."""
    stores = []

    def environment():
        stores.append(torch.distributed.TCPStore(
            "127.0.0.1", 0, is_master=True, wait_for_workers=False))
        for name, value in {
            "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "True", "RANK": "0",
            "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(stores[-1].port),
        }.items():
            monkeypatch.setenv(name, value)

    return environment


class Injected(Exception):
    """A defect."""


def fails_in(step: int):
    """batch_gradient of stage 1, with a defect in one step."""
    whole = pretrain_ctkd.batch_gradient

    def batch_gradient(encoder, corpus, config, at, ranks):
        if at == step:
            raise Injected
        return whole(encoder, corpus, config, at, ranks)

    return batch_gradient


def test_a_worker_that_torchrun_starts_again_goes_on(run, torchrun, tmp_path, monkeypatch):
    """Its command is the first one's, without --resume."""
    flags = ["--steps", 6, "--save-every", 2]
    assert run("whole", *flags) == 0
    torchrun()
    with monkeypatch.context() as patch, pytest.raises(Injected):
        patch.setattr(pretrain_ctkd, "batch_gradient", fails_in(3))
        run("run", *flags)
    assert len(losses(tmp_path / "run")) == 3 and checkpoints(tmp_path / "run") == ["step-0000002"]
    assert run("run", *flags) == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole", 6)


@pytest.mark.parametrize("moment", ["new_encoder", "start_run", "Metrics"])
def test_a_worker_that_died_early_starts_again(moment, run, torchrun, tmp_path, monkeypatch):
    def dies(*_):
        raise Injected

    torchrun()
    with monkeypatch.context() as patch, pytest.raises(Injected):
        patch.setattr(pretrain_ctkd, moment, dies)
        run("run", "--steps", 2)
    (tmp_path / "run/.config.json.writing").write_text("{")
    assert run("run", "--steps", 2) == 0 and len(losses(tmp_path / "run")) == 2


def test_a_worker_that_died_between_two_files_starts_again(run, torchrun, tmp_path, monkeypatch):
    write = training.write_file

    def dies(path, text):
        if path.name == "config.json":
            raise Injected
        write(path, text)

    torchrun()
    with monkeypatch.context() as patch, pytest.raises(Injected):
        patch.setattr(training, "write_file", dies)
        run("run", "--steps", 2)
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["environment.json"]
    assert run("run", "--steps", 2) == 0 and len(losses(tmp_path / "run")) == 2


def test_a_restart_does_not_take_up_the_run_of_another_job(run, torchrun, tmp_path, capsys):
    torchrun()
    with signal_after(1, signal.SIGTERM):
        assert run("run", "--steps", 6) == 143
    before = files(tmp_path)
    torchrun()
    for _ in range(3):
        capsys.readouterr()
        assert run("run", "--steps", 6) == 2
        assert "exists and is not an empty folder" in capsys.readouterr().err
    assert files(tmp_path) == before
    assert run("run", "--steps", 6, "--resume") == 0


def test_one_process_at_a_time_writes_to_a_run(tmp_path):
    config = pretrain_ctkd.Config(out=str(tmp_path / "run"))
    with open_run(config, (), ALONE) as going_on:
        assert not going_on
        with pytest.raises(UserError, match="another process writes to it"):
            with open_run(config, (), ALONE):
                raise AssertionError
        assert [p.name for p in (tmp_path / "run").iterdir()] == [".lock"]
    with open_run(config, (), ALONE) as going_on:
        assert not going_on


def test_a_damaged_environment_does_not_stop_a_resume(run, tmp_path):
    with signal_after(1, signal.SIGTERM):
        assert run("run", "--steps", 3) == 143
    (tmp_path / "run/environment.json").write_text("{")
    assert run("run", "--steps", 3, "--resume") == 0


def test_ranks_without_an_address_are_told(run, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert run("run", "--steps", 3) == 2
    assert "MASTER_ADDR expected, but not set" in capsys.readouterr().err


def test_only_our_checkpoints_are_removed(run, tmp_path):
    """What a killed save has left goes, what somebody has put there stays."""
    folder = tmp_path / "run/checkpoints"
    (folder / ".step-0000003.writing").mkdir(parents=True)
    (folder / "step-0000001-keep").mkdir()
    (folder / "step-0000001.tar").write_text("")
    folder.parent.rename(tmp_path / "other")
    handle = after(1, lambda: (tmp_path / "other/checkpoints").rename(folder))
    assert run("run", "--steps", 5, "--save-every", 2) == 0
    handle.remove()
    assert checkpoints(tmp_path / "run") == [
        "step-0000001-keep", "step-0000001.tar", "step-0000004", "step-0000005"]


def test_scores_that_a_crash_has_prevented_are_made_up_for(run, tmp_path, monkeypatch):
    """Saving comes before scoring: a signal shall not wait for an evaluation."""
    flags = ["--steps", 4, "--eval-tasks", "demo-sts", "--eval-every", 2, "--save-every", 2]
    assert run("whole", *flags, stage="ucl") == 0
    with signal_after(1, signal.SIGTERM):
        assert run("run", *flags, stage="ucl") == 143
    rows = (tmp_path / "run/scores.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [0]
    assert run("run", *flags, "--resume", stage="ucl") == 0
    for name in ("scores.jsonl", "best/ucl/adapter_model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_ctrl_c_before_the_first_step_is_no_traceback(run, tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrain_ctkd, "new_encoder", interrupted)
    assert run("run", "--steps", 2) == 130
    assert capsys.readouterr().err.strip() == "interrupted"

"""A run's life: interrupted in every way, it ends with the same numbers, or with a clear line and
nothing lost."""

import errno
import json
import os
import resource
import signal
import threading
import weakref
from pathlib import Path

import pytest
import torch
from helpers import (
    ONE, STAGES, after_step, assert_same_run, error_line, files, losses, metrics, names,
    signal_after,
)
from kills import kill_again_and_again

import pretrain_ctkd
import runtime.checkpoints
import runtime.run
from data.batches import SplitTexts
from runtime.checkpoints import unseal
from runtime.errors import UserError
from runtime.run import Log, Run, describe_memory, open_run

# ---------------------------------------------------------------------------------------------
# Resumed and killed
# ---------------------------------------------------------------------------------------------


def test_deterministic_algorithms_can_be_demanded_and_change_nothing_on_the_cpu(run, tmp_path):
    assert run("plain", "--steps", 3) == 0 and not torch.are_deterministic_algorithms_enabled()
    try:
        assert run("strict", "--steps", 3, "--deterministic") == 0
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same_run(tmp_path / "strict", tmp_path / "plain", 3)


def test_killed_at_drawn_moments_a_run_ends_with_the_undisturbed_bits(tmp_path):
    """slow/test_kills.py, short: one SIGKILL in each phase, to a rank or to the whole job."""
    result = kill_again_and_again(tmp_path, kills=4, steps_per_kill=3, seed=2, stretch=0.1)
    assert [kill["hit"] for kill in result["kills"]] == ["forward", "backward", "save", "rename"]
    assert {"job", "rank 0"} <= {kill["whom"] for kill in result["kills"]}
    assert_same_run(tmp_path / "killed", tmp_path / "whole", 12)


def test_scores_that_a_crash_prevented_are_made_up_for(run, tmp_path):
    """Saving comes before scoring: a signal does not wait for an evaluation."""
    flags = ["--steps", 4, "--eval-tasks", "demo-sts", "--eval-every", 2, "--save-every", 2]
    assert run("whole", *flags, stage="ucl") == 0
    with signal_after(2, signal.SIGTERM):
        assert run("run", *flags, stage="ucl") == 143
    assert names(tmp_path / "run/checkpoints") == ["step-0000002"]
    rows = (tmp_path / "run/scores.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [0]
    assert run("run", *flags, "--resume", stage="ucl") == 0
    for name in ("scores.jsonl", "best/ucl/adapter_model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_ctrl_c_before_the_first_step_is_no_traceback(run, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrain_ctkd, "new_encoder", interrupted)
    assert run("run", "--steps", 2) == 130
    assert capsys.readouterr().err.strip() == "interrupted"


def test_a_signal_that_is_ignored_stays_ignored(run):
    """As in a shell script's background jobs."""
    before, seen = signal.signal(signal.SIGINT, signal.SIG_IGN), []
    try:
        with after_step(1, lambda: seen.append(signal.getsignal(signal.SIGINT))):
            assert run("run", "--steps", 1) == 0
        assert seen == [signal.getsignal(signal.SIGINT)] == [signal.SIG_IGN]
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_stage_runs_in_a_thread(run):
    """Where no signal can be asked for."""
    codes = []
    thread = threading.Thread(target=lambda: codes.append(run("run", "--steps", 1)))
    thread.start()
    thread.join()
    assert codes == [0]


@pytest.mark.parametrize("stage", list(STAGES))
def test_the_trained_model_is_gone_before_the_report_loads_its_own(stage, run, monkeypatch):
    module, trained, alive = STAGES[stage], [], []
    new = module.new_encoder

    def new_encoder(*inputs):
        found = new(*inputs)
        trained.append(weakref.ref(found if stage == "ctkd" else found[0]))
        return found

    monkeypatch.setattr(module, "new_encoder", new_encoder)
    monkeypatch.setattr(module, "report", lambda *_: alive.append(trained[0]()))
    assert run("run", "--steps", 1, stage=stage) == 0
    assert alive == [None]


# ---------------------------------------------------------------------------------------------
# The folder: its lock, its environment, its logs
# ---------------------------------------------------------------------------------------------


def test_one_process_at_a_time_writes_to_a_run(tmp_path):
    config = pretrain_ctkd.Config(out=str(tmp_path / "run"))
    with open_run(config, ONE) as run:
        assert not run.resuming
        with pytest.raises(UserError, match="another process writes to it"):
            with open_run(config, ONE):
                raise AssertionError
        assert names(tmp_path / "run") == [".lock"]
    with open_run(config, ONE) as run:
        assert not run.resuming
    assert names(tmp_path / "run") == []


def test_a_damaged_environment_does_not_stop_a_resume(run, tmp_path):
    with signal_after(1, signal.SIGTERM):
        assert run("run", "--steps", 3) == 143
    (tmp_path / "run/environment.json").write_text("{")
    assert run("run", "--steps", 3, "--resume") == 0


@pytest.mark.parametrize("rows, said", [
    ([[1, 0], [0, 2], [-3, 0]], "memory 3 rows, mean cosine -0.3333\n"),
    ([[1, 1], [5, 5]], "memory 2 rows, mean cosine 1.0000\n"),
    ([[3, 0], [3, 4]], "memory 2 rows, mean cosine 0.6000\n"),
    ([[1, 0]], ""), ([], ""),
], ids=str)
def test_the_cosine_of_the_memory_rows_is_the_mean_over_pairs(rows, said):
    assert describe_memory(torch.tensor(rows, dtype=torch.float32).reshape(-1, 2)) == said


def test_lines_of_a_log_that_are_no_metrics_are_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 0}\n\xff\xfe\n[1]\n{"a": 1}\n{"step": "x"}\n{"step": 1}\n'
                     b'{"step": 2}\n{"st')
    log = Log(path, 2)
    log.write(step=2, loss=1.0)
    assert metrics(tmp_path) == log.rows == [
        {"step": 0}, {"step": 1}, {"step": 2, "loss": 1.0}]


# ---------------------------------------------------------------------------------------------
# Disks that fail
# ---------------------------------------------------------------------------------------------


def assert_resumable(run, tmp_path, capsys, code: int, *fragments):
    """The run ended with a line; its checkpoint of step 4 is whole; it resumes to the end."""
    error_line(code, capsys, *fragments, bar=True)
    out = tmp_path / "run"
    assert unseal(out / "checkpoints/step-0000004")["step"] == 4
    assert list(out.rglob(".*")) == [] and not (out / "encoder").exists()
    assert run("run", "--steps", 9, "--save-every", 4, "--resume") == 0
    assert run("whole", "--steps", 9, "--save-every", 4) == 0
    assert_same_run(out, tmp_path / "whole", 9)


@pytest.mark.parametrize("size, name", [(4000, "step-0000008"), (800, "metrics.jsonl")])
def test_a_full_disk_is_reported_and_the_checkpoint_before_it_is_whole(
    size, name, run, tmp_path, capsys
):
    """From step 5 on no file can grow beyond `size` bytes: the kernel cuts the writes off."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with after_step(5, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))):
            code = run("run", "--steps", 9, "--save-every", 4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_resumable(run, tmp_path, capsys, code, name, "cannot be written", "File too large")


@pytest.mark.parametrize("name", ["weights", "optimizer", "state"])
def test_a_writer_that_fails_halfway_leaves_the_checkpoint_before_it(
    name, run, tmp_path, capsys, monkeypatch
):
    write, seal = runtime.checkpoints.write_tensors, runtime.checkpoints.seal
    failed = []

    def fail(path: Path):
        if path.parent.name == ".step-0000008.writing" and path.stem == name:
            path.write_bytes(path.read_bytes()[:-99])
            failed.append(path)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(runtime.checkpoints, "write_tensors", lambda path, *rest, **options: (
            write(path, *rest, **options), fail(path)))
        patch.setattr(runtime.checkpoints, "seal", lambda folder, about: (
            seal(folder, about), fail(folder / "state.json")))
        code = run("run", "--steps", 9, "--save-every", 4)
    assert len(failed) == 1
    assert_resumable(run, tmp_path, capsys, code, "step-0000008: cannot be written",
                     "No space left", "intact")


def test_a_folder_that_can_no_longer_be_written_is_reported(run, tmp_path, capsys):
    """A file where the checkpoints were: unlike a read-only folder it stops root too."""
    folder, aside = tmp_path / "run/checkpoints", tmp_path / "aside"

    def swap():
        folder.rename(aside)
        folder.write_text("")

    with after_step(5, swap):
        code = run("run", "--steps", 9, "--save-every", 4)
    folder.unlink()
    aside.rename(folder)
    assert_resumable(run, tmp_path, capsys, code, "step-0000008: cannot be written")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes where it likes")
def test_a_folder_that_turns_read_only_is_reported(run, tmp_path, capsys):
    folder = tmp_path / "run/checkpoints"
    with after_step(5, lambda: folder.chmod(0o555)):
        code = run("run", "--steps", 9, "--save-every", 4)
    folder.chmod(0o755)
    assert_resumable(run, tmp_path, capsys, code, "step-0000008", "Permission denied")


# ---------------------------------------------------------------------------------------------
# Workers that torchrun restarts
# ---------------------------------------------------------------------------------------------


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


def die(*_):
    raise Injected


def test_a_worker_that_torchrun_restarts_resumes_its_run(run, torchrun, tmp_path, monkeypatch):
    """Its command is the first one's, without --resume."""
    flags, whole = ["--steps", 6, "--save-every", 2], SplitTexts.read_batch
    assert run("whole", *flags) == 0
    torchrun()
    with monkeypatch.context() as patch, pytest.raises(Injected):
        patch.setattr(SplitTexts, "read_batch", lambda data, seed, step, size: (
            die() if step == 3 else whole(data, seed, step, size)))
        run("run", *flags)
    assert len(losses(tmp_path / "run")) == 3
    assert names(tmp_path / "run/checkpoints") == ["step-0000002"]
    assert run("run", *flags) == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole", 6)


@pytest.mark.parametrize("place, name", [
    (pretrain_ctkd, "new_encoder"), (Run, "start"), (runtime.run, "Log"),
], ids=["before the encoder", "before the folder is filled", "before the log"])
def test_a_worker_that_died_early_starts_anew(place, name, run, torchrun, tmp_path, monkeypatch):
    torchrun()
    with monkeypatch.context() as patch, pytest.raises(Injected):
        patch.setattr(place, name, die)
        run("run", "--steps", 2)
    (tmp_path / "run/.config.json.writing").write_text("{")
    assert run("run", "--steps", 2) == 0 and len(losses(tmp_path / "run")) == 2


def test_a_worker_that_died_between_two_files_starts_anew(run, torchrun, tmp_path, monkeypatch):
    write = runtime.run.write_file
    torchrun()
    with monkeypatch.context() as patch, pytest.raises(Injected):
        patch.setattr(runtime.run, "write_file", lambda path, text: (
            die() if path.name == "config.json" else write(path, text)))
        run("run", "--steps", 2)
    assert names(tmp_path / "run") == ["environment.json"]
    assert run("run", "--steps", 2) == 0 and len(losses(tmp_path / "run")) == 2


def test_a_restart_does_not_resume_the_run_of_another_job(run, torchrun, tmp_path, capsys):
    torchrun()
    with signal_after(1, signal.SIGTERM):
        assert run("run", "--steps", 6) == 143
    before = files(tmp_path)
    torchrun()
    for _ in range(3):
        capsys.readouterr()
        error_line(run("run", "--steps", 6), capsys, "exists and is not an empty folder")
    assert files(tmp_path) == before
    assert run("run", "--steps", 6, "--resume") == 0

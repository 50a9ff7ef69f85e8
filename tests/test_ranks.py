"""Two processes: what they exchange, the numbers they share, and what one's fault does to both."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers
import torch
import torch.distributed as dist
from helpers import (
    DROPOUT, ONE, ROOT, STAGES, assert_same_run, error_line, losses, metrics, names, refused,
    signal_after,
)

import runtime.ranks
from data.tasks import TASKS, read_task
from runtime.ranks import Ranks, rendezvous


@pytest.fixture(scope="module")
def pair():
    """pair(job): the answers of two processes to a job, see pair.py.

    All their jobs meet over one store, as those do that torchrun restarts again and again.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes = [
        subprocess.Popen(
            [sys.executable, ROOT / "tests/pair.py"], text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, env={
                **os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "RANK": str(rank),
                "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"})
        for rank in range(2)]

    def answers(job: dict) -> list[SimpleNamespace]:
        timer = threading.Timer(600, end_all, [processes])
        timer.start()
        for process in processes:
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
        lines = [process.stdout.readline() for process in processes]
        timer.cancel()
        return [SimpleNamespace(**json.loads(line)) for line in lines]

    yield answers
    for process in processes:
        process.stdin.close()
        assert process.wait(60) == 0


def end_all(processes: list[subprocess.Popen]):
    """What hangs shall fail, not stall."""
    for process in processes:
        process.kill()


@pytest.fixture
def run_pair(pair, argv):
    """run_pair(stage, out, flags..., fault=(kind, rank, step)): a stage on both, a result each."""

    def main(stage: str, out: Path, *flags, fault=None) -> list[SimpleNamespace]:
        return pair({"stage": stage, "argv": argv(stage, out, *flags), "fault": fault})

    return main


def codes(results) -> list[int]:
    return [result.code for result in results]


# ---------------------------------------------------------------------------------------------
# What ranks exchange
# ---------------------------------------------------------------------------------------------


def test_gradients_are_summed_small_ones_in_one_message(pair):
    first, second = pair({"exchange": "gradients", "inputs": []})
    sums = [[2.0 * i + 100 for i in range(n)] for n in (6, 4, 2, 50)]
    sums[2] = [0.0, 1.0]  # rank 1 had none and added zeros
    assert first.sums == second.sums == sums
    assert first.messages == second.messages == [12, 50, 60]


def test_rank_0_works_before_the_others_and_alone_where_it_shall(pair, tmp_path):
    first, second = pair({"exchange": "turns", "inputs": [str(tmp_path)]})
    assert (first.own, second.own) == (10, 11)
    assert first.order[0] == "0" and sorted((tmp_path / "order").read_text().split()) == ["0", "1"]
    assert (first.first, second.first) == ([3, "x", 0], None)
    assert (first.number, second.number) == (40, 40)
    assert (first.share, second.share) == ([0, 1], [2, 3, 4])


def test_a_users_mistake_on_one_rank_ends_a_common_block_on_both(pair):
    first, second = pair({"exchange": "errors", "inputs": []})
    other = "another rank has stopped, see its message"
    assert first.fail_together == ["rank 0 failed", other, "nothing"]
    assert second.fail_together == [other, "rank 1 failed", "nothing"]
    assert (first.on_first, second.on_first) == ("rank 0 failed", other)
    assert getattr(first, "on_first, elsewhere") == "nothing"
    assert getattr(second, "on_first, elsewhere") == "nothing"
    assert first.first_then_others == ["rank 0 failed", other]
    assert second.first_then_others == [other, "rank 1 failed"]
    assert {first.encode, second.encode} == {"bb is refused", other}
    assert first.sum == second.sum == 2


def test_a_process_without_a_gpu_of_its_own_is_refused(monkeypatch):
    monkeypatch.setattr(runtime.ranks, "find_device", torch.device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for device, place in (("cuda", 5), ("cuda:9", 9)):
        monkeypatch.setenv("LOCAL_RANK", "5")
        refused(lambda device=device: runtime.ranks.start_ranks(device, torch.get_num_threads(),
                                                                  1, False),
                f"--device {device}", f"GPU {place}", "there are 4", "--nproc-per-node")


@pytest.mark.parametrize("limit", [0, 1, 2, 100])
@pytest.mark.parametrize("n, size", [(5, 1), (8, 3), (7, 7), (5, 2)])
def test_micro_batches_of_all_ranks_are_the_whole_range_in_order(n, size, limit):
    ranks = [Ranks(rank, size, ONE.device) for rank in range(size)]
    parts = [one.micro_batches(n, limit) for one in ranks]
    assert [i for own in parts for part in own for i in part] == list(range(n))
    assert all(0 < len(part) <= (limit or n) for own in parts for part in own)
    counts = [sum(map(len, own)) for own in parts]
    assert max(counts) - min(counts) <= 1 and counts == [len(one.share(n)) for one in ranks]
    assert limit not in (0, 100) or all(len(own) == 1 for own in parts)


def test_one_process_exchanges_nothing():
    p = torch.zeros(2, requires_grad=True)
    ONE.sum_gradients([p])
    assert p.grad is None and ONE.from_first(3) == 3 and ONE.on_first(max, 1, 2) == 2
    assert ONE.first_then_others(lambda: 5) == 5


# ---------------------------------------------------------------------------------------------
# Rendezvous
# ---------------------------------------------------------------------------------------------


def meet(store, size: int, delays: list[float], seconds=20.0) -> list[str]:
    """What each of `size` ranks that start after these delays finds at "place" on its store."""
    found = [""] * size

    def start(rank: int):
        time.sleep(delays[rank])
        own = rendezvous(store, rank, size, timedelta(seconds=seconds))
        if rank == 0:
            own.set("place", uuid.uuid4().hex)
        found[rank] = own.get("place").decode()

    threads = [threading.Thread(target=start, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds)
    return found


def test_ranks_that_are_restarted_do_not_take_the_store_of_the_dead():
    """Over one store, whoever comes first: the later ones find all that the earlier have left."""
    store, places = dist.HashStore(), []
    for delays in ([0, 0, 0], [0.3, 0, 0.1], [0, 0.3, 0], [0.1, 0.2, 0]):
        place, *others = meet(store, 3, delays)
        assert place and others == [place, place]
        places.append(place)
    assert len(set(places)) == 4


def test_a_call_that_the_dead_did_not_answer_is_not_taken_for_the_new_one():
    """Rank 0 died after its call, before all had answered; one of the dead had."""
    store = dist.HashStore()
    store.set("call", "old")
    store.set("old/2", "a dead rank")
    place, *others = meet(store, 3, [0.3, 0, 0])
    assert place and others == [place, place]


@pytest.mark.parametrize("answered", [False, True])
def test_a_rank_without_rank_0_gives_up_after_the_timeout(answered):
    store = dist.HashStore()
    store.set("call", "old")
    if answered:
        store.set("old/answers", "a dead rank")
    with pytest.raises(RuntimeError, match="rank 0 did not call"):
        rendezvous(store, 1, 2, timedelta(seconds=0.3))


def test_ranks_without_an_address_are_a_clear_error(run, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    error_line(run("run", "--steps", 3), capsys, "MASTER_ADDR expected, but not set")


# ---------------------------------------------------------------------------------------------
# The same numbers: resumed, on another number of processes, with an incomplete batch
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", list(STAGES))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ten_steps_of_two_processes_are_four_and_six_bit_for_bit(dtype, stage, run_pair, tmp_path):
    flags = ["--steps", 10, "--dtype", dtype, *DROPOUT[stage]]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert codes(run_pair(stage, whole, *flags)) == [0, 0]
    assert codes(run_pair(stage, parts, *flags, fault=("SIGTERM", 1, 3))) == [143, 143]
    assert names(parts / "checkpoints") == ["step-0000004"] and len(losses(parts)) == 4
    assert codes(run_pair(stage, parts, *flags, "--resume")) == [0, 0]
    assert_same_run(parts, whole, 10)


@pytest.mark.parametrize("stage, dropout", [("ctkd", 0.0), ("ucl", 0.2), ("scl", 0.2)])
@pytest.mark.parametrize("before", [1, 2])
def test_another_number_of_processes_continues_with_the_same_samples(
    before, stage, dropout, run, run_pair, tmp_path, capsys
):
    """Stage 1's dropout depends on the micro-batches of a rank, that of the others does not."""
    flags = ["--steps", 10, "--dtype", "float64", "--lora-dropout", dropout]
    assert run("whole", *flags, stage=stage) == 0
    parts = tmp_path / "parts"
    if before == 1:
        with signal_after(4, signal.SIGTERM):
            assert run("parts", *flags, stage=stage) == 143
        printed = run_pair(stage, parts, *flags, "--resume")[0].out
    else:
        assert codes(run_pair(stage, parts, *flags, fault=("SIGINT", 0, 3))) == [130, 130]
        capsys.readouterr()
        assert run("parts", *flags, "--resume", stage=stage) == 0
        printed = capsys.readouterr().out
    assert f"note: processes {before} -> {3 - before}: the same samples" in printed
    for ours, theirs in zip(metrics(parts), metrics(tmp_path / "whole"), strict=True):
        assert all(ours[key] == theirs[key] for key in ("step", "learning_rate", "real_tokens"))
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-9)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-7)


def test_an_incomplete_batch_is_dropped_on_every_rank(run_pair, run, tmp_path):
    flags = ["--num-texts", 20, "--batch-size", 7, "--dtype", "float64", "--lora-dropout", 0]
    assert codes(run_pair("ctkd", tmp_path / "two", *flags)) == [0, 0]
    assert run("one", *flags) == 0
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-9)
    assert len(losses(tmp_path / "two")) == 2  # 20 // 7


def test_the_cut_texts_of_each_evaluation_are_counted_over_both_ranks(pair, ctkd, tiny):
    tasks, tokenizer = ["demo-sts", "demo-retrieval"], tokenizers.Tokenizer.from_file(
        str(tiny / "tokenizer.json"))
    results = pair({"exchange": "notes", "inputs": [str(ctkd / "encoder"), tasks]})
    expected = []
    for task in tasks:
        texts, _, _ = read_task(TASKS[task])
        expected.append(sum(len(tokenizer.encode(text).ids) > 40
                            for text in {text for part in texts.values() for text in part}))
    assert results[0].notes == results[1].notes == [
        [f"texts cut to 40 tokens: {n}"] for n in expected]
    assert min(result.own for result in results) > 0 and min(expected) > 0
    assert sum(result.own for result in results) == sum(expected)


# ---------------------------------------------------------------------------------------------
# A fault on one rank
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["ctkd", "scl"])
@pytest.mark.parametrize("kind", ["weight", "gradient"])
def test_what_is_not_finite_on_one_rank_stops_both_before_the_update(
    kind, stage, run_pair, tmp_path
):
    out = tmp_path / "run"
    flags = ["--steps", 6, "--save-every", 2, "--batch-size", 6, "--micro-tokens", 64]
    flags = flags[:6] if stage == "ctkd" else flags
    results = run_pair(stage, out, *flags, fault=(kind, 1, 3))
    assert codes(results) == [2, 2]
    for rank, result in enumerate(results):
        line = result.err.splitlines()[-1]
        assert line.startswith("error on rank 1: step 3: " if rank else "error: step 3: ")
        assert "not finite; nothing was updated" in line and str(out / "checkpoints") in line
    named = re.findall(r"/texts.txt, text \d+\b|triples.jsonl, row \d+\b", line.split("Rows")[1])
    assert {("texts" in name) for name in named} == {stage == "ctkd"}
    if kind == "gradient" or stage == "ctkd":  # in scl each row may have a text that rank 1 reads
        assert len(named) == (6 if kind == "gradient" else 3)
    assert names(out / "checkpoints") == ["step-0000002"] and not (out / "encoder").exists()
    assert [row["step"] for row in metrics(out)] == [0, 1, 2]
    assert codes(run_pair(stage, out, *flags, "--resume")) == [0, 0]  # the fault does not recur
    assert [row["step"] for row in metrics(out)] == list(range(6))


@pytest.mark.parametrize("stage", ["ctkd", "ucl"])
def test_an_exception_on_one_rank_ends_the_other_with_a_line(stage, run_pair, tmp_path):
    out = tmp_path / "run"
    flags = ["--steps", 6, "--save-every", 2]
    first, second = run_pair(stage, out, *flags, fault=("raise", 1, 3))
    assert second.code == 1 and second.err.count("Traceback") == 1
    assert "RuntimeError: injected" in second.err
    assert first.code == 1 and "Traceback" not in first.err
    assert first.err.splitlines()[-1].startswith("error: another rank has died")
    assert names(out / "checkpoints") == ["step-0000002"]
    assert codes(run_pair(stage, out, *flags, "--resume")) == [0, 0]
    assert codes(run_pair(stage, tmp_path / "whole", *flags)) == [0, 0]
    assert_same_run(out, tmp_path / "whole", 6)


@pytest.mark.parametrize("stage, kind, code", [("scl", "SIGTERM", 143), ("ctkd", "SIGINT", 130)])
def test_a_signal_to_one_rank_stops_both_after_the_step(stage, kind, code, run_pair, tmp_path):
    out = tmp_path / "run"
    results = run_pair(stage, out, "--steps", 6, fault=(kind, 1, 2))
    assert codes(results) == [code, code] and "Traceback" not in results[0].err + results[1].err
    assert "stopped by signal" in results[0].out and results[1].out == ""
    assert names(out / "checkpoints") == ["step-0000003"] and len(losses(out)) == 3


def test_a_silent_rank_is_given_up_after_the_timeout(run_pair, tmp_path):
    results = run_pair("ctkd", tmp_path / "run", "--steps", 6, "--timeout", 0.05,
                       fault=("hang", 1, 2))
    assert codes(results) == [1, 1]
    assert "within --timeout: Timed out" in results[0].err.splitlines()[-1]


def test_the_others_wait_for_rank_0_to_save_longer_than_the_timeout(run_pair, tmp_path):
    results = run_pair("ctkd", tmp_path / "run", "--steps", 2, "--timeout", 0.05,
                       fault=("slow save", 0, 0))
    assert codes(results) == [0, 0]


def test_ranks_that_read_different_files_are_stopped(run_pair, tmp_path, home):
    """Two folders under one name, as on two machines: rank 1 finds another text at --text."""
    text = tmp_path / "texts.txt"
    text.write_text((home / "texts.txt").read_text())
    first, second = run_pair("ctkd", tmp_path / "run", "--text", text, "--steps", 2,
                             fault=("other text", 1, 0))
    assert codes([first, second]) == [2, 2]
    assert "rank 1 has read another base, other data or another checkpoint" in second.err
    assert "another rank has stopped" in first.err


def test_torchrun_shows_the_traceback_of_the_rank_that_died(argv, tmp_path):
    program = tmp_path / "fails.py"
    program.write_text(
        f"import sys\nsys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
        "import pretrain_ctkd\nfrom pair import fault\n"
        "with fault('raise', 1, 1):\n"
        "    sys.exit(pretrain_ctkd.record(pretrain_ctkd.main)())\n")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         program, *argv("ctkd", tmp_path / "run", "--steps", 4)], stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 1
    record = done.stderr.split("Root Cause")[1]
    assert "rank      : 1" in record and "RuntimeError: injected" in record
    assert "error: another rank has died" in done.stderr and "terminate" not in done.stderr

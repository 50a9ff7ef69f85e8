"""One of two processes that do jobs together, one after another.

A job is a line of JSON on stdin: a stage's command line and the fault that one rank shall suffer,
or the name of an exchange. The answer is a line of JSON with the exit code, stdout and stderr, or
with what this rank saw. Starting two interpreters for each case would take longer than the cases.
"""

import io
import json
import os
import signal
import sys
import time
import traceback
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

import contrastive
import evaluate
import pretrain_ctkd
import runtime.ranks
from data.batches import Sentences, SplitTexts, TripleRows
from model import load_encoder
from runtime.checkpoints import Checkpoints
from runtime.errors import UserError
from runtime.ranks import Ranks, join_ranks
from runtime.run import Run

RANK = int(os.environ.get("RANK", 0))
STAGES = {"ctkd": pretrain_ctkd, "ucl": contrastive, "scl": contrastive}


# ---------------------------------------------------------------------------------------------
# A stage, with a fault
# ---------------------------------------------------------------------------------------------


@contextmanager
def fault(kind: str, rank: int, at: int):
    """Let one rank suffer a fault of this kind in the step `at` of any stage.

    raise, SIGTERM, SIGINT, hang: when it reads its batch; weight: one is not a number from then on;
    gradient: an entry of its own part of the gradient is infinite.
    """
    trained, now = [], []
    start, sum_gradients = Run.start, Ranks.sum_gradients

    def remember(run, encoder, *inputs):
        trained[:] = [p for p in encoder.parameters() if p.requires_grad]
        return start(run, encoder, *inputs)

    def reading(whole):
        def read_batch(data, seed, step, batch_size):
            now[:] = [step == at and RANK == rank]
            if now[0] and kind == "raise":
                raise RuntimeError("injected")
            if now[0] and kind in ("SIGTERM", "SIGINT"):
                signal.raise_signal(getattr(signal, kind))
            if now[0] and kind == "hang":
                time.sleep(7)
            if now[0] and kind == "weight":
                with torch.no_grad():
                    trained[-1].fill_(float("nan"))
            return whole(data, seed, step, batch_size)

        return read_batch

    def summing(ranks, parameters):
        if now[0] and kind == "gradient":
            parameters[0].grad.view(-1)[0] = float("inf")
        sum_gradients(ranks, parameters)

    with ExitStack() as patches:
        for data in (SplitTexts, Sentences, TripleRows):
            patch = mock.patch.object(data, "read_batch", reading(data.read_batch))
            patches.enter_context(patch)
        patches.enter_context(mock.patch.object(Run, "start", remember))
        patches.enter_context(mock.patch.object(Ranks, "sum_gradients", summing))
        yield


save = Checkpoints.save


def slow_save(checkpoints, step: int):
    """A save that takes rank 0 longer than the others' timeout."""
    time.sleep(7)
    save(checkpoints, step)


def run(job: dict) -> dict:
    """A stage's exit code and output; an exception is shown as by the interpreter."""
    stage, out, err = STAGES[job["stage"]], io.StringIO(), io.StringIO()
    kind, *place = job["fault"] or ("none", 0, 0)
    saving = slow_save if kind == "slow save" else save
    if kind == "other text" and place[0] == RANK:
        other = Path(job["argv"][-3]).with_name("other.txt")
        other.write_text("another text " * 30 + "\n" + Path(job["argv"][-3]).read_text())
        job["argv"][-3] = str(other)
    with (redirect_stdout(out), redirect_stderr(err), fault(kind, *place),
          mock.patch.object(stage, "report", lambda *_: None),
          mock.patch.object(Checkpoints, "save", saving)):
        try:
            code = stage.main(job["argv"])
        except Exception:
            traceback.print_exc()
            code = 1
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


# ---------------------------------------------------------------------------------------------
# Exchanges: what a rank sees of them
# ---------------------------------------------------------------------------------------------


def exchange_gradients(ranks: Ranks) -> dict:
    """Two small tensors, one that only rank 0 has a gradient for, and one that is sent alone."""
    parameters = [torch.zeros(shape, requires_grad=True) for shape in ((2, 3), (4,), (2,), (50,))]
    for i, p in enumerate(parameters):
        if ranks.rank == 0 or i != 2:
            p.grad = torch.arange(p.numel()).float().view_as(p) + 100 * ranks.rank
    sizes = []
    whole = Ranks.sum

    def count(ranks, tensor, group=None):
        sizes.append(tensor.numel())
        return whole(ranks, tensor, group)

    with mock.patch.object(Ranks, "sum", count), mock.patch.object(runtime.ranks, "LARGE", 50):
        ranks.sum_gradients(parameters)
        ranks.sum_gradients([torch.zeros(60)])  # without a small one
    return {"sums": [p.grad.flatten().tolist() for p in parameters], "messages": sizes}


def exchange_turns(ranks: Ranks, folder: str) -> dict:
    """When each rank does its work under first_then_others; what it gets from the others."""
    order = Path(folder) / "order"

    def work() -> int:
        if ranks.rank == 0:
            time.sleep(0.3)
        with open(order, "a") as file:
            file.write(f"{ranks.rank}\n")
        return 10 + ranks.rank

    own = ranks.first_then_others(work)
    first = ranks.on_first(lambda a, b: (a, b, ranks.rank), 3, "x")
    return {"own": own, "first": first, "number": ranks.from_first(40 + ranks.rank),
            "share": list(ranks.share(5)), "order": order.read_text().split()}


def exchange_errors(ranks: Ranks) -> dict:
    """What each rank raises if one of them fails in a common block; afterwards all go on."""

    def failing(rank: int):
        if ranks.rank == rank:
            raise UserError(f"rank {rank} failed")

    def said(block, *inputs) -> str:
        try:
            block(*inputs)
        except UserError as error:
            return str(error)
        return "nothing"

    def together(rank: int):
        with ranks.fail_together():
            failing(rank)

    def encode(texts: list[str]) -> np.ndarray:
        if "bb" in texts:
            raise UserError("bb is refused")
        return np.ones((len(texts), 2), np.float32)

    return {"fail_together": [said(together, rank) for rank in (0, 1, 2)],
            "on_first": said(ranks.on_first, failing, 0),
            "on_first, elsewhere": said(ranks.on_first, failing, 1),
            "first_then_others": [said(ranks.first_then_others, lambda rank=rank: failing(rank))
                                  for rank in (0, 1)],
            "encode": said(evaluate.over_ranks(encode, ranks), ["a", "bb", "ccc"]),
            "sum": ranks.sum(torch.ones(1)).item()}


def exchange_notes(ranks: Ranks, folder: str, tasks: list[str]) -> dict:
    """What the evaluations of an encoder on these tasks, one after another, note."""
    encoder = load_encoder(folder)
    found = [evaluate.evaluate_on_ranks(evaluate.find_task(name), encoder, encoder.encode, "", None,
                                        ranks) for name in tasks]
    return {"notes": [scores["notes"] for scores in found], "own": encoder.cut}


def exchange(job: dict) -> dict:
    """The named exchange between the two ranks."""
    with join_ranks("cpu", 1, 1) as ranks:
        return globals()[f"exchange_{job['exchange']}"](ranks, *job["inputs"])


if __name__ == "__main__":
    for line in sys.stdin:
        job = json.loads(line)
        print(json.dumps(exchange(job) if "exchange" in job else run(job)), flush=True)

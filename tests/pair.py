"""One of two processes that run the stages' command lines together, one job after another.

A job is a line of JSON on stdin: stage, argv, and the fault that one rank shall suffer. The
answer is a line of JSON with exit code, stdout and stderr. Starting two interpreters for each case
would take longer than the cases.
"""

import io
import json
import os
import signal
import sys
import time
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import contrastive
import pretrain_ctkd
import training

RANK = int(os.environ.get("RANK", 0))
STAGES = {"ctkd": pretrain_ctkd, "ucl": contrastive, "scl": contrastive}


def faulty(stage, kind: str, rank: int, at: int):
    """batch_gradient of a stage, with a fault of this kind on one rank in one step."""
    whole = stage.batch_gradient

    def batch_gradient(encoder, batch, config, step, ranks):
        here = RANK == rank and step == at
        trained = [p for p in encoder.parameters() if p.requires_grad]
        if here and kind == "raise":
            raise RuntimeError("injected")
        if here and kind in ("SIGTERM", "SIGINT"):
            signal.raise_signal(getattr(signal, kind))
        if here and kind == "hang":
            time.sleep(7)
        if here and kind == "loss":
            with torch.no_grad():
                trained[-1].fill_(float("nan"))
        found = whole(encoder, batch, config, step, ranks)
        if here and kind == "gradient":
            trained[0].grad.view(-1)[0] = float("inf")
        return found

    return mock.patch.object(stage, "batch_gradient", batch_gradient)


save = training.Checkpoints.save


def slow_save(checkpoints, step: int):
    """A save that takes rank 0 longer than the others' timeout."""
    time.sleep(7)
    save(checkpoints, step)


def run(job: dict) -> dict:
    """A job's exit code and output; an exception is told as the interpreter would."""
    stage, out, err = STAGES[job["stage"]], io.StringIO(), io.StringIO()
    kind, *place = job["fault"] or ("none", 0, 0)
    saving = slow_save if kind == "slow save" else save
    if kind == "other text" and place[0] == RANK:
        other = Path(job["argv"][-3]).with_name("other.txt")
        other.write_text("another text " * 30 + "\n" + Path(job["argv"][-3]).read_text())
        job["argv"][-3] = str(other)
    with (redirect_stdout(out), redirect_stderr(err), faulty(stage, kind, *place),
          mock.patch.object(stage, "report", lambda *_: None),
          mock.patch.object(training.Checkpoints, "save", saving)):
        try:
            code = stage.main(job["argv"])
        except Exception:
            traceback.print_exc()
            code = 1
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)

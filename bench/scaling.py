"""What a CTKD step costs as a function of length, batch, K, vocabulary, threads and processes.

    python bench/scaling.py --dtype bfloat16 --threads 1 --figure docs/scaling.svg
    python bench/scaling.py --shape tiny --axes batch --values 1 2 --turns 1       to try it out

One axis at a time; the others stay at --batch 8 texts of --length 256 tokens, K = 8, the vocabulary
of the shape, --threads and one process. Random weights and ids, dropout 0, each text split in the
middle.

length      of a text, at --tokens 8,192 per batch (128 texts of 64 ... one of 8,192): what is
            linear in the tokens keeps its time per token, attention adds to it; also for encoding
batch       texts per step, in one micro-batch
K           memory tokens: each is read by the encoder and by the student
vocabulary  rows of the head, and of the encoder's own table, which gets a gradient and AdamW
threads     of one process; loss and norm of the first step must agree
processes   that share one batch, --threads each (gloo, on CUDA nccl); they must agree, too

A step is that of bench/time_ctkd.py, with the sum of the gradients over the processes; an encoding
pass is Encoder.embed on the whole batch. In bf16 on the CPU, attention takes another path above 512
tokens (K and BOS counted): a step's encoder and student read half a text, the teacher and an
encoding pass all of it. Seconds and peak (of rank 0) as in bench/harness.py; each point is measured
in fresh processes, and points do not take turns: a change in the machine's load during the run
shows in the numbers.
"""

import json
import sys
from types import SimpleNamespace

import harness
import time_ctkd
import torch
from harness import Timing, whole

from data.batches import SplitBatch
from runtime.devices import flat_ids

K = 8  # memory tokens on the other axes
AXES = {
    "length": [64, 128, 256, 512, 1024, 2048, 4096, 8192],
    "batch": [1, 2, 4, 8, 16, 32],
    "K": [1, 2, 4, 8, 16, 32, 64],
    "vocabulary": [4096, 8192, 32000, 64000, 128256],
    "threads": [1, 2],
    "processes": [1, 2],
}


class Step(time_ctkd.Ours):
    """Our CTKD step on texts that are split in the middle."""

    def prepare(self, turn: int) -> SplitBatch:
        batch = super().prepare(turn)
        splits = [len(ids) // 2 for ids in batch.texts]
        return batch._replace(splits=splits, total_targets=batch.total_tokens - sum(splits))


class Pass(Step):
    """One pass over the texts of a step, to their embeddings."""

    def check(self) -> dict:
        self.modules.eval()
        return {}

    @torch.no_grad()
    def measure(self, turn: int) -> dict:
        texts = self.prepare(turn).texts
        clock = harness.now(self.args.device)
        self.modules.embed(flat_ids(texts, self.args.device), [len(ids) for ids in texts])
        return {"seconds": harness.now(self.args.device) - clock}


KINDS = {"training step": Step, "encoding pass": Pass}


def points_of(axis: str, values: list[int], args) -> list[dict]:
    """The points of an axis: what is measured (`kind`), and at which values of all axes."""
    common = {"length": args.length, "batch": args.batch, "K": K, "vocabulary": args.vocabulary,
              "threads": args.threads[0], "processes": 1}
    if axis == "length":
        return [{**common, "kind": kind, "length": n, "batch": max(1, args.tokens // n)}
                for kind in KINDS for n in values]
    return [{**common, "kind": "training step", axis: value} for value in values]


def measure(point: dict, args) -> Timing:
    """Time a point, in processes of its own."""
    kind, n, k = (point[key] for key in ("kind", "length", "K"))
    ours = json.dumps({"memory_tokens": k, "max_tokens": max(512, n)})
    given = {**vars(args), **point, "threads": [point["threads"]], "lengths": [n, n],
             "dropout": 0.0, "ours": ours}
    found = harness.race({kind: KINDS[kind]}, SimpleNamespace(**given), lambda *_: None,
                         processes=point["processes"])
    return found[kind]


def table(axis: str, points: list[dict], timings: list[Timing]) -> str:
    """Markdown: the points of an axis, one kind after another."""
    lines, first = [], {}
    for point, timing in zip(points, timings):
        per_token = timing.median / (point["batch"] * point["length"])
        seconds, _, peak = timing.cells(timing)
        lines.append([point["kind"], f"{point[axis]:,}", point["batch"], seconds,
                      f"{1 / per_token:,.0f}",
                      f"{per_token / first.setdefault(point['kind'], per_token):.2f}", peak])
    return harness.table(("measured", axis, "texts", harness.TIMES[0], "real tokens/s",
                          "time per token / first", harness.TIMES[2]), lines)


def draw(axes: dict[str, dict], path: str):
    """The figure: a panel for each axis, medians with their range."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams["svg.fonttype"] = "none"  # text stays text
    wide, high = min(3, len(axes)), -(-len(axes) // 3)
    figure = Figure((3.6 * wide, 3 * high), layout="constrained")
    for i, (axis, found) in enumerate(axes.items(), start=1):
        panel = figure.add_subplot(high, wide, i)
        for kind in {point["kind"]: None for point in found["points"]}:
            x, y, below, above = [], [], [], []
            for point, timing in zip(found["points"], found["timings"]):
                if point["kind"] == kind:  # on the length axis, µs per token
                    scale = 1e6 / point["batch"] / point["length"] if axis == "length" else 1
                    x.append(point[axis])
                    y.append(scale * timing.median)
                    below.append(y[-1] - scale * min(timing.seconds))
                    above.append(scale * max(timing.seconds) - y[-1])
            panel.errorbar(x, y, [below, above], fmt="o-", markersize=3, label=kind)
        panel.set(xlabel=axis, ylabel="µs a real token" if axis == "length" else "s a step",
                  xscale="log", yscale="log")
        panel.set_xticks(x, [f"{value:,}" for value in x], rotation=45)
        panel.xaxis.minorticks_off()
        panel.legend(frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Date": None} if path.endswith(".svg") else None)


def bench(args):
    """Measure the axes asked for, and draw the figure; yields results and the table of each."""
    axes = {}
    for axis in args.axes:
        points, timings = points_of(axis, args.values or AXES[axis], args), []
        for point in points:
            timings.append(measure(point, args))
            print(f"{point}: {timings[-1].median:.4g} s", file=sys.stderr, flush=True)
        if axis in ("threads", "processes"):
            time_ctkd.check({f"{point[axis]} {axis}": timing.first
                             for point, timing in zip(points, timings)}, args)
        axes[axis] = {"points": points, "timings": timings}
        yield {"axes": axes}, table(axis, points, timings)
    if args.figure:
        draw(axes, args.figure)


def parse():
    """Parse the command line."""
    parser = harness.new_parser(__doc__, shape="7m", dtype="bfloat16", device="cpu", threads=[1],
                                turns=5, warm_up=1)
    add = parser.add_argument
    add("--axes", nargs="+", choices=list(AXES), default=list(AXES), help="those to measure")
    add("--values", type=whole(), nargs="+", help="of the one axis named")
    add("--length", type=whole(20), default=256, help="tokens of a text on the other axes")
    add("--batch", type=whole(), default=8, help="texts of a step on the other axes")
    add("--vocabulary", type=whole(4), help="V on the other axes, if not the shape's")
    add("--tokens", type=whole(), default=8192, help="length: tokens of a batch")
    add("--figure", help="draw it there, with matplotlib")
    args = parser.parse_args()
    if args.values and len(args.axes) > 1:
        parser.error("--values are those of one axis: name it with --axes")
    return args


if __name__ == "__main__":
    sys.exit(harness.main(__file__, parse, bench))

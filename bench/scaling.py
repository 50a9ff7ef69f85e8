"""What a CTKD step and an encoding pass cost, as functions of length, batch, K, vocabulary, ranks.

    python bench/scaling.py --shape 7m --dtype bfloat16 --threads 1 --figure bench/scaling.svg
    python bench/scaling.py --shape tiny --axes batch --values 1 2 --repeats 1     to try it out
    python bench/scaling.py --draw bench/results/scaling.json --figure scaling.svg

One axis at a time; the others stay at --batch 8 texts of --length 256 tokens, K = 8 and the
vocabulary of the shape. Random weights and ids, dropout 0, each text cut in its middle.

length      of a text, at --tokens 8,192 a batch (128 texts of 64 ... one of 8,192): what is linear
            in the tokens keeps its time per token, what attention adds is seen; also for encoding
batch       texts of a step, in one micro-batch
K           memory tokens: each is read by the encoder and by the student
vocabulary  rows of the head, and of the encoder's own table, which gets a gradient and AdamW
ranks       processes x threads each: 1 x 1, 1 x --nproc (CPU only) and --nproc x 1 (gloo, on CUDA
            nccl), one batch shared among them; loss and norm of the first step must agree

A step is pretrain_ctkd.batch_gradient, the sum over the ranks, clip and AdamW, as bench/step.py
has it; an encoding pass is Encoder.embed on the whole batch. In bf16 on the CPU `attend` goes
another way above 512 tokens (K and BOS counted): a step's encoder and student read half a text,
the teacher and an encoding pass all of it.

Each point is measured in a fresh process: a warm-up, then --repeats turns of new texts. Real tokens
are the texts' with BOS. Peak: of the process (rank 0's), the highest resident memory (VmHWM), and
how far it is above that after the imports; CUDA: torch.cuda.max_memory_allocated. Points do not
take turns: a change in the machine's load during the run is in the numbers. Not tried on CUDA yet.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import psutil
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project root

import step

import pretrain_ctkd as stage1
from bench import evaluate as sibling
from data import UserError
from model import LlamaConfig, flat_ids
from training import Ranks, leave_ranks, reduce_gradients, start_ranks

SHAPES = {**step.SHAPES, "7m": LlamaConfig(8192, 256, 704, 6, 4, 4, 64, 1e-5, True)}  # embedded
K = 8  # memory tokens on the other axes
AXES = {
    "length": [64, 128, 256, 512, 1024, 2048, 4096, 8192],
    "batch": [1, 2, 4, 8, 16, 32],
    "K": [1, 2, 4, 8, 16, 32, 64],
    "vocabulary": [4096, 8192, 32000, 64000, 128256],
    "ranks": [],
}
TITLES = {
    "length": "tokens of a text", "batch": "texts of a step", "K": "K, memory tokens",
    "vocabulary": "V, vocabulary", "ranks": "processes x threads",
}
KINDS = {"step": "training step", "encoding": "encoding pass"}

# ---------------------------------------------------------------------------------------------
# A worker: one point in a process (or several) of its own
# ---------------------------------------------------------------------------------------------


class Ours(step.Ours):
    """Ours, on several ranks."""

    def __init__(self, args, ranks: Ranks):
        super().__init__(args)
        self.ranks = ranks

    def gradient(self, step: int) -> Tensor:
        loss = super().gradient(step)
        reduce_gradients(self.parameters, self.ranks)
        return self.ranks.sum(loss)


class Encoding:
    """One pass over the texts of a step, to their embeddings."""

    def __init__(self, ours: Ours):
        self.ours, self.device = ours, str(ours.ranks.device)
        ours.encoder.eval()

    @torch.no_grad()
    def measure(self, turn: int) -> dict:
        texts, _ = step.batch_of(self.ours.config, self.ours.corpus, turn)
        clock = step.now(self.device)
        self.ours.encoder.embed(flat_ids(texts, self.device), [len(ids) for ids in texts])
        return {"seconds": step.now(self.device) - clock}


def worker(args):
    """Measure the point; rank 0 prints its answer as a line of JSON."""
    ranks = start_ranks(args.device, args.threads, timeout_minutes=30)  # keeps freed memory, too
    cuda = ranks.device.type == "cuda"
    imported = 0 if cuda else psutil.Process().memory_info().rss
    # this process is for one point: here is what bench/step.py draws, and where stage 1 cuts
    step.SHAPES[args.shape] = replace(SHAPES[args.shape], vocab_size=args.vocabulary)
    step.SHORTEST = step.LONGEST = args.length
    stage1.split_point = lambda config, position, length: length // 2
    ours = Ours(args, ranks)
    measured = step.Step(ours, args) if args.kind == "step" else Encoding(ours)
    first, *turns = [measured.measure(i) for i in range(args.steps + 1)]
    if ranks.rank == 0:
        print(json.dumps({
            "seconds": [turn["seconds"] for turn in turns],
            "loss": first.get("loss"), "norm": first.get("norm"), "imported_bytes": imported,
            "peak_bytes": step.peak_bytes(args.device) if cuda else sibling.peak_bytes(),
            "device": torch.cuda.get_device_name() if cuda else step.cpu_name()}))
    leave_ranks(ranks)


# ---------------------------------------------------------------------------------------------
# The parent: points, tables, figure
# ---------------------------------------------------------------------------------------------


def points_of(axis: str, values: list[int], args) -> list[dict]:
    """The points of an axis; each says in `kind` and `value` how it is listed."""
    common = {"kind": "step", "length": args.length, "batch": args.batch, "K": K, "processes": 1,
              "threads": args.threads, "vocabulary": SHAPES[args.shape].vocab_size}
    if axis == "length":
        return [{**common, "kind": kind, "value": n, "length": n, "batch": max(1, args.tokens // n)}
                for kind in KINDS for n in values]
    if axis == "ranks":
        n, cpu = args.nproc, args.device == "cpu"
        return [{**common, "value": f"{p} x {t}", "processes": p, "threads": t}
                for p, t in ((1, 1), (1, n), (n, 1)) if cpu or t == 1]
    return [{**common, "value": value, axis: value} for value in values]


def measure(point: dict, args) -> dict:
    """The point with what its worker found."""
    ours = {"memory_tokens": point["K"], "max_tokens": max(512, point["length"] + point["K"])}
    settings = {**vars(args), **point, "steps": args.repeats, "ours": json.dumps(ours),
                "dropout": 0.0, "share_device": False}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
                str(point["processes"])]
    done = subprocess.run(
        [sys.executable, *(torchrun if point["processes"] > 1 else []), __file__, "--worker",
         json.dumps(settings)], text=True, stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": str(point["threads"])},
    )
    if done.returncode:
        raise UserError(f"the worker of {point} ended with code {done.returncode}, see above; -9 "
                        f"means too little memory")
    found = {**point, **json.loads(done.stdout.splitlines()[-1])}
    tokens, seconds = point["batch"] * point["length"], median(found["seconds"])
    print(f"{KINDS[point['kind']]}, {point['value']}: {seconds:.4g} s", file=sys.stderr, flush=True)
    return {**found, "median": seconds, "per_token": seconds / tokens}


def table(axis: str, rows: list[dict]) -> list[str]:
    """Markdown: the points of an axis, one kind after another."""
    titles = (TITLES[axis], "measured", "texts", "s, median (min-max)", "real tokens/s",
              "time per token / first", "peak GiB (above imports)")
    lines = [f"| {' | '.join(titles)} |", "|---:|---|" + "---:|" * 5]
    for row in rows:
        first = next(other for other in rows if other["kind"] == row["kind"])
        value, seconds = row["value"], row["seconds"]
        cells = [value if axis == "ranks" else f"{value:,}", KINDS[row["kind"]], str(row["batch"]),
                 f"{row['median']:.4g} ({min(seconds):.4g}-{max(seconds):.4g})",
                 f"{1 / row['per_token']:,.0f}", f"{row['per_token'] / first['per_token']:.2f}",
                 f"{row['peak_bytes'] / step.GIB:.2f} "
                 f"({(row['peak_bytes'] - row['imported_bytes']) / step.GIB:.2f})"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def draw(content: dict, path: Path):
    """A panel for each axis: medians with their range, and a straight line of slope 1."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter
    except ImportError:
        print("no figure: matplotlib is not installed; the numbers are in the JSON")
        return
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "", "font.size": 9,
                                "axes.spines.top": False, "axes.spines.right": False})
    args, axes = content["arguments"], content["axes"]
    wide, high = min(3, len(axes)), -(-len(axes) // 3)
    figure = Figure((3.6 * max(2, wide), 3.1 * high + 0.6), layout="constrained")
    figure.suptitle(f"{args['shape']} Llama, {args['dtype']}, {content['device']}\nunless drawn: "
                    f"{args['batch']} texts of {args['length']} tokens (length: {args['tokens']:,} "
                    f"tokens in all), K = {K}, {args['threads']} thread(s)", fontsize=9)
    for i, (axis, rows) in enumerate(axes.items(), start=1):
        panel = figure.add_subplot(high, wide, i, xlabel=TITLES[axis])
        panel.set_ylabel("µs a real token" if axis == "length" else "s a step")
        ends = []
        for kind, colour in zip(KINDS, ("C0", "C1")):
            points = [row for row in rows if row["kind"] == kind]
            if not points:
                continue
            scales = [1e6 * p["per_token"] / p["median"] if axis == "length" else 1 for p in points]
            low, y, top = ([scale * of(p["seconds"]) for p, scale in zip(points, scales)]
                           for of in (min, median, max))
            x = [p["value"] for p in points]
            bars = [[b - a for a, b in zip(low, y)], [b - a for a, b in zip(y, top)]]
            if axis == "ranks":
                panel.bar(x, y, width=0.5, yerr=bars, color=colour)
                panel.axhline(y[0] / args["nproc"], color="0.5", ls="--",
                              label=f"1 x 1 / {args['nproc']}")
            else:
                panel.errorbar(x, y, bars, fmt="o-", ms=3, color=colour, label=KINDS[kind])
            ends += [min(low), max(top)]
            if axis in ("length", "batch", "vocabulary"):
                label = "slope 1" if kind == "step" else None
                panel.plot(x, [y[-1] * v / x[-1] for v in x], color="0.5", ls="--", label=label)
        if axis in ("length", "batch", "vocabulary"):
            panel.set_xscale("log", base=2)
            panel.set_xticks(x, [f"{v:,}" for v in x], rotation=45 * (max(x) > 999))
            panel.set_yscale("log")
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
            panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            panel.set_ylim(min(ends) / 1.3, max(ends) * 1.3)
        else:  # what grows from a constant, and bars
            panel.set_ylim(0, 1.3 * max(ends))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.yaxis.set_minor_locator(NullLocator())
        panel.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    print(f"drawn in {path}")


def bench(args):
    """Measure the axes asked for; after each of them print its table and write the JSON."""
    content = {"arguments": vars(args), "torch": version("torch"), "load_before": os.getloadavg(),
               "axes": {}}
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    for axis in args.axes:
        rows = [measure(point, args) for point in points_of(axis, args.values or AXES[axis], args)]
        content |= {"device": rows[0]["device"], "load_after": os.getloadavg()}
        content["axes"][axis] = rows
        out.write_text(json.dumps(content, indent=1) + "\n")
        print("\n".join(["", *table(axis, rows)]), flush=True)
        if axis == "ranks":
            step.check_agreement({row["value"]: row for row in rows}, args.dtype)
    print(f"\n{content['device']}, torch {content['torch']}, {args.shape}, {args.dtype}, "
          f"{args.threads} thread(s) but for the ranks, {args.repeats} turns, load "
          f"{content['load_before'][0]:.1f} to {content['load_after'][0]:.1f}\nwritten to {out}")
    draw(content, Path(args.figure))


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shape", choices=list(SHAPES), default="7m")
    add("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    add("--threads", type=int, default=1, help="CPU threads, but for the ranks")
    add("--device", default="cpu", help="cpu or cuda")
    add("--seed", type=int, default=0)
    add("--repeats", type=int, default=5, help="counted turns of a point")
    add("--axes", nargs="+", choices=list(AXES), default=list(AXES))
    add("--values", type=int, nargs="+", help="of the one axis named, other than ranks")
    add("--length", type=int, default=256, help="tokens of a text on the other axes")
    add("--batch", type=int, default=8, help="texts of a step on the other axes")
    add("--tokens", type=int, default=8192, help="length: tokens of a batch")
    add("--nproc", type=int, default=2, help="ranks: processes, or threads, besides one")
    add("--out", default="bench/results/scaling.json")
    add("--figure", default="bench/results/scaling.svg")
    add("--draw", metavar="JSON", help="only draw the figure of an earlier run's --out")
    try:
        if sys.argv[1:2] == ["--worker"]:
            worker(SimpleNamespace(**json.loads(sys.argv[2])))
            return 0
        args = parser.parse_args()
        if args.values and (len(args.axes) > 1 or args.axes == ["ranks"]):
            parser.error("--values are those of one axis: name it with --axes, not ranks")
        least = {"length": 2, "vocabulary": 4}.get(args.axes[0], 1)
        if min(args.threads, args.repeats, args.tokens, *(args.values or [1])) < 1:
            parser.error("the numbers must be above 0")
        if min(args.values or [least]) < least or args.length < 2:
            parser.error("a text has at least 2 tokens, a vocabulary 4")
        if not 2 <= args.nproc <= args.batch:
            parser.error("--nproc must be at least 2 and at most --batch")
        if args.draw:
            draw(json.loads(Path(args.draw).read_text()), Path(args.figure))
        else:
            bench(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

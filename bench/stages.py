"""Stage by stage: several starts -> ucl -> scl on the same data, and the scores after each stage.

    python bench/stages.py --runs runs/real --starts ctkd-0 ctkd-1 none-0 none-1 rc-0 nll-0 \\
        --text sentences.txt.gz --triples FOLDER --data-dir FOLDER --ucl-lr 1e-4 --scl-lr 3e-4

A start is a run OBJECTIVE-SEED below --runs, as bench/objectives.py leaves it, or none-SEED: the
plain Llama (--model) with fresh memory tokens. Its seed is also that of the later stages, so all
starts of one seed see the same rows in the same order. Runs are OUT/STAGE-START-LR; a finished one
is not repeated and an interrupted one goes on, so the command can be interrupted, and parts of it
(--starts) can run beside each other.

Several rates (--ucl-lr 3e-5 1e-4) are all run, for the given starts, and their scores on the first
task of --choose (a validation split) are printed instead: choose one, and go on with it. A rate may
be given for one kind of start: --ucl-lr 1e-4 none=3e-4.
"""

import argparse
import json
import shlex
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))  # the project root

import contrastive
import evaluate
from data.results import label_of

KINDS = ("none", "rc", "nll", "ctkd")  # of a start, in the order of the table


def rates_of(given: list[str], start: str) -> list[str]:
    """The rates for a start: those of its kind (none=3e-4), else those without a kind."""
    own = [rate.partition("=")[2] for rate in given if rate.startswith(start.split("-")[0] + "=")]
    rates = own or [rate for rate in given if "=" not in rate]
    return rates or sys.exit(f"no rate is given for {start}")


def train(stage: str, start: str, lr: str, model: str, args: argparse.Namespace) -> Path:
    """The folder of a run of a stage, made if it is not finished."""
    out = Path(args.out) / f"{stage}-{start}-{lr}"
    data = ["--text", args.text, "--num-texts", "0"] if stage == "ucl" else [
        "--triples", args.triples]
    flags = ["--preset", stage, "--model", model, *data, "--lr", lr, "--out", str(out), "--seed",
             start.rpartition("-")[2], "--eval-tasks", " ".join(args.choose),
             *shlex.split(args.ucl_flags if stage == "ucl" else args.scl_flags)]
    flags += ["--data-dir", args.data_dir] if args.data_dir else []
    wanted = contrastive.parse_arguments(flags)
    if (out / "encoder" / "encoder.json").is_file():
        before = json.loads((out / "config.json").read_text())
        for key, value in contrastive.settings_of(wanted).items():
            if key not in (*contrastive.FREE, "out", "threads") and before.get(key) != value:
                sys.exit(f"{out}: was run with {key}={before.get(key)!r}, now {value!r}; name "
                         f"another --out")
        return out
    flags += ["--resume"] if (out / "config.json").is_file() else []
    if code := contrastive.main(flags):
        sys.exit(code)
    return out


def scores_of(model: str, args: argparse.Namespace, *flags: str) -> dict[str, float]:
    """Task -> main score x 100, evaluated by evaluate.py where it is not there yet."""
    results = Path(args.out) / "results"
    common = ["--model", model, "--results", str(results), "--dtype", args.eval_dtype, *flags]
    common += ["--data-dir", args.data_dir] if args.data_dir else []
    if evaluate.main([*common, "--task", *args.task]):
        sys.exit(2)
    method = flags[flags.index("--method") + 1] if flags else "memory"
    files = [results / label_of(model, method) / f"{evaluate.TASKS[task]['name']}.json"
             for task in args.task]
    return {task: 100 * json.loads(file.read_text())["scores"]["test"][0]["main_score"]
            for task, file in zip(args.task, files)}


def curve_of(run: Path) -> list[dict]:
    """The scores of a run over its steps."""
    return [json.loads(line) for line in (run / "scores.jsonl").read_text().splitlines()]


def cell(values: list[float]) -> str:
    """Mean, and standard deviation if there are several values."""
    spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{spread}"


def table(scores: dict, tasks: list[str]) -> list[str]:
    """Markdown: a row for each kind of start and stage; mean and deviation over seeds."""
    lines = [f"| start | after | seeds | {' | '.join(tasks)} | mean |",
             "|---" * (len(tasks) + 4) + "|"]
    for (kind, stage), seeds in scores.items():
        means = [float(np.mean(list(seed.values()))) for seed in seeds]
        cells = [cell([seed[task] for seed in seeds]) for task in tasks]
        lines.append(f"| {kind} | {stage} | {len(seeds)} | {' | '.join(cells)} | {cell(means)} |")
    return lines


def curves(runs: dict[str, list[Path]]) -> list[str]:
    """Markdown: the scores of each kind of start over the steps of a stage, mean over seeds."""
    first = curve_of(next(iter(runs.values()))[0])[0]
    tasks = [key for key in first if key not in ("step", "mean")]
    lines = [f"| start | step | {' | '.join(tasks)} |", "|---" * (len(tasks) + 2) + "|"]
    for kind, folders in runs.items():
        for rows in zip(*map(curve_of, folders)):
            cells = [cell([row[task] for row in rows]) for task in tasks]
            lines.append(f"| {kind} | {rows[0]['step']} | {' | '.join(cells)} |")
    return lines


def compare_rates(stage: str, runs: dict[tuple[str, str], Path], task: str):
    """Print the score of each rate on the validation task, after each evaluation."""
    print(f"\n{stage}: {task} over the steps\n\n| start | rate | scores |\n|---|---|---|")
    for (start, lr), run in runs.items():
        scores = ", ".join(f"{row[task]:.1f}" for row in curve_of(run))
        print(f"| {start} | {lr} | {scores} |")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--runs", required=True, help="folder with the runs of stage 1")
    add("--starts", nargs="+", required=True, help="runs below --runs, or none-SEED")
    add("--model", default="demo", help="the Llama of none-SEED")
    add("--text", default="demo", help="of ucl")
    add("--triples", default="demo", help="of scl")
    add("--ucl-lr", nargs="+", default=["1e-4"], help="rate of ucl; several: compare them")
    add("--scl-lr", nargs="+", default=["1e-4"], help="rate of scl; several: compare them")
    add("--ucl-flags", default="", help="more flags of contrastive.py, in quotes")
    add("--scl-flags", default="")
    add("--choose", nargs="+", default=["demo-sts"], help="tasks scored during the runs")
    add("--task", nargs="+", default=["demo-sts", "demo-retrieval"], help="scored after each stage")
    add("--data-dir")
    add("--until", choices=["ucl", "scl"], default="scl", help="the last stage to run")
    add("--eval-dtype", default="float32", choices=["float32", "bfloat16"])
    add("--max-tokens", default="256", help="of the untrained Llama's evaluation")
    add("--out", default="runs/stages")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run what is missing; print the rates, or evaluate and print the tables."""
    args = parse_arguments(argv)
    runs: dict[str, dict[tuple[str, str], Path]] = {"ucl": {}, "scl": {}}
    for start in args.starts:
        model = args.model if start.startswith("none-") else str(Path(args.runs) / start)
        for stage, given in (("ucl", args.ucl_lr), ("scl", args.scl_lr)):
            for lr in rates_of(given, start):
                runs[stage][start, lr] = train(stage, start, lr, model, args)
            if len(rates_of(given, start)) > 1 or args.until == stage:
                break
            model = str(runs[stage][start, lr])
    for stage in runs:
        if len(runs[stage]) > len({start for start, _ in runs[stage]}):
            compare_rates(stage, runs[stage], args.choose[0])
            return 0
    scores, over_steps = defaultdict(list), defaultdict(list)
    for kind in KINDS:
        for start in (s for s in args.starts if s.split("-")[0] == kind):
            if kind == "none" and not scores[kind, "-"]:  # one Llama, whatever the seed
                scores[kind, "-"].append(scores_of(
                    args.model, args, "--method", "weighted-mean", "--max-tokens", args.max_tokens))
            elif kind != "none":
                scores[kind, "-"].append(scores_of(str(Path(args.runs) / start), args))
            for stage in runs:
                for (of, _), run in runs[stage].items():
                    if of == start:
                        scores[kind, stage].append(scores_of(str(run), args))
                        over_steps[stage, kind].append(run)
    lines = table(scores, args.task)
    for stage in runs:
        found = {kind: over_steps[stage, kind] for kind in KINDS if over_steps[stage, kind]}
        if found:
            lines += ["", f"{stage}, over its steps:", "", *curves(found)]
    print("\n" + "\n".join(lines))
    (Path(args.out) / "table.md").write_text("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Objectives x seeds of stage 1 beside the untrained methods: the quality table of the README.

    python bench/objectives.py                                     the embedded demo, 3 seeds
    python bench/objectives.py --text FILE --steps 1000 --seeds 0 1 --num-texts 8000 \\
        --task sts17 stsbenchmark --data-dir FOLDER --out runs/real

Each run is `pretrain_ctkd.py --objective O --seed S --out OUT/O-S` with all other flags passed on;
a run whose encoder exists is not repeated, so the command can be interrupted, and parts of it
(--objectives, --seeds) can run beside each other. All objectives see the same texts in the same
order with the same splits. The table shows main scores x 100, mean and standard deviation over
seeds, and for STS a 95 % paired bootstrap interval of the gain of `ctkd` over the best untrained
method (samples are resampled; one seed's encoder at a time, the interval is that of the mean over
seeds).
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # the project root

import evaluate
import pretrain_ctkd


def scores_of(model: str, method: str | None, tasks: list[str], data_dir: str | None) -> dict:
    """Task -> result of evaluate_task."""
    encode = evaluate.encoding(*evaluate.open_model(model, method))
    return {task: evaluate.evaluate_task(task, encode, data_dir) for task in tasks}


def bootstrap_gain(trained: list[dict], untrained: dict, draws: int = 2000) -> tuple[float, float]:
    """95 % interval of (mean Spearman over seeds) - (untrained Spearman), samples resampled."""
    random, gold, gains = np.random.default_rng(0), untrained["gold"], []
    for _ in range(draws):
        rows = random.integers(0, len(gold), len(gold))
        ours = [evaluate.spearman(run["cosines"][rows], gold[rows]) for run in trained]
        gains.append(np.mean(ours) - evaluate.spearman(untrained["cosines"][rows], gold[rows]))
    return tuple(np.percentile(gains, [2.5, 97.5]))


def check_same(before: dict, wanted: pretrain_ctkd.Config):
    """Stop with a line if a finished run was made with other settings than are asked for now."""
    for key, value in pretrain_ctkd.settings_of(wanted).items():
        if key not in ("out", "threads") and before[key] != value:
            sys.exit(f"{wanted.out}: was run with {key}={before[key]!r}, now {value!r}; name "
                     f"another --out")


def table(untrained: dict, trained: dict, tasks: list[str]) -> str:
    """Markdown: a row per method, mean (sd over seeds) per task; then the gains of ctkd."""
    lines = [f"| method | {' | '.join(tasks)} |", "|---" * (len(tasks) + 1) + "|"]
    for method, results in untrained.items():
        cells = [f"{100 * results[task]['main_score']:.1f}" for task in tasks]
        lines.append(f"| {method}, untrained | {' | '.join(cells)} |")
    for objective, runs in trained.items():
        cells = []
        for task in tasks:
            x = 100 * np.array([run[task]["main_score"] for run in runs])
            spread = f" ± {x.std(ddof=1):.1f}" if len(x) > 1 else ""
            cells.append(f"{x.mean():.1f}{spread}")
        lines.append(f"| {objective}, {len(runs)} seed(s) | {' | '.join(cells)} |")
    for task in tasks if "ctkd" in trained else []:
        best = max(untrained, key=lambda method: untrained[method][task]["main_score"])
        if "gold" not in untrained[best][task]:
            continue
        runs = [run[task] for run in trained["ctkd"]]
        low, high = bootstrap_gain(runs, untrained[best][task])
        gain = np.mean([r["main_score"] for r in runs]) - untrained[best][task]["main_score"]
        lines.append(f"\n{task}: ctkd - {best} = {100 * gain:+.1f}, 95 % interval "
                     f"[{100 * low:+.1f}, {100 * high:+.1f}]")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run what is missing, evaluate, print the table and write it below --out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--objectives", nargs="+", default=["ctkd", "nll", "rc"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--task", nargs="+", default=["demo-sts"])
    parser.add_argument("--data-dir")
    parser.add_argument("--out", default="runs/objectives")
    args, rest = parser.parse_known_args(argv)  # the rest goes to pretrain_ctkd.py
    model = pretrain_ctkd.parse_arguments(["--preset", "demo", *rest]).model
    trained: dict[str, list] = {}
    for seed in args.seeds:
        for objective in args.objectives:
            run = Path(args.out) / f"{objective}-{seed}"
            flags = ["--preset", "demo", "--objective", objective, "--seed", str(seed), *rest]
            done = run / "encoder" / "encoder.json"
            if done.is_file():
                wanted = pretrain_ctkd.parse_arguments([*flags, "--out", str(run)])
                check_same(json.loads(done.read_text())["history"][0], wanted)
            else:
                flags += ["--resume"] if (run / "config.json").is_file() else []
                if code := pretrain_ctkd.main([*flags, "--out", str(run)]):
                    return code
            results = scores_of(str(run), None, args.task, args.data_dir)
            trained.setdefault(objective, []).append(results)
    untrained = {m: scores_of(model, m, args.task, args.data_dir) for m in evaluate.UNTRAINED}
    text = table(untrained, trained, args.task)
    print(f"\n{text}")
    (Path(args.out) / "table.md").write_text(text + "\n")
    settings = {"argv": argv or sys.argv[1:], "torch": torch.__version__}
    (Path(args.out) / "settings.json").write_text(json.dumps(settings, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Every training-free method and every encoder of a stage on a list of tasks: the README's table.

    python bench/methods.py --runs runs/objectives                 the embedded tasks
    python bench/methods.py --runs runs/objectives --data-dir FOLDER \\
        --task sts17 stsbenchmark scifact banking77 demo-sts demo-retrieval \\
        --task-dir FOLDER/my-sets clustering --task-dir FOLDER/my-lists reranking

Each cell is one evaluation by evaluate.py, written below --out and not repeated, so the command can
be interrupted and its parts (--methods, --runs) can run beside each other. Encoders are the folders
<objective>-<seed> below --runs, as bench/objectives.py leaves them; a row shows their mean and
standard deviation over seeds. Scores are main scores x 100.
"""

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))  # the project root

import evaluate
from data.results import label_of


def scores_of(model: str, method: str, args: argparse.Namespace) -> dict[str, float]:
    """Task -> main score x 100 of a model under a method, evaluated where it is not there yet."""
    flags = ["--model", model, "--method", method, "--results", args.out, "--dtype", args.dtype,
             "--threads", str(args.threads)]
    if method != "memory" and args.max_tokens:
        flags += ["--max-tokens", str(args.max_tokens)]
    jobs = [["--task", *args.task]] if args.task else []
    jobs += [["--task-dir", folder, "--kind", kind] for folder, kind in args.task_dir]
    for job in jobs:
        if evaluate.main([*flags, *job, *(["--data-dir", args.data_dir] * bool(args.data_dir))]):
            sys.exit(2)
    names = [evaluate.TASKS[task]["name"] for task in args.task]
    names += [Path(folder).resolve().name for folder, _ in args.task_dir]
    files = [Path(args.out) / label_of(model, method) / f"{name}.json" for name in names]
    results = [json.loads(file.read_text()) for file in files]
    return {r["task_name"]: 100 * r["scores"]["test"][0]["main_score"] for r in results}


def main(argv: list[str] | None = None) -> int:
    """Evaluate what is missing, print the table and write it below --out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo", help="the Llama of the training-free methods")
    parser.add_argument("--methods", nargs="*", default=list(evaluate.METHODS))
    parser.add_argument("--runs", help="folder with runs named <objective>-<seed>")
    parser.add_argument("--task", nargs="*", default=["demo-sts", "demo-retrieval"])
    parser.add_argument("--task-dir", nargs=2, action="append", default=[],
                        metavar=("FOLDER", "KIND"))
    parser.add_argument("--data-dir")
    parser.add_argument("--max-tokens", type=int, help="of the training-free methods")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--out", default="runs/methods")
    args = parser.parse_args(argv)
    rows = {method: [scores_of(args.model, method, args)] for method in args.methods}
    seeds = defaultdict(list)
    for encoder in sorted(Path(args.runs).glob("*/encoder")) if args.runs else []:
        seeds[encoder.parent.name.rpartition("-")[0]].append(str(encoder.parent))
    for objective, runs in seeds.items():
        title = f"{objective}, {len(runs)} seed{'s' * (len(runs) > 1)}"
        rows[title] = [scores_of(run, "memory", args) for run in runs]
    tasks = list(next(iter(rows.values()))[0])
    lines = [f"| method | {' | '.join(tasks)} |", "|---" * (len(tasks) + 1) + "|"]
    for title, runs in rows.items():
        cells = []
        for task in tasks:
            x = np.array([run[task] for run in runs])
            cells.append(f"{x.mean():.1f}" + (f" ± {x.std(ddof=1):.1f}" if len(x) > 1 else ""))
        lines.append(f"| {title} | {' | '.join(cells)} |")
    print("\n" + "\n".join(lines))
    (Path(args.out) / "table.md").write_text("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

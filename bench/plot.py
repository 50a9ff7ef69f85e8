"""Draw the logs of one or several runs: loss, rate, speed and scores over steps, in one figure.

    python bench/plot.py runs/ctkd-demo runs/second             writes plot.svg
    python bench/plot.py runs/ucl-demo runs/scl-demo --show loss accuracy effective_dimension \\
        scores --out stages.png

--show takes any number of metrics.jsonl (docs/runs.md, "What is logged"), `scores`, the mean of
--eval-tasks, and a task's name. Runs of one color have the same settings, apart from the seed.
Needs matplotlib.
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")  # a file, no window
matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "llm2comp"}  # text stays text
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project root

from runtime.errors import UserError, run_command
from runtime.files import read_json

AXES = {"loss": "loss", "learning_rate": "learning rate", "tokens_per_second": "real tokens / s",
        "grad_norm": "norm of the gradient", "accuracy": "accuracy in the batch",
        "effective_dimension": "effective dimension of the batch", "scores": "mean score x 100"}
DEFAULT = ("loss", "learning_rate", "tokens_per_second", "scores")  # those that were logged
SMOOTH = 20  # a line's points are means over at most so many parts of a run


def read_log(path: Path) -> list[dict]:
    """The rows of a log of numbers; none without one. UserError for a line that is no row."""
    rows = []
    for number, line in enumerate(path.read_text().splitlines() if path.is_file() else [], 1):
        try:
            rows.append({"step": None, **json.loads(line)})
            float(rows[-1]["step"])
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}, line {number}: not a step of a run ({error}); remove it")
    return rows


def read_run(folder: Path) -> tuple[dict, dict[str, list[tuple[float, float]]]]:
    """A run's settings without its seed and place, and (step, value) of all that it logged."""
    settings = read_json(folder / "config.json", "a run's")
    for name in ("seed", "out", "threads", "device", "model", "save_every"):
        settings.pop(name, None)
    found: dict[str, list] = {}
    for row in read_log(folder / "metrics.jsonl"):
        for key, value in row.items():
            found.setdefault(key, []).append((row["step"], value))
    for row in read_log(folder / "scores.jsonl"):
        for key, value in row.items():
            found.setdefault({"mean": "scores"}.get(key, key), []).append((row["step"], value))
    if not found:
        raise UserError(f"{folder}: has no metrics.jsonl; is it a run's folder?")
    return settings, found


def smooth(points: np.ndarray) -> np.ndarray:
    """Means (m, 2) of equal stretches of the points (n, 2)."""
    parts = np.array_split(points, max(1, min(SMOOTH, len(points) // 5)))
    return np.array([part.mean(axis=0) for part in parts])


def draw(runs: dict[str, tuple[dict, dict]], shown: list[str], out: Path):
    """One panel per quantity, one line per run, one color per set of settings."""
    kinds: list[dict] = []
    for settings, _ in runs.values():
        kinds += [settings] * (settings not in kinds)
    width = min(len(shown), 3)
    rows = -(-len(shown) // width)
    figure, panels = plt.subplots(rows, width, figsize=(4.6 * width, 3.2 * rows), squeeze=False,
                                  layout="constrained")
    for panel, key in zip(panels.flat, shown):
        for name, (settings, found) in runs.items():
            if key in found:
                points, color = np.array(found[key], float), f"C{kinds.index(settings) % 10}"
                noisy = len(points) >= 3 * SMOOTH and key != "learning_rate"
                line = smooth(points) if noisy else points
                if noisy:
                    panel.plot(*points.T, color=color, alpha=0.15, linewidth=0.7)
                panel.plot(*line.T, color=color, label=name, linewidth=1.5,
                           marker="." if len(line) < 12 else "")
        panel.set(xlabel="step", ylabel=AXES.get(key, key))
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels.flat[len(shown):]:
        panel.axis("off")
    handles, names = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False)
    try:
        figure.savefig(out)
    except (OSError, ValueError) as error:
        raise UserError(f"--out {out}: cannot be written ({error}); name a .svg, .png or .pdf")
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="+", help="folders of runs")
    parser.add_argument("--show", nargs="+", help=f"default: {', '.join(DEFAULT)}")
    parser.add_argument("--out", default="plot.svg", help=".svg, .png or .pdf")
    args = parser.parse_args(argv)

    def run():
        runs = {folder.rstrip("/"): read_run(Path(folder)) for folder in args.run}
        there = {key for _, found in runs.values() for key in found} - {"step"}
        if unknown := set(args.show or ()) - there:
            raise UserError(f"--show {' '.join(sorted(unknown))}: no run has logged it; there are "
                            f"{', '.join(sorted(there))}")
        draw(runs, [key for key in args.show or DEFAULT if key in there], Path(args.out))
        print(f"wrote {args.out}")

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())

"""Draw what runs have logged, over steps, and what collapse.py has found, in one figure.

    python bench/plot.py runs/ctkd-demo runs/second             writes plot.svg
    python bench/plot.py runs/ucl-demo runs/scl-demo --show loss accuracy effective_dimension \\
        scores --out stages.png
    python bench/plot.py runs/collapse/collapse.json --out collapse.svg
    python bench/plot.py bench/records/demo/ctkd-*.json --show loss spectrum

For a run's folder --show takes any quantity in metrics.jsonl (docs/runs.md, "What is logged"),
`scores`, the mean of --eval-tasks, and a task's name; for the JSON of collapse.py `spectrum`, and
`cosines` and `products` of the memory tokens (Eq. 7), a square per model; for a record of
bench/ablations.py `loss`, `spectrum` and `cosines`. Runs of the same color have the same settings
apart from the seed. Needs matplotlib.
"""

import argparse
import json
import re
import sys
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")  # draw to a file, without a window
matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "llm2comp",  # text stays text
                        "path.simplify_threshold": 0.5}
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project root

from runtime.errors import UserError, run_command
from runtime.files import read_json

AXES = {"loss": "loss", "learning_rate": "learning rate", "tokens_per_second": "real tokens / s",
        "grad_norm": "norm of the gradient", "accuracy": "accuracy in the batch",
        "effective_dimension": "effective dimension of the batch", "scores": "mean score x 100",
        "spectrum": "singular value / first", "cosines": "mean cosine", "products": "mean product"}
SQUARES = ("cosines", "products")  # K x K, the others are curves
DEFAULT = ("loss", "learning_rate", "tokens_per_second", "scores", "spectrum", "cosines")
SMOOTH = 20  # a line's points are means over at most this many parts of a run
LEAST = 1e-4  # as a share of the first; smaller singular values are not drawn


def read_log(path: Path) -> list[dict]:
    """The rows of a log of numbers; [] without a log. UserError for a line that is not a row."""
    rows = []
    for number, line in enumerate(path.read_text().splitlines() if path.is_file() else [], 1):
        try:
            rows.append({"step": None, **json.loads(line)})
            float(rows[-1]["step"])
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}, line {number}: not a step of a run ({error}); remove it")
    return rows


def comparable(settings: dict) -> dict:
    """Settings without the seed, the place, and all that does not change results."""
    other = ("seed", "out", "threads", "device", "save_every")
    model = re.sub(r"-\d+$", "", Path(str(settings.get("model", ""))).name)  # ctkd-0: 0 is its seed
    return {key: value for key, value in settings.items() if key not in other} | {"model": model}


def read_run(folder: Path) -> tuple[dict, dict[str, list]]:
    """A run's settings, and (step, value) of all that it logged."""
    settings = read_json(folder / "config.json", "a run's")
    found: dict[str, list] = {}
    for row in read_log(folder / "metrics.jsonl"):
        for key, value in row.items():
            found.setdefault(key, []).append((row["step"], value))
    for row in read_log(folder / "scores.jsonl"):
        for key, value in row.items():
            found.setdefault({"mean": "scores"}.get(key, key), []).append((row["step"], value))
    if not found:
        raise UserError(f"{folder}: has no metrics.jsonl; is it a run's folder?")
    return comparable(settings), found


def read_analysis(result: dict) -> dict[str, list]:
    """(index, share of the first) of a spectrum, and the squares that there are."""
    s = np.array(result["spectrum"]) / result["spectrum"][0]
    curve = [(i, value) for i, value in enumerate(s, 1) if value > LEAST]
    return {"spectrum": curve, **{key: result[key] for key in SQUARES if len(result.get(key, ()))}}


def read(name: str) -> dict[str, tuple[dict, dict[str, list]]]:
    """Label -> settings, and what can be drawn, of a run, a record or an analysis."""
    path = Path(name)
    if path.suffix != ".json":
        return {name.rstrip("/"): read_run(path)}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, list):  # of collapse.py
            return {r["model"]: ({"of": r["model"]}, read_analysis(r)) for r in content}
        found, loss = read_analysis(content["collapse"]), content.get("loss")
        if loss:  # means over stretches of steps, drawn at their middle
            middle = (loss["every"] - 1) / 2
            found["loss"] = [(loss["every"] * i + middle, x) for i, x in enumerate(loss["mean"])]
        return {path.stem: (comparable(content.get("settings", {"of": path.stem})), found)}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path}: neither JSON of collapse.py nor a record of bench/ablations.py "
                        f"({error!r}); name one, or a run's folder")


def smooth(points: np.ndarray) -> np.ndarray:
    """Means (m, 2) of equal stretches of the points (n, 2)."""
    parts = np.array_split(points, max(1, min(SMOOTH, len(points) // 5)))
    return np.array([part.mean(axis=0) for part in parts])


def draw_curves(panel, key: str, runs: dict[str, tuple[dict, dict]]):
    """One quantity: a line per run, one color per set of settings."""
    kinds: list[dict] = []
    for name, (settings, found) in runs.items():
        kinds += [settings] * (settings not in kinds)
        if key in found:
            points, color = np.array(found[key], float), f"C{kinds.index(settings) % 10}"
            noisy = len(points) >= 3 * SMOOTH and key not in ("learning_rate", "spectrum")
            line = smooth(points) if noisy else points
            if noisy:
                panel.plot(*points.T, color=color, alpha=0.15, linewidth=0.7)
            panel.plot(*line.T, color=color, label=name, linewidth=1.5,
                       marker="." if len(line) < 12 else "")
    spectrum = key == "spectrum"
    panel.set(xlabel="index" if spectrum else "step", ylabel=AXES.get(key, key),
              yscale="log" if spectrum else "linear")
    panel.spines[["top", "right"]].set_visible(False)


def draw_square(figure, panel, key: str, name: str, square: list[list[float]]):
    """The correlation of K tokens: dark where they are far from each other."""
    limits = {"vmin": 0, "vmax": 1} if key == "cosines" else {}
    image = panel.imshow(square, cmap=plt.get_cmap("viridis", 10), interpolation="nearest",
                         **limits)
    panel.set(title=name, xlabel="memory token", xticks=[], yticks=[])
    figure.colorbar(image, ax=panel, label=AXES[key], shrink=0.8)


def draw(runs: dict[str, tuple[dict, dict]], shown: list[str], out: Path):
    """One panel per quantity with all runs in it, and one per square."""
    wanted = [(key, name) for key in shown for name in
              ([n for n in runs if key in runs[n][1]] if key in SQUARES else [""])]
    width = len(wanted) if len(wanted) <= 4 else 3
    rows = -(-len(wanted) // width)
    figure, panels = plt.subplots(rows, width, squeeze=False, layout="constrained",
                                  figsize=((4.6 if width < 4 else 3.2) * width, 3.2 * rows))
    for panel, (key, name) in zip(panels.flat, wanted):
        if name:
            draw_square(figure, panel, key, name, runs[name][1][key])
        else:
            draw_curves(panel, key, runs)
    for panel in panels.flat[len(wanted):]:
        panel.axis("off")
    lines = {line.get_label(): line for panel in panels.flat
             for line in panel.get_legend_handles_labels()[0]}
    if lines := {name: lines[name] for name in runs if name in lines}:
        figure.legend(lines.values(), lines, loc="outside lower center", ncols=3, frameon=False)
    try:
        figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)
    except (OSError, ValueError) as error:
        raise UserError(f"--out {out}: cannot be written ({error}); name a .svg, .png or .pdf")
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="+", help="folders of runs, records, JSON of collapse.py")
    parser.add_argument("--show", nargs="+", help=f"default, if they are there: "
                                                  f"{', '.join(DEFAULT)}")
    parser.add_argument("--out", default="plot.svg", help=".svg, .png or .pdf")
    args = parser.parse_args(argv)

    def run():
        runs: dict = {}
        for name in args.run:
            for label, found in read(name).items():
                label = f"{label} ({name})" if label in runs else label
                runs[label] = found
        runs = {label.replace("$", r"\$"): found for label, found in runs.items()}  # not a formula
        there = {key for _, found in runs.values() for key in found} - {"step"}
        if unknown := set(args.show or ()) - there:
            raise UserError(f"--show {' '.join(sorted(unknown))}: no run has logged it; there are "
                            f"{', '.join(sorted(there))}")
        draw(runs, [key for key in args.show or DEFAULT if key in there], Path(args.out))
        print(f"wrote {args.out}")

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())

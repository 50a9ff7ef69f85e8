"""Write docs/results.md and its figures from the records of bench/ablations.py.

    python bench/report.py                                     of bench/records/, the project's own
    python bench/report.py --runs runs/ablations/records --out runs/page.md

What has no record yet is listed, and is in no figure. bench/claims.py judges; the page says how.
"""

import argparse
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib import rcParams
from matplotlib.figure import Figure
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project root

import ablations
from claims import (ALPHA, CLAIMS, DIMENSIONS, MEASURES, NO_DIFFERENCE, PEAK, SEEDS, Runs, cell,
                    judge_all, read_runs, retrieval_of, values_of)
from runtime.errors import run_command

PAGE = Path(__file__).resolve().parents[1] / "docs" / "results.md"
RECORDS = Path(__file__).resolve().parent / "records"
JUDGED = {"smollm2": "2,400 texts", "smollm2-32000": "32,000 texts, and stage 2"}  # folder -> data
HIGH = 30  # participation ratio from which runs are also compared among themselves


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows))


def by_variant(runs: Runs, head: list[str], columns: Callable[[str], list[str]]) -> str:
    """A table, one row per variant with finished seeds: study, variant, seeds, columns(variant)."""
    rows = [["" if i else study, variant, str(len(runs.seeds(variant))), *columns(variant)]
            for study, variants in runs.studies.items()
            for i, variant in enumerate(filter(runs.seeds, variants))]
    return table(["study", "variant", "seeds", *head], rows)


def losses_of(runs: Runs, variant: str) -> str:
    """Mean loss of the first and of the last 50 steps, over seeds."""
    found = [runs.records[variant, seed].get("loss") for seed in runs.seeds(variant)]
    parts = ("first", "last") if all(found) else ()
    return " → ".join(cell(np.array([x[part] for x in found]), 2) for part in parts)


def draw_scores(runs: Runs, path: Path):
    """Figures 2 and 3: one dot per seed, a line through the means; 8 and 10 if they were run."""
    axes = {"objective": ["weighted-mean", "rc", "nll", "ctkd"], "K": [
        "K=1", "K=2", "K=4", "ctkd", "K=16"], "stage": ["ctkd", "ucl-ctkd", "scl-ctkd"]}
    later = bool(runs.seeds("scl-ctkd"))
    figure = Figure((9, 2.8 + 3.6 * later), layout="constrained")
    polar = {"d": {"projection": "polar"}} if later else {}
    panels = figure.subplot_mosaic("abc;dee" if later else "abc", per_subplot_kw=polar)
    for panel, (title, variants) in zip(map(panels.get, "abc"), axes.items()):
        there, style = [v for v in variants if runs.seeds(v)], "_" if title == "objective" else "-"
        for colour, key in enumerate((*dict.fromkeys(runs.tasks.values()), "mean")):
            values = [runs.of(v, key) for v in there]
            panel.plot([x.mean() for x in values], style, color=f"C{colour}", label=key)
            for i, x in enumerate(values):
                panel.plot([i] * len(x), x, ".", color=f"C{colour}")
        panel.set_xticks(range(len(there)), there, fontsize=7)
        panel.set_xlabel(title)
    panels["a"].set_ylabel("score x 100")
    if panels["a"].lines:
        panels["c"].legend(*panels["a"].get_legend_handles_labels(), loc="center left",
                           bbox_to_anchor=(1, 0.5), frameon=False, fontsize=7)
    if later:
        draw_stages(runs, panels["d"], panels["e"])
    figure.savefig(path, metadata={"Date": None})


def draw_stages(runs: Runs, radar, curve):
    """Tasks by stage (Figure 8); scores over stage 3's steps, one line per seed (Figure 10)."""
    turns = 2 * np.pi * np.arange(len(runs.tasks)) / len(runs.tasks)
    for variant in filter(runs.seeds, ("ctkd", "ucl-ctkd", "scl-ctkd")):
        x = [runs.of(variant, task).mean() for task in runs.tasks]
        radar.plot([*turns, 0], [*x, x[0]], label=variant)
    radar.set_xticks(turns, runs.tasks, fontsize=7)
    for turn, seed in enumerate(runs.seeds("scl-ctkd")):
        rows = runs.records["scl-ctkd", seed].get("curve", [])
        for i, name in enumerate(("mean", "retrieval")):
            values = [row["mean"] if name == "mean" else retrieval_of(row) for row in rows]
            curve.plot([row["step"] for row in rows], values, f"C{i}", label="_" * turn + name)
    curve.set(xlabel="steps of stage 3 after ctkd", ylabel="score x 100")
    for panel in (radar, curve):
        panel.legend(loc="center left", bbox_to_anchor=(1.1, 0.5), frameon=False, fontsize=7)


def draw_collapse(runs: Runs, path: Path):
    """Spectra of objectives and stages, one line per seed (4, 9); the tokens' cosines (5, 6)."""
    figure = Figure((9, 4.8), layout="constrained")
    tokens = (objective + end for end in ("", "-4x", "-normal") for objective in ("nll", "ctkd"))
    tokens = [*filter(runs.seeds, tokens)]
    lower, half = [name for name in tokens for _ in "ab"] or [".", "."], len(tokens) or 1
    panels = figure.subplot_mosaic([["a"] * half + ["b"] * half, lower])
    for name, variants in (("a", ["weighted-mean", "rc", "nll", "ctkd"]),
                           ("b", ["ctkd", "ucl-ctkd", "scl-ctkd"])):
        for i, variant in enumerate(variants):
            for turn, seed in enumerate(runs.seeds(variant)):
                s = np.array(runs.records[variant, seed]["collapse"]["spectrum"])
                panels[name].plot(s / s[0], f"C{i}", linewidth=0.8, label="_" * turn + variant)
        panels[name].set(yscale="log", ylim=(1e-5, 1.5), ylabel="singular value / first")
        if panels[name].lines:
            panels[name].legend(frameon=False, fontsize=7)
    for name in tokens:  # of the first seed
        cosines = runs.records[name, runs.seeds(name)[0]]["collapse"]["cosines"]
        image = panels[name].imshow(cosines, vmin=0, vmax=1)
        panels[name].set_title(name, fontsize=8)
    figure.colorbar(image, ax=[panels[name] for name in tokens]) if tokens else None
    figure.savefig(path, metadata={"Date": None})


def command(runs: Runs) -> str:
    """The command that made the runs, as a shell block."""
    args = runs.args
    lines = [["--study", *filter(runs.begun, runs.studies)], args.common]
    lines += [["--task-dir", *pair] for pair in args.task_dir]
    skipped = {"common", "task_dir", "base", "about"}
    lines += [["--" + key.replace("_", "-"), *(value if isinstance(value, list) else [str(value)])]
              for key, value in vars(args).items() if key not in skipped and value not in ("", None)
              and not (key.startswith("curve") and not runs.begun("stages"))]
    text = " \\\n    ".join(map(shlex.join, filter(None, lines)))
    return f"```sh\npython bench/ablations.py {text}\n```"


def model_of(runs: Runs) -> str:
    """A description of the base."""
    names = {"demo": "the bundled Llama (6.9 M weights, D = 256)", "smollm2":
             "SmolLM2-135M-Instruct (D = 576; the weights of bench/smollm2.py, dequantised)"}
    return names.get(runs.args.base.model, runs.args.base.model)


def hours_of(runs: Runs, variant: str) -> str:
    """Mean hours of training and of scoring a run, and the machines."""
    records = [runs.records[variant, seed] for seed in runs.seeds(variant)]
    hours = " + ".join(f"{np.mean([r['hours'][key] for r in records]):.2f}"
                       for key in ("training", "scoring")
                       if all(key in r["hours"] for r in records))
    machines = sorted({runs.machine(variant, seed) for seed in runs.seeds(variant)})
    return f"{hours} ({', '.join(machines)})"


def first_section(runs: Runs, title: str) -> str:
    """What the claims are judged on: model, command, data."""
    made = [r["environment"] for r in runs.records.values() if "environment" in r]
    dtypes = ", ".join(sorted({about["dtype"].removeprefix("torch.") for about in made}))
    devices = ", ".join(sorted({f"{about['device']} (torch {about['torch']})" for about in made}))
    return f"""## {title}

**Exploratory**: the paper's ablations and analysis with {model_of(runs)} in place of
Llama-2-7B, and little data. Directions may carry over, scores (the paper's 66.78) cannot.
`python bench/report.py` writes this page from the records that this command has left (one per run:
settings, command, machine, hours, losses, scores, analysis):

{command(runs)}

{runs.args.about or "The data are those of the command."}

Scores are main scores x 100, mean ± standard deviation over seeds. In stage 1 all variants of a
seed see the same texts in the same order, but for those of `texts`. Training in {dtypes} on
{devices}; evaluation and analysis in {runs.args.eval_dtype}. * No MTEB task
([where the data are from](measured.md#where-the-data-are-from)).
"""


def claims_section(runs: Runs) -> str:
    """The table of claims, one row per comparison, and a line for each claim that was not run."""
    judged, rows, missing = judge_all(runs), [], []
    study_of = {name: study for study, variants in reversed(runs.studies.items())
                for name in variants}
    count = len({(f.sides, f.sign) for _, found in judged for f in found if not np.isnan(f.p)})
    chance = (f"Comparisons: {count}; if nothing differed, {count * ALPHA:.1f} would have p < "
              f"{ALPHA} by\nchance, half of them with the expected sign." if count else
              "No comparison has enough seeds yet.")
    for (text, paper, parts), (verdict, found) in zip(CLAIMS, judged):
        if verdict == "not run":
            needed = {study_of[name] for a, _, b, _ in parts for name in map(runs.same, (a, b))
                      if name in study_of and not runs.seeds(name)}
            missing.append(f"* {text} ({paper}): `--study {' '.join(sorted(needed))}`")
            continue
        for i, f in enumerate(found):
            p = [f"{p:.3f}" if p >= 5e-4 else "< 0.001" for p in (f.p, f.holm) if p >= 0]
            rows.append([*(["", "", ""] if i else [text, paper, verdict]), f.sides, f.difference,
                         *(p or "--"), str(f.seeds)])
    head = ["claim", "paper (7 B)", "here", "compared", "difference [95 %]", "p", "Holm", "seeds"]
    return f"""### The paper's claims

{chance} A difference is paired over common seeds, of which a
verdict needs {SEEDS}: its mean, 95 % interval and two-sided p by Student's t, and Holm's p, which
holds for all of them together. *Confirmed* is the expected sign and p < {ALPHA} in each comparison,
*the opposite* the other sign. Little difference is confirmed if the 90 % interval is within
± {NO_DIFFERENCE:g} points (its p is that of the less clear of the two sides), *the opposite* if it
is wholly beyond; deviations over seeds are compared by their ratio and an F test.

{table(head, rows)}
{not_run(missing)}"""


def not_run(claims: list[str]) -> str:
    """The claims of which nothing was run, and what the command above lacks for them."""
    return f"""
Not run; the command above runs them with these studies (`texts` takes a multiple of `--num-texts
N`; Figure 10 needs a stage 3 of more than {PEAK} steps, `--scl-flags "--steps 1000 --schedule-steps
2000"`; other flags need another `--out`):

{chr(10).join(claims)}
""" if claims else ""


def scores_table(runs: Runs) -> str:
    """One row per variant: scores on every task, their mean, the loss, hours."""
    tasks = [*runs.tasks, "mean"]
    return by_variant(runs, [*tasks, "loss", "hours"], lambda v: [
        *(cell(runs.of(v, task)) for task in tasks), losses_of(runs, v), hours_of(runs, v)])


def measures_table(runs: Runs) -> str:
    """One row per variant: the measures of collapse."""
    return by_variant(runs, [title for title, _ in MEASURES.values()], lambda v: [
        cell(runs.of(v, key), digits) for key, (_, digits) in MEASURES.items()])


def short_section(runs: Runs, title: str, text: str) -> str:
    """Runs that judge no claim: command, scores, measures."""
    return f"""## {title}

{text}

{command(runs)}

{runs.args.about}

{scores_table(runs)}

{measures_table(runs)}
"""


def trained_runs(there: dict[str, Runs]) -> dict[str, list[tuple[str, dict[str, float]]]]:
    """Tasks in words -> variant and values of SmolLM2's trained runs of all folders, scored on the
    tasks that these have in common, with the final loss of stage 1 if that was ctkd."""
    found = {"three validation tasks": [], "six test tasks": []}
    for name, runs in there.items():
        if not name.startswith("smollm2"):
            continue
        tasks = {task: kind for task, kind in runs.tasks.items() if task != "SciFact"}
        group = found["three validation tasks" if runs in settings_of(there) else "six test tasks"]
        for (variant, seed), record in runs.records.items():
            if "settings" in record and (variant, seed) in runs.values:
                values = values_of(record, tasks)
                if record["settings"].get("objective") == "ctkd":
                    values["loss"] = record["loss"]["last"]
                group.append((variant, values))
    return {title: group for title, group in found.items() if len(group) > 2}


def dimensions_section(groups: dict[str, list[tuple[str, dict[str, float]]]]) -> str:
    """How well the measures of collapse, and the loss, order the runs by their scores."""
    measures = [(MEASURES[key][0], key, 0) for key in (*DIMENSIONS, "mean_cosine")]
    measures += [(f"participation, of runs above {HIGH}", "participation", HIGH),
                 ("loss at the end, ctkd in stage 1 alone", "loss", 0)]
    rows = []
    for title, key, least in measures:
        pairs = [[(v[key], v["mean"]) for _, v in group if v.get(key, -1) >= least]
                 for group in groups.values()]
        rows.append([title, *map(rank_correlation, pairs)])
    return f"""## What tells a good encoder without labels

Spearman correlation of what collapse.py measures on the sentences of STSBenchmark, for which it
needs no labels, with the mean score, over all of SmolLM2's trained runs on this page. It was looked
for after the runs, which share seeds and texts, so the p-values are too small. The measures tell
failed runs from good ones better than good ones from each other.

![Score against effective dimension](dimension.svg)

{table(["measure", *groups], rows)}
"""


def rank_correlation(pairs: list[tuple[float, float]]) -> str:
    """Spearman's correlation as a table cell, "-" for fewer than three runs."""
    if len(pairs) < 3:
        return "-"
    rho, p = stats.spearmanr(*zip(*pairs))
    return f"{rho:+.2f} ({len(pairs)} runs, p {p:.1g})"


def draw_dimensions(groups: dict[str, list[tuple[str, dict[str, float]]]], path: Path):
    """Mean score against the participation ratio, a dot per trained run, coloured by its kind."""
    figure = Figure((9, 3.4), layout="constrained")
    kinds = [*ablations.OBJECTIVES, *ablations.PRETEXTS, "ucl", "scl", "ctkd-window"]
    for panel, (title, group) in zip(figure.subplots(1, len(groups), squeeze=False)[0],
                                     groups.items()):
        for i, kind in enumerate(kinds):
            points = [(v["participation"], v["mean"]) for variant, v in group
                      if kind_of(variant) == kind]
            if points:
                panel.plot(*zip(*points), "o", color=f"C{i}", label=kind, markersize=4)
        panel.set(xlabel="participation ratio", ylabel=f"mean of {title}, x 100")
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False, fontsize=7)
    figure.savefig(path, metadata={"Date": None})


def kind_of(variant: str) -> str:
    """The stage after the first, or the objective, of a variant."""
    if variant.startswith("ctkd-window"):
        return "ctkd-window"
    start = variant.partition("-")[0]
    return start if start in ablations.LATER else ablations.beside(variant)


def settings_of(there: dict[str, Runs]) -> list[Runs]:
    """The runs by which settings were chosen."""
    return [part for name, part in there.items() if "validation" in name]


SETTINGS = """One factor at a time around the common setting, `ctkd`, on validation tasks
(`bench/validation.py`, which says what they share with the test sets). The rows of `rate` give each
objective its own rate, those of `attention` try the other attention at several."""

SHORT = {  # folder -> title, text
    "smollm2-clip": ("Clipped at 0.5, on the test tasks", """The runs of 2,400 texts with gradients
clipped at 0.5 in place of 2 ([why](measured.md#objectives-beside-ctkd-a-screen)). They judge no
claim of the paper."""),
    "smollm2-first": ("The first choice, on the test tasks", """What an earlier choice of settings
gave: batches of 8 and `normal` initial rows, with which not every seed gets going. It judges
nothing."""),
    "demo": ("Smoke test", "It shows that every part works, and judges nothing."),
}


def judged_section(runs: Runs, title: str, end: str) -> str:
    """Runs by which the claims are judged; `end` is the suffix of their figures' names."""
    found = next((r["collapse"]["texts"] for r in runs.records.values()), 0)
    return f"""{first_section(runs, title)}
{claims_section(runs)}
### Scores

The loss is the mean of the first and of the last 50 steps, hours those of training and of scoring
one run; `python bench/ablations.py --help` says what a variant is.

![Scores over objectives, K and stages](ablations{end}.svg)

{scores_table(runs)}

### Collapse

{found:,} texts of {runs.args.analyse}; `python collapse.py --help` says what the columns are.

![Spectra and token correlations](collapse{end}.svg)

{measures_table(runs)}
"""


def costs_section(there: dict[str, Runs]) -> str:
    """What the runs of each judged variant read and how long they took, by machine; a stage's row
    counts that stage alone."""
    rows = []
    for name, what in JUDGED.items():
        found: dict[tuple, list[dict]] = {}
        for (variant, _), record in (there[name].records if name in there else {}).items():
            if "settings" in record:
                found.setdefault((variant, record["machine"]), []).append(record)
        for (variant, machine), records in sorted(found.items()):
            settings = argparse.Namespace(**records[0]["settings"])
            count, tokens = settings.steps * settings.batch_size, "-"
            if hasattr(settings, "objective"):
                tokens = f"{1e-6 * count * ablations.reads(settings.objective, settings):.2f}"
            hours = [f"{np.mean([r['hours'][key] for r in records]):.2f}"
                     for key in ("training", "scoring")]
            rows.append([what, variant, f"{settings.steps:,} of {settings.batch_size}", tokens,
                         *hours, machine])
    head = ["", "variant", "steps", "tokens, millions", "hours of training", "of scoring", "on"]
    return f"""## What it costs

Means of one run, of a stage without those before it. Tokens are those that all networks read in
stage 1, its texts at their full length; several runs shared a machine, so that alone each takes
less. Nobody measured the energy. The deviations from the paper, with what each does to the scores
where that is known: [official.md](official.md#what-the-differences-do).

{table(head, rows)}
"""


def page(there: dict[str, Runs], groups: dict) -> str:
    """The text of docs/results.md, from the runs of each folder of records, and trained_runs."""
    settings = settings_of(there)
    missing = [f"* {v}, seed {seed}: {why} ({folder})" for folder, part in there.items()
               if part not in settings for study in part.studies for v in part.begun(study)
               for (name, seed), why in part.missing.items() if name == v]
    machines = sorted({r["machine"] for part in there.values() for r in part.records.values()})
    total = sum(sum(r["hours"].values()) for part in there.values()
                for r in part.records.values())
    sections = ["# Results\n"]
    for name, what in JUDGED.items():
        if name in there:
            title = f"{model_of(there[name])}, {what}"
            sections.append(judged_section(there[name], title[0].upper() + title[1:],
                                           name.removeprefix("smollm2")))
    if groups:
        sections.append(dimensions_section(groups))
    if JUDGED.keys() & there.keys():
        sections.append(costs_section(there))
    for i, part in enumerate(settings):
        title = "How the settings were chosen" + f", {i + 1}" * (len(settings) > 1)
        sections.append(short_section(part, f"{title}: {model_of(part)}", SETTINGS))
    for name, (title, text) in SHORT.items():
        if name in there:
            sections.append(short_section(there[name], f"{title}: {model_of(there[name])}", text))
    sections.append(f"""## Machines, and what is missing

{total:.1f} hours in all on {"; ".join(machines)}, often beside other work. The command of each
run is in its record.

{chr(10).join(dict.fromkeys(missing)) or "Every variant that was begun has its seeds."}
""")
    return "\n".join(sections)


def write(args: argparse.Namespace):
    """Write the page and its figures."""
    out = Path(args.out)
    if args.runs:
        there = {"smollm2": read_runs(Path(args.runs))}
    else:
        there = {folder.name: read_runs(folder) for folder in sorted(RECORDS.iterdir())}
    rcParams["svg.hashsalt"] = "ablations"  # the same runs draw the same file
    out.parent.mkdir(parents=True, exist_ok=True)
    for name in JUDGED.keys() & there.keys():
        end = name.removeprefix("smollm2")
        draw_scores(there[name], out.parent / f"ablations{end}.svg")
        draw_collapse(there[name], out.parent / f"collapse{end}.svg")
    if groups := trained_runs(there):
        draw_dimensions(groups, out.parent / "dimension.svg")
    out.write_text(page(there, groups), encoding="utf-8")
    print(f"{out}: {sum(len(part.values) for part in there.values())} runs")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("--runs", help="a page of these records alone (--records of bench/ablations.py); default: "
                       "of all that the project has")
    add("--out", default=str(PAGE), help="the page; its figures go beside it")
    return run_command(lambda: write(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())

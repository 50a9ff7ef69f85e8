"""docs/results.md and its figures from the run folders that bench/ablations.py has left.

    python bench/report.py --runs runs/ablations

Reads only: common.json, each run's config.json, metrics.jsonl and collapse.json, and the results of
evaluate.py. What is not finished is named, and enters no figure; with unfinished runs an existing
docs/results.md is overwritten only with --force. A difference between two variants is the mean over
their common seeds, of which there must be two; it counts if it has one sign in each and is above
two standard errors. Without any real difference that happens by chance in 30 % of the cases with
two seeds, in 18 % with three.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project root

import ablations
from data.tasks import TASKS
from runtime.errors import UserError, run_command
from runtime.results import label_of

PAGE = Path(__file__).resolve().parents[1] / "docs" / "results.md"

SHORT = {"STSBenchmark": "STSB", "Banking77Classification": "Banking77", "demo-sts": "embedded STS",
         "demo-retrieval": "embedded retrieval", "clustering-20newsgroups": "20 Newsgroups*"}
NO_DIFFERENCE = 2.0  # points; a difference is said to be small if it is, with two errors, below
PUBLIC = {  # file or folder of a command -> what it is
    "passages.jsonl.gz": "36,000 paragraphs of 1,000 to 2,400 characters of English Wikipedia "
                         "articles (data set jason-feng/wikiVisual)",
    "sentences.txt.gz": "128,000 sentences of the same source",
    "triples": "19,982 triples: MedQuAD questions with their and other answers, SNLI pairs "
               "(sentences of the STS sets removed)",
    "clustering-20newsgroups": "ten sets of 20 Newsgroups subject lines in the layout of MTEB's "
                               "task, not its own draws: marked * in the tables",
}
MEASURES = {  # key of a run -> heading, digits
    "entropy": ("dimension: entropy", 1), "participation": ("participation", 1),
    "above_1_percent": ("above 1 %", 0), "mean_cosine": ("tokens' mean cosine", 3),
    "effective": ("effective tokens", 1), "uniformity": ("uniformity", 2),
    "alignment": ("alignment", 3),
}


@dataclass
class Runs:
    """All runs below a folder: values[variant, seed][key], and what is missing."""

    args: argparse.Namespace  # of the command that made them, without its studies and seeds
    studies: dict[str, dict[str, str]]
    values: dict[tuple[str, int], dict[str, float]]
    files: dict[tuple[str, int], dict]  # environment, config, losses, collapse
    unfinished: dict[tuple[str, int], str]
    tasks: dict[str, str]  # heading -> kind

    def seeds(self, variant: str) -> list[int]:
        """The finished seeds of a variant."""
        return sorted(seed for name, seed in self.values if name == variant)

    def of(self, variant: str, key: str, seeds: list[int] | None = None) -> np.ndarray:
        """A score or a measure of a variant, one number a finished seed."""
        seeds = self.seeds(variant) if seeds is None else seeds
        return np.array([self.values[variant, seed].get(key, np.nan) for seed in seeds])

    def both(self, a: str, b: str, key: str) -> tuple[np.ndarray, np.ndarray]:
        """The values of a and b, one a common seed; an untrained b has one value for all."""
        if b in self.studies["untrained"]:
            return self.of(a, key), np.repeat(self.of(b, key), len(self.seeds(a)))
        seeds = [seed for seed in self.seeds(a) if seed in self.seeds(b)]
        return self.of(a, key, seeds), self.of(b, key, seeds)


def read_run(out: Path, results: Path, tasks: dict[str, str]) -> tuple[dict, dict, str]:
    """Values and files of a run, and why it is not finished (empty if it is)."""
    values, files = {}, {}
    for name in ("environment", "config"):
        if (path := out / f"{name}.json").is_file():
            files[name] = json.loads(path.read_text())
    if "config" in files:
        metrics, steps = out / "metrics.jsonl", files["config"]["steps"]
        lines = metrics.read_text().splitlines(True) if metrics.is_file() else []
        files["losses"] = [json.loads(line)["loss"] for line in lines if line.endswith("\n")]
        if not (out / "encoder" / "encoder.json").is_file():
            return values, files, f"{len(files['losses'])}{f' of {steps}' if steps else ''} steps"
    hashes = set()
    for path in results.glob("*.json"):
        about = json.loads(path.read_text())
        hashes.add(about["settings"]["sha256"])
        name = SHORT.get(about["task_name"], about["task_name"])
        values[name] = 100 * about["scores"]["test"][0]["main_score"]
    if missing := [task for task in tasks if task not in values]:
        return values, files, "not evaluated on " + ", ".join(missing) if values else "not begun"
    if not (path := out / "collapse" / "collapse.json").is_file():
        return values, files, "not analysed"
    [found] = json.loads(path.read_text())
    if hashes != {found["sha256"]}:
        return values, files, "evaluated and analysed with different weights"
    files["collapse"] = found
    values |= {key: found[key] for key in MEASURES if found.get(key) is not None}
    if "clusters" in found:
        values["effective"] = len(found["kept_tokens"]) or len(found["clusters"])
        values["kept"] = len(found["kept_tokens"]) or len(found["cosines"])
    for kind in set(tasks.values()):
        values[kind] = np.mean([values[task] for task, of in tasks.items() if of == kind])
    values["mean"] = np.mean([values[task] for task in tasks])
    return values, files, ""


def seeds_of(folder: Path, study: str, variant: str) -> list[int]:
    """The seeds that a variant should have, and those that it has besides."""
    there = [path.name.removeprefix(f"{variant}-") for path in folder.glob(f"{variant}-*")]
    there = [int(seed) for seed in there if seed.isdigit()]
    return sorted({*ablations.SEEDS.get(study, [0, 1]), *there})


def read_runs(folder: Path) -> Runs:
    """Everything that lies below the folder of bench/ablations.py."""
    setting = json.loads((folder / "common.json").read_text())
    base = ablations.pretrain_ctkd.parse_arguments(setting["common"])
    args = argparse.Namespace(**setting, base=base)
    tasks = {SHORT.get(TASKS[t]["name"], TASKS[t]["name"]): TASKS[t]["kind"] for t in args.task}
    tasks |= {SHORT.get(Path(f).name, Path(f).name): kind for f, kind in args.task_dir}
    runs = Runs(args, ablations.studies(args.base), {}, {}, {}, tasks)
    for study, variants in runs.studies.items():
        for variant in variants:
            for seed in seeds_of(folder, study, variant):
                name, model, method = f"{variant}-{seed}", f"{args.out}/{variant}-{seed}", "memory"
                if study == "untrained":
                    name, model, method = variant, args.base.model, variant
                out, label = folder / name, label_of(model, method)
                values, files, why = read_run(out, folder / "results" / label, tasks)
                runs.files[variant, seed] = files
                (runs.unfinished if why else runs.values)[variant, seed] = why or values
    return runs


def cell(x: np.ndarray, digits: int = 1) -> str:
    """Mean, and standard deviation if there are several numbers."""
    if not len(x) or np.isnan(x).any():
        return "-"
    spread = f" ± {x.std(ddof=1):.{digits}f}" if len(x) > 1 else ""
    return f"{x.mean():.{digits}f}{spread}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def by_variant(runs: Runs, columns: Callable[[str], list[str]]) -> list[list[str]]:
    """A row a variant with finished seeds: study, variant, seeds, columns(variant)."""
    rows = []
    for study, variants in runs.studies.items():
        there = [variant for variant in variants if runs.seeds(variant)]
        rows += [["" if i else study, variant, str(len(runs.seeds(variant))), *columns(variant)]
                 for i, variant in enumerate(there)]
    return rows


def command_of(runs: Runs, study: str, variant: str) -> str:
    """The command that made the runs of a variant; S stands for the seed."""
    if study == "untrained":
        return (f"evaluate.py --model {runs.args.base.model} --method {variant} --max-tokens "
                f"{runs.args.base.max_tokens}")
    module, flags, _ = ablations.recipe(variant, runs.studies[study][variant], "S", runs.args)
    return f"{module.__name__}.py {shlex.join(flags)}"


def losses_of(runs: Runs, variant: str) -> str:
    """Mean loss of the first and of the last 50 steps, over seeds."""
    found = [runs.files[variant, seed]["losses"] for seed in runs.seeds(variant)
             if "losses" in runs.files[variant, seed]]
    if not found:
        return "-"
    return " → ".join(cell(np.array([np.mean(part) for part in parts]), 2)
                      for parts in ([x[:50] for x in found], [x[-50:] for x in found]))


@dataclass
class Claim:
    """A sentence of the paper, its figures, and what to compare: (a, b, key, expected sign)."""

    text: str
    paper: str
    comparisons: Sequence[tuple[str, str, str, int]] = ()
    judge: Callable[[Runs], tuple[str, str]] | None = None  # in place of comparisons


def sign_of(d: np.ndarray) -> int:
    """The sign of a difference that counts, else 0 (see the top)."""
    if abs(np.sign(d).sum()) < len(d):
        return 0
    return int(np.sign(d[0])) * int(abs(d.mean()) > 2 * error_of(d))


def error_of(d: np.ndarray) -> float:
    """Standard error of the mean."""
    return float(d.std(ddof=1) / np.sqrt(len(d)))


def judge(runs: Runs, claim: Claim) -> tuple[str, str]:
    """Verdict and evidence: confirmed if every comparison is as expected."""
    if claim.judge:
        return claim.judge(runs)
    found = [compare(runs, *comparison) for comparison in claim.comparisons]
    verdicts, evidence = {verdict for verdict, _ in found}, "; ".join(text for _, text in found)
    if "opposite" in verdicts:
        part = "in part " if len(verdicts) > 1 else ""
        return f"not confirmed: {part}the opposite", evidence
    for verdict in ("unfinished", "not testable here", "not confirmed"):
        if verdict in verdicts:
            return verdict, evidence
    return "confirmed", evidence


def compare(runs: Runs, a: str, b: str, key: str, expected: int) -> tuple[str, str]:
    """Verdict and evidence of one comparison: `expected` is the sign of a - b, 0 a small one."""
    (x, y), (title, digits) = runs.both(a, b, key), MEASURES.get(key, (key, 1))
    if min(len(x), len(y)) < 2:
        return "unfinished", f"{title}: {a} {cell(x, digits)}, {b} {cell(y, digits)}"
    d = x - y
    if np.isnan(d).any():
        return "not testable here", f"{title}: not measured"
    evidence = (f"{title}: {a} {cell(x, digits)}, {b} {cell(y, digits)}, difference "
                f"{d.mean():+.{digits}f} ± {d.std(ddof=1):.{digits}f} ({len(d)})")
    small = abs(d.mean()) + 2 * error_of(d) < NO_DIFFERENCE
    if small if expected == 0 else sign_of(d) == expected:
        return "confirmed", evidence
    return "opposite" if expected and sign_of(d) == -expected else "not confirmed", evidence


def judge_spread(runs: Runs) -> tuple[str, str]:
    """Whether the scores of ctkd vary less over seeds than those of nll: an F test at 5 %."""
    x = {name: runs.of(name, "mean") for name in ("ctkd", "nll", "rc")}
    if min(map(len, x.values())) < 3:
        return "unfinished", "three seeds are needed"
    spread = {name: values.std(ddof=1) for name, values in x.items()}
    told = (spread["nll"] / spread["ctkd"]) ** 2 > 19  # F(2, 2)
    evidence = ", ".join(f"{name} {value:.2f}" for name, value in spread.items())
    return ("confirmed" if told else "not confirmed",
            f"deviation of the mean over three seeds: {evidence}; three seeds tell only deviations "
            f"apart that differ 4.4 times")


def judge_merging(runs: Runs) -> tuple[str, str]:
    """Whether the mean of effective tokens scores higher, if any were merged at all."""
    seeds = [seed for seed in runs.seeds("merged-nll") if seed in runs.seeds("nll")]
    kept = runs.of("merged-nll", "kept", seeds)
    verdict, evidence = judge(runs, Claim("", "", [("merged-nll", "nll", "mean", 1)]))
    if len(kept) > 1 and (kept == runs.of("nll", "kept", seeds)).any():
        verdict = "not testable here"  # there was nothing to merge
    return verdict, f"{evidence}; tokens kept by seed: {', '.join(f'{n:.0f}' for n in kept)}"


def judge_peak(runs: Runs) -> tuple[str, str]:
    """Stage 3 is not followed over its steps here."""
    steps = {runs.files["scl-ctkd", seed]["config"]["steps"] for seed in runs.seeds("scl-ctkd")}
    after = f", after {' or '.join(map(str, sorted(steps)))} steps" if steps else ""
    return "not testable here", f"stage 3 was scored at its end only{after}"


def judge_size(runs: Runs) -> tuple[str, str]:
    """The absolute scores belong to another model and other data."""
    return "not testable here", (f"{runs.args.base.model} in place of a Llama of 7 B weights, "
                                 f"{len(runs.tasks)} tasks, little data")


CLAIMS = [
    Claim("Continuation beats reconstruction", "CTKD 52.49, NLL 46.22, RC 35.79 after stage 1",
          [("ctkd", "rc", "mean", 1), ("nll", "rc", "mean", 1)]),
    Claim("Distillation beats the plain likelihood", "CTKD 52.49, NLL 46.22",
          [("ctkd", "nll", "mean", 1)]),
    Claim("CTKD varies less over runs", "deviation 1.37, NLL 5.32, RC 2.65 (five runs)",
          judge=judge_spread),
    Claim("Stage 1 beats the training-free mean", "CTKD 52.49, weighted mean 40.46",
          [("ctkd", "weighted-mean", "mean", 1)]),
    Claim("NLL's embeddings collapse to fewer dimensions", "about 10 against 100 (of 4,096)",
          [("nll", "ctkd", "entropy", -1), ("nll", "ctkd", "participation", -1)]),
    Claim("NLL's memory tokens are more alike", "Figures 5 and 6",
          [("nll", "ctkd", "mean_cosine", 1)]),
    Claim("Merging alike tokens helps NLL", "48.38 -> 51.09 (128,000 texts)", judge=judge_merging),
    Claim("K from 1 to 8 makes little difference", "Figure 3",
          [(f"K={k}", "ctkd", "mean", 0) for k in (1, 2, 4)]),
    Claim("K = 16 hurts retrieval", "Figure 3", [("K=16", "ctkd", "retrieval", -1)]),
    Claim("Bidirectional attention helps retrieval", "section 4",
          [("causal", "ctkd", "retrieval", -1)]),
    Claim("Causal attention helps STS and classification", "section 4",
          [("causal", "ctkd", "sts", 1), ("causal", "ctkd", "classification", 1)]),
    Claim("Each contrastive stage raises the scores", "52.49, 58.51, 66.78",
          [("ucl-ctkd", "ctkd", "mean", 1), ("scl-ctkd", "ucl-ctkd", "mean", 1)]),
    Claim("Each contrastive stage raises the effective dimension", "Figures 8 and 10",
          [("ucl-ctkd", "ctkd", "entropy", 1), ("scl-ctkd", "ucl-ctkd", "entropy", 1)]),
    Claim("Compression is a better start for the contrastive stages than none",
          "66.78; LLM2Vec, another pretext task, 66.11",
          [("ucl-ctkd", "ucl-none", "mean", 1), ("scl-ctkd", "scl-none", "mean", 1)]),
    Claim("Stage 3 is best within 200 steps, retrieval declines after", "section 4",
          judge=judge_peak),
    Claim("The scores themselves", "66.78 on 14 tasks", judge=judge_size),
]


def draw_scores(runs: Runs, path: Path):
    """Objectives, K and stages: a dot a seed, a line through the means."""
    from matplotlib.figure import Figure

    figure = Figure((9, 2.8), layout="constrained")
    axes = {"objective": ["weighted-mean", "rc", "nll", "ctkd"],
            "K": ["K=1", "K=2", "K=4", "ctkd", "K=16"],
            "after": ["ctkd", "ucl-ctkd", "scl-ctkd"]}
    panels = figure.subplots(1, len(axes))
    for panel, (title, variants) in zip(panels, axes.items()):
        there, style = [v for v in variants if runs.seeds(v)], "_" if title == "objective" else "-"
        for colour, key in enumerate(("sts", "retrieval", "mean")):
            values = [runs.of(v, key) for v in there]
            panel.plot([x.mean() for x in values], style, color=f"C{colour}",
                       label="mean of all" if key == "mean" else key)
            for i, x in enumerate(values):
                panel.plot([i] * len(x), x, ".", color=f"C{colour}")
        names = there if title != "K" else [
            str(runs.args.base.memory_tokens) if v == "ctkd" else v[2:] for v in there]
        panel.set_xticks(range(len(there)), names, fontsize=7)
        panel.set_xlabel(title)
    panels[0].set_ylabel("score x 100")
    panels[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=7)
    figure.savefig(path, metadata={"Date": None})


def draw_collapse(runs: Runs, path: Path):
    """Spectra of objectives and stages, a line a seed; mean cosines of the memory tokens."""
    from matplotlib.figure import Figure

    figure = Figure((9, 4.8), layout="constrained")
    panels = figure.subplot_mosaic("aabb;cdef", height_ratios=[1.2, 1])
    for name, variants in (("a", ["weighted-mean", "rc", "nll", "ctkd"]),
                           ("b", ["ctkd", "ucl-ctkd", "scl-ctkd"])):
        for i, variant in enumerate(variants):
            for turn, seed in enumerate(runs.seeds(variant)):
                s = np.array(runs.files[variant, seed]["collapse"]["spectrum"])
                panels[name].plot(np.arange(1, len(s) + 1), s / s[0], color=f"C{i}", linewidth=0.8,
                                  label=None if turn else variant)
        panels[name].set(yscale="log", ylim=(1e-5, 1.5), xlabel="index",
                         ylabel="singular value / first")
        panels[name].legend(frameon=False, fontsize=7)
    for name, variant in zip("cdef", ["rc", "nll", "ctkd", "scl-ctkd"]):
        if seeds := runs.seeds(variant):
            cosines = runs.files[variant, seeds[0]]["collapse"]["cosines"]
            image = panels[name].imshow(cosines, vmin=0, vmax=1)
            panels[name].set_title(f"{variant}, seed {seeds[0]}", fontsize=8)
            figure.colorbar(image, ax=panels[name], shrink=0.8)
        else:
            panels[name].remove()
    figure.savefig(path, metadata={"Date": None})


def flag_of(key: str, value) -> str:
    """A setting of bench/ablations.py as its flag in a shell."""
    flag = "--" + key.replace("_", "-")
    if key == "task_dir":
        return " ".join(f"{flag} {path} {kind}" for path, kind in value)
    if isinstance(value, list):
        return f"{flag} {' '.join(value)}"
    return f'{flag} "{value}"' if "'" in value else f"{flag} {shlex.quote(value)}"


def first_section(runs: Runs) -> str:
    """The first section: model, command, data."""
    args, llama = runs.args, runs.args.base.model
    words = shlex.split(" ".join([*args.common, args.ucl_flags, args.scl_flags,
                                  *sum(args.task_dir, [])]))
    names = {Path(word).name for word in words}
    data = [f"* `{name}`: {what}" for name, what in PUBLIC.items() if name in names]
    about = next((f["environment"] for f in runs.files.values() if "environment" in f), {})
    dtype = about.get("dtype", "?").removeprefix("torch.")
    llama = "the embedded one (6.9 M weights, D = 256)" if llama == "demo" else llama
    more = " \\\n    ".join(flag_of(key, value) for key, value in vars(args).items()
                           if value and key not in ("common", "base", "out"))
    common = shlex.join(args.common[2:])
    return f"""# Results

The paper's ablations and analysis at the size of a laptop: the Llama is {llama}, not the paper's
of 7 B. `python bench/report.py --runs {args.out}` writes this page from the run folders that this
command leaves (and resumes where it was stopped):

```sh
python bench/ablations.py --study {' '.join(runs.studies)} \\
    {common} \\
    {more} \\
    --out {args.out}
```

{chr(10).join(data)}

Scores are main scores x 100, mean ± standard deviation over seeds. Within stage 1 all variants of
a seed see the same texts in the same order, except those of the study `texts`. Training in {dtype}
on {about.get('device', '?')}, evaluation and analysis in {args.eval_dtype}, torch
{about.get('torch', '?')}. Speed, memory and the evaluator's agreement with published scores are in
[measured.md](measured.md).
"""


def page(runs: Runs) -> str:
    """The text of docs/results.md."""
    args, tasks = runs.args, list(runs.tasks)
    analysed = next((f["collapse"]["texts"] for f in runs.files.values() if "collapse" in f), 0)
    scores = by_variant(runs, lambda v: [
        *(cell(runs.of(v, task)) for task in [*tasks, "mean"])])
    measures = by_variant(runs, lambda v: [
        cell(runs.of(v, key), digits) for key, (_, digits) in MEASURES.items()])
    claims = [[c.text, c.paper, *judge(runs, c)] for c in CLAIMS]
    commands = [[f"{study}: {variant}", losses_of(runs, variant),
                 f"`{command_of(runs, study, variant)}`"]
                for study, variants in runs.studies.items() for variant in variants]
    unfinished = [f"* {study}: {variant}, seed {seed}: {why}"
                  for study, variants in runs.studies.items()
                  for (variant, seed), why in runs.unfinished.items() if variant in variants]
    return f"""{first_section(runs)}
## The paper's claims

A difference is taken seed by seed; it counts if it has one sign in all common seeds (their number
in brackets) and is above two standard errors. That happens by chance in 30 % of the cases with two
seeds, in 18 % with three: *confirmed* is a direction seen, not a proof. A claim of little
difference is confirmed if it is, with two standard errors, below {NO_DIFFERENCE:g} points. The
studies texts, embeddings and memory belong to no claim; their rows are below.

{table(["claim", "paper (7 B)", "here", "evidence"], claims)}

## Scores

![Scores over objectives, K and stages](ablations.svg)

{table(["study", "variant", "seeds", *tasks, "mean"], scores)}

## Collapse

Of the embeddings of {analysed:,} texts of {args.analyse} (`collapse.py --help` says what the
columns are):

![Spectra and token correlations](collapse.svg)

{table(["study", "variant", "seeds", *(name for name, _ in MEASURES.values())], measures)}

## Commands

S stands for the seed; the loss is the mean of the first and of the last 50 steps. Each run is then
read by `evaluate.py` on the tasks above and by `collapse.py --task {args.analyse}`.

{table(["runs", "loss", "command"], commands)}

## Unfinished

{chr(10).join(unfinished) or "Nothing."}
"""


def write(args: argparse.Namespace):
    """Write the page and its figures."""
    folder, out = Path(args.runs), Path(args.out)
    if not (folder / "common.json").is_file():
        raise UserError(f"{folder}: no common.json there; is it the --out of bench/ablations.py?")
    runs = read_runs(folder)
    if runs.unfinished and out.resolve() == PAGE and out.exists() and not args.force:
        (variant, seed), why = next(iter(runs.unfinished.items()))
        raise UserError(f"{out}: kept as it is, {len(runs.unfinished)} runs are unfinished ("
                        f"{variant}, seed {seed}: {why}); finish them, name another --out, or give "
                        f"--force")
    from matplotlib import rcParams

    rcParams["svg.hashsalt"] = "ablations"  # the same runs draw the same file
    out.parent.mkdir(parents=True, exist_ok=True)
    draw_scores(runs, out.parent / "ablations.svg")
    draw_collapse(runs, out.parent / "collapse.svg")
    out.write_text(page(runs), encoding="utf-8")
    print(f"{out}: {len(runs.values)} runs, {len(runs.unfinished)} unfinished")


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", default="runs/ablations", help="folder of bench/ablations.py")
    parser.add_argument("--out", default=str(PAGE), help="the page; its figures go beside it")
    parser.add_argument("--force", action="store_true",
                        help="write docs/results.md though runs are unfinished")
    args = parser.parse_args(argv)
    return run_command(lambda: write(args))


if __name__ == "__main__":
    sys.exit(main())

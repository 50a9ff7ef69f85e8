"""The claims of the paper, and how the records of bench/ablations.py judge them.

    runs = read_runs(Path("bench/records/smollm2"))
    judge_all(runs)                             a verdict and its comparisons for each of CLAIMS

bench/report.py turns them into a page.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project root

import ablations
from data.tasks import TASKS
from runtime.errors import UserError

SHORT = {"STSBenchmark": "STSB", "Banking77Classification": "Banking77", "demo-sts": "bundled STS",
         "demo-retrieval": "bundled retrieval", "clustering-20newsgroups": "20 Newsgroups*",
         "reranking-medquad": "MedQuAD*", "stsbenchmark-validation": "STSB (validation)",
         "banking77-validation": "Banking77 (validation)",
         "scifact-validation": "SciFact (validation)"}
SEEDS, ALPHA = 3, 0.05  # the least that a verdict needs; level of each test
NO_DIFFERENCE = 2.0  # points; a difference is called small if shown to be below this
PEAK = 200  # steps of stage 3, after which the paper sees no gain
DIMENSIONS = ("entropy", "participation", "above_1_percent")
MEASURES = {  # key of a run -> heading, digits
    "entropy": ("dimension: entropy", 1), "participation": ("participation", 1),
    "above_1_percent": ("above 1 %", 0), "mean_cosine": ("tokens' mean cosine", 3),
    "effective": ("effective tokens", 1), "uniformity": ("uniformity", 2),
    "alignment": ("alignment", 3),
}


@dataclass
class Runs:
    """All records of a folder: values[variant, seed][key], and what is missing."""

    args: argparse.Namespace  # of the command that made them, without its studies and seeds
    studies: dict[str, dict[str, str]]
    values: dict[tuple[str, int], dict[str, float]]
    records: dict[tuple[str, int], dict]
    missing: dict[tuple[str, int], str]  # variants and seeds that are due -> why they lack values
    tasks: dict[str, str]  # heading -> kind

    def seeds(self, variant: str) -> list[int]:
        """The finished seeds of a variant."""
        return sorted(seed for name, seed in self.values if name == variant)

    def begun(self, study: str) -> list[str]:
        """The variants of a study of which there is any record."""
        there = {name for name, _ in self.records}
        return [variant for variant in self.studies[study] if variant in there]

    def of(self, variant: str, key: str, seeds: list[int] | None = None) -> np.ndarray:
        """A score or a measure of a variant, one number per finished seed."""
        seeds = self.seeds(variant) if seeds is None else seeds
        return np.array([self.values[variant, seed].get(key, np.nan) for seed in seeds])

    def machine(self, variant: str, seed: int) -> str:
        """What a run was made on, in a word."""
        return "CPU" if "threads" in self.records[variant, seed]["machine"] else "GPU"

    def both(self, a: str, b: str, key: str) -> tuple[np.ndarray, np.ndarray]:
        """The values of a and b, one per common seed; an untrained b has one for all."""
        seeds = [seed for seed in self.seeds(a) if seed in self.seeds(b)]
        if b in self.studies["untrained"] or b == "0":
            y = np.repeat(self.of(b, key) if b != "0" else 0.0, len(self.seeds(a)))
            return self.of(a, key)[: len(y)], y
        return self.of(a, key, seeds), self.of(b, key, seeds)

    def same(self, variant: str) -> str:
        """The name that the variant of a claim has here.

        If the common setting has that value already, `causal` or `ctkd-mean` is `ctkd` itself.
        """
        common = {self.args.base.attention: "ctkd"} | {
            f"{name}-{self.args.base.memory_init}": name for name in ablations.OBJECTIVES}
        start, _, end = variant.partition("-")
        if start in ablations.LATER and end in common:
            return f"{start}-{common[end]}"
        return common.get(variant, variant)


def values_of(record: dict, tasks: dict[str, str]) -> dict[str, float]:
    """The scores and measures of a record, and its means over kinds of tasks."""
    values = {SHORT.get(name, name): score for name, score in record["scores"].items()}
    found = record["collapse"]
    values |= {key: found[key] for key in MEASURES if found.get(key) is not None}
    if "clusters" in found:
        values["effective"] = len(found["kept_tokens"]) or len(found["clusters"])
        values["kept"] = len(found["kept_tokens"]) or len(found["cosines"])
    groups = {kind: [task for task in tasks if tasks[task] == kind] for kind in tasks.values()}
    groups["mean without retrieval"] = [task for task in tasks if tasks[task] != "retrieval"]
    for name, there in {**groups, "mean": tasks}.items():
        values[name] = np.mean([values[task] for task in there] or np.nan)
    return values | after_peak(record.get("curve", []))


def retrieval_of(row: dict) -> float:
    """The mean of the retrieval tasks of a row of scores.jsonl; nan without any."""
    there = [x for name, x in row.items() if TASKS.get(name, {}).get("kind") == "retrieval"]
    return float(np.mean(there)) if there else np.nan


def after_peak(curve: list[dict]) -> dict[str, float]:
    """Figure 10: what stage 3 gains after step PEAK over its best before; retrieval's change."""
    early = [row for row in curve if row["step"] <= PEAK]
    late = [row["mean"] for row in curve if row["step"] > PEAK]
    if not early or not late:
        return {}
    return {f"gain after step {PEAK}": max(late) - max(row["mean"] for row in early),
            f"retrieval after step {PEAK}": retrieval_of(curve[-1]) - retrieval_of(early[-1])}


def read_runs(folder: Path) -> Runs:
    """The records that bench/ablations.py has written to a folder."""
    if not (folder / "setting.json").is_file():
        raise UserError(f"{folder}: no setting.json there; is it the --records of "
                        f"bench/ablations.py?")
    args = argparse.Namespace(**ablations.read_setting(folder / "setting.json"))
    args.base = ablations.pretrain_ctkd.parse_arguments(args.common)
    tasks = {SHORT.get(name, name): kind for name, kind in ablations.task_names(args).items()}
    studies = {name: v for name, v in ablations.studies(args).items() if name != "curve"}
    runs = Runs(args, studies, {}, {}, {}, tasks)  # `curve` has a run of `stages`
    for path in sorted(folder.glob("*-*.json")):
        record = json.loads(path.read_text())
        runs.records[record["variant"], record["seed"]] = record
    for variants in studies.values():
        for variant in variants:
            untrained = variant in studies["untrained"]
            there = [seed for name, seed in runs.records if name == variant]
            for seed in sorted({*there, *([0] if untrained else ablations.SEEDS)}):
                record = runs.records.get((variant, seed))
                scored = {SHORT.get(name, name) for name in record["scores"]} if record else set()
                if record is None:
                    runs.missing[variant, seed] = "no record"
                elif lacking := [task for task in tasks if task not in scored]:
                    runs.missing[variant, seed] = "not evaluated on " + ", ".join(lacking)
                else:
                    runs.values[variant, seed] = values_of(record, tasks)
    return runs


def cell(x: np.ndarray, digits: int = 1) -> str:
    """Mean, and standard deviation if there are several numbers."""
    if not len(x) or np.isnan(x).any():
        return "-"
    spread = f" ± {x.std(ddof=1):.{digits}f}" if len(x) > 1 else ""
    return f"{x.mean():.{digits}f}{spread}"


def student(d: np.ndarray, level: float = 0.95) -> tuple[float, float, float, float]:
    """Mean of paired differences, its interval by Student's t (two bounds), its two-sided p."""
    mean, error = d.mean(), d.std(ddof=1) / np.sqrt(len(d))
    half = stats.t.ppf((1 + level) / 2, len(d) - 1) * error
    p = 2 * stats.t.sf(abs(mean) / error, len(d) - 1) if error else mean == 0
    return mean, mean - half, mean + half, float(p)


@np.errstate(divide="ignore", invalid="ignore")  # a deviation of 0 is not testable
def deviations(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float, float]:
    """Ratio of two standard deviations, its 95 % interval, and the two-sided p of an F test."""
    ratio, df = x.std(ddof=1) / y.std(ddof=1), (len(x) - 1, len(y) - 1)
    low, high = ratio / np.sqrt(stats.f.ppf([0.975, 0.025], *df))
    p = 2 * min(stats.f.cdf(ratio**2, *df), stats.f.sf(ratio**2, *df))
    return ratio, low, high, float(p)


def equivalence(d: np.ndarray) -> float:
    """p of two one-sided t tests that the mean of d is within ± NO_DIFFERENCE."""
    below = stats.ttest_1samp(d, NO_DIFFERENCE, alternative="less").pvalue
    above = stats.ttest_1samp(d, -NO_DIFFERENCE, alternative="greater").pvalue
    return float(max(below, above))


def holm(p: Sequence[float]) -> np.ndarray:
    """Holm's p-values: with probability 95 % none of those below 0.05 is due to chance."""
    p, order = np.array(p), np.argsort(p)
    adjusted = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)).clip(max=1)
    return adjusted[np.argsort(order)]


@dataclass
class Found:
    """The outcome of a comparison; p and holm are nan if it could not be tested."""

    sides: str
    sign: str
    seeds: int
    verdict: str = "not testable here"
    difference: str = "-"
    p: float = np.nan
    holm: float = np.nan


def compare(runs: Runs, a: str, sign: str, b: str, key: str) -> Found:
    """One comparison of a claim: a > b, a < b, or a = b for a small difference."""
    a, b = runs.same(a), runs.same(b)
    (x, y), (title, digits) = runs.both(a, b, key), MEASURES.get(key, (key, 1))
    if key == "deviation":  # of the mean score, over all seeds of each: not paired
        x, y = runs.of(a, "mean"), runs.of(b, "mean")
    sides = f"{title}: {a} {cell(x, digits)}" + f", {b} {cell(y, digits)}" * (b != "0")
    made = [{runs.machine(name, seed) for seed in runs.seeds(name)} for name in (a, b)]
    sides += " (on unlike machines)" * (made[0] != made[1] and all(made))
    found = Found(sides, sign, min(len(x), len(y)))
    if found.seeds > 1 and not np.isnan([*x, *y]).any():
        ratio, form = key == "deviation", ".2f" if key == "deviation" else f"+.{max(digits, 1)}f"
        middle, low, high, found.p = deviations(x, y) if ratio else student(x - y)
        found.difference = f"{middle:{form}} [{low:{form}}, {high:{form}}]"
        if sign == "=":
            _, low, high, _ = student(x - y, 1 - 2 * ALPHA)
            found.difference += f", 90 % [{low:{form}}, {high:{form}}]"
            found.p = equivalence(x - y)
            found.verdict = "confirmed" if max(-low, high) < NO_DIFFERENCE else "not confirmed"
            if min(abs(low), abs(high)) > NO_DIFFERENCE and low * high > 0:
                found.verdict = "opposite"
        elif not np.isnan(found.p):
            shown = "confirmed" if (middle > ratio) == (sign == ">") else "opposite"
            found.verdict = shown if found.p < ALPHA else "not confirmed"
    if a.partition("-")[0] in ablations.KEPT:
        kept, before = runs.both(a, b, "kept")
        found.sides += f"; tokens kept by seed: {', '.join(f'{n:.0f}' for n in kept)}"
        if (kept == before).any():  # nothing was merged, or left out
            found.verdict = "not testable here"
    if found.seeds < SEEDS:
        found.verdict = f"no verdict: {found.seeds} seed{'s' * (found.seeds != 1)}"
    return found


def conclude(found: list[Found]) -> str:
    """The verdict of a claim: confirmed if every comparison is as expected."""
    verdicts = sorted({f.verdict for f in found})
    if "opposite" in verdicts:
        return f"not confirmed: {'in part ' * (len(verdicts) > 1)}the opposite"
    few = sum(f.seeds < SEEDS for f in found)
    if few and len(found) > 1:
        return f"no verdict: under {SEEDS} seeds in {few} of {len(found)} comparisons"
    for start in ("no verdict", "not testable here", "not confirmed"):
        if there := [verdict for verdict in verdicts if verdict.startswith(start)]:
            return there[0]
    corrected = "also" if all(f.holm < ALPHA for f in found) else "not"
    return "confirmed" + f", {corrected} after Holm" * (found[0].sign != "=")


def judge_all(runs: Runs) -> list[tuple[str, list[Found]]]:
    """Verdict ("not run" if nothing of it was) and comparisons, with Holm's p, of each claim."""
    judged = [[compare(runs, *part) for part in parts] for *_, parts in CLAIMS]
    tested = [f for found in judged for f in found if not np.isnan(f.p)]
    tests = {(f.sides, f.sign): f.p for f in tested}  # two claims may share one, which counts once
    corrected = dict(zip(tests, holm([*tests.values()])))
    for f in tested:
        f.holm = float(corrected[f.sides, f.sign])
    return [(conclude(found) if any(f.seeds for f in found) else "not run", found)
            for found in judged]


def each(comparisons: str, *values: str) -> list[list[str]]:
    """`a > b by key; ...` as lists of a, sign, b, key, once for each value of X."""
    return [part.replace(" by ", " ").split(" ", 3) for value in values or "-"
            for part in comparisons.replace("X", value).split("; ")]


CLAIMS = [  # what the paper says, its figures, what is compared
    ("Continuation beats reconstruction", "CTKD 52.49, NLL 46.22, RC 35.79 after stage 1",
     each("X > rc by mean", "ctkd", "nll")),
    ("Distillation beats the likelihood", "CTKD 52.49, NLL 46.22", each("ctkd > nll by mean")),
    ("CTKD varies less over runs", "Figure 2: deviation 1.37, NLL 5.32, RC 2.65 (five runs)",
     each("ctkd < X by deviation", "nll", "rc")),
    ("Stage 1 beats the training-free mean", "CTKD 52.49, weighted mean 40.46",
     each("ctkd > weighted-mean by mean")),
    ("Stage 1 beats every training-free row but MetaEOL", "CTKD 52.49, EE 46.54, PromptEOL "
     "43.55", each("ctkd > X by mean", "last", "mean", "weighted-mean", "echo", "prompteol")),
    ("Compression beats the pretext tasks of LLM2Vec and Llama2Vec", "CTKD 52.49, LLM2Vec 46.87, "
     "Llama2Vec 43.54 after stage 1", each("ctkd > X by mean", "mntp", "ebae-ebar")),
    ("NLL's embeddings collapse to fewer dimensions", "Figure 4: about 10 against 100 (of 4,096); "
     "in which sense is not said: values near zero are meant, `above 1 %` is the nearest",
     each("nll < ctkd by X", *DIMENSIONS)),
    ("NLL's memory tokens are more alike", "Figures 5 and 6, 32,000 texts",
     each("nll > ctkd by mean_cosine")),
    ("NLL's memory tokens are more alike, 4 x texts", "Figures 5 and 6, 128,000 texts",
     each("nll-4x > ctkd-4x by mean_cosine")),
    ("Initial rows that are alike keep the tokens alike", "ours",
     each("X-mean > X-normal by mean_cosine", *ablations.OBJECTIVES)),
    ("The initial rows make little difference to the scores", "ours",
     each("X-mean = X-normal by mean", *ablations.OBJECTIVES)),
    ("Merging alike tokens helps NLL", "Figure 7, section 4.2", each("merged-nll > nll by mean")),
    ("Merging alike tokens helps NLL, 4 x texts", "Figure 7: 48.38 -> 51.09, 128,000 texts",
     each("merged-nll-4x > nll-4x by mean")),
    ("Reading by the wide tokens helps", "ours", each("wide-X > X by mean", *ablations.OBJECTIVES)),
    ("Reading by the wide tokens helps the stages after it", "ours",
     each("X-wide-ctkd > X-ctkd by mean", "ucl", "scl")),
    ("A window of the continuation is a better objective than all of it", "ours, equal tokens",
     each("ctkd-window > ctkd by mean")),
    ("A window is better on 4 x texts", "ours, equal tokens",
     each("ctkd-window-4x > ctkd-4x by mean")),
    ("A window is a better start for the stages after it", "ours, equal tokens",
     each("X-ctkd-window > X-ctkd by mean; X-ctkd-window-4x > X-ctkd-4x by mean", "ucl", "scl")),
    ("K from 1 to 8 makes little difference outside retrieval", "Figure 3",
     each("K=X = ctkd by mean without retrieval", "1", "2", "4")),
    ("K = 16 hurts retrieval", "Figure 3", each("K=16 < ctkd by retrieval")),
    ("One memory token is not enough", "section 4.2: unsatisfactory", each("K=1 < ctkd by mean")),
    ("One memory token is not enough for NLL", "section 4.2", each("nll-K=1 < nll by mean")),
    ("Bidirectional attention helps retrieval", "a summary of the paper, not its text",
     each("causal < bidirectional by retrieval")),
    ("Causal attention helps STS and classification", "a summary of the paper, not its text",
     each("causal > bidirectional by X", "sts", "classification")),
    ("Each contrastive stage raises the scores", "CTKD 52.49, 58.51, 66.78; NLL 46.22, 56.84, "
     "65.90; RC 35.79, 45.41, 65.49",
     each("ucl-X > X by mean; scl-X > ucl-X by mean", *ablations.OBJECTIVES)),
    ("The order CTKD, NLL, RC lasts", "after stage 2 58.51, 56.84, 45.41; 3 66.78, 65.90, 65.49",
     each("X-ctkd > X-nll by mean; X-nll > X-rc by mean", "ucl", "scl")),
    ("Each contrastive stage raises the effective dimension", "Figure 9",
     each("ucl-ctkd > ctkd by X; scl-ctkd > ucl-ctkd by X", *DIMENSIONS)),
    ("Compression is a better start for the contrastive stages than none", "not in the paper",
     each("X-ctkd > X-none by mean", "ucl", "scl")),
    ("Compression is a better start for the contrastive stages than LLM2Vec's pretext task",
     "after stage 2 58.51, LLM2Vec 57.82; 3 66.78, 66.11",
     each("X-ctkd > X-mntp by mean", "ucl", "scl")),
    (f"Stage 3 is best within {PEAK} steps, retrieval declines after", "section 5.4, Figure 10",
     each(f"scl-ctkd < 0 by X after step {PEAK}", "gain", "retrieval")),
]

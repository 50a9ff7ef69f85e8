"""bench/claims.py and report.py: what is read, how claims are judged, what the page says."""

import json
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from helpers import ROOT
from scipy import stats

sys.path[:0] = [str(Path(__file__).parents[1] / folder) for folder in ("", "bench")]
import ablations
import claims
import report

SETTING = {"common": "--preset demo --memory-init mean --steps 20 --num-texts 9000".split(),
           "task": ["sts17", "scifact", "banking77"], "task_dir": [], "analyse": "demo-sts",
           "data_dir": None, "eval_dtype": "float32", "nll_flags": "", "rc_flags": "",
           "ucl_flags": "--lr 1e-5", "scl_flags": "", "curve_tasks": ["scifact"],
           "curve_every": 50, "about": ""}
TASKS = {"sts": "STS17", "retrieval": "SciFact", "classification": "Banking77Classification"}


def write_run(folder, variant, seed, sts, retrieval=30.0, classification=50.0, *, steps=20,
              kept=(), curve=(), **measures):
    """A record as bench/ablations.py leaves it, with these scores x 100 and losses 0, 1, 2, ..."""
    curve = [{"step": step, "scifact": score, "sts17": 2 * mean - score, "mean": mean}
             for step, mean, score in curve]
    found = {"variant": variant, "seed": seed, "machine": "A, 2 cores, 1 threads",
             "hours": {"training": 0.25, "scoring": 0.05}, "command": "pretrain_ctkd.py",
             "environment": {"device": "cpu", "dtype": "torch.bfloat16", "torch": "2.13"},
             "scores": dict(zip(TASKS.values(), (sts, retrieval, classification))),
             "loss": ablations.thin([float(i) for i in range(steps)]), "curve": curve,
             "collapse": {
                 "spectrum": [4.0, 1.0], "cosines": np.eye(2).tolist(), "texts": 50,
                 "entropy": 10.0, "participation": 5.0, "above_1_percent": 2, "mean_cosine": 0.5,
                 "clusters": [[0], [1]], "kept_tokens": list(kept), "uniformity": -1.0,
                 "alignment": None, **measures}}
    path = folder / f"{variant}-{seed}.json"
    path.write_text(json.dumps(found))
    return path


def change(path, **parts):
    """Replace parts of a record's analysis."""
    found = json.loads(path.read_text())
    path.write_text(json.dumps({**found, "collapse": {**found["collapse"], **parts}}))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "setting.json").write_text(json.dumps(SETTING))
    return tmp_path


def write(folder, variant, *columns, **more):
    """A run of each seed; the columns are the scores of sts, retrieval, classification by seed."""
    for seed, scores in enumerate(zip(*columns)):
        write_run(folder, variant, seed, *scores, **more)


def judged(folder):
    """Claim -> its verdict and comparisons."""
    found = claims.judge_all(claims.read_runs(folder))
    return {text: result for (text, *_), result in zip(claims.CLAIMS, found, strict=True)}


def verdict(folder, beginning):
    [(verdict, _)] = [v for text, v in judged(folder).items() if text == beginning]
    return verdict


# ---------------------------------------------------------------------------------------------
# Statistics
# ---------------------------------------------------------------------------------------------


def test_a_difference_has_the_interval_and_p_of_scipys_paired_t_test():
    x, y = np.array([61.0, 62.5, 60.2, 64.0]), np.array([58.0, 61.0, 59.9, 60.0])
    oracle = stats.ttest_rel(x, y)
    for level in (0.95, 0.9):
        mean, low, high, p = claims.student(x - y, level)
        assert (mean, p) == pytest.approx(((x - y).mean(), oracle.pvalue))
        assert (low, high) == pytest.approx(tuple(oracle.confidence_interval(level)))
    assert claims.student(np.zeros(3)) == (0, 0, 0, 1)
    assert claims.student(np.ones(3)) == (1, 1, 1, 0)


@pytest.mark.parametrize("seeds, threshold", [(3, 39.0), (5, 9.605), (8, 4.995)])
def test_deviations_are_told_apart_at_the_tabled_value_of_f(seeds, threshold):
    """The 97.5 % points of F(n - 1, n - 1) as tables print them: two-sided, 5 %."""
    y = np.arange(seeds, dtype=float)
    for factor, told in ((0.999, False), (1.001, True)):
        ratio, low, high, p = claims.deviations(y * np.sqrt(threshold * factor), y)
        assert (p < 0.05) == told == (low > 1), (seeds, factor)
        assert claims.deviations(y, y * ratio)[3] == pytest.approx(p)
        assert ratio**2 == pytest.approx(threshold * factor) and low < ratio < high


def test_holms_correction():
    assert claims.holm([0.04, 0.01, 0.03, 0.005]) == pytest.approx([0.06, 0.03, 0.06, 0.02])
    assert claims.holm([0.5, 0.9]) == pytest.approx([1, 1])
    assert claims.holm([]).size == 0


# ---------------------------------------------------------------------------------------------
# Claims
# ---------------------------------------------------------------------------------------------


def test_a_comparison_is_judged_by_its_paired_difference(folder):
    x, y = [60.0, 61.0, 62.0, 63.0], [40.0, 40.5, 43.0, 43.0]
    write(folder, "ctkd", x)
    write(folder, "rc", y)
    write_run(folder, "rc", 7, 90.0)  # no common seed
    found = claims.compare(claims.read_runs(folder), "ctkd", ">", "rc", "sts")
    oracle = stats.ttest_rel(x, y)
    low, high = oracle.confidence_interval()
    assert found.p == pytest.approx(oracle.pvalue) and found.seeds == 4
    assert found.difference == f"+19.9 [{low:+.1f}, {high:+.1f}]" and found.verdict == "confirmed"
    assert found.sides == "sts: ctkd 61.5 ± 1.3, rc 41.6 ± 1.6"


@pytest.mark.parametrize("sign, other, expected", [
    (">", 50, "confirmed"), ("<", 50, "opposite"), (">", 70, "opposite"), ("<", 70, "confirmed"),
    (">", 61, "not confirmed"), ("<", 61, "not confirmed"),
])
def test_the_sign_and_the_p_value_make_the_verdict(sign, other, expected, folder):
    write(folder, "ctkd", [60, 61, 62])
    write(folder, "rc", [other + 0.5, other - 0.5, other + 0.4])
    assert claims.compare(claims.read_runs(folder), "ctkd", sign, "rc", "sts").verdict == expected


def test_two_seeds_make_no_verdict(folder):
    write(folder, "ctkd", [60, 60.001])
    write(folder, "nll", [50, 50])
    verdict, [found] = judged(folder)["Distillation beats the likelihood"]
    assert verdict == "no verdict: 2 seeds" and found.p < 0.05
    assert found.difference == "+3.3 [+3.3, +3.3]"
    write_run(folder, "rc", 0, 40)
    assert judged(folder)["Continuation beats reconstruction"][0] == (
        "no verdict: under 3 seeds in 2 of 2 comparisons")


def test_a_claim_is_confirmed_if_all_of_it_is_and_says_what_holm_leaves(folder):
    write(folder, "ctkd", [60, 61, 62])
    write(folder, "nll", [60, 61, 62.5])
    write(folder, "rc", [40, 41.5, 42])
    found = judged(folder)
    verdict, comparisons = found["Continuation beats reconstruction"]
    assert verdict == "confirmed, also after Holm"
    every = [f for _, several in found.values() for f in several if not np.isnan(f.p)]
    assert [f.holm for f in every] == pytest.approx(claims.holm([f.p for f in every]))
    assert len(every) > 5 and all(f.holm > f.p for f in comparisons)
    assert judged(folder)["Distillation beats the likelihood"][0] == "not confirmed"


def test_a_comparison_that_two_claims_share_counts_once(folder):
    write(folder, "ctkd", [60, 61, 62])
    write_run(folder, "weighted-mean", 0, 40)  # it has no seeds
    found = judged(folder)
    [alone] = found["Stage 1 beats the training-free mean"][1]
    among = found["Stage 1 beats every training-free row but MetaEOL"][1]
    assert alone.p == alone.holm < 0.05
    assert [f.holm for f in among if not np.isnan(f.p)] == [alone.p]


def test_a_p_value_that_holm_raises_is_said(folder):
    write(folder, "ctkd", [60, 61, 62])
    write(folder, "nll", [57.0, 59.1, 59.5])
    verdict, [found] = judged(folder)["Distillation beats the likelihood"]
    assert found.p < 0.05 < found.holm and verdict == "confirmed, not after Holm"


def test_opposites_are_said_in_part_or_whole(folder):
    write(folder, "ctkd", [60, 61, 62])
    write(folder, "rc", [50, 51.5, 52])
    write(folder, "nll", [40, 41, 42.5])
    found = judged(folder)
    assert found["Continuation beats reconstruction"][0] == (
        "not confirmed: in part the opposite")
    write(folder, "causal", [60, 60, 60], [40, 41, 42.5], [1, 1, 1])
    found = judged(folder)
    assert found["Bidirectional attention helps retrieval"][0] == "not confirmed: the opposite"


def test_attention_is_judged_by_retrieval_and_by_sts_and_classification(folder):
    """Each claim reads its own kinds of task: here they say different things."""
    write(folder, "ctkd", [60, 61, 62], [30, 31, 32], [50, 51, 52])
    write(folder, "causal", [70, 71.5, 72], [20, 21, 22.5], [60, 61, 62.5])
    found = judged(folder)
    verdict, [retrieval] = found["Bidirectional attention helps retrieval"]
    assert verdict.startswith("confirmed") and retrieval.sides.startswith("retrieval: causal 21.2")
    verdict, several = found["Causal attention helps STS and classification"]
    assert verdict.startswith("confirmed")
    assert [f.sides.split()[:3] for f in several] == [
        ["sts:", "causal", "71.2"], ["classification:", "causal", "61.2"]]


@pytest.mark.parametrize("scores, sixteen, one", [
    ([20, 21, 22.5], "confirmed", "confirmed"),
    ([40, 41, 42.5], "not confirmed: the opposite", "not confirmed: the opposite"),
    ([30, 31, 32.5], "not confirmed", "not confirmed"),
])
def test_the_claims_on_k_expect_lower_scores(scores, sixteen, one, folder):
    write(folder, "ctkd", [60, 61, 62], [30, 31, 32])
    write(folder, "K=16", [60, 61, 62], scores)
    write(folder, "K=1", [60, 61, 62], scores)
    assert verdict(folder, "K = 16 hurts retrieval").split(",")[0] == sixteen
    assert verdict(folder, "One memory token is not enough").split(",")[0] == one


@pytest.mark.parametrize("gains, expected", [
    ((0.1, 0.2, 0.1), "confirmed"), ((-1.5, -1.4, -1.6), "confirmed"),
    ((0.0, 2.5, 0.5), "not confirmed"), ((3.0, 3.1, 3.2), "not confirmed: the opposite"),
    ((-3.0, -3.1, -3.2), "not confirmed: the opposite"), ((1.1, 1.2, 2.0), "not confirmed"),
    ((2.5, 1.9, 3.2), "not confirmed"), ((-9.0, 9.0, 8.0), "not confirmed"),
])
def test_little_difference_is_shown_by_the_90_percent_interval(gains, expected, folder):
    """Outside retrieval, which here always differs by 20."""
    write(folder, "ctkd", [60, 61, 62], [30, 31, 32], [50, 51, 52])
    other = [[x + gain for x, gain in zip(x, gains)] for x in ([60, 61, 62], [50, 51, 52])]
    for k in (1, 2, 4):
        write(folder, f"K={k}", other[0], [10, 11, 12], other[1])
    verdict, found = judged(folder)["K from 1 to 8 makes little difference outside retrieval"]
    low, high = stats.ttest_1samp(gains, 0).confidence_interval(0.9)
    beyond = bool(low > 2 or high < -2)
    assert verdict == expected == ("confirmed" if -2 < low and high < 2 else
                                   "not confirmed" + ": the opposite" * beyond)
    assert found[0].difference.endswith(f"90 % [{low:+.1f}, {high:+.1f}]")
    error = np.std(gains, ddof=1) / np.sqrt(3)  # two one-sided tests against 2 points
    t = [(np.mean(gains) + shift) / error for shift in (-2, 2)]
    p = max(stats.t.cdf(t[0], 2), stats.t.sf(t[1], 2))
    assert [f.p for f in found] == pytest.approx([p] * 3)
    assert (p < 0.05) == (expected == "confirmed")


def test_variation_is_compared_over_all_seeds_of_each(folder):
    write(folder, "ctkd", [60, 60.3, 60.6, 60.3])
    for name, scores in (("nll", [40, 60, 80]), ("rc", [40, 60, 80])):
        write(folder, name, scores)
    claim = "CTKD varies less over runs"
    verdict, [found, _] = judged(folder)[claim]
    x, y = np.array([60, 60.3, 60.6, 60.3]) / 3, np.array([40, 60, 80]) / 3
    assert verdict.startswith("confirmed") and found.seeds == 3
    assert found.p == pytest.approx(2 * stats.f.cdf(x.var(ddof=1) / y.var(ddof=1), 3, 2))
    write_run(folder, "nll", 3, 60)
    p = judged(folder)[claim][1][0].p
    assert p == pytest.approx(2 * stats.f.cdf(x.var(ddof=1) / np.var([40, 60, 80, 60], ddof=1) * 9,
                                              3, 3))


@pytest.mark.parametrize("spread, expected", [
    (4.0, "not confirmed"), (6.0, "not confirmed"), (6.5, "confirmed"),
    (1 / 6.5, "not confirmed: the opposite"),
])
def test_three_seeds_tell_deviations_apart_that_differ_6_times(spread, expected, folder):
    """sqrt(39): one-sided, as the constant 19 had it, it would be 4.4 times."""
    write(folder, "ctkd", [59, 60, 61])
    for name in ("nll", "rc"):
        write(folder, name, [60 - spread, 60, 60 + spread])
    assert verdict(folder, "CTKD varies less over runs").split(", ")[0] == expected


def test_collapse_is_judged_in_all_three_senses(folder):
    for seed in range(3):
        few = {"entropy": 10.0 + seed, "participation": 5 + seed / 2, "above_1_percent": 20 + seed}
        many = {name: 2 * value + seed**2 / 9 for name, value in few.items()}
        write_run(folder, "ctkd", seed, 60, **many)
        write_run(folder, "nll", seed, 60, **few)
    claim = "NLL's embeddings collapse to fewer dimensions"
    verdict, found = judged(folder)[claim]
    assert verdict.startswith("confirmed") and len(found) == 3
    for path in folder.glob("nll-*.json"):
        change(path, above_1_percent=90)
    assert judged(folder)[claim][0] == "not confirmed: in part the opposite"


def test_merging_is_judged_only_where_tokens_were_merged(folder):
    claim = "Merging alike tokens helps NLL"
    write(folder, "nll", [60, 61, 62])
    write(folder, "merged-nll", [70, 71, 72.5], kept=[1])
    verdict, [found] = judged(folder)[claim]
    assert verdict.startswith("confirmed") and found.sides.endswith("kept by seed: 1, 1, 1")
    change(folder / "merged-nll-1.json", kept_tokens=[])
    verdict, [found] = judged(folder)[claim]
    assert verdict == "not testable here" and found.sides.endswith("kept by seed: 1, 2, 1")
    assert judged(folder)["Merging alike tokens helps NLL, 4 x texts"][0] == "not run"


@pytest.mark.parametrize("late, expected", [
    ([(250, 58, 30), (300, 57, 25)], "confirmed"),
    ([(250, 68, 30), (300, 57, 25)], "not confirmed: in part the opposite"),  # best after 200
    ([(250, 58, 30), (300, 57, 48)], "not confirmed: in part the opposite"),  # retrieval rises
    ([], "not testable here"),
])
def test_stage_3_is_followed_over_its_steps(late, expected, folder):
    for seed in range(3):
        curve = [(0, 40, 35), (100, 61, 45), (200, 60, 40), *late]
        curve = [(step, mean + (seed**2 * step / 1000), score + seed * (step > 200) / 9)
                 for step, mean, score in curve]
        write_run(folder, "scl-ctkd", seed, 60, curve=curve)
    claim = "Stage 3 is best within 200 steps, retrieval declines after"
    assert verdict(folder, claim).split(",")[0] == expected


def test_stage_3_is_compared_with_its_best_before_and_with_step_200(folder):
    write_run(folder, "scl-ctkd", 0, 60, curve=[
        (0, 40, 35), (100, 61, 45), (200, 60, 40), (250, 59, 38), (300, 57, 25)])
    values = claims.read_runs(folder).values["scl-ctkd", 0]
    assert values["gain after step 200"] == -2 and values["retrieval after step 200"] == -15


def test_what_was_not_measured_is_not_judged(folder):
    setting = {**SETTING, "task": ["sts17", "scifact"]}
    (folder / "setting.json").write_text(json.dumps(setting))
    write(folder, "ctkd", [60, 61, 62])
    write(folder, "causal", [70, 71, 72.5])  # there is no task of classification
    assert verdict(folder, "Causal attention helps STS and classification") == "not testable here"


def test_the_untrained_have_one_value_for_all_seeds(folder):
    write(folder, "ctkd", [60, 61, 62])
    write_run(folder, "weighted-mean", 0, 30)
    verdict, [found] = judged(folder)["Stage 1 beats the training-free mean"]
    assert verdict.startswith("confirmed") and found.seeds == 3
    assert found.p == pytest.approx(stats.ttest_1samp([10, 31 / 3, 32 / 3], 0).pvalue)


@pytest.mark.parametrize("flags", ["", "--attention causal", "--memory-init normal"])
def test_every_comparison_is_of_variants_and_measures_that_exist(flags, folder):
    """Whatever the common setting is: a claim's `causal` is then `ctkd`."""
    setting = {**SETTING, "common": [*SETTING["common"], *flags.split()]}
    (folder / "setting.json").write_text(json.dumps(setting))
    runs = claims.read_runs(folder)
    names = {name for variants in runs.studies.values() for name in variants} | {"0"}
    keys = {*claims.MEASURES, *TASKS, "mean", "mean without retrieval", "deviation",
            "gain after step 200", "retrieval after step 200"}
    for text, _, parts in claims.CLAIMS:
        for a, sign, b, key in parts:
            assert {runs.same(a), runs.same(b)} <= names, (text, a, b)
            assert key in keys and sign in "<=>", (text, key)
    assert len({text for text, *_ in claims.CLAIMS}) == len(claims.CLAIMS)
    assert runs.same("causal") == ("ctkd" if "causal" in flags else "causal")
    assert runs.same("merged-nll-mean") == (
        "merged-nll-mean" if "normal" in flags else "merged-nll")


def test_a_claim_on_attention_or_start_holds_whichever_of_both_is_common(folder):
    setting = {**SETTING, "common": [*SETTING["common"], "--attention", "causal",
                                     "--memory-init", "normal"]}
    (folder / "setting.json").write_text(json.dumps(setting))
    write(folder, "ctkd", [60, 61, 62], [20, 21, 22], mean_cosine=0.5)
    write(folder, "bidirectional", [60, 61, 62], [30, 31, 32.5])
    write(folder, "ctkd-mean", [60, 61, 62], mean_cosine=0.9)
    assert verdict(folder, "Bidirectional attention helps retrieval").startswith("confirmed")
    _, [found, *_] = judged(folder)["Initial rows that are alike keep the tokens alike"]
    assert found.sides == ("tokens' mean cosine: ctkd-mean 0.900 ± 0.000, ctkd 0.500 ± 0.000")
    assert found.verdict == "confirmed"


# ---------------------------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------------------------


def page_of(folder):
    assert report.main(["--runs", str(folder), "--out", str(folder / "RESULTS.md")]) == 0
    return (folder / "RESULTS.md").read_text()


def test_the_page_says_what_it_is_and_how_often_chance_would_speak(folder, capsys):
    write(folder, "ctkd", [60, 61, 62], steps=120)
    write(folder, "rc", [40, 41, 42.5])
    text = page_of(folder)
    assert ("Training in bfloat16 on\ncpu (torch 2.13); evaluation and analysis in float32."
            ) in text
    head = " ".join(text[:700].split())
    assert "**Exploratory**" in head and "the bundled Llama (6.9 M weights, D = 256)" in head
    tested = [f for _, found in judged(folder).values() for f in found if not np.isnan(f.p)]
    assert len(tested) == 2
    assert "Comparisons: 2; if nothing differed, 0.1 would have p < 0.05" in text
    row = next(line for line in text.splitlines() if line.startswith("| objective | ctkd | 3 |"))
    # the loss of steps 0 to 49 and of 70 to 119
    assert row == ("| objective | ctkd | 3 | 61.0 ± 1.0 | 30.0 ± 0.0 | 50.0 ± 0.0 | "
                   "47.0 ± 0.3 | 24.50 ± 0.00 → 94.50 ± 0.00 | 0.25 + 0.05 (CPU) |")
    assert "24.50" not in next(line for line in text.splitlines() if line.startswith("|  | rc"))
    for name in ("ablations.svg", "collapse.svg"):
        assert (folder / name).read_text().startswith("<?xml") and f"]({name})" in text
    row = next(line for line in text.splitlines() if "Continuation beats" in line)
    assert "| no verdict: under 3 seeds in 1 of 2 comparisons | mean: ctkd 47.0 ± 0.3, rc " in row
    command = text.split("```")[1]
    assert "--study objective" in command and "--curve" not in command  # no stage 3 was run
    assert "    --preset demo --memory-init mean --steps 20 --num-texts 9000 " in command
    assert "--ucl-flags '--lr 1e-5'" in command and "--about" not in command
    assert "1.8 hours in all on A, 2 cores, 1 threads, often" in text


def test_what_was_not_run_takes_a_line_and_nothing_else(folder, capsys):
    write(folder, "ctkd", [60, 61, 62])
    write_run(folder, "K=1", 0, 60)
    text = page_of(folder)
    lines = text.split("\nNot run; ")[1].split("\n## ")[0].splitlines()
    assert "* K = 16 hurts retrieval (Figure 3): `--study tokens`" in lines
    assert any("4 x texts" in line and "`--study merging texts`" in line for line in lines)
    assert any(line.endswith("`--study stages`") and "200 steps" in line for line in lines)
    assert text.count("K = 16") == text.count("5.4, Figure 10") == 1 and "causal-" not in text
    missing = text.split("and what is missing")[1]
    assert "* K=1, seed 1: no record" in missing and "K=2" not in missing
    assert "| One memory token is not enough | section 4.2: unsatisfactory | no verdict: 1 " in text


def test_the_page_names_what_is_missing(folder, capsys):
    write(folder, "ctkd", [60, 61, 62])
    half = write_run(folder, "K=1", 0, 50)
    found = json.loads(half.read_text())
    half.write_text(json.dumps({**found, "scores": {"STS17": 50.0}}))
    missing = page_of(folder).split("and what is missing")[1]
    assert "* K=1, seed 0: not evaluated on SciFact, Banking77 (smollm2)\n" in missing
    assert "* K=1, seed 2: no record" in missing and "ctkd" not in missing


def test_the_projects_own_records_have_their_sections(folder, capsys, tmp_path_factory,
                                                      monkeypatch):
    write(folder, "ctkd", [60, 61, 62])
    records, out = tmp_path_factory.mktemp("records"), tmp_path_factory.mktemp("out") / "page.md"
    monkeypatch.setattr(report, "RECORDS", records)
    for name, flags in (("smollm2-validation", ["--memory-init", "normal"]), ("demo", []),
                        ("smollm2-validation-2", [])):
        (other := records / name).mkdir()
        setting = {**SETTING, "about": f"About {name}.", "common": ["--preset", "smollm2", *flags]}
        (other / "setting.json").write_text(json.dumps(setting))
        write_run(other, "lr=3e-4", 0, 55.5)
    settings = {"objective": "ctkd", "steps": 600, "batch_size": 4, "max_tokens": 128,
                "memory_tokens": 8}
    for seed, hours in enumerate((0.25, 0.35)):  # the third run has none, and is not counted
        found = json.loads((folder / f"ctkd-{seed}.json").read_text())
        (folder / f"ctkd-{seed}.json").write_text(json.dumps(
            {**found, "settings": settings, "hours": {"training": hours, "scoring": 0.05}}))
    folder.rename(records / "smollm2")
    assert report.main(["--out", str(out)]) == 0
    text = out.read_text()
    assert text.count("| lr=3e-4 |") == 6 and text.count("| objective | ctkd |") == 2
    judged, costs, *others, end = text.split("\n## ")[1:]
    assert costs.startswith("What it costs\n") and costs.rstrip().endswith(  # 2,400 x 273 tokens
        "| 2,400 texts | ctkd | 600 of 4 | 0.66 | 0.30 | 0.05 | A, 2 cores, 1 threads |")
    assert "| objective | ctkd |" in judged and end.startswith("Machines")
    for part, head, name in zip(others, ("How the settings were chosen, 1", "How the settings were "
                                         "chosen, 2", "Smoke test"), ("smollm2-validation",
                                         "smollm2-validation-2", "demo"), strict=True):
        assert part.startswith(f"{head}: ") and f"About {name}." in part
        assert "| rate | lr=3e-4 | 1 | 55.5 |" in part
        assert "python bench/ablations.py --study rate \\\n    --preset smollm2" in part
    assert report.main(["--runs", str(records / "nothing")]) == 2
    assert "no setting.json there" in capsys.readouterr().err


def test_every_figure_is_drawn(folder, capsys, monkeypatch):
    """What the lines of each panel are of, and their values where a panel has few."""
    drawn, save = {}, report.Figure.savefig

    def keep(figure, path, **options):
        drawn[path.name] = figure
        save(figure, path, **options)

    monkeypatch.setattr(report.Figure, "savefig", keep)
    for variant in ("ctkd", "nll", "ctkd-4x", "nll-normal", "ucl-ctkd", "K=1"):
        write(folder, variant, [60, 61])
    write(folder, "scl-ctkd", [60, 61], curve=[(0, 40, 35), (100, 61, 45)])
    text = page_of(folder)
    assert "## Scores" in text
    by_objective, by_k, by_stage, radar, curve = drawn["ablations.svg"].axes
    ticks = [[label.get_text() for label in panel.get_xticklabels()]
             for panel in (by_objective, by_k, by_stage)]
    assert ticks == [["nll", "ctkd"], ["K=1", "ctkd"], ["ctkd", "ucl-ctkd", "scl-ctkd"]]
    means = next(line for line in by_k.lines if line.get_label() == "sts")
    assert means.get_ydata().tolist() == [60.5, 60.5] and len(by_k.lines) == 4 * (1 + 2)
    assert [line.get_label() for line in radar.lines] == ticks[2] and radar.name == "polar"
    assert [line.get_ydata().tolist() for line in radar.lines] == [[60.5, 30, 50, 60.5]] * 3
    assert [(line.get_label(), line.get_xydata().tolist()) for line in curve.lines[:2]] == [
        ("mean", [[0, 40], [100, 61]]), ("retrieval", [[0, 35], [100, 45]])]
    spectra, by_stage, *tokens = drawn["collapse.svg"].axes
    assert [panel.get_title() for panel in tokens] == ["nll", "ctkd", "ctkd-4x", "nll-normal", ""]
    assert [len(panel.images) for panel in tokens[:4]] == [1] * 4
    assert [line.get_label() for line in spectra.lines] == ["nll", "_nll", "ctkd", "_ctkd"]
    assert len(by_stage.lines) == 6 and spectra.lines[0].get_ydata().tolist() == [1, 0.25]


def test_the_page_of_results_and_its_figures_are_those_of_the_projects_records(tmp_path, capsys):
    """To the letter where matplotlib is the pinned one; the page elsewhere, too."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # bench/plot.py has its own, for all of this process
        assert report.main(["--out", str(tmp_path / "results.md")]) == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"results.md", "dimension.svg", "ablations.svg", "collapse.svg",
                     "ablations-32000.svg", "collapse-32000.svg"}
    pinned = f"matplotlib=={matplotlib.__version__}" in (
        ROOT / "tests/requirements.txt").read_text()
    for name in names if pinned else {"results.md"}:
        assert (tmp_path / name).read_text() == (ROOT / "docs" / name).read_text(), name
    assert "](docs/dimension.svg)" in (ROOT / "README.md").read_text()

"""bench/ablations.py and bench/report.py: what runs, what is repeated, how claims are judged."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
import ablations
import report

SETTING = {"common": ["--preset", "demo", "--steps", "20"], "task": ["sts17", "scifact"],
           "task_dir": [], "analyse": "demo-sts", "data_dir": None, "eval_dtype": "float32",
           "ucl_flags": "", "ucl_flags_none": "", "scl_flags": ""}


def write_run(folder, variant, seed, sts, retrieval, entropy=10.0, steps=20, name=None):
    """A finished run as the commands leave it, with these scores (of 1)."""
    out = folder / (name or f"{variant}-{seed}")
    for part in ("encoder", "collapse"):
        (out / part).mkdir(parents=True)
    (out / "encoder" / "encoder.json").write_text("{}")
    (out / "config.json").write_text(json.dumps({"steps": 20}))
    losses = [json.dumps({"step": i, "loss": 2.0 - i / 50}) for i in range(steps)]
    (out / "metrics.jsonl").write_text("\n".join(losses) + "\n")
    results = folder / "results" / report.label_of(str(out), "memory")
    results.mkdir(parents=True)
    for task, score in (("STS17", sts), ("SciFact", retrieval)):
        (results / f"{task}.json").write_text(json.dumps(
            {"task_name": task, "scores": {"test": [{"main_score": score}]}}))
    (out / "collapse" / "collapse.json").write_text(json.dumps([{
        "spectrum": [4.0, 1.0], "cosines": np.eye(2).tolist(), "texts": 50, "entropy": entropy,
        "participation": entropy / 2, "above_1_percent": 2, "mean_cosine": 0.5,
        "kept_tokens": [0, 1], "uniformity": -1.0, "alignment": None}]))
    return out


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "common.json").write_text(json.dumps(SETTING))
    for seed in range(3):
        write_run(tmp_path, "ctkd", seed, 0.60 + seed / 100, 0.30)
        write_run(tmp_path, "rc", seed, 0.40 - seed / 100, 0.20)
        write_run(tmp_path, "nll", seed, 0.60 + seed / 50, 0.34, entropy=20.0)
    return tmp_path


def verdicts(folder):
    runs = report.read_runs(folder)
    return {claim.text: report.judge(runs, claim) for claim in report.CLAIMS}


def test_claims_are_judged_by_the_scores(folder):
    found = verdicts(folder)
    verdict, evidence = found["Continuation beats reconstruction"]
    assert verdict == "confirmed"
    assert evidence.startswith("mean: ctkd 45.5 ± 0.5 against 29.5 ± 0.5 rc; mean: nll")
    assert found["Distillation beats the plain likelihood"][0] == (
        "not confirmed, in part the opposite")
    assert found["NLL's embeddings collapse to fewer dimensions"][0] == (
        "not confirmed, in part the opposite")
    assert found["NLL's memory tokens are more alike"][0] == "not confirmed"  # no difference
    assert found["CTKD varies less over runs"][0] == "not confirmed"  # 0.5 and 1.0
    assert found["K = 16 hurts retrieval"][0] == "unfinished"
    assert found["Merging alike tokens helps NLL"][0] == "unfinished"
    assert found["The scores themselves"][0] == "not testable here"


def test_merging_is_judged_only_where_tokens_were_merged(folder):
    for seed in range(3):
        write_run(folder, "merged-nll", seed, 0.70, 0.50)
    claim = "Merging alike tokens helps NLL"
    verdict, evidence = verdicts(folder)[claim]
    assert verdict == "not testable here" and evidence.endswith("tokens kept by seed: 2, 2, 2")
    merged = folder / "merged-nll-1" / "encoder" / "encoder.json"
    merged.write_text(json.dumps({"kept_tokens": [1]}))
    verdict, evidence = verdicts(folder)[claim]
    assert verdict == "confirmed" and evidence.endswith("tokens kept by seed: 2, 1, 2")


@pytest.mark.parametrize("differences, sign", [
    ([1.0], 0), ([1.0, 1.1], 1), ([-1.0, -1.1], -1), ([1.0, -0.1], 0), ([0.1, 2.0], 0),
    ([1.0, 2.0, 1.5], 1), ([], 0), ([0.0, 0.0], 0), ([1.0, np.nan], 0),
])
def test_a_difference_needs_two_seeds_one_sign_and_two_errors(differences, sign):
    assert report.sign_of(np.array(differences)) == sign


def test_differences_are_between_equal_seeds(folder):
    write_run(folder, "causal", 1, 0.7, 0.3)
    runs = report.read_runs(folder)
    np.testing.assert_allclose(runs.difference("causal", "ctkd", "sts"), [9.0])
    assert "(one seed)" in verdicts(folder)["Causal attention helps STS and classification"][1]


def test_the_page_names_what_is_not_finished(folder, capsys):
    half = write_run(folder, "K=1", 0, 0.5, 0.3, steps=7)
    (half / "encoder" / "encoder.json").unlink()
    (write_run(folder, "K=2", 0, 0.5, 0.3) / "collapse" / "collapse.json").unlink()
    assert report.main(["--runs", str(folder), "--out", str(folder / "RESULTS.md")]) == 0
    text = (folder / "RESULTS.md").read_text()
    unfinished = text.split("## Unfinished")[1]
    assert "tokens: K=1, seed 0: 7 of 20 steps" in unfinished
    assert "tokens: K=2, seed 0: not analysed" in unfinished
    assert "tokens: K=2, seed 1: not begun" in unfinished
    assert "ctkd, seed" not in unfinished.replace("ucl-ctkd", "").replace("scl-ctkd", "").replace(
        "merged-ctkd", "")
    row = next(line for line in text.splitlines() if line.startswith("| objective | ctkd | 3 |"))
    assert row == "| objective | ctkd | 3 | 61.0 ± 1.0 | 30.0 ± 0.0 | 45.5 ± 0.5 |"
    assert "1.81 ± 0.00 → 1.81 ± 0.00" in text  # 20 steps: the first and last 50 are the same
    for name in ("ablations.svg", "collapse.svg"):
        assert (folder / "bench" / name).read_text().startswith("<?xml")


def test_ablations_run_once_and_go_on(tmp_path, capsys, monkeypatch):
    """Two steps of two variants: a second call trains, evaluates and analyses nothing."""
    command = ["--study", "attention", "merging", "--seeds", "0", "--steps", "2", "--num-texts",
               "16", "--threads", "1", "--task", "demo-sts", "--out", str(tmp_path / "out")]
    assert ablations.main(command) == 0
    names = {"causal-0", "ctkd-0", "nll-0", "merged-ctkd-0", "merged-nll-0"}
    out = tmp_path / "out"
    assert names <= {path.name for path in out.iterdir()}
    kept = json.loads((out / "merged-nll-0" / "encoder" / "encoder.json").read_text())
    assert set(kept["kept_tokens"]) <= set(range(8)) and kept["kept_tokens"]
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert ablations.main(command) == 0
    changed = {path.name for path, time in before.items() if path.stat().st_mtime_ns != time}
    assert changed == {"common.json"}
    with pytest.raises(SystemExit, match="was run with steps=2, now 3; name another --out"):
        ablations.main([*command, "--steps", "3"])
    runs = report.read_runs(out)
    assert runs.values["causal", 0].keys() >= {"embedded STS", "sts", "mean", "entropy"}

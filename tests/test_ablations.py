"""bench/ablations.py and bench/report.py: what runs, what is repeated, how claims are judged."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path[:0] = [str(Path(__file__).parents[1] / folder) for folder in ("", "bench")]
import ablations
import report

SETTING = {"common": ["--preset", "demo", "--steps", "20"], "task": ["sts17", "scifact"],
           "task_dir": [], "analyse": "demo-sts", "data_dir": None, "eval_dtype": "float32",
           "ucl_flags": "", "ucl_flags_none": "", "scl_flags": "", "out": "runs/here"}


def write_run(folder, variant, seed, sts, retrieval, entropy=10.0, steps=20, kept=()):
    """A finished run as the commands leave it, with these scores (of 1)."""
    out, kept = folder / f"{variant}-{seed}", list(kept)
    for part in ("encoder", "collapse"):
        (out / part).mkdir(parents=True)
    (out / "encoder" / "encoder.json").write_text("{}")
    (out / "config.json").write_text(json.dumps({"steps": 20}))
    losses = [json.dumps({"step": i, "loss": 2.0 - i / 50}) for i in range(steps)]
    (out / "metrics.jsonl").write_text("\n".join(losses) + "\n")
    results = folder / "results" / report.label_of(f"runs/here/{out.name}", "memory")
    results.mkdir(parents=True)
    for task, score in (("STS17", sts), ("SciFact", retrieval)):
        (results / f"{task}.json").write_text(json.dumps(
            {"task_name": task, "scores": {"test": [{"main_score": score}]},
             "settings": {"sha256": "ab"}}))
    (out / "collapse" / "collapse.json").write_text(json.dumps([{
        "spectrum": [4.0, 1.0], "cosines": np.eye(2).tolist(), "texts": 50, "entropy": entropy,
        "participation": entropy / 2, "above_1_percent": 2, "mean_cosine": 0.5,
        "clusters": [[0], [1]], "kept_tokens": kept, "uniformity": -1.0, "alignment": None,
        "sha256": "ab"}]))
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
    assert evidence.startswith(
        "mean: ctkd 45.5 ± 0.5, rc 29.5 ± 0.5, difference +16.0 ± 1.0 (3); ")
    for text in ("Distillation beats the plain likelihood",
                 "NLL's embeddings collapse to fewer dimensions"):
        assert found[text][0] == "not confirmed: the opposite"
    assert found["NLL's memory tokens are more alike"][0] == "not confirmed"  # no difference
    assert found["CTKD varies less over runs"][0] == "not confirmed"  # 0.5 and 1.0
    assert found["K = 16 hurts retrieval"][0] == "unfinished"
    assert found["Merging alike tokens helps NLL"][0] == "unfinished"
    assert found["The scores themselves"][0] == "not testable here"


def test_what_was_not_measured_is_not_judged(folder):
    for seed in range(2):
        write_run(folder, "causal", seed, 0.7, 0.3)  # there is no task of classification
    assert verdicts(folder)["Causal attention helps STS and classification"][0] == (
        "not testable here")
    write_run(folder, "K=16", 0, 0.1, 0.1)
    assert verdicts(folder)["K = 16 hurts retrieval"][0] == "unfinished"  # one seed


@pytest.mark.parametrize("gains, verdict", [
    ((0.001, 0.001), "confirmed"), ((0.0, 0.01), "not confirmed"), ((0.20, 0.21), "not confirmed"),
])
def test_little_difference_has_to_be_shown(folder, gains, verdict):
    for k in (1, 2, 4):
        for seed, gain in enumerate(gains):
            write_run(folder, f"K={k}", seed, 0.60 + seed / 100 + 2 * gain, 0.30 + 2 * gain)
    assert verdicts(folder)["K from 1 to 8 makes little difference"][0] == verdict


def test_merging_is_judged_only_where_tokens_were_merged(folder):
    claim = "Merging alike tokens helps NLL"
    for seed in range(3):
        write_run(folder, "merged-nll", seed, 0.70, 0.50, kept=[1])
    verdict, evidence = verdicts(folder)[claim]
    assert verdict == "confirmed" and evidence.endswith("tokens kept by seed: 1, 1, 1")
    whole = folder / "merged-nll-1" / "collapse" / "collapse.json"
    whole.write_text(whole.read_text().replace('"kept_tokens": [1]', '"kept_tokens": []'))
    verdict, evidence = verdicts(folder)[claim]
    assert verdict == "not testable here" and evidence.endswith("tokens kept by seed: 1, 2, 1")


@pytest.mark.parametrize("differences, sign", [
    ([1.0, 1.1], 1), ([-1.0, -1.1], -1), ([1.0, -0.1], 0), ([0.1, 2.0], 0),
    ([1.0, 2.0, 1.5], 1), ([0.0, 0.0], 0),
])
def test_a_difference_needs_one_sign_and_two_errors(differences, sign):
    assert report.sign_of(np.array(differences)) == sign


def test_differences_are_between_equal_seeds(folder):
    write_run(folder, "causal", 1, 0.7, 0.3)
    runs = report.read_runs(folder)
    assert [list(x.round(6)) for x in runs.both("causal", "ctkd", "sts")] == [[70.0], [61.0]]


def test_the_page_names_what_is_not_finished(folder, capsys):
    half = write_run(folder, "K=1", 0, 0.5, 0.3, steps=7)
    (half / "encoder" / "encoder.json").unlink()
    (write_run(folder, "K=2", 0, 0.5, 0.3) / "collapse" / "collapse.json").unlink()
    other = write_run(folder, "K=4", 7, 0.5, 0.3) / "collapse" / "collapse.json"
    other.write_text(other.read_text().replace('"ab"', '"cd"'))
    assert report.main(["--runs", str(folder), "--out", str(folder / "RESULTS.md")]) == 0
    text = (folder / "RESULTS.md").read_text()
    unfinished = text.split("## Unfinished")[1]
    assert "tokens: K=1, seed 0: 7 of 20 steps" in unfinished
    assert "tokens: K=2, seed 0: not analysed" in unfinished
    assert "tokens: K=2, seed 1: not begun" in unfinished
    assert "tokens: K=4, seed 7: evaluated and analysed with different weights" in unfinished
    assert "ctkd, seed" not in unfinished.replace("ucl-ctkd", "").replace("scl-ctkd", "").replace(
        "merged-ctkd", "")
    row = next(line for line in text.splitlines() if line.startswith("| objective | ctkd | 3 |"))
    assert row == "| objective | ctkd | 3 | 61.0 ± 1.0 | 30.0 ± 0.0 | 45.5 ± 0.5 |"
    assert "1.81 ± 0.00 → 1.81 ± 0.00" in text  # 20 steps: the first and last 50 are the same
    for name in ("ablations.svg", "collapse.svg"):
        assert (folder / name).read_text().startswith("<?xml") and f"]({name})" in text


def test_the_committed_page_is_not_overwritten_by_unfinished_runs(folder, capsys, monkeypatch):
    page = folder / "docs" / "results.md"
    monkeypatch.setattr(report, "PAGE", page)
    assert report.main(["--runs", str(folder)]) == 0  # there was none yet
    assert report.main(["--runs", str(folder), "--out", str(folder / "other.md")]) == 0
    page.write_text("as committed")
    capsys.readouterr()
    assert report.main(["--runs", str(folder)]) == 2
    found = capsys.readouterr()
    assert "runs are unfinished (" in found.err and "--force" in found.err
    assert found.err.count("\n") == 1 and not found.out and page.read_text() == "as committed"
    assert report.main(["--runs", str(folder), "--force"]) == 0
    assert page.read_text().startswith("# Results")
    runs = report.read_runs(folder)
    runs.unfinished.clear()
    monkeypatch.setattr(report, "read_runs", lambda _: runs)  # a finished set needs no force
    page.write_text("as committed")
    assert report.main(["--runs", str(folder)]) == 0 and page.read_text() != "as committed"


def test_a_folder_without_runs_is_refused(tmp_path, capsys):
    assert report.main(["--runs", str(tmp_path), "--out", str(tmp_path / "results.md")]) == 2
    assert "no common.json" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_ablations_run_once_and_resume(tmp_path, capsys):
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
    capsys.readouterr()
    assert ablations.main([*command, "--dtype", "float32"]) == 2
    error = capsys.readouterr().err
    assert "its runs have common=" in error and "name another --out" in error
    (out / "common.json").unlink()
    assert ablations.main([*command, "--steps", "3"]) == 2
    error = capsys.readouterr().err
    assert "was run with other settings (steps: 2 -> 3); name another --out" in error
    runs = report.read_runs(tmp_path / "out")
    assert runs.values["causal", 0].keys() >= {"embedded STS", "sts", "mean", "entropy"}
    assert ("merged-nll", 0) in runs.values and ("nll", 0) in runs.values


@pytest.mark.parametrize("arguments, line", [
    (["--study", "texts"], "needs --num-texts"), (["--seed", "3"], "--seed is set by"),
    (["--task", "st17"], "did you mean sts17"), (["--steps", "many"], "many"),
])
def test_what_ablations_refuses(arguments, line, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        ablations.main([*arguments, "--out", str(tmp_path / "out")])
    assert stop.value.code == 2 and line in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

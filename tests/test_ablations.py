"""bench/ablations.py: which runs a study has, how each is made, and that none is made twice."""

import json
import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parents[1] / folder) for folder in ("", "bench")]
import ablations
import report


def parse(*more):
    return ablations.parse_arguments(["--num-texts", "100", "--steps", "20", "--out", "o", *more])


def flags_of(variant, args):
    """The flags with which a variant of seed 3 is made, as one string, and its start."""
    module, flags, start = ablations.recipe(variant, 3, args)
    return f"{module.__name__} {' '.join(flags)} ", start


@pytest.mark.parametrize("variant, parts", [
    ("ctkd", "--seed 3 --out o/ctkd-3"), ("rc", "--objective rc"), ("K=16", "--memory-tokens 16"),
    ("nll-K=1", "--objective nll --memory-tokens 1"), ("causal", "--attention causal"),
    ("ctkd-normal", "--memory-init normal"), ("rc-normal", "--objective rc --memory-init normal"),
    ("ctkd-4x", "--num-texts 400 --steps 80"), ("memory-rows", "--train-embeddings memory"),
    ("nll-4x", "--objective nll --num-texts 400 --steps 80"),
])
def test_a_variant_of_stage_1_adds_its_flags_to_the_common_ones(variant, parts):
    flags, start = flags_of(variant, parse())
    common = "pretrain_ctkd --preset demo --memory-init mean --num-texts 100 --steps 20 "
    assert flags.startswith(common) and f" {parts} " in flags and not start
    assert len(flags) == len(f"{common}{parts} --seed 3 --out o/{variant}-3 ") or variant == "ctkd"


def test_stages_2_and_3_have_the_same_flags_after_every_start():
    args = parse("--ucl-flags", "--lr 1e-5", "--scl-flags", "--lr 1e-3", "--data-dir", "d",
                 "--curve-tasks", "sts17", "scifact", "--curve-every", "50")
    found = {}
    for variant in ablations.studies(args.base)["stages"]:
        kind, _, start = variant.partition("-")
        flags, before = flags_of(variant, args)
        model = "demo" if variant == "ucl-none" else f"o/{before}-3"
        assert before == {"ucl-none": ""}.get(variant, f"ucl-{start}" if kind == "scl" else start)
        assert flags.startswith(f"contrastive --stage {kind} --preset demo --model {model} ")
        found.setdefault(kind, set()).add(flags.split(f"--model {model}")[1].split("--seed")[0])
    assert found == {"ucl": {" --eval-tasks  --lr 1e-5 "}, "scl": {
        " --eval-tasks sts17 scifact --eval-every 50 --data-dir d --lr 1e-3 "}}
    _, flags, _ = ablations.recipe("scl-rc", 0, parse("--curve-tasks"))
    assert "--eval-every" not in flags and flags[flags.index("--eval-tasks") + 1] == ""


def test_every_variant_is_made_from_one_that_is_there():
    args = parse()
    studies = ablations.studies(args.base)
    everything = {name for variants in studies.values() for name in variants}
    assert {"merged-nll-4x", "merged-rc-normal", "scl-nll", "prompteol"} <= everything
    for study, variants in studies.items():
        for variant in variants if study != "untrained" else ():
            assert ablations.recipe(variant, 0, args)[2] in everything | {""}
            assert ablations.beside(variant) in everything | {"none"}
    assert {name: ablations.beside(name) for name in (
        "K=4", "memory-rows", "nll-K=1", "rc-normal", "ctkd-4x", "merged-nll-4x", "scl-rc")} == {
        "K=4": "ctkd", "memory-rows": "ctkd", "nll-K=1": "nll", "rc-normal": "rc",
        "ctkd-4x": "ctkd", "merged-nll-4x": "nll-4x", "scl-rc": "rc"}
    whole = ablations.studies(ablations.parse_arguments([]).base)  # all texts: no multiple of them
    assert whole["texts"] == {} and not any("4x" in name for name in whole["merging"])


def test_a_study_is_made_beside_what_it_changes_for_three_seeds(monkeypatch, tmp_path):
    made = []
    monkeypatch.setattr(ablations, "score", lambda *_: None)
    monkeypatch.setattr(ablations, "make", lambda name, seed, _: made.append((name, seed)))
    for study, names in (("texts", "ctkd nll ctkd-4x nll-4x"), ("curve", "ctkd scl-ctkd"),
                         ("tokens", "ctkd nll K=1 K=2 K=4 K=16 nll-K=1")):
        ablations.run(parse("--study", study, "--out", str(tmp_path / study)))
        assert made == [(name, seed) for seed in range(3) for name in names.split()], study
        made.clear()


def test_ablations_run_once_and_resume(tmp_path, capsys):
    """Two steps of two variants: a second call trains, evaluates and analyses nothing."""
    command = ["--study", "attention", "merging", "--seeds", "0", "--steps", "2", "--num-texts",
               "16", "--threads", "1", "--task", "demo-sts", "--out", str(tmp_path / "out"),
               "--variant", "ctkd", "causal", "nll", "merged-ctkd", "merged-nll"]
    assert ablations.main(command) == 0
    names = {"causal-0", "ctkd-0", "nll-0", "merged-ctkd-0", "merged-nll-0"}
    out = tmp_path / "out"
    assert names == {path.name for path in out.iterdir()} - {"results", "common.json"}
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
    (["--curve-tasks", "st17"], "did you mean sts17"), (["--memory-init=normal"], "is set by"),
    (["--attention", "causal"], "--attention is set by"), (["--variant", "K=3"], "--variant K=3"),
    (["--warmup", "-3"], "--warmup -3.0: must be"), (["--max-tokens", "5"], "--max-tokens 5: must"),
])
def test_what_ablations_refuses(arguments, line, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ablations, "run", lambda _: None)  # what is not refused ends at once
    with pytest.raises(SystemExit) as stop:
        ablations.main([*arguments, "--out", str(tmp_path / "out")])
    assert stop.value.code == 2 and line in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

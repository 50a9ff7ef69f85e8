"""bench/ablations.py: which runs a study has, how each is made, and that none is made twice."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parents[1] / folder) for folder in ("", "bench")]
import ablations
import claims
import evaluate
from model import plain_encoder


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
    ("nll-4x", "--objective nll --num-texts 400 --steps 80"), ("lr=2e-3", "--lr 2e-3"),
    ("nll-lr=3e-4", "--objective nll --lr 3e-4"), ("bos=1", "--bos 1"),
    ("ctkd-0.25x", "--num-texts 25 --steps 5"),
    # ctkd reads 2 * 256 + 2 * 8 + 1 = 529 tokens a text, nll 273, mntp 256, ebae-ebar 296; a
    # continuation of 10 to 246 tokens, cut to 40, has 38.04 on average: 2 * (128 + 38.04) + 17
    ("ctkd-window", "--objective ctkd-window --steps 30"),
    ("ctkd-window-4x", "--objective ctkd-window --num-texts 400 --steps 120"),
    ("nll-equal", "--objective nll --steps 39"),
    ("mntp", "--objective mntp --attention bidirectional --memory-tokens 0 --train-embeddings "
             "memory --steps 41"),
    ("ebae-ebar", "--objective ebae-ebar --attention causal --steps 36"),
    ("ebae-ebar-lr=2e-3", "--objective ebae-ebar --attention causal --steps 36 --lr 2e-3"),
])
def test_a_variant_of_stage_1_adds_its_flags_to_the_common_ones(variant, parts):
    flags, start = flags_of(variant, parse())
    common = "pretrain_ctkd --preset demo --memory-init mean --num-texts 100 --steps 20 "
    assert flags.startswith(common) and f" {parts} " in flags and not start
    assert len(flags) == len(f"{common}{parts} --seed 3 --out o/{variant}-3 ") or variant == "ctkd"


def test_stages_2_and_3_have_the_same_flags_after_every_start():
    args = parse("--threads", "3", "--ucl-flags", "--lr 1e-5", "--scl-flags", "--lr 1e-3",
                 "--data-dir", "d", "--curve-tasks", "sts17", "scifact", "--curve-every", "50")
    found = {}
    for variant in ablations.studies(args)["stages"]:
        kind, _, start = variant.partition("-")
        flags, before = flags_of(variant, args)
        model = "demo" if variant == "ucl-none" else f"o/{before}-3"
        assert before == {"ucl-none": ""}.get(variant, f"ucl-{start}" if kind == "scl" else start)
        assert flags.startswith(f"contrastive --stage {kind} --preset demo --threads 3 "
                                f"--model {model} ")
        own = flags.split(f"--model {model}")[1].split("--seed")[0]
        if variant == "ucl-none":  # what stage 1 would have begun with
            shape = " --attention bidirectional --memory-init mean --memory-tokens 8"
            assert shape in own
            own = own.replace(shape, "")
        found.setdefault(kind, set()).add(own)
    assert found == {"ucl": {" --eval-tasks  --lr 1e-5 "}, "scl": {
        " --eval-tasks sts17 scifact --eval-every 50 --data-dir d --lr 1e-3 "}}
    _, flags, _ = ablations.recipe("scl-rc", 0, parse("--curve-tasks"))
    assert "--eval-every" not in flags and flags[flags.index("--eval-tasks") + 1] == ""


def test_untrained_methods_read_as_much_of_a_text_as_an_encoder():
    for method in ablations.studies(parse())["untrained"]:
        about = evaluate.METHODS[method]
        limit = ablations.tokens_with(method, "demo", 64)
        encoder = plain_encoder("demo", replace(evaluate.PLAIN, pooling=about["pooling"],
                                                max_tokens=limit, template=about["prompts"][0]))
        text = "a" + " a" * 62  # BOS and 63 tokens
        assert len(encoder.tokenizer.encode([text])[0]) == 64
        assert encoder.tokenize([text, f"{text} a"]).cut == [False, True]


def test_every_variant_is_made_from_one_that_is_there():
    args = parse()
    studies = ablations.studies(args)
    everything = {name for variants in studies.values() for name in variants}
    assert {"merged-nll-4x", "merged-rc-normal", "scl-nll", "prompteol"} <= everything
    for study, variants in studies.items():
        for variant in variants if study != "untrained" else ():
            assert ablations.recipe(variant, 0, args)[2] in everything | {""}
            assert ablations.beside(variant) in everything | {"none"}
    assert {name: ablations.beside(name) for name in (
        "K=4", "memory-rows", "nll-K=1", "rc-normal", "ctkd-4x", "merged-nll-4x", "scl-rc",
        "lr=1e-4", "nll-lr=2e-3", "wide-rc", "ebae-ebar-lr=1e-3", "scl-mntp", "nll-equal",
        "ctkd-window-4x", "ucl-ctkd-window-4x")} == {
        "K=4": "ctkd", "memory-rows": "ctkd", "nll-K=1": "nll", "rc-normal": "rc",
        "ctkd-4x": "ctkd", "merged-nll-4x": "nll-4x", "scl-rc": "rc", "lr=1e-4": "ctkd",
        "nll-lr=2e-3": "nll", "wide-rc": "rc", "ebae-ebar-lr=1e-3": "ebae-ebar", "scl-mntp": "mntp",
        "nll-equal": "nll", "ctkd-window-4x": "ctkd", "ucl-ctkd-window-4x": "ctkd-window-4x"}
    whole = ablations.studies(ablations.parse_arguments([]))  # all texts: no multiple of them
    assert whole["texts"] == {}
    assert not any("4x" in name for variants in whole.values() for name in variants)


def test_the_common_setting_is_no_variant_of_itself():
    """Of two-valued settings the other one is; an objective's own rate is not tried again."""
    def variants(*flags):
        there = ablations.studies(ablations.parse_arguments([*flags, "--out", "o"]))
        return [set(there[study]) for study in ("attention", "start", "embeddings", "tokens")]

    k = {"K=1", "K=2", "K=4", "K=8", "K=16", "nll-K=1"}
    rates = ("", "-lr=3e-4", "-lr=2e-3")
    assert variants() == [{f"causal{end}" for end in rates}, {
        f"{name}-{init}" for name in ablations.OBJECTIVES for init in ("normal", "rows")},
        {"memory-rows"}, k - {"K=8"}]
    assert variants("--preset", "smollm2", "--attention", "causal", "--memory-tokens", "4") == [
        {f"bidirectional{end}" for end in rates}, {
            f"{name}-{init}" for name in ablations.OBJECTIVES for init in ("mean", "normal")},
        {"whole-table"}, k - {"K=4"}]
    rates = ablations.studies(parse("--lr", "3e-4", "--nll-flags", "--lr 2e-3"))["rate"]
    assert set(rates) == {"lr=1e-4", "lr=1e-3", "lr=2e-3", "nll-lr=3e-4", "nll-lr=1e-3",
                          "rc-lr=1e-3", "rc-lr=2e-3"}


def made_by(monkeypatch, *flags):
    """The variants and seeds in the order in which they are made."""
    made = []
    monkeypatch.setattr(ablations, "finish", lambda name, seed, _: made.append((name, seed)))
    assert ablations.main(list(flags)) == 0
    return made


def test_a_study_is_made_beside_what_it_changes_seed_by_seed(monkeypatch, tmp_path):
    for study, names in (("tokens", "ctkd K=1 K=2 K=4 K=16 nll nll-K=1"), ("curve",
                         "ctkd scl-ctkd"), ("bos", "ctkd bos=1")):
        made = made_by(monkeypatch, "--study", study, "--out", str(tmp_path / study))
        assert len(made) == len(set(made)) == 3 * len(names.split()), study
        for seed in range(3):  # the first seed of all comes first
            part = made[seed * len(names.split()) :][: len(names.split())]
            assert set(part) == {(name, seed) for name in names.split()}, study
    made = made_by(monkeypatch, "--study", "objective", "untrained", "--seeds", "1", "2", "--out",
                   str(tmp_path / "more"))
    assert ("echo", 0) in made and ("echo", 1) not in made and ("rc", 2) in made


def test_what_starts_from_another_run_is_made_after_it_in_the_same_job():
    args = parse("--study", "objective", "stages", "merging", "wide-stages", "--seeds", "0", "1")
    jobs = ablations.queue(args)
    flat = [(seed, name) for seed, names in jobs for name in names]
    assert len(flat) == len(set(flat))
    for seed, names in jobs:
        for name in names:
            start = ablations.recipe(name, seed, args)[2]
            assert not start or start in names[: names.index(name)], (name, names)
    assert [0, 1] == sorted({seed for seed, _ in jobs}) and jobs[0][0] == 0 and jobs[-1][0] == 1


COMMAND = ["--study", "attention", "merging", "wide", "untrained", "--seeds", "0", "--steps", "2",
           "--num-texts", "16", "--threads", "1", "--task", "demo-sts", "--variant", "ctkd",
           "causal", "nll", "merged-ctkd", "merged-nll", "wide-nll", "mean"]


def test_ablations_run_once_and_are_recorded(tmp_path, capsys, monkeypatch):
    """Two steps of two variants: a second call makes nothing, also where only records are left."""
    command = [*COMMAND, "--out", str(tmp_path / "out"), "--records", str(tmp_path / "kept")]
    assert ablations.main(command) == 0
    names = {"causal-0", "ctkd-0", "nll-0", "merged-ctkd-0", "merged-nll-0", "wide-nll-0"}
    out, kept = tmp_path / "out", tmp_path / "kept"
    assert names | {"mean"} == {path.name for path in out.iterdir()} - {"results"}
    merged = json.loads((out / "merged-nll-0" / "encoder" / "encoder.json").read_text())
    assert set(merged["kept_tokens"]) <= set(range(8)) and merged["kept_tokens"]
    wide = json.loads((kept / "wide-nll-0.json").read_text())
    [told] = json.loads((out / "wide-nll-0" / "merging" / "collapse.json").read_text())
    assert "--keep wide" in wide["command"]
    assert (wide["collapse"]["kept_tokens"] or list(range(8))) == told["wide"]
    assert {path.stem for path in kept.iterdir()} == names | {"setting", "mean-0"}
    found = json.loads((kept / "causal-0.json").read_text())
    assert found["command"].startswith("pretrain_ctkd.py --preset demo --memory-init mean ")
    assert found["settings"]["attention"] == "causal" and found["hours"]["training"] > 0
    losses = [json.loads(line)["loss"] for line in
              (out / "causal-0" / "metrics.jsonl").read_text().splitlines()]
    assert found["loss"]["last"] == pytest.approx(sum(losses) / 2)
    assert found["scores"].keys() == {"demo-sts"} and 0 < found["scores"]["demo-sts"] < 100
    assert "cores" in found["machine"] and found["environment"]["threads"] == 1
    shutil.rmtree(out)
    before = {path: path.read_bytes() for path in kept.iterdir()}
    monkeypatch.setattr(ablations, "make", None)  # as is scoring: nothing is left to be done
    monkeypatch.setattr(ablations, "score", None)
    assert ablations.main(command) == 0
    assert before == {path: path.read_bytes() for path in kept.iterdir()} and not out.exists()
    older = json.loads((kept / "ctkd-0.json").read_text())
    del older["settings"]["special_tokens"]  # of a run from before there was a choice
    (kept / "ctkd-0.json").write_text(json.dumps(older))
    assert ablations.main(command) == 0
    capsys.readouterr()
    assert ablations.main([*command, "--dtype", "float32"]) == 2
    error = capsys.readouterr().err
    assert "its runs have common=" in error and "name another --out" in error
    older = json.loads((kept / "setting.json").read_text())
    del older["mntp_flags"]  # of records from before mntp
    (kept / "setting.json").write_text(json.dumps(older))
    assert ablations.main(command) == 0
    assert ablations.main([*command, "--mntp-flags", "--lr 3e-4"]) == 2
    assert "its runs have mntp_flags=''" in capsys.readouterr().err
    (kept / "setting.json").unlink()
    assert ablations.main([*command, "--steps", "3"]) == 2
    error = capsys.readouterr().err
    assert "was run with other settings (steps: 2 -> 3); name another --out" in error
    runs = claims.read_runs(kept)
    assert runs.values["causal", 0].keys() >= {"bundled STS", "sts", "mean", "entropy"}
    assert ("merged-nll", 0) in runs.values and ("nll", 0) in runs.values


def test_an_interrupted_run_is_resumed_and_a_task_more_is_scored(tmp_path, capsys, monkeypatch):
    command = [*COMMAND, "--variant", "ctkd", "--out", str(tmp_path)]
    calls = []
    ours = ablations.call

    def call(module, flags):
        calls.append((module.__name__, "--resume" in flags))
        if module is ablations.evaluate and len(calls) == 2:
            sys.exit(130)  # as a signal would end it
        ours(module, flags)

    monkeypatch.setattr(ablations, "call", call)
    with pytest.raises(SystemExit):
        ablations.main(command)
    assert not (tmp_path / "records" / "ctkd-0.json").exists()
    (tmp_path / "ctkd-0" / "encoder" / "encoder.json").unlink()  # and the training, too
    assert ablations.main(command) == 0
    assert calls == [("pretrain_ctkd", False), ("evaluate", False), ("pretrain_ctkd", True),
                     ("evaluate", False), ("collapse", False)]
    more = [*command, "--task", "demo-sts", "demo-retrieval"]
    assert ablations.main(more) == 0 and calls[5:] == [("evaluate", False)]
    found = json.loads((tmp_path / "records" / "ctkd-0.json").read_text())
    assert found["scores"].keys() == {"demo-sts", "demo-retrieval"}
    analysis = tmp_path / "ctkd-0" / "collapse" / "collapse.json"
    [about] = json.loads(analysis.read_text())
    analysis.write_text(json.dumps([{**about, "sha256": "other"}]))
    (tmp_path / "records" / "ctkd-0.json").unlink()
    assert ablations.main(command) == 2
    assert "was evaluated and analysed with different weights" in capsys.readouterr().err


def test_jobs_run_beside_each_other_and_a_failed_one_is_named(tmp_path, capsys):
    command = [*COMMAND, "--variant", "mean", "ctkd", "--jobs", "2", "--out", str(tmp_path)]
    assert ablations.main(command) == 0
    assert capsys.readouterr().out.count(": done") == 2
    assert {p.name for p in (tmp_path / "records").iterdir()} == {
        "setting.json", "mean-0.json", "ctkd-0.json"}
    before = (tmp_path / "records" / "setting.json").stat()
    (tmp_path / "records" / "mean-0.json").write_text("{")
    assert ablations.main(command) == 2
    after = (tmp_path / "records" / "setting.json").stat()  # else jobs would write it at once
    assert before.st_ino == after.st_ino
    found = capsys.readouterr()
    assert "mean, seed 0: exit code 1, see " in found.out and "1 of the jobs failed" in found.err


@pytest.mark.parametrize("arguments, line", [
    (["--study", "texts"], "needs --num-texts"), (["--seed", "3"], "--seed is set by"),
    (["--study", "rates"], "--study rates: choose from"),
    (["--task", "st17"], "did you mean sts17"), (["--steps", "many"], "many"),
    (["--curve-tasks", "st17"], "did you mean sts17"), (["--objective=nll"], "is set by"),
    (["--jobs", "0"], "--jobs 0: must"), (["--variant", "K=3"], "--variant K=3"),
    (["--warmup", "-3"], "--warmup -3.0: must be"), (["--max-tokens", "5"], "--max-tokens 5: must"),
])
def test_what_ablations_refuses(arguments, line, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ablations, "run", lambda *_: None)  # what is not refused ends at once
    with pytest.raises(SystemExit) as stop:
        ablations.main([*arguments, "--out", str(tmp_path / "out")])
    assert stop.value.code == 2 and line in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

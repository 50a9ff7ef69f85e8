"""runtime/settings.py and what the stages build on it: flags, presets, bounds, stored settings."""

import json
import math
import re
from dataclasses import dataclass, fields, replace

import pytest
from helpers import error_line

import contrastive
import pretrain_ctkd
from runtime.errors import UserError
from runtime.settings import (
    RunConfig,
    changed_settings,
    differences,
    check_bounds,
    flag,
    parse_config,
    setting,
    stored_settings,
)

CONFIGS = [pretrain_ctkd.Config, contrastive.Config]
NUMBERS = [pytest.param(config, f, id=f"{config.__module__} {flag(f.name)}")
           for config in CONFIGS for f in fields(config) if f.type in (int, float)]


@dataclass
class Config(RunConfig):
    """Settings of no stage."""

    lr: float = setting(1e-3, "100% of it", least=0)
    min_lr: float = setting(1e-4, "lower", least=0)
    kind: str = setting("a", "which", ("a", "b"))
    whole_table: bool = setting(True, "all rows")


@dataclass
class Staged(Config):
    """Settings of two stages."""

    stage: str = setting("one", "which", ("one", "two"))
    model: str = setting("x", "where from")


PRESETS = {"paper": {}, "demo": {}, "strong": {"lr": 0.5, "kind": "b"}}
STAGED = {"one": {"paper": {}, "demo": {"lr": 0.5}},
          "two": {"paper": {"stage": "two"}, "demo": {"stage": "two", "lr": 0.25},
                  "strong": {"stage": "two", "lr": 0.75}}}


def parse(*argv) -> Config:
    """The configuration of a command line."""
    return parse_config(Config, {"one": PRESETS}, list(argv), "about this stage")


def parse_staged(*argv) -> Staged:
    """The configuration of a command line that knows two stages."""
    return parse_config(Staged, STAGED, list(argv), "about these stages")


# ---------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------


def test_flags_are_stronger_than_a_preset_and_a_preset_than_the_defaults():
    assert parse() == Config()
    assert parse("--preset", "strong") == Config(lr=0.5, kind="b")
    assert parse("--preset", "strong", "--lr", "0.25") == Config(lr=0.25, kind="b")
    assert parse("--kind", "a", "--preset", "strong") == Config(lr=0.5, kind="a")
    assert parse("--no-whole-table", "--resume", "--threads", "3") == Config(
        whole_table=False, resume=True, threads=3)


@pytest.mark.parametrize("flags, expected", [
    ([], ("one", 0.5)), (["--stage", "two"], ("two", 0.25)), (["--model", "demo"], ("one", 0.5)),
    (["--model", "y"], ("one", 1e-3)), (["--stage", "two", "--model", "y"], ("two", 1e-3)),
    (["--preset", "paper"], ("one", 1e-3)),
    (["--stage", "two", "--preset", "paper"], ("two", 1e-3)),
    (["--preset", "demo", "--model", "y"], ("one", 0.5)), (["--preset", "strong"], ("two", 0.75)),
    (["--preset", "strong", "--stage", "two", "--lr", "0.125"], ("two", 0.125)),
], ids=lambda v: " ".join(v) if isinstance(v, list) else v[0])
def test_the_preset_is_that_of_the_stage_and_demo_or_paper_by_the_model(flags, expected):
    found = parse_staged(*flags)
    assert (found.stage, found.lr) == expected


def test_a_preset_that_the_stage_lacks_ends_with_the_usage(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_staged("--stage", "one", "--preset", "strong")
    said = capsys.readouterr().err
    assert caught.value.code == 2 and said.startswith("usage: ")
    assert "--preset strong: is not for one, which has paper, demo\n" in said


@pytest.mark.parametrize("argv", [["--kind", "c"], ["--preset", "none"], ["--threads", "x"],
                                  ["--learning-rate", "1"]])
def test_an_unknown_flag_or_choice_ends_with_the_usage(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(*argv)
    assert caught.value.code == 2 and argv[-1] in capsys.readouterr().err


@pytest.mark.parametrize("config, parse", [
    (Staged, lambda argv: parse_staged(*argv)),
    (pretrain_ctkd.Config, pretrain_ctkd.parse_arguments),
    (contrastive.Config, contrastive.parse_arguments),
])
def test_help_has_every_setting_once_with_its_default(config, parse, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as caught:
        parse(["--help"])
    printed = capsys.readouterr().out
    assert caught.value.code == 0 and "%%" not in printed
    for f in fields(config):
        (entry,) = re.findall(rf"^  {flag(f.name)}[ ,].*(?:\n {{8}}.*)?", printed, re.M)
        assert f.metadata["help"] in entry
        assert f.type is bool or f"(default {f.default!r})" in entry
    presets = {Staged: STAGED, pretrain_ctkd.Config: {"stage 1": pretrain_ctkd.PRESETS},
               contrastive.Config: contrastive.PRESETS}[config]
    about = {(name, stage): ", ".join(f"{k} {v}" for k, v in changes.items()) or "the defaults"
             for stage, own in presets.items() for name, changes in own.items()}
    assert re.findall(r"^preset (\w+) of ([\w ]+): (.*)$", printed, re.M) == [
        (*key, text) for key, text in about.items()]
    named = re.search(r"--preset {(.*?)}", printed)[1].split(",")
    assert set(named) == {name for name, _ in about} and len(set(named)) == len(named)


# ---------------------------------------------------------------------------------------------
# Presets
# ---------------------------------------------------------------------------------------------


def test_stage_1s_preset_is_demo_unless_a_model_or_a_preset_is_named(tmp_path, capsys):
    cases = [([], "demo"), (["--model", "x"], "paper"), (["--preset", "paper"], "paper"),
             (["--model", "x", "--preset", "demo"], "demo"), (["--model", "demo"], "demo")]
    for flags, preset in cases:
        out = ["--out", str(tmp_path / "x")]
        expected = pretrain_ctkd.Config(**pretrain_ctkd.PRESETS[preset])
        expected.out = out[-1]
        if "x" in flags:
            expected.model = "x"
        assert pretrain_ctkd.parse_arguments([*flags, *out]) == expected
        lr = {"demo": 1e-3, "paper": 1e-4}[preset]  # the bounds are checked against the preset's
        error_line(pretrain_ctkd.main([*flags, *out, "--min-lr", "1"]), capsys,
                   f"--lr {lr}: must be at least --min-lr 1.0")
    assert not (tmp_path / "x").exists()


def test_a_run_of_another_model_has_the_defaults_of_the_paper(run, tmp_path):
    assert run("run", "--steps", 1) == 0
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert (config["num_texts"], config["batch_size"], config["save_every"]) == (32000, 4, 500)


@pytest.mark.parametrize("flags, stage, preset", [
    ([], "ucl", "demo"), (["--stage", "scl"], "scl", "demo"), (["--model", "x"], "ucl", "paper"),
    (["--stage", "scl", "--model", "x"], "scl", "paper"), (["--preset", "paper"], "ucl", "paper"),
    (["--preset", "paper", "--stage", "scl"], "scl", "paper"),
    (["--preset", "repllama"], "scl", "repllama"),
    (["--stage", "scl", "--preset", "repllama"], "scl", "repllama"),
    (["--preset", "demo", "--model", "x"], "ucl", "demo"),
], ids=lambda v: " ".join(v) if isinstance(v, list) else v)
def test_the_contrastive_preset_is_the_stages_demo_unless_a_model_or_a_preset_is_named(
    flags, stage, preset
):
    config = contrastive.parse_arguments(flags)
    expected = contrastive.Config(**contrastive.PRESETS[stage][preset])
    if "--model" in flags:
        expected.model = "x"
    assert config == expected and config.stage == stage


@pytest.mark.parametrize("flags", [["--stage", "ucl", "--preset", "repllama"],
                                   ["--preset", "ucl"], ["--preset", "scl-demo"]], ids=" ".join)
def test_a_contrastive_preset_of_another_stage_or_of_an_old_name_ends_with_the_usage(flags, capsys):
    with pytest.raises(SystemExit) as caught:
        contrastive.main(flags)
    said = capsys.readouterr().err
    assert caught.value.code == 2 and flags[-1] in said and "repllama" in said


@pytest.mark.parametrize("stage, preset", [
    *(pytest.param(pretrain_ctkd, preset, id=f"ctkd {name}")
      for name, preset in pretrain_ctkd.PRESETS.items()),
    *(pytest.param(contrastive, preset, id=f"{stage} {name}")
      for stage, own in contrastive.PRESETS.items() for name, preset in own.items()),
])
def test_every_preset_passes_its_own_check(stage, preset):
    config = stage.Config(**preset)
    if config.__dict__.get("stage") == "scl":
        config.triples = config.triples or "FOLDER"
    stage.check(config)


def test_the_presets_of_a_stage_are_of_that_stage():
    for stage, own in contrastive.PRESETS.items():
        for name, preset in own.items():
            assert preset.get("stage", "ucl") == stage, name


# ---------------------------------------------------------------------------------------------
# Bounds
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config, field", NUMBERS)
def test_a_number_outside_its_bounds_is_refused(config, field):
    least, below = field.metadata["least"], field.metadata["below"]
    bad = {2**63: "must be below 2^63"} if field.type is int else {
        math.inf: "must be finite", -math.inf: "must be", math.nan: "must be", 1e38: "below 1e38"}
    if least is not None:
        bad[least - 1] = f"must be at least {least}"
    if below is not None:
        bad[float(below)] = f"must be below {below}"
    for value, message in bad.items():
        with pytest.raises(UserError) as caught:
            check_bounds(replace(config(), **{field.name: value}))
        assert str(caught.value).startswith(f"{flag(field.name)} {value}: ")
        assert message in str(caught.value)
    for value in [least] * (least is not None) + [field.default]:
        check_bounds(replace(config(), **{"min_lr": 0.0, field.name: value}))


def test_the_highest_rate_may_not_be_below_the_lowest():
    check_bounds(Config(lr=1e-4, min_lr=1e-4))
    with pytest.raises(UserError, match="--lr 1e-05: must be at least --min-lr 0.0001; lower both"):
        check_bounds(Config(lr=1e-5))


# ---------------------------------------------------------------------------------------------
# Stored settings
# ---------------------------------------------------------------------------------------------


def test_all_settings_but_resume_are_stored():
    stored = json.loads(json.dumps(stored_settings(Config(resume=True, lr=0.25))))
    assert "resume" not in stored and stored["lr"] == 0.25
    assert stored.keys() == {f.name for f in fields(Config)} - {"resume"}
    assert changed_settings(Config(lr=0.25), stored) == []
    assert "dry_run" not in stored_settings(contrastive.Config())


def test_a_changed_setting_is_named_unless_it_is_resumable():
    stored = stored_settings(Config())
    kept = Config(save_every=7, save_minutes=1.5, timeout=2.0, resume=True)
    assert changed_settings(kept, stored) == []
    assert changed_settings(Config(lr=0.5, kind="b"), stored) == [
        "lr: 0.001 -> 0.5", "kind: 'a' -> 'b'"]


def test_a_setting_newer_than_the_run_had_its_default():
    stored = stored_settings(Config())
    del stored["lr"]
    assert changed_settings(Config(), stored) == []
    assert changed_settings(Config(lr=0.5), stored) == ["lr: 0.001 -> 0.5"]


@pytest.mark.parametrize("config, kind, names", [
    (pretrain_ctkd.Config, True, {"recompute"}),
    (contrastive.Config, True, {"base", "data_dir", "dry_run"}),
    (pretrain_ctkd.Config, "place", {"model", "revision", "text"}),
    (contrastive.Config, "place", {"model", "revision", "text", "triples"}),
    (pretrain_ctkd.Config, "bits", {"micro_batch", "chunk_rows"}),
    (contrastive.Config, "bits", {"micro_tokens"}),
])
def test_what_a_resumed_run_may_change(config, kind, names):
    every = {True: {"out", "save_every", "save_minutes", "timeout", "resume"}, "place": set(),
             "bits": {"device", "threads"}}[kind]
    assert {f.name for f in fields(config) if f.metadata["resumable"] == kind} == names | every


@pytest.mark.parametrize("before, after, found", [
    ("runs/a", "runs/a/", []), ("runs/a/", "./runs/a", []), ("runs/a", "runs/b", ["model"]),
    ("", "runs/a", ["model"]), ("runs/a", "", ["model"]),
])
def test_one_place_may_be_written_in_several_ways(before, after, found):
    old = stored_settings(contrastive.Config(model=before))
    config = contrastive.Config(model=after)
    assert list(differences(config, old)) == found
    assert [text.partition(":")[0] for text in changed_settings(config, old)] == found
    assert changed_settings(config, old, resuming=True) == []

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


PRESETS = {"plain": {}, "strong": {"lr": 0.5, "kind": "b"}}


def parse(*argv) -> Config:
    """The configuration of a command line; without --preset that of `strong` if --kind is given."""
    return parse_config(Config, PRESETS, lambda given: "strong" if "kind" in given else "plain",
                        list(argv), "about this stage")


# ---------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------


def test_flags_are_stronger_than_a_preset_and_a_preset_than_the_defaults():
    assert parse() == Config()
    assert parse("--preset", "strong") == Config(lr=0.5, kind="b")
    assert parse("--preset", "strong", "--lr", "0.25") == Config(lr=0.25, kind="b")
    assert parse("--kind", "a") == Config(lr=0.5, kind="a")  # the preset picked by what is given
    assert parse("--kind", "a", "--preset", "plain") == Config(kind="a")
    assert parse("--no-whole-table", "--resume", "--threads", "3") == Config(
        whole_table=False, resume=True, threads=3)


@pytest.mark.parametrize("argv", [["--kind", "c"], ["--preset", "none"], ["--threads", "x"],
                                  ["--learning-rate", "1"]])
def test_an_unknown_flag_or_choice_ends_with_the_usage(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(*argv)
    assert caught.value.code == 2 and argv[-1] in capsys.readouterr().err


@pytest.mark.parametrize("config, parse", [
    (Config, lambda argv: parse(*argv)),
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
    assert all(f"\npreset {name}: " in printed for name in
               re.search(r"--preset {(.*?)}", printed)[1].split(","))


# ---------------------------------------------------------------------------------------------
# Presets
# ---------------------------------------------------------------------------------------------


def test_stage_1s_defaults_are_the_papers():
    config = pretrain_ctkd.Config(**pretrain_ctkd.PRESETS["paper"])
    expected = {
        "model": "meta-llama/Llama-2-7b-chat-hf", "text": "wikitext103", "num_texts": 32000,
        "batch_size": 4, "lr": 1e-4, "min_lr": 1e-5, "warmup": 0.1, "weight_decay": 1e-5,
        "clip": 2.0, "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "max_tokens": 512,
        "memory_tokens": 8, "objective": "ctkd", "nll_weight": 0.0, "attention": "bidirectional",
        "train_embeddings": "all", "steps": 0,
    }
    assert expected.items() <= vars(config).items()
    assert config.num_texts // config.batch_size == 8000  # steps = 0 is once through the texts


def test_stages_2_and_3_have_the_papers_settings():
    ucl, scl = (contrastive.Config(**contrastive.PRESETS[name]) for name in ("ucl", "scl"))
    shared = {"negatives": 1, "batches": "mixed", "max_tokens": 512, "document_tokens": 1024,
              "temperature": 0.05, "min_lr": 1e-5, "warmup": 0.1, "lora_r": 16, "lora_alpha": 32,
              "lora_dropout": 0.05}
    for config in (ucl, scl):
        assert shared.items() <= vars(config).items()
    assert vars(ucl).items() >= {
        "stage": "ucl", "text": "wiki1m", "num_texts": 128000, "batch_size": 128, "lr": 3e-5,
        "weight_decay": 1e-3, "clip": 1.0, "attention_dropout": 0.2, "steps": 0,
        "schedule_steps": 0}.items()
    assert vars(scl).items() >= {
        "stage": "scl", "batch_size": 1024, "lr": 1e-4, "weight_decay": 3e-4, "clip": 0.0,
        "attention_dropout": 0.0, "steps": 1000, "schedule_steps": 2000}.items()


def test_stage_1s_preset_is_demo_unless_a_model_or_a_preset_is_named(tmp_path, capsys):
    cases = [([], 256), (["--model", "x"], 512), (["--preset", "paper"], 512),
             (["--model", "x", "--preset", "demo"], 256), (["--model", "demo"], 256)]
    for flags, max_tokens in cases:
        out = ["--memory-tokens", "999", "--out", str(tmp_path / "x")]
        error_line(pretrain_ctkd.main([*flags, *out]), capsys,
                   f"--max-tokens {max_tokens}: must be at least")
    assert not (tmp_path / "x").exists()


def test_a_run_of_another_model_has_the_defaults_of_the_paper(run, tmp_path):
    assert run("run", "--steps", 1) == 0
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert (config["num_texts"], config["batch_size"], config["save_every"]) == (32000, 4, 500)


def test_the_contrastive_preset_is_the_stages_demo_unless_a_model_or_a_preset_is_named():
    for flags, preset in (([], "ucl-demo"), (["--stage", "scl"], "scl-demo"),
                          (["--model", "x"], "ucl"), (["--stage", "scl", "--model", "x"], "scl"),
                          (["--preset", "repllama"], "repllama"), (["--preset", "ucl"], "ucl")):
        config = contrastive.parse_arguments(flags)
        expected = contrastive.Config(**contrastive.PRESETS[preset])
        if "--model" in flags:
            expected.model = "x"
        assert config == expected


@pytest.mark.parametrize("stage", [pretrain_ctkd, contrastive])
def test_every_preset_passes_its_own_check(stage):
    for name, changes in stage.PRESETS.items():
        config = stage.Config(**changes)
        if config.__dict__.get("stage") == "scl":
            config.triples = config.triples or "FOLDER"
        stage.check(config)


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


@pytest.mark.parametrize("config, resumable", [
    (pretrain_ctkd.Config, {"recompute"}), (contrastive.Config, {"base", "data_dir"})])
def test_what_a_resumed_run_may_change(config, resumable):
    assert {f.name for f in fields(config) if f.metadata["resumable"]} == resumable | {
        "save_every", "save_minutes", "timeout", "resume"}

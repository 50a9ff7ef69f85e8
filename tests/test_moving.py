"""A run that moves: resumed in another place, on other copies of what it reads, with another
division of the work. What its steps depend on is known by hashes; what is changed is told."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from helpers import LONG, assert_same_run, edit_json, error_line, files, losses, metrics
from helpers import signal_after

import runtime.run
from model import load_encoder


@pytest.fixture(params=["ctkd", "ucl", "scl"])
def stage(request) -> str:
    return request.param


@pytest.fixture
def command(stage, argv, home, texts, tiny, ctkd, tmp_path, run, capsys):
    """command(flags..., out=, model=, data=): a run of the stage on copies of model and data."""
    shutil.copytree(tiny if stage == "ctkd" else ctkd, tmp_path / "model")
    data = texts if stage == "ctkd" else home / ("folder" if stage == "scl" else "texts.txt")
    own = "triples" if stage == "scl" else "texts.txt"
    (shutil.copytree if data.is_dir() else shutil.copy)(data, tmp_path / own)

    def call(*flags, out="run", model="model", data=own) -> int:
        source = ["--triples" if stage == "scl" else "--text", tmp_path / data]
        more = ["--lora-dropout", 0] + ["--attention-dropout", 0] * (stage != "ctkd")
        more += LONG if stage == "scl" else []
        return run(out, "--model", tmp_path / model, *source, "--steps", 4, "--dtype", "float32",
                   "--device", "cpu", "--threads", 1, *more, *flags, stage=stage)

    return call


@pytest.fixture
def stopped(command, capsys):
    """The command, whose run was stopped after step 2."""
    with signal_after(2, signal.SIGTERM):
        assert command() == 143
    capsys.readouterr()
    return command


def about(out: Path) -> tuple[dict, dict]:
    """A run's config.json, and its entry in the encoder's history."""
    return tuple(json.loads((out / name).read_text()) for name in
                 ("config.json", "encoder/encoder.json"))


def test_a_run_whose_folder_base_and_texts_have_moved_ends_as_if_they_had_not(
    stage, stopped, tmp_path, capsys
):
    shutil.copytree(tmp_path / "run", tmp_path / "whole")
    assert stopped("--resume", out="whole/") == 0  # the folder is the run, whatever its name
    assert "note: model" not in capsys.readouterr().out
    data = "triples" if stage == "scl" else "texts.txt"
    for old, new in (("run", "disk/run"), ("model", "disk/model"), (data, f"disk/{data}")):
        (tmp_path / "disk").mkdir(exist_ok=True)
        (tmp_path / old).rename(tmp_path / new)
    assert stopped("--resume", out="disk/run", model="disk/model", data=f"disk/{data}") == 0
    printed = capsys.readouterr().out
    assert "note: model " in printed and "the same content, by its sha256" in printed
    assert_same_run(tmp_path / "disk/run", tmp_path / "whole", 4)
    config, encoder = about(tmp_path / "disk/run")
    key = "triples" if stage == "scl" else "text"
    assert config["model"] == str(tmp_path / "disk/model")
    assert config["changes"] == encoder["history"][-1]["changes"] == [
        {"after_step": 2, "model": [str(tmp_path / p) for p in ("model", "disk/model")],
         key: [str(tmp_path / p) for p in (data, f"disk/{data}")]}]
    assert "changes" not in about(tmp_path / "whole")[0]
    load_encoder(tmp_path / "disk/run")


DIVIDE = {"ctkd": ["--micro-batch", 1, "--chunk-rows", 7], "ucl": ["--micro-tokens", 70],
          "scl": ["--micro-tokens", 125]}


def test_a_run_may_be_divided_in_another_way(stage, stopped, tmp_path, capsys):
    shutil.copytree(tmp_path / "run", tmp_path / "whole")
    still = ["--resume"]
    assert stopped(*still, out="whole") == 0
    capsys.readouterr()
    assert stopped(*still, *DIVIDE[stage], "--threads", 2, "--device", "auto") == 0
    printed = capsys.readouterr().out
    (note,) = [line for line in printed.splitlines() if line.startswith("note: ")]
    assert "threads 1 -> 2" in note and "the same samples in the same steps and the same " in note
    assert DIVIDE[stage][0].removeprefix("--").replace("-", "_") in note and "same bits" in note
    torch.set_num_threads(1)
    whole, other = metrics(tmp_path / "whole"), metrics(tmp_path / "run")
    assert [row["real_tokens"] for row in other] == [row["real_tokens"] for row in whole]
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)
    config, encoder = about(tmp_path / "run")
    (change,) = config["changes"]
    assert change["after_step"] == 2 and change["threads"] == [1, 2]
    assert encoder["history"][-1]["changes"] == [change]
    assert encoder["history"][-1]["threads"] == config["threads"] == 2


@pytest.mark.parametrize("changed", ["base", "text"])
def test_what_lies_elsewhere_and_is_something_else_is_refused(
    changed, stage, stopped, tmp_path, capsys
):
    where = {}
    if changed == "base":
        shutil.copytree(tmp_path / "model", tmp_path / "other")
        if stage == "ctkd":
            edit_json(tmp_path / "other/config.json", rms_norm_eps=0.1)
        else:
            edit_json(tmp_path / "other/encoder/ctkd/adapter_config.json", lora_alpha=99)
        where["model"] = "other"
    else:
        own = "triples" if stage == "scl" else "texts.txt"
        (shutil.copytree if stage == "scl" else shutil.copy)(tmp_path / own, tmp_path / "o.txt")
        path = tmp_path / ("o.txt/mine.jsonl" if stage == "scl" else "o.txt")
        path.write_text(path.read_text().replace("the", "a").replace('"query": "', '"query": "o '))
        where["data"] = "o.txt"
    before = files(tmp_path)
    error_line(stopped("--resume", **where), capsys, "step-0000002", "of this run changed",
               "texts" if changed == "text" else "base")
    assert files(tmp_path) == before


@pytest.mark.parametrize("flags, said", [
    (["--seed", 3], "seed: 0 -> 3"), (["--dtype", "bfloat16"], "dtype: 'float32' -> 'bfloat16'"),
    (["--batch-size", 5], "batch_size: "), (["--lora-dropout", 0.3], "lora_dropout: "),
    (["--deterministic"], "deterministic: False -> True"),
])
def test_what_changes_the_steps_is_refused_as_before(flags, said, stage, stopped, capsys):
    error_line(stopped("--resume", *flags), capsys, "with a changed configuration", said)


@pytest.mark.parametrize("stage", ["ctkd"], indirect=True)
def test_auto_is_on_every_machine_the_dtype_that_the_run_began_with(
    stage, command, tmp_path, monkeypatch, capsys
):
    pick = runtime.run.pick_dtype
    flags = ["--dtype", "auto"]
    with monkeypatch.context() as patch:
        patch.setattr(runtime.run, "pick_dtype", lambda name, device: torch.float64
                      if name == "auto" else pick(name, device))
        with signal_after(2, signal.SIGTERM):
            assert command(*flags) == 143
    shutil.copytree(tmp_path / "run", tmp_path / "named")
    capsys.readouterr()
    error_line(command("--dtype", "bfloat16", "--resume"), capsys, "dtype: 'auto' -> 'bfloat16'")
    assert command(*flags, "--resume") == 0
    assert "note: " not in capsys.readouterr().out
    assert command("--dtype", "float64", "--resume", out="named") == 0
    assert_same_run(tmp_path / "run", tmp_path / "named", 4)
    environment = json.loads((tmp_path / "run/environment.json").read_text())
    assert environment["dtype"] == "torch.float64"


@pytest.mark.parametrize("stage", ["ucl"], indirect=True)
def test_stage_2_may_start_on_another_base_on_purpose(
    stage, command, tiny_copy, tmp_path, capsys
):
    edit_json(tiny_copy / "config.json", rms_norm_eps=1e-3)
    error_line(command("--base", tiny_copy), capsys, "rms_norm_eps", "--other-base")
    with signal_after(2, signal.SIGTERM):
        assert command("--base", tiny_copy, "--other-base") == 143
    assert "note: " in capsys.readouterr().out
    error_line(command("--base", tiny_copy, "--resume"), capsys, "other_base: True -> False")
    assert command("--base", tiny_copy, "--other-base", "--resume") == 0
    base = load_encoder(tmp_path / "run").base
    assert base["name"] == str(tiny_copy) and base["trained_on"]["sha256"] != base["sha256"]
    edit_json(tiny_copy / "config.json", rms_norm_eps=1e-4)
    capsys.readouterr()
    error_line(command("--base", tiny_copy, "--other-base", "--resume"), capsys,
               "the base of this run changed")


@pytest.mark.parametrize("stage", ["ctkd"], indirect=True)
def test_before_the_first_checkpoint_there_is_nothing_to_compare(
    stage, command, tmp_path, capsys
):
    with signal_after(2, signal.SIGTERM):
        assert command() == 143
    shutil.rmtree(tmp_path / "run/checkpoints")
    shutil.copy(tmp_path / "texts.txt", tmp_path / "o.txt")
    capsys.readouterr()
    assert command("--resume", "--micro-batch", 1, data="o.txt") == 0
    assert "note: " not in capsys.readouterr().out
    assert "changes" not in about(tmp_path / "run")[0] and len(metrics(tmp_path / "run")) == 4

"""Checkpoints: when they are written, what they hold, and what becomes of damaged ones."""

import os
import random
import shutil
import signal
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    after_step, assert_same_run, error_line, files, metrics, names, refused, signal_after,
)

import runtime.checkpoints
from runtime.checkpoints import Checkpoints, seal, unseal
from runtime.errors import UserError
from runtime.files import finish_renaming, write_folder

INPUTS = {"base": "a1" * 32, "texts": "b2" * 32}


def trained_model(seed: int, steps: int = 2):
    """Two tensors after a few steps of AdamW: by name, and their optimiser."""
    torch.manual_seed(seed)
    trained = {name: torch.randn(shape, requires_grad=True)
               for name, shape in (("table", (5, 3)), ("q_proj.lora_A", (2, 3)))}
    optimizer = torch.optim.AdamW(trained.values(), lr=0.1)
    for _ in range(steps):
        sum(p.square().sum() for p in trained.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return trained, optimizer


# ---------------------------------------------------------------------------------------------
# Saving and loading
# ---------------------------------------------------------------------------------------------


def test_a_loaded_checkpoint_has_the_weights_and_moments_that_were_saved(tmp_path):
    trained, optimizer = trained_model(0)
    Checkpoints(tmp_path, 0, trained, optimizer, INPUTS).save(7)
    other, fresh = trained_model(1, steps=0)
    loaded = Checkpoints(tmp_path, 0, other, fresh, INPUTS)
    assert loaded.newest_step() == 7
    state = loaded.load(7)
    assert {"step": 7, **INPUTS}.items() <= state.items()
    assert state["files"].keys() == {"weights.safetensors", "optimizer.safetensors"}
    for name in trained:
        assert torch.equal(other[name], trained[name])
        ours, theirs = fresh.state[other[name]], optimizer.state[trained[name]]
        assert ours.keys() == theirs.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
        assert ours["step"] == 2 and ours["exp_avg_sq"].abs().max() > 0


def test_the_last_two_checkpoints_are_kept(tmp_path):
    saved = Checkpoints(tmp_path, 0, *trained_model(0), INPUTS)
    assert saved.newest_step() == 0 and saved.all() == []
    for step, kept in ((3, [3]), (6, [3, 6]), (12, [6, 12]), (13, [12, 13])):
        saved.save(step)
        assert names(tmp_path / "checkpoints") == [f"step-{n:07d}" for n in kept]
        assert saved.newest_step() == step


@pytest.mark.parametrize("key", INPUTS)
def test_a_checkpoint_made_from_other_inputs_is_refused(key, tmp_path):
    model = trained_model(0)
    Checkpoints(tmp_path, 0, *model, INPUTS).save(3)
    changed = Checkpoints(tmp_path, 0, *model, {**INPUTS, key: "c3" * 32})
    refused(changed.newest_step, f"step-0000003: the {key} of this run changed", "now c3c3c3",
            "another --out")


def test_a_checkpoint_is_written_when_the_last_one_is_old(run, tmp_path, monkeypatch):
    """A clock that advances by a minute whenever it is read (once a step, and when saving)."""
    minutes = count()
    clock = SimpleNamespace(monotonic=lambda: 60.0 * next(minutes))
    monkeypatch.setattr(runtime.checkpoints, "time", clock)
    saved, save = [], Checkpoints.save
    monkeypatch.setattr(Checkpoints, "save", lambda self, step: (saved.append(step),
                                                                 save(self, step)))
    assert run("run", "--steps", 10, "--save-minutes", 3) == 0
    assert saved == [3, 6, 9, 10]
    saved.clear()
    assert run("off", "--steps", 10) == 0
    assert saved == [10]


def test_only_our_checkpoints_are_removed(run, tmp_path):
    """What a killed save has left behind goes, what somebody else has put there stays."""
    folder = tmp_path / "run/checkpoints"
    (folder / ".step-0000003.writing").mkdir(parents=True)
    (folder / "step-0000001-keep").mkdir()
    (folder / "step-0000001.tar").write_text("")
    folder.parent.rename(tmp_path / "other")
    with after_step(1, lambda: (tmp_path / "other/checkpoints").rename(folder)):
        assert run("run", "--steps", 5, "--save-every", 2) == 0
    assert names(folder) == [
        "step-0000001-keep", "step-0000001.tar", "step-0000004", "step-0000005"]


# ---------------------------------------------------------------------------------------------
# Damage
# ---------------------------------------------------------------------------------------------


def truncate(path: Path, draw: random.Random):
    os.truncate(path, draw.randrange(path.stat().st_size))


def flip(path: Path, draw: random.Random):
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def delete(path: Path, draw: random.Random):
    path.unlink()


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", [truncate, flip, delete])
def test_a_damaged_checkpoint_is_reported_and_skipped(damage, name, run, tmp_path, capsys):
    flags = ["--steps", 6, "--save-every", 2]
    assert run("whole", *flags) == 0
    out = shutil.copytree(tmp_path / "whole", tmp_path / "run")
    shutil.rmtree(out / "encoder")
    last = out / "checkpoints/step-0000006"
    damage(last / name, random.Random(1))
    config = (out / "config.json").read_text()
    (out / "config.json").write_text(config.replace(str(tmp_path / "whole"), str(out)))
    capsys.readouterr()
    assert run("run", *flags, "--resume") == 0
    printed = capsys.readouterr().out
    note = next(line for line in printed.splitlines() if line.startswith("note: "))
    assert str(last / name) in note and "resuming from the checkpoint before it" in note
    assert_same_run(out, tmp_path / "whole", 6)
    assert names(out / "checkpoints") == ["step-0000004", "step-0000006"]
    assert unseal(last)["step"] == 6


def test_if_all_checkpoints_are_damaged_nothing_is_touched(run, tmp_path, capsys):
    flags = ["--steps", 4, "--save-every", 2]
    assert run("run", *flags) == 0
    out = tmp_path / "run"
    for step in (2, 4):
        truncate(out / f"checkpoints/step-000000{step}/weights.safetensors", random.Random(0))
    before = files(out)
    capsys.readouterr()
    error_line(run("run", *flags, "--resume"), capsys,
               "step-0000002/weights.safetensors: damaged",
               f"remove {out / 'checkpoints'} to start")
    assert files(out) == before
    shutil.rmtree(out / "checkpoints")
    assert run("run", *flags, "--resume") == 0
    assert [row["step"] for row in metrics(out)] == [0, 1, 2, 3]


def test_a_damaged_checkpoint_of_a_later_step_does_not_displace_a_whole_one(run, tmp_path):
    assert run("run", "--steps", 8, "--save-every", 4) == 0
    out = tmp_path / "run"
    (out / "checkpoints/step-0000008/state.json").unlink()
    with signal_after(2, signal.SIGTERM):
        assert run("run", "--steps", 8, "--save-every", 4, "--resume") == 143
    assert names(out / "checkpoints") == ["step-0000004", "step-0000006"]


def test_every_flipped_bit_of_a_state_is_noticed_or_has_no_meaning(tmp_path):
    (tmp_path / "weights.safetensors").write_bytes(b"some weights")
    about = {"step": 14, "base": "a1" * 4, "texts": "b2" * 4}
    seal(tmp_path, about)
    path = tmp_path / "state.json"
    whole, noticed, state = path.read_bytes(), 0, unseal(tmp_path)
    assert about.items() <= state.items() and list(state["files"]) == ["weights.safetensors"]
    for place in range(8 * len(whole)):
        content = bytearray(whole)
        content[place // 8] ^= 1 << place % 8
        path.write_bytes(content)
        try:
            assert unseal(tmp_path) == state
        except UserError:
            noticed += 1
    assert noticed > 0.9 * 8 * len(whole)  # the rest is white space


@pytest.mark.parametrize("content", [
    b"", b"[]", b"{}", b"[" * 100_000, b'{"step": 3}', b"\xff\xfe",
], ids=["empty", "list", "object", "deep", "without a hash", "not UTF-8"])
def test_something_else_in_place_of_a_state_is_a_clear_error(content, tmp_path):
    (tmp_path / "state.json").write_bytes(content)
    refused(lambda: unseal(tmp_path), "state.json")


# ---------------------------------------------------------------------------------------------
# Folders that are never half written
# ---------------------------------------------------------------------------------------------


class Killed(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("moment", ["while writing", "between the renames", "before the removal"])
def test_a_folder_is_old_or_new_at_every_moment(moment, tmp_path, monkeypatch):
    """Killed at any moment of a second writing, the folder has the first or the second content."""
    target = tmp_path / "best"
    with write_folder(target) as folder:
        (folder / "content").write_text("first")

    def killed(*_):
        raise Killed

    if moment == "while writing":
        monkeypatch.setattr("runtime.files.sync", killed)
    else:
        steps, original = iter(range(2)), os.rename
        monkeypatch.setattr(os, "rename", lambda *a: (
            original(*a), next(steps) == (moment == "before the removal") and killed()))
    monkeypatch.setattr("runtime.files.finish_renaming", lambda _: None)  # the dead repair nothing
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    with pytest.raises(Killed):
        with write_folder(target) as folder:
            (folder / "content").write_text("second")
    monkeypatch.undo()
    finish_renaming(target)
    assert (target / "content").read_text() == (
        "second" if moment == "before the removal" else "first")
    with write_folder(target) as folder:
        (folder / "content").write_text("third")
    assert names(tmp_path) == ["best"] and (target / "content").read_text() == "third"

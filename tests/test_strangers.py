"""Folders by strangers: links out of them, pipes and devices among their files, absurd sizes. What
they lead to is neither read, nor copied, nor waited for, nor given memory."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from helpers import edit_json, error_line, files, metrics, names, refused, signal_after
from helpers import trained_encoder, TEXTS
from safetensors.torch import load_file, save_file

import evaluate
from model import load_encoder, load_llama, save_encoder
from runtime.checkpoints import FILES, seal
from runtime.files import MOST_JSON, sha256_of_json, write_file
from runtime.encoders import own_file


@pytest.fixture(autouse=True)
def no_waiting():
    """What waits for a pipe fails after ten minutes."""
    def late(*_):
        raise TimeoutError("waits for a pipe or reads without an end")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(600)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def encoder(tiny, tmp_path) -> Path:
    """An encoder folder; beside it the file `secret`."""
    save_encoder(trained_encoder(tiny), tmp_path / "encoder")
    (tmp_path / "secret").write_text("a file of this machine")
    return tmp_path / "encoder"


OWN = ("encoder.json", "embeddings.safetensors", "ctkd/adapter_config.json",
       "ctkd/adapter_model.safetensors")


def link(path: Path, target):
    path.unlink()
    path.symlink_to(target)


def pipe(path: Path, _=None):
    path.unlink()
    os.mkfifo(path)


def zeros(path: Path, _=None):
    link(path, "/dev/zero")


def folder(path: Path, _=None):
    path.unlink()
    path.mkdir()


def huge(path: Path, _=None):
    os.truncate(path, MOST_JSON + 1)


# ---------------------------------------------------------------------------------------------
# Links
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OWN)
def test_a_link_out_of_an_encoders_folder_is_not_followed(name, encoder, tmp_path):
    shutil.copy(encoder / name, tmp_path / "copy")
    link(encoder / name, tmp_path / "copy")
    refused(lambda: load_encoder(encoder), str(encoder / name), "out of the encoder's folder",
            str(tmp_path / "copy"))


@pytest.mark.parametrize("target", ["/", "../elsewhere"])
def test_a_stages_folder_elsewhere_is_not_followed(target, encoder, tmp_path):
    (encoder / "ctkd").rename(tmp_path / "elsewhere")
    (encoder / "ctkd").symlink_to(target)
    refused(lambda: load_encoder(encoder), "ctkd", "out of the encoder's folder")


@pytest.mark.parametrize("how", [
    lambda e, root: link(e / OWN[2], Path("../../encoder") / "ctkd.json"),
    lambda e, root: e.rename(root / "real") and e.symlink_to(root / "real"),
], ids=["within the folder", "the folder itself"])
def test_links_that_stay_are_followed(how, encoder, tmp_path):
    expected = load_encoder(encoder).encode(TEXTS)
    shutil.copy(encoder / OWN[2], encoder / "ctkd.json")
    how(encoder, tmp_path)
    assert (load_encoder(encoder).encode(TEXTS) == expected).all()


def as_in_the_cache(encoder: Path, hub: Path) -> Path:
    """The encoder as the hub's cache holds it: links to the blobs of its repository."""
    snapshot = hub / "models--o--encoder/snapshots" / ("0" * 40)
    for i, name in enumerate(OWN):
        blob, place = hub / f"models--o--encoder/blobs/{i}", snapshot / name
        for path in (blob, place):
            path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(encoder / name, blob)
        place.symlink_to(os.path.relpath(blob, place.parent))
    return snapshot


def test_the_links_of_the_hubs_cache_are_followed_to_the_blobs_of_their_repository(
    encoder, tmp_path
):
    snapshot = as_in_the_cache(encoder, tmp_path / "hub")
    assert (load_encoder(snapshot).encode(TEXTS) == load_encoder(encoder).encode(TEXTS)).all()
    assert own_file(snapshot, OWN[3]).is_symlink()
    other = tmp_path / "hub/models--o--other/blobs/0"
    other.parent.mkdir(parents=True)
    shutil.copy(snapshot / OWN[0], other)
    link(snapshot / OWN[0], other)
    refused(lambda: load_encoder(snapshot), "out of the encoder's folder")


def next_stage(encoder: Path):
    """The encoder as a second stage saves it."""
    second = load_encoder(encoder)
    second.history = [*second.history, {"stage": "ucl"}]
    return second


def test_of_an_earlier_stage_only_the_adapter_is_copied(encoder, tmp_path):
    second = next_stage(encoder)
    (encoder / "ctkd/all").symlink_to("/")
    (encoder / "ctkd/notes.txt").symlink_to(tmp_path / "secret")
    (encoder / "ctkd/model.py").write_text("import os")
    os.mkfifo(encoder / "ctkd/pipe")
    save_encoder(second, tmp_path / "next", earlier=encoder)
    assert names(tmp_path / "next/ctkd") == ["adapter_config.json", "adapter_model.safetensors"]
    assert load_encoder(tmp_path / "next").history[-1] == {"stage": "ucl"}


@pytest.mark.parametrize("damage", [lambda path, secret: link(path, secret), pipe, zeros],
                         ids=["link", "pipe", "zeros"])
@pytest.mark.parametrize("name", OWN[2:])
def test_a_link_that_came_after_loading_is_not_copied(name, damage, encoder, tmp_path):
    second = next_stage(encoder)
    damage(encoder / name, tmp_path / "secret")
    refused(lambda: save_encoder(second, tmp_path / "next", earlier=encoder), str(encoder / name))
    assert not (tmp_path / "next").exists() and not list(tmp_path.glob(".next*"))


# ---------------------------------------------------------------------------------------------
# Pipes, devices, absurd sizes
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [pipe, zeros, folder])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_file_of_a_model_that_is_no_file_is_refused(name, damage, tiny_copy):
    damage(tiny_copy / name)
    refused(lambda: evaluate.open_model(str(tiny_copy)), str(tiny_copy / name), "no regular file")


def test_an_index_that_is_no_file_is_refused(tiny_copy):
    os.mkfifo(tiny_copy / "model.safetensors.index.json")
    refused(lambda: load_llama(tiny_copy), "index.json", "no regular file")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_json_file_that_is_too_large_is_refused(name, tiny_copy):
    huge(tiny_copy / name)
    refused(lambda: evaluate.open_model(str(tiny_copy)), str(tiny_copy / name), "at most")


@pytest.mark.parametrize("damage", [pipe, folder])
@pytest.mark.parametrize("name", OWN[1:])
def test_a_file_of_an_encoder_that_is_no_file_is_refused(name, damage, encoder):
    damage(encoder / name)
    refused(lambda: load_encoder(encoder), str(encoder / name), "no regular file")


@pytest.mark.parametrize("name", [OWN[0], OWN[2]])
def test_the_json_files_of_an_encoder_have_a_largest_size(name, encoder):
    huge(encoder / name)
    refused(lambda: load_encoder(encoder), str(encoder / name), "at most")


def empty(encoder: Path, shapes: dict[str, tuple], **config):
    """An adapter of tensors without elements, which take no place in a file."""
    save_file({name: torch.empty(shape) for name, shape in shapes.items()}, encoder / OWN[3])
    edit_json(encoder / OWN[2], **config)


@pytest.mark.parametrize("rank", [10**12, 10**14])  # which no machine has room for
def test_no_memory_is_taken_for_an_adapter_that_is_not_there(rank, encoder):
    present = load_file(encoder / OWN[3])
    empty(encoder, {name: (rank, 0) for name in present}, r=rank)
    refused(lambda: load_encoder(encoder), "adapter_model.safetensors", "of another shape")
    empty(encoder, {}, r=rank)
    refused(lambda: load_encoder(encoder), "adapter_model.safetensors", "missing")


@pytest.mark.parametrize("k", [10**15, 2**62])
def test_no_memory_is_taken_for_rows_that_are_not_there(k, encoder):
    edit_json(encoder / OWN[0], num_memory_tokens=k)
    save_file({"memory_tokens": torch.empty(k, 0)}, encoder / OWN[1])
    refused(lambda: load_encoder(encoder), "embeddings.safetensors", "memory_tokens")


def test_no_memory_is_taken_for_a_network_that_is_not_there(tiny_copy):
    edit_json(tiny_copy / "config.json", hidden_size=2**24, vocab_size=2**24,
              intermediate_size=2**24, head_dim=8)
    refused(lambda: load_llama(tiny_copy), "config.json says")


# ---------------------------------------------------------------------------------------------
# Runs, results
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def stopped(run, tmp_path, capsys) -> Path:
    """A run stopped after step 2, with the checkpoints of steps 1 and 2."""
    with signal_after(2, signal.SIGTERM):
        assert run("run", "--steps", 4, "--save-every", 1) == 143
    capsys.readouterr()
    return tmp_path / "run"


RESUME = ("--steps", 4, "--save-every", 1, "--resume")


@pytest.mark.parametrize("name", ["state.json", *FILES])
@pytest.mark.parametrize("damage", [pipe, zeros])
def test_a_file_of_a_checkpoint_that_is_no_file_is_skipped(name, damage, stopped, run, capsys):
    damage(stopped / "checkpoints/step-0000002" / name)
    assert run("run", *RESUME) == 0 and len(metrics(stopped)) == 4
    assert f"step-0000002/{name}: " in capsys.readouterr().out


def reseal(folder: Path, **changes):
    """Seal a checkpoint as a stranger would: the hash of what the state says is right."""
    state = json.loads((folder / "state.json").read_text())
    state.pop("sha256")
    state |= changes
    state["sha256"] = sha256_of_json(state)
    (folder / "state.json").write_text(json.dumps(state))


@pytest.mark.parametrize("changes", [
    {"files": {"../../../secret": [22, "0" * 64]}}, {"files": []}, {"files": None},
    {"files": {FILES[0]: 5}}, {"files": {FILES[0]: ["a"]}}, {"files": {FILES[0]: [0, None]}},
], ids=str)
def test_a_state_that_a_stranger_has_sealed_names_no_other_files(changes, stopped, run, capsys):
    for step in (1, 2):
        reseal(stopped / f"checkpoints/step-000000{step}", **changes)
    before = files(stopped)
    error_line(run("run", *RESUME), capsys, "step-0000001/")
    assert files(stopped) == before


@pytest.mark.parametrize("edit", [
    lambda t: t.pop(min(t)), lambda t: t.update({min(t): torch.ones(2, 2)}),
    lambda t: t.update(extra=torch.ones(1)),
], ids=["missing", "another shape", "extra"])
def test_a_sealed_checkpoint_of_another_network_is_refused(edit, stopped, run, capsys):
    place = stopped / "checkpoints/step-0000002"
    tensors = load_file(place / FILES[1])
    edit(tensors)
    save_file(tensors, place / FILES[1])
    state = json.loads((place / "state.json").read_text())
    seal(place, {key: state[key] for key in ("step", "base", "texts")})
    error_line(run("run", *RESUME), capsys, "step-0000002", "another run")


def test_nothing_is_written_through_the_links_of_a_run(stopped, run, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("as it was")
    for name in (".config.json.writing", ".metrics.jsonl.writing", ".environment.json.writing"):
        (stopped / name).symlink_to(secret)
    assert run("run", *RESUME) == 0 and secret.read_text() == "as it was"
    assert not any(path.is_symlink() for path in stopped.iterdir())
    (tmp_path / ".file.writing").symlink_to(secret)
    write_file(tmp_path / "file", "new")
    assert secret.read_text() == "as it was" and (tmp_path / "file").read_text() == "new"


def test_a_lock_is_not_made_through_a_link(stopped, run, tmp_path, capsys):
    (stopped / ".lock").symlink_to(tmp_path / "made")
    error_line(run("run", *RESUME), capsys, str(stopped), "cannot be written")
    assert not (tmp_path / "made").exists()


def test_a_result_that_is_a_pipe_is_refused(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results/demo@mean").mkdir(parents=True)
    os.mkfifo(tmp_path / "results/demo@mean/DemoSTS.json")
    error_line(evaluate.main(["--compare", "demo@mean"]), capsys, "no regular file")
    os.mkfifo(tmp_path / "x.json")
    error_line(evaluate.main(["--compare", str(tmp_path)]), capsys, "no results")

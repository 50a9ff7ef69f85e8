"""What an earlier version has written is read as it was: fixtures/.

    llama/           a tiny random Llama, the base of all that follows
    texts.txt        twelve texts
    ucl/encoder/     an encoder after stages 1 and 2, of format 1, from before there was runtime/
    format-1/        config.json of a run of that time
    run/             stage 1 (COMMAND), interrupted after step 2 of 4, of format 2; without dropout,
                     whose draws may be others in another version
    expected/        encoder and losses of the whole run, embeddings of ucl/encoder

None of it is ever written anew: it stands for the folders that people have.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import embed_with_transformers, error_line, files, metrics
from safetensors.torch import load_file

import export
import pretrain_ctkd
from model import load_encoder

FIXTURES = Path(__file__).parent / "fixtures"
EXPECTED = FIXTURES / "expected"
COMMAND = """--model llama --text texts.txt --out run --steps 4 --batch-size 2 --memory-tokens 3
    --max-tokens 60 --save-every 2 --dtype float32 --threads 1 --lr 1e-3 --lora-r 2
    --lora-dropout 0""".split()


@pytest.fixture(scope="module")
def embeddings() -> tuple[list[str], np.ndarray]:
    """Texts and what ucl/encoder made of them."""
    stored = json.loads((EXPECTED / "embeddings.json").read_text(encoding="utf-8"))
    assert len(stored) == 8
    return list(stored), np.array([*stored.values()])


def test_an_old_encoder_gives_its_old_embeddings(embeddings):
    texts, expected = embeddings
    encoder = load_encoder(FIXTURES / "ucl/encoder", base=str(FIXTURES / "llama"))
    assert [stage["stage"] for stage in encoder.history] == ["ctkd", "ucl"]
    assert np.abs(encoder.encode(texts) - expected).max() <= 1e-5


def test_an_old_encoder_cuts_its_texts_where_it_did(embeddings):
    """Format 1 says 60 with the three memory tokens; two texts are longer than the 57 left."""
    texts, expected = embeddings
    about = json.loads((FIXTURES / "ucl/encoder/encoder.json").read_text())
    assert (about["format"], about["max_tokens"], about["num_memory_tokens"]) == (1, 60, 3)
    encoder = load_encoder(FIXTURES / "ucl/encoder", base=str(FIXTURES / "llama"))
    ids, _, cut = encoder.tokenize(texts)
    assert encoder.config.max_tokens == 57 and cut == [True] * 2 + [False] * 6
    assert [len(text) for text in ids[:2]] == [57, 57] and max(map(len, ids[2:])) < 57
    encoder.config = replace(encoder.config, max_tokens=60)
    assert np.abs(encoder.encode(texts) - expected).max(axis=1)[:2].min() > 1e-3


def test_an_old_encoder_can_be_exported(embeddings, tmp_path):
    texts, expected = embeddings
    arguments = [FIXTURES / "ucl/encoder", tmp_path / "out", "--base", FIXTURES / "llama"]
    assert export.main([*map(str, arguments)]) == 0
    found = embed_with_transformers(tmp_path / "out", texts[2:], k=3)  # two are cut to max_tokens
    assert np.abs(found - expected[2:]).max() <= 1e-4


@pytest.fixture(scope="module")
def resumed(tmp_path_factory) -> Path:
    """The folder of the old run, resumed on the CPU by the command that began it."""
    home = tmp_path_factory.mktemp("fixtures")
    shutil.copytree(FIXTURES, home, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(pretrain_ctkd, "report", lambda *_: None)
        assert pretrain_ctkd.main([*COMMAND, "--resume"]) == 0
    return home / "run"


def test_a_run_of_format_1_is_not_resumed(tmp_path, monkeypatch, capsys):
    """Its lengths, order of texts and learning rate were others."""
    shutil.copytree(FIXTURES, tmp_path, dirs_exist_ok=True)
    shutil.copy(tmp_path / "format-1/config.json", tmp_path / "run/config.json")
    monkeypatch.chdir(tmp_path)
    before = files(tmp_path)
    code = pretrain_ctkd.main([*COMMAND, "--resume"])
    error_line(code, capsys, "run/config.json: format=1, this version resumes 2",
               "finish the run with the version that began it, or name another --out")
    assert files(tmp_path) == before


def test_an_old_run_resumes_with_its_old_losses(resumed):
    before, expected, found = metrics(FIXTURES / "run"), metrics(EXPECTED), metrics(resumed)
    assert found[:2] == before == expected[:2]  # not trained again: the same speeds, too
    assert [row["step"] for row in found] == [0, 1, 2, 3]
    assert json.loads((FIXTURES / "run/config.json").read_text())["format"] == 2
    for key in ("loss", "learning_rate", "grad_norm", "real_tokens"):
        assert [row[key] for row in found] == pytest.approx([row[key] for row in expected],
                                                            rel=0, abs=1e-5)


@pytest.mark.parametrize("name", ["embeddings.safetensors", "ctkd/adapter_model.safetensors"])
def test_an_old_run_ends_with_its_old_encoder(name, resumed):
    found, expected = load_file(resumed / "encoder" / name), load_file(EXPECTED / "encoder" / name)
    assert found.keys() == expected.keys()
    for key in expected:
        assert (found[key] - expected[key]).abs().max() <= 1e-4
    before = load_file(FIXTURES / "run/checkpoints/step-0000002/weights.safetensors")
    moved = [(expected[key] - tensor).abs().max() for key, tensor in before.items()
             if key in expected]  # the memory tokens; adapters and table have other names there
    assert all(distance > 5e-4 for distance in moved)


def test_the_encoder_of_an_old_run_says_the_same_of_itself(resumed):
    found, expected = (json.loads((folder / "encoder/encoder.json").read_text())
                       for folder in (resumed, EXPECTED))
    base = {**expected.pop("base"), "name": str(resumed.parent.resolve() / "llama")}
    (entry,), (old_entry,) = found.pop("history"), expected.pop("history")
    assert all(entry[key] == value for key, value in old_entry.items())  # it may have gained some
    own = found.pop("base")  # it has the identity of its parts now, in place of its files'
    assert {key: own[key] for key in ("name", "revision")} == {
        key: base[key] for key in ("name", "revision")}
    assert own["sha256"] != base["sha256"]
    assert {"weights", "config", "tokenizer", "bos"} < own.keys()
    assert found == expected | {"bos": -1, "special_tokens": "parsed"}  # newer: as it was without

"""export.py: a plain folder that transformers reads, with the encoder's embeddings."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
import torch
from helpers import ROOT, TEXTS, K, edit_json, embed_with_transformers, refused
from helpers import trained_encoder
from safetensors.torch import load_file
from transformers import AutoModel

import export
from export import export_llama
from model import load_encoder

SHORT = TEXTS[:-1]


@pytest.mark.parametrize("kind, tokens", [  # with 300 the tokenizer has fewer ids than the table
    ("llama", 300), ("llama", 320), ("mistral", 320), ("qwen2", 300), ("qwen3", 300),
])
@pytest.mark.parametrize("settings", [
    {}, {"tie_word_embeddings": True}, {"head_dim": 12, "shard": "30KB"},
], ids=["untied", "tied", "sharded, head_dim"])
def test_an_exported_folder_gives_the_same_embeddings_in_transformers(
    tokens, settings, kind, checkpoint, tmp_path
):
    encoder = trained_encoder(checkpoint(tokens=tokens, kind=kind, **settings))
    expected = encoder.encode(SHORT)
    export_llama(encoder, tmp_path / "exported")
    theirs = embed_with_transformers(tmp_path / "exported", SHORT)
    assert np.abs(theirs - expected).max() <= 1e-4
    assert np.abs(encoder.encode(SHORT) - expected).max() <= 1e-5
    about = json.loads((tmp_path / "exported/config.json").read_text())
    assert (about["model_type"], about["vocab_size"]) == (kind, 320 + K)
    reader = AutoModel.from_pretrained(tmp_path / "exported")
    assert about["architectures"] == [type(reader).__name__] == [f"{kind.capitalize()}Model"]
    names = load_file(tmp_path / "exported/model.safetensors").keys()
    assert len([name for name in names if name.endswith("bias")]) == 6 * (kind == "qwen2")
    assert len([name for name in names if re.search("[qk]_norm", name)]) == 4 * (kind == "qwen3")


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_a_base_without_the_name_of_its_class_is_exported_under_it(kind, checkpoint, tmp_path):
    folder = checkpoint(kind=kind)
    edit_json(folder / "config.json", drop=["architectures"])
    export_llama(trained_encoder(folder), tmp_path / "exported")
    about = json.loads((tmp_path / "exported/config.json").read_text())
    assert about["architectures"] == [type(AutoModel.from_pretrained(folder)).__name__]


def test_the_adapters_of_two_stages_are_both_merged(two_stages, tmp_path):
    encoder = load_encoder(two_stages[1])
    expected = encoder.encode(SHORT)
    export_llama(encoder, tmp_path / "exported")
    assert np.abs(embed_with_transformers(tmp_path / "exported", SHORT) - expected).max() <= 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=lambda t: f"base {t}")
def test_transformers_loads_an_exported_folder_in_the_dtype_it_was_written_in(
    stored, dtype, checkpoint, tmp_path
):
    export_llama(trained_encoder(checkpoint(dtype=stored), dtype=dtype), tmp_path / "exported")
    assert AutoModel.from_pretrained(tmp_path / "exported", dtype="auto").dtype == dtype


@pytest.mark.parametrize("template", [None, "<s> $A </s>", "$A </s>"])
def test_the_exported_tokenizer_puts_bos_first_and_nothing_after_the_memory_tokens(
    template, checkpoint, tmp_path
):
    encoder = trained_encoder(checkpoint(template=template))
    expected = encoder.encode(SHORT)
    export_llama(encoder, tmp_path / "exported")
    assert np.abs(embed_with_transformers(tmp_path / "exported", SHORT) - expected).max() <= 1e-4


@pytest.mark.parametrize("taken", ["<memory_2>", "<unused_310>"])
def test_a_tokenizer_that_has_such_a_token_already_is_refused(taken, checkpoint, tmp_path):
    folder = checkpoint(tokens=300)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([taken])
    tokenizer.save(str(folder / "tokenizer.json"))
    encoder = trained_encoder(folder)
    refused(lambda: export_llama(encoder, tmp_path / "exported"), str(folder), taken, "rename")
    assert not (tmp_path / "exported").exists()


# ---------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [[], ["merge"]], ids=["export.py", "model.py merge"])
def test_the_command_line_exports_once_and_then_refuses(command, two_stages, tmp_path, capsys):
    out = tmp_path / "deep" / "exported"
    arguments = [*command, str(two_stages[1]), str(out)]
    assert export.main(arguments) == 0
    assert str(out) in capsys.readouterr().out
    expected = load_encoder(two_stages[1]).encode(SHORT)
    assert np.abs(embed_with_transformers(out, SHORT) - expected).max() <= 1e-4
    assert export.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and str(out) in error and "exists" in error
    assert len(error.splitlines()) == 1


def test_the_command_line_reports_what_is_wrong_with_an_encoder(tiny, tmp_path, capsys):
    assert export.main([str(tmp_path / "none"), str(tmp_path / "out")]) == 2
    assert str(tmp_path / "none") in capsys.readouterr().err
    assert export.main([str(tiny), str(tmp_path / "out")]) == 2
    assert "encoder.json" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", [["export.py"], ["model.py", "merge"]], ids=" ".join)
def test_both_commands_export_the_same_files(command, two_stages, tmp_path):
    expected, found = tmp_path / "expected", tmp_path / "found"
    export_llama(load_encoder(two_stages[1]), expected)
    arguments = [*command, str(two_stages[1].resolve()), str(found)]
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True,
                          timeout=100)
    assert (done.returncode, done.stdout) == (0, f"wrote {found}\n"), done.stderr
    assert {path.name: path.read_bytes() for path in found.iterdir()} == {
        path.name: path.read_bytes() for path in expected.iterdir()}

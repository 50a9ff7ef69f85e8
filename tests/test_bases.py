"""The bases beside llama: what config.json says of them, sliding windows, missing tensors, and all
stages from the command line. Logits are in test_model.py, adapters in test_lora.py."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import OTHERS, STAGES, edit_json, embed_with_transformers, error_line, evaluate_main
from helpers import files, history, losses, refused, words
from safetensors.torch import load_file, save_file

import export
from model import BASES, EncoderConfig, load_encoder, load_llama, plain_encoder
from runtime.formats import read_llama_config


@pytest.fixture
def copy_of(tiny_of, tmp_path):
    """copy_of(kind, drop=[keys], **keys): a copy of the tiny checkpoint with an edited config."""

    def copy(kind: str, drop=(), **keys) -> Path:
        folder = shutil.copytree(tiny_of(kind), tmp_path / f"copy of {kind}")
        edit_json(folder / "config.json", drop, **keys)
        return folder

    return copy


# ---------------------------------------------------------------------------------------------
# config.json
# ---------------------------------------------------------------------------------------------


def test_the_bases_are_these():
    assert list(BASES) == ["llama", *OTHERS]


@pytest.mark.parametrize("kind, key, value", [
    ("qwen2", "use_sliding_window", True), ("qwen3", "use_sliding_window", True),
    ("qwen3", "attention_bias", True), ("mistral", "attention_bias", True),
    ("mistral", "layer_types", ["full_attention", "sliding_attention"]),
    ("qwen2", "layer_types", ["sliding_attention"]), ("qwen3", "layer_types", 5),
    ("mistral", "sliding_window", 0), ("mistral", "sliding_window", "many"),
    ("mistral", "sliding_window", False), ("qwen3", "head_dim", 7),
], ids=str)
def test_what_the_network_does_not_compute_is_refused_by_name(kind, key, value, copy_of):
    folder = copy_of(kind, **{key: value})
    seen = value[-1] if isinstance(value, list) else value
    refused(lambda: load_llama(folder), str(folder / "config.json"), key, str(seen))


def test_qwen3_has_heads_of_128_if_config_json_does_not_say(copy_of, tiny_of):
    config = read_llama_config(copy_of("qwen3", drop=["head_dim"]) / "config.json", BASES)
    assert config == read_llama_config(tiny_of("qwen3") / "config.json", BASES)
    assert config["head_dim"] == 128 != config["hidden_size"] // config["num_attention_heads"]


@pytest.mark.parametrize("kind, drop, keys, expected", [
    ("mistral", ["sliding_window"], {}, 4096), ("mistral", [], {"sliding_window": None}, None),
    ("mistral", [], {"sliding_window": 77}, 77),
    ("qwen2", ["use_sliding_window"], {"sliding_window": 77}, None),
    ("qwen3", [], {"use_sliding_window": False, "sliding_window": 77}, None),
    ("llama", [], {"sliding_window": 77}, None),
])
def test_the_sliding_window_is_that_of_transformers(
    kind, drop, keys, expected, copy_of, reference
):
    folder = copy_of(kind, drop, **keys)
    assert load_llama(folder).config.sliding_window == expected
    if kind != "llama":
        assert reference(folder).config.sliding_window == expected


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_up_to_the_window_transformers_computes_what_it_would_without_one(
    causal, copy_of, reference
):
    folder = copy_of("mistral", sliding_window=40, is_causal=causal)
    ids = torch.randint(320, (44,), generator=torch.Generator().manual_seed(1))
    llama, mistral, gaps = load_llama(folder), reference(folder), []
    with torch.no_grad():
        for n in (40, 44):
            ours = llama(llama.embed(ids[:n]), [n], causal)
            theirs = mistral.model(ids[None, :n]).last_hidden_state[0]
            gaps.append((ours - theirs).abs().max())
    assert gaps[0] <= 1e-4 and gaps[1] > 1e-2


# ---------------------------------------------------------------------------------------------
# Texts longer than the window
# ---------------------------------------------------------------------------------------------

ROOM = "--max-tokens", 30, "--micro-tokens", 160


@pytest.mark.parametrize("window, stage, flags, longest, memory", [
    (97, "ctkd", [], 96, 2), (97, "ctkd", ["--objective", "rc"], 96, 2),
    (31, "ucl", [*ROOM, "--memory-tokens", 2], 30, 2), (39, "ucl", ["--pooling", "mean"], 40, 0),
    (34, "scl", [*ROOM, "--document-tokens", 33, "--memory-tokens", 2], 33, 2),
])
def test_a_stage_refuses_texts_that_are_longer_than_the_window(
    window, stage, flags, longest, memory, copy_of, run, tmp_path, capsys
):
    folder = copy_of("mistral", sliding_window=window)
    arguments = ["--model", folder, "--steps", 1, *flags]
    before = files(folder)
    error_line(run("run", *arguments, stage=stage), capsys,
               f"{folder}/config.json: sliding_window={window} is shorter than a text of up to "
               f"{longest} tokens and its {memory} memory tokens; cut texts to {window - memory} "
               f"with --max-tokens")
    assert not (tmp_path / "run/metrics.jsonl").exists() and files(folder) == before
    edit_json(folder / "config.json", sliding_window=longest + memory)
    assert run("run", *arguments, stage=stage) == 0


def test_the_window_of_an_encoders_base_counts_in_the_next_stage(copy_of, run, tmp_path, capsys):
    folder = copy_of("mistral", sliding_window=98)
    assert run("one", "--model", folder, "--steps", 1, stage="ctkd") == 0
    flags = ["--model", tmp_path / "one", "--steps", 1, "--micro-tokens", 200]
    capsys.readouterr()
    error_line(run("two", *flags, "--max-tokens", 97, stage="ucl"), capsys, "sliding_window=98")
    assert run("two", *flags, "--max-tokens", 96, stage="ucl") == 0


def test_an_evaluation_refuses_texts_that_are_longer_than_the_window(copy_of, here, capsys):
    folder = copy_of("mistral", sliding_window=50)
    arguments = ["--task", "sts17", "--model", folder, "--method", "mean"]
    error_line(evaluate_main(*arguments), capsys, "sliding_window=50", "512", "--max-tokens")
    assert evaluate_main(*arguments, "--max-tokens", 50) == 0


@pytest.mark.parametrize("stage", ["ctkd", "ucl"])
def test_the_report_of_a_stage_reads_the_plain_base_within_the_window(
    stage, copy_of, argv, tmp_path, capsys
):
    folder = copy_of("mistral", sliding_window=98)
    flags = argv(stage, tmp_path / "run", "--model", folder, "--steps", 1, "--batch-size", 4)
    assert STAGES[stage].main(flags) == 0
    assert "untrained, " in capsys.readouterr().out


def test_a_text_that_python_reads_is_refused_too(copy_of):
    folder = copy_of("mistral", sliding_window=30)
    config = EncoderConfig(0, "mean", max_tokens=31)
    refused(lambda: plain_encoder(folder, config).encode(["a"]), "sliding_window=30")
    assert len(plain_encoder(folder, EncoderConfig(0, "mean", max_tokens=30)).encode(["a"])) == 1


# ---------------------------------------------------------------------------------------------
# From files to an export
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, part, count, first", [
    ("qwen2", "bias", 6, "model.layers.0.self_attn.k_proj.bias"),
    ("qwen3", "q_norm", 2, "model.layers.0.self_attn.q_norm.weight"),
])
def test_a_checkpoint_without_its_own_parts_is_one_clear_line(
    kind, part, count, first, copy_of, run, tmp_path, capsys
):
    folder = copy_of(kind)
    path = folder / "model.safetensors"
    save_file({n: t for n, t in load_file(path).items() if part not in n}, path)
    error_line(run("run", "--model", folder, stage="ctkd"), capsys,
               f"{folder}: {count} tensors are missing, the first is {first}")
    assert not (tmp_path / "run/metrics.jsonl").exists()


@pytest.mark.parametrize("kind, other, name", [
    ("qwen2", "llama", "self_attn.k_proj.bias"), ("qwen3", "mistral", "self_attn.k_norm.weight"),
])
def test_a_checkpoint_of_another_base_is_one_clear_line(
    kind, other, name, copy_of, run, capsys
):
    folder = copy_of(kind, model_type=other)
    error_line(run("run", "--model", folder, stage="ctkd"), capsys, folder, name, "no place for")


@pytest.mark.parametrize("kind, dtype", [*((kind, "float32") for kind in OTHERS),
                                         ("qwen2", "bfloat16"), ("qwen3", "bfloat16")])
def test_all_stages_train_an_encoder_that_is_exported(
    kind, dtype, tiny_of, texts, run, tmp_path
):
    base, before, place = tiny_of(kind), files(tiny_of(kind)), ["--dtype", dtype]
    first = ["--model", base, "--text", texts, "--steps", 2]
    assert run("one", *first, *place, stage="ctkd") == 0
    assert run("two", "--model", tmp_path / "one", "--steps", 2, *place, stage="ucl") == 0
    assert run("three", "--model", tmp_path / "two", "--steps", 1, *place, stage="scl") == 0
    assert history(tmp_path / "three") == ["ctkd", "ucl", "scl"] and files(base) == before
    assert all(np.isfinite(losses(tmp_path / name)).all() for name in ("one", "two", "three"))
    encoders = [load_encoder(tmp_path / name / "encoder") for name in ("one", "two", "three")]
    z = [encoder.encode(words(5, 1)) for encoder in encoders]
    assert all(np.abs(before - after).max() > 1e-4 for before, after in zip(z, z[1:]))
    assert encoders[-1].llama.config.model_type == kind
    assert export.main([str(tmp_path / "three"), str(tmp_path / "plain")]) == 0
    theirs = embed_with_transformers(tmp_path / "plain", words(5, 1), k=2)
    assert np.abs(theirs - z[-1]).max() <= 1e-4

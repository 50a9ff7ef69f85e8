"""runtime/formats.py, encoders.py: what is refused, in a line that names it; hashes of weights."""

import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from helpers import TEXT, K, edit_json, refused, trained_encoder, write_llama
from safetensors.torch import load_file, save_file

import lora
from lora import LoraConfig
from model import EncoderConfig, load_encoder, load_llama, save_encoder
from runtime.formats import read_llama_config

# ---------------------------------------------------------------------------------------------
# Weights
# ---------------------------------------------------------------------------------------------


def edit_tensors(file, edit):
    """damage(folder): `edit` the tensors of a file in it."""

    def damage(folder):
        tensors = load_file(folder / file)
        edit(tensors)
        save_file(tensors, folder / file, metadata={"format": "pt"})

    return damage


edit_weights = partial(edit_tensors, "model.safetensors")
edit_adapter = partial(edit_tensors, "adapter_model.safetensors")
edit_embeddings = partial(edit_tensors, "embeddings.safetensors")


def edit_keys(file, **new):
    """damage(folder): change keys of a JSON file in it."""
    return lambda folder: edit_json(folder / file, **new)


edit_lora = partial(edit_keys, "adapter_config.json")
edit_about = partial(edit_keys, "encoder.json")


def with_index(name):
    def damage(folder):
        shutil.copy(folder / "model.safetensors", folder.parent / "outside.safetensors")
        index = {"weight_map": {"model.norm.weight": name}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return damage


def cut(folder, size=-1000):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])


NORM, HEAD = "model.norm.weight", "lm_head.weight"
BAD_WEIGHTS = {
    "no file": (lambda f: (f / "model.safetensors").unlink(), ["model.safetensors", "missing"]),
    "cut off": (cut, ["model.safetensors", "damaged"]),
    "empty": (lambda f: cut(f, 0), ["model.safetensors", "damaged"]),
    "header cut off": (lambda f: cut(f, 60), ["model.safetensors", "damaged"]),
    "not safetensors": (
        lambda f: (f / "model.safetensors").write_bytes(b"version https://git-lfs.github.com"),
        ["model.safetensors", "damaged"],
    ),
    "a tensor missing": (edit_weights(lambda t: t.pop(NORM)), ["missing", NORM]),
    "an untied head missing": (edit_weights(lambda t: t.pop(HEAD)), ["missing", HEAD]),
    "a tensor too many": (
        edit_weights(lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.ones(1)})),
        ["model.safetensors", "model.layers.2.mlp.up_proj.weight"],
    ),
    "a bias": (
        edit_weights(lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)})),
        ["model.safetensors", "model.layers.0.self_attn.q_proj.bias"],
    ),
    "another shape": (
        edit_weights(lambda t: t.update({NORM: torch.ones(31)})),
        ["model.safetensors", NORM, "(31,)", "(32,)"],
    ),
    "index not JSON": (
        lambda f: (f / "model.safetensors.index.json").write_text("{"),
        ["model.safetensors.index.json", "JSON"],
    ),
    "index without weight_map": (
        lambda f: (f / "model.safetensors.index.json").write_text("{}"),
        ["model.safetensors.index.json", "weight_map"],
    ),
    **{
        f"index names {name}": (with_index(name), ["model.safetensors.index.json", repr(name)])
        for name in ("../outside.safetensors", "/etc/hostname", "/tmp/x.safetensors", "",
                     "sub/x.safetensors", "pytorch_model.bin", "..safetensors", "x.safetensors\n",
                     "a\\..\\b.safetensors")
    },
    "index names a file that is not there": (
        with_index("model-00002.safetensors"), ["model-00002.safetensors", "missing"]
    ),
}


@pytest.mark.parametrize("damage, fragments", BAD_WEIGHTS.values(), ids=BAD_WEIGHTS)
def test_bad_weights_are_refused_by_name(damage, fragments, tiny_copy):
    damage(tiny_copy)
    refused(lambda: load_llama(tiny_copy), str(tiny_copy), *fragments)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    folder = write_llama(tmp_path, shard="30KB")
    shards = sorted(folder.glob("*.safetensors"))
    tensors = load_file(shards[0])
    save_file({**tensors, **load_file(shards[1])}, shards[1])
    refused(lambda: load_llama(folder), shards[1].name, min(tensors))


# ---------------------------------------------------------------------------------------------
# config.json
# ---------------------------------------------------------------------------------------------

BAD_CONFIGS = {
    "model_type": "gemma", "hidden_act": "gelu", "attention_bias": True, "mlp_bias": True,
    "quantization_config": {"quant_method": "gptq"}, "vocab_size": "320", "hidden_size": None,
    "num_hidden_layers": 0, "num_attention_heads": -4, "intermediate_size": 48.5,
    "num_key_value_heads": 3, "head_dim": 7, "rms_norm_eps": "small",
    "rope_parameters": "linear",
}


@pytest.mark.parametrize("key, value", BAD_CONFIGS.items(), ids=BAD_CONFIGS)
def test_an_unsupported_value_in_config_json_is_refused_by_name(key, value, tiny_copy):
    edit_json(tiny_copy / "config.json", **{key: value})
    seen = [] if value is None else [str(value)]
    refused(lambda: load_llama(tiny_copy), str(tiny_copy / "config.json"), key, *seen)


@pytest.mark.parametrize("key", ["model_type", "vocab_size", "hidden_size", "intermediate_size",
                                 "num_hidden_layers", "num_attention_heads"])
def test_a_key_missing_from_config_json_is_named(key, tiny_copy):
    edit_json(tiny_copy / "config.json", drop=[key])
    refused(lambda: load_llama(tiny_copy), str(tiny_copy / "config.json"), key)


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}
BAD_ROPES = [
    ({"rope_type": "yarn", "factor": 4.0}, ["rope_type", "yarn"]),
    ({"type": "dynamic", "factor": 2.0}, ["rope_type", "dynamic"]),
    ({"rope_type": ["linear"]}, ["rope_type", "linear"]),
    ({"rope_type": "linear"}, ["factor", "None"]),
    ({"rope_type": "linear", "factor": 0}, ["factor=0"]),
    ({"rope_type": "llama3", **LLAMA3, "low_freq_factor": "one"}, ["low_freq_factor='one'"]),
    ({"rope_type": "default", "rope_theta": -1.0}, ["rope_theta=-1.0"]),
]


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("rope, fragments", BAD_ROPES, ids=lambda v: str(v)[:40])
def test_unsupported_rope_settings_are_named(rope, fragments, key, tiny_copy):
    edit_json(tiny_copy / "config.json", drop=["rope_parameters"], **{key: rope})
    refused(lambda: load_llama(tiny_copy), str(tiny_copy / "config.json"), *fragments)


@pytest.mark.parametrize("content, fragment", [
    (b"{", "not readable as JSON"), (b"", "not readable as JSON"), (b"\xff\xfe\x00", "JSON"),
    (b"[]", "list"), (b"null", "NoneType"), (None, "missing"),
], ids=["cut off", "empty", "binary", "a list", "null", "no file"])
def test_a_config_json_that_is_not_a_json_object_is_refused(content, fragment, tiny_copy):
    path = tiny_copy / "config.json"
    path.unlink() if content is None else path.write_bytes(content)
    refused(lambda: load_llama(tiny_copy), str(path), fragment)


def test_only_the_model_types_that_have_a_network_are_read(tiny_copy):
    path = tiny_copy / "config.json"
    edit_json(path, model_type="mistral")
    assert read_llama_config(path, ["llama", "mistral"])["model_type"] == "mistral"
    refused(lambda: read_llama_config(path, ["llama", "qwen2"]), str(path), "model_type='mistral'",
            "only 'llama', 'qwen2'")


# ---------------------------------------------------------------------------------------------
# Adapters
# ---------------------------------------------------------------------------------------------

SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture
def adapter(tiny, tmp_path):
    lora.save_adapter(trained_encoder(tiny).llama, LoraConfig(), tmp_path / "adapter", str(tiny))
    return tmp_path / "adapter"


FIRST = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
BAD_ADAPTERS = {
    "no folder": (shutil.rmtree, "FileNotFoundError"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "adapter_model"),
    "weights cut off": (
        lambda f: (f / "adapter_model.safetensors").write_bytes(b"12345"), "SafetensorError"
    ),
    "config not JSON": (lambda f: (f / "adapter_config.json").write_text("{"), "JSONDecodeError"),
    "config a list": (lambda f: (f / "adapter_config.json").write_text("[]"), "TypeError"),
    "no rank": (lambda f: edit_json(f / "adapter_config.json", drop=["r"]), "'r'"),
    "another rank": (edit_lora(r=8), FIRST),
    "a tensor missing": (edit_adapter(lambda t: t.pop(FIRST)), FIRST),
    "a tensor too many": (edit_adapter(lambda t: t.update(extra=torch.ones(1))), "extra"),
    "another shape": (edit_adapter(lambda t: t.update({FIRST: torch.ones(16, 47)})), FIRST),
    "a target too many": (edit_lora(target_modules=list(SEVEN)), "k_proj"),
    "targets as a pattern": (edit_lora(target_modules="all-linear"), FIRST),
    "dora": (edit_lora(use_dora=True), "use_dora=True"),
    "rslora": (edit_lora(use_rslora=True), "use_rslora=True"),
    "rank_pattern": (edit_lora(rank_pattern={"q_proj": 4}), "rank_pattern={'q_proj': 4}"),
    "alpha_pattern": (edit_lora(alpha_pattern={"q_proj": 4}), "alpha_pattern={'q_proj': 4}"),
    "modules_to_save": (edit_lora(modules_to_save=["lm_head"]), "modules_to_save=['lm_head']"),
    "rank zero": (edit_lora(r=0), "0"),
    "alpha is a word": (edit_lora(lora_alpha="many"), "many"),
}


@pytest.mark.parametrize("damage, fragment", BAD_ADAPTERS.values(), ids=BAD_ADAPTERS)
def test_a_bad_adapter_is_refused_by_name(damage, fragment, adapter, tiny):
    damage(adapter)
    refused(lambda: lora.load_adapter(load_llama(tiny), adapter), str(adapter), fragment)


def test_adapter_config_json_names_the_base_and_the_projections(adapter, tiny):
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny)
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (16, 32, 0.05)
    assert set(config["target_modules"]) == set(SEVEN) - {"k_proj"}


# ---------------------------------------------------------------------------------------------
# Encoder folders
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings, fragment", [
    ({"pooling": "max"}, "'max'"), ({"attention": "both"}, "'both'"),
    ({"num_memory_tokens": 0}, "num_memory_tokens=0"),
    ({"num_memory_tokens": 8, "pooling": "mean"}, "num_memory_tokens=8"),
    ({"num_memory_tokens": -1, "pooling": "mean"}, "num_memory_tokens=-1"),
    ({"max_tokens": 1}, "max_tokens=1 leaves no room"), ({"max_tokens": -9}, "max_tokens=-9"),
    ({"template": "query: "}, "must contain {text}"),
    ({"template": "{instruction}:"}, "must contain {text}"),
    ({"num_memory_tokens": 8, "pooling": "echo"}, "num_memory_tokens=8"),
])
def test_a_contradictory_encoder_config_is_refused(settings, fragment):
    refused(lambda: EncoderConfig(**settings), fragment)


def test_the_limit_of_a_text_leaves_the_memory_tokens_aside():
    config = EncoderConfig(num_memory_tokens=8, max_tokens=2)
    assert (config.num_memory_tokens, config.max_tokens) == (8, 2)


def as_format_1(folder, **settings):
    """Make an encoder folder say what format 1 said of it: max_tokens with the memory tokens."""
    about = json.loads((folder / "encoder.json").read_text())
    edit_json(folder / "encoder.json", format=1,
              max_tokens=about["max_tokens"] + about["num_memory_tokens"], **settings)


def test_an_encoder_of_format_1_is_cut_as_before_and_is_saved_in_format_2(two_stages, tmp_path):
    folder = shutil.copytree(two_stages[0], tmp_path / "encoder")
    new = load_encoder(folder)
    as_format_1(folder)
    assert json.loads((folder / "encoder.json").read_text())["max_tokens"] == 64 + K
    old = load_encoder(folder)
    assert old.config == new.config and old.config.max_tokens == 64
    texts = [TEXT, TEXT[:150], "short"]
    assert len(old.tokenizer.encode([TEXT])[0]) > 64 + K
    (ids, *_), _, cut = old.tokenize(texts)
    assert len(ids) == 64 and cut[0] and not cut[2]  # 64 + K with the memory tokens: as it was
    assert np.array_equal(old.encode(texts), new.encode(texts))
    save_encoder(old, tmp_path / "again")
    about = json.loads((tmp_path / "again/encoder.json").read_text())
    assert (about["format"], about["max_tokens"], about["num_memory_tokens"]) == (2, 64, K)
    assert load_encoder(tmp_path / "again").config == old.config


def test_the_limit_of_an_encoder_of_format_1_without_memory_tokens_is_the_same(tiny, tmp_path):
    config = EncoderConfig(0, "mean", max_tokens=30)
    save_encoder(trained_encoder(tiny, config), tmp_path / "encoder")
    edit_json(tmp_path / "encoder/encoder.json", format=1)
    assert load_encoder(tmp_path / "encoder").config == config


def test_a_saved_encoder_says_its_format(two_stages):
    assert json.loads((two_stages[1] / "encoder.json").read_text())["format"] == 2


def test_an_encoder_json_from_before_the_newer_keys_gets_their_defaults(two_stages, tmp_path):
    folder = shutil.copytree(two_stages[0], tmp_path / "encoder")
    edit_json(folder / "encoder.json", drop=["document_template", "kept_tokens"])
    assert load_encoder(folder).config == load_encoder(two_stages[0]).config


ABOUT, ROWS = "encoder.json", "embeddings.safetensors"
BAD_ENCODERS = {
    "no encoder.json": (lambda f: (f / ABOUT).unlink(), ABOUT, "missing"),
    "encoder.json cut off": (lambda f: (f / ABOUT).write_text("{"), ABOUT, "JSON"),
    "a newer format": (edit_about(format=3), ABOUT, "format=3, this version reads 1 and 2"),
    "no format": (lambda f: edit_json(f / ABOUT, drop=["format"]), ABOUT, "format=None"),
    "the format a word": (edit_about(format="2"), ABOUT, "format='2'"),
    "no room for a text": (edit_about(max_tokens=1), ABOUT, "max_tokens=1 leaves no room"),
    "format 1 without room": (edit_about(format=1, max_tokens=5), ABOUT, "max_tokens=1 leaves"),
    "format 1, K a word": (edit_about(format=1, num_memory_tokens="4"), ABOUT, "odd"),
    "format 1, no limit": (
        lambda f: (edit_about(format=1)(f), edit_json(f / ABOUT, drop=["max_tokens"])),
        ABOUT, "max_tokens"
    ),
    "no pooling": (lambda f: edit_json(f / ABOUT, drop=["pooling"]), ABOUT, "pooling"),
    "no base": (lambda f: edit_json(f / ABOUT, drop=["base"]), ABOUT, "base"),
    "base without revision": (edit_about(base={"name": "demo", "sha256": ""}), ABOUT, "revision"),
    "base without hash": (edit_about(base={"name": "demo", "revision": None}), ABOUT, "sha256"),
    "K is a word": (edit_about(num_memory_tokens="8"), ABOUT, ""),
    "unknown pooling": (edit_about(pooling="max"), "", "'max'"),
    "history of words": (edit_about(history=["ctkd"]), ABOUT, ""),
    "a stage outside": (edit_about(history=[{"stage": "../first"}]), ABOUT, "../first"),
    "a stage that is a number": (edit_about(history=[{"stage": 1}]), ABOUT, "1"),
    "a stage that is not there": (edit_about(history=[{"stage": "scl"}]), "scl", "adapter"),
    "another K": (edit_about(num_memory_tokens=5), ROWS, "(4, 32)"),
    "no embeddings": (lambda f: (f / ROWS).unlink(), ROWS, "missing"),
    "embeddings cut off": (lambda f: (f / ROWS).write_bytes(b"1234567890"), ROWS, "damaged"),
    "no memory tokens": (edit_embeddings(lambda t: t.pop("memory_tokens")), ROWS, "memory_tokens"),
    "a table of another size": (
        edit_embeddings(lambda t: t.update(embed_tokens=torch.ones(7, 32))), ROWS, "(7, 32)"
    ),
    "an unknown tensor": (edit_embeddings(lambda t: t.update(x=torch.ones(1))), ROWS, "x"),
    "a damaged adapter": (edit_keys("ctkd/adapter_config.json", r="many"), "ctkd", "many"),
}


@pytest.mark.parametrize("damage, file, fragment", BAD_ENCODERS.values(), ids=BAD_ENCODERS)
def test_a_bad_encoder_folder_is_refused_by_name(damage, file, fragment, two_stages, tmp_path):
    folder = shutil.copytree(two_stages[0], tmp_path / "encoder")
    damage(folder)
    refused(lambda: load_encoder(folder), file, fragment)

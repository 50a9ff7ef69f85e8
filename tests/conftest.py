"""Tiny random checkpoints, written by transformers, for all tests."""

import json
import os
import shutil
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach the network; see test_model.py for the hub
os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

torch.set_num_threads(1)
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

TEXT = """The quick brown fox jumps over the lazy dog. A model reads a text from left to right, and
an encoder reads the whole of it at once. Memory tokens stand at the end; their hidden states are
the embedding of the text. What is learnt in one place is of use in another place as well."""

TINY = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "bos_token_id": 1, "eos_token_id": 2, "rms_norm_eps": 1e-5,
}


def write_tokenizer(folder: Path, size: int = 320, template: str | None = "<s> $A"):
    """A trained byte-level BPE of `size` ids; `template` is its post-processor."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=alphabet, show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    assert tokenizer.get_vocab_size() == size
    if template:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))


def write_llama(folder: Path, seed=0, shard="1GB", dtype=torch.float32, **settings) -> Path:
    """A random LlamaForCausalLM of the given config settings, all weights of useful size."""
    config = transformers.LlamaConfig(**{**TINY, **settings})
    model = transformers.LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        noise = torch.randn(weight.shape, generator=generator)
        spread = 0.3 if weight.dim() == 1 else weight.shape[-1] ** -0.5
        weight.data = noise * spread + (1.0 if weight.dim() == 1 else 0.0)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


def edit_json(path: Path, drop=(), **new):
    """Change keys of the JSON object in a file."""
    value = {key: old for key, old in json.loads(path.read_text()).items() if key not in drop}
    path.write_text(json.dumps({**value, **new}))


@pytest.fixture
def checkpoint(tmp_path):
    """Make a checkpoint folder: checkpoint(name, tokens=..., template=..., **config settings)."""

    def make(name="llama", tokens=320, template="<s> $A", **settings) -> Path:
        folder = write_llama(tmp_path / name, **settings)
        write_tokenizer(folder, tokens, template)
        return folder

    return make


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """The checkpoint of TINY with its tokenizer; read only."""
    folder = write_llama(tmp_path_factory.mktemp("session") / "tiny")
    write_tokenizer(folder)
    return folder


@pytest.fixture
def tiny_copy(tiny, tmp_path) -> Path:
    """A copy of `tiny` that a test may damage."""
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


@pytest.fixture(scope="session")
def reference():
    """reference(folder): the same checkpoint in transformers, float32."""

    def load(folder: Path):
        model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return model.eval()

    return load

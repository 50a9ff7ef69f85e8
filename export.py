"""Write a trained encoder as a plain Hugging Face folder, for tools that do not know this code.

    python export.py ENCODER OUT                 a LlamaModel (or Qwen2Model, ..., as its base is)
                                                 with its adapters merged, in float32
    python export.py runs/llama2-scl OUT --dtype bfloat16
    python model.py merge ENCODER OUT            the same, under its older name

The K memory tokens become special tokens of the tokenizer with the ids V..V+K-1. A reader appends
them to a text, attends as the encoder does and averages the K last hidden states (docs/runs.md).
"""

import argparse
import json
import sys
from pathlib import Path

import tokenizers
import torch
from tokenizers.processors import TemplateProcessing

from lora import merge_lora
from model import Encoder, load_encoder
from runtime.errors import UserError, run_command
from runtime.files import read_json, write_folder
from runtime.formats import encoder_of, write_tensors
from runtime.hub import find_model


@torch.no_grad()
def export_llama(encoder: Encoder, folder: str | Path):
    """Write config.json, model.safetensors and the tokenizer of a plain LlamaModel, V + K rows.

    Modifies the encoder: its adapters are merged in place.
    """
    if kept := encoder.config.kept_tokens:
        raise UserError(f"kept_tokens={kept}: a reader of the exported folder would average all "
                        f"{encoder.config.num_memory_tokens} memory tokens; export the encoder "
                        f"that they were chosen from")
    base = find_model(encoder.base["name"], encoder.base["revision"])
    rows = encoder.llama.config.vocab_size + encoder.config.num_memory_tokens
    config = read_json(base / "config.json")
    names = config.get("architectures") or [f"{config['model_type'].capitalize()}ForCausalLM"]
    config["architectures"] = [name.replace("ForCausalLM", "Model") for name in names]  # no head
    config.pop("dtype", None)  # the newer name of torch_dtype, which would win over it
    config |= {"vocab_size": rows, "torch_dtype": str(encoder.dtype).removeprefix("torch.")}
    tokenizer, settings = tokenizer_with_memory(encoder)
    merge_lora(encoder.llama)
    tensors = {name.removeprefix("model."): tensor for name, tensor in
               encoder.llama.state_dict().items() if name != "lm_head.weight"}
    tensors["embed_tokens.weight"] = torch.cat((encoder.table, encoder.memory_tokens))
    with write_folder(Path(folder)) as aside:
        write_tensors(aside / "model.safetensors", tensors, encoder.dtype)
        (aside / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (aside / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
        tokenizer.save(str(aside / "tokenizer.json"))


def tokenizer_with_memory(encoder: Encoder) -> tuple[tokenizers.Tokenizer, dict]:
    """The encoder's tokenizer with a token for every row of V + K, and its tokenizer_config.json.

    UserError if the tokenizer's ids have gaps, or if it has such tokens already.
    """
    v, k = encoder.llama.config.vocab_size, encoder.config.num_memory_tokens
    tokenizer = tokenizers.Tokenizer.from_str(encoder.tokenizer.backend.to_str())
    # every id of the table gets a token, in order: those that the tokenizer lacks, then the memory
    new = [f"<unused_{i}>" for i in range(tokenizer.get_vocab_size(), v)]
    new += [f"<memory_{i}>" for i in range(1, k + 1)]
    taken = [token for token in new if tokenizer.token_to_id(token) is not None]
    tokenizer.add_special_tokens(new)
    last = [tokenizer.id_to_token(v + k - 1)] if new else []
    if taken or tokenizer.get_vocab_size() != v + k or last != new[-1:]:
        raise UserError(f"{encoder.tokenizer.file}: its ids have gaps, or it has a token named "
                        f"{', '.join(taken or new[-1:])} already; rename that token")
    bos = encoder.tokenizer.bos
    names = [tokenizer.id_to_token(i) for i in bos]
    tokenizer.post_processor = TemplateProcessing(
        single=[*names, "$A"], special_tokens=list(zip(names, bos))
    )
    return tokenizer, {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": names[0]}


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("encoder", help="an encoder folder, or a run's")
    parser.add_argument("out", help="the folder to write; must not exist")
    parser.add_argument("--base", help="path of the base model, if it has moved")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    args = parser.parse_args(argv[1:] if argv[:1] == ["merge"] else argv)

    def run():
        if Path(args.out).exists():
            raise UserError(f"{args.out}: exists already; name a new folder")
        dtype = getattr(torch, args.dtype)
        export_llama(load_encoder(encoder_of(args.encoder), args.base, dtype), args.out)
        print(f"wrote {args.out}")

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())

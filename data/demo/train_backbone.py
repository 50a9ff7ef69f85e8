"""Train a tiny Llama, such as the demo's, on any text; one hour on two CPU cores is enough.

    python data/demo/train_backbone.py --text FILE... --out FOLDER                     from scratch
    python data/demo/train_backbone.py --text FILE... --out FOLDER --from data/demo/llama

FILE is a .txt with one text per line or a .jsonl with a field `text`, both may be gzipped. FOLDER
becomes a Hugging Face folder in bf16. Matrices are trained by Muon, the rest by AdamW. --bf16 takes
half the time on CPUs that multiply bf16 themselves. The learning rates are for a start from scratch
or a long continuation; a short one wants about a fifth of them.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the project's root: run by path

from data.corpora import read_texts  # noqa: E402
from data.tokenizer import Tokenizer  # noqa: E402
from model import BASES, Llama, LlamaConfig, load_llama  # noqa: E402
from runtime.errors import UserError, run_command  # noqa: E402
from runtime.files import read_json, write_folder  # noqa: E402
from runtime.formats import read_llama_config, write_tensors  # noqa: E402
from runtime.hub import find_model  # noqa: E402

SHAPE = {"vocab_size": 8192, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6,
         "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 64}
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
          "max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
          "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False,
          "bos_token_id": 1, "eos_token_id": 2}
WARMUP = 20  # steps: AdamW's first ones know little of the gradient's size


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum for matrices (Keller Jordan, kellerjordan.github.io/posts/muon).

    The step is U V' for a momentum U S V', so that all directions of a matrix learn equally fast.
    """

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        """Update the momenta with the present gradients, and the matrices with their steps."""
        for group in self.param_groups:
            for p in group["params"]:
                buffer = self.state[p].setdefault("buffer", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalise(p.grad.lerp(buffer, group["momentum"]))  # Nesterov's
                p.add_(update, alpha=-group["lr"] * max(1, p.shape[0] / p.shape[1]) ** 0.5)


def orthogonalise(g: Tensor, steps: int = 5) -> Tensor:
    """U V' of g = U S V', roughly (singular values 0.7 to 1.2), by a Newton-Schulz iteration."""
    tall = g.shape[0] > g.shape[1]
    x = (g.T if tall else g) / (g.norm() + 1e-7)
    for _ in range(steps):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if tall else x


def train_tokenizer(texts: list[str], vocab_size: int) -> tokenizers.Tokenizer:
    """A byte-level BPE that puts BOS before each text."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()  # all bytes, so that no text is unknown
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=["<unk>", "<s>", "</s>"],
                                  initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bpe.token_to_id("<s>"))]
    )
    return bpe


def new_llama(config: LlamaConfig, generator: torch.Generator) -> Llama:
    """A Llama with matrices from N(0, 0.02^2) and norms of one."""
    llama = Llama(config)
    for p in llama.parameters():
        nn.init.ones_(p) if p.ndim == 1 else nn.init.normal_(p, std=0.02, generator=generator)
    return llama


def batches(
    texts: list[np.ndarray], size: int, context: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """Endless batches (size, context + 1) of windows that are cut from all texts in one row.

    Each epoch cuts the row at other places and shuffles the windows.
    """
    row = torch.from_numpy(np.concatenate(texts))
    count = (len(row) - 1) // context - 1  # windows; the last one leaves room for the shift
    if count < size:
        raise UserError(f"{len(row):,} tokens of text are too few for --batch {size} --context "
                        f"{context}; give more text or a smaller batch")
    while True:
        shift = int(torch.randint(context, (), generator=generator))
        order = torch.randperm(count, generator=generator)
        for chosen in order[: count // size * size].split(size):
            yield torch.stack([row[s : s + context + 1] for s in chosen * context + shift]).long()


def train(llama: Llama, data: Iterator[Tensor], args: argparse.Namespace):
    """args.steps steps, or as many as args.minutes allow, of the language-model loss."""
    llama.requires_grad_(True).train()
    named = dict(llama.named_parameters())
    matrices = [n for n, p in named.items() if n.startswith("model.layers.") and p.ndim == 2]
    optimizers = [
        Muon([named.pop(n) for n in matrices], lr=args.muon_lr),
        torch.optim.AdamW(named.values(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    lengths, begin, recent = [args.context] * args.batch, time.monotonic(), []
    step, done = 0, 0.0
    while done < 1.0:
        # full rate, then down to zero over the last 35 % of the steps or of the minutes
        factor = min(1.0, (step + 1) / WARMUP, (1.0 - done) / 0.35)
        for optimizer, lr in zip(optimizers, (args.muon_lr, args.lr)):
            optimizer.param_groups[0]["lr"] = lr * factor

        windows = next(data)
        inputs, targets = windows[:, :-1].flatten(), windows[:, 1:].flatten()
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            hidden = llama(llama.embed(inputs), lengths, causal=True)
            logits = F.linear(hidden, llama.head)
        loss = F.cross_entropy(logits.float(), targets)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

        step += 1
        minutes = (time.monotonic() - begin) / 60
        done = max(step / args.steps, minutes / args.minutes)
        recent.append(loss.item())
        if not math.isfinite(recent[-1]):
            raise UserError(f"the loss is {recent[-1]} at step {step}; lower --muon-lr and --lr")
        if step % args.log_every == 0 or done >= 1.0:
            mean, recent = sum(recent) / len(recent), []
            print(f"step {step:6,}  loss {mean:.4f}  {minutes:6.1f} min", flush=True)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", nargs="+", required=True, metavar="FILE")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--from", dest="start", metavar="FOLDER", help="a Llama to continue from")
    parser.add_argument("--batch", type=int, default=16, help="windows per step")
    parser.add_argument("--context", type=int, default=256, help="tokens per window")
    parser.add_argument("--steps", type=int, default=4500)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop by then")
    parser.add_argument("--muon-lr", type=float, default=0.01, help="of the matrices")
    parser.add_argument("--lr", type=float, default=3e-3, help="of embeddings and norms (AdamW)")
    parser.add_argument("--bf16", action="store_true", help="matrix products in bf16")
    parser.add_argument("--log-every", type=int, default=50, help="steps that a line averages")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    shape = parser.add_argument_group("shape of a new Llama; --from has its own")
    for key, value in SHAPE.items():
        shape.add_argument("--" + key.replace("_", "-"), type=int, default=value)
    args = parser.parse_args(argv)
    return run_command(lambda: run(args))


def run(args: argparse.Namespace):
    """From texts to a model folder, which is complete or not there."""
    if min(args.batch, args.context, args.steps, args.minutes, args.log_every, args.threads) <= 0:
        raise UserError("--batch, --context, --steps, --minutes, --log-every and --threads must "
                        "be above zero")
    if args.out.exists():
        raise UserError(f"{args.out}: exists already; name a new folder")
    torch.set_num_threads(args.threads)
    generator = torch.Generator().manual_seed(args.seed)
    texts = [text for file in args.text for text in read_texts(file)]

    with write_folder(args.out) as folder:
        start = find_model(args.start) if args.start else folder
        if args.start:
            llama = load_llama(start)
        else:
            train_tokenizer(texts, args.vocab_size).save(str(folder / "tokenizer.json"))
            config = CONFIG | {key: getattr(args, key) for key in SHAPE}
            (folder / "config.json").write_text(json.dumps(config))
            config = LlamaConfig(**read_llama_config(folder / "config.json", BASES))
            llama = new_llama(config, generator)
        tokenizer = Tokenizer(start, llama.config.vocab_size, llama.config.bos_token_id)
        ids = tokenizer.encode(texts)
        print(f"{len(texts):,} texts, {sum(map(len, ids)):,} tokens; "
              f"{sum(p.numel() for p in llama.parameters()):,} parameters")

        train(llama, batches(ids, args.batch, args.context, generator), args)
        weights = dict(llama.named_parameters())
        write_tensors(folder / "model.safetensors", weights, torch.bfloat16)
        config = read_json(start / "config.json") | {"torch_dtype": "bfloat16"}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        tokenizer.backend.save(str(folder / "tokenizer.json"))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    sys.exit(main())

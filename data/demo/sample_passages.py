"""Sample the demo's passages: text that the tiny Llama in data/demo/llama makes up itself.

    python data/demo/sample_passages.py --check FILE... [--out data/demo/passages.jsonl.gz]

A passage is sampled from BOS alone and cut after its last full stop. With --check, the files being
the text that the Llama was trained on, every passage is removed in which a sentence of eight words
or more stands word for word in that text: the demo then carries no copied sentence. The output is
the same byte for byte for the same Llama, --seed, --threads and version of PyTorch.

The text is invented: names and numbers in it mean nothing.
"""

import argparse
import gzip
import json
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the project's root: run by path

from data.corpora import read_texts  # noqa: E402
from data.tokenizer import Tokenizer  # noqa: E402
from model import Llama, load_llama, rotate  # noqa: E402
from runtime.errors import UserError, run_command  # noqa: E402
from runtime.hub import find_model  # noqa: E402

SHINGLE = 8  # words; a copied sentence has at least as many
COPIED = "has a sentence of the training text"
LENGTHS = range(96, 225)  # tokens of a passage, BOS included
# A full stop after three small letters, two digits or a bracket: none of "U.S.", "Dr.", "St. Paul".
FULL_STOP = re.compile(r"(?:[a-z]{3}|\d\d|[\")])\.[\")]*(?=\s|$)")
COARSE = re.compile(r"porn|fuck|shit|nazi|rape[ds]?\b|nigger|whore|slut", re.IGNORECASE)
ODD_CHARACTER = re.compile(r"[^ -~\u00a1-\u00ac\u00ae-\u024f\u2010-\u2027]")  # not Latin text


# ---------------------------------------------------------------------------------------------
# Sampling with a key-value cache. B: passages at once, T: positions, H: heads, h: head_dim
# ---------------------------------------------------------------------------------------------


class CachedLlama:
    """Next-token logits of B equally long sequences, one position per call."""

    def __init__(self, llama: Llama, batch: int, length: int):
        c = llama.config
        self.llama, self.t = llama, 0
        self.cos, self.sin = llama.rotary_table([length], llama.head)  # (T, 1, h)
        shape = (c.num_hidden_layers, batch, c.num_key_value_heads, length, c.head_dim)
        self.keys, self.values = llama.head.new_empty(shape), llama.head.new_empty(shape)

    def step(self, ids: Tensor) -> Tensor:
        """ids (B,) at position t -> logits (B, V) for position t + 1."""
        x, t = self.llama.embed(ids), self.t
        for block, keys, values in zip(self.llama.model.layers, self.keys, self.values):
            attention, normed = block.self_attn, block.input_layernorm(x)
            heads = (-1, attention.head_dim)
            q = rotate(attention.q_proj(normed).unflatten(-1, heads), self.cos[t], self.sin[t])
            k = rotate(attention.k_proj(normed).unflatten(-1, heads), self.cos[t], self.sin[t])
            keys[:, :, t], values[:, :, t] = k, attention.v_proj(normed).unflatten(-1, heads)
            past = keys[:, :, : t + 1], values[:, :, : t + 1]
            mixed = F.scaled_dot_product_attention(q.unsqueeze(2), *past, enable_gqa=True)
            x = x + attention.o_proj(mixed.flatten(1))  # from (B, H, 1, h)
            x = x + block.mlp(block.post_attention_layernorm(x), adapters=False)
        self.t += 1
        return F.linear(self.llama.model.norm(x), self.llama.head)


def nucleus(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """One id per row of logits (B, V), from the likeliest ids that make up the share top_p.

    At most 512 ids are looked at: sorting the whole vocabulary would cost as much as the model.
    """
    logits = logits / temperature
    top, ids = logits.topk(min(512, logits.shape[-1]))
    p = (top - logits.logsumexp(-1, keepdim=True)).exp()
    p[p.cumsum(-1) - p >= top_p] = 0.0  # the first id is always kept
    return ids.gather(-1, torch.multinomial(p, 1, generator=generator)).squeeze(-1)


@torch.inference_mode()
def sample(
    llama: Llama, bos: list[int], batch: int, length: int, **nucleus_settings
) -> np.ndarray:
    """`batch` rows of `length` ids that follow BOS, whatever ends in between."""
    cached = CachedLlama(llama, batch, len(bos) + length)
    for token in bos:
        logits = cached.step(torch.full((batch,), token))
    rows = [nucleus(logits, **nucleus_settings)]
    while len(rows) < length:
        rows.append(nucleus(cached.step(rows[-1]), **nucleus_settings))
    return torch.stack(rows, dim=1).numpy()


# ---------------------------------------------------------------------------------------------
# From sampled ids to a passage
# ---------------------------------------------------------------------------------------------


def passage(ids: np.ndarray, tokenizer: Tokenizer) -> str | None:
    """The readable part of sampled ids: up to the next BOS, on one line, to the last full stop."""
    special = [i for i, t in tokenizer.backend.get_added_tokens_decoder().items() if t.special]
    ends = np.flatnonzero(np.isin(ids, special))
    text = " ".join(tokenizer.decode(ids[: ends[0]] if len(ends) else ids).split())
    stops = [match.end() for match in FULL_STOP.finditer(text)]
    return text[: stops[-1]] if stops else None


def problem(text: str | None, tokenizer: Tokenizer) -> str | None:
    """Why a passage is not kept, or None if it is fine."""
    if text is None or len(tokenizer.encode([text])[0]) not in LENGTHS:
        return "too short or too long"
    if ODD_CHARACTER.search(text):
        return "not in Latin letters"
    words = text.split()
    sixes = Counter(zip(*(words[i:] for i in range(6))))
    if max(sixes.values()) > 3:
        return "repeats itself"
    return None


# ---------------------------------------------------------------------------------------------
# The check against the text that the Llama was trained on
# ---------------------------------------------------------------------------------------------


def normal_words(text: str) -> list[str]:
    """The words in small letters, without punctuation: quotes and brackets hide no copy."""
    return re.findall(r"\w+", text.lower())


def shingle_hashes(words: list[str]) -> np.ndarray:
    """One 64-bit hash for each run of SHINGLE words."""
    hashes = np.fromiter(map(hash, words), np.int64, len(words)).view(np.uint64)
    runs = np.zeros(max(0, len(words) - SHINGLE + 1), np.uint64)
    for i in range(SHINGLE):
        runs = runs * np.uint64(0x9E3779B97F4A7C15) + hashes[i : i + len(runs)]  # modulo 2^64
    return runs


class TrainingText:
    """Finds sentences of SHINGLE words or more in a text of many million words.

    A sentence can only stand there if all its shingles do, which a sorted array of hashes tells at
    once; the few sentences that pass are then searched for in the text itself.
    """

    def __init__(self, files: list[str]):
        texts, hashes = [], []
        for file in files:
            for text in tqdm(read_texts(file), f"reading {Path(file).name}", unit="text"):
                words = normal_words(text)
                texts.append(f" {' '.join(words)} ")
                hashes.append(shingle_hashes(words))
        self.text = "\n".join(texts)
        self.shingles = np.unique(np.concatenate(hashes))

    def has_sentence_of(self, passage: str) -> bool:
        """Whether a sentence of SHINGLE words or more stands word for word in the text."""
        # cut at every stop, and at sure ones only: "Dr. Brown" must not hide a copied sentence
        stops = [0, *(match.end() for match in FULL_STOP.finditer(passage)), len(passage)]
        sentences = [passage[a:b] for a, b in zip(stops, stops[1:])]
        for sentence in [*sentences, *re.split(r"[.!?][\")']*\s+", passage)]:
            words = normal_words(sentence)
            if len(words) >= SHINGLE and self.has_shingles(shingle_hashes(words)):
                if f" {' '.join(words)} " in self.text:
                    return True
        return False

    def has_shingles(self, hashes: np.ndarray) -> bool:
        """Whether all of `hashes` are among the text's."""
        first, last = (np.searchsorted(self.shingles, hashes, side) for side in ("left", "right"))
        return bool((first < last).all())


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llama", default="demo", help="`demo` or the folder of another Llama")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "passages.jsonl.gz")
    parser.add_argument("--check", nargs="+", default=[], metavar="FILE",
                        help="text the Llama was trained on: .txt or .jsonl, also .gz")
    parser.add_argument("--count", type=int, default=4000, help="passages to sample")
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--batch", type=int, default=256, help="passages sampled at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    return run_command(lambda: write_passages(args))


def write_passages(args: argparse.Namespace):
    """Sample until args.count passages are good, then write them in one go."""
    if min(args.count, args.batch, args.threads) < 1 or args.temperature <= 0 or args.top_p <= 0:
        raise UserError("--count, --batch, --threads, --temperature and --top-p must be above zero")
    torch.set_num_threads(args.threads)
    llama = load_llama(args.llama)
    c = llama.config
    tokenizer = Tokenizer(find_model(args.llama), c.vocab_size, c.bos_token_id)
    training_text = TrainingText(args.check) if args.check else None
    settings = {"temperature": args.temperature, "top_p": args.top_p,
                "generator": torch.Generator().manual_seed(args.seed)}
    length = LENGTHS[-1] - len(tokenizer.bos)

    kept, tokens, removed = [], 0, Counter()
    with tqdm(desc="sampling", total=args.count, unit="passage") as bar:
        while len(kept) < args.count:
            for ids in sample(llama, tokenizer.bos, args.batch, length, **settings):
                text = passage(ids, tokenizer)
                if why := problem(text, tokenizer):
                    removed[why] += 1
                elif len(kept) < args.count:
                    kept.append(text)
                    tokens += len(tokenizer.encode([text])[0])
            bar.update(len(kept) - bar.n)
            if sum(removed.values()) > 20 * len(kept) + 1000:
                raise UserError(f"{args.llama}: not one sample in twenty is readable; train it "
                                f"longer or lower --temperature")

    sampled = len(kept)
    for why, is_bad in ((COPIED, training_text and training_text.has_sentence_of),
                        ("coarse words", COARSE.search)):
        good = [text for text in kept if not (is_bad and is_bad(text))]
        removed[why], kept = len(kept) - len(good), good
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in kept)
    args.out.write_bytes(gzip.compress(lines.encode("utf-8"), mtime=0))
    for why in [*sorted(removed.keys() - {COPIED}), *([COPIED] if args.check else [])]:
        print(f"removed {removed[why]:5,}: {why}")
    print(f"wrote {len(kept):,} passages, {tokens / sampled:.1f} tokens each, to {args.out} "
          f"({args.out.stat().st_size:,} bytes)")


if __name__ == "__main__":
    sys.exit(main())

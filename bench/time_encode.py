"""Encoding, timed side by side: this project, sentence-transformers and transformers.

    python bench/time_encode.py --dtype bfloat16 --threads 2
    python bench/time_encode.py --shape 134m --dtype bfloat16 --texts 500
    python bench/time_encode.py --shape 7b --dtype bfloat16 --device cuda

Timed from texts, of --lengths tokens of the bundled passages, to the mean of a causal Llama's
states; at most 512 tokens with BOS. SDPA, and the same weights, dtype and threads for all.

ours                   plain_encoder(...).encode, no padding
sentence-transformers  Transformer and Pooling, its own sorting (by characters); texts per batch:
                       --batch-tokens / mean length
transformers           LlamaModel, texts sorted by length, padded on the right (which causal
                       attention needs no mask for); a batch with its padding fills --batch-tokens

The others must get our ids, and our embeddings: fp32 to 1e-4, bf16 to a cosine of 0.999. Time
includes the tokenizer; real tokens are those of the texts with BOS, without padding. Turns, seconds
and peak as in bench/harness.py; the check is the warm-up, and the peak includes the texts.
"""

import json
import sys
from pathlib import Path

import harness
import numpy as np
import torch
from harness import Implementation, whole
from torch.nn.utils.rnn import pad_sequence

from data.corpora import read_texts
from data.tokenizer import Tokenizer
from measures import unit
from model import PLAIN, plain_encoder
from runtime.errors import UserError
from runtime.formats import read_llama_config
from runtime.hub import find_model

LONGEST = 512  # tokens of a text, BOS counted


class Encoding(Implementation):
    """What the three share; they define `build()` and `encode(texts)`."""

    def __init__(self, args):
        self.texts = json.loads(Path(args.texts).read_text())
        self.dtype = getattr(torch, args.dtype)
        super().__init__(args)

    def measure(self, turn: int) -> dict:
        clock = harness.now(self.args.device)
        self.rows = self.encode(self.texts)
        return {"seconds": harness.now(self.args.device) - clock}

    def check(self) -> dict:
        """A turn, whose embeddings are saved to a file."""
        found, file = self.measure(0), f"{self.args.scratch}/{type(self).__name__}.npy"
        np.save(file, self.rows)
        return {**found, "file": file}

    def check_ids(self, theirs: list[list[int]]):
        """UserError unless a library's ids of the first texts equal ours, with BOS and cut."""
        ours = tokens_of(self.args.folder, self.texts[: len(theirs)])
        for a, b in zip(ours, theirs):
            if a.tolist() != list(b):
                raise UserError(f"its ids {list(b)[:5]}... are not ours, {a.tolist()[:5]}...")


class OurEncoding(Encoding):
    ours = True

    def build(self):
        self.encoder = plain_encoder(self.args.folder, PLAIN, None, self.dtype, self.args.device)

    def encode(self, texts: list[str]) -> np.ndarray:
        return self.encoder.encode(texts, batch_tokens=self.args.batch_tokens)


class SentenceTransformers(Encoding):
    imports = ("sentence_transformers", "transformers.models.llama.modeling_llama")

    def build(self):
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

        options = {"dtype": self.dtype, "attn_implementation": "sdpa"}
        llama = Transformer(self.args.folder, max_seq_length=LONGEST, model_kwargs=options)
        pooling = Pooling(llama.get_embedding_dimension(), "mean")
        self.model = SentenceTransformer(modules=[llama, pooling], device=self.args.device)
        ids = llama.tokenizer(self.texts[:50], truncation=True, max_length=LONGEST)["input_ids"]
        self.check_ids(ids)

    def encode(self, texts: list[str]) -> np.ndarray:
        return self.model.encode(texts, batch_size=self.args.batch_texts, show_progress_bar=False)


class Transformers(Encoding):
    imports = ("transformers.models.llama.modeling_llama",)

    def build(self):
        from transformers import AutoTokenizer, LlamaModel

        self.tokenizer = AutoTokenizer.from_pretrained(self.args.folder)
        self.model = LlamaModel.from_pretrained(
            self.args.folder, dtype=self.dtype, attn_implementation="sdpa"
        ).eval().to(self.args.device)
        self.check_ids(self.ids(self.texts[:50]))

    def ids(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, truncation=True, max_length=LONGEST)["input_ids"]

    @torch.inference_mode()
    def encode(self, texts: list[str]) -> np.ndarray:
        ids = [torch.tensor(i) for i in self.ids(texts)]
        out = np.empty((len(texts), self.model.config.hidden_size), dtype=np.float32)
        for batch in padded_batches([len(i) for i in ids], self.args.batch_tokens):
            padded = pad_sequence([ids[i] for i in batch], batch_first=True).to(self.args.device)
            lengths = torch.tensor([[len(ids[i])] for i in batch], device=self.args.device)
            states = self.model(padded, use_cache=False).last_hidden_state.float()
            padding = torch.arange(padded.shape[1], device=self.args.device) >= lengths
            out[batch] = (states.masked_fill_(padding[..., None], 0).sum(1) / lengths).cpu().numpy()
        return out


def padded_batches(lengths: list[int], budget: int) -> list[list[int]]:
    """Batches of text indices, longest first; longest x count is at most `budget` (or one text)."""
    batches, room = [], 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not room:
            batches.append([])
            room = max(1, budget // lengths[i])
        batches[-1].append(i)
        room -= 1
    return batches


def open_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a Llama's folder."""
    config = read_llama_config(Path(folder) / "config.json", ["llama"])
    return Tokenizer(Path(folder), config["vocab_size"], config["bos_token_id"])


def tokens_of(folder: str | Path, texts: list[str]) -> list[np.ndarray]:
    """The texts' ids as our encoder reads them: with BOS, and cut."""
    return open_tokenizer(folder).read(texts, "{text}", LONGEST).ids


def sample_texts(args) -> list[str]:
    """--texts texts of --lengths tokens each, cut from the bundled passages."""
    tokenizer, (low, high) = open_tokenizer(find_model("demo")), args.lengths
    row = np.concatenate([ids[1:] for ids in tokenizer.encode(read_texts("demo"))])
    random = np.random.default_rng(args.seed)
    lengths = random.integers(low, high + 1, args.texts)
    starts = random.integers(0, len(row) - high - 1, args.texts)
    return [tokenizer.decode(row[i : i + n - 1]) for i, n in zip(starts, lengths)]


def check_rows(first: dict[str, dict], args) -> dict[str, str]:
    """Label -> how close its embeddings are to ours; UserError if they are not close enough."""
    ours, *others = ((label, np.load(answer["file"])) for label, answer in first.items())
    words = {"ours": "-"}
    for label, rows in others:
        off = float(np.abs(ours[1] - rows).max())
        cosine = float((unit(ours[1]) * unit(rows)).sum(axis=1).min())
        words[label] = f"off by {off:.1e}, cosine {cosine:.6f}"
        print(f"{label}: embeddings {words[label]}", flush=True)
        if not (off <= 1e-4 if args.dtype == "float32" else cosine >= 0.999):
            raise UserError(f"{label}: its embeddings are not ours ({words[label]})")
    return words


def bench(args):
    """Let the three take turns; yields results and the table."""
    texts, args.texts = sample_texts(args), f"{args.scratch}/texts.json"
    Path(args.texts).write_text(json.dumps(texts))
    args.folder = harness.write_folder(args)
    lengths = [len(ids) for ids in tokens_of(args.folder, texts)]
    tokens = sum(lengths)
    args.batch_texts = max(1, round(args.batch_tokens * len(texts) / tokens))
    padded = sum(len(b) * lengths[b[0]] for b in padded_batches(lengths, args.batch_tokens))
    print(f"{args.shape}, {args.dtype}, {len(texts):,} texts, {tokens:,} tokens with BOS "
          f"({min(lengths)}-{max(lengths)} a text); batches of {args.batch_tokens} tokens, in "
          f"sentence-transformers {args.batch_texts} texts; padding in transformers "
          f"{padded / tokens - 1:.1%}", flush=True)
    kinds = {"ours": OurEncoding, "sentence-transformers": SentenceTransformers,
             "transformers": Transformers}
    found = harness.race(kinds, args, check_rows)
    rows = [[label, *timing.cells(found["ours"]), f"{len(texts) / timing.median:,.1f}",
             f"{tokens / timing.median:,.0f}", timing.agreement]
            for label, timing in found.items()]
    titles = ("encoding", *harness.TIMES, "texts/s", "real tokens/s", "beside ours")
    yield {"tokens": tokens, "timings": found}, harness.table(titles, rows)


def parse():
    """Parse the command line."""
    parser = harness.new_parser(__doc__, shape="7m", dtype="float32", device="cpu", threads=[1],
                                turns=5, warm_up=0)
    add = parser.add_argument
    add("--texts", type=whole(), default=5000, help="how many")
    add("--lengths", type=whole(2), nargs=2, default=[20, 400], metavar=("LOW", "HIGH"),
        help="tokens of a text with BOS")
    add("--batch-tokens", type=whole(), default=4096, help="tokens of a forward pass")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(harness.main(__file__, parse, bench, "transformers", "sentence-transformers",
                          "tokenizers"))

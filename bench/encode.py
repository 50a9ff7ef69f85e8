"""Encoding, timed side by side: this project and the libraries that it stands in for.

    python bench/encode.py --dtype bfloat16 --threads 2
    python bench/encode.py --shape 134m --dtype bfloat16 --texts 500 --memory
    python bench/encode.py --shape 7b --dtype bfloat16 --device cuda
    python bench/encode.py --part tokenize
    python bench/encode.py --part start

speed     texts (SciFact's documents if --data-dir has them, else --lengths tokens of the embedded
          passages) to the mean of a causal Llama's states, at most 512 tokens with BOS:
          ours                   plain_encoder(...).encode, no padding
          sentence-transformers  Transformer and Pooling, its own sorting (by characters); texts a
                                 batch: --batch-tokens by the mean length
          transformers           LlamaModel, texts sorted by length, padded on the right (which
                                 causal attention needs no mask for); a batch with its padding
                                 fills --batch-tokens
          The others' embeddings must be ours: fp32 to 1e-4, bf16 cosine at least 0.999. Time
          includes the tokenizer. SDPA, the same weights, dtype and threads for all. With --memory
          the embedding is the mean of 8 memory tokens (random rows) behind each text, attention
          bidirectional; sentence-transformers cannot do that and is left out. Real tokens are the
          texts' with BOS: neither padding nor memory tokens.
tokenize  a million sentences to token ids; they are those of the embedded passages, repeated in
          shuffled order (the library remembers words, not texts):
          ours                   Tokenizer.encode: an int32 array a text, BOS before it
          tokenizers             encode_batch in chunks of as many texts, the ids kept as lists
          Ids must be equal. Bytes kept: resident memory after the first turn above that before
          it, by texts; beside it what the ids alone take at 4 bytes each.
start     evaluate.py on the embedded task and Llama, whole, and what its start is made of: each
          row is a fresh process that does what the row above does, and more. Files come from the
          system's cache.

Each implementation lives in a process of its own, so that its peak memory is its own, and waits on
its stdin while another one is timed; they take turns, the first turn of each is warm-up and not
counted. Peak: the highest resident memory (VmHWM; elsewhere than on Linux ru_maxrss), and how far
it is above that after the imports; the data are in it. CUDA: torch.cuda.max_memory_allocated.

On the CPU ours calls training.keep_freed_memory, as its commands do; the others are left as they
are, or call it too (--keep-memory-for-all).
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import zlib
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import numpy as np
import psutil
import tokenizers
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `evaluate` is the product's

import step

import evaluate
from bench import evaluate as sibling
from data import UserError
from data.corpora import read_texts
from data.tokenizer import CHUNK, Tokenizer
from model import PLAIN, EncoderConfig, Llama, find_device, find_model, plain_encoder, read_config
from training import keep_freed_memory

ROOT = Path(__file__).resolve().parents[1]
MEMORY = EncoderConfig()  # 8 memory tokens, bidirectional
LONGEST = PLAIN.max_tokens  # BOS and memory tokens counted, as in MEMORY
TEXTS = {"speed": 5000, "tokenize": 1_000_000}

# ---------------------------------------------------------------------------------------------
# speed: args.folder is a Llama for all three, args.texts_file a JSON list
# ---------------------------------------------------------------------------------------------


def keeps_memory(name: str, args) -> bool:
    """Whether the implementation calls keep_freed_memory."""
    return args.device == "cpu" and (name == "ours" or args.keep_memory_for_all)


class Contestant:
    imports = ()

    def __init__(self, args):
        self.args = args
        if keeps_memory(args.worker, args):
            keep_freed_memory()
        self.prepare()


class Encoding(Contestant):
    """What the three share; `build()` and `encode(texts)` are theirs."""

    memory_tokens = 0

    def prepare(self):
        self.texts = json.loads(Path(self.args.texts_file).read_text())
        self.dtype = getattr(torch, self.args.dtype)
        self.build()

    def measure(self) -> dict:
        clock = step.now(self.args.device)
        x = self.encode(self.texts)
        seconds = step.now(self.args.device) - clock
        np.save(Path(self.args.scratch) / f"{self.args.worker}.npy", x)
        return {"seconds": seconds}

    def check_ids(self, theirs: list[list[int]]):
        """UserError unless a library's ids of the first texts are ours, BOS and cut included."""
        ours = open_tokenizer(self.args.folder).encode(
            self.texts[: len(theirs)], LONGEST - self.memory_tokens)
        for a, b in zip(ours, theirs):
            if a.tolist() != list(b):
                raise UserError(f"{self.args.worker}: its ids {list(b)[:5]}... are not ours, "
                                f"{a.tolist()[:5]}...; does tokenizer.json put BOS, and only BOS, "
                                f"around a text?")


class OurEncoding(Encoding):
    config = PLAIN

    def build(self):
        self.encoder = plain_encoder(
            self.args.folder, self.config, dtype=self.dtype, device=self.args.device)

    def encode(self, texts: list[str]) -> np.ndarray:
        return self.encoder.encode(texts, batch_tokens=self.args.batch_tokens)


class OurMemory(OurEncoding):
    config, memory_tokens = MEMORY, MEMORY.num_memory_tokens

    def build(self):
        super().build()
        self.encoder.add_memory("normal", train_table=False)
        draw_memory(self.encoder.memory_tokens)


class SentenceTransformers(Encoding):
    imports = ("sentence_transformers", "transformers.models.llama.modeling_llama")

    def build(self):
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

        llama = Transformer(
            self.args.folder, max_seq_length=LONGEST,
            model_kwargs={"dtype": self.dtype, "attn_implementation": "sdpa"},
        )
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
        longest = LONGEST - self.memory_tokens
        return self.tokenizer(texts, truncation=True, max_length=longest)["input_ids"]

    @torch.inference_mode()
    def encode(self, texts: list[str]) -> np.ndarray:
        ids = [torch.tensor(i) for i in self.ids(texts)]
        read = [len(i) + self.memory_tokens for i in ids]
        out = np.empty((len(texts), self.model.config.hidden_size), dtype=np.float32)
        for batch in padded_batches(read, self.args.batch_tokens):
            lengths = torch.tensor([len(ids[i]) for i in batch])
            padded = torch.nn.utils.rnn.pad_sequence([ids[i] for i in batch], batch_first=True)
            z = self.embed(padded.to(self.args.device), lengths.to(self.args.device))
            out[batch] = z.cpu().numpy()
        return out

    def embed(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Padded ids (N, longest) -> means of the states (N, D) in fp32."""
        mask = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        states = self.model(ids, use_cache=False).last_hidden_state  # causal: no row sees padding
        return states.float().masked_fill_(~mask[..., None], 0).sum(1) / lengths[:, None]


class TransformersMemory(Transformers):
    memory_tokens = MEMORY.num_memory_tokens

    def build(self):
        super().build()
        memory = torch.empty(
            self.memory_tokens, self.model.config.hidden_size, device=self.args.device)
        draw_memory(memory)
        self.memory = memory.to(self.dtype)

    def embed(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Padded ids (N, longest) -> means of the memory states (N, D) in fp32."""
        x = self.model.embed_tokens(F.pad(ids, (0, self.memory_tokens)))
        rows = torch.arange(len(ids), device=ids.device)[:, None]
        places = lengths[:, None] + torch.arange(self.memory_tokens, device=ids.device)
        x[rows, places] = self.memory
        inside = torch.arange(x.shape[1], device=ids.device) < lengths[:, None] + self.memory_tokens
        mask = inside[:, None, None].expand(-1, 1, x.shape[1], -1)  # all see all
        states = self.model(inputs_embeds=x, attention_mask=mask, use_cache=False).last_hidden_state
        return states[rows, places].float().mean(1)


def draw_memory(rows: Tensor):
    """Fill the memory rows (K, D): the same values for all."""
    step.draw("memory_tokens", rows, rows.shape[1] ** -0.5)


def padded_batches(lengths: list[int], budget: int) -> list[list[int]]:
    """Indices of texts, longest first; longest times count is at most `budget` (or one text)."""
    batches, room = [], 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not room:
            batches.append([])
            room = max(1, budget // lengths[i])
        batches[-1].append(i)
        room -= 1
    return batches


def random_llama(shape: str, dtype: str, folder: Path):
    """Write a Llama of a shape of bench/step.py with random weights and the embedded tokenizer."""
    with torch.device("meta"):
        llama = Llama(step.SHAPES[shape]).to(getattr(torch, dtype))
    step.draw_base(llama.to_empty(device="cpu"), llama.config.num_hidden_layers)
    save_file(llama.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    about = asdict(replace(llama.config, bos_token_id=1))
    about |= {"rope_theta": about.pop("rope")["rope_theta"], "model_type": "llama",
              "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 2048}
    (folder / "config.json").write_text(json.dumps(about))
    (folder / "tokenizer.json").symlink_to(find_model("demo") / "tokenizer.json")


def open_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a Llama's folder."""
    config = read_config(Path(folder) / "config.json")
    return Tokenizer(Path(folder), config.vocab_size, config.bos_token_id)


def shared_folder(args) -> Path:
    """A Llama's folder that all three read: --model's files, and a plain tokenizer_config.json."""
    folder = Path(args.scratch) / "llama"
    folder.mkdir()
    if args.shape:
        random_llama(args.shape, args.dtype, folder)
    else:
        source = find_model(args.model).resolve()
        for file in [*source.glob("*.safetensors*"), source / "config.json",
                     source / "tokenizer.json"]:
            (folder / file.name).symlink_to(file)
    fast = {"tokenizer_class": "PreTrainedTokenizerFast",  # pad_token: any, padding is masked
            "pad_token": open_tokenizer(folder).backend.id_to_token(0)}
    (folder / "tokenizer_config.json").write_text(json.dumps(fast))
    return folder


def sample_texts(args) -> list[str]:
    """--texts texts: SciFact's documents, else --lengths tokens each of the embedded passages."""
    if found := sibling.scifact(args):
        return found[0]["documents"][: args.texts]
    tokenizer, (low, high) = open_tokenizer(find_model("demo")), args.lengths
    row = np.concatenate([ids[1:] for ids in tokenizer.encode(read_texts("demo"))])
    if high + 1 >= len(row):
        raise UserError(f"--lengths {low},{high}: the passages have {len(row):,} tokens")
    random = np.random.default_rng(args.seed)
    lengths = random.integers(low, high + 1, args.texts)
    starts = random.integers(0, len(row) - high - 1, args.texts)
    return [tokenizer.decode(row[i : i + n - 1]) for i, n in zip(starts, lengths)]


# ---------------------------------------------------------------------------------------------
# tokenize
# ---------------------------------------------------------------------------------------------


def sentences(args) -> list[str]:
    """--texts sentences: those of the embedded passages, in a new order each time around."""
    found = [s for text in read_texts("demo") for s in re.split(r"(?<=[.?!])\s+", text)]
    random, rounds = np.random.default_rng(args.seed), -(-args.texts // len(found))
    order = np.concatenate([random.permutation(len(found)) for _ in range(rounds)])
    return [found[i] for i in order[: args.texts]]


class Tokenizing(Contestant):
    """What the two share; `build()` and `encode(texts)` are theirs."""

    def prepare(self):
        self.texts = sentences(self.args)
        self.build()
        self.encode(self.texts[:CHUNK])  # starts the threads

    def measure(self) -> dict:
        process = psutil.Process()
        before, clock = process.memory_info().rss, time.perf_counter()
        kept = self.encode(self.texts)
        seconds, after = time.perf_counter() - clock, process.memory_info().rss
        tokens = crc = 0
        for ids in kept:
            ids = np.asarray(ids[self.added :], dtype=np.int32)
            tokens, crc = tokens + len(ids), zlib.crc32(ids, crc)
        return {"seconds": seconds, "kept_bytes": after - before, "tokens": tokens, "crc": crc,
                "ids_bytes": 4 * (tokens + self.added * len(kept))}


class OurTokenizing(Tokenizing):
    def build(self):
        self.tokenizer = open_tokenizer(find_model(self.args.model))
        self.added = len(self.tokenizer.bos)

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        return self.tokenizer.encode(texts)


class RawTokenizing(Tokenizing):
    def build(self):
        file = find_model(self.args.model) / "tokenizer.json"
        self.tokenizer, self.added = tokenizers.Tokenizer.from_file(str(file)), 0

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for i in range(0, len(texts), CHUNK) for encoding in
                self.tokenizer.encode_batch(texts[i : i + CHUNK], add_special_tokens=False)]


IMPLEMENTATIONS = {
    "encode": {"ours": OurEncoding, "sentence-transformers": SentenceTransformers,
               "transformers": Transformers},
    "memory": {"ours": OurMemory, "transformers": TransformersMemory},
    "tokenize": {"ours": OurTokenizing, "tokenizers": RawTokenizing},
}

# ---------------------------------------------------------------------------------------------
# The parts: results, and the lines of a table
# ---------------------------------------------------------------------------------------------


def check_rows(first: dict[str, dict], args: dict) -> dict[str, str]:
    """name -> how near its embeddings are to ours; UserError if they are not near enough."""
    load = lambda name: np.load(Path(args["scratch"]) / f"{name}.npy")  # noqa: E731
    ours, said = load("ours"), {"ours": "-"}
    for name in [name for name in first if name != "ours"]:
        theirs = load(name)
        off = float(np.abs(ours - theirs).max())
        cosine = float((evaluate.unit(ours) * evaluate.unit(theirs)).sum(axis=1).min())
        said[name] = f"off by {off:.1e}, cosine {cosine:.6f}"
        fine = off <= 1e-4 if args["dtype"] == "float32" else cosine >= 0.999
        if not fine:
            raise UserError(f"{name}: its embeddings are not ours ({said[name]})")
        print(f"agrees: {name}, embeddings off by at most {off:.1e}, lowest cosine {cosine:.6f}")
    return said


def check_tokens(first: dict[str, dict], args: dict) -> dict[str, str]:
    """name -> that its ids are ours; UserError if not."""
    for name, answer in first.items():
        if any(answer[key] != first["ours"][key] for key in ("tokens", "crc")):
            raise UserError(f"{name}: its {answer['tokens']:,} tokens are not ours, "
                            f"{first['ours']['tokens']:,}")
    return dict.fromkeys(first, "equal ids")


def race(job: str, args, check, **settings) -> dict[str, dict]:
    """sibling.take_turns of a job's implementations; says which of them keep freed memory."""
    names = IMPLEMENTATIONS[job]
    keep = ", ".join(name for name in names if keeps_memory(name, args)) or "none"
    if "MALLOC_MMAP_THRESHOLD_" in os.environ:  # which goes before
        keep = "as MALLOC_MMAP_THRESHOLD_ says"
    print(f"freed memory is kept by: {keep}", flush=True)
    return sibling.take_turns(__file__, job, names, {**vars(args), **settings}, check)


def bench_speed(args) -> tuple[dict, list[str]]:
    """Texts to embeddings."""
    job = "memory" if args.memory else "encode"
    folder, texts = shared_folder(args), sample_texts(args)
    k = IMPLEMENTATIONS[job]["ours"].memory_tokens
    lengths = [len(ids) for ids in open_tokenizer(folder).encode(texts, LONGEST - k)]
    tokens, batch_texts = sum(lengths), max(1, round(args.batch_tokens * len(texts) / sum(lengths)))
    read = [n + k for n in lengths]
    padded = sum(len(b) * max(read[i] for i in b) for b in padded_batches(read, args.batch_tokens))
    there = f", in sentence-transformers {batch_texts} texts" * (not k)
    print(f"{job}: {args.shape or args.model}, {args.dtype}, {len(texts):,} texts, {tokens:,} "
          f"tokens with BOS ({min(lengths)}-{max(lengths)} a text), {k} memory tokens a text; "
          f"batches of {args.batch_tokens} tokens{there}; padding in transformers "
          f"{padded / sum(read) - 1:.1%}")
    file = Path(args.scratch) / "texts.json"
    file.write_text(json.dumps(texts))
    found = race(job, args, check_rows, folder=str(folder), texts_file=str(file),
                 batch_texts=batch_texts)
    titles = ("encoding", "s, median (min-max)", "time / ours", "peak GiB (above imports)",
              "texts/s", "real tokens/s", "beside ours")
    lines = [f"| {' | '.join(titles)} |", "|---|" + "---:|" * 5 + "---|"]
    for name in found:
        middle = median(found[name]["seconds"])
        cells = [*sibling.time_cells(found, name), f"{len(texts) / middle:,.1f}",
                 f"{tokens / middle:,.0f}", found[name]["agreement"]]
        lines.append(f"| {' | '.join(cells)} |")
    return {"texts": len(texts), "tokens": tokens, "batch_texts": batch_texts, **found}, lines


def bench_tokenize(args) -> tuple[dict, list[str]]:
    """Sentences to token ids."""
    found = race("tokenize", args, check_tokens)
    tokens = found["ours"]["tokens"]
    print(f"tokenize: {args.model}, {args.texts:,} sentences, {tokens:,} tokens without BOS, "
          f"{len(set(sentences(args))):,} different sentences")
    titles = ("tokenizing", "s, median (min-max)", "time / ours", "peak GiB (above imports)",
              "sentences/s", "tokens/s", "bytes kept a sentence", "its ids alone", "beside ours")
    lines = [f"| {' | '.join(titles)} |", "|---|" + "---:|" * 7 + "---|"]
    for name, answer in found.items():
        middle = median(answer["seconds"])
        cells = [*sibling.time_cells(found, name), f"{args.texts / middle:,.0f}",
                 f"{tokens / middle:,.0f}", f"{answer['kept_bytes'] / args.texts:.1f}",
                 f"{answer['ids_bytes'] / args.texts:.1f}", answer["agreement"]]
        lines.append(f"| {' | '.join(cells)} |")
    return found, lines


def bench_start(args) -> tuple[dict, list[str]]:
    """A whole command, and fresh processes that do a part of it."""
    load = (f"import evaluate, torch; evaluate.plain_encoder('demo', dtype=torch.{args.dtype}, "
            f"device='{args.device}')")
    whole = ["evaluate.py", "--task", "demo-sts", "--model", "demo", "--force", "--results",
             f"{args.scratch}/results", "--device", args.device, "--dtype", args.dtype,
             "--threads", str(args.threads)]
    commands = {
        "python -c pass": ["-c", "pass"],
        "import torch": ["-c", "import torch"],
        "import evaluate": ["-c", "import evaluate"],
        "load the embedded Llama": ["-c", load],
        "evaluate.py --task demo-sts --model demo --force": whole,
    }
    env, seconds = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}, {n: [] for n in commands}
    for turn in range(args.repeats + 1):
        for name, command in commands.items():
            clock = time.perf_counter()
            done = subprocess.run([sys.executable, *command], cwd=ROOT, env=env,
                                  capture_output=True, text=True)
            seconds[name].append(time.perf_counter() - clock)
            if done.returncode:
                raise UserError(f"{name}: ended with code {done.returncode}\n{done.stderr}")
        print(f"start, round {turn} of {args.repeats} done", file=sys.stderr, flush=True)
    lines = ["| start | s, median (min-max) | beyond the row above |", "|---|---:|---:|"]
    before = 0.0
    for name, (_, *counted) in seconds.items():
        middle = median(counted)
        lines.append(f"| {name} | {middle:.3f} ({min(counted):.3f}-{max(counted):.3f}) | "
                     f"{middle - before:+.3f} |")
        before = middle
    return {"seconds": seconds}, lines


PARTS = {"speed": bench_speed, "tokenize": bench_tokenize, "start": bench_start}


def bench(args):
    """The part asked for: print its table, write the JSON."""
    cuda = find_device(args.device).type == "cuda"
    device, load = torch.cuda.get_device_name() if cuda else step.cpu_name(), os.getloadavg()
    versions = {p: version(p) for p in ("torch", "transformers", "sentence-transformers",
                                        "tokenizers", "numpy")}
    print(f"{device}, {args.threads} thread(s), load {load[0]:.1f}, {args.repeats} turns, "
          f"{versions}")
    results, lines = PARTS[args.part](args)
    print("\n" + "\n".join(lines))
    out = Path(args.out or f"bench/results/encode-{args.part}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    about = {"arguments": vars(args), "device": device, **versions, "load_before": load,
             "load_after": os.getloadavg()}
    out.write_text(json.dumps({**about, "results": results}, indent=1) + "\n")
    print(f"\nwritten to {out}")


def main() -> int:
    """The command line; returns the exit code."""
    if sys.argv[1:2] == ["--worker"]:
        sibling.worker(SimpleNamespace(**json.loads(sys.argv[2])), IMPLEMENTATIONS)
        return 0
    counts = lambda text: [int(t) for t in text.split(",")]  # noqa: E731
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--part", choices=list(PARTS), default="speed")
    add("--data-dir", help="speed: folder with SciFact (hub layout), for its documents")
    add("--model", default="demo", help="speed, tokenize: a Llama's folder or hub name; demo: the "
        "embedded")
    add("--shape", choices=["134m", "7b"], help="speed: random weights instead of --model")
    add("--dtype", choices=["float32", "bfloat16"], default="float32",
        help="speed, start")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="speed, start")
    add("--texts", type=int, help="how many; default: speed 5000, tokenize 1000000")
    add("--lengths", type=counts, default=[20, 400], metavar="LOW,HIGH",
        help="speed: tokens of a text with BOS, if it is cut from the passages; default 20,400")
    add("--batch-tokens", type=int, default=4096, help="speed: tokens of a forward pass")
    add("--memory", action="store_true", help="speed: memory tokens instead of the mean")
    add("--keep-memory-for-all", action="store_true", help="the others keep freed memory too")
    add("--threads", type=int, default=1)
    add("--repeats", type=int, default=5, help="counted turns of each")
    add("--seed", type=int, default=0)
    add("--out", help="default: bench/results/encode-PART.json")
    args = parser.parse_args()
    args.texts = TEXTS.get(args.part, 1) if args.texts is None else args.texts
    if min(args.repeats, args.threads, args.texts, args.batch_tokens, *args.lengths) < 1:
        parser.error("the numbers must be above 0")
    if len(args.lengths) != 2 or args.lengths[0] > args.lengths[1]:
        parser.error("--lengths must be LOW,HIGH")
    if args.keep_memory_for_all and args.device != "cpu":
        parser.error("--keep-memory-for-all is about the CPU's memory")
    try:
        with tempfile.TemporaryDirectory() as args.scratch:
            bench(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

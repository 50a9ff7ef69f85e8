"""One step of stage 3 (scl): its peak memory, and its speed beside sentence-transformers.

    python bench/contrastive.py --part memory
    python bench/contrastive.py --part memory --shape 134m --dtype bfloat16
    python bench/contrastive.py --part speed --dtype float32
    python bench/contrastive.py --part speed --dtype bfloat16 --lengths equal

A step is forward, backward, clip and AdamW (fused) on rows of a query, a positive and a negative,
all of random token ids; new ones each turn, equal for all contestants. A positive begins like its
query. LoRA r 16, alpha 32 on all projections but k_proj, dropout 0, temperature 0.05; the adapters
start from equal values, B small but not zero, so that the first gradient has all parts.

memory   our step with --micro-tokens, for each of --rows in a fresh process, with 8 memory tokens
         and bidirectional attention. The target: peaks within 10 %.
speed    causal attention and the mean of all tokens with BOS, on the same weights:
         ours                   contrastive.batch_gradient, --micro-tokens at a time
         ours, one micro-batch  the same without recomputation, if memory allows
         sentence-transformers  CachedMultipleNegativesRankingLoss, adapters by add_adapter (PEFT)
             same tokens        as many texts a mini-batch as --micro-tokens holds on average
             best mini-batch    the fastest of that and --mini-batch, tried beforehand in a
                                process of its own
             sorted rows        rows sorted by their longest text, which the loss does not see,
                                before they are made a batch; again the fastest mini-batch
         The others must have our loss and norm of the gradient in the first step: fp32 to 1e-3,
         bf16 to 1e-2 and 5e-2.

sentence-transformers gets the ids that its collator would make of strings: each column padded to
its longest text, outside the clock. It cuts a mini-batch to that one's longest text itself; what
is left is `padding`, counted in its forward calls. (Its input without padding needs CUDA.) In bf16
its base is bf16, its adapters fp32, and the loss reads fp32 embeddings, as here; it runs under
autocast or with PEFT's own casting, whichever is faster.

Each contestant lives in a process of its own and waits while another one is timed; they take
turns, the first of each is warm-up. Ours lets glibc keep freed memory, as our commands do; with
--keep-memory-for-all the others do, too. Peak: highest resident memory (VmHWM), and how far it is
above that after imports and weights. On two cores about: memory 2 minutes on the embedded Llama, 10
on 134m in bf16 and 20 in fp32; speed 8 minutes.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import numpy as np
import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `contrastive` is the product's

import encode
import step

import contrastive
from bench import evaluate as sibling
from contrastive import Batch, Config, batch_gradient, new_encoder, same_texts
from data import UserError
from model import read_config
from training import Ranks, keep_freed_memory, trained_of

TOLERANCES = {"float32": {"loss": 1e-3, "norm": 1e-3}, "bfloat16": {"loss": 1e-2, "norm": 5e-2}}
TARGET = 1.1  # peak with the most rows by peak with the fewest
MATCHED = "sentence-transformers, same tokens"

# ---------------------------------------------------------------------------------------------
# Contestants: `prepare` is not timed, `gradient(prepared)` returns the loss
# ---------------------------------------------------------------------------------------------


def draw_batch(args, turn: int) -> Batch:
    """The rows of a turn: random ids with BOS, lengths from --queries and --documents."""
    random = np.random.default_rng((args.seed, turn))
    llama = read_config(Path(args.folder) / "config.json")

    def texts(low: int, high: int) -> list[np.ndarray]:
        if args.lengths == "equal":  # all of them, queries too
            low = high = sum(args.documents) // 2
        return [np.concatenate(([llama.bos_token_id], random.integers(3, llama.vocab_size, n - 1)))
                for n in random.integers(low, high + 1, args.batch)]

    queries, positives, negatives = (
        texts(*span) for span in (args.queries, args.documents, args.documents))
    for query, positive in zip(queries, positives):
        shared = min(len(query), len(positive)) // 2
        positive[:shared] = query[:shared]
    keys = positives + negatives
    excluded = same_texts(keys, args.batch)
    if excluded.any():
        raise UserError("two documents are equal, which sentence-transformers would not exclude; "
                        "make --documents longer")
    rows = list(range(args.batch))
    return Batch(queries, keys, excluded, rows, 2 * rows)


class Contestant:
    def __init__(self, args):
        if isinstance(self, Ours) or args.keep_memory_for_all:
            keep_freed_memory()  # as our commands do
        pooled = {} if args.part == "memory" else {"pooling": "mean", "attention": "causal"}
        self.args, self.config = args, replace(Config(), **contrastive.SCL | pooled | {
            "model": args.folder, "dtype": args.dtype, "seed": args.seed, "lora_dropout": 0.0})
        self.build()
        self.optimizer = torch.optim.AdamW(
            self.parameters, self.config.lr, weight_decay=self.config.weight_decay, fused=True)

    def measure(self, turn: int, **settings) -> dict:
        """Take the step of a turn."""
        batch = draw_batch(self.args, turn)
        self.computed_tokens = batch.real_tokens
        prepared = self.prepare(batch, **settings)
        clock = time.perf_counter()
        loss = self.gradient(prepared)
        clip = self.config.clip or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, clip).item()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {"seconds": time.perf_counter() - clock, "loss": loss.item(), "norm": norm,
                "real_tokens": batch.real_tokens, "computed_tokens": self.computed_tokens,
                "peak_bytes": sibling.peak_bytes()}


class Ours(Contestant):
    def build(self):
        self.ranks = Ranks(0, 1, torch.device("cpu"))
        self.encoder, _ = new_encoder(self.config, self.ranks)
        step.draw_adapters(self.encoder.llama.model)
        self.parameters = list(trained_of(self.encoder).values())

    def prepare(self, batch: Batch, micro_tokens: int) -> tuple[Batch, Config]:
        return batch, replace(self.config, micro_tokens=micro_tokens or batch.real_tokens)

    def gradient(self, prepared: tuple[Batch, Config]) -> torch.Tensor:
        return batch_gradient(self.encoder, *prepared, 0, self.ranks)[0]


class SentenceTransformers(Contestant):
    def build(self):
        from peft import LoraConfig
        from peft.tuners.tuners_utils import BaseTunerLayer
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.losses import (
            CachedMultipleNegativesRankingLoss,
        )
        from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

        options = {"dtype": getattr(torch, self.args.dtype), "attn_implementation": "sdpa"}
        llama = Transformer(self.args.folder, model_kwargs=options)
        pooling = Pooling(llama.get_embedding_dimension(), "mean")
        self.model = SentenceTransformer(modules=[llama, pooling], device="cpu").train()
        self.model.add_adapter(LoraConfig(
            r=self.config.lora_r, lora_alpha=self.config.lora_alpha, lora_dropout=0.0,
            target_modules=list(step.lora.LoraConfig().targets)))
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        for p in self.parameters:
            p.data = p.data.float()
        step.draw_adapters(llama.auto_model)
        self.layers = [m for m in self.model.modules() if isinstance(m, BaseTunerLayer)]
        self.plain_forward, self.model.forward = self.model.forward, self.forward
        scale = 1 / self.config.temperature
        self.loss = CachedMultipleNegativesRankingLoss(self.model, scale=scale)

    def forward(self, features: dict) -> dict:
        """The model's forward call as a trainer wraps it, counting tokens with their padding."""
        self.computed_tokens += features["input_ids"].numel() / 2  # each mini-batch comes twice
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            features = self.plain_forward(features)
        features["sentence_embedding"] = features["sentence_embedding"].float()
        return features

    def prepare(self, batch: Batch, mini_batch: str, rows: str, autocast: bool) -> list[dict]:
        """The three columns, each padded on the right to its longest text; applies the settings."""
        self.computed_tokens, self.autocast = 0, autocast
        for layer in self.layers:
            layer.cast_input_dtype_enabled = not autocast
        size, tokens = int(mini_batch.rstrip("t")), mini_batch.endswith("t")
        self.loss.mini_batch_num_tokens = size if tokens else None
        self.loss.mini_batch_size = 32 if tokens else size  # else its default, for the loss only
        n = len(batch.queries)
        triples = list(zip(batch.queries, batch.keys[:n], batch.keys[n:]))
        if rows == "sorted":
            triples.sort(key=lambda texts: -max(map(len, texts)))
        columns = []
        for texts in zip(*triples):
            ids = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(t) for t in texts], True)
            mask = torch.arange(ids.shape[1]) < torch.tensor([len(t) for t in texts])[:, None]
            columns.append({"input_ids": ids, "attention_mask": mask.long()})
        return columns

    def gradient(self, prepared: list[dict]) -> torch.Tensor:
        loss = self.loss(prepared, None)
        loss.backward()
        return loss.detach()


def serve(args):
    """Build a contestant, then take a step for each line of settings: JSON in, JSON out."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    torch.set_num_threads(args.threads)
    try:
        contestant = (Ours if args.contestant == "ours" else SentenceTransformers)(args)
        built = psutil.Process().memory_info().rss
        for line in sys.stdin:
            found = {**contestant.measure(**json.loads(line)), "built_bytes": built}
            print(json.dumps(found), file=answers, flush=True)
    except UserError as error:
        sys.exit(f"error: {error}")


class Worker(sibling.Worker):
    """The parent's end of a contestant's process."""

    def __init__(self, name: str, args, batch: int):
        given = json.dumps({**vars(args), "contestant": name, "batch": batch})
        quiet = {"PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS":
                 str(args.threads), "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
        self.name, pipes = name, dict.fromkeys(("stdin", "stdout"), subprocess.PIPE)
        self.process = subprocess.Popen([sys.executable, __file__, "--serve", given], text=True,
                                        env={**os.environ, **quiet}, **pipes)

    def ask(self, turn: int, **settings) -> dict:
        """The measurements of a step."""
        self.process.stdin.write(json.dumps({"turn": turn, **settings}) + "\n")
        self.process.stdin.flush()
        return self.answer()


# ---------------------------------------------------------------------------------------------
# The parts: results, and the lines of a table
# ---------------------------------------------------------------------------------------------


def above(answer: dict) -> int:
    """Bytes of the peak above imports and weights."""
    return answer["peak_bytes"] - answer["built_bytes"]


def bench_memory(args) -> tuple[dict, list[str]]:
    """Our step at each of --rows."""
    results = {}
    lines = ["| rows | texts | real tokens | micro-batches | s | peak GiB | above weights |",
             "|" + "---:|" * 7]
    for rows in args.rows:
        with closing(Worker("ours", args, rows)) as worker:
            found = results[rows] = worker.ask(0, micro_tokens=args.micro_tokens)
        read = found["real_tokens"] + 3 * rows * Config.memory_tokens
        lines.append(f"| {rows:,} | {3 * rows:,} | {found['real_tokens']:,} | "
                     f"{read / args.micro_tokens:.1f} | {found['seconds']:.1f} | "
                     f"{found['peak_bytes'] / step.GIB:.3f} | {above(found) / step.GIB:.3f} |")
    few, many = results[min(results)], results[max(results)]
    ratio = many["peak_bytes"] / few["peak_bytes"]
    ratio_above = above(many) / above(few)
    verdict = "met" if ratio <= TARGET else "MISSED"
    said = (f"peak with {max(results):,} rows / {min(results):,}: {ratio:.3f} (above imports and "
            f"weights: {ratio_above:.3f}); target: at most {TARGET}, {verdict}")
    return {"memory": results, "ratio": ratio, "ratio_above": ratio_above}, [*lines, "", said]


def tune(args, matched: int) -> dict[str, dict]:
    """Label -> settings of sentence-transformers, the fastest of those tried."""
    sizes = [str(max(1, matched // part)) for part in (16, 8, 4, 2)] + [f"{args.micro_tokens}t"]
    sizes = dict.fromkeys([*(args.mini_batch or sizes), str(matched)])
    with closing(Worker(MATCHED, args, args.rows[0])) as worker:

        def fastest(choices: list[dict]) -> dict:
            """The fastest in turn 1, after a warm-up by turn 0."""
            seconds = []
            for given in choices if len(choices) > 1 else []:
                seconds.append([worker.ask(turn, **given)["seconds"] for turn in (0, 1)][1])
                print(f"tried {given}: {seconds[-1]:.4g} s", flush=True)
            return choices[int(np.argmin(seconds))] if seconds else choices[0]

        casts = [True, False] if args.dtype == "bfloat16" else [False]
        same = fastest([{"mini_batch": str(matched), "rows": "drawn", "autocast": cast}
                        for cast in casts])
        best = fastest([{**same, "mini_batch": size} for size in sizes])
        found = {MATCHED: same} | ({"sentence-transformers, best mini-batch": best}
                                   if best != same else {})
        if args.lengths == "mixed":
            found["sentence-transformers, sorted rows"] = fastest(
                [{**same, "mini_batch": size, "rows": "sorted"} for size in sizes])
    return found


def check_agreement(label: str, found: dict, ours: dict, dtype: str):
    """UserError unless loss and norm of a first step are ours."""
    for key, tolerance in TOLERANCES[dtype].items():
        off = abs(found[key] / ours[key] - 1)
        print(f"first step, {label}: {key} {found[key]:.6g}, ours {ours[key]:.6g}, off {off:.1e}")
        if not off <= tolerance:  # also true for nan
            raise UserError(f"{label}: {key} {found[key]} is not ours, {ours[key]}")


def fits_in_one_piece(ours: dict, micro_tokens: int) -> bool:
    """Whether a step in one micro-batch should fit, by what our first one took; says if not."""
    need = above(ours) * max(1.0, ours["real_tokens"] / micro_tokens) + ours["built_bytes"]
    there = psutil.virtual_memory().available
    if need > 0.8 * there:
        print(f"left out: ours, one micro-batch: would need about {need / step.GIB:.1f} GiB, "
              f"{there / step.GIB:.1f} are there")
    return need <= 0.8 * there


def take_turns(args, entries: dict[str, dict]) -> dict[str, list[dict]]:
    """Label -> answers, the first from warm-up; entries: label -> settings, ours first."""
    answers, asks = {}, {}
    with ExitStack() as stack:
        for label, settings in entries.items():
            if settings.get("micro_tokens") == 0 and not fits_in_one_piece(
                    answers["ours"][0], args.micro_tokens):
                continue
            name = "ours" if "micro_tokens" in settings else label
            worker = stack.enter_context(closing(Worker(name, args, args.rows[0])))
            asks[label] = partial(worker.ask, **settings)
            answers[label] = [asks[label](0)]
            if label != "ours":
                check_agreement(label, answers[label][0], answers["ours"][0], args.dtype)
        for turn in range(1, args.turns + 1):
            for label, ask in asks.items():
                answers[label].append(ask(turn))
            print(f"turn {turn} of {args.turns} done", file=sys.stderr, flush=True)
    return answers


def bench_speed(args) -> tuple[dict, list[str]]:
    """All contestants at the first of --rows."""
    batch = draw_batch(SimpleNamespace(**vars(args), batch=args.rows[0]), 0)
    mean = batch.real_tokens / len(batch.queries + batch.keys)
    print(f"{args.rows[0]} rows, {batch.real_tokens:,} tokens with BOS in the first turn, "
          f"{mean:.1f} a text; our micro-batches: {args.micro_tokens} tokens", flush=True)
    entries = {"ours": {"micro_tokens": args.micro_tokens},
               "ours, one micro-batch": {"micro_tokens": 0},
               **tune(args, max(1, min(args.rows[0], round(args.micro_tokens / mean))))}
    answers = take_turns(args, entries)
    titles = ("step", "mini-batch", "s, median (min-max)", "time / ours", "real tokens/s",
              "padding", "peak GiB (above weights)", "last loss")
    lines = [f"| {' | '.join(titles)} |", "|---|---|" + "---:|" * 6]
    reference = median(answer["seconds"] for answer in answers["ours"][1:])
    for label, (_, *turns) in answers.items():
        given, seconds, last = entries[label], [a["seconds"] for a in turns], turns[-1]
        size = given.get("mini_batch") or f"{given['micro_tokens'] or 'all'}t"
        size = size[:-1] + " tokens" if size.endswith("t") else size + " texts"
        cells = [label, size + ", autocast" * given.get("autocast", False),
                 f"{median(seconds):.4g} ({min(seconds):.4g}-{max(seconds):.4g})",
                 f"{median(seconds) / reference:.2f}",
                 f"{median(a['real_tokens'] / a['seconds'] for a in turns):,.0f}",
                 f"{median(a['computed_tokens'] / a['real_tokens'] for a in turns) - 1:.1%}",
                 f"{last['peak_bytes'] / step.GIB:.2f} ({above(last) / step.GIB:.2f})",
                 f"{last['loss']:.5f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return {"settings": entries, "answers": answers}, lines


def bench(args):
    """The part asked for: print its table, write the JSON."""
    args.folder, load = str(encode.shared_folder(args)), os.getloadavg()
    about = {"device": step.cpu_name(), **{package: version(package) for package in (
        "torch", "transformers", "peft", "sentence-transformers")}}
    print(f"{about}, load {load[0]:.1f}, {args.threads} thread(s)\n{args.shape or args.model}, "
          f"{args.dtype}, queries {args.queries}, documents {args.documents}, {args.lengths}")
    results, lines = (bench_memory if args.part == "memory" else bench_speed)(args)
    print("\n" + "\n".join(lines))
    out = Path(args.out or f"bench/results/contrastive-{args.part}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    about |= {"arguments": vars(args), "load_before": load, "load_after": os.getloadavg()}
    out.write_text(json.dumps({**about, **results}, indent=1) + "\n")
    print(f"\nwritten to {out}")


def main() -> int:
    """The command line; returns the exit code."""
    if sys.argv[1:2] == ["--serve"]:
        serve(SimpleNamespace(**json.loads(sys.argv[2])))
        return 0
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, span = parser.add_argument, {"type": int, "nargs": 2, "metavar": ("LOW", "HIGH")}
    add("--part", choices=["memory", "speed"], required=True)
    add("--model", default="demo", help="a Llama's folder or hub name; demo: the embedded")
    add("--shape", choices=["134m", "7b"], help="random weights instead of --model")
    add("--dtype", choices=["float32", "bfloat16"], default="float32")
    add("--keep-memory-for-all", action="store_true",
        help="let glibc keep freed memory in all processes, not in ours alone")
    add("--rows", type=int, nargs="+", help="of a batch; memory: 64 1024, speed: 128")
    add("--micro-tokens", type=int, default=4096, help="tokens that ours embeds at a time")
    add("--queries", **span, default=[8, 32], help="tokens of a query, BOS counted")
    add("--documents", **span, default=[20, 128], help="tokens of a document, BOS counted")
    add("--lengths", choices=["mixed", "equal"], default="mixed", help="equal: all texts, queries "
        "too, have the mean of --documents")
    add("--mini-batch", nargs="+", metavar="N", help="speed: those to try, as 16 (texts) or 4096t "
        "(tokens); default: from a sixteenth of the same tokens up to them")
    add("--turns", type=int, default=5, help="speed: counted steps of each")
    add("--threads", type=int, default=2)
    add("--seed", type=int, default=0)
    add("--out", help="default: bench/results/contrastive-PART.json")
    args = parser.parse_args()
    args.rows = args.rows or ([64, 1024] if args.part == "memory" else [128])
    if min(args.turns, args.threads, args.micro_tokens, *args.rows, args.queries[0] - 1,
           args.documents[0] - 1) < 1:
        parser.error("the numbers must be above 0, and the texts have at least 2 tokens")
    try:
        with tempfile.TemporaryDirectory() as args.scratch:
            bench(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

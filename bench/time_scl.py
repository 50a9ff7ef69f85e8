"""One step of stage 3 (scl), timed side by side: this project and sentence-transformers.

    python bench/time_scl.py --dtype bfloat16 --threads 2
    python bench/time_scl.py --dtype bfloat16 --queries 74 74 --documents 74 74        no padding
    python bench/time_scl.py --implementations ours --rows 64 1024 --turns 1       its peak memory

A step is forward, backward, clip and AdamW (fused) on rows of a query, a positive and a negative,
all of random token ids; new ones each turn, the same for all. A positive begins like its query.
Causal attention, the mean of all tokens with BOS, LoRA r 16, alpha 32 on all projections but
k_proj, dropout 0, temperature 0.05; the adapters start from equal values, B small but not zero, so
that no part of the first gradient is zero. Loss and norm of the first gradient must agree: in fp32
to 1e-3, in bf16 to 1e-2 (if the loss is near zero, absolutely) and 5e-2.

ours                   the body of contrastive.train's loop, --micro-tokens at a time
one-micro-batch        the same without recomputation, if memory allows
sentence-transformers  CachedMultipleNegativesRankingLoss, adapters by add_adapter (PEFT): a row of
                       the table for each --mini-batch, by default as many texts as --micro-tokens
                       hold on average, and a quarter of them
    sorted rows        rows sorted by their longest text before they are batched, which does not
                       change the loss

sentence-transformers gets the ids that its collator would make of strings: each column padded to
its longest text, which is not timed. It cuts each mini-batch to its longest text itself; what is
left is `padding`, counted in its forward calls. (Its input without padding needs CUDA.) In bf16
its base is bf16, its adapters fp32, and the loss reads fp32 embeddings, as here; it runs under
autocast, which was faster than PEFT's own casting. Turns, seconds and peak as in bench/harness.py,
except that the peak in brackets is above imports and weights.
"""

import sys
from dataclasses import replace
from pathlib import Path
from statistics import median

import harness
import numpy as np
import torch
from harness import TrainingStep, whole

import contrastive
import lora
from contrastive import Config
from data.batches import Batch, same_texts
from runtime.errors import UserError
from runtime.formats import read_llama_config
from runtime.ranks import Ranks
from runtime.run import Run

TOLERANCES = {"float32": {"loss": 1e-3, "norm": 1e-3}, "bfloat16": {"loss": 1e-2, "norm": 5e-2}}
NAMES = ("ours", "one-micro-batch", "sentence-transformers")


def draw_batch(args, turn: int) -> Batch:
    """The rows of a turn: random ids with BOS, lengths from --queries and --documents."""
    random, n = np.random.default_rng((args.seed, turn)), args.batch
    vocabulary = read_llama_config(Path(args.folder) / "config.json", ["llama"])["vocab_size"]

    def texts(low: int, high: int) -> list[np.ndarray]:
        return harness.random_texts(random, random.integers(low, high + 1, n), vocabulary)

    queries, positives, negatives = (
        texts(*span) for span in (args.queries, args.documents, args.documents))
    for query, positive in zip(queries, positives):
        shared = min(len(query), len(positive)) // 2
        positive[:shared] = query[:shared]
    keys = positives + negatives
    excluded = same_texts(keys, n)
    if excluded.any():
        raise UserError("two documents are equal, which sentence-transformers would not exclude; "
                        "make --documents longer")
    return Batch(queries, keys, excluded, list(range(n)), 2 * list(range(n)), cut=0)


class SclStep(TrainingStep):
    def __init__(self, args):
        self.config = replace(Config(), **contrastive.SCL | {
            "model": args.folder, "pooling": "mean", "attention": "causal", "dtype": args.dtype,
            "seed": args.seed, "lora_dropout": 0.0})
        super().__init__(args)

    def measure(self, turn: int, **settings) -> dict:
        real = self.computed_tokens = draw_batch(self.args, turn).real_tokens
        found = super().measure(turn, **settings)
        return {**found, "real_tokens": real, "computed_tokens": self.computed_tokens}


class Ours(SclStep):
    ours = True

    def build(self):
        self.ranks = Ranks(0, 1, torch.device("cpu"))
        self.modules, _ = contrastive.new_encoder(self.config, Run(self.config, self.ranks, False))
        harness.draw_adapters(self.modules.llama.model)

    def prepare(self, turn: int, micro_tokens: int) -> tuple[Batch, Config]:
        batch = draw_batch(self.args, turn)
        return batch, replace(self.config, micro_tokens=micro_tokens or batch.real_tokens)

    def gradient(self, prepared: tuple[Batch, Config]) -> torch.Tensor:
        batch, config = prepared
        texts = batch.queries + batch.keys
        every = contrastive.GlobalBatch(self.modules, texts, config, 0, self.ranks)
        queries, keys = every.embeddings.split([len(batch.queries), len(batch.keys)])
        loss = contrastive.info_nce(queries, keys, config.temperature, batch.excluded)
        every.backward(loss)
        return loss.detach()


class SentenceTransformers(SclStep):
    imports = ("sentence_transformers", "peft", "transformers.models.llama.modeling_llama")

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
        self.modules = SentenceTransformer(modules=[llama, pooling], device="cpu").train()
        self.modules.add_adapter(LoraConfig(
            r=self.config.lora_r, lora_alpha=self.config.lora_alpha, lora_dropout=0.0,
            target_modules=list(lora.LoraConfig().targets)))
        for p in self.modules.parameters():
            if p.requires_grad:
                p.data = p.data.float()
        harness.draw_adapters(llama.auto_model)
        self.autocast = self.args.dtype == "bfloat16"
        for module in self.modules.modules():
            if isinstance(module, BaseTunerLayer):
                module.cast_input_dtype_enabled = not self.autocast
        self.plain_forward, self.modules.forward = self.modules.forward, self.forward
        scale = 1 / self.config.temperature
        self.loss = CachedMultipleNegativesRankingLoss(self.modules, scale=scale)

    def forward(self, features: dict) -> dict:
        """The model's forward call as a trainer wraps it, counting tokens with their padding."""
        self.computed_tokens += features["input_ids"].numel() / 2  # each mini-batch comes twice
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            features = self.plain_forward(features)
        features["sentence_embedding"] = features["sentence_embedding"].float()
        return features

    def prepare(self, turn: int, mini_batch: str, rows: str) -> list[dict]:
        """The three columns, each padded on the right to its longest text; applies the settings."""
        batch, self.computed_tokens = draw_batch(self.args, turn), 0
        size, tokens = int(mini_batch.removesuffix("t")), mini_batch.endswith("t")
        self.loss.mini_batch_num_tokens = size if tokens else None
        self.loss.mini_batch_size = 32 if tokens else size  # 32: the default, for the loss only
        n = len(batch.queries)
        triples = list(zip(batch.queries, batch.keys[:n], batch.keys[n:]))
        if rows == "sorted":
            triples.sort(key=lambda texts: -max(map(len, texts)))
        columns = []
        for texts in zip(*triples):
            ids = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(t).long() for t in texts], True)
            mask = torch.arange(ids.shape[1]) < torch.tensor([len(t) for t in texts])[:, None]
            columns.append({"input_ids": ids, "attention_mask": mask.long()})
        return columns

    def gradient(self, prepared: list[dict]) -> torch.Tensor:
        loss = self.loss(prepared, None)
        loss.backward()
        return loss.detach()


def settings_of(args, mean: float) -> dict[str, dict]:
    """Label -> settings of what --implementations names; mean: tokens of a text."""
    found = {"ours": {"micro_tokens": args.micro_tokens}, "one-micro-batch": {"micro_tokens": 0}}
    found = {name: given for name, given in found.items() if name in args.implementations}
    if "sentence-transformers" in args.implementations:
        same = max(1, min(args.batch, round(args.micro_tokens / mean)))
        for size in args.mini_batch or dict.fromkeys([str(same), str(max(1, same // 4))]):
            words = size[:-1] + " tokens" if size.endswith("t") else size + " texts"
            label = f"sentence-transformers, {words}"
            found[label] = {"mini_batch": size, "rows": "drawn"}
            if len({*args.queries, *args.documents}) > 1:  # else there is nothing to sort
                found[label + ", sorted rows"] = {"mini_batch": size, "rows": "sorted"}
    return found


def measure(args) -> tuple[dict, str]:
    """All implementations at --rows of args.batch: results and the table."""
    batch = draw_batch(args, 0)
    mean = batch.real_tokens / len(batch.queries + batch.keys)
    print(f"{args.shape}, {args.dtype}, queries {args.queries}, documents {args.documents}: "
          f"{args.batch} rows, {batch.real_tokens:,} tokens with BOS in the first "
          f"turn, {mean:.1f} a text; ours reads {args.micro_tokens:,} at a time", flush=True)
    settings = settings_of(args, mean)
    kinds = {label: Ours if "micro_tokens" in given else SentenceTransformers
             for label, given in settings.items()}
    absolute = TOLERANCES[args.dtype]["loss"] if args.dtype == "bfloat16" else 0.0
    found = harness.race(kinds, args, settings=settings, check=lambda first, _: (
        harness.check_losses(first, TOLERANCES[args.dtype], absolute)))
    rows, reference = [], next(iter(found.values()))
    for label, timing in found.items():
        turns = timing.turns
        speed = median(a["real_tokens"] / a["seconds"] for a in turns)
        padding = median(a["computed_tokens"] / a["real_tokens"] for a in turns) - 1
        rows.append([label, *timing.cells(reference, since="built_bytes"), f"{speed:,.0f}",
                     f"{padding:.1%}", f"{turns[-1]['loss']:.5f}"])
    titles = ("step", *harness.TIMES[:2], "peak GiB (above weights)", "real tokens/s", "padding",
              "last loss")
    return {"settings": settings, "timings": found}, harness.table(titles, rows)


def bench(args):
    """Each of --rows; yields results so far and the table."""
    args.folder, results = harness.write_folder(args), {}
    for args.batch in args.rows:
        results[args.batch], text = measure(args)
        yield {"rows": results}, text


def parse():
    """Parse the command line."""
    parser = harness.new_parser(__doc__, shape="7m", dtype="float32", threads=[2], turns=5,
                                warm_up=1)
    add, span = parser.add_argument, {"type": whole(2), "nargs": 2, "metavar": ("LOW", "HIGH")}
    add("--implementations", nargs="+", choices=NAMES, default=NAMES,
        help="the first is the reference")
    add("--rows", type=whole(), nargs="+", default=[128], help="of a batch")
    add("--micro-tokens", type=whole(), default=4096, help="tokens that ours embeds at a time")
    add("--queries", **span, default=[8, 32], help="tokens of a query, BOS counted")
    add("--documents", **span, default=[20, 128], help="tokens of a document, BOS counted")
    add("--mini-batch", nargs="+", metavar="N", help="of sentence-transformers, a row of the table "
        "each, as 16 (texts) or 4096t (tokens); see above")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(harness.main(__file__, parse, bench, "transformers", "peft",
                          "sentence-transformers"))

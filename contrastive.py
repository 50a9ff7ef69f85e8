"""Stages 2 and 3 of LLM2Comp: sharpen the encoder by contrastive learning.

    torchrun contrastive.py                                   stage 2 (ucl) on the embedded demo
    torchrun contrastive.py --stage scl                       stage 3 (scl) after it
    torchrun --nproc-per-node 8 contrastive.py --model runs/llama2 --out runs/llama2-ucl
    torchrun --nproc-per-node 8 contrastive.py --stage scl --model runs/llama2-ucl \\
        --triples FOLDER --out runs/llama2-scl
    python contrastive.py --help                              every setting

    ucl    query and key are the same text under two dropout masks; B keys
    scl    query, a text to find, a text that only looks like it; the 2 B keys of Eq. 8

Both stages minimise InfoNCE over a global batch of B rows and differ by that batch only. It never
has to fit: its texts are embedded in micro-batches of so many tokens, whose activations are made
anew when their gradient is due. Micro-batches are cut from the global batch and dealt out to the
processes: their size does not change the gradient, the number of processes not even the dropout.
Letters as in model.py; B rows in a batch, M keys.
"""

import re
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record  # tracebacks for torchrun
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import evaluate
from data import UserError
from data.corpora import digest_ids, read_texts
from data.triples import Triples
from lora import LoraConfig, add_lora, merge_lora
from model import INSTRUCTED, Encoder, EncoderConfig, encoder_of, find_model
from model import flat_ids, is_encoder, load_encoder, plain_encoder, save_encoder, to_device
from model import token_batches
from training import (
    Metrics, Ranks, agree, check_numbers, flag, generator, global_batch, learning_rate,
    parse_config, pick_dtype, print_header, reduce_gradients, run_stage, setting,
    settings_of, start_run, stop_on_signals, trained_of,
)

FREE = (  # may change when a run is resumed
    "resume", "save_every", "save_minutes", "timeout", "base", "data_dir",
)


@dataclass
class Config:
    """Stages 2 and 3. Defaults are the paper's stage 2, `--stage scl` changes them (PRESETS)."""

    stage: str = setting("ucl", "ucl (stage 2) or scl (stage 3)", ("ucl", "scl"))
    model: str = setting("runs/ctkd", "a run or encoder folder to go on from, or a plain Llama: "
                         "folder, hub repository, or demo")
    revision: str = setting("", "branch, tag or commit of a hub model")
    base: str = setting("", "where the encoder's base model lies now")
    text: str = setting("wiki1m", "ucl: a .txt, a .jsonl (also .gz), wiki1m, wikitext103, or demo")
    num_texts: int = setting(128000, "ucl: texts used, the first ones; 0 = all")
    triples: str = setting("", "scl: a .jsonl(.gz) of {query, positive, negative}, a folder of "
                           "them, or demo")
    instruction: str = setting("", "scl: before the queries of files that are not one of E5's; "
                               "none = before no query at all")
    negatives: int = setting(1, "scl: hard negatives a row, drawn where a row has a list")
    batches: str = setting("mixed", "scl: rows of a batch from all files, or from one file",
                           ("mixed", "single-dataset"))
    out: str = setting("runs/ucl", "folder of the run; must be new or empty")
    pooling: str = setting("auto", "of a plain Llama; auto = memory; an encoder knows its own",
                           ("auto", "memory", "last", "mean", "weighted-mean"))
    attention: str = setting("auto", "of a plain Llama; auto = bidirectional; an encoder knows "
                             "its own", ("auto", "bidirectional", "causal"))
    memory_tokens: int = setting(0, "K, of a plain Llama with pooling memory; 0 = 8")
    template: str = setting("", "of a plain Llama's texts, like 'query: {text}</s>'")
    document_template: str = setting("", "of a plain Llama's documents")
    max_tokens: int = setting(512, "cut texts and queries to this, BOS and K counted")
    document_tokens: int = setting(1024, "scl: cut documents to this")
    batch_size: int = setting(128, "rows a step, over all ranks")
    micro_tokens: int = setting(2048, "tokens embedded at a time; more micro-batches than "
                                "processes keep all of them busy")
    temperature: float = setting(0.05, "cosines are divided by it")
    attention_dropout: float = setting(0.2, "of the attention weights")
    steps: int = setting(0, "optimiser steps; 0 = once through the data")
    schedule_steps: int = setting(0, "steps that the rate's schedule is made for; 0 = steps")
    lr: float = setting(3e-5, "highest learning rate")
    min_lr: float = setting(1e-5, "where the rate starts and ends")
    warmup: float = setting(0.1, "share of the schedule in which the rate rises")
    weight_decay: float = setting(1e-3, "of AdamW")
    clip: float = setting(1.0, "largest norm of the gradient; 0 = off")
    lora_r: int = setting(16, "rank of the new adapters")
    lora_alpha: float = setting(32, "the adapters are scaled by alpha / r")
    lora_dropout: float = setting(0.05, "before the adapters")
    eval_tasks: str = setting("", "tasks of evaluate.py whose mean score chooses the best encoder")
    eval_every: int = setting(100, "steps between evaluations on --eval-tasks")
    data_dir: str = setting("", "folder with the tasks' repositories, hub layout")
    dtype: str = setting("auto", "of frozen weights and activations",
                         ("auto", "bfloat16", "float32", "float64"))
    device: str = setting("auto", "auto, cpu, cuda")
    threads: int = setting(0, "CPU threads a process; 0 = the cores shared among processes")
    seed: int = setting(0, "of order, negatives, initialisation and dropout")
    deterministic: bool = setting(False, "on CUDA: the same bits from the same input, slower")
    save_every: int = setting(100, "steps between checkpoints")
    save_minutes: float = setting(0.0, "also save when the last checkpoint is so old; 0 = off")
    timeout: float = setting(30.0, "minutes that a rank waits for the others in a step")
    resume: bool = setting(False, "go on from the newest checkpoint in --out")


SCL = {  # the paper's stage 3; its schedule is made for 2,000 steps, the best point is at 200
    "stage": "scl", "model": "runs/ucl", "out": "runs/scl", "num_texts": 0, "batch_size": 1024,
    "micro_tokens": 8192, "steps": 1000, "schedule_steps": 2000, "lr": 1e-4, "weight_decay": 3e-4,
    "clip": 0.0, "attention_dropout": 0.0,
}
DEMO = {"max_tokens": 256, "batch_size": 64, "micro_tokens": 4096, "num_texts": 0,
        "eval_tasks": "demo-sts demo-retrieval", "eval_every": 10, "save_every": 30}
PRESETS = {
    "ucl": {},
    "scl": SCL,
    "repllama": {**SCL, "pooling": "last", "attention": "causal", "instruction": "none",
                 "template": "query: {text}</s>", "document_template": "passage: {text}</s>",
                 "model": "meta-llama/Llama-2-7b-hf", "out": "runs/repllama"},
    "ucl-demo": {**DEMO, "model": "runs/ctkd-demo", "text": "demo", "out": "runs/ucl-demo",
                 "steps": 60, "lr": 1e-4},
    "scl-demo": {**SCL, **DEMO, "model": "runs/ucl-demo", "triples": "demo", "steps": 30,
                 "out": "runs/scl-demo", "schedule_steps": 0, "lr": 3e-4, "document_tokens": 256},
}

# ---------------------------------------------------------------------------------------------
# The objective
# ---------------------------------------------------------------------------------------------


def scaled_cosines(queries: Tensor, keys: Tensor, temperature: float, excluded: Tensor) -> Tensor:
    """cos(q_i, k_j) / temperature (B, M); -inf where `excluded` (B, M) is true."""
    cosines = F.normalize(queries, dim=-1) @ F.normalize(keys, dim=-1).T
    return (cosines / temperature).masked_fill(to_device(excluded, cosines.device), -torch.inf)


def info_nce(queries: Tensor, keys: Tensor, temperature: float, excluded: Tensor) -> Tensor:
    """Mean over i of -log of the share of k_i in sum_j exp(cos(q_i, k_j) / temperature).

    queries (B, D), keys (M, D) with query i's positive at i: M = B for ucl, 2 B for scl (Eq. 8).
    excluded (B, M): keys that are no negatives of a query, see `same_texts`.
    """
    logits = scaled_cosines(queries, keys, temperature, excluded)
    return F.cross_entropy(logits, torch.arange(len(queries), device=logits.device))


def same_texts(keys: list[np.ndarray], rows: int) -> Tensor:
    """(rows, M): whether key j, without being row i's positive, has the text of row i's positive.

    Such a key would be a false negative.
    """
    names: dict[bytes, int] = {}
    text = torch.tensor([names.setdefault(ids.tobytes(), len(names)) for ids in keys])
    return (text[:rows, None] == text).fill_diagonal_(False)


def effective_dimension(x: Tensor) -> float:
    """Participation ratio (sum of eigenvalues)^2 / (sum of their squares) of the covariance of x.

    x (n, D). Between 1 (all on a line) and min(n - 1, D); 0 if all rows are equal.
    """
    x = x - x.mean(dim=0)
    gram = x @ x.T  # has the covariance's eigenvalues, times n
    return float(gram.trace() ** 2 / gram.square().sum().clamp_min(1e-30))


@torch.no_grad()
def diagnostics(queries: Tensor, keys: Tensor, temperature: float, excluded: Tensor) -> dict:
    """What a batch's embeddings look like; alignment and uniformity as in arXiv 2005.10242.

    accuracy: queries whose positive is the nearest key. alignment: mean squared distance of the
    pairs. uniformity: log of the mean of exp(-2 squared distance) over pairs of positives.
    """
    rows = len(queries)
    nearest = scaled_cosines(queries, keys, temperature, excluded).argmax(dim=1).cpu()
    queries, positives = F.normalize(queries, dim=-1), F.normalize(keys[:rows], dim=-1)
    distances = torch.pdist(positives).square()
    return {"accuracy": (nearest == torch.arange(rows)).double().mean().item(),
            "alignment": (queries - positives).square().sum(dim=1).mean().item(),
            "uniformity": distances.mul(-2).exp().mean().log().item(),
            "effective_dimension": effective_dimension(queries)}


# ---------------------------------------------------------------------------------------------
# The gradient of a global batch, in the memory of a micro-batch
# ---------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """A global batch as token ids with BOS: B queries, M keys (the B positives first).

    excluded (B, M) marks the keys that are no negatives; `rows` are places in the data, of the
    queries, and `key_rows` those of the keys.
    """

    queries: list[np.ndarray]
    keys: list[np.ndarray]
    excluded: Tensor
    rows: list[int]
    key_rows: list[int]

    @property
    def real_tokens(self) -> int:
        """Tokens of all texts with BOS, without memory tokens."""
        return sum(map(len, self.queries + self.keys))


def embed_batch(
    encoder: Encoder, texts: list[np.ndarray], config: Config, step: int, ranks: Ranks
) -> Tensor:
    """Embeddings (n, D) of all texts on every rank; only the rows embedded here carry a gradient.

    The micro-batches are dealt out to the ranks. All but the last are checkpointed: their
    activations are dropped, and computed again with the same dropout when backward comes to them.
    Backward begins with the last one, which therefore keeps its own.
    """
    k, device = encoder.config.num_memory_tokens, encoder.llama.head.device
    parts = token_batches([len(ids) + k for ids in texts], config.micro_tokens)
    mine, embeddings = parts[ranks.rank :: ranks.size], []
    for part in mine:
        torch.manual_seed(int(generator(config.seed, 2, step, part[0]).integers(2**62)))
        inputs = (flat_ids([texts[i] for i in part], device), [len(texts[i]) for i in part],
                  config.attention_dropout)
        if part is mine[-1]:
            embeddings.append(encoder.embed(*inputs))
        else:
            embeddings.append(checkpoint(encoder.embed, *inputs, use_reentrant=False))
    wide = torch.promote_types(encoder.llama.head.dtype, torch.float32)
    everyone = torch.zeros(len(texts), encoder.table.shape[1], dtype=wide, device=device)
    if not mine:
        return ranks.sum(everyone)
    own, rows = torch.cat(embeddings), to_device(torch.tensor(sum(mine, [])), device)
    everyone[rows] = own.detach()
    return ranks.sum(everyone).index_copy(0, rows, own)


def batch_gradient(
    encoder: Encoder, batch: Batch, config: Config, step: int, ranks: Ranks
) -> tuple[Tensor, Tensor, Tensor]:
    """Forward and backward of a step; gradients are this rank's part, not yet summed.

    Every rank computes the loss of the whole batch and differentiates it by the rows that it has
    embedded: the sum over ranks is the gradient. Returns loss, queries (B, D), keys (M, D).
    """
    z = embed_batch(encoder, batch.queries + batch.keys, config, step, ranks)
    queries, keys = z.split([len(batch.queries), len(batch.keys)])
    loss = info_nce(queries, keys, config.temperature, batch.excluded)
    if loss.requires_grad:
        loss.backward()
    return loss.detach(), queries.detach(), keys.detach()


# ---------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------


def open_texts(config: Config, encoder: Encoder) -> list[np.ndarray]:
    """The texts of ucl as token ids (of the embedded passages, the sentences)."""
    texts = read_texts(config.text)
    if config.text == "demo":
        texts = [s for text in texts for s in re.split(r"(?<=[.?!])\s+", text)]
    data, _ = encoder.tokenize(texts[: config.num_texts or None])
    if len({ids.tobytes() for ids in data}) < 2:
        raise UserError(f"{config.text}: all {len(data):,} texts are the same (after "
                        f"{len(data[0])} tokens), nothing tells them apart; give different ones")
    return data


def open_triples(config: Config, encoder: Encoder, progress: bool) -> Triples:
    """The triples of scl; UserError for an instruction that the encoder has no room for."""
    instruction = None if config.instruction == "none" else config.instruction
    data = Triples(config.triples, instruction, progress)
    try:
        for text in ["", *data.instructions]:
            encoder.tokenize(["a"], text)
        encoder.tokenize(["a"], document=True, max_tokens=config.document_tokens)
    except UserError as error:  # no place in a template, or no room in its length
        raise UserError(f"{error} (--instruction none, --max-tokens or --document-tokens)")
    return data


def sources(data: list[np.ndarray] | Triples, config: Config) -> dict[str, int]:
    """The parts of the data that no batch mixes, by name, and their sizes."""
    if config.stage == "scl" and config.batches == "single-dataset":
        return {str(file.path): len(file.offsets) for file in data.files}
    return {config.text if config.stage == "ucl" else config.triples: len(data)}


def open_data(config: Config, encoder: Encoder, progress: bool) -> list[np.ndarray] | Triples:
    """The data of the stage; UserError if they make no batch."""
    ucl = config.stage == "ucl"
    data = open_texts(config, encoder) if ucl else open_triples(config, encoder, progress)
    for name, size in sources(data, config).items():
        if size < config.batch_size:
            raise UserError(f"{name}: {size:,} rows, fewer than --batch-size {config.batch_size}; "
                            f"lower it or give more rows")
    return data


def read_batch(
    encoder: Encoder, data: list[np.ndarray] | Triples, config: Config, step: int
) -> Batch:
    """The global batch of a step: all by which the training of ucl and scl differs."""
    if config.stage == "ucl":
        rows = global_batch(config.seed, step, config.batch_size, len(data))
        queries = keys = [data[i] for i in rows]
        return Batch(queries, keys, same_texts(keys, len(rows)), rows, rows)
    sizes = list(sources(data, config).values())
    rows = one_source_batch(config.seed, step, config.batch_size, sizes)
    triples = [data[i] for i in rows]
    queries: list = [None] * len(rows)
    for instruction in dict.fromkeys(triple.instruction for triple in triples):
        places = [j for j, triple in enumerate(triples) if triple.instruction == instruction]
        ids, _ = encoder.tokenize([triples[j].query for j in places], instruction)
        for j, query in zip(places, ids):
            queries[j] = query
    texts, key_rows = [triple.positive for triple in triples], list(rows)
    for j, triple in enumerate(triples):
        order = generator(config.seed, 3, step * len(rows) + j).permutation(len(triple.negatives))
        texts += [triple.negatives[n] for n in order[: config.negatives]]
        key_rows += [rows[j]] * len(order[: config.negatives])
    keys, _ = encoder.tokenize(texts, document=True, max_tokens=config.document_tokens)
    return Batch(queries, keys, same_texts(keys, len(rows)), rows, key_rows)


def one_source_batch(seed: int, step: int, batch: int, sizes: list[int]) -> list[int]:
    """The rows of a step, all from one of the sources that lie one after another with these sizes.

    An epoch has each source's full batches in a drawn order. With one source: global_batch.
    """
    counts = [size // batch for size in sizes]
    epoch, index = divmod(step, sum(counts))
    order = generator(seed, 4, epoch).permutation(np.repeat(np.arange(len(sizes)), counts))
    source = int(order[index])
    earlier = int((order[:index] == source).sum())  # batches of this source in this epoch
    first = sum(sizes[:source])
    rows = global_batch(seed + source, epoch * counts[source] + earlier, batch, sizes[source])
    return [first + row for row in rows]


# ---------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------


def open_base(config: Config, ranks: Ranks) -> tuple[Encoder, Path | None]:
    """An earlier stage's encoder with its adapters merged, and its folder; or a plain Llama."""
    name = encoder_of(config.model)
    if missing_stage(Path(name)):
        raise UserError(f"--model {name}: no encoder there; run the stage before this one first "
                        f"(pretrain_ctkd.py, then contrastive.py; --resume goes on with an "
                        f"interrupted one), or name an encoder or a Llama")
    folder = find_model(name, config.revision or None)
    dtype = pick_dtype(config.dtype, ranks.device)
    if not is_encoder(folder):
        pooling = "memory" if config.pooling == "auto" else config.pooling
        shape = EncoderConfig(
            (config.memory_tokens or 8) if pooling == "memory" else 0, pooling,
            "bidirectional" if config.attention == "auto" else config.attention,
            config.max_tokens, config.template or "{text}", config.document_template)
        encoder = plain_encoder(name, shape, config.revision or None, dtype, ranks.device)
        check_special_tokens(encoder)
        return encoder.requires_grad_(False), None
    encoder = load_encoder(folder, config.base or None, dtype, ranks.device)
    own = {"pooling": encoder.config.pooling, "attention": encoder.config.attention,
           "memory_tokens": encoder.config.num_memory_tokens, "template": encoder.config.template,
           "document_template": encoder.config.document_template}
    for key, trained in own.items():
        if getattr(config, key) not in ("", "auto", 0, trained):
            raise UserError(f"{flag(key)} {getattr(config, key)}: {name} was trained with "
                            f"{trained!r}; leave it out, or start from its base")
    merge_lora(encoder.llama)
    encoder.config = replace(encoder.config, max_tokens=config.max_tokens)
    return encoder, folder


def missing_stage(folder: Path) -> bool:
    """Whether this is the place of a run that has no encoder (yet)."""
    if folder.is_dir():
        return (folder / "environment.json").is_file() or not any(folder.iterdir())
    return folder.parts[:1] == ("runs",)


def new_encoder(config: Config, ranks: Ranks) -> tuple[Encoder, Path | None]:
    """The encoder that the stage trains, with a fresh adapter, and the folder it came from.

    Memory tokens and table of an earlier stage are frozen; memory tokens that a plain Llama gets
    here have never been trained, and are.
    """
    encoder, folder = open_base(config, ranks)
    before = [entry["stage"] for entry in encoder.history]
    # every stage draws anew: an adapter that began like the merged one would repeat its directions
    random = torch.Generator()
    random.manual_seed(int(generator(config.seed, 5, len(before)).integers(2**62)))
    if encoder.config.num_memory_tokens and not before:
        encoder.add_memory("normal", train_table=False, generator=random)
    encoder.lora_config = LoraConfig(config.lora_r, config.lora_alpha, config.lora_dropout)
    add_lora(encoder.llama, encoder.lora_config, random)
    encoder.adapters = True
    again = sum(name.partition("_")[0] == config.stage for name in before)
    stage = f"{config.stage}_{again + 1}" if again else config.stage  # its adapter's folder
    encoder.history = [*encoder.history, {**settings_of(config), "stage": stage}]
    if ranks.rank == 0 and (config.stage in before or "scl" in before):
        print(f"note: {config.model} has been through {', '.join(before)}; these adapters are "
              f"merged, and {config.stage} trains a new one after them")
    return encoder.train(), folder


def check_special_tokens(encoder: Encoder):
    """UserError if a template has a special token like </s> that the tokenizer does not know."""
    for template in (encoder.config.template, encoder.config.document_template):
        for token in re.findall(r"<[^<>\s]+>", template):
            if encoder.tokenizer.backend.token_to_id(token) is None:
                raise UserError(f"template {template!r}: {token} is no token of "
                                f"{encoder.tokenizer.file}; write its own end-of-text token")


def score(encoder: Encoder, config: Config, ranks: Ranks) -> dict[str, float]:
    """Main scores x 100 on --eval-tasks, and their `mean`; all ranks share the encoding."""
    scores = {}
    for name in eval_tasks(config):
        instruction = evaluate.instruction_for(name, "auto", encoder)
        found = evaluate.evaluate_together(evaluate.TASKS[name], encoder.encode, instruction,
                                           config.data_dir or None, ranks)
        scores[name] = 100 * found["main_score"]
    return {**scores, "mean": sum(scores.values()) / len(scores)}


def eval_tasks(config: Config) -> list[str]:
    """The names in --eval-tasks."""
    return config.eval_tasks.replace(",", " ").split()


def score_and_keep(encoder: Encoder, config: Config, done: int, score_log: Metrics | None,
                   earlier: Path | None, ranks: Ranks):
    """Log the scores after `done` steps; keep the encoder in OUT/best if it is the best so far."""
    found = score(encoder, config, ranks)
    with ranks.together():
        if score_log is not None:
            before = [row.get("mean", -np.inf) for row in score_log.rows if row["step"]]
            best = max(before, default=-np.inf)
            if done and found["mean"] > best:
                save_encoder(encoder, Path(config.out) / "best", earlier)
            score_log.write(step=done, **found)


def train(config: Config, ranks: Ranks, going_on: bool) -> int:
    """Run a stage, or go on with it; returns the number of the signal that ended it early, or 0."""
    out, first = Path(config.out), ranks.rank == 0
    for turn in (first, not first):  # rank 0 first: it checks, downloads and caches
        with ranks.together():
            if turn:
                encoder, earlier = new_encoder(config, ranks)
                data = open_data(config, encoder, progress=first)
                for task in eval_tasks(config):  # complain before the training, not after
                    evaluate.read_task(evaluate.TASKS[task], config.data_dir or None)
    if config.stage == "scl" and data.instructions and encoder.config.template == "{text}":
        encoder.config = replace(encoder.config, template=INSTRUCTED)
    steps = config.steps or sum(n // config.batch_size for n in sources(data, config).values())
    schedule, tasks = config.schedule_steps or steps, eval_tasks(config)
    warmup = int(config.warmup * schedule)
    parameters = list(trained_of(encoder).values())
    optimizer = torch.optim.AdamW(
        parameters, config.lr, weight_decay=config.weight_decay, fused=True
    )
    run = {"base": encoder.sha256 or encoder.base["sha256"],
           "texts": digest_ids(data) if config.stage == "ucl" else data.sha256}
    start, checkpoints = start_run(config, encoder, optimizer, run, ranks, going_on)
    with ranks.together():
        metrics = Metrics(out / "metrics.jsonl", start) if first else None
        score_log = Metrics(out / "scores.jsonl", start + 1) if first and tasks else None
    if first:
        print_header(config, encoder, f"{config.stage}, {encoder.config.pooling} pooling, "
                     f"{encoder.config.attention}", ranks)
        print(f"data   {describe(data, config)}\n"
              f"steps  {steps:,} of {config.batch_size} rows -> {out}", flush=True)
    bar = tqdm(total=steps, initial=start, disable=not first, dynamic_ncols=True,
               mininterval=0.2 if sys.stderr.isatty() else 15)  # few lines in a log file

    with stop_on_signals() as signals, bar:
        # a crash may have come between saving and scoring
        scored = ranks.from_first(any(row["step"] == start for row in score_log.rows)
                                  if score_log else 0)
        if tasks and not scored and (start == steps or start % config.eval_every == 0):
            score_and_keep(encoder, config, start, score_log, earlier, ranks)
        for step in range(start, steps):
            clock = time.perf_counter()
            rate = learning_rate(step, schedule, warmup, config.min_lr, config.lr)
            optimizer.param_groups[0]["lr"] = rate
            # forward, backward, reduce, clip, step
            batch = read_batch(encoder, data, config, step)
            loss, queries, keys = batch_gradient(encoder, batch, config, step, ranks)
            reduce_gradients(parameters, ranks)
            norm = torch.nn.utils.clip_grad_norm_(parameters, config.clip or float("inf"))
            stop, late = agree(signals, checkpoints.late(), ranks)
            if not (loss.isfinite() and norm.isfinite()):
                raise UserError(describe_non_finite(config, step, loss, norm,
                                                    torch.cat((queries, keys)), data, batch))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            # everything below is diagnostics and saving
            done = step + 1
            if first:
                seconds, tokens = time.perf_counter() - clock, batch.real_tokens
                about = diagnostics(queries, keys, config.temperature, batch.excluded)
                metrics.write(step=step, loss=loss.item(), **about,
                              masked=int(batch.excluded.sum()), learning_rate=rate,
                              grad_norm=norm.item(), real_tokens=tokens,
                              tokens_per_second=tokens / seconds)
                bar.set_postfix_str(f"loss {loss:.3f}, accuracy {about['accuracy']:.2f}, "
                                    f"{tokens / seconds:,.0f} tokens/s", refresh=False)
                bar.update()
            if done == steps or stop or late or done % config.save_every == 0:
                with ranks.together():
                    if first:
                        checkpoints.save(done)
            if stop:
                return stop
            if tasks and (done == steps or done % config.eval_every == 0):
                score_and_keep(encoder, config, done, score_log, earlier, ranks)
        with ranks.together():
            if first and not (start == steps and is_encoder(out / "encoder")):
                save_encoder(encoder, out / "encoder", earlier)
    return 0


def describe(data: list[np.ndarray] | Triples, config: Config) -> str:
    """The data in a line, and the instructions of the files of triples in one more line each."""
    if config.stage == "ucl":
        tokens = sum(map(len, data)) / len(data)
        return f"{config.text}: {len(data):,} texts, {tokens:.0f} tokens each"
    kinds = [f"\n  {len(file.offsets):>9,}  {file.path.name}: "
             f"{' | '.join(filter(None, file.instructions)) or 'no instruction'}"
             for file in data.files]
    return f"{config.triples}: {len(data):,} rows, {config.batches}{''.join(kinds)}"


def describe_non_finite(
    config: Config, step: int, loss: Tensor, norm: Tensor, embeddings: Tensor, data, batch: Batch
) -> str:
    """The message for a loss or gradient that is not finite: the step and the rows to look at."""
    finite = embeddings.isfinite().all(dim=1).tolist()
    rows = sorted({row for row, fine in zip(batch.rows + batch.key_rows, finite) if not fine})
    rows = rows or batch.rows
    if isinstance(data, Triples):
        named = (f"{file.path.name} {row}" for file, row in map(data.locate, rows[:8]))
    else:
        named = (f"{config.text} {row}" for row in rows[:8])
    return (f"step {step}: the loss ({loss.item():.4g}) or the gradient's norm ({norm.item():.4g}) "
            f"is not finite; nothing was updated. Rows (from 0): {', '.join(named)}"
            f"{', ...' * (len(rows) > 8)}. Lower --lr or use --dtype float32; checkpoints are in "
            f"{config.out}/checkpoints")


# ---------------------------------------------------------------------------------------------
# After training
# ---------------------------------------------------------------------------------------------


def report(config: Config, ranks: Ranks):
    """Score the encoder on the embedded STS set beside what it came from, and say what next."""
    folder, device = Path(config.out), str(ranks.device)
    dtype = torch.bfloat16 if ranks.device.type == "cuda" else torch.float32
    options = {"dtype": dtype, "device": device}
    print("\nembedded STS set (325 pairs), Spearman x 100")
    rows = {"before": config.model, config.stage: folder / "encoder"}
    if is_encoder(folder / "best"):
        rows[f"{config.stage}, best"] = folder / "best"
    for name, model in rows.items():
        encoder, method = evaluate.open_model(str(model), base=config.base or None,
                                              revision=config.revision or None, **options)
        stages = " + ".join(entry["stage"] for entry in encoder.history) or f"untrained, {method}"
        print(f"  {name:<12}{stages:<26}{evaluate.demo_sts(encoder):6.2f}")
        del encoder  # before the next copy of the weights is loaded
    demo = str(folder) == PRESETS["ucl-demo"]["out"]  # what stage 3's demo goes on from
    flags = "" if demo else f" --model {folder} --triples FOLDER --out FOLDER"
    after = f"\n  torchrun contrastive.py --stage scl{flags}" * (config.stage == "ucl")
    print(f"\nthe encoder is in {folder}/encoder; next (evaluate.py downloads 250 pairs):{after}\n"
          f"  python evaluate.py --task sts17 --model {folder}")


def check(config: Config):
    """Raise UserError for values that no run can have."""
    check_numbers(config, {"batch_size": 2, "memory_tokens": 0, "negatives": 0, "eval_every": 1,
                           "max_tokens": 10, "document_tokens": 10, "schedule_steps": 0,
                           "attention_dropout": 0}, below_one=("attention_dropout",))
    if config.temperature <= 0:
        raise UserError(f"--temperature {config.temperature}: must be above 0")
    longest = max(config.max_tokens, config.document_tokens if config.stage == "scl" else 0)
    if config.micro_tokens < longest:
        raise UserError(f"--micro-tokens {config.micro_tokens}: smaller than one text, which may "
                        f"have {longest} tokens; raise it, or lower --max-tokens and "
                        f"--document-tokens")
    if config.stage == "scl" and not config.triples:
        raise UserError("--stage scl needs --triples: a .jsonl, a folder of them, or demo")
    if config.stage == "ucl" and config.triples:
        raise UserError(f"--triples {config.triples}: is for --stage scl; ucl takes --text")
    for name in eval_tasks(config):
        if name not in evaluate.TASKS:
            raise UserError(f"--eval-tasks {name}: unknown; one or more of "
                            f"{', '.join(evaluate.TASKS)}")


def parse_arguments(argv: list[str] | None) -> Config:
    """The command line; the preset is the stage's demo unless a model other than it is named."""

    def pick(given: dict) -> str:
        demo = given.get("model", "demo") == "demo"
        return given.get("stage", "ucl") + ("-demo" if demo else "")

    return parse_config(Config, PRESETS, pick, argv, __doc__)


def main(argv: list[str] | None = None) -> int:
    """Run a contrastive stage from its command line; returns the exit code (see run_stage)."""
    return run_stage(parse_arguments(argv), check, FREE, train, report)


if __name__ == "__main__":
    sys.exit(record(main)())

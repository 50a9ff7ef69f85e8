"""Stage 1 of LLM2Comp: compress a text into K memory tokens from which the frozen Llama goes on.

    torchrun pretrain_ctkd.py                                 the embedded demo, minutes on 2 cores
    torchrun --nproc-per-node 4 pretrain_ctkd.py --preset paper --out runs/llama2
    torchrun pretrain_ctkd.py --model FOLDER_OR_REPOSITORY --text texts.jsonl --out runs/mine
    python pretrain_ctkd.py --help                            every setting

The encoder f_theta (the Llama + LoRA + its own embedding table, bidirectional) reads a context and
K memory tokens; the frozen causal Llama g_phi reads only the K memory states and has to go on as it
would after the whole context. Objectives (section 3 of the paper):

    ctkd   KL(teacher || student) over the continuation            Eq. 5, the paper's LLM2Comp_KL
    nll    cross entropy of the continuation's tokens              Eq. 4, LLM2Comp_NLL
    rc     cross entropy of the context itself                     reconstruction, LLM2Comp_RC

Letters as in model.py; a continuation has S tokens. Order and splits depend on (seed, position of
the sample in the run) alone, dropout also on which texts share a forward pass: an interruption
changes nothing, the number of ranks and the micro-batch only the dropout.
"""

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record  # tracebacks for torchrun
from tqdm import tqdm

import evaluate
from data import UserError
from data.corpora import digest_ids, read_texts
from data.tokenizer import Tokenizer
from lora import LoraConfig, add_lora
from model import Encoder, EncoderConfig, Llama, flat_ids, is_encoder, load_encoder, pack
from model import plain_encoder, save_encoder, steady, to_device
from training import (
    Metrics, Ranks, agree, check_numbers, generator, global_batch, learning_rate, parse_config,
    pick_dtype, print_header, reduce_gradients, run_stage, setting, settings_of, start_run,
    stop_on_signals, trained_of,
)

MIN_SIDE = 10  # fewest tokens of a context (BOS counted) and of a continuation
FREE = ("resume", "recompute", "save_every", "save_minutes", "timeout")  # --resume may change


@dataclass
class Config:
    """Stage 1. Defaults are the paper's (its official code where the paper is silent)."""

    model: str = setting("meta-llama/Llama-2-7b-chat-hf", "folder, hub repository, or demo")
    revision: str = setting("", "branch, tag or commit of a hub model")
    text: str = setting("wikitext103", "a .txt, a .jsonl (also .gz), wikitext103, or demo")
    out: str = setting("runs/ctkd", "folder of the run; must be new or empty")
    objective: str = setting("ctkd", "Eq. 5, Eq. 4, or reconstruction", ("ctkd", "nll", "rc"))
    nll_weight: float = setting(0.0, "weight of the cross entropy beside ctkd")
    memory_tokens: int = setting(8, "K")
    memory_init: str = setting("normal", "initial memory rows", ("normal", "mean"))
    attention: str = setting("bidirectional", "of the encoder", ("bidirectional", "causal"))
    train_embeddings: str = setting("all", "the whole table or K rows", ("all", "memory"))
    num_texts: int = setting(32000, "texts used, the first ones; 0 = all")
    min_characters: int = setting(-1, "drop shorter texts; -1 = 1000 for wikitext103, else off")
    max_text_tokens: int = setting(-1, "drop texts of so many; -1 = 512 for wikitext103; 0 = off")
    max_tokens: int = setting(512, "cut texts to this, BOS and K counted")
    batch_size: int = setting(4, "texts a step, over all ranks")
    micro_batch: int = setting(0, "texts a forward pass; 0 = a rank's whole share")
    steps: int = setting(0, "optimiser steps; 0 = once through the texts")
    lr: float = setting(1e-4, "highest learning rate")
    min_lr: float = setting(1e-5, "where the rate starts and ends")
    warmup: float = setting(0.1, "share of the steps in which the rate rises")
    weight_decay: float = setting(1e-5, "of AdamW")
    clip: float = setting(2.0, "largest norm of the gradient; 0 = off")
    lora_r: int = setting(16, "rank of the adapters")
    lora_alpha: float = setting(32, "the adapters are scaled by alpha / r")
    lora_dropout: float = setting(0.05, "before the adapters")
    chunk_rows: int = setting(256, "rows of logits formed at a time")
    recompute: bool = setting(False, "less memory, more time: keep the inputs of blocks only")
    dtype: str = setting("auto", "of frozen weights and activations",
                         ("auto", "bfloat16", "float32", "float64"))
    device: str = setting("auto", "auto, cpu, cuda")
    threads: int = setting(0, "CPU threads a process; 0 = the cores shared among processes")
    seed: int = setting(0, "of order, splits, initialisation and dropout")
    deterministic: bool = setting(False, "on CUDA: the same bits from the same input, slower")
    save_every: int = setting(500, "steps between checkpoints")
    save_minutes: float = setting(0.0, "also save when the last checkpoint is so old; 0 = off")
    timeout: float = setting(30.0, "minutes that a rank waits for the others in a step")
    resume: bool = setting(False, "go on from the newest checkpoint in --out")


PRESETS = {
    "paper": {},
    "demo": {
        "model": "demo", "text": "demo", "out": "runs/ctkd-demo", "num_texts": 0, "steps": 200,
        "batch_size": 8, "lr": 1e-3, "max_tokens": 256, "save_every": 100,
    },
}

# ---------------------------------------------------------------------------------------------
# Objectives
# ---------------------------------------------------------------------------------------------


class ThroughHead(torch.autograd.Function):
    """Sum of row_loss(hidden @ head^T) over chunks of rows; the (rows, V) logits are never kept.

    The head is frozen, so a chunk's gradient with respect to its hidden states can be formed while
    its logits are at hand: nothing of size V outlives the chunk.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, head: Tensor, row_loss, chunk_rows: int) -> Tensor:
        """hidden (R, D), head (V, D), row_loss(logits, rows) -> scalar, for each chunk of rows."""
        total, gradients = 0.0, []
        for start in range(0, len(hidden), chunk_rows):
            rows = slice(start, start + chunk_rows)
            with torch.enable_grad():
                chunk = hidden[rows].detach().requires_grad_()
                loss = row_loss(logits_of(chunk, head), rows)
            gradients += torch.autograd.grad(loss, chunk)
            total += loss.detach()
        ctx.save_for_backward(torch.cat(gradients))
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return ctx.saved_tensors[0] * gradient, None, None, None


def logits_of(hidden: Tensor, head: Tensor) -> Tensor:
    """hidden (R, D), head (V, D) -> (R, V)."""
    return F.linear(steady(hidden), head)[: len(hidden)]


def log_probabilities(logits: Tensor) -> Tensor:
    """log softmax over V in at least fp32: finite where a probability underflows."""
    return F.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def ctkd_loss(
    student: Tensor, teacher: Tensor, weights: Tensor, head: Tensor, chunk_rows: int = 256
) -> Tensor:
    """Eq. 5: sum over rows of weight * KL(teacher || student), the sum over V exact.

    student, teacher (R, D) hidden states, weights (R,); gradient flows to `student` only.
    """

    def kl(student_logits: Tensor, rows: slice) -> Tensor:
        with torch.no_grad():
            target = log_probabilities(logits_of(teacher[rows], head))
        student_log = log_probabilities(student_logits)
        divergence = F.kl_div(student_log, target, reduction="none", log_target=True).sum(-1)
        return divergence @ weights[rows].to(divergence.dtype)

    return ThroughHead.apply(student, head, kl, chunk_rows)


def nll_loss(student: Tensor, targets: Tensor, head: Tensor, chunk_rows: int = 256) -> Tensor:
    """Eq. 4: sum over rows of -log p(target); student (R, D) hidden states, targets (R,) ids."""

    def cross_entropy(logits: Tensor, rows: slice) -> Tensor:
        return F.nll_loss(log_probabilities(logits), targets[rows], reduction="sum")

    return ThroughHead.apply(student, head, cross_entropy, chunk_rows)


def student_states(
    llama: Llama, bos: list[int], memory: Tensor, continuations: list[np.ndarray]
) -> Tensor:
    """g_phi reads BOS m~_1..m~_K n_{a+1}..n_{a+S} (Eq. 4): each text's last S + 1 states.

    memory (N, K, D) -> (sum of S + 1, D). The first of the S + 1 states (that of m~_K) predicts
    n_{a+1}, the last one what follows the text.
    """
    n, k, _ = memory.shape
    sizes = [len(c) for c in continuations]
    begin = llama.embed(flat_ids([np.array(bos)] * n, memory.device))
    text = llama.embed(flat_ids(continuations, memory.device))
    x, lengths = pack((begin, [len(bos)] * n), (memory.flatten(0, 1), [k] * n), (text, sizes))
    return llama(x, lengths, causal=True, last=[size + 1 for size in sizes])


@torch.no_grad()
def teacher_states(llama: Llama, texts: list[np.ndarray], splits: list[int]) -> Tensor:
    """g_phi reads the whole texts: the states (sum of S + 1, D) that predict the same positions."""
    x, lengths = llama.embed(flat_ids(texts, llama.head.device)), [len(ids) for ids in texts]
    return llama(x, lengths, causal=True, last=[n - a + 1 for n, a in zip(lengths, splits)])


def stage1_loss(
    encoder: Encoder, texts: list[np.ndarray], splits: list[int], counts: dict, config: Config
) -> Tensor:
    """This micro-batch's share of the global batch's loss, for the chosen objective.

    texts: token ids with BOS; splits: a + 1, the tokens of each context with BOS; counts: `texts`
    and `tokens` of the global batch, by which sums are divided. ctkd: mean over a text's S + 1
    rows, then over texts. nll, rc: mean over all target tokens.
    """
    llama, bos = encoder.llama, encoder.tokenizer.bos
    device = llama.head.device
    contexts = [ids[:a] for ids, a in zip(texts, splits)]
    continuations = [ids[a:] for ids, a in zip(texts, splits)]
    if config.objective == "rc":
        contexts, continuations = texts, [ids[len(bos) :] for ids in texts]
    memory = encoder.memory(flat_ids(contexts, device), [len(ids) for ids in contexts])
    student = student_states(llama, bos, memory, continuations)
    rows = [len(ids) + 1 for ids in continuations]
    loss = 0.0
    if config.objective == "ctkd":
        teacher = teacher_states(llama, texts, splits)
        shares = np.concatenate([np.full(n, 1 / n / counts["texts"]) for n in rows])
        weights = to_device(torch.from_numpy(shares), device)
        loss = ctkd_loss(student, teacher, weights, llama.head, config.chunk_rows)
    nll_weight = config.nll_weight if config.objective == "ctkd" else 1.0
    if nll_weight:
        targets = flat_ids(continuations, device)
        predicting = torch.cat([h[:-1] for h in student.split(rows)])
        nll = nll_loss(predicting, targets, llama.head, config.chunk_rows)
        loss = loss + nll_weight * nll / counts["tokens"]
    return loss


# ---------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------


def prepare_texts(config: Config, tokenizer: Tokenizer) -> list[np.ndarray]:
    """The run's texts as token ids with BOS, after the filters; UserError if too few are left."""
    paper = config.text == "wikitext103"  # the paper's filter is the default of this source
    min_characters, max_text_tokens = config.min_characters, config.max_text_tokens
    min_characters = min_characters if min_characters >= 0 else 1000 * paper
    max_text_tokens = max_text_tokens if max_text_tokens >= 0 else 512 * paper
    texts = read_texts(config.text)
    long = [text for text in texts if len(text) >= min_characters]
    kept, dropped = [], {f"under {min_characters} characters": len(texts) - len(long)}
    shorter = longer = 0
    wanted = config.num_texts or len(long)
    for start in range(0, len(long), 4096):
        for ids in tokenizer.encode(long[start : start + 4096]):
            if len(ids) < 2 * MIN_SIDE:
                shorter += 1
            elif max_text_tokens and len(ids) >= max_text_tokens:
                longer += 1
            else:
                kept.append(ids[: config.max_tokens - config.memory_tokens])
        if len(kept) >= wanted:
            break
    dropped[f"under {2 * MIN_SIDE} tokens"] = shorter
    dropped[f"{max_text_tokens} tokens or more"] = longer
    counts = ", ".join(f"{n} {why}" for why, n in dropped.items() if n) or "none dropped"
    if not kept:
        raise UserError(f"{config.text}: no text left of {len(texts)} after the filters "
                        f"({counts}); change --min-characters or --max-text-tokens")
    kept = kept[:wanted]
    if len(kept) < config.batch_size:
        raise UserError(f"--batch-size {config.batch_size} is larger than the {len(kept)} texts of "
                        f"{config.text} ({counts}); lower it")
    return kept


def split_point(config: Config, position: int, length: int) -> int:
    """Where the text at `position` in the run is cut: uniform in [10, length - 10], BOS counted."""
    return int(generator(config.seed, 1, position).integers(MIN_SIDE, length - MIN_SIDE + 1))


def micro_batches(config: Config, step: int, ranks: Ranks) -> list[range]:
    """This rank's part of the step's batch, as ranges of places within the batch."""
    share = ranks.share(config.batch_size)
    size = config.micro_batch or len(share)
    return [share[i : i + size] for i in range(0, len(share), size)]


def batch_gradient(
    encoder: Encoder, corpus: list[np.ndarray], config: Config, step: int, ranks: Ranks
) -> tuple[Tensor, dict]:
    """Forward and backward over this rank's micro-batches of a step; gradients are not yet summed.

    Returns the losses (batch_size,) float64, each micro-batch's in equal parts at the places of its
    texts and zero elsewhere, and the counts of the global batch.
    """
    batch = [corpus[i] for i in global_batch(config.seed, step, config.batch_size, len(corpus))]
    first = step * config.batch_size
    splits = [split_point(config, first + j, len(ids)) for j, ids in enumerate(batch)]
    targets = sum(len(ids) - (len(encoder.tokenizer.bos) if config.objective == "rc" else a)
                  for ids, a in zip(batch, splits))
    counts = {"texts": len(batch), "tokens": targets, "real_tokens": sum(map(len, batch))}
    losses = torch.zeros(len(batch), dtype=torch.float64, device=ranks.device)
    for places in micro_batches(config, step, ranks):
        torch.manual_seed(int(generator(config.seed, 2, first + places[0]).integers(2**62)))
        part = [batch[j] for j in places], [splits[j] for j in places]
        loss = stage1_loss(encoder, *part, counts, config)
        loss.backward()
        losses[places.start : places.stop] = loss.detach() / len(places)
    return losses, counts


# ---------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------


def new_encoder(config: Config, ranks: Ranks) -> Encoder:
    """The Llama with fresh adapters, memory tokens and (--train-embeddings all) its own table."""
    shape = EncoderConfig(num_memory_tokens=config.memory_tokens, attention=config.attention,
                          max_tokens=config.max_tokens)
    dtype = pick_dtype(config.dtype, ranks.device)
    encoder = plain_encoder(config.model, shape, config.revision or None, dtype, ranks.device)
    random = torch.Generator().manual_seed(config.seed)
    encoder.lora_config = LoraConfig(config.lora_r, config.lora_alpha, config.lora_dropout)
    add_lora(encoder.llama, encoder.lora_config, random)
    encoder.llama.recompute = config.recompute
    encoder.add_memory(config.memory_init, config.train_embeddings == "all", random)
    encoder.adapters = True
    encoder.history = [{"stage": "ctkd", **settings_of(config)}]
    return encoder.train()


def train(config: Config, ranks: Ranks, going_on: bool) -> int:
    """Run stage 1, or go on with it; returns the number of the signal that ended it early, or 0."""
    if config.batch_size < ranks.size:
        raise UserError(f"--batch-size {config.batch_size}: {ranks.size} processes need at least "
                        f"one text each; start fewer with --nproc-per-node")
    out, clip = Path(config.out), config.clip or float("inf")
    for turn in (ranks.rank == 0, ranks.rank > 0):  # rank 0 first: it checks, downloads and caches
        with ranks.together():
            if turn:
                encoder = new_encoder(config, ranks)
                corpus = prepare_texts(config, encoder.tokenizer)
    steps = config.steps or len(corpus) // config.batch_size
    parameters = list(trained_of(encoder).values())
    optimizer = torch.optim.AdamW(
        parameters, config.lr, weight_decay=config.weight_decay, fused=True
    )
    run = {"base": encoder.base["sha256"], "texts": digest_ids(corpus)}
    start, checkpoints = start_run(config, encoder, optimizer, run, ranks, going_on)
    if ranks.rank == 0:
        print_header(config, encoder, f"K = {config.memory_tokens}, {config.attention}, objective "
                     f"{config.objective}", ranks)
        print(f"text   {config.text}: {len(corpus):,} texts, "
              f"{sum(map(len, corpus)) / len(corpus):.0f} tokens each; "
              f"{steps:,} steps of {config.batch_size} -> {out}")
    with ranks.together():
        metrics = Metrics(out / "metrics.jsonl", start) if ranks.rank == 0 else None
    bar = tqdm(total=steps, initial=start, disable=ranks.rank > 0, dynamic_ncols=True,
               mininterval=0.2 if sys.stderr.isatty() else 15)  # few lines in a log file

    with stop_on_signals() as signals, bar:
        for step in range(start, steps):
            clock = time.perf_counter()
            rate = learning_rate(step, steps, int(config.warmup * steps), config.min_lr, config.lr)
            optimizer.param_groups[0]["lr"] = rate
            # forward, backward, reduce, clip, step
            losses, counts = batch_gradient(encoder, corpus, config, step, ranks)
            reduce_gradients(parameters, ranks)
            norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
            losses = ranks.sum(losses)
            stop, late = agree(signals, checkpoints.late(), ranks)
            if not (losses.isfinite().all() and norm.isfinite()):
                raise UserError(describe_non_finite(config, step, losses, norm, corpus))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            # everything below is diagnostics and saving
            done = step + 1
            if ranks.rank == 0:
                seconds, loss = time.perf_counter() - clock, losses.sum().item()
                speed = counts["real_tokens"] / seconds
                metrics.write(step=step, loss=loss, learning_rate=rate, grad_norm=norm.item(),
                              real_tokens=counts["real_tokens"], tokens_per_second=speed)
                about = f"loss {loss:.3f}, rate {rate:.1e}, {speed:,.0f} tokens/s"
                bar.set_postfix_str(about, refresh=False)
                bar.update()
            if done == steps or stop or late or done % config.save_every == 0:
                with ranks.together():
                    if ranks.rank == 0:
                        checkpoints.save(done)
            if stop:
                return stop
        with ranks.together():
            if ranks.rank == 0 and not (start == steps and is_encoder(out / "encoder")):
                save_encoder(encoder, out / "encoder")
    return 0


def describe_non_finite(config, step, losses, norm, corpus) -> str:
    """The message for a loss or gradient that is not finite: the step and the texts to look at."""
    samples = global_batch(config.seed, step, config.batch_size, len(corpus))
    bad = [samples[j] for j in range(len(samples)) if not losses[j].isfinite()] or samples
    return (f"step {step}: the loss ({losses.sum().item():.4g}) or the gradient's norm "
            f"({norm.item():.4g}) is not finite; nothing was updated. Texts (from 0, after the "
            f"filters of {config.text}): {', '.join(map(str, bad))}. Lower --lr or use --dtype "
            f"float32; checkpoints are in {config.out}/checkpoints")


# ---------------------------------------------------------------------------------------------
# After training
# ---------------------------------------------------------------------------------------------


@torch.no_grad()
def go_on(llama: Llama, x: Tensor, count: int) -> list[int]:
    """Greedy continuation by `count` tokens of one sequence of input embeddings x (T, D)."""
    ids = []
    for _ in range(count):
        hidden = llama(x, [len(x)], causal=True)
        ids.append(int(F.linear(hidden[-1], llama.head).argmax()))
        x = torch.cat((x, llama.embed(torch.tensor(ids[-1:], device=x.device))))
    return ids


@torch.no_grad()
def show_continuations(encoder: Encoder, texts: list[np.ndarray], tokens: int = 24):
    """Print how g_phi goes on from half a text, and from the K memory tokens of that half alone."""
    llama, tokenizer = encoder.llama, encoder.tokenizer
    for ids in texts:
        half = torch.from_numpy(ids[: max(MIN_SIDE, len(ids) // 2)]).to(llama.head.device)
        memory = encoder.memory(half, [len(half)])[0]
        bos = llama.embed(torch.tensor(tokenizer.bos, device=half.device))
        full = tokenizer.decode(go_on(llama, llama.embed(half), tokens))
        short = tokenizer.decode(go_on(llama, torch.cat((bos, memory)), tokens))
        print(f"\ncontext ({len(half)} tokens)  ...{tokenizer.decode(half[-40:])!r}")
        print(f"  from the text     {full!r}\n  from {len(memory)} memories   {short!r}")


def report(config: Config, ranks: Ranks):
    """Score the saved encoder beside the untrained base, show two continuations, say what next."""
    device, folder = str(ranks.device), f"{config.out}/encoder"
    dtype = torch.bfloat16 if ranks.device.type == "cuda" else torch.float32
    options = {"dtype": dtype, "device": device}
    print("\nembedded STS set (325 pairs), Spearman x 100")
    plain = plain_encoder(config.model, revision=config.revision or None, **options)
    for method in evaluate.UNTRAINED:
        plain.config = replace(plain.config, pooling=method)
        print(f"  untrained, {method:<14}{evaluate.demo_sts(plain):6.2f}")
    del plain  # before the second copy of the weights is loaded
    encoder = load_encoder(folder, **options)
    print(f"  {config.objective}, {encoder.config.num_memory_tokens} memory tokens"
          f"{'':<5}{evaluate.demo_sts(encoder):6.2f}")
    show_continuations(encoder, prepare_texts(replace(config, num_texts=2, batch_size=1),
                                              encoder.tokenizer))
    demo = config.out == PRESETS["demo"]["out"]  # what stage 2's demo goes on from
    flags = "" if demo else f" --model {config.out} --out FOLDER"
    print(f"\nthe encoder is in {folder}; next (evaluate.py downloads 250 pairs):\n"
          f"  torchrun contrastive.py{flags}\n"
          f"  python evaluate.py --task sts17 --model {folder}")


def check(config: Config):
    """Raise UserError for values that no run can have."""
    check_numbers(config, {"memory_tokens": 1, "chunk_rows": 1, "micro_batch": 0, "nll_weight": 0,
                           "min_characters": -1, "max_text_tokens": -1}, below_one=())
    if config.max_tokens < config.memory_tokens + 2 * MIN_SIDE:
        raise UserError(f"--max-tokens {config.max_tokens}: must be at least --memory-tokens + "
                        f"{2 * MIN_SIDE} = {config.memory_tokens + 2 * MIN_SIDE}")


def parse_arguments(argv: list[str] | None) -> Config:
    """The command line; the preset is `demo` unless a model other than the demo's is named."""

    def pick(given: dict) -> str:
        return "paper" if given.get("model", "demo") != "demo" else "demo"

    return parse_config(Config, PRESETS, pick, argv, __doc__)


def main(argv: list[str] | None = None) -> int:
    """Run stage 1 from its command line; returns the exit code (see run_stage)."""
    return run_stage(parse_arguments(argv), check, FREE, train, report)


if __name__ == "__main__":
    sys.exit(record(main)())

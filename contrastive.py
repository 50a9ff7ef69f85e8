"""Stages 2 and 3 of LLM2Comp: sharpen the encoder by contrastive learning.

    torchrun contrastive.py                                   stage 2 (ucl) on the bundled demo
    torchrun contrastive.py --stage scl                       stage 3 (scl) after it
    torchrun --nproc-per-node 8 contrastive.py --preset paper --model runs/llama2 \\
        --out runs/llama2-ucl
    torchrun --nproc-per-node 8 contrastive.py --preset paper --stage scl \\
        --model runs/llama2-ucl --triples FOLDER --out runs/llama2-scl
    torchrun contrastive.py --stage scl --triples FOLDER --dry-run        how its rows are read
    python contrastive.py --help                              every setting

    ucl    query and key are the same text under two dropout masks; B keys
    scl    query, positive, hard negative; the 2 B keys of Eq. 8

Both stages minimise InfoNCE over a global batch of B rows and differ only in that batch. It need
not fit in memory: its texts are embedded in micro-batches of at most --micro-tokens tokens, whose
activations are recomputed in the backward pass. Micro-batches are cut from the global batch and
dealt out to the processes: their size changes nothing but the dropout, the number of processes not
even that. Notation as in model.py; B rows in a batch, M keys.
"""

import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from shlex import quote

if __name__ == "__main__":  # handle Ctrl-C while torch is imported, which takes seconds
    from runtime.errors import await_command

    await_command()

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record  # tracebacks for torchrun

from data.batches import Sentences, TripleRows, open_triples, preview, require_rows, token_batches
from data.tokenizer import INSTRUCTED, check_special_tokens
from lora import TARGETS, LoraConfig, add_lora, merge_lora
from measures import effective_dimension
from model import (MEMORY_INITS, POOLINGS, Encoder, EncoderConfig, load_encoder, plain_encoder,
                   save_encoder)
from runtime.devices import flat_ids, scoring_dtype, to_device
from runtime.encoders import read_exported, require_no_base, require_stage
from runtime.errors import UserError, print_once, run_command
from runtime.formats import encoder_of, is_encoder, note_positions
from runtime.hub import find_model
from runtime.identity import identity
from runtime.ranks import Ranks
from runtime.run import Run, run_stage
from runtime.schedule import ADAPTER, DROPOUT, learning_rate, seed_torch, torch_seed, warmup_steps
from runtime.settings import RunConfig, check_bounds, flag, parse_config, require_unset
from runtime.settings import setting, stored_settings

# ---------------------------------------------------------------------------------------------
# The objective
# ---------------------------------------------------------------------------------------------


def scaled_cosines(queries: Tensor, keys: Tensor, temperature: float, excluded: Tensor) -> Tensor:
    """cos(q_i, k_j) / temperature (B, M); -inf where `excluded` (B, M) is true."""
    cosines = F.normalize(queries, dim=-1) @ F.normalize(keys, dim=-1).T
    return (cosines / temperature).masked_fill(to_device(excluded, cosines.device), -torch.inf)


def info_nce(queries: Tensor, keys: Tensor, temperature: float, excluded: Tensor) -> Tensor:
    """Eq. 8: mean over i of -log( exp(cos(q_i, k_i) / tau) / sum_j exp(cos(q_i, k_j) / tau) ).

    queries (B, D), keys (M, D) with query i's positive at i: M = B for ucl, 2 B for scl with one
    hard negative per row. excluded (B, M): keys not used as negatives (data.batches.same_texts).
    """
    # one direction only, as in the official code: no loss from keys to queries
    logits = scaled_cosines(queries, keys, temperature, excluded)
    return F.cross_entropy(logits, torch.arange(len(queries), device=logits.device))


# ---------------------------------------------------------------------------------------------
# The gradient of a global batch, in the memory of a micro-batch
# ---------------------------------------------------------------------------------------------


class GlobalBatch:
    """The embeddings of a batch too large for its activations to fit (GradCache, arXiv 2101.06983).

    The micro-batches, dealt out to the ranks, are embedded without a graph, except each rank's
    last. Once the loss has been differentiated with respect to the embeddings, `backward` embeds
    the other micro-batches again, one at a time, with the same dropout and a graph, and propagates
    the gradient to the parameters. Every rank computes the loss of the whole batch and propagates
    the gradient of its own rows; the sum over ranks is the full gradient.
    """

    def __init__(self, encoder: Encoder, texts: list[np.ndarray], config: "Config", step: int,
                 ranks: Ranks):
        """Embed the texts: `embeddings` (n, D), on every rank, is a leaf that takes a gradient."""
        self.encoder, self.texts, self.config, self.step = encoder, texts, config, step
        lengths = [len(ids) + encoder.config.num_memory_tokens for ids in texts]
        self.parts = token_batches(lengths, config.micro_tokens)[ranks.rank :: ranks.size]
        wide, width = torch.promote_types(encoder.dtype, torch.float32), encoder.table.shape[1]
        z = torch.zeros(len(texts), width, dtype=wide, device=encoder.device)
        for part in self.parts:
            # backward begins with the last one, which therefore keeps its graph
            with torch.set_grad_enabled(part is self.parts[-1]):
                self.last = self.embed(part)
            z[part] = self.last.detach()
        self.embeddings = ranks.sum(z).requires_grad_()  # a gather: other ranks add zeros

    def embed(self, part: list[int]) -> Tensor:
        """Embeddings of these texts, with the same dropout each time."""
        seed_torch(self.config.seed, DROPOUT, self.step, part[0])
        texts = [self.texts[i] for i in part]
        return self.encoder.embed(flat_ids(texts, self.encoder.device), [len(ids) for ids in texts],
                                  self.config.attention_dropout)

    def backward(self, loss: Tensor):
        """Add this rank's rows' share of the loss's gradient to the parameters' gradients."""
        loss.backward()
        for part in reversed(self.parts):
            z = self.last if part is self.parts[-1] else self.embed(part)
            z.backward(self.embeddings.grad[part])


# ---------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------


@dataclass
class Config(RunConfig):
    """Stages 2 and 3. Defaults are the paper's stage 2, `--stage scl` changes them (PRESETS)."""

    stage: str = setting("ucl", "ucl (stage 2) or scl (stage 3)", ("ucl", "scl"))
    model: str = setting("runs/ctkd", "a run or encoder folder to start from, or a plain Llama: "
                         "folder, hub repository, or demo", resumable="place")
    revision: str = setting("", "branch, tag or commit of a hub model", resumable="place")
    base: str = setting("", "path of the encoder's base model, if it has moved", resumable=True)
    other_base: bool = setting(False, "take another base than the encoder was trained on")
    text: str = setting("wiki1m", "a .txt, a .jsonl (also .gz), wiki1m, wikitext103, or demo",
                        resumable="place", only="ucl")
    num_texts: int = setting(128000, "use the first N texts; 0 = all", least=0, only="ucl")
    text_seed: int = setting(42, "shuffle the texts by this before the first N are taken; -1 = "
                             "the file's order", least=-1, only="ucl")
    triples: str = setting("", "a .jsonl(.gz) of {query, positive, negative}, a folder of "
                           "them, or demo", resumable="place", only="scl")
    instruction: str = setting("", "for the queries of files not named like E5's; none = for no "
                               "query at all", only="scl")
    negatives: int = setting(1, "hard negatives per row, drawn where a row has a list", least=0,
                             only="scl")
    batches: str = setting("mixed", "rows of a batch from all files, or from one file",
                           ("mixed", "single-dataset"), only="scl")
    out: str = setting("runs/ucl", "folder of the run; must be new or empty", resumable=True)
    pooling: str = setting("auto", "of a plain Llama; auto = memory; an encoder knows its own",
                           lambda: ["auto", "memory", *(p for p in POOLINGS if p != "echo")])
    attention: str = setting("auto", "of a plain Llama; auto = bidirectional; an encoder knows "
                             "its own", ("auto", "bidirectional", "causal"))
    memory_tokens: int = setting(0, "K, of a plain Llama with pooling memory; 0 = 8", least=0)
    memory_init: str = setting("auto", "initial memory rows of a plain Llama; auto = mean, see "
                               "pretrain_ctkd.py", ("auto", *MEMORY_INITS))
    template: str = setting("", "of a plain Llama's texts, like 'query: {text}</s>'")
    document_template: str = setting("", "of a plain Llama's documents")
    special_tokens: str = setting("auto", "of a plain Llama, see pretrain_ctkd.py; auto = literal",
                                  ("auto", "literal", "parsed"), older="parsed")
    # the official code's 512 and 1,024 include its 8 memory tokens
    max_tokens: int = setting(504, "cut texts and queries to this, BOS counted; the K memory "
                              "tokens come on top", least=10)
    document_tokens: int = setting(1016, "cut documents to this", least=10, only="scl")
    encoder_tokens: int = setting(0, "cut texts to this once trained; 0 = max_tokens", least=0)
    batch_size: int = setting(128, "rows per step, over all ranks", least=2)
    micro_tokens: int = setting(2048, "tokens embedded at a time; more micro-batches than "
                                "processes keep all of them busy", resumable="bits")
    temperature: float = setting(0.05, "cosines are divided by it")
    attention_dropout: float = setting(0.2, "dropout on the attention weights", least=0, below=1)
    steps: int = setting(0, "optimiser steps; 0 = once through the data", least=0)
    schedule_steps: int = setting(0, "length of the learning-rate schedule; 0 = steps", least=0)
    lr: float = setting(3e-5, "peak learning rate", least=0)
    min_lr: float = setting(1e-5, "learning rate at the start and the end", least=0)
    warmup: float = setting(0.1, "steps of rising rate; below 1, a share of the schedule", least=0)
    weight_decay: float = setting(1e-3, "of AdamW", least=0)
    clip: float = setting(1.0, "clip the gradient to this norm; 0 = off", least=0)
    lora_r: int = setting(16, "rank of the new adapters", least=1)
    lora_alpha: float = setting(32, "the adapters are scaled by alpha / r")
    lora_dropout: float = setting(0.05, "dropout on the adapters' input", least=0, below=1)
    lora_k_proj: bool = setting(False, "adapt the keys, too, which the official code does not")
    eval_tasks: str = setting("", "tasks of evaluate.py whose mean score chooses the best encoder")
    eval_every: int = setting(100, "steps between evaluations on --eval-tasks", least=1)
    data_dir: str = setting("", "folder with the tasks' repositories, hub layout", resumable=True)
    save_every: int = setting(100, "steps between checkpoints", least=1, resumable=True)
    dry_run: bool = setting(False, "show what the data are read as, and stop", resumable=True)


SCL = {  # the paper reports step 200 (section 5.4, Figure 10) of a schedule of 2,000
    "stage": "scl", "model": "runs/ucl", "out": "runs/scl", "num_texts": 0, "batch_size": 1024,
    "micro_tokens": 8192, "steps": 200, "schedule_steps": 2000, "lr": 1e-4, "weight_decay": 3e-4,
    "clip": 0.0, "attention_dropout": 0.0,
}
DEMO = {"max_tokens": 256, "batch_size": 64, "micro_tokens": 4096, "num_texts": 0,
        "eval_tasks": "demo-sts demo-retrieval", "eval_every": 10, "save_every": 30}
# LLM2Vec's (its train_configs): training stops after 1,000 steps of a linear decay over 3 epochs,
# which has hardly begun for a million sentences; for E5's rows, if 1.5 million, it has 8,800 steps
LLM2VEC = {"steps": 1000, "weight_decay": 0.0, "clip": 1.0, "lora_k_proj": True}
PRESETS = {
    "ucl": {
        "paper": {},
        "llm2vec": {**LLM2VEC, "model": "runs/llm2vec", "out": "runs/llm2vec-ucl", "lr": 3e-5,
                    "min_lr": 3e-5, "warmup": 0.0, "max_tokens": 128, "encoder_tokens": 512,
                    "attention_dropout": 0.3},
        "demo": {**DEMO, "model": "runs/ctkd-demo", "text": "demo", "out": "runs/ucl-demo",
                 "steps": 60, "lr": 1e-4},
    },
    "scl": {
        "paper": SCL,
        "llm2vec": {**SCL, **LLM2VEC, "model": "runs/llm2vec-ucl", "out": "runs/llm2vec-scl",
                    "lr": 2e-4, "min_lr": 0.0, "warmup": 300.0, "schedule_steps": 8800,
                    "batch_size": 512, "max_tokens": 512, "document_tokens": 512},
        "demo": {**SCL, **DEMO, "model": "runs/ucl-demo", "triples": "demo", "steps": 30,
                 "out": "runs/scl-demo", "schedule_steps": 0, "lr": 3e-4, "document_tokens": 256},
        # once through MS MARCO's passages (arXiv 2310.08319; tevatron, examples/repllama)
        "repllama": {**SCL, "model": "meta-llama/Llama-2-7b-hf", "out": "runs/repllama",
                     "pooling": "last", "attention": "causal", "instruction": "none",
                     "template": "query: {text}</s>", "document_template": "passage: {text}</s>",
                     "max_tokens": 32, "document_tokens": 196, "encoder_tokens": 512,
                     "batch_size": 128, "negatives": 15, "temperature": 0.01, "lora_r": 32,
                     "lora_alpha": 64, "lora_dropout": 0.1, "steps": 0, "schedule_steps": 0,
                     "min_lr": 0.0, "warmup": 100.0, "weight_decay": 0.0, "clip": 1.0},
    },
}


def check(config: Config):
    """Raise UserError for values that no run can use."""
    check_bounds(config)
    if config.temperature <= 0:
        raise UserError(f"--temperature {config.temperature}: must be above 0")
    longest = max(config.max_tokens, config.document_tokens if config.stage == "scl" else 0)
    if config.micro_tokens < longest:
        raise UserError(f"--micro-tokens {config.micro_tokens}: smaller than one text, which may "
                        f"have {longest} tokens (its memory tokens come on top); raise it, or "
                        f"lower --max-tokens and --document-tokens")
    if 0 < config.encoder_tokens < config.max_tokens:
        raise UserError(f"--encoder-tokens {config.encoder_tokens}: below --max-tokens; raise it")
    if config.stage == "scl" and not config.triples:
        raise UserError("--stage scl needs --triples: a .jsonl, a folder of them, or demo")
    if config.data_dir and not config.eval_tasks:
        raise UserError(f"--data-dir {config.data_dir}: is for --eval-tasks; leave it out")
    from evaluate import find_task
    for name in eval_tasks(config):
        find_task(name, "--eval-tasks")


def parse_arguments(argv: list[str] | None) -> Config:
    """Parse the command line; the preset is `demo` unless a model other than `demo` is named."""
    return parse_config(Config, PRESETS, argv, __doc__)


# ---------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------


def open_base(config: Config, run: Run) -> tuple[Encoder, Path | None]:
    """An earlier stage's encoder with its adapters merged, and its folder; or a plain Llama."""
    name = encoder_of(config.model)
    require_stage(Path(name))
    folder, place = find_model(name, config.revision or None), (run.dtype, run.ranks.device)
    if read_exported(folder, EncoderConfig):
        raise UserError(f"--model {name}: was written by export.py, with the adapters merged; name "
                        f"the encoder or the run that it was made from")
    if not is_encoder(folder):
        require_no_base(name, config.base, config.other_base and not config.resume)
        pooling = "memory" if config.pooling == "auto" else config.pooling
        if pooling != "memory" and not config.resume:
            require_unset("--pooling memory", config, "memory_tokens", "memory_init")
        shape = EncoderConfig(
            (config.memory_tokens or 8) if pooling == "memory" else 0, pooling,
            "bidirectional" if config.attention == "auto" else config.attention,
            config.max_tokens, config.template or "{text}", config.document_template,
            special_tokens="literal" if config.special_tokens == "auto" else config.special_tokens)
        encoder = plain_encoder(name, shape, config.revision or None, *place)
        check_special_tokens(encoder.tokenizer, (shape.template, shape.document_template),
                             new=not config.resume)
        return encoder.requires_grad_(False), None
    encoder = load_encoder(folder, config.base or None, *place, other_base=config.other_base)
    alike = ("pooling", "attention", "template", "document_template", "special_tokens")
    own = {key: getattr(encoder.config, key) for key in alike} | {
        "memory_tokens": encoder.config.num_memory_tokens, "memory_init": "memory rows of its own"}
    for key, trained in own.items():
        if getattr(config, key) not in ("", "auto", 0, trained):
            raise UserError(f"{flag(key)} {getattr(config, key)}: {name} was trained with "
                            f"{trained!r}; leave it out, or start from its base")
    merge_lora(encoder.llama)
    return encoder, folder


def new_encoder(config: Config, run: Run) -> tuple[Encoder, Path | None]:
    """The encoder that the stage trains, with a fresh adapter, and the folder it came from.

    An earlier stage's memory tokens and table are frozen; a plain Llama gets new memory tokens,
    which are trained.
    """
    encoder, folder = open_base(config, run)
    limit = config.encoder_tokens or config.max_tokens
    encoder.config = replace(encoder.config, max_tokens=limit)
    note_positions(encoder, limit, config.document_tokens * (config.stage == "scl"))
    before = [entry["stage"] for entry in encoder.history]
    # each stage draws its own: one that began like the merged one would repeat its directions
    random = torch.Generator().manual_seed(torch_seed(config.seed, ADAPTER, len(before)))
    if encoder.config.num_memory_tokens and not before:
        init = "mean" if config.memory_init == "auto" else config.memory_init
        encoder.add_memory(init, train_table=False, generator=random)
    encoder.lora_config = LoraConfig(config.lora_r, config.lora_alpha, config.lora_dropout,
                                     TARGETS if config.lora_k_proj else LoraConfig.targets)
    add_lora(encoder.llama, encoder.lora_config, random)
    encoder.adapters = True
    again = sum(name.partition("_")[0] == config.stage for name in before)
    stage = f"{config.stage}_{again + 1}" if again else config.stage  # its adapter's folder
    encoder.history = [*encoder.history, {**stored_settings(config), "stage": stage}]
    return encoder.train(), folder


def open_data(config: Config, encoder: Encoder, progress: bool) -> Sentences | TripleRows:
    """The data of the stage; UserError if there are too few for a batch."""
    tokenize = partial(encoder.tokenize, max_tokens=config.max_tokens)
    if config.stage == "ucl":
        data = Sentences(config.text, config.num_texts, tokenize, config.text_seed)
    else:
        rows = open_triples(config.triples, config.instruction, progress)
        data = TripleRows(rows, tokenize, config.document_tokens, config.negatives,
                          one_file=config.batches == "single-dataset")
    require_rows(data.sizes, config.batch_size)
    return data


def prepare(config: Config, run: Run) -> tuple[Encoder, Path | None, Sentences | TripleRows]:
    """The encoder to train, the folder it came from, and the data to train it on."""
    encoder, earlier = new_encoder(config, run)
    data = open_data(config, encoder, progress=run.first_rank)
    from evaluate import TASKS, read_task

    for name in eval_tasks(config):  # complain before the training, not after
        read_task(TASKS[name], config.data_dir or None)
    before = [entry["stage"] for entry in encoder.history[:-1]]
    if run.first_rank and (config.stage in before or "scl" in before):
        print(f"note: {config.model} has been through {', '.join(before)}; these adapters are "
              f"merged, and {config.stage} trains a new one after them")
    return encoder, earlier, data


class BestEncoder:
    """--eval-tasks: scores.jsonl, and in OUT/best the encoder with the best mean score so far."""

    def __init__(self, config: Config, run: Run, encoder: Encoder, earlier: Path | None):
        self.config, self.run, self.encoder, self.earlier = config, run, encoder, earlier
        self.tasks = eval_tasks(config)
        self.log = run.open_log("scores.jsonl", run.first_step + 1) if self.tasks else None

    def start(self, instruction: str):
        """Score the encoder before the first step, or a checkpoint that a crash left unscored.

        instruction: before the first step, as --instruction of evaluate.py.
        """
        done, run = self.run.first_step, self.run
        scored = self.log is not None and any(row["step"] == done for row in self.log.rows)
        if not run.ranks.from_first(int(scored)):
            self.after(done, "auto" if done else instruction)

    def due(self, done: int) -> bool:
        """Whether to score after `done` steps (saved first, so that OUT/best is never ahead)."""
        at_end = done == self.run.last_step
        return bool(self.tasks) and (at_end or done % self.config.eval_every == 0)

    def after(self, done: int, instruction: str = "auto"):
        """Score the encoder after `done` steps if that is due, and keep it if it is the best."""
        if not self.due(done) or self.run.stopped:
            return
        from evaluate import score_on_ranks

        scores = {name: score_on_ranks(name, self.encoder, self.config.data_dir, self.run.ranks,
                                       instruction) for name in self.tasks}
        scores["mean"] = sum(scores.values()) / len(scores)
        self.run.ranks.on_first(self._keep, done, scores)

    def _keep(self, done: int, scores: dict[str, float]):
        means = [row["mean"] for row in self.log.rows if row["step"] and "mean" in row]
        if done and scores["mean"] > max(means, default=-np.inf):
            self.encoder.history[-1]["trained_steps"] = done
            save_encoder(self.encoder, self.run.out / "best", self.earlier)
        self.log.write(step=done, **scores)


def eval_tasks(config: Config) -> list[str]:
    """The names in --eval-tasks."""
    return config.eval_tasks.replace(",", " ").split()


def train(config: Config, run: Run):
    """Stage 2 or 3, from its first step or from the newest checkpoint of `run`."""
    ranks = run.ranks
    encoder, earlier, data = ranks.first_then_others(lambda: prepare(config, run))
    parameters = [p for p in encoder.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=config.weight_decay, fused=True)
    steps = config.steps or sum(n // config.batch_size for n in data.sizes.values())
    schedule = config.schedule_steps or steps
    warmup, clip = warmup_steps(config.warmup, schedule), config.clip or float("inf")
    run.start(encoder, optimizer, steps, {"base": identity(encoder), "texts": data.sha256},
              f"{config.stage}, {encoder.config.pooling} pooling, {encoder.config.attention}",
              str(data))
    best, instruction = BestEncoder(config, run, encoder, earlier), "auto"
    if data.instructions and encoder.config.template == "{text}":
        encoder.config = replace(encoder.config, template=INSTRUCTED)
        instruction = "none"  # it has never seen one
    best.start(instruction)

    for step in run.steps():
        rate = learning_rate(step, schedule, warmup, config.min_lr, config.lr)
        optimizer.param_groups[0]["lr"] = rate
        batch = data.read_batch(config.seed, step, config.batch_size)
        embedded = GlobalBatch(encoder, batch.queries + batch.keys, config, step, ranks)  # forward
        queries, keys = embedded.embeddings.split([len(batch.queries), len(batch.keys)])
        loss = info_nce(queries, keys, config.temperature, batch.excluded)
        embedded.backward(loss)
        ranks.sum_gradients(parameters)  # the gradient of the global batch, on all ranks
        norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
        rows = batch.rows + batch.key_rows
        run.require_finite(step, loss, norm, embedded.embeddings, rows, data.name)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        about = diagnostics(queries, keys, config.temperature, batch.excluded)
        run.end_step(step, f"loss {loss:.3f}, accuracy {about['accuracy']:.2f}", best.due(step + 1),
                     loss=loss.item(), **about, masked=int(batch.excluded.sum()), cut=batch.cut,
                     learning_rate=rate, grad_norm=norm.item(), real_tokens=batch.real_tokens)
        best.after(step + 1)

    encoder.history[-1]["trained_steps"] = steps
    run.finish(lambda folder: save_encoder(encoder, folder, earlier))


@torch.no_grad()
def diagnostics(queries: Tensor, keys: Tensor, temperature: float, excluded: Tensor) -> dict:
    """What a batch's embeddings look like; alignment and uniformity as in arXiv 2005.10242.

    accuracy: share of queries nearest to their positive. alignment: mean squared distance of the
    pairs. uniformity: log of the mean of exp(-2 squared distance) over pairs of positives.
    """
    b = len(queries)
    nearest = scaled_cosines(queries, keys, temperature, excluded).argmax(dim=1).cpu()
    queries, positives = F.normalize(queries, dim=-1), F.normalize(keys[:b], dim=-1)
    distances = torch.pdist(positives).square()
    return {"accuracy": (nearest == torch.arange(b)).double().mean().item(),
            "alignment": (queries - positives).square().sum(dim=1).mean().item(),
            "uniformity": distances.mul(-2).exp().mean().log().item(),
            "effective_dimension": effective_dimension(queries)}


# ---------------------------------------------------------------------------------------------
# After training
# ---------------------------------------------------------------------------------------------


def report(config: Config, device: torch.device):
    """Score the encoder and what it came from on the bundled STS set; say what to run next."""
    from evaluate import demo_sts, open_model

    folder = Path(config.out)
    options = {"dtype": scoring_dtype(None, device), "device": str(device),
               "base": config.base or None, "other_base": config.other_base}
    print("\nbundled STS set (325 pairs), Spearman x 100")
    rows = {"before": config.model, config.stage: folder / "encoder"}
    if is_encoder(folder / "best"):
        rows[f"{config.stage}, best"] = folder / "best"
    for name, model in rows.items():
        revision = config.revision or None if name == "before" else None
        encoder, method = open_model(str(model), revision=revision, **options)
        if not encoder.history:  # a plain Llama: cut texts as the new encoder does
            limit = config.encoder_tokens or config.max_tokens
            encoder.config = replace(encoder.config, max_tokens=limit)
        stages = " + ".join(entry.get("objective", entry["stage"])
                            for entry in encoder.history) or f"untrained, {method}"
        print(f"  {name:<12}{stages:<26}{demo_sts(encoder):6.2f}")
        del encoder  # before the next copy of the weights is loaded
    place = quote(str(folder))  # for a shell
    flags = f" --model {place} --triples FOLDER --out FOLDER"
    if config.text == "demo":  # stage 3's demo starts from this stage's, wherever that is
        default = config.out == PRESETS["ucl"]["demo"]["out"]
        flags = "" if default else f" --preset demo --model {place} --out FOLDER"
    after = f"\n  torchrun contrastive.py --stage scl{flags}" * (config.stage == "ucl")
    print(f"\nthe encoder is in {folder}/encoder; next (evaluate.py downloads 250 pairs):{after}\n"
          f"  python evaluate.py --task sts17 --model {place}")


def main(argv: list[str] | None = None) -> int:
    """Run a contrastive stage from its command line; returns the exit code (see run_stage)."""
    config = parse_arguments(argv)
    if config.dry_run:
        return run_command(lambda: check(config) or print_once(preview(config)))
    return run_stage(config, check, train, report)


if __name__ == "__main__":
    sys.exit(record(main)())

"""Stage 1 of LLM2Comp: compress a text into K memory tokens; the frozen Llama continues from them.

    torchrun pretrain_ctkd.py                                 the bundled demo, minutes on 2 cores
    torchrun pretrain_ctkd.py --preset smollm2                a real Llama, 20 minutes on one core
    torchrun --nproc-per-node 4 pretrain_ctkd.py --preset paper --out runs/llama2
    torchrun pretrain_ctkd.py --model FOLDER_OR_REPOSITORY --text texts.jsonl --out runs/mine
    python pretrain_ctkd.py --help                            every setting

The encoder f_theta (the Llama + LoRA + its own embedding table, bidirectional) reads a context and
K memory tokens; the frozen causal Llama g_phi reads only the K memory states and must continue as
it would after the whole context. Objectives (section 3 of the paper):

    ctkd   KL(teacher || student) over the continuation            Eq. 5, the paper's LLM2Comp_KL
    nll    cross entropy of the continuation's tokens              Eq. 4, LLM2Comp_NLL
    rc     cross entropy of the context itself                     Eq. 2, LLM2Comp_RC

one of ours, ctkd-window (Eq. 5 for tokens 9 to 41 of a continuation alone: docs/measured.md), and
those of pretexts.py, which the paper compares with: mntp, ebae-ebar.
Notation as in model.py; a continuation has S tokens. Order and splits depend only on (seed, place
of the sample in the run), dropout also on which texts share a forward pass: an interruption changes
nothing; the number of ranks and the micro-batch size change only the dropout.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from shlex import quote

if __name__ == "__main__":  # handle Ctrl-C while torch is imported, which takes seconds
    from runtime.errors import await_command

    await_command()

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record  # tracebacks for torchrun

import pretexts
from data.batches import MIN_SIDE, SplitBatch, SplitTexts, require_rows
from data.tokenizer import Tokenizer
from head import ThroughHead, log_probabilities, logits_of, nll_loss
from lora import TARGETS, LoraConfig, add_lora
from model import (MEMORY_INITS, PLAIN, Encoder, EncoderConfig, Llama, load_encoder,
                   plain_encoder, save_encoder)
from runtime.devices import flat_ids, pack, scoring_dtype, to_device
from runtime.errors import UserError
from runtime.formats import note_positions, require_head
from runtime.identity import identity
from runtime.run import Run, run_stage
from runtime.schedule import DROPOUT, learning_rate, seed_torch, warmup_steps
from runtime.settings import RunConfig, check_bounds, parse_config, setting, stored_settings

WINDOW = 8, 40  # ctkd-window: the tokens of a continuation before its first row, before its last

# ---------------------------------------------------------------------------------------------
# Objectives (section 3): what f_theta is trained to do
# ---------------------------------------------------------------------------------------------


def student_states(
    encoder: Encoder, contexts: list, continuations: list, rows: list[int]
) -> Tensor:
    """Eq. 2, 4: f_theta compresses the contexts, g_phi reads BOS m~_1..m~_K n_{a+1}..n_{a+S}.

    Token ids of N texts -> each text's last `rows` states (sum of rows, D). Of all S + 1, the first
    (that of m~_K) predicts n_{a+1}, the last one what follows n_{a+S}.
    """
    llama, bos, n = encoder.llama, encoder.tokenizer.bos, len(contexts)
    # Eq. 1, 3: the only trained part; gradients flow back to it through the frozen g_phi below
    memory = encoder.memory(flat_ids(contexts, encoder.device), [len(ids) for ids in contexts])
    # g_phi reads tokens from its own table, not from the encoder's trained one, and BOS first, as
    # in every text that it was trained on (official code)
    begin = llama.embed(flat_ids([np.array(bos)] * n, encoder.device))
    text = llama.embed(flat_ids(continuations, encoder.device))
    x, lengths = pack((begin, [len(bos)] * n), (memory.flatten(0, 1), [memory.shape[1]] * n),
                      (text, [len(ids) for ids in continuations]))
    return llama(x, lengths, causal=True, adapters=False, last=rows)


@torch.no_grad()
def teacher_states(llama: Llama, texts: list, rows: list[int]) -> Tensor:
    """g_phi reads contexts and continuations: the states (sum of rows, D) of the same positions.

    Of S + 1 rows, the first is that of the context's last token, which predicts n_{a+1}.
    """
    x, lengths = llama.embed(flat_ids(texts, llama.head.device)), [len(ids) for ids in texts]
    return llama(x, lengths, causal=True, adapters=False, last=rows)


def distil(
    encoder: Encoder, batch: SplitBatch, continuations: list, rows: list[int], config: "Config"
) -> tuple[Tensor, Tensor]:
    """KL(teacher || student), mean over each text's last `rows`, then over texts; student states.

    continuations: the batch's, or their beginnings.
    """
    student = student_states(encoder, batch.contexts, continuations, rows)
    texts = [np.concatenate(pair) for pair in zip(batch.contexts, continuations)]
    teacher = teacher_states(encoder.llama, texts, rows)
    # a row weighs 1 / (rows * texts in the global batch): micro-batches and ranks simply add up
    shares = np.concatenate([np.full(n, 1 / n / batch.total_texts) for n in rows])
    weights = to_device(torch.from_numpy(shares), encoder.device)
    return ctkd_loss(student, teacher, weights, encoder.llama.head, config.chunk_rows), student


def ctkd(encoder: Encoder, batch: SplitBatch, config: "Config") -> Tensor:
    """Eq. 5: KL(teacher || student), mean over a text's S + 1 rows, then over texts.

    Plus --nll-weight times Eq. 4 (0 in the official code).
    """
    rows = [len(ids) + 1 for ids in batch.continuations]
    loss, student = distil(encoder, batch, batch.continuations, rows, config)
    if config.nll_weight:
        loss = loss + config.nll_weight * token_nll(encoder, student, batch.continuations,
                                                    batch.total_targets, config.chunk_rows)
    return loss


def ctkd_window(encoder: Encoder, batch: SplitBatch, config: "Config") -> Tensor:
    """Ours: Eq. 5 for tokens 9 to 41 of a continuation alone, of a short one for its second half.

    Meant to ask for the content of a context: the first tokens are its next words, the late ones
    follow from the continuation itself. Not shown to be better than ctkd (docs/measured.md).
    """
    skipped, end = WINDOW
    continuations = [ids[:end] for ids in batch.continuations]
    rows = [len(ids) + 1 - min(skipped, (len(ids) + 1) // 2) for ids in continuations]
    return distil(encoder, batch, continuations, rows, config)[0]


def nll(encoder: Encoder, batch: SplitBatch, config: "Config") -> Tensor:
    """Eq. 4: -log p(token) of the continuations under the student, mean over all tokens."""
    rows = [len(ids) + 1 for ids in batch.continuations]
    student = student_states(encoder, batch.contexts, batch.continuations, rows)
    return token_nll(encoder, student, batch.continuations, batch.total_targets, config.chunk_rows)


def rc(encoder: Encoder, batch: SplitBatch, config: "Config") -> Tensor:
    """Eq. 2: the whole text is the context, and has to be reconstructed from its memory."""
    bos_length = len(encoder.tokenizer.bos)
    targets = [ids[bos_length:] for ids in batch.texts]
    total = batch.total_tokens - bos_length * batch.total_texts
    student = student_states(encoder, batch.texts, targets, [len(ids) + 1 for ids in targets])
    return token_nll(encoder, student, targets, total, config.chunk_rows)


# --objective -> (encoder, micro-batch, config) -> its share of the global batch's loss
OBJECTIVES: dict[str, Callable[[Encoder, SplitBatch, "Config"], Tensor]] = {
    "ctkd": ctkd, "nll": nll, "rc": rc, "ctkd-window": ctkd_window, **pretexts.OBJECTIVES,
}

# ---------------------------------------------------------------------------------------------
# Losses on hidden states
# ---------------------------------------------------------------------------------------------


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


def token_nll(
    encoder: Encoder, student: Tensor, targets: list, total: int, chunk_rows: int
) -> Tensor:
    """-log p of the target tokens, summed and divided by `total`.

    student: S + 1 states per text, of which the last one predicts no target.
    """
    predicting = torch.cat([h[:-1] for h in student.split([len(ids) + 1 for ids in targets])])
    ids = flat_ids(targets, encoder.device)
    return nll_loss(predicting, ids, encoder.llama.head, chunk_rows) / total


# ---------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------


@dataclass
class Config(RunConfig):
    """Stage 1. Defaults are the paper's (its official code where the paper is silent)."""

    model: str = setting("meta-llama/Llama-2-7b-chat-hf", "folder, hub repository, or demo",
                         resumable="place")
    revision: str = setting("", "branch, tag or commit of a hub model", resumable="place")
    text: str = setting("wikitext103", "a .txt, a .jsonl (also .gz), wikitext103, wiki1m, or "
                        "demo", resumable="place")
    out: str = setting("runs/ctkd", "folder of the run; must be new or empty", resumable=True)
    objective: str = setting("ctkd", "Eq. 5, Eq. 4, reconstruction (Eq. 2), or a task of "
                             "pretexts.py", OBJECTIVES)
    nll_weight: float = setting(0.0, "weight of the cross entropy beside ctkd", least=0)
    mask_token: str = setting("_", "mntp: what a masked token is replaced by")
    mask_share: float = setting(0.2, "mntp: share of the tokens to be predicted", least=0, below=1)
    memory_tokens: int = setting(8, "K; 0 for mntp", least=0)
    memory_init: str = setting("mean", "initial memory rows: nearly equal, at the table's mean; "
                               "spread like its rows; some of its rows", MEMORY_INITS)
    attention: str = setting("bidirectional", "of the encoder", ("bidirectional", "causal"))
    bos: int = setting(-1, "id of the token before each text; -1 = the base's own", least=-1)
    special_tokens: str = setting("literal", "</s> and the like in a text: literal letters, or "
                                  "parsed as transformers does", ("literal", "parsed"),
                                  older="parsed")
    train_embeddings: str = setting("all", "train the whole table, or only the K memory rows",
                                    ("all", "memory"))
    num_texts: int = setting(32000, "use the first N texts; 0 = all", least=0)
    text_seed: int = setting(42, "shuffle the texts by this before the first N are taken; -1 = the "
                             "file's order", least=-1)
    min_characters: int = setting(-1, "drop shorter texts; -1 = 1000 for wikitext103, else off",
                                  least=-1)
    max_text_tokens: int = setting(-1, "drop texts of this many tokens; -1 = 512 for wikitext103; "
                                   "0 = off", least=-1)
    max_tokens: int = setting(512, "cut texts to this, BOS counted; the K memory tokens come on "
                              "top")
    batch_size: int = setting(4, "texts per step, over all ranks", least=1)
    micro_batch: int = setting(0, "texts per forward pass; 0 = a rank's whole share", least=0,
                               resumable="bits")
    steps: int = setting(0, "optimiser steps; 0 = once through the texts", least=0)
    lr: float = setting(1e-4, "peak learning rate", least=0)
    min_lr: float = setting(1e-5, "learning rate at the start and the end", least=0)
    warmup: float = setting(0.1, "steps in which the rate rises, below 1 as a share", least=0)
    weight_decay: float = setting(1e-5, "of AdamW", least=0)
    clip: float = setting(2.0, "clip the gradient to this norm; 0 = off", least=0)
    lora_r: int = setting(16, "rank of the adapters", least=1)
    lora_alpha: float = setting(32, "the adapters are scaled by alpha / r")
    lora_dropout: float = setting(0.05, "dropout on the adapters' input", least=0, below=1)
    lora_k_proj: bool = setting(False, "adapt the keys, too, which the official code does not")
    chunk_rows: int = setting(256, "rows of logits computed at a time", least=1,
                              resumable="bits")
    recompute: bool = setting(False, "less memory, more time: keep only the blocks' inputs",
                              resumable=True)


PRESETS = {
    "paper": {},
    "demo": {
        "model": "demo", "text": "demo", "out": "runs/ctkd-demo", "num_texts": 0, "steps": 200,
        "batch_size": 8, "lr": 1e-3, "max_tokens": 256, "save_every": 100,
        "memory_init": "normal",  # nearly equal rows do not separate in so few steps
    },
    # a real Llama in minutes on one core: docs/results.md has what decided each value
    "smollm2": {
        "model": "HuggingFaceTB/SmolLM2-135M-Instruct", "out": "runs/ctkd-smollm2",
        "num_texts": 2400, "steps": 600, "lr": 1e-3, "max_tokens": 128, "save_every": 100,
        "train_embeddings": "memory",
        "memory_init": "rows",  # "normal" rows do not take off early with every seed
        "attention": "causal",  # bidirectional may not take off at this rate in so few steps
    },
    **pretexts.PRESETS,
}


def check(config: Config):
    """Raise UserError for values that no run can use."""
    check_bounds(config)
    pretexts.check(config)
    if config.nll_weight and config.objective != "ctkd":
        raise UserError(f"--nll-weight {config.nll_weight}: is for --objective ctkd; leave it out")
    if config.max_tokens < 2 * MIN_SIDE:
        raise UserError(f"--max-tokens {config.max_tokens}: must be at least {2 * MIN_SIDE}, "
                        f"{MIN_SIDE} for a context and as many for its continuation")


def parse_arguments(argv: list[str] | None) -> Config:
    """Parse the command line; the preset is `demo` unless a model other than `demo` is named."""
    return parse_config(Config, {"stage 1": PRESETS}, argv, __doc__)


# ---------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------


def new_encoder(config: Config, run: Run) -> Encoder:
    """The Llama with fresh adapters, memory tokens and (--train-embeddings all) its own table."""
    pretext = config.objective in pretexts.OBJECTIVES
    shape = EncoderConfig(config.memory_tokens, attention=config.attention,
                          max_tokens=config.max_tokens, bos=config.bos,
                          special_tokens=config.special_tokens,
                          **pretexts.SHAPES.get(config.objective, {}))
    encoder = plain_encoder(config.model, shape, config.revision or None, run.dtype,
                            run.ranks.device)
    require_head(config.model, encoder.llama.config.has_head)
    note_positions(encoder, config.max_tokens)
    for document in (False, True):
        encoder.tokenize(["a"], document=document)  # UserError if there is no room for a text
    if config.objective == "mntp":
        pretexts.mask_id(encoder.tokenizer, config.mask_token)  # UserError if there is none
    encoder.requires_grad_(False)
    random = torch.Generator().manual_seed(config.seed)
    encoder.lora_config = LoraConfig(config.lora_r, config.lora_alpha, config.lora_dropout,
                                     TARGETS if config.lora_k_proj else LoraConfig.targets)
    add_lora(encoder.llama, encoder.lora_config, random)
    if config.memory_tokens:
        encoder.add_memory(config.memory_init, config.train_embeddings == "all", random)
    encoder.llama.recompute, encoder.adapters = config.recompute, True
    # nll and rc are variants of the same stage: "objective" tells them apart
    stage = config.objective.replace("-", "_") if pretext else "ctkd"
    encoder.history = [{"stage": stage, **stored_settings(config)}]
    return encoder.train()


def open_texts(config: Config, tokenizer: Tokenizer, num_texts: int) -> SplitTexts:
    """The first `num_texts` texts of the run (0: all)."""
    return SplitTexts.read(config.text, tokenizer, num_texts, config.min_characters,
                           config.max_text_tokens, config.max_tokens, config.text_seed)


def prepare(config: Config, run: Run) -> tuple[Encoder, SplitTexts]:
    """The encoder to train and the texts to train it on."""
    if config.batch_size < run.ranks.size:
        raise UserError(f"--batch-size {config.batch_size}: {run.ranks.size} processes need at "
                        f"least one text each; start fewer with --nproc-per-node")
    encoder = new_encoder(config, run)
    data = open_texts(config, encoder.tokenizer, config.num_texts)
    require_rows(data.sizes, config.batch_size)
    return encoder, data


def train(config: Config, run: Run):
    """Stage 1, from its first step or from the newest checkpoint of `run`."""
    ranks, objective = run.ranks, OBJECTIVES[config.objective]
    encoder, data = ranks.first_then_others(lambda: prepare(config, run))
    parameters = [p for p in encoder.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=config.weight_decay, fused=True)
    steps = config.steps or len(data.texts) // config.batch_size
    warmup, clip = warmup_steps(config.warmup, steps), config.clip or float("inf")
    run.start(encoder, optimizer, steps, {"base": identity(encoder), "texts": data.sha256},
              f"K = {config.memory_tokens}, {config.attention}, objective {config.objective}",
              str(data))

    for step in run.steps():
        rate = learning_rate(step, steps, warmup, config.min_lr, config.lr)
        optimizer.param_groups[0]["lr"] = rate
        batch = data.read_batch(config.seed, step, config.batch_size)
        losses = torch.zeros(config.batch_size, dtype=torch.float64, device=ranks.device)
        for places in ranks.micro_batches(config.batch_size, config.micro_batch):
            seed_torch(config.seed, DROPOUT, step * config.batch_size + places[0])
            share = objective(encoder, batch.part(places), config)  # forward
            share.backward()
            # spread over the micro-batch's texts, so that require_finite can name them
            losses[places.start : places.stop] = share.detach() / len(places)
        ranks.sum_gradients(parameters)  # of the global batch, on all ranks
        norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
        loss = ranks.sum(losses).sum()
        run.require_finite(step, loss, norm, losses, batch.rows, data.name)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        run.end_step(step, f"loss {loss:.3f}, rate {rate:.1e}", loss=loss.item(),
                     learning_rate=rate, grad_norm=norm.item(), real_tokens=batch.total_tokens)

    encoder.history[-1]["trained_steps"] = steps
    run.finish(lambda folder: save_encoder(encoder, folder))


# ---------------------------------------------------------------------------------------------
# After training
# ---------------------------------------------------------------------------------------------


@torch.no_grad()
def generate(llama: Llama, x: Tensor, count: int) -> list[int]:
    """The `count` token ids that greedily continue one sequence of input embeddings x (T, D)."""
    ids = []
    for _ in range(count):
        hidden = llama(x, [len(x)], causal=True)
        ids.append(int(F.linear(hidden[-1], llama.head).argmax()))
        x = torch.cat((x, llama.embed(torch.tensor(ids[-1:], device=x.device))))
    return ids


@torch.no_grad()
def show_continuations(encoder: Encoder, texts: list[np.ndarray], tokens: int = 24):
    """Print how g_phi continues half a text, and how it does so from that half's memory alone."""
    llama, tokenizer = encoder.llama, encoder.tokenizer
    for ids in texts:
        half = torch.from_numpy(ids[: max(MIN_SIDE, len(ids) // 2)]).to(encoder.device)
        memory = encoder.memory(half, [len(half)])[0]
        bos = llama.embed(torch.tensor(tokenizer.bos, device=half.device))
        full = tokenizer.decode(generate(llama, llama.embed(half), tokens))
        short = tokenizer.decode(generate(llama, torch.cat((bos, memory)), tokens))
        print(f"\ncontext ({len(half)} tokens)  ...{tokenizer.decode(half[-40:])!r}")
        print(f"  from the text     {full!r}\n  from {len(memory)} memories   {short!r}")


def report(config: Config, device: torch.device):
    """Score the encoder and its untrained base, show two continuations and what to run next."""
    from evaluate import UNTRAINED, demo_sts

    folder = f"{config.out}/encoder"
    options = {"dtype": scoring_dtype(None, device), "device": str(device)}
    print("\nbundled STS set (325 pairs), Spearman x 100")
    shape = replace(PLAIN, max_tokens=config.max_tokens, bos=config.bos,
                    special_tokens=config.special_tokens)
    plain = plain_encoder(config.model, shape, config.revision or None, **options)
    for method in UNTRAINED:
        plain.config = replace(shape, pooling=method)
        print(f"  untrained, {method:<18}{demo_sts(plain):6.2f}")
    del plain  # before the second copy of the weights is loaded
    encoder = load_encoder(folder, **options)
    k = encoder.config.num_memory_tokens
    label = f"{config.objective}, {f'{k} memory tokens' if k else encoder.config.pooling}"
    print(f"  {label:<29}{demo_sts(encoder):6.2f}")
    if config.objective not in pretexts.OBJECTIVES:  # g_phi does not read their memory
        show_continuations(encoder, open_texts(config, encoder.tokenizer, num_texts=2).texts)
    flags = f" --model {quote(config.out)} --out FOLDER"
    if config.text == "demo":  # stage 2's demo starts from this stage's, wherever that is
        default = config.out == PRESETS["demo"]["out"]
        flags = "" if default else f" --preset demo{flags}"
    print(f"\nthe encoder is in {folder}; next (evaluate.py downloads 250 pairs):\n"
          f"  torchrun contrastive.py{flags}\n"
          f"  python evaluate.py --task sts17 --model {quote(folder)}")


def main(argv: list[str] | None = None) -> int:
    """Run stage 1 from its command line; returns the exit code (see run_stage)."""
    return run_stage(parse_arguments(argv), check, train, report)


if __name__ == "__main__":
    sys.exit(record(main)())

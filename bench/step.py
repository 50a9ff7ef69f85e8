"""One CTKD training step, timed side by side: this project and two versions on transformers + peft.

    python bench/step.py --shape 134m --threads 1,2                       CPU, bf16
    python bench/step.py --shape 7b --device cuda --batch 16 --peak-tflops 989 --share-device
                                                                          one H200, not run yet

A step is forward, backward, clip and AdamW on one batch of random token ids, with the paper's
dropout of the adapters' input; all implementations get the same weights (drawn by parameter name),
batches, splits and adapters.

    ours       pretrain_ctkd.batch_gradient, then clip and step as in its loop
    official   (a) the method as the official code writes it: two copies of the base, eager
               attention, padding and masks, logits of every token (of the encoder's too), masks,
               slices and losses in Python loops over the texts
    good       (b) transformers + peft done well: one copy, adapters switched off for teacher and
               student, SDPA, padding on the right (the causal passes need no mask then) up to a
               multiple of 64 (shapes repeat), the head on the needed rows only, one KL

Each implementation lives in a process of its own, so that its peak memory is its own, and waits on
its stdin while another one is timed; steps take turns (round, thread count, implementation). The
first two turns of each thread count are warm-up and not counted. Before them the loss of the first
batch without dropout must agree to 2e-3, the norm of its gradient to 2 % (fp32: both to 1e-3), or
the run ends with an error. On the CPU our commands let glibc keep freed memory, so `ours` does;
--keep-memory-for-all gives the others the same.

seconds      median over the counted steps at the thread count at which that median is lowest
tokens/s     median of real tokens (texts with BOS, no padding, no memory tokens) by seconds
peak         CPU: ru_maxrss of the process, and how far it is above the resident memory after the
             imports; CUDA: torch.cuda.max_memory_allocated
utilisation  median of useful FLOPs by seconds, as a share of the rate of one matrix product (a
             batch's tokens through an up_proj) that takes turns with the steps, at the same number
             of threads. Useful: 4n a token of encoder (context + K) and student (1 + K + S), 2n a
             token of the teacher, n = weights of all projections; the head counts for the S + 1
             needed rows of a text, 4VD for the student and 2VD for the teacher. Padding, attention
             scores, adapters and the optimiser are not counted.

bf16 on the CPU: torch and oneDNN compile kernels for every new length, which costs all three time
and up to 1 GiB. Resident memory counts what the allocator has not given back; to see what is in
use, set MALLOC_MMAP_THRESHOLD_=65536 (every tensor in pages of its own; slow).
"""

import argparse
import importlib
import json
import os
import platform
import resource
import subprocess
import sys
import time
import zlib
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import lora  # noqa: E402
import pretrain_ctkd as stage1  # noqa: E402
from data import UserError  # noqa: E402
from model import Encoder, EncoderConfig, Llama, LlamaConfig  # noqa: E402
from training import Ranks, global_batch, keep_freed_memory  # noqa: E402

SHAPES = {  # V, D, intermediate, layers, heads, key-value heads, head_dim
    "tiny": LlamaConfig(512, 64, 128, 2, 4, 4, 16),
    "134m": LlamaConfig(32000, 768, 2048, 12, 12, 12, 64),
    "7b": LlamaConfig(32000, 4096, 11008, 32, 32, 32, 128),
}
SHORTEST, LONGEST = 250, 500  # tokens of a text, BOS counted
BOS = 1
WARM_UP = 2  # turns that are not counted
GIB = 2**30

# ---------------------------------------------------------------------------------------------
# What all implementations share: data, weights, counts
# ---------------------------------------------------------------------------------------------


def stage1_config(args) -> stage1.Config:
    """The paper's settings, with what the command line changes."""
    config = replace(stage1.Config(), batch_size=args.batch, dtype=args.dtype, seed=args.seed,
                     device=args.device, lora_dropout=args.dropout)
    return replace(config, **json.loads(args.ours))


def random_corpus(args) -> list[np.ndarray]:
    """Enough texts of random ids for the warm-up and all steps."""
    random = np.random.default_rng(args.seed)
    lengths = random.integers(SHORTEST, LONGEST + 1, args.batch * (args.steps + WARM_UP))
    vocabulary = SHAPES[args.shape].vocab_size
    return [np.concatenate(([BOS], random.integers(3, vocabulary, n - 1))).astype(np.int32)
            for n in lengths]


def batch_of(config: stage1.Config, corpus: list, step: int) -> tuple[list[np.ndarray], list[int]]:
    """The texts of a step and their splits, as pretrain_ctkd.batch_gradient chooses them."""
    chosen = global_batch(config.seed, step, config.batch_size, len(corpus))
    texts, first = [corpus[i] for i in chosen], step * config.batch_size
    return texts, [stage1.split_point(config, first + j, len(t)) for j, t in enumerate(texts)]


def sizes(c: LlamaConfig) -> tuple[int, int]:
    """Weights of all projections, and of the head."""
    attention = 2 * c.hidden_size * (c.num_attention_heads + c.num_key_value_heads) * c.head_dim
    mlp = 3 * c.hidden_size * c.intermediate_size
    return c.num_hidden_layers * (attention + mlp), c.vocab_size * c.hidden_size


def useful_flops(c: LlamaConfig, texts: list, splits: list[int], k: int) -> int:
    """FLOPs of a step as the docstring above counts them."""
    n, head = sizes(c)
    total = 0
    for ids, a in zip(texts, splits):
        s = len(ids) - a
        total += n * (4 * (a + k) + 4 * (1 + k + s) + 2 * len(ids)) + head * (4 + 2) * (s + 1)
    return total


@torch.no_grad()
def draw(name: str, tensor: Tensor, std: float):
    """Fill a tensor from a generator that depends on its name alone."""
    random = torch.Generator(tensor.device).manual_seed(zlib.crc32(name.encode()))
    tensor.normal_(0.0, std, generator=random)


def draw_base(model: nn.Module, layers: int):
    """The frozen weights: norms 1, all else normal with deviation columns^-1/2.

    As in GPT-2, what adds to the residual stream is smaller by (2 layers)^-1/2; it also keeps the
    rounding of bf16 from growing with depth.
    """
    for name, p in model.requires_grad_(False).named_parameters():
        if p.dim() == 1:
            nn.init.ones_(p)
        else:
            adds = name.endswith(("o_proj.weight", "down_proj.weight"))
            draw(name, p, p.shape[-1] ** -0.5 * ((2 * layers) ** -0.5 if adds else 1.0))


def draw_adapters(model: nn.Module):
    """A with the deviation of LoRA's usual initialisation, B small but not zero."""
    for name, p in model.named_parameters():
        if "lora_" in name:
            name = name.removeprefix("base_model.model.").removesuffix(".default.weight")
            draw(name, p, 0.02 if name.endswith("lora_B") else (3 * p.shape[-1]) ** -0.5)


# ---------------------------------------------------------------------------------------------
# The implementations: `parameters` to train, `gradient(step)` -> loss
# ---------------------------------------------------------------------------------------------


class Ours:
    imports = ()

    def __init__(self, args):
        self.config, self.corpus = stage1_config(args), random_corpus(args)
        self.ranks = Ranks(0, 1, torch.device(args.device))
        with torch.device("meta"):
            llama = Llama(SHAPES[args.shape]).to(getattr(torch, args.dtype))
        draw_base(llama.to_empty(device=args.device), llama.config.num_hidden_layers)
        tokenizer = SimpleNamespace(bos=[BOS])
        shape = EncoderConfig(self.config.memory_tokens, max_tokens=self.config.max_tokens)
        self.encoder = Encoder(llama, tokenizer, shape)
        c = self.config
        lora.add_lora(llama, lora.LoraConfig(c.lora_r, c.lora_alpha, c.lora_dropout))
        draw_adapters(llama)
        llama.recompute = c.recompute
        self.encoder.add_memory("normal", train_table=True)
        draw("memory_tokens", self.encoder.memory_tokens, llama.config.hidden_size**-0.5)
        self.encoder.adapters = True
        self.encoder.train()
        self.modules = self.encoder
        self.parameters = [p for p in self.encoder.parameters() if p.requires_grad]

    def gradient(self, step: int) -> Tensor:
        inputs = self.encoder, self.corpus, self.config, step, self.ranks
        return stage1.batch_gradient(*inputs)[0].sum()


class Baseline:
    """What both versions on transformers + peft share; `loss(texts, splits)` is theirs."""

    imports = ("peft", "transformers.models.llama.modeling_llama")

    def __init__(self, args):
        self.config, self.corpus = stage1_config(args), random_corpus(args)
        self.k, self.v = self.config.memory_tokens, SHAPES[args.shape].vocab_size
        self.shape, self.device = SHAPES[args.shape], torch.device(args.device)
        self.dtype = getattr(torch, args.dtype)
        self.memory_ids = torch.arange(self.v, self.v + self.k, device=self.device)
        self.build()
        self.parameters = [p for p in self.modules.parameters() if p.requires_grad]

    def llama(self, attention: str) -> nn.Module:
        """A frozen LlamaForCausalLM with the shared weights."""
        from transformers import LlamaConfig, LlamaForCausalLM

        same = {name: value for name, value in asdict(self.shape).items() if name != "rope"}
        config = LlamaConfig(**same, use_cache=False)
        with self.device:
            model = LlamaForCausalLM._from_config(
                config, dtype=self.dtype, attn_implementation=attention
            )
        draw_base(model, self.shape.num_hidden_layers)
        return model.train()

    def add_adapters(self, model: nn.Module) -> nn.Module:
        """fp32 adapters through peft, with the shared values.

        peft would cast a layer's whole input up to fp32; with that off, autocast casts the small
        matrices down instead, which is faster.
        """
        from peft import LoraConfig, get_peft_model
        from peft.tuners.tuners_utils import BaseTunerLayer

        settings = LoraConfig(
            r=self.config.lora_r, lora_alpha=self.config.lora_alpha,
            lora_dropout=self.config.lora_dropout, target_modules=list(lora.LoraConfig().targets),
        )
        model = get_peft_model(model, settings)
        draw_adapters(model)
        for module in model.modules():
            if isinstance(module, BaseTunerLayer):
                module.cast_input_dtype_enabled = False
        return model

    def encoder_table(self, table: Tensor) -> nn.Parameter:
        """The encoder's trainable fp32 table (V + K, D)."""
        memory = torch.empty(self.k, table.shape[1], device=self.device)
        draw("memory_tokens", memory, table.shape[1] ** -0.5)
        return nn.Parameter(torch.cat((table.float(), memory)))

    def gradient(self, step: int) -> Tensor:
        texts, splits = batch_of(self.config, self.corpus, step)
        texts = [torch.from_numpy(ids).to(self.device, torch.int64) for ids in texts]
        mixed = self.dtype is torch.bfloat16
        with torch.autocast(self.device.type, torch.bfloat16, enabled=mixed):
            loss = self.loss(texts, splits)
        loss.backward()
        return loss.detach()


class Official(Baseline):
    """(a) two copies, eager, padded, whole logits, loops over texts."""

    def build(self):
        self.decoder = self.llama("eager")
        model = self.llama("eager")
        model.resize_token_embeddings(self.v + self.k, mean_resizing=False)
        self.encoder = self.add_adapters(model)
        self.table = model.get_input_embeddings()
        self.table.weight = self.encoder_table(self.decoder.get_input_embeddings().weight)
        self.modules = nn.ModuleList([self.decoder, self.encoder])

    def memory(self, texts: list[Tensor], splits: list[int]) -> list[Tensor]:
        """f_theta: per text its K memory states."""
        n, longest = len(texts), max(splits) + self.k
        ids = torch.zeros(n, longest, dtype=torch.int64, device=self.device)
        mask = torch.full((n, 1, longest, longest), torch.finfo(self.dtype).min,
                          dtype=self.dtype, device=self.device)
        for i, (text, a) in enumerate(zip(texts, splits)):
            ids[i, :a], ids[i, a : a + self.k] = text[:a], self.memory_ids
            mask[i, :, :, : a + self.k] = 0
        x = self.table(ids).to(self.dtype)
        output = self.encoder(inputs_embeds=x, attention_mask=mask, output_hidden_states=True)
        return [output.hidden_states[-1][i, a : a + self.k] for i, a in enumerate(splits)]

    def student(self, texts: list[Tensor], splits: list[int], memory: list[Tensor]) -> Tensor:
        """g_phi after the memory states: logits (N, 1 + K + longest S, V)."""
        embed, rows = self.decoder.get_input_embeddings(), []
        for text, a, states in zip(texts, splits, memory):
            rows.append(torch.cat((embed(text[:1]), states, embed(text[a:]))))
        longest = max(len(row) for row in rows)
        mask = torch.zeros(len(rows), longest, dtype=torch.int64, device=self.device)
        for i, row in enumerate(rows):
            mask[i, : len(row)] = 1
            rows[i] = F.pad(row, (0, 0, 0, longest - len(row)))
        return self.decoder(inputs_embeds=torch.stack(rows), attention_mask=mask).logits

    @torch.no_grad()
    def teacher(self, texts: list[Tensor]) -> Tensor:
        """g_phi on the whole texts: logits (N, longest text, V)."""
        longest = max(map(len, texts))
        ids = torch.zeros(len(texts), longest, dtype=torch.int64, device=self.device)
        mask = torch.zeros_like(ids)
        for i, text in enumerate(texts):
            ids[i, : len(text)], mask[i, : len(text)] = text, 1
        return self.decoder(input_ids=ids, attention_mask=mask).logits

    def loss(self, texts: list[Tensor], splits: list[int]) -> Tensor:
        student = self.student(texts, splits, self.memory(texts, splits))
        teacher = self.teacher(texts)
        total = 0.0
        for i, (text, a) in enumerate(zip(texts, splits)):
            rows = len(text) - a + 1
            student_log = F.log_softmax(student[i, self.k : self.k + rows].float(), dim=-1)
            teacher_log = F.log_softmax(teacher[i, a - 1 : len(text)].float(), dim=-1)
            kl = F.kl_div(student_log, teacher_log, reduction="none", log_target=True)
            total = total + kl.sum(-1).mean()
        return total / len(texts)


class Good(Baseline):
    """(b) one copy, SDPA, padded on the right, the head on needed rows, one KL in fp32."""

    def build(self):
        model = self.llama("sdpa")
        self.peft = self.add_adapters(model)
        self.llama_model, self.head = model.model, model.lm_head.weight
        self.embed = model.get_input_embeddings()
        self.table = nn.Embedding(1, 1)
        self.table.weight = self.encoder_table(self.embed.weight)
        self.modules = nn.ModuleList([self.peft, self.table])

    def hidden(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Without a mask SDPA is causal: no row sees the padding behind its text."""
        return self.llama_model(inputs_embeds=x, attention_mask=mask).last_hidden_state

    def pad(self, rows: list[Tensor], before: int = 0) -> Tensor:
        """One padded tensor whose width, with what comes before it, is a multiple of 64."""
        padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return F.pad(padded, (0, -(before + padded.shape[1]) % 64))

    def within(self, lengths: Tensor, width: int) -> Tensor:
        """(N, width) booleans: the place lies within the text."""
        return torch.arange(width, device=self.device) < lengths[:, None]

    def log_probabilities(self, rows: Tensor) -> Tensor:
        """(R, D) -> (R, V) in fp32."""
        logits = F.linear(F.pad(rows, (0, 0, 0, -len(rows) % 64)), self.head)[: len(rows)]
        return logits.float().log_softmax(-1)

    def loss(self, texts: list[Tensor], splits: list[int]) -> Tensor:
        n, k = len(texts), self.k
        a, length = (torch.tensor(t, device=self.device) for t in (splits, [*map(len, texts)]))

        encoder_ids = self.pad(
            [torch.cat((ids[:s], self.memory_ids)) for ids, s in zip(texts, splits)])
        width = encoder_ids.shape[1]
        mask = self.within(a + k, width)[:, None, None].expand(-1, 1, width, -1)
        states = self.hidden(self.table(encoder_ids).to(self.dtype), mask)
        places = a[:, None] + torch.arange(k, device=self.device)
        memory = states[torch.arange(n, device=self.device)[:, None], places]

        with self.peft.disable_adapter():
            text = self.embed(self.pad([ids[s:] for ids, s in zip(texts, splits)], before=1 + k))
            bos = self.embed(torch.full((n, 1), BOS, device=self.device))
            inside = self.within(length - a + k + 1, 1 + k + text.shape[1])
            student = self.hidden(torch.cat((bos, memory, text), dim=1))[:, k:]
            student = student[inside[:, k:]]  # (rows, D), S + 1 of each text
            with torch.no_grad():
                ids = self.pad(texts)
                inside, teacher = self.within(length, ids.shape[1]), self.hidden(self.embed(ids))
                needed = torch.arange(inside.shape[1], device=self.device) >= a[:, None] - 1
                teacher_log = self.log_probabilities(teacher[inside & needed])
        student_log = self.log_probabilities(student)
        kl = F.kl_div(student_log, teacher_log, reduction="none", log_target=True).sum(-1)
        rows = length - a + 1
        return (kl / rows.repeat_interleave(rows)).sum() / n


class MatrixProduct:
    """Not an implementation: the rate of tokens (T, D) through an up_proj, in FLOP/s."""

    imports = ()

    def __init__(self, args):
        c, tokens = SHAPES[args.shape], args.batch * (SHORTEST + LONGEST) // 2
        options = {"dtype": getattr(torch, args.dtype), "device": args.device}
        self.x = torch.randn(tokens, c.hidden_size, **options)
        self.weight = torch.randn(c.intermediate_size, c.hidden_size, **options)
        self.out = torch.empty(tokens, c.intermediate_size, **options)
        self.device = args.device

    def measure(self, step: int) -> dict:
        torch.mm(self.x, self.weight.T, out=self.out)
        clock, calls, seconds = now(self.device), 0, 0.0
        while seconds < 0.3:
            for _ in range(16):
                torch.mm(self.x, self.weight.T, out=self.out)
            calls, seconds = calls + 16, now(self.device) - clock
        return {"flops_per_second": 2 * self.x.numel() * len(self.weight) * calls / seconds}


IMPLEMENTATIONS = {"ours": Ours, "official": Official, "good": Good}

# ---------------------------------------------------------------------------------------------
# A worker: one implementation in a process of its own, which answers a line with a line
# ---------------------------------------------------------------------------------------------


def now(device: str) -> float:
    """Seconds, once the device has done all that it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_bytes(device: str) -> int:
    """The highest memory of this process so far."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Step:
    """Gradient, clip and AdamW of one implementation."""

    def __init__(self, implementation, args):
        self.implementation, self.args = implementation, args
        config = implementation.config
        self.parameters, self.clip = implementation.parameters, config.clip
        self.optimizer = torch.optim.AdamW(
            self.parameters, config.lr, weight_decay=config.weight_decay, fused=True
        )

    def check(self) -> dict:
        """Loss and norm of the gradient of step 0 without dropout; nothing is updated."""
        layers = [m for m in self.implementation.modules.modules()
                  if isinstance(m, nn.Dropout | lora.LoraLinear)]
        key = {layer: "p" if isinstance(layer, nn.Dropout) else "dropout" for layer in layers}
        before = [getattr(layer, key[layer]) for layer in layers]
        for layer in layers:
            setattr(layer, key[layer], 0.0)
        loss = self.implementation.gradient(0).item()
        norm = torch.nn.utils.get_total_norm(
            [p.grad for p in self.parameters if p.grad is not None]).item()
        self.optimizer.zero_grad(set_to_none=True)
        for layer, p in zip(layers, before):
            setattr(layer, key[layer], p)
        return {"loss": loss, "norm": norm}

    def run(self, step: int) -> tuple[float, float]:
        loss = self.implementation.gradient(step)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)
        loss, norm = loss.item(), norm.item()  # as the loop, which looks before it updates
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss, norm

    def measure(self, step: int) -> dict:
        if self.args.share_device:
            self.run(step)  # untimed: fills the allocator's cache again
        clock = now(self.args.device)
        loss, norm = self.run(step)
        seconds = now(self.args.device) - clock
        if self.args.share_device:
            torch.cuda.empty_cache()
        peak = peak_bytes(self.args.device)
        return {"seconds": seconds, "loss": loss, "norm": norm, "peak_bytes": peak}


def worker(args):
    """Build one implementation; answer `check 0 THREADS`, `step I THREADS` with a line of JSON."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    set_vocabulary(args)
    if args.device == "cpu" and (args.worker == "ours" or args.keep_memory_for_all):
        keep_freed_memory()
    kind = {**IMPLEMENTATIONS, "product": MatrixProduct}[args.worker]
    for module in kind.imports:
        importlib.import_module(module)
    cuda = args.device.startswith("cuda")
    ready = {"imported_bytes": 0 if cuda else psutil.Process().memory_info().rss}
    measured = kind(args)
    if args.worker in IMPLEMENTATIONS:
        ready["trained"] = sum(p.numel() for p in measured.parameters)
        measured = Step(measured, args)
    ready |= {"built_peak_bytes": peak_bytes(args.device),
              "device": torch.cuda.get_device_name() if cuda else cpu_name()}
    print(json.dumps(ready), file=answers, flush=True)
    for line in sys.stdin:
        what, step, threads = line.split()
        torch.set_num_threads(int(threads))
        answer = measured.check() if what == "check" else measured.measure(int(step))
        print(json.dumps(answer), file=answers, flush=True)


def cpu_name() -> str:
    """The processor, as Linux names it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


# ---------------------------------------------------------------------------------------------
# The parent: turns, check, table
# ---------------------------------------------------------------------------------------------


class Worker:
    """The parent's end of a worker process."""

    def __init__(self, name: str, args):
        self.name = name
        settings = json.dumps({**vars(args), "worker": name})
        quiet = {"PYTHONWARNINGS": "ignore::FutureWarning", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", settings], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, **quiet},
        )
        self.ready = self.answer()

    def answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            raise UserError(f"the worker {self.name!r} ended with code {code}, see above; -9 means "
                            f"too little memory: name fewer --implementations")
        return json.loads(line)

    def ask(self, what: str, step: int, threads: int) -> dict:
        self.process.stdin.write(f"{what} {step} {threads}\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def check_agreement(first: dict[str, dict], dtype: str):
    """UserError unless the first step's losses and gradient norms are those of the first named."""
    (reference, expected), *others = first.items()
    bf16 = dtype == "bfloat16"
    tolerances = {"loss": 2e-3 if bf16 else 1e-3, "norm": 2e-2 if bf16 else 1e-3}
    print(f"first step, {reference}: loss {expected['loss']:.7g}, norm {expected['norm']:.7g}")
    for name, found in others:
        for key, tolerance in tolerances.items():
            off = abs(found[key] / expected[key] - 1)
            print(f"first step, {name}: {key} {found[key]:.7g}, off by {off:.1e}")
            if not off <= tolerance:  # also true for nan
                raise UserError(f"{name}: {key} {found[key]} is not that of {reference}, "
                                f"{expected[key]}: they do not compute the same")


def take_turns(workers: dict[str, Worker], args) -> dict[str, dict[int, list[dict]]]:
    """name -> threads -> answers in the order of the steps; the first WARM_UP are not counted."""
    first = {name: process.ask("check", 0, args.threads[0])
             for name, process in workers.items() if name != "product"}
    check_agreement(first, args.dtype)
    answers = {name: {t: [] for t in args.threads} for name in workers}
    for step in range(args.steps + WARM_UP):
        for threads in args.threads:
            for name, process in workers.items():
                answers[name][threads].append(process.ask("step", step, threads))
        print(f"round {step + 1} of {args.steps + WARM_UP} done", file=sys.stderr)
    return answers


def summarise(answers: dict, args, ready: dict, steps: list[dict]) -> dict[str, dict]:
    """name -> the numbers of its row, at its best thread count; `steps`: tokens and FLOPs."""
    rates = {threads: median(a["flops_per_second"] for a in turns[WARM_UP:])
             for threads, turns in answers["product"].items()}
    summary = {"product": {"flops_per_second": rates}}
    for name in args.implementations:
        seconds = {t: [a["seconds"] for a in turns[WARM_UP:]]
                   for t, turns in answers[name].items()}
        best = min(seconds, key=lambda t: median(seconds[t]))
        speed = {key: median(s[key] / t for s, t in zip(steps[WARM_UP:], seconds[best]))
                 for key in ("real_tokens", "flops")}
        peak = max(turns[-1]["peak_bytes"] for turns in answers[name].values())
        summary[name] = {
            "threads": best, "seconds": median(seconds[best]),
            "lowest": min(seconds[best]), "highest": max(seconds[best]),
            "median_by_threads": {t: median(s) for t, s in seconds.items()},
            "tokens_per_second": speed["real_tokens"], "flops_per_second": speed["flops"],
            "peak_gib": peak / GIB,
            "above_imports_gib": (peak - ready[name]["imported_bytes"]) / GIB,
            "utilisation": speed["flops"] / rates[best],
        }
    return summary


def print_table(summary: dict, args):
    """One Markdown table."""
    reference = args.implementations[0]
    last = f" | of {args.peak_tflops:g} TFLOP/s |" if args.peak_tflops else " |"
    print(f"\n| implementation | threads | s/step, median (min-max) | real tokens/s | time / "
          f"{reference} | peak GiB (above imports) | utilisation{last}")
    print("|---|" + "---:|" * (7 if args.peak_tflops else 6))
    for name in args.implementations:
        row = summary[name]
        cells = [name, str(row["threads"]),
                 f"{row['seconds']:.4g} ({row['lowest']:.4g}-{row['highest']:.4g})",
                 f"{row['tokens_per_second']:,.0f}",
                 f"{row['seconds'] / summary[reference]['seconds']:.2f}",
                 f"{row['peak_gib']:.2f} ({row['above_imports_gib']:.2f})",
                 f"{row['utilisation']:.1%}"]
        if args.peak_tflops:
            cells.append(f"{row['flops_per_second'] / args.peak_tflops / 1e12:.1%}")
        print(f"| {' | '.join(cells)} |")


def set_vocabulary(args):
    """Give the shape the vocabulary of the command line."""
    if args.vocabulary:
        SHAPES[args.shape] = replace(SHAPES[args.shape], vocab_size=args.vocabulary)


def bench(args):
    """Start the workers, let them take turns, print the table and write the JSON."""
    set_vocabulary(args)
    config, shape = stage1_config(args), SHAPES[args.shape]
    n, head = sizes(shape)
    versions = {p: version(p) for p in ("torch", "transformers", "peft")}
    workers, load = {}, os.getloadavg()
    try:
        for name in [*args.implementations, "product"]:
            workers[name] = Worker(name, args)
        ready = {name: process.ready for name, process in workers.items()}
        device = ready["product"]["device"]
        trained = ready[args.implementations[0]]["trained"]
        print(f"{device}, {args.dtype}, threads {args.threads}, load {load[0]:.1f}, {versions}\n"
              f"{args.shape}: {(n + 2 * head) / 1e6:.2f} M weights (projections {n / 1e6:.2f} M, "
              f"head and table {head / 1e6:.2f} M each), {trained / 1e6:.2f} M trained; batch "
              f"{args.batch}, {SHORTEST}-{LONGEST} tokens a text, dropout {args.dropout:g}; freed "
              f"memory kept by {'all' if args.keep_memory_for_all else 'ours'}")
        answers = take_turns(workers, args)
    finally:
        for process in workers.values():
            process.close()
    batches = [batch_of(config, random_corpus(args), step) for step in range(args.steps + WARM_UP)]
    steps = [{"real_tokens": sum(map(len, texts)),
              "flops": useful_flops(shape, texts, splits, config.memory_tokens)}
             for texts, splits in batches]
    summary = summarise(answers, args, ready, steps)
    for threads, rate in summary["product"]["flops_per_second"].items():
        print(f"matrix product, {args.dtype}, {threads} thread(s): {rate / 1e9:,.1f} GFLOP/s")
    print_table(summary, args)
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    about = {"arguments": vars(args), "device": device, "python": platform.python_version(),
             **versions, "load_before": load, "load_after": os.getloadavg()}
    content = {**about, "summary": summary, "steps": steps, "ready": ready, "answers": answers}
    out.write_text(json.dumps(content, indent=1) + "\n")
    print(f"\nwritten to {out}")


def main() -> int:
    """The command line; returns the exit code."""
    if sys.argv[1:2] == ["--worker"]:
        worker(SimpleNamespace(**json.loads(sys.argv[2])))
        return 0
    split = lambda text: text.split(",")  # noqa: E731
    counts = lambda text: [int(t) for t in text.split(",")]  # noqa: E731
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=list(SHAPES), default="134m")
    parser.add_argument("--vocabulary", type=int, help="V, if not the shape's")
    parser.add_argument("--batch", type=int, default=4, help="texts a step")
    parser.add_argument("--steps", type=int, default=8, help="counted steps of each")
    parser.add_argument("--dropout", type=float, default=0.05, help="before the adapters")
    parser.add_argument("--keep-memory-for-all", action="store_true",
                        help="CPU: let glibc keep freed memory in all processes, not in ours alone")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--threads", type=counts, default=[1, 2], help="CPU thread counts: 1,2")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--implementations", type=split, default=list(IMPLEMENTATIONS),
                        help="which, the first is the reference")
    parser.add_argument("--ours", default="{}", metavar="JSON",
                        help='settings of pretrain_ctkd: {"chunk_rows": 1024}')
    parser.add_argument("--share-device", action="store_true", help="CUDA: give cached memory back "
                        "between turns, with an untimed step before each timed one")
    parser.add_argument("--peak-tflops", type=float, default=0.0, help="of the datasheet")
    parser.add_argument("--out", default="bench/results/step.json")
    args = parser.parse_args()
    try:
        bench(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

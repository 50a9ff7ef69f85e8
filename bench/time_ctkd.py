"""One CTKD training step, timed side by side: this project and two versions on transformers + peft.

    python bench/time_ctkd.py --shape 134m --threads 2                      CPU, bf16
    python bench/time_ctkd.py --shape 134m --threads 2 --no-keep-memory-for-all
    python bench/time_ctkd.py --shape 7b --device cuda --batch 16 --peak-tflops 989

A step is forward, backward, clip and AdamW on one batch of random token ids, with the paper's
dropout on the adapters' input; all implementations get the same weights (drawn by parameter name),
batches, splits and adapters.

    ours       the body of pretrain_ctkd.train's loop
    official   (a) the method as the official code has it: two copies of the base, eager attention,
               padding and masks, logits of every token (also the encoder's); masks, slices and
               losses in Python loops over the texts
    good       (b) transformers + peft done well: one copy, adapters switched off for teacher and
               student, SDPA, padding on the right (the causal passes need no mask then) up to a
               multiple of 64 (shapes repeat), the head on the needed rows only, one KL

The loss of the first batch without dropout must agree to 2e-3, the norm of its gradient to 2 %
(fp32: both to 1e-3). Turns, seconds and peak are those of bench/harness.py.

tokens/s     median of real tokens (texts with BOS, no padding, no memory tokens) / seconds
utilisation  median of useful FLOPs / seconds, as a share of the rate of one matrix product (a
             batch's tokens through an up_proj) that takes turns with the steps, at the same number
             of threads. Useful: 4n per token of encoder (context + K) and student (1 + K + S), 2n
             per token of the teacher, n = weights of all projections; the head counts for the S + 1
             needed rows of a text, 4VD for the student and 2VD for the teacher. Padding, attention
             scores, adapters and the optimiser are not counted.
"""

import json
import sys
from contextlib import ExitStack
from dataclasses import asdict, replace
from statistics import median
from types import SimpleNamespace

import harness
import numpy as np
import torch
import torch.nn.functional as F
from harness import BOS, TrainingStep, whole
from torch import Tensor, nn

import lora
import pretrain_ctkd
from data.batches import SplitBatch, SplitTexts
from model import Encoder, EncoderConfig, LlamaConfig
from runtime.ranks import join_ranks
from runtime.schedule import seed_torch


def shape_of(args) -> LlamaConfig:
    """The shape, with the vocabulary of the command line."""
    shape = harness.SHAPES[args.shape]
    return replace(shape, vocab_size=args.vocabulary or shape.vocab_size)


def settings_of(args) -> pretrain_ctkd.Config:
    """The paper's settings, with what the command line changes."""
    given = {"batch_size": args.batch, "dtype": args.dtype, "seed": args.seed,
             "device": args.device, "lora_dropout": args.dropout, **json.loads(args.ours)}
    return replace(pretrain_ctkd.Config(), **given)


def random_texts(args) -> SplitTexts:
    """Stage 1's data, made of random ids: enough for all turns."""
    random, (low, high) = np.random.default_rng(args.seed), args.lengths
    lengths = random.integers(low, high + 1, args.batch * (args.turns + args.warm_up))
    ids = harness.random_texts(random, lengths, shape_of(args).vocab_size)
    return SplitTexts("random ids", ids)


class CtkdStep(TrainingStep):
    """What the three share: the settings of the paper, and the data."""

    def __init__(self, args):
        self.config, self.data, self.shape = settings_of(args), random_texts(args), shape_of(args)
        self.device, self.dtype = torch.device(args.device), getattr(torch, args.dtype)
        super().__init__(args)

    def prepare(self, turn: int) -> SplitBatch:
        self.turn = turn
        return self.data.read_batch(self.config.seed, turn, self.config.batch_size)


class Ours(CtkdStep):
    ours = True

    def build(self):
        args, c, self.stack = self.args, self.config, ExitStack()
        self.ranks = self.stack.enter_context(join_ranks(args.device, args.threads[0], 30))
        llama = harness.random_llama(self.shape, args.dtype, args.device)
        config = EncoderConfig(c.memory_tokens, max_tokens=c.max_tokens)
        self.modules = encoder = Encoder(llama, SimpleNamespace(bos=[BOS]), config)
        lora.add_lora(llama, lora.LoraConfig(c.lora_r, c.lora_alpha, c.lora_dropout))
        harness.draw_adapters(llama)
        encoder.add_memory("normal", train_table=True)
        harness.draw("memory_tokens", encoder.memory_tokens, self.shape.hidden_size**-0.5)
        llama.recompute, encoder.adapters = c.recompute, True
        encoder.train()

    def gradient(self, batch: SplitBatch) -> Tensor:
        c, total = self.config, torch.zeros((), device=self.device)
        for places in self.ranks.micro_batches(c.batch_size, c.micro_batch):
            seed_torch(c.seed, 2, self.turn * c.batch_size + places[0])
            part = batch.part(places)
            loss = pretrain_ctkd.OBJECTIVES[c.objective](self.modules, part, c)
            loss.backward()
            total += loss.detach()
        self.ranks.sum_gradients(self.parameters)
        return self.ranks.sum(total)

    def close(self):
        self.stack.close()


class Baseline(CtkdStep):
    """What both versions on transformers + peft share; they define `build_model` and `loss`."""

    imports = ("peft", "transformers.models.llama.modeling_llama")

    def build(self):
        self.v, self.k = self.shape.vocab_size, self.config.memory_tokens
        self.memory_ids = torch.arange(self.v, self.v + self.k, device=self.device)
        self.build_model()

    def llama(self, attention: str) -> nn.Module:
        """A frozen LlamaForCausalLM with the shared weights."""
        from transformers import LlamaConfig, LlamaForCausalLM

        same = {k: v for k, v in asdict(self.shape).items() if k not in ("rope", "model_type")}
        with self.device:
            model = LlamaForCausalLM._from_config(
                LlamaConfig(**same, use_cache=False), dtype=self.dtype,
                attn_implementation=attention)
        harness.draw_base(model, self.shape.num_hidden_layers)
        return model.train()

    def add_adapters(self, model: nn.Module) -> nn.Module:
        """fp32 adapters through peft, with the shared values.

        peft would cast a layer's whole input up to fp32; with that off, autocast casts the small
        matrices down instead, which is faster.
        """
        from peft import LoraConfig, get_peft_model
        from peft.tuners.tuners_utils import BaseTunerLayer

        model = get_peft_model(model, LoraConfig(
            r=self.config.lora_r, lora_alpha=self.config.lora_alpha,
            lora_dropout=self.config.lora_dropout, target_modules=list(lora.LoraConfig().targets)))
        harness.draw_adapters(model)
        for module in model.modules():
            if isinstance(module, BaseTunerLayer):
                module.cast_input_dtype_enabled = False
        return model

    def encoder_table(self, table: Tensor) -> nn.Parameter:
        """The encoder's trainable fp32 table (V + K, D)."""
        memory = torch.empty(self.k, table.shape[1], device=self.device)
        harness.draw("memory_tokens", memory, table.shape[1] ** -0.5)
        return nn.Parameter(torch.cat((table.float(), memory)))

    def gradient(self, batch: SplitBatch) -> Tensor:
        texts = [torch.from_numpy(ids).to(self.device, torch.int64) for ids in batch.texts]
        mixed = self.dtype is torch.bfloat16
        with torch.autocast(self.device.type, torch.bfloat16, enabled=mixed):
            loss = self.loss(texts, batch.splits)
        loss.backward()
        return loss.detach()


class Official(Baseline):
    """(a) two copies, eager, padded, whole logits, loops over texts."""

    def build_model(self):
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

    def build_model(self):
        model = self.llama("sdpa")
        self.peft = self.add_adapters(model)
        self.llama_model, self.head = model.model, model.lm_head.weight
        self.embed = model.get_input_embeddings()
        self.table = nn.Embedding(1, 1)
        self.table.weight = self.encoder_table(self.embed.weight)
        self.modules = nn.ModuleList([self.peft, self.table])

    def hidden(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Without a mask SDPA is causal: no row sees the padding after its text."""
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


class MatrixProduct(harness.Implementation):
    """Not an implementation: the rate of tokens (T, D) through an up_proj, in FLOP/s."""

    def build(self):
        args, c = self.args, shape_of(self.args)
        options = {"dtype": getattr(torch, args.dtype), "device": args.device}
        self.x = torch.randn(args.batch * sum(args.lengths) // 2, c.hidden_size, **options)
        self.weight = torch.randn(c.intermediate_size, c.hidden_size, **options)
        self.out = torch.empty(len(self.x), c.intermediate_size, **options)

    def check(self) -> dict:
        return {}

    def measure(self, turn: int) -> dict:
        torch.mm(self.x, self.weight.T, out=self.out)
        clock, calls, seconds = harness.now(self.args.device), 0, 0.0
        while seconds < 0.3:
            for _ in range(16):
                torch.mm(self.x, self.weight.T, out=self.out)
            calls, seconds = calls + 16, harness.now(self.args.device) - clock
        rate = 2 * self.x.numel() * len(self.weight) * calls / seconds
        return {"seconds": seconds / calls, "flops_per_second": rate}


IMPLEMENTATIONS = {"ours": Ours, "official": Official, "good": Good}


def sizes(c: LlamaConfig) -> tuple[int, int]:
    """Weights of all projections, and of the head."""
    attention = 2 * c.hidden_size * (c.num_attention_heads + c.num_key_value_heads) * c.head_dim
    mlp = 3 * c.hidden_size * c.intermediate_size
    return c.num_hidden_layers * (attention + mlp), c.vocab_size * c.hidden_size


def useful_flops(c: LlamaConfig, batch: SplitBatch, k: int) -> int:
    """FLOPs of a step as the docstring above counts them."""
    (n, head), total = sizes(c), 0
    for ids, a in zip(batch.texts, batch.splits):
        s = len(ids) - a
        total += n * (4 * (a + k) + 4 * (1 + k + s) + 2 * len(ids)) + head * (4 + 2) * (s + 1)
    return total


def check(first: dict[str, dict], args):
    """UserError unless all but the matrix product have the first one's loss and norm."""
    steps = {label: answer for label, answer in first.items() if "loss" in answer}
    bf16 = args.dtype == "bfloat16"
    harness.check_losses(steps, {"loss": 2e-3 if bf16 else 1e-3, "norm": 2e-2 if bf16 else 1e-3})


def bench(args):
    """Let the implementations take turns; yields results and the table."""
    shape, data, config = shape_of(args), random_texts(args), settings_of(args)
    n, head = sizes(shape)
    weights = n + head * (1 if shape.tie_word_embeddings else 2)
    low, high = args.lengths
    print(f"{args.shape}, {args.dtype}: {weights / 1e6:.2f} M weights (projections {n / 1e6:.2f} "
          f"M, head {head / 1e6:.2f} M); batch {args.batch}, {low}-{high} tokens a text, dropout "
          f"{args.dropout:g}", flush=True)
    kinds = {name: IMPLEMENTATIONS[name] for name in args.implementations}
    found = harness.race({**kinds, "product": MatrixProduct}, args, check)
    batches = [data.read_batch(args.seed, turn, args.batch)
               for turn in range(args.warm_up, args.warm_up + args.turns)]
    flops = [useful_flops(shape, batch, config.memory_tokens) for batch in batches]
    product = found.pop("product")
    rates = {threads: median(a["flops_per_second"] for a in turns[args.warm_up :])
             for threads, turns in product.answers.items()}
    for threads, rate in rates.items():
        print(f"matrix product, {args.dtype}, {threads} thread(s): {rate / 1e9:,.1f} GFLOP/s")
    reference, rows = next(iter(found.values())), []
    for label, timing in found.items():
        speed = median(b.total_tokens / s for b, s in zip(batches, timing.seconds))
        done = median(f / s for f, s in zip(flops, timing.seconds))
        rows.append([label, timing.threads, *timing.cells(reference), f"{speed:,.0f}",
                     f"{done / rates[timing.threads]:.1%}"])
        if args.peak_tflops:
            rows[-1].append(f"{done / args.peak_tflops / 1e12:.1%}")
    last = [f"of {args.peak_tflops:g} TFLOP/s"] * bool(args.peak_tflops)
    times = [title.replace("ours", args.implementations[0]) for title in harness.TIMES]
    titles = ["implementation", "threads", *times, "real tokens/s", "utilisation", *last]
    trained = f"{reference.first['trained'] / 1e6:.2f} M trained"
    yield {"flops": flops, "timings": found, "product": product}, (
        f"{trained}\n\n{harness.table(titles, rows)}")


def parse():
    """Parse the command line."""
    parser = harness.new_parser(__doc__, shape="134m", dtype="bfloat16", device="cpu",
                                threads=[1, 2], turns=8, warm_up=2)
    add = parser.add_argument
    add("--vocabulary", type=whole(4), help="V, if not the shape's")
    add("--batch", type=whole(), default=4, help="texts a step")
    add("--lengths", type=whole(20), nargs=2, default=[250, 500], metavar=("LOW", "HIGH"),
        help="tokens of a text, BOS counted")
    add("--dropout", type=float, default=0.05, help="before the adapters")
    add("--implementations", nargs="+", choices=list(IMPLEMENTATIONS),
        default=list(IMPLEMENTATIONS), help="the first is the reference")
    add("--ours", default="{}", metavar="JSON",
        help='settings of pretrain_ctkd: {"chunk_rows": 1024}')
    add("--peak-tflops", type=float, default=0.0, help="of the datasheet")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(harness.main(__file__, parse, bench, "transformers", "peft"))

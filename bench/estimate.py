"""How long the stages and the embedding of a corpus take, and how much memory, before they run.

    python bench/estimate.py         the tables of docs/first-hour.md and measured.md
    python bench/estimate.py --base FOLDER --documents 1000000 --document-tokens 400
    python bench/estimate.py --base 135m 1b --measure     on one thread of this machine

time     FLOPs / rate, or calls of PyTorch x CALL where these take longer. FLOPs are counted as for
         `utilisation` in bench/time_ctkd.py: n weights of all projections; stage 1 takes 4n per
         token of encoder and student, 2n per token of the teacher, 6VD per row of the head; stages
         2 and 3 take 6n, as a batch that does not fit is embedded twice; encoding takes 2n. Not
         counted: attention scores, which are no longer small from about 1,000 tokens per text on.
memory   of a process: the base in bf16; 16 bytes (weight, gradient, two moments in fp32) per
         trained parameter; what is kept for the backward pass; logits; x SLACK on the CPU, plus the
         imports. Not counted: CUDA's context, and what its allocator keeps

Rates and SLACK of the CPU are fitted to the measured rows of the second table (two cores of an AMD
EPYC with AVX512-BF16). CALL is fitted to a step of 135m on an H100 (4 texts of 128 tokens, 0.2 s);
a GPU's rate is an assumed share of an H100's data sheet, too large a share for 135m: 32 texts of
512 tokens took 0.4 s, for 0.11 s of which the card was busy (docs/measured.md).
"""

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import harness
import torch
from harness import GIB, SHAPES
from time_ctkd import sizes, useful_flops

from lora import LoraConfig
from model import Encoder, EncoderConfig, LlamaConfig
from runtime.cpu import keep_freed_memory
from runtime.errors import run_command
from runtime.formats import read_llama_config

K, BATCH_TOKENS = 8, 4096  # memory tokens; tokens of an encoding pass (--batch-tokens)
CALL = 1e-5  # s that a GPU waits for each call of PyTorch (fitted)
CALLS = {"train": 670, "encode": 60}  # per layer (train: measured on the CPU; encode: assumed)
SLACK, IMPORTS = 1.4, 0.25 * GIB  # on the CPU: what glibc keeps between tensors, fitted


@dataclass(frozen=True)
class Machine:
    """The rate of one process in FLOP/s, how many there are, and whether each has a GPU."""

    train: float
    encode: float
    processes: int = 1
    gpu: bool = False


MACHINES = {
    "two CPU cores": Machine(0.45e12, 0.60e12),  # measured.md: 50 to 59 %, 71 % of a product
    "one GPU": Machine(0.35 * 989e12, 0.35 * 989e12, gpu=True),  # 35 % is assumed
    "eight GPUs": Machine(0.32 * 989e12, 0.35 * 989e12, processes=8, gpu=True),  # they wait
}


@dataclass(frozen=True)
class Job:
    """Work that repeats: `steps` of `texts` texts of `tokens` tokens in `stage` (0: encoding).

    table: whether the encoder's own table is trained, too; micro: tokens of a forward pass with a
    graph in stages 2 and 3. The lengths of the paper's texts are guesses.
    """

    name: str
    stage: int
    steps: float
    texts: int
    tokens: int
    table: bool = False
    micro: int = 8192


JOBS = [
    Job("stage 1, `smollm2`", 1, 600, 4, 128),  # 2,400 texts of 128 tokens
    Job("stage 1, `paper`", 1, 8000, 4, 340, table=True),  # 32,000 passages
    Job("stage 2, `paper`", 2, 1000, 256, 25, micro=2048),  # 128,000 sentences, each twice
    Job("stage 3, `paper`", 3, 200, 3072, 80),  # 1,024 queries, positives and negatives a step
]
MEASURED = [  # base, job, seconds of a step, peak GiB of the process: docs/measured.md
    ("7m", Job("stage 1, a step of 8 texts of 128 tokens", 1, 1, 8, 128, table=True), 0.158, 0.75),
    ("135m", Job("stage 1, a step of 8 texts of 128 tokens", 1, 1, 8, 128, table=True), 1.85, 2.83),
    ("135m", Job("stage 1, a step of 8 texts of 512 tokens", 1, 1, 8, 512, table=True), 6.72, 5.06),
    ("135m", Job("encoding 100 texts of 214 tokens", 0, 1, 100, 214), 7.44, 0.66),
]
BASES = {"7m": SHAPES["7m"], "135m": SHAPES["smollm2"], "1b": SHAPES["1b"], "7b": SHAPES["7b"]}


def flops(c: LlamaConfig, job: Job) -> float:
    """Useful FLOPs of one step of a job, over all processes."""
    if job.stage == 1:
        texts = SimpleNamespace(texts=[range(job.tokens)] * job.texts,
                                splits=[job.tokens // 2] * job.texts)
        return useful_flops(c, texts, K)
    return (6 if job.stage else 2) * sizes(c)[0] * job.texts * (job.tokens + K)


def seconds(c: LlamaConfig, job: Job, m: Machine) -> float:
    """Seconds of the whole job."""
    share = -(-job.texts // m.processes)  # of a step, by one process
    passes = 1 if job.stage == 1 else max(1, share * job.tokens / (
        job.micro if job.stage else BATCH_TOKENS))
    kind = "train" if job.stage else "encode"
    calls = passes * c.num_hidden_layers * CALLS[kind] * CALL * m.gpu
    return job.steps * max(flops(c, job) * share / job.texts / getattr(m, kind), calls)


def adapters(c: LlamaConfig) -> int:
    """Parameters in the adapters of all layers."""
    d, q, kv = c.hidden_size, c.num_attention_heads * c.head_dim, (
        c.num_key_value_heads * c.head_dim)
    ends = {"q_proj": d + q, "k_proj": d + kv, "v_proj": d + kv, "o_proj": q + d,
            **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), d + c.intermediate_size)}
    lora = LoraConfig()
    return c.num_hidden_layers * lora.r * sum(ends[name] for name in lora.targets)


def memory(c: LlamaConfig, job: Job, m: Machine) -> float:
    """Peak bytes of one process: bf16 base, adapters of rank 16."""
    (n, head), d = sizes(c), c.hidden_size
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    found = 2 * (n + head * (1 if c.tie_word_embeddings else 2))
    if job.stage:
        share = -(-job.texts // m.processes)
        tokens = share * (job.tokens + 1 + 2 * K) if job.stage == 1 else (
            min(job.micro, share * (job.tokens + K)))
        # of a layer: inputs of norms (fp32, by PyTorch) and of projections, q k v, gate and up
        layer = tokens * (2 * (4 * d + 2 * q + 2 * kv + 3 * c.intermediate_size) + 8 * d)
        found += c.num_hidden_layers * layer + 16 * (adapters(c) + (K * d + head * job.table))
        found += 4 * 4 * 256 * c.vocab_size * (job.stage == 1)  # four tensors of 256 rows of logits
    else:
        found += 2 * BATCH_TOKENS * (4 * d + 3 * c.intermediate_size)
    return found if m.gpu else SLACK * found + IMPORTS


def duration(s: float) -> str:
    """A duration of s seconds, in the largest unit of which there are at least two."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if s >= 2 * size:
            return f"{float(f'{s / size:.2g}'):g} {unit}"
    return f"{float(f'{s:.2g}'):g} s"


def tables(bases: dict[str, LlamaConfig], documents: Job) -> str:
    """Markdown: the jobs of each base on each machine; estimates next to what was measured."""
    rows = []
    for name, c in bases.items():
        for job in (*JOBS, documents):
            times = [duration(seconds(c, job, m)) for m in MACHINES.values()]
            peaks = [f"{memory(c, job, m) / GIB:.2g}" for m in MACHINES.values()]
            rows.append([name, job.name, *times, "; ".join(peaks)])
    first = harness.table(("base", "what", *MACHINES, f"GiB of a process: {'; '.join(MACHINES)}"),
                          rows, words=2)
    cpu, rows = next(iter(MACHINES.values())), []
    for name, job, s, gib in MEASURED:
        c = BASES[name]
        rows.append([name, job.name, f"{seconds(c, job, cpu):.3g}", s,
                     f"{memory(c, job, cpu) / GIB:.2f}", gib])
    titles = ("base", "on two CPU cores", "s, estimated", "measured", "GiB, estimated", "measured")
    return f"{first}\n\n{harness.table(titles, rows, words=2)}"


def measure(c: LlamaConfig) -> tuple[float, float]:
    """Seconds of CPU and wall time in which one thread encodes 8 texts of 200 tokens, in bf16 and
    with random weights; the second time it does so, when all shapes have been seen."""
    torch.set_num_threads(1)
    keep_freed_memory()
    encoder = Encoder(harness.random_llama(c, "bfloat16", "cpu"), SimpleNamespace(bos=[1]),
                      EncoderConfig(K)).eval()
    encoder.add_memory("normal", train_table=False)
    for _ in range(2):
        cpu, wall = time.process_time(), time.perf_counter()
        with torch.no_grad():
            encoder.embed(torch.arange(1600) % c.vocab_size, [200] * 8)
    return time.process_time() - cpu, time.perf_counter() - wall


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--base", nargs="+", default=["135m", "1b", "7b"],
        help=f"{', '.join(BASES)}, or folders with a config.json")
    add("--documents", type=int, default=100_000, help="texts to embed")
    add("--document-tokens", type=int, default=200, help="of each")
    add("--measure", action="store_true", help="encode 8 texts of 200 tokens with random weights "
        "in place of all estimates but this one; 2 bytes of memory for each weight")
    args = parser.parse_args(argv)

    def run():
        bases = {name: BASES[name] if name in BASES else LlamaConfig(
            **read_llama_config(Path(name) / "config.json", ["llama", "mistral", "qwen2", "qwen3"]))
            for name in args.base}
        if args.measure:
            job, one = Job("", 0, 1, 8, 200), Machine(0.225e12, 0.30e12)
            rows = [[name, *(f"{s:.3g}" for s in (seconds(c, job, one), *measure(c)))]
                    for name, c in bases.items()]
            titles = ("base", "s of one core, estimated", "CPU time, measured", "wall time")
            return print(harness.table(titles, rows))
        name = f"embed {args.documents:,} texts"
        print(tables(bases, Job(name, 0, 1, args.documents, args.document_tokens)))

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())

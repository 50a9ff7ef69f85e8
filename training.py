"""What a training loop needs around it: configuration, ranks, schedule, checkpoints, signals.

The loops themselves, with forward, backward, reduce, clip and step, stand in the stage files.
"""

import argparse
import json
import math
import os
import platform
import shutil
import signal
import sys
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, field, fields
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # before any process group: see start_ranks
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from data import UserError
from model import Encoder, find_device, read_json, write_folder

# ---------------------------------------------------------------------------------------------
# Configuration: one dataclass a stage, one field a line; the command line is made from it
# ---------------------------------------------------------------------------------------------


def setting(default, help: str, choices: tuple | None = None):
    """A configuration field with its sentence of help."""
    return field(default=default, metadata={"help": help, "choices": choices})


def parse_config(config_class, presets: dict, pick_preset, argv: list[str] | None, doc: str):
    """A configuration from its defaults, a preset, and the flags given (the stronger last).

    `pick_preset(given)` names the preset when no --preset is given.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=list(presets), help="a set of defaults, see below")
    parser.epilog = "\n".join(
        f"preset {name}: " + (", ".join(f"{k} {v}" for k, v in changes.items()) or "the defaults")
        for name, changes in presets.items()
    )
    for f in fields(config_class):
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
        if f.metadata["choices"]:
            kind["choices"] = f.metadata["choices"]
        text = f.metadata["help"].replace("%", "%%")
        text += "" if f.default is MISSING or f.type is bool else f" (default {f.default!r})"
        parser.add_argument(flag(f.name), default=argparse.SUPPRESS, help=text, **kind)
    given = vars(parser.parse_args(argv))
    preset = given.pop("preset") or pick_preset(given)
    return config_class(**{**presets[preset], **given})


LEAST = {  # of settings that all stages have
    "batch_size": 1, "lora_r": 1, "save_every": 1, "steps": 0, "num_texts": 0, "threads": 0,
    "lr": 0, "min_lr": 0, "weight_decay": 0, "clip": 0, "seed": 0, "warmup": 0, "lora_dropout": 0,
    "timeout": 0,
}


def check_numbers(config, least: dict[str, float], below_one: tuple[str, ...]):
    """UserError for a number that is below its least value, not finite, or not below one.

    `least` and `below_one` are added to what holds for all stages.
    """
    for name, low in {**LEAST, **least}.items():
        if not getattr(config, name) >= low:  # also true for nan
            raise UserError(f"{flag(name)} {getattr(config, name)}: must be at least {low}")
    for name, value in vars(config).items():
        if isinstance(value, float) and not np.isfinite(value):
            raise UserError(f"{flag(name)} {value}: must be finite")
    if config.lr < config.min_lr:
        raise UserError(f"--lr {config.lr}: must be at least --min-lr {config.min_lr}; lower both")
    if config.seed >= 2**63:
        raise UserError(f"--seed {config.seed}: must be below 2^63")
    for name in ("warmup", "lora_dropout", *below_one):
        if getattr(config, name) >= 1:
            raise UserError(f"{flag(name)} {getattr(config, name)}: must be below 1")


def flag(name: str) -> str:
    """The command line's flag of a setting."""
    return "--" + name.replace("_", "-")


def settings_of(config) -> dict:
    """The configuration as it is stored with the run and the encoder."""
    return {name: value for name, value in asdict(config).items() if name != "resume"}


# ---------------------------------------------------------------------------------------------
# Ranks and devices
# ---------------------------------------------------------------------------------------------


@dataclass
class Ranks:
    """This process among all: its index, their number, its device."""

    rank: int
    size: int
    device: torch.device

    def sum(self, tensor: Tensor) -> Tensor:
        """Add the tensor over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    @contextmanager
    def together(self):
        """Wait for all ranks at the block's end; a UserError in it on one rank ends them all."""
        error = None
        try:
            yield
        except UserError as raised:
            error = raised
        failed = self.sum(torch.tensor([float(error is not None)], device=self.device)).item()
        if failed:
            raise error or UserError("another rank has stopped, see its message")

    def share(self, n: int) -> range:
        """The contiguous part of range(n) that is this rank's; shares differ by at most one."""
        return range(self.rank * n // self.size, (self.rank + 1) * n // self.size)


def start_ranks(device: str, threads: int, timeout_minutes: float) -> Ranks:
    """Join the process group that torchrun describes; without torchrun this is the only process.

    gloo on the CPU, nccl on CUDA. threads = 0 shares the cores among the processes of the machine.

    torch.distributed.nn.functional has the default group among its default arguments. torch.optim
    imports it at its first use; a group that existed by then would outlive its destruction, and its
    threads the interpreter, which aborts the process. So this module imports it first.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local, local_size = (int(os.environ.get(f"LOCAL_{k}", d)) for k, d in
                         (("RANK", 0), ("WORLD_SIZE", 1)))
    place = find_device(device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(threads or max(1, cores // local_size))
    if place.type == "cuda":
        place = torch.device("cuda", local if place.index is None else place.index)
        torch.cuda.set_device(place)
    if size > 1:
        backend = "nccl" if place.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes))
    return Ranks(rank, size, place)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto`: bf16 where matrix products in bf16 are fast (CUDA, AVX512-BF16, AMX), else fp32."""
    if name != "auto":
        return getattr(torch, name)
    cpu = torch.cpu.get_capabilities()
    fast = device.type == "cuda" or cpu.get("avx512_bf16") or cpu.get("amx_bf16")
    return torch.bfloat16 if fast else torch.float32


def reduce_gradients(parameters: list[Tensor], ranks: Ranks):
    """Sum the gradients over all ranks: small tensors in one flat message, large ones alone.

    Losses are divided by global counts before backward, so the sum is the gradient of the batch. A
    rank that had nothing to do adds zeros.
    """
    if ranks.size == 1:
        return
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    small = [p.grad for p in parameters if p.numel() < 1_000_000]
    flat = ranks.sum(torch.cat([g.flatten() for g in small]))
    for gradient, piece in zip(small, flat.split([g.numel() for g in small])):
        gradient.copy_(piece.view_as(gradient))
    for p in parameters:
        if p.numel() >= 1_000_000:
            ranks.sum(p.grad)


# ---------------------------------------------------------------------------------------------
# Schedule and randomness: pure functions of seed and step
# ---------------------------------------------------------------------------------------------


def learning_rate(step: int, steps: int, warmup: int, low: float, high: float) -> float:
    """DeepSpeed's WarmupDecayLR: lr = low + (high - low) g, step counted from 0.

    g rises as ln(step + 1) / ln(warmup) for `warmup` steps, then falls linearly to 0 at `steps`.
    """
    warmup = max(2, warmup)
    if step < warmup:
        g = math.log(step + 1) / math.log(warmup)
    else:
        g = max(0.0, (steps - step) / max(1, steps - warmup))
    return low + (high - low) * g


def generator(*key: int) -> np.random.Generator:
    """A generator that depends on its key alone: (seed, purpose, position)."""
    return np.random.default_rng(list(key))


def epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order of n samples in an epoch; it does not depend on the number of ranks."""
    return generator(seed, 0, epoch).permutation(n)


def global_batch(seed: int, step: int, batch: int, n: int) -> list[int]:
    """The samples of a step; the last incomplete batch of an epoch is dropped."""
    steps_per_epoch = n // batch
    epoch, index = divmod(step, steps_per_epoch)
    return epoch_order(seed, epoch, n)[index * batch : (index + 1) * batch].tolist()


# ---------------------------------------------------------------------------------------------
# The run's folder: config.json, metrics.jsonl, checkpoints/step-*/, encoder/
# ---------------------------------------------------------------------------------------------


def open_run(config, free: tuple[str, ...]):
    """Make the folder config.out, or look whether it can be resumed.

    Raises UserError if the folder has something in it and --resume is not given, if it cannot be
    written, or if a resumed configuration differs in fields other than `free`.
    """
    out = Path(config.out)
    saved, now = out / "config.json", asdict(config)
    if config.resume:
        if not saved.is_file():
            raise UserError(f"{saved}: missing, nothing to resume; leave --resume out")
        before = read_json(saved)
        changed = [f"{key}: {before.get(key)!r} -> {now[key]!r}" for key in now
                   if key not in free and before.get(key) != now[key]]
        if changed:
            raise UserError(f"{saved}: --resume with a changed configuration ({'; '.join(changed)})"
                            f"; give the first run's values, or another --out")
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists and is not an empty folder; continue that run with "
                        f"--resume, or name another folder with --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".writable"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); name another --out")


def environment(model_dtype: torch.dtype, ranks: Ranks) -> dict:
    """What a run's bits depend on besides its configuration; stored with the run."""
    return {"python": platform.python_version(), "torch": torch.__version__,
            "device": str(ranks.device), "dtype": str(model_dtype),
            "processes": ranks.size, "threads": torch.get_num_threads()}


def print_header(config, encoder: Encoder, about: str, ranks: Ranks):
    """Print what the run depends on: environment, parameter counts, and what `about` says."""

    def count(tensors):
        return f"{sum(p.numel() for p in tensors) / 1e6:.2f} M"

    trained = [p for p in encoder.parameters() if p.requires_grad]
    frozen = [p for p in encoder.llama.parameters() if not p.requires_grad]
    e = environment(encoder.llama.head.dtype, ranks)
    print(f"python {e['python']}, torch {e['torch']}, {e['processes']} process(es) on {e['device']}"
          f", {e['threads']} thread(s) each, {e['dtype'].removeprefix('torch.')}\n"
          f"model  {config.model}: {count(frozen)} frozen, {count(trained)} trained; {about}",
          flush=True)


def start_run(config, encoder: Encoder, optimizer, run: dict, ranks: Ranks) -> int:
    """The step to start from: 0, or that of the checkpoint that --resume puts in place.

    Rank 0 writes config.json and environment.json. Raises UserError if the ranks do not agree on
    the step and the data; `run` is what save_checkpoint stores.
    """
    out, start = Path(config.out), 0
    with ranks.together():
        if config.resume and checkpoints(out):
            start = load_checkpoint(checkpoints(out)[-1], trained_of(encoder), optimizer, run)
    mine = torch.tensor([start, int(run["texts"][:12], 16)], device=ranks.device)
    agreed = torch.equal(ranks.sum(mine.clone()), mine * ranks.size)
    with ranks.together():
        if not agreed:
            raise UserError(f"rank {ranks.rank} starts at step {start} with the texts "
                            f"{run['texts'][:12]}..., others do not; do all machines see the same "
                            f"--out and the same data?")
    if ranks.rank == 0:
        (out / "config.json").write_text(json.dumps(settings_of(config), indent=2) + "\n")
        about = environment(encoder.llama.head.dtype, ranks)
        (out / "environment.json").write_text(json.dumps(about) + "\n")
    return start


def trained_of(encoder: Encoder) -> dict[str, Tensor]:
    """Name -> parameter, of those that are trained."""
    return {name: p for name, p in encoder.named_parameters() if p.requires_grad}


def checkpoints(out: Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    return sorted((out / "checkpoints").glob("step-*"))


def save_checkpoint(out: Path, step: int, trained: dict[str, Tensor], optimizer, run: dict):
    """Write checkpoints/step-<step>: weights, optimiser moments, the step; keep the last two.

    `run` has the sha256 of the frozen `base` and of the `texts` that the run depends on.
    """
    with write_folder(out / "checkpoints" / f"step-{step:07d}") as folder:
        save_file({k: p.detach().cpu().contiguous() for k, p in trained.items()},
                  folder / "weights.safetensors")
        moments = {f"{name}/{key}": value.cpu().contiguous() for name, p in trained.items()
                   for key, value in optimizer.state[p].items()}
        save_file(moments, folder / "optimizer.safetensors")
        (folder / "state.json").write_text(json.dumps({"step": step, **run}) + "\n")
    for old in checkpoints(out)[:-2]:
        shutil.rmtree(old)


@torch.no_grad()
def load_checkpoint(folder: Path, trained: dict[str, Tensor], optimizer, run: dict) -> int:
    """Put a checkpoint's weights and moments in place; returns the number of steps done."""
    try:
        weights = load_file(folder / "weights.safetensors")
        moments = load_file(folder / "optimizer.safetensors")
        state = read_json(folder / "state.json")
        step, before = state["step"], {key: state[key] for key in run}
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(f"{folder}: damaged checkpoint ({error}); remove this folder and resume "
                        f"from the one before")
    for key in run:
        if before[key] != run[key]:
            raise UserError(f"{folder}: the {key} of this run changed since (sha256 "
                            f"{before[key][:12]}..., now {run[key][:12]}...); bring the first "
                            f"{key} back, or start anew with another --out")
    if weights.keys() != trained.keys():
        raise UserError(f"{folder}: holds other tensors than this run trains; remove the folder")
    for name, p in trained.items():
        p.copy_(weights[name])
        state = {key.rpartition("/")[2]: value for key, value in moments.items()
                 if key.rpartition("/")[0] == name}
        if state:
            optimizer.state[p] = {key: value.to(p.device) for key, value in state.items()}
    return step


class Metrics:
    """metrics.jsonl: one line a step, every step once, also after a resume.

    A resumed run keeps the lines before `first_step`. `rows` holds all lines.
    """

    def __init__(self, path: Path, first_step: int):
        self.path, self.rows = path, []
        kept = []
        if path.is_file():
            for line in path.read_text().splitlines():
                try:
                    row = json.loads(line)
                except ValueError:  # the line that a crash cut off
                    break
                if row["step"] < first_step:
                    self.rows.append(row)
                    kept.append(line + "\n")
        aside = path.with_suffix(".writing")
        aside.write_text("".join(kept))
        os.replace(aside, path)

    def write(self, **values):
        """Append one step."""
        self.rows.append(values)
        with open(self.path, "a") as file:
            file.write(json.dumps(values) + "\n")


STOPS = (signal.SIGINT, signal.SIGTERM)  # what ends a run early, after saving


@contextmanager
def stop_on_signals():
    """Yield a list that receives the numbers of SIGINT and SIGTERM instead of dying of them."""
    caught: list[int] = []
    before = {s: signal.signal(s, lambda number, _: caught.append(number)) for s in STOPS}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def asked_to_stop(signals: list[int], ranks: Ranks) -> int:
    """The number of the signal by which any rank was told to stop, or 0."""
    asked = ranks.sum(torch.tensor([float(s in signals) for s in STOPS], device=ranks.device))
    return max(int(number) * bool(n) for number, n in zip(STOPS, asked.tolist()))


def run_stage(config, check, train, report) -> int:
    """A stage from its configuration to the exit code: 0, 2 after a UserError, 128 + a signal.

    check(config); train(config, ranks) -> the signal that ended it, or 0, on all ranks;
    report(config, ranks) on the first one after a complete run.
    """
    rank, checked = os.environ.get("RANK", "0"), False
    try:
        check(config)
        checked = True
        ranks = start_ranks(config.device, config.threads, config.timeout)
        stopped = train(config, ranks)
        if stopped and ranks.rank == 0:
            print(f"\nstopped by signal {stopped}, saved; go on with the same command and --resume",
                  flush=True)
        if ranks.size > 1:
            dist.destroy_process_group()
        if ranks.rank == 0 and not stopped:
            report(config, ranks)
        return 128 + stopped if stopped else 0
    except UserError as error:
        if checked or rank == "0":  # all ranks have the same settings, one complains
            print(f"error{f' on rank {rank}' if rank != '0' else ''}: {error}", file=sys.stderr)
        return 2

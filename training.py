"""What a training loop needs around it: configuration, ranks, schedule, checkpoints, signals.

The loops themselves, with forward, backward, reduce, clip and step, stand in the stage files.
"""

import argparse
import ctypes
import fcntl
import hashlib
import io
import json
import math
import os
import platform
import re
import shutil
import signal
import sys
import time
import uuid
from contextlib import contextmanager, suppress
from dataclasses import MISSING, asdict, dataclass, field, fields
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # before any process group: see start_ranks
from safetensors.torch import load_file, save_file
from torch import Tensor

from data import UserError
from model import Encoder, digest, find_device, finish_renaming, read_json, sync
from model import write_file, write_folder

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
    "save_minutes": 0, "timeout": 0.01,
}


def check_numbers(config, least: dict[str, float], below_one: tuple[str, ...]):
    """UserError for a number that is below its least value, not finite, or not below one.

    `least` and `below_one` are added to what holds for all stages.
    """
    for name, low in {**LEAST, **least}.items():
        if not getattr(config, name) >= low:  # also true for nan
            raise UserError(f"{flag(name)} {getattr(config, name)}: must be at least {low}")
    for name, value in vars(config).items():
        if isinstance(value, float) and not abs(value) < 1e38:
            raise UserError(f"{flag(name)} {value}: must be finite, and below 1e38")
        if isinstance(value, int) and value >= 2**63:
            raise UserError(f"{flag(name)} {value}: must be below 2^63")
    if config.lr < config.min_lr:
        raise UserError(f"--lr {config.lr}: must be at least --min-lr {config.min_lr}; lower both")
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


class LostRank(Exception):
    """Another rank has died, or has not answered within --timeout."""


@dataclass
class Ranks:
    """This process among all: its index, their number, its device.

    `patient` is a second process group, which waits for a day, but notices a dead process.
    `launch` is what the starts of a process by the same torchrun have in common, and no other.
    """

    rank: int
    size: int
    device: torch.device
    patient: dist.ProcessGroup | None = None
    launch: str | None = None

    def sum(self, tensor: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
        """Add the tensor over all ranks, in place; LostRank if they do not all come to it."""
        if self.size > 1:
            try:
                dist.all_reduce(tensor, group=group)
            except RuntimeError as error:
                if not isinstance(error, dist.DistError) and "gloo" not in str(error):
                    raise  # this rank's own defect
                reason = re.sub(r"^\[\S+\] |\. .*", "", str(error).strip().splitlines()[0])
                raise LostRank(f"another rank has died (see its own message), or has not answered "
                               f"within --timeout: {reason}") from None
        return tensor

    def from_first(self, number: int) -> int:
        """Rank 0's number, on all ranks."""
        return int(self.sum(torch.tensor(number * (self.rank == 0)), self.patient))

    @contextmanager
    def together(self):
        """Wait for all ranks at the block's end; a UserError in it on one rank ends them all.

        The block may be the work of one rank and last as long as it likes.
        """
        error = None
        try:
            yield
        except UserError as raised:
            error = raised
        failed = self.sum(torch.tensor([float(error is not None)]), self.patient).item()
        if failed:
            raise error or UserError("another rank has stopped, see its message")

    def share(self, n: int) -> range:
        """The contiguous part of range(n) that is this rank's; shares differ by at most one."""
        return range(self.rank * n // self.size, (self.rank + 1) * n // self.size)


def keep_freed_memory():
    """Let glibc keep the memory that tensors free, for the next ones.

    By default it hands large blocks back to the system, and faulting them in again takes a fifth of
    a CPU's time (bench/NOTES.md). A threshold set in the environment goes before.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    given = "MALLOC_MMAP_THRESHOLD_" in os.environ or "malloc" in tunables
    if sys.platform != "linux" or given:
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # not in every C library
    mmap_threshold, trim_threshold = -3, -1  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD in malloc.h
    if mallopt and any(mallopt(mmap_threshold, size) for size in (2**30, 2**25)):  # the old limit
        mallopt(trim_threshold, 2**31 - 1)


def start_ranks(
    device: str, threads: int, timeout_minutes: float, deterministic: bool = False
) -> Ranks:
    """Join the process group that torchrun describes; without torchrun this is the only process.

    gloo on the CPU, nccl on CUDA. threads = 0 shares the cores among the processes of the machine.
    deterministic: only operations that give equal bits for equal input (the CPU's all do).

    torch.distributed.nn.functional has the default group among its default arguments. torch.optim
    imports it at its first use; a group that existed by then would outlive its destruction, and its
    threads the interpreter, which aborts the process. So this module imports it first.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local, local_size = (int(os.environ.get(f"LOCAL_{k}", d)) for k, d in
                         (("RANK", 0), ("WORLD_SIZE", 1)))
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    torch.use_deterministic_algorithms(deterministic)
    place = find_device(device)
    if threads > 1024:
        raise UserError(f"--threads {threads}: must be at most 1024")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(threads or max(1, cores // local_size))
    if place.type == "cpu":
        keep_freed_memory()
    else:
        place = torch.device("cuda", local if place.index is None else place.index)
        torch.cuda.set_device(place)
    patient, launch, by_torchrun = None, None, "TORCHELASTIC_RUN_ID" in os.environ
    backend = "nccl" if place.type == "cuda" else "gloo"
    wait = timedelta(minutes=min(timeout_minutes, 365 * 24 * 60))  # a year is for ever
    try:
        if size > 1 or by_torchrun:
            store, *_ = next(dist.rendezvous("env://", rank, size, timeout=wait))
        if by_torchrun:  # its store lives as long as it does: the first name stays
            launch = store.compare_set("launch", "", uuid.uuid4().hex).decode()
        if size > 1:
            dist.init_process_group(backend, store=meet(store, rank, size, wait), rank=rank,
                                    world_size=size, timeout=wait)
            patient = dist.new_group(backend="gloo", timeout=wait)  # to connect
            dist.distributed_c10d._set_pg_timeout(timedelta(days=1), patient)
    except ValueError as error:
        raise UserError(f"RANK and WORLD_SIZE are set, but {error}; start with torchrun")
    except RuntimeError as error:
        raise LostRank(f"the ranks did not find each other within --timeout ({error})") from None
    return Ranks(rank, size, place, patient, launch)


def meet(store: dist.Store, rank: int, size: int, wait: timedelta) -> dist.Store:
    """torchrun's store, under a prefix that only the processes of this start have.

    When torchrun starts crashed workers again its store still has the addresses of the dead, and
    who reads one waits for ever. So rank 0 calls out a new name, the others answer it with names of
    their own, and an old call is known by the guests it was answered by.
    """
    own, deadline = uuid.uuid4().hex, time.monotonic() + wait.total_seconds()
    if rank == 0:
        store.set("call", own)
        guests = [store.get(f"{own}/{guest}").decode() for guest in range(1, size)]
        store.set(f"{own}/guests", " ".join(guests))
        return dist.PrefixStore(own, store)
    while time.monotonic() < deadline:
        call = store.get("call").decode()
        store.set(f"{call}/{rank}", own)
        if store.check([f"{call}/guests"]) and own in store.get(f"{call}/guests").decode():
            return dist.PrefixStore(call, store)
        time.sleep(0.02)
    raise RuntimeError("rank 0 did not call")


def leave_ranks(ranks: Ranks | None, clean: bool = True):
    """End the process groups, so that none of their threads is left when the interpreter ends.

    clean: all ranks leave. One that leaves alone does not end NCCL, which would wait for the rest.
    """
    if ranks is not None:
        ranks.patient = None
    if dist.is_initialized() and (clean or dist.get_backend() == "gloo"):
        dist.destroy_process_group()


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


LOCK = ".lock"  # hidden, as what is written aside: such names do not make a folder a run's


@contextmanager
def open_run(config, free: tuple[str, ...], ranks: Ranks):
    """Make the folder config.out, or take up the run in it; it is this job's until the block ends.

    Yields whether the run goes on (on rank 0): with --resume, or because torchrun has started the
    crashed workers of this very run again (--max-restarts). Raises UserError if the folder has
    something else in it, if it cannot be written, if another process writes to it, or if a resumed
    configuration differs in fields other than `free`.
    """
    out, going_on, lock = Path(config.out), False, None
    with ranks.together():
        if ranks.rank == 0:
            try:
                going_on = goes_on(config, free, ranks.launch)
                out.mkdir(parents=True, exist_ok=True)
                lock = lock_folder(out)
            except OSError as error:
                raise UserError(f"{out}: cannot be written ({error.strerror}); name another --out")
    try:
        yield going_on
    finally:
        if lock is not None:
            with suppress(OSError):
                (out / LOCK).unlink()
            os.close(lock)


def goes_on(config, free: tuple[str, ...], launch: str | None) -> bool:
    """Whether the folder config.out has a run to go on with; see open_run."""
    out = Path(config.out)
    saved = out / "config.json"
    if config.resume and not saved.is_file():
        raise UserError(f"{saved}: missing, nothing to resume; leave --resume out")
    restarted = launch is not None and read_environment(out).get("launch") == launch
    if config.resume or restarted and saved.is_file():
        before, now = read_json(saved), asdict(config)
        changed = [f"{key}: {before.get(key)!r} -> {now[key]!r}" for key in now
                   if key not in free and before.get(key) != now[key]]
        if changed:
            raise UserError(f"{saved}: --resume with a changed configuration ({'; '.join(changed)})"
                            f"; give the first run's values, or another --out")
        return True
    found = [p.name for p in out.iterdir()] if out.is_dir() else [out.name] * out.exists()
    if any(name[0] != "." and name != "environment.json" for name in found):  # of a broken start
        raise UserError(f"{out}: exists and is not an empty folder; continue that run with "
                        f"--resume, or name another folder with --out")
    return False


def lock_folder(folder: Path) -> int:
    """An open descriptor that keeps other processes from locking the folder; UserError if taken."""
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(descriptor), os.stat(folder / LOCK)):
            raise BlockingIOError  # it was removed, and another one may be locked
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(f"{folder}: another process writes to it; end that one (also what a killed "
                        f"torchrun may have left behind), or name another --out")
    except OSError as error:
        print(f"note: {folder} cannot be locked ({error.strerror}): see to it that no other job "
              f"writes there", flush=True)
    return descriptor


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


def start_run(
    config, encoder: Encoder, optimizer, run: dict, ranks: Ranks, going_on: bool
) -> tuple[int, "Checkpoints"]:
    """The step to start from and the run's checkpoints, the newest of them put in place.

    `run` has the sha256 of the frozen `base` and of the `texts` that the run depends on. Rank 0
    decides, and writes config.json and environment.json. Raises UserError if a rank has read other
    files than rank 0.
    """
    out, about = Path(config.out), environment(encoder.llama.head.dtype, ranks)
    saved = Checkpoints(config, trained_of(encoder), optimizer, run)
    start = 0
    with ranks.together():
        if going_on:
            start = saved.newest_step()
            note_changes(read_environment(out), about)
            for name in ("encoder", "best"):
                finish_renaming(out / name)
    start = ranks.from_first(start)
    with ranks.together():
        state = saved.load(start) if start else {}
    mine = int(sha256_of([run, state])[:12], 16)
    same = mine == ranks.from_first(mine)
    with ranks.together():
        if not same:
            raise UserError(f"rank {ranks.rank} has read another base, other data or another "
                            f"checkpoint than rank 0; do all machines see the same files?")
        if ranks.rank == 0:
            about["launch"] = ranks.launch
            write_file(out / "environment.json", json.dumps(about) + "\n")
            write_file(out / "config.json", json.dumps(settings_of(config), indent=2) + "\n")
    return start, saved


def read_environment(out: Path) -> dict:
    """The environment in which the run in this folder was last, empty if there is none."""
    try:
        return read_json(out / "environment.json")
    except UserError:  # it serves notes and restarts only
        return {}


def note_changes(before: dict, now: dict):
    """Print what differs from the environment in which the run was before."""
    changed = [f"{key} {before[key]} -> {now[key]}" for key in now
               if key in before and before[key] != now[key]]
    if changed:
        print(f"note: {', '.join(changed)}: the same samples in the same steps, other bits than "
              f"without the interruption", flush=True)


def trained_of(encoder: Encoder) -> dict[str, Tensor]:
    """Name -> parameter, of those that are trained."""
    return {name: p for name, p in encoder.named_parameters() if p.requires_grad}


class Checkpoints:
    """OUT/checkpoints/step-*: weights, optimiser moments and the step; the last two are kept.

    A folder is written beside its place, synced and renamed. Its state.json has the size and sha256
    of the other files and of itself: what is not as it was written is never loaded.
    """

    def __init__(self, config, trained: dict[str, Tensor], optimizer, run: dict):
        self.folder = Path(config.out) / "checkpoints"
        self.seconds = 60 * config.save_minutes or float("inf")
        self.trained, self.optimizer, self.run = trained, optimizer, run
        self.clock = time.monotonic()

    def place(self, step: int) -> Path:
        """The folder of the checkpoint after so many steps."""
        return self.folder / f"step-{step:07d}"

    def all(self) -> list[Path]:
        """The checkpoints that are there, oldest first."""
        return sorted(self.folder.glob("step-" + 7 * "[0-9]"))

    def late(self) -> bool:
        """Whether the last checkpoint is --save-minutes old."""
        return time.monotonic() - self.clock >= self.seconds

    def save(self, step: int):
        """Write the checkpoint after so many steps and remove all but it and the one before."""
        place = self.place(step)
        with write_folder(place) as folder:
            for log in self.folder.parent.glob("*.jsonl"):  # they have all steps of the checkpoint
                sync(log)
            save_file({k: p.detach().cpu().contiguous() for k, p in self.trained.items()},
                      folder / "weights.safetensors")
            moments = {f"{name}/{key}": value.cpu().contiguous()
                       for name, p in self.trained.items()
                       for key, value in self.optimizer.state[p].items()}
            save_file(moments, folder / "optimizer.safetensors")
            seal(folder, {"step": step, **self.run})
        before = [old for old in self.all() if old < place]
        for other in [*self.all(), *self.folder.glob(".step-*.writing")]:
            if other not in (place, *before[-1:]):  # also a damaged one of a later step
                shutil.rmtree(other, ignore_errors=True)
        self.clock = time.monotonic()

    def newest_step(self) -> int:
        """The step of the newest checkpoint that is whole, 0 if there is none at all.

        A damaged one is told and passed over. Raises UserError if all are damaged, or if they
        belong to another base or to other texts.
        """
        folders = self.all()
        for folder in reversed(folders):
            try:
                state = unseal(folder)
            except UserError as error:
                if folder == folders[0]:
                    raise UserError(f"{error}; no checkpoint before it is left, remove "
                                    f"{self.folder} to start this run from its beginning")
                print(f"note: {error}; going on from the checkpoint before it", flush=True)
                continue
            for key, now in self.run.items():
                if state.get(key) != now:
                    raise UserError(f"{folder}: the {key} of this run changed since (sha256 "
                                    f"{str(state.get(key))[:12]}..., now {now[:12]}...); bring the "
                                    f"first {key} back, or start anew with another --out")
            return state["step"]
        return 0

    @torch.no_grad()
    def load(self, step: int) -> dict:
        """Put the checkpoint after so many steps in place; returns its state."""
        folder = self.place(step)
        state = unseal(folder)
        weights = load_file(folder / "weights.safetensors")
        moments = load_file(folder / "optimizer.safetensors")
        for name, p in self.trained.items():
            p.copy_(weights[name])
            own = {key.rpartition("/")[2]: value for key, value in moments.items()
                   if key.rpartition("/")[0] == name}
            if own:  # copied, so that the file is no longer needed
                self.optimizer.state[p] = {key: value.to(p.device, copy=True)
                                           for key, value in own.items()}
        return state


def sha256_of(value) -> str:
    """sha256 of a value as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def seal(folder: Path, about: dict):
    """Write folder/state.json: `about`, size and sha256 of the files beside it, its own sha256."""
    files = {path.name: [path.stat().st_size, digest([path])] for path in sorted(folder.iterdir())
             if path.name != "state.json"}
    state = {**about, "files": files}
    state["sha256"] = sha256_of(state)
    (folder / "state.json").write_text(json.dumps(state, indent=2) + "\n")


def unseal(folder: Path) -> dict:
    """What `seal` wrote about the folder; UserError if the folder is not as it was then."""
    path = folder / "state.json"
    state = read_json(path, "a complete checkpoint")
    own = state.pop("sha256", None)
    if own != sha256_of(state):
        raise UserError(f"{path}: damaged, not what was written")
    for name, (size, sha256) in state["files"].items():
        path = folder / name
        try:
            if path.stat().st_size != size or digest([path]) != sha256:
                raise UserError(f"{path}: damaged, not what was written")
        except OSError as error:
            raise UserError(f"{path}: not readable ({error.strerror})")
    return state


class Metrics:
    """metrics.jsonl: one line a step, every step once, also after a resume.

    A resumed run keeps the lines before `first_step`. `rows` holds all lines.
    """

    def __init__(self, path: Path, first_step: int):
        self.path, self.rows = path, []
        kept = []
        if path.is_file():
            for line in path.read_text(errors="replace").splitlines():
                try:
                    row = json.loads(line)
                    early = row["step"] < first_step
                    if not all(isinstance(value, int | float) for value in row.values()):
                        continue
                except (ValueError, KeyError, TypeError, RecursionError):  # that a crash cut off
                    continue
                if early:
                    self.rows.append(row)
                    kept.append(line + "\n")
        write_file(path, "".join(kept))

    def write(self, **values):
        """Append one step."""
        self.rows.append(values)
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps(values) + "\n")
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror}); mend that and go "
                            f"on with --resume")


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


def agree(signals: list[int], late: bool, ranks: Ranks) -> tuple[int, bool]:
    """The number of the signal by which any rank was told to stop, or 0; and rank 0's `late`."""
    mine = [float(s in signals) for s in STOPS] + [float(late and ranks.rank == 0)]
    *asked, late = ranks.sum(torch.tensor(mine, device=ranks.device)).tolist()
    return max(int(number) * bool(n) for number, n in zip(STOPS, asked)), bool(late)


def explain(error: Exception) -> str:
    """What is said of an error that ends a command."""
    return f"{error}" + "; mend that, or name another place" * isinstance(error, OSError)


def show_all():
    """Let standard output escape what its encoding has no place for, as standard error does."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def run_stage(config, check, free: tuple[str, ...], train, report) -> int:
    """A stage from its configuration to the exit code.

    check(config); train(config, ranks, going_on) -> the signal that ended it, or 0, on all ranks;
    report(config, ranks) on the first one after a complete run. Settings in `free` may change when
    the run is resumed. Returns 0, 2 after a UserError, or a file or folder that cannot be used, 1
    if another rank was lost, 128 + a signal.
    """
    show_all()
    rank, ranks, checked = os.environ.get("RANK", "0"), None, False
    try:
        check(config)
        checked = True
        ranks = start_ranks(config.device, config.threads, config.timeout, config.deterministic)
        with open_run(config, free, ranks) as going_on:
            stopped = train(config, ranks, going_on)
        leave_ranks(ranks)
        if stopped and ranks.rank == 0:
            print(f"\nstopped by signal {stopped}, saved; go on with the same command and --resume",
                  flush=True)
        if ranks.rank == 0 and not stopped:
            report(config, ranks)
        return 128 + stopped if stopped else 0
    except (UserError, LostRank, OSError) as error:
        if checked or rank == "0":  # all ranks have the same settings, one complains
            print(f"error{f' on rank {rank}' if rank != '0' else ''}: {explain(error)}",
                  file=sys.stderr, flush=True)
        if isinstance(error, LostRank) and "TORCHELASTIC_RUN_ID" in os.environ:
            time.sleep(2)  # torchrun tells the traceback of the rank that ends first: not of this
        return 1 if isinstance(error, LostRank) else 2
    except KeyboardInterrupt:  # before the first step, or in the report
        print("\ninterrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    finally:
        leave_ranks(ranks, clean=False)

"""The processes of a job: how they find each other, and what they exchange."""

import os
import re
import time
import uuid
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # before any process group: see join_ranks
from torch import Tensor

from runtime.cpu import keep_freed_memory
from runtime.devices import find_device
from runtime.errors import LostRank, UserError

LARGE = 1_000_000  # elements from which a gradient is sent on its own


@dataclass
class Ranks:
    """This process among all: its rank, the number of processes, its device.

    `patient` is a second process group whose operations may take a day; a dead process still ends
    them at once. `launch` is an id shared by all restarts under one torchrun.
    """

    rank: int
    size: int
    device: torch.device
    patient: dist.ProcessGroup | None = None
    launch: str | None = None

    def sum(self, tensor: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
        """Sum the tensor over all ranks, in place; LostRank unless all of them take part."""
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

    def sum_gradients(self, parameters: list[Tensor]):
        """Sum the gradients over all ranks: small ones in one flat message, large ones one by one.

        Losses are divided by global counts before backward, so the sum is the gradient of the
        batch. A rank that had nothing to do adds zeros.
        """
        if self.size == 1:
            return
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        small = [p.grad for p in parameters if p.numel() < LARGE]
        if small:
            flat = self.sum(torch.cat([g.flatten() for g in small]))
            for gradient, piece in zip(small, flat.split([g.numel() for g in small])):
                gradient.copy_(piece.view_as(gradient))
        for p in parameters:
            if p.numel() >= LARGE:
                self.sum(p.grad)

    def from_first(self, number: int) -> int:
        """Rank 0's number, on all ranks."""
        return int(self.sum(torch.tensor(number * (self.rank == 0)), self.patient))

    @contextmanager
    def fail_together(self):
        """Wait for all ranks at the block's end; a UserError in it on one rank ends them all.

        The block may be the work of one rank and take up to a day.
        """
        error = None
        try:
            yield
        except UserError as raised:
            error = raised
        failed = self.sum(torch.tensor([float(error is not None)]), self.patient).item()
        if failed:
            raise error or UserError("another rank has stopped, see its message")

    def on_first(self, work: Callable, *args):
        """work(*args) on rank 0 while the others wait; its result there, None elsewhere."""
        with self.fail_together():
            return work(*args) if self.rank == 0 else None

    def first_then_others(self, work: Callable):
        """work() on rank 0, then on the others: what it downloads and caches is there for them."""
        for turn in (self.rank == 0, self.rank > 0):
            with self.fail_together():
                if turn:
                    result = work()
        return result

    def share(self, n: int) -> range:
        """The contiguous part of range(n) that is this rank's; shares differ by at most one."""
        return range(self.rank * n // self.size, (self.rank + 1) * n // self.size)

    def micro_batches(self, n: int, size: int) -> list[range]:
        """This rank's share of range(n), in ranges of at most `size` (0: in one)."""
        share = self.share(n)
        size = size or max(1, len(share))
        return [share[i : i + size] for i in range(0, len(share), size)]


@contextmanager
def join_ranks(device: str, threads: int, timeout_minutes: float, deterministic: bool = False):
    """Join the process group that torchrun describes; without torchrun this is the only process.

    gloo on the CPU, nccl on CUDA. threads = 0 shares the cores among the processes of the machine.
    deterministic: only operations that give equal bits for equal input (the CPU's all do). Yields
    Ranks; the groups end with the block, so that none of their threads outlives the interpreter.

    torch.distributed.nn.functional keeps the default group as a default argument. torch.optim
    imports it on first use; a group that existed by then would outlive its destruction, and its
    threads the interpreter, which aborts the process. So this module imports it first.
    """
    ranks, finished = None, False
    try:
        ranks = start_ranks(device, threads, timeout_minutes, deterministic)
        yield ranks
        finished = True
    finally:
        if ranks is not None:
            ranks.patient = None
        # if this rank leaves alone, NCCL would wait for the others, so its group is left as is
        if dist.is_initialized() and (finished or dist.get_backend() == "gloo"):
            dist.destroy_process_group()


def start_ranks(device: str, threads: int, timeout_minutes: float, deterministic: bool) -> Ranks:
    """Set device and threads, and connect the processes; see `join_ranks`."""
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    given = [os.environ.get(name, value) for name, value in alone.items()]
    if not all(map(str.isdecimal, given)) or 0 in map(int, given[1::2]):
        raise UserError(f"{', '.join(alone)} are {', '.join(given)} in the environment, no numbers "
                        f"of processes; start with torchrun, or unset them")
    rank, size, local, local_size = map(int, given)
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
        if place.index >= (there := torch.cuda.device_count()):
            raise UserError(f"--device {device}: process {local} of this machine would need GPU "
                            f"{place.index} (from 0), and there are {there}; start fewer with "
                            f"--nproc-per-node, or name another device")
        torch.cuda.set_device(place)
    patient, launch, by_torchrun = None, None, "TORCHELASTIC_RUN_ID" in os.environ
    backend = "nccl" if place.type == "cuda" else "gloo"
    wait = timedelta(minutes=min(timeout_minutes, 365 * 24 * 60))  # timedelta has a limit
    try:
        if size > 1 or by_torchrun:
            store, *_ = next(dist.rendezvous("env://", rank, size, timeout=wait))
        if by_torchrun:  # its store outlives restarts: the first id stays
            launch = store.compare_set("launch", "", uuid.uuid4().hex).decode()
        if size > 1:
            dist.init_process_group(backend, store=rendezvous(store, rank, size, wait), rank=rank,
                                    world_size=size, timeout=wait)
            patient = dist.new_group(backend="gloo", timeout=wait)  # the time to connect
            dist.distributed_c10d._set_pg_timeout(timedelta(days=1), patient)
    except ValueError as error:
        raise UserError(f"RANK and WORLD_SIZE are set, but {error}; start with torchrun")
    except RuntimeError as error:
        raise LostRank(f"the ranks did not find each other within --timeout ({error})") from None
    return Ranks(rank, size, place, patient, launch)


def rendezvous(store: dist.Store, rank: int, size: int, wait: timedelta) -> dist.Store:
    """torchrun's store, under a prefix that only the processes of this start know.

    When torchrun restarts crashed workers, its store still has the dead ones' addresses, and a rank
    that reads one never connects. So rank 0 publishes a fresh name, the others answer it with names
    of their own, and a stale name is recognised by the answers recorded with it.
    """
    own, deadline = uuid.uuid4().hex, time.monotonic() + wait.total_seconds()
    if rank == 0:
        store.set("call", own)
        answers = [store.get(f"{own}/{other}").decode() for other in range(1, size)]
        store.set(f"{own}/answers", " ".join(answers))
        return dist.PrefixStore(own, store)
    while time.monotonic() < deadline:
        call = store.get("call").decode()
        store.set(f"{call}/{rank}", own)
        if store.check([f"{call}/answers"]) and own in store.get(f"{call}/answers").decode():
            return dist.PrefixStore(call, store)
        time.sleep(0.02)
    raise RuntimeError("rank 0 did not call")

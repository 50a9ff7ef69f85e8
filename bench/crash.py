"""Kill a training run again and again at random moments; it must end with the undisturbed bits.

    python bench/crash.py --kills 36 --out runs/crash

Two processes under torchrun with restarts train the demo's tiny Llama. A killer draws, from
--seed, whom to kill (one rank, or torchrun and both ranks), in which phase of the program (forward,
backward, save, rename, or any time, also while starting) and how far into it, waits for that moment
and sends SIGKILL. A killed rank is torchrun's to restart; a killed job is started again here with
--resume. Afterwards metrics.jsonl must have every step once, and metrics, weights, moments and
encoder must be equal, bit for bit, to those of a run that nobody disturbed.

Each process notes its phase in a file that the killer reads, before and after the kill: the table
counts what was hit, not what was aimed at. Phases are stretched by a sleep (a rename takes
microseconds), or the killer would seldom meet them.
"""

import argparse
import json
import mmap
import os
import random
import signal
import struct
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

PHASES = ["start", "between", "forward", "backward", "save", "rename", "end"]
AIMS = ["forward", "backward", "save", "rename", "any time"]
NOTE = struct.Struct("=qqq")  # process id, step, phase
SIZE = 2  # processes

# ---------------------------------------------------------------------------------------------
# The killed: a stage that notes where it is
# ---------------------------------------------------------------------------------------------


class Note:
    """A process's note to the killer: its id, step and phase, in shared memory."""

    def __init__(self, path: Path, create: bool = False):
        if create:
            path.write_bytes(NOTE.pack(0, -1, 0))
        with open(path, "r+b") as file:
            self.memory = mmap.mmap(file.fileno(), NOTE.size)

    def read(self) -> tuple[int, int, str]:
        """Process id (0 before its start), step (-1 before the first), phase."""
        process, step, phase = NOTE.unpack(self.memory[:])
        return process, step, PHASES[phase]

    def write(self, process: int, step: int, phase: str):
        """Replace the note."""
        self.memory[:] = NOTE.pack(process, step, PHASES.index(phase))


def work(note: Note, stretch: float, argv: list[str]) -> int:
    """Stage 1 from its command line, with notes about its phases."""
    note.write(os.getpid(), -1, "start")
    import torch

    import pretrain_ctkd as stage1
    import training

    def phase(name: str, function):
        """The function, in a phase of this name that is not over at once."""

        def stretched(*inputs, **options):
            process, step, before = note.read()
            note.write(process, step, name)
            time.sleep(stretch / 2)
            try:
                return function(*inputs, **options)
            finally:
                time.sleep(stretch / 2)
                note.write(process, step, before)

        return stretched

    whole = stage1.batch_gradient

    def batch_gradient(encoder, corpus, config, step, ranks):
        note.write(os.getpid(), step, "between")
        return whole(encoder, corpus, config, step, ranks)

    stage1.batch_gradient = batch_gradient
    stage1.stage1_loss = phase("forward", stage1.stage1_loss)
    torch.Tensor.backward = phase("backward", torch.Tensor.backward)
    training.Checkpoints.save = phase("save", training.Checkpoints.save)
    os.rename, os.replace = phase("rename", os.rename), phase("rename", os.replace)
    stage1.report = lambda *_: note.write(os.getpid(), -1, "end")
    return stage1.record(stage1.main)(argv)


# ---------------------------------------------------------------------------------------------
# The killer
# ---------------------------------------------------------------------------------------------


class Job:
    """A torchrun with its two processes."""

    def __init__(self, out: Path, notes: list[Path], stretch: float, settings: list[str]):
        self.out, self.paths, self.stretch, self.settings = out, notes, stretch, settings
        self.starts = 0
        self.start()

    def start(self):
        """Start torchrun, with --resume if there is something to resume."""
        self.notes = [Note(path, create=True) for path in self.paths]
        resume = ["--resume"] if (self.out / "config.json").is_file() else []
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                   "--nproc-per-node", SIZE, "--max-restarts", 1000, "--monitor-interval", 0.1,
                   __file__, "--work", self.paths[0].parent, "--stretch", self.stretch, "--",
                   *self.settings, *resume]
        with open(f"{self.out}.log", "a") as log:
            self.torchrun = subprocess.Popen(
                list(map(str, command)), cwd=ROOT, stdout=log, stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"})
        self.starts += 1

    def ended(self) -> bool:
        """Whether torchrun has ended; SystemExit if it has failed."""
        code = self.torchrun.poll()
        if code:
            sys.exit(f"torchrun ended with {code}; its output is in {self.out}.log")
        return code == 0

    def wait_for_moment(self, aim: str, rank: int, steps: int, delay: float) -> bool:
        """Return when the rank is in the phase, `steps` steps after its start; False at the end."""
        begun, process = time.monotonic(), self.notes[rank].read()[0]
        first = None
        while not self.ended():
            found, step, phase = self.notes[rank].read()
            if found and alive(found):
                if aim == "any time" and time.monotonic() - begun > 6 * delay / self.stretch:
                    return True
                first = step if first is None and step >= 0 else first
                if first is not None and step >= first + steps and phase == aim:
                    time.sleep(delay)
                    return True
            elif found != process:
                begun, process, first = time.monotonic(), found, None
            time.sleep(0.0005)
        return False

    def kill(self, whom: str, rank: int) -> str:
        """SIGKILL to one rank or to all; returns the phase in which `rank` died."""
        processes = [note.read()[0] for note in self.notes]
        if whom == "job":
            agent = self.torchrun.pid
            os.kill(agent, signal.SIGSTOP)  # it must not start a process while they are counted
            children = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
            for process in (processes[rank], *map(int, children), agent):
                kill(process)
            self.torchrun.wait()
        else:
            kill(processes[rank])
        while alive(processes[rank]):
            time.sleep(0.001)
        phase = self.notes[rank].read()[2]
        if whom == "job":
            self.start()
        else:  # torchrun ends the other rank and starts both again
            while not self.ended() and self.notes[rank].read()[0] == processes[rank]:
                time.sleep(0.01)
        return phase


def alive(process: int) -> bool:
    """Whether the process runs (a dead one that nobody has waited for does not)."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def kill(process: int):
    """SIGKILL, if it is still there."""
    try:
        os.kill(process, signal.SIGKILL)
    except ProcessLookupError:
        pass


def differences(left: Path, right: Path) -> list[str]:
    """What two runs do not share, bit for bit; empty if they are the same."""
    import torch
    from safetensors.torch import load_file

    found = []
    rows = []
    for out in (left, right):
        lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
        rows.append([{k: v for k, v in row.items() if k != "tokens_per_second"} for row in lines])
    if [row["step"] for row in rows[0]] != list(range(len(rows[0]))):
        found.append("metrics.jsonl has not every step once")
    if rows[0] != rows[1]:
        found.append("metrics.jsonl")
    last = sorted(right.glob("checkpoints/step-*"))[-1].relative_to(right)
    tensors = [last / "weights.safetensors", last / "optimizer.safetensors",
               *(p.relative_to(right) for p in (right / "encoder").rglob("*.safetensors"))]
    for path in tensors:
        a, b = load_file(left / path), load_file(right / path)
        if a.keys() != b.keys() or not all(torch.equal(a[key], b[key]) for key in a):
            found.append(str(path))
    return found


def compare_crashed(args: argparse.Namespace) -> dict:
    """An undisturbed run and one with kills; SystemExit if they differ or a phase was not hit."""
    out = Path(args.out)
    if out.exists():
        sys.exit(f"{out}: exists; remove it, or name another --out")
    out.mkdir(parents=True)
    draw, steps = random.Random(args.seed), args.steps_per_kill * args.kills
    settings = ["--model", "demo", "--text", "demo", "--batch-size", "4", "--num-texts", "400",
                "--max-tokens", "64", "--steps", steps, "--save-every", 3, "--lora-dropout", 0.1,
                "--threads", 1, "--device", "cpu"]
    names = ("whole", "crashed")
    jobs = [[*settings, "--out", out / name] for name in names]
    notes = [out / f"note-{rank}" for rank in range(SIZE)]
    job, began = Job(out / "whole", notes, args.stretch, jobs[0]), time.monotonic()
    while not job.ended():
        time.sleep(0.1)
    print(f"{steps} steps on {SIZE} processes, undisturbed: {time.monotonic() - began:.0f} s\n"
          f"seed {args.seed}; {'kill':>4}  {'whom':<6}  {'aimed at':<10}  {'hit':<10}  step",
          flush=True)

    job, began = Job(out / "crashed", notes, args.stretch, jobs[1]), time.monotonic()
    hits, kills = Counter(), []
    while not job.ended():
        if len(kills) == args.kills:
            time.sleep(0.1)
            continue
        aim = AIMS[len(kills) % len(AIMS)]
        whom = draw.choice(["rank", "job"])
        rank = 0 if aim in ("save", "rename") else draw.randrange(SIZE)
        moment = (aim, rank, draw.randrange(args.steps_per_kill),
                  draw.uniform(0, 0.75 * args.stretch))
        if not job.wait_for_moment(*moment):
            break
        step = job.notes[rank].read()[1]
        hit = job.kill(whom, rank)
        hits[hit] += 1
        whom = f"rank {rank}" if whom == "rank" else "job"
        kills.append({"whom": whom, "aim": aim, "hit": hit, "step": step})
        print(f"{len(kills):>12}  {whom:<6}  {aim:<10}  {hit:<10}  {step}", flush=True)
    seconds = time.monotonic() - began

    log = (out / "crashed.log").read_text()
    result = {"seed": args.seed, "steps": steps, "kills": kills, "hits": dict(hits),
              "starts": job.starts, "passed_over": log.count("going on from the checkpoint before"),
              "seconds": seconds, "differences": differences(out / "crashed", out / "whole")}
    (out / "crash.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{len(kills)} kills in {seconds:.0f} s ("
          + ", ".join(f"{n} in {phase}" for phase, n in hits.most_common())
          + f"), {job.starts} starts by hand; {steps} steps, each logged once; "
          + ("differences: " + ", ".join(result["differences"]) if result["differences"] else
             "metrics, weights, moments and encoder equal the undisturbed run's bit for bit"))
    missed = {"forward", "backward", "save", "rename"} - hits.keys()
    if result["differences"] or missed or len(kills) < args.kills:
        sys.exit(f"failed: {len(kills)} of {args.kills} kills, phases not hit: "
                 f"{', '.join(sorted(missed)) or 'none'}")
    return result


def main(argv: list[str] | None = None):
    """The command line; also the program that torchrun starts (--work)."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=36, help="SIGKILLs")
    parser.add_argument("--steps-per-kill", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--stretch", type=float, default=0.02, help="least seconds of a phase")
    parser.add_argument("--out", default="runs/crash", help="folder for both runs; must be new")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("settings", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.work:
        note = Note(Path(args.work) / f"note-{os.environ['RANK']}")
        sys.exit(work(note, args.stretch, args.settings))
    compare_crashed(args)


if __name__ == "__main__":
    main()

"""Kill a training run again and again at drawn moments, beside one that nobody disturbs.

Two processes under torchrun with restarts train the bundled Llama. A killer draws, from a seed,
whom to kill (one rank, or torchrun and both ranks), in which phase of the program (forward,
backward, save, rename, or any time, also while starting) and how far into it, waits for that moment
and sends SIGKILL. A killed rank is torchrun's to restart; a killed job is started again here with
--resume.

Each process notes its phase in a file that the killer reads, before and after the kill: what counts
is what was hit, not what was aimed at. Phases are stretched by a sleep (a rename takes
microseconds), or the killer would seldom meet them; it stops the rank (SIGSTOP) to see that it is
still in the phase.
"""

import mmap
import os
import random
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

PHASES = ["start", "between", "forward", "backward", "save", "rename", "end"]
AIMS = ["forward", "backward", "save", "rename", "any time"]
NOTE = struct.Struct("=qqq")  # process id, step, phase
SIZE = 2  # processes
PATIENCE = 120  # seconds without progress after which the test fails

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


def train(note: Note, stretch: float, argv: list[str]) -> int:
    """Stage 1 from its command line, with notes about its phases."""
    note.write(os.getpid(), -1, "start")
    import torch

    import pretrain_ctkd
    from data.batches import SplitTexts
    from runtime.checkpoints import Checkpoints

    def phase(name: str, function):
        """The function, in a phase of this name that lasts for a while."""

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

    whole = SplitTexts.read_batch

    def read_batch(data, seed, step, batch_size):
        note.write(os.getpid(), step, "between")
        return whole(data, seed, step, batch_size)

    SplitTexts.read_batch = read_batch
    pretrain_ctkd.OBJECTIVES["ctkd"] = phase("forward", pretrain_ctkd.ctkd)
    torch.Tensor.backward = phase("backward", torch.Tensor.backward)
    Checkpoints.save = phase("save", Checkpoints.save)
    os.rename, os.replace = phase("rename", os.rename), phase("rename", os.replace)
    pretrain_ctkd.report = lambda *_: note.write(os.getpid(), -1, "end")
    return pretrain_ctkd.record(pretrain_ctkd.main)(argv)


# ---------------------------------------------------------------------------------------------
# The killer
# ---------------------------------------------------------------------------------------------


class Job:
    """A torchrun with its two processes; as a context it ends them all."""

    def __init__(self, out: Path, stretch: float, settings: list):
        self.out, self.stretch, self.settings = out, stretch, [*settings, "--out", out]
        self.paths = [out.parent / f"note-{rank}" for rank in range(SIZE)]
        self.starts = 0
        self.start()

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_):
        self.kill_all()

    def start(self):
        """Start torchrun, with --resume if there is something to resume."""
        self.notes = [Note(path, create=True) for path in self.paths]
        resume = ["--resume"] if (self.out / "config.json").is_file() else []
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                   "--nproc-per-node", SIZE, "--max-restarts", 1000, "--monitor-interval", 0.1,
                   __file__, self.out.parent, self.stretch, *self.settings, *resume]
        with open(f"{self.out}.log", "a") as log:
            self.torchrun = subprocess.Popen(
                list(map(str, command)), cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"})
        self.starts += 1
        self.seen, self.clock = None, time.monotonic()

    def ended(self) -> bool:
        """Whether torchrun has ended; AssertionError if it has failed, or if nothing moves."""
        code, seen = self.torchrun.poll(), [note.read() for note in self.notes]
        if seen != self.seen:
            self.seen, self.clock = seen, time.monotonic()
        stuck = time.monotonic() - self.clock > PATIENCE
        assert not code and not stuck, (code, seen, Path(f"{self.out}.log").read_text()[-4000:])
        return code == 0

    def wait(self):
        """Return when the job has ended."""
        while not self.ended():
            time.sleep(0.1)

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
                    if self.hold(found, rank, aim):
                        return True
            elif found != process:
                begun, process, first = time.monotonic(), found, None
            time.sleep(0.0005)
        return False

    def hold(self, process: int, rank: int, aim: str) -> bool:
        """Whether the rank, stopped, is still in the phase; if not, it runs on."""
        kill(process, signal.SIGSTOP)
        while state(process) not in "TZX":
            time.sleep(0.0005)
        held = self.notes[rank].read()[::2] == (process, aim)
        if not held:
            kill(process, signal.SIGCONT)
        return held

    def kill(self, whom: str, rank: int) -> str:
        """SIGKILL to one rank or to all; returns the phase in which `rank` died."""
        process = self.notes[rank].read()[0]
        if whom == "job":
            self.kill_all(process)
        else:
            kill(process)
        while alive(process):
            time.sleep(0.001)
        phase = self.notes[rank].read()[2]
        if whom == "job":
            self.start()
        else:  # torchrun ends the other rank and restarts both
            while not self.ended() and self.notes[rank].read()[0] == process:
                time.sleep(0.01)
        return phase

    def kill_all(self, *first: int):
        """SIGKILL to these processes, then to torchrun's others and to itself."""
        if self.torchrun.poll() is None:
            agent = self.torchrun.pid
            os.kill(agent, signal.SIGSTOP)  # it must not start a process while they are counted
            children = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
            for process in (*first, *map(int, children), agent):
                kill(process)
            self.torchrun.wait()


def state(process: int) -> str:
    """R, S, T, Z, ... as the kernel has it; X if the process is gone."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def alive(process: int) -> bool:
    """Whether the process runs (a dead one that nobody has waited for does not)."""
    return state(process) not in "ZX"


def kill(process: int, number: int = signal.SIGKILL):
    """The signal, if it is still there."""
    try:
        os.kill(process, number)
    except ProcessLookupError:
        pass


def kill_again_and_again(
    folder: Path, kills: int, steps_per_kill: int, seed: int, stretch: float, show: Callable = print
) -> dict:
    """A run into folder/whole, and one with so many kills into folder/killed.

    steps_per_kill: steps of both runs for each kill; stretch: least seconds of a phase. Returns
    steps, kills (a dict each: whom, aim, hit, step), starts by hand, and checkpoints skipped.
    """
    draw, steps = random.Random(seed), steps_per_kill * kills
    settings = ["--model", "demo", "--text", "demo", "--batch-size", 4, "--num-texts", 400,
                "--max-tokens", 64, "--steps", steps, "--save-every", 3, "--lora-dropout", 0.1,
                "--threads", 1, "--device", "cpu"]
    clock = time.monotonic()
    with Job(folder / "whole", stretch, settings) as job:
        job.wait()
    show(f"\n{steps} steps on {SIZE} processes, undisturbed: {time.monotonic() - clock:.0f} s\n"
         f"seed {seed}; {'kill':>4}  {'whom':<6}  {'aimed at':<10}  {'hit':<10}  step")
    done, clock = [], time.monotonic()
    with Job(folder / "killed", stretch, settings) as job:
        while len(done) < kills:
            aim = AIMS[len(done) % len(AIMS)]
            whom = draw.choice(["rank", "job"])
            rank = 0 if aim in ("save", "rename") else draw.randrange(SIZE)
            moment = (aim, rank, draw.randrange(steps_per_kill), draw.uniform(0, 0.75 * stretch))
            if not job.wait_for_moment(*moment):
                break
            step = job.notes[rank].read()[1]
            hit = job.kill(whom, rank)
            whom = f"rank {rank}" if whom == "rank" else "job"
            done.append({"whom": whom, "aim": aim, "hit": hit, "step": step})
            show(f"{len(done):>12}  {whom:<6}  {aim:<10}  {hit:<10}  {step}")
        job.wait()
    log = Path(f"{folder / 'killed'}.log").read_text()
    skipped = log.count("resuming from the checkpoint before it")
    show(f"{len(done)} kills in {time.monotonic() - clock:.0f} s, {job.starts} starts by hand, "
         f"{skipped} damaged checkpoints skipped")
    return {"steps": steps, "kills": done, "starts": job.starts, "skipped": skipped}


if __name__ == "__main__":  # as torchrun starts it: FOLDER STRETCH SETTINGS...
    folder, stretch, *argv = sys.argv[1:]
    note = Note(Path(folder) / f"note-{os.environ['RANK']}")
    sys.exit(train(note, float(stretch), argv))

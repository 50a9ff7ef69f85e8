"""A run and its folder: config.json, environment.json, metrics.jsonl, checkpoints/, encoder/.

`Run` is what a stage's loop sees of all this:

    run.start(...)             the newest checkpoint if the run resumes, the header, the log
    for step in run.steps():   until the last step, or the step in which a signal came
        ...                    forward, backward, sum of gradients, clip
        run.require_finite()   or all ranks stop, before the update
        ...                    step
        run.end_step(...)      log, progress bar, checkpoint
    run.finish(...)            the encoder
"""

import json
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from runtime.checkpoints import Checkpoints
from runtime.devices import pick_dtype
from runtime.errors import (
    STOPS,
    LostRank,
    UserError,
    interruptible,
    first_process,
    print_error,
    print_interrupt,
    take_signals,
    terminal,
)
from runtime.files import finish_renaming, read_json, sha256_of_files, sha256_of_json, try_lock
from runtime.files import write_file
from runtime.formats import is_encoder, weight_files
from runtime.ranks import Ranks, join_ranks
from runtime.settings import adopt_older, changed_settings, differences, stored_settings

FORMAT = 2  # of a run; in format 1 lengths included memory tokens, rates were a step ahead
LOCK = ".lock"  # hidden, like temporary files: a folder of hidden files counts as empty
DTYPES = ("bfloat16", "float32", "float64")


class Run:
    """A run of a stage on this rank. All its methods are called by all ranks together."""

    def __init__(self, config, ranks: Ranks, resuming: bool):
        self.config, self.ranks, self.resuming = config, ranks, resuming
        self.out, self.first_rank = Path(config.out), ranks.rank == 0
        self.dtype = pick_dtype(config.dtype, ranks.device)  # of frozen weights and activations
        self.first_step = self.last_step = 0
        self.before: dict = {}  # config.json of the run that is resumed
        self.changes: list[dict] = []  # what was changed when it was resumed, oldest first
        self.stopped = 0  # the number of the signal that ended the run early
        self.signals: list[int] = []  # those caught so far
        self.handlers: dict = {}  # what handled them before
        self.bar = self.checkpoints = None

    # -- before the first step

    def start(self, encoder: nn.Module, optimizer, steps: int, inputs: dict[str, str],
              about: str, data: str):
        """Load the newest checkpoint if the run resumes, print the header, and open the log.

        inputs: sha256 of the frozen `base` and of the `texts` that the run depends on; about, data:
        for the header. Raises UserError if a rank has read different files from rank 0's.
        """
        trained = {name: p for name, p in encoder.named_parameters() if p.requires_grad}
        self.last_step = steps
        older = {"base": lambda: encoder.sha256 or sha256_of_files(
            weight_files(encoder.tokenizer.file.parent))}
        self.checkpoints = Checkpoints(self.out, self.config.save_minutes, trained, optimizer,
                                       inputs, older)
        self.environment = environment(self.dtype, self.ranks)
        found = self.ranks.on_first(self._newest_step)
        self.first_step = self.ranks.from_first(found or 0)
        with self.ranks.fail_together():
            state = self.checkpoints.load(self.first_step) if self.first_step else {}
        self._compare_ranks([inputs, state])
        self.ranks.on_first(self._write_configuration)
        if self.changes:
            encoder.history[-1]["changes"] = self.changes
        self.log = self.open_log("metrics.jsonl", self.first_step)
        if self.first_rank:
            self._print_header(encoder, trained, about, data)
        self.handlers = take_signals(lambda number, _: self.signals.append(number))
        self.bar = tqdm(total=steps, initial=self.first_step, disable=not self.first_rank,
                        dynamic_ncols=True,
                        mininterval=0.2 if sys.stderr.isatty() else 15)  # few lines in a log file

    def _newest_step(self) -> int:
        """The step to resume from; renames that the interruption cut short are finished."""
        if not self.resuming:
            return 0
        found = self.checkpoints.newest_step()
        self._note_changes(found)
        for name in ("encoder", "best"):
            finish_renaming(self.out / name)
        return found

    def _note_changes(self, step: int):
        """Say what has changed since the interruption, and keep it for the encoder's history.

        What has moved has the content that the checkpoint knows by its sha256.
        """
        said = self.before.get("changes")
        self.changes = said if isinstance(said, list) else []
        if not step:  # all steps are run again
            self.changes = []
            return
        moved, computed, changes = [], [], {}
        for name, (old, new, kind) in differences(self.config, self.before).items():
            if kind and kind is not True:
                changes[name] = [old, new]
            if kind == "place":
                moved.append(f"{name} {old} -> {new}")
            elif kind == "bits" and name not in self.environment:  # else compared below
                computed.append(f"{name} {old} -> {new}")
        was = read_environment(self.out)
        computed += [f"{key} {was[key]} -> {now}" for key, now in self.environment.items()
                     if key in was and was[key] != now]
        if changes:
            self.changes = [*self.changes, {"after_step": step, **changes}]
        if moved:
            print(f"note: {', '.join(moved)}: the same content, by its sha256", flush=True)
        if computed:
            print(f"note: {', '.join(computed)}: the same samples in the same steps and the same "
                  f"gradient up to dropout and rounding, no longer the same bits as without the "
                  f"interruption", flush=True)

    def _compare_ranks(self, read):
        """UserError if this rank has read anything different from rank 0."""
        mine = int(sha256_of_json(read)[:12], 16)
        same = mine == self.ranks.from_first(mine)
        with self.ranks.fail_together():
            if not same:
                raise UserError(f"rank {self.ranks.rank} has read another base, other data or "
                                f"another checkpoint than rank 0; do all machines see the same "
                                f"files?")

    def _write_configuration(self):
        """Write config.json and environment.json."""
        about = {**self.environment, "launch": self.ranks.launch}
        write_file(self.out / "environment.json", json.dumps(about) + "\n")
        settings = {"format": FORMAT, **stored_settings(self.config)}
        if self.changes:
            settings["changes"] = self.changes
        write_file(self.out / "config.json", json.dumps(settings, indent=2) + "\n")

    def _print_header(self, encoder: nn.Module, trained: dict[str, Tensor], about: str, data: str):
        """Print what the run depends on: environment, parameter counts, data, steps."""
        count = {name: f"{sum(p.numel() for p in tensors) / 1e6:.2f} M" for name, tensors in (
            ("trained", trained.values()),
            ("frozen", (p for p in encoder.llama.parameters() if not p.requires_grad)))}
        e = self.environment
        print(f"python {e['python']}, torch {e['torch']}, {e['processes']} process(es) on "
              f"{e['device']}, {e['threads']} thread(s) each, {e['dtype'].removeprefix('torch.')}\n"
              f"model  {self.config.model}: {count['frozen']} frozen, {count['trained']} trained; "
              f"{about}\n{describe_memory(encoder.memory_tokens)}data   {data}\n"
              f"steps  {self.last_step:,} of {self.config.batch_size} -> {self.out}", flush=True)

    def open_log(self, name: str, first_step: int) -> "Log | None":
        """The log of that name in the run's folder on rank 0, None on the others."""
        return self.ranks.on_first(Log, self.out / name, first_step)

    # -- around each step

    def steps(self) -> Iterator[int]:
        """The steps still to do; ends early, after the step in which a signal came."""
        for step in range(self.first_step, self.last_step):
            self.clock = time.perf_counter()
            yield step
            if self.stopped:
                return

    def require_finite(self, step: int, loss: Tensor, norm: Tensor, values: Tensor,
                       rows: list[int], name: Callable[[int], str]):
        """UserError on all ranks if the loss or the gradient's norm is not finite.

        It names the rows whose `values` (len(rows), ...) are not finite, or all if none is to
        blame; name(row) is a row's place in the data.
        """
        if loss.isfinite() and norm.isfinite():
            return
        finite = values.isfinite().reshape(len(rows), -1).all(dim=1).tolist()
        odd = sorted({row for row, fine in zip(rows, finite) if not fine} or set(rows))
        raise UserError(
            f"step {step}: the loss ({loss.item():.4g}) or the gradient's norm "
            f"({norm.item():.4g}) is not finite; nothing was updated. Rows: "
            f"{'; '.join(map(name, odd[:8]))}{'; ...' * (len(odd) > 8)}. Lower --lr or use "
            f"--dtype float32; checkpoints are in {self.out}/checkpoints")

    def end_step(self, step: int, shown: str, save: bool = False, **metrics):
        """Log a step; save if asked to, if a checkpoint is due, or if any rank was told to stop.

        metrics: one line of metrics.jsonl, including `real_tokens`; shown: text next to the bar.
        """
        if self.first_rank:
            speed = metrics["real_tokens"] / (time.perf_counter() - self.clock)
            self.log.write(step=step, **metrics, tokens_per_second=speed)
            self.bar.set_postfix_str(f"{shown}, {speed:,.0f} tokens/s", refresh=False)
            self.bar.update()
        self.stopped, late = self._sync_stop()
        done = step + 1
        due = save or done == self.last_step or done % self.config.save_every == 0
        if due or late or self.stopped:
            self.ranks.on_first(self.checkpoints.save, done)

    def _sync_stop(self) -> tuple[int, bool]:
        """The number of the signal by which any rank was told to stop, or 0; whether rank 0's last
        checkpoint is too old."""
        late = self.first_rank and self.checkpoints.late()
        mine = [float(s in self.signals) for s in STOPS] + [float(late)]
        *asked, late = self.ranks.sum(torch.tensor(mine, device=self.ranks.device)).tolist()
        return max(int(number) * bool(n) for number, n in zip(STOPS, asked)), bool(late)

    # -- after the last step

    def finish(self, save_encoder: Callable[[Path], None]):
        """save_encoder(OUT/encoder), unless the run was stopped or was already complete."""
        folder = self.out / "encoder"
        complete = self.first_step == self.last_step and is_encoder(folder)
        if not self.stopped and not complete:
            self.ranks.on_first(save_encoder, folder)

    def close(self):
        """Restore the previous signal handlers, and release the model."""
        self.checkpoints = None  # they hold its tensors; the report loads its own
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.bar is not None:
            self.bar.close()


class Log:
    """A .jsonl file: one line per step, every step once, even after a resume.

    A resumed run keeps the lines before `first_step`. `rows` holds all lines.
    """

    def __init__(self, path: Path, first_step: int):
        self.path, self.rows = path, []
        for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
            with suppress(ValueError, KeyError, TypeError, RecursionError):  # a crash cut it off
                row = json.loads(line)
                if row["step"] < first_step and all(
                        isinstance(value, int | float) for value in row.values()):
                    self.rows.append(row)
        write_file(path, "".join(json.dumps(row) + "\n" for row in self.rows))

    def write(self, **values):
        """Append one step."""
        self.rows.append(values)
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps(values) + "\n")
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror}); fix that and "
                            f"continue with --resume")


# ---------------------------------------------------------------------------------------------
# The folder: which job owns it, and in which environment it was written
# ---------------------------------------------------------------------------------------------


@contextmanager
def open_run(config, ranks: Ranks):
    """Make the folder config.out, or resume the run in it; this job owns it until the block ends.

    Yields a Run that resumes with --resume, or because torchrun has restarted the crashed workers
    of this very run (--max-restarts). Raises UserError if the folder contains something else, if it
    cannot be written, if another process writes to it, or if a resumed configuration differs in
    settings that are not `resumable`.
    """
    out, before, lock = Path(config.out), None, None
    with ranks.fail_together():
        if config.resume and (out / "config.json").is_file():
            if (older := adopt_older(config, read_json(out / "config.json"))) and ranks.rank == 0:
                print(f"note: the run in {out} is from before {', '.join(older)}, and goes on so")
        if ranks.rank == 0:
            try:
                before = stored_run(config, ranks.launch)
                out.mkdir(parents=True, exist_ok=True)
                lock = lock_folder(out)
            except OSError as error:
                raise UserError(f"{out}: cannot be written ({error.strerror}); name another --out")
    run = Run(config, ranks, before is not None)
    run.before = before or {}
    # auto means what it meant when the run began, on any machine: the same for all ranks
    own = began_with(out) if before and config.dtype == "auto" else ""
    if number := ranks.from_first(DTYPES.index(own) + 1 if own else 0):
        run.dtype = getattr(torch, DTYPES[number - 1])
    try:
        yield run
    finally:
        run.close()
        if lock is not None:
            with suppress(OSError):
                (out / LOCK).unlink()
            os.close(lock)


def stored_run(config, launch: str | None) -> dict | None:
    """config.json of the run in config.out if that is to be resumed, else None; see open_run."""
    out = Path(config.out)
    saved = out / "config.json"
    if config.resume and not saved.is_file():
        raise UserError(f"{saved}: missing, nothing to resume; leave --resume out")
    restarted = launch is not None and read_environment(out).get("launch") == launch
    if config.resume or restarted and saved.is_file():
        before = read_json(saved)
        if before.get("format", 1) != FORMAT:
            raise UserError(f"{saved}: format={before.get('format', 1)!r}, this version resumes "
                            f"{FORMAT} (lengths, order of texts and learning rate differ); finish "
                            f"the run with the version that began it, or name another --out")
        if config.dtype == began_with(out):  # what auto meant there
            before = {**before, "dtype": config.dtype}
        if changed := changed_settings(config, before, resuming=True):
            raise UserError(f"{saved}: --resume with a changed configuration ({'; '.join(changed)})"
                            f"; give the first run's values, or another --out")
        return before
    found = [p.name for p in out.iterdir()] if out.is_dir() else [out.name] * out.exists()
    if any(name[0] != "." and name != "environment.json" for name in found):  # of a failed start
        raise UserError(f"{out}: exists and is not an empty folder; continue that run with "
                        f"--resume, or name another folder with --out")
    return None


def lock_folder(folder: Path) -> int:
    """An open descriptor that keeps other processes from locking the folder; UserError if taken."""
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
    with suppress(FileNotFoundError):  # if it was removed, another one may be locked
        if try_lock(descriptor, folder) and os.path.samestat(
                os.fstat(descriptor), os.stat(folder / LOCK)):
            return descriptor
    os.close(descriptor)
    raise UserError(f"{folder}: another process writes to it; end that one (also what a killed "
                    f"torchrun may have left behind), or name another --out")


def describe_memory(rows: Tensor) -> str:
    """How alike the memory rows (K, D) are: a line of the header, empty for fewer than two."""
    if len(rows) < 2:
        return ""
    unit = torch.nn.functional.normalize(rows.detach().double(), dim=-1)
    mean = (unit @ unit.T).fill_diagonal_(0).sum() / (len(rows) * (len(rows) - 1))
    return f"memory {len(rows)} rows, mean cosine {mean:.4f}\n"


def environment(dtype: torch.dtype, ranks: Ranks) -> dict:
    """What a run's bits depend on besides its configuration; stored with the run."""
    return {"python": platform.python_version(), "torch": torch.__version__,
            "device": str(ranks.device), "dtype": str(dtype),
            "processes": ranks.size, "threads": torch.get_num_threads()}


def read_environment(out: Path) -> dict:
    """The environment that the run in this folder last ran in, empty if it is not known."""
    try:
        return read_json(out / "environment.json")
    except UserError:  # it is needed for notes and restarts only
        return {}


def began_with(out: Path) -> str:
    """The dtype of the run in this folder, empty if it is not known."""
    dtype = str(read_environment(out).get("dtype")).removeprefix("torch.")
    return dtype if dtype in DTYPES else ""


# ---------------------------------------------------------------------------------------------
# A stage's command, from its configuration to the exit code
# ---------------------------------------------------------------------------------------------


def run_stage(config, check: Callable, train: Callable, report: Callable) -> int:
    """check(config); train(config, run) on all ranks; report(config, device) on the first one after
    a complete run.

    Returns the exit code: 0; 2 after a UserError, or for a file or folder that cannot be used; 1 if
    another rank was lost; 128 + n after signal n.
    """
    checked = False
    with terminal(), interruptible():
        try:
            check(config)
            checked = True
            with (join_ranks(config.device, config.threads, config.timeout, config.deterministic)
                  as ranks, open_run(config, ranks) as run):
                train(config, run)
            if run.stopped and run.first_rank:
                print(f"\nstopped by signal {run.stopped}, saved; continue with the same command "
                      f"and --resume", flush=True)
            if run.first_rank and not run.stopped:
                report(config, ranks.device)
            return 128 + run.stopped if run.stopped else 0
        except BrokenPipeError:  # whoever read the output has had enough
            return 128 + signal.SIGPIPE
        except (UserError, LostRank, OSError) as error:
            code = 1 if isinstance(error, LostRank) else 2
            if checked or first_process():  # all ranks have the same settings: only one complains
                code = print_error(error)
            if isinstance(error, LostRank) and "TORCHELASTIC_RUN_ID" in os.environ:
                time.sleep(2)  # torchrun shows the traceback of the first to end: not this one
            return code
        except KeyboardInterrupt as stop:  # before the first step, or in the report
            return print_interrupt(stop)

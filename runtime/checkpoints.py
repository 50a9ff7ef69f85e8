"""OUT/checkpoints/step-*: weights and optimiser state, sealed by sizes and hashes."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from runtime.errors import UserError, printable
from runtime.files import read_json, sha256_of_files, sha256_of_json, sync, write_folder
from runtime.formats import read_fitting, write_tensors

FILES = ("optimizer.safetensors", "weights.safetensors")
OTHER = "is it the checkpoint of another run?"


class Checkpoints:
    """Weights, optimiser moments and the step; the last two checkpoints are kept.

    A folder is written under a temporary name, synced and renamed. Its state.json has size and
    sha256 of the other files, and its own sha256: what has changed since is never loaded.
    """

    def __init__(self, out: Path, save_minutes: float, trained: dict[str, Tensor], optimizer,
                 inputs: dict[str, str], older: dict[str, Callable[[], str]] | None = None):
        """inputs: the sha256 of what the run reads (base, texts), by name; older: what an earlier
        version wrote in their place."""
        self.folder = out / "checkpoints"
        self.seconds = 60 * save_minutes or float("inf")
        self.trained, self.optimizer, self.inputs = trained, optimizer, inputs
        self.older = older or {}
        self.clock = time.monotonic()

    def place(self, step: int) -> Path:
        """The folder of the checkpoint after `step` steps."""
        return self.folder / f"step-{step:07d}"

    def all(self) -> list[Path]:
        """The existing checkpoints, oldest first."""
        return sorted(self.folder.glob("step-" + 7 * "[0-9]"))

    def late(self) -> bool:
        """Whether the last checkpoint is --save-minutes old."""
        return time.monotonic() - self.clock >= self.seconds

    def save(self, step: int):
        """Write the checkpoint after `step` steps and remove all others but the one before it."""
        place = self.place(step)
        with write_folder(place) as folder:
            for log in self.folder.parent.glob("*.jsonl"):  # they hold the checkpoint's steps
                sync(log)
            write_tensors(folder / "weights.safetensors", self.trained, dtype=None)
            moments = {f"{name}/{key}": value for name, p in self.trained.items()
                       for key, value in self.optimizer.state[p].items()}
            write_tensors(folder / "optimizer.safetensors", moments, dtype=None)
            seal(folder, {"step": step, **self.inputs})
        before = [old for old in self.all() if old < place]
        for other in [*self.all(), *self.folder.glob(".step-*.writing")]:
            if other not in (place, *before[-1:]):  # also a damaged one of a later step
                shutil.rmtree(other, ignore_errors=True)
        self.clock = time.monotonic()

    def newest_step(self) -> int:
        """The step of the newest checkpoint that is intact, 0 if there is none at all.

        A damaged checkpoint is reported and skipped. Raises UserError if all are damaged, or if
        they belong to another base or to other texts.
        """
        folders = self.all()
        for folder in reversed(folders):
            try:
                state = unseal(folder)
            except UserError as error:
                if folder == folders[0]:
                    raise UserError(f"{error}; no checkpoint before it is left, remove "
                                    f"{self.folder} to start this run from its beginning")
                print(f"note: {printable(error)}; resuming from the checkpoint before it",
                      flush=True)
                continue
            for key, now in self.inputs.items():
                old = self.older.get(key, lambda: None)
                if state.get(key) != now and state.get(key) != old():
                    raise UserError(f"{folder}: the {key} of this run changed since (sha256 "
                                    f"{str(state.get(key))[:12]}..., now {now[:12]}...); bring the "
                                    f"first {key} back, or start anew with another --out")
            return int(folder.name.removeprefix("step-"))
        return 0

    @torch.no_grad()
    def load(self, step: int) -> dict:
        """Load the checkpoint after `step` steps; returns its state."""
        folder = self.place(step)
        state = unseal(folder)
        shapes = {name: tuple(p.shape) for name, p in self.trained.items()}
        weights = read_fitting(folder / "weights.safetensors", shapes, OTHER)
        if missing := sorted(shapes.keys() - weights.keys()):
            raise UserError(f"{folder}: has no {missing[0]}; {OTHER}")
        shapes = {f"{name}/{key}": shape for name, shape in shapes.items()
                  for key, shape in (("step", ()), ("exp_avg", shape), ("exp_avg_sq", shape))}
        moments = read_fitting(folder / "optimizer.safetensors", shapes, OTHER)
        for name, p in self.trained.items():
            p.copy_(weights[name])
            own = {key.rpartition("/")[2]: value for key, value in moments.items()
                   if key.rpartition("/")[0] == name}
            if own:  # copied, so that the file is no longer needed
                self.optimizer.state[p] = {key: value.to(p.device, copy=True)
                                           for key, value in own.items()}
        return state


def seal(folder: Path, about: dict):
    """Write folder/state.json: `about`, size and sha256 of the other files, its own sha256."""
    files = {path.name: [path.stat().st_size, sha256_of_files([path])]
             for path in sorted(folder.iterdir()) if path.name != "state.json"}
    state = {**about, "files": files}
    state["sha256"] = sha256_of_json(state)
    (folder / "state.json").write_text(json.dumps(state, indent=2) + "\n")


def unseal(folder: Path) -> dict:
    """What `seal` wrote about the folder; UserError if the folder has changed since."""
    path = folder / "state.json"
    state = read_json(path, "a complete checkpoint")
    own = state.pop("sha256", None)
    if own != sha256_of_json(state):
        raise UserError(f"{path}: damaged, not what was written")
    about = state.get("files")
    if not isinstance(about, dict) or not about.keys() <= set(FILES):
        raise UserError(f"{path}: names other files than {' and '.join(FILES)}")
    for name in about:
        path = folder / name
        try:
            size, sha256 = about[name]
            if path.stat().st_size != size or sha256_of_files([path]) != sha256:
                raise UserError(f"{path}: damaged, not what was written")
        except (TypeError, ValueError):
            raise UserError(f"{folder / 'state.json'}: no size and sha256 of {name}")
        except OSError as error:
            raise UserError(f"{path}: not readable ({error.strerror})")
    return state

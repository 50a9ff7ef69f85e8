"""Files that are never half written, and hashes by which they are recognised."""

import fcntl
import hashlib
import json
import os
import shutil
import stat
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError, safe_open

from runtime.errors import UserError, note

MOST_JSON = 64 * 2**20  # bytes of the largest JSON file read; tokenizer.json has up to 35 MB


def try_lock(descriptor: int, place: Path) -> bool:
    """Lock an open file until it is closed; False if another process has it.

    Where the file system has no locks, a note that names `place` says so.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        note(f"{place} cannot be locked ({error.strerror}): make sure that no other process writes "
             f"there")
    return True


def open_regular(path: Path, most: int | None = None) -> BinaryIO:
    """A regular file, open for reading; UserError if it is something else, or above `most` bytes.

    A pipe among a stranger's files would block, and a device be read without end. OSError if it
    cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # NONBLOCK: do not wait for a pipe
    about, problem = os.fstat(descriptor), ""
    if not stat.S_ISREG(about.st_mode):
        problem = "is no regular file (a pipe, a device or a folder); write what it has to a file"
    elif most is not None and about.st_size > most:
        problem = f"{about.st_size:,} bytes, at most {most:,} are read; is it the right file?"
    if problem:
        os.close(descriptor)
        raise UserError(f"{path}: {problem}")
    return open(descriptor, "rb")


def read_json(path: Path, whole: str = "a complete model folder") -> dict:
    """The JSON object in `path`; UserError if there is none. `whole`: what its folder should be."""
    try:
        with open_regular(path, MOST_JSON) as file:
            value = json.loads(file.read().decode("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: missing; is {path.parent} {whole}?")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); fetch it again")
    if not isinstance(value, dict):
        raise UserError(f"{path}: a JSON object is expected, this is a {type(value).__name__}")
    return value


@contextmanager
def open_tensors(path: Path, fix: str = "fetch it again"):
    """An open safetensors file (safe_open); UserError with the `fix` if missing or damaged."""
    try:
        open_regular(path).close()  # or the library would wait for a pipe
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: missing, damaged or cut off ({error!r}); {fix}")


@contextmanager
def write_folder(target: Path):
    """Yield a folder next to `target` to fill; then sync it to disk and rename it into place.

    UserError if the disk is full or read-only; what was at `target` is then still there.
    """
    aside, old = (target.parent / f".{target.name}.{part}" for part in ("writing", "old"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        finish_renaming(target)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        yield aside
        for path in [*aside.rglob("*"), aside]:
            sync(path)
        if target.exists():
            os.rename(target, old)
        os.rename(aside, target)
        sync(target.parent)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{target}: cannot be written ({error}); make room or name another place, "
                        f"what was saved before is intact")
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        with suppress(OSError):
            finish_renaming(target)


def finish_renaming(target: Path):
    """Put back what write_folder had set aside if nothing took its place; else remove it."""
    old = target.parent / f".{target.name}.old"
    if old.exists() and not target.exists():
        os.rename(old, target)
    shutil.rmtree(old, ignore_errors=True)


def write_file(path: Path, text: str):
    """Write a file under a temporary name, sync it and rename it: it is never half written."""
    aside = path.parent / f".{path.name}.writing"
    try:
        aside.unlink(missing_ok=True)  # or a stranger's link there would be followed
        aside.write_text(text)
        sync(aside)
        os.replace(aside, path)
        sync(path.parent)
    except OSError as error:
        with suppress(OSError):
            aside.unlink()
        raise UserError(f"{path}: cannot be written ({error.strerror}); make room or name another "
                        f"place")


def sync(path: Path):
    """Wait until a file or folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of_files(paths: list[Path]) -> str:
    """sha256 over the sha256 of each file."""
    total = hashlib.sha256()
    for path in paths:
        with open_regular(path) as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def sha256_of_json(value) -> str:
    """sha256 of a value as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()

"""Embed the texts of a file: row i of OUT.npy is the embedding of text i.

    python embed.py runs/scl-demo passages.jsonl passages.npy
    python embed.py runs/scl-demo corpus.jsonl.gz corpus.npy --field title text --document
    torchrun --nproc-per-node 8 embed.py runs/llama2-scl passages.txt passages.npy \\
        --dtype bfloat16 --normalize --half

A .jsonl(.gz) has one object per line, a .txt(.gz) one text; the texts of several fields are joined
by spaces. The file may be larger than memory: it is read twice, once to count, and embedded in
blocks, each of which is on disk before the next one begins. The same command resumes where an
interrupted one stopped, with the same bits if the number of processes is the same.
"""

import argparse
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path

if __name__ == "__main__":  # handle Ctrl-C while torch is imported, which takes seconds
    from runtime.errors import await_command

    await_command()

import numpy as np
import torch
from tqdm import tqdm

from data.corpora import json_texts, require_no_json
from data.lines import brief, list_unread, read_lines
from data.tokenizer import bare_instruction
from evaluate import METHODS, add_reading_flags, encoding, open_model, over_ranks
from measures import unit
from runtime.cpu import give_back_freed_memory, keep_few_products
from runtime.devices import scoring_dtype
from runtime.errors import UserError, note, printable, run_command
from runtime.files import read_json, try_lock, write_file
from runtime.identity import identity
from runtime.ranks import Ranks, join_ranks

BLOCK = 1024  # texts embedded between two writes of the progress
GIVE_BACK = 2  # blocks, after which freed memory is returned: each time would slow down short texts


# ---------------------------------------------------------------------------------------------
# Embeddings on disk
# ---------------------------------------------------------------------------------------------


class Embeddings:
    """A .npy of embeddings (n, D) in the making, and next to it a note of how many are done.

    The file is mapped afresh for each access, so that none of it stays in memory.
    """

    def __init__(self, path: Path, about: dict, dtype=np.float32, other="another OUT"):
        """Begin or resume the file that `about` describes; UserError if it has other contents.

        about: `shape`, and all else that the embeddings depend on, as JSON values. other: what to
        name to get another file, for messages.
        """
        self.path, self.note, self.other = path, path.with_name(path.name + ".json"), other
        path.parent.mkdir(parents=True, exist_ok=True)
        self.state, self.dtype = {**about, "done": 0, "cut": 0}, np.dtype(dtype)
        if self.note.exists():
            self.state = read_json(self.note, "where the command was interrupted")
            for key, value in about.items():
                if self.state.get(key) != value:
                    raise UserError(f"{path}: was begun with another {key}; remove it and "
                                    f"{self.note.name}, or name {other}")
        elif path.exists() and path.stat().st_size:
            raise UserError(f"{path}: exists, and is no interrupted command's; name {other}")
        if self.state["done"]:
            self.open("r")
        if self.state["done"] < about["shape"][0]:  # locked as long as this process lives
            self.locked = path.open("ab")
            if not try_lock(self.locked.fileno(), path):
                raise UserError(f"{path}: another process writes it; wait for that one, or name "
                                f"{other}")
        if not self.state["done"]:
            write_file(self.note, json.dumps(self.state) + "\n")
            self._allocate(about["shape"])

    def _allocate(self, shape: list[int]):
        """Allocate the whole file at once: writing to a map crashes when the disk is full."""
        try:
            np.lib.format.open_memmap(self.path, "w+", self.dtype, tuple(shape))
            with open(self.path, "r+b") as file:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, self.path.stat().st_size)
        except OSError as error:
            for path in (self.path, self.note):
                path.unlink(missing_ok=True)
            size = 1e-9 * self.dtype.itemsize * np.prod(shape)
            raise UserError(f"{self.path}: {size:.2g} GB cannot be written ({error.strerror}); "
                            f"make room, or name {self.other}")

    def open(self, mode: str) -> np.ndarray:
        """The file as a memory map; UserError if it is not what the note says."""
        try:
            rows = np.lib.format.open_memmap(self.path, mode)
            if list(rows.shape) != self.state["shape"] or rows.dtype != self.dtype:
                raise ValueError(f"{rows.dtype} {rows.shape}")
            return rows
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path}: missing or damaged ({error}); remove it and "
                            f"{self.note.name}, and start again")

    def __getitem__(self, places) -> np.ndarray:
        """A copy of the rows at these places."""
        return np.array(self.open("r")[places])

    def append(self, x: np.ndarray, cut: int, texts: list[str]):
        """Write the next rows, the texts' embeddings; then the note, which counts the `cut` texts.

        UserError if a value is not finite, as given or in the file's dtype.
        """
        with np.errstate(over="ignore"):
            x = x.astype(self.dtype)
        if len(wrong := np.flatnonzero(~np.isfinite(x).all(axis=1))):
            raise UserError(f"the embedding of {texts[wrong[0]][:60]!r} has nan or inf; the model "
                            f"is damaged, or its dtype or the file's too narrow")
        rows, done = self.open("r+"), self.state["done"]
        rows[done : done + len(x)] = x
        rows.flush()
        self.state |= {"done": done + len(x), "cut": self.state["cut"] + cut}
        write_file(self.note, json.dumps(self.state) + "\n")


# ---------------------------------------------------------------------------------------------
# Texts
# ---------------------------------------------------------------------------------------------


def read_file(path: Path, fields: list[str], unread: Counter,
              lacking: Counter | None = None) -> Iterator[str]:
    """The texts of a file, one at a time, including the empty lines of a .txt; UserError with file
    and line. `unread` counts the fields that are not read, `lacking` those of `fields` that a row
    does not have."""
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if kind not in ("txt", "jsonl"):
        raise UserError(f"{path}: unknown kind of file; name a .txt or a .jsonl (or .gz of them)")
    for number, line in enumerate(read_lines(path), 1):
        if kind == "txt":
            if number == 1:
                require_no_json(path, line.strip())
            yield line.rstrip("\r\n")
        elif line.strip():
            found = json_texts(path, number, line, unread, fields, "name its own with --field")
            if lacking is not None:
                lacking.update(name for name, text in zip(fields, found) if text is None)
            yield found[0] if len(found) == 1 else " ".join(filter(None, found))


def count(texts: Iterator[str]) -> tuple[int, str]:
    """How many texts there are, and their sha256."""
    digest = hashlib.sha256()
    n = sum(1 for _ in hashed(texts, digest))
    return n, digest.hexdigest()


def hashed(texts: Iterator[str], digest) -> Iterator[str]:
    """The same texts, each added to the hash as it is read."""
    for text in texts:
        digest.update(json.dumps(text).encode())
        yield text


# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", help="an encoder, a run, an exported folder, or a plain Llama")
    add("texts", help="a .jsonl or .txt, gzipped or not")
    add("out", help="the .npy to write")
    add("--field", nargs="+", help="of a .jsonl (default text); of several, one may be missing")
    add("--instruction", default="", help="to go before each text; none (default) for none")
    add("--document", action="store_true", help="read as documents to be found, where an encoder "
        "reads them differently")
    add("--normalize", action="store_true", help="to length 1: dot products are cosines")
    add("--half", action="store_true", help="float16 in place of float32")
    add("--method", choices=["memory", *METHODS], help="how a plain Llama is read, as of "
        "evaluate.py")
    add("--max-tokens", type=int, help="of a text, for a plain Llama; an encoder knows its own")
    add_reading_flags(add)
    add("--timeout", type=float, default=60, help="minutes that a rank waits for the others")
    args = parser.parse_args(argv)
    if args.batch_tokens < 1 or args.threads < 0 or not args.timeout > 0:
        parser.error("--batch-tokens and --timeout must be above 0, --threads not below")
    if args.field and args.texts.removesuffix(".gz").endswith(".txt"):
        parser.error(f"--field: {args.texts} has none; name a .jsonl")
    if args.instruction == "auto":
        parser.error("--instruction auto: is for tasks, in evaluate.py; give the text")
    args.instruction = "" if args.instruction == "none" else bare_instruction(args.instruction)
    if not args.out.endswith(".npy"):
        parser.error(f"{args.out}: must end in .npy, by which numpy knows it")
    return args


def run(args: argparse.Namespace, ranks: Ranks):
    """Embed the texts that are not done yet."""
    keep_few_products()
    encoder, method = open_model(
        args.model, args.method, args.max_tokens, args.special_tokens, base=args.base,
        other_base=args.other_base, device=ranks.device,
        dtype=scoring_dtype(args.dtype, ranks.device))
    encode = over_ranks(partial(
        encoding(encoder, method), instruction=args.instruction, document=args.document,
        batch_tokens=args.batch_tokens), ranks)
    out, path, fields = Path(args.out), Path(args.texts), args.field or ["text"]
    unread, lacking = Counter(), Counter()
    n, digest = count(read_file(path, fields, unread, lacking))
    if absent := [name for name, rows in lacking.items() if rows == n]:
        raise UserError(f"{path}: no row has the field {brief(absent[0])}; name others with "
                        f"--field")
    if not n:
        raise UserError(f"{path}: no text in it; name a file with at least one")
    for line in [*list_unread(unread), *(f"{rows:,} rows have no {brief(name)}"
                                         for name, rows in lacking.items())]:
        note(f"{args.texts}: {line}")
    about = {"shape": [n, encoder.table.shape[1]], "texts": digest, "method": method,
             "encoder": identity(encoder),
             "reading": [args.instruction, args.document, args.normalize, args.half,
                         str(encoder.dtype)]}
    found = ranks.on_first(Embeddings, out, about, np.float16 if args.half else np.float32)
    done = ranks.from_first(found.state["done"] if found else 0)
    again = hashlib.sha256()
    changed = UserError(f"{path}: has changed while it was read; see that nothing writes to it, "
                        f"remove {args.out} and {args.out}.json, and start again")
    texts = islice(hashed(read_file(path, fields, unread), again), done, None)
    with tqdm(total=n, initial=done, unit=" texts", disable=ranks.rank > 0 or None) as bar:
        while block := list(islice(texts, BLOCK)):
            if done + len(block) > n:
                raise changed
            before = encoder.cut
            x = encode(block)
            cut = int(ranks.sum(torch.tensor([encoder.cut - before], device=ranks.device)))
            ranks.on_first(found and found.append, unit(x) if args.normalize else x, cut, block)
            bar.update(len(block))
            done += len(block)
            if done % (GIVE_BACK * BLOCK) == 0:
                give_back_freed_memory()
    if again.hexdigest() != digest:
        raise changed
    if found:
        found.note.unlink()
        print(f"wrote {printable(args.out)}: {n:,} x {about['shape'][1]}, {found.dtype}; "
              f"{found.state['cut']:,} texts cut to {encoder.config.max_tokens} tokens")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    def command():
        """Do what the arguments ask for."""
        args = parse_arguments(argv)
        with join_ranks(args.device, args.threads, args.timeout) as ranks:
            run(args, ranks)

    return run_command(command, "what is embedded is kept, the same command goes on")


if __name__ == "__main__":
    sys.exit(main())

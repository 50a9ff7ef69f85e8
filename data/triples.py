"""Triples for stage 3: rows {query, positive, negative} of .jsonl files, read by their offset.

Only the offsets are kept, so the files may be larger than memory. Every row is checked once, before
the training starts. A gzipped file has no offsets: each process unpacks it to a temporary file of
its own (in TMPDIR).
"""

import gzip
import hashlib
import json
import shutil
import tempfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from tqdm import tqdm

from runtime.errors import UserError

HERE = Path(__file__).parent
DEMO_TRIPLES = HERE / "demo" / "triples.jsonl"  # what the name `demo` stands for
INSTRUCTIONS = json.loads((HERE / "e5_instructions.json").read_text())["instructions"]


class Triple(NamedTuple):
    """One row: a query and its instruction, a text to find, and texts that only look like it."""

    query: str
    instruction: str
    positive: str
    negatives: list[str]


@dataclass
class File:
    """One file of triples: where its rows begin, and the instructions that take turns over them."""

    path: Path
    instructions: list[str]
    handle: BinaryIO
    offsets: list[int] | np.ndarray = field(default_factory=list)


def parse_row(line: bytes) -> tuple[str, str, list[str]]:
    """Query, positive and negatives of one line of JSON; ValueError says what is wrong."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except RecursionError as error:
        raise ValueError(error)
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    negatives = row.get("negative")
    negatives = [] if negatives is None else negatives if isinstance(negatives, list) \
        else [negatives]
    for name, value in (("query", row.get("query")), ("positive", row.get("positive")),
                        *(("negative", text) for text in negatives)):
        if value is None:
            raise ValueError(f"has no {name}")
        if not isinstance(value, str):
            raise ValueError(f"{name} is {str(value)[:50]!r}, a text is expected")
        if not value.strip():
            raise ValueError(f"{name} is empty")
        value.encode()  # half a surrogate pair is JSON, but no text
    return row["query"].strip(), row["positive"].strip(), [text.strip() for text in negatives]


class Triples:
    """The rows of a file, of a folder of files, or of the embedded `demo`.

    A file named like one of the public E5 training files gets that data set's instructions
    (data/e5_instructions.json), any other one `instruction`; if that is None, no file gets any.
    """

    def __init__(self, source: str | Path, instruction: str | None = "", progress: bool = False):
        """Check and index all rows. UserError names file and line of what cannot be used."""
        self.source, self.files, digest = source, [], hashlib.sha256()
        positives: set[str] = set()  # two of them suffice
        for path in find_files(source):
            known = {} if instruction is None else INSTRUCTIONS
            own = (instruction or "").strip().removesuffix(":")  # the template brings the colon
            file = File(path, known.get(stem(path), [own]), open_plain(path))
            self._index(file, digest, positives, progress)
            self.files.append(file)
        self.sha256 = digest.hexdigest()
        self.ends = np.cumsum([len(file.offsets) for file in self.files])
        if len(self) == 0:
            raise UserError(f"{source}: no rows; a row is "
                            f'{{"query": "...", "positive": "...", "negative": "..."}}')
        if len(positives) < 2:
            raise UserError(f"{source}: all {len(self):,} rows have the same positive, nothing "
                            f"tells them apart; give rows with different ones")

    def _index(self, file: File, digest, positives: set[str], progress: bool):
        """Check the rows of a file and note where they begin."""
        size, offset = file.handle.seek(0, 2), 0
        file.handle.seek(0)
        with tqdm(total=size, unit="B", unit_scale=True, desc=f"check {file.path.name}",
                  disable=not progress or size < 50_000_000, leave=False) as bar:
            for number, line in enumerate(file.handle, 1):
                digest.update(line)
                if line.strip(b"\xef\xbb\xbf \t\r\n"):  # a byte order mark is no row
                    try:
                        positive = parse_row(line)[1]
                    except ValueError as error:
                        raise UserError(f"{file.path}, line {number}: {error}; a row needs query "
                                        f"and positive (texts) and may have negative (a text or "
                                        f"a list)")
                    file.offsets.append(offset)
                    if len(positives) < 2:
                        positives.add(positive)
                offset += len(line)
                bar.update(len(line))
        file.offsets = np.array(file.offsets, dtype=np.int64)
        digest.update(json.dumps([file.instructions, len(file.offsets)]).encode())

    def __len__(self) -> int:
        return int(self.ends[-1])

    def locate(self, i: int) -> tuple[File, int]:
        """The file of row i over all files, in their order, and the row's place in it, from 0."""
        place = int(np.searchsorted(self.ends, i, side="right"))
        return self.files[place], i - (int(self.ends[place - 1]) if place else 0)

    def __getitem__(self, i: int) -> Triple:
        """Row i over all files, in their order."""
        file, row = self.locate(i)
        file.handle.seek(int(file.offsets[row]))
        query, positive, negatives = parse_row(file.handle.readline())
        instruction = file.instructions[row % len(file.instructions)]
        return Triple(query, instruction, positive, negatives)

    @property
    def instructions(self) -> set[str]:
        """All instructions that queries have."""
        return {text for file in self.files for text in file.instructions if text}


def stem(path: Path) -> str:
    """The name of a file without .jsonl and .gz."""
    return path.name.removesuffix(".gz").removesuffix(".jsonl")


def find_files(source: str | Path) -> list[Path]:
    """The .jsonl(.gz) files of a folder in the order of their names, or the one file."""
    path = DEMO_TRIPLES if str(source) == "demo" else Path(source)
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.name.endswith((".jsonl", ".jsonl.gz")))
        if not files:
            raise UserError(f"{path}: no .jsonl or .jsonl.gz file in this folder; put the triples "
                            f"there, one JSON object per line")
        twice = [p for p in files if p.with_name(p.name + ".gz") in files]
        if twice:
            raise UserError(f"{twice[0]}: lies there twice, also as .gz; remove one of them")
        whole = {stem(p) for p in files} & {"allnli", "quora_duplicates"}
        halves = {f"{name}_split{i}" for name in whole for i in (1, 2)}  # E5's folder has both
        return [p for p in files if stem(p) not in halves]
    if not path.is_file():
        raise UserError(f"{path}: no such file or folder; --triples takes a .jsonl(.gz) or a "
                        f"folder of them")
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        raise UserError(f"{path}: unknown kind of file; triples are .jsonl or .jsonl.gz, one JSON "
                        f"object per line")
    return [path]


def open_plain(path: Path) -> BinaryIO:
    """The file, open for reading bytes; a gzipped one unpacked to a temporary file."""
    try:
        file = open(path, "rb")
        zipped = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        if not zipped:
            return file
        plain = tempfile.TemporaryFile(prefix="llm2comp-")
        with gzip.open(file) as unzipped:
            shutil.copyfileobj(unzipped, plain, 1 << 20)
        file.close()
        return plain
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error}); fetch it again, or set TMPDIR to a "
                        f"place with room to unpack it")

"""Triples for stage 3: rows {query, positive, negative} of .jsonl files, read by their offset.

Only the offsets are kept, so the files may be larger than memory. Every row is checked once, before
training starts. A file that is gzipped, or not in UTF-8, has no such offsets: each process writes a
plain copy to a temporary file of its own (in TMPDIR).
"""

import hashlib
import json
import re
import tempfile
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from tqdm import tqdm

from data.lines import CONVERT, brief, copy_plain, holds_text, is_plain, list_names, list_unread
from data.lines import next_line, parse_json
from data.tokenizer import bare_instruction
from runtime.errors import UserError
from runtime.files import open_regular

HERE = Path(__file__).parent
DEMO_TRIPLES = HERE / "demo" / "triples.jsonl"  # what the name `demo` stands for
INSTRUCTIONS = json.loads((HERE / "e5_instructions.json").read_text())["instructions"]

# The names of a row's fields: E5's and LLM2Vec's, then those of sentence-transformers (anchor,
# question, answer, negative_1 ... negative_n), FlagEmbedding (pos, neg, prompt), Tevatron
# (positive_passages, negative_passages) and SimCSE (sent0, sent1, hard_neg).
QUERY = ("query", "anchor", "question", "sent0")
POSITIVE = ("positive", "positives", "pos", "positive_passages", "answer", "sent1")
NEGATIVE = ("negative", "negatives", "neg", "negative_passages", "hard_negative", "hard_negatives",
            "hard_neg")
INSTRUCTION = ("instruction", "prompt")
EARLIER = ("query", "positive", "negative")  # files with these alone keep their earlier sha256
# Fields that may hold a text, but none to train on: ids, scores, where a row is from.
HARMLESS = re.compile(r"(.*[_-])?(id|ids|idx|index|scores?|qid|pid|docid|docids|guid|uuid)|type|"
                      r"source|dataset|split|lang|language|url|metadata|meta|answers")


class Triple(NamedTuple):
    """One row: a query and its instruction, a positive, and hard negatives.

    others: further positives; own: the instruction, if the row has its own.
    """

    query: str
    instruction: str
    positive: str
    negatives: list[str]
    others: tuple[str, ...] = ()
    own: str | None = None


class Row(NamedTuple):
    """What a line of JSON says, and the names of the fields that were read and that were not."""

    query: str
    positives: list[str]
    negatives: list[str]
    instruction: str | None
    read: list[str]
    unread: list[str]


@dataclass
class File:
    """One file of triples: where its rows begin, and the instructions that take turns over them.

    The rest are row counts, and the field names and instructions found in the rows.
    """

    path: Path
    instructions: list[str]
    handle: BinaryIO
    offsets: list[int] | np.ndarray = field(default_factory=list)
    with_negatives: int = 0
    with_several: int = 0  # positives
    with_own: int = 0  # instruction
    with_both: int = 0  # a text that is positive and negative
    own: set[str] = field(default_factory=set)
    read: set[str] = field(default_factory=set)
    unread: Counter = field(default_factory=Counter)

    def count(self, row: Row):
        """Add a row to the counts."""
        self.with_negatives += bool(row.negatives)
        self.with_several += len(row.positives) > 1
        self.with_both += not set(row.positives).isdisjoint(row.negatives)
        if row.instruction is not None:
            self.with_own += 1
            self.own.add(row.instruction)
        self.read.update(row.read)
        self.unread.update(row.unread)


# ---------------------------------------------------------------------------------------------
# Rows
# ---------------------------------------------------------------------------------------------


def one_of(row: dict, names: tuple[str, ...]) -> str | None:
    """The name among `names` that the row has; ValueError if it has two of them."""
    there = [name for name in names if row.get(name) is not None]
    if len(there) > 1:
        raise ValueError(f"has both {there[0]} and {there[1]}; keep one of them")
    return there[0] if there else None


def read_text(name: str, value, unread: list[str]) -> str:
    """A text, or a passage {title, text} as `title text`; ValueError for anything else."""
    if isinstance(value, dict) and isinstance(value.get("text"), str):
        parts = {key: value[key] for key in ("title", "text") if value.get(key) is not None}
        note_unread({f"{name}.{key}": value[key] for key in value if key not in parts}, unread)
        if not isinstance(parts.get("title", ""), str):
            raise ValueError(f"{name}.title is {str(parts['title'])[:50]!r}, a text is expected")
        value = f"{parts.get('title', '')} {parts['text']}"
    if value is None:
        raise ValueError(f"has no {name}")
    if not isinstance(value, str):
        pair = "; an instruction has a field of its own" * isinstance(value, list)
        raise ValueError(f"{name} is {str(value)[:50]!r}, a text is expected{pair}")
    if not value.strip():
        raise ValueError(f"{name} is empty")
    value.encode()  # half a surrogate pair is JSON, but not text
    return value.strip()


def field_texts(row: dict, name: str | None, unread: list[str]) -> list[str]:
    """The texts of a field that holds one, or a list of them."""
    value = row[name] if name else []
    return [read_text(name, one, unread) for one in (value if isinstance(value, list) else [value])]


def note_unread(fields: dict, unread: list[str]):
    """Add the names of fields that are not read; ValueError for one that may hold a text."""
    for name, value in fields.items():
        if name in ("label", "labels") and value is not None:
            raise ValueError(f"has a field {name}, which is not read; keep the positive pairs "
                             f"only, and remove it")
        if holds_text(value) and not HARMLESS.fullmatch(name.rpartition(".")[2]):
            raise ValueError(f"the field {brief(name)} could hold a text and is not read; rename "
                             f"it to query, positive, negative or instruction, or remove it")
        if value is not None:
            unread.append(name)


def parse_row(line: bytes) -> Row:
    """What one line of JSON says; ValueError says what is wrong."""
    try:
        row = parse_json(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({error.reason}); {CONVERT}")
    if isinstance(row, list):
        raise ValueError("a list, not a JSON object; write one object per line: jq -c '.[]' FILE > "
                         "NEW")
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    numbered = sorted((name for name in row if re.fullmatch(r"negative_\d+", name)
                       and row[name] is not None), key=lambda name: int(name[9:]))
    query, positive, negative, instruction = (
        one_of(row, names) for names in (QUERY, POSITIVE, NEGATIVE, INSTRUCTION))
    if negative and numbered:
        raise ValueError(f"has both {negative} and {numbered[0]}; keep one of them")
    for name, wanted in ((query, "query"), (positive, "positive")):
        if name is None or row[name] == []:
            raise ValueError(f"has no {wanted} (it has {list_names(row)})")
    unread: list[str] = []
    found = read_text(query, row[query], unread)
    positives = list(dict.fromkeys(field_texts(row, positive, unread)))
    negatives = [text for name in numbered or [negative] for text in field_texts(row, name, unread)]
    own = row[instruction] if instruction else None
    if own is not None and not isinstance(own, str):
        raise ValueError(f"{instruction} is {str(own)[:50]!r}, a text is expected")
    if own is not None:
        own.encode()
        own = bare_instruction(own)
    read = [name for name in (query, positive, negative, instruction, *numbered) if name]
    note_unread({name: row[name] for name in row if name not in read}, unread)
    return Row(found, positives, negatives, own, read, list(dict.fromkeys(unread)))


class Triples:
    """The rows of a file, of a folder of files, or of the bundled `demo`.

    A row's own instruction takes precedence. A file named like one of the public E5 training files
    gets that data set's instructions (data/e5_instructions.json), any other file `instruction`; if
    that is None, no query gets one.
    """

    def __init__(self, source: str | Path, instruction: str | None = "", progress: bool = False):
        """Check and index all rows. UserError names file and line of what cannot be used."""
        self.source, self.files, digest = source, [], hashlib.sha256()
        self.bare = instruction is None
        positives: set[str] = set()  # two different ones suffice
        for path in find_files(source):
            known = {} if self.bare else INSTRUCTIONS
            own = bare_instruction(instruction or "")
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
        size, offset, number = file.handle.seek(0, 2), 0, 1
        file.handle.seek(0)
        with tqdm(total=size, unit="B", unit_scale=True, desc=f"check {file.path.name}",
                  disable=not progress or size < 50_000_000, leave=False) as bar:
            while line := next_line(file.handle, file.path, number):
                digest.update(line)
                if line.strip(b"\xef\xbb\xbf \t\r\n"):  # a byte order mark is not a row
                    try:
                        row = parse_row(line)
                    except ValueError as error:
                        raise UserError(f"{file.path}, line {number}: {error}; a row needs query "
                                        f"and positive (texts) and may have negative (a text or "
                                        f"a list)")
                    file.offsets.append(offset)
                    file.count(row)
                    if len(positives) < 2:
                        positives.update(row.positives[:1])
                offset, number = offset + len(line), number + 1
                bar.update(len(line))
        file.offsets = np.array(file.offsets, dtype=np.int64)
        digest.update(json.dumps([file.instructions, len(file.offsets)]).encode())
        if more := sorted(file.read - set(EARLIER)):  # fields that earlier versions did not read
            digest.update(json.dumps([more, self.bare]).encode())

    def __len__(self) -> int:
        return int(self.ends[-1])

    def locate(self, i: int) -> tuple[File, int]:
        """The file of row i, counted over all files in order, and the row's place in it, from 0."""
        place = int(np.searchsorted(self.ends, i, side="right"))
        return self.files[place], i - (int(self.ends[place - 1]) if place else 0)

    def __getitem__(self, i: int) -> Triple:
        """Row i, counted over all files in order."""
        file, row = self.locate(i)
        file.handle.seek(int(file.offsets[row]))
        found = parse_row(file.handle.readline())
        instruction = file.instructions[row % len(file.instructions)]
        if found.instruction is not None and not self.bare:
            instruction = found.instruction
        positive, *others = found.positives
        return Triple(found.query, instruction, positive, found.negatives, tuple(others),
                      found.instruction)

    @property
    def instructions(self) -> set[str]:
        """All instructions that queries have."""
        own = set() if self.bare else set().union(*(file.own for file in self.files))
        return {text for file in self.files for text in file.instructions if text} | own - {""}

    @property
    def notes(self) -> list[str]:
        """Lines about what a user may not expect of the files, with row counts."""
        read = {file.path for file in self.files}
        place = DEMO_TRIPLES if str(self.source) == "demo" else Path(self.source)
        others = sorted(p.name for p in place.glob("[!.]*") if p not in read)
        found = [f"{self.source}: not read: {list_names(others)}"] * bool(others)
        for file in self.files:
            use = "not used (--instruction none)" if self.bare else "used in place of the file's"
            if file.with_own:
                found.append(f"{file.path.name}: {file.with_own:,} rows have an instruction of "
                             f"their own, {use}")
            if file.with_several:
                found.append(f"{file.path.name}: {file.with_several:,} rows have several "
                             f"positives, of which one is drawn in each step")
            if file.with_both:
                found.append(f"{file.path.name}: {file.with_both:,} rows have a positive among "
                             f"their negatives, which is no negative there")
            found += [f"{file.path.name}: {line}" for line in list_unread(file.unread)]
        return found

    def describe(self, batches: str) -> str:
        """Files, counts and notes for the header of a run; batches: how they are mixed."""
        rows, having = len(self), sum(file.with_negatives for file in self.files)
        differ = having not in (0, rows)
        lines = [f"{self.source}: {rows:,} rows, {batches}; {having:,} of {rows:,} rows have "
                 f"negatives"]
        for file in self.files:
            n, texts = len(file.offsets), " | ".join(filter(None, file.instructions))
            own = f"; {file.with_negatives:,} of {n:,} rows have negatives" * differ
            lines.append(f"  {n:>9,}  {file.path.name}: {texts or 'no instruction'}{own}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def examples(self, n: int = 5, most: int = 60) -> str:
        """The first n rows as they are read, texts shortened, for --dry-run."""
        def short(texts) -> str:
            return " | ".join(repr(t[:most]) + "..." * (len(t) > most) for t in texts) or "none"

        parts = []
        for i in range(min(n, len(self))):
            row, (file, place) = self[i], self.locate(i)
            parts.append(f"{brief(file.path.name)}, row {place + 1}\n"
                         f"  instruction  {short(filter(None, [row.instruction]))}\n"
                         f"  query        {short([row.query])}\n"
                         f"  positive     {short([row.positive, *row.others])}\n"
                         f"  negative     {short(row.negatives)}")
        return "\n".join(parts)


# ---------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------


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
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; --triples takes a .jsonl(.gz) or a "
                        f"folder of them")
    if path.is_file() and not path.name.endswith((".jsonl", ".jsonl.gz")):
        raise UserError(f"{path}: unknown kind of file; triples are .jsonl or .jsonl.gz, one JSON "
                        f"object per line")
    return [path]


def open_plain(path: Path) -> BinaryIO:
    """The file, open for reading bytes; if it is gzipped or not in UTF-8, a temporary copy."""
    try:
        if is_plain(path):
            return open_regular(path)
        plain = tempfile.TemporaryFile(prefix="llm2comp-")
        copy_plain(path, plain)
        return plain
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error}); fetch it again, or set TMPDIR to a "
                        f"place with room to unpack it")

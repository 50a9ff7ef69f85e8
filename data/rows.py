"""Rows of labelled data: .jsonl, .json, .tsv or .csv, gzipped or not, checked field by field.

A row may be flat, or columnar: lists of equal length under the fields' names (not where a field is
a list itself, as in reranking).
"""

import csv
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

from data.corpora import read_lines
from runtime.errors import UserError

ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".tsv", ".tsv.gz", ".csv", ".csv.gz")


def text(value) -> str:
    """A field that must be a text."""
    if not isinstance(value, str):
        raise ValueError("a text is expected")
    value.encode()  # half a surrogate pair is JSON, but no text
    return value


def number(value) -> float:
    """A field that must be a finite number (a numeral in .tsv and .csv)."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("a number is expected")
    try:
        found = float(value)
    except OverflowError as error:
        raise ValueError(error)
    if not math.isfinite(found):
        raise ValueError("not a finite number")
    return found


def label(value) -> int | str:
    """A field that must be a whole number or a text."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError("a whole number or a text is expected")
    return value


def identifier(value) -> str:
    """A field that must be an id; numbers become texts."""
    return str(label(value))


def texts(value) -> list[str]:
    """A field that must be a list of texts."""
    if not isinstance(value, list):
        raise ValueError("a list of texts is expected")
    return [text(v) for v in value]


def records(path: Path) -> Iterator[tuple[str, object]]:
    """The rows of a file as they stand, each with its place for messages (`line 3`)."""
    ending = path.name.removesuffix(".gz").rpartition(".")[2]
    if ending in ("tsv", "csv"):
        quoting = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if ending == "tsv" else {}
        reader = csv.DictReader(read_lines(path), **quoting)
        try:
            for row in reader:
                yield f"line {reader.line_num}", {k: v for k, v in row.items() if v is not None}
        except csv.Error as error:
            raise UserError(f"{path}, line {reader.line_num}: {error}; fix the line")
        return
    if ending == "json":
        whole = "".join(read_lines(path))
        try:
            rows = json.loads(whole)
            yield from ((f"row {i}", row) for i, row in
                        enumerate(rows if isinstance(rows, list) else [rows], 1))
            return
        except (ValueError, RecursionError):
            pass  # several objects, one per line
    for i, line in enumerate(read_lines(path), 1):
        if line.strip():
            try:
                yield f"line {i}", json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}, line {i}: not JSON ({error}); fetch the file again or "
                                f"fix the line")


def flatten(record, fields: dict[str, Callable], optional: tuple[str, ...]) -> list[dict]:
    """The flat rows of a record, `fields` only; ValueError if one is missing."""
    for name in fields:
        if name not in optional and not (isinstance(record, dict) and name in record):
            raise ValueError(f"has no field {name}")
    row = {name: record[name] for name in fields
           if name not in optional or record.get(name) is not None}
    if not all(isinstance(value, list) and fields[name] is not texts
               for name, value in row.items()):
        return [row]
    if len({len(values) for values in row.values()}) > 1:
        raise ValueError("its lists have different lengths")
    return [dict(zip(row, values)) for values in zip(*row.values())]


def checked(row: dict, fields: dict[str, Callable]) -> dict:
    """The row with each value as its field wants it; ValueError names the field and the value."""
    for name, value in row.items():
        try:
            row[name] = fields[name](value)
        except ValueError as error:
            raise ValueError(f"{name} is {str(value)[:50]!r}: {error}")
    return row


def read_blocks(path: Path, fields: dict[str, Callable], optional=()) -> list[list[dict]]:
    """The rows of a file, checked; a flat row makes a block of one, a columnar row one of many."""
    blocks = []
    for place, record in records(path):
        try:
            blocks.append([checked(row, fields) for row in flatten(record, fields, optional)])
        except ValueError as error:
            raise UserError(f"{path}, {place}: {error}; a row needs {', '.join(fields)}")
    if not any(blocks):
        raise UserError(f"{path}: no rows; fetch the file again")
    return blocks


def read_rows(path: Path, fields: dict[str, Callable], optional=()) -> list[dict]:
    """The rows of a file, flat; UserError with file and line for what does not fit `fields`."""
    return [row for block in read_blocks(path, fields, optional) for row in block]


def read_unique(path: Path, fields: dict[str, Callable], optional=()) -> dict[str, dict]:
    """Rows by their `_id`; UserError if one occurs twice."""
    rows = {}
    for row in read_rows(path, {"_id": identifier, **fields}, optional):
        if rows.setdefault(row["_id"], row) is not row:
            raise UserError(f"{path}: the id {row['_id']!r} occurs twice; remove one of the rows")
    return rows

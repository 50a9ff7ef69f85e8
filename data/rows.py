"""Rows of labelled data: .jsonl, .json, .tsv or .csv, gzipped or not, checked field by field.

A row may be flat, or columnar: lists of equal length under the fields' names (not where a field is
a list itself, as in reranking).
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from data.lines import MAX_JSON, brief, list_names, list_unread, parse_json, read_lines
from runtime.errors import UserError

ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".tsv", ".tsv.gz", ".csv", ".csv.gz")
# MTEB's own files have these besides what a score needs: no note says that they are not read.
KNOWN = {"_id", "id", "idx", "sid", "split", "genre", "dataset", "year", "lang", "label_text",
         "metadata"}


def text(value) -> str:
    """A field that must be a text."""
    if not isinstance(value, str):
        raise ValueError("a text is expected")
    value.encode()  # half a surrogate pair is JSON, but not text
    return value


def number(value) -> float:
    """A field that must be a finite number (a numeral in .tsv and .csv)."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("a number is expected")
    try:
        found = float(value)
    except OverflowError as error:
        raise ValueError(error)
    if isinstance(value, str) and "_" in value:  # Python's own syntax: 1_0 is 10 to float()
        raise ValueError("not a number")
    if not math.isfinite(found):
        raise ValueError("not a finite number")
    return found


def label(value) -> int | str:
    """A field that must be a whole number or a text that is not empty."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError("a whole number or a text is expected")
    if not str(value).strip():
        raise ValueError("is empty")
    return value


def identifier(value) -> str:
    """A field that must be an id, or a label to compare: numbers become texts, as in a .csv."""
    return str(label(value))


def texts(value) -> list[str]:
    """A field that must be a list of texts."""
    if not isinstance(value, list):
        raise ValueError("a list of texts is expected")
    return [text(v) for v in value]


# ---------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------

# A field in quotes, with inner quotes doubled, or any other; a line may end in several CRs, as from
# Python's writer on Windows. A field that begins with blanks and a quote is neither.
QUOTED, NEVER = r'"((?:[^"]++|"")*+)"', r"((?!))"
OTHER = r"([^{d}\r\n]*+(?:\r++(?!\n|\Z)[^{d}\r\n]*+)*+)"
END = r"({d}|\r*+(?:\n|\Z))"


def split_rows(text: str, delimiter: str, quotes: bool) -> Iterator[tuple[int, list[tuple]]]:
    """The rows of a table: the line where each begins, and for each field (inside its quotes, None)
    or (None, text); quotes inside are still doubled. Empty lines are left out.

    quotes: whether quotes around a field are syntax. ValueError if they do not enclose a field.
    """
    pattern = f'(?:{QUOTED}|(?![ ]*+"){OTHER}){END}' if quotes else f"(?:{NEVER}|{OTHER}){END}"
    field, place, begin, number, row = re.compile(pattern.format(d=delimiter)), 0, 0, 1, []
    while place < len(text):
        found = field.match(text, place)
        if found is None:
            where = number + text.count("\n", begin, place)
            raise ValueError(f"line {where}: the quotes at {brief(text[place : place + 60])} do "
                             f"not enclose a field; double those inside it")
        inside, plain, end = found.groups()
        row.append((inside, plain))
        place = found.end()
        if end != delimiter:
            if row != [(None, "")]:
                yield number, row
            number += text.count("\n", begin, place)
            begin, row = place, []
    if row:  # the text ends with a delimiter
        yield number, [*row, (None, "")]


def quotes_are_the_writers(path: Path, text: str) -> bool:
    """Whether quotes around the fields of a .tsv are a writer's syntax; UserError if ambiguous.

    A writer of quoted fields (csv.writer, pandas, Excel) quotes each field that has a quote, and
    doubles those inside; in a raw file quotes belong to the text, and each line is a row. A file
    that can be read either way is a writer's if its header is quoted, or each quoted field has
    doubled quotes inside.
    """
    if not re.search(r'(?:^|\t)"', text, re.MULTILINE):
        return False
    lines = [row for _, row in split_rows(text, "\t", quotes=False)]
    raw = len({len(row) for row in lines}) == 1
    try:
        rows = [row for _, row in split_rows(text, "\t", quotes=True)]
        bare = any(plain and '"' in plain for row in rows for _, plain in row)
    except ValueError:
        bare = True
    if bare:  # not a writer's, unless it was edited
        odd = [field for row in lines for _, field in row
               if re.fullmatch(QUOTED, field) and '""' in field[1:-1]]
        doubt = odd[0] if odd else None
    else:
        inside = [inside for row in rows for inside, _ in row if inside is not None]
        fits = len({len(row) for row in rows}) == 1
        if not raw or not fits:
            return fits or not raw
        whole = rows[0][0][0] is not None  # the header is quoted, too
        doubt = next((field for field in inside if re.search(r"[\t\n]", field)
                      or not whole and '""' not in field), None)
    if doubt is not None:
        raise UserError(f"{path}: the quotes of the field {brief(doubt)} may be its text or not; "
                        f"write the file as .csv or .jsonl")
    return not bare


def read_table(path: Path, delimiter: str, wanted=()) -> Iterator[tuple[str, dict]]:
    """The rows of a .csv or .tsv by the names in its header, each with its place.

    wanted: names that the header must have. If it lacks them, it is a row like the others, or its
    separators are not those that the file's ending implies.
    """
    text = "".join(read_lines(path))
    quotes = delimiter == "," or quotes_are_the_writers(path, text)
    header = None
    try:
        for number, row in split_rows(text, delimiter, quotes):
            values = [plain if inside is None else inside.replace('""', '"')
                      for inside, plain in row]
            if header is None:
                header = values
                if lacks := [name for name in wanted if name not in header]:
                    between = "tabs" if delimiter == "\t" else "commas"
                    raise ValueError(f"line {number}: has no {', '.join(lacks)} (it has "
                                     f"{list_names(header)}); the first line must name the "
                                     f"fields, with {between} between them")
                if twice := [name for name, n in Counter(header).items() if n > 1]:
                    raise ValueError(f"line {number}: the header has {brief(twice[0])} twice; "
                                     f"rename or remove one")
                continue
            if len(values) > len(header):
                raise ValueError(f"line {number}: has {len(values)} fields, the header "
                                 f"{len(header)} ({list_names(header)}); quote or fix it")
            if len(values) < len(header):
                raise ValueError(f"line {number}: has no field {brief(header[len(values)])} "
                                 f"({len(values)} fields, the header has {len(header)})")
            yield f"line {number}", dict(zip(header, values))
    except ValueError as error:
        raise UserError(f"{path}, {error}")


def records(path: Path, wanted=()) -> Iterator[tuple[str, object]]:
    """The rows of a file, unchecked, each with its place for messages (`line 3`).

    wanted: the fields that a table's header must name.
    """
    ending = path.name.removesuffix(".gz").rpartition(".")[2]
    if ending in ("tsv", "csv"):
        yield from read_table(path, "\t" if ending == "tsv" else ",", wanted)
        return
    if ending == "json":
        whole = "".join(read_lines(path, MAX_JSON))
        try:
            rows = parse_json(whole)
            yield from ((f"row {i}", row) for i, row in
                        enumerate(rows if isinstance(rows, list) else [rows], 1))
            return
        except ValueError as error:
            if whole.lstrip()[:1] == "[":
                raise UserError(f"{path}: not JSON ({error}); fetch the file again or fix it")
            # several objects, one per line
    for i, line in enumerate(read_lines(path), 1):
        if line.strip():
            try:
                yield f"line {i}", parse_json(line)
            except ValueError as error:
                raise UserError(f"{path}, line {i}: not JSON ({error}); fetch the file again or "
                                f"fix the line")


# ---------------------------------------------------------------------------------------------
# Rows
# ---------------------------------------------------------------------------------------------


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
    """The row with each value converted by its field; ValueError names the field and the value."""
    for name, value in row.items():
        try:
            row[name] = fields[name](value)
        except ValueError as error:
            raise ValueError(f"{name} is {str(value)[:50]!r}: {error}")
    return row


def read_blocks(path: Path, fields: dict[str, Callable], optional=(),
                notes: list[str] | None = None) -> list[list[dict]]:
    """The rows of a file, checked; a flat row makes a block of one, a columnar row one of many.

    notes: gets a line that names other fields and counts their rows.
    """
    blocks, unread = [], Counter()
    for place, record in records(path, [name for name in fields if name not in optional]):
        try:
            block = [checked(row, fields) for row in flatten(record, fields, optional)]
        except ValueError as error:
            has = f", this one has {list_names(record)}" if isinstance(record, dict) else (
                "; it is a list: call the file .json" if isinstance(record, list) else "")
            raise UserError(f"{path}, {place}: {error}; a row needs {', '.join(fields)}{has}")
        blocks.append(block)
        for name, value in record.items():
            if name not in fields and name not in KNOWN:
                unread[name] += len(block) * (value is not None)
    if not any(blocks):
        raise UserError(f"{path}: no rows; fetch the file again")
    if notes is not None:
        notes += [f"{path.name}: {line}" for line in list_unread(+unread)]
    return blocks


def read_rows(path: Path, fields: dict[str, Callable], optional=(),
              notes: list[str] | None = None) -> list[dict]:
    """The rows of a file, flat; UserError with file and line for what does not fit `fields`."""
    return [row for block in read_blocks(path, fields, optional, notes) for row in block]


def read_unique(path: Path, fields: dict[str, Callable], optional=(),
                notes: list[str] | None = None) -> dict[str, dict]:
    """Rows by their `_id`; UserError if one occurs twice."""
    rows = {}
    for row in read_rows(path, {"_id": identifier, **fields}, optional, notes):
        if rows.setdefault(row["_id"], row) is not row:
            raise UserError(f"{path}: the id {row['_id']!r} occurs twice; remove one of the rows")
    return rows

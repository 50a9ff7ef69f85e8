"""Lines of the files that a user names: gzipped or not, in UTF-8, UTF-16 or UTF-32, within limits.

A file that is not regular, never ends, or is not text is refused, with what to do about it.
"""

import gzip
import io
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from runtime.errors import UserError
from runtime.files import open_regular

# Bytes of one line: a long novel has 3 million. A file without line ends would fill the memory.
MAX_LINE = 64 << 20
# Bytes of a .json, which is read as a whole.
MAX_JSON = 1 << 30
# A gzipped file may unpack to this many bytes, or this many times its size, whichever is more: text
# shrinks to a third or a tenth, a file of zeros to a thousandth.
MAX_UNPACKED, MAX_RATIO = 1 << 30, 100

CONVERT = ("save it as UTF-8, or convert it from what it is in, for Western European text of "
           "Windows: iconv -f WINDOWS-1252 -t utf-8 FILE > NEW")
BYTE_ORDER_MARKS = {b"\xff\xfe\0\0": "utf-32-le", b"\0\0\xfe\xff": "utf-32-be",
                    b"\xff\xfe": "utf-16-le", b"\xfe\xff": "utf-16-be", b"\xef\xbb\xbf": "utf-8"}
OTHER_FILES = {  # the first bytes of other kinds of files, named like texts by mistake
    b"version https://git-lfs": "a pointer of Git LFS, not the data; fetch them: git lfs pull",
    b"<!doctype html": "a web page, not the data; fetch the file itself (on the hub, the address "
                       "has resolve in it, not blob)",
    b"<html": "a web page, not the data; fetch the file itself",
    b"PK\x03\x04": "a zip archive (or of an office program); unpack it, or save it as text",
    b"BZh91AY&SY": "packed by bzip2; unpack it", b"\xfd7zXZ\0": "packed by xz; unpack it",
    b"\x28\xb5\x2f\xfd": "packed by zstd; unpack it", b"7z\xbc\xaf\x27\x1c": "packed by 7z; unpack "
    "it",
    b"\x1f\x8b": "packed by gzip twice; unpack it once: gunzip",
    b"%PDF-": "a PDF; extract its text first", b"{\\rtf": "rich text; save it as plain text",
    b"\xd0\xcf\x11\xe0": "of an older office program; save it as text",
    b"PAR1": "parquet; convert it: pandas.read_parquet(FILE).to_json(NEW, orient='records', "
            "lines=True)",
    b"ARROW1": "an Arrow table; convert it to .jsonl", b"SQLite format 3\0": "an SQLite database",
    b"\x93NUMPY": "an array of numpy's, not texts",
    b"\x80\x04\x95": "a pickle, which can run code; write it as .jsonl where it comes from",
}


def encoding_of(head: bytes) -> str:
    """The encoding of a file that begins with `head`: by its byte order mark or zero bytes.

    Without a mark, two ASCII characters at the start reveal it (as in JSON's RFC 4627).
    """
    for mark, name in BYTE_ORDER_MARKS.items():
        if head.startswith(mark):
            return name
    zeros = "".join("0" if byte == 0 else "x" for byte in head[:4])
    return {"x0x0": "utf-16-le", "0x0x": "utf-16-be", "x000": "utf-32-le",
            "000x": "utf-32-be"}.get(zeros, "utf-8")


@contextmanager
def open_data(path: Path):
    """Yield the open file (unpacked if gzipped), its encoding, and a function that raises UserError
    if more has been unpacked than can be right.

    UserError if it is not a regular file, or plainly not text; OSError, EOFError, zlib.error while
    it is read.
    """
    with open_regular(path) as packed:
        size, zipped = os.fstat(packed.fileno()).st_size, packed.read(2) == b"\x1f\x8b"
        packed.seek(0)
        file = gzip.GzipFile(fileobj=packed) if zipped else packed
        head = file.read(512)
        file.seek(0)
        begins = head.removeprefix(b"\xef\xbb\xbf").lstrip()
        for start, what in OTHER_FILES.items():  # also HTML in capitals
            if begins.startswith(start) or begins.lower().startswith(start):
                raise UserError(f"{path}: is {what}")
        if head[257:262] == b"ustar":
            raise UserError(f"{path}: is a tar archive; unpack it: tar -xf")
        if head.strip() == b"Entry not found":
            raise UserError(f"{path}: is the hub's answer in place of a file; fetch it under its "
                            f"right name")
        most = max(MAX_UNPACKED, MAX_RATIO * size)

        def check():
            if zipped and file.tell() > most:
                raise UserError(f"{path}: has {size:,} bytes and unpacks to more than {most:,}; if "
                                f"that is meant, unpack it yourself: gunzip")

        yield file, encoding_of(head), check


def next_line(file, path: Path, number: int, most: int = 0) -> bytes | str:
    """The next line of an open file, the `number`-th; empty at the end.

    UserError if it is longer than `most` (0: MAX_LINE), or if the lines end in CR alone (old Macs).
    """
    most = most or MAX_LINE
    line = file.readline(most + 1)
    if len(line) > most:
        raise UserError(f"{path}, line {number}: longer than {most:,} bytes; is it a file of "
                        f"lines? Split the line")
    if number == 1:
        first = line if isinstance(line, str) else line.decode("latin-1")
        if re.search(r"\r(?!\r*\n|\r*\Z)", first) and first[-1] != "\n":
            raise UserError(f"{path}: its lines end in CR alone; convert it: "
                            f"tr '\\r' '\\n' < FILE > NEW")
    return line


def read_lines(path: Path, most: int = 0) -> Iterator[str]:
    """The lines of a text file with their ends, split at newlines only; no byte order marks.

    UserError with the line's number if it is not in the file's encoding, has NUL bytes, or is
    longer than `most` (0: MAX_LINE).
    """
    number, encoding = 1, "utf-8"
    try:
        with open_data(path) as (file, encoding, check):
            lines = file if encoding == "utf-8" else io.TextIOWrapper(file, encoding, newline="\n")
            while line := next_line(lines, path, number, most):
                check()
                text = line.decode() if isinstance(line, bytes) else line
                if "\0" in text:
                    raise UserError(f"{path}, line {number}: has a NUL byte; is it a text? If it "
                                    f"is in UTF-16: iconv -f UTF-16LE (or UTF-16BE) -t utf-8 FILE "
                                    f"> NEW")
                yield text.removeprefix("\ufeff")
                number += 1
    except UnicodeDecodeError as error:
        if encoding == "utf-8":
            raise UserError(f"{path}, line {number}: not UTF-8 ({error.reason}); {CONVERT}")
        raise UserError(f"{path}, after line {number - 1}: not {encoding[:6].upper()} "
                        f"({error.reason}), as which it begins; is it whole? Fetch it again")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; name one that is there")
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}, after line {number - 1}: cannot be read ({error}); fetch it "
                        f"again")


def is_plain(path: Path) -> bool:
    """Whether a file is UTF-8 and not gzipped; errors as in open_data."""
    with open_data(path) as (file, encoding, _):
        return encoding == "utf-8" and not isinstance(file, gzip.GzipFile)


def copy_plain(path: Path, target: BinaryIO):
    """Write the file to `target`, unpacked and in UTF-8; errors as in open_data and read_lines."""
    with open_data(path) as (file, encoding, check):
        while encoding == "utf-8" and (block := file.read(1 << 20)):
            check()
            target.write(block)
    if encoding != "utf-8":
        target.writelines(line.encode() for line in read_lines(path))


# ---------------------------------------------------------------------------------------------
# JSON, and fields that are not read
# ---------------------------------------------------------------------------------------------


def parse_json(text: str):
    """The value of a JSON text; ValueError also if an object has a field twice."""
    def once(pairs: list) -> dict:
        found = dict(pairs)
        if len(found) < len(pairs):
            name = next(name for name, n in Counter(key for key, _ in pairs).items() if n > 1)
            raise ValueError(f"has the field {brief(name)} twice")
        return found

    try:
        if text.strip() in ("{", "["):  # the first line of pretty-printed JSON
            raise ValueError("goes on in the next line; write one object per line: jq -c "
                             + (". " if "{" in text else "'.[]' ") + "FILE > NEW")
        return json.loads(text, object_pairs_hook=once)
    except RecursionError:
        raise ValueError("maximum recursion depth: nested too deep")


def holds_text(value) -> bool:
    """Whether a JSON value contains a text that is not blank."""
    rest = [value]
    while rest:
        value = rest.pop()
        if isinstance(value, str) and value.strip():
            return True
        rest += value if isinstance(value, list) else (
            value.values() if isinstance(value, dict) else [])
    return False


def brief(name, most: int = 40) -> str:
    """A field's name for messages: shortened, and escaped if it cannot be printed."""
    name = str(name)
    name = name if len(name) <= most else name[:most] + "..."
    return name if name.isprintable() and name and name == name.strip() else repr(name)


def list_names(names, most: int = 8) -> str:
    """The first `most` names of fields, for messages."""
    names = list(map(brief, names))
    more = f" and {len(names) - most} more" * (len(names) > most)
    return (", ".join(names[:most]) or "nothing") + more


def list_unread(unread: Counter, most: int = 8) -> list[str]:
    """A list of one line that names the fields not read, with their row counts; [] if none."""
    named = [f"{brief(name)} ({n:,} rows)" for name, n in unread.most_common(most)]
    more = f" and {len(unread) - most} more" * (len(unread) > most)
    return [f"fields not read: {', '.join(named)}{more}"] if unread else []

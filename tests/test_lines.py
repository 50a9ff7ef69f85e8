"""data/lines.py: every reader of data takes the same encodings, and refuses what has no end."""

import gzip
import json
import os
import subprocess
from pathlib import Path

import pytest

from data import lines
from data.corpora import read_texts
from data.rows import read_rows, text
from data.triples import Triples
from runtime.errors import UserError

ROWS = [{"query": "ümläut 漢字", "positive": "\u2028owl", "text": "ümläut 漢字"},
        {"query": "b", "positive": "heron", "text": "b"}]


def read(reader: str, path: Path) -> list[str]:
    """The queries, or texts, of ROWS as one of the readers gives them."""
    if reader == "triples":
        data = Triples(path)
        return [data[i].query for i in range(len(data))]
    return read_texts(str(path)) if reader == "texts" else [
        row["text"] for row in read_rows(path, {"text": text})]


def content(reader: str) -> str:
    """ROWS as the reader takes them."""
    drop = "text" if reader == "triples" else ""
    return "".join(json.dumps({k: v for k, v in row.items() if k != drop}, ensure_ascii=False)
                   + "\r\n" for row in ROWS)


READERS = ["texts", "triples", "rows"]
ENCODINGS = {  # name -> byte order mark, codec
    "utf-8": ("", "utf-8"), "utf-8 with a mark": ("\ufeff", "utf-8"),
    "PowerShell's": ("\ufeff", "utf-16-le"), "utf-16 big": ("\ufeff", "utf-16-be"),
    "utf-16 without a mark": ("", "utf-16-le"), "utf-16 big without a mark": ("", "utf-16-be"),
    "utf-32": ("\ufeff", "utf-32-le"), "utf-32 big": ("\ufeff", "utf-32-be"),
    "utf-32 without a mark": ("", "utf-32-le"),
}


@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("reader", READERS)
def test_every_reader_takes_every_encoding(reader, encoding, zipped, tmp_path):
    mark, codec = ENCODINGS[encoding]
    written = (mark + content(reader)).encode(codec)
    (tmp_path / "a.jsonl").write_bytes(gzip.compress(written) if zipped else written)
    assert read(reader, tmp_path / "a.jsonl") == [row["query"] for row in ROWS]


@pytest.mark.parametrize("written, advice", [
    ("café “q”\nb\n".encode("cp1252"), ["-f", "WINDOWS-1252"]),
    ("漢字 one\nb\n".encode("utf-16-le"), ["-f", "UTF-16LE"]),  # no mark, begins with no ASCII
])
def test_the_advice_of_a_refused_encoding_works(written, advice, tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(written)
    with pytest.raises(UserError) as caught:
        read_texts(str(path))
    assert f"iconv {advice[0]} {advice[1]} " in str(caught.value)
    converted = subprocess.run(["iconv", *advice, "-t", "utf-8", path], capture_output=True)
    path.write_bytes(converted.stdout)
    assert read_texts(str(path)) == [("café “q”" if "WIN" in advice[1] else "漢字 one"), "b"]


def test_a_utf_16_file_that_was_taken_for_latin_1_is_refused(tmp_path):
    """What the advice of earlier versions made of it."""
    path = tmp_path / "a.txt"
    path.write_bytes("owl\nheron\n".encode("utf-16").decode("latin-1").encode())
    with pytest.raises(UserError, match="line 1: has a NUL byte"):
        read_texts(str(path))


# ---------------------------------------------------------------------------------------------
# What has no end, or is something else
# ---------------------------------------------------------------------------------------------


def refused(reader: str, path: Path, said: str):
    """Reading ends with one line that says so."""
    with pytest.raises(UserError) as caught:
        read(reader, path)
    assert said in str(caught.value) and str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("reader", READERS)
def test_pipes_and_devices_are_not_waited_for(reader, tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    for name in ("pipe.jsonl", "zero.jsonl"):
        refused(reader, tmp_path / name, "is no regular file")


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("codec", ["utf-8", "utf-16"])
def test_a_line_has_a_bound(codec, reader, tmp_path, monkeypatch):
    written, path = content(reader), tmp_path / "a.jsonl"
    path.write_bytes(written.encode(codec))
    longest = max(len(line.encode()) + 1 for line in written.split("\n"))
    monkeypatch.setattr(lines, "MAX_LINE", longest)
    assert len(read(reader, path)) == 2
    monkeypatch.setattr(lines, "MAX_LINE", 9)
    refused(reader, path, "line 1: longer than 9 bytes")


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("codec", ["utf-8", "utf-16"])
def test_what_a_gzip_unpacks_to_has_a_bound(codec, reader, tmp_path, monkeypatch):
    rows = content(reader) + "\r\n" * 200_000
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(rows.encode(codec)))
    assert len(read(reader, path)) == 2
    monkeypatch.setattr(lines, "MAX_UNPACKED", 1000)
    refused(reader, path, "if that is meant, unpack it yourself: gunzip")
    (tmp_path / "b.jsonl").write_bytes(gzip.decompress(path.read_bytes()))  # the advice
    assert len(read(reader, tmp_path / "b.jsonl")) == 2


@pytest.mark.parametrize("written, said", [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "git lfs pull"),
    (b"<!DOCTYPE HTML>\n<html>\n", "a web page"), (b"PK\x03\x04\0\0", "a zip archive"),
    (b'{"text": "one"}\r{"text": "two"}\r', "its lines end in CR alone"),
], ids=["lfs", "page", "zip", "old Mac"])
@pytest.mark.parametrize("reader", READERS)
def test_a_file_of_another_kind_is_told_by_its_beginning(reader, written, said, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(written)
    refused(reader, tmp_path / "a.jsonl", said)

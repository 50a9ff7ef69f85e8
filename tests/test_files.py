"""runtime/files.py: files and folders that are never half written, and hashes."""

import hashlib
import json
import os
from pathlib import Path

import pytest
from helpers import refused

from runtime import files
from runtime.errors import UserError
from runtime.files import open_regular, read_json, sha256_of_files, sha256_of_json, write_file
from runtime.files import write_folder


def test_only_regular_files_of_a_bounded_size_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_bytes(b"12345")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(UserError, match="is no regular file"):
            open_regular(path)
    with pytest.raises(UserError, match="5 bytes, at most 4 are read"):
        open_regular(tmp_path / "file", most=4)
    with open_regular(tmp_path / "file", most=5) as file:
        assert file.read() == b"12345"
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "missing")


def test_an_interrupted_write_leaves_the_old_folder_and_nothing_else(tmp_path):
    target = tmp_path / "out"
    for text in ("old", "new"):
        with write_folder(target) as aside:
            (aside / "file").write_text(text)
        assert (target / "file").read_text() == text
    with pytest.raises(KeyboardInterrupt), write_folder(target) as aside:
        (aside / "file").write_text("half")
        raise KeyboardInterrupt
    assert (target / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_cannot_be_written_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match="what was saved before is intact") as info:
        with write_folder(tmp_path / "file" / "out"):
            pass
    assert str(tmp_path / "file" / "out") in str(info.value)
    assert (tmp_path / "file").read_text() == "not a folder"


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    for text in ("old", "new"):
        write_file(path, text)
        assert path.read_text() == text

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "sync", full)
    refused(lambda: write_file(path, "half"), str(path), "No space left on device")
    assert path.read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("content, fragment", [
    (None, "missing; is "), (b"{", "not readable as JSON"), (b"\xff", "not readable as JSON"),
    (b"[" * 100_000, "not readable as JSON"), (b"[]", "this is a list"),
], ids=["no file", "cut off", "binary", "too deep", "a list"])
def test_what_is_not_a_json_object_is_refused(content, fragment, tmp_path):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    refused(lambda: read_json(path), str(path), fragment)


def test_hashes_depend_on_content_and_order_of_files_and_not_on_their_names(tmp_path):
    paths = [tmp_path / name for name in "abc"]
    for path, content in zip(paths, (b"one", b"two", b"one")):
        path.write_bytes(content)
    a, b, c = paths
    digests = [hashlib.sha256(content).digest() for content in (b"one", b"two")]
    assert sha256_of_files([a, b]) == hashlib.sha256(b"".join(digests)).hexdigest()
    assert sha256_of_files([a, b]) == sha256_of_files([c, b]) != sha256_of_files([b, a])


def test_the_hash_of_a_value_does_not_depend_on_the_order_of_its_keys():
    value = {"a": 1, "b": [True, None, "x"]}
    expected = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
    assert sha256_of_json(value) == sha256_of_json(dict(reversed(value.items()))) == expected
    assert sha256_of_json({**value, "a": 2}) != expected

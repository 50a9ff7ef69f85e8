"""embed.py: a .npy with the embeddings of a file's texts, in order, resumed after an end."""

import gzip
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT, write_encoder

import embed
from data.tokenizer import INSTRUCTED
from measures import unit
from model import load_encoder

LINES = ["A bird sings.", "", "Two owls\thunt.", "  spaces  ", "x " * 200, "last"]


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of three texts."""
    monkeypatch.setattr(embed, "BLOCK", 3)


def write_texts(folder, name="texts.txt", lines=LINES):
    """A .txt, or a .jsonl of {title, text}, of the lines."""
    text = "".join(line + "\n" for line in lines)
    if ".jsonl" in name:
        text = "".join(json.dumps({"title": f"t{i}", "text": line, "id": i}) + "\n"
                       for i, line in enumerate(lines))
    path = folder / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


def close(a, b):
    return np.abs(a - b).max() <= 1e-5


@pytest.mark.parametrize("name", ["texts.txt", "texts.txt.gz", "texts.jsonl", "texts.jsonl.gz"])
def test_row_i_is_the_embedding_of_text_i(name, two_stages, tmp_path, capsys, small_blocks):
    encoder = load_encoder(two_stages[1])
    expected = encoder.encode(LINES)
    path, out = write_texts(tmp_path, name), tmp_path / "out.npy"
    assert embed.main([str(two_stages[1]), str(path), str(out)]) == 0
    said = capsys.readouterr().out
    assert f"wrote {out}: 6 x {expected.shape[1]}, float32; 1 texts cut to 64 tokens" in said
    found = np.load(out, mmap_mode="r")
    assert found.dtype == np.float32 and close(found, expected)
    assert {p.name for p in tmp_path.iterdir()} == {name, "out.npy"}


def test_the_flags(two_stages, tmp_path, small_blocks):
    encoder, path = load_encoder(two_stages[1]), write_texts(tmp_path, "texts.jsonl")

    def found(*flags):
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}.npy"
        assert embed.main([str(two_stages[1]), str(path), str(out), *flags]) == 0
        return np.load(out)

    x = encoder.encode(LINES)
    assert close(found("--normalize"), unit(x))
    half = found("--half")
    assert half.dtype == np.float16 and np.array_equal(half, found().astype(np.float16))
    assert close(found("--instruction", "Find it"), encoder.encode(LINES, "Find it"))
    both = [f"t{i} {line}" if line else f"t{i}" for i, line in enumerate(LINES)]
    assert close(found("--field", "title", "text"), encoder.encode(both))


def test_documents_are_read_in_their_template(tiny, tmp_path):
    model = write_encoder(tiny, tmp_path / "encoder", template=INSTRUCTED,
                          document_template="passage: {text}")
    path, out, encoder = write_texts(tmp_path), tmp_path / "out.npy", load_encoder(model)
    assert embed.main([str(model), str(path), str(out), "--document"]) == 0
    assert close(np.load(out), expected := encoder.encode(LINES, document=True))
    assert not close(encoder.encode(LINES), expected)


def test_a_plain_llama_is_read_by_its_method(tmp_path):
    path, out = write_texts(tmp_path), tmp_path / "out.npy"
    flags = ["--method", "mean", "--max-tokens", "32"]
    assert embed.main(["demo", str(path), str(out), *flags]) == 0
    encoder, _ = embed.open_model("demo", "mean", 32)
    assert close(np.load(out), encoder.encode(LINES))


@pytest.mark.parametrize("after", [0, 1, 2])
def test_an_interrupted_command_resumes_with_the_same_bytes(after, two_stages, tmp_path,
                                                            monkeypatch, small_blocks, capsys):
    path, calls = write_texts(tmp_path, lines=LINES * 2), []
    command = [str(two_stages[1]), str(path)]
    assert embed.main([*command, str(tmp_path / "whole.npy")]) == 0
    ours = embed.Embeddings.append

    def append(self, x, *rest):
        calls.append(len(x))
        if len(calls) == after + 1:
            raise KeyboardInterrupt
        ours(self, x, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(embed.Embeddings, "append", append)
        assert embed.main([*command, str(tmp_path / "out.npy")]) == 130
    assert capsys.readouterr().err.endswith(
        "\ninterrupted; what is embedded is kept, the same command goes on\n")
    assert len(calls) == after + 1 and (tmp_path / "out.npy.json").exists()
    done = json.loads((tmp_path / "out.npy.json").read_text())["done"]
    assert done == 3 * after
    assert embed.main([*command, str(tmp_path / "out.npy")]) == 0
    assert (tmp_path / "out.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()
    assert not (tmp_path / "out.npy.json").exists()


@pytest.mark.parametrize("change, what", [
    (["--instruction", "Find it"], "reading"), (["--half"], "reading"),
    (["--normalize"], "reading"),
    ("text", "texts"), ("encoder", "encoder"),
])
def test_what_was_begun_otherwise_is_not_resumed(change, what, two_stages, tmp_path, monkeypatch,
                                                 capsys, small_blocks):
    path, out, model = write_texts(tmp_path), tmp_path / "out.npy", two_stages[1]

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(embed.Embeddings, "append", stop)
        assert embed.main([str(model), str(path), str(out)]) == 130
    if change == "text":
        write_texts(tmp_path, lines=[*LINES[:-1], "other"])
    elif change == "encoder":
        model = two_stages[0]
    flags = change if isinstance(change, list) else []
    before = out.read_bytes()
    assert embed.main([str(model), str(path), str(out), *flags]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert what in error and "out.npy.json" in error
    assert out.read_bytes() == before


@pytest.mark.parametrize("file, text, flags, fragments", [
    ("a.jsonl", '{"text": "a"}\n{"body": "b"}\n', [], ["line 2", "text", "--field"]),
    ("a.jsonl", '{"text": 5}\n', [], ["line 1", 'no field "text"', "--field"]),
    ("a.jsonl", '{"text": "a"\n', [], ["line 1", "not JSON"]),
    ("a.txt", '{"text": "a"}\n', [], ["a.txt", "rename it to .jsonl"]),
    ("a.csv", "text\na\n", [], ["a.csv", "unknown kind"]),
    ("a.txt", "", [], ["a.txt", "no text"]),
    ("a.txt", "a\n", ["--instruction", "x", "--method", "prompteol"], ["--method prompteol"]),
])
def test_what_is_refused(file, text, flags, fragments, two_stages, tmp_path, capsys, monkeypatch):
    (tmp_path / file).write_text(text)
    out = tmp_path / "out.npy"
    command = [str(two_stages[1]), str(tmp_path / file), str(out), *flags]
    assert embed.main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and all(f in error for f in fragments), error
    assert not out.exists()
    out.write_text("mine")
    assert embed.main([str(two_stages[1]), str(tmp_path / "b.txt"), str(out)]) == 2
    assert f"{tmp_path}/b.txt: no such file" in capsys.readouterr().err
    (tmp_path / "b.txt").write_text("a\n")
    assert embed.main([str(two_stages[1]), str(tmp_path / "b.txt"), str(out)]) == 2
    assert "exists" in capsys.readouterr().err and out.read_text() == "mine"
    monkeypatch.setattr(embed, "encoding", lambda *_: lambda texts, **_: np.full(
        (len(texts), 32), 1e5, np.float32))
    command = [str(two_stages[1]), str(tmp_path / "b.txt"), str(tmp_path / "large.npy"), "--half"]
    assert embed.main(command) == 2
    assert "the file's too narrow" in capsys.readouterr().err


def test_a_full_disk_is_one_line(two_stages, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    path, out = write_texts(tmp_path), tmp_path / "out.npy"
    assert embed.main([str(two_stages[1]), str(path), str(out)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "out.npy" in error and "No space left" in error and "make room" in error
    assert "7.7e-07 GB" in error  # 6 x 32 numbers
    assert [p.name for p in tmp_path.iterdir()] == ["texts.txt"]
    monkeypatch.undo()
    assert embed.main([str(two_stages[1]), str(path), str(out)]) == 0


def test_freed_memory_is_given_back_every_other_block(two_stages, tmp_path, monkeypatch,
                                                      small_blocks):
    """And few products are kept: a million texts took twice the memory of ten thousand."""
    calls, path = [], write_texts(tmp_path, lines=LINES * 2 + ["a"])  # five blocks
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        monkeypatch.setenv(name, "")  # so that it is as before when the test has ended
        monkeypatch.delenv(name)
    monkeypatch.setattr(embed, "give_back_freed_memory", lambda: calls.append(
        json.loads((tmp_path / "out.npy.json").read_text())["done"]))
    assert embed.main([str(two_stages[1]), str(path), str(tmp_path / "out.npy")]) == 0
    assert calls == [6, 12]
    assert os.environ["LRU_CACHE_CAPACITY"] == os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "64"


@pytest.mark.parametrize("lines", [LINES[:4], LINES + ["more"] * 2, LINES[:5] + ["other"]])
@pytest.mark.parametrize("when", [1, 2])
def test_a_file_that_changes_meanwhile_is_noticed(lines, when, two_stages, tmp_path, monkeypatch,
                                                  capsys, small_blocks):
    """After its texts were counted, or in the middle of the second reading of a .txt."""
    path, out, calls = write_texts(tmp_path), tmp_path / "out.npy", []
    ours = embed.read_file

    def read(*args):
        calls.append(1)
        if len(calls) == 2:
            for i, line in enumerate(LINES if when == 2 else ()):
                if i == 3:
                    break
                yield line
            write_texts(tmp_path, lines=lines)
            yield from list(ours(*args))[3 * (when == 2) :]
        else:
            yield from ours(*args)

    monkeypatch.setattr(embed, "read_file", read)
    assert embed.main([str(two_stages[1]), str(path), str(out)]) == 2
    error = capsys.readouterr().err.rpartition("error: ")[2]
    assert f"{path}: has changed while it was read" in error and str(out) in error
    assert (tmp_path / "out.npy.json").exists()  # it is no finished command's


def test_a_method_that_there_is_not_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        embed.main(["demo", str(write_texts(tmp_path)), str(tmp_path / "o.npy"), "--method", "foo"])
    assert stop.value.code == 2 and "invalid choice: 'foo'" in capsys.readouterr().err


def test_two_processes_share_the_work_and_resume_it(two_stages, tmp_path, monkeypatch):
    """What one process has begun, two go on with."""
    path, ours, calls = write_texts(tmp_path, lines=LINES * 200), embed.Embeddings.append, []

    def append(*inputs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        ours(*inputs)

    with monkeypatch.context() as patch:
        patch.setattr(embed.Embeddings, "append", append)
        assert embed.main([str(two_stages[1]), str(path), str(tmp_path / "two.npy")]) == 130
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               ROOT / "embed.py", two_stages[1], path, tmp_path / "two.npy", "--threads", "1"]
    done = subprocess.run([sys.executable, "-m", *map(str, command)], capture_output=True,
                          text=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and done.stdout.count("wrote") == 1, done.stderr
    assert embed.main([str(two_stages[1]), str(path), str(tmp_path / "one.npy")]) == 0
    two, one = (np.load(tmp_path / f"{name}.npy") for name in ("two", "one"))
    assert len(one) == 1200 > embed.BLOCK and close(two, one)

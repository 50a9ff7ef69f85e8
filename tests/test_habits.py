"""What people bring along, by the trackers of neighbouring projects: files, flags and places that
were once read wrong, or left out without a word. Each is read, refused with the fix, or counted."""

import gzip
import io
import json
import os
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import FAST, FAST2, TASK_FILES, error_line, evaluate_main, refused, write_task

import collapse
import contrastive
import embed
import evaluate
import pretrain_ctkd
from data.lines import read_lines
from data.tasks import folder_task, read_task
from data.tokenizer import Tokenizer, check_special_tokens
from data.triples import Triples
from model import EncoderConfig, load_encoder, plain_encoder
from runtime import errors
from runtime.formats import note_positions
from runtime.hub import find_model
from runtime.ranks import start_ranks

HEADER = "query-id\tcorpus-id\tscore\n"


def write(path: Path, content) -> Path:
    """A file of bytes, of a text, or of JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(folder: Path, kind: str) -> tuple:
    return read_task(folder_task(folder, kind))


def triples(folder: Path, rows, **options) -> Triples:
    return Triples(write(folder / "rows.jsonl", rows), **options)


# ---------------------------------------------------------------------------------------------
# Files of tasks
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content, first", [
    ("q1\t0\td9\t1\nq3\t0\td1\t1\n", "q1, 0, d9, 1"), ("q1 0 d9 1\nq3 0 d1 1\n", "q1 0 d9 1"),
    ("q1\td9\t1\nq1\td1\t1\n", "q1, d9, 1"), ("1\t0\t1\t1\n", "1, 0, 1, 1"),
    ("qid\tpid\trel\nq1\td9\t1\n", "qid, pid, rel"), (HEADER.replace("\t", ","), "query-id,"),
], ids=["trec", "trec with blanks", "three columns", "a value twice", "other names", "commas"])
def test_judgements_without_their_header_are_told_what_it_is(content, first, tmp_path):
    """TREC's qrels have four columns and no header."""
    write_task(tmp_path, "retrieval")
    (tmp_path / "qrels/test.jsonl").unlink()
    path = write(tmp_path / "qrels/test.tsv", content)
    refused(lambda: read(tmp_path, "retrieval"), f"{path}, line 1: has no ", "query-id", first,
            "the first line must name the fields, with tabs between them")
    write(path, HEADER + "q1\td9\t1\nq3\td10\t1\n")
    assert len(read(tmp_path, "retrieval")[0]["queries"]) == 2


def test_a_second_file_for_the_same_part_of_a_task_is_not_left_out_in_silence(tmp_path):
    write_task(tmp_path, "sts")
    write(tmp_path / "test.csv", "sentence1,sentence2,score\na,b,1\nc,d,2\n")
    refused(lambda: read(tmp_path, "sts"), f"{tmp_path}: has test.jsonl and test.csv", "keep one")
    as_repository = {"name": "X", "kind": "sts", "repository": "o/x", "expected": {}}
    (data := tmp_path / "data").mkdir()
    write_task(data / "x", "sts")
    write(data / "x/test.csv", "")
    assert len(read_task(as_repository, data)[0]["left"]) == 4  # as the hub's would be


def test_where_a_file_is_missing_those_that_are_there_are_named(tmp_path):
    write_task(tmp_path, "sts")
    (tmp_path / "test.jsonl").rename(tmp_path / "validation.jsonl")
    with pytest.raises(errors.UserError) as caught:
        read(tmp_path, "sts")
    assert "has no file test (it has validation.jsonl)" in str(caught.value)
    assert "--data-dir" not in str(caught.value)


def test_labels_are_the_same_as_numbers_and_as_texts(tmp_path):
    write(tmp_path / "train.csv", "text,label\nan owl,0\na cat,1\n")
    write(tmp_path / "test.jsonl", [{"text": "owl", "label": 0}, {"text": "cat", "label": "1"}])
    assert read(tmp_path, "classification")[1]["test_labels"] == ["0", "1"]
    write(tmp_path / "test.jsonl", [{"text": "owl", "label": "0 "}])
    refused(lambda: read(tmp_path, "classification"), "has the label '0 '", "(it has 0, 1)")


@pytest.mark.parametrize("name, content, said", [
    ("train.csv", "text,label\nan owl,\na cat,1\n", "line 2: label is '': is empty"),
    ("train.jsonl", [{"text": "an owl", "label": " "}], "line 1: label is ' ': is empty"),
])
def test_a_missing_label_is_no_label(name, content, said, tmp_path):
    write_task(tmp_path, "classification")
    (tmp_path / "train.jsonl").unlink()
    write(tmp_path / name, content)
    refused(lambda: read(tmp_path, "classification"), said)


@pytest.mark.parametrize("numeral", ["1_0", "4,5", "4.5/5", "", "nan", "1e999", "True"])
def test_what_is_no_numeral_is_no_score(numeral, tmp_path):
    rows = [{**row, "score": numeral} for row in TASK_FILES["sts"]["test"]]
    write_task(tmp_path, "sts", test=rows)
    refused(lambda: read(tmp_path, "sts"), "line 1: score is ", numeral)


def test_what_a_score_hides_is_counted(tmp_path):
    rows = [{"query": "", "positive": ["a", "b"], "negative": ["b", ""]},
            {"query": "x", "positive": ["a"], "negative": ["c"]}]
    notes = read(write_task(tmp_path, "reranking", test=rows), "reranking")[2]
    assert notes == ["1 queries have a text that is positive and negative", "empty texts: 2"]


# ---------------------------------------------------------------------------------------------
# Triples and texts
# ---------------------------------------------------------------------------------------------

ROWS = [{"query": "owl", "positive": "A bird.", "negative": "A stone."},
        {"query": "rain", "positive": "Water."}]


def test_a_positive_among_the_negatives_is_counted(tmp_path):
    rows = [{**ROWS[0], "negative": ["A stone.", " A bird."]}, ROWS[1]]
    assert triples(tmp_path, rows).notes == [
        "rows.jsonl: 1 rows have a positive among their negatives, which is no negative there"]
    assert triples(tmp_path, ROWS).notes == []


def test_files_of_a_folder_that_are_not_read_are_named(tmp_path):
    for name in ("allnli.jsonl", "allnli_split1.jsonl", "more.json", "b.parquet", "C.JSONL",
                 ".git"):
        write(tmp_path / name, ROWS)
    (tmp_path / "older").mkdir()
    found = Triples(tmp_path)
    assert len(found) == 2 and found.notes == [
        f"{tmp_path}: not read: C.JSONL, allnli_split1.jsonl, b.parquet, more.json, older"]


@pytest.mark.parametrize("content, said", [
    ([{"query": ["Find it", "owl"], "positive": "A bird."}], "instruction has a field of its own"),
    (json.dumps(ROWS[0], indent=1), "goes on in the next line; write one object per line: jq -c ."),
    (json.dumps(ROWS, indent=1), "in the next line; write one object per line: jq -c '.[]'"),
])
def test_rows_in_another_shape_are_told_how_to_be_written(content, said, tmp_path):
    refused(lambda: triples(tmp_path, content), "line 1: ", said)


def packed_tar() -> bytes:
    """A tar archive of one text."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        about = tarfile.TarInfo("a.txt")
        about.size = 4
        archive.addfile(about, io.BytesIO(b"a\nb\n"))
    return file.getvalue()


@pytest.mark.parametrize("content, said", [
    (b"%PDF-1.4\n%\xe2\xe3\xcf\xd3\n", "is a PDF"), (b"PAR1\x15\x04\x15", "is parquet"),
    (b"{\\rtf1\\ansi owl}", "rich text"), (b"\x93NUMPY\x01\0v\0{'descr'", "numpy"),
    (b"\x80\x04\x95\x10", "a pickle"), (b"\xd0\xcf\x11\xe0\xa1", "office"),
    (b"SQLite format 3\0", "SQLite"), (packed_tar(), "tar -xf"),
    (gzip.compress(packed_tar()), "tar -xf"), (gzip.compress(gzip.compress(b"a\n")), "gzip twice"),
    (b"\n <!DOCTYPE HTML>\n<html>", "web page"), (b"\xef\xbb\xbf<HTML>", "web page"),
    (b"Entry not found", "the hub's answer"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_another_kind_of_file_is_known_by_its_beginning(content, said, tmp_path):
    """None of these is told to convert an encoding, whose result would be read."""
    path = write(tmp_path / "a.txt", content)
    for call in (lambda: list(read_lines(path)), lambda: Triples(path.rename(path.with_suffix(
            ".jsonl")))):
        with pytest.raises(errors.UserError, match=said) as caught:
            call()
        assert "iconv" not in str(caught.value)


@pytest.mark.parametrize("content", [b"Par1 is a text.", b"Entry not found in the book.\n", b"PDF"])
def test_a_text_that_only_looks_like_another_kind_of_file_is_read(content, tmp_path):
    assert list(read_lines(write(tmp_path / "a.txt", content))) == [content.decode()]


# ---------------------------------------------------------------------------------------------
# Flags that nothing would come of
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, said", [
    (["--base", "nowhere"], "--base, --other-base"), (["--other-base"], "--base, --other-base"),
    (["--revision", "main"], "--revision main"), (["--memory-tokens", 4, "--pooling", "mean"],
                                                  "--memory-tokens 4: is for --pooling memory"),
    (["--memory-init", "normal", "--pooling", "mean"], "--memory-init normal"),
    (["--template", "{query}: {text}"], "{query} stays as it is"),
    (["--template", "query: {text}\\n"], "for the end of a line write $'...\\n...'"),
    (["--instruction", "auto", "--stage", "scl", "--document-tokens", 40], "--instruction auto"),
])
def test_a_stage_refuses_what_it_would_not_use(flags, said, tiny, home, tmp_path, capsys):
    """Before it trains: --base beside a Llama was once refused in the report, after the steps."""
    text = [] if "--stage" in flags else ["--text", home / "texts.txt"]
    code = contrastive.main([str(word) for word in (
        "--preset", "demo", "--model", tiny, *text, *FAST2, "--eval-tasks", "", "--out",
        tmp_path / "run", *flags)])
    error_line(code, capsys, said)
    assert not (tmp_path / "run/encoder").exists()


@pytest.mark.parametrize("stage, flags", [
    ("ucl", ["--negatives", 2]), ("ucl", ["--document-tokens", 20]), ("scl", ["--text", "demo"]),
    ("ucl", ["--instruction", "x"]), ("scl", ["--num-texts", 4]), ("scl", ["--text-seed", 1]),
])
def test_a_flag_of_the_other_stage_is_refused(stage, flags, capsys):
    given, other = ["--stage", stage, *map(str, flags)], {"ucl": "scl", "scl": "ucl"}[stage]
    with pytest.raises(SystemExit) as end:
        contrastive.parse_arguments(given)
    assert end.value.code == 2
    assert f"{flags[0]}: is for --stage {other}, not for {stage}" in capsys.readouterr().err
    contrastive.parse_arguments([*given, "--resume"])  # a run that was begun so can be ended


def test_stage_1_refuses_another_objectives_flags(tiny, home, tmp_path, capsys):
    for flags in (["--mask-share", 0.3], ["--mask-token", "x"]):
        code = pretrain_ctkd.main([str(word) for word in (
            "--model", tiny, "--text", home / "texts.txt", *FAST, *flags, "--out", tmp_path / "r")])
        error_line(code, capsys, *map(str, flags), "is for --objective mntp")


@pytest.mark.parametrize("command, flags, said", [
    (evaluate, ["--task-dir", ".", "--kind", "sts", "--data-dir", "x"], "without --task"),
    (evaluate, ["--list", "--task", "sts17"], "one at a time"),
    (evaluate, ["--compare", "a", "--task", "sts17"], "one at a time"),
    (evaluate, ["--task", "demo-sts", "--model", "demo", "--base", "x"], "--base, --other-base"),
    (evaluate, ["--task", "demo-sts", "--model", "demo", "--revision", "x"], "--revision x"),
    (collapse, ["--task", "demo-sts", "--model", "demo", "--other-base"], "--base, --other-base"),
    (embed, ["demo", "a.txt", "a.npy", "--base", "x"], "--base, --other-base"),
])
def test_a_command_refuses_what_it_would_not_use(command, flags, said, here, capsys):
    write(Path("a.txt"), "a\n")
    error_line(command.main(flags), capsys, said)


@pytest.mark.parametrize("command, flags, said", [
    (embed, ["demo", "a.txt", "a.npy", "--field", "title"], "--field: a.txt has none"),
    (embed, ["demo", "a.txt.gz", "a.npy", "--field", "title"], "--field: a.txt.gz has none"),
    (embed, ["demo", "a.jsonl", "a.npy", "--instruction", "auto"], "--instruction auto"),
    (collapse, ["--text", "a.txt", "--model", "demo", "--data-dir", "x"], "--data-dir x: is for"),
])
def test_the_command_line_refuses_what_it_would_not_use(command, flags, said, capsys):
    with pytest.raises(SystemExit) as end:
        command.main(flags)
    assert end.value.code == 2 and said in capsys.readouterr().err


def test_collapse_takes_flags_that_some_of_its_models_use(two_stages, tiny, tmp_path, capsys):
    write(tmp_path / "a.txt", "one\ntwo\nthree\n")

    def call(*flags):
        return collapse.main(["--text", str(tmp_path / "a.txt"), "--out", str(tmp_path / "o"),
                              "--device", "cpu", "--threads", "1", *map(str, flags)])

    error_line(call("--model", two_stages[0], "--method", "mean"), capsys, "--method", "no --model")
    assert call("--model", two_stages[0], tiny, "--method", "mean", "--base", tiny) == 0


# ---------------------------------------------------------------------------------------------
# embed.py
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given, meant", [
    ("Find it:", "Find it"), (" Find it ", "Find it"), ("none", ""), ("  ", ""),
])
def test_an_instruction_means_the_same_to_every_command(given, meant, two_stages, tmp_path):
    """The template brings the colon, as in training and evaluation."""
    path, out = write(tmp_path / "a.txt", "an owl\n"), tmp_path / "new" / "folder" / "a.npy"
    assert embed.main([str(two_stages[1]), str(path), str(out), "--instruction", given]) == 0
    expected = load_encoder(two_stages[1]).encode(["an owl"], instruction=meant)
    assert np.abs(np.load(out) - expected).max() < 1e-5


def test_titles_may_be_missing_from_some_rows_but_not_from_all(two_stages, tmp_path, capsys):
    rows = [{"title": None, "text": "an owl"}, {"text": "a cat"},
            {"title": "Rain", "text": "falls"}]
    path, out = write(tmp_path / "a.jsonl", rows), tmp_path / "a.npy"
    flags = [str(two_stages[1]), str(path), str(out), "--field", "title", "text"]
    assert embed.main(flags) == 0 and "2 rows have no title" in capsys.readouterr().out
    expected = load_encoder(two_stages[1]).encode(["an owl", "a cat", "Rain falls"])
    assert np.abs(np.load(out) - expected).max() < 1e-5
    out.unlink()
    error_line(embed.main([*flags, "titel"]), capsys, "no row has the field titel")
    write(path, [{"title": 3, "text": "x"}])
    error_line(embed.main(flags), capsys, 'no field "title" that is a string (it is 3)')
    write(path, [{"text": None}])
    error_line(embed.main(flags[:3]), capsys, 'no field "text" that is a string (it is None)')


def test_two_processes_do_not_write_one_file(tmp_path):
    about = {"shape": [2, 3]}
    first = embed.Embeddings(tmp_path / "a.npy", about)
    first.open("r+")[:] = 7  # written, and not noted yet
    refused(lambda: embed.Embeddings(tmp_path / "a.npy", about), "another process writes it")
    assert (first.open("r") == 7).all()
    first.append(np.ones((2, 3)), 0, ["a", "b"])
    del first
    assert embed.Embeddings(tmp_path / "a.npy", about).state["done"] == 2


# ---------------------------------------------------------------------------------------------
# Places, streams, the environment
# ---------------------------------------------------------------------------------------------


def test_a_place_inside_of_what_is_meant_is_told_what_to_name(
    ctkd, tiny, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tiny.parent)
    refused(lambda: find_model(f"{tiny.name}/config.json"), "is a file; name the folder")
    for inside in ("encoder/ctkd", "checkpoints"):
        path = write(tmp_path / "a.txt", "a\n")
        code = embed.main([str(ctkd / inside), str(path), str(tmp_path / "a.npy")])
        error_line(code, capsys, f"{ctkd / inside}: is a part of the encoder or run in "
                                 f"{(ctkd / inside).parent}; name that")


def test_a_home_folder_is_meant_where_no_shell_has_seen_to_it(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setattr(errors, "take_signals", lambda stop: {})
    monkeypatch.setattr(sys, "argv", ["x.py", "--out=~/a", "~/b", "~", "--text", "a~/b", "~me/c",
                                      "--instruction", "find ~/x"])
    errors.await_command()
    assert sys.argv[1:] == ["--out=/home/me/a", "/home/me/b", "/home/me", "--text", "a~/b", "~me/c",
                            "--instruction", "find ~/x"]


def test_a_closed_stream_is_no_error(monkeypatch, capsys):
    """As 2>&- and some schedulers leave it: progress bars have nowhere to go."""
    monkeypatch.setattr(sys, "stderr", None)
    assert errors.run_command(lambda: print("owl") or sys.stderr.isatty()) == 0
    assert capsys.readouterr().out == "owl\n"


@pytest.mark.parametrize("name, value", [
    ("RANK", "abc"), ("WORLD_SIZE", "0"), ("LOCAL_RANK", ""), ("LOCAL_WORLD_SIZE", "-1")])
def test_odd_numbers_of_processes_are_named(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    refused(lambda: start_ranks("cpu", 1, 1, False), name, value, "torchrun")


def test_printed_commands_can_be_pasted(ucl, home, ctkd, tmp_path, monkeypatch, capsys):
    (place := tmp_path / "my runs").mkdir()
    os.symlink(ucl, place / "a")
    monkeypatch.setattr(evaluate, "demo_sts", lambda encoder: 0.0)
    config = contrastive.Config(model=str(ctkd), out=str(place / "a"), text="x")
    contrastive.report(config, torch.device("cpu"))
    said = capsys.readouterr().out
    assert said.count(f" --model '{place}/a'") == 2


def test_lengths_beyond_the_models_positions_are_noted(tiny, here, capsys):
    note_positions(plain_encoder(tiny), 256)
    assert capsys.readouterr().out == ""
    note_positions(plain_encoder(tiny, EncoderConfig(2)), 200, 255)
    assert "max_position_embeddings=256" in capsys.readouterr().out
    write_task(Path("mine"), "sts")
    flags = ["--task-dir", "mine", "--kind", "sts", "--model", tiny, "--max-tokens"]
    assert evaluate_main(*flags, 300) == 0
    assert "max_position_embeddings=256" in capsys.readouterr().out


def test_a_template_of_braces_that_are_data_is_read(tiny):
    tokenizer = Tokenizer(tiny, 320)
    check_special_tokens(tokenizer, ('{"text": "{text}"}', "{instruction}:{text}\n", "{{text}}"))

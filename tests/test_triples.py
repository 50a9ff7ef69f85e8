"""data/triples.py: rows read by their offset, instructions of the E5 files, bad input."""

import hashlib
import json
import random
import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from helpers import gz

from data import triples
from data.triples import DEMO_TRIPLES, Triple, Triples
from runtime.errors import UserError

HALVES = ["allnli_split1", "allnli_split2", "quora_duplicates_split1", "quora_duplicates_split2"]
E5 = ["allnli", "dureader", "eli5_question_answer", "fever", "hotpot_qa", "miracl", "mrtydi",
      "msmarco_document", "msmarco_passage", "nq", "quora_duplicates", "squad", "t2ranking",
      "trivia_qa"]
ROWS = [  # rows as they stand in a file, and what is read of them
    ({"query": "one", "positive": "uno", "negative": "due"}, ("one", "uno", ["due"])),
    ({"query": "töw 二 🐦", "positive": "zwei", "negative": None},
     ("töw 二 🐦", "zwei", [])),
    ({"query": "three", "positive": "drei"}, ("three", "drei", [])),
    ({"negative": ["a", "b", "c"], "positive": "vier", "query": "four"},
     ("four", "vier", ["a", "b", "c"])),
    ({"query": "five", "positive": "fünf", "negative": []}, ("five", "fünf", [])),
    ({"query": " six\t", "positive": "\nsechs", "negative": [" x ", "y"], "id": 6, "score": [1.5]},
     ("six", "sechs", ["x", "y"])),
    ({"query": "line\u2028one\x85two\x0b", "positive": "a\nb", "negative": "c\r\nd"},
     ("line\u2028one\x85two", "a\nb", ["c\r\nd"])),
]
EXPECTED = [row for _, row in ROWS]
LINES = [json.dumps(row, ensure_ascii=False).encode() for row, _ in ROWS]


def plain(data: Triples) -> list[tuple]:
    """All rows without their instructions."""
    return [(data[i].query, data[i].positive, data[i].negatives) for i in range(len(data))]


def sizes(data: Triples) -> list[int]:
    """The rows of each file."""
    return [len(file.offsets) for file in data.files]


def make(path: Path, count: int, word: str) -> Path:
    """A file of `count` rows that all differ."""
    rows = [{"query": f"{word} {i}", "positive": f"{word} positive {i}"} for i in range(count)]
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gz(content) if path.suffix == ".gz" else content)
    return path


# ---------------------------------------------------------------------------------------------
# Rows
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, content", [
    ("a.jsonl", b"\n".join(LINES) + b"\n"),
    ("no-newline-at-the-end.jsonl", b"\n".join(LINES)),
    ("byte-order-mark.jsonl", b"\xef\xbb\xbf" + b"\n".join(LINES)),
    ("carriage-returns.jsonl", b"\r\n".join(LINES) + b"\r\n"),
    ("blank-lines.jsonl", b"\n \n" + b"\n\r\n\t\n".join(LINES) + b"\n\n  "),
    ("escaped.jsonl", "\n".join(json.dumps(row) for row, _ in ROWS).encode()),
    ("a.jsonl.gz", gz(b"\n".join(LINES) + b"\n")),
    ("mark-in-a-gzip.jsonl.gz", gz(b"\xef\xbb\xbf" + b"\r\n".join(LINES))),
    ("two-gzips.jsonl.gz", gz(LINES[0] + b"\n") + gz(b"\n".join(LINES[1:]))),
    ("zipped-without-the-suffix.jsonl", gz(b"\n".join(LINES))),
    ("suffix-without-the-zip.jsonl.gz", b"\n".join(LINES)),
    ("with.dots and spaces.jsonl", b"\n".join(LINES)),
])
def test_rows_are_those_of_the_file(name, content, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    data = Triples(path)
    assert len(data) == len(ROWS) and sizes(data) == [len(ROWS)]
    assert plain(data) == EXPECTED
    assert data[0] == Triple("one", "", "uno", ["due"]) == Triples(str(path))[0]
    assert path.read_bytes() == content and [p.name for p in tmp_path.iterdir()] == [name]


def test_rows_can_be_read_repeatedly_and_in_any_order(tmp_path):
    for name, count in (("a.jsonl", 7), ("b.jsonl.gz", 300), ("c.jsonl", 40)):
        make(tmp_path / name, count, name[0])
    data = Triples(tmp_path)
    expected = [f"{name} {i}" for name, n in (("a", 7), ("b", 300), ("c", 40)) for i in range(n)]
    order = random.Random(0).choices(range(347), k=1000)
    assert [data[i].query for i in order] == [expected[i] for i in order]
    assert [data[i].query for i in (346, 0, 306, 307, 6, 7)] == [
        expected[i] for i in (346, 0, 306, 307, 6, 7)]
    assert data[np.int64(346)].positive == "c positive 39"
    with pytest.raises(IndexError):
        data[347]


def test_the_files_of_a_folder_are_read_in_the_order_of_their_names(tmp_path):
    for name, count in (("b.jsonl", 3), ("a.jsonl.gz", 2), ("Z.jsonl", 1), ("b2.jsonl", 4)):
        make(tmp_path / name, count, name[0])
    (tmp_path / "empty.jsonl").write_bytes(b"\n")
    for name in ("notes.txt", "c.json", "d.jsonl.bak", "e.gz"):
        (tmp_path / name).write_text("not a triple")
    data = Triples(tmp_path)
    assert [file.path.name for file in data.files] == [
        "Z.jsonl", "a.jsonl.gz", "b.jsonl", "b2.jsonl", "empty.jsonl"]
    assert sizes(data) == [1, 2, 3, 4, 0] and len(data) == 10
    assert [row[0] for row in plain(data)] == [
        "Z 0", "a 0", "a 1", "b 0", "b 1", "b 2", "b 0", "b 1", "b 2", "b 3"]


def test_halves_of_a_set_are_left_out_beside_the_whole(tmp_path):
    for name in [*HALVES, "allnli", "nq", "nq_split1"]:
        make(tmp_path / f"{name}.jsonl", 3, name)
    names = [file.path.name.removesuffix(".jsonl") for file in Triples(tmp_path).files]
    assert names == ["allnli", "nq", "nq_split1", *HALVES[2:]]


def test_only_offsets_are_kept_in_memory(tmp_path):
    path, rows = tmp_path / "a.jsonl", 1500
    with open(path, "w") as file:
        for i in range(rows):
            row = {"query": f"zebra {i} " * 50, "positive": f"heron {i} " * 100}
            file.write(json.dumps({**row, "negative": ["otter " * 100]}) + "\n")
    tracemalloc.start()
    try:
        data = Triples(path)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    (file,) = data.files
    assert file.offsets.dtype == np.int64 and file.offsets.nbytes == 8 * rows
    held = repr(vars(data)) + repr(vars(file))
    assert not any(word in held for word in ("zebra", "heron", "otter"))
    assert path.stat().st_size > 3_000_000 and kept < 100_000 and peak < 500_000
    assert data[rows - 1].query == (f"zebra {rows - 1} " * 50).strip()


def test_the_sha256_depends_on_the_content_only(tmp_path):
    path = make(tmp_path / "a.jsonl", 5, "a")
    first, content = Triples(path).sha256, path.read_bytes()
    assert re.fullmatch("[0-9a-f]{64}", first)
    copy, zipped = tmp_path / "b.jsonl", tmp_path / "c.jsonl.gz"
    copy.write_bytes(content)
    zipped.write_bytes(gz(content))
    assert Triples(copy).sha256 == Triples(zipped).sha256 == first
    others = [content.replace(b"positive 3", b"positive 4"), content + LINES[0] + b"\n",
              content[: content.index(b"\n") + 1], b"".join(content.splitlines(True)[::-1])]
    others[2] += LINES[1]
    digests = set()
    for other in others:
        path.write_bytes(other)
        digests.add(Triples(path).sha256)
    assert len(digests) == len(others) and first not in digests


def write_files(folder: Path, sizes: dict[str, int]) -> Triples:
    """The same ten rows, so many of them in each file."""
    folder.mkdir()
    lines = make(folder / "rows", 10, "a").read_bytes().splitlines(keepends=True)
    for name, size in sizes.items():
        (folder / f"{name}.jsonl").write_bytes(b"".join(lines[:size]))
        del lines[:size]
    return Triples(folder)


@pytest.mark.parametrize("sizes, same", [
    ({"x": 5, "y": 5}, True), ({"squad": 5, "z": 5}, False), ({"a": 6, "b": 4}, False),
], ids=["other names", "another instruction", "other sizes"])
def test_the_sha256_depends_on_instructions_and_sizes_of_files(sizes, same, tmp_path):
    """A resumed run would give a row another instruction, or lay it in another batch."""
    first = write_files(tmp_path / "first", {"a": 5, "b": 5})
    other = write_files(tmp_path / "other", sizes)
    assert plain(first) == plain(other) and (first.sha256 == other.sha256) == same


# ---------------------------------------------------------------------------------------------
# Instructions
# ---------------------------------------------------------------------------------------------


def test_the_instructions_are_those_of_the_public_e5_files():
    assert sorted(triples.INSTRUCTIONS) == E5
    two = [name for name, texts in triples.INSTRUCTIONS.items() if len(texts) == 2]
    assert two == ["allnli", "quora_duplicates"]
    texts = [text for texts in triples.INSTRUCTIONS.values() for text in texts]
    assert len(texts) == 16
    assert all(text == text.strip() and text and text[-1].isalpha() for text in texts)
    assert triples.INSTRUCTIONS["fever"] == [
        "Given a claim, retrieve documents that support or refute the claim"]
    assert triples.INSTRUCTIONS["allnli"] == [
        "Given a premise, retrieve a hypothesis that is entailed by the premise",
        "Retrieve semantically similar text"]


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz"])
def test_files_named_like_those_of_e5_get_their_instructions(ending, tmp_path):
    for name in E5:
        make(tmp_path / (name + ending), 5, name)
    data = Triples(tmp_path, "never used")
    assert sizes(data) == [5] * 14
    for place, name in enumerate(E5):
        texts = triples.INSTRUCTIONS[name]
        found = [data[5 * place + i].instruction for i in range(5)]
        assert found == [texts[i % len(texts)] for i in range(5)]
        assert data[5 * place].query == f"{name} 0"


def test_other_files_get_the_given_instruction(tmp_path):
    for name in ("allnli.jsonl", "allnli2.jsonl", "nq.v1.jsonl", "my_nq.jsonl"):
        make(tmp_path / name, 3, name)
    names, given = ["allnli", "allnli2", "my_nq", "nq.v1"], "Find it"
    first, second = triples.INSTRUCTIONS["allnli"]
    for instruction, other in ((given, given), ("", "")):
        data = Triples(tmp_path, instruction)
        assert [triples.stem(file.path) for file in data.files] == names
        assert [data[i].instruction for i in range(12)] == [first, second, first, *[other] * 9]
    assert [row.instruction for row in map(Triples(tmp_path, None).__getitem__, range(12))] == (
        [""] * 12)
    assert Triples(tmp_path)[3].instruction == ""


def test_the_instructions_of_a_file_take_turns_over_its_own_rows(tmp_path):
    """An odd number of rows lies before the file with two instructions."""
    make(tmp_path / "a.jsonl", 3, "a")
    make(tmp_path / "allnli.jsonl", 4, "b")
    data = Triples(tmp_path)
    assert [data[i].instruction for i in range(7)] == (
        [""] * 3 + 2 * triples.INSTRUCTIONS["allnli"])


def test_an_instruction_loses_its_colon_as_the_template_has_one(tmp_path):
    make(tmp_path / "mine.jsonl", 3, "a")
    assert Triples(tmp_path, " Find the text: ")[1].instruction == "Find the text"


# ---------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------

GOOD = b'{"query": "a", "positive": "b"}\n{"query": "c", "positive": "d"}\n'


@pytest.mark.parametrize("line, fragment", [
    (b'{"positive": "b"}', "has no query"),
    (b'{"query": null, "positive": "b"}', "has no query"),
    (b'{"query": "a", "negative": "b"}', "has no positive"),
    (b'{"query": "a", "passage": "b"}', "has no positive (it has query, passage)"),
    (b'{"query": "a", "pos": [], "neg": ["b"]}', "has no positive"),
    (b'{"query": "", "positive": "b"}', "query is empty"),
    (b'{"query": " \\n\\t", "positive": "b"}', "query is empty"),
    (b'{"query": "a", "positive": ""}', "positive is empty"),
    (b'{"query": "a", "positive": "\\u3000"}', "positive is empty"),
    (b'{"query": "a", "positive": "b", "negative": ""}', "negative is empty"),
    (b'{"query": "a", "positive": "b", "negative": ["c", " "]}', "negative is empty"),
    (b'{"query": "a", "positive": "b", "negative": ["c", null]}', "has no negative"),
    (b'{"query": 5, "positive": "b"}', "query is '5', a text is expected"),
    (b'{"query": ["a"], "positive": "b"}', "query is \"['a']\", a text is expected"),
    (b'{"query": "a", "positive": {"contents": "b"}}', "positive is "),
    (b'{"query": "a", "positive": {"title": 5, "text": "b"}}', "positive.title is '5'"),
    (b'{"query": ["instruction", "a"], "pos": ["instruction", "b"]}', "query is "),
    (b'{"query": "a", "positive": "b", "instruction": ["c"]}', "instruction is \"['c']\""),
    (b'{"query": "a", "query": "c", "positive": "b"}', "has the field query twice"),
    (b'[{"query": "a", "positive": "b"}]', "jq -c '.[]'"),
    (b'{"query": "a", "positive": true}', "positive is 'True', a text is expected"),
    (b'{"query": "a", "positive": "b", "negative": 1.5}', "negative is '1.5'"),
    (b'{"query": "a", "positive": "b", "negative": {"title": "c"}}', "negative is "),
    (b'{"query": "a", "positive": "b", "negative": ["c", ["d"]]}', "negative is "),
    (b'{"query": "a", "positive": "b", "negative": [0]}', "negative is '0'"),
    (b"{'query': 'a', 'positive': 'b'}", "Expecting property name"),
    (b'{"query": "a", "positive": "b"', "Expecting"),
    (b'{"query": "a", "positive": "b"} {"query": "a", "positive": "b"}', "Extra data"),
    (b"query,positive", "Expecting value"),
    (b"[" * 100_000, "recursion"),
    (b'["a", "b"]', "not a JSON object"),
    (b'"a"', "not a JSON object"),
    (b"null", "not a JSON object"),
    (b'{"query": "caf\xe9", "positive": "b"}', "utf-8"),
    (b'{"query": "a", "positive": "half an emoji \\ud83d"}', "surrogate"),
    (b'{"query": "a", "positive": "b", "negative": ["\\udc26"]}', "surrogate"),
])
@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gz"])
def test_a_bad_row_is_named_with_file_and_line(line, fragment, zipped, tmp_path):
    make(tmp_path / "a.jsonl", 3, "a")
    path = tmp_path / f"b.jsonl{'.gz' * zipped}"
    content = GOOD + b"\n" + line + b"\n" + GOOD
    content = gz(content) if zipped else content
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        Triples(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{path}, line 4: ") and fragment in message
    assert "a row needs query and positive" in message
    assert "\n" not in message and len(message) < 400
    assert path.read_bytes() == content


@pytest.mark.parametrize("content", [b"\x00\x01\x02" * 50, b"\xef\xbb\xbf{\n"])
def test_a_file_that_is_bad_from_the_start_is_named_with_line_1(content, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        Triples(path)
    assert str(caught.value).startswith(f"{path}, line 1: ") and "\n" not in str(caught.value)


CUT = gz(random.Random(0).randbytes(9999).hex().encode())


@pytest.mark.parametrize("name, content, fragments", [
    ("empty.jsonl", b"", ["no rows", '"query"', '"positive"']),
    ("blank.jsonl", b"\n \r\n\n", ["no rows", '"query"', '"positive"']),
    ("zipped-nothing.jsonl.gz", gz(b""), ["no rows", '"query"', '"positive"']),
    ("cut.jsonl.gz", CUT[:-3000], ["cannot be read", "end-of-stream", "fetch it again"]),
    ("damaged.jsonl.gz", CUT[:200] + b"\xff\xff\xff" + CUT[203:], ["cannot be read", "again"]),
    ("head.jsonl.gz", b"\x1f\x8b", ["cannot be read", "fetch it again"]),
    ("one-row.jsonl", b'{"query": "a", "positive": "b"}', ["all 1 rows", "the same positive"]),
    ("same.jsonl", b'{"query": "a", "positive": "b"}\n{"query": "c", "positive": " b"}',
     ["all 2 rows", "the same positive", "different ones"]),
    ("a.json", GOOD, ["unknown kind of file", ".jsonl or .jsonl.gz"]),
    ("a.csv", GOOD, ["unknown kind of file", ".jsonl or .jsonl.gz"]),
    ("a.gz", gz(GOOD), ["unknown kind of file", ".jsonl or .jsonl.gz"]),
    ("a.jsonl.zip", GOOD, ["unknown kind of file", ".jsonl or .jsonl.gz"]),
])
def test_a_bad_file_is_reported_with_a_remedy_and_left_alone(name, content, fragments, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        Triples(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    for fragment in fragments:
        assert fragment in message
    assert [p.name for p in tmp_path.iterdir()] == [name] and path.read_bytes() == content


@pytest.mark.parametrize("names", [[], ["notes.txt", "a.json", "b.csv.gz"], ["a.jsonl.bak"]],
                         ids=["empty", "other files", "backup"])
def test_a_folder_without_triples_is_named(names, tmp_path):
    for name in names:
        (tmp_path / name).write_bytes(GOOD)
    with pytest.raises(UserError, match=re.escape(str(tmp_path)) + ": no .jsonl") as caught:
        Triples(tmp_path)
    assert "put the triples there" in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_of_empty_files_or_equal_positives_is_named(tmp_path):
    for content, fragment in ((b"", "no rows"), (b'{"query": "a", "positive": "b"}\n', "all 2")):
        for name in ("a.jsonl", "b.jsonl"):
            (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=re.escape(str(tmp_path)) + f": {fragment}"):
            Triples(tmp_path)


def test_a_file_that_is_there_twice_is_refused(tmp_path):
    for name in ("a.jsonl", "b.jsonl", "b.jsonl.gz"):
        make(tmp_path / name, 3, name)
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "b.jsonl")) + ": .*twice.*gz"):
        Triples(tmp_path)
    (tmp_path / "b.jsonl").unlink()
    assert sizes(Triples(tmp_path)) == [3, 3]


@pytest.mark.parametrize("name", ["missing.jsonl", "missing.jsonl.gz", "missing", "no/where.jsonl"])
def test_a_missing_path_is_reported_with_what_triples_accepts(name, tmp_path):
    path = str(tmp_path / name)
    with pytest.raises(UserError, match=re.escape(path) + ": no such file or folder; --triples"):
        Triples(path)


def test_a_folder_named_like_a_file_of_triples_is_a_user_error(tmp_path):
    (tmp_path / "a.jsonl").mkdir()
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "a.jsonl"))):
        Triples(tmp_path)


# ---------------------------------------------------------------------------------------------
# The names of other projects
# ---------------------------------------------------------------------------------------------

READ = ("q", ["p"], ["n", "m"], None)  # query, positives, negatives, instruction


@pytest.mark.parametrize("row, read", [
    ({"query": "q", "positive": "p", "negative": ["n", "m"]}, READ),
    ({"query": "q", "positive": "p", "neg": ["n", "m"]}, READ),  # the two spellings mixed
    ({"anchor": "q", "positive": "p", "negative_2": "m", "negative_1": "n"}, READ),
    ({"anchor": "q", "positive": "p", "negative_10": "m", "negative_2": "n", "negative_1": None},
     READ),
    ({"question": "q", "answer": "p"}, ("q", ["p"], [], None)),
    ({"query": "q", "pos": ["p", "r", "p"], "neg": ["n"], "prompt": "Find it:"},
     ("q", ["p", "r"], ["n"], "Find it")),
    ({"query": "q", "positive_passages": [{"title": "T", "text": "p"}],
      "negative_passages": [{"title": "", "text": "n"}, {"text": "m"}]},
     ("q", ["T p"], ["n", "m"], None)),
    ({"query": "q", "pos": [{"title": None, "text": " p "}], "neg": []}, ("q", ["p"], [], None)),
    ({"sent0": "q", "sent1": "p", "hard_neg": "n"}, ("q", ["p"], ["n"], None)),
    ({"query": "q", "anchor": None, "positive": "p", "negative": None, "neg": ["n"]},
     ("q", ["p"], ["n"], None)),
    ({"query": "q", "positive": "p", "instruction": ""}, ("q", ["p"], [], "")),
], ids=lambda value: " ".join(value) if isinstance(value, dict) else "")
def test_rows_of_other_projects_are_read(row, read):
    found = triples.parse_row(json.dumps(row).encode())
    assert found[:4] == read and found.unread == []


@pytest.mark.parametrize("more, said", [
    ({"anchor": "x"}, "has both query and anchor"), ({"pos": ["x"]}, "has both positive and pos"),
    ({"negative": "x", "neg": ["y"]}, "has both negative and neg"),
    ({"neg": "x", "negative_1": "y"}, "has both neg and negative_1"),
    ({"instruction": "x", "prompt": "y"}, "has both instruction and prompt"),
    ({"hard_negs": ["x"]}, "hard_negs could hold a text"), ({"Negative": "x"}, "Negative could"),
    ({"title": "x"}, "title could"), ({"ctxs": [{"a": ["x"]}]}, "ctxs could"),
    ({"neg": [{"text": "x", "summary": "y"}]}, "neg.summary could"),
    ({"task": "Find it"}, "task could"), ({"\x1b[2J": "x"}, "'\\x1b[2J' could"),
    ({"label": 0}, "has a field label"), ({"labels": [1, 0]}, "keep the positive pairs"),
], ids=lambda value: " ".join(value) if isinstance(value, dict) else "")
def test_two_fields_for_one_thing_or_one_for_nothing_is_refused(more, said, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD + json.dumps({"query": "q", "positive": "p", **more}).encode())
    with pytest.raises(UserError) as caught:
        Triples(path)
    assert str(caught.value).startswith(f"{path}, line 3: ") and said in str(caught.value)
    assert re.search("keep one|rename it|remove it", str(caught.value))


def test_fields_that_hold_no_text_are_named_and_counted(tmp_path):
    rows = [{"query": "a", "pos": ["b", "x"], "neg": [{"docid": "7", "text": "c"}], "id": "r1",
             "pos_scores": [1.5], "type": "normal", "note": None},
            {"query": "d", "pos": ["e"], "id": "r2", "prompt": "Find it", "empty": "", "n": 3}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    make(tmp_path / "b.jsonl", 3, "b")
    data = Triples(tmp_path, "The file's")
    first, a, b, *notes = data.describe("mixed").splitlines()
    assert first == f"{tmp_path}: 5 rows, mixed; 1 of 5 rows have negatives"
    assert a.split(maxsplit=1)[1] == "a.jsonl: The file's; 1 of 2 rows have negatives"
    assert b.split(maxsplit=1)[1] == "b.jsonl: The file's; 0 of 3 rows have negatives"
    assert notes == [
        "note: a.jsonl: 1 rows have an instruction of their own, used in place of the file's",
        "note: a.jsonl: 1 rows have several positives, of which one is drawn in each step",
        "note: a.jsonl: fields not read: id (2 rows), neg.docid (1 rows), pos_scores (1 rows), "
        "type (1 rows), empty (1 rows), n (1 rows)"]
    assert [data[i].instruction for i in range(3)] == ["The file's", "Find it", "The file's"]
    assert data.instructions == {"The file's", "Find it"}
    assert data[0].others == ("x",) and data[1].own == "Find it" and data[2].own is None
    bare = Triples(tmp_path, None)
    assert bare[1].instruction == "" and not bare.instructions and bare.sha256 != data.sha256
    assert "not used (--instruction none)" in bare.notes[0]
    assert "\nb.jsonl, row 3\n" in f"\n{data.examples()}" and "'b' | 'x'" in data.examples()


def test_files_where_all_or_no_rows_have_negatives_say_so_once(tmp_path):
    assert Triples(make(tmp_path / "a.jsonl", 3, "a")).describe("mixed") == (
        f"{tmp_path}/a.jsonl: 3 rows, mixed; 0 of 3 rows have negatives\n"
        f"          3  a.jsonl: no instruction")


def test_rows_in_the_first_spelling_keep_the_sha256_by_which_runs_know_them(tmp_path):
    make(tmp_path / "a.jsonl", 2, "a")
    content = (tmp_path / "a.jsonl").read_bytes()
    expected = hashlib.sha256(content + json.dumps([[""], 2]).encode()).hexdigest()
    assert Triples(tmp_path / "a.jsonl").sha256 == expected
    other = content.replace(b'"positive"', b'"answer"')
    (tmp_path / "a.jsonl").write_bytes(other)
    unlike = hashlib.sha256(other + json.dumps([[""], 2]).encode()).hexdigest()
    assert Triples(tmp_path / "a.jsonl").sha256 != unlike


# ---------------------------------------------------------------------------------------------
# The bundled triples
# ---------------------------------------------------------------------------------------------


def texts_of(path: Path, *fields: str) -> list[str]:
    """The values of these fields over the rows of a .jsonl file."""
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [row[field] for row in rows for field in fields]


def test_the_bundled_triples_share_no_text_with_the_bundled_tasks():
    data = Triples("demo")
    assert len(data) >= 300 and data.files[0].path == DEMO_TRIPLES
    rows = [data[i] for i in range(len(data))]
    assert all(len(row.negatives) == 1 and row.instruction == "" for row in rows)
    ours = [text for row in rows for text in (row.query, row.positive, *row.negatives)]
    ours = [text.casefold() for text in ours]
    assert len(set(ours)) == len(ours) == 3 * len(data)
    demo = DEMO_TRIPLES.parent
    corpus = demo / "demo-retrieval/corpus.jsonl"
    tests = [*texts_of(demo / "demo-sts/test.jsonl", "sentence1", "sentence2"),
             *texts_of(demo / "demo-retrieval/queries.jsonl", "text"),
             *texts_of(corpus, "title", "text")]
    tests += [" ".join(pair) for pair in zip(texts_of(corpus, "title"), texts_of(corpus, "text"))]
    assert len(tests) == 2 * 325 + 76 + 3 * 98
    assert not set(ours) & {text.strip().casefold() for text in tests}

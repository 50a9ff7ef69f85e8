"""data/tasks.py and rows.py: tasks from folders in every spelling and from a hub; data/'s tables.

The hub is a server on the loopback.
"""

import csv
import gzip
import json
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, SPELLINGS, TASK_FILES, dead_url, hub_environment, hub_file, jsonl
from helpers import loopback, separated, tsv, write_task

from data.rows import records
from data.tasks import LAYOUT, TASKS, draw_training_sets, folder_task, read_task
from runtime.errors import UserError
from runtime.results import GROUPS, PAPER, PUBLISHED

DATA = ROOT / "data"
READ = {  # kind -> texts, labels and counts of TASK_FILES
    "sts": (
        {"left": ["A dog runs.", "A dog runs.", "", "A dog runs."],
         "right": ["A dog is running.", '"The moon", bright', "ümläut 漢字", "A dog runs."]},
        {"gold": [4.8, 0.25, 1, 5]},
        {"pairs": 4, "characters": 3 * 11 + 17 + 18 + 9 + 11},
    ),
    "retrieval": (
        {"queries": ["night, bird", "bird"], "documents": ["Owl hunts at night", "no title", ""]},
        {"query_ids": ["q1", "q3"], "document_ids": ["d9", "d10", "d1"], "skip_same_id": False,
         "judged": [{"d9": 1.0}, {"d10": 2.0, "d1": 0.0}]},
        {"documents": 3, "queries": 2, "judgements": 3, "characters": 15 + 26},
    ),
    "clustering": (
        {"sentences": ["red", "blue", "one, two"]}, {"labels": [["colour", "colour", "number"]]},
        {"sets": 1, "texts": 3, "characters": 15},
    ),
    "pair-classification": (
        {"left": ["a b", "a", ""], "right": ["a b", "c", "d"]}, {"labels": [1.0, 0.0, 0.0]},
        {"pairs": 3, "positives": 1, "characters": 9},
    ),
    "reranking": (
        {"queries": ["how", "why"], "documents": ["so", "thus", "no", "because"]},
        {"candidates": [[0, 1, 2], [0, 3, 2, 2]],
         "relevant": [[True, True, False], [True, False, False, False]]},
        {"queries": 2, "positives": 3, "candidates": 7},
    ),
}


EMPTY = "empty texts: 1"


def plain(value):
    """The value with lists in place of arrays, to compare it with ==."""
    return json.loads(json.dumps(value, default=lambda array: array.tolist()))


def read(folder: Path, kind: str, **about) -> tuple:
    return plain(read_task({**folder_task(folder, kind), **about}))


def refusal(folder: Path, kind: str, *fragments, **about) -> str:
    """The one line that reading the folder ends with; it has the fragments."""
    with pytest.raises(UserError) as caught:
        read(folder, kind, **about)
    message = str(caught.value)
    assert "\n" not in message
    for fragment in fragments:
        assert str(fragment) in message
    return message


# ---------------------------------------------------------------------------------------------
# What is read
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", READ)
def test_a_folder_gives_texts_labels_and_counts(kind, tmp_path):
    texts, labels, counts = READ[kind]
    found = read(write_task(tmp_path, kind), kind, expected=counts)
    notes = ["1 queries without a judged document, dropped"] if kind == "retrieval" else []
    notes += [EMPTY] * (kind in ("sts", "retrieval", "pair-classification"))
    assert found == [texts, labels, notes]


@pytest.mark.parametrize("kind, spelling", [
    (kind, spelling) for kind in TASK_FILES for spelling in SPELLINGS
    if not (kind == "reranking" and re.search("sv|columns", spelling))  # its fields are lists
    and not (kind == "clustering" and spelling == "columns in two lines")  # these are two sets
])
def test_every_spelling_of_the_files_gives_the_same_task(kind, spelling, tmp_path):
    found = read(write_task(tmp_path / "a", kind, spelling), kind)
    assert found == read(write_task(tmp_path / "b", kind), kind)
    assert kind not in READ or found[:2] == [*READ[kind][:2]]


@pytest.mark.parametrize("kind", READ)
def test_only_counts_that_differ_from_the_published_ones_are_noted(
    kind, tmp_path
):
    write_task(tmp_path, kind)
    for key, n in READ[kind][2].items():
        for other in (n - 1, n + 1000):
            *_, notes = read(tmp_path, kind, expected={**READ[kind][2], key: other})
            said = f"{n} {key}, the published task has {other:,}"
            assert [note for note in notes if "published" in note] == [said]


@pytest.mark.parametrize("name", TASKS)
def test_every_published_count_of_a_task_is_counted(name, tmp_path):
    task = {**TASKS[name], "repository": "owner/mine"}
    folder = tmp_path / "mine"
    stem = task.get("files", {}).get("test", ["test"])[0]
    write_task(folder, task["kind"])
    if stem != "test":
        (folder / stem).parent.mkdir(exist_ok=True)
        (folder / "test.jsonl").rename(folder / f"{stem}.jsonl")
    *_, notes = read_task(task, tmp_path)
    noted = [note for note in notes if "the published task has" in note]
    assert len(noted) == len(task["expected"]) and len(noted) >= 1


def test_the_bundled_tasks_match_their_counts_and_need_no_folder():
    for name in ("demo-sts", "demo-retrieval"):
        texts, labels, notes = read_task(TASKS[name], "nowhere")
        assert notes == [] and all(len(column) > 50 for column in texts.values())


def test_numbers_serve_as_ids_and_labels(tmp_path):
    rows = TASK_FILES["retrieval"]
    mine = {
        "corpus": [{**row, "_id": int(row["_id"][1:])} for row in rows["corpus"]],
        "queries": [{**row, "_id": int(row["_id"][1:])} for row in rows["queries"]],
        "qrels": [{key: int(str(value).strip("dq")) for key, value in row.items()}
                  for row in rows["qrels/test"]],
    }
    _, labels, _ = read(write_task(tmp_path / "a", "retrieval", **mine), "retrieval")
    assert labels["query_ids"] == ["1", "3"] and labels["document_ids"] == ["9", "10", "1"]
    assert labels["judged"] == [{"9": 1.0}, {"10": 2.0, "1": 0.0}]
    numbered = [{**row, "labels": i} for i, row in enumerate(TASK_FILES["clustering"]["test"])]
    _, labels, _ = read(write_task(tmp_path / "b", "clustering", test=numbered), "clustering")
    assert labels == {"labels": [["0", "1", "2"]]}


@pytest.mark.parametrize("title, text, joined", [
    ("Owl", "hunts", "Owl hunts"), (" Owl ", " hunts ", "Owl   hunts"), ("", "hunts", "hunts"),
    (None, "hunts", "hunts"), ("Owl", "", "Owl"), ("", "", ""), ("absent", "hunts", "hunts"),
])
def test_a_document_is_its_title_and_text_stripped(title, text, joined, tmp_path):
    row = {"_id": "d9", "title": title, "text": text}
    if title == "absent":
        del row["title"]
    write_task(tmp_path, "retrieval", corpus=[row, {"_id": "d1", "text": "other"}])
    texts, *_ = read(tmp_path, "retrieval")
    assert texts["documents"] == [joined, "other"]


def test_queries_without_judgements_and_the_reverse_are_dropped_and_noted(tmp_path):
    judged = [{"query-id": q, "corpus-id": "d1", "score": 1} for q in ("q2", "x", "y")]
    texts, labels, notes = read(write_task(tmp_path, "retrieval", qrels=judged), "retrieval")
    assert texts["queries"] == ["nothing"] and labels["judged"] == [{"d1": 1.0}]
    assert notes == ["2 queries without a judged document, dropped",
                     "2 judged queries without a text, dropped", EMPTY]


def test_queries_without_a_relevant_document_stay_in_the_task(tmp_path):
    """They score 0, as in MTEB."""
    judged = [*TASK_FILES["retrieval"]["qrels/test"],
              {"query-id": "q2", "corpus-id": "d1", "score": 0}]
    texts, labels, _ = read(write_task(tmp_path, "retrieval", qrels=judged), "retrieval")
    assert labels["query_ids"] == ["q1", "q2", "q3"] and len(texts["queries"]) == 3


def test_documents_with_the_querys_id_are_skipped_where_the_task_says_so(tmp_path):
    write_task(tmp_path, "retrieval")
    for skip in (True, False):
        assert read(tmp_path, "retrieval", skip_same_id=skip)[1]["skip_same_id"] == skip


def test_each_columnar_row_of_a_clustering_task_is_a_separate_set(tmp_path):
    sets = [{"sentences": ["a", "b", "c"], "labels": [0, 1, 0]}, {"sentences": [], "labels": []},
            {"sentences": ["d"], "labels": [5]}]
    write_task(tmp_path, "clustering", test=sets)
    texts, labels, notes = read(tmp_path, "clustering", expected={"sets": 2, "texts": 4})
    assert texts == {"sentences": ["a", "b", "c", "d"]}
    assert notes == ["1 sets with a single label, which score 1"]
    assert labels == {"labels": [["0", "1", "0"], ["5"]]}


def test_reranking_rows_without_positives_or_negatives_are_dropped_and_noted(tmp_path):
    rows = TASK_FILES["reranking"]["test"]
    more = [{"query": "p", "positive": [], "negative": ["x"]}, *rows,
            {"query": "n", "positive": ["y"], "negative": []}]
    texts, labels, notes = read(write_task(tmp_path, "reranking", test=more), "reranking")
    assert [texts, labels] == [*READ["reranking"][:2]]
    assert notes == ["2 queries without positives or negatives, dropped"]


def direct_draws(labels, n, draws=10):
    """MTEB's protocol word for word, on lists: the order is shuffled on and on by one seed."""
    order, drawn = list(range(len(labels))), []
    for _ in range(draws):
        np.random.RandomState(42).shuffle(order)
        first = {label: [i for i in order if labels[i] == label][:n] for label in set(labels)}
        drawn.append([i for i in order if i in first[labels[i]]])
    return drawn


@pytest.mark.parametrize("n", [1, 8, 16])
def test_training_sets_are_drawn_as_mteb_draws_them(n):
    for seed in range(20):
        random = np.random.default_rng(seed)
        labels = random.integers(0, 1 + seed % 5, random.integers(1, 120)).tolist()
        drawn = draw_training_sets(labels, n)
        assert plain(drawn) == direct_draws(labels, n)
    assert len({tuple(sorted(rows)) for rows in plain(drawn)}) > 1 or n == 16


@pytest.mark.parametrize("about", [{}, {"samples_per_label": 3}])
def test_classification_keeps_only_the_training_texts_drawn(about, tmp_path):
    texts = {row["text"]: row["label"] for row in TASK_FILES["classification"]["train"]}
    found, labels, _ = read(write_task(tmp_path, "classification"), "classification", **about)
    drawn = direct_draws([*texts.values()], about.get("samples_per_label", 8))
    kept = [text for i, text in enumerate(texts) if i in {i for rows in drawn for i in rows}]
    assert found == {"train": kept, "test": ["one", "", "three"]}
    assert labels["train_labels"] == [texts[text] for text in kept]
    assert labels["test_labels"] == ["b", "a", "b"] and len(labels["draws"]) == 10
    assert [[kept[i] for i in rows] for rows in labels["draws"]] == [
        [[*texts][i] for i in rows] for rows in drawn]
    assert len(kept) < len(texts) or not about


def test_the_counts_of_a_classification_task_include_all_texts(tmp_path):
    write_task(tmp_path, "classification")
    length = sum(len(row["text"]) for rows in TASK_FILES["classification"].values() for row in rows)
    expected = {"labels": 3, "train": 40, "test": 3, "characters": length}
    assert read(tmp_path, "classification", samples_per_label=1, expected=expected)[2] == [EMPTY]


# ---------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, role", [
    (kind, role) for kind, files in TASK_FILES.items() for role in files
])
def test_a_missing_file_is_named_with_the_layout(kind, role, tmp_path):
    write_task(tmp_path, kind)
    (tmp_path / f"{role}.jsonl").unlink()
    refusal(tmp_path, kind, f"{tmp_path}: has no file {role} (it has ", LAYOUT[kind])


def test_a_missing_folder_is_named_with_the_layout_and_data_dir(tmp_path):
    with pytest.raises(UserError, match=re.escape(f"{tmp_path}/sickr-sts: no such folder")) as e:
        read_task(TASKS["sickr"], tmp_path)
    assert LAYOUT["sts"] in str(e.value) and "--data-dir" in str(e.value)
    with pytest.raises(UserError, match=f"--task-dir {tmp_path}/none: no such folder"):
        folder_task(tmp_path / "none", "sts")
    assert list(tmp_path.iterdir()) == []


def test_parquet_is_refused_with_a_remedy(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/test-00000-of-00001.parquet").write_bytes(b"PAR1")
    message = refusal(tmp_path, "sts", "parquet is not read", "pandas.read_parquet", "test.jsonl")
    assert message.startswith(str(tmp_path / "data/test-00000-of-00001.parquet"))


def test_parquet_beside_a_readable_file_is_ignored(tmp_path):
    (write_task(tmp_path, "sts") / "test.parquet").write_bytes(b"PAR1")
    assert read(tmp_path, "sts")[0] == READ["sts"][0]


@pytest.mark.parametrize("spelling, place", [
    ("lines", "line 2"), ("zipped lines", "line 2"), ("array", "row 2"),
    ("lines named json", "line 2"),
])
@pytest.mark.parametrize("kind, role, field", [
    (kind, role, field) for kind, files in TASK_FILES.items() for role, rows in files.items()
    for field in rows[0] if field != "title"
])
def test_a_row_that_lacks_a_field_is_named_with_file_and_place(
    kind, role, field, spelling, place, tmp_path
):
    first, second, *others = TASK_FILES[kind][role]
    lacks = {key: value for key, value in second.items() if key != field}
    rows = [first, lacks, *others]
    write_task(tmp_path, kind, spelling, **{role.replace("qrels/test", "qrels"): rows})
    path = tmp_path / (role + SPELLINGS[spelling][0])
    fields = ", ".join(first)
    refusal(tmp_path, kind, f"{path}, {place}: has no field {field}; a row needs {fields}")


@pytest.mark.parametrize("name, content", [
    ("test.csv", b"sentence1,sentence2,score\na,b,1\na,b\n"),
    ("test.csv", b'sentence1,sentence2,score\n"a\nb",b,1\na,b\n'),
    ("test.tsv", b"sentence1\tsentence2\tscore\r\na\tb\t1\r\na\tb\r\n"),
])
def test_a_short_row_of_a_table_is_named_with_its_line(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    line = content.count(b"\n")
    refusal(tmp_path, "sts", f"{tmp_path / name}, line {line}: has no field score")


@pytest.mark.parametrize("line", [b'["a", "b", 3]\n', b"null\n", b"3\n", b'"sentence1"\n'])
def test_a_line_that_is_not_an_object_has_no_field(line, tmp_path):
    write_task(tmp_path, "sts")
    path = tmp_path / "test.jsonl"
    path.write_bytes(path.read_bytes() + line)
    refusal(tmp_path, "sts", f"{path}, line 5: has no field sentence1; a row needs sentence1")


@pytest.mark.parametrize("name, line", [
    ("test.jsonl", b"{'sentence1': 1}\n"), ("test.jsonl", b'{"sentence1": "a", "sen\n'),
    ("test.json", b'{"sentence1": "a", "sen\n'), ("test.jsonl", b"[" * 100_000 + b"\n"),
])
def test_a_line_that_is_not_json_is_named(name, line, tmp_path):
    (tmp_path / name).write_bytes(jsonl(TASK_FILES["sts"]["test"][:1]) + b"\n" + line)
    refusal(tmp_path, "sts", f"{tmp_path / name}, line 3: not JSON", "fix the line")


@pytest.mark.parametrize("content, fragment", [
    (b"", "no rows"), (b"\n\n", "no rows"), (b"\xff\xfe\n", "after line 0: not UTF-16"),
    (gzip.compress(jsonl(TASK_FILES["sts"]["test"] * 999))[:-9], "cannot be read"),
], ids=["empty", "blank", "utf-16", "cut off"])
def test_a_file_without_readable_rows_is_refused(content, fragment, tmp_path):
    (tmp_path / "test.jsonl").write_bytes(content)
    message = refusal(tmp_path, "sts", fragment)
    assert message.startswith(f"{tmp_path / 'test.jsonl'}")


@pytest.mark.parametrize("content", [b"sentence1,sentence2,score\n", b"", b"[]", b"{}"])
def test_a_table_or_array_without_rows_is_refused(content, tmp_path):
    path = tmp_path / ("test.json" if content[:1] in (b"[", b"{") else "test.csv")
    path.write_bytes(content)
    refusal(tmp_path, "sts", path, "has no field" if content == b"{}" else "no rows")


def test_a_field_of_any_length_is_read_and_lines_are_counted_as_they_stand(tmp_path):
    """Python's csv reader has a limit of 131,072 characters for all of the interpreter."""
    rows = [{"sentence1": "x" * 200_000, "sentence2": 'b\n"c"\n', "score": 1},
            {"sentence1": "y", "sentence2": "d", "score": 2}]
    for name, content in (("test.csv", separated(rows)),
                          ("test.tsv", separated(rows, delimiter="\t"))):
        (tmp_path / name).write_bytes(content)
        texts, *_ = read(tmp_path, "sts")
        assert texts["left"] == ["x" * 200_000, "y"] and texts["right"] == ['b\n"c"\n', "d"]
        (tmp_path / name).write_bytes(content + b"odd\r\n")  # rows 2-4, 5, 6
        refusal(tmp_path, "sts", f"{tmp_path / name}, line 6: has no field sentence2")
        (tmp_path / name).unlink()
    assert csv.field_size_limit() == 131072


HEADER = b"sentence1,sentence2,score\n"


@pytest.mark.parametrize("content, said", [
    (HEADER + b"a,b,1,more\n", "line 2: has 4 fields, the header 3"),
    (b"sentence1,sentence1,sentence2,score\na,x,b,1\n", "line 1: the header has sentence1 twice"),
    (b"Sentence1, sentence2,score\na,b,1\n",
     "line 1: has no sentence1, sentence2 (it has Sentence1, ' sentence2', score)"),
    (b"sentence1;sentence2;score\na;b;1\n", "(it has sentence1;sentence2;score); the first line"),
    (HEADER + b'"a,b,1\nc,d,2\n', "line 2: the quotes at"),
    (HEADER + b'c,d,2\n"a"x,b,1\n', "line 3: the quotes at"),
    (HEADER + b'a, "b",1\n', "line 2: the quotes at"), (HEADER + b"a\0,b,1\n", "line 2: has a NUL"),
    (HEADER.replace(b"\n", b"\r") + b"a,b,1\r", "its lines end in CR alone"),
])
def test_a_table_that_once_lost_or_misread_a_field_is_refused(content, said, tmp_path):
    (tmp_path / "test.csv").write_bytes(content)
    refusal(tmp_path, "sts", tmp_path / "test.csv", said)


@pytest.mark.parametrize("content", [
    b"\xef\xbb\xbf" + HEADER + b'5" pipe,"say ""b""",1\n,,2\n',
    HEADER.replace(b"\n", b"\r\r\n") + b'5" pipe,"say ""b""",1\r\r\n\r\r\n,,2\r\r\n',
], ids=["byte order mark", "CR CR LF"])
def test_a_table_as_spreadsheets_leave_it_is_read(content, tmp_path):
    (tmp_path / "test.csv").write_bytes(content)
    texts, *_ = read(tmp_path, "sts")
    assert texts == {"left": ['5" pipe', ""], "right": ['say "b"', ""]}


CELLS = ["a", "", '"', '""', 'say "hi"', '"quoted"', '"quoted" and', 'and "quoted"', '"a, b"',
         "t\tb", "new\nline", '""x""', '"q', 'q"', ' "x"', '漢 "字"', "7"]


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC, None])
def test_a_tsv_with_quotes_is_read_right_or_refused(quoting, tmp_path):
    """None: raw, as MTEB's are; a text in it is never `"x ""y"" z"`, which a writer leaves."""
    draw, counts, path = random.Random(0), Counter(), tmp_path / "a.tsv"
    for _ in range(500):
        table = [["one", "two"], *([draw.choice(CELLS), draw.choice(CELLS)] for _ in range(3))]
        if quoting is None:
            table = [[re.sub(r"\s", " ", cell) for cell in row] for row in table]
            path.write_text("".join("\t".join(row) + "\n" for row in table))
        else:
            with open(path, "w", newline="") as file:
                csv.writer(file, delimiter="\t", quoting=quoting).writerows(table)
        try:
            assert [list(row.values()) for _, row in records(path)] == table[1:]
            counts["read"] += 1
        except UserError as error:
            assert "write the file as .csv or .jsonl" in str(error)
            counts["refused"] += 1
    assert counts["read"] > (300 if quoting is None else 490)


def test_fields_that_are_not_read_are_noted_but_not_those_of_mtebs_own_files(tmp_path):
    rows = [{**row, "split": "test", "genre": "news", "lang": "en", "Title": "x", "none": None}
            for row in TASK_FILES["sts"]["test"]]
    assert read(write_task(tmp_path, "sts", test=rows), "sts")[2] == [
        "test.jsonl: fields not read: Title (4 rows)", EMPTY]


@pytest.mark.parametrize("kind, role", [(kind, role) for kind, files in TASK_FILES.items()
                                        for role in files])
def test_every_file_of_a_task_names_what_is_not_read(kind, role, tmp_path):
    rows = [{**row, "planted": "a text"} for row in TASK_FILES[kind][role]]
    write_task(tmp_path, kind, **{role.replace("qrels/test", "qrels"): rows})
    (note,) = [note for note in read(tmp_path, kind)[2] if "planted" in note]
    assert note == f"{role.rpartition('/')[2]}.jsonl: fields not read: planted ({len(rows)} rows)"


@pytest.mark.parametrize("kind, role, field, value", [
    ("sts", "test", "sentence1", None), ("sts", "test", "sentence1", ["a"]),
    ("sts", "test", "sentence2", 5), ("sts", "test", "sentence2", "half \ud83d"),
    ("sts", "test", "score", "high"), ("sts", "test", "score", None), ("sts", "test", "score", ""),
    ("sts", "test", "score", [1]), ("sts", "test", "score", True), ("sts", "test", "score", {}),
    ("sts", "test", "score", float("nan")), ("sts", "test", "score", float("-inf")),
    ("sts", "test", "score", "nan"), ("sts", "test", "score", 10**400),
    ("retrieval", "corpus", "_id", None), ("retrieval", "corpus", "_id", 1.5),
    ("retrieval", "corpus", "title", 5), ("retrieval", "corpus", "text", None),
    ("retrieval", "queries", "_id", True), ("retrieval", "queries", "text", {"a": "b"}),
    ("retrieval", "qrels/test", "query-id", None), ("retrieval", "qrels/test", "corpus-id", 0.5),
    ("retrieval", "qrels/test", "score", "relevant"),
    ("classification", "train", "text", None), ("classification", "train", "label", None),
    ("classification", "test", "label", 0.5), ("classification", "test", "label", False),
    ("clustering", "test", "sentences", 1), ("clustering", "test", "labels", None),
    ("pair-classification", "test", "sent2", None), ("pair-classification", "test", "labels", "no"),
    ("reranking", "test", "query", ["a"]), ("reranking", "test", "positive", "text"),
    ("reranking", "test", "negative", [1]), ("reranking", "test", "positive", None),
], ids=lambda value: repr(value)[:20])
def test_a_value_of_the_wrong_kind_is_named_with_field_and_line(
    kind, role, field, value, tmp_path
):
    first, second, *others = TASK_FILES[kind][role]
    rows = [first, {**second, field: value}, *others]
    write_task(tmp_path, kind, **{role.replace("qrels/test", "qrels"): rows})
    refusal(tmp_path, kind, f"{tmp_path / role}.jsonl, line 2: {field} is ", "a row needs")


def test_columns_of_different_lengths_are_refused(tmp_path):
    write_task(tmp_path, "clustering", test=[{"sentences": ["a", "b"], "labels": [1]}])
    refusal(tmp_path, "clustering", "test.jsonl, line 1: its lists have different lengths")


@pytest.mark.parametrize("role", ["corpus", "queries"])
def test_an_id_that_occurs_twice_is_refused(role, tmp_path):
    rows = TASK_FILES["retrieval"][role]
    write_task(tmp_path, "retrieval", **{role: [*rows, {**rows[1], "text": "other"}]})
    path, name = tmp_path / f"{role}.jsonl", rows[1]["_id"]
    refusal(tmp_path, "retrieval", f"{path}: the id '{name}' occurs twice")


@pytest.mark.parametrize("grade", [2, 0])
def test_a_pair_that_is_judged_twice_is_refused(grade, tmp_path):
    rows = TASK_FILES["retrieval"]["qrels/test"]
    write_task(tmp_path, "retrieval", qrels=[*rows, {**rows[0], "score": grade}])
    refusal(tmp_path, "retrieval", f"{tmp_path / 'qrels/test.jsonl'}: query 'q3' and document "
                                   f"'d10' are judged twice")


def test_an_empty_corpus_is_refused(tmp_path):
    (write_task(tmp_path, "retrieval") / "corpus.jsonl").write_bytes(b"")
    refusal(tmp_path, "retrieval", f"{tmp_path / 'corpus.jsonl'}: no rows")


def test_judgements_of_other_queries_are_refused(tmp_path):
    write_task(tmp_path, "retrieval", qrels=[{"query-id": "x", "corpus-id": "d1", "score": 1}])
    refusal(tmp_path, "retrieval", f"{tmp_path / 'qrels/test.jsonl'}: judges no query of the task")


def qrels(*rows) -> list[dict]:
    return [dict(zip(("query-id", "corpus-id", "score"), row)) for row in rows]


@pytest.mark.parametrize("judged, said", [
    (qrels(("q1", "x", 1), ("q2", "y", 1)), "judges no document of the corpus: 'x', ... are not"),
    (qrels(("q1", "d9 ", 1)), "do the files belong together?"),
    (qrels(("q1", "d9", 0), ("q2", "d1", -1)), "no query has a relevant document in the corpus"),
    (qrels(("q1", "d9", 0), ("q1", "x", 1)), "every score would be 0"),
])
def test_judgements_of_nothing_are_refused(judged, said, tmp_path):
    write_task(tmp_path, "retrieval", qrels=judged)
    refusal(tmp_path, "retrieval", f"{tmp_path / 'qrels/test.jsonl'}: ", said)


def test_judgements_that_cannot_count_are_counted(tmp_path):
    judged = qrels(("q1", "d9", 1), ("q1", "x", 1), ("q2", "y", 2), ("q3", "d1", 0))
    *_, notes = read(write_task(tmp_path, "retrieval", qrels=judged), "retrieval")
    assert notes == ["2 of 4 judgements name no document of the corpus",
                     "2 queries without a relevant document in the corpus, which score 0", EMPTY]
    same = qrels(("q1", "q1", 1))
    corpus = [{"_id": "q1", "text": "itself"}]
    write_task(tmp_path, "retrieval", qrels=same, corpus=corpus)
    assert read(tmp_path, "retrieval")[2][-1].endswith("dropped")
    refusal(tmp_path, "retrieval", "every score would be 0", skip_same_id=True)


@pytest.mark.parametrize("kind, role, changes, said", [
    ("sts", "test", {"score": 3}, "all 4 scores are 3"),
    ("classification", "train", {"label": "a"}, "all 40 rows have the label 'a'"),
    ("clustering", "test", {"labels": "colour"}, "each set has a single label"),
])
def test_data_of_which_every_score_would_be_the_same_are_refused(
    kind, role, changes, said, tmp_path
):
    rows = [{**row, **changes} for row in TASK_FILES[kind][role]]
    more = {"test": [{"text": "t", "label": "a"}]} if kind == "classification" else {}
    write_task(tmp_path, kind, **{role: rows, **more})
    refusal(tmp_path, kind, tmp_path / f"{role}.jsonl", said)


def test_a_label_missing_from_the_training_file_is_refused(tmp_path):
    rows = [*TASK_FILES["classification"]["test"], {"text": "new", "label": "z"}]
    write_task(tmp_path, "classification", test=rows)
    refusal(tmp_path, "classification", f"{tmp_path / 'test.jsonl'}: has the label 'z', which")


@pytest.mark.parametrize("labels, said", [
    ([0, 1, 2], "0, 1, 2"), ([0, 0, 0], "it has 0"), ([1, 1, 1], "it has 1"), ([-1, 0, 1], "-1"),
    ([0.5, 1, 0], "0, 0.5, 1"),
])
def test_pair_labels_other_than_0_and_1_are_refused(labels, said, tmp_path):
    pairs = TASK_FILES["pair-classification"]["test"]
    rows = [{**row, "labels": label} for row, label in zip(pairs, labels)]
    write_task(tmp_path, "pair-classification", test=rows)
    refusal(tmp_path, "pair-classification", tmp_path / "test.jsonl", "must be 0 and 1", said)


def test_reranking_without_a_usable_row_is_refused(tmp_path):
    rows = [{"query": "q", "positive": [], "negative": ["a"]}]
    write_task(tmp_path, "reranking", test=rows)
    refusal(tmp_path, "reranking", tmp_path / "test.jsonl", "no query has both positive and negat")


# ---------------------------------------------------------------------------------------------
# Tasks from the hub
# ---------------------------------------------------------------------------------------------


def hub_answers(broken: bool):
    """The hub with sts17 whole, sickr under a second name, scifact in four files of which one
    breaks off if `broken`, no file of arguana, and no such revision of stsbenchmark."""
    answers = {}

    def add(task: str, name: str, answer):
        about = TASKS[task]
        path = f"/datasets/{about['repository']}/resolve/{about['revision']}/{name}"
        answers[path] = answer

    def good(task: str, content: bytes):
        return hub_file(content, TASKS[task]["revision"])

    sts = jsonl(TASK_FILES["sts"]["test"])
    add("sts17", "test/en-en.jsonl.gz", good("sts17", gzip.compress(sts)))
    add("sts17", "test.jsonl", good("sts17", b"not this one"))
    add("sickr", "test.jsonl.gz", good("sickr", gzip.compress(sts)))
    for ending in (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".tsv", ".tsv.gz", ".csv"):
        add("stsbenchmark", f"test{ending}", (404, b"", {"X-Error-Code": "RevisionNotFound"}))
    files = TASK_FILES["retrieval"]
    add("scifact", "queries.jsonl", good("scifact", jsonl(files["queries"])))
    add("scifact", "qrels/test.tsv", good("scifact", tsv(files["qrels/test"])))
    status, corpus, headers = good("scifact", jsonl(files["corpus"]))
    if broken:
        headers, corpus = {**headers, "Content-Length": str(len(corpus))}, corpus[:40]
    add("scifact", "corpus.jsonl", (status, corpus, headers))
    return answers


# The hub's client sleeps for 23 seconds in all before it gives up: not here.
COMMANDS = """
import json, sys, time
time.sleep = lambda _: None
import evaluate
for task in sys.argv[2:]:
    flags = ["--model", sys.argv[1], "--device", "cpu", "--threads", "1", "--results", "results"]
    print(f"exit {evaluate.main([*flags, '--task', task])}", file=sys.stderr)
"""


def commands(folder: Path, endpoint: str, tiny: Path, *tasks: str) -> list[tuple[str, list[str]]]:
    """For each task, exit code and error lines of evaluate.py in one process with this hub."""
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, str(tiny), *tasks], capture_output=True, text=True,
        env=hub_environment(folder, endpoint), cwd=folder, timeout=100,
    )
    assert done.returncode == 0, done.stderr
    parts = re.split(r"exit (\d)", done.stderr)
    said = [[line for line in re.split("[\r\n]+", part) if "error:" in line] for part in parts[::2]]
    assert "Traceback" not in done.stderr and len(parts) == 2 * len(tasks) + 1
    return list(zip(parts[1::2], said))


def results(folder: Path) -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("results/*/*.json")}


@pytest.fixture(scope="module")
def hub_runs(tiny, tmp_path_factory):
    """Three processes: a hub whose download breaks off, no hub, and a hub in order again."""
    folder, runs = tmp_path_factory.mktemp("hub"), {}
    with loopback(hub_answers(broken=True)) as server:
        tasks = ["sts17", "sickr", "stsbenchmark", "arguana", "scifact"]
        runs["first"] = dict(zip(tasks, commands(folder, server.url, tiny, *tasks)))
        fetched = [r.partition("/resolve/")[2] for r in server.requests if r.startswith("GET")]
    first = results(folder)
    for path in folder.glob("results/*/*.json"):
        path.unlink()
    tasks = ["sts17", "sickr", "scifact"]
    runs["no hub"] = dict(zip(tasks, commands(folder, dead_url(), tiny, *tasks)))
    cached = results(folder)
    with loopback(hub_answers(broken=False)) as server:
        runs["repaired"] = dict(zip(["scifact"], commands(folder, server.url, tiny, "scifact")))
    return runs, fetched, first, cached, results(folder)


def test_the_first_name_that_a_repository_has_is_fetched_at_the_pinned_revision(hub_runs):
    runs, fetched, first, *_ = hub_runs
    assert runs["first"]["sts17"] == runs["first"]["sickr"] == ("0", [])
    for task, name in (("sts17", "test/en-en.jsonl.gz"), ("sickr", "test.jsonl.gz")):
        revision = TASKS[task]["revision"]
        assert fetched.count(f"{revision}/{name}") == 1
        result = first[TASKS[task]["name"]]
        assert result["dataset_revision"] == revision
        assert result["settings"]["data"] == f"{TASKS[task]['repository']} @ {revision}"
    assert not any("test.jsonl" == name.partition("/")[2] for name in fetched)
    assert any(note.startswith("4 pairs, the published task has 250") for note in
               first["STS17"]["notes"])


@pytest.mark.parametrize("run, task, reason", [
    ("first", "stsbenchmark", "RevisionNotFoundError"),
    ("first", "arguana", "it has no file corpus that can be read"),
    ("first", "scifact", "received 40 bytes"), ("no hub", "scifact", "no connection to the hub"),
])
def test_what_the_hub_cannot_provide_is_one_line_with_a_workaround(
    run, task, reason, hub_runs
):
    code, lines = hub_runs[0][run][task]
    repository, revision = TASKS[task]["repository"], TASKS[task]["revision"][:8]
    assert code == "2" and len(lines) == 1
    for fragment in [f"error: task {TASKS[task]['name']}", f"{repository} at {revision}", reason,
                     "cannot be fetched (", "--data-dir FOLDER"]:
        assert fragment in lines[0]


def test_an_interrupted_download_is_not_used_and_a_later_one_is(hub_runs):
    runs, _, first, cached, last = hub_runs
    assert "SciFact" not in first and "SciFact" not in cached
    assert runs["repaired"]["scifact"] == ("0", []) and 0 < len(last["SciFact"]["scores"])
    assert "1 queries without a judged document, dropped" in last["SciFact"]["notes"]


def test_what_was_fetched_once_needs_no_hub(hub_runs):
    runs, _, first, cached, _ = hub_runs
    assert runs["no hub"]["sts17"] == runs["no hub"]["sickr"] == ("0", [])
    for name in ("STS17", "SICK-R"):
        assert cached[name]["scores"] == first[name]["scores"]


# ---------------------------------------------------------------------------------------------
# The tables of data/
# ---------------------------------------------------------------------------------------------


def test_all_14_tasks_have_what_fetching_needs():
    assert len(PAPER) == 14 == len(set(PAPER)) and set(PAPER) < set(TASKS)
    for key in PAPER:
        task = TASKS[key]
        assert task["name"] and task["kind"] in LAYOUT and task["group"] in GROUPS
        assert re.fullmatch(r"mteb/[\w-]+", task["repository"])
        assert re.fullmatch(r"[0-9a-f]{40}", task["revision"])
        assert task["expected"] and all(n > 0 for n in task["expected"].values())
    assert len({TASKS[key]["revision"] for key in PAPER}) == 14
    assert [len(tasks) for tasks in GROUPS.values()] == [3, 3, 3, 3, 2]
    assert sorted(task for tasks in GROUPS.values() for task in tasks) == sorted(PAPER)


def test_every_published_row_has_14_numbers_or_gaps():
    rows = PUBLISHED["rows"]
    assert len(rows) >= 20 and all(len(row) == 14 for row in rows.values())
    for name, row in rows.items():
        assert all(value is None or 0 < value < 100 for value in row)
        assert (None in row) == (name == "RepLLaMA")


@pytest.mark.parametrize("name, mean", [
    ("LT", 33.05), ("WMP", 40.46), ("EE", 46.54), ("PromptEOL", 43.55), ("MetaEOL", 50.83),
    ("Llama2Vec", 43.54), ("LLM2Vec", 46.87), ("LLM2Comp RC", 35.79), ("LLM2Comp NLL", 46.22),
    ("LLM2Comp KL", 52.49), ("LLM2Vec + UCL", 57.82), ("LLM2Comp RC + UCL", 45.41),
    ("LLM2Comp NLL + UCL", 56.84), ("LLM2Comp KL + UCL", 58.51), ("LLM2Vec + SCL", 66.11),
    ("LLM2Comp RC + SCL", 65.49), ("LLM2Comp NLL + SCL", 65.90), ("LLM2Comp KL + SCL", 66.78),
    ("all-MiniLM-L6-v2", 61.29),
])
def test_the_published_rows_have_the_published_means(name, mean):
    assert np.mean(PUBLISHED["rows"][name]) == pytest.approx(mean, abs=0.02)


def test_each_of_the_14_tasks_has_an_instruction():
    instructions = json.loads((DATA / "instructions.json").read_text())["instructions"]
    ours = {"stsbenchmark-dev", "demo-sts", "demo-retrieval"}
    assert set(instructions) == set(PAPER) | ours == set(TASKS)
    assert all(text.endswith(":") and len(text) > 20 for text in instructions.values())


def test_the_prompts_are_those_of_the_paper():
    methods = json.loads((DATA / "prompts.json").read_text())
    assert {method["paper"] for method in methods.values()} - {None} <= set(PUBLISHED["rows"])
    prompts = methods["metaeol"]["prompts"]
    assert len(set(prompts)) == 8 and all(p.count("{text}") == 1 for p in prompts)
    assert all(p.endswith('in one word:"') for p in [*prompts, *methods["prompteol"]["prompts"]])
    assert methods["echo"]["prompts"][0].count("{text}") == 2
    assert methods["echo"]["prompts"][0].endswith("{text}")

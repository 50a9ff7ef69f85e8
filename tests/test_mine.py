"""mine.py: the search against a full sort, the rows against a plain loop over single texts,
interruptions, stage 3 on what was mined, and what is refused."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TEXT, error_line, files, metrics, names, trained_encoder, words
from helpers import write_encoder, write_triples

import embed
import mine
from data.batches import TripleRows
from data.tokenizer import INSTRUCTED
from data.triples import Triples
from measures import pack_scores, unpack_scores
from model import Encoder, EncoderConfig, load_encoder, save_encoder

# ---------------------------------------------------------------------------------------------
# The search
# ---------------------------------------------------------------------------------------------


def by_sorting(queries, corpus, limits, taken, k):
    """Places, cosines and counts of `search`, one query at a time, from a sort of all cosines."""
    table = (queries.astype(np.float64) @ corpus.astype(np.float64).T).astype(np.float32)
    places, cosines, above = [], [], []
    for i, row in enumerate(table):
        free = [j for j in range(len(corpus)) if [i, j] not in taken.tolist()]
        best = sorted((j for j in free if row[j] < limits[i]), key=lambda j: (-row[j], j))[:k]
        places.append(best)
        cosines.append([row[j] for j in best])
        above.append(sum(row[j] >= limits[i] for j in free))
    return places, cosines, above


def random_search(seed, whole):
    """Queries, corpus, limits and taken pairs; whole numbers, so that there are many ties, or
    unit rows. Some limits leave nothing, some take nothing away."""
    draw = np.random.default_rng(seed)
    queries, corpus = (draw.integers(-2, 3, (n, 5)) if whole else draw.normal(size=(n, 5))
                       for n in (17, 60))
    if not whole:
        queries, corpus = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, corpus))
    limits = draw.choice([-99, -0.4, 0.0, 0.3, 2.0, np.inf], len(queries))
    taken = np.array([(i, j) for i in range(len(queries)) for j in draw.integers(0, 70, 3)])
    return *(x.astype(np.float32) for x in (queries, corpus, limits)), taken


@pytest.mark.parametrize("whole", [True, False], ids=["ties", "unit rows"])
@pytest.mark.parametrize("k", [1, 4, 60])
@pytest.mark.parametrize("block", [1, 7, 59, 60, 1000])
def test_the_search_is_a_full_sort_whatever_the_blocks(block, k, whole):
    queries, corpus, limits, taken = random_search(k, whole)
    parts = (corpus[i : i + block] for i in range(0, len(corpus), block))
    places, cosines, above = mine.search(queries, parts, limits, taken, k)
    expected = by_sorting(queries, corpus, limits, taken, k)
    there = cosines > -np.inf
    assert [list(row[ok]) for row, ok in zip(places, there)] == expected[0]
    assert [list(row[ok]) for row, ok in zip(cosines, there)] == expected[1]
    assert list(above) == expected[2] and places.shape == cosines.shape == (17, k)
    assert {0, k} <= set(there.sum(axis=1)) or k == 60


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_search_on_cuda_is_that_on_the_cpu():
    queries, corpus, limits, taken = random_search(0, True)
    for left, right in zip(mine.search(queries, [corpus], limits, taken, 4),
                           mine.search(queries, [corpus], limits, taken, 4, "cuda")):
        assert left.tolist() == right.tolist()


def test_scores_and_places_survive_being_packed():
    scores = torch.tensor([[0.5, -0.0, 0.0, -1.5, -torch.inf, 1e-30, -1e-30, 3e38]])
    packed = pack_scores(scores, 2**31)
    places, found = unpack_scores(packed)
    assert places.tolist() == [list(range(2**31, 2**31 + 8))] and torch.equal(found, scores)
    order = packed[0].argsort(descending=True).tolist()
    assert order == [7, 0, 5, 1, 2, 6, 3, 4]  # -0.0 and 0.0 are equal: by place


# ---------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder(tiny, tmp_path_factory) -> Path:
    """An encoder folder, not trained with instructions; read only. The words before each text make
    cosines high, as a collapsed encoder's are: margins have something to keep out."""
    return write_encoder(tiny, tmp_path_factory.mktemp("mine") / "encoder", max_tokens=200,
                         template=f"{' '.join(TEXT.split()[:10])} {{text}}")


@pytest.fixture(scope="module")
def instructed(tiny, tmp_path_factory) -> Path:
    """An encoder folder, trained with instructions and a template for documents; read only."""
    return write_encoder(tiny, tmp_path_factory.mktemp("mine") / "instructed", max_tokens=150,
                         template=INSTRUCTED, document_template="passage: {text}")


def set_blocks(monkeypatch, size: int):
    """Blocks of so many texts, documents and queries."""
    for name in ("BLOCK", "QUERIES"):
        monkeypatch.setattr(mine, name, size)


def write_rows(path: Path, rows: list[dict]) -> Path:
    """A .jsonl of the rows."""
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_lines(path: Path) -> list[dict]:
    """The rows of a .jsonl."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def mined(model: Path, triples: Path, out: Path, *flags) -> int:
    """mine.py on one thread of the CPU; returns the exit code."""
    return mine.main([str(word) for word in (
        "--model", model, "--triples", triples, "--out", out, "--device", "cpu", "--threads", 1,
        *flags)])


@pytest.fixture
def rows(tmp_path) -> Path:
    """Rows of which some share a query, a positive or a text, in one file."""
    texts = words(60, 5)
    found = [{"query": texts[i], "positive": texts[20 + i], "negative": texts[40 + i]}
             for i in range(20)]
    found[3]["query"] = found[4]["query"] = found[5]["query"]  # three positives of one query
    found[7]["positive"] = found[8]["positive"]
    found[9]["negative"] = [found[9]["query"], found[10]["positive"], "  spaces around  "]
    found[11]["query"] = found[12]["positive"]
    return write_rows(tmp_path / "rows.jsonl", found)


def test_ctrl_c_is_a_line_and_the_same_command_continues(
    encoder, rows, tmp_path, monkeypatch, capsys
):
    set_blocks(monkeypatch, 7)
    assert mined(encoder, rows, tmp_path / "whole.jsonl") == 0
    append = mine.Embeddings.append
    with monkeypatch.context() as patch:
        patch.setattr(mine.Embeddings, "append", lambda *arguments: (
            append(*arguments), signal.raise_signal(signal.SIGINT)))
        assert mined(encoder, rows, tmp_path / "out.jsonl") == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "interrupted; the same command goes on where it was"
    assert json.loads((tmp_path / "out.npy.json").read_text())["done"] == 7
    assert mined(encoder, rows, tmp_path / "out.jsonl") == 0
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def by_loop(folder: Path, triples: Path, corpus: list[str], k: int, margin: float) -> list[dict]:
    """What mine.py has to write, each text encoded alone and each pair of texts looked at."""
    encoder, data = load_encoder(folder), Triples(triples)
    data = [data[i] for i in range(len(data))]
    unique = list(dict.fromkeys(corpus))

    def vector(text):
        x = encoder.encode([text])[0].astype(np.float64)
        return x / np.linalg.norm(x)

    embedded, rows = {text: vector(text) for text in unique}, []
    for row in data:
        query, positives = vector(row.query), {r.positive for r in data if r.query == row.query}
        own, found, above = query @ vector(row.positive), [], 0
        for text in unique:
            if text in positives or text == row.query:
                continue
            if margin and query @ embedded[text] >= margin * own:
                above += 1
            else:
                found.append((-(query @ embedded[text]), unique.index(text), text))
        best = sorted(found)[:k]
        rows.append({"query": row.query, "positive": row.positive,
                     "negative": [text for *_, text in best],
                     "cosines": [own, *(-c for c, *_ in best)], "above": above})
    return rows


def texts_of(triples: Path) -> list[str]:
    """All positives and negatives of the rows, in order."""
    data = Triples(triples)
    return [text for i in range(len(data)) for text in (data[i].positive, *data[i].negatives)]


def assert_rows(found: list[dict], expected: list[dict]):
    """Equal rows, cosines to the precision of a float32 sum."""
    for row, wanted in zip(found, expected, strict=True):
        assert row["cosines"] == pytest.approx(wanted["cosines"], abs=2e-5)
        assert row | {"cosines": 0} == wanted | {"cosines": 0}


@pytest.mark.parametrize("flags, k, margin", [
    ([], 1, 0.95), (["--negatives", 3], 3, 0.95), (["--negatives", 3, "--margin", 0.7], 3, 0.7),
    (["--negatives", 4, "--margin", 0], 4, 0), (["--negatives", 2, "--margin", 1.2], 2, 1.2),
], ids=str)
def test_the_rows_are_those_of_a_plain_loop(flags, k, margin, encoder, rows, tmp_path,
                                            monkeypatch, capsys):
    set_blocks(monkeypatch, 7)
    assert mined(encoder, rows, tmp_path / "out.jsonl", *flags) == 0
    found = read_lines(tmp_path / "out.jsonl")
    expected = by_loop(encoder, rows, texts_of(rows), k, margin)
    assert_rows(found, expected)
    printed, n = capsys.readouterr().out, [len(row["negative"]) for row in expected]
    negatives = [c for row in expected for c in row["cosines"][1:]]
    assert (f"mined  {n.count(k)} of 20 rows have {k} negatives, {n.count(0)} have none\n"
            f"cosine {np.mean([row['cosines'][0] for row in expected]):.3f} to the positives, "
            f"{np.mean(negatives):.3f} to the negatives\n" in printed)
    nearest = by_loop(encoder, rows, texts_of(rows), k, 0)  # the nearest that the margin took
    kept = [set(a["negative"]) & set(b["negative"]) for a, b in zip(nearest, expected)]
    removed = 1 - sum(map(len, kept)) / (20 * k)
    assert f"margin {margin:g}, removed {removed:.1%} of the {k} nearest\n" in printed
    assert names(tmp_path) == ["out.jsonl", "out.npy", "out.npy.json", "rows.jsonl"]


def test_the_margin_leaves_some_rows_without_negatives_and_takes_nothing_when_off(encoder, rows):
    """Else the test above would not see what it is for."""
    texts = texts_of(rows)
    assert {len(row["negative"]) for row in by_loop(encoder, rows, texts, 3, 0.7)} == {0, 1, 2, 3}
    assert {row["above"] for row in by_loop(encoder, rows, texts, 1, 0)} == {0}


@pytest.mark.parametrize("ending", [".jsonl", ".tsv"])
def test_a_corpus_has_titles_and_need_not_have_the_positives(
    ending, encoder, rows, tmp_path, capsys
):
    texts, own = words(30, 6), texts_of(rows)
    corpus = [{"_id": str(i), "title": f"title {i}" if i % 2 else "", "text": text}
              for i, text in enumerate([*texts, own[0], texts[0]])]
    path = tmp_path / f"corpus{ending}"
    if ending == ".jsonl":
        write_rows(path, [*corpus, {"text": " "}, {"title": None, "text": texts[2]}])
    else:
        path.write_text("\n".join("\t".join(row) for row in ([*corpus[0]], *(
            row.values() for row in corpus))))
    assert mined(encoder, rows, tmp_path / "out.jsonl", "--corpus", path, "--negatives", 2) == 0
    documents = [f"{row['title']} {row['text']}".strip() for row in corpus]
    assert_rows(read_lines(tmp_path / "out.jsonl"), by_loop(encoder, rows, documents, 2, 0.95))
    printed = capsys.readouterr().out
    assert f"corpus {len(set(documents))} texts; it lacks 19 rows' positives\n" in printed
    assert "rows   20, 18 queries; instruction: none\n" in printed


def test_all_positives_of_a_row_and_its_own_instruction_are_kept_and_never_mined(
    encoder, tmp_path, capsys
):
    texts = words(12, 7)
    rows = write_rows(tmp_path / "rows.jsonl", [
        {"query": texts[0], "pos": texts[1:4], "instruction": "Find it", "id": 7},
        {"query": texts[4], "pos": texts[5:6], "neg": texts[6:9]}])
    assert mined(encoder, rows, tmp_path / "out.jsonl", "--negatives", 4, "--margin", 0) == 0
    first, second = read_lines(tmp_path / "out.jsonl")
    assert first["positive"] == texts[1:4] and first["instruction"] == "Find it"
    assert second["positive"] == texts[5] and "instruction" not in second
    assert set(first["negative"]) == set(texts[5:9])
    assert set(second["negative"]) <= {*texts[1:4], *texts[6:9]} and len(second["negative"]) == 4
    assert "note: rows.jsonl: fields not read: id (1 rows)\n" in capsys.readouterr().out
    again = Triples(tmp_path / "out.jsonl", None)
    assert [again[i].others for i in range(2)] == [tuple(texts[2:4]), ()]


def test_a_corpus_names_what_is_not_read(encoder, rows, tmp_path, capsys):
    corpus = [{"text": text, "Title": "x"} for text in words(9, 6)]
    path = write_rows(tmp_path / "corpus.jsonl", corpus)
    assert mined(encoder, rows, tmp_path / "out.jsonl", "--corpus", path) == 0
    said = "note: corpus.jsonl: fields not read: Title (9 rows)\n"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("method, flags", [("weighted-mean", []), ("echo", ["--method", "echo"])])
def test_a_plain_llama_is_read_as_evaluate_reads_it(method, flags, tiny, home, tmp_path):
    out = tmp_path / "out.jsonl"
    assert mined(tiny, home / "triples.jsonl", out, "--margin", 0, *flags) == 0
    encoder, found = mine.open_model(str(tiny), method)
    encode, row = mine.encoding(encoder, found), read_lines(out)[0]
    q, *d = encode([row["query"], row["positive"], *row["negative"]])
    cosines = [x @ q / np.linalg.norm(x) / np.linalg.norm(q) for x in d]
    assert found == method and row["cosines"] == pytest.approx(cosines, abs=2e-5)


def test_blocks_of_any_size_mine_the_same(encoder, rows, tmp_path, monkeypatch, encoded):
    """Of one file of embeddings, which depend on the texts that share a pass in the last bits."""
    monkeypatch.setattr(mine.Pool, "sha256", lambda self: "the same file whatever the block")
    flags, found = ["--negatives", 3, "--margin", 0.7, "--embeddings", tmp_path / "all.npy"], set()
    for block in (4096, 1, 9, 40):
        set_blocks(monkeypatch, block)
        assert mined(encoder, rows, tmp_path / f"{block}.jsonl", *flags) == 0
        found.add((tmp_path / f"{block}.jsonl").read_bytes())
    assert len(found) == 1 and len(encoded) == 2


# ---------------------------------------------------------------------------------------------
# Interruptions
# ---------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for the end of the process: nothing may catch it."""


def die_at(monkeypatch, owner, name: str, call: int, after: bool, die):
    """Call `die` at the so-manieth call of a function, before or after it has done its work."""
    whole, calls = getattr(owner, name), []

    def dying(*args, **options):
        calls.append(1)
        if len(calls) == call and not after:
            die()
        result = whole(*args, **options)
        if len(calls) == call:
            die()
        return result

    monkeypatch.setattr(owner, name, dying)


def end(*_):
    raise Killed


MOMENTS = {  # owner, function, call, whether it has done its work; blocks of texts embedded then
    "before the first block": (Encoder, "encode", 1, False, 0),
    "after the note of the second": (mine.Embeddings, "append", 2, True, 2),
    "between rows and note": (embed, "write_file", 4, False, 2),
    "after a note, at once": (embed, "write_file", 4, True, 3),
    "before the search": (mine, "mine_rows", 1, False, 8),
    "in the search": (mine, "search", 3, False, 8),
    "before the last rename": (mine, "report", 1, True, 8),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_the_same_command_resumes_and_ends_with_the_same_bytes(
    moment, encoder, rows, tmp_path, monkeypatch, encoded, capsys
):
    set_blocks(monkeypatch, 8)
    flags = ["--negatives", 2]
    assert mined(encoder, rows, tmp_path / "whole/out.jsonl", *flags) == 0
    blocks = [texts for texts, _ in encoded]
    assert len(blocks) == 8  # of 40 documents and 18 queries
    *where, done = MOMENTS[moment]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_at(patch, *where, end)
        mined(encoder, rows, tmp_path / "killed/out.jsonl", *flags)
    assert not (tmp_path / "killed/out.jsonl").exists()
    encoded.clear()
    assert mined(encoder, rows, tmp_path / "killed/out.jsonl", *flags) == 0
    assert [texts for texts, _ in encoded] == blocks[done:]
    assert {path.name: content for path, content in files(tmp_path / "whole").items()} == {
        path.name: content for path, content in files(tmp_path / "killed").items()}


def test_a_killed_process_has_lost_a_block_at_most(encoder, rows, tmp_path, monkeypatch):
    """SIGKILL to a child, once while it encodes and once while it searches, which tears a line."""
    set_blocks(monkeypatch, 8)
    assert mined(encoder, rows, tmp_path / "whole/out.jsonl") == 0
    out = tmp_path / "killed/out.jsonl"
    for owner, name, call in ((mine.Embeddings, "append", 3), (mine, "search", 2)):
        if (child := os.fork()) == 0:
            die_at(monkeypatch, owner, name, call, False,
                   lambda: os.kill(os.getpid(), signal.SIGKILL))
            mined(encoder, rows, out)
            os._exit(0)  # it should not have come so far
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert json.loads((out.parent / "out.npy.json").read_text())["done"] == 40 + 18
    (unfinished,) = out.parent.glob(".out.jsonl.*")
    assert unfinished.read_bytes().count(b"\n") == 8
    unfinished.write_bytes(unfinished.read_bytes() + b'{"query": "half a li')
    assert mined(encoder, rows, out) == 0
    assert out.read_bytes() == (tmp_path / "whole/out.jsonl").read_bytes()


def test_embeddings_serve_another_margin(encoder, rows, tmp_path, encoded):
    for name, margin in (("a", 0), ("b", 0.9)):
        assert mined(encoder, rows, tmp_path / name, "--margin", margin, "--embeddings",
                     tmp_path / "both.npy") == 2  # a name without .jsonl
        assert mined(encoder, rows, tmp_path / f"{name}.jsonl", "--margin", margin,
                     "--embeddings", tmp_path / "both.npy") == 0
    assert len(encoded) == 2  # the documents and the queries, once
    assert_rows(read_lines(tmp_path / "b.jsonl"), by_loop(encoder, rows, texts_of(rows), 1, 0.9))


# ---------------------------------------------------------------------------------------------
# Stage 3
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, flags, instruction", [
    ("allnli", [], ""), ("rows", [], ""), ("rows", ["--instruction", "Find it:"], "Find it:"),
    ("allnli", ["--instruction", "none"], None), ("nq", [], ""),
])
def test_texts_are_read_as_stage_3_reads_them(
    name, flags, instruction, instructed, tmp_path, monkeypatch
):
    path = write_triples(tmp_path / f"in/{name}.jsonl", 12, 3)
    read, whole = [], Encoder.tokenize

    def tokenize(self, *args, **options):
        read.append(whole(self, *args, **options))
        return read[-1]

    monkeypatch.setattr(Encoder, "tokenize", tokenize)
    assert mined(instructed, path, tmp_path / f"out/{name}.jsonl", "--margin", 0, *flags) == 0
    ours = {ids.tobytes() for tokens in read for ids in tokens.ids}
    data = Triples(path, instruction)
    rows = TripleRows(data, load_encoder(instructed).tokenize, 150, 2, one_file=False)
    batch = rows.read_batch(0, 0, 12)
    assert ours == {ids.tobytes() for ids in batch.queries + batch.keys}
    again = Triples(tmp_path / f"out/{name}.jsonl", instruction)
    assert [again[i].instruction for i in range(12)] == [data[i].instruction for i in range(12)]
    assert (len(data.instructions) > 0) == (name != "rows" and instruction is not None
                                            or "Find" in str(instruction))


def test_an_encoder_that_has_seen_no_instruction_gets_none(encoder, tmp_path, encoded):
    path = write_triples(tmp_path / "in/allnli.jsonl", 12, 3)
    assert mined(encoder, path, tmp_path / "out/allnli.jsonl") == 0
    assert [instruction for _, instruction in encoded] == ["", ""]


@pytest.mark.parametrize("name, out", [("allnli", "mined"), ("rows", "allnli"), ("nq", "squad")])
def test_a_name_that_changes_the_instructions_is_refused(name, out, encoder, tmp_path, capsys):
    path = write_triples(tmp_path / f"in/{name}.jsonl", 12, 3)
    target = tmp_path / f"{out}.jsonl"
    error_line(mined(encoder, path, target), capsys, target, "instructions", f"{name}.jsonl")
    assert not target.exists()
    assert mined(encoder, path, target, "--instruction", "none") == 0


def test_stage_3_trains_on_what_was_mined(run, ctkd, home, tmp_path):
    out = tmp_path / "mined.jsonl"
    assert mined(ctkd, home / "triples.jsonl", out, "--negatives", 3, "--margin", 0) == 0
    assert all(len(row["negative"]) == 3 for row in read_lines(out))
    assert run("scl", "--triples", out, "--negatives", 2, "--steps", 2, stage="scl") == 0
    assert len(metrics(tmp_path / "scl")) == 2
    assert mined(tmp_path / "scl", out, tmp_path / "again.jsonl") == 0  # train, mine, train again


def test_rows_without_negatives_keep_their_place(encoder, rows, tmp_path, capsys):
    assert mined(encoder, rows, tmp_path / "out.jsonl", "--margin", 0.7) == 0
    found, data = read_lines(tmp_path / "out.jsonl"), Triples(tmp_path / "out.jsonl")
    assert [len(data[i].negatives) for i in range(20)] == [len(row["negative"]) for row in found]
    assert 0 < sum(not row["negative"] for row in found) < 20
    assert [data[i].query for i in range(20)] == [Triples(rows)[i].query for i in range(20)]


def test_a_second_process_is_refused_also_in_the_search(encoder, rows, tmp_path, monkeypatch,
                                                        capsys):
    """Once all is embedded it is the file of the rows that both would write."""
    whole, codes = mine.mine_block, []

    def meanwhile(*args):
        if not codes:
            codes.append(mined(encoder, rows, tmp_path / "out.jsonl"))
        return whole(*args)

    monkeypatch.setattr(mine, "mine_block", meanwhile)
    assert mined(encoder, rows, tmp_path / "out.jsonl") == 0 and codes == [2]
    assert "another process writes it" in capsys.readouterr().err
    found = read_lines(tmp_path / "out.jsonl")
    assert [row["query"] for row in found] == [row["query"] for row in read_lines(rows)]


# ---------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, fragments", [
    (["--negatives", 38], ["--negatives 38", "40 texts, 37 of them", "lower it"]),
    (["--margin", -0.1], ["--margin -0.1", "1.5"]), (["--margin", 95], ["--margin 95", "1.5"]),
    (["--margin", "nan"], ["--margin nan"]), (["--negatives", 0], ["--negatives"]),
    (["--threads", -1], ["--threads"]), (["--batch-tokens", 0], ["--batch-tokens"]),
    (["--out", "{rows}"], ["--out", "rows.jsonl", "new file"]),
    (["--out", "{folder}/mined"], ["--out", "mined", ".jsonl"]),
    (["--out", "{folder}/mined.jsonl.gz"], ["--out", "mined.jsonl.gz"]),
    (["--triples", "{folder}/none.jsonl"], ["none.jsonl", "no such file"]),
    (["--triples", "{folder}/bad.jsonl"], ["bad.jsonl, line 2", "has no positive"]),
    (["--triples", "{folder}/two"], ["two", "2 files", "one by one"]),
    (["--corpus", "{folder}/none.jsonl"], ["--corpus", "none.jsonl", "no such file"]),
    (["--corpus", "{folder}/empty.jsonl"], ["empty.jsonl", "no rows"]),
    (["--corpus", "{folder}/blank.jsonl"], ["--negatives 1", "0 texts", "--corpus"]),
    (["--corpus", "{folder}/bad.jsonl"], ["bad.jsonl, line 1", "no field text"]),
    (["--embeddings", "{rows}"], ["rows.jsonl", "--embeddings"]),
    (["--model", "{folder}/none"], ["none", "no such folder"]),
    (["--method", "echo"], ["--method echo", "was trained"]),
    (["--device", "tpu"], ["--device tpu"]),
], ids=lambda value: " ".join(map(str, value)))
def test_bad_input_is_one_line_and_leaves_nothing(flags, fragments, encoder, rows, tmp_path,
                                                  capsys):
    write_rows(tmp_path / "bad.jsonl", [{"query": "a", "positive": "b"}, {"query": "c"}])
    write_rows(tmp_path / "empty.jsonl", [])
    write_rows(tmp_path / "blank.jsonl", [{"text": " "}])
    for i in range(2):
        write_triples(tmp_path / f"two/{i}.jsonl", 3, i)
    before = files(tmp_path)
    flags = [str(word).format(folder=tmp_path, rows=rows) for word in flags]
    error_line(mined(encoder, rows, tmp_path / "out.jsonl", *flags), capsys, *fragments)
    after = {path: content for path, content in files(tmp_path).items()
             if not path.name.startswith("out.npy")}
    assert after == before


def test_a_margin_that_leaves_no_row_a_negative_is_reported(encoder, rows, tmp_path, monkeypatch,
                                                            capsys):
    monkeypatch.setattr(Encoder, "encode", lambda self, texts, *_, **__: np.ones((len(texts), 32)))
    code = mined(encoder, rows, tmp_path / "out.jsonl")
    error_line(code, capsys, "--margin 0.95", "for any row", "0 = off")
    assert names(tmp_path) == ["out.npy", "out.npy.json", "rows.jsonl"]
    assert mined(encoder, rows, tmp_path / "out.jsonl", "--margin", 1.1) == 0


def other_encoder(folder: Path, tiny: Path, rows: Path):
    write_encoder(tiny, folder / "other", seed=1, max_tokens=200)
    return ["--model", folder / "other"]


def other_length(folder: Path, tiny: Path, rows: Path):
    write_encoder(tiny, folder / "other", max_tokens=199)
    return ["--model", folder / "other"]


def other_text(folder: Path, tiny: Path, rows: Path):
    lines = rows.read_text().splitlines()
    rows.write_text("\n".join([*lines[:-1], lines[-1].replace('"positive": "', '"positive": "a ')]))
    return []


@pytest.mark.parametrize("change, what", [
    (other_encoder, "encoder"), (other_length, "encoder"), (other_text, "corpus"),
    (lambda folder, tiny, rows: ["--dtype", "bfloat16"], "encoder"),
])
def test_embeddings_of_something_else_are_refused(change, what, tiny, encoder, rows, tmp_path,
                                                  monkeypatch, capsys):
    set_blocks(monkeypatch, 8)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_at(patch, mine.Embeddings, "append", 3, False, end)
        mined(encoder, rows, tmp_path / "out.jsonl")
    before, flags = (tmp_path / "out.npy").read_bytes(), change(tmp_path, tiny, rows)
    capsys.readouterr()
    code = mined(encoder, rows, tmp_path / "out.jsonl", *flags)
    error_line(code, capsys, "out.npy", f"another {what}", "out.npy.json", "--embeddings")
    assert (tmp_path / "out.npy").read_bytes() == before


@pytest.mark.parametrize("damage", [
    lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-4]),
    lambda path: path.write_bytes(b"no array"), lambda path: np.save(path, np.zeros((58, 32))),
    lambda path: np.save(path, np.zeros((57, 32), np.float32)),
])
def test_damaged_embeddings_are_refused(damage, encoder, rows, tmp_path, capsys):
    assert mined(encoder, rows, tmp_path / "out.jsonl") == 0
    damage(tmp_path / "out.npy")
    capsys.readouterr()
    code = mined(encoder, rows, tmp_path / "again.jsonl", "--embeddings", tmp_path / "out.npy")
    error_line(code, capsys, "out.npy", "missing or damaged", "out.npy.json")


def test_a_full_disk_is_reported_before_anything_is_encoded(encoder, rows, tmp_path, monkeypatch,
                                                            encoded, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    error_line(mined(encoder, rows, tmp_path / "out.jsonl"), capsys, "out.npy", "No space left")
    monkeypatch.undo()
    assert not encoded and not (tmp_path / "out.npy").exists()
    assert mined(encoder, rows, tmp_path / "out.jsonl") == 0


def test_a_damaged_encoder_is_noticed(tiny, rows, tmp_path, capsys):
    encoder = trained_encoder(tiny, EncoderConfig(num_memory_tokens=2, max_tokens=100))
    encoder.memory_tokens.data[0, 0] = torch.nan
    save_encoder(encoder, tmp_path / "nan")
    error_line(mined(tmp_path / "nan", rows, tmp_path / "out.jsonl"), capsys, "nan or inf")

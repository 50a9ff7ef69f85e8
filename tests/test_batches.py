"""data/batches.py: filters and splits of stage 1's texts, sentences and triples as batches."""

import json
import random
import re
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import LONG, run_of, split_texts, words, write_triples

import contrastive
import pretrain_ctkd
from contrastive import Config
from data import corpora
from data.batches import MIN_SIDE, Sentences, SplitTexts, TripleRows, require_rows, same_texts
from data.batches import split_point, token_batches
from data.corpora import read_texts
from data.tokenizer import INSTRUCTED, Tokenizer
from data.triples import Triples
from runtime.errors import UserError


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return Tokenizer(tiny, 320)


@pytest.fixture
def encoder(ctkd):
    """The encoder that stage 2 trains after the run `ctkd`."""
    config = Config(model=str(ctkd), max_tokens=40, dtype="float32")
    return contrastive.new_encoder(config, run_of(config))[0]


# ---------------------------------------------------------------------------------------------
# Stage 1: split texts
# ---------------------------------------------------------------------------------------------


def test_wikitext_keeps_texts_of_1000_characters_and_less_than_512_tokens(
    tokenizer, tmp_path, monkeypatch
):
    texts = [("an encoder reads the whole of it " * 60)[:n] for n in range(1700)]
    by_tokens = {len(ids): text for ids, text in zip(tokenizer.encode(texts), texts)}
    kept = [texts[1000], by_tokens[511]]
    assert len(by_tokens[511]) > 1010
    lines = [texts[999], kept[0], by_tokens[512], kept[1] + "   ", texts[1600]]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "llm2comp").mkdir()
    with zipfile.ZipFile(tmp_path / "llm2comp" / corpora.WIKITEXT_MIRROR[1], "w") as archive:
        archive.writestr(corpora.WIKITEXT_MEMBER, "".join(f" {line} \n" for line in lines))
    config = pretrain_ctkd.Config(batch_size=2, text_seed=-1)
    data = pretrain_ctkd.open_texts(config, tokenizer, config.num_texts)
    expected = tokenizer.encode([text.strip() for text in kept])
    assert [ids.tolist() for ids in data.texts] == [ids.tolist() for ids in expected]
    assert data.dropped == "1 under 1000 characters, 2 512 tokens or more" and data.cut == 0
    assert [data.name(row) for row in range(2)] == ["wikitext103, text 2", "wikitext103, text 4"]
    off = SplitTexts.read("wikitext103", tokenizer, 0, min_characters=0, max_text_tokens=0)
    assert len(off.texts) == len(lines) and off.dropped == "none dropped"
    assert off.cut == 1  # of 1,600 characters; 512 tokens are not too many


@pytest.mark.parametrize("memory_tokens", [1, 2, 16])
def test_texts_are_cut_to_max_tokens_with_bos_whatever_the_memory_tokens(
    memory_tokens, tokenizer, texts
):
    config = pretrain_ctkd.Config(text=str(texts), max_tokens=40, memory_tokens=memory_tokens,
                                  text_seed=-1)
    data = pretrain_ctkd.open_texts(config, tokenizer, num_texts=7)
    assert [len(ids) for ids in data.texts] == [40] * 7
    whole = tokenizer.encode(read_texts(str(texts))[:7])
    for ids, all_ids in zip(data.texts, whole):
        assert ids[0] == 1 and ids.tolist() == all_ids[:40].tolist() and len(all_ids) > 40
    assert data.cut == 7
    assert str(data) == f"{texts}: 7 texts, 40 tokens each, 7 of them cut"


def test_cut_texts_are_counted_after_the_filters_and_among_the_first_texts(
    tokenizer, tmp_path
):
    """A filter for long texts sees them whole; a text of just the limit is not cut."""
    path, lines = tmp_path / "a.txt", ["x" * n for n in (60, 30, 31, 12, 29, 80, 90)]
    path.write_text("\n".join(lines))
    lengths = [len(ids) for ids in tokenizer.encode(lines)]
    assert lengths == [n + 1 for n in (60, 30, 31, 12, 29, 80, 90)]
    data = SplitTexts.read(str(path), tokenizer, 4, max_text_tokens=81, max_tokens=31, text_seed=-1)
    assert [len(ids) for ids in data.texts] == [31, 31, 31, 30] and data.cut == 2
    assert str(data) == f"{path}: 4 texts, 31 tokens each, 2 of them cut"
    assert data.dropped == "1 under 20 tokens, 2 81 tokens or more"
    whole = SplitTexts.read(str(path), tokenizer, 0, max_tokens=91, text_seed=-1)
    assert whole.cut == 0 and "of them cut" not in str(whole)


ROWS_WITH_GAPS = ["", *words(11, 3, 8, 20), "", " ", *words(12, 4, 1, 30), "", *words(9, 5, 8, 9)]


@pytest.fixture
def gaps(tmp_path):
    """A file of texts with empty lines among them, some too short to be split."""
    path = tmp_path / "gaps.txt"
    path.write_text("\n".join(ROWS_WITH_GAPS) + "\n")
    return path


@pytest.mark.parametrize("seed", [42, 0])
def test_stage_1_shuffles_as_the_library_datasets_does_before_it_filters(
    seed, tokenizer, gaps, tmp_path
):
    """Which the official code calls on all rows, empty ones too, and takes the first after it."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    rows = datasets.load_dataset("text", data_files=str(gaps), cache_dir=str(tmp_path / "cache"))
    shuffled = rows.shuffle(seed=seed)["train"]
    assert len(shuffled) == len(ROWS_WITH_GAPS)
    there = [text.strip() for text in shuffled["text"] if text.strip()]
    kept = [ids.tolist() for ids in tokenizer.encode(there) if len(ids) >= 20]
    assert 20 < len(kept) < len(there) == 32
    for wanted in (0, 5):
        data = SplitTexts.read(str(gaps), tokenizer, wanted, text_seed=seed)
        assert [ids.tolist() for ids in data.texts] == kept[: wanted or None]
    named = [int(re.fullmatch(re.escape(str(gaps)) + r", text (\d+)", data.name(row))[1])
             for row in range(5)]
    assert [tokenizer.encode([ROWS_WITH_GAPS[n - 1].strip()])[0].tolist()
            for n in named] == kept[:5]
    assert named != sorted(named)


def test_the_text_seed_of_minus_one_keeps_the_files_order(tokenizer, gaps):
    in_order = [ids.tolist() for ids in tokenizer.encode(read_texts(str(gaps))) if len(ids) >= 20]
    data = SplitTexts.read(str(gaps), tokenizer, 6, text_seed=-1)
    assert [ids.tolist() for ids in data.texts] == in_order[:6]
    others = [SplitTexts.read(str(gaps), tokenizer, 6, text_seed=seed).sha256
              for seed in (42, 0, 42)]
    assert others[0] == others[2] and len({data.sha256, *others}) == 3
    assert SplitTexts.read(str(gaps), tokenizer, 6).sha256 == others[0]  # 42 is the default


def test_which_texts_are_read_does_not_depend_on_the_runs_seed(tokenizer, gaps):
    read = {}
    for seed in (0, 1):
        for text_seed in (42, 7):
            config = pretrain_ctkd.Config(text=str(gaps), seed=seed, text_seed=text_seed)
            data = pretrain_ctkd.open_texts(config, tokenizer, num_texts=9)
            read[seed, text_seed] = [ids.tolist() for ids in data.texts]
    assert read[0, 42] == read[1, 42] and read[0, 7] == read[1, 7] != read[0, 42]


def test_filters_drop_and_count_texts(tokenizer, texts, tmp_path):
    path, whole = tmp_path / "more.txt", texts.read_text()
    path.write_text("short\nsmall\nthe embedding of the text is here\n" + whole)
    data = SplitTexts.read(str(path), tokenizer, text_seed=-1)
    assert len(data.texts) == 40 and data.sizes == {f"{path} (3 under 20 tokens)": 40}
    assert data.sha256 == SplitTexts.read(str(texts), tokenizer, text_seed=-1).sha256
    assert data.sha256 != SplitTexts.read(str(texts), tokenizer, num_texts=39, text_seed=-1).sha256
    assert str(data) == f"{path}: 40 texts, {sum(map(len, data.texts)) / 40:.0f} tokens each"
    counts = sorted(map(len, data.texts))
    short = SplitTexts.read(str(path), tokenizer, min_characters=30, max_text_tokens=counts[10])
    assert len(short.texts) == sum(count < counts[10] for count in counts)
    assert short.dropped == (f"2 under 30 characters, 1 under 20 tokens, "
                             f"{40 - len(short.texts)} {counts[10]} tokens or more")
    with pytest.raises(UserError, match="no text left of 43") as caught:
        SplitTexts.read(str(path), tokenizer, max_text_tokens=20)
    assert "--min-characters" in str(caught.value) and str(path) in str(caught.value)


def test_a_split_point_is_uniform_between_10_and_length_minus_10():
    splits = [split_point(0, position, 24) for position in range(4000)]
    counts = np.bincount(splits, minlength=15)
    assert MIN_SIDE == 10
    assert set(splits) == set(range(10, 15)) and counts[10:].min() > 700
    assert split_point(0, 0, 20) == 10


def test_order_and_splits_do_not_depend_on_the_batch_size(id_texts):
    whole = id_texts.read_batch(7, 0, 8)
    for size in (1, 2, 4):
        parts = [id_texts.read_batch(7, step, size) for step in range(8 // size)]
        assert sum((part.rows for part in parts), []) == whole.rows
        assert sum((part.splits for part in parts), []) == whole.splits
    other = id_texts.read_batch(8, 0, 8)
    assert other.rows != whole.rows and other.splits != whole.splits


def test_a_batch_has_contexts_continuations_and_the_totals_of_the_global_batch(id_texts):
    batch = id_texts.read_batch(0, 1, 6)
    for ids, context, continuation, a, row in zip(
            batch.texts, batch.contexts, batch.continuations, batch.splits, batch.rows):
        assert (np.concatenate((context, continuation)) == ids).all() and len(context) == a
        assert len(context) >= MIN_SIDE and len(continuation) >= MIN_SIDE
        assert (id_texts.texts[row] == ids).all()
    lengths = [len(ids) for ids in batch.texts]
    totals = 6, sum(lengths), sum(map(len, batch.continuations))
    assert (batch.total_texts, batch.total_tokens, batch.total_targets) == totals
    part = batch.part(range(2, 5))
    assert [len(ids) for ids in part.texts] == lengths[2:5]
    assert part.splits == batch.splits[2:5] and part.rows == batch.rows[2:5]
    assert (part.total_texts, part.total_tokens, part.total_targets) == totals


def test_a_text_is_cut_at_another_point_in_each_epoch():
    data = split_texts([np.arange(60, dtype=np.int32)])
    splits = [data.read_batch(0, step, 1).splits[0] for step in range(20)]
    assert len(set(splits)) > 5 and splits == [split_point(0, step, 60) for step in range(20)]


def test_splits_depend_on_the_seed():
    zero, again, one = ([split_point(seed, position, 60) for position in range(20)]
                        for seed in (0, 0, 1))
    assert zero == again and zero != one


# ---------------------------------------------------------------------------------------------
# Stage 2: sentences
# ---------------------------------------------------------------------------------------------


def test_a_key_with_the_text_of_a_rows_positive_is_excluded_for_that_row_only():
    keys = [np.array(ids, dtype=np.int32) for ids in ([1, 5], [1, 6], [1, 5], [1, 7], [1, 6],
                                                      [1, 8])]
    excluded = same_texts(keys, 3)  # three positives, three hard negatives
    assert excluded.nonzero().tolist() == [[0, 2], [1, 4], [2, 0]]


def test_a_batch_of_sentences_has_each_text_as_query_and_key(encoder, home):
    config = Config(text=str(home / "texts.txt"), batch_size=6, max_tokens=20)
    encoder.config = replace(encoder.config, max_tokens=20)
    data = contrastive.open_data(config, encoder, False)
    assert 0 < sum(data.cut) < 40
    assert str(data) == (f"{home}/texts.txt: 40 texts, "
                         f"{sum(map(len, data.texts)) / 40:.0f} tokens each, {sum(data.cut)} of "
                         f"them cut")
    texts = read_texts(str(home / "texts.txt"))
    random.Random(42).shuffle(texts)
    for step in range(2):
        batch = data.read_batch(0, step, 6)
        assert batch.key_rows == batch.rows and len(batch.queries) == len(batch.keys) == 6
        for query, key, row in zip(batch.queries, batch.keys, batch.rows):
            assert query.tolist() == key.tolist() == encoder.tokenize([texts[row]])[0][0].tolist()
        assert torch.equal(batch.excluded, same_texts(batch.keys, 6))
        assert batch.real_tokens == 2 * sum(map(len, batch.queries))
        too_long = [len(encoder.tokenizer.encode([texts[row]])[0]) > 20 for row in batch.rows]
        assert batch.cut == sum(too_long)
    assert data.name(3) == f"{home}/texts.txt, text {read_texts(data.source).index(texts[3]) + 1}"


@pytest.mark.parametrize("seed, wanted", [(42, 0), (42, 7), (0, 7)])
def test_stage_2_shuffles_as_python_does_and_leaves_empty_lines_out(seed, wanted, encoder, gaps):
    """The official code calls random.shuffle on all lines."""
    rows = [text.strip() for text in ROWS_WITH_GAPS]
    random.Random(seed).shuffle(rows)
    expected = [text for text in rows if text][: wanted or None]
    data = Sentences(str(gaps), wanted, encoder.tokenize, seed)
    assert [ids.tolist() for ids in data.texts] == [
        ids.tolist() for ids in encoder.tokenize(expected).ids]
    lines = [int(data.name(row).rpartition(" ")[2]) for row in range(len(expected))]
    assert [ROWS_WITH_GAPS[n - 1].strip() for n in lines] == expected and lines != sorted(lines)
    config = Config(text=str(gaps), num_texts=wanted, text_seed=seed, batch_size=4, seed=9,
                    max_tokens=40)
    assert contrastive.open_data(config, encoder, False).sha256 == data.sha256
    in_order = Sentences(str(gaps), wanted, encoder.tokenize, -1)
    assert [ids.tolist() for ids in in_order.texts] == [
        ids.tolist() for ids in encoder.tokenize(read_texts(str(gaps))[: wanted or None]).ids]


@pytest.mark.parametrize("memory_tokens", [1, 16])
def test_the_texts_of_a_contrastive_batch_do_not_depend_on_k(memory_tokens, tiny, home):
    """24 tokens of a text or query, 20 of a document."""
    common = {"model": str(tiny), "memory_tokens": memory_tokens, "max_tokens": 24,
              "document_tokens": 20, "batch_size": 8, "dtype": "float32"}
    config = Config(**common, text=str(home / "texts.txt"))
    encoder, _ = contrastive.new_encoder(config, run_of(config))
    assert len(encoder.memory_tokens) == memory_tokens
    data = contrastive.open_data(config, encoder, False)
    batch = data.read_batch(0, 0, 8)
    assert max(map(len, data.texts)) == 24
    assert batch.cut == sum(data.cut[row] for row in batch.rows) > 0
    config = Config(**common, stage="scl", triples=str(home / "triples.jsonl"),
                    instruction="none")
    data = contrastive.open_data(config, encoder, False)
    batch = data.read_batch(0, 0, 8)
    queries, positives = (
        encoder.tokenizer.encode([getattr(data.triples[row], role) for row in batch.rows])
        for role in ("query", "positive"))
    assert [len(ids) for ids in batch.queries] == [min(len(ids), 24) for ids in queries]
    assert [len(ids) for ids in batch.keys[:8]] == [min(len(ids), 20) for ids in positives]
    assert max(map(len, batch.queries)) == 24 and max(map(len, batch.keys)) == 20


def test_the_bundled_data_are_read_by_name(encoder):
    config = Config(text="demo", num_texts=300, text_seed=-1, max_tokens=40)
    data = contrastive.open_data(config, encoder, False)
    assert len(data.texts) == 300
    assert all(1 < len(ids) <= 40 and ids[0] == 1 for ids in data.texts)
    assert max(map(len, data.texts)) == 40
    first, *_ = passages = read_texts("demo")
    sentence = encoder.tokenizer.decode(data.texts[0])
    assert first.startswith(sentence) and len(sentence) < len(first)
    everything = contrastive.open_data(replace(config, num_texts=0), encoder, False)
    assert len(everything.texts) > 2 * len(passages)
    shuffled = contrastive.open_data(replace(config, num_texts=0, text_seed=42), encoder, False)
    order = list(range(len(everything.texts)))
    random.Random(42).shuffle(order)
    assert [ids.tolist() for ids in shuffled.texts] == [everything.texts[i].tolist()
                                                        for i in order]
    assert shuffled.name(0) == f"demo, text {order[0] + 1}"
    data = contrastive.open_data(Config(stage="scl", triples="demo"), encoder, False)
    assert data.sha256 == Triples("demo").sha256


# ---------------------------------------------------------------------------------------------
# Stage 3: triples
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("negatives, keys", [(0, 8), (1, 16), (2, 24), (5, 24)])
def test_negatives_of_a_row_are_drawn_from_its_list(negatives, keys, ctkd, home):
    config = Config(stage="scl", model=str(ctkd), triples=str(home / "triples.jsonl"),
                    negatives=negatives, batch_size=8, dtype="float32")
    encoder, _ = contrastive.new_encoder(config, run_of(config))
    data, chosen = contrastive.open_data(config, encoder, False), set()
    for step in range(6):
        batch, again = (data.read_batch(config.seed, step, 8) for _ in range(2))
        assert len(batch.queries) == 8 and len(batch.keys) == keys
        assert batch.excluded.shape == (8, keys) and again.rows == batch.rows
        assert all((a == b).all() for a, b in zip(batch.keys, again.keys, strict=True))
        per_row = min(negatives, 2)
        assert batch.key_rows == batch.rows + [row for row in batch.rows for _ in range(per_row)]
        for j, row in enumerate(batch.rows):
            mine = batch.keys[8 + per_row * j : 8 + per_row * (j + 1)]
            places = [data.triples[row].negatives.index(encoder.tokenizer.decode(ids))
                      for ids in mine]
            assert len(set(places)) == len(places) == per_row
            chosen.update(places[:1])
    assert chosen == ({0, 1} if negatives else set())


@pytest.fixture
def triple_batches(tiny, tmp_path):
    """triple_batches(low, high, settings...): tokenizer, data and nine batches of four rows, whose
    texts have `low` to `high` words."""

    def make(low: int, high: int, **settings):
        path = write_triples(tmp_path / "triples.jsonl", 12, 1, low, high)
        config = Config(**{"stage": "scl", "model": str(tiny), "triples": str(path),
                           "memory_tokens": 2, "max_tokens": 40, "document_tokens": 30,
                           "batch_size": 4, "dtype": "float32", **settings})
        encoder, _ = contrastive.new_encoder(config, run_of(config))
        data = contrastive.open_data(config, encoder, False)
        batches = [data.read_batch(config.seed, step, config.batch_size) for step in range(9)]
        return encoder.tokenizer, data, batches

    return make


def test_negatives_depend_on_the_seed(triple_batches):
    """The order of the rows does as well: what is compared are the places in the rows' lists."""
    drawn = []
    for seed in (0, 0, 1):
        tokenizer, data, batches = triple_batches(3, 5, seed=seed, max_tokens=60,
                                                  document_tokens=60)
        drawn.append([data.triples[row].negatives.index(tokenizer.decode(ids))
                      for batch in batches for row, ids in zip(batch.rows, batch.keys[4:])])
    assert drawn[0] == drawn[1] != drawn[2] and set(drawn[0]) == {0, 1}


def test_long_documents_are_cut_to_document_tokens(triple_batches):
    """30, and queries to 40; two memory tokens follow."""
    tokenizer, data, (batch, *_) = triple_batches(40, 45)
    assert [len(ids) for ids in batch.queries] == [40] * 4
    assert [len(ids) for ids in batch.keys] == [30] * 8
    assert batch.cut == 12  # each query, positive and drawn negative
    whole = tokenizer.encode([data.triples[row].positive for row in batch.rows])
    for ids, full in zip(batch.keys, whole):
        assert ids.tolist() == full[:30].tolist()


def test_the_cut_texts_of_a_batch_of_triples_are_counted(triple_batches):
    """With an instruction a query is longer; a hard negative counts if it was drawn."""
    sums = []
    for instruction in ("none", "Find the text that says the same"):
        tokenizer, data, batches = triple_batches(4, 14, instruction=instruction)
        expected = []
        for batch in batches:
            queries = [data.triples[row].query for row in batch.rows]
            if instruction != "none":
                queries = [f"{instruction}:{query}\n" for query in queries]
            long = sum(len(ids) > 40 for ids in tokenizer.encode(queries))
            keys = [data.triples[row].positive for row in batch.rows]
            for row, ids in zip(batch.rows, batch.keys[4:], strict=True):
                (drawn,) = {text for text in data.triples[row].negatives
                            if tokenizer.encode([text])[0][:30].tolist() == ids.tolist()}
                keys.append(drawn)
            expected.append(long + sum(len(ids) > 30 for ids in tokenizer.encode(keys)))
        assert [batch.cut for batch in batches] == expected
        assert min(expected) < max(expected)
        sums.append(sum(expected))
    assert sums[0] < sums[1]


def test_the_cut_queries_of_all_instructions_are_counted(tiny, home):
    """A batch of three files, each with an instruction of its own."""
    config = Config(stage="scl", model=str(tiny), triples=str(home / "folder"), memory_tokens=2,
                    max_tokens=60, batch_size=39, dtype="float32", instruction="Find it")
    encoder, _ = contrastive.new_encoder(config, run_of(config))
    data = contrastive.open_data(config, encoder, False)
    batch, lengths = data.read_batch(0, 0, 39), {}
    for row in batch.rows:
        triple = data.triples[row]
        (ids,) = encoder.tokenizer.encode([f"{triple.instruction}:{triple.query}\n"])
        lengths.setdefault(triple.instruction, []).append(len(ids))
    counts = [sum(length > 60 for length in own) for own in lengths.values()]
    assert len([n for n, own in zip(counts, lengths.values()) if 0 < n < len(own)]) == 2
    assert batch.cut == sum(counts)


def test_no_text_of_a_batch_is_counted_as_cut_if_none_is_too_long(triple_batches):
    _, _, batches = triple_batches(3, 5, max_tokens=60, document_tokens=60)
    assert [batch.cut for batch in batches] == [0] * 9


def test_hard_negatives_stand_without_an_instruction(triple_batches):
    tokenizer, data, (batch, *_) = triple_batches(3, 5, instruction="Find it", max_tokens=60,
                                                  document_tokens=60)
    for row, query, negative in zip(batch.rows, batch.queries, batch.keys[4:], strict=True):
        assert tokenizer.decode(query) == f"Find it:{data.triples[row].query}\n"
        assert tokenizer.decode(negative) in data.triples[row].negatives


@pytest.mark.parametrize("kind", ["mixed", "single-dataset"])
def test_single_dataset_makes_batches_of_one_file_only(kind, run, home, monkeypatch):
    seen, read_batch = [], TripleRows.read_batch

    def note(*arguments):
        batch = read_batch(*arguments)
        seen.append(set(np.searchsorted([20, 30, 39], batch.rows, side="right").tolist()))
        return batch

    monkeypatch.setattr(TripleRows, "read_batch", note)
    flags = ["--triples", home / "folder", "--batches", kind, "--steps", 4, *LONG]
    assert run("run", *flags, stage="scl") == 0
    assert len(seen) == 4
    if kind == "single-dataset":
        assert all(len(files) == 1 for files in seen)
        assert sorted(source for sources in seen for source in sources) == [0, 0, 1, 2]
    else:
        assert all(len(files) > 1 for files in seen)


def test_a_row_is_named_by_its_file_and_its_place_there(encoder, home):
    config = Config(stage="scl", triples=str(home / "folder"), batch_size=8, instruction="none")
    data = contrastive.open_data(config, encoder, False)
    assert [data.name(row) for row in (0, 19, 20, 29, 30, 38)] == [
        "allnli.jsonl, row 1", "allnli.jsonl, row 20", "mine.jsonl, row 1", "mine.jsonl, row 10",
        "squad.jsonl, row 1", "squad.jsonl, row 9"]
    lines = str(data).splitlines()
    assert lines[0] == (
        f"{home}/folder: 39 rows, mixed; 39 of 39 rows have negatives") and len(lines) == 4
    assert lines[2].split(maxsplit=1) == ["10", "mine.jsonl: no instruction"]
    one_file = contrastive.open_data(replace(config, batches="single-dataset"), encoder, False)
    assert str(one_file).startswith(f"{home}/folder: 39 rows, single-dataset; 39 of")
    assert list(one_file.sizes.values()) == [20, 10, 9] and data.sizes == {f"{home}/folder": 39}


@pytest.fixture
def several(tmp_path) -> Path:
    """Eight rows of which half have three positives; a negative and another row share one."""
    rows = [{"query": f"query {i}", "pos": [f"text {i} {c}" for c in "abc"[: 1 + 2 * (i % 2)]],
             "neg": [f"other {i}"]} for i in range(8)]
    rows[1]["neg"] = ["text 1 c"]
    rows[0]["pos"] = ["text 3 b"]
    rows[2]["prompt"] = "Find it"
    path = tmp_path / "several.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_one_of_several_positives_is_drawn_in_each_step_and_none_is_a_negative(
    several, encoder
):
    encoder.config = replace(encoder.config, template=INSTRUCTED, max_tokens=60)
    config = Config(stage="scl", triples=str(several), batch_size=8, instruction="Read")
    data, drawn = contrastive.open_data(config, encoder, False), {}
    for step in range(24):
        batch, again = (data.read_batch(5, step, 8) for _ in range(2))
        texts = [encoder.tokenizer.decode(ids) for ids in batch.keys]
        assert texts == [encoder.tokenizer.decode(ids) for ids in again.keys]
        for j, row in enumerate(batch.rows):
            triple = data.triples[row]
            positives = {triple.positive, *triple.others}
            assert texts[j] in positives
            drawn.setdefault(row, set()).add(texts[j])
            assert batch.excluded[j].tolist() == [
                m != j and text in positives for m, text in enumerate(texts)]
            words = "Find it" if row == 2 else "Read"
            assert encoder.tokenizer.decode(batch.queries[j]) == f"{words}:query {row}\n"
    assert [len(drawn[row]) for row in range(8)] == [1, 3] * 4
    assert len(batch.keys) == 16


def test_a_dry_run_shows_what_is_read_without_a_model_and_writes_nothing(
    several, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    flags = ["--dry-run", "--model", "no/such-model", "--out", "run"]
    assert contrastive.main([*flags, "--stage", "scl", "--triples", str(several)]) == 0
    first, second, *lines = capsys.readouterr().out.splitlines()
    assert first == f"data   {several}: 8 rows, mixed; 8 of 8 rows have negatives"
    assert second.split(maxsplit=1) == ["8", "several.jsonl: no instruction"]
    assert lines[:3] == [
        "note: several.jsonl: 1 rows have an instruction of their own, used in place of the file's",
        "note: several.jsonl: 4 rows have several positives, of which one is drawn in each step",
        "note: several.jsonl: 1 rows have a positive among their negatives, which is no negative "
        "there"]
    assert lines[3] == "several.jsonl, row 1" and lines[23] == "several.jsonl, row 5"
    assert lines[8:13] == [
        "several.jsonl, row 2", "  instruction  none", "  query        'query 1'",
        "  positive     'text 1 a' | 'text 1 b' | 'text 1 c'", "  negative     'text 1 c'"]
    assert len(lines) == 3 + 5 * 5
    (tmp_path / "a.txt").write_text("\none \x1b[2J\n\ntwo\n")
    assert contrastive.main([*flags, "--text", "a.txt"]) == 0
    assert capsys.readouterr().out == "data   a.txt: 2 texts\n  'one \\x1b[2J'\n  'two'\n"
    assert contrastive.main([*flags, "--stage", "scl", "--triples", "nowhere.jsonl"]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "several.jsonl"]


def test_a_source_with_fewer_rows_than_a_batch_is_an_error():
    require_rows({"a": 8, "b": 9}, 8)
    with pytest.raises(UserError, match="--batch-size 9 is larger than the 8 rows of a; lower it"):
        require_rows({"b": 9, "a": 8}, 9)


# ---------------------------------------------------------------------------------------------
# Batches of similar lengths
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1, 7, 10, 10**6])
@pytest.mark.parametrize("lengths", [[], [5], [3, 9, 3, 1, 9, 2, 2], [12, 1, 1, 1]], ids=str)
def test_batches_hold_each_text_once_within_the_budget_or_alone(lengths, budget):
    batches = token_batches(lengths, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(len(b) == 1 or sum(lengths[i] for i in b) <= budget for b in batches)
    order = [lengths[i] for batch in batches for i in batch]
    assert order == sorted(lengths, reverse=True)
    assert budget < 10**6 or len(batches) <= 1

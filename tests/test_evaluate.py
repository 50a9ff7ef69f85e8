"""evaluate.py: from texts to scores, training-free methods, instructions, the command."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import zlib
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
import torch
from helpers import ROOT, TASK_FILES, TEXT, cosine_table, edit_json, error_line, evaluate_main
from helpers import files, jsonl, mteb_demo_tasks, sklearn_clusters, sts17, trec_scores
from helpers import write_encoder, write_task
from sklearn.linear_model import LogisticRegression

import evaluate
from data.tasks import TASKS, draw_training_sets, folder_task
from data.tokenizer import INSTRUCTED
from evaluate import (
    METHODS,
    as_sentence,
    chosen_tasks,
    encoding,
    evaluate_task,
    instruction_for,
    open_model,
    parse_arguments,
)
from measures import KINDS, unit
from model import Encoder, EncoderConfig, load_encoder, plain_encoder
from runtime.errors import UserError, printable
from runtime.results import PAPER, PUBLISHED

# ---------------------------------------------------------------------------------------------
# Tasks: from texts to scores
# ---------------------------------------------------------------------------------------------


def hashed(texts: list[str]) -> np.ndarray:
    """A random row for each text, always the same."""
    return np.array([np.random.default_rng(zlib.crc32(text.encode())).standard_normal(24)
                     for text in texts], dtype=np.float32)


def letters(texts: list[str]) -> np.ndarray:
    """Counts of characters: similar texts get similar rows."""
    return np.array([[1 + text.count(chr(c)) for c in range(32, 123)] for text in texts])


def folder(tmp_path, kind: str, **about) -> dict:
    """The example task of a kind, in a folder."""
    return {**folder_task(write_task(tmp_path, kind), kind), **about}


def test_an_sts_task_scores_scipys_correlation_of_the_cosines(tmp_path):
    left, right, gold = zip(*(row.values() for row in TASK_FILES["sts"]["test"]))
    a, b = letters(left), letters(right)
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    expected = scipy.stats.spearmanr(cosines, gold).statistic
    scores = evaluate_task(folder(tmp_path, "sts"), letters)
    assert 0.1 < expected < 1 and scores["main_score"] == pytest.approx(expected, abs=1e-9)
    assert scores["cosine_spearman"] == scores["main_score"]
    assert scores["notes"] == ["empty texts: 1"]


def test_a_retrieval_task_scores_pytrec_evals_ndcg_of_the_cosines(tmp_path):
    documents = hashed(["Owl hunts at night", "no title", ""])
    cosines = cosine_table(hashed(["night, bird", "bird"]), documents)
    ids, judged = ["d9", "d10", "d1"], [{"d9": 1}, {"d10": 2, "d1": 0}]
    expected = trec_scores(cosines, ["q1", "q3"], ids, judged)["ndcg_cut_10"]
    scores = evaluate_task(folder(tmp_path, "retrieval"), hashed)
    assert scores["main_score"] == scores["ndcg_at_10"] == pytest.approx(expected.mean(), abs=1e-6)
    assert 0.3 < expected.mean() < 1 and scores["per_query"] == pytest.approx(expected, abs=1e-6)


def test_a_classification_task_scores_scikit_learns_accuracy(tmp_path):
    (train, y), (test, truth) = (
        zip(*(row.values() for row in TASK_FILES["classification"][name]))
        for name in ("train", "test"))
    expected = []
    for rows in draw_training_sets(list(y), 2):
        model = LogisticRegression(max_iter=100).fit(hashed(train)[rows], np.array(y)[rows])
        expected.append(np.mean(model.predict(hashed(test)) == np.array(truth)))
    task = folder(tmp_path, "classification", samples_per_label=2)
    assert evaluate_task(task, hashed)["main_score"] == pytest.approx(np.mean(expected))
    assert 0 < np.mean(expected) < 1


def test_a_clustering_task_scores_scikit_learns_mean_v_measure(tmp_path):
    words = TEXT.split()
    sets = [{"sentences": words[i::2], "labels": [len(word) % 3 for word in words[i::2]]}
            for i in range(2)]
    expected = [sklearn.metrics.v_measure_score(s["labels"], sklearn_clusters(
        hashed(s["sentences"]), 3)) for s in sets]
    write_task(tmp_path, "clustering", test=sets)
    scores = evaluate_task(folder_task(tmp_path, "clustering"), hashed)
    assert scores["main_score"] == pytest.approx(np.mean(expected))
    assert 0 < np.mean(expected) < 1 and len(set(expected)) == 2


def test_a_pair_classification_task_scores_the_best_average_precision(tmp_path):
    left, right, labels = zip(*(row.values() for row in TASK_FILES["pair-classification"]["test"]))
    a, b = hashed(left), hashed(right)
    expected = max(sklearn.metrics.average_precision_score(labels, s) for s in (
        (unit(a) * unit(b)).sum(1), (a * b).sum(1), -np.abs(a - b).sum(1)))
    scores = evaluate_task(folder(tmp_path, "pair-classification"), hashed)
    assert scores["main_score"] == scores["max_ap"] == pytest.approx(expected)


def test_a_reranking_task_scores_scikit_learns_average_precision_of_the_cosines(tmp_path):
    expected, words = [], TEXT.split()
    rows = [{"query": word, "positive": words[i : i + 2], "negative": words[i + 9 : i + 15]}
            for i, word in enumerate(words[:20])]
    for row in rows:
        documents = row["positive"] + row["negative"]
        cosines = cosine_table(hashed([row["query"]]), hashed(documents))[0]
        truth = [True] * len(row["positive"]) + [False] * len(row["negative"])
        expected.append(sklearn.metrics.average_precision_score(truth, cosines))
    write_task(tmp_path, "reranking", test=rows)
    scores = evaluate_task(folder_task(tmp_path, "reranking"), hashed)
    assert scores["main_score"] == scores["map"] == pytest.approx(np.mean(expected))
    assert scores["per_query"] == pytest.approx(expected) and 0.3 < np.mean(expected) < 0.9


@pytest.mark.parametrize("kind", TASK_FILES)
def test_each_distinct_text_is_encoded_once(kind, tmp_path):
    asked = []
    encode = lambda texts: asked.append(texts) or hashed(texts).tolist()  # noqa: E731
    scores = evaluate_task(folder(tmp_path, kind), encode)
    assert len(asked) == (2 if kind in ("retrieval", "reranking") else 1)
    assert all(isinstance(t, list) and len(set(t)) == len(t) > 0 for t in asked)
    assert scores["main_score"] == evaluate_task(folder(tmp_path, kind), hashed)[
        "main_score"]


@pytest.mark.parametrize("kind, documents", [
    ("retrieval", ["Owl hunts at night", "no title", ""]),
    ("reranking", ["so", "thus", "no", "because"]),
])
def test_documents_can_have_an_encode_function_of_their_own(kind, documents, tmp_path):
    asked = {"query": [], "document": []}

    def recording(name):
        return lambda texts: asked[name].append(texts) or hashed(texts)

    evaluate_task(folder(tmp_path, kind), recording("query"),
                  encode_documents=recording("document"))
    queries = ["night, bird", "bird"] if kind == "retrieval" else ["how", "why"]
    assert asked == {"query": [queries], "document": [documents]}


@pytest.mark.parametrize("encode, fragment", [
    (lambda texts: hashed(texts)[:-1], r"shape \(4, 24\) for 5 texts"),
    (lambda texts: hashed(texts)[0], r"shape \(24,\) for 5 texts"),
    (lambda texts: hashed(texts)[None], r"shape \(1, 5, 24\) for 5 texts"),
    (lambda texts: [], r"shape \(0,\) for 5 texts"),
    (lambda texts: np.where(np.arange(5)[:, None] == 2, np.nan, hashed(texts)),
     "embedding of 'A dog is running.' and of 0 other texts has nan or inf"),
    (lambda texts: np.where(np.arange(5)[:, None] >= 3, np.inf, hashed(texts)),
     "embedding of '\"The moon\", bright' and of 1 other texts has nan or inf"),
    (lambda texts: np.full((5, 3), 1e39), "embedding of 'A dog runs.' and of 4 other texts"),
])
def test_what_encode_returns_is_checked(encode, fragment, tmp_path):
    with pytest.raises(UserError, match=fragment) as caught:
        evaluate_task(folder(tmp_path, "sts"), encode)
    assert "\n" not in str(caught.value)


def test_zero_vectors_are_counted(tmp_path):
    def encode(texts):
        return hashed(texts) * np.array([[len(text) > 4] for text in texts])

    task = folder(tmp_path, "retrieval")
    notes = [note for note in evaluate_task(task, encode)["notes"] if "zero" in note]
    assert notes == ["1 of 2 texts have the zero vector (cosine 0)",
                     "1 of 3 texts have the zero vector (cosine 0)"]


def test_a_nan_score_is_refused(tmp_path):
    with pytest.raises(UserError, match="no rank correlation"):
        evaluate_task(folder(tmp_path, "sts"), lambda texts: np.ones((len(texts), 3)))


def test_the_bundled_tasks_are_scored_by_name():
    for name in ("demo-sts", "demo-retrieval"):
        scores = evaluate_task(name, letters)
        assert 0.1 < scores["main_score"] < 1 and scores["notes"] == []


@pytest.mark.parametrize("name, near", [
    ("stss17", "sts17"), ("STS17", "sts17"), ("SciFact", "scifact"), ("clusterin", "clustering"),
    ("ALL", "all"),
])
def test_an_unknown_task_is_refused_with_the_nearest_names(name, near, capsys):
    with pytest.raises(UserError, match=f"--task {name}: unknown; did you mean .*{near}"):
        evaluate_task(name, hashed)
    assert evaluate.main(["--task", "demo-sts", name]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"error: --task {name}") and near in said.err
    assert len(said.err.splitlines()) == 1 and said.out == ""


# ---------------------------------------------------------------------------------------------
# Methods and instructions
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, sentence", [
    ("", ""), ("A dog", "A dog."), ("A dog.", "A dog."), ("A dog?", "A dog."),
    ("A dog!", "A dog!."), ('He said "no"', "He said 'no'"), ("it's 'so'", "it's 'so'"),
    ('"a" b', "'a' b."), ("?", "."), ("a ", "a ."), ('why?"', "why?'"),
])
def test_one_word_prompts_get_a_sentence(text, sentence):
    assert as_sentence(text) == sentence


def last_states(model, encoder, strings) -> np.ndarray:
    """The hidden state of transformers at the last token of each string after BOS."""
    states = []
    for string in strings:
        ids = encoder.tokenizer.encode([string])[0]
        with torch.no_grad():
            hidden = model.model(torch.from_numpy(ids).long()[None]).last_hidden_state[0]
        states.append(hidden[-1].numpy())
    return np.stack(states)


SENTENCES = ["A model reads a text", "", "Is it so?", 'The "lazy" dog', "ümläut 漢字."]


def test_prompteol_is_the_last_state_of_the_filled_prompt(tiny, reference):
    encoder, method = open_model(str(tiny), "prompteol")
    prompt = 'This sentence : "{text}" means in one word:"'
    filled = [prompt.replace("{text}", as_sentence(text)) for text in SENTENCES]
    expected = last_states(reference(tiny), encoder, filled)
    assert method == "prompteol"
    assert np.abs(encoding(encoder, method)(SENTENCES) - expected).max() <= 1e-5


def test_metaeol_is_the_mean_of_its_eight_prompts(tiny, reference):
    encoder, method = open_model(str(tiny), "metaeol")
    model, texts = reference(tiny), SENTENCES[:3]
    eight = [last_states(model, encoder, [prompt.replace("{text}", as_sentence(text))
                                          for text in texts])
             for prompt in METHODS["metaeol"]["prompts"]]
    encode = encoding(encoder, method)
    for _ in range(2):  # a second call starts from the first prompt again
        assert np.abs(encode(texts) - np.mean(eight, axis=0)).max() <= 1e-5
    assert len(eight) == 8 and np.ptp(eight, axis=0).max() > 0.1


@pytest.mark.parametrize("method", METHODS)
def test_a_text_has_the_same_embedding_alone_and_among_others_under_every_method(method, tiny):
    encoder, name = open_model(str(tiny), method)
    encode = encoding(encoder, name)
    texts = [*SENTENCES, "  ", "word " * 400]
    rows = encode(texts)
    assert rows.shape == (7, 32) and rows.dtype == np.float32 and np.isfinite(rows).all()
    assert np.abs(encode([""]) - rows[1]).max() <= 1e-5
    assert encode([]).shape == (0, 32) and np.ptp(rows[:5], axis=0).max() > 1e-2
    assert encoder.config.pooling == METHODS[method]["pooling"]
    assert encoder.config.attention == "causal"


def test_the_methods_differ(tiny):
    rows = [encoding(*open_model(str(tiny), method))(["A model reads."]) for method in METHODS]
    assert all(np.abs(a - b).max() > 1e-3 for i, a in enumerate(rows) for b in rows[:i])


def test_the_default_method_of_a_plain_llama_is_the_weighted_mean(tiny):
    assert open_model(str(tiny))[1] == "weighted-mean"
    encoder = plain_encoder(tiny, EncoderConfig(0, "weighted-mean", "causal"))
    expected = encoder.encode(SENTENCES)
    assert np.array_equal(encoding(*open_model(str(tiny)))(SENTENCES), expected)


@pytest.mark.parametrize("task, wanted, template, instruction", [
    ("scifact", "auto", "{text}", ""), ("scifact", "none", INSTRUCTED, ""),
    ("scifact", "auto", INSTRUCTED,
     "Given a scientific claim, retrieve documents that support or refute the claim"),
    ("sts17", "auto", INSTRUCTED, "Retrieve semantically similar text"),
    ("demo-sts", "auto", INSTRUCTED, "Retrieve semantically similar text"),
    ("my-folder", "auto", INSTRUCTED, ""),
    ("sts17", " Say it: ", "{text}", "Say it"), ("my-folder", "Say it", INSTRUCTED, "Say it"),
])
def test_the_instruction_is_the_tasks_or_the_given_one(task, wanted, template, instruction, tiny):
    encoder = plain_encoder(tiny)
    encoder.config = replace(encoder.config, template=template)
    assert instruction_for(task, wanted, encoder) == instruction


@pytest.mark.parametrize("pooling", ["mean", "last", "weighted-mean"])
def test_a_trained_encoder_keeps_its_template_whatever_its_pooling(pooling, tiny, tmp_path):
    where = write_encoder(tiny, tmp_path / "mine", num_memory_tokens=0, pooling=pooling,
                          template="query: {text}")
    encoder, method = open_model(str(where))
    expected = encoder.encode(SENTENCES)
    assert np.abs(encoding(encoder, method)(SENTENCES) - expected).max() == 0


# ---------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------


def test_list_shows_the_kind_and_main_score_of_every_task(capsys):
    assert evaluate.main(["--list"]) == 0
    printed = capsys.readouterr().out
    for name, task in TASKS.items():
        (line,) = [line for line in printed.splitlines() if line.split()[:1] == [name]]
        for word in (task["kind"], KINDS[task["kind"]][1], task.get("group", "-")):
            assert word in line.split()
    assert "10,003 train" in printed and "characters" not in printed


@pytest.mark.parametrize("given, expected", [
    (["all"], PAPER), (["sts"], ["sts17", "sickr", "stsbenchmark"]),
    (["classification"], ["banking77", "emotion", "sprint"]),
    (["sickr", "sts", "demo-sts", "sickr"], ["sickr", "sts17", "stsbenchmark", "demo-sts"]),
])
def test_groups_and_all_expand_to_their_tasks_without_repeats(given, expected):
    tasks = chosen_tasks(parse_arguments(["--task", *given]))
    assert list(tasks) == expected and all(tasks[name] is TASKS[name] for name in tasks)


@pytest.mark.parametrize("arguments, fragments", [
    ([], ["nothing to do", "--task", "--list"]),
    (["--task-dir", "."], ["--task-dir .: needs --kind", "clustering"]),
    (["--task-dir", "nowhere", "--kind", "sts"], ["nowhere: no such folder"]),
])
def test_a_command_without_a_task_says_what_is_missing(arguments, fragments, here, capsys):
    error_line(evaluate_main(*arguments), capsys, *fragments)
    assert files(here) == {}


@pytest.mark.parametrize("kind", TASK_FILES)
def test_a_folder_of_any_kind_is_a_task_of_its_own(kind, tiny, here, capsys):
    write_task(here / "my task", kind)
    assert evaluate_main("--task-dir", "my task", "--kind", kind, "--model", tiny) == 0
    (path,) = here.glob("results/*/my task.json")
    result, encode = json.loads(path.read_text()), encoding(*open_model(str(tiny)))
    expected = evaluate_task(folder_task("my task", kind), encode)["main_score"]
    assert result["scores"]["test"][0]["main_score"] == pytest.approx(expected, abs=1e-9)
    assert (result["task_name"], result["dataset_revision"]) == ("my task", "local")
    assert f"{100 * expected:.2f}" in capsys.readouterr().out


def test_every_method_has_its_own_score_and_file(tiny, here):
    for method in METHODS:
        assert evaluate_main("--task", "sts17", "sickr", "--model", tiny, "--method", method) == 0
    results = [json.loads(path.read_text()) for path in here.glob("results/*/*.json")]
    assert Counter(r["settings"]["method"] for r in results) == dict.fromkeys(METHODS, 2)
    for result in results:
        method = METHODS[result["settings"]["method"]]
        assert result["settings"]["template"] == method["prompts"][0]
        assert result["settings"]["paper"] == method["paper"]
        assert -1 <= result["scores"]["test"][0]["main_score"] <= 1
    folders = {path.parent.name.partition("@")[2] for path in here.glob("results/*/*")}
    assert len(folders) == len(METHODS)


def test_a_trained_encoder_with_a_classic_pooling_is_not_a_training_free_method(tiny, here):
    write_encoder(tiny, here / "mine", num_memory_tokens=0, pooling="last", template="q: {text}")
    assert sts17("--model", "mine") == 0
    settings = json.loads((here / "results/mine/STS17.json").read_text())["settings"]
    assert (settings["method"], settings["template"]) == ("last", "q: {text}")
    assert settings["paper"] is None


def test_max_tokens_limits_what_a_plain_llama_reads(tiny, here, encoded, capsys):
    long = [{"sentence1": TEXT, "sentence2": TEXT[: 9 * i], "score": i} for i in range(1, 9)]
    (here.parent / "data/sts17-crosslingual-sts/test.jsonl").write_bytes(jsonl(long))
    found = []
    for n in (12, 512):
        assert sts17("--model", tiny, "--max-tokens", n, "--results", f"at {n}") == 0
        (path,) = here.glob(f"at {n}/*/*.json")
        result = json.loads(path.read_text())
        assert result["settings"]["max_tokens"] == n
        found.append(result["scores"]["test"][0]["main_score"])
    assert found[0] != found[1]
    capsys.readouterr()
    code = sts17("--model", tiny, "--results", "at 12")
    error_line(code, capsys, "max_tokens: 12 -> 512")


@pytest.mark.parametrize("k", [1, 16])
def test_how_many_texts_were_cut_is_noted_and_does_not_depend_on_k(k, tiny, here, capsys):
    """Queries and documents, each distinct text once; a text of just the limit is whole."""
    write_encoder(tiny, here / "mine", num_memory_tokens=k, max_tokens=21)
    queries = [{"_id": f"q{n}", "text": "x" * n} for n in (20, 21)]
    corpus = [{"_id": f"d{n}", "title": "", "text": "y" * n} for n in (3, 20, 21, 40)]
    judged = [{"query-id": f"q{n}", "corpus-id": "d3", "score": 1} for n in (20, 21)]
    write_task(here.parent / "data/scifact", "retrieval", queries=queries, corpus=corpus,
               qrels=judged)
    note = "texts cut to 21 tokens: 3"
    for again in range(2):  # the second time from the file
        assert evaluate_main("--task", "scifact", "sickr", "--model", "mine") == 0
        assert re.findall("note: (.*cut.*)", capsys.readouterr().out) == [note]
    result = json.loads((here / "results/mine/SciFact.json").read_text())
    assert result["notes"].count(note) == 1
    after = json.loads((here / "results/mine/SICK-R.json").read_text())
    assert not any("cut" in note for note in after["notes"])  # not those of the task before


@pytest.mark.parametrize("method", ["metaeol", "prompteol"])
def test_a_text_that_several_prompts_cut_counts_once(method):
    encoder, name = evaluate.open_model("demo", method, 130)
    encode = evaluate.encoding(encoder, name)
    encode(["word " * 200, "a"])
    assert encoder.cut == 1
    encode(["word " * 200, "word " * 201])
    assert encoder.cut == 3


def test_a_task_with_missing_data_does_not_stop_the_others(tiny, here, capsys):
    shutil.rmtree(here.parent / "data/scifact")
    assert evaluate_main("--task", "sts17", "scifact", "sickr", "--model", tiny) == 2
    said = capsys.readouterr()
    assert [p.name for p in sorted(here.glob("results/*/*"))] == ["SICK-R.json", "STS17.json"]
    lines = [line for line in said.err.splitlines() if "error:" in line]
    assert len(lines) == 1 and "data/scifact: no such folder" in lines[0]
    assert "sickr" in said.out and "average (2 of 14 tasks)" in said.out
    write_task(here.parent / "data/scifact", "retrieval")
    assert evaluate_main("--task", "sts17", "scifact", "sickr", "--model", tiny) == 0


def test_zero_vectors_and_unexpected_counts_are_noted_in_the_table_and_the_file(
    tiny, here, monkeypatch, capsys
):
    whole = Encoder.encode
    monkeypatch.setattr(Encoder, "encode", lambda self, texts, *a, **o: whole(
        self, texts, *a, **o) * np.array([[text != ""] for text in texts]))
    for again in range(2):  # the second time from the file
        assert sts17("--model", tiny) == 0
        notes = ["empty texts: 1", "4 pairs, the published task has 250",
                 "88 characters, the published task has 21,669",
                 "1 of 5 texts have the zero vector (cosine 0)"]
        printed = capsys.readouterr().out
        assert re.findall("note: (.*)", printed) == notes
        (path,) = here.glob("results/*/*.json")
        assert json.loads(path.read_text())["notes"] == notes
        assert ("finished before" in printed) == bool(again)


def test_expected_counts_are_not_noted(tiny, here, monkeypatch, capsys):
    monkeypatch.setitem(TASKS["sts17"], "expected", {"pairs": 4, "characters": 88})
    assert sts17("--model", tiny) == 0
    assert re.findall("note: (.*)", capsys.readouterr().out) == ["empty texts: 1"]


def test_a_non_finite_embedding_exits_with_2_and_writes_nothing(
    tiny, here, monkeypatch, capsys
):
    monkeypatch.setattr(Encoder, "encode", lambda self, texts, *_, **__: np.full(
        (len(texts), 4), np.nan, dtype=np.float32))
    code = sts17("--model", tiny)
    error_line(code, capsys, "embedding of 'A dog runs.' and of 4 other texts has nan")
    assert files(here) == {}


def test_all_texts_but_the_documents_of_retrieval_and_reranking_get_the_instruction(
    tiny, here, encoded, capsys
):
    write_encoder(tiny, here / "mine", template=INSTRUCTED, max_tokens=256)
    names = ["scifact", "scidocs", "sts17", "sprint"]
    assert evaluate_main("--task", *names, "--model", "mine") == 0
    told = {name: evaluate.INSTRUCTIONS[name].removesuffix(":") for name in names}
    assert [instruction for _, instruction in encoded] == [
        told["scifact"], "", told["scidocs"], "", told["sts17"], told["sprint"]]
    assert encoded[0][0] == ["night, bird", "bird"] and "Owl hunts at night" in encoded[1][0]
    assert encoded[2][0] == ["how", "why"] and encoded[3][0] == ["so", "thus", "no", "because"]
    printed = capsys.readouterr().out
    assert re.findall("instruction: (.*)", printed) == [told[name] for name in names]
    for name in names:
        path = here / "results/mine" / f"{TASKS[name]['name']}.json"
        assert json.loads(path.read_text())["settings"]["instruction"] == told[name]


def test_an_encoder_trained_without_instructions_gets_none(tiny, here, encoded, capsys):
    write_encoder(tiny, here / "mine")
    assert evaluate_main("--task", "scifact", "--model", "mine") == 0
    assert [instruction for _, instruction in encoded] == ["", ""]
    assert "instruction" not in capsys.readouterr().out


def test_an_encoder_trained_with_instructions_can_do_without(
    tiny, here, encoded, capsys
):
    write_encoder(tiny, here / "mine", template=INSTRUCTED)
    assert evaluate_main("--task", "scifact", "--model", "mine", "--instruction", "none") == 0
    assert [instruction for _, instruction in encoded] == ["", ""]
    assert "instruction: none" in capsys.readouterr().out


def test_an_instruction_is_refused_if_the_prompt_has_no_place_for_it(tiny, here, capsys):
    flags = ["--model", tiny, "--instruction", "Find it"]
    error_line(sts17(*flags, "--method", "echo"), capsys, "'Find it'")
    assert files(here) == {}
    assert sts17(*flags, "--method", "last") == 0


@pytest.mark.parametrize("instruction", ["Sort {text} by topic", "{instruction}", "{", "a\nb"])
def test_an_instruction_of_the_command_line_is_no_template(
    instruction, tiny, here, encoded, capsys
):
    assert sts17("--model", tiny, "--instruction", instruction, "--method", "last") == 0
    assert [told for _, told in encoded] == [instruction]
    assert capsys.readouterr().out.count("instruction: " + instruction.replace("\n", r"\n")) == 1


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interruption_is_a_line_and_keeps_the_finished_tasks(
    number, code, tiny, here, encoded, capsys, monkeypatch
):
    names = ["sts17", "sprint", "scifact"]
    tasks, score = iter(names), evaluate.score_task

    def interrupted(task, *arguments):
        if next(tasks) == "sprint":
            signal.raise_signal(number)
        return score(task, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "score_task", interrupted)
        assert evaluate_main("--task", *names, "--model", tiny) == code
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-1] == (
        "interrupted; finished tasks are kept, the same command goes on")
    assert "Traceback" not in printed.err and "sts17" in printed.out
    assert [path.name for path in here.glob("results/*/*")] == ["STS17.json"]
    encoded.clear()
    assert evaluate_main("--task", *names, "--model", tiny) == 0
    assert len(encoded) == 3 and capsys.readouterr().out.count("finished before") == 1


def test_names_and_notes_of_strangers_do_not_steer_the_terminal(tiny, here, capsys):
    name = "a\x1b[31m\x9b2J\nnote: b\u202e"
    write_task(here / name, "sts")
    assert evaluate_main("--task-dir", name, "--kind", "sts", "--model", tiny) == 0
    (path,) = here.glob("results/*/*.json")
    result = json.loads(path.read_text())
    path.write_text(json.dumps({**result, "task_name": name, "notes": [name, {"\x1b": name}]}))
    assert evaluate_main("--compare", path.parent.name) == 0
    printed = capsys.readouterr().out
    assert printable(printed, keep="\n") == printed and "\nnote: b" not in printed
    assert printed.count(printable(name)) >= 3


def test_the_default_model_is_the_newest_encoder(tiny, here, capsys):
    for i, name in enumerate("cba"):
        where = write_encoder(tiny, here / "runs" / name / "encoder", seed=i)
        when = 2_000_000_000 - 1000 * abs(i - 1)
        os.utime(where / "encoder.json", (when, when))
    assert sts17() == 0
    assert "model   runs/b/encoder  (the newest encoder under runs/)" in capsys.readouterr().out
    settings = json.loads((here / "results/runs__b/STS17.json").read_text())["settings"]
    assert settings["model"] == "runs/b/encoder" and settings["history"][0]["seed"] == 1


def test_without_a_run_the_default_model_is_the_bundled_llama(here, capsys):
    (here / "runs" / "unfinished").mkdir(parents=True)
    assert sts17() == 0
    assert "model   demo  (the bundled tiny Llama)" in capsys.readouterr().out
    assert (here / "results/demo@weighted-mean/STS17.json").is_file()


def test_a_runs_folder_stands_for_its_encoder(tiny, here, capsys):
    write_encoder(tiny, here / "mine" / "encoder")
    assert sts17("--model", "mine") == 0
    (path,) = here.glob("results/mine/*.json")
    assert sts17("--model", "mine/encoder") == 0
    assert "finished before" in capsys.readouterr().out
    assert [*here.glob("results/*/*")] == [path]


@pytest.mark.parametrize("arguments, fragments", [
    (["--model", "mine", "--method", "mean"], ["--method mean", "trained with memory"]),
    (["--model", "TINY", "--method", "memory"], ["--method memory", "plain Llama"]),
    (["--model", "TINY", "--max-tokens", "0"], ["--max-tokens 0: must be at least 2"]),
    (["--model", "TINY", "--max-tokens", "-9"], ["--max-tokens -9: must be at least 2"]),
    (["--model", "mine", "--max-tokens", "32"], ["--max-tokens 32", "trained with 64"]),
    (["--model", "mine", "--special-tokens", "parsed"],
     ["--special-tokens parsed", "trained with literal"]),
    (["--model", "nowhere"], ["nowhere: no such folder"]),
    (["--model", "mine", "--base", "nowhere"], ["base model cannot be loaded", "--base"]),
    (["--model", "mine", "--data-dir", "nowhere"], ["nowhere/sts17", "--data-dir"]),
    (["--model", "mine", "--results", "mine/encoder.json"], ["cannot be written", "--results"]),
])
def test_a_wrong_argument_exits_with_2_and_writes_nothing(
    arguments, fragments, tiny, here, capsys
):
    write_encoder(tiny, here / "mine")
    before = files(here)
    assert sts17(*[str(tiny) if a == "TINY" else a for a in arguments]) == 2
    message = capsys.readouterr().err.rpartition("\r")[2]  # what follows the progress bar
    assert message.startswith("error: ")
    for fragment in fragments:
        assert fragment in message
    assert files(here) == before


@pytest.mark.parametrize("flags", [["--batch-tokens", "0"], ["--threads", "-1"],
                                   ["--timeout", "0"], ["--timeout", "nan"]])
def test_an_impossible_setting_is_refused(flags, capsys):
    with pytest.raises(SystemExit) as caught:
        evaluate.main(["--task", "demo-sts", *flags])
    assert caught.value.code == 2
    bound = "(above 0|not below)"
    assert re.search(f"error: .*{flags[0]}.* {bound}", capsys.readouterr().err)


@pytest.mark.parametrize("flags", [["--model", "demo"], ["--method", "echo"], ["--force"],
                                   ["--max-tokens", "9"], ["--instruction", "none"]])
@pytest.mark.parametrize("what", [["--list"], ["--compare", "LT"]])
def test_what_an_evaluation_needs_is_refused_beside_a_list(what, flags, capsys):
    with pytest.raises(SystemExit) as caught:
        evaluate.main([*what, *flags])
    assert caught.value.code == 2
    assert f"{flags[0]}: is for --task; leave it out" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_device_exits_with_2(tiny, here, capsys):
    error_line(sts17("--model", tiny, "--device", "cuda"), capsys, "--device cuda")


def test_a_moved_base_is_found_with_base(tiny, here):
    elsewhere = shutil.copytree(tiny, here / "elsewhere")
    write_encoder(elsewhere, here / "mine")
    elsewhere.rename(here / "moved")
    assert sts17("--model", "mine") == 2
    assert sts17("--model", "mine", "--base", "moved") == 0


RECIPES = PUBLISHED["recipes"]


def encoder_after(*stages: str, objective="ctkd", **changed) -> SimpleNamespace:
    """An encoder whose history is that of the paper's recipes; `changed`: stage -> settings."""
    history = [{"stage": stage, **RECIPES.get(stage, {}), **changed.get(stage, {})}
               for stage in stages]
    history[0]["objective"] = objective
    return SimpleNamespace(history=history, config=EncoderConfig())


@pytest.mark.parametrize("objective, name", [("ctkd", "KL"), ("nll", "NLL"), ("rc", "RC")])
@pytest.mark.parametrize("stages, ending", [
    (["ctkd"], ""), (["ctkd", "ucl"], " + UCL"), (["ctkd", "ucl", "scl"], " + SCL")], ids=str)
def test_the_papers_own_recipes_name_a_row_of_its_table(objective, name, stages, ending):
    found, _ = evaluate.paper_row(encoder_after(*stages, objective=objective), "memory")
    assert found == f"LLM2Comp {name}{ending}" and found in PUBLISHED["rows"]


@pytest.mark.parametrize("stages", ["ctkd scl", "ctkd ucl scl scl_2", "ctkd scl ucl", "ucl",
                                    "ctkd ucl ucl_2", "scl", "ctkd ctkd"])
def test_stages_in_another_order_than_the_papers_have_no_row(stages):
    found = evaluate.paper_row(encoder_after(*stages.split()), "memory")
    assert found == (None, "stages " + stages.replace(" ", ", "))


CHANGED = {
    "memory_tokens": 4, "memory_init": "normal", "attention": "causal",
    "train_embeddings": "memory", "nll_weight": 0.5, "batch_size": 7, "trained_steps": 300,
}


@pytest.mark.parametrize("stage, key", [(stage, key) for stage, recipe in RECIPES.items()
                                        for key in recipe])
@pytest.mark.parametrize("missing", [False, True], ids=["changed", "missing"])
def test_an_encoder_of_another_recipe_has_no_row_and_is_told_why(stage, key, missing):
    encoder = encoder_after("ctkd", "ucl", "scl", **{stage: {key: CHANGED[key]}})
    place = list(RECIPES).index(stage)
    if missing:  # by a version of the code that did not store it
        del encoder.history[place][key]
    theirs, ours = RECIPES[stage][key], None if missing else CHANGED[key]
    why = f"{stage} had {key}={ours!r}, the row's is {theirs!r}"
    assert evaluate.paper_row(encoder, "memory") == (None, why)
    encoder.history = encoder.history[:place]  # the stages before it are as they should be
    assert not encoder.history or evaluate.paper_row(encoder, "memory")[0] is not None


def test_every_kind_of_deviation_that_has_a_row_of_its_own_is_compared():
    assert set(RECIPES["ctkd"]) == {
        "memory_tokens", "memory_init", "attention", "train_embeddings", "nll_weight",
        "batch_size", "trained_steps"}
    assert {"batch_size", "trained_steps"} == set(RECIPES["ucl"]) == set(RECIPES["scl"])


def test_kept_tokens_and_an_unknown_objective_have_no_row():
    encoder = encoder_after("ctkd", "ucl", "scl")
    encoder.config = EncoderConfig(kept_tokens=(0, 3))  # effective tokens are no row of Table 1
    assert evaluate.paper_row(encoder, "memory") == (None, "kept_tokens=(0, 3)")
    found, why = evaluate.paper_row(encoder_after("ctkd", objective="mine"), "memory")
    assert found is None and why.startswith("objective '")


@pytest.mark.parametrize("method", METHODS)
def test_a_plain_llama_is_compared_by_its_method(method):
    encoder = SimpleNamespace(history=[], config=EncoderConfig(0, "mean"))
    found, why = evaluate.paper_row(encoder, method)
    assert found == METHODS[method]["paper"] and why
    assert found is None or found in PUBLISHED["rows"]


def test_what_the_recipes_compare_is_in_the_history_of_a_run(scl):
    history = load_encoder(scl / "encoder").history
    assert [entry["stage"] for entry in history] == ["ctkd", "ucl", "scl"]
    for entry in history:
        assert set(RECIPES[entry["stage"]]) <= set(entry)
    assert [entry["trained_steps"] for entry in history] == [2, 3, 3]


def test_a_table_of_an_encoder_says_why_it_has_no_row_of_the_paper(tiny, here, capsys):
    where = write_encoder(tiny, here / "mine")
    edit_json(where / "encoder.json", history=encoder_after("ctkd").history)
    assert sts17("--model", "mine") == 0
    assert "not compared with a row" not in capsys.readouterr().out
    settings = json.loads((here / "results/mine/STS17.json").read_text())["settings"]
    assert (settings["paper"], settings["paper_differs"]) == ("LLM2Comp KL", "")
    edit_json(where / "encoder.json",
              history=encoder_after("ctkd", ctkd={"memory_tokens": 2}).history)
    assert sts17("--model", "mine", "--force") == 0
    why = "ctkd had memory_tokens=2, the row's is 8"
    assert f"\nnot compared with a row of the paper: {why}\n" in capsys.readouterr().out
    settings = json.loads((here / "results/mine/STS17.json").read_text())["settings"]
    assert (settings["paper"], settings["paper_differs"]) == (None, why)
    assert sts17("--model", tiny, "--method", "mean") == 0  # a plain Llama: none was to be expected
    assert "not compared with a row" not in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------
# Several processes
# ---------------------------------------------------------------------------------------------


def test_two_processes_write_the_scores_of_one_and_print_one_table(tiny, here):
    one_query = TASK_FILES["retrieval"]["qrels/test"][:2]  # none for the second process
    write_task(here.parent / "data/scifact", "retrieval", qrels=one_query)
    flags = ["--task", "demo-sts", "nfcorpus", "scifact", "--model", str(tiny), "--device", "cpu",
             "--threads", "1", "--data-dir", str(here.parent / "data"), "--max-tokens", "24"]
    assert evaluate.main([*flags, "--results", "one"]) == 2  # there is no nfcorpus
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               str(ROOT / "evaluate.py"), *flags, "--results", "two"]
    done = subprocess.run([sys.executable, "-m", *command], cwd=here, capture_output=True,
                          text=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 1, done.stderr  # torchrun's own
    assert "data/nfcorpus: no such folder" in done.stderr and "Connection" not in done.stderr
    results = [{path.name: json.loads(path.read_text()) for path in here.glob(f"{name}/*/*.json")}
               for name in ("one", "two")]
    assert results[0].keys() == results[1].keys() == {"demo-sts.json", "SciFact.json"}
    for name, one in results[0].items():
        two = results[1][name]
        assert (one["settings"]["ranks"], two["settings"]["ranks"]) == (1, 2)
        assert two["notes"] == one["notes"]
        assert name != "demo-sts.json" or "cut to 24 tokens" in one["notes"][-1]
        for key, value in one["scores"]["test"][0].items():
            assert two["scores"]["test"][0][key] == pytest.approx(value, abs=1e-6)
    assert done.stdout.count("main score") == done.stdout.count("written to two/") == 1
    assert len(re.findall("^demo-sts ", done.stdout, re.M)) == 1


# ---------------------------------------------------------------------------------------------
# mteb
# ---------------------------------------------------------------------------------------------


def wrapped(mteb, encoder):
    """The encoder as a model of mteb."""
    from mteb.models.abs_encoder import AbsEncoder
    from mteb.models.model_meta import ModelMeta, ScoringFunction

    class Wrapped(AbsEncoder):
        def __init__(self):
            about = {"name": "org/name", "revision": "x",
                     "similarity_fn_name": ScoringFunction.COSINE}
            self.mteb_model_meta = ModelMeta.create_empty(overwrites=about)

        def encode(self, inputs, *, task_metadata, hf_split, hf_subset, prompt_type=None, **_):
            return encoder.encode([text for batch in inputs for text in batch["text"]])

    return Wrapped()


@pytest.mark.parametrize("name, tolerance", [("demo-sts", 1e-6), ("demo-retrieval", 1e-5)])
def test_mteb_scores_an_encoder_the_same(name, tolerance, mteb, tiny):
    encoder = plain_encoder(tiny)
    ours = evaluate_task(name, encoder.encode)
    result = mteb.evaluate(wrapped(mteb, encoder), mteb_demo_tasks(mteb)[name], cache=None,
                           co2_tracker=False, show_progress_bar=False)
    (scores,) = result.task_results[0].scores["test"]
    assert scores["main_score"] == pytest.approx(ours["main_score"], abs=tolerance)
    assert 0.02 < ours["main_score"] < 0.98
    others = {"demo-sts": ["cosine_spearman", "cosine_pearson"],
              "demo-retrieval": ["ndcg_at_10", "map_at_10", "recall_at_100"]}[name]
    for key in others:
        assert scores[key] == pytest.approx(ours[key], abs=tolerance)

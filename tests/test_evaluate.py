"""Measures and kinds against the libraries that define them, methods, the command line, mteb."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import pytrec_eval
import scipy.stats
import sklearn.metrics
import torch
from conftest import TEXT
from safetensors.torch import load_file, save_file
from sklearn.cluster import MiniBatchKMeans
from sklearn.linear_model import LogisticRegression
from test_tasks import FILES, jsonl, write

import evaluate
from data import UserError
from data.results import GROUPS, PAPER, PUBLISHED, mean_of, summary
from data.tasks import TASKS, draw_training_sets, folder_task
from evaluate import (
    METHODS,
    as_sentence,
    average_precision,
    average_ranks,
    chosen_tasks,
    classification,
    encoding,
    evaluate_task,
    instruction_for,
    macro_f1,
    mini_batch_k_means,
    open_model,
    pair_classification,
    paired_cosine,
    parse_arguments,
    pearson,
    rank_documents,
    reranking,
    retrieval,
    spearman,
    sts,
    unit,
    v_measure,
)
from lora import add_lora
from model import INSTRUCTED, Encoder, EncoderConfig, plain_encoder, save_encoder

ROOT = Path(__file__).parent.parent

# ---------------------------------------------------------------------------------------------
# Measures
# ---------------------------------------------------------------------------------------------


def cases(count):
    """Pairs of vectors of 2 to 60 values, most with ties, of very unlike sizes."""
    random = np.random.default_rng(0)
    for _ in range(count):
        n, levels = random.integers(2, 60), random.integers(1, 40)
        x, y = random.integers(0, levels, (2, n)) * 10.0 ** random.integers(-9, 9, (2, 1))
        y = y + x * random.integers(-1, 2)
        yield (x, random.standard_normal(n)) if random.random() < 0.2 else (x, y)


@pytest.mark.parametrize("ours, theirs", [
    (spearman, scipy.stats.spearmanr), (pearson, scipy.stats.pearsonr),
])
def test_correlations_are_scipys_also_with_ties_and_nan_for_a_constant(ours, theirs):
    constant = 0
    for x, y in cases(2000):
        if np.ptp(x) == 0 or np.ptp(y) == 0:
            constant += 1
            assert np.isnan(ours(x, y))
        else:
            assert abs(ours(x, y) - theirs(x, y).statistic) <= 1e-9
    assert 50 < constant < 500


def test_average_ranks_are_scipys():
    for x, _ in cases(1000):
        assert np.array_equal(average_ranks(x), scipy.stats.rankdata(x))


def test_equal_rows_have_the_cosine_one_exactly_and_so_stay_tied():
    random = np.random.default_rng(0)
    rows = random.standard_normal((5000, 33)) * 10.0 ** random.integers(-6, 6, (5000, 1))
    for dtype in (np.float32, np.float64):
        assert (paired_cosine(rows.astype(dtype), rows.astype(dtype)) == 1).all()


def test_paired_cosine_is_the_cosine():
    a, b = np.random.default_rng(0).standard_normal((2, 1000, 33))
    plain = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert np.abs(paired_cosine(a, 7 * b) - plain).max() < 1e-14
    narrow = paired_cosine(a.astype(np.float32), b.astype(np.float32))
    assert np.abs(narrow - plain).max() < 1e-6
    assert paired_cosine(a, -a) == pytest.approx(-1.0)


def test_the_cosine_with_a_zero_row_is_zero():
    a = np.random.default_rng(0).standard_normal((6, 5)).astype(np.float32)
    zero = np.zeros_like(a)
    for left, right in ((a, zero), (zero, a), (zero, zero)):
        assert paired_cosine(left, right).tolist() == [0.0] * 6
    assert np.array_equal(unit(zero), zero)
    assert np.linalg.norm(unit(a), axis=1) == pytest.approx(np.ones(6), abs=1e-6)


def scored(count):
    """Relevances of 0 and 1 with scores, of few or many levels; some all or none relevant."""
    random = np.random.default_rng(1)
    for _ in range(count):
        n = random.integers(1, 60)
        relevant = random.random(n) < random.choice([0.0, 0.1, 0.5, 1.0])
        scores = random.integers(0, random.choice([1, 3, 10, 1000]), n) / 7.0
        yield relevant, scores.astype(random.choice([np.float32, np.float64]))


def test_average_precision_is_scikit_learns_also_with_ties_and_0_where_nothing_is_relevant():
    seen = Counter()
    for relevant, scores in scored(2000):
        seen[int(relevant.sum() > 0) + int(relevant.all())] += 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nothing relevant
            theirs = sklearn.metrics.average_precision_score(relevant, scores)
        for dtype in (bool, np.int64, np.float64):
            assert abs(average_precision(relevant.astype(dtype), scores) - theirs) <= 1e-9
        assert relevant.any() or theirs == 0
    assert min(seen.values()) > 200 and len(seen) == 3


def labellings(count):
    """Two labellings of the same things: of one label, of all different ones, and between."""
    random = np.random.default_rng(2)
    for _ in range(count):
        n = random.integers(1, 50)
        a, b = (np.arange(n) if random.random() < 0.1 else random.integers(0, k, n)
                for k in random.choice([1, 2, 3, 8, 40], 2))
        yield a, b


def test_the_v_measure_is_scikit_learns_also_with_one_cluster_one_class_and_all_distinct():
    kinds = set()
    for truth, clusters in labellings(2000):
        theirs = sklearn.metrics.v_measure_score(truth, clusters)
        assert abs(v_measure(truth.tolist(), clusters) - theirs) <= 1e-9
        named = [f"label {t}" for t in truth]
        assert abs(v_measure(named, clusters) - theirs) <= 1e-9
        kinds.add((len(set(truth)) == 1, len(set(clusters)) == 1, len(set(truth)) == len(truth)))
    assert len(kinds) >= 6


def test_macro_f1_is_scikit_learns_also_for_labels_in_one_of_the_arrays_only():
    one_sided = 0
    for truth, predicted in labellings(1000):
        theirs = sklearn.metrics.f1_score(truth, predicted, average="macro")
        one_sided += set(truth) != set(predicted)
        assert abs(macro_f1(predicted, truth) - theirs) <= 1e-12
    assert 100 < one_sided < 1000


# ---------------------------------------------------------------------------------------------
# Ranking
# ---------------------------------------------------------------------------------------------


def exact_rows(random, n: int, d: int = 16) -> np.ndarray:
    """Rows of 0, 1, 4 or 16 entries of +-1: cosines are multiples of 1/16 however they are summed.

    Most are repeated, a few are zero.
    """
    rows = np.zeros((n, d), dtype=np.float32)
    for row in rows:
        places = random.permutation(d)[: random.choice([0, 1, 4, 4, 4, 4, 16, 16, 16, 16])]
        row[places] = random.choice([-1, 1], len(places))
    return rows[random.integers(0, n, n)]


def normal_rows(random, n: int, d: int = 33) -> np.ndarray:
    """Normal rows, a few of them zero."""
    rows = random.standard_normal((n, d)).astype(np.float32)
    rows[random.random(n) < 0.1] = 0
    return rows


def repeated_rows(random, n: int) -> np.ndarray:
    """Normal rows, most of which occur several times."""
    return normal_rows(random, n)[random.integers(0, n, n)]


def retrieval_case(seed: int, rows):
    """Embeddings, ids as texts of numbers, and graded, zero and negative judgements."""
    random = np.random.default_rng(seed)
    n, n_queries = random.integers(1, random.choice([9, 160])), random.integers(1, 8)
    ids = [str(i) for i in random.permutation(n)]
    judged = []
    for _ in range(n_queries):
        documents = random.permutation(n)[: random.integers(1, n + 1)]
        grades = random.choice([-1, 0, 1, 2, 5], n, p=random.dirichlet([1, 1, 1, 1, 1]))
        judged.append({f"{'x' if random.random() < 0.05 else ''}{i}": int(g)
                       for i, g in zip(documents, grades)})
    queries = [f"q{i}" for i in range(n_queries)]
    return rows(random, n_queries), rows(random, n), queries, ids, judged


def cosine_table(queries, documents) -> np.ndarray:
    """Cosines of the float32 unit rows, each rounded to float32 once: equal rows are tied."""
    q, d = (unit(x).astype(np.float64) for x in (queries, documents))
    return (q @ d.T).astype(np.float32) + np.float32(0)


def trec(cosines, query_ids, document_ids, judged) -> dict[str, np.ndarray]:
    """What pytrec_eval makes of it: measure -> one value a query."""
    run = {q: {d: float(c) for d, c in zip(document_ids, row) if d != q}
           for q, row in zip(query_ids, cosines)}
    measures = {"ndcg_cut.10", "map_cut.10", "recall.100"}
    found = pytrec_eval.RelevanceEvaluator(dict(zip(query_ids, judged)), measures).evaluate(run)
    return {m.replace(".", "_"): np.array([found[q][m.replace(".", "_")] for q in query_ids])
            for m in measures}


def agrees(case, skip=False, ids=None):
    """Whether the scores of a case are pytrec_eval's."""
    queries, documents, query_ids, document_ids, judged = case
    ours = retrieval(queries, documents, ids or query_ids, document_ids, judged, skip_same_id=skip)
    theirs = trec(cosine_table(queries, documents), ids or query_ids, document_ids, judged)
    pairs = [(ours["per_query"], theirs["ndcg_cut_10"])] + [
        (ours[a], theirs[b].mean()) for a, b in (
            ("ndcg_at_10", "ndcg_cut_10"), ("map_at_10", "map_cut_10"),
            ("recall_at_100", "recall_100"))]
    return all(np.abs(a - b).max() <= 1e-6 for a, b in pairs)


@pytest.mark.parametrize("rows", [exact_rows, normal_rows, repeated_rows])
def test_retrieval_scores_are_pytrec_evals(rows):
    wrong = [seed for seed in range(500) if not agrees(retrieval_case(seed, rows))]
    assert wrong == []


def test_a_document_with_the_querys_own_id_is_left_out_of_the_ranking_only_if_asked_for():
    changed = 0
    for seed in range(200):
        case = retrieval_case(seed, exact_rows)
        ids = [case[3][i % len(case[3])] for i in range(len(case[2]))]
        if len(set(ids)) < len(ids):
            continue
        assert agrees(case, skip=True, ids=ids)  # trec() leaves it out of the run
        changed += not agrees(case, skip=False, ids=ids)
    assert changed > 50


def test_the_hundredth_document_counts_when_the_querys_own_one_is_left_out():
    documents = np.tile(np.float32([1, 0]), (101, 1))
    ids = [f"{i:03}" for i in range(101)]  # ranked 100, 99, ... 0
    judged = [{"000": 1}]
    for own, found in (("050", 1.0), ("x", 0.0)):
        scores = retrieval(documents[:1], documents, [own], ids, judged, skip_same_id=True)
        assert scores["recall_at_100"] == found


def test_a_gain_is_the_grade_itself_and_queries_without_relevant_documents_score_0():
    documents = np.eye(4, dtype=np.float32)
    queries = np.array([[4, 3, 2, 1]] * 2, dtype=np.float32)
    judged = [{"a": 1, "c": 3, "z": 2}, {"a": 0, "b": -2}]
    scores = retrieval(queries, documents, ["q", "r"], list("abcd"), judged)
    ideal = 3 + 2 / np.log2(3) + 1 / np.log2(4)
    assert scores["per_query"] == pytest.approx([(1 + 3 / np.log2(4)) / ideal, 0])
    assert scores["map_at_10"] == pytest.approx((1 / 1 + 2 / 3) / 3 / 2)
    assert scores["recall_at_100"] == pytest.approx(2 / 3 / 2)


def sorted_plainly(queries, documents, ids, k) -> list[list[int]]:
    """The k documents of each query by (score, id), both descending."""
    return [sorted(range(len(ids)), key=lambda j: (row[j], ids[j]), reverse=True)[:k]
            for row in cosine_table(queries, documents)]


@pytest.mark.parametrize("rows", [exact_rows, normal_rows, repeated_rows])
def test_documents_rank_by_score_and_then_id_descending_whatever_the_block(rows):
    wrong = []
    for seed in range(100):
        queries, documents, _, ids, _ = retrieval_case(seed, rows)
        for k in (1, 5, 1000):
            expected = sorted_plainly(queries, documents, ids, k)
            wrong += [(seed, block, k) for block in (1, 7, 50, 4096)
                      if rank_documents(queries, documents, ids, k, block).tolist() != expected]
    assert wrong == []


def test_ids_are_compared_as_texts():
    same = np.ones((4, 3), dtype=np.float32)
    ranking = rank_documents(same[:1], same, ["10", "9", "1", "100"])
    assert ranking.tolist() == [[1, 3, 0, 2]]


def test_zero_and_minus_zero_are_the_same_score():
    documents = np.float32([[0.0], [-0.0], [1.0]])
    ranking = rank_documents(np.float32([[-1], [-1]]), documents, ["b", "a", "c"])
    assert ranking.tolist() == [[0, 1, 2]] * 2


def test_more_queries_than_a_piece_keep_their_order():
    random = np.random.default_rng(0)
    queries, documents = exact_rows(random, 1500), exact_rows(random, 40)
    ids = [str(i) for i in range(40)]
    ranking = rank_documents(queries, documents, ids)
    assert ranking.shape == (1500, 40)
    assert ranking[1000:1050].tolist() == sorted_plainly(queries[1000:1050], documents, ids, 40)


@pytest.mark.parametrize("rows", [exact_rows, normal_rows, repeated_rows])
def test_reranking_is_scikit_learns_average_precision_and_a_plain_loops_reciprocal_rank(rows):
    for seed in range(150):
        random = np.random.default_rng(seed)
        queries, documents = rows(random, 5), rows(random, 30)
        candidates = [random.integers(0, 30, random.integers(2, 25)) for _ in queries]
        relevant = [np.arange(len(c)) < random.integers(1, len(c)) for c in candidates]
        scores = reranking(queries, documents, candidates, relevant)
        precision, reciprocal = [], []
        for row, c, truth in zip(cosine_table(queries, documents), candidates, relevant):
            precision.append(sklearn.metrics.average_precision_score(truth, row[c]))
            order = sorted(zip(-row[c], truth))  # the irrelevant first among equals
            first = [t for _, t in order].index(True) + 1
            reciprocal.append(1 / first if first <= 10 else 0)
        assert np.abs(scores["per_query"] - precision).max() <= 1e-9
        assert scores["map"] == pytest.approx(np.mean(precision), abs=1e-9)
        assert scores["mrr_at_10"] == pytest.approx(np.mean(reciprocal), abs=1e-9)


def test_a_tie_counts_against_the_relevant_document():
    same = np.ones((3, 2), dtype=np.float32)
    scores = reranking(same[:1], same, [np.arange(3)], [np.array([True, False, False])])
    assert scores["mrr_at_10"] == pytest.approx(1 / 3)
    assert scores["map"] == pytest.approx(1 / 3)


# ---------------------------------------------------------------------------------------------
# The other kinds
# ---------------------------------------------------------------------------------------------


def test_sts_gives_both_correlations_and_the_cosines():
    random = np.random.default_rng(0)
    left, right = random.standard_normal((2, 200, 8)).astype(np.float32)
    gold = random.integers(0, 6, 200)
    scores = sts(left, right, gold)
    cosines = (unit(left) * unit(right)).sum(1)
    spearmans = scipy.stats.spearmanr(paired_cosine(left, right), gold).statistic
    assert scores["cosine_spearman"] == pytest.approx(spearmans, abs=1e-9)
    pearsons = scipy.stats.pearsonr(cosines, gold).statistic
    assert scores["cosine_pearson"] == pytest.approx(pearsons, abs=1e-6)
    assert np.abs(scores["cosines"] - cosines).max() < 1e-6
    assert np.array_equal(scores["gold"], gold)


@pytest.mark.parametrize("block", [1, 7, 4096])
def test_pair_classification_is_scikit_learns_on_each_similarity_whatever_the_block(block):
    for seed in range(30):
        random = np.random.default_rng(seed)
        left, right = random.integers(-3, 4, (2, 60, 5)).astype(np.float32)
        some = random.integers(0, 60, 60)
        left, right = left[some], right[some]  # ties
        labels = (random.random(60) < 0.3).astype(float)
        labels[:2] = 0, 1
        similarities = {
            "cosine": paired_cosine(left, right), "dot": (left * right).sum(1),
            "manhattan": -np.abs(left - right).sum(1), "euclidean": -((left - right) ** 2).sum(1),
        }
        theirs = {name: sklearn.metrics.average_precision_score(labels, s)
                  for name, s in similarities.items()}
        scores = pair_classification(left, right, labels, block)
        assert len(scores) == 5
        for name, ap in theirs.items():
            assert scores[f"{name}_ap"] == pytest.approx(ap, abs=1e-9)
        assert scores["max_ap"] == max(scores[f"{name}_ap"] for name in theirs)
    assert len({round(ap, 6) for ap in theirs.values()}) > 1


def clusters(seed: int, n: int, k: int, d: int, spread: float):
    """n points (n, d) float32 about k normal centres, and the centre of each."""
    random = np.random.default_rng(seed)
    centers, labels = random.standard_normal((k, d)), random.integers(0, k, n)
    return (centers[labels] + spread * random.standard_normal((n, d))).astype(np.float32), labels


def sklearn_clusters(x: np.ndarray, k: int) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fewer distinct points than clusters
        model = MiniBatchKMeans(n_clusters=k, batch_size=500, n_init="auto", random_state=42)
        return model.fit_predict(x)


@pytest.mark.parametrize("n, k, d, spread, distinct", [
    (100, 2, 4, 4, 100), (300, 20, 16, 1, 300), (499, 5, 4, 0.3, 499), (500, 51, 64, 1, 500),
    (501, 10, 16, 1, 501), (800, 51, 16, 0.3, 800), (1500, 20, 4, 4, 300), (1600, 51, 64, 2, 1600),
    (2500, 5, 16, 2, 2500), (4000, 10, 4, 2, 1000), (4000, 20, 64, 4, 4000),
])
def test_mini_batch_k_means_gives_scikit_learns_labels(n, k, d, spread, distinct):
    x, _ = clusters(n + k, n, k, d, spread)
    x = x[np.random.default_rng(0).integers(0, distinct, n)] if distinct < n else x
    ours = mini_batch_k_means(x, k)
    assert np.array_equal(ours, sklearn_clusters(x, k)) and len(set(ours)) > 1


@pytest.mark.parametrize("n, k, distinct", [(300, 30, 20), (600, 10, 3), (100, 5, 1), (700, 9, 9)])
def test_equal_points_share_a_cluster_also_where_there_are_more_clusters_than_points(
    n, k, distinct
):
    x, _ = clusters(0, distinct, k, 8, 1)
    which = np.arange(n) % distinct
    labels = mini_batch_k_means(x[which], k)
    assert len({*zip(which, labels)}) == distinct and labels.min() >= 0 and labels.max() < k
    assert len(set(labels)) >= distinct - 1


def test_the_mean_v_measure_over_ten_sets_is_scikit_learns_within_half_a_point():
    ours, theirs, sets, labels = [], [], [], []
    for seed in range(10):
        x, truth = clusters(seed, 200 + 150 * seed, 12, 24, 1.5)
        ours.append(v_measure(truth, mini_batch_k_means(x, 12)))
        theirs.append(sklearn.metrics.v_measure_score(truth, sklearn_clusters(x, 12)))
        sets.append(x)
        labels.append(truth.tolist())
    assert np.mean(ours) == pytest.approx(np.mean(theirs), abs=0.005)
    assert 0.2 < np.mean(theirs) < 0.95
    scores = evaluate.clustering(np.concatenate(sets), labels)
    assert scores["v_measures"] == ours and scores["v_measure"] == pytest.approx(np.mean(ours))
    assert scores["v_measure_std"] == pytest.approx(np.std(ours))


def test_a_set_has_as_many_clusters_as_labels(monkeypatch):
    asked = []
    monkeypatch.setattr(evaluate, "mini_batch_k_means",
                        lambda x, k: asked.append((len(x), k)) or np.zeros(len(x), dtype=int))
    evaluate.clustering(np.zeros((7, 2)), [["a", "b", "a", "c"], ["a", "a"], ["x"]])
    assert asked == [(4, 3), (2, 1), (1, 1)]


def classes(seed: int, k: int, d: int, spread: float, long: bool):
    """Training and test sets of k overlapping classes, of unit norm or of norms 60 to 150."""
    random = np.random.default_rng(seed)
    centers = random.standard_normal((k, d))

    def draw(n):
        labels = random.integers(0, k, n)
        x = unit(centers[labels] + spread * random.standard_normal((n, d)))
        return (x * random.uniform(60, 150, (n, 1)) if long else x).astype(np.float32), labels

    return *draw(60 * k), *draw(600)


@pytest.mark.parametrize("long, points", [(False, 0.3), (True, 0.5)], ids=["unit", "long"])
@pytest.mark.parametrize("k, d, spread, shots", [(2, 32, 3.5, 8), (6, 32, 2.2, 16),
                                                 (20, 64, 2.2, 8)])
def test_classification_is_scikit_learns_logistic_regression(k, d, spread, shots, long, points):
    train, y, test, truth = classes(k, k, d, spread, long)
    draws = draw_training_sets(y.tolist(), shots)
    accuracy, f1 = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # not converged after 100 iterations
        for rows in draws:
            model = LogisticRegression(max_iter=100, random_state=42).fit(train[rows], y[rows])
            predicted = model.predict(test)
            accuracy.append(np.mean(predicted == truth))
            f1.append(sklearn.metrics.f1_score(truth, predicted, average="macro"))
    scores = classification(train, test, y.tolist(), truth.tolist(), draws)
    assert 0.6 < np.mean(accuracy) < 0.9
    assert 100 * scores["accuracy"] == pytest.approx(100 * np.mean(accuracy), abs=points)
    assert 100 * scores["f1"] == pytest.approx(100 * np.mean(f1), abs=points)
    single = [run["accuracy"] for run in scores["scores_per_experiment"]]
    assert len(single) == 10 and scores["accuracy"] == pytest.approx(np.mean(single))
    assert 100 * np.abs(np.array(single) - accuracy).max() <= 4 * points


def test_labels_may_be_texts_or_numbers():
    train, y, test, truth = classes(0, 3, 8, 1, False)
    draws = draw_training_sets(y.tolist(), 8)
    numbers = classification(train, test, y.tolist(), truth.tolist(), draws)
    names = [[f"label {i}" for i in labels] for labels in (y, truth)]
    assert classification(train, test, *names, draws) == numbers


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
    return {**folder_task(write(tmp_path, kind), kind), **about}


def test_an_sts_task_gives_scipys_correlation_of_the_cosines(tmp_path):
    left, right, gold = zip(*(row.values() for row in FILES["sts"]["test"]))
    a, b = letters(left), letters(right)
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    expected = scipy.stats.spearmanr(cosines, gold).statistic
    scores = evaluate_task(folder(tmp_path, "sts"), letters)
    assert 0.1 < expected < 1 and scores["main_score"] == pytest.approx(expected, abs=1e-9)
    assert scores["cosine_spearman"] == scores["main_score"] and scores["notes"] == []


def test_a_retrieval_task_gives_pytrec_evals_ndcg_of_the_cosines(tmp_path):
    documents = hashed(["Owl hunts at night", "no title", ""])
    cosines = cosine_table(hashed(["night, bird", "bird"]), documents)
    ids, judged = ["d9", "d10", "d1"], [{"d9": 1}, {"d10": 2, "d1": 0}]
    expected = trec(cosines, ["q1", "q3"], ids, judged)["ndcg_cut_10"]
    scores = evaluate_task(folder(tmp_path, "retrieval"), hashed)
    assert scores["main_score"] == scores["ndcg_at_10"] == pytest.approx(expected.mean(), abs=1e-6)
    assert 0.3 < expected.mean() < 1 and scores["per_query"] == pytest.approx(expected, abs=1e-6)


def test_a_classification_task_gives_scikit_learns_accuracy(tmp_path):
    (train, y), (test, truth) = (
        zip(*(row.values() for row in FILES["classification"][name])) for name in ("train", "test"))
    expected = []
    for rows in draw_training_sets(list(y), 2):
        model = LogisticRegression(max_iter=100).fit(hashed(train)[rows], np.array(y)[rows])
        expected.append(np.mean(model.predict(hashed(test)) == np.array(truth)))
    task = folder(tmp_path, "classification", samples_per_label=2)
    assert evaluate_task(task, hashed)["main_score"] == pytest.approx(np.mean(expected))
    assert 0 < np.mean(expected) < 1


def test_a_clustering_task_gives_scikit_learns_v_measure_of_each_set(tmp_path):
    words = TEXT.split()
    sets = [{"sentences": words[i::2], "labels": [len(word) % 3 for word in words[i::2]]}
            for i in range(2)]
    expected = [sklearn.metrics.v_measure_score(s["labels"], sklearn_clusters(
        hashed(s["sentences"]), 3)) for s in sets]
    write(tmp_path, "clustering", test=sets)
    scores = evaluate_task(folder_task(tmp_path, "clustering"), hashed)
    assert scores["main_score"] == pytest.approx(np.mean(expected))
    assert 0 < np.mean(expected) < 1 and len(set(expected)) == 2


def test_a_pair_classification_task_gives_the_best_average_precision(tmp_path):
    left, right, labels = zip(*(row.values() for row in FILES["pair-classification"]["test"]))
    a, b = hashed(left), hashed(right)
    expected = max(sklearn.metrics.average_precision_score(labels, s) for s in (
        (unit(a) * unit(b)).sum(1), (a * b).sum(1), -np.abs(a - b).sum(1)))
    scores = evaluate_task(folder(tmp_path, "pair-classification"), hashed)
    assert scores["main_score"] == scores["max_ap"] == pytest.approx(expected)


def test_a_reranking_task_gives_scikit_learns_average_precision_of_the_cosines(tmp_path):
    expected, words = [], TEXT.split()
    rows = [{"query": word, "positive": words[i : i + 2], "negative": words[i + 9 : i + 15]}
            for i, word in enumerate(words[:20])]
    for row in rows:
        documents = row["positive"] + row["negative"]
        cosines = cosine_table(hashed([row["query"]]), hashed(documents))[0]
        truth = [True] * len(row["positive"]) + [False] * len(row["negative"])
        expected.append(sklearn.metrics.average_precision_score(truth, cosines))
    write(tmp_path, "reranking", test=rows)
    scores = evaluate_task(folder_task(tmp_path, "reranking"), hashed)
    assert scores["main_score"] == scores["map"] == pytest.approx(np.mean(expected))
    assert scores["per_query"] == pytest.approx(expected) and 0.3 < np.mean(expected) < 0.9


@pytest.mark.parametrize("kind", FILES)
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
def test_documents_can_be_encoded_by_a_function_of_their_own(kind, documents, tmp_path):
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
def test_what_an_encode_function_returns_is_checked(encode, fragment, tmp_path):
    with pytest.raises(UserError, match=fragment) as caught:
        evaluate_task(folder(tmp_path, "sts"), encode)
    assert "\n" not in str(caught.value)


def test_texts_with_the_zero_vector_are_counted(tmp_path):
    def encode(texts):
        return hashed(texts) * np.array([[len(text) > 4] for text in texts])

    task = folder(tmp_path, "retrieval")
    notes = [note for note in evaluate_task(task, encode)["notes"] if "zero" in note]
    assert notes == ["1 of 2 texts have the zero vector (cosine 0)",
                     "1 of 3 texts have the zero vector (cosine 0)"]


def test_a_score_that_is_not_a_number_is_refused(tmp_path):
    with pytest.raises(UserError, match="no rank correlation"):
        evaluate_task(folder(tmp_path, "sts"), lambda texts: np.ones((len(texts), 3)))


def test_the_embedded_tasks_are_scored_by_name():
    for name in ("demo-sts", "demo-retrieval"):
        scores = evaluate_task(name, letters)
        assert 0.1 < scores["main_score"] < 1 and scores["notes"] == []


@pytest.mark.parametrize("name, near", [
    ("stss17", "sts17"), ("STS17", "sts17"), ("SciFact", "scifact"), ("clusterin", "clustering"),
    ("ALL", "all"),
])
def test_an_unknown_task_is_told_with_the_nearest_names(name, near, capsys):
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
def test_the_one_word_prompts_get_a_sentence(text, sentence):
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
def test_every_training_free_method_embeds_any_text_alone_as_among_others(method, tiny):
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


def test_a_plain_llama_is_read_by_the_weighted_mean_unless_told_otherwise(tiny):
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


def write_encoder(tiny: Path, where: Path, seed=0, **settings) -> Path:
    """An encoder folder as stage 1 leaves it, its adapters random."""
    config = EncoderConfig(**{"num_memory_tokens": 2, "max_tokens": 64, **settings})
    encoder = plain_encoder(tiny, config)
    random = torch.Generator().manual_seed(seed)
    encoder.add_memory("normal", True, random)
    add_lora(encoder.llama, encoder.lora_config, random)
    encoder.history = [{"stage": "ctkd", "seed": seed}]
    save_encoder(encoder, where)
    return where


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

PLACES = {  # task -> the file of its folder under --data-dir, kind
    "sts17": ("sts17-crosslingual-sts", "sts"), "sickr": ("sickr-sts", "sts"),
    "scifact": ("scifact", "retrieval"), "scidocs": ("scidocs-reranking", "reranking"),
    "sprint": ("sprintduplicatequestions-pairclassification", "pair-classification"),
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder beside data/ with the tasks of PLACES."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for place, kind in PLACES.values():
        write(tmp_path / "data" / place, kind)
    return tmp_path / "work"


@pytest.fixture
def encoded(monkeypatch):
    """The (texts, instruction) of every call of Encoder.encode from now on."""
    calls, whole = [], Encoder.encode

    def encode(self, texts, instruction="", **options):
        calls.append((texts, instruction))
        return whole(self, texts, instruction, **options)

    monkeypatch.setattr(Encoder, "encode", encode)
    return calls


def main(*arguments) -> int:
    flags = ["--data-dir", "../data", "--device", "cpu", "--threads", "1"]
    return evaluate.main([*flags, *map(str, arguments)])


def sts17(*arguments) -> int:
    return main("--task", "sts17", *arguments)


def files(where: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in where.rglob("*") if path.is_file()}


def error(capsys) -> str:
    """The one error line on stderr."""
    lines = re.split("[\r\n]+", capsys.readouterr().err)
    (line,) = [line for line in lines if line.startswith("error: ")]
    return line


def test_list_shows_each_task_with_kind_and_main_score(capsys):
    assert evaluate.main(["--list"]) == 0
    printed = capsys.readouterr().out
    for name, task in TASKS.items():
        (line,) = [line for line in printed.splitlines() if line.split()[:1] == [name]]
        for word in (task["kind"], evaluate.KINDS[task["kind"]][1], task.get("group", "-")):
            assert word in line.split()
    assert "10,003 train" in printed and "characters" not in printed


@pytest.mark.parametrize("given, expected", [
    (["all"], PAPER), (["sts"], ["sts17", "sickr", "stsbenchmark"]),
    (["classification"], ["banking77", "emotion", "sprint"]),
    (["sickr", "sts", "demo-sts", "sickr"], ["sickr", "sts17", "stsbenchmark", "demo-sts"]),
])
def test_groups_and_all_stand_for_their_tasks_each_once(given, expected):
    tasks = chosen_tasks(parse_arguments(["--task", *given]))
    assert list(tasks) == expected and all(tasks[name] is TASKS[name] for name in tasks)


@pytest.mark.parametrize("arguments, fragments", [
    ([], ["nothing to do", "--task", "--list"]),
    (["--task-dir", "."], ["--task-dir .: needs --kind", "clustering"]),
    (["--task-dir", "nowhere", "--kind", "sts"], ["nowhere: no such folder"]),
])
def test_a_command_without_a_task_is_told_what_it_lacks(arguments, fragments, here, capsys):
    assert main(*arguments) == 2
    line = error(capsys)
    assert all(fragment in line for fragment in fragments) and files(here) == {}


@pytest.mark.parametrize("kind", FILES)
def test_a_folder_of_any_kind_is_a_task_of_its_own(kind, tiny, here, capsys):
    write(here / "my task", kind)
    assert main("--task-dir", "my task", "--kind", kind, "--model", tiny) == 0
    (path,) = here.glob("results/*/my task.json")
    result, encode = json.loads(path.read_text()), encoding(*open_model(str(tiny)))
    expected = evaluate_task(folder_task("my task", kind), encode)["main_score"]
    assert result["scores"]["test"][0]["main_score"] == pytest.approx(expected, abs=1e-9)
    assert (result["task_name"], result["dataset_revision"]) == ("my task", "local")
    assert f"{100 * expected:.2f}" in capsys.readouterr().out


def test_the_json_file_says_what_the_score_depends_on(tiny, here, capsys):
    where = write_encoder(tiny, here / "mine", attention="causal")
    assert sts17("--model", "mine", "--dtype", "bfloat16", "--results", "out") == 0
    printed = capsys.readouterr().out
    result = json.loads((here / "out/mine/STS17.json").read_text())
    settings, (scores,) = result["settings"], result["scores"]["test"]
    encoder, _ = open_model(str(where), dtype=torch.bfloat16)
    expected = evaluate_task("sts17", encoder.encode, here.parent / "data")["main_score"]
    assert scores["main_score"] == scores["cosine_spearman"] == expected
    assert scores["hf_subset"] == "en-en" and result["task_name"] == "STS17"
    about = {"model": "mine", "method": "memory", "pooling": "memory", "num_memory_tokens": 2,
             "attention": "causal", "max_tokens": 64, "template": "{text}", "instruction": "",
             "dtype": "torch.bfloat16", "device": "cpu", "threads": 1, "ranks": 1,
             "history": [{"stage": "ctkd", "seed": 0}],
             "data": str(here.parent / "data/sts17-crosslingual-sts")}
    assert {key: settings[key] for key in about} == about
    assert settings["base"]["name"] == str(tiny) and len(settings["base"]["sha256"]) == 64
    assert len(settings["sha256"]) == 64 and settings["versions"]["torch"] == torch.__version__
    assert settings["versions"]["numpy"] == importlib.metadata.version("numpy")
    assert re.search(rf"sts17 +cosine_spearman +{100 * expected:.2f} ", printed)
    assert "written to out/mine/" in printed


@pytest.mark.parametrize("model, method, label", [
    ("runs/a/encoder", "memory", "runs__a"), ("runs/a", "memory", "runs__a"),
    ("runs/a/", "memory", "runs__a"), ("./runs/a", "memory", "runs__a"),
    ("demo", "echo", "demo@echo"), ("owner/name", "last", "owner__name@last"),
    ("/tmp/x", "mean", "tmp__x@mean"),
])
def test_results_go_to_a_folder_named_by_model_and_method(model, method, label):
    assert evaluate.label_of(model, method) == label
    assert evaluate.label_of(model, method, "none") == f"{label}+none"
    assert evaluate.label_of(model, method, "Find it") == f"{label}+instruction"


@pytest.mark.parametrize("name", [".", "./", ".."])
def test_a_model_without_a_name_of_its_own_has_a_folder_of_results_too(name):
    assert evaluate.label_of(name, "memory") not in ("", ".", "..")


def test_every_method_has_its_own_score_and_file(tiny, here):
    for method in METHODS:
        assert main("--task", "sts17", "sickr", "--model", tiny, "--method", method) == 0
    results = [json.loads(path.read_text()) for path in here.glob("results/*/*.json")]
    assert Counter(r["settings"]["method"] for r in results) == dict.fromkeys(METHODS, 2)
    for result in results:
        method = METHODS[result["settings"]["method"]]
        assert result["settings"]["template"] == method["prompts"][0]
        assert result["settings"]["paper"] == method["paper"]
        assert -1 <= result["scores"]["test"][0]["main_score"] <= 1
    assert len({path.parent.name.partition("@")[2] for path in here.glob("results/*/*")}) == 6


def test_a_trained_encoder_of_a_classic_pooling_is_no_training_free_method(tiny, here):
    write_encoder(tiny, here / "mine", num_memory_tokens=0, pooling="last", template="q: {text}")
    assert sts17("--model", "mine") == 0
    settings = json.loads((here / "results/mine/STS17.json").read_text())["settings"]
    assert (settings["method"], settings["template"]) == ("last", "q: {text}")
    assert settings["paper"] is None


def test_finished_tasks_are_not_encoded_again_unless_forced(tiny, here, encoded, capsys):
    assert sts17("--model", tiny) == 0
    first, before = capsys.readouterr().out, files(here)
    assert len(encoded) == 1
    assert main("--task", "sts17", "sickr", "--model", tiny) == 0
    printed = capsys.readouterr().out
    lines = {line.split()[0]: line for line in printed.splitlines() if "cosine_spearman" in line}
    assert "finished before" in lines["sts17"] and "finished before" not in lines["sickr"]
    assert lines["sts17"].split()[:3] == re.search("sts17.*", first)[0].split()[:3]
    assert len(encoded) == 2 and {**files(here), **before} == files(here)
    assert sts17("--model", tiny, "--force") == 0
    assert len(encoded) == 3 and "finished before" not in capsys.readouterr().out


def other_method(here, tiny):
    (first,) = here.glob("results/*")
    shutil.copytree(first, first.with_name(evaluate.label_of(str(tiny), "last")))
    return ["--model", tiny, "--method", "last"]


def other_weights(here, tiny):
    shutil.rmtree(here / "mine")
    write_encoder(tiny, here / "mine", seed=1)
    return ["--model", "mine"]


def other_base(here, tiny):
    path = here / "llama/model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"] += 1
    save_file(weights, path)
    return ["--model", "llama"]


def other_data(here, tiny):
    shutil.copytree(here.parent / "data", here / "data")
    return ["--model", tiny, "--data-dir", "data"]


@pytest.mark.parametrize("model, change, said", [
    ("TINY", lambda *_: ["--model", "TINY", "--dtype", "bfloat16"],
     "dtype: 'torch.float32' -> 'torch.bfloat16'"),
    ("TINY", other_method, "method: 'weighted-mean' -> 'last'"),
    ("mine", other_weights, "sha256: "), ("llama", other_base, "the base model"),
    ("TINY", other_data, "data: "),
])
def test_a_result_of_other_settings_is_not_taken_nor_overwritten(
    model, change, said, tiny, here, encoded, capsys
):
    write_encoder(tiny, here / "mine")
    shutil.copytree(tiny, here / "llama")
    place = {"TINY": str(tiny)}
    assert sts17("--model", place.get(model, model)) == 0
    arguments = [place.get(str(a), str(a)) for a in change(here, tiny)]
    before, calls = files(here), len(encoded)
    capsys.readouterr()
    assert sts17(*arguments) == 2
    line = error(capsys)
    assert "STS17.json: was made with other settings (" in line and said in line
    assert "--force" in line and files(here) == before and len(encoded) == calls
    assert sts17(*arguments, "--force") == 0 and len(encoded) == calls + 1


def test_a_plain_llama_reads_as_many_tokens_as_it_is_told_to(tiny, here, encoded, capsys):
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
    assert sts17("--model", tiny, "--results", "at 12") == 2
    assert "max_tokens: 12 -> 512" in error(capsys)


def test_another_instruction_is_another_setting(tiny, here, capsys):
    write_encoder(tiny, here / "mine", template=INSTRUCTED)
    for wanted, code in (("auto", 0), ("none", 0), ("Find it", 0), ("Find that", 2)):
        assert sts17("--model", "mine", "--instruction", wanted) == code
    assert "instruction: 'Find it' -> 'Find that'" in error(capsys)
    assert sorted(p.name for p in here.glob("results/*")) == ["mine", "mine+instruction",
                                                             "mine+none"]


def drop(*keys):
    return lambda result: json.dumps({k: v for k, v in result.items() if k not in keys})


def change(**new):
    return lambda result: json.dumps({**result, **new})


DAMAGES = {
    "empty": lambda _: "", "not JSON": lambda _: "{", "null": lambda _: "null",
    "a list": lambda _: "[]", "a number": lambda _: "3", "binary": lambda _: "\0",
    "cut off": lambda result: json.dumps(result)[:-40], "no settings": drop("settings"),
    "no scores": drop("scores"), "no notes": drop("notes"), "no time": drop("evaluation_time"),
    "settings a number": change(settings=3), "settings a list": change(settings=[]),
    "settings a text": change(settings="x"), "no split": change(scores={}),
    "an empty split": change(scores={"test": []}), "no main score": change(scores={"test": [{}]}),
    "null for a score": change(scores={"test": [{"main_score": None}]}),
    "a word for a score": change(scores={"test": [{"main_score": "high"}]}),
    "notes a number": change(notes=3),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_result_is_named_and_force_makes_it_anew(damage, tiny, here, capsys):
    assert sts17("--model", tiny) == 0
    (path,) = here.glob("results/*/*.json")
    whole = path.read_text()
    path.write_text(damage(json.loads(whole)))
    before = files(here)
    capsys.readouterr()
    assert sts17("--model", tiny) == 2
    line = error(capsys)
    assert f"{path.relative_to(here)}: damaged" in line and "--force" in line
    assert files(here) == before
    assert sts17("--model", tiny, "--force") == 0
    assert json.loads(path.read_text())["scores"] == json.loads(whole)["scores"]


def test_a_task_without_data_does_not_stop_the_others(tiny, here, capsys):
    shutil.rmtree(here.parent / "data/scifact")
    assert main("--task", "sts17", "scifact", "sickr", "--model", tiny) == 2
    said = capsys.readouterr()
    assert [p.name for p in sorted(here.glob("results/*/*"))] == ["SICK-R.json", "STS17.json"]
    lines = [line for line in said.err.splitlines() if "error:" in line]
    assert len(lines) == 1 and "data/scifact: no such folder" in lines[0]
    assert "sickr" in said.out and "average (2 of 14 tasks)" in said.out
    write(here.parent / "data/scifact", "retrieval")
    assert main("--task", "sts17", "scifact", "sickr", "--model", tiny) == 0


def test_zero_vectors_and_other_counts_stand_in_the_table_and_in_the_file(
    tiny, here, monkeypatch, capsys
):
    whole = Encoder.encode
    monkeypatch.setattr(Encoder, "encode", lambda self, texts, *a, **o: whole(
        self, texts, *a, **o) * np.array([[text != ""] for text in texts]))
    for again in range(2):  # the second time from the file
        assert sts17("--model", tiny) == 0
        notes = ["4 pairs, the published task has 250",
                 "88 characters, the published task has 21,669",
                 "1 of 5 texts have the zero vector (cosine 0)"]
        printed = capsys.readouterr().out
        assert re.findall("note: (.*)", printed) == notes
        (path,) = here.glob("results/*/*.json")
        assert json.loads(path.read_text())["notes"] == notes
        assert ("finished before" in printed) == bool(again)


def test_equal_counts_are_not_noted(tiny, here, monkeypatch, capsys):
    monkeypatch.setitem(TASKS["sts17"], "expected", {"pairs": 4, "characters": 88})
    assert sts17("--model", tiny) == 0
    assert "note" not in capsys.readouterr().out


def test_an_embedding_that_is_not_finite_is_exit_code_2_and_leaves_no_file(
    tiny, here, monkeypatch, capsys
):
    monkeypatch.setattr(Encoder, "encode", lambda self, texts, *_, **__: np.full(
        (len(texts), 4), np.nan, dtype=np.float32))
    assert sts17("--model", tiny) == 2
    assert "embedding of 'A dog runs.' and of 4 other texts has nan" in error(capsys)
    assert files(here) == {}


def test_documents_of_retrieval_and_reranking_get_no_instruction_and_all_others_do(
    tiny, here, encoded, capsys
):
    write_encoder(tiny, here / "mine", template=INSTRUCTED, max_tokens=256)
    names = ["scifact", "scidocs", "sts17", "sprint"]
    assert main("--task", *names, "--model", "mine") == 0
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


def test_an_encoder_that_never_saw_instructions_gets_none(tiny, here, encoded, capsys):
    write_encoder(tiny, here / "mine")
    assert main("--task", "scifact", "--model", "mine") == 0
    assert [instruction for _, instruction in encoded] == ["", ""]
    assert "instruction" not in capsys.readouterr().out


def test_an_encoder_trained_with_instructions_can_be_asked_to_do_without(
    tiny, here, encoded, capsys
):
    write_encoder(tiny, here / "mine", template=INSTRUCTED)
    assert main("--task", "scifact", "--model", "mine", "--instruction", "none") == 0
    assert [instruction for _, instruction in encoded] == ["", ""]
    assert "instruction: none" in capsys.readouterr().out


def test_an_instruction_for_a_prompt_without_a_place_is_refused(tiny, here, capsys):
    flags = ["--model", tiny, "--instruction", "Find it"]
    assert sts17(*flags, "--method", "echo") == 2
    assert "'Find it'" in error(capsys) and files(here) == {}
    assert sts17(*flags, "--method", "last") == 0


def test_the_default_model_is_the_encoder_written_last(tiny, here, capsys):
    for i, name in enumerate("cba"):
        where = write_encoder(tiny, here / "runs" / name / "encoder", seed=i)
        when = 2_000_000_000 - 1000 * abs(i - 1)
        os.utime(where / "encoder.json", (when, when))
    assert sts17() == 0
    assert "model   runs/b/encoder  (the newest encoder under runs/)" in capsys.readouterr().out
    settings = json.loads((here / "results/runs__b/STS17.json").read_text())["settings"]
    assert settings["model"] == "runs/b/encoder" and settings["history"][0]["seed"] == 1


def test_without_a_run_the_default_model_is_the_embedded_llama(here, capsys):
    (here / "runs" / "unfinished").mkdir(parents=True)
    assert sts17() == 0
    assert "model   demo  (the embedded tiny Llama)" in capsys.readouterr().out
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
    (["--model", "mine", "--max-tokens", "32"], ["--max-tokens 32", "trained with 64"]),
    (["--model", "TINY", "--max-tokens", "-9"], ["max_tokens=-9"]),
    (["--model", "nowhere"], ["nowhere: no such folder"]),
    (["--model", "mine", "--base", "nowhere"], ["base model cannot be loaded", "--base"]),
    (["--model", "mine", "--data-dir", "nowhere"], ["nowhere/sts17", "--data-dir"]),
    (["--model", "mine", "--results", "mine/encoder.json"], ["cannot be written", "--results"]),
])
def test_a_wrong_argument_is_exit_code_2_and_leaves_no_file(
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
                                   ["--timeout", "0"], ["--timeout", "nan"], ["--max-tokens", "0"]])
def test_a_setting_that_no_run_can_have_is_refused(flags, capsys):
    with pytest.raises(SystemExit) as caught:
        evaluate.main(["--task", "demo-sts", *flags])
    assert caught.value.code == 2 and "must be above 0" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_exit_code_2(tiny, here, capsys):
    assert sts17("--model", tiny, "--device", "cuda") == 2
    assert "--device cuda" in error(capsys)


def test_a_moved_base_is_found_with_the_flag(tiny, here):
    elsewhere = shutil.copytree(tiny, here / "elsewhere")
    write_encoder(elsewhere, here / "mine")
    elsewhere.rename(here / "moved")
    assert sts17("--model", "mine") == 2
    assert sts17("--model", "mine", "--base", "moved") == 0


# ---------------------------------------------------------------------------------------------
# Averages and comparisons
# ---------------------------------------------------------------------------------------------


def test_a_mean_is_only_over_complete_sets_of_tasks():
    assert mean_of({"a": 1.0, "b": 4.0, "c": 9.0}, ["a", "b"]) == 2.5
    assert mean_of({"a": 1.0}, ["a", "b"]) is None


def test_the_summary_averages_complete_groups_and_the_14():
    scores = {task: float(i) for i, task in enumerate(PAPER)}
    rows = dict(summary(scores))
    assert rows.pop("average (14 tasks)") == pytest.approx(6.5)
    assert rows == {f"{group} ({len(tasks)} tasks)": np.mean([scores[t] for t in tasks])
                    for group, tasks in GROUPS.items()}


def test_the_summary_of_a_part_says_how_many_of_the_tasks_are_there():
    some = {"sts17": 80.0, "sickr": 70.0, "stsbenchmark": 60.0, "biorxiv": 20.0, "demo-sts": 5.0}
    assert summary(some) == [("clustering (1 of 3 tasks)", None), ("sts (3 tasks)", 70.0),
                             ("average (4 of 14 tasks)", None)]
    assert summary({"demo-sts": 5.0}) == [] == summary({})
    assert summary({task: 1.0 for task in PAPER[1:]})[-1] == ("average (13 of 14 tasks)", None)


def test_the_published_row_of_a_whole_run_has_the_published_average():
    row = dict(zip(PAPER, PUBLISHED["rows"]["LLM2Comp KL + SCL"]))
    assert dict(summary(row))["average (14 tasks)"] == pytest.approx(66.78, abs=0.02)


def test_the_table_ends_with_group_averages(tiny, here, capsys):
    write(here.parent / "data/stsbenchmark-sts", "sts")
    assert main("--task", "sts", "--model", tiny) == 0
    printed = capsys.readouterr().out
    scores = [float(re.search(rf"^{name} .*?([\d.-]+) +[\d.]+$", printed, re.M)[1])
              for name in GROUPS["sts"]]
    mean = float(re.search(r"^sts \(3 tasks\) +([\d.-]+)$", printed, re.M)[1])
    assert mean == pytest.approx(np.mean(scores), abs=0.01)
    assert re.search(r"^average \(3 of 14 tasks\) +-$", printed, re.M)


def write_results(where: Path, paper=None, notes=(), **scores):
    """Result files of a run with these main scores x 100."""
    where.mkdir(parents=True)
    for key, score in scores.items():
        name = TASKS[key]["name"] if key in TASKS else key
        result = {"task_name": name, "scores": {"test": [{"main_score": score / 100}]},
                  "evaluation_time": 1.0, "notes": list(notes), "settings": {"paper": paper}}
        (where / f"{name}.json").write_text(json.dumps(result))


def compared(capsys, *names) -> tuple[list[str], dict[str, list[str]]]:
    """The titles of --compare's columns, and the cells of each line of scores."""
    assert main("--compare", *names) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    table = lines[: [line.startswith("published rows:") for line in lines].index(True)]
    cells = {line[:26].strip(): line[26:].split() for line in table}
    return re.split(r"\s{2,}", head[26:].strip()), cells


def test_two_runs_stand_side_by_side_with_their_difference(here, capsys):
    write_results(here / "results/runs__a", sts17=80, sickr=70.5)
    write_results(here / "results/b@last", sts17=75.25, scifact=30, own=1)
    titles, cells = compared(capsys, "runs/a", "b@last")
    assert titles == ["runs__a", "b@last", "against runs__a"]
    assert cells == {"sts17": ["80.00", "75.25", "-4.75"], "sickr": ["70.50", "-", "-"],
                     "scifact": ["-", "30.00", "-"], "own": ["-", "1.00", "-"],
                     "tasks of the 14": ["2", "2", "1"]}


def test_a_run_stands_beside_the_papers_row_for_it_and_a_named_row(here, capsys):
    row = dict(zip(PAPER, PUBLISHED["rows"]["WMP"]))
    write_results(here / "results/a", "WMP", **{task: row[task] + 1 for task in PAPER})
    titles, cells = compared(capsys, "a", "LLM2Comp KL + SCL")
    assert titles == ["a", "paper: WMP", "difference", "LLM2Comp KL + SCL", "against a"]
    best = dict(zip(PAPER, PUBLISHED["rows"]["LLM2Comp KL + SCL"]))
    for task in PAPER:
        ours, theirs = row[task] + 1, best[task]
        assert cells[task] == [f"{ours:.2f}", f"{row[task]:.2f}", "+1.00", f"{theirs:.2f}",
                               f"{theirs - ours:+.2f}"]
    average = [float(cell) for cell in cells["average (14 tasks)"]]
    assert average[:2] == pytest.approx([41.46, 40.46], abs=0.02) and average[2] == 1
    assert average[3:] == pytest.approx([66.78, 66.78 - 41.46], abs=0.03)
    assert cells["sts (3 tasks)"][2] == "+1.00" and cells["tasks of the 14"] == ["14"] * 5


def test_a_gap_in_a_published_row_is_a_dash_and_has_no_average(here, capsys):
    titles, cells = compared(capsys, "RepLLaMA", "LT")
    assert titles == ["RepLLaMA", "LT", "against RepLLaMA"]
    assert cells["sts17"] == ["-", "57.80", "-"]
    assert cells["scifact"] == ["75.60", "2.17", "-73.43"]
    assert cells["retrieval (3 tasks)"] == ["53.00", "5.91", "-47.09"]
    assert cells["average (14 tasks)"][::2] == ["-", "-"]
    assert float(cells["average (14 tasks)"][1]) == pytest.approx(33.05, abs=0.02)
    assert cells["tasks of the 14"] == ["3", "14", "3"]


def test_notes_of_the_results_stand_below_a_comparison(here, capsys):
    write_results(here / "results/a", notes=["4 pairs, the published task has 250"], sts17=80)
    assert main("--compare", "a") == 0
    assert capsys.readouterr().out.endswith(
        "note: a, sts17: 4 pairs, the published task has 250\n")


def test_a_folder_of_results_can_be_named_by_its_path(here, capsys):
    write_results(here / "elsewhere/a", sts17=80)
    assert compared(capsys, "elsewhere/a") == (["a"], {"sts17": ["80.00"],
                                                       "tasks of the 14": ["1"]})


def test_a_comparison_reads_what_an_evaluation_wrote(tiny, here, capsys):
    assert main("--task", "sts17", "sickr", "--model", tiny, "--method", "last") == 0
    capsys.readouterr()
    (where,) = here.glob("results/*")
    titles, cells = compared(capsys, where.name)
    assert titles == [where.name, "paper: LT", "difference"]
    for key, published in (("sts17", 57.8), ("sickr", 55.63)):
        path = where / f"{TASKS[key]['name']}.json"
        score = 100 * json.loads(path.read_text())["scores"]["test"][0]["main_score"]
        assert cells[key] == [f"{score:.2f}", f"{published:.2f}", f"{score - published:+.2f}"]


def test_a_run_is_compared_by_the_name_that_model_takes(tiny, here, capsys):
    """The run's own folder has JSON files too."""
    write_encoder(tiny, here / "runs/a/encoder")
    (here / "runs/a/config.json").write_text('{"model": "demo"}')
    assert sts17("--model", "runs/a") == 0
    capsys.readouterr()
    for name in ("runs/a", "runs/a/encoder", "runs__a"):
        assert compared(capsys, name)[0] == ["runs__a"]


@pytest.mark.parametrize("name, near", [
    ("LLM2Comp KL+SCL", "LLM2Comp KL + SCL"), ("runs/a", "runs__a"), ("metaeol", "MetaEOL"),
    ("zzzz", "runs__a"),
])
def test_an_unknown_run_is_told_with_the_nearest_names(name, near, here, capsys):
    write_results(here / "results/runs__ab", sts17=80)
    assert main("--compare", name) == 2
    line = error(capsys)
    assert f"--compare {name}: no results of that name" in line
    assert near in line.partition("there are ")[2]


def test_a_run_that_was_not_evaluated_has_no_results_whatever_its_folder_holds(here, capsys):
    (here / "runs/a").mkdir(parents=True)
    (here / "runs/a/config.json").write_text('{"model": "demo"}')
    assert main("--compare", "runs/a") == 2
    assert "--compare runs/a: no results of that name" in error(capsys)


def test_a_file_that_is_no_result_is_named_in_a_comparison(here, capsys):
    write_results(here / "results/a", sts17=80)
    for content in ("{", "[]", '{"task_name": "STS17"}', "null"):
        (here / "results/a/STS17.json").write_text(content)
        assert main("--compare", "a") == 2
        assert "STS17.json: damaged, or not a result of evaluate.py" in error(capsys)


# ---------------------------------------------------------------------------------------------
# Several processes
# ---------------------------------------------------------------------------------------------


def test_two_processes_give_the_scores_of_one_and_one_table(tiny, here):
    one_query = FILES["retrieval"]["qrels/test"][:2]  # none for the second process
    write(here.parent / "data/scifact", "retrieval", qrels=one_query)
    flags = ["--task", "demo-sts", "nfcorpus", "scifact", "--model", str(tiny), "--device", "cpu",
             "--threads", "1", "--data-dir", str(here.parent / "data")]
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
        for key, value in one["scores"]["test"][0].items():
            assert two["scores"]["test"][0][key] == pytest.approx(value, abs=1e-6)
    assert done.stdout.count("main score") == done.stdout.count("written to two/") == 1
    assert len(re.findall("^demo-sts ", done.stdout, re.M)) == 1


# ---------------------------------------------------------------------------------------------
# mteb
# ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mteb():
    return pytest.importorskip("mteb")


@pytest.mark.parametrize("task, subset, revision", [
    ("sts17", "en-en", TASKS["sts17"]["revision"]),
    ("scifact", "default", TASKS["scifact"]["revision"]),
    ("scidocs", "default", TASKS["scidocs"]["revision"]),
    ("demo-sts", "default", "embedded"),
])
def test_mteb_reads_a_result_file(task, subset, revision, mteb, tiny, here):
    assert main("--task", task, "--model", tiny) == 0
    (path,) = here.glob("results/*/*.json")
    ours = json.loads(path.read_text())["scores"]["test"][0]["main_score"]
    result = mteb.results.TaskResult.from_disk(path)
    assert result.get_score() == pytest.approx(ours, abs=1e-9)
    assert result.task_name == path.stem == TASKS[task]["name"]
    assert result.dataset_revision == revision and list(result.scores) == ["test"]
    (scores,) = result.scores["test"]
    assert scores["hf_subset"] == subset and scores["languages"] == ["eng-Latn"]
    assert result.get_score(splits=["test"], languages=["eng"]) == pytest.approx(ours, abs=1e-9)
    assert (subset, result.evaluation_time >= 0) == (result.hf_subsets[0], True)


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


def demo_tasks(mteb):
    """The embedded tasks as tasks of mteb; their data come from this repository's files."""
    from datasets import Dataset, DatasetDict

    demo = ROOT / "data/demo"

    def lines(name: str) -> list[dict]:
        return [json.loads(line) for line in (demo / name).read_text().splitlines()]

    def about(task, name: str):
        new = {"name": name, "dataset": {"path": "local", "revision": "1"}, "prompt": None}
        return task.metadata.model_copy(update={**new, "superseded_by": None})

    base = mteb.get_task("STSBenchmark")
    searching = mteb.get_task("SciFact")

    class DemoSTS(type(base)):
        metadata = about(base, "DemoSTS")

        def load_data(self, **_):
            self.dataset = DatasetDict(test=Dataset.from_list(lines("demo-sts/test.jsonl")))
            self.data_loaded = True

    class DemoRetrieval(type(searching)):
        metadata = about(searching, "DemoRetrieval")

        def load_data(self, **_):
            def renamed(rows):
                return Dataset.from_list([{"id": row.pop("_id"), **row} for row in rows])

            grades = {}
            _, *rows = (demo / "demo-retrieval/qrels/test.tsv").read_text().splitlines()
            for query, document, grade in map(str.split, rows):
                grades.setdefault(query, {})[document] = int(grade)
            self.dataset = {"default": {"test": {
                "corpus": renamed(lines("demo-retrieval/corpus.jsonl")),
                "queries": renamed(lines("demo-retrieval/queries.jsonl")),
                "relevant_docs": grades, "top_ranked": None}}}
            self.data_loaded = True

    return {"demo-sts": DemoSTS(), "demo-retrieval": DemoRetrieval()}


@pytest.mark.parametrize("name, tolerance", [("demo-sts", 1e-6), ("demo-retrieval", 1e-5)])
def test_mteb_gives_an_encoder_the_same_score(name, tolerance, mteb, tiny):
    encoder = plain_encoder(tiny)
    ours = evaluate_task(name, encoder.encode)
    result = mteb.evaluate(wrapped(mteb, encoder), demo_tasks(mteb)[name], cache=None,
                           co2_tracker=False, show_progress_bar=False)
    (scores,) = result.task_results[0].scores["test"]
    assert scores["main_score"] == pytest.approx(ours["main_score"], abs=tolerance)
    assert 0.02 < ours["main_score"] < 0.98
    others = {"demo-sts": ["cosine_spearman", "cosine_pearson"],
              "demo-retrieval": ["ndcg_at_10", "map_at_10", "recall_at_100"]}[name]
    for key in others:
        assert scores[key] == pytest.approx(ours[key], abs=tolerance)


@pytest.mark.parametrize("objective, stages, row", [
    ("ctkd", "ctkd", "LLM2Comp KL"), ("nll", "ctkd ucl", "LLM2Comp NLL + UCL"),
    ("rc", "ctkd ucl scl", "LLM2Comp RC + SCL"), ("ctkd", "ctkd scl", None),
    ("ctkd", "ctkd ucl scl scl_2", None), ("ctkd", "ctkd scl ucl", None), (None, "ucl", None),
])
def test_a_row_of_the_paper_is_named_for_its_recipe_only(objective, stages, row):
    history = [{"stage": stage} for stage in stages.split()]
    history[0]["objective"] = objective
    encoder = SimpleNamespace(history=history, config=EncoderConfig())
    assert evaluate.paper_row(encoder, "memory") == row
    encoder.config = EncoderConfig(kept_tokens=(0, 3))  # effective tokens are no row of Table 1
    assert evaluate.paper_row(encoder, "memory") is None

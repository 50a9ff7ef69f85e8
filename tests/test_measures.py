"""The measures and the six kinds of score against the libraries that define them."""

import warnings
from collections import Counter

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
import torch
from helpers import cosine_table, sklearn_clusters, trec_scores
from sklearn.linear_model import LogisticRegression

import measures
from data.tasks import draw_training_sets
from measures import (
    average_precision,
    average_ranks,
    classification,
    clustering,
    effective_dimension,
    macro_f1,
    mini_batch_k_means,
    pair_classification,
    paired_cosine,
    pearson,
    rank_documents,
    reranking,
    retrieval,
    spearman,
    sts,
    unit,
    v_measure,
)

# ---------------------------------------------------------------------------------------------
# Similarity, rank correlation, precision
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
def test_correlations_match_scipy_with_ties_and_are_nan_for_a_constant(ours, theirs):
    constant = 0
    for x, y in cases(2000):
        if np.ptp(x) == 0 or np.ptp(y) == 0:
            constant += 1
            assert np.isnan(ours(x, y))
        else:
            assert abs(ours(x, y) - theirs(x, y).statistic) <= 1e-9
    assert 50 < constant < 500


def test_average_ranks_match_scipy():
    for x, _ in cases(1000):
        assert np.array_equal(average_ranks(x), scipy.stats.rankdata(x))


def test_equal_rows_have_cosine_exactly_1_and_so_stay_tied():
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


def test_average_precision_matches_scikit_learn_with_ties_and_is_0_if_nothing_is_relevant():
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


def test_v_measure_matches_scikit_learn_from_a_single_cluster_to_all_singletons():
    kinds = set()
    for truth, clusters in labellings(2000):
        theirs = sklearn.metrics.v_measure_score(truth, clusters)
        assert abs(v_measure(truth.tolist(), clusters) - theirs) <= 1e-9
        named = [f"label {t}" for t in truth]
        assert abs(v_measure(named, clusters) - theirs) <= 1e-9
        kinds.add((len(set(truth)) == 1, len(set(clusters)) == 1, len(set(truth)) == len(truth)))
    assert len(kinds) >= 6


def test_macro_f1_matches_scikit_learn_with_labels_that_only_one_side_has():
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


def agrees(case, skip=False, ids=None):
    """Whether the scores of a case are pytrec_eval's."""
    queries, documents, query_ids, document_ids, judged = case
    ours = retrieval(queries, documents, ids or query_ids, document_ids, judged, skip_same_id=skip)
    theirs = trec_scores(cosine_table(queries, documents), ids or query_ids, document_ids, judged)
    pairs = [(ours["per_query"], theirs["ndcg_cut_10"])] + [
        (ours[a], theirs[b].mean()) for a, b in (
            ("ndcg_at_10", "ndcg_cut_10"), ("map_at_10", "map_cut_10"),
            ("recall_at_100", "recall_100"))]
    return all(np.abs(a - b).max() <= 1e-6 for a, b in pairs)


@pytest.mark.parametrize("rows", [exact_rows, normal_rows, repeated_rows])
def test_retrieval_scores_match_pytrec_eval(rows):
    wrong = [seed for seed in range(500) if not agrees(retrieval_case(seed, rows))]
    assert wrong == []


def test_a_document_with_the_querys_own_id_is_skipped_only_on_request():
    changed = 0
    for seed in range(200):
        case = retrieval_case(seed, exact_rows)
        ids = [case[3][i % len(case[3])] for i in range(len(case[2]))]
        if len(set(ids)) < len(ids):
            continue
        assert agrees(case, skip=True, ids=ids)  # trec_scores() leaves it out of the run
        changed += not agrees(case, skip=False, ids=ids)
    assert changed > 50


def test_recall_at_100_sees_100_documents_beside_the_querys_own():
    documents = np.tile(np.float32([1, 0]), (101, 1))
    ids = [f"{i:03}" for i in range(101)]  # ranked 100, 99, ... 0
    judged = [{"000": 1}]
    for own, found in (("050", 1.0), ("x", 0.0)):
        scores = retrieval(documents[:1], documents, [own], ids, judged, skip_same_id=True)
        assert scores["recall_at_100"] == found


def test_gains_are_linear_and_a_query_without_relevant_documents_scores_0():
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
def test_documents_rank_by_score_then_by_id_both_descending_for_any_block_size(rows):
    wrong = []
    for seed in range(100):
        queries, documents, _, ids, _ = retrieval_case(seed, rows)
        for k in (1, 5, 1000):
            expected = sorted_plainly(queries, documents, ids, k)
            wrong += [(seed, block, k) for block in (1, 7, 50, 4096)
                      if rank_documents(queries, documents, ids, k, block).tolist() != expected]
    assert wrong == []


def test_ids_compare_as_strings():
    same = np.ones((4, 3), dtype=np.float32)
    ranking = rank_documents(same[:1], same, ["10", "9", "1", "100"], 4)
    assert ranking.tolist() == [[1, 3, 0, 2]]


def test_zero_and_minus_zero_are_tied():
    documents = np.float32([[0.0], [-0.0], [1.0]])
    ranking = rank_documents(np.float32([[-1], [-1]]), documents, ["b", "a", "c"], 3)
    assert ranking.tolist() == [[0, 1, 2]] * 2


def test_queries_keep_their_order_across_pieces():
    random = np.random.default_rng(0)
    queries, documents = exact_rows(random, 1500), exact_rows(random, 40)
    ids = [str(i) for i in range(40)]
    ranking = rank_documents(queries, documents, ids, 40)
    assert ranking.shape == (1500, 40)
    assert ranking[1000:1050].tolist() == sorted_plainly(queries[1000:1050], documents, ids, 40)


@pytest.mark.parametrize("rows", [exact_rows, normal_rows, repeated_rows])
def test_reranking_matches_scikit_learns_map_and_a_plain_loops_reciprocal_rank(rows):
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


def test_sts_returns_both_correlations_and_the_cosines():
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
def test_pair_classification_matches_scikit_learn_for_each_similarity_and_block_size(block):
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


@pytest.mark.parametrize("n, k, d, spread, distinct", [
    (100, 2, 4, 4, 100), (300, 20, 16, 1, 300), (499, 5, 4, 0.3, 499), (500, 51, 64, 1, 500),
    (501, 10, 16, 1, 501), (800, 51, 16, 0.3, 800), (1500, 20, 4, 4, 300), (1600, 51, 64, 2, 1600),
    (2500, 5, 16, 2, 2500), (4000, 10, 4, 2, 1000), (4000, 20, 64, 4, 4000),
])
def test_mini_batch_k_means_returns_scikit_learns_labels(n, k, d, spread, distinct):
    x, _ = clusters(n + k, n, k, d, spread)
    x = x[np.random.default_rng(0).integers(0, distinct, n)] if distinct < n else x
    ours = mini_batch_k_means(x, k)
    assert np.array_equal(ours, sklearn_clusters(x, k)) and len(set(ours)) > 1


@pytest.mark.parametrize("n, k, distinct", [(300, 30, 20), (600, 10, 3), (100, 5, 1), (700, 9, 9)])
def test_equal_points_share_a_cluster_even_with_more_clusters_than_points(
    n, k, distinct
):
    x, _ = clusters(0, distinct, k, 8, 1)
    which = np.arange(n) % distinct
    labels = mini_batch_k_means(x[which], k)
    assert len({*zip(which, labels)}) == distinct and labels.min() >= 0 and labels.max() < k
    assert len(set(labels)) >= distinct - 1


def test_mean_v_measure_over_ten_sets_matches_scikit_learn_within_half_a_point():
    ours, theirs, sets, labels = [], [], [], []
    for seed in range(10):
        x, truth = clusters(seed, 200 + 150 * seed, 12, 24, 1.5)
        ours.append(v_measure(truth, mini_batch_k_means(x, 12)))
        theirs.append(sklearn.metrics.v_measure_score(truth, sklearn_clusters(x, 12)))
        sets.append(x)
        labels.append(truth.tolist())
    assert np.mean(ours) == pytest.approx(np.mean(theirs), abs=0.005)
    assert 0.2 < np.mean(theirs) < 0.95
    scores = clustering(np.concatenate(sets), labels)
    assert scores["v_measures"] == ours and scores["v_measure"] == pytest.approx(np.mean(ours))
    assert scores["v_measure_std"] == pytest.approx(np.std(ours))


def test_a_set_gets_as_many_clusters_as_it_has_labels(monkeypatch):
    asked = []
    monkeypatch.setattr(measures, "mini_batch_k_means",
                        lambda x, k: asked.append((len(x), k)) or np.zeros(len(x), dtype=int))
    clustering(np.zeros((7, 2)), [["a", "b", "a", "c"], ["a", "a"], ["x"]])
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
def test_classification_matches_scikit_learns_logistic_regression(
    k, d, spread, shots, long, points
):
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


def test_labels_may_be_strings_or_numbers():
    train, y, test, truth = classes(0, 3, 8, 1, False)
    draws = draw_training_sets(y.tolist(), 8)
    numbers = classification(train, test, y.tolist(), truth.tolist(), draws)
    names = [[f"label {i}" for i in labels] for labels in (y, truth)]
    assert classification(train, test, *names, draws) == numbers


# ---------------------------------------------------------------------------------------------
# Spread
# ---------------------------------------------------------------------------------------------


def test_the_effective_dimension_is_the_participation_ratio_of_the_eigenvalues():
    draw = np.random.default_rng(0)
    for n, d in ((50, 8), (8, 50), (200, 20)):
        x = draw.normal(size=(n, d)) * draw.exponential(size=d)
        eigenvalues = np.linalg.eigvalsh(np.cov(x.T))
        expected = eigenvalues.sum() ** 2 / (eigenvalues**2).sum()
        assert abs(effective_dimension(torch.from_numpy(x)) - expected) < 1e-9 * expected
    line = torch.outer(torch.arange(5.0), torch.tensor([1.0, -2.0, 3.0]))
    assert abs(effective_dimension(line + 7) - 1) < 1e-5
    assert effective_dimension(torch.ones(4, 3)) == 0
    equal = torch.full((64, 576), 0.1)  # whose mean is rounded in fp32
    assert (equal - equal.mean(dim=0)).any() and effective_dimension(equal) < 1e-9
    axes = torch.cat((torch.eye(6), -torch.eye(6)))
    assert abs(effective_dimension(axes) - 6) < 1e-5

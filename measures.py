"""The six kinds of scores: embeddings and labels in, MTEB's numbers out (fractions); dimension.

Imports NumPy and torch only. The tests' oracles: SciPy, scikit-learn, pytrec_eval, mteb. Random
numbers are drawn as by NumPy and scikit-learn, so that the same clusters come out.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

SEED = 42  # MTEB's

# ---------------------------------------------------------------------------------------------
# Similarity and rank correlation
# ---------------------------------------------------------------------------------------------


def unit(x: np.ndarray) -> np.ndarray:
    """The rows of x (n, D) scaled to unit length; zero rows stay zero."""
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    return x / np.where(norm > 0, norm, 1)


def paired_cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine of each row of a (n, D) with the same row of b, as 1 - |a/|a| - b/|b||^2 / 2.

    This is MTEB's form: equal rows give exactly 1, so that equal texts stay tied. The cosine with
    a zero row is 0.
    """
    a, b = unit(a), unit(b)
    cosines = 1 - 0.5 * np.square(a - b).sum(axis=1)
    return np.where(a.any(axis=1) & b.any(axis=1), cosines, 0)


def average_ranks(x: np.ndarray) -> np.ndarray:
    """Ranks 1..n of x (n,); equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Linear correlation of x and y (n,); nan if one of them is constant."""
    x, y = (np.asarray(v, dtype=np.float64) for v in (x, y))
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    x, y = x - x.mean(), y - y.mean()
    return float(x @ y / np.sqrt((x @ x) * (y @ y)))


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Rank correlation of x and y (n,), ties by average ranks; nan if one of them is constant."""
    return pearson(average_ranks(np.asarray(x)), average_ranks(np.asarray(y)))


def average_precision(relevant: np.ndarray, scores: np.ndarray) -> float:
    """Area under the steps of the precision-recall curve; equal scores make one step.

    relevant (n,) of 0 and 1, scores (n,); 0 where nothing is relevant.
    """
    order = np.argsort(-scores, kind="stable")
    last_of_step = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
    hits = np.cumsum(relevant[order])[last_of_step]
    if hits[-1] == 0:
        return 0.0
    return float(np.diff(hits, prepend=0) @ (hits / (last_of_step + 1)) / hits[-1])


# ---------------------------------------------------------------------------------------------
# The six kinds: embeddings and labels in, scores out (fractions, under MTEB's names)
# ---------------------------------------------------------------------------------------------


def sts(left: np.ndarray, right: np.ndarray, gold: np.ndarray) -> dict:
    """Correlation of the cosines of pairs (n, D), (n, D) with human scores (n,)."""
    cosines = paired_cosine(left, right)
    return {"cosine_spearman": spearman(cosines, gold), "cosine_pearson": pearson(cosines, gold),
            "cosines": cosines, "gold": np.asarray(gold)}


def pack_scores(scores: torch.Tensor, start: int) -> torch.Tensor:
    """Scores (Q, n) float32 and positions start..start + n - 1, packed into one int64 each (Q, n).

    The integers sort as the scores do, and among equal scores the earlier position ranks higher:
    top-k over blocks of positions is exact for any blocks.
    """
    bits = (scores + 0.0).view(torch.int32)  # no -0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()  # sorts like the floats
    return (ordered << 32) - torch.arange(start, start + scores.shape[1], device=scores.device)


def unpack_scores(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The positions (int64) and the scores (float32) that pack_scores packed."""
    places = -packed & 0xFFFFFFFF
    ordered = ((packed + places) >> 32).int()
    bits = torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered)
    return places, bits.view(torch.float32)


def rank_documents(queries: np.ndarray, documents: np.ndarray, ids: list[str], k: int,
                   block: int = 4096) -> np.ndarray:
    """The k nearest documents of each query by cosine, best first: indices (Q, min(k, n)).

    Equal scores rank by document id, descending (trec_eval's rule). Scores are summed in float64
    and rounded to float32: equal documents get equal scores.
    """
    order = sorted(range(len(ids)), key=ids.__getitem__, reverse=True)
    q, d = torch.from_numpy(unit(queries)), torch.from_numpy(unit(documents)[order])
    best = []
    for some in q.double().split(1024):
        top = torch.empty(len(some), 0, dtype=torch.int64)
        for start in range(0, len(d), block):
            scores = (some @ d[start : start + block].double().T).float()
            top = torch.cat((top, pack_scores(scores, start)), dim=1)
            top = top.topk(min(k, top.shape[1])).values
        best.append(unpack_scores(top)[0])
    return np.array(order)[torch.cat(best).numpy()]


def retrieval(queries: np.ndarray, documents: np.ndarray, query_ids: list[str],
              document_ids: list[str], judged: list[dict], skip_same_id: bool = False) -> dict:
    """nDCG@10 (linear gain), MAP@10 and recall@100 as in trec_eval, averaged over the queries.

    queries (Q, D), documents (n, D); judged[i] maps document ids to the grades of query i.
    skip_same_id removes a document with the query's own id from its ranking (ArguAna).
    """
    ranking = rank_documents(queries, documents, document_ids, 101)  # 100, and the query's own
    discount = 1 / np.log2(np.arange(2, 12))
    ndcg, precision, recall = np.zeros((3, len(queries)))
    for i, grades in enumerate(judged):
        ranked = [document_ids[j] for j in ranking[i]]
        if skip_same_id:
            ranked = [d for d in ranked if d != query_ids[i]]
        gains = np.array([max(0, grades.get(d, 0)) for d in ranked[:100]])
        hits, best = gains > 0, sorted((g for g in grades.values() if g > 0), reverse=True)
        if best:
            ideal = np.array(best[:10]) @ discount[: len(best)]
            ndcg[i] = gains[:10] @ discount[: len(gains)] / ideal
            found = np.flatnonzero(hits[:10])
            precision[i] = (np.arange(1, len(found) + 1) / (found + 1)).sum() / len(best)
            recall[i] = hits.sum() / len(best)
    return {"ndcg_at_10": float(ndcg.mean()), "map_at_10": float(precision.mean()),
            "recall_at_100": float(recall.mean()), "per_query": ndcg}


def logistic_regression(x: np.ndarray, y: np.ndarray, classes: int) -> Callable:
    """Fit by at most 100 L-BFGS iterations; returns a function from (n, D) to labels (n,).

    Mean cross entropy of x (n, D), y (n,) + |W|^2 / (2 n), the intercept free, in x's dtype: as
    scikit-learn's LogisticRegression() (1.9). Two classes share one row of weights.
    """
    rows = classes if classes > 2 else 1
    inputs, target = torch.from_numpy(x), torch.from_numpy(y)
    w = torch.zeros(rows, x.shape[1] + 1, dtype=inputs.dtype, requires_grad=True)

    def logits(x: torch.Tensor) -> torch.Tensor:
        z = x @ w[:, :-1].T + w[:, -1]
        return z if rows > 1 else F.pad(z, (1, 0))

    def objective() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(logits(inputs), target) + w[:, :-1].square().sum() / (2 * len(x))
        loss.backward()
        return loss

    optimizer = torch.optim.LBFGS([w], max_iter=100, max_eval=5000, history_size=10,
                                  tolerance_grad=1e-4, tolerance_change=1e-14,
                                  line_search_fn="strong_wolfe")
    optimizer.step(objective)
    return lambda x: logits(torch.from_numpy(x)).argmax(dim=1).numpy()


def macro_f1(predicted: np.ndarray, truth: np.ndarray) -> float:
    """Mean F1 over the labels that occur in either (n,) array."""
    f1 = [2 * np.sum((predicted == c) & (truth == c)) / np.sum((predicted == c) * 1 + (truth == c))
          for c in np.union1d(predicted, truth)]
    return float(np.mean(f1))


def classification(train: np.ndarray, test: np.ndarray, train_labels: list, test_labels: list,
                   draws: list[np.ndarray]) -> dict:
    """Accuracy and macro-F1 of logistic regression on each drawn training set, and their means.

    train (n, D) and test (m, D); the draws index rows of train; embeddings are not scaled.
    """
    names = {name: i for i, name in enumerate(sorted(set(train_labels), key=str))}
    y, truth = (np.array([names[v] for v in labels]) for labels in (train_labels, test_labels))
    accuracy, f1 = [], []
    for rows in draws:
        predicted = logistic_regression(train[rows], y[rows], len(names))(test)
        accuracy.append(float(np.mean(predicted == truth)))
        f1.append(macro_f1(predicted, truth))
    return {"accuracy": float(np.mean(accuracy)), "f1": float(np.mean(f1)),
            "scores_per_experiment": [{"accuracy": a, "f1": f} for a, f in zip(accuracy, f1)]}


def squared_distances(x: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """|x_i - c_j|^2 (n, k) of x (n, D) and centres (k, D)."""
    of_x, of_centers = (np.einsum("nd,nd->n", v, v) for v in (x, centers))
    return np.maximum(of_x[:, None] - 2 * (x @ centers.T) + of_centers, 0)


def k_means_plus_plus(x: np.ndarray, k: int, random: np.random.RandomState) -> np.ndarray:
    """k rows of x (n, D) far from each other (Arthur & Vassilvitskii 2007), the greedy variant.

    Each further centre is the best of 2 + ln k candidates drawn in proportion to the squared
    distance from the centres so far.
    """
    centers = [random.choice(len(x), p=np.full(len(x), 1 / len(x)))]
    nearest = squared_distances(x, x[centers])[:, 0]
    for _ in range(1, k):
        levels = random.uniform(size=2 + int(np.log(k))) * nearest.sum()
        candidates = np.minimum(np.searchsorted(np.cumsum(nearest), levels), len(x) - 1)
        after = np.minimum(nearest[:, None], squared_distances(x, x[candidates]))
        best = after.sum(axis=0).argmin()
        centers.append(candidates[best])
        nearest = after[:, best]
    return x[centers]


def mini_batch_k_means(x: np.ndarray, k: int, batch: int = 500, seed: int = SEED) -> np.ndarray:
    """Cluster labels (n,) of x (n, D) by mini-batch k-means (Sculley 2010), with the draws and the
    stopping rule of scikit-learn's MiniBatchKMeans (1.9, default settings).

    It ends after 100 passes, or 10 batches without a new minimum of the smoothed inertia; centres
    with under 1 % of the largest count are now and then replaced by samples.
    """
    n, random = len(x), np.random.RandomState(seed)
    batch = min(batch, n)
    start = min(n, 3 * batch if 3 * batch >= k else 3 * k)
    random.randint(0, n, start)  # scikit-learn draws a validation set even for one start
    centers = k_means_plus_plus(x[random.randint(0, n, start)] if start < n else x, k, random)
    counts, since, smooth, lowest, waited = np.zeros(k), 0, None, np.inf, 0
    for step in range(100 * n // batch):
        rows = x[random.choice(n, batch, p=np.full(n, 1 / n))]
        distances = squared_distances(rows, centers)
        labels = distances.argmin(axis=1)
        inertia = distances.min(axis=1).sum() / batch
        since += batch
        replacing = (counts == 0).any() or since >= 10 * k
        member = labels[:, None] == np.arange(k)  # (batch, k)
        totals = centers * counts[:, None] + member.T @ rows
        counts += member.sum(axis=0)
        centers = np.where(counts[:, None] > 0, totals / np.maximum(counts, 1)[:, None], centers)
        if replacing:
            since = 0
            small = counts < 0.01 * counts.max()
            if small.sum() > batch / 2:
                small[np.argsort(counts)[batch // 2 :]] = False
            if small.any():
                centers[small] = rows[random.choice(batch, small.sum(), replace=False)]
            counts[small] = counts[~small].min()
        if step == 0:
            continue
        weight = min(1, 2 * batch / (n + 1))
        smooth = inertia if smooth is None else (1 - weight) * smooth + weight * inertia
        waited = 0 if smooth < lowest else waited + 1
        lowest = min(lowest, smooth)
        if waited >= 10:
            break
    return squared_distances(x, centers).argmin(axis=1)


def v_measure(truth: list, clusters: np.ndarray) -> float:
    """Harmonic mean of homogeneity and completeness (Rosenberg & Hirschberg 2007)."""
    _, a = np.unique(np.asarray(truth, dtype=str), return_inverse=True)
    _, b = np.unique(clusters, return_inverse=True)
    joint = np.zeros((a.max() + 1, b.max() + 1))
    np.add.at(joint, (a, b), 1 / len(a))

    def entropy(p: np.ndarray) -> float:
        return float(-(p[p > 0] * np.log(p[p > 0])).sum())

    of_truth, of_clusters = entropy(joint.sum(1)), entropy(joint.sum(0))
    shared = of_truth + of_clusters - entropy(joint)  # mutual information
    homogeneity = shared / of_truth if of_truth > 0 else 1.0
    completeness = shared / of_clusters if of_clusters > 0 else 1.0
    both = homogeneity + completeness
    return 2 * homogeneity * completeness / both if both > 0 else 0.0


def clustering(sentences: np.ndarray, labels: list[list]) -> dict:
    """Mean V-measure of mini-batch k-means over sets, k = the number of labels in the set.

    sentences (n, D) holds the sets one after another, labels one list for each.
    """
    sets = np.split(sentences, np.cumsum([len(truth) for truth in labels])[:-1])
    scores = [v_measure(truth, mini_batch_k_means(x, len(set(truth))))
              for x, truth in zip(sets, labels)]
    return {"v_measure": float(np.mean(scores)), "v_measure_std": float(np.std(scores)),
            "v_measures": scores}


def pair_classification(left: np.ndarray, right: np.ndarray, labels: np.ndarray,
                        block: int = 4096) -> dict:
    """Average precision of four similarities of pairs, and their maximum.

    left and right (n, D), labels (n,) of 0 and 1; computed in blocks of pairs.
    """
    scores = {name: np.empty(len(labels)) for name in ("cosine", "dot", "manhattan", "euclidean")}
    for start in range(0, len(labels), block):
        part = slice(start, start + block)
        a, b = left[part], right[part]
        scores["cosine"][part] = paired_cosine(a, b)
        scores["dot"][part] = (a * b).sum(axis=1)
        scores["manhattan"][part] = -np.abs(a - b).sum(axis=1)
        scores["euclidean"][part] = -np.sqrt(np.square(a - b).sum(axis=1))
    ap = {f"{name}_ap": average_precision(labels, s) for name, s in scores.items()}
    return {**ap, "max_ap": max(ap.values())}


def reranking(queries: np.ndarray, documents: np.ndarray, candidates: list[np.ndarray],
              relevant: list[np.ndarray]) -> dict:
    """Mean average precision and MRR@10 of each query's candidates by cosine.

    queries (Q, D), documents (n, D); candidates[i] index documents, relevant[i] are 0 or 1. For
    the reciprocal rank, a tie counts against the relevant document.
    """
    queries, documents = unit(queries).astype(np.float64), unit(documents)
    precision, reciprocal = [], []
    for query, rows, truth in zip(queries, candidates, relevant):
        scores = (documents[rows] @ query).astype(np.float32)  # equal documents stay tied
        precision.append(average_precision(truth, scores))
        rank = 1 + np.sum(scores[truth == 0] >= scores[truth == 1].max())
        reciprocal.append(1 / rank if rank <= 10 else 0.0)
    return {"map": float(np.mean(precision)), "mrr_at_10": float(np.mean(reciprocal)),
            "per_query": np.array(precision)}


KINDS = {  # kind -> (its function, the main score)
    "sts": (sts, "cosine_spearman"),
    "retrieval": (retrieval, "ndcg_at_10"),
    "classification": (classification, "accuracy"),
    "clustering": (clustering, "v_measure"),
    "pair-classification": (pair_classification, "max_ap"),
    "reranking": (reranking, "map"),
}


# ---------------------------------------------------------------------------------------------
# Spread
# ---------------------------------------------------------------------------------------------


def effective_dimension(x: torch.Tensor) -> float:
    """Participation ratio (sum of eigenvalues)^2 / (sum of their squares) of the covariance of x.

    x (n, D). Between 1 (all on a line) and min(n - 1, D); 0 if all rows are equal.
    """
    x = x.double()  # so that equal rows differ from their mean by no more than the clamp
    x = x - x.mean(dim=0)
    gram = x @ x.T  # has n times the covariance's nonzero eigenvalues
    return float(gram.trace() ** 2 / gram.square().sum().clamp_min(1e-30))

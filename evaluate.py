"""Score a text encoder on the paper's 14 MTEB tasks (Muennighoff et al. 2022, arXiv 2210.07316).

    python evaluate.py --task demo-sts                   the newest encoder under runs/
    python evaluate.py --task all --model runs/llama2    the paper's row; interrupted, it goes on
    python evaluate.py --task sts retrieval --model demo --method echo       no training at all
    python evaluate.py --task-dir FOLDER --kind clustering                   data of your own
    python evaluate.py --compare runs/llama2 "LLM2Comp KL + SCL"
    torchrun --nproc-per-node 4 evaluate.py --task all --model runs/llama2   texts shared

Pooling, attention, length and instructions come from the encoder's folder; a plain Llama is read
by one of the training-free methods of data/prompts.json. Data lie under --data-dir in the hub's
layout (one folder a repository), or are downloaded once at the revision that MTEB pins. Protocol:
MTEB 1.12 (the official code's version); random draws are those of NumPy's and scikit-learn's
generators, so that the same sentences and clusters are drawn.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from difflib import get_close_matches
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data import UserError
from data.results import GROUPS, PAPER, PUBLISHED, compare, summary
from data.results import finished, label_of, result_of, write_result
from data.tasks import LAYOUT, TASKS, folder_task, read_task, task_place
from model import PLAIN, Encoder, encoder_of, find_model, is_encoder, load_encoder, plain_encoder
from training import LostRank, Ranks, explain, leave_ranks, show_all, start_ranks

DATA = Path(__file__).parent / "data"
METHODS = json.loads((DATA / "prompts.json").read_text())  # training-free: prompts and pooling
INSTRUCTIONS = json.loads((DATA / "instructions.json").read_text())["instructions"]
UNTRAINED = ("last", "mean", "weighted-mean")  # the methods without a prompt
SEED = 42  # MTEB's

Encode = Callable[[list[str]], np.ndarray]

# ---------------------------------------------------------------------------------------------
# Similarity and rank correlation
# ---------------------------------------------------------------------------------------------


def unit(x: np.ndarray) -> np.ndarray:
    """The rows of x (n, D) at length one; a zero row stays zero."""
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


def rank_documents(queries: np.ndarray, documents: np.ndarray, ids: list[str], k: int = 1000,
                   block: int = 4096) -> np.ndarray:
    """The k nearest documents of each query by cosine, best first: indices (Q, min(k, n)).

    Equal scores rank by document id, descending (trec_eval's rule). Scores are float32, of sums in
    float64: equal documents get equal scores. Score and rank of the id are packed into one integer,
    so that top-k over blocks of documents is exact whatever the block.
    """
    order = sorted(range(len(ids)), key=ids.__getitem__, reverse=True)
    q, d = torch.from_numpy(unit(queries)), torch.from_numpy(unit(documents)[order])
    best = []
    for some in q.double().split(1024):
        top = torch.empty(len(some), 0, dtype=torch.int64)
        for start in range(0, len(d), block):
            scores = (some @ d[start : start + block].double().T).float() + 0.0  # no -0.0
            bits = scores.view(torch.int32)
            ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()  # sorts as the floats
            key = (ordered << 32) - torch.arange(start, start + ordered.shape[1])
            top = torch.cat((top, key), dim=1)
            top = top.topk(min(k, top.shape[1])).values
        best.append(-top & 0xFFFFFFFF)
    return np.array(order)[torch.cat(best).numpy()]


def retrieval(queries: np.ndarray, documents: np.ndarray, query_ids: list[str],
              document_ids: list[str], judged: list[dict], skip_same_id: bool = False) -> dict:
    """nDCG@10 (linear gain), MAP@10 and recall@100 as trec_eval has them, means over the queries.

    queries (Q, D), documents (n, D); judged[i] maps document ids to the grades of query i.
    skip_same_id takes a document with the query's own id out of its ranking (ArguAna).
    """
    ranking = rank_documents(queries, documents, document_ids)
    discount = 1 / np.log2(np.arange(2, 12))
    ndcg, precision, recall = np.zeros((3, len(queries)))
    for i, grades in enumerate(judged):
        ranked = [document_ids[j] for j in ranking[i, :101]]
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

    train (n, D) and test (m, D), the draws index rows of train; no scaling of embeddings.
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
    """Cluster labels (n,) of x (n, D) by mini-batch k-means (Sculley 2010), drawn and stopped as
    scikit-learn's MiniBatchKMeans does it (1.9, default settings).

    It ends after 100 passes, or 10 batches without a new minimum of the smoothed inertia; centres
    with under 1 % of the largest count are now and then replaced by samples.
    """
    n, random = len(x), np.random.RandomState(seed)
    batch = min(batch, n)
    start = min(n, 3 * batch if 3 * batch >= k else 3 * k)
    random.randint(0, n, start)  # the validation set of several starts; there is one
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

    left and right (n, D), labels (n,) of 0 and 1; sums over D go by blocks of pairs.
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
# Tasks: texts become embeddings, and go with the labels to their kind
# ---------------------------------------------------------------------------------------------


def embed(encode: Encode, texts: dict[str, list[str]], notes: list[str]) -> dict[str, np.ndarray]:
    """Encode the texts of all roles, each distinct text once; role -> (n, D) float32.

    Raises UserError for a wrong shape and for nan or inf; zero vectors are counted in the notes.
    """
    row = {text: i for i, text in enumerate(dict.fromkeys(t for ts in texts.values() for t in ts))}
    distinct = list(row)
    with np.errstate(over="ignore"):
        x = np.asarray(encode(distinct), dtype=np.float32)
    if x.ndim != 2 or len(x) != len(distinct):
        raise UserError(f"encode returned the shape {x.shape} for {len(distinct)} texts; it must "
                        f"return one row for each")
    if len(wrong := np.flatnonzero(~np.isfinite(x).all(axis=1))):
        raise UserError(f"the embedding of {distinct[wrong[0]][:60]!r} and of {len(wrong) - 1} "
                        f"other texts has nan or inf; the model is damaged, or its dtype too "
                        f"narrow")
    if zeros := int((~x.any(axis=1)).sum()):
        notes.append(f"{zeros} of {len(x)} texts have the zero vector (cosine 0)")
    return {role: x[[row[text] for text in ts]] for role, ts in texts.items()}


def score_task(task: dict, read: tuple, encode: Encode, encode_documents: Encode) -> dict:
    """Encode and score a task that was read by read_task (see `evaluate_task`)."""
    (texts, labels, notes), (kind, main) = read, KINDS[task["kind"]]
    x = embed(encode, {r: t for r, t in texts.items() if r != "documents"}, notes)
    if "documents" in texts:
        x |= embed(encode_documents, {"documents": texts["documents"]}, notes)
    scores = kind(**x, **labels)
    if np.isnan(scores[main]):
        raise UserError(f"{task['name']}: no rank correlation, all cosines or all scores are "
                        f"equal; is the model collapsed?")
    return {"main_score": scores[main], **scores, "notes": notes}


def evaluate_task(task: str | dict, encode: Encode, data_dir: str | Path | None = None,
                  encode_documents: Encode | None = None) -> dict:
    """Score any `encode(list[str]) -> (n, D) array` on a task of data/tasks.json, or a folder's.

    `encode_documents` is for the documents of retrieval and reranking, if they are encoded in
    another way than queries (without an instruction). Returns main_score (a fraction), MTEB's
    other scores, arrays of single samples, and notes. Raises UserError for data that are missing
    or damaged, and for embeddings that are no (n, D) finite numbers.
    """
    task = find_task(task) if isinstance(task, str) else task
    return score_task(task, read_task(task, data_dir), encode, encode_documents or encode)


def demo_sts(encoder: Encoder) -> float:
    """Spearman x 100 on the embedded STS set, with its instruction if the encoder had some."""
    instruction = instruction_for("demo-sts", "auto", encoder)
    encode = partial(encoder.encode, instruction=instruction)
    return 100 * evaluate_task("demo-sts", encode)["main_score"]


def find_task(name: str) -> dict:
    """The entry of data/tasks.json; UserError with the nearest names if there is none."""
    if name not in TASKS:
        near = get_close_matches(name.lower(), [*TASKS, *GROUPS, "all"], n=3, cutoff=0.4)
        guess = f"did you mean {' or '.join(near)}? " if near else ""
        raise UserError(f"--task {name}: unknown; {guess}--list shows all tasks")
    return TASKS[name]


# ---------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------


def newest_encoder() -> str:
    """The encoder folder under runs/ that was written last, else the embedded Llama."""
    found = sorted(Path("runs").rglob("encoder/encoder.json"), key=lambda p: p.stat().st_mtime)
    return str(found[-1].parent) if found else "demo"


def open_model(
    name: str, method: str | None = None, max_tokens: int | None = None, **options
) -> tuple[Encoder, str]:
    """An encoder, and the method it is read by: `memory` if trained, else a training-free one.

    `name` is an encoder folder, a run's folder, a Llama's folder or a hub repository; `options` go
    to model.load_encoder or plain_encoder. UserError if `method` or `max_tokens` (512 for a plain
    Llama) contradicts the training.
    """
    name = encoder_of(name)
    folder = find_model(name, options.get("revision"))
    if is_encoder(folder):
        encoder = load_encoder(name, **options)
        for flag, given, trained in (("--method", method, encoder.config.pooling),
                                     ("--max-tokens", max_tokens, encoder.config.max_tokens)):
            if given not in (None, trained):
                raise UserError(f"{flag} {given}: {name} was trained with {trained}; leave {flag} "
                                f"out, or name its base with --model")
        return encoder, encoder.config.pooling
    if method == "memory":
        raise UserError(f"--method memory: {name} is a plain Llama without memory tokens; train an "
                        f"encoder with pretrain_ctkd.py, or take {', '.join(METHODS)}")
    options.pop("base", None)
    method = method or "weighted-mean"
    config = replace(PLAIN, pooling=METHODS[method]["pooling"], max_tokens=max_tokens or 512,
                     template=METHODS[method]["prompts"][0])
    return plain_encoder(name, config, **options), method


def as_sentence(text: str) -> str:
    """A text as the one-word prompts want it (code of PromptEOL and MetaEOL): it ends with a full
    stop if it has no final punctuation or a question mark, and has no double quotes."""
    if text and text[-1] not in ".?\"'":
        text += "."
    text = text.replace('"', "'")
    return text[:-1] + "." if text.endswith("?") else text


def encoding(encoder: Encoder, method: str) -> Callable:
    """`encode(texts, instruction="", **options)` by the method; MetaEOL averages its prompts."""
    if encoder.history:  # trained: its folder says how
        return encoder.encode
    about = METHODS[method]

    def encode(texts: list[str], instruction="", progress="", **options) -> np.ndarray:
        """The mean over the method's prompts (n, D)."""
        if about.get("sentences"):
            texts = [as_sentence(text) for text in texts]
        total, n = 0.0, len(about["prompts"])
        for i, prompt in enumerate(about["prompts"], 1):
            encoder.config = replace(encoder.config, template=prompt)
            bar = f"{progress} {i}/{n}" if progress and n > 1 else progress
            total = total + encoder.encode(texts, instruction, progress=bar, **options)
        return total / np.float32(n)

    return encode


def instruction_for(task: str, wanted: str, encoder: Encoder) -> str:
    """The instruction of --instruction: `auto` gives the task's to encoders trained with some."""
    if wanted == "none" or wanted == "auto" and "{instruction}" not in encoder.config.template:
        return ""
    text = INSTRUCTIONS.get(task, "") if wanted == "auto" else wanted
    return text.strip().removesuffix(":")  # the template brings the colon


def over_ranks(encode: Encode, ranks: Ranks) -> Encode:
    """The same function, each rank encoding its share of the texts; every rank gets all rows."""
    if ranks.size == 1:
        return encode

    def shared(texts: list[str]) -> np.ndarray:
        """Every size-th text by length is this rank's; the sum over ranks fills all rows."""
        by_length = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        mine = by_length[ranks.rank :: ranks.size]
        part = torch.from_numpy(encode([texts[i] for i in mine])).to(ranks.device)
        everything = part.new_zeros(len(texts), part.shape[1])
        everything[mine] = part
        return ranks.sum(everything).cpu().numpy()

    return shared


def evaluate_together(task: dict, encode: Callable, instruction: str, data_dir: str | None,
                      ranks: Ranks, **options) -> dict:
    """evaluate_task on all ranks, each encoding its share of the texts.

    `options` go to `encode(texts, instruction=, document=, **options)`, see Encoder.encode.
    """
    with ranks.together():
        read = read_task(task, data_dir)
    query = partial(encode, instruction=instruction, **options)
    document = partial(encode, document=True, **options)
    return score_task(task, read, over_ranks(query, ranks), over_ranks(document, ranks))


def paper_row(encoder: Encoder, method: str) -> str | None:
    """The row of data/published.json that an encoder or a method corresponds to."""
    if not encoder.history:
        return METHODS[method]["paper"]
    objective = str(encoder.history[0].get("objective"))
    row = "LLM2Comp " + {"ctkd": "KL", "nll": "NLL", "rc": "RC"}.get(objective, "")
    stages = tuple(entry["stage"] for entry in encoder.history)
    recipes = {("ctkd",): "", ("ctkd", "ucl"): " + UCL", ("ctkd", "ucl", "scl"): " + SCL"}
    row += recipes.get(stages, " in another order")
    return row if row in PUBLISHED["rows"] and not encoder.config.kept_tokens else None


def settings_of(encoder: Encoder, name: str, method: str, ranks: Ranks) -> dict:
    """What a score depends on besides the data, as it is written beside each score."""
    config = encoder.config
    return {
        "model": name, "method": method, "base": encoder.base, "sha256": encoder.sha256,
        "num_memory_tokens": config.num_memory_tokens, "kept_tokens": list(config.kept_tokens),
        "attention": config.attention,
        "pooling": config.pooling, "template": config.template,
        "document_template": config.document_template, "max_tokens": config.max_tokens,
        "dtype": str(encoder.llama.head.dtype), "device": str(encoder.llama.head.device),
        "threads": torch.get_num_threads(), "ranks": ranks.size, "history": encoder.history,
        "paper": paper_row(encoder, method),
        "versions": {p: version(p) for p in ("torch", "tokenizers", "numpy", "safetensors")},
    }


# ---------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------


def list_tasks():
    """Print the tasks: kind, size, main score, group."""
    print(f"{'task':<18}{'kind':<21}{'main score':<17}{'group':<16}size")
    for name, task in TASKS.items():
        size = ", ".join(f"{n:,} {what}" for what, n in task["expected"].items()
                         if what != "characters")
        print(f"{name:<18}{task['kind']:<21}{KINDS[task['kind']][1]:<17}"
              f"{task.get('group', '-'):<16}{size}")
    print("\nall: the 14 with a group; a group's name: its tasks. Sprint is pair classification, "
          "but the\npaper averages it with classification.")


def chosen_tasks(args: argparse.Namespace) -> dict[str, dict]:
    """Name -> entry of the tasks that the command line names, each once."""
    if args.task_dir and args.task or args.kind and not args.task_dir:
        raise UserError("--task-dir goes with --kind and without --task; evaluate them apart")
    if args.task_dir:
        if not args.kind:
            raise UserError(f"--task-dir {args.task_dir}: needs --kind, one of {', '.join(KINDS)}")
        task = folder_task(args.task_dir, args.kind)
        return {task["name"]: task}
    if not args.task:
        raise UserError("nothing to do: give --task, --task-dir, --compare or --list")
    names = [name for given in args.task
             for name in (PAPER if given == "all" else GROUPS.get(given, [given]))]
    return {name: find_task(name) for name in names}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--task", nargs="+", metavar="TASK", help="tasks (see --list), groups of tasks, or all")
    add("--task-dir", metavar="FOLDER", help="a task of your own: a folder in a kind's layout")
    add("--kind", choices=list(KINDS), help="of --task-dir. " + ". ".join(
        f"{kind}: {layout}" for kind, layout in LAYOUT.items()))
    add("--list", action="store_true", help="show the tasks and stop")
    add("--compare", nargs="+", metavar="RUN", help="print runs (as given to --model, or folders "
        "of results) and published rows side by side and stop; rows: "
        + ", ".join(PUBLISHED["rows"]))
    add("--model", help="an encoder, a run, a Llama's folder or hub repository, or demo; default: "
        "the newest encoder under runs/, else demo")
    add("--method", choices=["memory", *METHODS], help="how a plain Llama is read (default "
        "weighted-mean); an encoder knows its own")
    add("--max-tokens", type=int, help="of a text and its prompt, BOS counted, for a plain Llama "
        "(default 512); an encoder knows its own")
    add("--instruction", default="auto", help="auto (the task's, for encoders trained with "
        "instructions), none, or a text for all tasks")
    add("--data-dir", help="folder with the tasks' repositories, hub layout")
    add("--revision", help="branch, tag or commit of a hub model")
    add("--base", help="where an encoder's base model lies now")
    add("--device", default="auto", help="auto, cpu, cuda")
    add("--dtype", choices=["float32", "bfloat16"],
        help="default: bfloat16 on cuda, float32 elsewhere")
    add("--batch-tokens", type=int, default=4096, help="tokens per forward pass")
    add("--threads", type=int, default=0, help="CPU threads a process; 0 = the cores, shared")
    add("--timeout", type=float, default=60, help="minutes that a rank waits for the others")
    add("--results", default="results", help="folder for the JSON files")
    add("--force", action="store_true", help="evaluate finished tasks again")
    args = parser.parse_args(argv)
    if args.batch_tokens < 1 or args.threads < 0 or not args.timeout > 0 or args.max_tokens == 0:
        parser.error("--batch-tokens, --max-tokens and --timeout must be above 0, --threads not "
                     "below")
    return args


def run(args: argparse.Namespace, tasks: dict[str, dict], ranks: Ranks) -> int:
    """Evaluate the tasks, print the table, write the JSON files."""
    say = partial(print, flush=True) if ranks.rank == 0 else lambda *_: None
    name = args.model or newest_encoder()
    dtype = args.dtype or ("bfloat16" if ranks.device.type == "cuda" else "float32")
    encoder, method = open_model(name, args.method, args.max_tokens, base=args.base,
                                 revision=args.revision, dtype=getattr(torch, dtype),
                                 device=ranks.device)
    label = label_of(name, "memory" if encoder.history else method, args.instruction)
    folder = Path(args.results) / label
    common = settings_of(encoder, name, method, ranks)
    jobs = {}  # task -> file, settings, the result if it is there
    for key, task in tasks.items():
        instruction = instruction_for(key, args.instruction, encoder)
        encoder.template(instruction)  # raises if the method has no place for one
        settings = common | {"instruction": instruction,
                             "data": task_place(task, args.data_dir)[1]}
        path = folder / f"{task['name']}.json"
        jobs[key] = path, settings, None if args.force else finished(path, settings)

    chosen = "  (the newest encoder under runs/)" if not args.model and name != "demo" else ""
    say(f"model   {name}{'  (the embedded tiny Llama)' if name == 'demo' else chosen}\n"
        f"method  {method}, {encoder.config.attention}, {dtype}\n\n"
        f"{'task':<26}{'main score':<17}{'x 100':>7}{'seconds':>9}")
    encode, scores, failed = encoding(encoder, method), {}, False
    for key, (path, settings, result) in jobs.items():
        start, mark = time.perf_counter(), "  finished before"
        there = torch.tensor([float(result is not None and ranks.rank == 0)], device=ranks.device)
        if not ranks.sum(there).item():  # rank 0 decides: others may not see its files
            try:
                found = evaluate_together(
                    tasks[key], encode, settings["instruction"], args.data_dir, ranks,
                    batch_tokens=args.batch_tokens, progress=key if ranks.rank == 0 else "")
            except UserError as error:  # the other tasks go on
                failed = True
                print(f"error: {error}", file=sys.stderr)
                continue
            mark, seconds = "", time.perf_counter() - start
            result = result_of(tasks[key], found, settings, seconds)
            if ranks.rank == 0:
                write_result(path, result)
        if ranks.rank == 0:
            scores[key] = 100 * result["scores"]["test"][0]["main_score"]
            say(f"{key:<26}{KINDS[tasks[key]['kind']][1]:<17}{scores[key]:>7.2f}"
                f"{result['evaluation_time']:>9.1f}{mark}")
            if settings["instruction"] or "{instruction}" in encoder.config.template:
                say(f"  instruction: {settings['instruction'] or 'none'}")
            for note in result["notes"]:
                say(f"  note: {note}")
    for title, mean in summary(scores):
        say(f"{title:<43}{'-' if mean is None else f'{mean:.2f}':>7}")
    if scores:
        say(f"\nwritten to {folder}/")
    return 2 if failed else 0


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0, 2 after a UserError, or a file or folder that
    cannot be used, 1 if another rank was lost."""
    args, ranks = parse_arguments(argv), None
    show_all()
    try:
        if args.list:
            list_tasks()
        elif args.compare:
            compare(args.compare, Path(args.results))
        else:
            tasks = chosen_tasks(args)
            ranks = start_ranks(args.device, args.threads, args.timeout)
            return run(args, tasks, ranks)
    except (UserError, LostRank, OSError) as error:
        print(f"error: {explain(error)}", file=sys.stderr)
        return 1 if isinstance(error, LostRank) else 2
    finally:
        leave_ranks(ranks)
    return 0


if __name__ == "__main__":
    sys.exit(main())

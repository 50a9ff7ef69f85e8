"""Scoring, timed side by side: this project and the libraries that it stands in for.

    python bench/evaluate.py --data-dir FOLDER

Given random embeddings of --dims columns; nothing is encoded (bench/encode.py does that):

retrieval       SciFact's size (5,183 documents, 300 queries; its ids and judgements if --data-dir
                has them): evaluate.retrieval and mteb's search and metrics, from the moment that
                the documents' embeddings are handed over. mteb ranks as many documents and
                computes more metrics. nDCG@10, MAP@10 and recall@100 must agree to 1e-5.
classification  Banking77's size, ten draws: evaluate.classification and scikit-learn's
                LogisticRegression as mteb calls it. Accuracies within 0.3 points.
clustering      --sets sets of TwentyNewsgroups' size: evaluate.clustering and scikit-learn's
                MiniBatchKMeans as mteb calls it. V-measures within 0.5.

Each implementation lives in a process of its own, so that its peak memory is its own, and waits on
its stdin while another one is timed; they take turns, the first turn of each is warm-up and not
counted. Peak: the highest resident memory (VmHWM; elsewhere than on Linux ru_maxrss), and how far
it is above that after the imports; the data are in it.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import numpy as np
import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `evaluate` is the product's

import step
from published import cluster_measures, regression_accuracy

import evaluate
from data import UserError
from data.tasks import TASKS, draw_training_sets, read_task, task_place

SIZES = {"documents": 5183, "queries": 300, "train": 10003, "test": 3080, "set": 5954}
TOLERANCES = {"ndcg_at_10": 1e-5, "map_at_10": 1e-5, "recall_at_100": 1e-5, "accuracy": 3e-3,
              "v_measure": 5e-3}

# ---------------------------------------------------------------------------------------------
# Scoring: random embeddings with something to find in them
# ---------------------------------------------------------------------------------------------


def scaled(args, what: str) -> int:
    """A size of SIZES times --scale."""
    return max(2, round(args.scale * SIZES[what]))


def scifact(args) -> tuple[dict, dict] | None:
    """Texts and labels of SciFact, if --data-dir has it."""
    task = TASKS["scifact"]
    if args.data_dir is None or not task_place(task, args.data_dir)[0].is_dir():
        return None
    return read_task(task, args.data_dir)[:2]


def retrieval_data(args) -> dict:
    """The arguments of evaluate.retrieval; queries lie somewhat near their judged documents."""
    random, dim, found = np.random.default_rng(args.seed), args.dim, scifact(args)
    n, q = scaled(args, "documents"), scaled(args, "queries")
    if found:
        labels = {key: found[1][key] for key in ("document_ids", "query_ids", "judged")}
    else:
        ids = [str(i) for i in range(n)]
        judged = [{ids[j]: 1 for j in random.integers(0, n, random.integers(1, 3))}
                  for _ in range(q)]
        labels = {"document_ids": ids, "query_ids": [f"q{i}" for i in range(q)], "judged": judged}
    for key, size in (("document_ids", n), ("query_ids", q), ("judged", q)):
        labels[key] = labels[key][:size]
    labels["judged"] = [{d: int(g) for d, g in grades.items()} for grades in labels["judged"]]
    documents, queries = (random.standard_normal((len(labels[key]), dim), dtype=np.float32)
                          for key in ("document_ids", "query_ids"))
    for x in (documents, queries):  # in place, here and below: no peak before the scoring's own
        x /= dim**0.5
    place = {d: i for i, d in enumerate(labels["document_ids"])}
    for query, grades in zip(queries, labels["judged"]):
        for d in grades.keys() & place.keys():
            query += 3.5 * dim**-0.5 * documents[place[d]]
    return {"queries": queries, "documents": documents, **labels}


def around_centres(random, labels: np.ndarray, dim: int, distance: float) -> np.ndarray:
    """Rows (n, dim) of length about one around a centre for each label, variances falling."""
    spread = np.arange(1, dim + 1, dtype=np.float32) ** -0.5
    spread /= np.linalg.norm(spread)
    centres = random.standard_normal((labels.max() + 1, dim), dtype=np.float32)
    x = random.standard_normal((len(labels), dim), dtype=np.float32)
    for row, label in zip(x, labels):
        row += distance * centres[label]
    x *= spread / np.float32((1 + distance**2) ** 0.5)
    return x


def classification_data(args) -> dict:
    """The arguments of evaluate.classification; 77 labels, 8 samples of each in a draw."""
    random, train = np.random.default_rng(args.seed), scaled(args, "train")
    labels = random.integers(0, 77, train + scaled(args, "test"))
    labels[:77] = np.arange(77)
    draws = draw_training_sets(labels[:train].tolist(), 8)
    used = np.unique(np.concatenate(draws))
    rows = np.concatenate((used, np.arange(train, len(labels))))
    x = around_centres(random, labels[rows], args.dim, 0.5)
    return {"train": x[: len(used)], "test": x[len(used) :],
            "train_labels": labels[used].tolist(), "test_labels": labels[train:].tolist(),
            "draws": [np.searchsorted(used, draw) for draw in draws]}


def clustering_data(args) -> dict:
    """The arguments of evaluate.clustering; 20 labels a set."""
    random = np.random.default_rng(args.seed)
    labels = random.integers(0, 20, (args.sets, scaled(args, "set")))
    return {"sentences": around_centres(random, labels.ravel(), args.dim, 0.5),
            "labels": labels.tolist()}


DATA = {"retrieval": retrieval_data, "classification": classification_data,
        "clustering": clustering_data}


class OurScoring:
    imports = ()

    def __init__(self, args):
        self.score, self.data = evaluate.KINDS[args.job][0], DATA[args.job](args)

    def measure(self) -> dict:
        clock = time.perf_counter()
        scores = self.score(**self.data)
        seconds = time.perf_counter() - clock
        return {"seconds": seconds, "scores": {k: scores[k] for k in TOLERANCES if k in scores}}


class SklearnScoring:
    imports = ("sklearn.cluster", "sklearn.linear_model", "sklearn.metrics")

    def __init__(self, args):
        self.job, self.data = args.job, DATA[args.job](args)

    def measure(self) -> dict:
        clock = time.perf_counter()
        if self.job == "classification":
            scores = {"accuracy": regression_accuracy(**self.data)}
        else:
            scores = {"v_measure": float(np.mean(cluster_measures(**self.data)))}
        return {"seconds": time.perf_counter() - clock, "scores": scores}


class Given:
    """An encoder as mteb wants it, which hands over finished embeddings and remembers when."""

    mteb_model_meta = None

    def __init__(self, queries: np.ndarray, documents: np.ndarray):
        self.rows = {"query": torch.from_numpy(queries), "document": torch.from_numpy(documents)}

    def encode(self, inputs, *, prompt_type, **_) -> torch.Tensor:
        self.clock = time.perf_counter()
        return self.rows[prompt_type.value]

    def similarity(self, a, b) -> torch.Tensor:
        from mteb.similarity_functions import cos_sim

        return cos_sim(a, b)


class MtebRetrieval:
    imports = ("mteb", "mteb._evaluators", "mteb.similarity_functions", "datasets", "pytrec_eval")

    def __init__(self, args):
        import mteb
        from datasets import Dataset

        data = retrieval_data(args)
        self.ids, self.task = data["query_ids"], mteb.get_task("SciFact")
        self.judged = dict(zip(self.ids, data["judged"]))
        self.given = Given(data["queries"], data["documents"])
        self.tables = {name: Dataset.from_dict({"id": ids, "text": ["-"] * len(ids)})
                       for name, ids in (("corpus", data["document_ids"]), ("queries", self.ids))}

    def measure(self) -> dict:
        from mteb._evaluators import RetrievalEvaluator
        from mteb.models import SearchEncoderWrapper
        from mteb.timing import TimingStack

        evaluator = RetrievalEvaluator(
            **self.tables, task_metadata=self.task.metadata, hf_split="test", hf_subset="default",
            top_k=max(self.task.k_values), timer=TimingStack(),
        )
        options = {"batch_size": 32, "show_progress_bar": False}
        results = evaluator(SearchEncoderWrapper(self.given), encode_kwargs=options)
        scores = evaluator.evaluate(self.judged, results, self.task.k_values)[0]
        seconds = time.perf_counter() - self.given.clock
        names = {"ndcg_at_10": "ndcg_cut_10", "map_at_10": "map_cut_10",
                 "recall_at_100": "recall_100"}
        means = {ours: float(np.mean([scores[q][name] for q in self.ids]))
                 for ours, name in names.items()}
        return {"seconds": seconds, "scores": means}


IMPLEMENTATIONS = {
    "retrieval": {"ours": OurScoring, "mteb": MtebRetrieval},
    "classification": {"ours": OurScoring, "scikit-learn": SklearnScoring},
    "clustering": {"ours": OurScoring, "scikit-learn": SklearnScoring},
}

# ---------------------------------------------------------------------------------------------
# A worker: one implementation in a process of its own, which answers a line with a line
# ---------------------------------------------------------------------------------------------


def peak_bytes(device: str = "cpu") -> int:
    """The highest memory of this process so far: resident, or on CUDA allocated.

    Linux counts it in ru_maxrss from the parent's, so that VmHWM is read there.
    """
    if device.startswith("cuda"):
        return step.peak_bytes(device)
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    peaks = [1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")]
    return peaks[0] if peaks else step.peak_bytes(device)


def worker(args, implementations: dict[str, dict]):
    """Build one implementation, then answer each line with a measurement as a line of JSON."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    torch.set_num_threads(args.threads)
    kind = implementations[args.job][args.worker]
    for module in kind.imports:
        importlib.import_module(module)
    cuda = args.device.startswith("cuda")
    ready = {"imported_bytes": 0 if cuda else psutil.Process().memory_info().rss}
    measured = kind(args)
    print(json.dumps(ready), file=answers, flush=True)
    for _ in sys.stdin:
        found = measured.measure()
        found["peak_bytes"] = peak_bytes(args.device)
        print(json.dumps(found), file=answers, flush=True)


class Worker:
    """The parent's end of a worker process, which runs `script`."""

    def __init__(self, script: str, name: str, args: dict):
        self.name, threads = name, str(args["threads"])
        numbers = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS",
                   "RAYON_NUM_THREADS")
        quiet = {"PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY":
                 "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
                 "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, script, "--worker", json.dumps({**args, "worker": name})],
            text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={**os.environ, **quiet, **dict.fromkeys(numbers, threads)},
        )
        try:
            self.ready = self.answer()
        except UserError:
            self.close()
            raise

    def answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            raise UserError(f"the worker {self.name!r} ended with code {code}, see above; -9 means "
                            f"too little memory")
        return json.loads(line)

    def ask(self) -> dict:
        self.process.stdin.write("turn\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self):
        self.process.stdin.close()
        self.process.wait()


# ---------------------------------------------------------------------------------------------
# The parent: turns, checks, tables
# ---------------------------------------------------------------------------------------------


def take_turns(script: str, job: str, names, args: dict, check) -> dict[str, dict]:
    """name -> its first answer, with the seconds of the counted turns and the memory.

    `script` has the workers; `check` looks at the first answers, which are warm-up.
    """
    with ExitStack() as stack:
        workers = {}
        for name in names:
            workers[name] = Worker(script, name, {**args, "job": job})
            stack.callback(workers[name].close)
        turns = {name: [process.ask()] for name, process in workers.items()}
        agreement = check({name: answers[0] for name, answers in turns.items()}, args)
        for i in range(args["repeats"]):
            for name, process in workers.items():
                turns[name].append(process.ask())
            print(f"{job}, round {i + 1} of {args['repeats']} done", file=sys.stderr, flush=True)
        return {name: {**answers[0], "seconds": [a["seconds"] for a in answers[1:]],
                       "peak_bytes": answers[-1]["peak_bytes"],
                       "imported_bytes": workers[name].ready["imported_bytes"],
                       "agreement": agreement[name]}
                for name, answers in turns.items()}


def check_scores(first: dict[str, dict], args: dict) -> dict[str, str]:
    """name -> its scores and the largest difference; UserError if that is above the tolerance."""
    reference, said = first["ours"]["scores"], {}
    for name, answer in first.items():
        said[name] = ", ".join(f"{key} {value:.5f}" for key, value in answer["scores"].items())
        for key, value in answer["scores"].items():
            off = abs(value - reference[key])
            if not off <= TOLERANCES[key]:  # also true for nan
                raise UserError(f"{name}: {key} {value:.6f} is not ours, {reference[key]:.6f}")
            if name != "ours":
                print(f"agrees: {name} {key} {value:.6f}, ours {reference[key]:.6f}, difference "
                      f"{off:.1e}")
    return said


def time_cells(found: dict[str, dict], name: str) -> list[str]:
    """Median seconds with their range, their ratio to ours, and the peak."""
    row, middle = found[name], median(found[name]["seconds"])
    above = row["peak_bytes"] - row["imported_bytes"]
    return [name, f"{middle:.4g} ({min(row['seconds']):.4g}-{max(row['seconds']):.4g})",
            f"{middle / median(found['ours']['seconds']):.2f}",
            f"{row['peak_bytes'] / step.GIB:.2f} ({above / step.GIB:.2f})"]


def bench_scoring(args) -> tuple[dict, list[str]]:
    """Results, and the lines of the table."""
    results, titles = {}, ("scoring", "implementation", "s, median (min-max)", "time / ours",
                           "peak GiB (above imports)", "scores")
    lines = [f"| {' | '.join(titles)} |", "|---|---|---:|---:|---:|---|"]
    for job in ("retrieval", "classification", "clustering"):
        for dim in args.dims:
            settings = {**vars(args), "dim": dim, "device": "cpu"}
            found = take_turns(__file__, job, IMPLEMENTATIONS[job], settings, check_scores)
            results[f"{job} {dim}"] = found
            for name in found:
                cells = [f"{job}, D = {dim}", *time_cells(found, name), found[name]["agreement"]]
                lines.append(f"| {' | '.join(cells)} |")
    return results, lines


def bench(args):
    """Print the table, write the JSON."""
    versions = {p: version(p) for p in ("torch", "mteb", "scikit-learn", "numpy")}
    load = os.getloadavg()
    print(f"{step.cpu_name()}, {args.threads} thread(s), load {load[0]:.1f}, {args.repeats} "
          f"turns, {versions}")
    results, lines = bench_scoring(args)
    print("\n" + "\n".join(lines))
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    about = {"arguments": vars(args), "device": step.cpu_name(), **versions,
             "load_before": load, "load_after": os.getloadavg()}
    out.write_text(json.dumps({**about, "results": results}, indent=1) + "\n")
    print(f"\nwritten to {out}")


def main() -> int:
    """The command line; returns the exit code."""
    if sys.argv[1:2] == ["--worker"]:
        worker(SimpleNamespace(**json.loads(sys.argv[2])), IMPLEMENTATIONS)
        return 0
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data-dir", help="folder with SciFact (hub layout): its ids, judgements")
    add("--repeats", type=int, default=5, help="counted turns of each")
    add("--threads", type=int, default=1)
    add("--seed", type=int, default=0)
    add("--dims", type=int, nargs="+", default=[384, 4096], help="sizes of embeddings")
    add("--sets", type=int, default=4, help="sets of texts to cluster")
    add("--scale", type=float, default=1.0, help="all sizes times this, to try it out")
    add("--out", default="bench/results/evaluate.json")
    args = parser.parse_args()
    if min(args.repeats, args.threads, args.sets, *args.dims) < 1:
        parser.error("the numbers must be above 0")
    try:
        with tempfile.TemporaryDirectory() as args.scratch:
            bench(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Scoring of retrieval, timed side by side: measures.retrieval and mteb, which it replaces.

    python bench/time_scoring.py

The input is random embeddings of --dims columns in SciFact's size (5,183 documents, 300 queries
with one or two judged documents each); bench/time_encode.py times encoding. Timed are ranking and
metrics, for mteb from the moment that it has the documents' embeddings. Both rank 101 documents,
fewer than mteb does by default; mteb computes more metrics. nDCG@10, MAP@10 and recall@100 must
agree to 1e-5.
Turns, seconds and peak as in bench/harness.py; the check is the warm-up, the peak has the data.
"""

import sys
import time

import harness
import numpy as np
import torch
from harness import Implementation, whole

import measures
from runtime.errors import UserError

# ours -> mteb's
NAMES = {"ndcg_at_10": "ndcg_cut_10", "map_at_10": "map_cut_10", "recall_at_100": "recall_100"}


def random_data(args) -> dict:
    """The arguments of measures.retrieval; queries lie somewhat near their judged documents."""
    random, dim = np.random.default_rng(args.seed), args.dim
    documents, queries = (random.standard_normal((n, dim), dtype=np.float32)
                          for n in (args.documents, args.queries))
    for x in (documents, queries):  # in place: no peak before the scoring's own
        x /= dim**0.5
    judged = [random.integers(0, len(documents), random.integers(1, 3)) for _ in queries]
    for query, near in zip(queries, judged):
        query += 3.5 * dim**-0.5 * documents[np.unique(near)].sum(axis=0)
    return {"queries": queries, "documents": documents,
            "document_ids": [str(i) for i in range(len(documents))],
            "query_ids": [f"q{i}" for i in range(len(queries))],
            "judged": [{str(i): 1 for i in near} for near in judged]}


class Scoring(Implementation):
    """`score()` -> the scores of NAMES."""

    def build(self):
        self.data = random_data(self.args)

    def measure(self, turn: int) -> dict:
        self.clock = time.perf_counter()
        scores = self.score()
        seconds = time.perf_counter() - self.clock
        return {"seconds": seconds, "scores": {name: scores[name] for name in NAMES}}


class OurScoring(Scoring):
    ours = True

    def score(self) -> dict:
        return measures.retrieval(**self.data)


class MtebScoring(Scoring):
    """mteb's evaluator; this is also its encoder, which hands over finished embeddings."""

    imports = ("mteb", "mteb._evaluators", "mteb.similarity_functions", "datasets", "pytrec_eval")
    mteb_model_meta = None

    def build(self):
        import mteb
        from datasets import Dataset

        super().build()
        self.task, ids = mteb.get_task("SciFact"), self.data["query_ids"]
        self.rows = {"query": torch.from_numpy(self.data["queries"]),
                     "document": torch.from_numpy(self.data["documents"])}
        self.judged = dict(zip(ids, self.data["judged"]))
        self.tables = {name: Dataset.from_dict({"id": ids, "text": ["-"] * len(ids)})
                       for name, ids in (("corpus", self.data["document_ids"]), ("queries", ids))}

    def encode(self, inputs, *, prompt_type, **_) -> torch.Tensor:
        self.clock = time.perf_counter()  # in the last call, for the documents
        return self.rows[prompt_type.value]

    def similarity(self, a, b) -> torch.Tensor:
        from mteb.similarity_functions import cos_sim

        return cos_sim(a, b)

    def score(self) -> dict:
        from mteb._evaluators import RetrievalEvaluator
        from mteb.models import SearchEncoderWrapper
        from mteb.timing import TimingStack

        evaluator = RetrievalEvaluator(
            **self.tables, task_metadata=self.task.metadata, hf_split="test", hf_subset="default",
            top_k=101, timer=TimingStack())
        options = {"batch_size": 32, "show_progress_bar": False}
        results = evaluator(SearchEncoderWrapper(self), encode_kwargs=options)
        scores = evaluator.evaluate(self.judged, results, (10, 100))[0]
        return {ours: float(np.mean([scores[q][name] for q in self.judged]))
                for ours, name in NAMES.items()}


def check_scores(first: dict[str, dict], args) -> dict[str, str]:
    """Label -> its scores; UserError for a difference from ours above 1e-5."""
    words = {}
    for label, answer in first.items():
        scores = answer["scores"]
        words[label] = ", ".join(f"{key} {value:.5f}" for key, value in scores.items())
        for key, value in scores.items():
            off = abs(value - first["ours"]["scores"][key])
            print(f"{label}: {key} {value:.6f}, off by {off:.1e}", flush=True)
            if not off <= 1e-5:  # also true for nan
                raise UserError(f"{label}: {key} {value:.6f} is not ours")
    return words


def bench(args):
    """Each of --dims; yields results and the table."""
    timings, rows = {}, []
    for args.dim in args.dims:
        kinds = {"ours": OurScoring, "mteb": MtebScoring}
        found = timings[args.dim] = harness.race(kinds, args, check_scores)
        rows += [[f"retrieval, D = {args.dim:,}", label, *timing.cells(found["ours"]),
                  timing.agreement] for label, timing in found.items()]
    titles = ("scoring", "implementation", *harness.TIMES, "scores")
    yield {"timings": timings}, harness.table(titles, rows, words=2)


def parse():
    """Parse the command line."""
    parser = harness.new_parser(__doc__, threads=[1], turns=5, warm_up=0)
    add = parser.add_argument
    add("--dims", type=whole(), nargs="+", default=[384, 4096], help="sizes of embeddings")
    add("--documents", type=whole(), default=5183, help="how many")
    add("--queries", type=whole(), default=300, help="how many")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(harness.main(__file__, parse, bench, "mteb", "numpy"))

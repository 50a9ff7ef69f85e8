"""Scoring and encoding, timed side by side: this project and the libraries that it stands in for.

    python bench/evaluate.py --part scoring --data-dir FOLDER
    python bench/evaluate.py --part encode --data-dir FOLDER --dtype float32 --threads 2
    python bench/evaluate.py --part encode --shape 134m --dtype bfloat16 --texts 500

scoring  given random embeddings of --dims columns, nothing is encoded:
         retrieval       SciFact's size (5,183 documents, 300 queries; its ids and judgements if
                         --data-dir has them): evaluate.retrieval and mteb's search and metrics,
                         from the moment that the documents' embeddings are handed over. mteb ranks
                         as many documents and computes more metrics. nDCG@10, MAP@10 and
                         recall@100 must agree to 1e-5.
         classification  Banking77's size, ten draws: evaluate.classification and scikit-learn's
                         LogisticRegression as mteb calls it. Accuracies within 0.3 points.
         clustering      --sets sets of TwentyNewsgroups' size: evaluate.clustering and
                         scikit-learn's MiniBatchKMeans as mteb calls it. V-measures within 0.5.
encode   texts (SciFact's documents if --data-dir has them, else 20-400 tokens of the embedded
         passages) to the mean of a causal Llama's states, at most 512 tokens with BOS:
         ours                   plain_encoder(...).encode, no padding
         sentence-transformers  Transformer and Pooling, its own sorting (by characters); texts a
                                batch: --batch-tokens by the mean length
         transformers           LlamaModel, texts sorted by length, padded and masked; a batch
                                with its padding fills --batch-tokens
         The others' embeddings must be ours: fp32 to 1e-4, bf16 cosine at least 0.999. Time
         includes the tokenizer. SDPA, the same dtype and threads for all.

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
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import numpy as np
import psutil
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `evaluate` is the product's

import step
from published import cluster_measures, regression_accuracy

import evaluate
from data import UserError
from data.corpora import read_lines
from data.tasks import TASKS, draw_training_sets, read_task, task_place
from data.tokenizer import Tokenizer
from model import PLAIN, Llama, find_model, plain_encoder, read_config

LONGEST = PLAIN.max_tokens
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


# ---------------------------------------------------------------------------------------------
# Encoding: args.folder is a Llama for all three, args.texts_file a JSON list
# ---------------------------------------------------------------------------------------------


class Encoding:
    """What the three share; `encode(texts)` is theirs."""

    imports = ()

    def __init__(self, args):
        self.args, self.texts = args, json.loads(Path(args.texts_file).read_text())
        self.dtype = getattr(torch, args.dtype)
        self.build()

    def measure(self) -> dict:
        clock = time.perf_counter()
        x = self.encode(self.texts)
        seconds = time.perf_counter() - clock
        np.save(self.args.rows_file, x)
        return {"seconds": seconds}

    def check_ids(self, theirs: list[list[int]]):
        """UserError unless a library's ids of the first texts are ours, BOS and cut included."""
        bos = read_config(Path(self.args.folder) / "config.json").bos_token_id
        ours = Tokenizer(Path(self.args.folder), sys.maxsize, bos).encode(
            self.texts[: len(theirs)], LONGEST)
        for a, b in zip(ours, theirs):
            if a.tolist() != list(b):
                raise UserError(f"{self.args.worker}: its ids {list(b)[:5]}... are not ours, "
                                f"{a.tolist()[:5]}...; does tokenizer.json put BOS, and only BOS, "
                                f"around a text?")


class OurEncoding(Encoding):
    def build(self):
        self.encoder = plain_encoder(self.args.folder, PLAIN, dtype=self.dtype)

    def encode(self, texts: list[str]) -> np.ndarray:
        return self.encoder.encode(texts, batch_tokens=self.args.batch_tokens)


class SentenceTransformers(Encoding):
    imports = ("sentence_transformers", "transformers.models.llama.modeling_llama")

    def build(self):
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

        llama = Transformer(
            self.args.folder, max_seq_length=LONGEST,
            model_kwargs={"dtype": self.dtype, "attn_implementation": "sdpa"},
        )
        pooling = Pooling(llama.get_embedding_dimension(), "mean")
        self.model = SentenceTransformer(modules=[llama, pooling], device="cpu")
        ids = llama.tokenizer(self.texts[:50], truncation=True, max_length=LONGEST)["input_ids"]
        self.check_ids(ids)

    def encode(self, texts: list[str]) -> np.ndarray:
        return self.model.encode(texts, batch_size=self.args.batch_texts, show_progress_bar=False)


class Transformers(Encoding):
    imports = ("transformers.models.llama.modeling_llama",)

    def build(self):
        from transformers import AutoTokenizer, LlamaModel

        self.tokenizer = AutoTokenizer.from_pretrained(self.args.folder)
        self.model = LlamaModel.from_pretrained(
            self.args.folder, dtype=self.dtype, attn_implementation="sdpa"
        ).eval()
        self.check_ids(self.ids(self.texts[:50]))

    def ids(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, truncation=True, max_length=LONGEST)["input_ids"]

    @torch.inference_mode()
    def encode(self, texts: list[str]) -> np.ndarray:
        ids, out = [torch.tensor(i) for i in self.ids(texts)], None
        for batch in padded_batches([len(i) for i in ids], self.args.batch_tokens):
            lengths = torch.tensor([len(ids[i]) for i in batch])
            padded = torch.nn.utils.rnn.pad_sequence([ids[i] for i in batch], batch_first=True)
            mask = torch.arange(padded.shape[1]) < lengths[:, None]
            states = self.model(padded, attention_mask=mask, use_cache=False).last_hidden_state
            states = states.float().masked_fill_(~mask[..., None], 0)
            if out is None:
                out = np.empty((len(texts), states.shape[-1]), dtype=np.float32)
            out[batch] = (states.sum(1) / lengths[:, None]).numpy()
        return out


def padded_batches(lengths: list[int], budget: int) -> list[list[int]]:
    """Indices of texts, longest first; longest times count is at most `budget` (or one text)."""
    batches, room = [], 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not room:
            batches.append([])
            room = max(1, budget // lengths[i])
        batches[-1].append(i)
        room -= 1
    return batches


IMPLEMENTATIONS = {
    "retrieval": {"ours": OurScoring, "mteb": MtebRetrieval},
    "classification": {"ours": OurScoring, "scikit-learn": SklearnScoring},
    "clustering": {"ours": OurScoring, "scikit-learn": SklearnScoring},
    "encode": {"ours": OurEncoding, "sentence-transformers": SentenceTransformers,
               "transformers": Transformers},
}

# ---------------------------------------------------------------------------------------------
# A worker: one implementation in a process of its own, which answers a line with a line
# ---------------------------------------------------------------------------------------------


def peak_bytes() -> int:
    """The highest resident memory of this process so far.

    Linux counts it in ru_maxrss from the parent's, so that VmHWM is read there.
    """
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    peaks = [1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")]
    return peaks[0] if peaks else step.peak_bytes("cpu")


def worker(args):
    """Build one implementation, then answer each line with a measurement as a line of JSON."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    torch.set_num_threads(args.threads)
    kind = IMPLEMENTATIONS[args.job][args.worker]
    for module in kind.imports:
        importlib.import_module(module)
    ready = {"imported_bytes": psutil.Process().memory_info().rss}
    measured = kind(args)
    print(json.dumps(ready), file=answers, flush=True)
    for _ in sys.stdin:
        found = measured.measure()
        print(json.dumps({**found, "peak_bytes": peak_bytes()}), file=answers, flush=True)


class Worker:
    """The parent's end of a worker process."""

    def __init__(self, name: str, args: dict):
        self.name, threads = name, str(args["threads"])
        numbers = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS",
                   "RAYON_NUM_THREADS")
        quiet = {"PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY":
                 "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
                 "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", json.dumps({**args, "worker": name})],
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


def take_turns(job: str, args: dict, repeats: int, check) -> dict[str, dict]:
    """name -> seconds of the counted turns, first answer, memory; `check` looks at the warm-up."""
    with ExitStack() as stack:
        workers = {}
        for name in IMPLEMENTATIONS[job]:
            rows = str(Path(args["scratch"]) / f"{name}.npy")
            workers[name] = Worker(name, {**args, "job": job, "rows_file": rows})
            stack.callback(workers[name].close)
        turns = {name: [process.ask()] for name, process in workers.items()}
        agreement = check({name: answers[0] for name, answers in turns.items()}, args)
        for i in range(repeats):
            for name, process in workers.items():
                turns[name].append(process.ask())
            print(f"{job}, round {i + 1} of {repeats} done", file=sys.stderr, flush=True)
        return {name: {"seconds": [a["seconds"] for a in answers[1:]],
                       "peak_bytes": answers[-1]["peak_bytes"],
                       "imported_bytes": workers[name].ready["imported_bytes"],
                       "scores": answers[0].get("scores"), "agreement": agreement[name]}
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


def check_rows(first: dict[str, dict], args: dict) -> dict[str, str]:
    """name -> how near its embeddings are to ours; UserError if they are not near enough."""
    load = lambda name: np.load(Path(args["scratch"]) / f"{name}.npy")  # noqa: E731
    ours, said = load("ours"), {"ours": "-"}
    for name in [name for name in first if name != "ours"]:
        theirs = load(name)
        off = float(np.abs(ours - theirs).max())
        cosine = float((evaluate.unit(ours) * evaluate.unit(theirs)).sum(axis=1).min())
        said[name] = f"off by {off:.1e}, cosine {cosine:.6f}"
        fine = off <= 1e-4 if args["dtype"] == "float32" else cosine >= 0.999
        if not fine:
            raise UserError(f"{name}: its embeddings are not ours ({said[name]})")
        print(f"agrees: {name}, embeddings off by at most {off:.1e}, lowest cosine {cosine:.6f}")
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
            settings = {**vars(args), "dim": dim}
            found = take_turns(job, settings, args.repeats, check_scores)
            results[f"{job} {dim}"] = found
            for name in found:
                cells = [f"{job}, D = {dim}", *time_cells(found, name), found[name]["agreement"]]
                lines.append(f"| {' | '.join(cells)} |")
    return results, lines


def random_llama(shape: str, dtype: str, folder: Path):
    """Write a Llama of a shape of bench/step.py with random weights and the embedded tokenizer."""
    with torch.device("meta"):
        llama = Llama(step.SHAPES[shape]).to(getattr(torch, dtype))
    step.draw_base(llama.to_empty(device="cpu"), llama.config.num_hidden_layers)
    save_file(llama.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    about = asdict(replace(llama.config, bos_token_id=1))
    about |= {"rope_theta": about.pop("rope")["rope_theta"], "model_type": "llama",
              "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 2048}
    (folder / "config.json").write_text(json.dumps(about))
    (folder / "tokenizer.json").symlink_to(find_model("demo") / "tokenizer.json")


def shared_folder(args) -> Path:
    """A Llama's folder that all three read: --model's files, and a plain tokenizer_config.json."""
    folder = Path(args.scratch) / "llama"
    folder.mkdir()
    if args.shape:
        random_llama(args.shape, args.dtype, folder)
    else:
        source = find_model(args.model).resolve()
        for file in [*source.glob("*.safetensors*"), source / "config.json",
                     source / "tokenizer.json"]:
            (folder / file.name).symlink_to(file)
    config = read_config(folder / "config.json")
    tokenizer = Tokenizer(folder, config.vocab_size, config.bos_token_id)
    fast = {"tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": tokenizer.backend.id_to_token(0)}  # any: padding is masked
    (folder / "tokenizer_config.json").write_text(json.dumps(fast))
    return folder


def sample_texts(args) -> list[str]:
    """--texts texts: SciFact's documents, else 20-400 tokens each of the embedded passages."""
    if found := scifact(args):
        return found[0]["documents"][: args.texts]
    demo = find_model("demo")
    tokenizer = Tokenizer(demo, read_config(demo / "config.json").vocab_size)
    passages = [json.loads(line)["text"] for line in read_lines(
        demo.parent / "passages.jsonl.gz")]
    row = np.concatenate([ids[1:] for ids in tokenizer.encode(passages)])
    random = np.random.default_rng(args.seed)
    lengths = random.integers(20, 401, args.texts)
    starts = random.integers(0, len(row) - 401, args.texts)
    return [tokenizer.decode(row[i : i + n - 1]) for i, n in zip(starts, lengths)]


def bench_encode(args) -> tuple[dict, list[str]]:
    """Results, and the lines of the table."""
    folder, texts = shared_folder(args), sample_texts(args)
    config = read_config(folder / "config.json")
    tokenizer = Tokenizer(folder, config.vocab_size, config.bos_token_id)
    lengths = [len(ids) for ids in tokenizer.encode(texts, LONGEST)]
    tokens, batch_texts = sum(lengths), max(1, round(args.batch_tokens * len(texts) / sum(lengths)))
    padded = sum(len(b) * max(lengths[i] for i in b)
                 for b in padded_batches(lengths, args.batch_tokens))
    model = args.shape or args.model
    print(f"encode: {model}, {args.dtype}, {len(texts):,} texts, {tokens:,} tokens with BOS "
          f"({min(lengths)}-{max(lengths)} a text); batches of {args.batch_tokens} tokens, in "
          f"sentence-transformers {batch_texts} texts; padding in transformers "
          f"{padded / tokens - 1:.1%}")
    file = Path(args.scratch) / "texts.json"
    file.write_text(json.dumps(texts))
    settings = {**vars(args), "folder": str(folder), "texts_file": str(file),
                "batch_texts": batch_texts}
    found = take_turns("encode", settings, args.repeats, check_rows)
    titles = ("encoding", "s, median (min-max)", "time / ours", "peak GiB (above imports)",
              "texts/s", "real tokens/s", "beside ours")
    lines = [f"| {' | '.join(titles)} |", "|---|" + "---:|" * 5 + "---|"]
    for name in found:
        middle = median(found[name]["seconds"])
        cells = [*time_cells(found, name), f"{len(texts) / middle:,.1f}",
                 f"{tokens / middle:,.0f}", found[name]["agreement"]]
        lines.append(f"| {' | '.join(cells)} |")
    about = {"texts": len(texts), "tokens": tokens, "batch_texts": batch_texts}
    return {"encode": {**about, **found}}, lines


def bench(args):
    """The parts asked for: print their tables, write the JSON."""
    versions = {p: version(p) for p in ("torch", "transformers", "sentence-transformers", "mteb",
                                        "scikit-learn", "numpy")}
    load = os.getloadavg()
    print(f"{step.cpu_name()}, {args.threads} thread(s), load {load[0]:.1f}, {args.repeats} "
          f"turns, {versions}")
    results, lines = {}, []
    for name, part in (("scoring", bench_scoring), ("encode", bench_encode)):
        if args.part in (name, "all"):
            more, table = part(args)
            results |= more
            lines += ["", *table]
    print("\n".join(lines))
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    about = {"arguments": vars(args), "device": step.cpu_name(), **versions,
             "load_before": load, "load_after": os.getloadavg()}
    out.write_text(json.dumps({**about, "results": results}, indent=1) + "\n")
    print(f"\nwritten to {out}")


def main() -> int:
    """The command line; returns the exit code."""
    if sys.argv[1:2] == ["--worker"]:
        worker(SimpleNamespace(**json.loads(sys.argv[2])))
        return 0
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--part", choices=["scoring", "encode", "all"], default="all")
    add("--data-dir", help="folder with SciFact (hub layout): its ids, judgements, texts")
    add("--repeats", type=int, default=5, help="counted turns of each")
    add("--threads", type=int, default=1)
    add("--seed", type=int, default=0)
    add("--dims", type=int, nargs="+", default=[384, 4096], help="scoring: sizes of embeddings")
    add("--sets", type=int, default=4, help="scoring: sets of texts to cluster")
    add("--scale", type=float, default=1.0, help="scoring: all sizes times this, to try it out")
    add("--model", default="demo", help="encode: a Llama's folder or hub name; demo: the embedded")
    add("--shape", choices=["134m", "7b"], help="encode: random weights instead of --model")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="encode")
    add("--texts", type=int, default=5000, help="encode: how many")
    add("--batch-tokens", type=int, default=4096, help="encode: tokens of a forward pass")
    add("--out", default="bench/results/evaluate.json")
    args = parser.parse_args()
    if min(args.repeats, args.threads, args.texts, args.batch_tokens, args.sets, *args.dims) < 1:
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

"""What the tests share: tiny random checkpoints and encoders, one process's Ranks, a step's
gradient, attention by an explicit loop, servers on the loopback, files of evaluation tasks."""

import csv
import gzip
import hashlib
import io
import itertools
import json
import math
import os
import random
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SMOLLM2 = ROOT / "data" / "smollm2"
sys.path.insert(0, str(ROOT))

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.optim.optimizer import register_optimizer_step_post_hook

import contrastive
import evaluate
import lora
import pretrain_ctkd
from data.batches import SplitTexts
from lora import lora_layers
from measures import unit
from model import Encoder, EncoderConfig, Llama, LlamaConfig, plain_encoder, save_encoder
from runtime.errors import UserError
from runtime.formats import write_tensors
from runtime.ranks import Ranks
from runtime.run import Run
from runtime import schedule

ONE = Ranks(0, 1, torch.device("cpu"))  # the only process

TEXT = """The quick brown fox jumps over the lazy dog. A model reads a text from left to right, and
an encoder reads the whole of it at once. Memory tokens stand at the end; their hidden states are
the embedding of the text. What is learnt in one place is of use in another place as well."""

TINY = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "bos_token_id": 1, "eos_token_id": 2, "rms_norm_eps": 1e-5,
}
OTHERS = ("mistral", "qwen2", "qwen3")  # the bases beside llama


def write_tokenizer(folder: Path, size: int = 320, template: str | None = "<s> $A"):
    """A trained byte-level BPE of `size` ids; `template` is its post-processor."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=alphabet, show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    assert tokenizer.get_vocab_size() == size
    if template:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))


def write_llama(folder: Path, seed=0, shard="1GB", dtype=torch.float32, kind="llama",
                **settings) -> Path:
    """A random causal language model of the model_type `kind` and the given config settings, all
    weights of useful size."""
    config = transformers.AutoConfig.for_model(kind, **{**TINY, **settings})
    model = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        spread = 0.3 if weight.dim() == 1 else weight.shape[-1] ** -0.5
        weight.data = noise * spread + (1.0 if "norm" in name else 0.0)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


def write_smollm2(folder: Path) -> Path:
    """A base of the shape of data/smollm2's: random rows in its table, all else 0 or 1, and a
    small tokenizer."""
    about = json.loads((SMOLLM2 / "encoder.json").read_text())["base"]["config"]
    config = {key: value for key, value in about.items()
              if key not in ("rope", "qkv_bias", "qk_norm")}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(
        {**config, "rope_theta": about["rope"]["rope_theta"], "bos_token_id": 1}))
    with torch.device("meta"):
        shapes = {key: p.shape for key, p in Llama(LlamaConfig(**about)).named_parameters()}
    weights = {key: torch.full(shape, float("norm" in key), dtype=torch.bfloat16)
               for key, shape in shapes.items() if key != "lm_head.weight"}
    weights["model.embed_tokens.weight"].normal_(generator=torch.Generator().manual_seed(0))
    write_tensors(folder / "model.safetensors", weights, dtype=None)
    write_tokenizer(folder)
    return folder


def gz(content: bytes) -> bytes:
    """gzip without the time, so that a test's id is the same in every process."""
    return gzip.compress(content, mtime=0)


def edit_json(path: Path, drop=(), **new):
    """Change keys of the JSON object in a file."""
    value = {key: old for key, old in json.loads(path.read_text()).items() if key not in drop}
    path.write_text(json.dumps({**value, **new}))


def run_of(config, ranks: Ranks = ONE, resuming: bool = False) -> Run:
    """A Run of this configuration, as a stage's functions take it; nothing is written."""
    return Run(config, ranks, resuming)


def split_texts(texts: list, source: str = "texts") -> SplitTexts:
    """Stage 1's data made of token ids (with BOS), without reading a file."""
    return SplitTexts(source, texts)


def ctkd_step(encoder, data: SplitTexts, config, step: int, ranks: Ranks = ONE):
    """Forward and backward of stage 1's loop: losses (batch_size,) and the batch."""
    batch = data.read_batch(config.seed, step, config.batch_size)
    losses = torch.zeros(config.batch_size, dtype=torch.float64, device=ranks.device)
    for places in ranks.micro_batches(config.batch_size, config.micro_batch):
        schedule.seed_torch(config.seed, schedule.DROPOUT, step * config.batch_size + places[0])
        loss = pretrain_ctkd.OBJECTIVES[config.objective](encoder, batch.part(places), config)
        loss.backward()
        losses[places.start : places.stop] = loss.detach() / len(places)
    return losses, batch


def contrastive_step(encoder, batch, config, step: int, ranks: Ranks = ONE):
    """Forward and backward of the contrastive loop: loss, queries (B, D), keys (M, D)."""
    every = contrastive.GlobalBatch(encoder, batch.queries + batch.keys, config, step, ranks)
    queries, keys = every.embeddings.split([len(batch.queries), len(batch.keys)])
    loss = contrastive.info_nce(queries, keys, config.temperature, batch.excluded)
    every.backward(loss)
    return loss.detach(), queries.detach(), keys.detach()


def gradients(encoder) -> dict[str, torch.Tensor]:
    """Name -> gradient of all parameters that have one; they are reset."""
    found = {n: p.grad.clone() for n, p in encoder.named_parameters() if p.grad is not None}
    encoder.zero_grad(set_to_none=True)
    return found


# a step of stage 1 in which nothing but the algebra can differ
CTKD = pretrain_ctkd.Config(**{**pretrain_ctkd.PRESETS["demo"], "batch_size": 8,
                               "memory_tokens": 3, "dtype": "float64", "lora_dropout": 0.0})


# the same for every objective: those of pretexts.py have settings of their own
CONFIGS = {name: replace(CTKD, objective=name) for name in pretrain_ctkd.OBJECTIVES}
CONFIGS["mntp"] = replace(CONFIGS["mntp"], memory_tokens=0, train_embeddings="memory",
                          lora_k_proj=True)
CONFIGS["ebae-ebar"] = replace(CONFIGS["ebae-ebar"], attention="causal", train_embeddings="memory")


def stage1_encoder(config) -> Encoder:
    """The encoder that stage 1 would train, with adapters whose B is not zero."""
    encoder = pretrain_ctkd.new_encoder(config, run_of(config))
    draw = torch.Generator().manual_seed(1)
    for layer in lora_layers(encoder.llama).values():
        layer.lora_B.data.normal_(std=0.02, generator=draw)
    return encoder


def worst(left: dict, right: dict) -> float:
    """Largest difference relative to the largest entry of each tensor."""
    assert left.keys() == right.keys() and len(left) > 10
    return max(((left[n] - right[n]).abs().max() / right[n].abs().max()).item() for n in left)


# ---------------------------------------------------------------------------------------------
# Runs of the stages
# ---------------------------------------------------------------------------------------------

STAGES = {"ctkd": pretrain_ctkd, "ucl": contrastive, "scl": contrastive}
FAST = ["--memory-tokens", "2", "--max-tokens", "96", "--threads", "1", "--dtype", "float32",
        "--lr", "0.01", "--device", "cpu"]  # stage 1
FAST2 = ["--max-tokens", 40, "--batch-size", 8, "--steps", 3, "--lr", 0.003, "--threads", 1,
         "--dtype", "float32", "--device", "cpu", "--micro-tokens", 160, "--lora-r", 4]  # 2 and 3
LONG = ["--max-tokens", 120, "--micro-tokens", 360]  # room for an instruction
WEIGHTS = "adapter_model.safetensors"


def words(count: int, seed: int, low=3, high=30) -> list[str]:
    """Random texts of `low` to `high` words."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(TEXT.split(), k=draw.randint(low, high))) for _ in range(count)]


def write_triples(path: Path, count: int, seed: int, low=2, high=8) -> Path:
    """A file of `count` rows of texts of `low` to `high` words, each with two negatives."""
    texts = iter(words(4 * count, seed, low, high))
    rows = [{"query": q, "positive": p, "negative": n} for q, p, *n in zip(*[texts] * 4)]
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def metrics(out: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def without_speed(out: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl without the one number that no seed determines."""
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in metrics(out)]


def settings_of(out: Path) -> dict:
    """The settings in a run's config.json, its format left out."""
    stored = json.loads((out / "config.json").read_text())
    assert stored.pop("format") == 2
    return stored


def losses(out: Path) -> list[float]:
    """The losses in a run's metrics.jsonl."""
    return [row["loss"] for row in metrics(out)]


def scores(out: Path) -> list[dict]:
    """The lines of a run's scores.jsonl."""
    return [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]


def history(out: Path) -> list[str]:
    """The stages that the encoder of a run has been through."""
    about = json.loads((out / "encoder/encoder.json").read_text())
    return [entry["stage"] for entry in about["history"]]


def names(folder: Path) -> list[str]:
    """The names in a folder, sorted."""
    return sorted(p.name for p in folder.iterdir())


def files(folder: Path) -> dict[Path, bytes]:
    """The content of every file below a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def contents(folder: Path) -> dict[str, bytes]:
    """The content of every file in a folder, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def same_tensors(left: Path, right: Path) -> bool:
    """Whether two safetensors files hold the same tensors bit for bit (and more than one)."""
    a, b = load_file(left), load_file(right)
    return a.keys() == b.keys() and len(a) > 1 and all(torch.equal(a[k], b[k]) for k in a)


def signal_after(steps: int, number: int):
    """A signal to this process in its optimiser step of that number, after which a run ends."""
    return after_step(steps, lambda: signal.raise_signal(number))


def error_line(code: int, capsys, *fragments, bar=False) -> str:
    """The one line on stderr of a run that ended with exit code 2; it holds the fragments.

    bar: the run had begun, and its progress bar stands before that line.
    """
    printed = capsys.readouterr().err
    *above, line = printed.splitlines()
    assert code == 2 and line.startswith("error: ") and printed.endswith("\n")
    assert bar or not above
    assert not any(text.startswith(("error", "Traceback")) for text in above)
    for fragment in fragments:
        assert str(fragment) in line
    return line


def refused(load, *fragments):
    """`load` raises a UserError whose message has every fragment."""
    with pytest.raises(UserError) as info:
        load()
    for fragment in fragments:
        assert fragment in str(info.value)


# ---------------------------------------------------------------------------------------------
# Encoders
# ---------------------------------------------------------------------------------------------

K = 4
MEMORY = EncoderConfig(num_memory_tokens=K, max_tokens=64)
ECHO = "Rewrite the sentence: {text}, rewritten sentence: {text}"
EOL = 'This sentence : "{text}" means in one word:"'
TEXTS = [
    "A model reads a text.", "", "The quick brown fox jumps over the lazy dog", "x", " ",
    "ümläut 漢字", "the embedding of the text", "the embedding of the text",
    "A model reads a text.\n", TEXT,
]


def randomize_adapters(llama, seed):
    """Make adapters look trained: B is no longer zero."""
    generator = torch.Generator().manual_seed(seed)
    for layer in lora.lora_layers(llama).values():
        noise = 0.1 * torch.randn(layer.lora_B.shape, generator=generator)
        layer.lora_B.data = noise.to(layer.lora_B)


def trained_encoder(folder, config=MEMORY, train_table=True, dtype=torch.float32) -> Encoder:
    """An encoder as it is after a first stage: random adapters, memory tokens and table."""
    encoder = plain_encoder(folder, config, dtype=dtype)
    generator = torch.Generator().manual_seed(11)
    encoder.add_memory("normal", train_table, generator)
    if train_table:
        encoder.table.data += 0.1 * torch.randn(encoder.table.shape, generator=generator)
    lora.add_lora(encoder.llama, encoder.lora_config, generator)
    randomize_adapters(encoder.llama, 12)
    encoder.adapters, encoder.history = True, [{"stage": "ctkd"}]
    return encoder.eval()


def embed_with_transformers(folder, texts, k=K, literal=None) -> np.ndarray:
    """What a reader of an exported folder has to do: embeddings (N, D) from transformers alone.

    literal: whether special tokens in a text are letters, where that is not left to the folder.
    """
    reference = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rows = []
    more = {} if literal is None else {"split_special_tokens": literal}
    for text in texts:
        ids = tokenizer(text, return_tensors="pt", **more).input_ids
        size = reference.config.vocab_size
        assert ids[0, -k:].tolist() == list(range(size - k, size)) and ids[0, 0] == 1
        with torch.no_grad():
            rows.append(reference(ids).last_hidden_state[0, -k:].mean(0).numpy())
    return np.stack(rows)


# ---------------------------------------------------------------------------------------------
# Attention
# ---------------------------------------------------------------------------------------------


def slow_attention(q, k, v, lengths, causal):
    """One query of one head of one sequence at a time."""
    group, rows, start = q.shape[1] // k.shape[1], [], 0
    for length in lengths:
        for i in range(start, start + length):
            end = i + 1 if causal else start + length
            heads = []
            for h in range(q.shape[1]):
                scores = k[start:end, h // group] @ q[i, h] / math.sqrt(q.shape[2])
                weights = scores.exp() / scores.exp().sum()
                heads.append(weights @ v[start:end, h // group])
            rows.append(torch.stack(heads))
        start += length
    return torch.stack(rows)


def random_qkv(lengths, heads, groups, dtype=torch.float64, size=6):
    """q (T, heads, size), k and v (T, groups, size): the same numbers in every dtype."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(sum(lengths), n, size, generator=generator, dtype=torch.float64).to(dtype)
            for n in (heads, groups, groups)]


# ---------------------------------------------------------------------------------------------
# Servers on the loopback
# ---------------------------------------------------------------------------------------------


class Site(BaseHTTPRequestHandler):
    """Answers from `server.answers`: path -> (status, body, headers); notes every request."""

    def log_message(self, *_):
        pass

    def find_answer(self, path: str):
        """Status, body and headers of the answer to a request for `path`."""
        not_found = 404, b"", {"X-Error-Code": "EntryNotFound"}
        status, body, headers = self.server.answers.get(path, not_found)
        if "wants-agent" in headers and self.headers["User-Agent"].startswith("Python-urllib"):
            return 403, b"", {}
        return status, body, headers

    def do_GET(self):
        path = self.path.partition("?")[0]
        self.server.requests.append(f"{self.command} {path}")
        status, body, headers = self.find_answer(path)
        self.send_response(status)
        length = {} if "Transfer-Encoding" in headers else {"Content-Length": str(len(body))}
        for key, value in {**length, **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET


@contextmanager
def loopback(answers, site=Site):
    """A server of these answers, with its `url` and the `requests` that it has seen."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), site)
    server.answers, server.requests = answers, []
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def hub_file(content: bytes, commit: str):
    """What the hub answers for a file of a repository."""
    tag = hashlib.sha1(content).hexdigest()
    return 200, content, {"ETag": f'"{tag}"', "X-Repo-Commit": commit}


def dead_url() -> str:
    """An address on the loopback where nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def hub_environment(home: Path, endpoint: str) -> dict[str, str]:
    """The environment of a process whose hub is `endpoint` and whose caches are below `home`."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return kept | {
        "HF_HOME": str(home / "hf"), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1", "XDG_CACHE_HOME": str(home / "cache"),
        "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }


# ---------------------------------------------------------------------------------------------
# Files of evaluation tasks
# ---------------------------------------------------------------------------------------------


def table(*fields):
    """table("a", "b")((1, 2), (3, 4)): rows as dictionaries."""
    return lambda *rows: [dict(zip(fields, row)) for row in rows]


TASK_FILES = {  # kind -> file -> its rows
    "sts": {"test": table("sentence1", "sentence2", "score")(
        ("A dog runs.", "A dog is running.", 4.8), ("A dog runs.", '"The moon", bright', 0.25),
        ("", "ümläut 漢字", 1), ("A dog runs.", "A dog runs.", 5))},
    "retrieval": {
        "corpus": table("_id", "title", "text")(
            ("d9", "Owl", "hunts at night"), ("d10", "", " no title "), ("d1", " ", "")),
        "queries": table("_id", "text")(("q1", "night, bird"), ("q2", "nothing"), ("q3", "bird")),
        "qrels/test": table("query-id", "corpus-id", "score")(
            ("q3", "d10", 2), ("q3", "d1", 0), ("q1", "d9", 1)),
    },
    "classification": {
        "train": table("text", "label")(
            *((f"text {i} of {'abc'[i % 3]}", "abc"[i % 3]) for i in range(40))),
        "test": table("text", "label")(("one", "b"), ("", "a"), ("three", "b")),
    },
    "clustering": {"test": table("sentences", "labels")(
        ("red", "colour"), ("blue", "colour"), ("one, two", "number"))},
    "pair-classification": {"test": table("sent1", "sent2", "labels")(
        ("a b", "a b", 1), ("a", "c", 0), ("", "d", 0))},
    "reranking": {"test": table("query", "positive", "negative")(
        ("how", ["so", "thus"], ["no"]), ("why", ["so"], ["because", "no", "no"]))},
}


def jsonl(rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def separated(rows, **dialect) -> bytes:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\r\n", **dialect)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def tsv(rows) -> bytes:
    return separated(rows, delimiter="\t", quoting=csv.QUOTE_NONE, quotechar=None)


def columnar(rows) -> list[dict]:
    return [{name: [row[name] for row in rows] for name in rows[0]}]


SPELLINGS = {
    "lines": (".jsonl", jsonl),
    "lines and blank lines": (".jsonl", lambda rows: b"\n" + jsonl(rows).replace(b"\n", b"\n \n")),
    "zipped lines": (".jsonl.gz", lambda rows: gzip.compress(jsonl(rows))),
    "zipped without the name": (".jsonl", lambda rows: gzip.compress(jsonl(rows))),
    "the name without the zip": (".jsonl.gz", jsonl),
    "array": (".json", lambda rows: json.dumps(rows, indent=1).encode()),
    "zipped array": (".json.gz", lambda rows: gzip.compress(json.dumps(rows).encode())),
    "lines named json": (".json", jsonl),
    "byte order mark": (".jsonl", lambda rows: b"\xef\xbb\xbf" + jsonl(rows)),
    "other fields too": (".jsonl", lambda rows: jsonl([{"id": 7, **row} for row in rows])),
    "tsv": (".tsv", tsv),
    "zipped tsv": (".tsv.gz", lambda rows: gzip.compress(tsv(rows))),
    "csv": (".csv", separated),
    "columns in a line": (".jsonl", lambda rows: jsonl(columnar(rows))),
    "columns as an object": (".json", lambda rows: json.dumps(columnar(rows)[0]).encode()),
    "columns in two lines": (".jsonl", lambda rows: jsonl(columnar(rows[:2]) + columnar(rows[2:]))),
}


def write_task(folder: Path, kind: str, spelling="lines", **other) -> Path:
    """A folder in the layout of `kind`; `other` replaces the rows of a file."""
    ending, spell = SPELLINGS[spelling]
    for name, rows in TASK_FILES[kind].items():
        path = folder / f"{name}{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(spell(other.get(name.replace("qrels/test", "qrels"), rows)))
    return folder


# ---------------------------------------------------------------------------------------------
# Evaluation: encoders, the command, mteb
# ---------------------------------------------------------------------------------------------


def write_encoder(base: Path, where: Path, seed=0, **settings) -> Path:
    """An encoder folder as stage 1 leaves it, its adapters random."""
    config = EncoderConfig(**{"num_memory_tokens": 2, "max_tokens": 64, **settings})
    encoder = plain_encoder(base, config)
    generator = torch.Generator().manual_seed(seed)
    encoder.add_memory("normal", True, generator)
    lora.add_lora(encoder.llama, encoder.lora_config, generator)
    randomize_adapters(encoder.llama, seed)
    encoder.history = [{"stage": "ctkd", "seed": seed}]
    save_encoder(encoder, where)
    return where


def evaluate_main(*arguments) -> int:
    """evaluate.py in the folder of the fixture `here`; returns the exit code."""
    data = [] if "--task-dir" in arguments else ["--data-dir", "../data"]
    return evaluate.main([*data, "--device", "cpu", "--threads", "1", *map(str, arguments)])


def sts17(*arguments) -> int:
    """evaluate.py --task sts17 in the folder of the fixture `here`; returns the exit code."""
    return evaluate_main("--task", "sts17", *arguments)


def mteb_demo_tasks(mteb, sts="DemoSTS", retrieval="DemoRetrieval") -> dict:
    """The bundled tasks as tasks of mteb of these names; their data come from this repository."""
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
        metadata = about(base, sts)

        def load_data(self, **_):
            self.dataset = DatasetDict(test=Dataset.from_list(lines("demo-sts/test.jsonl")))
            self.data_loaded = True

    class DemoRetrieval(type(searching)):
        metadata = about(searching, retrieval)

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


def cosine_table(queries, documents) -> np.ndarray:
    """Cosines of the float32 unit rows, each rounded to float32 once: equal rows are tied."""
    q, d = (unit(x).astype(np.float64) for x in (queries, documents))
    return (q @ d.T).astype(np.float32) + np.float32(0)


def trec_scores(cosines, query_ids, document_ids, judged) -> dict[str, np.ndarray]:
    """What pytrec_eval makes of the cosines: measure -> one value per query.

    A document with the query's own id is left out.
    """
    import pytrec_eval

    run = {q: {d: float(c) for d, c in zip(document_ids, row) if d != q}
           for q, row in zip(query_ids, cosines)}
    measures = {"ndcg_cut.10", "map_cut.10", "recall.100"}
    found = pytrec_eval.RelevanceEvaluator(dict(zip(query_ids, judged)), measures).evaluate(run)
    return {m.replace(".", "_"): np.array([found[q][m.replace(".", "_")] for q in query_ids])
            for m in measures}


def sklearn_clusters(x: np.ndarray, k: int) -> np.ndarray:
    """The labels of scikit-learn's MiniBatchKMeans under MTEB's settings."""
    from sklearn.cluster import MiniBatchKMeans

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fewer distinct points than clusters
        clusters = MiniBatchKMeans(n_clusters=k, batch_size=500, n_init="auto", random_state=42)
        return clusters.fit_predict(x)


# ---------------------------------------------------------------------------------------------
# Interruptions
# ---------------------------------------------------------------------------------------------

DROPOUT = {  # of every kind that a stage has, in several micro-batches per step
    "ctkd": ["--lora-dropout", 0.3, "--micro-batch", 1],
    "ucl": ["--lora-dropout", 0.3, "--attention-dropout", 0.2, "--micro-tokens", 64],
    "scl": ["--lora-dropout", 0.3, "--attention-dropout", 0.2, "--micro-tokens", 64],
}


@contextmanager
def after_step(step: int, action: Callable[[], object]):
    """Call `action` after the optimiser step of this number, counted from 1."""
    counter = itertools.count(1)
    handle = register_optimizer_step_post_hook(lambda *_: next(counter) == step and action())
    try:
        yield
    finally:
        handle.remove()


def assert_same_run(left: Path, right: Path, last: int):
    """Equal metrics, every step once; equal weights, moments and encoder, bit for bit."""
    assert without_speed(left) == without_speed(right)
    assert [row["step"] for row in metrics(left)] == list(range(last))
    for name in ("weights", "optimizer"):
        path = f"checkpoints/step-{last:07d}/{name}.safetensors"
        assert same_tensors(left / path, right / path)
    encoders = [sorted(p.relative_to(out) for p in (out / "encoder").rglob("*.safetensors"))
                for out in (left, right)]
    assert encoders[0] == encoders[1] and len(encoders[0]) >= 2
    for path in encoders[0]:
        a, b = load_file(left / path), load_file(right / path)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)

"""Score a text encoder on MTEB's STS tasks (Muennighoff et al. 2022, arXiv 2210.07316).

    python evaluate.py --task demo-sts                            the newest encoder under runs/
    python evaluate.py --task sts17 stsbenchmark --model runs/ctkd-demo
    python evaluate.py --task sts17 --model demo --method mean    a Llama as it is, no training

An encoder's pooling, attention and length come from its folder; a plain Llama is read by one of
the training-free methods. Data lie under --data-dir in the hub's layout (one folder per repository,
named like it), or are downloaded once from the hub at the revision that MTEB pins.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import RemoteEntryNotFoundError

from data import UserError
from data.corpora import read_lines
from model import PLAIN, Encoder, find_device, find_model, is_encoder, load_encoder, plain_encoder

ROOT = Path(__file__).parent
TASKS = json.loads((ROOT / "data" / "tasks.json").read_text())
UNTRAINED = ("last", "mean", "weighted-mean")  # LT, mean, WMP of the paper's Table 1

Encode = Callable[[list[str]], np.ndarray]

# ---------------------------------------------------------------------------------------------
# Measures
# ---------------------------------------------------------------------------------------------


def average_ranks(x: np.ndarray) -> np.ndarray:
    """Ranks 1..n of x (n,); equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Rank correlation of x and y (n,), ties by average ranks; nan if one of them is constant."""
    rx, ry = (average_ranks(np.asarray(v)) for v in (x, y))
    rx, ry = rx - rx.mean(), ry - ry.mean()
    norm = np.sqrt((rx @ rx) * (ry @ ry))
    return float(rx @ ry / norm) if norm > 0 else float("nan")


def paired_cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine of each row of a (n, D) with the same row of b, as 1 - |a/|a| - b/|b||^2 / 2.

    This is MTEB's form: equal rows give exactly 1, so that equal texts stay tied.
    """
    a, b = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (a, b))
    return 1 - 0.5 * np.square(a - b).sum(axis=1)


# ---------------------------------------------------------------------------------------------
# Tasks
# ---------------------------------------------------------------------------------------------


def task_file(task: str, data_dir: str | Path | None = None) -> tuple[Path, str]:
    """The file of a task and its revision: embedded, below `data_dir`, or from the hub."""
    about = TASKS[task]
    repository, revision, names = about["repository"], about["revision"], about["files"]
    if data_dir is not None or repository == "demo":
        embedded = repository == "demo"
        folder = (ROOT / "data/demo" / task if embedded
                  else Path(data_dir) / repository.rpartition("/")[2])
        for name in names:
            if (folder / name).is_file():
                return folder / name, revision if embedded else "local"
        raise UserError(f"{folder}: holds none of {', '.join(names)} (task {task}); --data-dir "
                        f"takes a folder with the hub's layout")
    for name in names:
        try:
            path = hf_hub_download(repository, name, repo_type="dataset", revision=revision)
            return Path(path), revision
        except RemoteEntryNotFoundError:
            reason = f"it has none of {', '.join(names)}"
        except Exception as error:  # whatever the network, the hub or its client has to say
            line = str(error).partition("\n")[0][:120]
            reason = f"{type(error).__name__}: {line}"
            break
    raise UserError(f"task {task}: {repository} at {revision[:8]} cannot be fetched ({reason}); "
                    f"pass a local copy with --data-dir FOLDER")


def read_rows(path: Path, fields: dict[str, type]) -> list[dict]:
    """The rows of a .jsonl(.gz) file; UserError unless each has the fields with their types."""
    rows = []
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            row = {name: row[name] for name in fields}
            for name, kind in fields.items():
                if not isinstance(row[name], str if kind is str else int | float):
                    raise TypeError(f"{name} is {row[name]!r}")
                if kind is float and not np.isfinite(row[name]):
                    raise ValueError(f"{name} is {row[name]!r}")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: needs {', '.join(fields)} ({error!r}); fetch "
                            f"the file again or mend the line")
        rows.append(row)
    if not rows:
        raise UserError(f"{path}: no rows; fetch the file again")
    return rows


def evaluate_sts(path: Path, encode: Encode) -> dict:
    """Spearman of the pairs' cosine with the human score (MTEB's cosine_spearman)."""
    rows = read_rows(path, {"sentence1": str, "sentence2": str, "score": float})
    sides = []
    for side in ("sentence1", "sentence2"):
        embeddings = np.asarray(encode([row[side] for row in rows]), dtype=np.float32)
        if embeddings.ndim != 2 or len(embeddings) != len(rows):
            raise UserError(f"encode returned the shape {embeddings.shape} for {len(rows)} texts")
        if not np.isfinite(embeddings).all():
            raise UserError(f"{path}: an embedding of {side} is not finite; the model is damaged")
        sides.append(embeddings)
    cosines = paired_cosine(*sides)
    gold = np.array([row["score"] for row in rows])
    score = spearman(cosines, gold)
    if np.isnan(score):
        raise UserError(f"{path}: no rank correlation, all cosines or all scores are equal; is the "
                        f"model collapsed?")
    return {"main_score": score, "cosine_spearman": score, "samples": len(rows),
            "cosines": cosines, "gold": gold}


KINDS = {"sts": evaluate_sts}


def evaluate_task(task: str, encode: Encode, data_dir: str | Path | None = None) -> dict:
    """Score any `encode(list[str]) -> (n, D) array` on a task of data/tasks.json.

    Returns main_score (a fraction), the number of samples, the data's revision, and per-sample
    arrays. Raises UserError for data that are missing or damaged.
    """
    if task not in TASKS:
        raise UserError(f"--task {task}: unknown; one of {', '.join(TASKS)}")
    path, revision = task_file(task, data_dir)
    scores = KINDS[TASKS[task]["kind"]](path, encode)
    expected = TASKS[task]["samples"]
    if expected and scores["samples"] != expected:
        print(f"note: {path} has {scores['samples']} samples, the published task {expected}")
    return {"task": task, "revision": revision, **scores}


# ---------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------


def newest_encoder() -> str:
    """The encoder folder under runs/ that was written last, else the embedded Llama."""
    found = sorted(Path("runs").rglob("encoder/encoder.json"), key=lambda p: p.stat().st_mtime)
    return str(found[-1].parent) if found else "demo"


def open_model(name: str, method: str | None = None, **options) -> Encoder:
    """An encoder from an encoder folder, a run's folder, a Llama's folder or a hub repository.

    `options` go to model.load_encoder or plain_encoder. UserError if `method` contradicts what an
    encoder was trained with.
    """
    if is_encoder(Path(name) / "encoder"):
        name = str(Path(name) / "encoder")
    folder = find_model(name, options.get("revision"))
    if is_encoder(folder):
        encoder = load_encoder(name, **options)
        if method not in (None, encoder.config.pooling):
            raise UserError(f"--method {method}: {name} was trained with {encoder.config.pooling}; "
                            f"leave --method out, or name its base with --model")
        return encoder
    if method == "memory":
        raise UserError(f"--method memory: {name} is a plain Llama without memory tokens; train an "
                        f"encoder with pretrain_ctkd.py, or take {', '.join(UNTRAINED)}")
    options.pop("base", None)
    return plain_encoder(name, replace(PLAIN, pooling=method or "weighted-mean"), **options)


def settings_of(encoder: Encoder, name: str) -> dict:
    """What a score depends on besides the data, as it is written beside each score."""
    config = encoder.config
    return {
        "model": name, "base": encoder.base, "method": config.pooling,
        "num_memory_tokens": config.num_memory_tokens, "attention": config.attention,
        "max_tokens": config.max_tokens, "template": config.template,
        "history": encoder.history, "dtype": str(encoder.llama.head.dtype),
        "device": str(encoder.llama.head.device), "threads": torch.get_num_threads(),
        "versions": {p: version(p) for p in ("torch", "tokenizers", "numpy", "safetensors")},
    }


def write_result(scores: dict, settings: dict, folder: Path) -> Path:
    """Write a task's score and settings as JSON below `folder`, by model and method."""
    model = settings["model"].strip("/.").replace("/", "__")
    path = folder / model / settings["method"] / f"{scores['task']}.json"
    plain = {key: value for key, value in scores.items() if not isinstance(value, np.ndarray)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**plain, **settings}, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error}); name another --results")
    return path


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", nargs="+", choices=list(TASKS), required=True, metavar="TASK",
                        help="one or more of " + ", ".join(TASKS))
    parser.add_argument("--model", help="an encoder, a run, a Llama's folder or hub repository, or "
                        "demo; default: the newest encoder under runs/, else demo")
    parser.add_argument("--method", choices=["memory", *UNTRAINED],
                        help="default: what the encoder was trained with; for a plain Llama "
                        "weighted-mean")
    parser.add_argument("--data-dir", help="folder with the tasks' repositories, hub layout")
    parser.add_argument("--revision", help="branch, tag or commit of a hub model")
    parser.add_argument("--base", help="where an encoder's base model lies now")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"],
                        help="default: bfloat16 on cuda, float32 elsewhere")
    parser.add_argument("--batch-tokens", type=int, default=4096, help="tokens per forward pass")
    parser.add_argument("--results", default="results", help="folder for the JSON files")
    return parser.parse_args(argv)


def run(args: argparse.Namespace):
    """Evaluate the tasks of the command line, print the table, write the JSON files."""
    name = args.model or newest_encoder()
    if is_encoder(Path(name) / "encoder"):  # a run's folder
        name = str(Path(name) / "encoder")
    chosen = "" if args.model else "  (the newest encoder under runs/)"
    if name == "demo":
        chosen = "  (the embedded tiny Llama)"
    device = find_device(args.device)
    dtype = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    encoder = open_model(name, args.method, base=args.base, revision=args.revision,
                         dtype=getattr(torch, dtype), device=device)
    encode = partial(encoder.encode, batch_tokens=args.batch_tokens, progress=True)
    settings = settings_of(encoder, name)
    print(f"model   {name}{chosen}")
    print(f"method  {settings['method']}, {settings['attention']}, {dtype}\n")
    print(f"{'task':<14}{'samples':>8}{'Spearman x 100':>16}{'seconds':>9}")
    for task in args.task:
        start = time.perf_counter()
        scores = evaluate_task(task, encode, args.data_dir)
        scores["seconds"] = round(time.perf_counter() - start, 2)
        score = 100 * scores["main_score"]
        print(f"{task:<14}{scores['samples']:>8}{score:>16.2f}{scores['seconds']:>9.1f}")
        path = write_result(scores, settings, Path(args.results))
    print(f"\nwritten to {path.parent}/")


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0, or 2 after a UserError."""
    args = parse_arguments(argv)
    try:
        run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

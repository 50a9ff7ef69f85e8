"""An encoder for your own domain from start to finish, with three kinds of hard negatives.

    python bench/domain.py --rows medquad.jsonl.gz --base smollm2 --out runs/medquad

From rows {query, positive, negative} (here MedQuAD's: a question, its answer, an answer about
another aspect of the same disease) it makes, in OUT/data,

    documents.jsonl    texts without labels: answers, including those of the test
    pairs.jsonl        training rows, with their own, static negatives
    test/              a retrieval task: questions about diseases that no training row is about;
                       the corpus is all answers of training and test rows

and with them scores the base untrained, after stages 1 and 2 on the documents, and after stage 3 on
the rows, always from stage 2's encoder and for equally many steps, with three kinds of negatives:

    static       those of the rows
    mined        found among the rows' answers by the encoder trained with static negatives
    mined-twice  found there by the encoder trained with mined negatives

Every command is printed and can be run by itself. What exists already is not made again.
"""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ablations import tokens_with
from data.rows import read_rows, text
from runtime.errors import UserError, run_command
from runtime.files import read_json, write_file
from runtime.results import label_of, read_result
from runtime.settings import flag
from validation import write

KINDS = ("static", "mined", "mined-twice")
UNTRAINED = ("weighted-mean", "prompteol")

# ---------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------


def topics(rows: list[dict]) -> list[list[dict]]:
    """The rows in groups that share no text: rows linked by a text are in the same group."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    for row in rows:
        for document in (row["positive"], row["negative"]):
            parent[root(row["query"])] = root(document)
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(root(row["query"]), []).append(row)
    return list(groups.values())


def prepare(args: argparse.Namespace, data: Path):
    """Write documents, training rows and the test; UserError if there are too few rows."""
    groups = topics(read_rows(Path(args.rows), dict.fromkeys(("query", "positive", "negative"),
                                                             text)))
    order = np.random.default_rng(0).permutation(len(groups))
    test, train, rest = [], [], []
    for group in (groups[i] for i in order):
        part = test if len(test) < args.queries else train if len(train) < args.pairs else rest
        part.extend(group)
    if len(train) < args.pairs:
        raise UserError(f"--rows {args.rows}: only {len(train):,} rows of {len(groups):,} topics "
                        f"are left for training; lower --queries or --pairs")
    test, train = test[: args.queries], train[: args.pairs]

    def answers(rows: list[dict]) -> list[str]:
        return list(dict.fromkeys(row[key] for row in rows for key in ("positive", "negative")))

    corpus = {document: f"d{i}" for i, document in enumerate(answers(test + train))}
    asked = {query: f"q{i}" for i, query in enumerate(dict.fromkeys(r["query"] for r in test))}
    judged = dict.fromkeys((asked[row["query"]], corpus[row["positive"]]) for row in test)
    write(data / "test/corpus.jsonl", [{"_id": i, "text": d} for d, i in corpus.items()])
    write(data / "test/queries.jsonl", [{"_id": i, "text": q} for q, i in asked.items()])
    write(data / "test/qrels/test.jsonl",
          [{"query-id": q, "corpus-id": d, "score": 1} for q, d in judged])
    write(data / "pairs.jsonl", train)
    documents = answers(test + train + rest)[: max(args.documents, len(corpus))]
    write(data / "documents.jsonl", [{"text": document} for document in documents])


def keep_setting(path: Path, setting: dict):
    """Write the flags on which all results depend; UserError if the folder has others."""
    before = read_json(path) if path.is_file() else setting
    for name, value in setting.items():
        if before.get(name) != value:
            raise UserError(f"{flag(name)} {value}: {path.parent} was begun with "
                            f"{before.get(name)}; name another --out")
    write_file(path, json.dumps(setting) + "\n")


# ---------------------------------------------------------------------------------------------
# Commands
# ---------------------------------------------------------------------------------------------


def call(*command: object):
    """Print a command of the project and run it; UserError if it fails."""
    line = [str(part) for part in command]
    print(f"\npython {shlex.join(line)}", flush=True)
    code = subprocess.run([sys.executable, str(ROOT / line[0]), *line[1:]]).returncode
    if code:
        raise UserError(f"{line[0]} ended with {code}; the same command goes on")


def train(script: str, out: Path, *flags: object):
    """Run a stage; a run that was begun is resumed, one that is done is left alone."""
    if not (out / "encoder/encoder.json").is_file():
        resume = ["--resume"] * (out / "config.json").is_file()
        call(script, *flags, "--out", out, *resume)


def stages_1_and_2(args: argparse.Namespace, data: Path, out: Path):
    """Stage 1, and stage 2 from it, on the documents."""
    own = ["--threads", args.threads, "--text", data / "documents.jsonl"]
    train("pretrain_ctkd.py", out / "ctkd", "--preset", "smollm2", "--model", args.base, *own)
    train("contrastive.py", out / "ucl", "--preset", "demo", "--model", out / "ctkd", *own,
          "--batch-size", 2 * args.batch_size, "--steps", args.steps, "--max-tokens",
          args.max_tokens, "--micro-tokens", 4096, "--eval-tasks", "")


def stage_3(args: argparse.Namespace, data: Path, out: Path, seed: int):
    """Stage 3 with each kind of negatives, each mined by the encoder of the kind before."""
    triples = data / "pairs.jsonl"
    for kind, before in zip(KINDS, ("", *KINDS)):
        if before:
            triples = out / f"{kind}-{seed}.jsonl"
            if not triples.is_file():
                call("mine.py", "--model", out / f"{before}-{seed}", "--triples",
                     data / "pairs.jsonl", "--out", triples, "--threads", args.threads, "--dtype",
                     "bfloat16")
        train("contrastive.py", out / f"{kind}-{seed}", "--stage", "scl", "--preset", "demo",
              "--model", out / "ucl", "--triples", triples, "--threads", args.threads,
              "--batch-size", args.batch_size, "--steps", args.steps, "--lr", 1e-4,
              "--max-tokens", args.max_tokens, "--document-tokens", args.max_tokens,
              "--micro-tokens", 4096, "--eval-tasks", "", "--seed", seed)


def score(model: str | Path, args: argparse.Namespace, data: Path, method: str = "memory") -> float:
    """nDCG@10 x 100 on the test."""
    results = data.parent / "results"
    path = results / label_of(str(model), method) / "test.json"
    if not path.is_file():
        untrained = [] if method == "memory" else [
            "--method", method, "--max-tokens", tokens_with(method, str(model), args.max_tokens)]
        call("evaluate.py", "--model", model, "--task-dir", data / "test", "--kind", "retrieval",
             "--dtype", "bfloat16", "--threads", args.threads, "--results", results,
             *untrained)
    return 100 * read_result(path)["scores"]["test"][0]["main_score"]


def run(args: argparse.Namespace):
    """Make what is missing, one seed of stage 3 after another, then print the table."""
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    keep_setting(out / "setting.json", {key: value for key, value in vars(args).items()
                                        if key not in ("out", "seeds", "threads")})
    if not (out / "data/documents.jsonl").is_file():  # written last
        prepare(args, out / "data")
    data, table = out / "data", {}
    for method in UNTRAINED:
        table[f"untrained, {method}"] = [score(args.base, args, data, method)]
    stages_1_and_2(args, data, out)
    for name, stage in (("ctkd", "stage 1"), ("ucl", "stage 2")):
        table[stage] = [score(out / name, args, data)]
    for seed in args.seeds:
        stage_3(args, data, out, seed)
        for kind in KINDS:
            found = score(out / f"{kind}-{seed}", args, data)
            table.setdefault(f"stage 3, {kind}", []).append(found)
    print("\n| | nDCG@10 x 100 | of each seed |\n|---|---:|---|")
    for name, scores in table.items():
        spread = f" ± {np.std(scores, ddof=1):.1f}" if len(scores) > 1 else ""
        each = ", ".join(f"{x:.1f}" for x in scores) if len(scores) > 1 else ""
        print(f"| {name} | {np.mean(scores):.1f}{spread} | {each} |")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("--rows", required=True, help="a .jsonl(.gz) of {query, positive, negative}")
    add("--base", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="a Llama: folder or hub")
    add("--out", default="runs/domain", help="folder of data, runs and results")
    add("--queries", type=int, default=200, help="test rows")
    add("--pairs", type=int, default=640, help="training rows")
    add("--documents", type=int, default=2400, help="answers that stages 1 and 2 read")
    add("--steps", type=int, default=50, help="of stage 2 and of stage 3")
    add("--batch-size", type=int, default=8, help="rows of a step of stage 3; stage 2 has twice "
        "as many texts")
    add("--max-tokens", type=int, default=64, help="of a text from stage 2 on, and untrained")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of stage 3")
    add("--threads", type=int, default=0)
    args = parser.parse_args(argv)
    return run_command(lambda: run(args), "the same command goes on")


if __name__ == "__main__":
    sys.exit(main())

"""Two measurements of mine.py: the cost of its search, and how many mined negatives are false.

    python bench/mining.py search --documents 1000000 --queries 1000 --dim 256
    python bench/mining.py judged --model runs/scl-demo --data-dir FOLDER --task scifact --every 5
    python bench/mining.py judged --model runs/scl-demo --data-dir FOLDER --task banking77

search   random unit rows in a file: seconds of the search, and the peak of resident memory (on
         Linux only) above that after the imports
judged   rows with one known positive; what else the data call relevant is hidden, and a mined
         negative among it is false. scifact: its training queries, each with the first document
         judged relevant; the corpus is all judged documents and every --every'th other one.
         banking77: its training texts, each with the next one of its label; hidden are the
         others of the label
"""

import argparse
import json
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project root

import mine
from data.rows import label, read_rows, text
from data.tasks import TASKS, find_file, read_task
from runtime.errors import UserError, run_command


def peak() -> int:
    """The highest resident memory of this process so far, in bytes; 0 if that is not known."""
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def time_search(args: argparse.Namespace):
    """Fill a file block by block, search it, and print the time and the peak."""
    draw, before = np.random.default_rng(0), peak()
    mine.torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        shape = [args.documents, args.dim]
        embeddings = mine.Embeddings(Path(folder) / "embeddings.npy", {"shape": shape})
        for start in range(0, args.documents, mine.BLOCK):
            size = (min(mine.BLOCK, args.documents - start), args.dim)
            embeddings.append(mine.unit(draw.standard_normal(size, dtype=np.float32)), 0, [])
        queries = mine.unit(draw.standard_normal((args.queries, args.dim), dtype=np.float32))
        parts = (embeddings[start : min(start + mine.BLOCK, args.documents)]
                 for start in range(0, args.documents, mine.BLOCK))
        wall, cpu = time.perf_counter(), time.process_time()
        mine.search(queries, parts, np.full(args.queries, np.inf, np.float32),
                    np.zeros((0, 2), dtype=np.int64), args.negatives)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(f"| documents | D | file, GB | queries | s | CPU s | peak above imports, GB |\n"
          f"|---:|---:|---:|---:|---:|---:|---:|\n| {args.documents:,} | {args.dim} | "
          f"{4e-9 * args.documents * args.dim:.2f} | {args.queries:,} | {wall:.1f} | {cpu:.1f} | "
          f"{1e-9 * (peak() - before):.2f} |")


def retrieval_rows(args: argparse.Namespace):
    """Rows, corpus, and query -> its relevant documents, for SciFact's training queries."""
    task = TASKS["scifact"] | {"files": {"qrels": ["qrels/train"]}, "expected": {}}
    texts, about, _ = read_task(task, args.data_dir)
    document = dict(zip(about["document_ids"], texts["documents"]))
    relevant = {query: [document[i] for i, grade in judged.items() if grade > 0]
                for query, judged in zip(texts["queries"], about["judged"])}
    judged = {found for some in relevant.values() for found in some}
    others = [found for found in texts["documents"] if found not in judged]
    rows = [{"query": query, "positive": found[0]} for query, found in relevant.items() if found]
    return rows, [*sorted(judged), *others[:: args.every]], relevant


def labelled_rows(args: argparse.Namespace):
    """Rows, corpus, and text -> the others of its label, for Banking77's training texts."""
    path = find_file(TASKS["banking77"], "train", args.data_dir)
    groups: dict[str, list[str]] = {}
    for row in read_rows(path, {"text": text, "label": label}):
        if row["text"].strip() not in groups.setdefault(row["label"], []):
            groups[row["label"]].append(row["text"].strip())
    rows, relevant = [], {}
    for group in groups.values():
        for i, query in enumerate(group):
            rows.append({"query": query, "positive": group[(i + 1) % len(group)]})
            relevant[query] = relevant.get(query, []) + [text for text in group if text != query]
    return rows, list(relevant), relevant


ROWS = {"scifact": retrieval_rows, "banking77": labelled_rows}


def judge(args: argparse.Namespace):
    """Mine with each margin, from the same embeddings, and print how many negatives are false."""
    rows, corpus, relevant = ROWS[args.task](args)
    with tempfile.TemporaryDirectory(dir=args.scratch) as place:
        folder = Path(place)
        for name, found in (("rows", rows), ("corpus", [{"text": found} for found in corpus])):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in found))
        hidden = sum(len(set(found)) for found in relevant.values()) - len(rows)
        print(f"{args.task}, {args.model}: {len(rows):,} rows, {len(corpus):,} texts, {hidden:,} "
              f"hidden relevant ones\n| margin | rows with {args.negatives} | with none | of the "
              f"nearest removed | cosine of positives, negatives | negatives | false | share |\n"
              f"|---:|---:|---:|---:|---:|---:|---:|---:|")
        for margin in args.margins:
            out = folder / f"{margin}.jsonl"
            flags = ["--model", args.model, "--triples", folder / "rows.jsonl", "--corpus",
                     folder / "corpus.jsonl", "--embeddings", folder / "rows.npy", "--out", out,
                     "--negatives", args.negatives, "--margin", margin, "--threads", args.threads,
                     *(["--dtype", args.dtype] if args.dtype else [])]
            with redirect_stdout(sys.stderr):
                if code := mine.main([str(flag) for flag in flags]):
                    raise UserError(f"mine.py ended with {code}")
            print_row(margin, args.negatives, [json.loads(line) for line in open(out)], relevant)


def print_row(margin: float, k: int, mined: list[dict], relevant: dict[str, list[str]]):
    """Print the table's row for one margin."""
    sizes = [len(row["negative"]) for row in mined]
    false = sum(text in relevant[row["query"]] for row in mined for text in row["negative"])
    removed = sum(min(k, row["above"]) for row in mined) / (k * len(mined))
    positives = np.mean([row["cosines"][0] for row in mined])
    negatives = np.mean([cosine for row in mined for cosine in row["cosines"][1:]])
    print(f"| {margin:g} | {sizes.count(k):,} | {sizes.count(0):,} | {removed:.1%} | "
          f"{positives:.3f}, {negatives:.3f} | {sum(sizes):,} | {false:,} | "
          f"{false / sum(sizes):.2%} |", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("what", choices=["search", "judged"])
    add("--documents", type=int, default=1_000_000)
    add("--queries", type=int, default=1000)
    add("--dim", type=int, default=256)
    add("--negatives", type=int, default=4)
    add("--model", default="demo", help="as mine.py takes it")
    add("--dtype", help="as mine.py takes it")
    add("--task", choices=list(ROWS), default="scifact")
    add("--data-dir", help="folder with the tasks' repositories, hub layout")
    add("--every", type=int, default=1, help="of the documents that are not judged")
    add("--margins", type=float, nargs="+", default=[0, 0.95])
    add("--threads", type=int, default=1)
    add("--scratch", help="folder for temporary files")
    args = parser.parse_args(argv)
    return run_command(lambda: (time_search if args.what == "search" else judge)(args))


if __name__ == "__main__":
    sys.exit(main())

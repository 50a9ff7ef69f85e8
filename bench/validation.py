"""Validation tasks for choosing settings, made of data that no test score is computed from.

    python bench/validation.py --out validation                     data from the hub
    python bench/validation.py --out validation --data-dir FOLDER   or from a copy in its layout

    stsbenchmark-validation    sts             its validation pairs (1,500)
    banking77-validation       classification  its training texts: every 10th is a test text
                               (1,001), every 4th of the rest trains the classifier (2,251)
    scifact-validation         retrieval       its first 200 training queries; documents: those
                               judged for them, and every 13th of the others (about 570)

What they share with the test sets: no text of Banking77's, no query of SciFact's, but its
documents; 4 of STSBenchmark's 1,379 test pairs are among its validation pairs.

`evaluate.py --task-dir FOLDER/NAME --kind KIND` scores an encoder on one of them.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project root

from data.rows import identifier, label, number, read_rows, text
from data.tasks import TASKS, find_file
from runtime.errors import UserError, run_command

KINDS = {"stsbenchmark-validation": "sts", "banking77-validation": "classification",
         "scifact-validation": "retrieval"}
QUERIES = 200


def write(path: Path, rows: list[dict]):
    """Write a .jsonl, one row per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{path}: {len(rows):,} rows")


def make(out: Path, data_dir: str | None):
    """Write the three tasks below `out`; UserError for data that are missing or damaged."""

    def rows(task: str, role: str, optional=(), **fields) -> list[dict]:
        return read_rows(find_file(TASKS[task], role, data_dir), fields, optional)

    if out.exists():
        raise UserError(f"{out}: exists; name a new folder")
    pairs = rows("stsbenchmark", "validation", sentence1=text, sentence2=text, score=number)
    texts = rows("banking77", "train", text=text, label=label)
    documents = rows("scifact", "corpus", ("title",), _id=identifier, title=text, text=text)
    judged = rows("scifact", "qrels/train",
                  **{"query-id": identifier, "corpus-id": identifier, "score": number})
    asked = {row["query-id"]: None for row in judged}  # in the order of the judgements
    asked = set(list(asked)[:QUERIES])
    judged = [row for row in judged if row["query-id"] in asked]
    found = {row["corpus-id"] for row in judged}
    others = [row for row in documents if row["_id"] not in found]
    queries = [row for row in rows("scifact", "queries", _id=identifier, text=text)
               if row["_id"] in asked]
    sts, banking, scifact = (out / name for name in KINDS)
    write(sts / "test.jsonl", pairs)
    write(banking / "test.jsonl", texts[::10])
    write(banking / "train.jsonl", [row for i, row in enumerate(texts) if i % 10][::4])
    write(scifact / "queries.jsonl", queries)
    write(scifact / "corpus.jsonl", [r for r in documents if r["_id"] in found] + others[::13])
    write(scifact / "qrels" / "test.jsonl", judged)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--out", required=True, help="folder to write, must be new")
    parser.add_argument("--data-dir", help="the tasks' repositories, hub layout")
    args = parser.parse_args(argv)
    return run_command(lambda: make(Path(args.out), args.data_dir))


if __name__ == "__main__":
    sys.exit(main())

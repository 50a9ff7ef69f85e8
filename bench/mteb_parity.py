"""An exported folder's scores from mteb, and from evaluate.py for the encoder in it.

    python bench/mteb_parity.py exported --task sts17 scifact
    python bench/mteb_parity.py exported --task sts17 --instruction none --data-dir FOLDER

mteb has sentence-transformers read the folder, with the folder's own prompts; evaluate.py reads it
as the encoder that it was. Data are the hub's, or those of --data-dir, as evaluate.py takes them.
Main scores are fractions; a difference above 1e-4 is an error. The last column is the largest
difference between embeddings of the first 100 texts of each role, relative to the largest entry.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project root

from data.rows import number, read_rows, read_unique, text
from data.tasks import TASKS, find_file, read_judgements, read_task
from evaluate import evaluate_task, instruction_for, open_model
from runtime.errors import UserError, run_command

KINDS = ("sts", "retrieval")  # those for which mteb 2 has mteb 1.12's protocol
CLOSE = 1e-4


def take_local(task, about: dict, data_dir: str | None):
    """Give mteb's task the data that evaluate.py would read, in place of the hub's."""
    from datasets import Dataset, DatasetDict

    file = partial(find_file, about, data_dir=data_dir)
    if about["kind"] == "sts":
        fields = {"sentence1": text, "sentence2": text, "score": number}
        read = DatasetDict(test=Dataset.from_list(list(read_rows(file("test"), fields))))
        task.dataset = {about["subset"]: read} if task.metadata.is_multilingual else read
    else:
        corpus = read_unique(file("corpus"), {"title": text, "text": text}, ("title",))
        parts = {"corpus": corpus, "queries": read_unique(file("queries"), {"text": text})}
        tables = {name: Dataset.from_list([{"id": i, **row} for i, row in rows.items()])
                  for name, rows in parts.items()}
        grades = {query: {document: int(grade) for document, grade in row.items()}
                  for query, row in read_judgements(file("qrels"), []).items()}
        task.dataset = {"default": {"test": {
            **tables, "relevant_docs": grades, "top_ranked": None}}}
    task.data_loaded = True


def score_by_mteb(reader, about: dict, data_dir: str | None) -> float:
    """The main score that mteb gives a SentenceTransformer."""
    import mteb

    subset = {"hf_subsets": [about["subset"]]} if "subset" in about else {}
    task = mteb.get_task(about["name"], eval_splits=["test"], **subset)
    if data_dir:
        take_local(task, about, data_dir)
    found = mteb.evaluate(reader, task, cache=None, show_progress_bar=False)
    [scores] = found.task_results[0].scores["test"]
    return scores["main_score"]


def run(args: argparse.Namespace):
    """Score, and print a row for each task."""
    from sentence_transformers import SentenceTransformer

    for name in args.task:
        if TASKS.get(name, {}).get("kind") not in KINDS or TASKS[name]["repository"] == "demo":
            raise UserError(f"--task {name}: not one of mteb's tasks of the kinds "
                            f"{' and '.join(KINDS)}, whose protocol is that of evaluate.py")
    encoder, _ = open_model(args.folder)
    reader = SentenceTransformer(args.folder, device="cpu")
    if args.instruction == "none":
        reader.prompts.clear()
    print(f"{'task':<16}{'mteb':>10}{'evaluate.py':>13}{'difference':>12}{'embedding':>11}")
    for name in args.task:
        about, told = TASKS[name], instruction_for(name, args.instruction, encoder)
        query, document = partial(encoder.encode, instruction=told), partial(
            encoder.encode, document=True)
        worst = 0.0
        for role, texts in read_task(about, args.data_dir)[0].items():
            ours = (document if role == "documents" else query)(texts[:100])
            theirs = reader.encode_document(texts[:100]) if role == "documents" else \
                reader.encode(texts[:100], prompt=told or None)
            worst = max(worst, np.abs(theirs - ours).max() / np.abs(ours).max())
        theirs = score_by_mteb(reader, about, args.data_dir)
        ours = evaluate_task(name, query, args.data_dir, document)["main_score"]
        print(f"{about['name']:<16}{theirs:>10.6f}{ours:>13.6f}{abs(theirs - ours):>12.1e}"
              f"{worst:>11.1e}", flush=True)
        if told:
            print(f"  instruction: {told}")
        if abs(theirs - ours) > CLOSE:
            raise UserError(f"{about['name']}: mteb and evaluate.py differ by more than {CLOSE}; "
                            f"is {args.folder} as export.py has written it?")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("folder", help="a folder that export.py has written")
    parser.add_argument("--task", nargs="+", default=["sts17", "scifact"], help="of evaluate.py, "
                        "of the kinds sts and retrieval")
    parser.add_argument("--data-dir", help="folder with the tasks' repositories, hub layout")
    parser.add_argument("--instruction", choices=["auto", "none"], default="auto", help="auto: "
                        "the task's, for encoders trained with instructions")
    args = parser.parse_args(argv)
    return run_command(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())

"""Mine hard negatives for stage 3: for each query, the texts that an encoder finds most similar.

    python mine.py --model runs/scl-demo --triples demo --out mined.jsonl
    python mine.py --model runs/scl --triples rows.jsonl --corpus corpus.jsonl --negatives 4 \\
        --out mined.jsonl
    torchrun contrastive.py --stage scl --triples mined.jsonl ...         trains on what was mined

Rows {query, positive} become {query, positive, negative: [...]}, nearest first. Left out are all
positives of the query, its own text, and what may be a false negative: texts whose cosine is not
below --margin times the (first) positive's (TopK-PercPos of NV-Retriever, arXiv 2407.15831).

The same command resumes after an interruption. Embeddings are written block by block into a .npy
next to --out, with a note of the progress; rows go into a hidden file that is renamed at the end.
Memory holds all texts once, and one block of everything else.
"""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

if __name__ == "__main__":  # handle Ctrl-C while torch is imported, which takes seconds
    from runtime.errors import await_command

    await_command()

import numpy as np
import torch
from tqdm import tqdm

from data.rows import read_rows, text
from data.triples import INSTRUCTIONS, Triples, stem
from embed import BLOCK, Embeddings
from evaluate import METHODS, add_reading_flags, encoding, open_model
from measures import pack_scores, unit, unpack_scores
from model import Encoder
from runtime.cpu import keep_freed_memory
from runtime.devices import find_device, scoring_dtype, to_device
from runtime.errors import UserError, printable, run_command
from runtime.files import sha256_of_json, try_lock
from runtime.identity import identity

QUERIES = 4096  # searched together, in one pass over the corpus

# ---------------------------------------------------------------------------------------------
# Texts, and their embeddings
# ---------------------------------------------------------------------------------------------


def corpus_texts(path: str) -> Iterator[str]:
    """The documents of a file as `title text`, as in retrieval tasks; empty ones are left out."""
    if not Path(path).exists():
        raise UserError(f"--corpus {path}: no such file")
    notes: list[str] = []
    rows = read_rows(Path(path), {"title": text, "text": text}, ("title",), notes)
    for note in notes:
        print(f"note: {note}")
    return filter(None, (f"{row.get('title', '')} {row['text']}".strip() for row in rows))


class Pool:
    """The documents of a corpus and the queries of the rows, each once.

    The first `size` documents can be mined; positives that the corpus lacks come after them.
    Embeddings are numbered over all documents, then all queries.
    """

    def __init__(self, rows: Triples, corpus: str):
        """corpus: a file, or empty for all positives and negatives. UserError for a bad file."""
        place: dict[str, int] = {}
        for document in corpus_texts(corpus) if corpus else (
                document for row in rows
                for document in (row.positive, *row.others, *row.negatives)):
            place.setdefault(document, len(place))
        self.size, pairs = len(place), []
        self.taken: dict[str, set[int]] = {}  # query -> places of its positives and of its text
        queries: dict[str, dict[str, int]] = {}  # instruction -> query -> number
        for row in rows:
            own = queries.setdefault(row.instruction, {})
            positive = place.setdefault(row.positive, len(place))
            pairs.append((row.instruction, own.setdefault(row.query, len(own)), positive))
            self.taken.setdefault(row.query, {place.get(row.query, positive)}).add(positive)
            self.taken[row.query].update(place[text] for text in row.others if text in place)
        self.documents, first, self.count = list(place), {}, len(place)
        self.parts = [(self.documents, {"document": True})]  # texts, and how they are read
        for instruction, own in queries.items():
            first[instruction], self.count = self.count, self.count + len(own)
            self.parts.append((list(own), {"instruction": instruction}))
        # (rows, 2): places of each row's query and positive
        self.pairs = np.array([(first[name] + number, place) for name, number, place in pairs])

    def require(self, negatives: int):
        """UserError unless the corpus has `negatives` candidates for every query."""
        for query, taken in self.taken.items():
            left = self.size - sum(place < self.size for place in taken)
            if left < negatives:
                raise UserError(f"--negatives {negatives}: the corpus has {self.size:,} texts, "
                                f"{left:,} of them neither the query {query[:60]!r} nor one of its "
                                f"positives; lower it, or name a larger --corpus")

    def blocks(self) -> Iterator[tuple[int, list[str], dict]]:
        """The first place, the texts, and the options of `encode` of each block."""
        first = 0
        for texts, options in self.parts:
            for start in range(0, len(texts), BLOCK):
                yield first + start, texts[start : start + BLOCK], options
            first += len(texts)

    def sha256(self) -> str:
        """sha256 of all texts, how they are read, and where blocks begin."""
        digest = hashlib.sha256()
        for _, texts, options in self.blocks():
            digest.update(json.dumps([options, texts]).encode())
        return digest.hexdigest()


def encode_pool(pool: Pool, encoder: Encoder, encode: Callable, embeddings: Embeddings, **options):
    """Embed the blocks that are not done yet; `options` are those of Encoder.encode."""
    done = embeddings.state["done"]
    with tqdm(total=pool.count, initial=done, desc="encode", disable=None) as bar:
        for start, texts, how in pool.blocks():
            if start >= done:
                before = encoder.cut
                x = unit(encode(texts, **how, **options))
                embeddings.append(x, encoder.cut - before, texts)
                bar.update(len(texts))


# ---------------------------------------------------------------------------------------------
# Search
# ---------------------------------------------------------------------------------------------


def search(queries: np.ndarray, corpus: Iterable[np.ndarray], limits: np.ndarray,
           taken: np.ndarray, k: int, device="cpu") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The k nearest texts below each query's limit: places and cosines (Q, k), best first.

    queries (Q, D) and the parts of the corpus, together (n, D), have unit rows; limits (Q,)
    float32; taken (m, 2): a query and a place that it must not find. Where fewer than k are left,
    cosines are -inf. The third array (Q,) counts the texts, except the taken ones, that are not
    below the limit. Cosines are summed in float64 and rounded to float32; ties rank by place, so
    that parts of any size give the same.
    """
    q = to_device(torch.from_numpy(queries), device).double()
    limits, taken = (to_device(torch.from_numpy(x), device) for x in (limits, taken))
    top = torch.empty(len(q), 0, dtype=torch.int64, device=device)
    above, start = torch.zeros(len(q), dtype=torch.int64, device=device), 0
    for part in corpus:
        scores = (q @ to_device(torch.from_numpy(part), device).double().T).float()
        here = taken[(taken[:, 1] >= start) & (taken[:, 1] < start + len(part))]
        scores[here[:, 0], here[:, 1] - start] = -torch.inf
        high = scores >= limits[:, None]
        above += high.sum(dim=1)
        packed = pack_scores(scores.masked_fill_(high, -torch.inf), start)
        top = torch.cat((top, packed.topk(min(k, len(part))).values), dim=1)
        top = top.topk(min(k, top.shape[1])).values
        start += len(part)
    places, scores = unpack_scores(top)
    return places.cpu().numpy(), scores.cpu().numpy(), above.cpu().numpy()


def mine_block(pool: Pool, rows: list, pairs: np.ndarray, embeddings: Embeddings, k: int,
               margin: float, device) -> Iterator[dict]:
    """The rows with their negatives; pairs (len(rows), 2) are places of queries and positives.

    cosines: the positive's, then the negatives'; above: how many texts the margin excludes.
    """
    queries, positives = embeddings[pairs[:, 0]], embeddings[pairs[:, 1]]
    own = np.einsum("qd,qd->q", queries, positives, dtype=np.float64).astype(np.float32)
    limits = np.float32(margin) * own if margin else np.full_like(own, np.inf)
    taken = np.array([(i, place) for i, row in enumerate(rows) for place in pool.taken[row.query]])
    corpus = (embeddings[start : min(start + BLOCK, pool.size)]
              for start in range(0, pool.size, BLOCK))
    found = search(queries, corpus, limits, taken, k, device)
    for row, positive, places, cosines, above in zip(rows, own, *found):
        there = np.isfinite(cosines)
        yield {**({} if row.own is None else {"instruction": row.own}), "query": row.query,
               "positive": [row.positive, *row.others] if row.others else row.positive,
               "negative": [pool.documents[place] for place in places[there]],
               "cosines": [round(float(c), 5) for c in (positive, *cosines[there])],
               "above": int(above)}


def mine_rows(pool: Pool, rows: Triples, embeddings: Embeddings, path: Path, *options):
    """Append the rows to `path`, after those already there; options: those of mine_block."""
    with open(path, "ab+") as file, tqdm(total=len(rows), desc="search", disable=None) as bar:
        if not try_lock(file.fileno(), path):
            raise UserError(f"{path}: another process writes it; wait for that one, or name "
                            f"another --out")
        file.seek(0)
        whole = [len(line) for line in file if line.endswith(b"\n")]  # a kill may have cut a line
        file.truncate(sum(whole))
        bar.update(len(whole))
        for start in range(len(whole), len(rows), QUERIES):
            places = range(start, min(start + QUERIES, len(rows)))
            pairs = pool.pairs[places.start : places.stop]
            for row in mine_block(pool, [rows[i] for i in places], pairs, embeddings, *options):
                file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())
            bar.update(len(places))


def report(path: Path, k: int, margin: float):
    """Print what was mined; UserError if nothing was."""
    total, full, none, removed, sums = 0, 0, 0, 0, np.zeros(3)
    with open(path, encoding="utf-8") as file:
        for row in map(json.loads, file):
            n, (positive, *cosines) = len(row["negative"]), row["cosines"]
            total, full, none = total + 1, full + (n == k), none + (n == 0)
            removed += min(k, row["above"])  # of the k nearest, those above come first
            sums += positive, sum(cosines), n
    if none == total:
        path.unlink()
        raise UserError(f"--margin {margin:g}: no text of the corpus is below it for any row; "
                        f"raise it (0 = off), or mine with an encoder that tells texts apart")
    print(f"mined  {full:,} of {total:,} rows have {k} negatives, {none:,} have none\n"
          f"cosine {sums[0] / total:.3f} to the positives, {sums[1] / sums[2]:.3f} to the "
          f"negatives\nmargin {margin:g}, removed {removed / (k * total):.1%} of the {k} nearest")


# ---------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="an encoder, a run, a Llama's folder or hub repository, or "
        "demo")
    add("--triples", required=True, help="one .jsonl(.gz) of {query, positive, negative}, or demo")
    add("--corpus", default="", help="where negatives are looked for, rows {text, title (optional)}"
        " (default: the positives and negatives of the rows)")
    add("--out", required=True, help="the .jsonl to write; must not exist")
    add("--negatives", type=int, default=1, help="of each row, at most")
    add("--margin", type=float, default=0.95, help="a negative's cosine is below this times the "
        "positive's; 0 = off")
    add("--instruction", default="auto", help="for the queries: auto (stage 3's for a file named "
        "like E5's, if the encoder was trained with some), none, or a text for files not named "
        "like E5's")
    add("--embeddings", help="the .npy of the embeddings (default: beside --out); it stays, for "
        "another --margin or --negatives")
    add("--method", choices=list(METHODS), help="how a plain Llama is read (default weighted-mean)")
    add("--max-tokens", type=int, help="of a text, for a plain Llama (default 512)")
    add("--revision", help="branch, tag or commit of a hub model")
    add_reading_flags(add)
    return parser.parse_args(argv)


def open_rows(args: argparse.Namespace, encoder: Encoder) -> Triples:
    """The rows, queries with stage 3's instructions; UserError if --out would lose them."""
    known = "{instruction}" in encoder.config.template
    wanted = {"none": None, "auto": "" if known else None}
    rows = Triples(args.triples, wanted.get(args.instruction, args.instruction), progress=True)
    if len(rows.files) > 1:
        raise UserError(f"--triples {args.triples}: has {len(rows.files)} files; mine them one by "
                        f"one, under their own names")
    name, out = stem(rows.files[0].path), stem(Path(args.out))
    if args.instruction != "none" and INSTRUCTIONS.get(name) != INSTRUCTIONS.get(out):
        raise UserError(f"--out {args.out}: stage 3 gives queries other instructions in a file of "
                        f"this name than in {name}.jsonl; name it FOLDER/{name}.jsonl, or mine and "
                        f"train with --instruction none")
    return rows


def check(args: argparse.Namespace):
    """Raise UserError for invalid arguments."""
    if args.negatives < 1 or args.batch_tokens < 1 or args.threads < 0:
        raise UserError("--negatives and --batch-tokens must be at least 1, --threads 0")
    if not 0 <= args.margin <= 1.5:
        raise UserError(f"--margin {args.margin:g}: must be from 0 (off) to 1.5")
    if Path(args.out).exists() or Path(args.out).suffix != ".jsonl":
        raise UserError(f"--out {args.out}: must be a new file that ends in .jsonl")


def run(args: argparse.Namespace):
    """Encode, search, write; each resumes where an interrupted command left off."""
    check(args)
    keep_freed_memory()
    torch.set_num_threads(args.threads or torch.get_num_threads())
    device, out = find_device(args.device), Path(args.out)
    encoder, method = open_model(args.model, args.method, args.max_tokens, args.special_tokens,
                                 base=args.base, other_base=args.other_base,
                                 revision=args.revision, device=device,
                                 dtype=scoring_dtype(args.dtype, device))
    rows = open_rows(args, encoder)
    pool = Pool(rows, args.corpus)
    pool.require(args.negatives)
    print(f"model  {printable(args.model)}, {method}\ncorpus {pool.size:,} texts; it lacks "
          f"{sum(pool.pairs[:, 1] >= pool.size):,} rows' positives\nrows   {len(rows):,}, "
          f"{pool.count - len(pool.documents):,} queries; instruction: "
          f"{printable(' | '.join(sorted(rows.instructions))) or 'none'}", flush=True)
    for note in rows.notes:
        print(f"note: {printable(note)}", flush=True)
    about = {"encoder": sha256_of_json([identity(encoder), method, str(encoder.dtype)]),
             "corpus": pool.sha256(), "shape": [pool.count, encoder.table.shape[1]]}
    out.parent.mkdir(parents=True, exist_ok=True)
    embeddings = Embeddings(Path(args.embeddings or out.with_suffix(".npy")), about,
                            other="other --embeddings")
    encode_pool(pool, encoder, encoding(encoder, method), embeddings,
                batch_tokens=args.batch_tokens)
    settings = sha256_of_json([about, rows.sha256, pool.size, args.negatives, args.margin])
    unfinished = out.with_name(f".{out.name}.{settings[:12]}")
    mine_rows(pool, rows, embeddings, unfinished, args.negatives, args.margin, device)
    report(unfinished, args.negatives, args.margin)
    if cut := embeddings.state["cut"]:
        print(f"note   texts cut to {encoder.config.max_tokens} tokens: {cut:,}")
    os.replace(unfinished, out)
    print(f"wrote  {out}; {embeddings.path} may be removed, or kept for another --margin")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_command(lambda: run(parse_arguments(argv)), "the same command goes on where it was")


if __name__ == "__main__":
    sys.exit(main())

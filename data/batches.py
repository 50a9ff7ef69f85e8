"""What a step reads: split texts (stage 1), sentences (ucl) or triples (scl), as global batches.

Order, splits and negatives are functions of (seed, step): the same on any number of ranks. Which
texts of a file are read depends on text_seed alone: the same for all seeds.
"""

import random
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.corpora import digest_ids, every_text
from data.tokenizer import Tokenizer, Tokens
from data.triples import Triple, Triples
from runtime.errors import UserError
from runtime.schedule import NEGATIVES, SPLIT, generator, global_batch, one_source_batch

MIN_SIDE = 10  # minimum tokens of a context (BOS counted) and of a continuation

# tokenize(texts, instruction="", document=False, max_tokens=None)
Tokenize = Callable[..., Tokens]


# ---------------------------------------------------------------------------------------------
# Stage 1
# ---------------------------------------------------------------------------------------------


class SplitBatch(NamedTuple):
    """The texts of a step as token ids with BOS: all of them, or those of a micro-batch.

    splits: each text's a, the number of its context tokens, BOS counted; rows: places in the data;
    positions: places in the run, which determine what is drawn at random for a text.
    The totals are those of the global batch: sums of losses are divided by them, so that
    micro-batches add up.
    """

    texts: list[np.ndarray]
    splits: list[int]
    rows: list[int]
    positions: list[int]
    total_texts: int
    total_tokens: int  # of the texts, with BOS
    total_targets: int  # of the continuations
    of: "SplitBatch | None" = None  # the batch that this is a part of

    def part(self, places: range) -> "SplitBatch":
        """The texts at these places."""
        lists = ("texts", "splits", "rows", "positions")
        part = {key: [getattr(self, key)[j] for j in places] for key in lists}
        return self._replace(**part, of=self.whole)

    @property
    def whole(self) -> "SplitBatch":
        """The global batch."""
        return self.of or self

    @property
    def contexts(self) -> list[np.ndarray]:
        """n_1..n_a of each text; n_1 is BOS."""
        return [ids[:a] for ids, a in zip(self.texts, self.splits)]

    @property
    def continuations(self) -> list[np.ndarray]:
        """n_{a+1}..n_{a+S} of each text."""
        return [ids[a:] for ids, a in zip(self.texts, self.splits)]


def split_point(seed: int, position: int, length: int) -> int:
    """Where the text at `position` in the run is cut: uniform in [10, length - 10], BOS counted."""
    return int(generator(seed, SPLIT, position).integers(MIN_SIDE, length - MIN_SIDE + 1))


class SplitTexts:
    """Stage 1: texts that a step cuts into a context and its continuation."""

    def __init__(self, source: str, texts: list[np.ndarray], places: list[int] | None = None,
                 max_tokens: int | None = None, dropped: str = "none dropped"):
        """texts: ids with BOS, cut here to max_tokens; places: their indices in the source."""
        self.source, self.dropped = source, dropped
        self.places = range(len(texts)) if places is None else places
        self.cut = sum(len(ids) > (max_tokens or len(ids)) for ids in texts)
        self.texts = [ids[:max_tokens] for ids in texts]
        self.sizes, self.sha256 = {f"{source} ({dropped})": len(texts)}, digest_ids(self.texts)

    @classmethod
    def read(cls, source: str, tokenizer: Tokenizer, num_texts: int = 0, min_characters: int = -1,
             max_text_tokens: int = -1, max_tokens: int = 512, text_seed: int = 42) -> "SplitTexts":
        """Shuffle by text_seed, filter, and take the first num_texts (0: all), cut to max_tokens.

        -1 means the paper's filter for wikitext103 (at least 1,000 characters, under 512 tokens)
        and no filter for other sources; as text_seed, the file's own order.
        """
        paper = source == "wikitext103"
        min_characters = min_characters if min_characters >= 0 else 1000 * paper
        max_text_tokens = max_text_tokens if max_text_tokens >= 0 else 512 * paper
        rows = every_text(source)
        order = np.arange(len(rows))
        if text_seed >= 0:  # as the library `datasets` shuffles, with empty rows (official code)
            order = np.random.default_rng(text_seed).permutation(len(rows))
        there = [int(i) for i in order if rows[i]]
        long = [i for i in there if len(rows[i]) >= min_characters]
        kept, places, shorter, longer, wanted = [], [], 0, 0, num_texts or len(long)
        for start in range(0, len(long), 4096):
            part = long[start : start + 4096]
            for place, ids in zip(part, tokenizer.encode([rows[i] for i in part])):
                if len(ids) < 2 * MIN_SIDE:  # cannot be split
                    shorter += 1
                elif max_text_tokens and len(ids) >= max_text_tokens:
                    longer += 1
                else:
                    kept.append(ids)
                    places.append(place)
            if len(kept) >= wanted:
                break
        dropped = {f"under {min_characters} characters": len(there) - len(long),
                   f"under {2 * MIN_SIDE} tokens": shorter,
                   f"{max_text_tokens} tokens or more": longer}
        counts = ", ".join(f"{n} {why}" for why, n in dropped.items() if n) or "none dropped"
        if not kept:
            raise UserError(f"{source}: no text left of {len(there)} after the filters ({counts}); "
                            f"change --min-characters or --max-text-tokens")
        return cls(source, kept[:wanted], places[:wanted], max_tokens, counts)

    def read_batch(self, seed: int, step: int, batch_size: int) -> SplitBatch:
        """The global batch of a step, each text with its split point."""
        rows = global_batch(seed, step, batch_size, len(self.texts))
        texts = [self.texts[i] for i in rows]
        positions = [step * batch_size + j for j in range(batch_size)]
        splits = [split_point(seed, i, len(ids)) for i, ids in zip(positions, texts)]
        tokens = sum(map(len, texts))
        return SplitBatch(texts, splits, rows, positions, len(texts), tokens, tokens - sum(splits))

    def name(self, row: int) -> str:
        """A row's place for messages: its number in the source, from 1, empty lines counted."""
        return f"{self.source}, text {self.places[row] + 1}"

    def __str__(self) -> str:
        return describe(self.source, self.texts, self.cut)


def describe(source: str, texts: list[np.ndarray], cut: int) -> str:
    """A line about the texts for the header of a run."""
    tokens = sum(map(len, texts)) / len(texts)
    shortened = f", {cut:,} of them cut" if cut else ""
    return f"{source}: {len(texts):,} texts, {tokens:.0f} tokens each{shortened}"


# ---------------------------------------------------------------------------------------------
# Stages 2 and 3
# ---------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """A global batch as token ids with BOS: B queries, M keys (the B positives first).

    excluded (B, M) marks the keys that are not used as negatives; `rows` are the queries' places in
    the data, `key_rows` those of the keys; `cut` counts the texts that were too long.
    """

    queries: list[np.ndarray]
    keys: list[np.ndarray]
    excluded: Tensor
    rows: list[int]
    key_rows: list[int]
    cut: int

    @property
    def real_tokens(self) -> int:
        """Tokens of all texts with BOS, without memory tokens."""
        return sum(map(len, self.queries + self.keys))


def same_texts(keys: list[np.ndarray], queries: int) -> Tensor:
    """(queries, M): whether key j != i has the same text as row i's positive: a false negative."""
    names: dict[bytes, int] = {}
    text = torch.tensor([names.setdefault(ids.tobytes(), len(names)) for ids in keys])
    return (text[:queries, None] == text).fill_diagonal_(False)


def other_positives(texts: list[str], triples: list[Triple]) -> Tensor:
    """(B, M): whether the text of key j != i is one of the positives of row i."""
    places: dict[str, list[int]] = {}
    for j, text in enumerate(texts):
        places.setdefault(text, []).append(j)
    found = torch.zeros(len(triples), len(texts), dtype=torch.bool)
    for i, triple in enumerate(triples):
        for text in (triple.positive, *triple.others):
            found[i, places.get(text, [])] = True
    return found.fill_diagonal_(False)


def every_sentence(source: str) -> list[str]:
    """The texts of a source; for the bundled passages, their sentences."""
    rows = every_text(source)
    if source == "demo":
        rows = [s for text in rows for s in re.split(r"(?<=[.?!])\s+", text)]
    return rows


class Sentences:
    """Stage 2: each text is both query and positive, read twice with different dropout."""

    instructions: tuple = ()

    def __init__(self, source: str, num_texts: int, tokenize: Tokenize, text_seed: int = 42):
        """Shuffle the texts by text_seed, and tokenise the first num_texts (0: all)."""
        rows = every_sentence(source)
        order = list(range(len(rows)))
        if text_seed >= 0:  # Python's shuffle here, not that of `datasets` (official code)
            random.Random(text_seed).shuffle(order)
        self.source, self.places = source, [i for i in order if rows[i]][: num_texts or None]
        self.texts, _, self.cut = tokenize([rows[i] for i in self.places])
        if len({ids.tobytes() for ids in self.texts}) < 2:
            raise UserError(f"{source}: all {len(self.texts):,} texts are the same (after "
                            f"{len(self.texts[0])} tokens), nothing tells them apart; give "
                            f"different ones")
        self.sizes, self.sha256 = {source: len(self.texts)}, digest_ids(self.texts)

    def read_batch(self, seed: int, step: int, batch_size: int) -> Batch:
        """The global batch of a step: B queries, and the same texts as B keys."""
        rows = global_batch(seed, step, batch_size, len(self.texts))
        queries = keys = [self.texts[i] for i in rows]
        cut = sum(self.cut[i] for i in rows)
        return Batch(queries, keys, same_texts(keys, len(rows)), rows, rows, cut)

    def name(self, row: int) -> str:
        """A row's place for messages: its number in the source, from 1, empty lines counted."""
        return f"{self.source}, text {self.places[row] + 1}"

    def __str__(self) -> str:
        return describe(self.source, self.texts, sum(self.cut))


class TripleRows:
    """Stage 3: queries with their instructions, positives and hard negatives as bare documents.

    If a row has several positives, one is drawn in each step, and none is used as its negative.
    """

    def __init__(self, triples: Triples, tokenize: Tokenize, document_tokens: int, negatives: int,
                 one_file: bool):
        """negatives: at most this many per row, drawn if more; one_file: no batch mixes files.

        UserError for an instruction that the encoder has no room for.
        """
        self.triples, self.tokenize, self.document_tokens = triples, tokenize, document_tokens
        self.negatives, self.one_file = negatives, one_file
        self.instructions, self.sha256 = triples.instructions, triples.sha256
        self.sizes = {str(triples.source): len(triples)}
        if one_file:
            self.sizes = {str(file.path): len(file.offsets) for file in triples.files}
        try:
            for text in ["", *self.instructions]:
                tokenize(["a"], text)
            tokenize(["a"], document=True, max_tokens=document_tokens)
        except UserError as error:  # no place in the template, or no room in max_tokens
            raise UserError(f"{error} (flags: --instruction none; for more room --max-tokens, "
                            f"--document-tokens)")

    def read_batch(self, seed: int, step: int, batch_size: int) -> Batch:
        """The global batch of a step: B queries, then the B positives and the hard negatives."""
        rows = one_source_batch(seed, step, batch_size, list(self.sizes.values()))
        triples, cut = [self.triples[i] for i in rows], 0
        queries: list = [None] * len(rows)
        for instruction in dict.fromkeys(triple.instruction for triple in triples):
            places = [j for j, triple in enumerate(triples) if triple.instruction == instruction]
            read = self.tokenize([triples[j].query for j in places], instruction)
            cut += sum(read.cut)
            for j, query in zip(places, read.ids):
                queries[j] = query
        positives, texts, key_rows = [], [], list(rows)
        for j, triple in enumerate(triples):
            draw = generator(seed, NEGATIVES, step * len(rows) + j)
            order = draw.permutation(len(triple.negatives))
            texts += [triple.negatives[n] for n in order[: self.negatives]]
            key_rows += [rows[j]] * len(order[: self.negatives])
            all_of_row = [triple.positive, *triple.others]
            positives.append(all_of_row[draw.integers(len(all_of_row))])
        texts = positives + texts
        keys, _, too_long = self.tokenize(texts, document=True, max_tokens=self.document_tokens)
        excluded = same_texts(keys, len(rows)) | other_positives(texts, triples)
        return Batch(queries, keys, excluded, rows, key_rows, cut + sum(too_long))

    def name(self, row: int) -> str:
        """A row's place for messages: its file, and the row in it from 1."""
        file, place = self.triples.locate(row)
        return f"{file.path.name}, row {place + 1}"

    def __str__(self) -> str:
        return self.triples.describe("single-dataset" if self.one_file else "mixed")


def open_triples(source: str, instruction: str, progress: bool = False) -> Triples:
    """The rows of --triples with --instruction; with `none`, no query gets one."""
    if instruction == "auto":
        raise UserError("--instruction auto: is for mine.py and evaluate.py; here a file's own "
                        "instruction is read without the flag")
    return Triples(source, None if instruction == "none" else instruction, progress)


def preview(config) -> str:
    """How the data of a contrastive stage are read, without a model: a header, and the first five
    rows of the source, before it is shuffled."""
    if config.stage == "scl":
        rows = open_triples(config.triples, config.instruction, progress=True)
        return f"data   {rows.describe(config.batches)}\n{rows.examples()}"
    texts = [text for text in every_sentence(config.text) if text]
    first = [f"  {text[:90]!r}{'...' * (len(text) > 90)}" for text in texts[:5]]
    return "\n".join([f"data   {config.text}: {len(texts):,} texts", *first])


def token_batches(lengths: list[int], budget: int) -> list[list[int]]:
    """Indices of texts, longest first, in batches whose lengths sum to at most `budget`.

    A longer text is a batch of its own.
    """
    batches, room = [], 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if lengths[i] > room:
            batches.append([])
            room = budget
        batches[-1].append(i)
        room -= lengths[i]
    return batches


def require_rows(sizes: dict[str, int], batch_size: int):
    """UserError for a source that has fewer rows than a batch; sizes: rows by source."""
    for name, size in sizes.items():
        if size < batch_size:
            raise UserError(f"--batch-size {batch_size} is larger than the {size:,} rows of "
                            f"{name}; lower it or give more")

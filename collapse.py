"""How far embeddings and memory tokens collapse: the analysis in section 4 of the paper.

    python collapse.py --model runs/ctkd runs/nll --task sts17      table, JSON
    python collapse.py --model runs/nll --text texts.jsonl.gz --save runs/nll-merged

spectrum          singular values of the covariance of the embeddings (Figures 4 and 9)
dimension         of a spectrum s with shares p = s / sum s, in three senses: exp of the entropy of
                  p; participation ratio 1 / sum p^2; how many s are above 1 % of the first; and the
                  rank, how many are above 1e-10 of the first
correlation       of the K memory tokens: mean over the texts of m~_i . m~_j, and of their cosine
                  (Eq. 7; Figures 5 and 6)
effective tokens  clusters of the tokens by complete linkage: two merge while every pair between
                  them has a mean cosine of at least --merge (section 4.2). --save writes an
                  encoder whose embedding is the mean of one token per cluster, drawn by --seed
wide tokens       those whose own states have a participation ratio of at least 3/4 of the
                  largest (ours); --save with --keep wide writes an encoder that averages them
alignment         mean squared distance of positive pairs on the unit sphere, here the pairs of an
                  STS task with at least 4/5 of the highest score (Wang & Isola 2020); none if the
                  texts are a sample
uniformity        log of the mean over pairs of exp(-2 squared distance), of up to 4,096 texts

Tokens are clustered by the correlation over all texts and drawn once. If they were drawn per text,
two texts would be represented by different tokens, and their cosine would lose what they share.
Wide tokens matter after a long stage 1: the content of a text has then moved into few tokens, and
the others hold little but the next words (docs/measured.md has both).
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":  # handle Ctrl-C while torch is imported, which takes seconds
    from runtime.errors import await_command

    await_command()

import numpy as np
import torch

from data.corpora import read_texts
from data.tasks import read_task
from evaluate import METHODS, add_reading_flags, encoding, find_task, instruction_for, open_model
from measures import effective_dimension, unit
from model import Encoder, save_encoder
from runtime.cpu import keep_freed_memory
from runtime.devices import at_least_fp32, find_device, scoring_dtype
from runtime.encoders import require_no_base
from runtime.errors import UserError, printable, run_command
from runtime.files import write_file
from runtime.formats import encoder_of, is_encoder
from runtime.hub import find_model
from runtime.results import GROUPS

PAIRS_OF = 4096  # texts whose pairs give the uniformity
STATES_OF = 1024  # keep the memory states of about this many texts, for wide_tokens

# ---------------------------------------------------------------------------------------------
# Measures: arrays in, numbers out, all in float64
# ---------------------------------------------------------------------------------------------


def covariance(x: np.ndarray, block: int = 4096) -> np.ndarray:
    """Covariance (D, D) of the rows of x (n, D), divided by n; summed by blocks of rows."""
    mean, total = x.mean(axis=0, dtype=np.float64), np.zeros((x.shape[1],) * 2)
    for start in range(0, len(x), block):
        centred = x[start : start + block] - mean
        total += centred.T @ centred
    return total / len(x)


def spectrum(x: np.ndarray) -> np.ndarray:
    """Singular values (D,) of the covariance of x (n, D), largest first."""
    return np.linalg.eigvalsh(covariance(x))[::-1].clip(0)  # positive semidefinite: singular values


def dimensions(values: np.ndarray) -> dict[str, float]:
    """The effective dimension of a spectrum (D,), largest first, in three senses, and the rank.

    All are 0 for a spectrum of zeros, which is that of a single point.
    """
    if values[0] <= 0:
        return {"entropy": 0.0, "participation": 0.0, "above_1_percent": 0, "rank": 0}
    p = values / values.sum()
    entropy = -(p[p > 0] * np.log(p[p > 0])).sum()
    return {"entropy": float(np.exp(entropy)), "participation": float(1 / np.square(p).sum()),
            "above_1_percent": int((values > 0.01 * values[0]).sum()),
            "rank": int((values > 1e-10 * values[0]).sum())}


def correlation(memory: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eq. 7 before the division by N: sums over the texts of the products and of the cosines of
    memory states (n, K, D): two (K, K) arrays."""
    memory = memory.astype(np.float64)
    norm = np.linalg.norm(memory, axis=-1, keepdims=True)
    direction = memory / np.where(norm > 0, norm, 1)
    return tuple((m @ m.transpose(0, 2, 1)).sum(axis=0) for m in (memory, direction))


def complete_linkage(cosine: np.ndarray, threshold: float) -> list[list[int]]:
    """Clusters of tokens by their cosines (K, K): the two clusters whose least similar pair is most
    similar are merged, repeatedly, as long as that pair's cosine is at least `threshold`."""
    clusters = [[i] for i in range(len(cosine))]
    while len(clusters) > 1:
        least = {(a, b): cosine[np.ix_(clusters[a], clusters[b])].min()
                 for b in range(len(clusters)) for a in range(b)}
        a, b = max(least, key=least.get)
        if least[a, b] < threshold:
            break
        clusters[a] += clusters.pop(b)
    return [sorted(cluster) for cluster in clusters]


def draw_tokens(clusters: list[list[int]], seed: int) -> list[int]:
    """One random token of each cluster, in order."""
    random = np.random.default_rng(seed)
    return sorted(int(random.choice(cluster)) for cluster in clusters)


def wide_tokens(states: np.ndarray) -> tuple[list[float], list[int]]:
    """The participation ratio of each token's states (n, K, D), and the tokens with at least 3/4 of
    the largest: all of them if no token's state differs between texts."""
    ratios = [effective_dimension(torch.from_numpy(states[:, k])) for k in range(states.shape[1])]
    return ratios, [k for k, ratio in enumerate(ratios) if ratio >= 0.75 * max(ratios)]


def alignment(left: np.ndarray, right: np.ndarray) -> float:
    """Mean squared distance of pairs (n, D), (n, D) of equal meaning, on the unit sphere."""
    left, right = unit(left.astype(np.float64)), unit(right.astype(np.float64))
    return float(np.square(left - right).sum(axis=1).mean())


def uniformity(x: np.ndarray, block: int = 512) -> float:
    """log of the mean of exp(-2 squared distance) over the pairs of rows of x (n, D), n > 1."""
    x, total, n = unit(x.astype(np.float64)), 0.0, len(x)
    for start in range(0, n, block):
        squared = 2 - 2 * x[start : start + block] @ x.T
        kernel = np.exp(-2 * squared.clip(0))
        total += kernel.sum() - np.trace(kernel, offset=start)  # a row and itself are not a pair
    return float(np.log(total / (n * (n - 1))))


# ---------------------------------------------------------------------------------------------
# From texts to measures
# ---------------------------------------------------------------------------------------------


@torch.no_grad()
def read_states(encoder: Encoder, method: str, texts: list[str], **options):
    """Embeddings (n, D) float32; the sums of Eq. 7 over texts; some texts' memory states (m, K, D).

    The last two are 0 and None without memory tokens. `options` are those of Encoder.encode.
    """
    if not encoder.config.num_memory_tokens:
        return encoding(encoder, method)(texts, **options), 0.0, None
    width, every = encoder.table.shape[1], max(1, -(-len(texts) // STATES_OF))
    x, sums = np.empty((len(texts), width), dtype=np.float32), 0.0
    states = np.empty((-(-len(texts) // every), encoder.config.num_memory_tokens, width),
                      dtype=np.float32)
    for batch, row, lengths, _ in encoder.batches(texts, **options):
        memory = encoder.memory(row, lengths)
        x[batch] = encoder.pool(memory).float().cpu().numpy()
        memory = at_least_fp32(memory).cpu().numpy()
        sums += np.stack(correlation(memory))
        chosen = [i for i, place in enumerate(batch) if place % every == 0]
        states[[batch[i] // every for i in chosen]] = memory[chosen]
    return x, sums, states


def read_source(args) -> tuple[list[str], list[str], np.ndarray | None]:
    """Up to --texts distinct texts: those that are no task's documents, those that are; pairs.

    The positive pairs (n, 2) index the texts; None without an STS task, and if texts were drawn.
    """
    if args.text:
        texts, documents, pairs = read_texts(args.text), [], None
    else:
        if args.task in GROUPS or args.task == "all":
            raise UserError(f"--task {args.task}: is a group of tasks; name one, see evaluate.py "
                            f"--list")
        task = find_task(args.task)
        roles, labels, notes = read_task(task, args.data_dir)
        for note in notes:
            print(f"note: {printable(note)}")
        documents = roles.pop("documents", [])
        texts, pairs = [text for role in roles.values() for text in role], None
    texts = list(dict.fromkeys(texts))
    documents = list(dict.fromkeys([*texts, *documents]))[len(texts) :]
    if args.task and task["kind"] == "sts":
        place, gold = {text: i for i, text in enumerate(texts)}, np.asarray(labels["gold"])
        same = np.flatnonzero(gold >= 0.8 * gold.max())
        pairs = np.array([[place[roles[side][i]] for side in ("left", "right")] for i in same])
    n, of = len(texts), texts + documents
    if len(of) < 2:
        raise UserError(f"{args.text or args.task}: {len(of)} distinct text; a covariance needs "
                        f"two")
    if len(of) > args.texts:
        chosen = np.sort(np.random.default_rng(args.seed).permutation(len(of))[: args.texts])
        texts, documents = ([of[i] for i in chosen if i < n], [of[i] for i in chosen if i >= n])
        pairs = None
    return texts, documents, pairs


def open_named(name: str, args) -> tuple[Encoder, str]:
    """A model and how it is read; --method, --max-tokens and --special-tokens apply to untrained
    models, --base and --other-base to the others."""
    device = find_device(args.device)
    options = {"device": device, "dtype": scoring_dtype(args.dtype, device)}
    if is_encoder(find_model(encoder_of(name))):
        return open_model(name, base=args.base, other_base=args.other_base, **options)
    return open_model(name, args.method, args.max_tokens, args.special_tokens, **options)


def keep_tokens(encoder: Encoder, kept: list[int]):
    """Make the mean of these memory tokens, in ascending order, the embedding.

    Under causal attention, none of them sees the tokens after the last one, which are dropped.
    """
    k = kept[-1] + 1 if encoder.config.attention == "causal" else encoder.config.num_memory_tokens
    encoder.memory_tokens = torch.nn.Parameter(encoder.memory_tokens[:k])
    encoder.config = replace(encoder.config, num_memory_tokens=k,
                             kept_tokens=tuple(kept) if len(kept) < k else ())


def analyse(name: str, source: tuple, args) -> tuple[dict, Encoder]:
    """All measures of one model, and the model."""
    encoder, method = open_named(name, args)
    if args.save and not encoder.config.num_memory_tokens:
        raise UserError(f"--save: {name} has no memory tokens to merge")
    if args.save and encoder.config.kept_tokens:
        raise UserError(f"--save: {name} is read by some of its memory tokens already; name the "
                        f"encoder that it was made from")
    texts, documents, pairs = source
    instruction = instruction_for(args.task or "", "auto", encoder)
    options = {"batch_tokens": args.batch_tokens, "progress": name}
    x, sums, states = read_states(encoder, method, texts, instruction=instruction, **options)
    if documents:
        more, other, of = read_states(encoder, method, documents, document=True, **options)
        x, sums = np.concatenate((x, more)), sums + other
        states = None if states is None else np.concatenate((states, of))
    if encoder.cut:
        print(f"note: {printable(name)}: texts cut to {encoder.config.max_tokens} tokens: "
              f"{encoder.cut:,}")
    if not np.isfinite(x).all():
        raise UserError(f"{name}: embeddings with nan or inf; its training diverged")
    random, values = np.random.default_rng(args.seed), spectrum(x)
    found = {"model": name, "method": method, "source": args.text or args.task, "texts": len(x),
             "instruction": instruction, "max_tokens": encoder.config.max_tokens,
             "dtype": str(encoder.dtype), "seed": args.seed, "base": encoder.base,
             "sha256": encoder.sha256, "special_tokens": encoder.config.special_tokens,
             "kept_tokens": list(encoder.config.kept_tokens),
             "spectrum": values.tolist(), **dimensions(values),
             "uniformity": uniformity(x[random.permutation(len(x))[:PAIRS_OF]]),
             "alignment": alignment(*x[pairs.T]) if pairs is not None and len(pairs) else None}
    if encoder.config.num_memory_tokens:
        products, cosines = sums / len(x)
        clusters = complete_linkage(cosines, args.merge)
        others = cosines[~np.eye(len(cosines), dtype=bool)]
        ratios, wide = wide_tokens(states)
        found |= {"products": products.tolist(), "cosines": cosines.tolist(), "merge": args.merge,
                  "mean_cosine": float(others.mean()) if len(others) else None,
                  "clusters": clusters, "drawn": draw_tokens(clusters, args.seed),
                  "token_participation": ratios, "wide": wide}
    return found, encoder


# ---------------------------------------------------------------------------------------------
# Output
# ---------------------------------------------------------------------------------------------


def print_table(results: list[dict]):
    """One Markdown row per model."""
    titles = ("model", "entropy", "participation", "above 1 %", "uniformity", "alignment",
              "tokens' mean cosine", "effective tokens", "wide tokens")
    print(f"| {' | '.join(titles)} |\n|---|" + "---:|" * (len(titles) - 1))

    def cell(value, form: str) -> str:
        return "-" if value is None else format(value, form)

    for r in results:
        cells = [printable(r["model"]), f"{r['entropy']:.1f}", f"{r['participation']:.1f}",
                 str(r["above_1_percent"]), f"{r['uniformity']:.3f}", cell(r["alignment"], ".3f"),
                 cell(r.get("mean_cosine"), ".3f"),
                 *(f"{len(r[key])} of {len(r['cosines'])}" if key in r else "-"
                   for key in ("clusters", "wide"))]
        print(f"| {' | '.join(cells)} |")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", nargs="+", required=True, metavar="MODEL",
        help="encoders, runs, Llamas (folder or hub), demo")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", help="a .txt, a .jsonl, wiki1m, wikitext103, or demo")
    source.add_argument("--task", help="the texts of a task, see evaluate.py --list")
    add("--texts", type=int, default=60_000, help="use at most this many, sampled by --seed")
    add("--merge", type=float, default=0.9, help="merge tokens whose mean cosine is at least this")
    add("--save", metavar="FOLDER", help="write the one model, read by fewer memory tokens, as "
        "FOLDER/encoder")
    add("--keep", choices=["effective", "wide"], help="the tokens that --save keeps (default "
        "effective)")
    add("--seed", type=int, default=0, help="of the texts and of the token kept of a cluster")
    add("--method", choices=list(METHODS), help="how plain Llamas are read (default weighted-mean)")
    add("--max-tokens", type=int, help="of a text for a plain Llama (default 512)")
    add("--data-dir", help="folder with the tasks' repositories, hub layout")
    add_reading_flags(add)
    add("--out", default="runs/collapse", help="folder of collapse.json")
    args = parser.parse_args(argv)
    if args.texts < 2 or args.batch_tokens < 1 or min(args.threads, args.seed) < 0:
        parser.error("--texts must be above 1, --batch-tokens above 0, --threads and --seed not "
                     "below")
    if not -1 <= args.merge <= 1:
        parser.error(f"--merge {args.merge}: is no cosine")
    if args.text and args.data_dir:
        parser.error(f"--data-dir {args.data_dir}: is for --task; leave it out")
    if args.save and len(args.model) > 1:
        parser.error("--save is for one --model")
    if args.keep and not args.save:
        parser.error(f"--keep {args.keep}: is for --save; leave it out")
    return args


def run(args: argparse.Namespace):
    """Analyse the models; print the table, write the JSON and, with --save, an encoder that is read
    by fewer memory tokens."""
    keep_freed_memory()
    torch.set_num_threads(args.threads or torch.get_num_threads())
    if args.save and (is_encoder(args.save) or is_encoder(Path(args.save) / "encoder")):
        raise UserError(f"--save {args.save}: exists already; name a new folder")
    folders = [find_model(encoder_of(name)) for name in args.model]
    trained = list(map(is_encoder, folders))
    if args.save and not trained[0]:
        raise UserError(f"--save: {args.model[0]} is no encoder as training leaves it (an exported "
                        f"one is not, either); name one that is")
    given = (args.method, args.max_tokens, args.special_tokens)
    if all(trained) and given != (None, None, None):
        raise UserError("--method, --max-tokens, --special-tokens: are for Llamas, and no --model "
                        "is one; leave them out")
    if not any(trained):
        require_no_base(" ".join(args.model), args.base, args.other_base)
    (out := Path(args.out)).mkdir(parents=True, exist_ok=True)
    source = read_source(args)
    print(f"{len(source[0]) + len(source[1]):,} texts of {printable(args.text or args.task)}")
    results = []
    for name in args.model:
        encoder = None  # before the next copy of the weights is loaded
        found, encoder = analyse(name, source, args)
        results.append(found)
        write_file(out / "collapse.json", json.dumps(results, indent=1) + "\n")
    print_table(results)
    print(f"\nwritten to {printable(args.out)}/collapse.json; to draw it: python bench/plot.py "
          f"{printable(args.out)}/collapse.json")
    if args.save:
        kept = found["wide" if args.keep == "wide" else "drawn"]
        keep_tokens(encoder, kept)
        chosen = {key: getattr(args, key) for key in ("text", "task", "texts", "seed", "keep")}
        encoder.history[-1]["collapse"] = chosen | {"merge": args.merge, "kept_tokens": kept}
        save_encoder(encoder, Path(args.save) / "encoder", folders[0])
        print(f"memory tokens {', '.join(map(str, kept))} make the embedding of {args.save}/encoder"
              f", which reads {encoder.config.num_memory_tokens}")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_command(lambda: run(parse_arguments(argv)), "the same command begins anew")


if __name__ == "__main__":
    sys.exit(main())

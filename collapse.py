"""How far embeddings and memory tokens collapse: the analysis of the paper's section 4.

    python collapse.py --model runs/ctkd runs/nll --task sts17      table, JSON, figures
    python collapse.py --model runs/nll --text texts.jsonl.gz --save runs/nll-merged

spectrum          singular values of the covariance of the embeddings (Figures 4 and 9)
dimension         of a spectrum s with shares p = s / sum s, in three senses: exp of the entropy of
                  p; participation ratio 1 / sum p^2; how many s are above 1 % of the first; and the
                  rank, how many are above 1e-10 of the first
correlation       of the K memory tokens: mean over the texts of m~_i . m~_j, and of their cosine
                  (Eq. 7; Figures 5 and 6)
effective tokens  clusters of the tokens by complete linkage: two join while every pair between
                  them has a mean cosine of at least --merge (section 4.2). --save writes an
                  encoder whose embedding is the mean of one token of each, drawn by --seed.
alignment         mean squared distance of positive pairs on the unit sphere, here the pairs of an
                  STS task with at least 4/5 of the highest score (Wang & Isola 2020)
uniformity        log of the mean over pairs of exp(-2 squared distance), of up to 4,096 texts

Tokens are clustered by the correlation over all texts, not text by text: which of them say the
same is a property of the encoder, and an embedding depends on its own text alone.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import UserError
from data.corpora import read_texts
from data.tasks import read_task
from evaluate import find_task, instruction_for, open_model, unit
from model import Encoder, encoder_of, find_device, flat_ids, save_encoder, token_batches, wide
from model import write_file
from training import explain, keep_freed_memory, show_all

PAIRS_OF = 4096  # texts whose pairs make the uniformity

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
    return np.linalg.eigvalsh(covariance(x))[::-1].clip(0)  # it is symmetric, none is negative


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
    """Eq. 7, summed over the texts: products and cosines (K, K) of memory states (n, K, D)."""
    memory = memory.astype(np.float64)
    norm = np.linalg.norm(memory, axis=-1, keepdims=True)
    direction = memory / np.where(norm > 0, norm, 1)
    return tuple(np.einsum("nid,njd->ij", m, m) for m in (memory, direction))


def complete_linkage(cosine: np.ndarray, threshold: float) -> list[list[int]]:
    """Clusters of tokens by their cosines (K, K): the two whose least similar pair is the most
    similar are joined, again and again while that pair has at least `threshold`."""
    clusters = [[i] for i in range(len(cosine))]
    while len(clusters) > 1:
        least = {(a, b): cosine[np.ix_(clusters[a], clusters[b])].min()
                 for b in range(len(clusters)) for a in range(b)}
        a, b = max(least, key=least.get)
        if least[a, b] < threshold:
            break
        clusters[a] += clusters.pop(b)
    return [sorted(cluster) for cluster in clusters]


def alignment(left: np.ndarray, right: np.ndarray) -> float:
    """Mean squared distance of pairs (n, D), (n, D) of equal meaning, on the unit sphere."""
    return float(np.square(unit(left) - unit(right)).sum(axis=1).mean())


def uniformity(x: np.ndarray, block: int = 512) -> float:
    """log of the mean of exp(-2 squared distance) over the pairs of rows of x (n, D), n > 1."""
    x, total = unit(x.astype(np.float64)), 0.0
    for start in range(0, len(x), block):
        squared = 2 - 2 * x[start : start + block] @ x.T
        total += np.exp(-2 * squared.clip(0)).sum()
    n = len(x)
    return float(np.log((total - n) / (n * (n - 1))))  # a row and itself are no pair


# ---------------------------------------------------------------------------------------------
# From texts to measures
# ---------------------------------------------------------------------------------------------


@torch.no_grad()
def read_states(encoder: Encoder, texts: list[str], instruction: str, batch_tokens: int):
    """Embeddings (n, D) float32, and the means of Eq. 7 (None without memory tokens)."""
    k, device = encoder.config.num_memory_tokens, encoder.llama.head.device
    ids, tails = encoder.tokenize(texts, instruction)
    x = np.empty((len(texts), encoder.table.shape[1]), dtype=np.float32)
    sums = np.zeros((2, k, k))
    with tqdm(total=len(texts), unit="text", leave=False) as bar:
        for batch in token_batches([len(i) + k for i in ids], batch_tokens):
            row, lengths = flat_ids([ids[i] for i in batch], device), [len(ids[i]) for i in batch]
            if k:
                memory = encoder.memory(row, lengths)
                z = encoder.pool(memory)
                sums += correlation(wide(memory).cpu().numpy())
            else:
                z = encoder.embed(row, lengths, tails=[tails[i] for i in batch])
            x[batch] = z.float().cpu().numpy()
            bar.update(len(batch))
    return x, sums / len(texts) if k else None


def read_source(args) -> tuple[list[str], np.ndarray | None]:
    """Up to --texts distinct texts, and the positive pairs (n, 2) among them as places."""
    if args.text:
        texts, pairs = list(dict.fromkeys(read_texts(args.text))), None
    else:
        task = find_task(args.task)
        roles, labels, _ = read_task(task, args.data_dir)
        texts, pairs = list(dict.fromkeys(t for role in roles.values() for t in role)), None
        if task["kind"] == "sts":
            place, gold = {text: i for i, text in enumerate(texts)}, np.asarray(labels["gold"])
            same = np.flatnonzero(gold >= 0.8 * gold.max())
            pairs = np.array([[place[roles["left"][i]], place[roles["right"][i]]] for i in same])
    if len(texts) < 2:
        raise UserError(f"{args.text or args.task}: {len(texts)} text; a covariance needs two")
    if len(texts) > args.texts:
        chosen = np.sort(np.random.default_rng(args.seed).permutation(len(texts))[: args.texts])
        texts, pairs = [texts[i] for i in chosen], None
    return texts, pairs


def analyse(name: str, texts: list[str], pairs: np.ndarray | None, args) -> dict:
    """All measures of one model; with --save also its merged form."""
    encoder, method = open_model(name, args.method, dtype=getattr(torch, args.dtype),
                                 device=find_device(args.device), base=args.base)
    encoder.eval()
    if args.save and not encoder.config.num_memory_tokens:
        raise UserError(f"--save: {name} has no memory tokens to merge")
    instruction = instruction_for(args.task or "", "auto", encoder)
    x, mean = read_states(encoder, texts, instruction, args.batch_tokens)
    if not np.isfinite(x).all():
        raise UserError(f"{name}: embeddings that are no finite numbers; its training diverged")
    values = spectrum(x)
    found = {"model": name, "method": method, "texts": len(texts), "instruction": instruction,
             "sha256": encoder.sha256 or encoder.base["sha256"], "spectrum": values.tolist(),
             **dimensions(values), "uniformity": uniformity(x[:PAIRS_OF]),
             "alignment": alignment(*x[pairs.T]) if pairs is not None and len(pairs) else None}
    if mean is not None:
        clusters, random = complete_linkage(mean[1], args.merge), np.random.default_rng(args.seed)
        kept = sorted(int(random.choice(cluster)) for cluster in clusters)
        others = mean[1][~np.eye(len(mean[1]), dtype=bool)]
        found |= {"products": mean[0].tolist(), "cosines": mean[1].tolist(), "clusters": clusters,
                  "kept_tokens": kept, "mean_cosine": float(others.mean()) if len(others) else None}
        if args.save:
            encoder.config = replace(encoder.config, kept_tokens=tuple(kept))
            save_encoder(encoder, Path(args.save) / "encoder", Path(encoder_of(name)))
    return found


# ---------------------------------------------------------------------------------------------
# Output
# ---------------------------------------------------------------------------------------------


def print_table(results: list[dict]):
    """One Markdown row a model."""
    titles = ("model", "entropy", "participation", "above 1 %", "uniformity", "alignment",
              "tokens' mean cosine", "effective tokens")
    print(f"| {' | '.join(titles)} |\n|---|" + "---:|" * (len(titles) - 1))

    def cell(value, form: str) -> str:
        return "-" if value is None else format(value, form)

    for r in results:
        kept = r.get("kept_tokens")
        cells = [r["model"], f"{r['entropy']:.1f}", f"{r['participation']:.1f}",
                 str(r["above_1_percent"]), f"{r['uniformity']:.3f}", cell(r["alignment"], ".3f"),
                 cell(r.get("mean_cosine"), ".3f"),
                 f"{len(kept)} of {len(r['cosines'])}" if kept else "-"]
        print(f"| {' | '.join(cells)} |")


def draw(results: list[dict], folder: Path):
    """spectra.svg with a line a model, and correlation.svg with a square a model."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no figures: matplotlib is not installed; the numbers are in the JSON")
        return
    folder.mkdir(parents=True, exist_ok=True)
    figure = Figure((5, 3.4), layout="constrained")
    panel = figure.add_subplot(xlabel="index", ylabel="singular value of the covariance",
                               xscale="log", yscale="log")
    for r in results:
        values = np.array(r["spectrum"])
        values = values[values > 1e-6 * values[0]]
        panel.plot(np.arange(1, len(values) + 1), values, label=r["model"])
    panel.legend(frameon=False)
    figure.savefig(folder / "spectra.svg", metadata={"Date": None})
    with_tokens = [r for r in results if "cosines" in r]
    if with_tokens:
        figure = Figure((2.8 * len(with_tokens) + 0.6, 5.6), layout="constrained")
        rows = figure.subplots(2, len(with_tokens), squeeze=False)
        for title, panels, key in (("mean product", rows[0], "products"),
                                   ("mean cosine", rows[1], "cosines")):
            highest = max(np.max(r[key]) for r in with_tokens)
            for panel, r in zip(panels, with_tokens):
                image = panel.imshow(r[key], vmin=0, vmax=highest)
                panel.set_title(r["model"], fontsize=8)
            figure.colorbar(image, ax=list(panels), label=title)
        figure.savefig(folder / "correlation.svg", metadata={"Date": None})
    print(f"drawn in {folder}/")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", nargs="+", required=True, metavar="MODEL",
        help="encoders, runs, Llamas (folder or hub), demo")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", help="a .txt, a .jsonl, wiki1m, wikitext103, or demo")
    source.add_argument("--task", help="the texts of a task, see evaluate.py --list")
    add("--texts", type=int, default=60_000, help="at most; more are drawn from by --seed")
    add("--merge", type=float, default=0.9, help="cosine from which tokens are one")
    add("--save", metavar="FOLDER", help="write the one model, merged, as FOLDER/encoder")
    add("--seed", type=int, default=0, help="of the texts and of the token kept of a cluster")
    add("--method", help="how plain Llamas are read, see evaluate.py")
    add("--base", help="where the encoders' base model lies now")
    add("--data-dir", help="folder with the tasks' repositories, hub layout")
    add("--device", default="auto", help="auto, cpu, cuda")
    add("--dtype", choices=["float32", "bfloat16"], default="float32")
    add("--batch-tokens", type=int, default=4096, help="tokens per forward pass")
    add("--threads", type=int, default=0, help="CPU threads; 0 = all cores")
    add("--out", default="results/collapse", help="folder of collapse.json and the figures")
    args = parser.parse_args(argv)
    if args.texts < 2 or args.batch_tokens < 1 or args.threads < 0 or not -1 <= args.merge <= 1:
        parser.error("--texts must be above 1, --batch-tokens above 0, --merge a cosine")
    if args.save and len(args.model) > 1:
        parser.error("--save is for one --model")
    return args


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    args = parse_arguments(argv)
    show_all()
    keep_freed_memory()
    torch.set_num_threads(args.threads or torch.get_num_threads())
    try:
        if args.save and Path(args.save).exists():
            raise UserError(f"--save {args.save}: exists already; name a new folder")
        texts, pairs = read_source(args)
        print(f"{len(texts):,} texts of {args.text or args.task}")
        results = [analyse(name, texts, pairs, args) for name in args.model]
        print_table(results)
        out = Path(args.out)
        out.mkdir(parents=True, exist_ok=True)
        write_file(out / "collapse.json", json.dumps(results, indent=1) + "\n")
        print(f"\nwritten to {out}/collapse.json")
        draw(results, out)
    except (UserError, OSError) as error:
        print(f"error: {explain(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

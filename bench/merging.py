"""Effective tokens chosen from the mean cosines of all texts, or for each text: STS scores of both.

    python bench/merging.py --model runs/ablations/nll-0 --task stsbenchmark --data-dir FOLDER

One token of each cluster is drawn: once for all texts, or for each text its own. All of it
`--draws` times, for the standard deviation. The table decided how collapse.py reads section 4.2.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project root

from collapse import complete_linkage, correlation
from data.tasks import read_task
from evaluate import find_task, sts, unit
from model import encoder_of, load_encoder, wide


@torch.no_grad()
def memories(encoder, texts: list[str]) -> np.ndarray:
    """The memory states (n, K, D) of all texts, float32."""
    shape = len(texts), encoder.config.num_memory_tokens, encoder.table.shape[1]
    out = np.empty(shape, dtype=np.float32)
    for batch, row, lengths, _ in encoder.batches(texts):
        out[batch] = wide(encoder.memory(row, lengths)).numpy()
    return out


def mean_of_drawn(memory: np.ndarray, clusters: list[list[int]], random) -> np.ndarray:
    """memory (n, K, D) -> (n, D): the mean of one token of each cluster, the same for all n."""
    return memory[:, [random.choice(cluster) for cluster in clusters]].mean(axis=1)


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", required=True, help="encoders with memory tokens")
    parser.add_argument("--task", default="demo-sts", help="an STS task")
    parser.add_argument("--data-dir")
    parser.add_argument("--merge", nargs="+", type=float, default=[0.9, 0.8, 0.7, 0.6])
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    roles, labels, _ = read_task(find_task(args.task), args.data_dir)
    texts = list(dict.fromkeys(roles["left"] + roles["right"]))
    place = {text: i for i, text in enumerate(texts)}
    left, right = ([place[text] for text in roles[side]] for side in ("left", "right"))

    def cell(embed) -> str:
        """Mean and deviation of the score of embed(random) over the draws."""
        x = []
        for seed in range(args.draws):
            z = embed(np.random.default_rng(seed))
            x.append(100 * sts(z[left], z[right], **labels)["cosine_spearman"])
        return f"{np.mean(x):.1f} ± {np.std(x, ddof=1):.1f}"

    print("| model | cosine | tokens by the mean of all texts | score | tokens by each text, mean "
          "| score |\n|---|" + "---:|" * 5)
    for name in args.model:
        memory = memories(load_encoder(encoder_of(name)), texts)
        mean = correlation(memory)[1] / len(texts)
        own = unit(memory.reshape(-1, memory.shape[-1])).reshape(memory.shape)
        own = np.einsum("nid,njd->nij", own, own)
        for threshold in args.merge:
            all_texts = complete_linkage(mean, threshold)
            each = [complete_linkage(cosines, threshold) for cosines in own]
            together = cell(lambda random: mean_of_drawn(memory, all_texts, random))
            apart = cell(lambda random: np.concatenate([
                mean_of_drawn(states[None], clusters, random)
                for states, clusters in zip(memory, each)]))
            print(f"| {name} | {threshold} | {len(all_texts)} | {together} "
                  f"| {np.mean([len(clusters) for clusters in each]):.1f} | {apart} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

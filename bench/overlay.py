"""Whether speed costs truth: the losses of stage 1 by the fast path and by the readable one.

    python bench/overlay.py --steps 200 --threads 2

Both train the embedded Llama on the embedded text with the demo's settings (no dropout, --batch
texts a step) from the same start: `fast` is pretrain_ctkd.batch_gradient and the fused AdamW,
`readable` is tests/readable.py (one text at a time, whole masks and logits) and the plain AdamW. In
each dtype the difference of their losses, step by step, stands beside what rounding does to the
readable path itself: fp32 beside its own fp64, bf16 beside its own fp32.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / folder) for folder in ("", "tests")]
import pretrain_ctkd as stage1  # noqa: E402
import readable  # noqa: E402
from training import (  # noqa: E402
    Ranks, global_batch, keep_freed_memory, learning_rate, trained_of,
)

RUNS = [("fast", "float32"), ("readable", "float32"), ("readable", "float64"),
        ("fast", "bfloat16"), ("readable", "bfloat16")]
COMPARED = [  # name, two runs
    ("fp32: fast - readable", 0, 1), ("readable: fp32 - fp64", 1, 2),
    ("bf16: fast - readable", 3, 4), ("fast: bf16 - fp32", 3, 0), ("readable: bf16 - fp32", 4, 1)]


def losses(path: str, dtype: str, start: dict, args) -> np.ndarray:
    """The loss of each step, before its update; `start` gets the first run's initial weights."""
    config = stage1.Config(**stage1.PRESETS["demo"] | {
        "dtype": dtype, "seed": args.seed, "batch_size": args.batch, "steps": args.steps,
        "lora_dropout": 0.0})
    ranks = Ranks(0, 1, torch.device("cpu"))
    encoder = stage1.new_encoder(config, ranks)
    corpus = stage1.prepare_texts(config, encoder.tokenizer)
    for name, p in trained_of(encoder).items():
        p.data.copy_(start.setdefault(name, p.detach().clone()))
    parameters = list(trained_of(encoder).values())
    optimizer = torch.optim.AdamW(parameters, config.lr, weight_decay=config.weight_decay,
                                  fused=path == "fast", foreach=False)
    out, clock = [], time.perf_counter()
    for step in range(args.steps):
        rate = learning_rate(step, args.steps, int(config.warmup * args.steps), config.min_lr,
                             config.lr)
        optimizer.param_groups[0]["lr"] = rate
        if path == "fast":
            loss = stage1.batch_gradient(encoder, corpus, config, step, ranks)[0].sum()
        else:
            chosen = global_batch(config.seed, step, config.batch_size, len(corpus))
            first, texts = step * config.batch_size, [corpus[i] for i in chosen]
            splits = [stage1.split_point(config, first + j, len(t)) for j, t in enumerate(texts)]
            loss = readable.stage1_loss(encoder, texts, splits, config.objective)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        out.append(loss.item())
    print(f"{path}, {dtype}: loss {out[0]:.4f} -> {np.mean(out[-10:]):.4f} (last ten), "
          f"{time.perf_counter() - clock:.0f} s", file=sys.stderr, flush=True)
    return np.array(out)


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=4, help="texts a step")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="bench/results/overlay.json")
    args = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    start = {}
    curves = [losses(path, dtype, start, args) for path, dtype in RUNS]
    marks = sorted({0, args.steps // 4, args.steps // 2, args.steps - 1})
    print("| loss at step | " + " | ".join(map(str, marks)) + " |\n|---|" + "---:|" * len(marks))
    for (path, dtype), curve in zip(RUNS, curves):
        print(f"| {path}, {dtype} | " + " | ".join(f"{curve[i]:.6f}" for i in marks) + " |")
    print("\n| difference of losses | mean absolute | largest | at step |\n|---|---:|---:|---:|")
    for name, a, b in COMPARED:
        off = np.abs(curves[a] - curves[b])
        print(f"| {name} | {off.mean():.1e} | {off.max():.1e} | {off.argmax()} |")
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    named = {f"{path} {dtype}": list(curve) for (path, dtype), curve in zip(RUNS, curves)}
    out.write_text(json.dumps({"arguments": vars(args), "losses": named}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

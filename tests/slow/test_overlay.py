"""Does speed cost truth? Stage 1's losses by the fast path and by paper.py, step by step.

    python -m pytest -m slow tests/slow/test_overlay.py          STEPS=200 by default: minutes

Both train the bundled Llama on the bundled texts with the demo's settings (no dropout, 2 texts
per step) from the same start: `fast` is stage 1's forward and backward with the fused AdamW,
`paper` is paper.batch_loss (one text at a time, whole masks and logits) with the plain AdamW. In
each dtype the difference of their losses stands beside what rounding does to paper.py itself: fp32
beside its own fp64, bf16 beside its own fp32.
"""

import os
import time

import numpy as np
import paper
import pytest
import torch
from helpers import ctkd_step, run_of

import pretrain_ctkd
from runtime.cpu import keep_freed_memory
from runtime.schedule import learning_rate, warmup_steps

pytestmark = pytest.mark.slow

STEPS = int(os.environ.get("STEPS", 200))
RUNS = [("fast", "float32"), ("paper", "float32"), ("paper", "float64"), ("fast", "bfloat16"),
        ("paper", "bfloat16")]
COMPARED = {  # name -> two runs
    "fp32: fast - paper": (0, 1), "paper: fp32 - fp64": (1, 2), "bf16: fast - paper": (3, 4),
    "fast: bf16 - fp32": (3, 0), "paper: bf16 - fp32": (4, 1)}


def losses(path: str, dtype: str, start: dict[str, torch.Tensor]) -> np.ndarray:
    """The loss of each step, before its update; `start` gets the first run's initial weights."""
    config = pretrain_ctkd.Config(**pretrain_ctkd.PRESETS["demo"] | {
        "dtype": dtype, "device": "cpu", "batch_size": 2, "steps": STEPS, "lora_dropout": 0.0})
    encoder = pretrain_ctkd.new_encoder(config, run_of(config))
    data = pretrain_ctkd.open_texts(config, encoder.tokenizer, config.num_texts)
    trained = {name: p for name, p in encoder.named_parameters() if p.requires_grad}
    for name, p in trained.items():
        p.data.copy_(start.setdefault(name, p.detach().clone()))
    optimizer = torch.optim.AdamW(trained.values(), config.lr, weight_decay=config.weight_decay,
                                  fused=path == "fast", foreach=False)
    found = []
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = learning_rate(
            step, STEPS, warmup_steps(config.warmup, STEPS), config.min_lr, config.lr)
        if path == "fast":
            loss = ctkd_step(encoder, data, config, step)[0].sum()
        else:
            batch = data.read_batch(config.seed, step, config.batch_size)
            texts = [torch.from_numpy(ids).long() for ids in batch.texts]
            loss = paper.batch_loss(encoder, encoder.llama, texts, batch.splits, config.objective)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), config.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        found.append(loss.item())
    return np.array(found)


def test_the_fast_path_has_the_losses_of_the_paper(capsys):
    keep_freed_memory()
    start, curves = {}, []
    marks = sorted({0, STEPS // 4, STEPS // 2, STEPS - 1})
    with capsys.disabled():
        print(f"\nloss at step        {''.join(f'{step:>11}' for step in marks)}")
        for path, dtype in RUNS:
            clock = time.perf_counter()
            curves.append(losses(path, dtype, start))
            print(f"{f'{path}, {dtype}':<20}{''.join(f'{curves[-1][i]:11.6f}' for i in marks)}"
                  f"   ({time.perf_counter() - clock:.0f} s)", flush=True)
        print(f"\ndifference of the losses over {STEPS} steps    mean absolute  largest  at step")
        mean = {}
        for name, (a, b) in COMPARED.items():
            off = np.abs(curves[a] - curves[b])
            mean[name] = off.mean()
            print(f"{name:<42}{off.mean():14.1e}{off.max():9.1e}{off.argmax():9}")
    assert all(np.isfinite(curve).all() and curve[-10:].mean() < curve[0] for curve in curves)
    assert mean["fp32: fast - paper"] <= 2e-7
    assert mean["bf16: fast - paper"] <= 5e-3
    assert 0 < mean["paper: fp32 - fp64"] < mean["paper: bf16 - fp32"]  # truly in these dtypes

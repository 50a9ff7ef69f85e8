"""Learning rate, order and randomness: pure functions of seed and step.

So a resumed run needs no generator state, and the order of samples does not depend on the number
of ranks.
"""

import math

import numpy as np
import torch

from runtime.errors import UserError

# what a generator is for: the second number of its key
ORDER, SPLIT, DROPOUT, NEGATIVES, SOURCE, ADAPTER, MASKS = range(7)


def learning_rate(step: int, steps: int, warmup: int, low: float, high: float) -> float:
    """DeepSpeed's WarmupDecayLR: lr = low + (high - low) g, step counted from 0.

    At the scheduler's t-th update g rises as ln(t + 1) / ln(warmup) for `warmup` steps, then falls
    linearly to 0 at `steps`, so that the rate returns to `low`.
    """
    t = max(0, step - 1)  # DeepSpeed updates it after the optimiser: two steps run at `low`
    warmup = max(2, warmup)  # as in DeepSpeed: ln(1) = 0 cannot be a divisor
    if t < warmup:
        g = math.log(t + 1) / math.log(warmup)
    else:
        g = max(0.0, (steps - t) / max(1, steps - warmup))
    return low + (high - low) * g


def warmup_steps(warmup: float, steps: int) -> int:
    """The number of steps in which the rate rises; `warmup` below 1 is a share of `steps`.

    UserError if they are more than `steps`.
    """
    if warmup >= 1 and warmup > steps:
        raise UserError(f"--warmup {warmup:g}: more steps than the {steps:,} of the schedule; "
                        f"lower it, or give a share below 1")
    return int(warmup * steps if warmup < 1 else warmup)


def generator(*key: int) -> np.random.Generator:
    """A generator that depends on its key alone: seed, purpose, position."""
    return np.random.default_rng(list(key))


def torch_seed(*key: int) -> int:
    """A seed for torch that depends on its key alone."""
    return int(generator(*key).integers(2**62))


def seed_torch(*key: int):
    """Seed torch from a key alone, so that a micro-batch has the same dropout after a resume."""
    torch.manual_seed(torch_seed(*key))


def epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order of n samples in an epoch."""
    return generator(seed, ORDER, epoch).permutation(n)


def global_batch(seed: int, step: int, batch: int, n: int) -> list[int]:
    """The samples of a step; the last incomplete batch of an epoch is dropped."""
    steps_per_epoch = n // batch
    epoch, index = divmod(step, steps_per_epoch)
    return epoch_order(seed, epoch, n)[index * batch : (index + 1) * batch].tolist()


def one_source_batch(seed: int, step: int, batch: int, sizes: list[int]) -> list[int]:
    """The samples of a step, all from one source; samples are numbered source after source.

    sizes: samples per source. An epoch has all full batches of each source in a random order. With
    a single source: global_batch.
    """
    counts = [size // batch for size in sizes]
    epoch, index = divmod(step, sum(counts))
    order = generator(seed, SOURCE, epoch).permutation(np.repeat(np.arange(len(sizes)), counts))
    source = int(order[index])
    earlier = int((order[:index] == source).sum())  # batches of this source in this epoch
    first = sum(sizes[:source])
    rows = global_batch(seed + source, epoch * counts[source] + earlier, batch, sizes[source])
    return [first + row for row in rows]

"""runtime/schedule.py: the learning rate, the order of samples, and what randomness depends on."""

import math

import numpy as np
import pytest
import torch

from runtime.errors import UserError
from runtime.schedule import (
    epoch_order,
    generator,
    global_batch,
    learning_rate,
    one_source_batch,
    seed_torch,
    warmup_steps,
)


def test_the_learning_rate_is_deepspeeds_warmup_decay():
    """Its own numbers are in test_recipes.py; it is updated after the optimiser."""
    rates = [learning_rate(s, 100, 10, 1e-5, 1e-4) for s in range(102)]
    assert rates[0] == rates[1] == 1e-5 and rates[11] == 1e-4 and rates[101] == 1e-5
    assert rates[10] == 1e-4  # the tenth update is ln(10) / ln(10)
    assert rates[5] == pytest.approx(1e-5 + 9e-5 * np.log(5) / np.log(10))
    assert rates[56] == pytest.approx(1e-5 + 9e-5 * 0.5)
    assert max(rates) == 1e-4 and min(rates) == 1e-5 and rates[100] > 1e-5


@pytest.mark.parametrize("warmup", [0, 1, 2])
def test_a_warmup_shorter_than_two_steps_counts_as_two(warmup):
    rates = [learning_rate(step, 6, warmup, 0.0, 1.0) for step in range(8)]
    assert rates == [0, 0, math.log(2) / math.log(2), 1, 3 / 4, 2 / 4, 1 / 4, 0]


def test_the_learning_rate_stays_finite_where_the_schedule_is_over_or_all_warmup():
    assert learning_rate(9, 4, 1, 1e-5, 1e-4) == 1e-5
    assert learning_rate(4, 3, 3, 1e-5, 1e-4) == 1e-5
    assert learning_rate(3, 2, 0, 1e-5, 1e-4) == 1e-5


@pytest.mark.parametrize("warmup, steps, expected", [
    (0.1, 8000, 800), (0.1, 2000, 200), (0.1, 60, 6), (0.5, 7, 3), (0.0, 100, 0),
    (1.0, 8000, 1), (100.0, 100, 100), (100, 2000, 100), (0.999, 1000, 999), (250.7, 300, 250),
])
def test_a_warmup_below_1_is_a_share_and_from_1_on_a_number_of_steps(warmup, steps, expected):
    found = warmup_steps(warmup, steps)
    assert found == expected and type(found) is int


@pytest.mark.parametrize("warmup, steps", [(2.0, 1), (101.0, 100), (250.7, 250)])
def test_more_steps_of_warmup_than_of_the_schedule_are_refused(warmup, steps):
    with pytest.raises(UserError, match=rf"--warmup {warmup:g}: more steps than the {steps}"):
        warmup_steps(warmup, steps)


def test_a_generator_depends_on_its_key_alone():
    drawn = [generator(*key).integers(2**62) for key in ((7, 1, 3), (7, 1, 3), (7, 1, 4), (7, 3, 1),
                                                         (7, 1), (8, 1, 3))]
    assert drawn[0] == drawn[1] and len(set(drawn)) == 5


def test_torchs_dropout_depends_on_the_key_alone():
    masks = []
    for key in ((0, 2, 5), (0, 2, 6), (0, 2, 5)):
        torch.rand(3)  # whatever was drawn before
        seed_torch(*key)
        masks.append(torch.nn.functional.dropout(torch.ones(64), 0.5))
    assert torch.equal(masks[0], masks[2]) and not torch.equal(masks[0], masks[1])


def test_an_epoch_has_every_sample_once_and_each_epoch_its_own_order():
    orders = [epoch_order(seed, epoch, 20).tolist() for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert all(sorted(order) == list(range(20)) for order in orders)
    assert orders[0] != orders[1] and orders[0] != orders[2]


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_every_sample_comes_once_per_epoch_whatever_the_batch_size(batch):
    n = 16
    steps = n // batch
    seen = [i for step in range(steps) for i in global_batch(5, step, batch, n)]
    assert len(set(seen)) == len(seen) == steps * batch
    again = [i for step in range(steps, 2 * steps) for i in global_batch(5, step, batch, n)]
    assert again != seen


def test_the_order_does_not_depend_on_the_batch_size():
    whole = global_batch(7, 0, 8, 16)
    assert [i for step in range(4) for i in global_batch(7, step, 2, 16)] == whole


@pytest.mark.parametrize("sizes, batch", [([20, 10, 9], 4), ([7], 2), ([3, 3], 3), ([5, 100], 5),
                                          ([2, 0, 9], 2)])
def test_a_one_source_batch_has_rows_of_one_source_only(sizes, batch):
    per_epoch, ends = sum(size // batch for size in sizes), np.cumsum(sizes)
    epochs = []
    for epoch in range(3):
        rows, counts = [], [0] * len(sizes)
        for step in range(epoch * per_epoch, (epoch + 1) * per_epoch):
            found = one_source_batch(5, step, batch, sizes)
            assert found == one_source_batch(5, step, batch, list(sizes))
            assert len(found) == batch and all(isinstance(row, int) for row in found)
            (source,) = set(np.searchsorted(ends, found, side="right").tolist())
            counts[source] += 1
            rows += found
        assert len(set(rows)) == len(rows) and 0 <= min(rows) and max(rows) < sum(sizes)
        assert counts == [size // batch for size in sizes]
        epochs.append(rows)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [one_source_batch(6, step, batch, sizes) for step in range(per_epoch)] != [
        one_source_batch(5, step, batch, sizes) for step in range(per_epoch)]


def test_with_one_source_a_one_source_batch_is_the_global_batch():
    for seed, n in ((0, 17), (3, 8)):
        for step in range(9):
            assert one_source_batch(seed, step, 4, [n]) == global_batch(seed, step, 4, n)

"""A run that is killed at many drawn moments ends with the bits of one that nobody disturbed.

    KILLS=36 python -m pytest -m slow tests/slow/test_kills.py          36 by default: minutes
"""

import os
from collections import Counter

import pytest
from helpers import assert_same_run
from kills import kill_again_and_again

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("KILLS", 36))


def test_killed_at_drawn_moments_a_run_ends_with_the_undisturbed_bits(tmp_path, capsys):
    with capsys.disabled():
        result = kill_again_and_again(tmp_path, KILLS, steps_per_kill=6, seed=0, stretch=0.02)
        hits = Counter(kill["hit"] for kill in result["kills"])
        print(", ".join(f"{n} in {phase}" for phase, n in hits.most_common()))
    assert len(result["kills"]) == KILLS
    assert hits.keys() >= {"forward", "backward", "save", "rename"}
    assert_same_run(tmp_path / "killed", tmp_path / "whole", result["steps"])

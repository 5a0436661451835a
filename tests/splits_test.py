"""Splits: one rule, which the renderer and the records share."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from chameleon_jax import runway, splits
from chameleon_jax.errors import UserError


def test_splits_follow_the_seeds():
    expected = {
        0: "train",
        799_999: "train",
        800_000: "validation",
        899_999: "validation",
        900_000: "test",
        10**9: "test",
    }
    assert {seed: splits.split_of(seed) for seed in expected} == expected
    assert runway.split_of is splits.split_of
    with pytest.raises(UserError, match="seed is -1; expected 0 or more"):
        splits.split_of(-1)


def test_knowing_the_split_needs_nothing_of_the_renderer():
    program = (
        "import sys; from chameleon_jax import splits; "
        "assert not {'numba', 'jax', 'tensorflow_datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[1])

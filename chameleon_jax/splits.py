"""Which split a clip of the synthetic data belongs to: its seed decides.

The renderer (runway/) draws other garments for other splits, and the records (data/) are sorted by
them; neither needs the other for that.
"""

from __future__ import annotations

from chameleon_jax.errors import UserError

# First seed of each. The test split is never trained or tuned on.
SPLITS = {"train": 0, "validation": 800_000, "test": 900_000}


def split_of(seed: int) -> str:
    """The split of a seed: train below 800,000, validation below 900,000, test from there on.

    Raises:
      UserError: the seed is negative.
    """
    if seed < 0:
        raise UserError(f"seed is {seed}; expected 0 or more")
    found = "train"
    for name, first in SPLITS.items():
        if seed >= first:
            found = name
    return found

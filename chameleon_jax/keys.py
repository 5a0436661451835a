"""What every random number is for.

A random number comes from a key that is made of a seed, a purpose and an index, never from a
running generator. So a run that was stopped and resumed draws what the unbroken run would have
drawn, and no two uses share a number. The purposes of one table must differ from each other; those
of different tables meet different seeds or another generator.

    training    JAX, (config.seed, TRAINING purpose, step or index of a batch), then a LOSS draw
    data        NumPy, (config.seed, DATA purpose, step, ...)
    inference   JAX, (seed of the video, INFERENCE purpose), then the number of the chunk

The place of a name in a tuple, or its value in a dictionary, is its number: append only, or old
runs cannot be continued and old seeds give other videos.
"""

from __future__ import annotations

import jax
import numpy as np

from chameleon_jax.errors import UserError

MAX_SEED = 2**32 - 1  # a seed is an unsigned number of 32 bits

TRAINING = ("init", "loss", "preview", "eval", "critic")
LOSS = (  # draws within one loss
    "times",
    "noise",
    "history_noise",
    "reference_noise",
    "exits",
    "rollout",
    "before",
    "recycling",
    "kept_errors",
    "resampling",
    "changes",
)
DATA = {"order": 0, "replace": 1, "caption": 2, "batches": 3, "start": 4, "crop": 100}
INFERENCE = ("chunk_noise", "clip_noise", "random_frame")


class SeedError(UserError):
    """A seed is out of range. The message is one line."""


def check_seed(seed: int) -> int:
    """A seed as it is, if random numbers can be drawn from it.

    Raises:
      SeedError: it is not from 0 to `MAX_SEED`.
    """
    if not 0 <= seed <= MAX_SEED:
        raise SeedError(f"seed {seed}: expected 0 to {MAX_SEED}")
    return seed


def training_key(seed: int, purpose: str, index: int | jax.Array = 0) -> jax.Array:
    """Key of the `index`-th draw for one of `TRAINING`."""
    key = jax.random.fold_in(jax.random.key(seed), TRAINING.index(purpose))
    return jax.random.fold_in(key, index)


def loss_key(key: jax.Array, draw: str) -> jax.Array:
    """Key of one of the draws of `LOSS`, from the key of a step."""
    return jax.random.fold_in(key, LOSS.index(draw))


def data_rng(seed: int, purpose: str, *indices: int) -> np.random.Generator:
    """Random numbers for one of `DATA`, others for each step, slot, process and so on."""
    return np.random.default_rng([seed, DATA[purpose], *indices])


def inference_key(seed: int | jax.Array, purpose: str) -> jax.Array:
    """Key of a video for one of `INFERENCE`."""
    return jax.random.fold_in(jax.random.key(seed), INFERENCE.index(purpose))

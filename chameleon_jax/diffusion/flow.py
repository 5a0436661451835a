"""Flow matching: the noise schedule, and what clean sample, noise and velocity make of each other.

The path is rectified flow (Liu et al., arXiv 2209.03003; Lipman et al., arXiv 2210.02747) with the
timestep shift of Esser et al. (arXiv 2403.03206, section 5.3.2), as Wan 2.1 (arXiv 2503.20314) and
FashionChameleon (arXiv 2605.15824) use it:

    x_sigma = (1 - sigma) x0 + sigma noise
    v = d x_sigma / d sigma = noise - x0
    t = 1000 sigma

Time runs from noise (sigma 1, t 1000) down to the clean sample (sigma 0, t 0). Training draws sigma
from a table of 1000 rows whose last one is not zero; few-step sampling reads the same table;
many-step sampling has its own grids.

Axes: b batch, f latent frames, h w grid, c channels. A sigma or t is [], [b] or [b, f] where x is
[b, f, h, w, c]. Tables are computed in float64 NumPy and returned as float32.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

SHIFT = 5.0
ROWS = 1000
FEW_STEPS = (1000, 750, 500, 250)


def shift_sigma(sigma, shift: float = SHIFT):
    """sigma' = s sigma / (1 + (s - 1) sigma) (arXiv 2403.03206, eq. 23).

    More of the steps at high noise.

    Any array or number in [0, 1]; 0 and 1 stay where they are.
    """
    return shift * sigma / (1 + (shift - 1) * sigma)


def unshift_sigma(sigma, shift: float = SHIFT):
    """The inverse of `shift_sigma`: sigma = sigma' / (s - (s - 1) sigma')."""
    return sigma / (shift - (shift - 1) * sigma)


def _table(shift: float, n: int) -> np.ndarray:
    """The shifted table in float64."""
    return shift_sigma(np.linspace(1.0, 0.0, n + 1)[:-1], shift)


def sigma_table(shift: float = SHIFT, n: int = ROWS) -> np.ndarray:
    """Shifted sigmas of the training table, [n] float32.

    From 1 down to s / (n + s - 1), which is 0.00498 for shift 5 and 1000 rows: never 0.
    """
    return _table(shift, n).astype(np.float32)


def timesteps_table(shift: float = SHIFT, n: int = ROWS) -> np.ndarray:
    """Timesteps of the training table, [n] float32: t = 1000 sigma."""
    return (1000.0 * _table(shift, n)).astype(np.float32)


def nearest_row(t: jax.Array, shift: float = SHIFT, n: int = ROWS) -> jax.Array:
    """Index of the table row whose timestep is nearest to t, int32 in the shape of t.

    Of two as near, the noisier.
    """
    return jnp.argmin(
        jnp.abs(jnp.asarray(t, jnp.float32)[..., None] - timesteps_table(shift, n)), axis=-1
    )


def sigma_of(t: jax.Array, shift: float = SHIFT, n: int = ROWS) -> jax.Array:
    """Sigma of the table row nearest to t, float32 in the shape of t.

    The released code looks every sigma up this way, so t = 0 means sigma 0.00498 there. Where
    exactness is wanted, sigma = t / 1000 is the continuous form.
    """
    return jnp.asarray(sigma_table(shift, n))[nearest_row(t, shift, n)]


def expand(value_bf: jax.Array | float, x: jax.Array) -> jax.Array:
    """Bring a value per sample or frame to the rank of x, in float32.

    [], [b] or [b, f] gets axes of size 1 on the right.
    """
    value = jnp.asarray(value_bf, jnp.float32)
    return value.reshape(value.shape + (1,) * (x.ndim - value.ndim))


def add_noise(x0: jax.Array, noise: jax.Array, sigma: jax.Array | float) -> jax.Array:
    """x_sigma = (1 - sigma) x0 + sigma noise; computed in float32, returned in the dtype of x0."""
    s = expand(sigma, x0)
    return ((1 - s) * x0.astype(jnp.float32) + s * noise.astype(jnp.float32)).astype(x0.dtype)


def velocity(x0: jax.Array, noise: jax.Array) -> jax.Array:
    """v = noise - x0, what the network learns to predict."""
    return noise - x0


def x0_from_velocity(x_t: jax.Array, v: jax.Array, sigma: jax.Array | float) -> jax.Array:
    """x0 = x_sigma - sigma v; computed in float32, returned in the dtype of x_t."""
    return (x_t.astype(jnp.float32) - expand(sigma, x_t) * v.astype(jnp.float32)).astype(x_t.dtype)


def velocity_from_x0(x_t: jax.Array, x0: jax.Array, sigma: jax.Array | float) -> jax.Array:
    """v = (x_sigma - x0) / sigma, for sigma > 0.

    Computed in float32, returned in the dtype of x_t.
    """
    return ((x_t.astype(jnp.float32) - x0.astype(jnp.float32)) / expand(sigma, x_t)).astype(
        x_t.dtype
    )


def training_weights(shift: float = SHIFT, n: int = ROWS) -> np.ndarray:
    """Loss weight of each table row, [n] float32.

    A bell exp(-2 ((t - 500) / 1000)^2), lowered to touch 0, of mean 1.

    0 at t = 1000, at most 2.076 near t = 500, 0.032 at the last row (for 5 and 1000).
    """
    bell = np.exp(-2 * ((1000.0 * _table(shift, n) - 500) / 1000) ** 2)
    bell -= bell.min()
    return (bell * (n / bell.sum())).astype(np.float32)


def training_weight_of(t: jax.Array, shift: float = SHIFT, n: int = ROWS) -> jax.Array:
    """Loss weight of the table row nearest to t, float32 in the shape of t."""
    return jnp.asarray(training_weights(shift, n))[nearest_row(t, shift, n)]


def few_step_timesteps(
    steps: Sequence[int] = FEW_STEPS, shift: float = SHIFT, n: int = ROWS
) -> np.ndarray:
    """Timesteps of the few-step sampler, [len(steps)] float32.

    A step counts rows from the end of the table.

    (1000, 750, 500, 250) gives t = 1000, 937.5, 833.33, 625.

    Raises:
      ValueError: if the steps do not fall from at most n to at least 1.
    """
    rows = [n - step for step in steps]
    if not rows or rows[0] < 0 or rows[-1] >= n or any(a >= b for a, b in itertools.pairwise(rows)):
        raise ValueError(
            f"denoising steps {tuple(steps)} must fall strictly, from at most {n} to at least 1"
        )
    return timesteps_table(shift, n)[np.array(rows)]


def round_timesteps(t: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Timesteps as the released network sees them, float32.

    They are cast to its working dtype, then cut to an integer.

    1000, 937.5, 833.33, 625 become 1000, 936, 832, 624 in bfloat16 and 1000, 937, 833, 625 in
    float32. Only what the network reads is rounded; noising and x0 use the exact value.
    """
    return jnp.trunc(jnp.asarray(t).astype(dtype).astype(jnp.float32))


def euler_sigmas(n: int, shift: float = SHIFT) -> np.ndarray:
    """Grid of a plain ODE solver with n steps, [n + 1] float32.

    An even grid from 1 to exactly 0, shifted.

    Raises:
      ValueError: if n < 1.
    """
    if n < 1:
        raise ValueError(f"a sampler needs at least one step, got {n}")
    return shift_sigma(np.linspace(1.0, 0.0, n + 1), shift).astype(np.float32)


def euler_step(
    x: jax.Array, v: jax.Array, sigma: jax.Array | float, sigma_next: jax.Array | float
) -> jax.Array:
    """x + (sigma_next - sigma) v: one step along the straight line.

    Computed in float32, returned in the dtype of x.
    """
    step = expand(sigma_next, x) - expand(sigma, x)
    return (x.astype(jnp.float32) + step * v.astype(jnp.float32)).astype(x.dtype)


def draw_timesteps(
    key: jax.Array,
    batch: int,
    frames: int,
    block: int | None = None,
    shift: float = SHIFT,
    n: int = ROWS,
    copies: int = 1,
) -> jax.Array:
    """Training timesteps, uniform over the rows of the table: t_bf float32.

    Args:
      key: PRNG key.
      batch: number of samples.
      frames: number of latent frames (context not counted).
      block: None draws one per sample, shared by its frames (bidirectional training); an int draws
        one per block of that many frames (teacher forcing).
      shift: shift of the table.
      n: rows of the table.
      copies: noisy copies of the frames, behind each other; those of a frame get one timestep from
        each of `copies` equal parts of the table, in random order.

    Returns:
      [batch, copies frames]

    Raises:
      ValueError: if `block` does not divide `frames`.
    """
    size = frames if block is None else block
    if size < 1 or frames % size:
        raise ValueError(f"{frames} latent frames cannot be cut into blocks of {size}")
    blocks = frames // size
    if copies == 1:
        rows = jax.random.randint(key, (batch, blocks), 0, n)
    else:
        key_part, key_place = jax.random.split(key)
        part = jnp.argsort(jax.random.uniform(key_part, (batch, copies, blocks)), axis=1)
        place = jax.random.uniform(key_place, part.shape)
        rows = jnp.floor((part + place) * (n / copies)).astype(jnp.int32)
        rows = jnp.minimum(rows, n - 1).reshape(batch, copies * blocks)
    return jnp.repeat(jnp.asarray(timesteps_table(shift, n))[rows], size, axis=1)

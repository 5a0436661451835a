"""UniPC: a multistep predictor-corrector for the flow ODE, of order 2, that predicts x0.

Zhao et al., "UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion Models"
(arXiv 2302.04867), in the data-prediction form with B2(h) = expm1(-h): the solver of Wan 2.1 (arXiv
2503.20314). For the flow path,

    a = 1 - sigma,   lambda = log a - log sigma,   m = x - sigma v    (the predicted x0).

Every update is a linear combination of the sample and of the last three m, with weights that depend
on the grid alone. So the weights of all steps are worked out once, in float64 (`unipc_table`), and
a step (`unipc_step`) is two such sums: first the corrector moves the sample it was given, then the
predictor leaves for the next sigma. The step is the same code for every k, hence one trace under
`jax.lax.scan`.

The model runs once a step, on the predicted sample; m is not computed again after the correction.

Axes: n steps; samples of any shape.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from chameleon_jax.diffusion import flow


class UniPcTable(NamedTuple):
    """The weights of n steps; a pytree, so that a scan can walk over its rows."""

    sigma: np.ndarray  # [n] noise level of the sample that enters step k
    timestep: np.ndarray  # [n] for the network
    correct: np.ndarray  # [n, 5] weights of (x_k, y, m_k, m_(k-1), m_(k-2)) in the corrected x_k
    predict: np.ndarray  # [n, 3] weights of (corrected x_k, m_k, m_(k-1)) in x_(k+1)


# Where the original grid starts before the shift. The original keeps it in float32, and with shift
# 1 that matters: 1000 sigma falls on whole numbers, and from 0.999 itself it would fall just below
# some of them.
WAN_START = float(np.float32(0.999))


class UniPcState(NamedTuple):
    """What step k needs of the past, in float32 (float64 for float64 samples)."""

    y: jax.Array  # the corrected sample that entered the last predictor
    m1: jax.Array  # m_(k-1)
    m2: jax.Array  # m_(k-2)


def unipc_sigmas(n: int, shift: float = flow.SHIFT) -> np.ndarray:
    """Grid of the original Wan sampler, [n + 1] float64: linspace(0.999, 0, n + 1), shifted.

    The last is exactly 0.

    Raises:
      ValueError: if n < 1.
    """
    return flow.shift_sigma(np.linspace(WAN_START, 0.0, _steps(n) + 1), shift)


def diffusers_sigmas(n: int, shift: float = flow.SHIFT) -> np.ndarray:
    """Grid of diffusers' UniPC with flow sigmas, [n + 1] float64.

    linspace(1, 0.001, n + 1)[:-1], shifted; then 0.

    The first sigma is 1e-6 short of 1, where lambda would be infinite. The values are those that
    float32 can hold, as in
    diffusers: so near to 1 the rounding changes lambda by percents.

    Raises:
      ValueError: if n < 1.
    """
    sigmas = flow.shift_sigma(np.linspace(1.0, 0.001, _steps(n) + 1)[:-1], shift)
    sigmas[0] -= 1e-6
    return np.append(sigmas, 0.0).astype(np.float32).astype(np.float64)


GRIDS = {"wan": unipc_sigmas, "diffusers": diffusers_sigmas}


def _steps(n: int) -> int:
    if n < 1:
        raise ValueError(f"a sampler needs at least one step, got {n}")
    return n


def unipc_timesteps(sigmas: np.ndarray) -> np.ndarray:
    """Timesteps for the network at each step, [n] float32.

    floor(1000 sigma) of all but the last sigma.
    """
    return np.floor(1000 * np.asarray(sigmas[:-1], np.float64)).astype(np.float32)


def unipc_table(sigmas: np.ndarray, order: int = 2) -> UniPcTable:
    """Weights of all steps on a grid.

    Args:
      sigmas: [n + 1], falling strictly, the first below 1, the last 0 or above.
      order: 1 or 2. The first step, and the last one of a grid that ends at 0, always have order 1.

    Returns:
      The table, float64.

    Raises:
      ValueError: if the grid or the order is not as above.
    """
    s = np.asarray(sigmas, np.float64)
    if s.ndim != 1 or len(s) < 2 or not (np.diff(s) < 0).all() or s[0] >= 1 or s[-1] < 0:
        raise ValueError(
            "sigmas must fall strictly from below 1 to 0 or above, and be at least two"
        )
    if order not in (1, 2):
        raise ValueError(f"order {order} is not available; expected 1 or 2")
    n = len(s) - 1
    a = 1 - s
    with np.errstate(divide="ignore"):
        lam = np.log(a) - np.log(s)  # infinite at sigma 0, where expm1(-h) is -1
    correct, predict = np.zeros((n, 5)), np.zeros((n, 3))
    for k in range(n):
        correct[k] = (
            (1, 0, 0, 0, 0) if k == 0 else _corrector(s, a, lam, k, _order(k - 1, s, order))
        )
        predict[k] = _predictor(s, a, lam, k, _order(k, s, order))
    return UniPcTable(s[:-1], unipc_timesteps(s), correct, predict)


def add_idle_row(table: UniPcTable) -> UniPcTable:
    """One row more, at sigma and t 0, whose step leaves the sample as it is.

    It makes a last pass over the clean sample one more step of the loop.
    """
    idle = UniPcTable(*map(np.array, (0.0, 0.0, (1.0, 0.0, 0.0, 0.0, 0.0), (1.0, 0.0, 0.0))))
    return jax.tree.map(lambda column, last: np.concatenate([column, last[None]]), table, idle)


def _order(k: int, s: np.ndarray, order: int) -> int:
    """Order of the predictor of step k: as many past m as there are.

    Order 1 for the step that lands on sigma 0.
    """
    return 1 if s[k + 1] == 0 else min(order, k + 1)


def _predictor(s: np.ndarray, a: np.ndarray, lam: np.ndarray, k: int, order: int) -> np.ndarray:
    """UniP: weights of (x_k, m_k, m_(k-1)).

    x_(k+1) = (s_(k+1) / s_k) x_k - a_(k+1) P m_k - a_(k+1) P (m_(k-1) - m_k) / (2 r)
    """
    h = lam[k + 1] - lam[k]
    p = a[k + 1] * np.expm1(-h)
    past = 0.0 if order == 1 else p * h / (2 * (lam[k - 1] - lam[k]))
    return np.array([s[k + 1] / s[k], -p + past, -past])


def _corrector(s: np.ndarray, a: np.ndarray, lam: np.ndarray, k: int, order: int) -> np.ndarray:
    """UniC of the step that led from k-1 to k: weights of (x_k, y, m_k, m_(k-1), m_(k-2)).

    The sample that was predicted is replaced altogether: its weight is 0.

    x_k = (s_k / s_(k-1)) y - a_k P m_(k-1) - a_k P (c0 (m_(k-2) - m_(k-1)) / r + c1 (m_k -
    m_(k-1))), with c from [[1, 1], [r, 1]] c = (phi_1, phi_2), the two exponential integrals over
    B(h) = P = expm1(-h).
    """
    h = lam[k] - lam[k - 1]
    expm1 = np.expm1(-h)
    p = a[k] * expm1
    if order == 1:
        return np.array([0.0, s[k] / s[k - 1], -p / 2, -p / 2, 0.0])
    r = (lam[k - 2] - lam[k - 1]) / h
    phi = expm1 / -h - 1
    c0, c1 = np.linalg.solve([[1.0, 1.0], [r, 1.0]], [phi / expm1, 2 * (phi / -h - 0.5) / expm1])
    return np.array([0.0, s[k] / s[k - 1], -p * c1, -p * (1 - c0 / r - c1), -p * c0 / r])


def unipc_init(x: jax.Array) -> UniPcState:
    """The state before step 0, for samples like x.

    Three arrays, not one array three times, so that they may be donated.
    """
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    return UniPcState(*(jnp.zeros(x.shape, dtype) for _ in UniPcState._fields))


def unipc_step(
    row: UniPcTable, state: UniPcState, x: jax.Array, v: jax.Array
) -> tuple[jax.Array, UniPcState]:
    """One step: correct the sample with the new evaluation, then predict the next one.

    Args:
      row: one row of the table (`jax.tree.map(lambda a: a[k], table)`, or what a scan hands out).
      state: the past.
      x: x_k as the last predictor left it (the initial noise for k = 0).
      v: velocity of the network at x.

    Returns:
      x_(k+1) in the dtype of x (after the last step of a grid that ends at 0: the clean sample),
      and the new state.
    """
    dtype = state.y.dtype
    sigma, correct, predict = (jnp.asarray(w, dtype) for w in (row.sigma, row.correct, row.predict))
    x_k = x.astype(dtype)
    m = x_k - sigma * v.astype(dtype)
    y = (
        correct[0] * x_k
        + correct[1] * state.y
        + correct[2] * m
        + correct[3] * state.m1
        + correct[4] * state.m2
    )
    x_next = predict[0] * y + predict[1] * m + predict[2] * state.m1
    return x_next.astype(x.dtype), UniPcState(y, m, state.m1)

"""Many-step sampling of whole clips with a bidirectional model and classifier-free guidance.

The teacher of FashionChameleon (arXiv 2605.15824) and plain Wan2.2 are sampled alike. A model is
any callable v = model(x_bfhwc, t_bf), with text, positions and clean condition frames already
bound to it (models/dit.py, `bidirectional_forward`), e.g.

    model = guided(partial(forward, text=prompt), partial(forward, text=negative), scale=3.0)
    for row in rows: x, state = step_unipc(model, row, x, state)

Axes: b batch, f latent frames, h w latent grid, c channels.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from chameleon_jax.diffusion import flow
from chameleon_jax.diffusion.unipc import UniPcState, UniPcTable, unipc_step

Model = Callable[[jax.Array, jax.Array], jax.Array]

# The negative prompt of Wan 2.1 and of every stage of FashionChameleon.
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，"
    "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，"
    "背景人很多，倒着走"
)


def guidance(v_cond: jax.Array, v_uncond: jax.Array, scale: float | jax.Array) -> jax.Array:
    """Classifier-free guidance (Ho & Salimans, arXiv 2207.12598).

    v = v_uncond + scale (v_cond - v_uncond): scale 1 is the conditional prediction, 0 the
    unconditional one. x0 predictions may be guided with the same formula: at a given sample they
    are linear in v.
    """
    return v_uncond + scale * (v_cond - v_uncond)


def guided(model_cond: Model, model_uncond: Model, scale: float | jax.Array) -> Model:
    """A model that calls both and guides."""

    def model(x: jax.Array, t_bf: jax.Array) -> jax.Array:
        return guidance(model_cond(x, t_bf), model_uncond(x, t_bf), scale)

    return model


def _per_frame(t: jax.Array, x: jax.Array) -> jax.Array:
    """One timestep for every frame: t_bf float32."""
    return jnp.full(x.shape[:2], t, jnp.float32)


def step_unipc(
    model: Model, row: UniPcTable, x: jax.Array, state: UniPcState
) -> tuple[jax.Array, UniPcState]:
    """One step from noise to clean latents with UniPC.

    Args:
      model: v = model(x_bfhwc, t_bf).
      row: one row of the table from `unipc.unipc_table`.
      x: the sample [b, f, h, w, c]; the noise in the first step.
      state: from `unipc.unipc_init`, then from the step before.

    Returns:
      The sample and the state for the next step.
    """
    return unipc_step(row, state, x, model(x, _per_frame(row.timestep, x)))


def sample_euler(model: Model, noise: jax.Array, sigmas: np.ndarray) -> jax.Array:
    """Integrate from noise to clean latents with Euler steps; the model is traced once.

    Args:
      model: v = model(x_bfhwc, t_bf); it is given t = 1000 sigma.
      noise: [b, f, h, w, c] standard normal.
      sigmas: the grid [steps + 1] from `flow.euler_sigmas`.

    Returns:
      Clean latents in the shape and dtype of `noise`.
    """

    def step(x: jax.Array, pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        sigma, sigma_next = pair
        v = model(x, _per_frame(1000 * sigma, x))
        return flow.euler_step(x, v, sigma, sigma_next), None

    grid = jnp.asarray(sigmas, jnp.float32)
    x, _ = jax.lax.scan(step, noise, (grid[:-1], grid[1:]))
    return x

"""Many-step sampling of whole clips with a bidirectional model and classifier-free guidance.

The teacher of FashionChameleon (arXiv 2605.15824) and plain Wan2.2 are sampled by the same loop:
the first has clean condition frames in front of the video, at t = 0 and put back at every step;
text-to-video has none, and image-to-video has one, the first frame of the clip itself.

A model is any callable v = model(x_bfhwc, t_bf), with text and positions already bound to it, e.g.

    model = guided(partial(forward, text=prompt), partial(forward, text=negative), scale=3.0)
    latents = sample_unipc(model, noise, unipc_table(unipc_sigmas(50)), context=z_context)

Axes: b batch, f latent frames, h w latent grid, c channels.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from chameleon_jax.diffusion import flow
from chameleon_jax.diffusion.unipc import UniPcState, UniPcTable, unipc_init, unipc_step

Model = Callable[[jax.Array, jax.Array], jax.Array]

# The negative prompt of Wan 2.1 and of every stage of FashionChameleon.
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，"
    "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，"
    "背景人很多，倒着走"
)


def guidance(v_cond: jax.Array, v_uncond: jax.Array, scale: float | jax.Array) -> jax.Array:
    """Classifier-free guidance (Ho & Salimans, arXiv 2207.12598): v = v_uncond + scale (v_cond -
    v_uncond).

    Scale 1 is the conditional prediction, 0 the unconditional one. x0 predictions may be guided
    with the same formula: at a given sample they are linear in v.
    """
    return v_uncond + scale * (v_cond - v_uncond)


def guided(model_cond: Model, model_uncond: Model, scale: float) -> Model:
    """A model that calls both and guides. With scale 1 the unconditional one is never called."""
    if scale == 1.0:
        return model_cond
    return lambda x, t: guidance(model_cond(x, t), model_uncond(x, t), scale)


def with_context(model: Model, context: jax.Array | None) -> Model:
    """The velocity of the video frames alone: clean context frames go in front at t = 0, and their
    velocity is dropped.

    Args:
      model: v = model(x_bfhwc, t_bf) over context and video.
      context: clean latents [b, c, h, w, channels] of the context frames, or None.
    """
    if context is None:
        return model
    frames = context.shape[1]

    def video_only(x: jax.Array, t: jax.Array) -> jax.Array:
        clean = jnp.zeros((x.shape[0], frames), t.dtype)
        joined = jnp.concatenate([context.astype(x.dtype), x], axis=1)
        return model(joined, jnp.concatenate([clean, t], axis=1))[:, frames:]

    return video_only


def _per_frame(t: jax.Array, x: jax.Array) -> jax.Array:
    """One timestep for every frame: t_bf float32."""
    return jnp.full(x.shape[:2], t, jnp.float32)


def step_unipc(
    model: Model, row: UniPcTable, x: jax.Array, state: UniPcState
) -> tuple[jax.Array, UniPcState]:
    """One step of the loop below, for those who go through the table themselves.

    Args:
      model: v = model(x_bfhwc, t_bf); sees the frames of x.
      row: one row of the table.
      x: the sample [b, f, h, w, c]; the noise in the first step.
      state: from `unipc.unipc_init`, then from the step before.

    Returns:
      The sample and the state for the next step.
    """
    return unipc_step(row, state, x, model(x, _per_frame(row.timestep, x)))


def sample_unipc(
    model: Model, noise: jax.Array, table: UniPcTable, context: jax.Array | None = None
) -> jax.Array:
    """Integrate from noise to clean latents with UniPC; the model is traced once.

    Args:
      model: v = model(x_bfhwc, t_bf); sees context and video frames.
      noise: [b, f, h, w, c] standard normal, the video frames only.
      table: the steps, from `unipc.unipc_table`.
      context: clean latents [b, frames, h, w, c] to put in front at t = 0 at every step, or None.

    Returns:
      Clean latents of the video frames, in the shape and dtype of `noise`.
    """
    predict = with_context(model, context)

    def step(carry, row):
        return step_unipc(predict, row, *carry), None

    rows = jax.tree.map(jnp.asarray, table)
    (x, _), _ = jax.lax.scan(step, (noise, unipc_init(noise)), rows)
    return x


def sample_euler(
    model: Model, noise: jax.Array, sigmas: np.ndarray, context: jax.Array | None = None
) -> jax.Array:
    """Integrate from noise to clean latents with Euler steps; the model is told t = 1000 sigma and
    traced once.

    Args:
      model: v = model(x_bfhwc, t_bf); sees context and video frames.
      noise: [b, f, h, w, c] standard normal, the video frames only.
      sigmas: the grid [steps + 1] from `flow.euler_sigmas`.
      context: clean latents [b, frames, h, w, c] to put in front at t = 0 at every step, or None.

    Returns:
      Clean latents of the video frames, in the shape and dtype of `noise`.
    """
    predict = with_context(model, context)

    def step(x, pair):
        sigma, sigma_next = pair
        return flow.euler_step(x, predict(x, _per_frame(1000 * sigma, x)), sigma, sigma_next), None

    grid = jnp.asarray(sigmas, jnp.float32)
    x, _ = jax.lax.scan(step, noise, (grid[:-1], grid[1:]))
    return x

"""What a generated clip looks like in numbers, to be held against a true one.

Distillation fails in a few ways that the loss does not show: clips stand still, colours run over,
everything turns into one colour. Each has a measure here; docs/training_diagnosis.md says what
their curves look like. Pure functions, which can be traced.

Axes: b batch, t pixel frames, f latent frames, h w grid, c channels.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

SMALLEST = 1e-6  # a clip with less than this of something gives no ratio


def motion(x_bthwc: jax.Array) -> jax.Array:
    """Root of the temporal difference energy, [b, t - 1], in units of x; also for latents.

    From frame to frame the root mean square, over h, w and c, of what changes.
    """
    x = x_bthwc.astype(jnp.float32)
    return jnp.sqrt(jnp.square(x[:, 1:] - x[:, :-1]).mean(axis=(2, 3, 4)))


def colourfulness(rgb_bthwc: jax.Array) -> jax.Array:
    """M3 of Hasler and Suesstrunk (Measuring colourfulness in natural images, 2003), [b, t].

    Args:
      rgb_bthwc: RGB, 0 to 255.

    Returns:
      0 for grey; about 15 is slightly, 60 quite, 110 extremely colourful.
    """
    red, green, blue = jnp.moveaxis(rgb_bthwc.astype(jnp.float32), -1, 0)
    opponents = jnp.stack([red - green, (red + green) / 2 - blue])
    spread, mean = opponents.std(axis=(-2, -1)), opponents.mean(axis=(-2, -1))
    return _length(spread) + 0.3 * _length(mean)


def contrast(x_bthwc: jax.Array) -> jax.Array:
    """Standard deviation within a frame, [b, t], in units of x; 0 for a flat one.

    Root mean square over the channels of their deviations over h and w.
    """
    return jnp.sqrt(x_bthwc.astype(jnp.float32).var(axis=(2, 3)).mean(axis=-1))


def frame_measures(pixels_bthwc: jax.Array) -> dict[str, jax.Array]:
    """`contrast` and `colour` of each frame [b, t], and `motion` between frames [b, t - 1].

    Args:
      pixels_bthwc: RGB, 0 to 255.
    """
    return {
        "motion": motion(pixels_bthwc),
        "colour": colourfulness(pixels_bthwc),
        "contrast": contrast(pixels_bthwc),
    }


def latent_measures(z_made: jax.Array, z_true: jax.Array) -> dict[str, jax.Array]:
    """How far latents [b, f, h, w, c] are from true ones, float32 scalars.

    Returns:
      latent_mean, latent_std: of all of them.
      latent_shift: root mean square over the channels of how far their means are from the data's,
        in standard deviations of the data's channel.
      latent_std_ratio: geometric mean over the channels of deviation / the data's deviation.
      nonfinite: share of numbers that are NaN or infinite.
    """
    finite = jnp.isfinite(z_made)
    made = jnp.where(finite, z_made, 0).astype(jnp.float32)
    (mean, std), (true_mean, true_std) = channel_statistics(made), channel_statistics(z_true)
    safe = jnp.maximum(true_std, SMALLEST)
    return {
        "latent_mean": made.mean(),
        "latent_std": made.std(),
        "latent_shift": jnp.sqrt(jnp.square((mean - true_mean) / safe).mean()),
        "latent_std_ratio": jnp.exp(jnp.log(jnp.maximum(std, SMALLEST) / safe).mean()),
        "nonfinite": (~finite).mean(dtype=jnp.float32),  # 0 to the bit if all are finite
    }


def channel_statistics(z_bfhwc: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation of each channel, [c] float32."""
    z = z_bfhwc.astype(jnp.float32)
    return z.mean(axis=(0, 1, 2, 3)), z.std(axis=(0, 1, 2, 3))


def compare(
    made: Mapping[str, np.ndarray],
    true: Mapping[str, np.ndarray],
    *,
    first: int = 0,
    last: int = 0,
) -> dict[str, float]:
    """Means of frame measures, and their ratios to those of true clips.

    Args:
      made: `frame_measures` of generated clips.
      true: those of true clips, as many and as long.
      first: pixel frames of the first chunk, which is then also compared on its own.
      last: those of the last one. Clips that are not longer than one of them have no such parts.

    Returns:
      NAME and NAME_ratio of every measure; first/NAME_ratio and last/NAME_ratio. A measure that
      does not exist (motion of one frame) is left out, and a ratio to next to nothing (motion of
      data that stand still).
    """
    found: dict[str, float] = {}
    for name, values in made.items():
        if not values.size:
            continue
        found[name] = float(values.mean())
        parts, frames = {"": slice(None)}, true["contrast"].shape[1]
        if 0 < first < frames and 0 < last < frames:
            skipped = frames - values.shape[1]  # the first frame has no motion
            parts |= {"first/": slice(0, first - skipped), "last/": slice(-last, None)}
        for part, chosen in parts.items():
            data = float(true[name][:, chosen].mean())
            if data > SMALLEST:
                found[f"{part}{name}_ratio"] = float(values[:, chosen].mean()) / data
    return found


def _length(pair: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.square(pair).sum(axis=0))

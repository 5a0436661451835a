"""What training a VAE needs beyond the network, as pure functions; the stage is in `vae`.

Its loss, its start from a network of pictures, and the statistics of its latents.

A picture meets only the last tap of the causal convolutions and none of the layers that change the
number of frames, so it trains quickly. `inflate` turns a network that has seen pictures only into
one that treats each latent frame of a clip alone, from which clips are learnt in a fraction of the
time that they need from scratch.

Axes: b batch, t pixel frames, f latent frames, h w grid, c channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from chameleon_jax.data.labels import GARMENT, HEAD
from chameleon_jax.models.vae import Vae, VaeConfig
from chameleon_jax.sharding import to_host

PEAK = 2.0  # distance from black to white; pixels are in [-1, 1]


@dataclasses.dataclass(frozen=True)
class LossWeights:
    """Weights of the parts of the loss.

    Each part is a mean, so that none depends on the size of the batch.
    """

    l1: float = 1.0  # absolute error of the pixels
    l2: float = 0.0  # squared error of the pixels: what PSNR counts
    gradient: float = 0.25  # absolute error of the differences of neighbouring pixels: edges
    laplacian: float = 0.0  # absolute error of the bands of a Laplacian pyramid: every scale
    kl: float = 1e-6  # divergence of the posterior from the unit normal
    # A pixel of the garment, or of the head, counts so many times as one of anything else. Other
    # than 1 they need labels.
    garment: float = 1.0
    head: float = 1.0

    @property
    def focused(self) -> bool:
        """Whether some pixels count more than others."""
        return (self.garment, self.head) != (1, 1)


def loss(
    vae: Vae,
    batch_bthwc: jax.Array,
    key: jax.Array,
    weights: LossWeights,
    *,
    labels_bthw: jax.Array | None = None,
    encoder: bool = True,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Loss of a variational auto-encoder (arXiv 1312.6114), with one draw from the posterior.

    Args:
      vae: the network.
      batch_bthwc: float pixels in [-1, 1]; t = 1 for pictures, else `temporal_factor` k + 1.
      key: of the draw.
      weights: of the parts.
      labels_bthw: what each pixel shows, see `chameleon_jax.data.labels`.
      encoder: False trains the decoder alone, on the posterior's means: what was trained on the
        latents stays valid.

    Returns:
      The weighted sum, and its parts before weighting with `psnr`, in dB, of all pixels of the
      batch after clamping; with labels `psnr_garment` and `psnr_head`, too.
    """
    mean, logvar = vae.encode_moments(batch_bthwc)
    z = sample_posterior(mean, logvar, key) if encoder else jax.lax.stop_gradient(mean)
    x = batch_bthwc.astype(jnp.float32)
    counts = pixel_weights(labels_bthw, weights, x.shape[:-1])
    error = decode_unscaled(vae, z) - x
    parts = {
        "l1": weighted_mean(jnp.abs(error), counts),
        "l2": weighted_mean(jnp.square(error), counts),
        "gradient": gradient_error(error, counts),
        "laplacian": laplacian_error(error),
        "kl": kl_to_normal(mean, logvar) if encoder else jnp.zeros(()),
    }
    total = sum(getattr(weights, name) * part for name, part in parts.items())
    clamped = jnp.clip(error + x, -1, 1) - x
    parts["psnr"] = psnr(clamped)
    if labels_bthw is not None:
        for name, label in (("garment", GARMENT), ("head", HEAD)):
            shown = (labels_bthw == label)[..., None].astype(jnp.float32)
            parts[f"psnr_{name}"] = psnr(clamped, shown)
    return total, parts


def pixel_weights(
    labels_bthw: jax.Array | None, weights: LossWeights, shape_bthw: Sequence[int]
) -> jax.Array:
    """How much each pixel counts, [b, t, h, w, 1]; of mean 1.

    Raises:
      ValueError: the weights ask for labels, and there are none.
    """
    if labels_bthw is None:
        if weights.focused:
            raise ValueError("loss.garment and loss.head need labels; set data.labels=('labels',)")
        return jnp.ones((*shape_bthw, 1), jnp.float32)
    counts = jnp.where(labels_bthw == GARMENT, weights.garment, 1.0)
    counts = jnp.where(labels_bthw == HEAD, weights.head, counts)[..., None]
    return counts / counts.mean()


def weighted_mean(values_bthwc: jax.Array, weights_bthw1: jax.Array) -> jax.Array:
    """The mean of values over pixels that count differently; the weights have the mean 1."""
    return (values_bthwc * weights_bthw1).mean()


def sample_posterior(mean: jax.Array, logvar: jax.Array, key: jax.Array) -> jax.Array:
    """A draw from the normal distribution with these moments."""
    return mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)


def decode_unscaled(vae: Vae, z_bfhwc: jax.Array) -> jax.Array:
    """Pixels of latents as the encoder makes them, before scaling.

    They are not clamped, so that every pixel has a gradient.
    """
    mean, std = jnp.array(vae.config.latent_mean), jnp.array(vae.config.latent_std)
    return vae.decode((z_bfhwc - mean) / std, clamp=False)


def kl_to_normal(mean: jax.Array, logvar: jax.Array) -> jax.Array:
    """Mean over all latent numbers of KL(N(mean, exp(logvar)), N(0, 1)).

    That is (mean^2 + exp(logvar) - 1 - logvar) / 2 (arXiv 1312.6114, appendix B).
    """
    return 0.5 * (jnp.square(mean) + jnp.exp(logvar) - 1 - logvar).mean()


def gradient_error(error_bthwc: jax.Array, weights_bthw1: jax.Array | None = None) -> jax.Array:
    """Mean absolute error of the differences from row to row plus that from column to column.

    Args:
      error_bthwc: of the pixels.
      weights_bthw1: how much each pixel counts; a difference counts as its first pixel does.
    """
    total = jnp.zeros((), jnp.float32)
    for axis in (2, 3):
        differences = jnp.abs(jnp.diff(error_bthwc, axis=axis))
        if weights_bthw1 is not None:
            size = weights_bthw1.shape[axis] - 1
            differences *= jax.lax.slice_in_dim(weights_bthw1, 0, size, axis=axis)
        total += differences.mean()
    return total


def laplacian_error(error_bthwc: jax.Array, levels: int = 4) -> jax.Array:
    """Mean absolute error summed over the bands of a Laplacian pyramid (Lap1, arXiv 1707.05776).

    The pyramid is linear, so that of the error is the difference of the two. Band j is what
    averaging 2x2 pixels takes away at level j; the last one is what remains. A level whose sides
    are odd is not halved any more.
    """
    total = jnp.zeros((), jnp.float32)
    for _ in range(levels):
        b, t, h, w, c = error_bthwc.shape
        if h % 2 or w % 2:
            break
        squares = error_bthwc.reshape(b, t, h // 2, 2, w // 2, 2, c)
        coarse = squares.mean(axis=(3, 5), keepdims=True)
        total += jnp.abs(squares - coarse).mean()
        error_bthwc = coarse.reshape(b, t, h // 2, w // 2, c)
    return total + jnp.abs(error_bthwc).mean()


def psnr(error_bthwc: jax.Array, weights_bthw1: jax.Array | None = None) -> jax.Array:
    """Peak signal-to-noise ratio in dB, of all pixels or of those that have weight."""
    squared = jnp.square(error_bthwc).mean(-1, keepdims=True)
    if weights_bthw1 is None:
        return 10 * jnp.log10(PEAK**2 / squared.mean())
    mean = (squared * weights_bthw1).sum() / jnp.maximum(weights_bthw1.sum(), 1)
    return 10 * jnp.log10(PEAK**2 / jnp.maximum(mean, 1e-6))  # finite where nothing has weight


def inflate(params: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Parameters of a network for clips, from those of a network of pictures.

    The latter may have been trained, or be yet to train.

    Causal convolutions keep their last tap only. The layer that halves time becomes the mean of two
    frames, that which doubles it shows each frame twice. Then a clip is treated like this:

    - decoding: the last frame of each latent frame is exactly the picture that this latent frame is
      alone; so are the other frames of the group, if no stage changes width and time together (as
      in Wan2.2);
    - encoding: each latent frame comes from its own pixel frames only, the first from its one frame
      as a picture. The others differ a little from pictures, because the averaging shortcuts pair a
      first frame with an empty one.

    Args:
      params: arrays by parameter path, as in `weights.flat_params`.

    Returns:
      The same names and shapes; biases of the layers that change time are zero.
    """

    def change(name: str, x: jax.Array) -> jax.Array:
        if name.endswith("time_conv.bias"):
            return jnp.zeros_like(x)
        if name.endswith("time_conv.kernel"):
            inputs, outputs = x.shape[-2:]
            same = jnp.tile(jnp.eye(inputs, dtype=x.dtype), outputs // inputs)
            taps = (0, 0.5, 0.5) if inputs == outputs else (0, 0, 1)
            return jnp.stack([tap * same for tap in taps])[:, None, None]
        return x.at[:-1].set(0) if x.ndim == 5 else x

    return {name: change(name, x) for name, x in params.items()}


def latent_statistics(
    vae: Vae, batches: Iterable[np.ndarray | jax.Array]
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel of the encoder's means, before scaling.

    Args:
      vae: the network; what its config says about the statistics does not matter.
      batches: float pixels [b, t, h, w, 3] in [-1, 1]; every latent pixel counts the same.

    Returns:
      Two float64 arrays [z_dim], summed up in float64.

    Raises:
      ValueError: there is no batch.
    """
    graph, params = nnx.split(vae)
    encode = jax.jit(lambda params, x: nnx.merge(graph, params).encode_moments(x)[0])
    count, total, squares = 0, 0.0, 0.0
    for batch in batches:
        z = to_host(encode(params, batch)).astype(np.float64).reshape(-1, vae.config.z_dim)
        count, total, squares = count + len(z), total + z.sum(0), squares + np.square(z).sum(0)
    if not count:
        raise ValueError("no batches to measure the latents on; expected at least one")
    mean = total / count
    return mean, np.sqrt(np.maximum(squares / count - mean**2, 0))


def with_statistics(config: VaeConfig, mean: np.ndarray, std: np.ndarray) -> VaeConfig:
    """The config whose VAE hands out latents of about mean 0 and standard deviation 1.

    Raises:
      ValueError: a channel has no spread; it has died in training.
    """
    dead = np.flatnonzero(np.asarray(std) < 1e-6)
    if dead.size:
        raise ValueError(
            f"latent channels {dead.tolist()} are constant; train again with a smaller weight of kl"
        )
    return dataclasses.replace(
        config,
        latent_mean=tuple(round(float(x), 6) for x in mean),
        latent_std=tuple(round(float(x), 6) for x in std),
    )

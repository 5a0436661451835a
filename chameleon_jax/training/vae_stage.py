"""The VAE, trained from scratch: single pictures first, then clips.

    loss = l1 * mean |y - x|  +  gradient * mean |grad y - grad x|  +  kl * KL(posterior, unit normal)

A batch holds windows of clips, `video` uint8 [b, t, h, w, 3]; single pictures are clips of one frame, half of them
frames, a quarter persons, a quarter garments. A picture meets only the last tap of the causal convolutions. The other
taps start at zero and the layers that halve and double time at "mean of two" and "twice the same" (`inflate`), so that
nothing has to be unlearnt when clips come.

Axes: b batch, t pixel frames, f latent frames, h w grid, c channels.
"""

from __future__ import annotations

import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from chameleon_jax.data.images import to_model, to_uint8
from chameleon_jax.data.loader import LoaderConfig
from chameleon_jax.training.feed import HostBatch, Part, crop
from chameleon_jax.training.metrics import picture_grid
from chameleon_jax.training.networks import Params, build_network
from chameleon_jax.training.state import Batch, Metrics, ParamTree, Stage, TrainState

log = logging.getLogger(__name__)


def make_stage(config: ConfigDict) -> Stage:
    """The VAE stage; see configs/vae.py for the config."""
    network = build_network("vae", config)

    def loss(params: ParamTree, fixed: ParamTree, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        del fixed
        x = to_model(batch["video"])
        vae = network.bind(params["vae"])
        mean, logvar = vae.encode_moments(x)
        z = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
        # `decode` takes scaled latents.
        scale = jnp.array(vae.config.latent_mean), jnp.array(vae.config.latent_std)
        y = vae.decode((z - scale[0]) / scale[1], clamp=False)
        return vae_loss(x, y, mean, logvar, config.loss)

    @jax.jit
    def repeat(params: ParamTree, batch: Batch) -> jax.Array:
        vae = network.bind(params["vae"])
        return to_uint8(vae.decode(vae.encode(to_model(batch["video"][: config.preview.samples]))))

    def preview(params: ParamTree, fixed: ParamTree, batch: Batch, key: jax.Array) -> np.ndarray:
        del fixed, key
        made, true = np.asarray(repeat(params, batch)), np.asarray(batch["video"])
        if true.shape[1] == 1:
            return picture_grid([list(true[: len(made), 0]), list(made[:, 0])])
        shown = np.linspace(0, true.shape[1] - 1, min(config.preview.frames, true.shape[1])).round().astype(int)
        return picture_grid([list(clip[index][shown]) for index in range(len(made)) for clip in (true, made)])

    def start(params: ParamTree) -> ParamTree:
        return {"vae": inflate(params["vae"])} if config.loss.inflate else params

    return Stage("vae", {"vae": network}, loss, preview, start=start)


def vae_loss(
    x: jax.Array, y: jax.Array, mean: jax.Array, logvar: jax.Array, weights: ConfigDict
) -> tuple[jax.Array, Metrics]:
    """Loss of a batch.

    Args:
      x, y: true and decoded pixels [b, t, h, w, 3], y not clamped.
      mean, logvar: moments of the posterior [b, f, h, w, c], not scaled.
      weights: `l1`, `gradient`, `kl`.

    Returns:
      The loss, and its parts with `psnr` in dB of the whole batch (pixels clamped, peak 2).
    """
    error = y - x
    parts = {
        "l1": jnp.abs(error).mean(),
        "gradient": jnp.abs(jnp.diff(error, axis=2)).mean() + jnp.abs(jnp.diff(error, axis=3)).mean(),
        "kl": 0.5 * (jnp.square(mean) + jnp.exp(logvar) - 1 - logvar).mean(),
    }
    psnr = -10 * jnp.log10(jnp.square(jnp.clip(y, -1, 1) - x).mean() / 4)
    return sum(weights[name] * value for name, value in parts.items()), parts | {"psnr": psnr}


def inflate(params: Params) -> Params:
    """A network that treats every frame like a picture, and time like pairs of equal frames; see the module's docstring."""

    def change(name: str, kernel: jax.Array) -> jax.Array:
        if kernel.ndim != 5 or kernel.shape[0] != 3:
            return kernel
        if not name.endswith("time_conv.kernel"):
            return kernel.at[:2].set(0)
        inputs, outputs = kernel.shape[-2:]
        same = jnp.tile(jnp.eye(inputs, dtype=kernel.dtype), outputs // inputs)
        taps = (0, 0.5, 0.5) if inputs == outputs else (0, 0, 1)  # halves time: mean of a pair; doubles it: both the same
        return jnp.stack([tap * same for tap in taps])[:, None, None]

    return {name: change(name, kernel) for name, kernel in params.items()}


def make_parts(config: ConfigDict) -> list[Part]:
    """One kind of batch for each entry (frames, height, width, samples) of `data.crops`, in turn."""
    return [_part(config, *entry) for entry in config.data.crops]


def make_eval_parts(config: ConfigDict) -> list[Part]:
    """Held out: `data.batch` whole pictures, or whole clips if clips are trained."""
    frames = config.video.frames if any(entry[0] > 1 for entry in config.data.crops) else 1
    return [_part(config, frames, config.video.height, config.video.width, config.data.batch, random_start=False)]


def before_export(config: ConfigDict, stage: Stage, state: TrainState, eval_batches: list[HostBatch]) -> ConfigDict:
    """Put mean and standard deviation of the latents into the config, so that those of the exported VAE are normal.

    Measured over the held-out batches, per channel. The network already scales by what the config says; the two are
    composed.
    """
    if not eval_batches:
        return config
    network = stage.trained["vae"]
    encode = jax.jit(lambda params, x: network.bind(params).encode(to_model(x)))
    latents = [np.asarray(encode(state.inference_params["vae"], jnp.asarray(batch["video"]))) for batch in eval_batches]
    z = np.concatenate([z.reshape(-1, z.shape[-1]) for z in latents]).astype(np.float64)
    old_mean, old_std = (np.array(config.model.vae[name]) for name in ("latent_mean", "latent_std"))
    mean, std = z.mean(0) * old_std + old_mean, z.std(0) * old_std
    config = config.copy_and_resolve_references()
    config.unlock()
    config.model.vae.latent_mean = tuple(round(float(value), 5) for value in mean)
    config.model.vae.latent_std = tuple(round(float(value), 5) for value in std)
    log.info("latent mean %s, std %s", config.model.vae.latent_mean, config.model.vae.latent_std)
    return config


def _part(
    config: ConfigDict, frames: int, height: int, width: int, samples: int, *, random_start: bool = True
) -> Part:
    def transform(raw: dict[str, Any], rng: np.random.Generator) -> HostBatch:
        video = raw["video"]
        if frames == 1:
            video = video.copy()
            video[1::4, 0], video[3::4, 0] = raw["reference"][1::4], raw["garment"][3::4]
        video = crop(video, (height, width), rng)
        if random_start:  # in training: half of them mirrored
            mirrored = rng.random(len(video)) < 0.5
            video = np.where(mirrored[:, None, None, None, None], video[:, :, :, ::-1], video)
        return {"video": video}

    data = config.data
    loader = LoaderConfig(
        batch=samples, frames=frames, buckets=((config.video.height, config.video.width),), captions="dynamic",
        dropout=0.0, random_start=random_start, seed=config.seed, threads=data.threads, prefetch=data.prefetch,
        workers=data.workers,
    )  # fmt: skip
    return Part(loader, transform)

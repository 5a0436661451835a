"""The VAE's stage: single pictures first, then clips, with the losses of `vae`.

A batch holds windows of clips, `video` uint8 [b, t, h, w, 3]; single pictures are clips of one frame, half of them
frames, a quarter persons, a quarter garments.

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
from chameleon_jax.training.networks import build_network
from chameleon_jax.training.state import Batch, Metrics, ParamTree, Stage, TrainState
from chameleon_jax.training.vae import vae_loss

log = logging.getLogger(__name__)


def make_stage(config: ConfigDict) -> Stage:
    """The VAE stage; see configs/vae.py for the config."""
    network = build_network("vae", config)

    def loss(params: ParamTree, fixed: ParamTree, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        del fixed
        return vae_loss(network.bind(params["vae"]), to_model(batch["video"]), key, **config.loss)

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

    return Stage("vae", {"vae": network}, loss, preview)


def make_parts(config: ConfigDict) -> list[Part]:
    """One kind of batch for each entry (frames, height, width, samples) of `data.crops`, in turn."""
    return [_part(config, *entry) for entry in config.data.crops]


def make_eval_parts(config: ConfigDict) -> list[Part]:
    """Held out: whole pictures, or whole clips if clips are trained."""
    frames = config.video.frames if any(entry[0] > 1 for entry in config.data.crops) else 1
    samples = 2 if frames > 1 else 16
    return [_part(config, frames, config.video.height, config.video.width, samples, random_start=False)]


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
        return {"video": crop(video, (height, width), rng)}

    data = config.data
    loader = LoaderConfig(
        batch=samples, frames=frames, buckets=((config.video.height, config.video.width),), captions="dynamic",
        dropout=0.0, random_start=random_start, seed=config.seed, threads=data.threads, prefetch=data.prefetch,
        workers=data.workers,
    )  # fmt: skip
    return Part(loader, transform)

"""The VAE's stage: single pictures first, then clips, with the loss of `vae`.

A batch holds windows of clips, `video` uint8 [b, t, h, w, 3]; single pictures are clips of one
frame, half of them frames, a quarter persons, a quarter garments.

Axes: b batch, t pixel frames, f latent frames, h w grid, c channels.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from chameleon_jax.config import ConfigError
from chameleon_jax.data.images import to_model, to_uint8
from chameleon_jax.data.loader import LoaderConfig
from chameleon_jax.data.sheets import contact_sheet
from chameleon_jax.models.build import read_sizes
from chameleon_jax.training.feed import HostBatch, Part, crop
from chameleon_jax.training.networks import build_network
from chameleon_jax.training.stages import vae_loss as losses
from chameleon_jax.training.state import Batch, Metrics, ParamTree, Stage, TrainState

log = logging.getLogger(__name__)


def make_stage(config: ConfigDict) -> Stage:
    """The VAE stage; see configs/vae.py for the config."""
    network = build_network("vae", config)
    names = [field.name for field in dataclasses.fields(losses.LossWeights)]
    weights = losses.LossWeights(**{name: config.loss[name] for name in names})

    def loss(
        params: ParamTree, fixed: ParamTree, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        del fixed
        vae, x = network.bind(params["vae"]), to_model(batch["video"])
        return losses.loss(vae, x, key, weights, encoder=config.loss.encoder)

    @jax.jit
    def repeat(params: ParamTree, batch: Batch) -> jax.Array:
        vae = network.bind(params["vae"])
        return to_uint8(vae.decode(vae.encode(to_model(batch["video"][: config.preview.samples]))))

    def preview(params: ParamTree, fixed: ParamTree, batch: Batch, key: jax.Array) -> np.ndarray:
        del fixed, key
        made, true = np.asarray(repeat(params, batch)), np.asarray(batch["video"])
        if true.shape[1] == 1:
            return np.asarray(contact_sheet([true[: len(made), 0], made[:, 0]]))
        shown = (
            np.linspace(0, true.shape[1] - 1, min(config.preview.frames, true.shape[1]))
            .round()
            .astype(int)
        )
        rows = [clip[index][shown] for index in range(len(made)) for clip in (true, made)]
        return np.asarray(contact_sheet(rows))

    def start(params: ParamTree) -> ParamTree:
        return {"vae": losses.inflate(params["vae"])} if config.loss.inflate else params

    return Stage("vae", {"vae": network}, loss, preview, start=start)


def make_parts(config: ConfigDict) -> list[Part]:
    """One kind of batch for each entry (frames, height, width, samples) of `data.crops`, in turn."""
    return [_part(config, *entry) for entry in config.data.crops]


def make_eval_parts(config: ConfigDict) -> list[Part]:
    """Held out: `data.batch` whole pictures, or whole clips if clips are trained."""
    frames = config.video.frames if any(entry[0] > 1 for entry in config.data.crops) else 1
    return [
        _part(
            config,
            frames,
            config.video.height,
            config.video.width,
            config.data.batch,
            random_start=False,
        )
    ]


def before_export(
    config: ConfigDict, stage: Stage, state: TrainState, eval_batches: list[HostBatch]
) -> ConfigDict:
    """Put mean and standard deviation of the latents, over the held-out batches, into the config of
    the exported VAE.

    Raises:
      ConfigError: a latent channel is constant.
    """
    if not eval_batches:
        return config
    vae = stage.trained["vae"].bind(state.inference_params["vae"])
    mean, std = losses.latent_statistics(vae, (to_model(batch["video"]) for batch in eval_batches))
    try:
        measured = losses.with_statistics(vae.config, mean, std)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    config = config.copy_and_resolve_references()
    config.unlock()
    config.model.vae.update(latent_mean=measured.latent_mean, latent_std=measured.latent_std)
    log.info("latent mean %s, std %s", measured.latent_mean, measured.latent_std)
    return config


def _part(
    config: ConfigDict,
    frames: int,
    height: int,
    width: int,
    samples: int,
    *,
    random_start: bool = True,
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
        batch=samples,
        frames=frames,
        frames_per_latent=read_sizes("vae", config.model.vae).temporal_factor,
        buckets=((config.video.height, config.video.width),),
        captions="dynamic",
        dropout=0.0,
        random_start=random_start,
        seed=config.seed,
        threads=data.threads,
        prefetch=data.prefetch,
        workers=data.workers,
    )
    return Part(loader, transform)

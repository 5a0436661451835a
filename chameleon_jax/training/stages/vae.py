"""The VAE's stage: single pictures first, then clips, with the loss of `vae_loss`.

A batch holds windows of clips, `video` uint8 [b, t, h, w, 3]; single pictures are clips of one
frame, half of them frames, a quarter persons, a quarter garments. With labels (`data.labels`) a
batch has `labels` uint8 [b, t, h, w], too, and three quarters of the pictures are frames, since the
pictures of persons have none.

Axes: b batch, t pixel frames, f latent frames, h w grid, c channels.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from chameleon_jax.config import ConfigError
from chameleon_jax.data.images import to_model, to_uint8
from chameleon_jax.data.labels import BACKGROUND, GARMENT
from chameleon_jax.data.loader import LoaderConfig
from chameleon_jax.data.sheets import contact_sheet
from chameleon_jax.data.sources import Source
from chameleon_jax.models.build import read_sizes
from chameleon_jax.sharding import to_host
from chameleon_jax.training import diagnosis
from chameleon_jax.training.feed import Feed, HostBatch, Part, crop
from chameleon_jax.training.networks import Network, build_network, weights_file
from chameleon_jax.training.stage import Shown, Stage, simple_stage
from chameleon_jax.training.stages import common
from chameleon_jax.training.stages import vae_loss as losses
from chameleon_jax.training.state import Batch, Metrics, ParamTree

log = logging.getLogger(__name__)


def make_stage(config: ConfigDict) -> Stage:
    """The VAE stage; see configs/vae.py for the config."""
    network = build_network("vae", config)
    names = [field.name for field in dataclasses.fields(losses.LossWeights)]
    weights = losses.LossWeights(**{name: config.loss[name] for name in names})
    if weights.focused and "labels" not in config.data.labels:
        raise ConfigError(
            f"loss.garment is {weights.garment:g} and loss.head {weights.head:g}: pixels that count"
            " more are known by their labels; set data.labels=('labels',)"
        )

    def loss(
        params: ParamTree, frozen: ParamTree, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        del frozen
        vae, x = network.bind(params["vae"]), to_model(batch["video"])
        return losses.loss(
            vae,
            x,
            key,
            weights,
            labels_bthw=batch.get("labels"),
            encoder=config.loss.encoder,
        )

    @jax.jit
    def repeat(params: ParamTree, batch: Batch) -> tuple[tuple[jax.Array, dict[str, jax.Array]]]:
        vae, true = network.bind(params["vae"]), batch["video"][: config.preview.samples]
        made = to_uint8(vae.decode(vae.encode(to_model(true))))
        return tuple((clips, diagnosis.frame_measures(clips)) for clips in (made, true))

    def preview(params: ParamTree, frozen: ParamTree, batch: Batch, key: jax.Array) -> Shown:
        del frozen, key
        (made, of_made), (true, of_true) = to_host(repeat(params, batch))
        measures = common.sample_metrics(diagnosis.compare(of_made, of_true))
        if true.shape[1] == 1:
            return np.asarray(contact_sheet([true[:, 0], made[:, 0]])), measures
        shown = common.evenly_spaced(true.shape[1], config.preview.frames)
        rows = [clip[index][shown] for index in range(len(made)) for clip in (true, made)]
        return np.asarray(contact_sheet(rows)), measures

    def inflated(params: ParamTree) -> ParamTree:
        return {"vae": losses.inflate(params["vae"])}

    return simple_stage(
        config,
        "vae",
        trained={"vae": network},
        weights={"vae": weights_file(config.init_from, "vae")} if config.init_from else {},
        loss=loss,
        preview=preview,
        batches=functools.partial(batches, config),
        eval_batches=functools.partial(eval_batches, config),
        start=inflated if config.loss.inflate else None,
        finish=functools.partial(measure_latents, network),
    )


def batches(config: ConfigDict, source: Source) -> Feed:
    """One kind of batch for each (frames, height, width, samples) of `data.crops`, in turn."""
    parts = [_part(config, *entry) for entry in config.data.crops]
    return Feed(source, parts)


def eval_batches(config: ConfigDict, source: Source) -> Feed:
    """`data.batch` whole pictures, or whole clips if clips are trained."""
    clips = any(frames > 1 for frames, *_ in config.data.crops)
    video = config.video
    frames = video.frames if clips else 1
    part = _part(config, frames, video.height, video.width, config.data.batch, random_start=False)
    return Feed(source, [common.held_out(part)])


def measure_latents(
    network: Network, config: ConfigDict, params: ParamTree, batches: Sequence[Batch]
) -> ConfigDict:
    """The config with mean and standard deviation of the latents, over the held-out batches.

    Raises:
      ConfigError: a latent channel is constant.
    """
    vae = network.bind(params["vae"])
    mean, std = losses.latent_statistics(vae, (to_model(batch["video"]) for batch in batches))
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
    def transform(raw: dict[str, Any], rngs: list[np.random.Generator]) -> HostBatch:
        video, labels = raw["video"], raw.get("labels")
        if frames == 1:
            video = video.copy()
            chosen = raw["slot"] % 4 == 3
            video[chosen, 0] = raw["garment"][chosen]
            if labels is None:
                chosen = raw["slot"] % 4 == 1
                video[chosen, 0] = raw["reference"][chosen]
            else:
                labels = labels.copy()
                white = (raw["garment"][chosen] == 255).all(-1)
                labels[chosen, 0] = np.where(white, BACKGROUND, GARMENT)
        if labels is not None:
            video = np.concatenate([video, labels[..., None]], axis=-1)
        video = crop(video, (height, width), rngs)
        if random_start:  # in training: half of them mirrored
            mirrored = np.array([rng.random() < 0.5 for rng in rngs])
            video = np.where(mirrored[:, None, None, None, None], video[:, :, :, ::-1], video)
        if labels is None:
            return {"video": video}
        return {"video": video[..., :3], "labels": video[..., 3]}

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

"""What the diffusion stages share: networks, conditions, the loss of flow matching, data, previews.

Axes: b batch, t pixel frames, f latent frames, h w grid, c channels, l text tokens.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from chameleon_jax.config import ConfigError
from chameleon_jax.data.images import to_model, to_uint8
from chameleon_jax.data.loader import LoaderConfig
from chameleon_jax.data.sheets import contact_sheet
from chameleon_jax.data.sources import Source
from chameleon_jax.data.tokenizer import Tokenizer
from chameleon_jax.diffusion import flow
from chameleon_jax.models.build import read_sizes
from chameleon_jax.models.dit import DiT, TextKV
from chameleon_jax.sharding import to_host
from chameleon_jax.training import diagnosis
from chameleon_jax.training.feed import Feed, HostBatch, Part
from chameleon_jax.training.networks import Network, build_network, weights_file
from chameleon_jax.training.stage import Shown, Stage, simple_stage
from chameleon_jax.training.state import Batch, Loss, Metrics, ParamTree

# The arrays of a batch, in the order of context and video.
LATENTS = ("z_reference", "z_garment", "z_video")
PIXELS = ("reference", "garment", "video")


@dataclasses.dataclass(frozen=True)
class Networks:
    """The networks of a stage, see the fields of the same names of `stage.Stage`."""

    trained: Mapping[str, Network]
    frozen: Mapping[str, Network]
    weights: Mapping[str, Path]

    @property
    def all(self) -> dict[str, Network]:
        return {**self.trained, **self.frozen}


@dataclasses.dataclass(frozen=True)
class Sample:
    """A batch as the diffusion stages see it."""

    z_context: jax.Array  # [b, 2, h, w, c]: reference, garment
    z_video: jax.Array  # [b, f, h, w, c]
    text_kv: TextKV  # cross-attention keys and values of every layer


SampleOf = Callable[[ParamTree, DiT, Batch], Sample]
Generate = Callable[[ParamTree, ParamTree, Batch, jax.Array], jax.Array]


def networks(config: ConfigDict) -> Networks:
    """The transformer, trained; the VAE, frozen; the text encoder, trained if `train.text` says so.

    Raises:
      ConfigError: a frozen network has no weights.
    """
    trained = {"dit": build_network("dit", config)}
    frozen = {}
    if config.weights.vae:
        frozen["vae"] = build_network("vae", config, frozen=True)
    elif config.train.preview_every:
        raise ConfigError(
            "weights.vae is not set: previews cannot be decoded; set it, or train.preview_every=0"
        )
    if config.train.text:
        trained["text"] = build_network("text", config)
    else:
        if not config.weights.text:
            raise ConfigError(
                "weights.text is not set, and train.text is false: there is no text encoder"
            )
        frozen["text"] = build_network("text", config, frozen=True)
    weights = {name: weights_file(config.weights[name], name) for name in frozen}
    if config.init_from:
        weights |= {name: weights_file(config.init_from, name) for name in trained}
    return Networks(trained, frozen, weights)


def flow_stage(
    config: ConfigDict, name: str, nets: Networks, *, loss: Loss, generate: Generate
) -> Stage:
    """A stage of the transformer with one loss; its previews are generated clips.

    Args:
      config: see configs/training.py.
      name: of the stage.
      nets: see `networks`.
      loss: see `state.descend`.
      generate: see `make_preview`.

    Raises:
      ConfigError: an unknown optimiser or schedule.
    """
    return simple_stage(
        config,
        name,
        trained=nets.trained,
        frozen=nets.frozen,
        weights=nets.weights,
        copied=tuple(nets.frozen),
        loss=loss,
        preview=make_preview(config, nets, generate),
        batches=functools.partial(batches, config),
        eval_batches=functools.partial(eval_batches, config),
    )


def make_conditions(nets: Networks) -> SampleOf:
    """How a batch becomes latents and cross-attention inputs.

    Returns:
      (parameters of all networks, transformer, batch) -> Sample.
    """

    def sample(params: ParamTree, dit: DiT, batch: Batch) -> Sample:
        z_context, z_video = latents(nets, params, batch)
        states_blm = nets.all["text"].bind(params["text"])(batch["ids"], batch["mask"])
        return Sample(z_context, z_video, dit.text_kv(states_blm))

    return sample


def latents(nets: Networks, params: ParamTree, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Latents of the context [b, 2, h, w, c] and of the video [b, f, h, w, c], without gradient.

    Float32; taken from the batch if the data set holds latents, else encoded now. A picture is
    encoded as a clip of one frame.

    Raises:
      ConfigError: the data are pixels, and there is no VAE.
    """
    if "z_video" in batch:
        parts = [batch[name] for name in LATENTS]
    elif "vae" in nets.frozen:
        vae = nets.frozen["vae"].bind(params["vae"])
        pictures = batch["reference"][:, None], batch["garment"][:, None], batch["video"]
        parts = [vae.encode(to_model(pixels)) for pixels in pictures]
    else:
        raise ConfigError(
            "weights.vae is not set, and the data are pixels: set it, or encode the data first"
        )
    reference, garment, video = (jax.lax.stop_gradient(z.astype(jnp.float32)) for z in parts)
    return jnp.concatenate([reference, garment], axis=1), video


def loss_weights(config: ConfigDict) -> Callable[[jax.Array], jax.Array]:
    """Weights of the loss by timestep, as `loss.weights` says: "bell" or "none".

    Raises:
      ConfigError: another name.
    """
    if config.loss.weights == "bell":
        return functools.partial(flow.training_weight_of, shift=config.loss.shift)
    if config.loss.weights == "none":
        return jnp.ones_like
    raise ConfigError(f"loss.weights is {config.loss.weights!r}; expected bell or none")


def flow_loss(
    v_pred: jax.Array, x0: jax.Array, noise: jax.Array, w_bf: jax.Array
) -> tuple[jax.Array, Metrics]:
    """Weighted flow-matching loss of the video frames in float32.

    Args:
      v_pred, x0, noise: [b, f, h, w, c].
      w_bf: weights of the frames.

    Returns:
      The loss, and `mse`, the same without weights.
    """
    error = jnp.square(v_pred.astype(jnp.float32) - flow.velocity(x0, noise).astype(jnp.float32))
    error_bf = error.mean(axis=(2, 3, 4))
    return (w_bf * error_bf).mean(), {"mse": error_bf.mean()}


def network_timesteps(t_bf: jax.Array, config: ConfigDict) -> jax.Array:
    """Timesteps as the network gets them: exact, or rounded as the released code does."""
    if not config.loss.round_timesteps:
        return t_bf
    return flow.round_timesteps(t_bf, jnp.dtype(config.dtype))


def batches(config: ConfigDict, source: Source) -> Feed:
    """Clips with tokenised prompts, one kind of batch for each (frames, clips) of `data.lengths`.

    Without entries there is one kind, `data.batch` clips of `video.frames` frames.

    Raises:
      ConfigError, TokenizerError: no usable tokenizer, or a length above `video.frames`.
    """
    lengths = config.data.lengths or ((config.video.frames, config.data.batch),)
    too_long = [frames for frames, _ in lengths if frames > config.video.frames]
    if too_long:
        raise ConfigError(
            f"data.lengths has clips of {too_long} frames; video.frames allows"
            f" {config.video.frames}"
        )
    return Feed(source, [_part(config, frames, clips) for frames, clips in lengths])


def eval_batches(config: ConfigDict, source: Source) -> Feed:
    """`data.batch` clips of `video.frames` frames, with their prompts, the same in every run."""
    return Feed(source, [held_out(_part(config, config.video.frames, config.data.batch))])


def held_out(part: Part) -> Part:
    """The same batches without dropped prompts, and without threads that read ahead."""
    plain = dataclasses.replace(part.loader, dropout=0.0, workers=0, threads=1, prefetch=1)
    return dataclasses.replace(part, loader=plain)


def _part(config: ConfigDict, frames: int, clips: int) -> Part:
    path = config.data.tokenizer
    if not path:
        raise ConfigError("data.tokenizer is not set; give the tokenizer.json of the text encoder")
    tokenizer = Tokenizer.from_file(path, config.model.text.length)
    if tokenizer.vocab > config.model.text.vocab:
        raise ConfigError(
            f"{path} has {tokenizer.vocab} pieces, model.text.vocab is {config.model.text.vocab}"
        )

    def transform(raw: dict[str, Any], rng: np.random.Generator) -> HostBatch:
        del rng
        ids, mask = tokenizer(raw["prompt"])
        found = {name: raw[name] for name in (*LATENTS, *PIXELS) if name in raw}
        return found | {"ids": ids, "mask": mask}

    data = config.data
    loader = LoaderConfig(
        batch=clips,
        frames=frames,
        frames_per_latent=read_sizes("vae", config.model.vae).temporal_factor,
        buckets=((config.video.height, config.video.width),),
        captions=data.captions,
        dropout=data.dropout,
        seed=config.seed,
        threads=data.threads,
        prefetch=data.prefetch,
        workers=data.workers,
    )
    return Part(loader, transform)


def make_preview(
    config: ConfigDict, nets: Networks, generate: Generate
) -> Callable[[ParamTree, ParamTree, Batch, jax.Array], Shown]:
    """A preview of generated clips, and how they measure up to the true ones.

    For each sample two rows: reference, garment and frames of the true clip; below, the same frames
    of the generated one. The measures are those of `diagnosis`, of the clips that are shown; those
    of the latents are of the whole batch. The true clips are decoded from their latents as well,
    so that the VAE makes no difference.

    Args:
      config: group `preview`, and `cache.block` for the measures of the first and last chunk.
      nets: of the stage.
      generate: pure; (trained parameters, frozen ones, batch, key) -> latents of the video, maybe
        fewer frames than the true one.
    """
    generate = jax.jit(generate)
    compare_latents = jax.jit(diagnosis.latent_measures)
    factor = read_sizes("vae", config.model.vae).temporal_factor
    chunk = config.cache.block * factor  # pixel frames; the first latent frame stands for one

    @jax.jit
    def decode(frozen: ParamTree, z: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        pixels = to_uint8(nets.frozen["vae"].bind(frozen["vae"]).decode(z))
        return pixels, diagnosis.frame_measures(pixels)

    @jax.jit
    def read(frozen: ParamTree, batch: Batch) -> tuple[jax.Array, jax.Array]:
        return latents(nets, frozen, batch)

    def preview(params: ParamTree, frozen: ParamTree, batch: Batch, key: jax.Array) -> Shown:
        z_context, z_video = read(frozen, batch)
        z_made = generate(params, frozen, batch, key)
        z_video = z_video[:, : z_made.shape[1]]
        count = min(config.preview.samples, z_video.shape[0])
        (reference, _), (garment, _) = (
            to_host(decode(frozen, z_context[:count, i : i + 1])) for i in range(2)
        )
        (true, of_true), (made, of_made) = (
            to_host(decode(frozen, z[:count])) for z in (z_video, z_made)
        )
        shown = evenly_spaced(true.shape[1], config.preview.frames)
        rows = []
        for index in range(count):
            blank = np.full_like(reference[index, 0], 255)
            rows.append([reference[index, 0], garment[index, 0], *true[index][shown]])
            rows.append([blank, blank, *made[index][shown]])
        measures = diagnosis.compare(of_made, of_true, first=chunk - factor + 1, last=chunk)
        measures |= {
            name: float(value) for name, value in to_host(compare_latents(z_made, z_video)).items()
        }
        return np.asarray(contact_sheet(rows)), sample_metrics(measures)

    return preview


def sample_metrics(measures: Mapping[str, float]) -> dict[str, float]:
    """Measures of generated clips by the names that metrics and alarms have."""
    return {f"sample/{name}": value for name, value in measures.items()}


def evenly_spaced(frames: int, count: int) -> np.ndarray:
    """Indices of at most `count` of `frames` frames, the first and the last among them."""
    return np.linspace(0, frames - 1, min(count, frames)).round().astype(int)

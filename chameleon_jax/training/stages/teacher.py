"""Stage 1, the teacher: a bidirectional in-context video model (FashionChameleon, arXiv 2605.15824,
section 4.1).

Two clean latent frames, the person in another garment and the garment alone, stand before the video
at t = 0. All video frames share one t; the network learns v = noise - x0 on them:

    loss = mean over b, f of  w(t) * mean over h, w, c of (v_pred - v)^2

with w the training weight of the released schedule (`loss.weights` "bell") or 1 ("none"). The bell
leaves out t = 1000, where the first step of a sampler decides what goes where: pretrained weights
know that step, new ones have to learn it. The reference shows another garment than the video, or
the model would learn to copy it. 10 % of the prompts are empty, for classifier-free guidance.

Axes: b batch, t pixel frames, f latent frames, h w grid, c channels, l query tokens.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from chameleon_jax.config import ConfigError
from chameleon_jax.data.images import to_model, to_uint8
from chameleon_jax.data.loader import LoaderConfig
from chameleon_jax.data.sheets import contact_sheet
from chameleon_jax.data.tokenizer import Tokenizer
from chameleon_jax.diffusion import flow, sampler
from chameleon_jax.models.build import read_sizes
from chameleon_jax.models.dit import bidirectional_forward
from chameleon_jax.training.feed import HostBatch, Part
from chameleon_jax.training.networks import Network, build_network
from chameleon_jax.training.state import Batch, Metrics, ParamTree, Stage, TrainState


@dataclasses.dataclass(frozen=True)
class Sample:
    """A batch as the diffusion stages see it."""

    z_context: jax.Array  # [b, 2, h, w, c]: reference, garment
    z_video: jax.Array  # [b, f, h, w, c]
    text_kv: Any  # cross-attention keys and values of every layer


def make_stage(config: ConfigDict) -> Stage:
    """The teacher stage; see configs/teacher.py for the config."""
    trained, frozen = networks(config)
    conditions = make_conditions(config, trained | frozen)
    weights_of = loss_weights(config)

    def loss(
        params: ParamTree, fixed: ParamTree, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        dit = trained["dit"].bind(params["dit"])
        sample = conditions(params | fixed, dit, batch)
        b, f = sample.z_video.shape[:2]
        t_bf = flow.draw_timesteps(jax.random.fold_in(key, 0), b, f, shift=config.loss.shift)
        noise = jax.random.normal(jax.random.fold_in(key, 1), sample.z_video.shape)
        z_t = flow.add_noise(sample.z_video, noise, t_bf / 1000)
        v = bidirectional_forward(
            dit, sample.z_context, z_t, told_timesteps(t_bf, config), sample.text_kv
        )
        return flow_loss(v, sample.z_video, noise, weights_of(t_bf))

    def generate(params: ParamTree, fixed: ParamTree, batch: Batch, key: jax.Array) -> jax.Array:
        dit = trained["dit"].bind(params["dit"])
        sample = conditions(params | fixed, dit, batch)

        def model(z: jax.Array, t_bf: jax.Array) -> jax.Array:
            return bidirectional_forward(
                dit, sample.z_context, z, told_timesteps(t_bf, config), sample.text_kv
            )

        noise = jax.random.normal(key, sample.z_video.shape)
        sigmas = flow.euler_sigmas(config.preview.steps, config.loss.shift)
        return sampler.sample_euler(model, noise, sigmas)

    return Stage("teacher", trained, loss, make_preview(config, frozen, generate), frozen)


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


def told_timesteps(t_bf: jax.Array, config: ConfigDict) -> jax.Array:
    """Timesteps as the network is told them: rounded as the released code does, or exact."""
    return (
        flow.round_timesteps(t_bf, jnp.dtype(config.dtype)) if config.loss.round_timesteps else t_bf
    )


def networks(config: ConfigDict) -> tuple[dict[str, Network], dict[str, Network]]:
    """The trained and the frozen networks of a diffusion stage.

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
    return trained, frozen


def make_conditions(
    config: ConfigDict, nets: dict[str, Network]
) -> Callable[[ParamTree, Any, Batch], Sample]:
    """How a batch becomes latents and cross-attention inputs: sample(params of all networks, dit,
    batch).
    """

    def sample(params: ParamTree, dit: Any, batch: Batch) -> Sample:
        z_context, z_video = latents(nets, params, batch)
        states_blm = nets["text"].bind(params["text"])(batch["ids"], batch["mask"])
        return Sample(z_context, z_video, dit.text_kv(states_blm))

    return sample


def latents(
    nets: dict[str, Network], params: ParamTree, batch: Batch
) -> tuple[jax.Array, jax.Array]:
    """Latents of the context [b, 2, h, w, c] and of the video [b, f, h, w, c], float32, without
    gradient.

    Taken from the batch if the data set holds latents, else encoded now; a picture is encoded as a
    clip of one frame.
    """
    if "z_video" in batch:
        parts = batch["z_reference"], batch["z_garment"], batch["z_video"]
    else:
        if "vae" not in nets:
            raise ConfigError(
                "weights.vae is not set, and the data are pixels: set it, or encode the data first"
            )
        vae = nets["vae"].bind(params["vae"])
        pictures = batch["reference"][:, None], batch["garment"][:, None], batch["video"]
        parts = tuple(vae.encode(to_model(pixels)) for pixels in pictures)
    reference, garment, video = (jax.lax.stop_gradient(z.astype(jnp.float32)) for z in parts)
    return jnp.concatenate([reference, garment], axis=1), video


def make_parts(config: ConfigDict) -> list[Part]:
    """How batches are made: clips with tokenised prompts, one kind for each entry (frames, clips)
    of `data.lengths`.

    Without entries there is one kind, `data.batch` clips of `video.frames` frames.

    Raises:
      ConfigError, TokenizerError: no usable tokenizer, or a length that is longer than
        `video.frames`.
    """
    lengths = config.data.lengths or ((config.video.frames, config.data.batch),)
    too_long = [frames for frames, _ in lengths if frames > config.video.frames]
    if too_long:
        raise ConfigError(
            f"data.lengths has clips of {too_long} frames; video.frames allows"
            f" {config.video.frames}"
        )
    return [_part(config, frames, clips) for frames, clips in lengths]


def make_eval_parts(config: ConfigDict) -> list[Part]:
    """Held out: `data.batch` clips of `video.frames` frames."""
    return [_part(config, config.video.frames, config.data.batch)]


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
        names = [
            n
            for n in ("z_video", "z_reference", "z_garment", "video", "reference", "garment")
            if n in raw
        ]
        return {name: raw[name] for name in names} | {"ids": ids, "mask": mask}

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


def before_export(
    config: ConfigDict, stage: Stage, state: TrainState, eval_batches: list[HostBatch]
) -> ConfigDict:
    """Nothing is measured after a diffusion stage."""
    del stage, state, eval_batches
    return config


def make_preview(
    config: ConfigDict,
    frozen: dict[str, Network],
    generate: Callable[[ParamTree, ParamTree, Batch, jax.Array], jax.Array],
) -> Callable[[ParamTree, ParamTree, Batch, jax.Array], np.ndarray]:
    """A preview: per sample the reference, the garment, and frames of the true clip above those of
    the generated one.
    """
    generate = jax.jit(generate)

    def decode(fixed: ParamTree, z: jax.Array) -> jax.Array:
        return to_uint8(frozen["vae"].bind(fixed["vae"]).decode(z))

    decode = jax.jit(decode)
    read = jax.jit(lambda params, fixed, batch: latents(frozen, params | fixed, batch))

    def preview(params: ParamTree, fixed: ParamTree, batch: Batch, key: jax.Array) -> np.ndarray:
        z_context, z_video = read({}, fixed, batch)
        z_made = generate(params, fixed, batch, key)
        count = min(config.preview.samples, z_video.shape[0])
        pictures = [np.asarray(decode(fixed, z_context[:count, i : i + 1]))[:, 0] for i in range(2)]
        true, made = (np.asarray(decode(fixed, z[:count])) for z in (z_video, z_made))
        shown = (
            np.linspace(0, true.shape[1] - 1, min(config.preview.frames, true.shape[1]))
            .round()
            .astype(int)
        )
        rows = []
        for index in range(count):
            blank = np.full_like(pictures[0][index], 255)
            rows.append([pictures[0][index], pictures[1][index], *true[index][shown]])
            rows.append([blank, blank, *made[index][shown]])
        return np.asarray(contact_sheet(rows))

    return preview

"""What the diffusion stages share: networks, conditions, the loss of flow matching, data, previews.

Axes: b batch, t pixel frames, f latent frames, h w grid, c channels, l text tokens.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from chameleon_jax.config import ConfigError
from chameleon_jax.data.images import to_model, to_uint8
from chameleon_jax.data.labels import GARMENT, HEAD, KINDS
from chameleon_jax.data.loader import LoaderConfig
from chameleon_jax.data.sheets import contact_sheet
from chameleon_jax.data.sources import Source
from chameleon_jax.diffusion import flow
from chameleon_jax.models.build import read_sizes
from chameleon_jax.models.decoding import decode_in_turn
from chameleon_jax.models.dit import DiT, TextKV
from chameleon_jax.sharding import to_host
from chameleon_jax.training import diagnosis
from chameleon_jax.training.feed import Feed, HostBatch, Part
from chameleon_jax.training.networks import (
    Parameters,
    build_network,
    build_widened,
    weights_file,
)
from chameleon_jax.training.stage import Shown, Stage, simple_stage
from chameleon_jax.training.state import Batch, Loss, Metrics, ParamTree
from chameleon_jax.training.texts import Texts, check_encoder
from chameleon_jax.training.tuning import Tuned, fixed_name, stored, tune

# The arrays of a batch, in the order of context and video.
LATENTS = ("z_reference", "z_garment", "z_video")
PIXELS = ("reference", "garment", "video")
CONDITIONS = PIXELS[:2]


@dataclasses.dataclass(frozen=True)
class Networks:
    """The networks of a stage.

    Attributes:
      trained, frozen, weights: see the fields of the same names of `stage.Stage`.
      modules: how a network is put together from its parameters, by name.
      helpers: trained networks that only training needs; they are not exported.
    """

    trained: Mapping[str, Parameters]
    frozen: Mapping[str, Parameters]
    weights: Mapping[str, Path]
    modules: Mapping[str, Tuned]
    helpers: tuple[str, ...] = ()

    def bind(self, name: str, params: ParamTree) -> Any:
        """A network with its parameters. Can be traced.

        Args:
          name: "dit", "text" or "vae".
          params: of all networks, trained and frozen, by name.
        """
        return self.modules[name].bind(params[name], params.get(fixed_name(name)))

    def exported(self, params: ParamTree, frozen: ParamTree) -> ParamTree:
        """Files of weights by name: trained networks as a whole, and a LoRA alone if there is one.

        Args:
          params: of the trained networks.
          frozen: with what of them does not change, see `parts`.
        """
        files: ParamTree = {}
        for name, changing in params.items():
            if name in self.helpers:
                continue
            tuned = self.modules[name]
            files[name] = tuned.whole(changing, frozen.get(fixed_name(name)))
            files |= tuned.adapters(changing)
        return files

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of what is frozen and belongs to a trained network."""
        return tuple(fixed_name(name) for name in self.trained if fixed_name(name) in self.frozen)

    @property
    def copied(self) -> tuple[str, ...]:
        """Networks that are not trained, whose weights inference needs beside the trained ones."""
        return tuple(name for name in self.weights if name not in (*self.trained, *self.parts))


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

    Of the transformer that is trained which `tune` says, see `tuning`. With stored text states
    (`data.text`) there is no text encoder. Its weights, if they are given, are compared with those
    that made the states, and exported.

    Raises:
      ConfigError: a frozen network has no weights, the clips have a size that cannot be, or what
        `tuning.tune` raises.
    """
    read_buckets(config)
    modules = {"dit": transformer(config)}
    if config.weights.vae:
        modules["vae"] = Tuned(build_network("vae", config, frozen=True))
    elif config.train.preview_every:
        raise ConfigError(
            "weights.vae is not set: previews cannot be decoded; set it, or train.preview_every=0"
        )
    if config.data.text:
        check_stored_text(config)
        return assemble(config, modules, ("dit",))
    if not config.train.text and not config.weights.text:
        raise ConfigError(
            "weights.text is not set, and train.text is false: there is no text encoder"
        )
    modules["text"] = Tuned(build_network("text", config, frozen=not config.train.text))
    return assemble(config, modules, ("dit", "text") if config.train.text else ("dit",))


def transformer(config: ConfigDict) -> Tuned:
    """The transformer as `tune` says; for conditions on channels, one that reads more of them.

    Raises:
      ConfigError: another name as `conditioning`, sizes that do not suit it, or what
        `tuning.tune` raises.
    """
    conditioning = config.get("conditioning", "in_context")
    if conditioning == "in_context":
        return tune("dit", config)
    if conditioning != "channels":
        raise ConfigError(f"conditioning is {conditioning!r}; expected in_context or channels")
    if config.tune.mode != "full":
        raise ConfigError(
            f"conditioning is 'channels', and tune.mode is {config.tune.mode!r}: the weights of the"
            " new channels would stay zero; set tune.mode=full"
        )
    sizes, channels = config.model.dit, read_sizes("vae", config.model.vae).z_dim
    wanted = (1 + len(CONDITIONS)) * channels, channels
    if (sizes.in_channels, sizes.get("out_channels")) != wanted:
        raise ConfigError(
            f"conditioning is 'channels': set model.dit.in_channels={wanted[0]} (noisy latents,"
            f" {' and '.join(CONDITIONS)}) and model.dit.out_channels={wanted[1]}"
        )
    return stored(Tuned(build_widened("dit", config, channels)))


def assemble(config: ConfigDict, modules: Mapping[str, Tuned], trained: Sequence[str]) -> Networks:
    """The networks of a stage, and the files that they start from.

    Args:
      config: `init_from` has the weights of the trained networks, `weights` those of the others,
        and `tune.lora` a LoRA to go on with.
      modules: all networks by name.
      trained: names of those that are trained; of the others nothing changes.
    """
    changing = {name: modules[name].changing for name in trained}
    frozen = {name: net.changing for name, net in modules.items() if name not in trained}
    weights = {name: weights_file(config.weights[name], name) for name in frozen}
    if config.data.text and config.weights.text:
        weights["text"] = weights_file(config.weights.text, "text")
    for name in trained:
        fixed = modules[name].fixed
        if fixed is not None:
            frozen[fixed_name(name)] = fixed
            weights[fixed_name(name)] = weights_file(config.init_from, name)
        if modules[name].added:
            if config.tune.lora:
                weights[name] = weights_file(config.tune.lora, "lora")
        elif config.init_from:
            weights[name] = weights_file(config.init_from, name)
    return Networks(changing, frozen, weights, modules)


def check_stored_text(config: ConfigDict) -> None:
    """Raise ConfigError if the stored text states are not those of the run's encoder."""
    if config.train.text:
        raise ConfigError(
            "train.text trains the text encoder, and data.text names states of a frozen one; set"
            ' train.text=false, or data.text=""'
        )
    check_encoder(config)


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
        copied=nets.copied,
        parts=nets.parts,
        whole=nets.exported,
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
        return Sample(z_context, z_video, dit.text_kv(text_states(nets, params, batch)))

    return sample


def text_states(
    nets: Networks, params: ParamTree, batch: Batch, network: str = "text"
) -> jax.Array:
    """States [b, l, m] of the prompts: stored ones if the batch has them, else encoded now.

    Args:
      nets: of the stage.
      params: parameters of all networks.
      batch: with `text`, or with `ids` and `mask`.
      network: the text encoder.
    """
    if "text" in batch:
        return batch["text"]
    return nets.bind(network, params)(batch["ids"], batch["mask"])


def negative_states(
    config: ConfigDict, nets: Networks, prompt: str
) -> Callable[[ParamTree, int, str], jax.Array]:
    """Text states of the negative prompt of classifier-free guidance.

    Returns:
      (parameters of all networks, samples, text encoder) -> states [samples, l, m], all the same.

    Raises:
      ConfigError, TokenizerError, TextError: no usable tokenizer, or no stored states.
    """
    inputs = Texts(config)([prompt])

    def states(params: ParamTree, samples: int, network: str = "text") -> jax.Array:
        one = text_states(nets, params, jax.tree.map(jnp.asarray, inputs), network)
        return jnp.broadcast_to(one, (samples, *one.shape[1:]))

    return states


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
        vae = nets.bind("vae", params)
        pictures = batch["reference"][:, None], batch["garment"][:, None], batch["video"]
        parts = [vae.encode(to_model(pixels)) for pixels in pictures]
    else:
        raise ConfigError(
            "weights.vae is not set, and the data are pixels: set it, or encode the data first"
        )
    reference, garment, video = (jax.lax.stop_gradient(z.astype(jnp.float32)) for z in parts)
    return jnp.concatenate([reference, garment], axis=1), video


def decode_clip(vae: Any, z_bfhwc: jax.Array) -> jax.Array:
    """Pixels uint8 [b, t, h, w, 3] of a clip, with the memory of one latent frame."""
    return decode_in_turn(vae, z_bfhwc, None, first=True, at_once=1, finish=to_uint8)[0]


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
    v_pred: jax.Array,
    x0: jax.Array,
    noise: jax.Array,
    w_bf: jax.Array,
    w_bfhw: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:
    """Weighted flow-matching loss of the video frames in float32.

    Args:
      v_pred, x0, noise: [b, f, h, w, c].
      w_bf: weights of the frames.
      w_bfhw: weights of the latent pixels, see `cell_weights`; None: all count the same.

    Returns:
      The loss, and `mse`, the same without weights.
    """
    error = jnp.square(v_pred.astype(jnp.float32) - flow.velocity(x0, noise).astype(jnp.float32))
    error_bfhw = error.mean(axis=-1)
    mse = error_bfhw.mean()
    if w_bfhw is not None:
        error_bfhw *= w_bfhw
    return (w_bf * error_bfhw.mean(axis=(2, 3))).mean(), {"mse": mse}


def check_focus(config: ConfigDict) -> None:
    """Raise ConfigError if the loss is to favour garment or head, and the data have no labels."""
    focus = config.loss.garment, config.loss.head
    if focus != (1, 1) and "labels" not in config.data.labels:
        raise ConfigError(
            f"loss.garment is {focus[0]:g} and loss.head {focus[1]:g}: what counts more is known by"
            " labels; set data.labels=('labels',)"
        )


def cell_weights(config: ConfigDict, batch: Batch, frames: int) -> jax.Array | None:
    """How much each latent pixel counts, [b, f, h, w], of mean 1; None if all count the same.

    A latent pixel counts `loss.garment` times where it is all garment, `loss.head` times where it
    is all head, and what lies between for shares of them.

    Args:
      config: see `check_focus`.
      batch: with `labels` uint8 [b, f, h, w, labels], the shares as 0 to 255, see
        `chameleon_jax.data.labels`.
      frames: latent frames of the video that are trained, the first ones.
    """
    if (config.loss.garment, config.loss.head) == (1, 1):
        return None
    shares = batch["labels"][:, :frames].astype(jnp.float32) / 255
    counts = 1 + (config.loss.garment - 1) * shares[..., GARMENT]
    counts += (config.loss.head - 1) * shares[..., HEAD]
    return counts / counts.mean()


def network_timesteps(t_bf: jax.Array, config: ConfigDict) -> jax.Array:
    """Timesteps as the network gets them: exact, or rounded as the released code does."""
    if not config.loss.round_timesteps:
        return t_bf
    return flow.round_timesteps(t_bf, jnp.dtype(config.dtype))


def batches(config: ConfigDict, source: Source) -> Feed:
    """Clips with their prompts, one kind of batch for each (frames, clips) of `data.lengths`.

    Without entries there is one kind, `data.batch` clips of `video.frames` frames.

    Raises:
      ConfigError: a length above `video.frames`, or a size that cannot be; see also `Texts`.
      TokenizerError, TextError: see `Texts`.
    """
    lengths = config.data.lengths or ((config.video.frames, config.data.batch),)
    too_long = [frames for frames, _ in lengths if frames > config.video.frames]
    if too_long:
        raise ConfigError(
            f"data.lengths has clips of {too_long} frames; video.frames allows"
            f" {config.video.frames}"
        )
    buckets = read_buckets(config)
    return Feed(source, [_part(config, frames, clips, buckets) for frames, clips in lengths])


def eval_batches(config: ConfigDict, source: Source) -> Feed:
    """`data.batch` clips of `video.frames` frames, with their prompts, the same in every run.

    All are of the size of `video`; latents of other sizes are left out.
    """
    part = _part(config, config.video.frames, config.data.batch, (main_size(config),))
    return Feed(source, [held_out(part)])


def main_size(config: ConfigDict) -> tuple[int, int]:
    """(height, width) of held-out clips, of previews, and of what the exported weights make."""
    return config.video.height, config.video.width


def read_buckets(config: ConfigDict) -> tuple[tuple[int, int], ...]:
    """`data.buckets`, or the one size of `video`, as (height, width).

    Raises:
      ConfigError: a size that latents and patches do not divide.
    """
    units = _size_units(config)
    _check_size("video.height, video.width are", main_size(config), units)
    buckets = tuple((height, width) for height, width in config.data.buckets)
    for size in buckets:
        _check_size("data.buckets has the entry", size, units)
    return buckets or (main_size(config),)


def _check_size(what: str, size: tuple[int, int], units: tuple[int, int]) -> None:
    fitting = tuple(
        max(unit, round(side / unit) * unit) for side, unit in zip(size, units, strict=True)
    )
    if size != fitting:
        raise ConfigError(
            f"{what} {size}; expected multiples of {units}, the pixels of a token: the nearest is"
            f" {fitting}"
        )


def _size_units(config: ConfigDict) -> tuple[int, int]:
    """Height and width of a token in pixels."""
    factor = read_sizes("vae", config.model.vae).spatial_factor
    _, rows, columns = read_sizes("dit", config.model.dit).patch
    return factor * rows, factor * columns


def held_out(part: Part) -> Part:
    """The same batches without dropped prompts, and without threads that read ahead."""
    plain = dataclasses.replace(
        part.loader, dropout=0.0, workers=0, threads=1, prefetch=1, leave_others=True
    )
    return dataclasses.replace(part, loader=plain)


def _part(
    config: ConfigDict, frames: int, clips: int, buckets: tuple[tuple[int, int], ...]
) -> Part:
    texts = Texts(config)

    def transform(raw: dict[str, Any], rngs: list[np.random.Generator]) -> HostBatch:
        del rngs
        found = {name: raw[name] for name in (*LATENTS, *PIXELS, *KINDS, "text") if name in raw}
        return found if "text" in found else found | texts(raw["prompt"])

    data = config.data
    loader = LoaderConfig(
        batch=clips,
        frames=frames,
        frames_per_latent=read_sizes("vae", config.model.vae).temporal_factor,
        buckets=buckets,
        captions=data.captions,
        dropout=data.dropout,
        seed=config.seed,
        threads=data.threads,
        prefetch=data.prefetch,
        workers=data.workers,
    )
    return Part(loader, transform, texts.states)


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
        pixels = to_uint8(nets.bind("vae", frozen).decode(z))
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

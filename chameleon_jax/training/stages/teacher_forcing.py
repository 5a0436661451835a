"""Stage 2, teacher forcing: the teacher learns to continue a video chunk by chunk.

FashionChameleon, arXiv 2605.15824, section 4.2.

The video is cut into blocks of 3 latent frames. Each block is noised with a t of its own and
denoised with the clean context and the clean earlier blocks in sight, as far as the cache of the
stream would hold them (`config.cache`), all in one pass over [clean copy | noisy copy] with a
block-causal mask. Streaming over that cache computes the same function. Loss and data are those of
the teacher, see `teacher` and `common`.

In a stream the model continues its own frames, which are not as clean as the data's: the earlier
blocks are its own, and after a garment switch with `disentangle` the reference is, too.
`loss.history_noise` and `loss.reference_noise` > 0 add a little noise, a random amount per clip
that the network does not know, so that small faults in them are not carried on and multiplied (as
in GameNGen, arXiv 2408.14837). Noise on the reference has a price: what the noise hides, the
network does not learn to copy. The paper has none: its distillation, on the model's own streams,
does this work. `recycling` adds the network's own errors instead, see `recycling`; `resampling`
replaces the history by what the network makes of the same clip (Resampling Forcing, arXiv
2512.15702): its blocks are noised, each to a level of its own, and predicted clean again in one
step, without a gradient. That costs a forward pass more. The paper does it block after block; here
all are made at once, each behind clean ones. `resampling.noise` hides some of the reference and of
those clean ones, so that persons go wrong in them as they do in streams, where they come back from
the reference alone.

`changes` shows some clips with the history of another garment, under noise that the network knows
of: so it learns what a change with `carry` asks for, see inference/mechanisms.py. The level tells
such a history from one to be believed in.

Several noisy copies of a clip, of different t, can share the clean one and the context
(`loss.copies`): clips of one block then cost half as much a copy.

Axes: b batch, f latent frames, h w grid, c channels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from chameleon_jax.attention.policies import CachePolicy, make_policy
from chameleon_jax.config import ConfigError
from chameleon_jax.data.sources import latent_frames
from chameleon_jax.diffusion import flow
from chameleon_jax.keys import loss_key
from chameleon_jax.models.build import read_sizes
from chameleon_jax.models.dit import teacher_forcing_features, teacher_forcing_forward
from chameleon_jax.training.stage import Stage
from chameleon_jax.training.stages import common
from chameleon_jax.training.stages.labeller import NAME, label_loss, with_labeller
from chameleon_jax.training.stages.recycling import (
    ERRORS,
    RECYCLED,
    TIMES,
    disturb,
    read_recycling,
    with_bank,
)
from chameleon_jax.training.state import Batch, Metrics, ParamTree


def make_stage(config: ConfigDict) -> Stage:
    """The teacher-forcing stage; see configs/teacher_forcing.py for the config.

    Of a clip the whole blocks are used.

    Raises:
      ConfigError: clips are shorter than a block, or the cache is impossible; weights are missing,
        or a name is unknown.
    """
    nets = with_labeller(config, common.networks(config))
    sample_of = common.make_conditions(nets)
    weights_of = common.loss_weights(config)
    policy = read_policy(config)
    check_lengths(config, policy.block)
    common.check_focus(config)
    if config.changes.least > config.changes.most:
        raise ConfigError(
            f"changes.least is {config.changes.least}, and changes.most {config.changes.most};"
            " expected a range of noise, from the lower level to the higher one"
        )
    recycle, copies = read_recycling(config), config.loss.copies
    if recycle is not None and copies > 1:
        raise ConfigError(
            f"loss.copies is {copies}, and recycling.clips above 0: what is recycled depends on the"
            " noise of the one copy; set loss.copies=1"
        )
    forward = functools.partial(teacher_forcing_forward, policy=policy)
    layers = (config.loss.labels_layer,) if config.loss.labels else ()

    def loss(
        params: ParamTree, frozen: ParamTree, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        params = params | frozen
        dit = nets.bind("dit", params)
        sample = sample_of(params, dit, batch)
        z_clean = whole_blocks(sample.z_video, policy.block)
        b, f = z_clean.shape[:2]
        t_bf = flow.draw_timesteps(
            loss_key(key, "times"),
            b,
            f,
            block=policy.block,
            shift=config.loss.shift,
            copies=copies,
        )
        z = jnp.tile(z_clean, (1, copies, 1, 1, 1))
        noise = jax.random.normal(loss_key(key, "noise"), z.shape)
        z_noisy = flow.add_noise(z, noise, t_bf / 1000)
        t_network = common.network_timesteps(t_bf, config)
        history = z_clean
        if config.resampling.clips:
            of_reference, of_history, of_own = jax.random.split(loss_key(key, "resampling"), 3)
            most = config.resampling.noise
            reference = disturbed(sample.z_context[:, :1], most, of_reference)
            again = functools.partial(
                forward,
                dit,
                jnp.concatenate([reference, sample.z_context[:, 1:]], axis=1),
                disturbed(z_clean, most, of_history),
                text_kv=sample.text_kv,
            )
            history = resampled(again, z_clean, config, policy.block, of_own)
        history = disturbed(history, config.loss.history_noise, loss_key(key, "history_noise"))
        t_history = None
        if config.changes.clips:
            before = whole_blocks(read_before(config, batch), policy.block)
            history, t_history = changed(
                history, before.astype(z_clean.dtype), config, loss_key(key, "changes")
            )
        if RECYCLED in frozen:
            history = disturb(
                recycle,
                frozen[RECYCLED]["bank"],
                history,
                t_bf[:, :: policy.block],
                frozen[RECYCLED]["step"],
                loss_key(key, "recycling"),
            )
        reference = disturbed(
            sample.z_context[:, :1], config.loss.reference_noise, loss_key(key, "reference_noise")
        )
        z_context = jnp.concatenate([reference, sample.z_context[:, 1:]], axis=1)
        v, seen = teacher_forcing_features(
            dit,
            z_context,
            history,
            z_noisy,
            t_network,
            sample.text_kv,
            policy=policy,
            layers=layers,
            t_clean=t_history,
        )
        w_bfhw = common.cell_weights(config, batch, f)
        if w_bfhw is not None:
            w_bfhw = jnp.tile(w_bfhw, (1, copies, 1, 1))
        value, metrics = common.flow_loss(v, z, noise, weights_of(t_bf), w_bfhw)
        for features in seen:
            extra, found = label_loss(nets.bind(NAME, params), features, batch, f, dit.config.patch)
            value, metrics = value + config.loss.labels * extra, metrics | found
        if RECYCLED in frozen:
            errors = flow.x0_from_velocity(z_noisy, v, t_bf / 1000) - z
            metrics |= {ERRORS: errors, TIMES: t_bf[:, :: policy.block]}
        return value, metrics

    def generate(params: ParamTree, frozen: ParamTree, batch: Batch, key: jax.Array) -> jax.Array:
        """Block after block as in a stream, but with the forward pass of training.

        What it makes is what a stream over the cache makes.
        """
        params = params | frozen
        dit = nets.bind("dit", params)
        sample = sample_of(params, dit, batch)
        sigmas = jnp.asarray(flow.euler_sigmas(config.preview.steps, config.loss.shift))
        video = jax.random.normal(key, whole_blocks(sample.z_video, policy.block).shape)

        for start in range(0, video.shape[1], policy.block):
            chunk = slice(start, start + policy.block)

            def step(
                video: jax.Array, pair: tuple[jax.Array, jax.Array], chunk: slice = chunk
            ) -> tuple[jax.Array, None]:
                sigma, sigma_next = pair
                t_bf = jnp.full(video.shape[:2], 1000 * sigma)
                t_network = common.network_timesteps(t_bf, config)
                v = forward(dit, sample.z_context, video, video, t_network, sample.text_kv)
                z = flow.euler_step(video[:, chunk], v[:, chunk], sigma, sigma_next)
                return video.at[:, chunk].set(z), None

            video, _ = jax.lax.scan(step, video, (sigmas[:-1], sigmas[1:]))
        return video

    stage = common.flow_stage(config, "teacher_forcing", nets, loss=loss, generate=generate)
    if recycle is None:
        return stage
    return with_bank(stage, recycle, chunk_shape(config, policy.block), config.seed)


def chunk_shape(config: ConfigDict, block: int) -> tuple[int, int, int, int]:
    """Latents of a chunk, [f, h, w, c]."""
    vae = read_sizes("vae", config.model.vae.to_dict())
    height, width = (
        side // vae.spatial_factor for side in (config.video.height, config.video.width)
    )
    return block, height, width, vae.z_dim


def read_policy(config: ConfigDict) -> CachePolicy:
    """The cache policy of the stream to train for.

    Raises:
      ConfigError: it is impossible.
    """
    try:
        return make_policy(**config.cache)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def check_lengths(config: ConfigDict, block: int) -> None:
    """Raise ConfigError if a kind of clip has no whole block of latent frames."""
    factor = read_sizes("vae", config.model.vae).temporal_factor
    for frames in [config.video.frames, *(frames for frames, _ in config.data.lengths)]:
        latents = latent_frames(frames, factor)
        if latents < block:
            raise ConfigError(
                f"clips of {frames} frames are {latents} latent ones, a block is {block}"
            )


def whole_blocks(z: jax.Array, block: int) -> jax.Array:
    """The latent frames [b, f, h, w, c] that make whole blocks."""
    return z[:, : z.shape[1] // block * block]


def resampled(
    forward: Callable[..., jax.Array],
    z: jax.Array,
    config: ConfigDict,
    block: int,
    key: jax.Array,
) -> jax.Array:
    """Latents in which some clips are the network's own predictions of themselves.

    Args:
      forward: (noisy latents, timesteps of the network) -> velocity [b, f, h, w, c].
      z: clean latents [b, f, h, w, c].
      config: `resampling.clips`, the share of the others; `resampling.most`, the highest level that
        their blocks are noised to, each to one from U(0, most).
      block: latent frames that share a level.
      key: PRNG key.

    Returns:
      As `z`; no gradient goes through it.
    """
    b, f = z.shape[:2]
    of_clip, of_level, of_noise = jax.random.split(key, 3)
    chosen = jax.random.bernoulli(of_clip, config.resampling.clips, (b, 1, 1, 1, 1))
    level = jax.random.uniform(of_level, (b, f // block), maxval=config.resampling.most)
    level = jnp.repeat(level, block, axis=1)
    z_noisy = flow.add_noise(z, jax.random.normal(of_noise, z.shape), level)
    v = forward(z_noisy, common.network_timesteps(1000 * level, config))
    own = flow.x0_from_velocity(z_noisy, v, level).astype(z.dtype)
    return jax.lax.stop_gradient(jnp.where(chosen, own, z))


def read_before(config: ConfigDict, batch: Batch) -> jax.Array:
    """The clips of a batch in another garment.

    Raises:
      ConfigError: it has none.
    """
    if "z_before" not in batch:
        raise ConfigError(
            f"changes.clips is {config.changes.clips}, and the data has no clips in another"
            " garment; scenes that are rendered meanwhile have them, see configs/sprint.py; or set"
            " changes.clips=0"
        )
    return batch["z_before"]


def changed(
    z: jax.Array, before: jax.Array, config: ConfigDict, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """A history in which some clips show another garment, under noise that the network knows of.

    Args:
      z: the history [b, f, h, w, c].
      before: the same clips in another garment, of the same shape.
      config: `changes.clips`, the share of those that do; `changes.least` and `changes.most`, the
        range that the level of the noise is drawn from, one for each clip.
      key: PRNG key.

    Returns:
      The history, and its timesteps [b, f]: 0 where nothing is changed.
    """
    b, f = z.shape[:2]
    of_clip, of_level, of_noise = jax.random.split(key, 3)
    chosen = jax.random.bernoulli(of_clip, config.changes.clips, (b, 1))
    low, high = config.changes.least, config.changes.most
    level = jax.random.uniform(of_level, (b, 1), minval=low, maxval=high)
    level = jnp.broadcast_to(level, (b, f))
    noisy = flow.add_noise(before, jax.random.normal(of_noise, z.shape), level)
    where = chosen[..., None, None, None]
    times = common.network_timesteps(1000 * level, config)
    return jnp.where(where, noisy, z), jnp.where(chosen, times, 0.0)


def disturbed(z: jax.Array, most: float, key: jax.Array) -> jax.Array:
    """Clean latents [b, f, h, w, c] with noise of a level drawn per clip from U(0, `most`).

    Unchanged if `most` is 0.
    """
    if not most:
        return z
    level_key, noise_key = jax.random.split(key)
    level = jax.random.uniform(level_key, (z.shape[0], 1), maxval=most)
    return flow.add_noise(z, jax.random.normal(noise_key, z.shape), level)

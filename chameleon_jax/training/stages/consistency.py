"""Stage 2b, causal consistency distillation: from many steps to few, without roll-outs.

Causal Forcing++, arXiv 2605.15141; consistency models, arXiv 2303.01469. The teacher is the
network of teacher forcing, with guidance; the student has the same weights and the same mask. On
one path from noise to data every prediction of the clean clip should be the same:

    x_t  = (1 - t) x0 + t noise                       t on a grid of `loss.steps` levels
    x_t' = x_t + (t' - t) v_teacher(x_t)              one step of the teacher to the next level
    loss = mean of (G(x_t, t) - G_ema(x_t', t'))^2    G predicts x0; without gradient on the right

All of them see the clean history of the data. At t' = 0 the prediction is x_t' itself, which holds
all others. The student is sampled with `few_step`: predict, noise again. It needs no pairs of noise
and video, and the paper does without it: distillation (`dmd`) may start from either.

Axes: b batch, f latent frames, h w grid, c channels.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from chameleon_jax.config import ConfigError
from chameleon_jax.diffusion import flow
from chameleon_jax.diffusion.sampler import guidance
from chameleon_jax.keys import loss_key, training_key
from chameleon_jax.models.dit import DiT, teacher_forcing_forward
from chameleon_jax.training import optim
from chameleon_jax.training.networks import build_network, weights_file
from chameleon_jax.training.stage import Stage
from chameleon_jax.training.stages import common, dmd_setup, rollouts
from chameleon_jax.training.stages.scores import Clip
from chameleon_jax.training.stages.teacher_forcing import (
    check_lengths,
    disturbed,
    read_policy,
    whole_blocks,
)
from chameleon_jax.training.state import (
    Batch,
    Metrics,
    ParamTree,
    TrainState,
    descend,
    new_state,
)
from chameleon_jax.training.tuning import Tuned, stored


def make_stage(config: ConfigDict) -> Stage:
    """The consistency stage; see configs/consistency.py for the config.

    Raises:
      ConfigError: weights are missing, or settings do not go together.
    """
    nets = networks(config)
    policy, sampler = read_policy(config), dmd_setup.read_sampler(config)
    check_lengths(config, policy.block)
    forward = functools.partial(teacher_forcing_forward, policy=policy)
    levels = jnp.asarray(flow.euler_sigmas(config.loss.steps, config.loss.shift))
    negative = None
    if config.loss.guidance != 1:
        negative = common.negative_states(config, nets, config.loss.negative_prompt)
    schedule = optim.make_schedule(config.schedule, config.train.steps)
    optimizer = optim.make_optimizer(config.optimizer, schedule)

    def velocity(
        dit: DiT, clip: Clip, states: jax.Array, x: jax.Array, sigma_bf: jax.Array
    ) -> jax.Array:
        t_network = common.network_timesteps(1000 * sigma_bf, config)
        v = forward(dit, clip.z_context, clip.history, x, t_network, dit.text_kv(states))
        return v.astype(jnp.float32)

    def draw_levels(key: jax.Array, b: int, f: int) -> tuple[jax.Array, jax.Array]:
        rows = jax.random.randint(key, (b, f // policy.block), 0, config.loss.steps)
        rows = jnp.repeat(rows, policy.block, axis=1)
        return levels[rows], levels[rows + 1]

    def loss(
        params: ParamTree, fixed: ParamTree, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        everything = params | fixed
        teacher, student = nets.bind("teacher", everything), nets.bind("dit", everything)
        average = nets.bind("dit", everything | {"dit": everything["target"]})
        z_context, z_video = common.latents(nets, everything, batch)
        z = whole_blocks(z_video, policy.block)
        history = disturbed(z, config.loss.history_noise, loss_key(key, "history_noise"))
        clip = Clip(z_context, z, history)
        states = common.text_states(nets, everything, batch)
        sigma, sigma_next = draw_levels(loss_key(key, "times"), *z.shape[:2])
        x = flow.add_noise(z, jax.random.normal(loss_key(key, "noise"), z.shape), sigma)

        v = velocity(teacher, clip, states, x, sigma)
        if negative is not None:
            without = velocity(teacher, clip, negative(everything, len(states)), x, sigma)
            v = guidance(v, without, config.loss.guidance)
        x_next = flow.euler_step(x, v, sigma, sigma_next)
        v_next = velocity(average, clip, states, x_next, sigma_next)
        target = jax.lax.stop_gradient(flow.x0_from_velocity(x_next, v_next, sigma_next))

        predicted = flow.x0_from_velocity(x, velocity(student, clip, states, x, sigma), sigma)
        error = jnp.square(predicted - target).mean()
        return error, {"target_mse": jnp.square(target - z).mean()}

    follow = descend(
        loss,
        optimizer,
        functools.partial(training_key, config.seed, "loss"),
        ema_decay=config.ema.decay,
        ema_start=config.ema.start,
        accumulate=config.train.accumulate,
    )

    def init(params: ParamTree) -> TrainState:
        return new_state(params, optimizer, ema=True)

    def step(state: TrainState, frozen: ParamTree, batch: Batch) -> tuple[TrainState, Metrics]:
        target = {"target": state.ema["dit"]}
        after, metrics = follow(state, frozen | target, batch)
        rate = schedule(state.step) * optim.rate_scale(state.opt_state)
        return after, metrics | {"learning_rate": rate}

    def evaluate(state: TrainState, frozen: ParamTree, batch: Batch, key: jax.Array) -> Metrics:
        average = state.inference_params
        value, metrics = loss(average, frozen | {"target": average["dit"]}, batch, key)
        return {"loss": value, **metrics}

    def generate(params: ParamTree, frozen: ParamTree, batch: Batch, key: jax.Array) -> jax.Array:
        everything = params | frozen
        dit = nets.bind("dit", everything)
        z_context, z_video = common.latents(nets, everything, batch)
        text_kv = dit.text_kv(common.text_states(nets, everything, batch))
        exits = rollouts.last_exits(sampler, z_video.shape[1] // policy.block)
        return rollouts.roll_out(
            dit, policy, z_context, text_kv, key, sampler=sampler, exits=exits
        ).z

    preview = common.make_preview(config, nets, generate)
    return Stage(
        "consistency",
        trained=nets.trained,
        frozen=nets.frozen,
        weights=nets.weights,
        copied=tuple(name for name in ("vae", "text") if name in nets.weights),
        init=init,
        steps={"consistency": step},
        evaluate=evaluate,
        preview=lambda state, *rest: preview(state.inference_params, *rest),
        exported=lambda state, frozen: nets.exported(state.inference_params, frozen),
        parts=nets.parts,
        batches=functools.partial(common.batches, config),
        eval_batches=functools.partial(common.eval_batches, config),
    )


def networks(config: ConfigDict) -> common.Networks:
    """The student; and, with the weights that it starts from, its teacher.

    Raises:
      ConfigError: no weights to start from, no averaging, or a text encoder that is to be trained.
    """
    if not config.init_from:
        raise ConfigError(
            "init_from is not set; consistency distillation starts from the export of teacher"
            " forcing"
        )
    if not config.ema.decay:
        raise ConfigError("ema.decay is 0; the average is the target here: set it, e.g. to 0.99")
    if config.train.text:
        raise ConfigError("train.text is true; distillation keeps the text encoder as it is")
    nets = common.networks(config)
    teacher = stored(Tuned(build_network("dit", config, frozen=True)))
    return dataclasses.replace(
        nets,
        frozen={**nets.frozen, "teacher": teacher.changing},
        weights={**nets.weights, "teacher": weights_file(config.init_from, "dit")},
        modules={**nets.modules, "teacher": teacher},
    )

"""Stage 3, gradient-reweighted distribution matching distillation (GR-DMD).

FashionChameleon, arXiv 2605.15824, section 4.2; the mathematics is in `dmd_loss`. The student rolls
a video out as it will stream. A frozen score, the teacher, and a critic that follows the student
say where the video should go; the frames that a reward likes least count most. The critic learns
from a roll-out in every step, the student in every `critic.every`-th. What the config can ask for
is in `dmd_setup`.

Axes: b batch, f latent frames, h w grid, c channels.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from chameleon_jax.diffusion import flow
from chameleon_jax.keys import loss_key, training_key
from chameleon_jax.models.build import read_sizes
from chameleon_jax.models.dit import TextKV
from chameleon_jax.training import diagnosis, optim
from chameleon_jax.training.stage import Stage, Step
from chameleon_jax.training.stages import common, dmd_loss, dmd_setup, rollouts
from chameleon_jax.training.stages.dmd_setup import Kind
from chameleon_jax.training.stages.rewards import make_reward
from chameleon_jax.training.stages.scores import Clip, Noised, Score
from chameleon_jax.training.stages.teacher_forcing import read_policy, whole_blocks
from chameleon_jax.training.state import (
    Batch,
    Metrics,
    ParamTree,
    TrainState,
    descend,
    new_state,
)
from chameleon_jax.training.tuning import fixed_name

State = dict[str, TrainState]  # "generator" and "critic"


class Made(NamedTuple):
    """A roll-out in its setting.

    Attributes:
      data: the clip of the data set whose conditions it starts from; whole chunks.
      z_context: its condition frames, those after the last switch.
      text_kv: of the student.
      rollout: what the student made; as many frames as `data` are trained, the last ones.
      z_opening: the condition frames of its first chunk, if it has others.
    """

    data: Clip
    z_context: jax.Array
    text_kv: TextKV
    rollout: rollouts.Rollout
    z_opening: jax.Array | None = None

    @property
    def frames(self) -> int:
        """Latent frames that are trained."""
        return self.data.z.shape[1]


def make_stage(config: ConfigDict) -> Stage:
    """The distillation stage; see configs/dmd.py for the config.

    Raises:
      ConfigError: weights are missing, a name is unknown, or settings do not go together.
    """
    parts = Distillation(config)
    nets, every, kinds = parts.nets, config.critic.every, dmd_setup.read_kinds(config)
    # The student's schedule counts the student's steps.
    schedules = {
        "generator": optim.make_schedule(config.schedule, -(-config.train.steps // every)),
        "critic": optim.make_schedule(config.critic.schedule, config.train.steps),
    }
    optimisers = {
        "generator": optim.make_optimizer(config.optimizer, schedules["generator"]),
        "critic": optim.make_optimizer(config.critic.optimizer, schedules["critic"]),
    }

    def init(params: ParamTree) -> State:
        student = {"generator": params["generator"]}
        followers = {name: params[name] for name in params if name != "generator"}
        average = config.ema.decay > 0
        return {
            "generator": new_state(student, optimisers["generator"], ema=average),
            "critic": new_state(followers, optimisers["critic"], ema=False),
        }

    def steps_of(kind: Kind) -> dict[str, Step]:
        learn = descend(
            functools.partial(parts.generator_loss, kind),
            optimisers["generator"],
            functools.partial(training_key, config.seed, "loss"),
            ema_decay=config.ema.decay,
            ema_start=config.ema.start,
            accumulate=config.train.accumulate,
        )
        follow = descend(
            functools.partial(parts.critic_loss, kind),
            optimisers["critic"],
            functools.partial(training_key, config.seed, "critic"),
            accumulate=config.train.accumulate,
        )

        def critic_step(state: State, frozen: ParamTree, batch: Batch) -> tuple[State, Metrics]:
            fixed = frozen | state["generator"].params
            critic, metrics = follow(state["critic"], fixed, batch)
            return state | {"critic": critic}, _named("critic", metrics)

        def both_steps(state: State, frozen: ParamTree, batch: Batch) -> tuple[State, Metrics]:
            student = state["generator"]
            rate = schedules["generator"](student.step) * optim.rate_scale(student.opt_state)
            fixed = frozen | state["critic"].params
            generator, metrics = learn(state["generator"], fixed, batch)
            state, others = critic_step(state | {"generator": generator}, frozen, batch)
            return state, _named("generator", metrics) | others | {"learning_rate": rate}

        return {f"critic{kind.suffix}": critic_step, f"both{kind.suffix}": both_steps}

    def turn(number: int) -> str:
        kind = kinds[number // every % len(kinds)]
        return ("critic" if number % every else "both") + kind.suffix

    def evaluate(state: State, frozen: ParamTree, batch: Batch, key: jax.Array) -> Metrics:
        params = state["generator"].inference_params | state["critic"].params
        return parts.held_out(params | frozen, batch, key)

    def exported(state: State, frozen: ParamTree) -> ParamTree:
        files = nets.exported(state["generator"].inference_params, frozen)
        return {"dit": files.pop("generator"), **files}

    generate = common.make_preview(config, nets, parts.generate)
    return Stage(
        "dmd",
        trained=nets.trained,
        frozen=nets.frozen,
        weights=nets.weights,
        copied=tuple(name for name in ("vae", "text") if name in nets.weights),
        parts=nets.parts,
        init=init,
        steps={name: step for kind in kinds for name, step in steps_of(kind).items()},
        turn=turn,
        evaluate=evaluate,
        preview=lambda state, *rest: generate(state["generator"].inference_params, *rest),
        exported=exported,
        batches=functools.partial(common.batches, config),
        eval_batches=functools.partial(common.eval_batches, config),
        shown=("critic/loss", "generator/loss", "dmd/ratio"),
    )


class Distillation:
    """The pure functions of the stage, over one config.

    `params` in all of them holds the parameters of all networks, by name.
    """

    def __init__(self, config: ConfigDict):
        self.config = config
        self.reward = make_reward(config) if config.reward.name else None
        self.nets = dmd_setup.networks(config, self.reward)
        self.policy, self.sampler = read_policy(config), dmd_setup.read_sampler(config)
        self.shared_exit = dmd_setup.shares_exit(config)
        self.score = Score(config.scores.causal, self.policy)
        self.frames_per_latent = read_sizes("vae", config.model.vae.to_dict()).temporal_factor
        # The released code's "t = 0" is the last row of its table, which is not clean.
        self.residual = 0.0
        if config.rollout.residual_noise:
            self.residual = float(flow.sigma_table(config.loss.shift)[-1])
        self.negative = None
        if config.scores.guidance != 1:
            self.negative = common.negative_states(config, self.nets, config.scores.negative_prompt)

    def bind(self, name: str, params: ParamTree) -> Any:
        """One of the networks; a critic that is a LoRA lies on the teacher."""
        if dmd_setup.shares_teacher(name, self.nets.modules[name]):
            params = params | {fixed_name(name): params["real"]}
        return self.nets.bind(name, params)

    # Roll-outs.

    def make(self, params: ParamTree, kind: Kind, batch: Batch, key: jax.Array) -> Made:
        """A roll-out of a kind with exit steps drawn, without gradient."""
        data = self._clip_of_data(params, batch)
        z_context, text_kv = data.z_context, self._generator_kv(params, batch)
        chunks, before, z_opening = data.z.shape[1] // self.policy.block, kind.before, None
        for switch in range(kind.switches):
            switch_key = jax.random.fold_in(loss_key(key, "before"), switch)
            exits = rollouts.last_exits(self.sampler, kind.before)
            made = self._roll_out(params, z_context, text_kv, switch_key, exits, z_opening)
            last_frame = rollouts.last_frame(self.bind("vae", params), made.z)
            person, garment = z_context[:, :1], jnp.roll(z_context[:, 1:], 1, axis=0)
            z_context, before = jnp.concatenate([last_frame, garment], axis=1), 0
            if self.config.rollout.anchor:
                z_opening = z_context
                z_context = jnp.concatenate([person, garment], axis=1)
        exits = rollouts.draw_exits(
            loss_key(key, "exits"),
            self.sampler,
            before + chunks,
            shared=self.shared_exit,
            before=before,
        )
        made = self._roll_out(
            params, z_context, text_kv, loss_key(key, "rollout"), exits, z_opening
        )
        return Made(data, z_context, text_kv, made, z_opening)

    def _clip_of_data(self, params: ParamTree, batch: Batch) -> Clip:
        z_context, z_video = common.latents(self.nets, params, batch)
        z = whole_blocks(z_video, self.policy.block)
        return Clip(z_context, z, z)

    def _generator_kv(self, params: ParamTree, batch: Batch) -> TextKV:
        states = common.text_states(self.nets, params, batch)
        return self.bind("generator", params).text_kv(states)

    def _roll_out(
        self,
        params: ParamTree,
        z_context: jax.Array,
        text_kv: TextKV,
        key: jax.Array,
        exits: rollouts.Exits,
        z_opening: jax.Array | None = None,
    ) -> rollouts.Rollout:
        return rollouts.roll_out(
            self.bind("generator", params),
            self.policy,
            z_context,
            text_kv,
            key,
            sampler=self.sampler,
            exits=exits,
            residual=self.residual,
            z_opening=z_opening,
            opening_noise=0.0 if z_opening is None else self.config.rollout.history_noise,
        )

    def clip_of(self, params: ParamTree, made: Made, x: jax.Array) -> tuple[Clip, jax.Array]:
        """The trained frames as a clip that the scores know, and which of them have a gradient.

        A bidirectional score knows clips that begin with the latent of a single picture. Where the
        trained frames lie in the middle of a stream their first latent is therefore replaced by
        that of its last pixel frame, encoded alone, which has no gradient (as LongLive, arXiv
        2509.22622, does). Causal scores see the stream itself.

        Args:
          params: of all networks.
          made: the roll-out.
          x: its last frames, [b, f, h, w, c].

        Returns:
          The clip, and 0 or 1 for each frame, [f].
        """
        before = made.rollout.z[:, : -x.shape[1]]
        history = jnp.concatenate([before, x], axis=1)
        free = jnp.ones(x.shape[1], jnp.float32)
        if self.score.causal or not before.shape[1]:
            return Clip(made.z_context, x, history, made.z_opening), free
        upto = made.rollout.z[:, : before.shape[1] + 1]
        first = rollouts.last_frame(self.bind("vae", params), upto)
        z = jnp.concatenate([first, x[:, 1:]], axis=1)
        return Clip(made.z_context, z, z), free.at[0].set(0.0)

    # The scores.

    def noised(self, z: jax.Array, key: jax.Array) -> Noised:
        """A clip at drawn noise levels."""
        scores, b, f = self.config.scores, *z.shape[:2]
        draws = self.score.draws(f)
        t = dmd_loss.score_timesteps(
            loss_key(key, "times"), b, draws, scores.low, scores.high, self.config.loss.shift
        )
        t_bf = jnp.repeat(t, f // draws, axis=1)
        noise = jax.random.normal(loss_key(key, "noise"), z.shape)
        x = flow.add_noise(z, noise, t_bf / 1000)
        return Noised(x, noise, t_bf, common.network_timesteps(t_bf, self.config))

    def compare(
        self, params: ParamTree, batch: Batch, clip: Clip, noised: Noised
    ) -> tuple[jax.Array, jax.Array]:
        """Predictions of the clean clip: (fake, real), without gradient."""
        fake, real = (self.bind(name, params) for name in ("critic", "real"))
        states, negative = self._score_states(params, batch)
        negative_kv = None if negative is None else real.text_kv(negative)
        scale = self.config.scores.guidance
        predictions = (
            self.score.clean(fake, clip, noised, fake.text_kv(states)),
            self.score.guided(real, clip, noised, real.text_kv(states), negative_kv, scale),
        )
        return jax.lax.stop_gradient(predictions)

    def _score_states(self, params: ParamTree, batch: Batch) -> tuple[jax.Array, jax.Array | None]:
        encoder = "score_text" if "score_text" in self.nets.frozen else "text"
        states = common.text_states(self.nets, params, batch, encoder)
        negative = None
        if self.negative is not None:
            negative = self.negative(params, states.shape[0], encoder)
        return states, negative

    # Losses.

    def generator_loss(
        self, kind: Kind, params: ParamTree, fixed: ParamTree, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """Where the student should go, as a loss; see `state.descend` for the arguments."""
        everything = params | fixed
        made = self.make(everything, kind, batch, key)
        student = self.bind("generator", everything)
        x = rollouts.predict(
            student,
            self.policy,
            made.z_context,
            made.text_kv,
            made.rollout,
            made.frames,
            made.z_opening,
        )
        clip, free = self.clip_of(everything, made, jax.lax.stop_gradient(x))
        noised = self.noised(clip.z, key)
        fake, real = self.compare(everything, batch, clip, noised)
        g = dmd_loss.dmd_gradient(clip.z, fake, real)
        metrics = dmd_loss.gap(clip.z, fake, real) | _about(x, made.data.z)
        if self.config.gan.layers:
            push, of_heads = self._adversarial_gradient(everything, batch, clip, noised, g)
            g, metrics = g + push, metrics | of_heads
        weights, of_reward = self._weights(everything, made, x)
        metrics |= of_reward
        return dmd_loss.matching_loss(x, g, weights * free), metrics

    def _weights(self, params: ParamTree, made: Made, x: jax.Array) -> tuple[jax.Array, Metrics]:
        """Weights of the frames of x, [b, f]; of the reward if there is one."""
        if self.reward is None:
            return dmd_loss.even_weights(x), {}
        z = jax.lax.stop_gradient(made.rollout.z)
        pixels = common.decode_clip(self.bind("vae", params), z)
        block = self.policy.block
        rewards = dmd_loss.chunk_rewards(
            self.reward.score(params, pixels), block, self.frames_per_latent
        )[:, -(x.shape[1] // block) :]
        rewards = jax.lax.stop_gradient(rewards)
        metrics = {"reward/mean": rewards.mean()}
        means = rewards.mean(axis=0)
        metrics |= {f"reward/chunk_{i:02d}": means[i] for i in range(means.shape[0])}
        return dmd_loss.reward_weights(rewards, block, self.config.reward.tau), metrics

    def _adversarial_gradient(
        self, params: ParamTree, batch: Batch, clip: Clip, noised: Noised, g: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """What the heads would change at x, made `gan.weight` times as long as DMD's g."""

        def loss(z: jax.Array) -> jax.Array:
            moved = noised._replace(x=flow.add_noise(z, noised.noise, noised.t_bf / 1000))
            logits, _ = self._look(params, batch, clip._replace(z=z), moved)
            _, of_generator = dmd_loss.adversarial_losses(logits, logits)
            return of_generator

        value, push = jax.value_and_grad(loss)(clip.z)
        ratio = _length(g) / jnp.maximum(_length(push), jnp.finfo(jnp.float32).tiny)
        return self.config.gan.weight * ratio * push, {"gan/generator": value}

    def _look(
        self, params: ParamTree, batch: Batch, clip: Clip, noised: Noised
    ) -> tuple[jax.Array, jax.Array]:
        """Logits of the heads [b, f, heads], and the critic's velocity."""
        critic = self.bind("critic", params)
        states, _ = self._score_states(params, batch)
        v, features = self.score.velocity_and_features(
            critic, clip, noised, critic.text_kv(states), self.config.gan.layers
        )
        return self.bind("heads", params)(features), v

    def critic_loss(
        self, kind: Kind, params: ParamTree, fixed: ParamTree, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """Flow matching on the student's own videos; pixels are only decoded for switches."""
        everything = params | fixed
        made = self.make(everything, kind, batch, key)
        x = jax.lax.stop_gradient(made.rollout.z[:, -made.frames :])
        clip, _ = self.clip_of(everything, made, x)
        noised = self.noised(clip.z, key)
        target = flow.velocity(clip.z, noised.noise)
        if not self.config.gan.layers:
            critic = self.bind("critic", everything)
            states, _ = self._score_states(everything, batch)
            v = self.score.velocity(critic, clip, noised, critic.text_kv(states))
            return _flow_error(v, target), {}
        fake_logits, v = self._look(everything, batch, clip, noised)
        true = noised._replace(x=flow.add_noise(made.data.z, noised.noise, noised.t_bf / 1000))
        real_logits, _ = self._look(everything, batch, made.data, true)
        of_heads, _ = dmd_loss.adversarial_losses(real_logits, fake_logits)
        loss = _flow_error(v, target)
        right = jnp.concatenate([real_logits > 0, fake_logits < 0]).mean()
        return loss + self.config.gan.critic_weight * of_heads, {
            "flow": loss,
            "heads": of_heads,
            "heads_right": right,
        }

    # What is shown.

    def generate(
        self, params: ParamTree, frozen: ParamTree, batch: Batch, key: jax.Array
    ) -> jax.Array:
        """Latents of a stream with all of its steps, for previews."""
        everything = params | frozen
        data, text_kv = self._clip_of_data(everything, batch), self._generator_kv(everything, batch)
        exits = rollouts.last_exits(self.sampler, data.z.shape[1] // self.policy.block)
        return self._roll_out(everything, data.z_context, text_kv, key, exits).z

    def held_out(self, params: ParamTree, batch: Batch, key: jax.Array) -> Metrics:
        """Streams of held-out conditions against the scores, and against the clips themselves."""
        x = self.generate(params, {}, batch, loss_key(key, "rollout"))
        data = self._clip_of_data(params, batch)
        clip = data._replace(z=x, history=x)
        noised = self.noised(x, key)
        fake, real = self.compare(params, batch, clip, noised)
        return dmd_loss.gap(x, fake, real) | _about(x, data.z)


def _named(network: str, metrics: Metrics) -> Metrics:
    """Metrics of `descend` under the name of their network; those with a name of their own stay."""
    return {key if "/" in key else f"{network}/{key}": value for key, value in metrics.items()}


def _about(x: jax.Array, z_video: jax.Array) -> Metrics:
    """The student's latents beside those of the clips, see `diagnosis`."""
    x = jax.lax.stop_gradient(x.astype(jnp.float32))
    measures = diagnosis.latent_measures(x, z_video)
    named = {f"x/{name.removeprefix('latent_')}": value for name, value in measures.items()}
    # The first latent frame stands for one picture and is unlike the others.
    moved, true = (diagnosis.motion(z[:, 1:].astype(jnp.float32)).mean() for z in (x, z_video))
    return named | {"x/motion_ratio": moved / jnp.maximum(true, diagnosis.SMALLEST)}


def _flow_error(v: jax.Array, target: jax.Array) -> jax.Array:
    return jnp.square(v.astype(jnp.float32) - target.astype(jnp.float32)).mean()


def _length(x: Any) -> jax.Array:
    return jnp.sqrt(jnp.square(x).sum())

"""Stage 1, the teacher: a bidirectional in-context video model (arXiv 2605.15824, section 4.1).

Two clean latent frames, the person in another garment and the garment alone, stand before the video
at t = 0. All video frames share one t; the network learns v = noise - x0 on them:

    loss = mean over b, f of  w(t) * mean over h, w, c of (v_pred - v)^2

with w the training weight of the released schedule (`loss.weights` "bell") or 1 ("none"). The bell
leaves out t = 1000, where the first step of a sampler decides what goes where: pretrained weights
know that step, new ones have to learn it. The reference shows another garment than the video, or
the model would learn to copy it. 10 % of the prompts are empty, for classifier-free guidance.

`conditioning` = "channels" is the baseline of Table 2: the two latents lie behind the channels of
every noisy frame instead, see `dit.channels_forward`.

Axes: b batch, f latent frames, h w grid, c channels.
"""

from __future__ import annotations

import jax
from ml_collections import ConfigDict

from chameleon_jax.diffusion import flow, sampler
from chameleon_jax.keys import loss_key
from chameleon_jax.models.dit import bidirectional_forward, channels_forward
from chameleon_jax.training.stage import Stage
from chameleon_jax.training.stages import common
from chameleon_jax.training.state import Batch, Metrics, ParamTree

# How the network gets its conditions, by `conditioning`.
FORWARDS = {"in_context": bidirectional_forward, "channels": channels_forward}


def make_stage(config: ConfigDict) -> Stage:
    """The teacher stage; see configs/teacher.py for the config.

    Raises:
      ConfigError: weights are missing, or a name is unknown.
    """
    nets = common.networks(config)
    forward = FORWARDS[config.get("conditioning", "in_context")]
    sample_of = common.make_conditions(nets)
    weights_of = common.loss_weights(config)

    def loss(
        params: ParamTree, frozen: ParamTree, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        params = params | frozen
        dit = nets.bind("dit", params)
        sample = sample_of(params, dit, batch)
        b, f = sample.z_video.shape[:2]
        t_bf = flow.draw_timesteps(loss_key(key, "times"), b, f, shift=config.loss.shift)
        noise = jax.random.normal(loss_key(key, "noise"), sample.z_video.shape)
        z_t = flow.add_noise(sample.z_video, noise, t_bf / 1000)
        t_network = common.network_timesteps(t_bf, config)
        v = forward(dit, sample.z_context, z_t, t_network, sample.text_kv)
        return common.flow_loss(v, sample.z_video, noise, weights_of(t_bf))

    def generate(params: ParamTree, frozen: ParamTree, batch: Batch, key: jax.Array) -> jax.Array:
        params = params | frozen
        dit = nets.bind("dit", params)
        sample = sample_of(params, dit, batch)

        def velocity(z: jax.Array, t_bf: jax.Array) -> jax.Array:
            t_network = common.network_timesteps(t_bf, config)
            return forward(dit, sample.z_context, z, t_network, sample.text_kv)

        noise = jax.random.normal(key, sample.z_video.shape)
        sigmas = flow.euler_sigmas(config.preview.steps, config.loss.shift)
        return sampler.sample_euler(velocity, noise, sigmas)

    return common.flow_stage(config, "teacher", nets, loss=loss, generate=generate)

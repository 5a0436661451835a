"""Score networks of distillation: what was a noised clip before it was noised?

    bidirectional   every frame sees every frame, one t a clip: the teacher, as published
    causal          chunks see the clip's own history, one t a chunk: the mask of teacher forcing
                    (LongLive-2.0, arXiv 2605.18739), for scores that were trained so

Axes: b batch, f latent frames, h w grid, c channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax

from chameleon_jax.attention.policies import CachePolicy
from chameleon_jax.diffusion import flow
from chameleon_jax.diffusion.sampler import guidance
from chameleon_jax.models.dit import (
    DiT,
    TextKV,
    bidirectional_features,
    self_forcing_forward,
    teacher_forcing_forward,
)


class Clip(NamedTuple):
    """A clip as the scores see it.

    Attributes:
      z_context: clean latents of its condition frames, [b, context, h, w, c].
      z: its clean latents, [b, f, h, w, c].
      history: for causal scores, all frames since the start of the stream, `z` the last of them.
      z_opening: for causal scores, the condition frames of the stream's first chunk, if it has
        others than the rest.
    """

    z_context: jax.Array
    z: jax.Array
    history: jax.Array
    z_opening: jax.Array | None = None


class Noised(NamedTuple):
    """A clip at a noise level.

    Attributes:
      x: [b, f, h, w, c].
      noise: what was mixed in, of the same shape.
      t_bf: timesteps, exact.
      t_network: timesteps as networks get them.
    """

    x: jax.Array
    noise: jax.Array
    t_bf: jax.Array
    t_network: jax.Array


@dataclasses.dataclass(frozen=True)
class Score:
    """How score networks look at a clip.

    Attributes:
      causal: with the mask of teacher forcing.
      policy: of the stream.
    """

    causal: bool
    policy: CachePolicy

    def draws(self, frames: int) -> int:
        """Timesteps that a clip of so many frames gets."""
        return frames // self.policy.block if self.causal else 1

    def velocity(self, dit: DiT, clip: Clip, noised: Noised, text_kv: TextKV) -> jax.Array:
        """v of every frame, [b, f, h, w, c]."""
        return self.velocity_and_features(dit, clip, noised, text_kv, ())[0]

    def velocity_and_features(
        self, dit: DiT, clip: Clip, noised: Noised, text_kv: TextKV, layers: Sequence[int]
    ) -> tuple[jax.Array, list[jax.Array]]:
        """v, and what the attention of some layers saw, [b, f, p, m]; see `models.dit`.

        Raises:
          ValueError: features of a causal score.
        """
        if not self.causal:
            return bidirectional_features(
                dit, clip.z_context, noised.x, noised.t_network, text_kv, layers
            )
        if layers:
            raise ValueError("features are taken from bidirectional scores only")
        history = jax.lax.stop_gradient(clip.history)
        whole = history.shape[1] == noised.x.shape[1]
        forward = teacher_forcing_forward if whole else self_forcing_forward
        v = forward(
            dit,
            clip.z_context,
            history,
            noised.x,
            noised.t_network,
            text_kv,
            policy=self.policy,
            z_opening=clip.z_opening,
        )
        return v, []

    def clean(self, dit: DiT, clip: Clip, noised: Noised, text_kv: TextKV) -> jax.Array:
        """The prediction of the clean clip, float32."""
        v = self.velocity(dit, clip, noised, text_kv)
        return flow.x0_from_velocity(noised.x, v, noised.t_bf / 1000)

    def guided(
        self,
        dit: DiT,
        clip: Clip,
        noised: Noised,
        text_kv: TextKV,
        negative_kv: TextKV | None,
        scale: float,
    ) -> jax.Array:
        """`clean` with classifier-free guidance; scale 1 needs no negative prompt."""
        positive = self.clean(dit, clip, noised, text_kv)
        if negative_kv is None:
            return positive
        return guidance(positive, self.clean(dit, clip, noised, negative_kv), scale)

"""Stage 3, gradient-reweighted distribution matching distillation (arXiv 2605.15824).

    python -m launch.train --config configs/dmd.py:runway_tiny \
        --config.data.dir=data/latents --config.data.tokenizer=data/tokenizer.json \
        --config.weights.vae=runs/vae/export --config.weights.text=runs/consistency/export \
        --config.weights.score=runs/teacher/export --config.weights.score_text=runs/teacher/export \
        --config.init_from=runs/consistency/export --config.workdir=runs/dmd

`paper` has the paper's numbers, `released` those of the authors' code where the two differ (a table
is in docs/training.md), `runway_tiny` distils the small model, `smoke` shows in a minute that
everything is wired up. The student starts from `init_from`: teacher forcing, as in the paper, or
consistency distillation.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from chameleon_jax.diffusion.sampler import NEGATIVE_PROMPT
from chameleon_jax.diffusion.wan22 import SAMPLER
from configs import common, training

VARIANTS = ("paper", "released", "runway_tiny", "smoke")


def get_config(variant: str = "paper") -> ConfigDict:
    """One of `VARIANTS`."""
    return common.choose(variant, paper, released, runway_tiny, smoke)


def paper() -> ConfigDict:
    """The paper's numbers (sections 4.2 and B); what it does not say is as in the released code."""
    config = training.captioned(training.paper("dmd"))
    config.name = "paper"
    config.train.steps = 400  # of the critic; the student takes a fifth of them
    config.train.update(eval_every=20, preview_every=20, checkpoint_every=20)
    config.data.batch = 64  # clips a step, over all processes
    config.data.captions = "full"  # action and scene: better in the paper's table 6
    config.data.dropout = 0.0
    config.loss = {
        "shift": 5.0,  # of the timesteps, towards noise
        "round_timesteps": False,  # the networks get exact timesteps
    }
    # What is trained is what is streamed.
    config.streaming.sampler = dict(SAMPLER) | {"round_timesteps": False}
    config.rollout = {
        # The exit step: one draw for all chunks ("shared"), or one for each ("chunk").
        "exit": "shared",
        # Kinds of roll-out in turn, see training/stages/dmd_setup.py: (chunks in front, switches).
        "kinds": ((0, 0),),
        # Behind the first chunk after a switch the person's own picture is the reference again, as
        # in streams with that mechanism; needs scores.causal.
        "anchor": False,
        "history_noise": 0.0,  # under which that first chunk is remembered, as in the streams
        "residual_noise": False,  # on the history, as the released code has it
    }
    config.scores = {
        "causal": False,  # with the mask of teacher forcing, for scores that were trained so
        "guidance": 3.0,  # of the real score; 1: the prompt alone
        "negative_prompt": NEGATIVE_PROMPT,
        "low": 20.0,  # timesteps at which the scores are compared, in [0, 1000]
        "high": 980.0,
    }
    config.reward = {
        "name": "aesthetic",  # see training/stages/rewards.py; empty: naive DMD, all frames alike
        "tau": 0.2,  # temperature of the weights
    }
    config.model.reward = common.clip_vit_l14()
    config.gan = {
        # Layers of the critic with a head that tells data from the student; none: no heads.
        "layers": (),
        "hidden": 256,  # channels of a head
        "weight": 1.0,  # length of the heads' gradient in that of DMD, for the student
        "critic_weight": 0.03,  # of the heads' loss beside that of the critic
    }
    config.weights.update(score="", score_text="", reward="")
    config.optimizer = training.adamw_without_momentum()
    config.schedule = {"name": "constant", "peak": 2e-6, "warmup": 0}
    config.critic = {
        "every": 5,  # steps of the critic for each step of the student
        "optimizer": training.adamw_without_momentum(),
        "schedule": {"name": "constant", "peak": 4e-7, "warmup": 0},
    }
    config.ema.update(decay=0.99, start=40)  # in steps of the student: from step 200 on
    config.preview.samples = 2
    return config


def released() -> ConfigDict:
    """The same with the numbers of the authors' code."""
    config = paper()
    config.name = "released"
    config.train.update(steps=3000, eval_every=100, preview_every=100, checkpoint_every=100)
    config.data.captions = "mixed"
    config.loss.round_timesteps = True
    config.streaming.sampler.round_timesteps = True
    config.rollout.residual_noise = True
    config.scores.guidance = 4.0  # written there as cond + 3 (cond - uncond)
    return config


def runway_tiny() -> ConfigDict:
    """The small model."""
    config = training.small(paper())
    config.train.update(steps=3000, text=False, eval_every=100, preview_every=100)
    config.alarms.update(contrast=0.3, motion=0.7, colour=1.15)  # it starts from a model that works
    config.data.batch = 8
    config.data.captions = "mixed"
    config.loss.shift = 3.0
    config.streaming.sampler = {
        "name": "few_step",
        "shift": 3.0,
        "timesteps": (1000, 750, 500, 250),
        "round_timesteps": False,
    }
    # Streams of the small model suffer from their own history, and from switches.
    config.rollout.update(exit="chunk", kinds=((0, 0), (3, 0), (1, 2)))
    config.scores.update(guidance=1.5, negative_prompt="")
    config.reward.update(name="sharpness", tau=0.01)
    config.optimizer.update(b2=0.99, weight_decay=0.0, clip=1.0)
    config.critic.optimizer.update(b2=0.99, weight_decay=0.0, clip=1.0)
    config.schedule = {"name": "constant", "peak": 1e-4, "warmup": 20}
    config.critic.schedule = {"name": "constant", "peak": 2e-4, "warmup": 20}
    config.critic.every = 3
    config.ema.update(decay=0.995, start=20)
    return config


def smoke() -> ConfigDict:
    """Four steps: two of the student, of two kinds of roll-out."""
    config = training.smoke(runway_tiny())
    config.video.frames = 21  # two blocks of three latent frames
    config.rollout.kinds = ((0, 0), (1, 1))
    config.critic.every = 2
    config.critic.schedule.warmup = 2
    config.alarms.update(contrast=0.0, motion=0.0, colour=0.0)
    config.streaming.sampler = runway_tiny().streaming.sampler
    return config

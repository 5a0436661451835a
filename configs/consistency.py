"""Stage 2b, causal consistency distillation (arXiv 2605.15141): few steps without a critic.

    python -m launch.train --config configs/consistency.py:runway_tiny \
        --config.data.dir=data/latents --config.data.tokenizer=data/tokenizer.json \
        --config.weights.vae=runs/vae/export --config.weights.text=runs/teacher_forcing/export \
        --config.init_from=runs/teacher_forcing/export --config.workdir=runs/consistency

FashionChameleon has no such stage: it goes from teacher forcing straight to distillation. Small
models suffer most from that gap. What comes out streams in four steps, or in two or one after the
first chunk: `--config.streaming.sampler.timesteps='(1000,500)'
--config.streaming.sampler.first='(1000,750,500,250)'`.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from chameleon_jax.diffusion.sampler import NEGATIVE_PROMPT
from chameleon_jax.diffusion.wan22 import SAMPLER
from configs import common, training

VARIANTS = ("wan22_5b", "runway_tiny", "smoke")


def get_config(variant: str = "runway_tiny") -> ConfigDict:
    """One of `VARIANTS`."""
    return common.choose(variant, wan22_5b, runway_tiny, smoke)


def wan22_5b() -> ConfigDict:
    """The paper's model with the numbers of Causal Forcing++; not tried at this size."""
    config = training.captioned(training.paper("consistency"))
    config.train.steps = 3000
    config.data.batch = 64  # clips a step, over all processes
    config.data.captions = "full"
    config.data.dropout = 0.0
    config.loss = {
        "shift": 5.0,  # of the timesteps, towards noise
        "round_timesteps": False,  # the networks get exact timesteps
        "steps": 48,  # of the teacher from noise to data
        "guidance": 3.0,  # of the teacher; 1: the prompt alone
        "negative_prompt": NEGATIVE_PROMPT,
        "history_noise": 0.0,  # most noise on the earlier blocks, see stages/teacher_forcing.py
    }
    config.streaming.sampler = dict(SAMPLER) | {"round_timesteps": False, "first": ()}
    config.optimizer = training.adamw_without_momentum()
    config.schedule = {"name": "constant", "peak": 2e-6, "warmup": 0}
    config.ema.decay = 0.99  # of the target
    return config


def runway_tiny() -> ConfigDict:
    """The small model."""
    config = training.small(wan22_5b())
    config.train.update(steps=3000, text=False)
    config.alarms.update(contrast=0.3, motion=0.7, colour=1.15)  # it starts from a model that works
    config.data.batch = 8
    config.data.captions = "mixed"
    config.loss.update(shift=3.0, steps=24, guidance=1.0, negative_prompt="", history_noise=0.1)
    config.streaming.sampler = {
        "name": "few_step",
        "shift": 3.0,
        "timesteps": (1000, 750, 500, 250),
        "round_timesteps": False,
        "first": (),
    }
    config.optimizer.update(b2=0.99, weight_decay=0.0, clip=1.0)
    config.schedule = {"name": "constant", "peak": 3e-4, "warmup": 50}
    config.ema.decay = 0.99
    return config


def smoke() -> ConfigDict:
    """Four steps."""
    config = training.smoke(runway_tiny())
    config.video.frames = 21  # two blocks of three latent frames
    config.loss.update(steps=4, guidance=2.0)
    config.alarms.update(contrast=0.0, motion=0.0, colour=0.0)
    config.streaming.sampler = runway_tiny().streaming.sampler
    return config

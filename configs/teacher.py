"""Stage 1, the in-context teacher (FashionChameleon, arXiv 2605.15824).

    python -m launch.train --config configs/teacher.py:runway_tiny \
        --config.data.dir=data/latents --config.data.tokenizer=data/tokenizer.json \
        --config.weights.vae=runs/vae/export --config.workdir=runs/teacher

`paper` has the paper's numbers (section B), `released` those of the authors' code where the two
differ (a table is in docs/training.md), `runway_tiny` trains the small model in hours on a CPU,
`smoke` shows in a minute that everything is wired up. Which weights change is said by `tune`:
Table 2 of the paper compares all, attention alone, and a LoRA:

    --config.tune.mode=attention --config.init_from=weights/wan22
    --config.tune.mode=lora --config.init_from=weights/wan22
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common, training

VARIANTS = ("paper", "released", "runway_tiny", "smoke")


def get_config(variant: str = "paper") -> ConfigDict:
    """One of `VARIANTS`."""
    return common.choose(variant, paper, released, runway_tiny, smoke)


def paper() -> ConfigDict:
    """The paper's numbers; what it does not say is as in the released code."""
    config = training.captioned(training.paper("teacher"))
    config.name = "paper"
    # The two condition latents: "in_context", as frames in front of the video; or "channels", as in
    # configs/teacher_concat.py.
    config.conditioning = "in_context"
    config.train.steps = 2300
    config.data.batch = 64  # clips a step, over all processes
    config.loss = {
        "shift": 5.0,  # of the timesteps, towards noise
        "round_timesteps": False,  # the network gets exact timesteps
        "weights": "bell",  # by timestep, see training/stages/teacher.py
    }
    config.optimizer = {
        "name": "adamw",
        "b1": 0.9,
        "b2": 0.999,
        "eps": 1e-8,
        "weight_decay": 0.01,
        "clip": 1.0,  # norm of the gradient
    }
    config.schedule = {
        "name": "halved",
        "peak": 1e-5,
        "warmup": 200,  # steps
        "halve_at": 1100,  # step from which on half of the peak is used
    }
    return config


def released() -> ConfigDict:
    """The same with the numbers of the authors' code."""
    config = paper()
    config.name = "released"
    config.train.steps = 5000
    config.loss.round_timesteps = True
    config.schedule.warmup = 100
    return config


def runway_tiny() -> ConfigDict:
    """The small model, from random weights."""
    config = training.small(paper())
    config.train.steps = 4000
    config.data.batch = 4
    config.loss = {"shift": 3.0, "round_timesteps": False, "weights": "none"}
    config.optimizer.weight_decay = 0.0
    config.schedule = {
        "name": "linear",
        "peak": 1e-3,
        "warmup": 100,  # steps
        "decay_from": 0.7,  # share of the steps
        "final": 0.05,  # share of the peak
    }
    return config


def smoke() -> ConfigDict:
    """Four steps."""
    return training.smoke(runway_tiny())

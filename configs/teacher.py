"""Stage 1, the in-context teacher (FashionChameleon, arXiv 2605.15824).

    python -m launch.train --config configs/teacher.py:runway_tiny --config.data.dir=data/latents \
        --config.data.tokenizer=data/tokenizer.json --config.weights.vae=runs/vae/export --config.workdir=runs/teacher

`wan22_5b` has the paper's numbers: global batch 64, 5000 steps.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import training


def get_config(variant: str = "runway_tiny") -> ConfigDict:
    """Variants: `runway_tiny` (CPU, hours), `wan22_5b`, `smoke`."""
    config = training.base("teacher", variant)
    # round_timesteps: tell the network integer timesteps, as the released code does. weights: see
    # training/teacher.py.
    config.loss = {"shift": 5.0, "round_timesteps": True, "weights": "bell"}
    if variant == "wan22_5b":
        config.data.batch = 64
        config.train.update(steps=5000, log_every=10, checkpoint_every=250)
        config.schedule.update(name="halved", peak=1e-5, warmup=100, halve_at=1100)
        config.ema.decay = 0.0
    else:
        config.loss.update(shift=3.0, round_timesteps=False, weights="none")
        config.data.batch = 4
        config.train.update(steps=4000, eval_every=500, preview_every=500)
        config.optimizer.weight_decay = 0.0
        config.schedule.update(name="linear", peak=1e-3)
    return training.shorten(config) if variant == "smoke" else config

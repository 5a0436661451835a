"""The judge of Runway-Bench, trained on rendered frames (see chameleon_jax/models/judge.py).

    python -m launch.prepare runway --out data/judge --world mirror --labels --people 4 --frames 5 \
        --clips 8000
    python -m launch.prepare runway --out data/judge --world mirror --labels --people 4 --frames 5 \
        --clips 64 --seed_start 800000
    python -m launch.train --config configs/judge.py:runway_tiny --config.data.dir=data/judge \
        --config.workdir=runs/judge
    python -m launch.evaluate --bench judge --judge runs/judge/export

`runway_open` is for the open world (`--world open` in each of these commands). There people wear
several garments that a picture may be about, so the judge is told where the one in question is
worn.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common, training

VARIANTS = ("runway_tiny", "runway_open", "smoke")


def get_config(variant: str = "runway_tiny") -> ConfigDict:
    """One of `VARIANTS`."""
    return common.choose(variant, runway_tiny, runway_open, smoke)


def runway_tiny() -> ConfigDict:
    """128x80, as the embedded model makes them."""
    config = training.small(training.paper("judge"))
    config.model.judge = {
        "widths": (32, 64, 96, 128),
        "slots": 0,  # where the garment in question is worn, as labels.SLOTS; 0: always the same
    }
    config.video.frames = 5  # of the clips; one of them is drawn each time
    config.train.update(steps=4000, eval_every=500, preview_every=500)
    config.data.batch = 16
    config.data.labels = ("labels", "joints", "attributes")
    config.people = {
        "count": 2000,  # that are told apart: clips of the set over `each`
        "each": 4,  # clips of a person, `--people` of the set
        "first": 0,  # seed of the first clip
    }
    config.loss = {
        # Weights of the parts, see training/stages/judge.py.
        "labels": 1.0,
        "joints": 5.0,
        "type": 0.5,
        "pattern": 0.5,
        "person": 1.0,
        "spoiled": 0.5,  # share of the frames that are blurred, and of those that are noisy
    }
    config.optimizer = {
        "name": "adamw",
        "b1": 0.9,
        "b2": 0.99,
        "eps": 1e-8,
        "weight_decay": 0.01,
        "clip": 1.0,  # norm of the gradient
    }
    config.schedule = {
        "name": "linear",
        "peak": 2e-3,
        "warmup": 100,  # steps
        "decay_from": 0.4,  # share of the steps
        "final": 0.02,  # share of the peak
    }
    config.ema.decay = 0.998
    config.preview.update(samples=8)
    return config


def runway_open() -> ConfigDict:
    """The same for the open world."""
    config = runway_tiny()
    config.name = "runway_open"
    config.model.judge.slots = 4
    config.train.steps = 7000
    return config


def smoke() -> ConfigDict:
    """A few steps of a small one."""
    config = runway_tiny()
    config.name = "smoke"
    config.model.judge.widths = (8, 8, 16)
    config.video = {"height": 32, "width": 32, "fps": 16.0, "frames": 2}
    config.train.update(
        steps=4, log_every=1, eval_every=4, eval_batches=1, preview_every=4, checkpoint_every=2
    )
    config.schedule.warmup = 2
    config.data.batch, config.people.count = 2, 4
    return config

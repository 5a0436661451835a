"""The embedded model in minutes of one large GPU, whose stages end by the clock.

    python -m launch.sprint --config configs/sprint.py:h200 --compile h200-1 --programs programs
    python -m launch.sprint --config configs/sprint.py:h200 --prepare_stills stills.npz
    python -m launch.sprint --config configs/sprint.py:h200 --programs programs \
        --stills stills.npz --workdir runs/sprint

`h200` is what the model in this repository was trained with; `changes` teaches it in an hour of two
cores how to go on behind a change (`carry`); `toy` runs all of it in minutes on two cores. A kind
of step has a config of its own in `kinds`, of those of configs/teacher_forcing.py,
configs/consistency.py and configs/dmd.py; `--config.kinds.clips.schedule.peak=1e-3` changes one.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common, consistency, dmd, teacher_forcing

VARIANTS = ("h200", "changes", "toy")


def get_config(variant: str = "h200") -> ConfigDict:
    """One of `VARIANTS`."""
    return common.choose(variant, h200, changes, toy)


def h200() -> ConfigDict:
    """285 s of training on one H200, with 14 processes that render."""
    return ConfigDict(
        {
            "name": "h200",
            "seed": 0,
            "weights": "chameleon_jax/assets/runway_tiny",  # folder of the VAE, trained before
            "tokenizer": "chameleon_jax/assets/runway_tiny/tokenizer.json",
            "mesh": {"data": 1, "fsdp": -1, "seq": 1, "tensor": 1},
            "log_seconds": 5.0,
            "scenes": {
                "world": "mirror",
                "height": 128,
                "width": 80,
                "fps": 16.0,
                "frames": 33,
                "tops": 4,  # of a person
                "matched": False,  # an ablation: references in the garment of the video
                "workers": 14,  # processes that render
                "first": 300_000,  # seed of the first one; clips come after the stills
                "stills": 1464,  # scenes of one frame, made before the first clip
                "room": 5000,  # most scenes of clips in memory; the oldest are forgotten
                "together": 4,  # scenes that are encoded at a time
            },
            # "changes", "consistency" and "dmd" may come behind, see docs/training.md: as it is,
            # consistency spoils the model; dmd has run on a CPU only.
            "order": ("stills", "starts", "clips"),
            "stages": {
                "stills": _stage(75.0, ("stills",), "random"),
                "starts": _stage(40.0, ("starts",), "state"),
                "clips": _stage(170.0, ("clips", "clips", "starts"), "state", fall=0.35),
                "changes": _stage(60.0, ("changes",), "export", fall=0.6),
                "consistency": _stage(65.0, ("consistency",), "export", fall=0.5, final=0.1),
                "dmd": _stage(120.0, ("dmd",), "export", fall=0.4, final=0.1, teacher="clips"),
            },
            "kinds": {
                "stills": _kind(teacher_forcing.runway_tiny_stills(), 128),
                "starts": _kind(teacher_forcing.runway_tiny_starts(), 64),
                "clips": _kind(_clips(), 48),
                "changes": _kind(_changes(), 48, peak=4e-4),
                "consistency": _kind(consistency.runway_tiny(), 48, peak=3e-4),
                "dmd": _kind(_dmd(), 48, peak=1e-4),
            },
        }
    )


def changes() -> ConfigDict:
    """From the weights in this repository, on a CPU: changes within clips, for `carry`."""
    config = h200()
    config.name = "changes"
    config.order = ("changes",)
    config.scenes.update(first=610_000, stills=4, workers=1)
    config.stages.changes.update(seconds=3600.0, begins="weights")
    config.kinds.changes.dtype = "float32"
    config.kinds.changes.data.batch = 4
    config.kinds.changes.schedule.warmup = 20
    return config


def toy() -> ConfigDict:
    """The same with two narrow layers, a few scenes and a few seconds a stage, on a CPU."""
    config = h200()
    config.name = "toy"
    config.log_seconds = 1.0
    config.scenes.update(tops=2, workers=1, stills=4, room=8, together=1)
    for stage in config.stages.values():
        stage.update(seconds=4.0, least=2)
    for kind in config.kinds.values():
        kind.dtype = "float32"
        kind.data.batch = 2
        kind.model.dit.update(layers=2, width=64, heads=2, ffn=128)
        kind.schedule.warmup = 2
        if "labels_layer" in kind.loss:
            kind.loss.labels_layer = 1
    config.kinds.dmd.rollout.kinds = ((0, 0),)
    return config


def _stage(
    seconds: float,
    turn: tuple[str, ...],
    begins: str,
    *,
    fall: float = 0.0,
    final: float = 0.05,
    teacher: str = "",
) -> dict:
    return {
        "seconds": seconds,  # after its first step
        "turn": turn,  # kinds of step, in turn
        # From "random" weights, those in the folder `weights`, the "state" of the stage before, or
        # its "export" (averaged weights, a new optimiser).
        "begins": begins,
        "fall": fall,  # share of the time, its last part, in which the rate falls
        "final": final,  # share of the rate at the end of the time
        "least": 60,  # scenes before it begins
        "teacher": teacher,  # stage whose export is the score of distillation; empty: none
    }


def _clips() -> ConfigDict:
    """Three chunks; first chunks have steps of their own, with labels in all."""
    config = teacher_forcing.runway_tiny()
    config.name = "runway_tiny_clips"
    config.data.lengths = ()
    config.data.labels = ("labels", "origin")
    config.loss.update(garment=3.0, head=2.0, labels=0.1)
    return config


def _changes() -> ConfigDict:
    """Two chunks, the first a start; the history of the second mostly shows another garment."""
    config = _clips()
    config.name = "runway_tiny_changes"
    config.video.frames = 21
    config.loss.update(labels=0.0, copies=2)
    config.changes.clips = 0.75
    return config


def _dmd() -> ConfigDict:
    """Roll-outs as long as clips, and longer than the window.

    The score is the causal model itself. Without a reward, and without switches in the roll-outs,
    no pixels are made: convolutions cannot be compiled ahead.
    """
    config = dmd.runway_tiny()
    config.scores.causal = True
    config.reward.name = ""
    config.rollout.kinds = ((0, 0), (3, 0))
    config.critic.optimizer.by_clock = True
    return config


def _kind(config: ConfigDict, batch: int, peak: float = 2e-3) -> ConfigDict:
    """A stage's config for a run by the clock: nothing in it depends on a number of steps."""
    config.dtype = "bfloat16"
    config.export_dtype = "bfloat16"
    # Of the kernels that can be compiled for a chip that is not here, the same on every one.
    config.model.dit.attention = "xla"
    config.data.batch = batch
    config.optimizer.by_clock = True
    config.schedule = {"name": "constant", "peak": peak, "warmup": 50}
    if config.stage == "teacher_forcing":
        config.ema.decay = 0.98 if config.changes.clips else 0.998
    return config

"""The stages of training, by the name that a config gives as `stage`."""

from __future__ import annotations

from ml_collections import ConfigDict

from chameleon_jax.config import ConfigError
from chameleon_jax.training.stage import Stage
from chameleon_jax.training.stages import consistency, dmd, judge, teacher, teacher_forcing, vae

STAGES = {
    "vae": vae.make_stage,
    "teacher": teacher.make_stage,
    "teacher_forcing": teacher_forcing.make_stage,
    "consistency": consistency.make_stage,
    "dmd": dmd.make_stage,
    "judge": judge.make_stage,
}


def make_stage(config: ConfigDict) -> Stage:
    """The stage that a config describes.

    Raises:
      ConfigError: an unknown stage, or one that cannot be built as asked.
    """
    if config.stage not in STAGES:
        raise ConfigError(f"stage is {config.stage!r}; expected one of {', '.join(STAGES)}")
    return STAGES[config.stage](config)

"""A pipeline holds weights; what runs them: a session (garments), a generator (whole clips),
several shots.

Importing this package needs jax, flax, numpy and pillow only; what reads weight files, prompts or
videos is imported where it is used, so that a benchmark on random weights runs on a bare
accelerator machine.
"""

from chameleon_jax.inference.clip import GenerateConfig, GenerateError, Generator
from chameleon_jax.inference.pipeline import Pipeline, PipelineError
from chameleon_jax.inference.session import (
    Mechanisms,
    Session,
    SessionError,
    Snapshot,
    SnapshotError,
    Switch,
)
from chameleon_jax.inference.shots import MultiShot, MultiShotError, Shot

__all__ = [
    "GenerateConfig",
    "GenerateError",
    "Generator",
    "Mechanisms",
    "MultiShot",
    "MultiShotError",
    "Pipeline",
    "PipelineError",
    "Session",
    "SessionError",
    "Shot",
    "Snapshot",
    "SnapshotError",
    "Switch",
]

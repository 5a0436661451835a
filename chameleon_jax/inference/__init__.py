"""What a program holds: a pipeline with the weights, and what runs them.

A session streams a person in garments, a generator makes whole clips, several shots make a film.

Importing this package needs jax, flax, numpy and pillow only; what reads weight files, prompts or
videos is imported where it is used, so that a benchmark on random weights runs on a bare
accelerator machine.
"""

from chameleon_jax.inference.clip import GenerateConfig, GenerateError, Generator
from chameleon_jax.inference.mechanisms import SwitchConfig, SwitchError
from chameleon_jax.inference.pictures import EncodedPicture
from chameleon_jax.inference.pipeline import Pipeline, PipelineError
from chameleon_jax.inference.session import Session, SessionError, Switch
from chameleon_jax.inference.shots import MultiShot, MultiShotError, Shot
from chameleon_jax.inference.snapshots import Snapshot, SnapshotError

__all__ = [
    "EncodedPicture",
    "GenerateConfig",
    "GenerateError",
    "Generator",
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
    "SwitchConfig",
    "SwitchError",
]

"""Streaming: a pipeline holds weights, a session holds a running stream.

Importing this package needs jax, flax, numpy and pillow only; what reads weight files, prompts or videos is imported
where it is used, so that a benchmark on random weights runs on a bare accelerator machine.
"""

from chameleon_jax.serving.pipeline import Pipeline
from chameleon_jax.serving.session import Mechanisms, Session, SessionError, Snapshot, SnapshotError, Switch

__all__ = ["Mechanisms", "Pipeline", "Session", "SessionError", "Snapshot", "SnapshotError", "Switch"]

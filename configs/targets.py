"""What `python -m launch.targets --cases` compiles: configs on chips.

    python -m launch.targets --cases configs/targets.py:streams
    python -m launch.targets --cases configs/targets.py:training

`streams` and `training` are the tables of docs/performance.md; `small` shows within minutes that
all of it works.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common

VARIANTS = ("streams", "training", "small")

STREAM = "configs/wan22_5b.py"
# As one trains at the published size: one compiled block in a loop.
SCANNED = ("train.scan_layers=true",)


def get_config(variant: str = "streams") -> ConfigDict:
    """One of `VARIANTS`: tuples (config, target, mesh, overrides, programs).

    An empty mesh is the one of `targets.programs.mesh_for`, no programs are all of them.
    """
    return common.choose(variant, streams, training, small)


def streams() -> ConfigDict:
    """A stream of the paper's model at 1280x704."""
    targets = ("v5e-4", "v6e-1", "v6e-4", "v5p-1", "h200-1")
    return _cases("streams", *((STREAM, target, "", (), ()) for target in targets))


def training() -> ConfigDict:
    """All stages at 1280x704 and 81 frames, 64 clips a step."""
    stages = (
        "configs/teacher.py:paper",
        "configs/teacher_forcing.py:paper",
        "configs/consistency.py:wan22_5b",
        "configs/dmd.py:paper",
    )
    meshes = {
        "v5p-64": "fsdp=64",
        "v5p-128": "fsdp=64,seq=2",
        "v6e-64": "fsdp=64",
        "v6e-256": "fsdp=64,seq=4",
        "h200-64": "fsdp=64",
    }
    return _cases(
        "training",
        *(
            (stage, target, mesh, SCANNED, ())
            for target, mesh in meshes.items()
            for stage in stages
        ),
    )


def small() -> ConfigDict:
    """A few thousand parameters."""
    teacher = "configs/teacher.py:smoke"
    stream = "configs/runway_tiny.py:smoke"
    return _cases(
        "small",
        (stream, "v6e-1", "", (), ("refresh", "chunk")),
        (stream, "v5e-4", "tensor=2,seq=2", ("model.dit.heads=4",), ("chunk",)),
        (teacher, "v6e-4", "fsdp=4", ("data.batch=4", *SCANNED), ()),
    )


def _cases(name: str, *cases: tuple) -> ConfigDict:
    return ConfigDict({"name": name, "cases": cases})

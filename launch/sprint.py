"""Train several stages by the clock, on scenes that are rendered meanwhile: a model in minutes.

    python -m launch.sprint --config configs/sprint.py:h200 --workdir runs/sprint

What does not need the chip can be made before, on any machine:

    python -m launch.sprint --config configs/sprint.py:h200 --compile h200-1 --programs programs
    python -m launch.sprint --config configs/sprint.py:h200 --prepare_stills stills.npz
    python -m launch.sprint --config configs/sprint.py:h200 --programs programs \\
        --stills stills.npz --workdir runs/sprint

The compiler of a target must be installed, see `python -m launch.targets --help`. A compiled step
serves one kind of chip, one version of JAX, one config and one state of the code; where it does not
fit, it is compiled on the spot and a line says so. Load only programs of your own: a file can run
code.

In the workdir: config.json, metrics.jsonl, tensorboard/, and <stage>/export, the averaged weights
after each stage, which --weights takes. Nothing is resumed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from chameleon_jax import places
from launch import cli
from launch.cli import UsageError

if TYPE_CHECKING:
    from jax.sharding import Mesh
    from ml_collections import ConfigDict

CONFIG = "configs/sprint.py"
HERE = "here"


def define_flags(parser: cli.Parser) -> None:
    """The flags of this command."""
    parser.config_flag((CONFIG, ""))
    parser.flag("workdir", "folder of the run, which must not hold one yet", metavar="DIR")
    parser.flag("programs", "folder of steps that were compiled ahead", metavar="DIR")
    parser.flag(
        "compile",
        f"compile the steps into --programs, for chips such as h200-1 or for {HERE}, and stop",
        metavar="CHIP-N",
    )
    parser.flag("stills", "file of stills that were made before", metavar="FILE")
    parser.flag(
        "prepare_stills", "render and encode the stills into this file, and stop", metavar="FILE"
    )
    parser.compilation_flag()


def run(values: cli.Values) -> int:
    """The command. Returns its exit code.

    Raises:
      UserError: an input cannot be used.
    """
    _check(values)
    if values.compile not in (None, HERE):
        from chameleon_jax.targets import compiling

        os.environ.update(compiling.ENVIRONMENT)  # before JAX looks for devices
    from chameleon_jax.config import load_config

    config = load_config(values.config or CONFIG, values.overrides)
    from chameleon_jax.training import sprint, sprint_kinds
    from chameleon_jax.training.run import start_logging

    cli.start_jax(values)
    start_logging()
    if values.compile:
        sprint_kinds.compile_ahead(config, _mesh(config, values.compile), Path(values.programs))
    elif values.prepare_stills:
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            sprint.prepare_stills(config, Path(folder), Path(values.prepare_stills))
    else:
        sprint.run(
            config,
            Path(values.workdir),
            _path(values.programs),
            _path(values.stills),
        )
    return 0


def _check(values: cli.Values) -> None:
    """Raise UsageError if the flags do not go together."""
    if values.compile and values.prepare_stills:
        raise UsageError("--compile and --prepare_stills: give one of them at a time")
    if values.compile and not values.programs:
        raise UsageError("--compile needs --programs DIR, the folder to compile into")
    if values.prepare_stills:
        if not values.prepare_stills.endswith(".npz"):
            raise UsageError(
                f"--prepare_stills {values.prepare_stills}: expected the name of a file that ends"
                " in .npz"
            )
        places.check_writable(Path(values.prepare_stills))
    if not (values.compile or values.prepare_stills or values.workdir):
        raise UsageError("give --workdir DIR to train, or --compile, or --prepare_stills")
    for flag in ("stills", "programs"):
        given = getattr(values, flag)
        if given and not values.compile and not Path(given).exists():
            raise UsageError(f"--{flag} {given}: does not exist")


def _path(given: str | None) -> Path | None:
    return Path(given) if given else None


def _mesh(config: ConfigDict, target: str) -> Mesh:
    """The mesh to compile for."""
    from chameleon_jax import sharding
    from chameleon_jax.targets import machines

    chips = None if target == HERE else machines.devices(machines.find(target))
    return sharding.make_mesh(config.mesh, chips)


def main(argv: Sequence[str] | None = None, program: str = "python -m launch.sprint") -> None:
    """Read the command line, train, and end the process."""
    cli.main(program, __doc__ or "", define_flags, run, argv)


if __name__ == "__main__":
    main()

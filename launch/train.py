"""Train one stage.

    python -m launch.train --config configs/vae.py:runway_tiny --config.data.dir=data/runway \\
        --config.workdir=runs/vae
    python -m launch.train --config configs/teacher.py:runway_tiny \\
        --config.data.dir=data/latents --config.data.tokenizer=data/tokenizer.json \\
        --config.weights.vae=runs/vae/export --config.workdir=runs/teacher

The same command again resumes a run where it stopped. At the end the averaged weights are exported
to <workdir>/export. In the workdir: config.json, metrics.jsonl, tensorboard/, previews/,
checkpoints/.

`--profile 20:25` writes a profile of these steps of this start into <workdir>/profile.

A run that has gone wrong (alarms.* in the config) is stopped, and its last good checkpoint kept:
docs/training_diagnosis.md. `python -m launch.curves WORKDIR` draws the curves.

Ctrl-C and SIGTERM save the state after the current step and export nothing; the exit code is then
130 or 143, not 0. A checkpoint that is damaged is passed by, with a warning, for the newest intact
one.

Several processes: on TPU pods, GKE, Slurm and Open MPI start the same command on every host with
--distributed; elsewhere with --coordinator HOST:PORT --processes N --process_id I. When one of them
dies, the others end within a minute with exit code 75, and the same commands resume the run.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from chameleon_jax import parsing, processes
from launch import cli

if TYPE_CHECKING:
    from ml_collections import ConfigDict

CONFIG = "configs/teacher.py"


def define_flags(parser: cli.Parser) -> None:
    """The flags of this command."""
    others = (
        "configs/vae.py",
        "configs/teacher_concat.py",
        "configs/teacher_forcing.py",
        "configs/consistency.py",
        "configs/dmd.py",
    )
    parser.config_flag((CONFIG, ""), others=others)
    parser.switch("distributed", "join the processes of all hosts of this cluster", default=False)
    parser.flag("coordinator", "join the processes that meet here: process 0", metavar="HOST:PORT")
    parser.flag("processes", "how many there are", kind=cli.whole_number(1), metavar="N")
    parser.flag("process_id", "number of this one, from 0", kind=cli.whole_number(0), metavar="I")
    parser.switch(
        "export_only",
        "export a checkpoint and stop, also of a run that is still going",
        default=False,
    )
    parser.flag(
        "export",
        "what is exported, at the end or by --export_only: the newest state, or the checkpoint with"
        " the best config.train.best",
        kind=cli.one_of("newest", "best"),
        default="newest",
        metavar="newest|best",
    )
    parser.switch(
        "resume_with_changes", "resume a run although the config has changed", default=False
    )
    parser.flag(
        "profile",
        "write a profile of these steps of this start into <workdir>/profile, e.g. 20:25",
        kind=parsing.span,
        metavar="FIRST:LAST",
    )
    parser.switch("strict", "refuse to resume if the newest checkpoint is damaged", default=False)
    parser.compilation_flag()


def command(values: cli.Values) -> int:
    """The command. Returns its exit code.

    Raises:
      UserError: an input cannot be used.
    """
    meeting = processes.Meeting(values.coordinator, values.processes, values.process_id)
    if not values.distributed and meeting.coordinator is None:
        return train(read_config(values), values)

    def one_of_several() -> int:
        config = read_config(values)  # its faults are named before all processes have met
        processes.connect(meeting)
        with processes.named_errors():
            return train(config, values)

    return processes.supervise(
        functools.partial(cli.finish, one_of_several), f"waiting for {meeting}"
    )


def read_config(values: cli.Values) -> ConfigDict:
    """The config that was asked for."""
    from chameleon_jax.config import load_config

    return load_config(values.config or CONFIG, values.overrides)


def train(config: ConfigDict, values: cli.Values) -> int:
    """Train as one process, or as one of several that are connected. Returns the exit code."""
    from chameleon_jax.training.run import EXIT_CODES, run, start_logging

    cli.start_jax(values)
    start_logging()
    outcome = run(
        config,
        export_only=values.export_only,
        resume_with_changes=values.resume_with_changes,
        profile=values.profile,
        strict=values.strict,
        export_best=values.export == "best",
    )
    return EXIT_CODES[outcome.reason]


def main(argv: Sequence[str] | None = None, program: str = "python -m launch.train") -> None:
    """Read the command line, train, and end the process."""
    cli.main(program, __doc__ or "", define_flags, command, argv)


if __name__ == "__main__":
    main()

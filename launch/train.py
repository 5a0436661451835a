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
130 or 143, not 0. On TPU pods, Slurm and GKE start the same command on every host with
--distributed.
"""

from __future__ import annotations

from collections.abc import Sequence

from chameleon_jax import parsing
from chameleon_jax.errors import one_line
from launch import cli

CONFIG = "configs/teacher.py"


def define_flags(parser: cli.Parser) -> None:
    """The flags of this command."""
    others = ("configs/vae.py", "configs/teacher_concat.py", "configs/teacher_forcing.py")
    parser.config_flag((CONFIG, ""), others=others)
    parser.switch("distributed", "join the processes of all hosts", default=False)
    parser.switch(
        "export_only",
        "export the newest checkpoint and stop, also of a run that is still going",
        default=False,
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
    parser.compilation_flag()


def command(values: cli.Values) -> int:
    """The command. Returns its exit code.

    Raises:
      UserError: an input cannot be used.
    """
    import jax

    from chameleon_jax.config import load_config
    from chameleon_jax.training.run import EXIT_CODES, run, start_logging

    config = load_config(values.config or CONFIG, values.overrides)
    if values.distributed:
        try:
            jax.distributed.initialize()
        except (ValueError, RuntimeError) as error:
            raise cli.UsageError(
                f"--distributed: {one_line(error)}; start it on every host of a TPU pod, or under"
                " Slurm or GKE"
            ) from None
    cli.start_jax(values)
    start_logging()
    outcome = run(
        config,
        export_only=values.export_only,
        resume_with_changes=values.resume_with_changes,
        profile=values.profile,
    )
    return EXIT_CODES[outcome.reason]


def main(argv: Sequence[str] | None = None, program: str = "python -m launch.train") -> None:
    """Read the command line, train, and end the process."""
    cli.main(program, __doc__ or "", define_flags, command, argv)


if __name__ == "__main__":
    main()

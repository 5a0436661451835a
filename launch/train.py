"""Train one stage.

    python -m launch.train --config configs/vae.py:runway_tiny --config.data.dir=data/runway \
        --config.workdir=runs/vae
    python -m launch.train --config configs/teacher.py:runway_tiny --config.data.dir=data/latents \
        --config.data.tokenizer=data/tokenizer.json --config.weights.vae=runs/vae/export \
        --config.workdir=runs/teacher

The same command again resumes a run where it stopped. At the end the averaged weights are exported
to <workdir>/export. In the workdir: config.json, metrics.jsonl, tensorboard/, previews/,
checkpoints/.

Ctrl-C and SIGTERM save the state after the current step and export nothing; the exit code is then
130 or 143, not 0. On TPU pods, Slurm and GKE start the same command on every host with
--distributed.
"""

from __future__ import annotations

import sys

import jax
from absl import flags

from chameleon_jax.errors import UserError
from chameleon_jax.training.run import EXIT_CODES, run, start_logging
from launch import cli

FLAGS = flags.FlagValues()
cli.define(FLAGS, "configs/teacher.py")
flags.DEFINE_bool("distributed", False, "join the processes of all hosts", flag_values=FLAGS)
flags.DEFINE_bool(
    "export_only",
    False,
    "export the newest checkpoint, also of a run that is going on",
    flag_values=FLAGS,
)
flags.DEFINE_bool(
    "resume_with_changes",
    False,
    "resume a run although the config has changed",
    flag_values=FLAGS,
)


def main(argv: list[str]) -> None:
    """Read the command line and run; every expected fault is one line on stderr and exit code 2."""
    try:
        parsed, overrides = cli.parse(FLAGS, argv, __doc__)
        if parsed.distributed:
            jax.distributed.initialize()
        start_logging()
        outcome = run(
            cli.read_config(parsed.config, overrides),
            export_only=parsed.export_only,
            resume_with_changes=parsed.resume_with_changes,
        )
    except UserError as error:
        cli.fail(error)
    sys.exit(EXIT_CODES[outcome.reason])


if __name__ == "__main__":
    main(sys.argv)

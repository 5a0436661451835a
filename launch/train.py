"""Train one stage.

    python -m launch.train --config configs/vae.py:runway_tiny --config.data.dir=data/runway \\
        --config.workdir=runs/vae
    python -m launch.train --config configs/teacher.py:runway_tiny \\
        --config.data.dir=data/latents --config.data.tokenizer=data/tokenizer.json \\
        --config.weights.vae=runs/vae/export --config.workdir=runs/teacher

The same command again continues where the run stopped. SIGTERM saves and exits with 0. At the end
the averaged weights are exported to <workdir>/export. In the workdir: config.json, metrics.jsonl,
tensorboard/, previews/, checkpoints/. On TPU pods, Slurm and GKE start the same command on every
host with --distributed.
"""

from __future__ import annotations

import dataclasses
import importlib
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
from ml_collections import ConfigDict

from chameleon_jax.config import ConfigError, load_config, save_config
from chameleon_jax.data.memory import InMemorySource
from chameleon_jax.data.sources import MatchingSource, Source, open_sources
from chameleon_jax.errors import one_line
from chameleon_jax.training import loop
from chameleon_jax.training.export import export, stored_model
from chameleon_jax.training.feed import Feed, HostBatch
from configs import runway_tiny, wan22_5b
from launch import cli

STAGES = {
    "vae": "vae",
    "teacher": "teacher",
    "teacher_forcing": "teacher_forcing",
}  # and their modules
CONFIG = "configs/teacher.py"


def define_flags(parser: cli.Parser) -> None:
    """The flags of this command."""
    parser.config_flag((CONFIG, ""))
    parser.switch("distributed", "join the processes of all hosts", default=False)
    parser.switch(
        "export_only",
        "export the newest checkpoint and stop, also of a run that is still going",
        default=False,
    )
    parser.compilation_flag()


def command(values: cli.Values) -> None:
    """The command.

    Raises:
      UserError: an input cannot be used.
    """
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
    run(config, export_only=values.export_only)


def main(argv: Sequence[str] | None = None, program: str = "python -m launch.train") -> None:
    """Read the command line, train, and end the process."""
    cli.main(program, __doc__, define_flags, command, argv)


def run(config: ConfigDict, *, export_only: bool = False) -> None:
    """Train the stage that a config describes, and export its weights.

    Raises:
      UserError: the run cannot start, or has diverged.
    """
    for key, value in (("workdir", config.workdir), ("data.dir", config.data.dir)):
        if not value:
            raise ConfigError(f"{key} is not set; give it as --config.{key}=FOLDER")
    if config.stage not in STAGES:
        raise ConfigError(f"stage is {config.stage!r}; expected one of {', '.join(STAGES)}")
    start_logging()
    config = with_stored_sizes(config)
    module = importlib.import_module(f"chameleon_jax.training.stages.{STAGES[config.stage]}")
    workdir = Path(config.workdir)
    stage = module.make_stage(config)
    eval_batches = held_out(config, module)
    if export_only:
        state = loop.load_state(config, stage)
    else:
        workdir.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            save_config(workdir / "config.json", config)
        feed = Feed(open_data(config, config.data.split), module.make_parts(config))
        outcome = loop.train(config, stage, feed, eval_batches)
        if outcome.reason == "signal":
            return  # what sent the signal will not wait: the checkpoint is enough
        state = outcome.state
    folder = config.export_dir or workdir / "export"
    config = module.before_export(config, stage, state, eval_batches)
    tokenizer = config.data.tokenizer or None
    export(folder, state, stage, config, streaming_config(config), tokenizer)
    logging.getLogger("chameleon_jax").info("weights exported to %s", folder)


def open_data(config: ConfigDict, split: str) -> Source:
    """What is chosen of a split of the data folders, read into memory if the config says so."""
    source = open_chosen(config, split)
    if not config.data.in_memory:
        return source
    return InMemorySource(
        source, config.video.frames, (config.video.height, config.video.width), config.data.threads
    )


def open_chosen(config: ConfigDict, split: str) -> Source:
    """The split of the data folders, or those of its clips whose captions match `data.match`."""
    source = open_sources(config.data.dir.split(","), split)
    return MatchingSource(source, config.data.match) if config.data.match else source


def held_out(config: ConfigDict, module) -> list[HostBatch]:
    """The first batches of the validation split, or of the training split where no validation split
    is named.

    Prompts are never dropped here; clips and crops are the same in every run with the same seed.
    """
    source = open_chosen(config, config.data.validation or config.data.split)
    plain = {"dropout": 0.0, "workers": 0, "threads": 1, "prefetch": 1}
    parts = [
        dataclasses.replace(part, loader=dataclasses.replace(part.loader, **plain))
        for part in module.make_eval_parts(config)
    ]
    feed = Feed(source, parts)
    return [next(feed) for _ in range(max(config.train.eval_batches, 1))]


def with_stored_sizes(config: ConfigDict) -> ConfigDict:
    """Frozen weights know their own sizes and latent statistics: take them from the config.json
    beside them.
    """
    config = config.copy_and_resolve_references()
    config.unlock()
    for name, path in config.weights.items():
        sizes = stored_model(path, name) if path else None
        if sizes is not None:
            config.model[name].update(sizes)
    return config


def streaming_config(config: ConfigDict) -> ConfigDict:
    """The inference config that goes with the size of a training config."""
    if config.name.startswith("wan22_5b"):
        return wan22_5b.get_config()
    return runway_tiny.get_config(config.name.removesuffix("_video"))


def start_logging() -> None:
    """Progress lines of this project, with the time, on stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("chameleon_jax")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO if jax.process_index() == 0 else logging.WARNING)


if __name__ == "__main__":
    main()

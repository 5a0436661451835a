"""A whole training run, from a config to exported weights.

    outcome = run(load_config("configs/teacher.py", ["workdir=runs/teacher", ...]))

In the workdir: config.json, metrics.jsonl, tensorboard/, previews/, checkpoints/, export/.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from chameleon_jax import sharding
from chameleon_jax.config import ConfigError, flatten, save_config
from chameleon_jax.data.memory import InMemorySource
from chameleon_jax.data.rendered import RenderedSource
from chameleon_jax.data.sources import MatchingSource, Source, open_sources
from chameleon_jax.errors import need
from chameleon_jax.models.build import read_sizes
from chameleon_jax.models.dit import DiTConfig
from chameleon_jax.splits import SPLITS
from chameleon_jax.training import loop
from chameleon_jax.training.export import export, stored_model
from chameleon_jax.training.feed import HostBatch, Part
from chameleon_jax.training.loop import Outcome
from chameleon_jax.training.networks import weights_file
from chameleon_jax.training.profile import Steps
from chameleon_jax.training.settings import check_resume, check_settings
from chameleon_jax.training.stage import Stage
from chameleon_jax.training.stages import make_stage

log = logging.getLogger(__name__)

# What a run that ended by a signal exits with: 128 + the signal's number, as shells do. It has not
# exported anything, so it must not look like success: a script would use an older export, and
# Kubernetes would count the job as done instead of starting it again.
EXIT_CODES = {"finished": 0, "time": 0, "SIGINT": 130, "SIGTERM": 143}


# Clips of `data.world` that are held out.
HELD_OUT = 64

# Networks of distillation that are of the kind of another one.
ROLES = {"score": "dit", "score_text": "text"}


def run(
    config: ConfigDict,
    *,
    export_only: bool = False,
    resume_with_changes: bool = False,
    profile: Steps | None = None,
    strict: bool = False,
    export_best: bool = False,
) -> Outcome:
    """Train the stage that a config describes, and export its weights.

    A run that is stopped by a signal is saved and not exported. What can be checked is checked
    before data or weights are loaded.

    Args:
      config: see configs/training.py.
      export_only: train nothing; export the newest checkpoint, also of a run that is going on.
      resume_with_changes: resume from a checkpoint that was made with other settings.
      profile: the steps of this start to write a profile of, into <workdir>/profile.
      strict: use no earlier checkpoint than the newest, should that be damaged.
      export_best: export the checkpoint with the best `train.best` instead of the last step.

    Returns:
      How it ended; with `export_best` the state is that of the exported checkpoint.

    Raises:
      UserError: the run cannot start or continue. The message is one line.
    """
    check_settings(config)
    if export_best and not config.train.best:
        raise ConfigError("train.best is not set: there is no best checkpoint to export")
    config = with_stored_sizes(config)
    mesh = sharding.make_mesh(config.mesh)
    _check_split(config, mesh)
    stage = make_stage(config)
    if export_only:
        state, step = loop.load_state(config, stage, best=export_best, strict=strict)
        outcome = Outcome(state, step, "finished", loop.load_parts(config, stage))
        _export(config, stage, outcome, held_out_batches(config, stage))
        return outcome
    need("tensorboardX", "train")
    resumed = check_resume(config, stage.name, allow_changes=resume_with_changes) is not None
    _check_weights(config, stage, without_trained=resumed)
    held_out = held_out_batches(config, stage)
    source = open_data(config, config.data.split)
    parts = stage.batches(source).parts
    for part in parts:
        _check_batch(part.loader.batch, config.train.get("accumulate", 1), mesh)
    feed = stage.batches(_in_memory(config, source, parts))
    _save_config(config)
    outcome = loop.train(
        config,
        stage,
        feed,
        held_out,
        resume_with_changes=resume_with_changes,
        strict=strict,
        profile=profile,
    )
    if outcome.reason in ("SIGINT", "SIGTERM"):
        log.warning(stopped_message(config, outcome))
        return outcome
    if export_best:
        jax.tree.map(lambda array: array.delete(), outcome.state)  # no room for two
        state, step = loop.load_state(config, stage, best=True)
        log.info("step %d of %d is the best", step, outcome.step)
        outcome = dataclasses.replace(outcome, state=state)
    _export(config, stage, outcome, held_out)
    return outcome


def _check_split(config: ConfigDict, mesh: Mesh) -> None:
    """Raise MeshError if the transformer's activations cannot be split over the mesh."""
    dit = read_sizes("dit", config.model.dit.to_dict())
    factor = read_sizes("vae", config.model.vae.to_dict()).spatial_factor
    _, rows, columns = dit.patch
    for height, width in (
        (config.video.height, config.video.width),
        *config.data.get("buckets", ()),
    ):
        tokens = (height // (factor * rows)) * (width // (factor * columns))
        sharding.check_network(dit.heads, tokens, mesh)


def export_folder(config: ConfigDict) -> Path:
    """Where the weights of a run go."""
    return Path(config.export_dir or Path(config.workdir) / "export")


def stopped_message(config: ConfigDict, outcome: Outcome) -> str:
    """What there is, and what is not, after a run was stopped by a signal."""
    folder = export_folder(config)
    exported = "nothing was exported"
    if (folder / "config.json").is_file():
        exported += f" ({folder} holds the weights of an earlier export)"
    return (
        f"stopped by {outcome.reason} at step {outcome.step} of {config.train.steps}: the state is"
        f" saved in {Path(config.workdir) / 'checkpoints'}, {exported}. The same command resumes"
        f" the run; with --export_only it exports step {outcome.step}"
    )


def _export(
    config: ConfigDict, stage: Stage, outcome: Outcome, batches: Sequence[HostBatch]
) -> None:
    mesh = sharding.make_mesh(config.mesh)
    params = stage.exported(outcome.state, outcome.frozen)
    measured = stage.finish(config, params, [sharding.put_batch(batch, mesh) for batch in batches])
    export(export_folder(config), params, stage, measured, config.data.tokenizer or None)
    if jax.process_count() > 1:  # the first one writes for long, and the others must not leave it
        multihost_utils.sync_global_devices("exported")
    log.info("weights exported to %s", export_folder(config))


def _check_weights(config: ConfigDict, stage: Stage, *, without_trained: bool) -> None:
    """Raise ConfigError if a file that networks start from is not there."""
    for name, path in stage.weights.items():
        if without_trained and name in stage.trained:
            continue  # they are in the checkpoint
        if not path.is_file():
            key = _weights_key(config, stage, name)
            raise ConfigError(f"{key}: {path} does not exist; expected the weights of {name!r}")


def _check_batch(size: int, parts: int, mesh: Mesh) -> None:
    """Raise ConfigError or MeshError if the parts of a batch cannot be split over the devices."""
    sharding.check_batch(size, mesh)
    if size % parts:
        raise ConfigError(
            f"train.accumulate is {parts}, and a batch of {size} does not make so many equal parts;"
            f" choose a divisor of {size}, or a multiple of {parts} as the size of the batch"
        )
    sharding.check_batch(size // parts, mesh)


def _weights_key(config: ConfigDict, stage: Stage, name: str) -> str:
    """The key of the config that a file of `stage.weights` comes from."""
    named = {f"weights.{key}": path for key, path in config.weights.items()}
    starts = {"init_from": config.init_from, "tune.lora": flatten(config).get("tune.lora", "")}
    own = f"weights.{name}"
    if own in named:  # several keys may name one folder
        named = {own: named[own], **named, **starts}
    else:
        named = {**starts, **named}
    file = stage.weights[name]
    keys = [key for key, path in named.items() if path and weights_file(path, file.stem) == file]
    return keys[0]


def open_data(config: ConfigDict, split: str) -> Source:
    """The split of the data folders, or those of its clips whose captions match `data.match`.

    With `data.world` clips that are rendered when they are asked for.
    """
    if config.data.world:
        source = _rendered(config, split)
    else:
        source = open_sources(config.data.dir.split(","), split, config.data.labels)
    return MatchingSource(source, config.data.match) if config.data.match else source


def _rendered(config: ConfigDict, split: str) -> RenderedSource:
    """The first clips of a split of a world: `data.clips` to train on, a few that are held out."""
    if config.data.dir:
        raise ConfigError(
            f"data.dir is {config.data.dir!r}, and data.world {config.data.world!r}: clips come"
            " from one place; leave one of them empty"
        )
    if split not in SPLITS:
        raise ConfigError(f"no split {split!r}; expected one of {', '.join(SPLITS)}")
    count = config.data.clips if split == config.data.split else HELD_OUT
    return RenderedSource(
        range(SPLITS[split], SPLITS[split] + count),
        (config.video.height, config.video.width),
        config.video.fps,
        config.data.world,
        people=config.data.people,
        labels=config.data.labels,
        workers=config.data.render_workers,
    )


def _in_memory(config: ConfigDict, source: Source, parts: Sequence[Part]) -> Source:
    if not config.data.in_memory:
        return source
    main = (config.video.height, config.video.width)
    buckets = list(dict.fromkeys(size for part in parts for size in part.loader.buckets)) or [main]
    return InMemorySource(source, config.video.frames, buckets, config.data.threads)


def _save_config(config: ConfigDict) -> None:
    if jax.process_index():
        return
    workdir = Path(config.workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        save_config(workdir / "config.json", config)
    except OSError as error:
        why = error.strerror or error
        raise ConfigError(f"workdir {workdir}: cannot be written to ({why})") from None


def held_out_batches(config: ConfigDict, stage: Stage) -> list[HostBatch]:
    """The first batches of the validation split; of the training split if no other is named.

    Prompts are never dropped here; clips and crops are the same in every run with the same seed.
    """
    feed = stage.eval_batches(open_data(config, config.data.validation or config.data.split))
    for part in feed.parts:
        sharding.check_batch(part.loader.batch, sharding.make_mesh(config.mesh))
    return [next(feed) for _ in range(config.train.eval_batches)]


def with_stored_sizes(config: ConfigDict) -> ConfigDict:
    """The config with the sizes and latent statistics that lie beside the frozen weights.

    A score may be of another size than the student: it gets a group of its own in `model`. What the
    transformer of `init_from` says (velocities or clean frames) is kept, since its weights do not
    show it.
    """
    config = config.copy_and_resolve_references()
    config.unlock()
    if config.init_from and weights_file(config.init_from, "dit").is_file():
        stored = stored_model(config.init_from, "dit")
        if stored is not None:
            config.model.dit.says = stored.get("says", DiTConfig.says)
    for name, path in config.weights.items():
        network = ROLES.get(name, name)
        if not path or network not in config.model:
            continue
        sizes = stored_model(path, network)
        if sizes is None:
            continue
        if name in ROLES:
            config.model[name] = {"network": network, **config.model[network].to_dict(), **sizes}
        else:
            config.model[name].update(sizes)
    return config


def start_logging() -> None:
    """Show the progress lines of this project, with the time, on stderr: for a program to call."""
    handler = logging.StreamHandler(sys.stderr)
    who = f"[process {jax.process_index()}] " if jax.process_index() else ""
    handler.setFormatter(logging.Formatter(f"%(asctime)s {who}%(message)s", "%H:%M:%S"))
    logger = logging.getLogger("chameleon_jax")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO if jax.process_index() == 0 else logging.WARNING)

"""What a training config may say, and what of it may change when a run is resumed.

Both are looked at before anything is loaded, and every fault is named at once.
"""

from __future__ import annotations

import ast
import dataclasses
import fnmatch
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from chameleon_jax.config import ConfigError, flatten
from chameleon_jax.keys import MAX_SEED
from chameleon_jax.models.build import DTYPES
from chameleon_jax.training.about import CheckpointError, read_newest
from chameleon_jax.training.alarms import ACTIONS


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included unless `above` or `below` is set."""

    low: float
    high: float = math.inf
    above: bool = False
    below: bool = False

    def __contains__(self, value: float) -> bool:
        after = value > self.low if self.above else value >= self.low
        before = value < self.high if self.below else value <= self.high
        return after and before

    def __str__(self) -> str:
        low = f"above {self.low}" if self.above else f"{self.low}"
        if self.high == math.inf:
            return low if self.above else f"{low} or more"
        return f"{low} to below {self.high}" if self.below else f"{low} to {self.high}"


COUNT = Range(1)  # of things that there must be
INTERVAL = Range(0)  # in steps; 0: never
SHARE = Range(0, 1)
DECAY = Range(0, 1, below=True)  # of an exponential average
POSITIVE = Range(0, above=True)
TIMESTEP = Range(0, 1000)

# Groups that a config does not have are not asked for.
RANGES = {
    "seed": Range(0, MAX_SEED),
    "video.height": COUNT,
    "video.width": COUNT,
    "video.frames": COUNT,
    "video.fps": POSITIVE,
    "data.batch": COUNT,
    "data.dropout": SHARE,
    "data.threads": COUNT,
    "data.prefetch": COUNT,
    "data.workers": Range(0),
    "data.clips": COUNT,
    "data.people": COUNT,
    "data.render_workers": Range(0),
    "people.count": COUNT,
    "people.each": COUNT,
    "people.first": Range(0),
    "train.steps": Range(0),
    "train.accumulate": COUNT,
    "train.max_minutes": Range(0),
    "train.log_every": INTERVAL,
    "train.eval_every": INTERVAL,
    "train.eval_batches": COUNT,
    "train.preview_every": INTERVAL,
    "train.checkpoint_every": INTERVAL,
    "train.keep": COUNT,
    "optimizer.b1": DECAY,
    "optimizer.b2": DECAY,
    "optimizer.momentum": DECAY,
    "optimizer.eps": POSITIVE,
    "optimizer.weight_decay": Range(0),
    "optimizer.clip": Range(0),
    "schedule.peak": POSITIVE,
    "schedule.warmup": Range(0),
    "schedule.halve_at": Range(0),
    "schedule.decay_from": SHARE,
    "schedule.final": SHARE,
    "tune.rank": COUNT,
    "tune.alpha": POSITIVE,
    "ema.decay": DECAY,
    "ema.start": Range(0),
    "loss.shift": POSITIVE,
    "loss.history_noise": SHARE,
    "loss.reference_noise": SHARE,
    "rollout.history_noise": Range(0, 1, below=True),
    "loss.l1": Range(0),
    "loss.l2": Range(0),
    "loss.gradient": Range(0),
    "loss.laplacian": Range(0),
    "loss.kl": Range(0),
    "loss.copies": COUNT,
    "loss.garment": POSITIVE,
    "loss.head": POSITIVE,
    "loss.labels": Range(0),
    "loss.labels_layer": Range(0),
    "loss.steps": COUNT,
    "loss.guidance": Range(0),
    "resampling.clips": SHARE,
    "resampling.most": SHARE,
    "resampling.noise": SHARE,
    "changes.clips": SHARE,
    "changes.least": SHARE,
    "changes.most": SHARE,
    "recycling.clips": SHARE,
    "recycling.chunks": SHARE,
    "recycling.levels": COUNT,
    "recycling.size": COUNT,
    "recycling.warmup": Range(0),
    "scores.guidance": Range(0),
    "scores.low": TIMESTEP,
    "scores.high": TIMESTEP,
    "reward.tau": POSITIVE,
    "gan.hidden": COUNT,
    "gan.weight": Range(0),
    "gan.critic_weight": Range(0),
    "critic.every": COUNT,
    "preview.samples": COUNT,
    "preview.frames": COUNT,
    "preview.steps": COUNT,
    "alarms.explosion": Range(0),
    "alarms.contrast": SHARE,
    "alarms.motion": SHARE,
    "alarms.colour": Range(0),
    "alarms.checks": COUNT,
    "alarms.arm_after": Range(0),
}
# The critic of distillation has groups of its own.
RANGES |= {
    f"critic.{key}": bounds
    for key, bounds in RANGES.items()
    if key.startswith(("optimizer.", "schedule."))
}
# Keys whose value is a tuple of tuples of whole numbers above 0.
TABLES = {
    "data.buckets": ("height", "width"),
    "data.lengths": ("frames", "clips"),
    "data.crops": ("frames", "height", "width", "samples"),
}

# What may change from one start of a run to the next: where things are written, how often, and how
# the work is spread. Everything else makes it another run.
FREE = (
    "name",
    "workdir",
    "export_*",
    "streaming.*",
    "mesh.*",
    "preview.*",
    "alarms.*",
    "data.threads",
    "data.prefetch",
    "data.workers",
    "train.max_minutes",
    "train.*_every",
    "train.eval_batches",
    "train.keep",
    "train.best",
    "train.best_mode",
    "train.remat",
)
SHOWN_CHANGES = 12  # named in a message


def check_settings(config: ConfigDict) -> None:
    """Look at the values of a training config that can be judged alone.

    Raises:
      ConfigError: some are impossible; all of them are named.
    """
    faults = list(_faults(config, flatten(config)))
    if faults:
        raise ConfigError("; ".join(faults))


def _faults(config: ConfigDict, flat: Mapping[str, Any]) -> Iterator[str]:
    if not flat["workdir"]:
        yield "workdir is not set; give it as --config.workdir=FOLDER"
    if not flat["data.dir"] and not flat["data.world"]:
        yield "data.dir is not set; give it as --config.data.dir=FOLDER"
    for key in ("workdir", "export_dir"):
        if flat[key] and (fault := _folder_fault(Path(flat[key]))):
            yield f"{key} is {flat[key]}: {fault}"
    for key in ("dtype", "export_dtype"):
        if flat[key] not in DTYPES:
            yield f"{key} is {flat[key]!r}; expected one of {', '.join(DTYPES)}"
    if flat.get("quantize", "none") != "none":
        yield (
            f"quantize is {flat['quantize']!r}; expected none: rounding to 8 bits has no gradient,"
            " it is for streams"
        )
    if "alarms.action" in flat and flat["alarms.action"] not in ACTIONS:
        yield f"alarms.action is {flat['alarms.action']!r}; expected one of {', '.join(ACTIONS)}"
    if flat["train.best_mode"] not in ("min", "max"):
        yield f"train.best_mode is {flat['train.best_mode']!r}; expected min or max"
    if flat["train.best"] and not flat["train.eval_every"]:
        yield f"train.best is {flat['train.best']!r}; it needs evaluations: set train.eval_every"
    for key, value in flat.items():
        if key in RANGES:
            if not _is_number(value) or value not in RANGES[key]:
                yield f"{key} is {value}; expected {RANGES[key]}"
        elif key in TABLES:
            yield from _table_faults(key, value, TABLES[key])
        elif not _is_finite(value):
            yield f"{key} is {value}; expected finite numbers"


def _table_faults(key: str, table: Any, columns: tuple[str, ...]) -> Iterator[str]:
    expected = f"expected entries ({', '.join(columns)}), whole numbers above 0"
    for entry in table:
        full = isinstance(entry, (tuple, list)) and len(entry) == len(columns)
        if not full or not all(_is_whole(number) and number > 0 for number in entry):
            yield f"{key} has the entry {entry}; {expected}"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_finite(item) for item in value)
    return not isinstance(value, float) or math.isfinite(value)


def _folder_fault(folder: Path) -> str:
    """Why nothing can be written to a folder that may not exist yet; "" if it can."""
    existing = folder.absolute()
    while not os.path.lexists(existing):
        existing = existing.parent
    if not existing.is_dir():
        return f"{existing} is not a folder"
    if not os.access(existing, os.W_OK | os.X_OK):
        return f"{existing} cannot be written to"
    return ""


def describe(config: ConfigDict) -> dict[str, str]:
    """A config as its checkpoints store it, as text by dotted key."""
    return {key: str(value) for key, value in flatten(config).items()}


def check_resume(
    config: ConfigDict, stage: str, *, allow_changes: bool = False
) -> list[str] | None:
    """Compare a config with the one of the newest checkpoint in its workdir that can be read.

    Keys that only one of them has are left alone: they come with another version of the config.

    Args:
      config: of the run.
      stage: its name.
      allow_changes: accept another config, though not another stage.

    Returns:
      What has changed, each as "key old -> new"; None if there is no checkpoint.

    Raises:
      CheckpointError: the checkpoint is of another stage, or of a run with other settings.
    """
    folder = Path(config.workdir) / "checkpoints"
    newest = read_newest(folder, stage)
    if newest is None:
        return None
    step, about = newest
    stored = about["config"]
    changes = [
        f"{key} {_shown(stored[key])} -> {_shown(value)}"
        for key, value in flatten(config).items()
        if key in stored and not _is_free(key) and not _is_same(stored[key], value)
    ]
    if changes and not allow_changes:
        raise CheckpointError(
            f"{folder}: step {step} is of a run with other settings: {shortened(changes)}. Set them"
            " back; or resume with them by --resume_with_changes; or start a new run from its"
            " export (another workdir, init_from)"
        )
    return changes


def _shown(value: Any) -> str:
    return "(empty)" if value == "" else str(value)


def shortened(changes: Sequence[str]) -> str:
    """The first changes of many, for a message."""
    listed = "; ".join(changes[:SHOWN_CHANGES])
    more = len(changes) - SHOWN_CHANGES
    return f"{listed}; and {more} more" if more > 0 else listed


def _is_free(key: str) -> bool:
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in FREE)


def _is_same(stored: str, value: Any) -> bool:
    if stored == str(value):
        return True
    try:
        return bool(ast.literal_eval(stored) == value)
    except (ValueError, SyntaxError):
        return False

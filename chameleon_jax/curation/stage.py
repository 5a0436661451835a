"""What a stage of curation is: a batch of clips in, a batch of clips out, no engine known.

    class Brightness(Stage):
        name, version = "brightness", "1"

        def measure(self, clips):
            return [Found(values={"luma": ...}) for clip in clips]

        limits = {"luma": Limits(least=0.1)}

A stage looks (`measure`, slow: its result is kept on disk) and judges (`judge`, a pure function of
what was found). So other thresholds cost no second look. Calling a stage does both for the clips
that are still in and passes the others through; this is all that a runner on a cluster needs.
"""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from chameleon_jax.curation.clip import Clip, Rejection
from chameleon_jax.errors import UserError


class CurationError(UserError):
    """Curation cannot go on. The message is one line."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a measured value has to be within; None is no limit."""

    least: float | None = None
    most: float | None = None


@dataclasses.dataclass(frozen=True)
class Found:
    """What a stage found out about a clip, as the journal keeps it.

    Attributes:
      values: numbers by name.
      made: a JSON value; None: nothing was made.
      refused: (reason, value, threshold, detail) where the clip cannot be used whatever the
        thresholds are.
      passing: the refusal may be none another time (nobody answered): the next run tries again.
    """

    values: Mapping[str, float] = dataclasses.field(default_factory=dict)
    made: Any = None
    refused: tuple[str, float, float, str] | None = None
    passing: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries, lists, numbers and strings."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Found:
        """Inverse of `to_json`, also for values that were written as JSON text and read again."""
        refused = values["refused"]
        return cls(
            dict(values["values"]),
            values["made"],
            None if refused is None else tuple(refused),
            values["passing"],
        )


class Stage(abc.ABC):
    """One step of curation.

    Attributes:
      name: unique in a pipeline.
      version: another one where the same clip would give another result.
      needs: names of stages whose results it reads.
      settings: JSON values that decide what is found, besides the version.
      limits: by the name of a measured value.
      looks_around: it has to know something of all clips that are in before it looks at one. Then
        `survey`, which may run in many processes, `index`, which runs once, and `begin` are called,
        and what they hand over is pickled. Most stages do not.
      graded: those values whose limit a calibration may choose, see `calibrate`.
    """

    name: str
    version: str
    needs: Sequence[str] = ()
    settings: Mapping[str, Any] = {}
    limits: Mapping[str, Limits] = {}
    graded: Sequence[str] = ()
    looks_around: bool = False

    def survey(self, clips: Sequence[Clip]) -> list[Any]:
        """What the stage has to know of each clip before it looks at any; see `looks_around`."""
        raise NotImplementedError

    def index(self, surveyed: Sequence[Any]) -> Any:
        """What is made, once, of what `survey` says of all clips, in their order."""
        raise NotImplementedError

    def begin(self, index: Any) -> None:
        """Take what `index` made, in every process that looks at clips."""
        raise NotImplementedError

    @abc.abstractmethod
    def measure(self, clips: Sequence[Clip]) -> list[Found]:
        """Look at clips that are in; one result each, in their order."""

    def judge(self, clip: Clip, found: Found) -> list[Clip]:
        """The clip with what was found, refused if it has to be; some stages make several of it."""
        measured = {**clip.measured, **found.values}
        made = clip.made if found.made is None else {**clip.made, self.name: found.made}
        versions = {**clip.versions, self.name: self.version}
        rejection = None
        if found.refused is not None:
            reason, value, threshold, detail = found.refused
            rejection = Rejection(self.name, reason, value, threshold, detail)
        else:
            rejection = self.out_of_limits(found.values)
        return [
            dataclasses.replace(
                clip, measured=measured, made=made, versions=versions, rejection=rejection
            )
        ]

    def out_of_limits(self, values: Mapping[str, float]) -> Rejection | None:
        """The first value that is not within its limits."""
        for name, limits in self.limits.items():
            value = values[name]
            if limits.least is not None and not value >= limits.least:
                return Rejection(self.name, f"{name} too low", value, limits.least)
            if limits.most is not None and not value <= limits.most:
                return Rejection(self.name, f"{name} too high", value, limits.most)
        return None

    def __call__(self, clips: Sequence[Clip]) -> list[Clip]:
        """Batch in, batch out; clips that were refused before pass through."""
        looked_at = [clip for clip in clips if clip.rejection is None]
        found = iter(self.measure(looked_at) if looked_at else [])
        out: list[Clip] = []
        for clip in clips:
            out += [clip] if clip.rejection is not None else self.judge(clip, next(found))
        return out

    def fingerprint(self) -> str:
        """Other for another version or other settings; limits do not count."""
        said = json.dumps([self.name, self.version, dict(self.settings)], sort_keys=True)
        return hashlib.sha256(said.encode()).hexdigest()[:12]


def check_order(stages: Sequence[Stage]) -> None:
    """Raise unless names are unique and each stage comes behind what it needs.

    Raises:
      CurationError: one does not.
    """
    seen: set[str] = set()
    for stage in stages:
        missing = [name for name in stage.needs if name not in seen]
        if missing or stage.name in seen:
            why = f"needs {', '.join(missing)} before it" if missing else "is there twice"
            raise CurationError(f"stage {stage.name!r} {why}; change the order of the stages")
        seen.add(stage.name)

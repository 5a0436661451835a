"""The serial runner: stages over clips, in one process, resumable at any moment.

Stages come in groups. Within a group a few clips go through all stages before the next few, so that
a clip is decoded once for all of them. A group begins when the one before has ended: its stages may
know of all clips that are in (`Stage.looks_around`), as the choice of another garment does.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from chameleon_jax.curation.clip import Clip
from chameleon_jax.curation.journal import Journal
from chameleon_jax.curation.stage import CurationError, Stage, check_order

BATCH = 4  # clips that go through a group together
MAX_UNANSWERED = 5  # clips in a row about which nobody answered: then nobody will

# Called with the name of a stage, clips that are through, clips in all.
Progress = Callable[[str, int, int], None]


@dataclasses.dataclass
class Spent:
    """What a stage did in this run.

    Attributes:
      clips: that it looked at, or that it made of videos; those of earlier runs do not count.
      seconds: that it took.
    """

    clips: int = 0
    seconds: float = 0.0


class SerialRunner:
    """Runs stages over clips, and keeps what they find.

    Args:
      groups: stages; see the module's docstring.
      out: the folder of the run, which holds the journals.
      batch: clips that go through a group together: what a killed run may lose.
      progress: called after each batch.

    Attributes:
      spent: by the name of the stage.

    Raises:
      CurationError: a stage stands before one that it needs, or a journal cannot be read.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[Stage]],
        out: Path,
        *,
        batch: int = BATCH,
        progress: Progress | None = None,
    ):
        stages = [stage for group in groups for stage in group]
        check_order(stages)
        self.groups, self.out, self.batch = groups, out, batch
        self.spent = {stage.name: Spent() for stage in stages}
        self._progress = progress or (lambda *_: None)
        self._journals = {stage.name: Journal(out, stage) for stage in stages}
        self._unanswered = 0

    def __call__(self, clips: Sequence[Clip]) -> list[Clip]:
        """All clips, those that were refused too, each as its last stage left it.

        Raises:
          UserError: of a stage that cannot go on at all; what was found until then is kept.
          CurationError: nobody answered about several clips in a row.
        """
        for group in self.groups:
            clips = self.run_group(group, clips)
        return list(clips)

    def run_group(self, group: Sequence[Stage], clips: Sequence[Clip]) -> list[Clip]:
        """One group alone; see `__call__`."""
        for stage in group:
            if stage.looks_around and any(self._lacks(group, clip) for clip in clips):
                stage.begin(stage.index(stage.survey(survivors(clips))))
        out: list[Clip] = []
        done = 0
        for some in _batches(clips, self.batch):
            done += len(some)
            for stage in group:
                some = self._run_stage(stage, some)
            out += some
            self._progress(group[-1].name, done, len(clips))
        return out

    def _lacks(self, group: Sequence[Stage], clip: Clip) -> bool:
        """Whether a stage has to look at a clip."""
        for stage in group:
            if clip.rejection is not None:
                return False
            found = self._journals[stage.name].get(clip.id)
            if found is None:
                return True
            judged = stage.judge(clip, found)
            if len(judged) != 1:  # a stage that cuts is alone in its group
                return False
            clip = judged[0]
        return False

    def _run_stage(self, stage: Stage, clips: Sequence[Clip]) -> list[Clip]:
        journal = self._journals[stage.name]
        inside = [clip for clip in clips if clip.rejection is None]
        missing = [clip for clip in inside if journal.get(clip.id) is None]
        spent = self.spent[stage.name]
        if missing:
            began = time.monotonic()
            found = stage.measure(missing)
            spent.seconds += time.monotonic() - began
            journal.add({clip.id: one for clip, one in zip(missing, found, strict=True)})
            for one in found:
                self._count_unanswered(stage, one.passing, one.refused)
        now = {clip.id for clip in missing}
        out: list[Clip] = []
        for clip in clips:
            found_here = journal.get(clip.id)
            if clip.rejection is not None or found_here is None:
                out.append(clip)
                continue
            judged = stage.judge(clip, found_here)
            spent.clips += len(judged) if clip.id in now else 0
            out += judged
        return out

    def _count_unanswered(
        self, stage: Stage, passing: bool, refused: tuple[str, float, float, str] | None
    ) -> None:
        self._unanswered = self._unanswered + 1 if passing else 0
        if self._unanswered >= MAX_UNANSWERED:
            detail = refused[3] if refused else ""
            raise CurationError(
                f"{stage.name}: no answer about {MAX_UNANSWERED} clips in a row ({detail}); see to"
                " the endpoint, the same command continues"
            )


def _batches(clips: Sequence[Clip], size: int) -> Iterator[Sequence[Clip]]:
    for start in range(0, len(clips), size):
        yield clips[start : start + size]


def survivors(clips: Iterable[Clip]) -> list[Clip]:
    """The clips that are in."""
    return [clip for clip in clips if clip.rejection is None]

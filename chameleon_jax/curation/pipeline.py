"""The stages of a config, put together and run: from a folder of videos to records.

The models behind the stages are given (`Models`), so that the same pipeline runs with real ones,
with those of the demo and with those of a test.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from chameleon_jax import files
from chameleon_jax.curation import calibrate, output, report
from chameleon_jax.curation.aesthetics import AestheticFilter, FrameScorer
from chameleon_jax.curation.captioner import Captioner
from chameleon_jax.curation.clip import Clip
from chameleon_jax.curation.endpoint import Endpoint, PictureEditor, VisionModel
from chameleon_jax.curation.footage import Footage
from chameleon_jax.curation.garment import (
    Checks,
    Embedder,
    Garment,
    GarmentStage,
    LookEmbedder,
    ReferenceStage,
    local_editor,
)
from chameleon_jax.curation.journal import only_run
from chameleon_jax.curation.motion import MotionFilter
from chameleon_jax.curation.person import PersonDetector, PersonFilter, YoloxDetector
from chameleon_jax.curation.pose import PoseEstimator, PoseFilter, chosen_estimator
from chameleon_jax.curation.quality import BlurFilter, TechnicalFilter
from chameleon_jax.curation.runner import Progress, SerialRunner, survivors
from chameleon_jax.curation.shots import Shots
from chameleon_jax.curation.stage import CurationError, Limits, Stage

CHOSEN = "thresholds.json"


@dataclasses.dataclass(frozen=True)
class Models:
    """Who looks, speaks and draws.

    Attributes:
      detector: finds people.
      estimators: of joints; empty: poses are left out.
      scorers: of frames; empty: aesthetics are left out.
      vision: captions, and checks of pictures; None: the run ends behind the filters.
      editor: makes pictures; None: it ends behind the captions.
      embedder: says which garments are alike.
      garments: of the user's own.
    """

    detector: PersonDetector
    estimators: Sequence[PoseEstimator] = ()
    scorers: Sequence[FrameScorer] = ()
    vision: VisionModel | None = None
    editor: PictureEditor | None = None
    embedder: Embedder = dataclasses.field(default_factory=LookEmbedder)
    garments: Sequence[Garment] = ()


def real_models(config: ConfigDict, garments: Sequence[Garment] = ()) -> Models:
    """The models that a config names.

    Raises:
      CurationError: a file is not there, or an endpoint cannot be used.
      MissingPackageError: a package is not installed.
    """
    from chameleon_jax.curation.aesthetics import chosen_scorer

    vision = _endpoint(config.vision) if config.vision.url else None
    editor: PictureEditor | None = None
    if config.editor.local:
        editor = local_editor(config.editor.local)
    elif config.editor.url:
        editor = _endpoint(config.editor)
    if editor is not None and vision is None:
        raise CurationError(
            "editor is set and vision.url is not: nobody would check the pictures; set vision.url"
        )
    detector = YoloxDetector(config.person.weights, config.person.score)
    estimators = chosen_estimator(config.pose.weights)
    scorers = chosen_scorer(config.aesthetics.weights)
    return Models(
        detector=detector,
        estimators=estimators,
        scorers=scorers,
        embedder=scorers[0] if scorers else LookEmbedder(),
        vision=vision,
        editor=editor,
        garments=garments,
    )


def _endpoint(group: ConfigDict) -> Endpoint:
    return Endpoint(group.url, group.model, group.key, group.timeout, group.tries)


@dataclasses.dataclass
class Pipeline:
    """The stages of a run, in groups, see `runner`.

    Attributes:
      config: see configs/curation.py.
      folder: of the videos.
      out: what is written.
      models: who looks.
    """

    config: ConfigDict
    folder: Path
    out: Path
    models: Models

    def __post_init__(self):
        config, models = self.config, self.models
        self.footage = Footage(self.folder, config.pairs)
        shortest = max(config.shots.seconds[0], config.out.frames / config.out.fps)
        if shortest > config.shots.seconds[1]:
            raise CurationError(
                f"{config.out.frames} frames at {config.out.fps:g} a second are {shortest:.2f} s;"
                f" clips have at most {config.shots.seconds[1]:g}: change out.frames, out.fps or"
                " shots.seconds"
            )
        shots = Shots(
            self.footage,
            (shortest, config.shots.seconds[1]),
            config.shots.adaptive,
            config.shots.content,
        )
        filters: list[Stage] = [
            PersonFilter(self.footage, models.detector, limits_of(config.person.limits)),
            *(self._pose_filter(estimator) for estimator in models.estimators),
            MotionFilter(self.footage, limits_of(config.motion.limits)),
            BlurFilter(self.footage, limits_of(config.blur.limits)),
            TechnicalFilter(self.footage, limits_of(config.technical.limits)),
        ]
        for scorer in models.scorers:
            limits = limits_of(config.aesthetics.limits)
            filters.append(AestheticFilter(self.footage, scorer, limits))
        self.filters = filters
        self.groups: list[list[Stage]] = [[shots], filters]
        if models.vision is not None:
            made: list[Stage] = [Captioner(self.footage, models.vision, config.vision.answers)]
            self.groups.append(made)
            if models.editor is not None:
                checks = Checks(models.editor, models.vision, config.editor.pictures)
                made.append(GarmentStage(self.footage, self.out, checks))
                reference = ReferenceStage(
                    self.footage,
                    self.out,
                    checks,
                    models.embedder,
                    models.garments,
                    most_alike=config.editor.most_alike,
                )
                self.groups.append([reference])

    def _pose_filter(self, estimator: PoseEstimator) -> PoseFilter:
        pose = self.config.pose
        limits = limits_of(pose.limits)
        return PoseFilter(self.footage, estimator, limits, pose.score, pose.angle, pose.parts)

    @property
    def stages(self) -> list[Stage]:
        """All stages, in order."""
        return [stage for group in self.groups for stage in group]

    @property
    def complete(self) -> bool:
        """Whether clips that pass all stages can become records."""
        return self.models.editor is not None


@dataclasses.dataclass(frozen=True)
class RealGroups:
    """Builds the stages of a config anew, in a worker; can be pickled.

    Attributes:
      config: as JSON.
      folder, out: of the videos, and of the run; the same on all machines.
      garments: of the user's own.
    """

    config: str
    folder: Path
    out: Path
    garments: Sequence[Garment] = ()

    def __call__(self) -> list[list[Stage]]:
        config = from_json(self.config)
        models = real_models(config, self.garments)
        return Pipeline(config, self.folder, self.out, models).groups


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run made.

    Attributes:
      clips: all of them, those that were refused too.
      summary: what `funnel.json` holds.
      records: how many were written; None if stages for that were left out.
    """

    clips: list[Clip]
    summary: dict[str, Any]
    records: int | None


# Makes a runner of groups of stages, the folder of the run, and what is called for progress.
MakeRunner = Callable[[Sequence[Sequence[Stage]], Path, Progress | None], SerialRunner]


def serial(groups: Sequence[Sequence[Stage]], out: Path, progress: Progress | None) -> SerialRunner:
    """The runner of one process."""
    return SerialRunner(groups, out, progress=progress)


def run(
    pipeline: Pipeline,
    videos: Sequence[Clip],
    *,
    make_runner: MakeRunner = serial,
    keep: float | None = None,
    sample: int = 500,
    split: str = "train",
    progress: Progress | None = None,
    written: Any = None,
) -> Result:
    """Curate videos; a run that was killed goes on where it was.

    Args:
      pipeline: the stages.
      videos: see `intake.find_videos`.
      make_runner: of the stages; default one of this process.
      keep: share of a sample of clips that the graded filters are to keep; None: thresholds are
        those of the config.
      sample: clips that thresholds are chosen by.
      split: of the records.
      progress: see `SerialRunner`.
      written: called as by `data.records.write_records`.

    Raises:
      UserError: what the user gave cannot be used, or an endpoint does not answer; what was found
        until then is kept.
    """
    out, config = pipeline.out, pipeline.config
    with only_run(out):
        runner = make_runner(pipeline.groups, out, progress)
        clips = runner.run_group(pipeline.groups[0], videos)
        chosen: dict[str, float] = {}
        if keep is not None:
            chosen = _chosen_thresholds(pipeline, runner, clips, keep, sample)
            calibrate.apply(pipeline.filters, chosen)
        for group in pipeline.groups[1:]:
            clips = runner.run_group(group, clips)
        files.write_text(out / "clips.jsonl", _lines(clips))
        records = _write(pipeline, survivors(clips), split, written)
        summary = report.write_report(
            out,
            pipeline.stages,
            clips,
            pipeline.footage,
            runner.spent,
            videos=len(videos),
            more={
                "chosen": chosen,
                "records": records,
                "out": config.out.to_dict(),
                "licences_of_all": sorted({clip.licence for clip in clips}),
            },
        )
    return Result(list(clips), summary, records)


def _write(pipeline: Pipeline, kept: Sequence[Clip], split: str, written: Any) -> int | None:
    """Records and table of the clips that are in; None if the stages for them were left out."""
    if not pipeline.complete:
        return None
    if not kept:
        return 0
    out = pipeline.config.out
    examples = output.CuratedExamples(
        output.in_order(pipeline.out, kept),
        pipeline.footage,
        pipeline.out,
        tuple(out.size),
        out.frames,
        out.fps,
        out.crf,
        thresholds(pipeline.stages),
    )
    count = output.write_records(examples, split, out.shard_size, written)
    if out.table:
        output.write_table(examples, out.crf)
    return count


def thresholds(stages: Sequence[Stage]) -> dict[str, list[float | None]]:
    """[least, most] of every measured value."""
    return {
        name: [limits.least, limits.most]
        for stage in stages
        for name, limits in stage.limits.items()
    }


def _chosen_thresholds(
    pipeline: Pipeline, runner: SerialRunner, clips: Sequence[Clip], keep: float, sample: int
) -> dict[str, float]:
    """Those of an earlier run with the same `keep` and stages, or chosen now."""
    path = pipeline.out / CHOSEN
    asked = {"keep": keep, "stages": {stage.name: stage.version for stage in pipeline.filters}}
    if path.exists():
        known = json.loads(path.read_text(encoding="utf-8"))
        if known["asked"] == asked:
            return known["chosen"]
    inside = survivors(clips)
    step = max(1, len(inside) // sample)
    some = inside[::step][:sample]
    chosen = calibrate.calibrate(runner, [pipeline.groups[1]], some, keep)
    files.write_json(path, {"asked": asked, "clips": len(some), "chosen": chosen})
    return chosen


def to_json(config: ConfigDict) -> str:
    """A config as JSON text."""
    return json.dumps(config.to_dict())


def from_json(text: str) -> ConfigDict:
    """Inverse of `to_json`."""

    def tuples(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: tuples(item) for name, item in value.items()}
        return tuple(map(tuples, value)) if isinstance(value, list) else value

    return ConfigDict(tuples(json.loads(text)))


def limits_of(group: ConfigDict) -> dict[str, Limits]:
    """Limits of a config, pairs (least, most) with None for no limit."""
    return {name: Limits(*pair) for name, pair in group.items()}


def _lines(clips: Sequence[Clip]) -> str:
    return "".join(json.dumps(clip.to_json(), ensure_ascii=False) + "\n" for clip in clips)

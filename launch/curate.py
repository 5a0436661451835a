"""Curate a folder of videos into training data.

    python -m launch.curate --videos footage --out data/curated --licence own --source "our shoots"
    python -m launch.curate --videos footage --out data/curated --keep 0.4
    python -m launch.curate --demo --out out/curation_demo

Videos are cut into clips of 3 to 5 seconds without a cut in them. Filters keep those of one
prominent person who faces the camera and moves, sharp, without technical faults and of good looks.
A vision model says what happens and what it looks like; an image editor shows the garment alone and
the person in another one, and the vision model checks both. Out come records as trained on, a table
of clips, and a report.

Licence and source of every video are required: `--licence` and `--source` for all, or a table
`sources.csv` beside the videos (columns video, licence, source). Without an endpoint
(`--config.vision.url`) the run ends behind the filters, without an editor (`--config.editor.url` or
`--config.editor.local`) behind the captions; the same command with one goes on from there. It can
be interrupted at any time; what was looked at is not looked at again.

`--demo` curates rendered footage of which everything is known, with scripted models, and says how
well each step does. Needs the extras `curation`, `video` and `train`; the demo `runway`, too.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chameleon_jax import places
from chameleon_jax.errors import need
from launch import cli
from launch.cli import UsageError

if TYPE_CHECKING:
    from chameleon_jax.curation.demo import Truth
    from chameleon_jax.curation.pipeline import Pipeline, Result

CONFIG = "configs/curation.py"
DEMO = f"{CONFIG}:demo"
CONTINUES = "the same command continues"
SPARE = 4  # garments of each type that the demo's clips can be dressed in, besides their own


def define_flags(parser: cli.Parser) -> None:
    """The flags of this command."""
    parser.config_flag((CONFIG, ""))
    parser.flag("videos", "folder of videos", metavar="DIR")
    parser.flag("out", "folder to write", needed=True, metavar="DIR")
    parser.flag("licence", "of all videos that sources.csv does not name", default="")
    parser.flag("source", "of all videos that sources.csv does not name", default="")
    parser.flag(
        "garments",
        "pictures of garments for the reference pictures, in upper/, lower/ and full/ of it",
        metavar="DIR",
    )
    parser.flag(
        "keep",
        "share of the clips that the graded filters keep; thresholds are then chosen by a sample;"
        " default those of the config",
        kind=cli.number(above=0),
        metavar="SHARE",
    )
    parser.flag("sample", "of --keep: clips of the sample", kind=cli.whole_number(5), default=500)
    parser.flag("split", "of the records", default="train")
    parser.flag(
        "ray",
        "run on Ray: address of a cluster whose machines all see --videos and --out, auto, or local"
        " to start one here (extra `ray`)",
        metavar="ADDRESS",
    )
    parser.flag(
        "workers",
        "of --ray: workers of each group of stages",
        kind=cli.whole_number(1, 10_000),
        default=2,
        metavar="N",
    )
    parser.switch("demo", "curate rendered footage, and say how well each step does", default=False)
    parser.flag("demo_videos", "of --demo", kind=cli.whole_number(1, 1000), default=6, metavar="N")
    parser.flag(
        "demo_takes",
        "of --demo: takes in a video",
        kind=cli.whole_number(1, 100),
        default=6,
        metavar="N",
    )
    parser.flag("seed", "of --demo", kind=cli.whole_number(0, 600), default=0, metavar="N")
    parser.compilation_flag()


def run(values: cli.Values) -> None:
    """Curate, print the funnel, say where everything is."""
    if bool(values.videos) == values.demo:
        raise UsageError("give --videos (a folder) or --demo, one of them")
    if values.demo and values.ray:
        raise UsageError("--demo runs in one process; leave out --ray")
    if values.keep is not None and values.keep > 1:
        raise UsageError(f"--keep {values.keep:g}: expected a share from 0 to 1")
    for module in ("cv2", "scenedetect"):
        need(module, "curation")
    need("av", "video")
    need("array_record", "train")
    places.check_writable(Path(values.out) / "funnel.json")
    if values.demo:
        run_demo(values)
        return
    from chameleon_jax.config import load_config
    from chameleon_jax.curation import garment, intake, pipeline

    if values.ray:
        need("ray", "ray")
    config = load_config(values.config or CONFIG, values.overrides)
    folder, out = Path(values.videos), Path(values.out)
    videos = intake.find_videos(folder, values.licence, values.source)
    garments = garment.own_garments(Path(values.garments).resolve()) if values.garments else []
    if config.aesthetics.weights != "none":
        cli.start_jax(values)
    models = pipeline.real_models(config, garments)
    print(f"{len(videos)} videos", file=sys.stderr)
    stages = pipeline.Pipeline(config, folder, out, models)
    make_runner = pipeline.serial
    if values.ray:
        build = pipeline.RealGroups(
            pipeline.to_json(config), folder.resolve(), out.resolve(), garments
        )
        make_runner = functools.partial(ray_runner, values, build)
    result = curate(values, stages, videos, make_runner)
    print(summary_lines(result, out))


def ray_runner(values: cli.Values, build: Any, groups: Any, out: Path, progress: Any) -> Any:
    """The runner on Ray."""
    from chameleon_jax.curation.ray_runner import RayRunner

    print("Ray starts ...", file=sys.stderr)
    return RayRunner(
        groups, out, build, address=values.ray, workers=values.workers, progress=progress
    )


def curate(
    values: cli.Values, pipeline: Pipeline, videos: Sequence[Any], make_runner: Any = None
) -> Result:
    """Run a pipeline with a line of progress."""
    from chameleon_jax.curation.pipeline import run as run_pipeline
    from chameleon_jax.curation.pipeline import serial

    with StageLine() as line:
        return run_pipeline(
            pipeline,
            videos,
            make_runner=make_runner or serial,
            keep=values.keep,
            sample=values.sample,
            split=values.split,
            progress=line,
            written=lambda done, found, total: line("records", done, total),
        )


def run_demo(values: cli.Values) -> None:
    """Render footage, curate it, and compare with the truth; prints a table, writes demo.json."""
    need("numba", "runway")
    from chameleon_jax import files
    from chameleon_jax.config import load_config
    from chameleon_jax.curation import demo, demo_footage, intake, pipeline

    config = load_config(values.config or DEMO, values.overrides)
    out = Path(values.out)
    folder = out / f"footage_{values.demo_videos}x{values.demo_takes}_{values.seed}"
    with StageLine() as line:
        videos = demo_footage.make(
            values.demo_videos,
            values.demo_takes,
            values.seed,
            lambda done, total: line("rendering", done, total),
        )
    demo_footage.write(folder, videos)
    truth = demo.Truth(videos)
    spare = demo.spare_garments(truth, SPARE)
    own = [truth.renderer(span.take).spec.garment for video in videos for span in video.spans]
    book = demo.GarmentBook([*own, *spare])
    models = pipeline.Models(
        detector=demo.ScriptedDetector(truth),
        estimators=[demo.ScriptedPoses(truth)],
        scorers=[demo.ScriptedScorer(truth)],
        vision=demo.ScriptedVision(truth, book),
        editor=demo.ScriptedEditor(truth, book),
        garments=demo.write_garments(out / "garments", book, spare),
    )
    stages = pipeline.Pipeline(config, folder, out, models)
    result = curate(values, stages, intake.find_videos(folder))
    scores = demo_scores(truth, stages, result)
    checks = demo.check_records(
        truth, book, [clip for clip in result.clips if clip.rejection is None], out
    )
    files.write_json(
        out / "demo.json",
        {
            "found": scores,
            "records": checks,
            "spoilt": models.vision.spoilt | models.editor.spoilt,
        },
    )
    print(summary_lines(result, out))
    print(demo_lines(scores, checks))
    print(f"{out / 'demo.json'}")


def demo_scores(truth: Truth, pipeline: Pipeline, result: Result) -> dict[str, Any]:
    """Precision and recall of joints and filters."""
    from chameleon_jax.curation import demo
    from chameleon_jax.curation.shots import CutDetector

    boundaries = {}
    for name, video in truth.videos.items():
        detector = CutDetector(pipeline.config.shots.adaptive, pipeline.config.shots.content)
        for frame in video.frames:
            detector.add(frame, demo.FPS)
        boundaries[name] = detector.boundaries()
    # The broken file is no clip of the footage.
    clips = [clip for clip in result.clips if clip.video in truth.videos]
    names = [stage.name for stage in (*pipeline.groups[0], *pipeline.filters)]
    scores = demo.score_joints(truth, boundaries) | demo.score_filters(truth, clips, names)
    return {name: score.to_json() for name, score in scores.items()}


def demo_lines(scores: dict[str, Any], checks: dict[str, Any]) -> str:
    """The demo's table."""
    lines = ["", f"{'':24}precision   recall   right wrong missed"]
    for name, score in scores.items():
        shares = [
            "       -" if score[kind] is None else f"{score[kind]:8.3f}"
            for kind in ("precision", "recall")
        ]
        counts = f"{score['right']:5d} {score['wrong']:5d} {score['missed']:6d}"
        lines.append(f"{name:24}{shares[0]} {shares[1]}   {counts}")
    lines.append("")
    for name, check in checks.items():
        lines.append(f"kept, {name}: {check['right']} of {check['of']}")
    return "\n".join(lines)


def summary_lines(result: Result, out: Path) -> str:
    """The funnel, and where everything is."""
    summary = result.summary
    lines = [f"{'stage':14}{'reached':>8}{'kept':>8}   refused for"]
    for step in summary["steps"]:
        reasons = ", ".join(f"{reason} {count}" for reason, count in step["reasons"].items())
        lines.append(f"{step['stage']:14}{step['entered']:8d}{step['left']:8d}   {reasons}")
    if summary["chosen"]:
        chosen = ", ".join(f"{name} {value:.4g}" for name, value in summary["chosen"].items())
        lines.append(f"thresholds by --keep: {chosen}")
    if result.records is None:
        lines.append(
            f"{out}: {summary['kept']} clips pass; no records yet, those need"
            " --config.vision.url and --config.editor.url"
        )
    else:
        lines.append(f"{out / 'records'}: {result.records} records")
    lines.append(f"{out / 'report.html'}")
    return "\n".join(lines)


class StageLine:
    """One line on stderr that is written over: what is done, and how much of it."""

    def __init__(self):
        self._last, self._shown = -1.0, False

    def __enter__(self) -> StageLine:
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown:
            print(file=sys.stderr)  # what is said next stands on a line of its own

    def __call__(self, name: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._last < 0.5 and done < total:
            return
        self._last, self._shown = now, True
        print(f"\r{name}: {done}/{total}        ", end="", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None, program: str = "python -m launch.curate") -> None:
    """Read the flags, curate, and end the process."""
    cli.main(program, __doc__, define_flags, run, argv, interrupted=CONTINUES)


if __name__ == "__main__":
    main()

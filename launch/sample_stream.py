"""The task `stream` of `launch.sample`: a person's video in which the garment is changed."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from chameleon_jax import compilation
from chameleon_jax.attention.policies import make_policy
from chameleon_jax.data.images import prepare_garment, prepare_reference
from chameleon_jax.errors import ROOT
from chameleon_jax.inference.mechanisms import SwitchConfig
from chameleon_jax.inference.schedule import (
    ChunkFrames,
    Garment,
    plan_garments,
    plan_stream,
)
from chameleon_jax.inference.session import Session, Switch
from chameleon_jax.inference.settings import check_config
from launch import cli, jobs
from launch.cli import UsageError

EXAMPLES = ROOT / "chameleon_jax" / "assets" / "examples"


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamJob(jobs.Job):
    """Everything that is asked for, checked."""

    reference: np.ndarray  # uint8 [h, w, 3]
    garments: tuple[tuple[Garment, np.ndarray], ...]  # by frame; the first is worn from the start
    prompt: str
    frames: int
    mechanisms: SwitchConfig

    @property
    def size(self) -> tuple[int, int]:
        return self.config.video.height, self.config.video.width


def read_job(values: cli.Values, default_config: str) -> tuple[StreamJob, list[str]]:
    """Check everything that can be checked before weights are loaded.

    Returns:
      The job, and remarks on what it will not do.

    Raises:
      UserError: something cannot be used.
    """
    config, mechanisms = jobs.read_stream(values, default_config)
    frames = config.video.frames if values.frames is None else values.frames
    if frames < 1:
        raise UsageError(f"video.frames {frames}: a video has at least 1 frame")
    common = jobs.check_common(values, config)
    mechanisms = _checked(mechanisms, values)
    person, texts, prompt = _inputs(values, frames)
    garments, remarks = plan_garments(texts, frames)
    checked = check_config(config)
    plan = plan_stream(
        frames,
        [garment.frame for garment in garments[1:]],
        mechanisms,
        ChunkFrames.of(checked),
    )
    make_policy(**checked.cache).check_length(plan.longest - 1)
    if garments[-1].frame > plan.last_start:
        late = garments[-1]
        raise UsageError(
            f"--garment {late.path}@{late.frame}: the last chunk of {frames} frames starts at"
            f" frame {plan.last_start}, so it would not be seen; ask for it earlier, or for more"
            " --frames"
        )
    size = (config.video.height, config.video.width)
    job = StreamJob(
        **common,
        out=jobs.check_out(values.out, frames, size),
        reference=prepare_reference(person, size),
        garments=tuple((garment, prepare_garment(garment.path, size)) for garment in garments),
        prompt=prompt,
        frames=frames,
        mechanisms=mechanisms,
    )
    return job, remarks


def _checked(mechanisms: SwitchConfig, values: cli.Values) -> SwitchConfig:
    """What a switch does in a video that is made to be looked at."""
    if not mechanisms.refresh:
        raise UsageError(
            "--switch without refresh: the new garment would never be seen; add refresh"
        )
    if values.drop_repeated_frame is not None:
        mechanisms = dataclasses.replace(mechanisms, drop_repeated_frame=values.drop_repeated_frame)
    return mechanisms


def _inputs(values: cli.Values, frames: int) -> tuple[str, list[str], str]:
    """Reference, garments and prompt as given, or the examples."""
    if values.reference is None and not values.garment:
        person, garments, prompt = examples()
        garments = [text for text in garments if Garment.parse(text).frame < frames]
        return person, garments, prompt if values.prompt is None else values.prompt
    if values.reference is None or not values.garment:
        raise UsageError(
            "--reference and --garment belong together: give both, or neither to run on the"
            " examples"
        )
    return values.reference, values.garment, values.prompt or ""


def examples() -> tuple[str, list[str], str]:
    """Reference, garments and prompt that ship with the project."""
    if not (EXAMPLES / "person.png").is_file():
        raise UsageError(
            f"{EXAMPLES}: the example pictures are missing; give --reference and --garment"
        )
    garments = [
        str(EXAMPLES / "first.png"),
        f"{EXAMPLES / 'second.png'}@24",
        f"{EXAMPLES / 'third.png'}@48",
    ]
    prompt = (EXAMPLES / "prompt.txt").read_text(encoding="utf-8").strip()
    return str(EXAMPLES / "person.png"), garments, prompt


def chunks(
    job: StreamJob, session: Session, switches: list[tuple[Garment, Switch]]
) -> Iterator[np.ndarray]:
    """The frames of the video, chunk after chunk; what is asked for is appended to `switches`."""
    (_, worn), *waiting = job.garments
    session.start(job.reference, worn, job.prompt, job.seed)
    made = 0
    while made < job.frames:
        while waiting and waiting[0][0].frame <= session.frames:
            garment, picture = waiting.pop(0)
            switches.append((garment, session.switch_garment(picture)))
        frames = session.next_chunk()[: job.frames - made]
        made += len(frames)
        yield frames


def stream(job: StreamJob, session: Session) -> tuple[jobs.Made, dict[str, Any]]:
    """Make the video and its contact sheet.

    Returns:
      What was made, and what is to be said about it in the JSON file.
    """
    switches: list[tuple[Garment, Switch]] = []
    asked = ", ".join(str(garment.frame) for garment, _ in job.garments)
    made = jobs.write_video(
        job,
        job.size,
        job.frames,
        chunks(job, session, switches),
        [job.reference, *(picture for _, picture in job.garments)],
        f"person, garments asked for at {asked}",
    )
    denoised = sum(timing.denoise for timing in session.timings)
    report = {
        "size": list(job.size),
        "prompt": job.prompt,
        "garments": [dataclasses.asdict(garment) for garment, _ in job.garments],
        "mechanisms": dataclasses.asdict(job.mechanisms),
        "switches": [
            {
                "path": garment.path,
                "asked": garment.frame,
                "effective": switch.effective,
                "superseded": switch.superseded,
            }
            for garment, switch in switches
        ],
        "seconds": {"stream": round(made.seconds, 3), "first_frame": round(made.first, 3)},
        "denoise_fps": round(sum(timing.frames for timing in session.timings) / denoised, 2),
        "delivered_fps": round(made.frames / made.seconds, 2),
    }
    return made, report


def run(values: cli.Values, default_config: str) -> int:
    """The task. Returns the command's exit code.

    Raises:
      UserError: an input cannot be used.
    """
    job, remarks = read_job(values, default_config)
    for remark in remarks:
        print(f"note: {remark}", file=sys.stderr)
    begin = time.perf_counter()
    pipeline = jobs.load_pipeline(job)
    loaded = time.perf_counter()
    with compilation.announced("the programs of the stream"):
        pipeline.compile()
    compiled = time.perf_counter()
    made, report = stream(job, pipeline.session(job.mechanisms, measure=True))
    report["seconds"] |= {"load": round(loaded - begin, 3), "compile": round(compiled - loaded, 3)}
    jobs.save_report(job, made, report, pipeline)
    print(
        f"{job.out}: {made.frames} frames, {report['delivered_fps']} frames/s (denoising alone"
        f" {report['denoise_fps']}), {report['seconds']['stream']} s"
    )
    for switch in report["switches"]:
        worn = f"worn from frame {switch['effective']}"
        if switch["superseded"]:
            worn = "replaced before it was worn"
        print(f"  {switch['path']}: asked for at frame {switch['asked']}, {worn}")
    return jobs.exit_code(job, made)


if __name__ == "__main__":
    cli.library_module(
        "sample_stream", "python -m launch.sample --reference FILE --garment FILE --out FILE"
    )

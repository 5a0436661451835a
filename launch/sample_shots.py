"""The task `shots` of `launch.sample`: a video of several shots, each with a prompt of its own."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from chameleon_jax import compilation
from chameleon_jax.attention.policies import make_policy
from chameleon_jax.data.images import stretched
from chameleon_jax.inference.schedule import ChunkFrames
from chameleon_jax.inference.settings import check_config
from chameleon_jax.inference.shots import MultiShot, Shot, check_shots
from chameleon_jax.parsing import is_whole_number
from launch import cli, jobs
from launch.cli import UsageError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShotsJob(jobs.Job):
    """Everything that is asked for, checked."""

    shots: tuple[Shot, ...]
    image: str | None  # path
    picture: np.ndarray | None  # what it shows, uint8 [h, w, 3], stretched to the video
    frames: int  # of the whole video

    @property
    def size(self) -> tuple[int, int]:
        return self.config.video.height, self.config.video.width


def is_for_shots(config: ConfigDict) -> bool:
    """Whether a config describes a stream without condition frames."""
    return config.get("cache", {}).get("context") == 0


def parse_shot(text: str) -> Shot:
    """`PROMPT@CHUNKS`; without a number behind the last @ it is one chunk."""
    head, at, tail = text.rpartition("@")
    if not at or not is_whole_number(tail):
        return Shot(text, 1)
    if int(tail) < 1:
        raise UsageError(f"--shot {text}: {tail} chunks; expected at least 1")
    return Shot(head, int(tail))


def read_job(values: cli.Values, default_config: str) -> ShotsJob:
    """Check everything that can be checked before weights are loaded.

    Raises:
      UserError: something cannot be used.
    """
    config = jobs.read_chunked(values, default_config, is_for_shots)
    if not values.shot:
        raise UsageError("--task shots needs --shot 'PROMPT@CHUNKS', once for each shot")
    common = jobs.check_common(values, config)
    checked, asked = check_config(config), tuple(parse_shot(text) for text in values.shot)
    check_shots(asked, make_policy(**checked.cache))
    size = (checked.video.height, checked.video.width)
    frames = ChunkFrames.of(checked).total(sum(shot.chunks for shot in asked))
    return ShotsJob(
        **common,
        out=jobs.check_out(values.out, frames, size),
        shots=asked,
        image=values.image,
        picture=None if values.image is None else stretched(values.image, size),
        frames=frames,
    )


def make(job: ShotsJob, streams: MultiShot) -> tuple[jobs.Made, dict[str, Any]]:
    """Make the video and its contact sheet.

    Returns:
      What was made, and what is to be said about it in the JSON file.
    """
    made = jobs.write_video(
        job,
        job.size,
        job.frames,
        streams.stream(job.shots, image=job.picture, seed=job.seed),
        [] if job.picture is None else [job.picture],
        "the first frame asked for",
    )
    report = {
        "task": "shots",
        "size": list(job.size),
        "shots": [{"prompt": shot.prompt, "chunks": shot.chunks} for shot in job.shots],
        "image": job.image,
        "seconds": {"stream": round(made.seconds, 3), "first_frames": round(made.first, 3)},
        "delivered_fps": round(made.frames / made.seconds, 2),
    }
    return made, report


def run(values: cli.Values, default_config: str) -> int:
    """The task. Returns the command's exit code.

    Raises:
      UserError: an input cannot be used.
    """
    job = read_job(values, default_config)
    begin = time.perf_counter()
    pipeline = jobs.load_pipeline(job)
    streams, loaded = MultiShot(pipeline), time.perf_counter()
    with compilation.announced("the programs of the stream"):
        pipeline.compile()
    compiled = time.perf_counter()
    made, report = make(job, streams)
    report["seconds"] |= {"load": round(loaded - begin, 3), "compile": round(compiled - loaded, 3)}
    jobs.save_report(job, made, report, pipeline)
    print(
        f"{job.out}: {made.frames} frames in {len(job.shots)} shots, {report['delivered_fps']}"
        " frames/s"
    )
    return jobs.exit_code(job, made)


if __name__ == "__main__":
    cli.library_module("sample_shots", "python -m launch.sample --task shots --shot PROMPT@CHUNKS")

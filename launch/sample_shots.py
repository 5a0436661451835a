"""The task `shots` of `launch.sample`: a video of several shots, chunk after chunk, each told its
own prompt.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from tqdm import tqdm

from chameleon_jax.attention.policies import make_policy
from chameleon_jax.data.images import stretched
from chameleon_jax.inference.settings import check_config
from chameleon_jax.inference.shots import MultiShot, Shot, check_shots
from chameleon_jax.models.vae import VaeConfig
from launch import cli, jobs
from launch.cli import UsageError

CONFIG = "configs/longlive2_5b.py"


@dataclasses.dataclass(frozen=True)
class ShotsJob:
    """Everything that is asked for, checked."""

    config: Any
    weights: str
    shots: tuple[Shot, ...]
    image: str | None  # path
    picture: np.ndarray | None  # what it shows, uint8 [h, w, 3], stretched to the video
    seed: int
    out: Path
    loras: tuple[tuple[Path, float], ...] = ()

    @property
    def frames(self) -> int:
        """Of the whole video: a chunk has `block` latent frames, the first of which is one pixel
        frame.
        """
        latents = self.config.cache.block * sum(shot.chunks for shot in self.shots)
        return VaeConfig(**self.config.model.vae).temporal_factor * (latents - 1) + 1


def parse_shot(text: str) -> Shot:
    """`PROMPT@CHUNKS`; without a number behind the last @ it is one chunk."""
    head, at, tail = text.rpartition("@")
    if not at or not tail.isdigit():
        return Shot(text, 1)
    if int(tail) < 1:
        raise UsageError(f"--shot {text}: {tail} chunks; expected at least 1")
    return Shot(head, int(tail))


def read_job(values: flags.FlagValues, overrides: Sequence[str]) -> ShotsJob:
    """Check everything that can be checked before weights are loaded.

    Raises:
      UsageError, ConfigError, ImageError, PipelineError, MultiShotError, PositionError: something
        cannot be used.
    """
    config = cli.read_config(values.config if values["config"].present else CONFIG, overrides)
    config = config.copy_and_resolve_references()
    if values.steps is not None:
        config.sampler.steps = values.steps
    if not values.shot:
        raise UsageError("--task shots needs --shot 'PROMPT@CHUNKS', once for each shot")
    checked, asked = check_config(config), tuple(parse_shot(text) for text in values.shot)
    check_shots(asked, make_policy(**checked.cache))
    picture = None
    if values.image is not None:
        picture = stretched(values.image, (checked.video.height, checked.video.width))
    return ShotsJob(
        config,
        jobs.check_weights(values.weights or config.weights, config),
        asked,
        values.image,
        picture,
        jobs.check_seed(config.seed if values.seed is None else values.seed),
        jobs.check_out(Path(values.out)),
        jobs.check_loras(values.lora),
    )


def make(job: ShotsJob, streams: MultiShot) -> dict[str, Any]:
    """Make the video and its contact sheet. Returns what is to be said about it in the JSON file."""
    from chameleon_jax.data.video import VideoWriter

    begin, first = time.perf_counter(), None
    chunks = streams.stream(job.shots, image=job.picture, seed=job.seed)
    sheet = jobs.Sheet(job.frames)
    job.out.parent.mkdir(parents=True, exist_ok=True)
    bar = tqdm(
        total=job.frames, unit=" frames", file=sys.stderr, dynamic_ncols=True, desc=job.out.name
    )
    size = streams.pipeline.size
    with (
        jobs.Interrupt() as interrupt,
        VideoWriter(job.out, job.config.video.fps, size) as writer,
        bar,
    ):
        for frames in chunks:
            first = first or time.perf_counter() - begin
            sheet.add(frames)
            writer.write(frames)
            bar.update(len(frames))
            if interrupt.requested:
                break
    seconds, made = time.perf_counter() - begin, writer.frames
    sheet.save(
        job.out.with_suffix(".png"),
        () if job.picture is None else [job.picture],
        "the first frame asked for",
    )
    return {
        "task": "shots",
        "interrupted": made < job.frames,
        "frames": made,
        "frames_asked": job.frames,
        "size": list(size),
        "fps": job.config.video.fps,
        "seed": job.seed,
        "shots": [{"prompt": shot.prompt, "chunks": shot.chunks} for shot in job.shots],
        "image": job.image,
        "seconds": {"stream": round(seconds, 3), "first_frames": round(first, 3)},
        "delivered_fps": round(made / seconds, 2),
    }


def run(values: flags.FlagValues, overrides: Sequence[str]) -> int:
    """The task. Returns the command's exit code.

    Raises:
      UsageError, ConfigError, ImageError, PipelineError, MultiShotError, PositionError, ...: an
      input cannot be used.
    """
    import chameleon_jax.data.video  # noqa: F401  -- so that a missing PyAV is noticed before the work, not after it

    job = read_job(values, overrides)
    begin = time.perf_counter()
    pipeline = jobs.load_pipeline(job.weights, job.config, job.seed, job.loras)
    streams, loaded = MultiShot(pipeline), time.perf_counter()
    print(f"compiling for {jax.devices()[0].device_kind} ...", file=sys.stderr)
    pipeline.compile()
    compiled = time.perf_counter()
    report = make(job, streams)
    report["seconds"] |= {"load": round(loaded - begin, 3), "compile": round(compiled - loaded, 3)}
    jobs.save_report(job.out.with_suffix(".json"), report, job, pipeline)
    print(
        f"{job.out}: {report['frames']} frames in {len(job.shots)} shots, {report['delivered_fps']}"
        " frames/s"
    )
    return jobs.exit_code(report, job.out)

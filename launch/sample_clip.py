"""The tasks `t2v` and `i2v` of `launch.sample`: a whole clip from a prompt, or from a prompt and
its first frame.
"""

from __future__ import annotations

import dataclasses
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from tqdm import tqdm

from chameleon_jax.data.images import first_frame, open_image
from chameleon_jax.inference.clip import (
    GenerateConfig,
    Generator,
    best_size,
    latent_shape,
    size_units,
)
from chameleon_jax.inference.settings import check_config
from launch import cli, jobs
from launch.cli import UsageError

CONFIG = "configs/wan22_ti2v.py"
SETTINGS = (
    "negative_prompt",
    "steps",
    "guidance",
    "shift",
    "grid",
)  # flags that are keys of the group `generate`


@dataclasses.dataclass(frozen=True)
class ClipJob:
    """Everything that is asked for, checked. Size, length and settings are those of the config."""

    task: str
    config: Any
    weights: str
    prompt: str
    image: str | None  # path
    picture: np.ndarray | None  # what it shows, uint8 [h, w, 3], fitted to the clip
    seed: int
    out: Path
    loras: tuple[tuple[Path, float], ...] = ()

    @property
    def size(self) -> tuple[int, int]:
        return self.config.video.height, self.config.video.width


def read_job(values: flags.FlagValues, overrides: Sequence[str]) -> tuple[ClipJob, list[str]]:
    """Check everything that can be checked before weights are loaded.

    Returns:
      The job, and remarks on what it will not do.

    Raises:
      UsageError, ConfigError, ImageError, PipelineError, GenerateError: something cannot be used.
    """
    task = values.task
    config = cli.read_config(values.config if values["config"].present else CONFIG, overrides)
    config = config.copy_and_resolve_references()
    given = {name: getattr(values, name) for name in SETTINGS if getattr(values, name) is not None}
    settings = dataclasses.replace(GenerateConfig.read(config), **given)
    config.generate.update(given)
    if values.prompt is None:
        raise UsageError(
            f"--task {task} needs --prompt, what happens in the clip; it may be empty: --prompt="
        )
    if task == "i2v" and values.image is None:
        raise UsageError("--task i2v needs --image, the first frame")
    weights = jobs.check_weights(values.weights or config.weights, config)
    seed = jobs.check_seed(config.seed if values.seed is None else values.seed)
    check_config(config)

    source = None if values.image is None else open_image(values.image)
    size = (config.video.height, config.video.width)
    if values.size is not None:
        size = parse_size(values.size)
    elif source is not None:
        size = best_size((source.height, source.width), size[0] * size[1], size_units(config))
    frames = config.video.frames if values.frames is None else values.frames
    latent_shape(config, size, frames, image=source is not None)
    config.video.height, config.video.width = size
    config.video.frames = frames
    picture = None if source is None else first_frame(source, size)
    remarks = []
    if settings.guidance == 1 and values.negative_prompt is not None:
        remarks.append("--negative_prompt is not used: with guidance 1 only the prompt counts")
    out = jobs.check_out(Path(values.out))
    loras = jobs.check_loras(values.lora)
    return ClipJob(
        task, config, weights, values.prompt, values.image, picture, seed, out, loras
    ), remarks


def parse_size(text: str) -> tuple[int, int]:
    """`HEIGHTxWIDTH` as (height, width)."""
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match:
        raise UsageError(f"--size {text}: expected HEIGHTxWIDTH in pixels, as 704x1280")
    return int(match[1]), int(match[2])


def make(job: ClipJob, generator: Generator) -> dict[str, Any]:
    """Make the video and its contact sheet. Returns what is to be said about it in the JSON file.

    Until the last step of denoising is done nothing is written. From then on Ctrl-C keeps the
    frames made so far.
    """
    from chameleon_jax.data.video import VideoWriter

    settings, video = generator.settings, job.config.video
    times = [time.perf_counter()]
    with tqdm(
        total=settings.steps, unit=" steps", file=sys.stderr, dynamic_ncols=True, desc="denoising"
    ) as bar:

        def on_step(done: int, steps: int) -> None:
            times.append(time.perf_counter())
            bar.update(1) if done else bar.reset(
                steps
            )  # the clock of the bar starts when denoising does

        latents = generator.generate(
            job.prompt,
            image=job.picture,
            size=job.size,
            frames=video.frames,
            seed=job.seed,
            on_step=on_step,
        )
    (begin, encoded, first), denoised = times[:3], times[-1]
    sheet = jobs.Sheet(video.frames)
    job.out.parent.mkdir(parents=True, exist_ok=True)
    bar = tqdm(
        total=video.frames, unit=" frames", file=sys.stderr, dynamic_ncols=True, desc=job.out.name
    )
    with jobs.Interrupt() as interrupt, VideoWriter(job.out, video.fps, job.size) as writer, bar:
        for frames in generator.decode(latents):
            sheet.add(frames)
            writer.write(frames)
            bar.update(len(frames))
            if interrupt.requested:
                break
    made, end = writer.frames, time.perf_counter()
    sheet.save(
        job.out.with_suffix(".png"),
        () if job.picture is None else [job.picture],
        "the first frame asked for",
    )
    seconds = {
        "encode": encoded - begin,  # prompts and image, compilation included
        "first_step": first - encoded,  # compilation included
        "denoise": denoised - encoded,
        "decode": end - denoised,
        "total": end - begin,
    }
    return {
        "task": job.task,
        "interrupted": made < video.frames,
        "frames": made,
        "frames_asked": video.frames,
        "size": list(job.size),
        "fps": video.fps,
        "seed": job.seed,
        "prompt": job.prompt,
        "negative_prompt": None if settings.guidance == 1 else settings.negative_prompt,
        "image": job.image,
        **{name: getattr(settings, name) for name in ("grid", "steps", "shift", "guidance")},
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
    }


def run(values: flags.FlagValues, overrides: Sequence[str]) -> int:
    """The tasks. Returns the command's exit code.

    Raises:
      UsageError, ConfigError, ImageError, PipelineError, GenerateError, ...: an input cannot be
      used.
    """
    import chameleon_jax.data.video  # noqa: F401  -- so that a missing PyAV is noticed before the work, not after it

    job, remarks = read_job(values, overrides)
    for remark in remarks:
        print(f"note: {remark}", file=sys.stderr)
    begin = time.perf_counter()
    pipeline = jobs.load_pipeline(job.weights, job.config, job.seed, job.loras)
    loaded = time.perf_counter() - begin
    generator = Generator(pipeline)
    print(
        f"{job.config.name} on {jax.devices()[0].device_kind}; the first step compiles ...",
        file=sys.stderr,
    )
    report = make(job, generator)
    report["seconds"] = {"load": round(loaded, 3), **report["seconds"]}
    jobs.save_report(job.out.with_suffix(".json"), report, job, pipeline)
    seconds, (height, width) = report["seconds"], job.size
    print(
        f"{job.out}: {report['frames']} frames of {height}x{width}, {report['steps']} steps in"
        f" {seconds['denoise']} s, decoding in {seconds['decode']} s"
    )
    return jobs.exit_code(report, job.out)

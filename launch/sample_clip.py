"""The tasks `t2v` and `i2v` of `launch.sample`: a whole clip from a prompt, possibly with its
first frame.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from chameleon_jax import compilation, machine
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

# Flags that are keys of the config's group `generate`.
SETTINGS = ("negative_prompt", "steps", "guidance", "shift", "grid")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipJob(jobs.Job):
    """Everything that is asked for, checked. Size, length and settings are those of the config."""

    task: str
    prompt: str
    image: str | None  # path
    picture: np.ndarray | None  # what it shows, uint8 [h, w, 3], fitted to the clip

    @property
    def size(self) -> tuple[int, int]:
        return self.config.video.height, self.config.video.width


def is_for_clips(config: ConfigDict) -> bool:
    """Whether a config says how whole clips are denoised."""
    return "generate" in config


def read_job(values: cli.Values, default_config: str) -> tuple[ClipJob, list[str]]:
    """Check everything that can be checked before weights are loaded.

    Returns:
      The job, and remarks on what it will not do.

    Raises:
      UserError: something cannot be used.
    """
    task = values.task
    config = jobs.read_config(values, default_config, is_for_clips)
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
    common = jobs.check_common(values, config)
    check_config(config)

    source = None if values.image is None else open_image(values.image)
    size = (config.video.height, config.video.width)
    if values.size is not None:
        size = values.size
    elif source is not None:
        size = best_size((source.height, source.width), size[0] * size[1], size_units(config))
    frames = config.video.frames if values.frames is None else values.frames
    latent_shape(config, size, frames, image=source is not None)
    config.video.height, config.video.width = size
    config.video.frames = frames
    remarks = []
    if settings.guidance == 1 and values.negative_prompt is not None:
        remarks.append("--negative_prompt is not used: with guidance 1 only the prompt counts")
    job = ClipJob(
        **common,
        out=jobs.check_out(values.out, frames, size),
        task=task,
        prompt=values.prompt,
        image=values.image,
        picture=None if source is None else first_frame(source, size),
    )
    return job, remarks


def denoise(job: ClipJob, generator: Generator) -> tuple[jax.Array, dict[str, float]]:
    """The latents of the clip, with a bar on stderr, and the seconds of encoding and denoising.

    The first step compiles, which a line says.
    """
    times = [time.perf_counter()]
    steps = generator.settings.steps
    bar = tqdm(total=steps, unit=" steps", file=sys.stderr, dynamic_ncols=True, desc="denoising")
    with compilation.watched() as seen, bar:

        def on_step(done: int, steps: int) -> None:
            times.append(time.perf_counter())
            if not done:
                bar.reset(steps)  # the clock of the bar starts when denoising does
                return
            bar.update(1)
            if done == 1:
                about = compilation.summary(seen, times[-1] - times[0])
                bar.write(f"  first step done: {about}", file=sys.stderr)

        latents = generator.generate(
            job.prompt,
            image=job.picture,
            size=job.size,
            frames=job.config.video.frames,
            seed=job.seed,
            on_step=on_step,
        )
    begin, encoded, first = times[:3]
    return latents, {
        "encode": encoded - begin,  # prompts and image, compilation included
        "first_step": first - encoded,  # compilation included
        "denoise": times[-1] - encoded,
    }


def make(job: ClipJob, generator: Generator) -> tuple[jobs.Made, dict[str, Any]]:
    """Make the video and its contact sheet.

    Until the last step of denoising is done nothing is written. From then on Ctrl-C keeps the
    frames made so far.

    Returns:
      What was made, and what is to be said about it in the JSON file.
    """
    begin = time.perf_counter()
    latents, seconds = denoise(job, generator)
    pictures = [] if job.picture is None else [job.picture]
    made = jobs.write_video(
        job,
        job.size,
        job.config.video.frames,
        generator.decode(latents),
        pictures,
        "the first frame asked for",
    )
    seconds |= {"decode": made.seconds, "total": time.perf_counter() - begin}
    settings = generator.settings
    negative = None if settings.guidance == 1 else settings.negative_prompt
    report = {
        "task": job.task,
        "size": list(job.size),
        "prompt": job.prompt,
        "negative_prompt": negative,
        "image": job.image,
        "grid": settings.grid,
        "steps": settings.steps,
        "shift": settings.shift,
        "guidance": settings.guidance,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
    }
    return made, report


def run(values: cli.Values, default_config: str) -> int:
    """The tasks. Returns the command's exit code.

    Raises:
      UserError: an input cannot be used.
    """
    job, remarks = read_job(values, default_config)
    for remark in remarks:
        print(f"note: {remark}", file=sys.stderr)
    begin = time.perf_counter()
    pipeline = jobs.load_pipeline(job)
    loaded = time.perf_counter() - begin
    generator = Generator(pipeline)
    device = machine.device().device_kind
    print(f"{job.config.name} on {device}: the first step compiles ...", file=sys.stderr)
    made, report = make(job, generator)
    report["seconds"] = {"load": round(loaded, 3), **report["seconds"]}
    jobs.save_report(job, made, report, pipeline)
    seconds, (height, width) = report["seconds"], job.size
    print(
        f"{job.out}: {made.frames} frames of {height}x{width}, {report['steps']} steps in"
        f" {seconds['denoise']} s, decoding in {seconds['decode']} s"
    )
    return jobs.exit_code(job, made)


if __name__ == "__main__":
    cli.library_module(
        "sample_clip", "python -m launch.sample --task t2v --prompt TEXT --weights DIR"
    )

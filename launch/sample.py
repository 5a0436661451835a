"""Stream a video to a file, changing garments on the way; or make a clip from prompts.

    python -m launch.sample --reference person.png --garment first.png --garment second.png@24 \\
        --garment third.png@48 --prompt "a person walks" --frames 81 --seed 0 --out out.mp4

`path@frame` asks for a garment from that frame on; it takes effect at the first chunk that starts
there or later. Beside the video lie `out.json` (what was asked for, what happened, how fast) and
`out.png` (a contact sheet). Without pictures it runs on the examples that ship with the project.
Ctrl-C keeps what was made so far, as a video that plays.

Plain Wan2.2, bidirectional, from public weights; by default with configs/wan22_ti2v.py:

    python -m launch.sample --task t2v --weights DIR --prompt "A cat surfs." --size 704x1280 --frames 121 --out out.mp4
    python -m launch.sample --task i2v --weights DIR --image first.png --prompt "It waves." --out out.mp4

Ctrl-C before the last denoising step leaves nothing; after it, the frames decoded so far.

Several shots in a row with LongLive-2.0-5B, each so many chunks long (1.3 s); by default with
configs/longlive2_5b.py:

    python -m launch.sample --task shots --weights DIR --shot "A cat wakes up.@6" --shot "It walks out into the snow.@10" \\
        --out out.mp4

Exit codes: 0 done, 2 an input cannot be used (nothing is written), 130 interrupted.
"""

from __future__ import annotations

import dataclasses
import os
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
from chameleon_jax.attention.positions import PositionError
from chameleon_jax.config import ConfigError
from chameleon_jax.data.images import ImageError, prepare_garment, prepare_reference
from chameleon_jax.diffusion.flow import ROWS
from chameleon_jax.diffusion.unipc import GRIDS
from chameleon_jax.inference.pretrained import PipelineError
from chameleon_jax.inference.session import Mechanisms, Session
from chameleon_jax.inference.settings import check_config
from launch import cli, jobs, sample_clip, sample_shots
from launch.cli import UsageError

EXAMPLES = Path(__file__).resolve().parents[1] / "chameleon_jax" / "assets" / "examples"
TASKS = ("stream", "t2v", "i2v", "shots")
# Flags that not every task has; the others have the same meaning for all of them.
BELONGS_TO = {
    **dict.fromkeys(("reference", "garment", "switch", "drop_repeated_frame"), ("stream",)),
    **dict.fromkeys(("negative_prompt", "size", "guidance", "shift", "grid"), ("t2v", "i2v")),
    **dict.fromkeys(("prompt", "frames"), ("stream", "t2v", "i2v")),
    "image": ("i2v", "shots"),
    "shot": ("shots",),
}


def define_flags() -> flags.FlagValues:
    """The flags of this command, apart from those of any other."""
    values = flags.FlagValues()
    cli.define(values, "configs/runway_tiny.py")
    kw = {"flag_values": values}
    flags.DEFINE_enum(
        "task",
        "stream",
        TASKS,
        "stream; plain Wan2.2: t2v (text), i2v (and first frame); LongLive: shots",
        **kw,
    )
    flags.DEFINE_string(
        "reference", None, "picture of the person (PNG, JPEG or WebP, any size)", **kw
    )
    flags.DEFINE_multi_string(
        "garment", [], "picture of a garment, or picture@frame; may be repeated", **kw
    )
    flags.DEFINE_string("prompt", None, "what happens, in any language; may be empty", **kw)
    flags.DEFINE_integer(
        "frames", None, "length of the video; default video.frames of the config", **kw
    )
    flags.DEFINE_integer("seed", None, "default that of the config", **kw)
    flags.DEFINE_string("out", "out/sample.mp4", "video to write", **kw)
    flags.DEFINE_string(
        "switch",
        None,
        "full, or some of refresh,withdraw,disentangle; default as in the config",
        **kw,
    )
    flags.DEFINE_bool(
        "drop_repeated_frame",
        None,
        "leave out the frame that repeats the pose after a full switch",
        **kw,
    )
    flags.DEFINE_string(
        "weights", None, "folder of weights, or random; default that of the config", **kw
    )
    flags.DEFINE_multi_string(
        "lora", [], "LoRA to merge, or file@strength, in any naming; may be repeated", **kw
    )
    flags.DEFINE_integer("steps", None, "denoising steps; default that of the config", **kw)
    flags.DEFINE_string(
        "image", None, "i2v, shots: picture of the first frame (PNG, JPEG or WebP, any size)", **kw
    )
    flags.DEFINE_multi_string("shot", [], "shots: PROMPT@CHUNKS; once for each shot", **kw)
    flags.DEFINE_string(
        "negative_prompt",
        None,
        "t2v, i2v: what to keep away from; default that of the config",
        **kw,
    )
    flags.DEFINE_string(
        "size",
        None,
        "t2v, i2v: HEIGHTxWIDTH; default that of the config, for i2v the same area in the image's"
        " shape",
        **kw,
    )
    flags.DEFINE_float(
        "guidance",
        None,
        "t2v, i2v: 1 is the prompt alone, in half the time; default as the config",
        **kw,
    )
    flags.DEFINE_float(
        "shift", None, "t2v, i2v: more of the steps at high noise; default that of the config", **kw
    )
    flags.DEFINE_enum(
        "grid",
        None,
        list(GRIDS),
        "t2v, i2v: sigmas of the original or of diffusers; default as the config",
        **kw,
    )
    return values


def check_flags(values: flags.FlagValues) -> None:
    """Every flag that was given belongs to the task."""
    for name, tasks in BELONGS_TO.items():
        if values[name].present and values.task not in tasks:
            raise UsageError(
                f"--{name} is for --task {' or '.join(tasks)}, not for --task {values.task}"
            )


@dataclasses.dataclass(frozen=True)
class Garment:
    """A garment and the frame from which it is asked for."""

    path: str
    frame: int

    @classmethod
    def parse(cls, text: str) -> Garment:
        """`path` (frame 0) or `path@frame`. An existing file whose name looks like that is taken as
        a file.
        """
        head, at, tail = text.rpartition("@")
        number = tail.removeprefix("-").isdigit()
        if not at or not number or (Path(text).is_file() and not Path(head).is_file()):
            return cls(text, 0)
        return cls(head, int(tail))


@dataclasses.dataclass(frozen=True)
class Job:
    """Everything that is asked for, checked."""

    config: Any
    weights: str
    reference: np.ndarray  # uint8 [h, w, 3]
    garments: tuple[tuple[Garment, np.ndarray], ...]  # by frame; the first is worn from the start
    prompt: str
    frames: int
    seed: int
    mechanisms: Mechanisms
    out: Path
    loras: tuple[tuple[Path, float], ...] = ()


def plan_garments(texts: Sequence[str], frames: int) -> tuple[list[Garment], list[str]]:
    """Garments in the order of their frames, one a frame, and a remark for each that was left out.

    Raises:
      UsageError: no garment for the start, two of them, or a frame that does not exist.
    """
    garments = [Garment.parse(text) for text in texts]
    for text, garment in zip(texts, garments, strict=True):
        if not 0 <= garment.frame < frames:
            raise UsageError(
                f"--garment {text}: there is no frame {garment.frame}; the video has frames 0 to"
                f" {frames - 1}"
            )
    bare = [text for text, garment in zip(texts, garments, strict=True) if garment.path == text]
    if len(bare) > 1:
        raise UsageError(
            f"--garment {bare[1]}: {bare[0]} is worn from the start already; say from when, as"
            f" {bare[1]}@24"
        )
    by_frame: dict[int, Garment] = {}
    remarks = []
    for garment in garments:
        if garment.frame in by_frame:
            remarks.append(
                f"two garments at frame {garment.frame}: {garment.path} replaces"
                f" {by_frame[garment.frame].path}"
            )
        by_frame[garment.frame] = garment
    if 0 not in by_frame:
        raise UsageError("no garment to start with; give one --garment without @frame")
    return [by_frame[frame] for frame in sorted(by_frame)], remarks


def chunk_starts(
    frames: int, asked: Sequence[int], mechanisms: Mechanisms, block: int
) -> tuple[list[int], int]:
    """First frames of the chunks of a video, given where switches are asked for, and the most
    chunks in one clip.

    A chunk is 4 frames a latent frame; the first latent frame of a clip gives one, which a full
    switch can leave out.
    """
    starts, waiting, start, held, longest = [], sorted(asked), 0, 0, 0
    while start < frames:
        repeats = False
        if waiting and waiting[0] <= start:
            waiting = [frame for frame in waiting if frame > start]
            if mechanisms.withdraw:
                held, repeats = (
                    0,
                    mechanisms.refresh
                    and mechanisms.disentangle
                    and mechanisms.drop_repeated_frame,
                )
        starts.append(start)
        start += 4 * block - 3 * (held == 0) - repeats
        held += 1
        longest = max(longest, held)
    return starts, longest


def read_job(values: flags.FlagValues, overrides: Sequence[str]) -> tuple[Job, list[str]]:
    """Check everything that can be checked before weights are loaded.

    Raises:
      UsageError, ConfigError, ImageError, PipelineError, PositionError: something cannot be used.
    """
    config = cli.read_config(values.config, overrides)
    if values.steps is not None:
        config = with_steps(config, values.steps)
    frames = config.video.frames if values.frames is None else values.frames
    if frames < 1:
        raise UsageError(f"--frames {frames}: a video has at least 1 frame")
    seed = jobs.check_seed(config.seed if values.seed is None else values.seed)
    weights = jobs.check_weights(values.weights or config.weights, config)
    try:
        mechanisms = Mechanisms(**config.switch)
        if values.switch is not None:
            mechanisms = Mechanisms.parse(
                values.switch, drop_repeated_frame=config.switch.drop_repeated_frame
            )
    except (TypeError, ValueError) as error:
        raise UsageError(f"--switch: {error}") from None
    if not mechanisms.refresh:
        raise UsageError(
            "--switch without refresh: the new garment would never be seen; add refresh"
        )
    if values.drop_repeated_frame is not None:
        mechanisms = dataclasses.replace(mechanisms, drop_repeated_frame=values.drop_repeated_frame)

    reference, texts, prompt = values.reference, values.garment, values.prompt
    if reference is None and not texts:
        reference, texts, example_prompt = examples()
        texts = [text for text in texts if Garment.parse(text).frame < frames]
        prompt = example_prompt if prompt is None else prompt
    elif reference is None or not texts:
        raise UsageError(
            "--reference and --garment belong together: give both, or neither to run on the"
            " examples"
        )
    garments, remarks = plan_garments(texts, frames)
    cache = check_config(config).cache
    starts, longest = chunk_starts(frames, [g.frame for g in garments[1:]], mechanisms, cache.block)
    make_policy(**cache).check_length(longest - 1)
    late = [garment for garment in garments if garment.frame > starts[-1]]
    if late:
        raise UsageError(
            f"--garment {late[0].path}@{late[0].frame}: the last chunk of {frames} frames starts at"
            f" frame {starts[-1]},"
            " so it would not be seen; ask for it earlier, or for more --frames"
        )
    out = jobs.check_out(Path(values.out))
    size = (config.video.height, config.video.width)
    pictures = tuple((garment, prepare_garment(garment.path, size)) for garment in garments)
    person, loras = prepare_reference(reference, size), jobs.check_loras(values.lora)
    return Job(
        config, weights, person, pictures, prompt or "", frames, seed, mechanisms, out, loras
    ), remarks


def with_steps(config: Any, steps: int) -> Any:
    """A copy of a config with another number of denoising steps, evenly spaced before the shift.

    Raises:
      UsageError: fewer than 1 or more than 1000.
    """
    if not 1 <= steps <= ROWS:
        raise UsageError(f"--steps {steps}: expected 1 to {ROWS}")
    config = config.copy_and_resolve_references()
    if config.sampler.name == "few_step":
        config.sampler.timesteps = tuple(round(ROWS * (steps - i) / steps) for i in range(steps))
    else:
        config.sampler.steps = steps
    return config


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
    return (
        str(EXAMPLES / "person.png"),
        garments,
        (EXAMPLES / "prompt.txt").read_text(encoding="utf-8").strip(),
    )


def stream(job: Job, session: Session) -> dict[str, Any]:
    """Make the video and its contact sheet. Returns what is to be said about it in the JSON file."""
    from chameleon_jax.data.video import VideoWriter

    begin = time.perf_counter()
    (_, worn), *waiting = job.garments
    switches: list[tuple[Garment, Any]] = []
    sheet = jobs.Sheet(job.frames)
    first_frame = None
    job.out.parent.mkdir(parents=True, exist_ok=True)
    bar = tqdm(
        total=job.frames, unit=" frames", file=sys.stderr, dynamic_ncols=True, desc=job.out.name
    )
    with (
        jobs.Interrupt() as interrupt,
        VideoWriter(job.out, job.config.video.fps, session.pipeline.size) as video,
        bar,
    ):
        session.start(job.reference, worn, job.prompt, job.seed)
        while video.frames < job.frames and not interrupt.requested:
            while waiting and waiting[0][0].frame <= session.frames:
                garment, picture = waiting.pop(0)
                switches.append((garment, session.switch_garment(picture)))
            frames = session.next_chunk()[: job.frames - video.frames]
            first_frame = first_frame or time.perf_counter() - begin
            sheet.add(frames)
            video.write(frames)
            bar.update(len(frames))
    seconds = time.perf_counter() - begin
    made = video.frames
    if not made:
        raise KeyboardInterrupt
    asked = ", ".join(str(garment.frame) for garment, _ in job.garments)
    pictures = [job.reference, *(picture for _, picture in job.garments)]
    sheet.save(job.out.with_suffix(".png"), pictures, f"person, garments asked for at {asked}")
    denoised = sum(timing.denoise for timing in session.timings)
    return {
        "interrupted": made < job.frames,
        "frames": made,
        "frames_asked": job.frames,
        "size": list(session.pipeline.size),
        "fps": job.config.video.fps,
        "seed": job.seed,
        "prompt": job.prompt,
        "garments": [{"path": garment.path, "frame": garment.frame} for garment, _ in job.garments],
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
        "seconds": {"stream": round(seconds, 3), "first_frame": round(first_frame, 3)},
        "denoise_fps": round(sum(timing.frames for timing in session.timings) / denoised, 2),
        "delivered_fps": round(made / seconds, 2),
    }


def run(argv: Sequence[str]) -> int:
    """The command. Returns its exit code.

    Raises:
      UsageError, ConfigError, ImageError, PipelineError, WeightsError, ...: an input cannot be
      used.
    """
    values, overrides = cli.parse(define_flags(), argv, __doc__)
    check_flags(values)
    task = {"stream": run_stream, "shots": sample_shots.run}.get(values.task, sample_clip.run)
    return task(values, overrides)


def run_stream(values: flags.FlagValues, overrides: Sequence[str]) -> int:
    """The task `stream`; see `run`."""
    job, remarks = read_job(values, overrides)
    for remark in remarks:
        print(f"note: {remark}", file=sys.stderr)
    begin = time.perf_counter()
    pipeline = jobs.load_pipeline(job.weights, job.config, job.seed, job.loras)
    loaded = time.perf_counter()
    print(f"compiling for {jax.devices()[0].device_kind} ...", file=sys.stderr)
    pipeline.compile()
    compiled = time.perf_counter()
    report = stream(job, pipeline.session(job.mechanisms, measure=True))
    report["seconds"] |= {"load": round(loaded - begin, 3), "compile": round(compiled - loaded, 3)}
    jobs.save_report(job.out.with_suffix(".json"), report, job, pipeline)
    print(
        f"{job.out}: {report['frames']} frames, {report['delivered_fps']} frames/s"
        f" (denoising alone {report['denoise_fps']}), {report['seconds']['stream']} s"
    )
    for switch in report["switches"]:
        worn = (
            "replaced before it was worn"
            if switch["superseded"]
            else f"worn from frame {switch['effective']}"
        )
        print(f"  {switch['path']}: asked for at frame {switch['asked']}, {worn}")
    return jobs.exit_code(report, job.out)


def main(argv: Sequence[str] = tuple(sys.argv)) -> None:
    """Run, and turn whatever is wrong with the input into one line."""
    try:
        sys.exit(run(argv))
    except (UsageError, ConfigError, ImageError, PipelineError, PositionError) as error:
        cli.fail(error)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr, flush=True)
        os._exit(130)  # at once: a normal exit would wait for compilers that run in threads
    except ModuleNotFoundError as error:
        cli.fail(f"{error.name} is not installed; python -m pip install 'chameleon-jax[video]'")
    except ValueError as error:
        if type(error).__module__.startswith(
            "chameleon_jax."
        ):  # weights, tokenizer, video: imported where used
            cli.fail(error)
        raise


if __name__ == "__main__":
    main()

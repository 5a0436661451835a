"""What the tasks of `launch.sample` share: config, weights, the video and what lies beside it."""

from __future__ import annotations

import dataclasses
import itertools
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from PIL import Image

from chameleon_jax import files, interrupts, machine, places, sharding
from chameleon_jax.config import load_config, override
from chameleon_jax.inference.mechanisms import SwitchConfig, SwitchError
from chameleon_jax.inference.pipeline import Pipeline
from chameleon_jax.inference.schedule import with_steps
from chameleon_jax.inference.settings import NETWORKS, with_quantize
from chameleon_jax.keys import check_seed
from launch.cli import UsageError, Values

SHEET_FRAMES = 24  # frames on the contact sheet
SHEET_HEIGHT = 256  # pixels of the tallest of them
SHEET_COLUMNS = 8
BITS_PER_PIXEL = 0.1  # of a video file, at the least; to see whether there is room for it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What every task is asked for, checked."""

    config: ConfigDict
    weights: str  # a folder, a name on the Hub, or `random`
    seed: int
    out: Path  # the video
    loras: tuple[tuple[Path, float], ...] = ()
    mesh: Mesh | None = None  # devices over which a stream is split; None: one
    decoder: str | None = None  # of `Pipeline.from_pretrained`


@dataclasses.dataclass(frozen=True)
class Made:
    """What became of a video."""

    frames: int
    asked: int  # frames that were asked for
    first: float  # seconds until the first frames were on the host
    seconds: float  # seconds for all of it

    @property
    def interrupted(self) -> bool:
        return self.frames < self.asked


def read_config(values: Values, default: str, is_for: Callable[[ConfigDict], bool]) -> ConfigDict:
    """The config of a task: `--config`; else the one beside the weights; else the task's own.

    Weights say the sizes of their networks. How to run them is taken from the config beside them
    if that describes such a task, else from `default`.

    Args:
      values: the flags `config`, `overrides`, `weights` and `quantize`.
      default: the task's config file.
      is_for: whether a config describes such a task.

    Raises:
      ConfigError: a config cannot be read.
    """
    config = _read_config(values, default, is_for)
    return config if values.quantize is None else with_quantize(config, values.quantize)


def _read_config(values: Values, default: str, is_for: Callable[[ConfigDict], bool]) -> ConfigDict:
    stored = None if values.config is not None else _stored_config(values.weights)
    if stored is None:
        return load_config(values.config or default, values.overrides)
    config = stored
    if not is_for(stored):
        networks = {"model": stored.model, "dtype": stored.get("dtype", "float32")}
        config = ConfigDict({**load_config(default).to_dict(), **networks})
    config = config.copy_and_resolve_references().unlock()
    override(config, values.overrides)
    return config.lock()


def is_for_streams(config: ConfigDict) -> bool:
    """Whether a config describes a stream with a person and a garment."""
    return "switch" in config and config.get("cache", {}).get("context", 0) > 0


def read_chunked(values: Values, default: str, is_for: Callable[[ConfigDict], bool]) -> ConfigDict:
    """The same of a task that makes chunks, which may take other steps: the flag `steps`.

    Raises:
      UserError: the config cannot be read, or its sampler cannot take so many steps.
    """
    config = read_config(values, default, is_for)
    return config if values.steps is None else with_steps(config, values.steps)


def read_stream(values: Values, default: str) -> tuple[ConfigDict, SwitchConfig]:
    """The config of a stream, by `read_chunked`, and what a switch does in it: the flag `switch`.

    Raises:
      UserError: the config cannot be read, or the flags do not fit it.
    """
    config = read_chunked(values, default, is_for_streams)
    mechanisms = SwitchConfig.of(config)
    if values.switch is not None:
        try:
            mechanisms = SwitchConfig.parse(values.switch, like=mechanisms)
        except SwitchError as error:
            raise UsageError(f"--switch: {error}") from None
    return config, mechanisms


def _stored_config(weights: str | None) -> ConfigDict | None:
    """The config beside weights in our layout; None without one."""
    if weights is None or weights == "random":
        return None
    path = places.find(weights) / "config.json"
    if not path.is_file():
        return None
    config = load_config(path)
    model = config.get("model")  # without one it is the config of a public layout
    whole = isinstance(model, ConfigDict) and set(NETWORKS) <= set(model)
    return config if whole else None


def check_common(values: Values, config: ConfigDict) -> dict[str, Any]:
    """The fields of `Job` but for the video's place.

    Raises:
      UsageError: weights cannot be used, or a LoRA does not exist.
      UsageError, MeshError: `--mesh` cannot be used here.
      SeedError: the seed is out of range.
      VideoError: the frame rate cannot be written.
    """
    from chameleon_jax.data.video import frame_rate

    frame_rate(config.video.fps)
    seed = check_seed(config.seed if values.seed is None else values.seed)
    weights = values.weights or config.weights
    if not weights:
        raise UsageError(
            f"config {config.name} comes without weights; give --weights FOLDER, or --weights"
            " random"
        )
    return {
        "config": config,
        "weights": weights,
        "seed": seed,
        "loras": _check_loras(values.lora),
        "mesh": stream_mesh(values.mesh),
        "decoder": values.decoder,
    }


def stream_mesh(sizes: Mapping[str, int] | None) -> Mesh | None:
    """The mesh of `--mesh`: over the first devices that there are.

    Args:
      sizes: by axis; None if the flag was not given.

    Raises:
      UsageError: an axis that there is not, or more devices than there are.
    """
    if sizes is None:
        return None
    given = ",".join(f"{axis}={size}" for axis, size in sizes.items())
    for axis in sizes:
        if axis not in sharding.AXES:
            raise UsageError(f"--mesh {given}: no axis {axis!r}; expected tensor or seq")
    devices, wanted = jax.devices(), math.prod(sizes.values())
    if wanted > len(devices):
        raise UsageError(
            f"--mesh {given}: {wanted} devices asked for, {len(devices)} found; choose fewer"
        )
    return sharding.make_mesh(sizes, devices[:wanted])


def split_axes(mesh: Mesh | None) -> dict[str, int]:
    """The axes of a mesh over which something is split, for reports; empty for one device."""
    return {} if mesh is None else {axis: size for axis, size in mesh.shape.items() if size > 1}


def check_out(name: str, frames: int, size: tuple[int, int]) -> Path:
    """The path of the video, if it and its companions can be written there.

    Raises:
      UsageError, PlaceError: they cannot.
    """
    out = Path(name)
    if out.suffix.lower() != ".mp4":
        raise UsageError(f"--out {out}: expected a name that ends in .mp4")
    nbytes = int(frames * size[0] * size[1] * BITS_PER_PIXEL / 8)
    for path in (out, out.with_suffix(".json"), out.with_suffix(".png")):
        places.check_writable(path, nbytes)
    return out


def _check_loras(texts: Sequence[str]) -> tuple[tuple[Path, float], ...]:
    """`file` or `file@strength`, each of which exists."""
    from chameleon_jax.weights.lora import parse_strength

    loras = []
    for text in texts:
        try:
            path, strength = parse_strength(text)
        except ValueError as error:
            raise UsageError(f"--lora {text}: {error}") from None
        if not path.exists():
            raise UsageError(f"--lora {text}: no such file or folder")
        loras.append((path, strength))
    return tuple(loras)


def load_pipeline(job: Job) -> Pipeline:
    """The networks: from a folder or the Hub, or random ones; changed by LoRAs."""
    if job.weights == "random":
        pipeline = Pipeline.random(job.config, job.seed, decoder=job.decoder, mesh=job.mesh)
    else:
        pipeline = Pipeline.from_pretrained(
            job.weights, job.config, decoder=job.decoder, mesh=job.mesh
        )
    for path, strength in job.loras:
        pipeline.add_lora(path, strength)
    return pipeline


class Interrupt:
    """Ctrl-C as a flag: what is in progress is finished and written. A second one stops at once."""

    def __init__(self):
        self.requested = False

    def __enter__(self) -> Interrupt:
        self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _handle(self, *_: object) -> None:
        if self.requested:
            interrupts.interrupt()
        self.requested = True


def write_video(
    job: Job,
    size: tuple[int, int],
    frames: int,
    chunks: Iterator[np.ndarray],
    pictures: Sequence[np.ndarray],
    label: str,
) -> Made:
    """Write a video while it is made, with a bar on stderr, and its contact sheet.

    Ctrl-C ends it after the chunk in progress. Nothing is written before the first chunk is there.

    Args:
      job: says where to, and how many frames a second.
      size: (height, width).
      frames: that were asked for.
      chunks: uint8 [t, h, w, 3] each.
      pictures: given ones, for the first row of the sheet.
      label: what is written above them.

    Raises:
      VideoError, OSError: the video cannot be written to the end.
    """
    from tqdm import tqdm

    from chameleon_jax.data.video import VideoWriter

    begin = time.perf_counter()
    sheet = Sheet(frames)
    bar = tqdm(total=frames, unit=" frames", file=sys.stderr, dynamic_ncols=True, desc=job.out.name)
    with Interrupt() as interrupt, bar:
        chunk = next(chunks)
        first = time.perf_counter() - begin
        job.out.parent.mkdir(parents=True, exist_ok=True)
        with VideoWriter(job.out, job.config.video.fps, size) as writer:
            for made in itertools.chain([chunk], chunks):
                sheet.add(made)
                writer.write(made)
                bar.update(len(made))
                if interrupt.requested:
                    break
    seconds = time.perf_counter() - begin
    sheet.save(job.out.with_suffix(".png"), pictures, label)
    return Made(writer.frames, frames, first, seconds)


class Sheet:
    """The contact sheet: pictures that were given, then every n-th frame, in rows.

    Args:
      frames: how many there will be.
    """

    def __init__(self, frames: int):
        self.stride = max(1, -(-frames // SHEET_FRAMES))
        self.kept: list[np.ndarray] = []
        self._seen = 0

    def add(self, frames: np.ndarray) -> None:
        """The next frames of the video, uint8 [t, h, w, 3]."""
        for index, frame in enumerate(frames, self._seen):
            if index % self.stride == 0:
                self.kept.append(_small(frame))
        self._seen += len(frames)

    def save(self, path: Path, pictures: Sequence[np.ndarray] = (), label: str = "") -> None:
        """Write it as PNG, with `pictures` in a first row called `label`."""
        from chameleon_jax.data.sheets import contact_sheet

        rows, labels = [], []
        if len(pictures):
            rows.append([_small(picture) for picture in pictures])
            labels.append(label)
        for first in range(0, len(self.kept), SHEET_COLUMNS):
            rows.append(self.kept[first : first + SHEET_COLUMNS])
            last = first + len(rows[-1]) - 1
            labels.append(f"frames {first * self.stride} to {last * self.stride}")
        with files.replacing(path) as part:
            contact_sheet(rows, labels).save(part, "PNG")


def _small(frame: np.ndarray) -> np.ndarray:
    height, width = frame.shape[:2]
    if height <= SHEET_HEIGHT:
        return frame
    size = (round(width * SHEET_HEIGHT / height), SHEET_HEIGHT)
    return np.asarray(Image.fromarray(frame).resize(size))


def save_report(job: Job, made: Made, report: Mapping[str, Any], pipeline: Pipeline) -> None:
    """Write beside the video, as JSON, what was asked for and what happened.

    The machine, the versions and the resolved config are in it too, and what of a prompt was too
    long to be read.
    """
    shots = report.get("shots", [])
    prompts = [report["prompt"]] if "prompt" in report else [shot["prompt"] for shot in shots]
    common = {
        "interrupted": made.interrupted,
        "frames": made.frames,
        "frames_asked": made.asked,
        "fps": job.config.video.fps,
        "seed": job.seed,
        **report,
        "prompts_left_out": [pipeline.cut_prompt(prompt)[1] for prompt in prompts],
        "device": machine.device().device_kind,
        "mesh": split_axes(job.mesh),
        "versions": machine.versions(),
        "weights": job.weights,
        "decoder": job.decoder,
        "loras": [{"path": str(path), "strength": strength} for path, strength in job.loras],
        "config": pipeline.config.to_dict(),
    }
    files.write_json(job.out.with_suffix(".json"), common)


def exit_code(job: Job, made: Made) -> int:
    """0; after Ctrl-C 130, and a line on what there is."""
    if not made.interrupted:
        return 0
    print(
        f"interrupted: {made.frames} of {made.asked} frames were made, {job.out} holds them",
        file=sys.stderr,
    )
    return 130

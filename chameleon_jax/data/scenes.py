"""Scenes: one person and one motion of a world in several tops, and processes that render them.

A motion is planned once and a person is built once, so a scene of n tops costs little more than n
clips, and gives n (n - 1) examples: every ordered pair of tops is one, reference in one of them,
garment and video of the other. Only tops are changed, so the world must show them (`mirror`).

A kind of scene says what of the motion is seen:

  still   one frame, anywhere in a clip of `frames`
  clip    all frames, and beside them `later`: `LATER` frames from a random frame on, encoded as a
          clip of their own. A garment switch begins a new clip in the middle of a motion, where
          people do not stand as they do in a first frame.

    python -m chameleon_jax.data.scenes '{"folder": ..., ...}'      # what `Renderers` starts

renders scenes into files, each of which appears when it is complete; who reads it removes it.

Axes: n tops, t pixel frames, f latent frames, h w pixels or latent pixels.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from chameleon_jax import files
from chameleon_jax.data import labels
from chameleon_jax.data.workers import settle
from chameleon_jax.errors import UserError, need

log = logging.getLogger(__name__)

LATER = 9  # pixel frames of a later start: a first chunk of three latent frames
EARLIEST = 2  # frame that it may begin at
STILL, CLIP = "still", "clip"
WAITING = 64  # files that may wait to be read before a renderer pauses
LABELS = ("labels", "origin")  # kinds of `data.labels` that a scene has


class SceneError(UserError):
    """Scenes cannot be rendered or read. The message is one line."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What scenes are rendered by.

    Attributes:
      size: (height, width) in pixels.
      fps: frames per second.
      frames: of a clip: 4 k + 1.
      tops: in which each person is seen; at least 2.
      world: what is drawn from, see `runway.worlds`; one that shows tops.
      frames_per_latent, factor: pixel frames of a latent frame, and pixels along one side of a
        latent pixel: those of the VAE that encodes them.

    Raises:
      SceneError: fewer than two tops, or clips too short for a later start.
    """

    size: tuple[int, int] = (128, 80)
    fps: float = 16.0
    frames: int = 33
    tops: int = 4
    world: str = "mirror"
    frames_per_latent: int = 4
    factor: int = 8

    def __post_init__(self):
        if self.tops < 2:
            raise SceneError(
                f"scenes of {self.tops} tops make no pair of reference and video; expected 2 or"
                " more"
            )
        if self.frames < EARLIEST + LATER or self.frames % self.frames_per_latent != 1:
            raise SceneError(
                f"clips of {self.frames} frames: expected a multiple of {self.frames_per_latent}"
                f" and one, and at least {EARLIEST + LATER}, so that a later start has room"
            )

    def render(self, seed: int, kind: str = CLIP) -> Scene:
        """A scene.

        Args:
          seed: decides everything; below 800,000 for training, see `runway.clip`.
          kind: "still" or "clip".

        Raises:
          SceneError: the seed's clip is not about a top.
        """
        from chameleon_jax.runway import garment_picture, sample_spec
        from chameleon_jax.runway.clip import PICTURE_SAMPLES, ClipRenderer, stream

        spec = sample_spec(seed, frames=self.frames, size=self.size, fps=self.fps, world=self.world)
        if spec.slot != "top":
            raise SceneError(
                f"seed {seed} of the world {self.world} is about a {spec.slot}; scenes change tops:"
                " expected a world that shows these alone, such as mirror"
            )
        shown: Sequence[int] = range(self.frames)
        if kind == STILL:
            shown = [int(stream(seed, "still").integers(self.frames))]
        last = self.frames - LATER + 1
        later = slice(start := int(stream(seed, "later").integers(EARLIEST, last)), start + LATER)
        renderer = ClipRenderer(spec)
        arrays: dict[str, list[np.ndarray]] = {}
        texts = []
        for top in draw_tops(spec, self.tops):
            worn = spec.with_garment(top)
            clip = renderer.clip(worn, shown, ground_truth=True)
            known = labels.of_clip(clip, worn.to_json(), seed)
            found = {"video": clip.frames} | self._cells(known)
            found["garment"] = garment_picture(top, self.size, PICTURE_SAMPLES, self.world)
            if kind == CLIP:
                cut = {name: known[name][later] for name in LABELS}
                found["later_video"] = clip.frames[later]
                found |= {f"later_{name}": cells for name, cells in self._cells(cut).items()}
            for name, value in found.items():
                arrays.setdefault(name, []).append(value)
            texts.append(dict(worn.captions()))
        return Scene({name: np.stack(parts) for name, parts in arrays.items()}, tuple(texts))

    def _cells(self, known: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        wanted = {name: known[name] for name in LABELS}
        return labels.to_cells(wanted, self.frames_per_latent, self.factor)


@dataclasses.dataclass(frozen=True)
class Scene:
    """A rendered scene.

    Attributes:
      arrays: `video` uint8 [n, t, h, w, 3], `garment` uint8 [n, h, w, 3], and of latent pixels
        `labels` uint8 [n, f, h, w, 5] and `origin` uint8 [n, f, h, w, 2], see `data.labels`; of a
        clip also `later_video`, `later_labels`, `later_origin`, those of the later start.
      captions: of each top {"static": ..., "dynamic": ...}.
    """

    arrays: dict[str, np.ndarray]
    captions: tuple[Mapping[str, str], ...]

    def write(self, path: Path) -> None:
        """Write a file that appears complete or not at all."""
        with files.replacing(path) as part, part.open("wb") as file:
            np.savez(file, captions=json.dumps(self.captions), **self.arrays)

    @classmethod
    def read(cls, path: Path) -> Scene:
        """Inverse of `write`.

        Raises:
          SceneError: it is not a file of `write`.
        """
        try:
            with np.load(path) as stored:
                arrays = {name: stored[name] for name in stored.files}
            return cls(arrays, tuple(json.loads(str(arrays.pop("captions")))))
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise SceneError(f"{path}: not a scene ({error}); remove it") from None


def draw_tops(spec: Any, count: int) -> list[Any]:
    """The clip's top, that of its reference, and further ones, all of which look different.

    Args:
      spec: a `runway.ClipSpec` about a top.
      count: how many.

    Returns:
      `runway.GarmentSpec`s; the further ones are not held out, and easy to tell from the bottom.
    """
    from chameleon_jax.runway.clip import go_together, look_different, seen_in_training, stream
    from chameleon_jax.runway.garments import belongs_to, sample_garment
    from chameleon_jax.runway.worlds import world_of

    world, rng = world_of(spec.world), stream(spec.seed, "tops")
    bottom = spec.outfit.get("bottom")
    tops = [spec.garment, spec.reference_garment]

    def fits(top: Any) -> bool:
        new = seen_in_training(top) and all(look_different(top, other) for other in tops)
        return new and belongs_to(top, world) and (bottom is None or go_together(top, bottom))

    while len(tops) < count:
        tops.append(sample_garment(rng, spec.slot, accept=fits))
    return tops[:count]


@dataclasses.dataclass(frozen=True)
class Job:
    """The scenes of one process, as JSON values.

    Attributes:
      folder: gets the folders `still` and `clip`, with files named after their seeds.
      recipe: fields of a `Recipe`.
      seeds: the first one, and the step to the next: `worker` and `workers` of them.
      stills: seeds below this many after `first` are stills, all later ones clips without end.
      parent: number of the process to end with.
    """

    folder: str
    recipe: Mapping[str, Any]
    first: int
    worker: int
    workers: int
    stills: int
    parent: int


class Renderers(contextlib.AbstractContextManager):
    """Processes that render scenes until they are told to end: stills first, then clips.

    They end with this process, however it ends.

    Args:
      folder: see `Job`; what they say goes into `renderer_N.log` there.
      recipe: what is rendered.
      workers: how many processes, one core each.
      first: seed of the first scene.
      stills: how many stills before the first clip.

    Raises:
      MissingPackageError: numba is not installed, which the renderer needs.
    """

    def __init__(self, folder: Path, recipe: Recipe, workers: int, first: int, stills: int = 0):
        need("numba", "runway")
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        # One core each; a renderer needs no accelerator, and must not take memory of one.
        alone = {"NUMBA_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
        self._processes = []
        for worker in range(workers):
            job = Job(
                str(folder),
                dataclasses.asdict(recipe),
                first,
                worker,
                workers,
                stills,
                os.getpid(),
            )
            command = [sys.executable, "-m", __name__, json.dumps(dataclasses.asdict(job))]
            with (folder / f"renderer_{worker}.log").open("wb") as said:
                process = subprocess.Popen(
                    command, env=os.environ | alone, stdout=said, stderr=subprocess.STDOUT
                )
            self._processes.append(process)

    def __exit__(self, *raised: object) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.wait()

    def check(self) -> None:
        """Raise SceneError if no process is left that renders."""
        if all(process.poll() is not None for process in self._processes):
            raise SceneError(
                f"all processes that render scenes have ended; {self.folder}/renderer_0.log says"
                " why, perhaps for lack of memory or disk: try fewer scenes.workers"
            )


def ready(folder: Path, kind: str) -> list[Path]:
    """Files of complete scenes of a kind, in the order of their seeds."""
    return sorted((folder / kind).glob("*.npz"))


def work(job: Job) -> None:
    """Render without end, or until the parent has ended."""
    folder, recipe = Path(job.folder), Recipe(**job.recipe)
    for kind in (STILL, CLIP):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for number in _every(job.worker, job.workers):
        kind = STILL if number < job.stills else CLIP
        while len(ready(folder, kind)) >= WAITING * job.workers:
            time.sleep(0.2)
        seed = job.first + number
        try:
            recipe.render(seed, kind).write(folder / kind / f"{seed:08d}.npz")
        except OSError:  # the disk: the next scene would fail as well
            raise
        except Exception:  # one scene that cannot be drawn must not cost a run
            log.exception("seed %d cannot be rendered", seed)


def _every(first: int, step: int) -> Iterator[int]:
    while True:
        yield first
        first += step


def main() -> None:
    """Do the job on the command line."""
    job = Job(**json.loads(sys.argv[1]))
    job.recipe["size"] = tuple(job.recipe["size"])
    settle(job.parent)
    os.nice(5)  # the process that trains comes first
    logging.basicConfig(format="%(asctime)s %(message)s")
    work(job)


if __name__ == "__main__":
    main()

"""Clips that are rendered when they are asked for: a source without files.

Encoding a set renders each clip once, looks at it once and forgets it, so nothing but the latents
has to be stored, and no video is compressed on the way (`prepare latents --world`).
"""

from __future__ import annotations

import collections
import concurrent.futures
import concurrent.futures.process
import dataclasses
import functools
import logging
import multiprocessing
import os
from collections.abc import Generator, Sequence
from typing import Any

import numpy as np

from chameleon_jax.data import labels
from chameleon_jax.data.sources import SourceError
from chameleon_jax.data.workers import settle
from chameleon_jax.errors import need, one_line

AHEAD = 4  # clips per worker that are rendered before they are asked for


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What clips are rendered by; see `runway.render_triplet`."""

    fps: float
    world: str
    people: int
    labels: tuple[str, ...]

    def person(self, seed: int) -> int:
        """The seed whose person a clip shows."""
        return seed - seed % self.people

    def render(self, seed: int, frames: int, size: tuple[int, int]) -> dict[str, Any]:
        """A clip as a source gives it."""
        from chameleon_jax.runway import render_triplet

        person = self.person(seed)
        triplet = render_triplet(
            seed, frames, size, self.fps, self.world, bool(self.labels), person
        )
        found = {
            "video": triplet.video,
            "reference": triplet.reference,
            "garment": triplet.garment,
            "captions": dict(triplet.captions),
            "fps": float(self.fps),
            "seed": seed,
        }
        if self.labels:
            known = labels.of_clip(triplet.clip, triplet.spec, person)
            found |= {name: known[name] for name in self.labels}
        return found


class RenderedSource:
    """See `sources` for the interface.

    Args:
      seeds: of the clips.
      size: (height, width) in pixels.
      fps: frames per second.
      world: what clips are drawn from, see `chameleon_jax.runway.worlds`.
      people: so many neighbouring seeds show the same person.
      labels: kinds of labels to give with the pixels.
      workers: processes that render; 0 renders in this one.

    Raises:
      MissingPackageError: numba is not installed, which the renderer needs.
      WorldError: there is no such world.
    """

    kind = "pixels"
    frames_per_latent = None

    def __init__(
        self,
        seeds: Sequence[int],
        size: tuple[int, int],
        fps: float = 16.0,
        world: str = "open",
        *,
        people: int = 1,
        labels: Sequence[str] = (),
        workers: int = 0,
    ):
        need("numba", "runway")
        from chameleon_jax.runway.worlds import world_of

        world_of(world)
        self.seeds, self.size, self.workers = list(seeds), tuple(size), workers
        self.recipe = Recipe(fps, world, people, tuple(labels))
        self.sizes = np.tile(np.array([self.size]), (len(self.seeds), 1))

    def __len__(self) -> int:
        return len(self.seeds)

    def __repr__(self) -> str:
        return f"RenderedSource({len(self)} clips of the world {self.recipe.world})"

    def captions(self, index: int) -> dict[str, Any]:
        """See `sources`; nothing is drawn."""
        from chameleon_jax.runway import sample_spec

        seed, recipe = self.seeds[index], self.recipe
        spec = sample_spec(
            seed, size=self.size, fps=recipe.fps, world=recipe.world, person=recipe.person(seed)
        )
        return dict(spec.captions())

    def load(
        self, index: int, frames: int, size: tuple[int, int], start: float = 0.0
    ) -> dict[str, Any]:
        """See `sources`.

        Raises:
          SourceError: another size than its own, or another start than the first frame: a motion is
            planned for the frames that are asked for.
        """
        self._check(size, start)
        return self.recipe.render(self.seeds[index], frames, self.size)

    def load_many(
        self, indices: Sequence[int], frames: int, size: tuple[int, int]
    ) -> Generator[dict[str, Any] | SourceError, None, None]:
        """Several clips, in their order, rendered ahead by the workers.

        Yields:
          Each clip, or the error in its place: one scene that cannot be drawn must not cost a
          night's run.

        Raises:
          SourceError: a worker ended.
        """
        self._check(size, 0.0)
        seeds = [self.seeds[index] for index in indices]
        render = functools.partial(_rendered, self.recipe, frames=frames, size=self.size)
        if not self.workers:
            yield from map(render, seeds)
            return
        # Forking a process that runs threads of JAX or numba can hang.
        context = multiprocessing.get_context("spawn")
        pool = concurrent.futures.ProcessPoolExecutor(
            self.workers, context, initializer=settle, initargs=(os.getpid(),)
        )
        waiting: collections.deque[concurrent.futures.Future] = collections.deque()
        try:
            for seed in seeds:
                waiting.append(pool.submit(render, seed))
                if len(waiting) > AHEAD * self.workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except concurrent.futures.process.BrokenProcessPool:
            raise SourceError(
                "a rendering process ended, perhaps for lack of memory; try fewer workers, the same"
                " command continues"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _check(self, size: tuple[int, int], start: float) -> None:
        if tuple(size) != self.size or start:
            raise SourceError(
                f"clips of {self.size} pixels from their first frame on are rendered; {tuple(size)}"
                f" from {start:g} on were asked"
            )


def _rendered(
    recipe: Recipe, seed: int, frames: int, size: tuple[int, int]
) -> dict[str, Any] | SourceError:
    """A clip, or why there is none."""
    try:
        return recipe.render(seed, frames, size)
    except Exception as error:
        logging.exception("seed %d cannot be rendered", seed)
        return SourceError(f"seed {seed} cannot be rendered ({one_line(error)})")

"""What a record is, and how records are made: rendered clips, and latents of clips.

Two kinds of set share one layout (see `records`):

  runway_garment   clips as H.264 (4:4:4, crf 12), pictures as lossless WebP, captions and scene as
                   JSON text
  runway_latents   the same clips after the VAE, float16, so that training on a CPU need not encode
                   them again

Sizes are (height, width); t counts pixel frames, f latent frames.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from chameleon_jax.data import captions, images, labels
from chameleon_jax.data.rendered import RenderedSource
from chameleon_jax.data.sources import Source, import_tfds, latent_frames
from chameleon_jax.errors import UserError, need
from chameleon_jax.splits import SPLITS, split_of

# Of so many seeds one must match a choice of clips, or the choice is taken for a mistake.
SEEDS_WITHOUT_MATCH = 5000
# Every so many captions of a source are compared to see whether it is still the same.
DIGEST_STEP = 50

Record = dict[str, Any]


class ExampleError(UserError):
    """Records of this kind cannot be made. The message is one line."""


class Examples(Protocol):
    """Makes the records of a set, each from its key: a seed, or an index of a source."""

    def __call__(self, keys: Sequence[int]) -> Iterable[tuple[int, Record | None]]:
        """The record of each key, in order; None if it cannot be made."""

    def metadata(self) -> dict[str, Any]:
        """What is the same in every record; kept beside the shards for those who read them."""

    def recipe(self) -> dict[str, Any]:
        """What decides what records hold, besides their keys."""

    def digest(self, keys: Sequence[int]) -> str:
        """Other for other records: what the keys stand for, not only the keys."""


@dataclasses.dataclass(frozen=True)
class RunwayExamples:
    """Renders records of `runway_garment`; the keys are seeds.

    Attributes:
      size: (height, width) of the clips.
      frames: pixel frames a clip.
      fps: frames per second.
      crf: quality of the stored clip; 12 keeps 41 dB on 128 x 80 pixels.
      match: regular expression; only clips with a caption in which it is found. Empty: all.
      slot: only clips whose garment is worn there: top, bottom, dress or outer. Empty: all.
      world: what clips are drawn from, a name from `chameleon_jax.runway.worlds`.
      labels: store the exact labels of each clip, too, see `labels`.
      people: so many neighbouring seeds show the same person, in other clothes elsewhere.
      render: called as render(seed, frames, size, fps, world, ground_truth, person); None is
        `chameleon_jax.runway.render_triplet`.

    Raises:
      ExampleError: a number, an expression or a slot that cannot be.
      WorldError: there is no such world.
      VideoError: an impossible fps.
      MissingPackageError: PyAV is not installed, or numba, which the renderer needs.
    """

    size: tuple[int, int] = (128, 80)
    frames: int = 33
    fps: float = 16
    crf: int = 12
    match: str = ""
    slot: str = ""
    world: str = "open"
    labels: bool = False
    people: int = 1
    render: Callable[..., Any] | None = None

    def __post_init__(self):
        from chameleon_jax.data.video import frame_rate

        if self.render is None:
            need("numba", "runway")
            from chameleon_jax.runway.worlds import world_of

            world_of(self.world)
        frame_rate(self.fps)
        if min(self.frames, self.people, *self.size) < 1:
            raise ExampleError(
                f"{self.frames} frames of {self.size[0]}x{self.size[1]} pixels, {self.people} clips"
                " a person; expected at least 1"
            )
        try:
            captions.compile_match(self.match)
        except captions.CaptionError as error:
            raise ExampleError(str(error)) from None
        if self.slot:
            from chameleon_jax.runway.garments import SLOTS

            if self.slot not in SLOTS:
                raise ExampleError(f"slot {self.slot!r}; expected one of {', '.join(SLOTS)}")

    def seeds(self, start: int, count: int) -> Sequence[int]:
        """The first `count` seeds from `start` on whose clips are wanted; nothing is rendered.

        Raises:
          ExampleError: the split of `start` ends before there are so many, or nothing matches for a
            long while.
        """
        if self.match or self.slot:
            return check_seeds(self._matching_seeds(start, count), start, count)
        return check_seeds(range(start, start + count), start, count)

    def _matching_seeds(self, start: int, count: int) -> list[int]:
        """Fewer than `count` if the split ends before."""
        seeds: list[int] = []
        for seed in itertools.count(start):
            if len(seeds) == count or split_of(seed) != split_of(start):
                return seeds
            if self.wants(seed):
                seeds.append(seed)
            if not seeds and seed - start == SEEDS_WITHOUT_MATCH:
                raise ExampleError(
                    f"no clip of seeds {start} to {seed} matches {self.match!r} with slot"
                    f" {self.slot!r}"
                )

    def person(self, seed: int) -> int:
        """The seed whose person a clip shows."""
        return seed - seed % self.people

    def wants(self, seed: int) -> bool:
        """Whether the clip of a seed is one of those that `match` and `slot` ask for."""
        from chameleon_jax.runway import sample_spec

        spec = sample_spec(
            seed,
            frames=self.frames,
            size=self.size,
            fps=self.fps,
            world=self.world,
            person=self.person(seed),
        )
        chosen = captions.mentions(spec.captions(), captions.compile_match(self.match))
        return chosen and self.slot in ("", spec.slot)

    def __call__(self, keys: Sequence[int]) -> Iterator[tuple[int, Record | None]]:
        render = self.render or _renderer()
        for seed in keys:
            try:
                triplet = render(
                    seed,
                    frames=self.frames,
                    size=self.size,
                    fps=self.fps,
                    world=self.world,
                    ground_truth=self.labels,
                    person=self.person(seed),
                )
                yield seed, self.record(seed, triplet)
            except Exception:
                # One scene that cannot be drawn must not cost a night's run; the writer counts.
                logging.exception("seed %d cannot be rendered; skipped", seed)
                yield seed, None

    def record(self, seed: int, triplet: Any) -> Record:
        """A triplet (video, reference, garment: uint8; captions; spec) as a record."""
        from chameleon_jax.data.video import encode_video

        shape = (self.frames, *self.size, 3)
        if triplet.video.shape != shape:
            raise ExampleError(
                f"seed {seed}: the renderer made {triplet.video.shape}; expected {shape}"
            )
        known = {}
        if self.labels:
            known = labels.of_clip(triplet.clip, triplet.spec, self.person(seed))
        return known | {
            "video": encode_video(triplet.video, self.fps, crf=self.crf, yuv444p=True),
            "reference": images.encode_image(triplet.reference),
            "garment": images.encode_image(triplet.garment),
            "captions": json.dumps(triplet.captions, ensure_ascii=False),
            "spec": json.dumps(triplet.spec, default=_plain),
            "seed": seed,
            "height": self.size[0],
            "width": self.size[1],
            "frames": self.frames,
            "fps": self.fps,
        }

    def metadata(self) -> dict[str, Any]:
        """See `Examples`."""
        return _metadata("pixels", self.size, self.frames, self.fps)

    def recipe(self) -> dict[str, Any]:
        """See `Examples`."""
        recipe = self.metadata() | {"crf": self.crf}
        if self.match:
            recipe["match"] = self.match
        if self.slot:
            recipe["slot"] = self.slot
        if self.world != "open":
            recipe["world"] = self.world
        if self.people != 1:
            recipe["people"] = self.people
        if self.labels:
            recipe["labels"] = list(labels.NAMES)
        return recipe

    def features(self) -> Any:
        """Features of the records, see `clip_features`."""
        if not self.labels:
            return clip_features()
        from chameleon_jax.runway import asset

        return clip_features(self.frames, self.size, len(asset.load().bones))

    def digest(self, keys: Sequence[int]) -> str:
        """See `Examples`."""
        return hashlib.sha256(np.asarray(keys, np.int64).tobytes()).hexdigest()[:16]


def check_seeds(seeds: Sequence[int], start: int, count: int) -> Sequence[int]:
    """The seeds, if they are `count` and of one split.

    Raises:
      ExampleError: they are not.
    """
    if len(seeds) < count or split_of(seeds[-1]) != split_of(start):
        raise ExampleError(
            f"{count} clips from seed {start} on belong to several splits, which begin at"
            f" {', '.join(f'{first} ({name})' for name, first in SPLITS.items())}"
        )
    return seeds


@dataclasses.dataclass(frozen=True)
class LatentExamples:
    """Encodes records of `runway_latents`; the keys are indices of a source.

    Attributes:
      source: a source of kind "pixels", see `sources`.
      encode: uint8 pixels [b, t, h, w, 3] to scaled latents [b, f, h', w', c] (NumPy or JAX).
      size: (height, width) of the pixels.
      frames: pixel frames a clip, t = frames_per_latent * (f - 1) + 1.
      frames_per_latent: pixel frames that a latent frame stands for: the VAE's `temporal_factor`.
      batch: clips encoded together.
      fps: frames per second.
      weights: names the VAE's weights; a set is not continued with others.
      factor: pixels along one side of a latent pixel.
      labels: kinds of labels to store beside the latents, see `labels.to_cells`; the source gives
        them.

    Raises:
      ExampleError: the source is one of latents.
      SourceError: a number of frames that the VAE does not take.
    """

    source: Source
    encode: Callable[[np.ndarray], Any]
    size: tuple[int, int]
    frames: int
    frames_per_latent: int
    batch: int = 4
    fps: float = 16
    weights: str = ""
    factor: int = 8
    labels: tuple[str, ...] = ()

    def __post_init__(self):
        if self.source.kind != "pixels":
            raise ExampleError(f"{self.source}: is encoded already; expected clips of pixels")
        latent_frames(self.frames, self.frames_per_latent)

    def shape(self) -> tuple[int, int, int, int]:
        """(f, h', w', c) of a clip's latents; runs the encoder once.

        Raises:
          ExampleError: the encoder makes another number of latent frames.
        """
        blank = np.zeros((self.batch, self.frames, *self.size, 3), np.uint8)
        shape = tuple(np.shape(self.encode(blank)))[1:]
        expected = latent_frames(self.frames, self.frames_per_latent)
        if shape[0] != expected:
            raise ExampleError(
                f"{self.frames} frames became {shape[0]} latent frames; expected {expected} with"
                f" {self.frames_per_latent} frames per latent frame"
            )
        return shape

    def __call__(self, keys: Sequence[int]) -> Iterator[tuple[int, Record | None]]:
        with contextlib.closing(self._load(keys)) as loaded:  # ends the workers, also at Ctrl-C
            for start in range(0, len(keys), self.batch):
                some = keys[start : start + self.batch]
                clips = dict(zip(some, loaded, strict=False))
                found = {index: clip for index, clip in clips.items() if clip is not None}
                yield from self._encode_some(some, found)

    def _load(self, keys: Sequence[int]) -> Generator[dict[str, Any] | None, None, None]:
        """The clips, in order; None for one that cannot be read."""
        if isinstance(self.source, RenderedSource):
            with contextlib.closing(
                self.source.load_many(keys, self.frames, self.size)
            ) as rendered:
                for clip in rendered:
                    yield None if isinstance(clip, ValueError) else clip
            return
        for index in keys:
            try:
                yield self.source.load(index, self.frames, self.size)
            except ValueError as error:
                logging.error("record %d cannot be read, skipped: %s", index, error)
                yield None

    def _encode_some(
        self, keys: Sequence[int], clips: dict[int, dict[str, Any]]
    ) -> Iterator[tuple[int, Record | None]]:
        """Records of at most `batch` keys."""
        latents = self._encode_clips(list(clips.values())) if clips else []
        made = dict(zip(clips, latents, strict=True))
        for index in keys:
            if index not in clips:
                yield index, None
                continue
            clip = clips[index]
            if not all(np.isfinite(z).all() for z in made[index].values()):
                logging.error("record %d has latents that are not finite; skipped", index)
                yield index, None
                continue
            known = {name: clip[name] for name in self.labels}
            yield (
                index,
                made[index]
                | labels.to_cells(known, self.frames_per_latent, self.factor)
                | {
                    "captions": json.dumps(clip["captions"], ensure_ascii=False),
                    "seed": clip["seed"],
                    "fps": self.fps,
                },
            )

    def _encode_clips(self, clips: Sequence[dict[str, Any]]) -> list[Record]:
        # The last batch is filled up, so that `encode` is compiled for one shape.
        filled = [*clips, *[clips[-1]] * (self.batch - len(clips))]
        z_video = _half(self.encode(np.stack([clip["video"] for clip in filled])))
        z_reference = _half(self.encode(np.stack([clip["reference"][None] for clip in filled])))
        z_garment = _half(self.encode(np.stack([clip["garment"][None] for clip in filled])))
        return [
            {
                "z_video": z_video[slot],
                "z_reference": z_reference[slot],
                "z_garment": z_garment[slot],
            }
            for slot in range(len(clips))
        ]

    def metadata(self) -> dict[str, Any]:
        """See `Examples`."""
        metadata = _metadata("latents", self.size, self.frames, self.fps)
        return metadata | {"frames_per_latent": self.frames_per_latent}

    def recipe(self) -> dict[str, Any]:
        """See `Examples`."""
        recipe = self.metadata() | {"weights": self.weights}
        return recipe | ({"labels": list(self.labels)} if self.labels else {})

    def features(self) -> Any:
        """Features of the records, see `latent_features`; runs the encoder once."""
        joints = 0
        if "joints" in self.labels:
            joints = self.source.load(0, self.frames, self.size)["joints"].shape[1]
        return latent_features(self.shape(), self.labels, joints)

    def digest(self, keys: Sequence[int]) -> str:
        """See `Examples`: from the captions of some records of the source, the last among them."""
        hashed = hashlib.sha256(str(len(keys)).encode())
        for index in [*keys[::DIGEST_STEP], keys[-1]]:
            try:
                found = json.dumps(self.source.captions(index), sort_keys=True)
            except ValueError:
                found = "cannot be read"
            hashed.update(found.encode())
        return hashed.hexdigest()[:16]


def clip_features(frames: int = 0, size: tuple[int, int] = (0, 0), joints: int = 0) -> Any:
    """Features of `runway_garment`, a `tfds.features.FeaturesDict`.

    Pictures and clip are encoded bytes, captions and scene JSON text.

    Args:
      frames, size: of the clips, in pixels; needed if there are labels.
      joints: of the labels; 0: the records have no labels.
    """
    tfds = import_tfds()
    encoded = tfds.features.Tensor(shape=(), dtype=np.bytes_)
    packed = functools.partial(tfds.features.Tensor, encoding=tfds.features.Encoding.ZLIB)
    known = {
        "labels": packed(shape=(frames, *size), dtype=np.uint8),
        "origin": packed(shape=(frames, *size, 2), dtype=np.uint8),
        "joints": packed(shape=(frames, joints, 2), dtype=np.float16),
        "attributes": packed(shape=(labels.ATTRIBUTES,), dtype=np.float32),
    }
    return tfds.features.FeaturesDict(
        (known if joints else {})
        | {
            "video": encoded,
            "reference": encoded,
            "garment": encoded,
            "captions": tfds.features.Text(),
            "spec": tfds.features.Text(),
            "seed": np.int64,
            "height": np.int64,
            "width": np.int64,
            "frames": np.int64,
            "fps": np.float32,
        }
    )


def latent_features(
    shape: tuple[int, int, int, int], kinds: Sequence[str] = (), joints: int = 0
) -> Any:
    """Features of `runway_latents`, a `tfds.features.FeaturesDict`.

    Args:
      shape: of a clip's latents, (f, h, w, c).
      kinds: of labels beside them.
      joints: how many, if these are among the labels.
    """
    tfds = import_tfds()
    packed = functools.partial(tfds.features.Tensor, encoding=tfds.features.Encoding.ZLIB)
    known = labels.cell_shapes(*shape[:3], joints)
    latent = functools.partial(
        tfds.features.Tensor, dtype=np.float16, encoding=tfds.features.Encoding.BYTES
    )
    return tfds.features.FeaturesDict(
        {name: packed(shape=known[name][0], dtype=known[name][1]) for name in kinds}
        | {
            "z_video": latent(shape=shape),
            "z_reference": latent(shape=(1, *shape[1:])),
            "z_garment": latent(shape=(1, *shape[1:])),
            "captions": tfds.features.Text(),
            "seed": np.int64,
            "fps": np.float32,
        }
    )


def _metadata(kind: str, size: tuple[int, int], frames: int, fps: float) -> dict[str, Any]:
    height, width = size
    return {"kind": kind, "height": height, "width": width, "frames": frames, "fps": fps}


def _renderer() -> Callable[..., Any]:
    """The project's renderer, imported late: it needs numba, which reading records does not."""
    from chameleon_jax.runway import render_triplet

    return render_triplet


def _half(x: Any) -> np.ndarray:
    with np.errstate(over="ignore"):  # what float16 does not hold becomes infinite, and is seen
        return np.asarray(x).astype(np.float16)


def _plain(value: Any) -> Any:
    """JSON form of what a scene may hold besides plain values."""
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} has no JSON form")

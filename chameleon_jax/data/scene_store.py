"""Latents of scenes in memory, and the batches that training draws from them.

    store = SceneStore(room=5000, tops=4, shape=(9, 16, 10, 16), tokenizer=tokenizer)
    store.add(z_video, z_garment, labels, captions)       # while training draws from it
    batch = draw([store], rng, frames=9, count=48)

Axes: s scenes, n tops, f latent frames, h w latent pixels, c channels, b batch, l tokens.
"""

from __future__ import annotations

import os
import threading
import zipfile
from collections.abc import Mapping, Sequence

import numpy as np

from chameleon_jax import files
from chameleon_jax.data.captions import DYNAMIC_ONLY, full
from chameleon_jax.data.labels import cell_shapes
from chameleon_jax.data.scenes import LABELS, SceneError
from chameleon_jax.data.tokenizer import Tokenizer

_LATENTS = np.dtype(np.float16)


class SceneStore:
    """Scenes of one kind, as latents.

    One thread may add while others draw. A full store forgets its oldest scenes.

    Args:
      room: most scenes; memory is taken as they come.
      tops: of a scene.
      shape: (f, h, w, c) of a clip's latents.
      tokenizer: of the captions.
    """

    def __init__(
        self, room: int, tops: int, shape: tuple[int, int, int, int], tokenizer: Tokenizer
    ):
        frames, height, width, _ = shape
        cells = cell_shapes(frames, height, width)
        kinds = {"z_video": (shape, _LATENTS), "z_garment": (shape[1:], _LATENTS)}
        kinds |= {name: cells[name] for name in LABELS}
        # Both captions of each top: the dynamic one alone, and both together.
        kinds |= {"ids": ((2, tokenizer.length), np.dtype(np.int32))}
        kinds |= {"mask": ((2, tokenizer.length), np.dtype(bool))}
        self.room, self.tops, self.frames = room, tops, frames
        self._arrays = {
            name: np.zeros((room, tops, *shape), dtype) for name, (shape, dtype) in kinds.items()
        }
        self._tokenizer, self._added, self._lock = tokenizer, 0, threading.Lock()
        self.no_prompt = tuple(part[0] for part in tokenizer([""]))  # ids and mask, each [l]

    def __len__(self) -> int:
        return min(self._added, self.room)

    def __repr__(self) -> str:
        return f"SceneStore({len(self)} scenes of {self.tops} tops, {self.frames} latent frames)"

    @property
    def added(self) -> int:
        """Scenes that were ever added, also those that are forgotten."""
        return self._added

    def add(
        self,
        z_video: np.ndarray,
        z_garment: np.ndarray,
        cells: Mapping[str, np.ndarray],
        captions: Sequence[Sequence[Mapping[str, str]]],
    ) -> None:
        """Take scenes in.

        Args:
          z_video: [s, n, f, h, w, c].
          z_garment: [s, n, h, w, c].
          cells: `labels` and `origin` of the latent pixels, [s, n, f, h, w, ...].
          captions: of each top of each scene, {"static": ..., "dynamic": ...}.

        Raises:
          SceneError: latents that are not finite, or too large for float16.
        """
        if not (_fits(z_video) and _fits(z_garment)):
            raise SceneError(
                "latents of scenes are not finite in float16; expected those of a trained VAE:"
                " compare weights.vae with the export of its training"
            )
        texts = [
            text
            for scene in captions
            for top in scene
            for text in (top["dynamic"], full(top["static"], top["dynamic"]))
        ]
        ids, mask = self._tokenizer(texts)
        lead = len(z_video), self.tops, 2
        new = {"z_video": z_video, "z_garment": z_garment, **{k: cells[k] for k in LABELS}}
        new |= {"ids": ids.reshape(*lead, -1), "mask": mask.reshape(*lead, -1)}
        self._take(new)

    def _take(self, new: Mapping[str, np.ndarray]) -> None:
        count = len(new["ids"])
        with self._lock:
            places = (self._added + np.arange(count)) % self.room
            for name, array in self._arrays.items():
                array[places] = new[name]
            self._added += count

    def pick(
        self,
        rng: np.random.Generator,
        scenes: np.ndarray,
        frames: int,
        *,
        dynamic_only: float = DYNAMIC_ONLY,
        dropout: float = 0.0,
        matched: bool = False,
        before: bool = False,
    ) -> dict[str, np.ndarray]:
        """Examples of some scenes, each of a random ordered pair of tops.

        The reference is the first latent frame of the clip in the other top: the VAE is causal, so
        it is the latent of the clip's first frame alone.

        Args:
          rng: source of randomness.
          scenes: [b] numbers of the scenes.
          frames: latent frames of the video, the first ones.
          dynamic_only: share of the examples that get the dynamic caption alone.
          dropout: share of them that get the empty prompt.
          before: give the clips in another top than theirs, too, as `z_before`.
          matched: take the reference from the clip itself, in the same top. An ablation: as the
            paper trains (section 4.1), they differ.

        Returns:
          `z_reference`, `z_garment` [b, 1, h, w, c], `z_video` [b, f, h, w, c], `labels`, `origin`
          [b, f, h, w, ...], `ids`, `mask` [b, l].
        """
        b = len(scenes)
        top = rng.integers(self.tops, size=b)
        other = (top + rng.integers(1, self.tops, size=b)) % self.tops
        shown = top if matched else other
        caption = (rng.random(b) >= dynamic_only).astype(int)
        dropped = rng.random(b) < dropout
        worn = (top + rng.integers(1, self.tops, size=b)) % self.tops if before else None
        with self._lock:
            x = self._arrays
            batch = {
                "z_reference": x["z_video"][scenes, shown, :1],
                "z_garment": x["z_garment"][scenes, top][:, None],
                "z_video": x["z_video"][scenes, top, :frames],
                "ids": x["ids"][scenes, top, caption],
                "mask": x["mask"][scenes, top, caption],
            } | {name: x[name][scenes, top, :frames] for name in LABELS}
            if worn is not None:
                batch["z_before"] = x["z_video"][scenes, worn, :frames]
        batch["ids"][dropped], batch["mask"][dropped] = self.no_prompt
        return batch

    def save(self, path: str | os.PathLike) -> None:
        """Write all scenes into one file, for `load`."""
        with files.replacing(path) as part, part.open("wb") as file:
            np.savez_compressed(
                file, **{name: array[: len(self)] for name, array in self._arrays.items()}
            )

    def load(self, path: str | os.PathLike) -> None:
        """Add the scenes of a file of `save`.

        Raises:
          SceneError: not such a file, or its scenes are of another kind.
        """
        try:
            with np.load(path) as stored:
                new = {name: stored[name] for name in stored.files}
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise SceneError(f"{path}: no latents of scenes can be read ({error})") from None
        for name, array in self._arrays.items():
            found = new[name].shape[1:] if name in new else None
            if found != array.shape[1:]:
                raise SceneError(
                    f"{path}: {name} of a scene is {found}, expected {array.shape[1:]}; make the"
                    " file again with this config"
                )
        self._take({name: value[: self.room] for name, value in new.items()})


def _fits(z: np.ndarray) -> bool:
    return bool((np.abs(z) <= np.finfo(_LATENTS).max).all())


def draw(
    stores: Sequence[SceneStore],
    rng: np.random.Generator,
    frames: int,
    count: int,
    *,
    dynamic_only: float = DYNAMIC_ONLY,
    dropout: float = 0.0,
    matched: bool = False,
    before: bool = False,
) -> dict[str, np.ndarray]:
    """A batch from several stores, in which every scene of each is as likely as any other.

    Args:
      stores: with clips of at least `frames` latent frames.
      rng, frames, dynamic_only, dropout, matched: see `SceneStore.pick`.
      count: examples of the batch.

    Raises:
      SceneError: there is no scene yet.
    """
    sizes = [len(store) for store in stores]
    if not sum(sizes):
        raise SceneError("there is no scene to draw from yet; wait until one was added")
    ends = np.cumsum(sizes)
    numbers = rng.integers(ends[-1], size=count)
    parts = []
    for store, end, size in zip(stores, ends, sizes, strict=True):
        mine = numbers[(numbers >= end - size) & (numbers < end)] - (end - size)
        if len(mine):
            picked = store.pick(
                rng,
                mine,
                frames,
                dynamic_only=dynamic_only,
                dropout=dropout,
                matched=matched,
                before=before,
            )
            parts.append(picked)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

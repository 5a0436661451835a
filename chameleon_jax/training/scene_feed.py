"""Scenes on their way into training: rendered in processes, encoded in a thread, drawn in threads.

    renderers (processes) -> files -> encoder (thread) -> stores -> batches (threads)

Everything runs beside the training that it feeds. What goes wrong in a thread is raised where its
scenes are waited for or drawn.

Axes: b batch, n clips, t pixel frames, f latent frames, h w pixels or latent pixels, c channels.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from chameleon_jax import sharding
from chameleon_jax.config import ConfigError
from chameleon_jax.data.captions import dynamic_share
from chameleon_jax.data.images import to_model
from chameleon_jax.data.scene_store import SceneStore, draw
from chameleon_jax.data.scenes import CLIP, LABELS, LATER, STILL, Recipe, Renderers, Scene, ready
from chameleon_jax.data.sources import latent_frames
from chameleon_jax.data.tokenizer import Tokenizer
from chameleon_jax.keys import data_rng
from chameleon_jax.models import build
from chameleon_jax.models.build import read_sizes
from chameleon_jax.training.export import stored_model
from chameleon_jax.training.networks import Network, weights_file
from chameleon_jax.training.state import Batch

log = logging.getLogger(__name__)

ENDLESS = 1 << 40  # stills, where no clips are to follow
AHEAD = 3  # batches of a kind that wait to be trained on
# cuDNN's convolutions are chosen by trying them, here where the device is; see `ahead`.
ENCODER_OPTIONS = {"xla_gpu_autotune_level": 1}


class Encoder:
    """The VAE's encoder, compiled for scenes of one kind before training keeps the device busy.

    Compiling it on a GPU that trains takes nine times as long: engines are tried out in turn with
    the steps.

    Args:
      weights: folder of the VAE's export.
      mesh: over which its parameters are copied.
    """

    def __init__(self, weights: str, mesh: Mesh):
        stored = stored_model(weights, "vae")
        if stored is None:
            raise ConfigError(
                f"weights {weights!r}: no config.json beside the VAE; expected an export of"
                " training, such as chameleon_jax/assets/runway_tiny"
            )
        self.sizes = read_sizes("vae", stored)
        network = Network(build.builder("vae", stored, dtype=jnp.float32, param_dtype=jnp.float32))
        self._place = sharding.replicated(mesh)
        self._shapes = dict(network.shapes)
        self._options = ENCODER_OPTIONS if mesh.devices.flat[0].platform == "gpu" else None
        self._params = jax.device_put(network.load(weights_file(weights, "vae")), self._place)
        self._compiled: dict[tuple[tuple[int, ...], ...], jax.stages.Compiled] = {}

        def encode(params: Any, clips: Sequence[jax.Array]) -> list[jax.Array]:
            vae = network.bind(params)
            return [vae.encode(to_model(clip)) for clip in clips]

        self._encode = jax.jit(encode, in_shardings=self._place, out_shardings=self._place)

    def __call__(self, *clips: np.ndarray) -> list[np.ndarray]:
        """Latents float32 [n, f, h, w, c] of clips uint8 [n, t, h, w, 3], each of its own length.

        A picture is a clip of one frame. Each new set of shapes is compiled.
        """
        key = tuple(clip.shape for clip in clips)
        if key not in self._compiled:
            self.compile(*key)
        return [np.asarray(z) for z in self._compiled[key](self._params, list(clips))]

    def compile(self, *shapes: tuple[int, ...]) -> None:
        """Make the program for clips of these shapes."""
        begin = time.monotonic()
        clips = [jax.ShapeDtypeStruct(shape, jnp.uint8) for shape in shapes]
        lowered = self._encode.lower(self._shapes, clips)
        self._compiled[tuple(shapes)] = lowered.compile(compiler_options=self._options)
        took = time.monotonic() - begin
        log.info("compiled the encoder for %s in %.1f s", " ".join(map(str, shapes)), took)


class SceneFeed(contextlib.AbstractContextManager):
    """Scenes that are rendered and encoded while training draws from them. A context manager.

    Args:
      config: group `scenes`, and `weights`, `tokenizer` and `seed`; see configs/sprint.py.
      length: tokens of a prompt.
      mesh: of the encoder.
      folder: for the files of the renderers.
      rendered_stills: how many stills the renderers make before the first clip; 0: none; `ENDLESS`:
        no clips at all.

    Attributes:
      stores: "still", "clip" and "later", by what they hold.
      recipe: of the scenes.
      matched: the reference wears what the video shows, see `SceneStore.pick`.
    """

    def __init__(
        self, config: ConfigDict, length: int, mesh: Mesh, folder: Path, rendered_stills: int
    ):
        scenes = config.scenes
        self._config, self._folder, self._stills = scenes, folder, rendered_stills
        self.matched = scenes.matched
        self.encoder = Encoder(config.weights, mesh)
        vae = self.encoder.sizes
        self.recipe = Recipe(
            (scenes.height, scenes.width),
            scenes.fps,
            scenes.frames,
            scenes.tops,
            scenes.world,
            vae.temporal_factor,
            vae.spatial_factor,
        )
        tokenizer = Tokenizer.from_file(config.tokenizer, length)
        grid = [side // vae.spatial_factor for side in self.recipe.size]
        frames = {STILL: 1, CLIP: scenes.frames, "later": LATER}
        self.stores = {
            name: SceneStore(
                scenes.stills if name == STILL else scenes.room,
                scenes.tops,
                (latent_frames(count, vae.temporal_factor), *grid, vae.z_dim),
                tokenizer,
            )
            for name, count in frames.items()
        }
        self._error: BaseException | None = None
        self._over, self._compiled = threading.Event(), threading.Event()

    def __enter__(self) -> SceneFeed:
        scenes = self._config
        # Stills that were made before have the first seeds: clips show other people.
        first = scenes.first if self._stills else scenes.first + scenes.stills
        self._renderers = Renderers(self._folder, self.recipe, scenes.workers, first, self._stills)
        self._thread = threading.Thread(target=self._work, name="encoder", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._over.set()
        self._renderers.__exit__(*raised)
        self._thread.join()

    def long_enough(self, frames: int) -> list[SceneStore]:
        """The stores whose clips have so many latent frames."""
        return [store for store in self.stores.values() if store.frames >= frames]

    def wait(self, frames: int, least: int) -> None:
        """Wait for the encoder, and for so many scenes with clips of so many latent frames.

        The encoder is waited for even if there are scenes enough: see `Encoder`.

        Raises:
          SceneError: nobody renders any more; or what the encoder raised.
        """
        said = 0.0
        while True:
            self.check()
            have = sum(map(len, self.long_enough(frames)))
            if have >= least and self._compiled.is_set():
                return
            if time.monotonic() > said + 10:
                said = time.monotonic()
                log.info("waiting for scenes of %d latent frames: %d of %d", frames, have, least)
            time.sleep(0.05)

    def check(self) -> None:
        """Raise what has gone wrong beside the training; see `wait`."""
        if self._error is not None:
            raise self._error
        self._renderers.check()

    def _compile(self) -> None:
        """Compile the encoder for the kinds of scenes that are rendered; rendering goes on."""
        n, picture = self._config.together * self.recipe.tops, (*self.recipe.size, 3)
        if self._stills:
            self.encoder.compile((n, 1, *picture), (n, 1, *picture))
        if self._stills != ENDLESS:
            frames = self.recipe.frames, 1, LATER
            self.encoder.compile(*((n, count, *picture) for count in frames))

    def _work(self) -> None:
        try:
            self._compile()
            self._compiled.set()
            while not self._over.is_set():
                taken = [self._take(kind) for kind in (STILL, CLIP)]
                if not any(taken):
                    time.sleep(0.1)
        except BaseException as error:  # raised again by `check`, in the thread that trains
            self._error = error

    def _take(self, kind: str) -> bool:
        """Encode some scenes of a kind, if there are enough of them."""
        paths = ready(self._folder, kind)[: self._config.together]
        if len(paths) < self._config.together:
            return False
        scenes = [Scene.read(path) for path in paths]
        for path in paths:
            path.unlink()

        def stacked(name: str) -> np.ndarray:
            return np.stack([scene.arrays[name] for scene in scenes])

        names = ["video", "garment", *(["later_video"] if kind == CLIP else [])]
        clips = [np.concatenate([scene.arrays[name] for scene in scenes]) for name in names]
        clips[1] = clips[1][:, None]
        z = [x.reshape(len(scenes), -1, *x.shape[1:]) for x in self.encoder(*clips)]
        captions = [scene.captions for scene in scenes]
        garment = z[1][:, :, 0]
        self.stores[kind].add(z[0], garment, {name: stacked(name) for name in LABELS}, captions)
        if kind == CLIP:
            cells = {name: stacked(f"later_{name}") for name in LABELS}
            self.stores["later"].add(z[2], garment, cells, captions)
        return True


class Batches(contextlib.AbstractContextManager):
    """Batches of several kinds, each drawn and placed on the devices by a thread. Ends with it.

    Args:
      feed: gives the scenes.
      kinds: by name, the config of the stage and the shapes of its batches.
      seed: of the random numbers; another one for every stage.
    """

    def __init__(
        self,
        feed: SceneFeed,
        kinds: Mapping[str, tuple[ConfigDict, Mapping[str, jax.ShapeDtypeStruct]]],
        seed: tuple[int, int],
    ):
        self._over = threading.Event()
        self._queues: dict[str, queue.Queue] = {name: queue.Queue(AHEAD) for name in kinds}
        self._threads = []
        for index, (name, (config, shapes)) in enumerate(kinds.items()):
            make = functools.partial(
                _batch, feed, config, shapes, data_rng(seed[0], "batches", seed[1], index)
            )
            thread = threading.Thread(target=self._fill, args=(name, make), daemon=True)
            self._threads.append(thread)
            thread.start()

    def __exit__(self, *raised: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def next(self, name: str) -> Batch:
        """The next batch of a kind.

        Raises:
          UserError: it cannot be drawn.
        """
        made = self._queues[name].get()
        if isinstance(made, BaseException):
            raise made
        return made

    def _fill(self, name: str, make: Callable[[], Batch]) -> None:
        while not self._over.is_set():
            try:
                made: Batch | BaseException = make()
            except BaseException as error:  # raised again by `next`, in the thread that trains
                made = error
            while not self._over.is_set():
                with contextlib.suppress(queue.Full):
                    self._queues[name].put(made, timeout=0.1)
                    break
            if isinstance(made, BaseException):
                return


def _batch(
    feed: SceneFeed,
    config: ConfigDict,
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    rng: np.random.Generator,
) -> Batch:
    """A batch of one kind, on its devices."""
    frames = shapes["z_video"].shape[1]
    found = draw(
        feed.long_enough(frames),
        rng,
        frames,
        config.data.batch,
        dynamic_only=dynamic_share(config.data.captions),
        dropout=config.data.dropout,
        matched=feed.matched,
        before="z_before" in shapes,
    )
    return {name: jax.device_put(found[name], s.sharding) for name, s in shapes.items()}

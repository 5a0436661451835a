"""How a stream makes a chunk, and what a change of garment, person or prompt does to it.

All that a stream is stands in a `StreamState`. What a change does is said in `mechanisms`, and done
here; who asks for it, and when, is the business of `session`.

Axes: b batch (always 1), t pixel frames, f latent frames, h w grid, c channels.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from chameleon_jax.attention.cache import KVCache, close_chunk, open_chunk, withdraw
from chameleon_jax.inference.mechanisms import SwitchConfig
from chameleon_jax.inference.pictures import EncodedPicture
from chameleon_jax.inference.programs import Flight
from chameleon_jax.keys import inference_key

if TYPE_CHECKING:
    from chameleon_jax.inference.pipeline import Pipeline


@dataclasses.dataclass
class StreamState:
    """All that a stream is, besides its switches. Device arrays unless said otherwise."""

    seed: int
    cache: Any
    text_kv: Any
    z_person: jax.Array  # [1, 1, h, w, c], of the picture that was given
    z_reference: jax.Array  # [1, 1, h, w, c]
    z_garment: jax.Array  # [1, 1, h, w, c]
    decoder: Any = None  # None: the next chunk starts a new clip
    chunk: int = 0  # chunks made since the start; never reset, so that no noise is drawn twice
    held: int = 0  # chunks made since the history was last withdrawn
    carried: bool = False  # while a chunk is made: the history is the chunk before, under noise
    goes_on: bool = False  # the reference is what the stream itself gave, not the person's picture
    last_frame: np.ndarray | None = None  # uint8 [h, w, 3], on the host: what was shown last
    last_chunk: jax.Array | None = None  # [1, f, h, w, c], float32
    random_frame: np.ndarray | None = None  # uint8 [h, w, 3], on the host; with that mechanism


@dataclasses.dataclass
class Timing:
    """Seconds of one chunk, host time."""

    frames: int  # frames handed out
    switch: float  # encoding pictures, refreshing the cache; next to nothing without a switch
    denoise: float  # the denoise steps; and the clean pass, if the frames wait for it
    decode: float  # VAE, conversion to uint8, copy to the host


class Chunk(NamedTuple):
    """A chunk that was made.

    Attributes:
      frames: uint8 [t, h, w, 3], those to hand out.
      timing: what took how long; None if it was not measured.
    """

    frames: np.ndarray
    timing: Timing | None


class ChunkMaker:
    """Makes the chunks of a stream.

    Args:
      pipeline: weights and programs.
      does: what a change does.
      measure: wait for the device after every stage, and say how long each took.
    """

    def __init__(self, pipeline: Pipeline, does: SwitchConfig, *, measure: bool = False):
        self._pipeline, self._does, self._measure = pipeline, does, measure
        self._media, self._stream = pipeline.media, pipeline.stream

    def make(
        self,
        state: StreamState,
        switched: Mapping[str, Any],
        shown: int,
        called_off: Callable[[], bool] | None = None,
    ) -> Chunk | None:
        """Apply changes, make a chunk, bring `state` up to date.

        Args:
          state: of the stream. Its arrays on the device are consumed, also by a call that fails.
          switched: what changes, by kind: pictures of `garment` and `reference`, encoded `prompt`.
          shown: frames handed out before.
          called_off: asked after every denoising step; see `Session.next_chunk`.

        Returns:
          The chunk; None if it was called off, with the state somewhere within it.
        """
        begin = time.perf_counter()
        repeats = self.apply(state, switched)
        applied = self._wait(state.cache)
        if called_off is None:
            latents, state.cache = self._stream.chunk(
                state.cache, state.text_kv, state.seed, state.chunk, self._history_noise(state)
            )
        else:
            flight = self._denoise(state, called_off)
            if flight is None:
                return None
            latents, _ = flight
        denoised = self._wait(latents)
        decoder, state.decoder = state.decoder, None  # donated
        decoded, state.decoder = self._media.decode(latents, decoder)
        if repeats and self._does.fade:
            decoded = self._media.fade(state.last_frame, decoded)
        frames = np.array(decoded)
        done = time.perf_counter()
        if state.carried:  # what the chunk went on from shows another garment
            self._recall(state, latents)
        elif called_off is not None:
            self._remember(state, flight)
        if repeats and self._does.drop_repeated_frame and len(frames) > 1:
            frames = frames[1:]
        self.keep_for_reference(state, latents, frames, shown)
        state.chunk += 1
        state.held = 1 if state.carried else state.held + 1
        state.carried = False
        state.last_frame = frames[-1].copy()
        if not self._measure:
            return Chunk(frames, None)
        return Chunk(
            frames, Timing(len(frames), applied - begin, denoised - applied, done - denoised)
        )

    def apply(self, state: StreamState, switched: Mapping[str, Any]) -> bool:
        """Let changes take effect on `state`.

        Returns whether the next frame repeats the pose that was shown last.
        """
        does = self._does
        if "prompt" in switched:
            state.text_kv = self._pipeline.stream_text(switched["prompt"])
        if not switched.keys() - {"prompt"}:
            if self.anchors(state):
                state.z_reference, state.goes_on = state.z_person, False
                self._refresh(state)
            return False
        if "garment" in switched:
            state.z_garment = self.encode(switched["garment"])
        z_next = None
        if "reference" in switched:
            state.z_person = state.z_reference = self.encode(switched["reference"])
            state.goes_on = False
        else:
            z_next = self._next_reference(state)
        if z_next is not None:
            state.z_reference, state.goes_on = z_next, True
        carries = does.carry and "reference" not in switched and state.last_chunk is not None
        if carries:
            state.z_reference, state.goes_on = state.z_person, False
        if does.withdraw:
            state.cache, state.held = withdraw(state.cache), 0
            state.decoder = state.decoder if carries else None
        if does.refresh:
            self._refresh(state)
        if carries:
            self._recall(state, state.last_chunk, does.carry_noise)
            state.held, state.carried = 1, True
        return does.repeats and z_next is not None

    def anchors(self, state: StreamState) -> bool:
        """Whether the person's picture comes back with the next chunk that changes no picture."""
        return self._does.anchor and state.goes_on

    def encode(self, picture: np.ndarray | EncodedPicture) -> jax.Array:
        """The latent [1, 1, h, w, c] of a picture that `data.images` prepared."""
        if isinstance(picture, EncodedPicture):
            return picture.latent
        return self._media.encode_image(picture)

    def keep_for_reference(
        self, state: StreamState, latents: jax.Array, frames: np.ndarray, shown: int
    ) -> None:
        """Keep of a new chunk what a change may go on from; before it is counted.

        Args:
          state: before the chunk.
          latents: of the chunk, [1, f, h, w, c].
          frames: of the chunk that are handed out, uint8 [t, h, w, 3].
          shown: frames handed out before.
        """
        random_frame = None
        # What was not kept from the first chunk on is no choice among all frames.
        if self._does.random_frame and (state.chunk == 0 or state.random_frame is not None):
            random_frame = _draw_frame(state, frames, shown)
        state.last_chunk, state.random_frame = latents, random_frame

    def _denoise(self, state: StreamState, called_off: Callable[[], bool]) -> Flight | None:
        """All passes of a chunk but the last; None if it was called off in between."""
        flight, state.cache = self._stream.new_flight(), open_chunk(state.cache)
        for number in range(self._stream.count_passes(state.held == 0) - 1):
            flight, state.cache = self._pass(state, flight, number)
            jax.block_until_ready(flight)
            if called_off():
                return None
        return flight

    def _remember(self, state: StreamState, flight: Flight) -> None:
        """The last pass of a chunk; nobody waits for it."""
        last = self._stream.count_passes(state.held == 0) - 1
        _, state.cache = self._pass(state, flight, last, self._history_noise(state))
        state.cache = close_chunk(state.cache)

    def _recall(self, state: StreamState, latents: jax.Array, noise: float = 0.0) -> None:
        """Remember a chunk alone, in the place of the history, under noise of some level."""
        state.cache = open_chunk(withdraw(state.cache))
        flight = latents, self._stream.new_flight()[1]
        last = self._stream.count_passes(True) - 1
        _, state.cache = self._pass(state, flight, last, noise)
        state.cache = close_chunk(state.cache)

    def _pass(
        self, state: StreamState, flight: Flight, number: int, history_noise: float = 0.0
    ) -> tuple[Flight, KVCache]:
        """One pass of the chunk that is made; only the last one knows of noise."""
        return self._stream.passes(
            state.cache,
            state.text_kv,
            state.seed,
            state.chunk,
            flight,
            number,
            number + 1,
            history_noise,
        )

    def _history_noise(self, state: StreamState) -> float:
        """Level of noise under which the chunk that is made is remembered."""
        return self._does.history_noise if self.anchors(state) else 0.0

    def _refresh(self, state: StreamState) -> None:
        """Write reference and garment into the cache."""
        state.cache = self._stream.refresh(
            state.cache, state.z_reference, state.z_garment, state.text_kv
        )

    def _next_reference(self, state: StreamState) -> jax.Array | None:
        """What the stream itself gives as the reference; None: it stays what it is."""
        does, frame = self._does, None
        if does.last_latent and state.last_chunk is not None:
            return state.last_chunk[:, -1:].astype(state.z_reference.dtype)
        if does.disentangle:
            frame = state.last_frame
        if does.random_frame:
            frame = state.random_frame
        return None if frame is None else self._media.encode_image(frame)

    def _wait(self, value: Any) -> float:
        if self._measure:
            jax.block_until_ready(value)
        return time.perf_counter()


def _draw_frame(state: StreamState, frames: np.ndarray, shown: int) -> np.ndarray:
    """One of all frames handed out, these included: a reservoir of one (Vitter 1985)."""
    key = jax.random.fold_in(
        inference_key(np.uint32(state.seed), "random_frame"), np.int32(state.chunk)
    )
    place = int(jax.random.randint(key, (), 0, shown + len(frames))) - shown
    return state.random_frame if place < 0 else frames[place].copy()

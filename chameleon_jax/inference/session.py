"""A session: what a user holds while a video streams.

    session = pipeline.session()
    session.start(person, garment, "a person walks", seed=0)
    for frames in session:                 # uint8 [t, h, w, 3]: 9 frames, then 12, 12, ...
        show(frames)
        if clicked:
            session.switch_garment(other)  # from any thread; takes effect at the next chunk

What a garment switch does is in `mechanisms`.

The state is a value: `snapshot()` gives it, a file keeps it, `restore()` continues from it with the
same bits. Random numbers are drawn from (seed, purpose, chunk number) and from nothing else.

Axes: b batch (always 1), t pixel frames, f latent frames, h w grid, c channels.
"""

from __future__ import annotations

import collections
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from chameleon_jax import __version__
from chameleon_jax.attention.cache import KVCache, close_chunk, open_chunk, withdraw
from chameleon_jax.errors import UserError
from chameleon_jax.inference.mechanisms import SwitchConfig
from chameleon_jax.inference.pictures import PREPARE, EncodedPicture
from chameleon_jax.inference.programs import Flight, stream_arguments
from chameleon_jax.inference.snapshots import (
    SNAPSHOT_VERSION,
    Snapshot,
    SnapshotError,
    fill,
    identity,
    named_leaves,
)
from chameleon_jax.keys import check_seed, inference_key

if TYPE_CHECKING:
    from chameleon_jax.inference.pipeline import Pipeline

NOT_RUNNING = (
    "no stream is running: call start() or restore() first (a chunk that failed ends the stream)"
)


class SessionError(UserError):
    """The session is not in a state for this call. The message is one line."""


@dataclasses.dataclass
class Switch:
    """A change that was asked for. Filled in when it takes effect."""

    kind: str  # garment, prompt or reference
    asked: int  # frames handed out when it was asked for
    # The first frame made with it; None while it waits, or if it was superseded.
    effective: int | None = None
    superseded: bool = False  # a later switch of the same kind came before the next chunk


@dataclasses.dataclass
class Timing:
    """Seconds of one chunk, host time; only taken by a session with `measure=True`."""

    frames: int  # frames handed out
    switch: float  # encoding pictures, refreshing the cache; next to nothing without a switch
    denoise: float  # the denoise steps; and the clean pass, if the frames wait for it
    decode: float  # VAE, conversion to uint8, copy to the host


class Session:
    """One running stream.

    `switch_*` may be called at any time from any thread and never wait for the device. The other
    methods exclude each other: one thread drives the stream.

    Args:
      pipeline: weights and config, shared between sessions.
      mechanisms: what a switch does; default those of the config's group `switch`. What
        `random_frame` needs is kept from the start of a stream that has it.
      measure: wait for the device after every stage and keep a `Timing` per chunk in `timings`.
      keep: chunks that can be taken back, see `rewind`; each costs what it overwrites of the cache,
        and a decoder's state.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        mechanisms: SwitchConfig | None = None,
        *,
        measure: bool = False,
        keep: int = 0,
    ):
        self.pipeline = pipeline
        self.mechanisms = mechanisms or SwitchConfig.of(pipeline.config)
        self.timings: list[Timing] = []
        self._measure = measure
        self._media, self._stream = pipeline.media, pipeline.stream
        self._chunk_lock = threading.RLock()  # held while a chunk is made
        self._lock = threading.Lock()  # guards what other threads touch; held for moments only
        self._state: _State | None = None
        self._frames: int | None = None  # handed out; None while no stream is running
        self._pending: dict[str, tuple[Switch, Any]] = {}
        self._switches: list[Switch] = []
        self._marks: collections.deque[_Mark] = collections.deque(maxlen=max(keep, 0))

    def __repr__(self) -> str:
        with self._lock:
            if self._frames is None:
                return "Session(no stream is running)"
            switches, waiting = len(self._switches), len(self._pending)
            return f"Session({self._frames} frames made, {switches} switches, {waiting} waiting)"

    def start(self, reference: Any, garment: Any, prompt: Any = "", seed: int = 0) -> None:
        """Begin a stream; one that was running is dropped, waiting switches with it.

        Args:
          reference: picture of the person: a path, bytes, a Pillow image or an array, of any size,
            mode and orientation; or one from `Pipeline.encode_picture`.
          garment: picture of the garment, likewise.
          prompt: text in any language, possibly empty, or encoded states [1, l, m].
          seed: in [0, 2**32).

        Raises:
          ImageError: a picture cannot be used.
          SeedError: the seed is out of range.
          SessionError: an encoded picture of another kind or size.
        """
        check_seed(int(seed))
        person, worn = self._picture("reference", reference), self._picture("garment", garment)
        with self._chunk_lock:
            self._stop()
            self.timings.clear()
            self.pipeline.compile()
            stream = self._stream
            text_kv = self.pipeline.stream_text(self.pipeline.encode_prompt(prompt))
            z_reference, z_garment = self._latent(person), self._latent(worn)
            cache = stream.refresh(stream.new_cache(), z_reference, z_garment, text_kv)
            state = _State(int(seed), cache, text_kv, z_reference, z_reference, z_garment)
            self._run(state, {}, [], frames=0)

    def __iter__(self) -> Iterator[np.ndarray]:
        """Chunks without end."""
        while True:
            yield self.next_chunk()

    def next_chunk(self, called_off: Callable[[], bool] | None = None) -> np.ndarray | None:
        """Let the waiting switches take effect, make one chunk and hand it out.

        Args:
          called_off: asked after every denoising step; True: the chunk is not wanted any more, and
            the session is as it was before this call. Needs a session with `keep`. The pass that
            remembers the chunk comes behind its decoding then, and the frames do not wait for it.

        Returns:
          Frames uint8 [t, h, w, 3]. t is 4 times the latent frames of a chunk, 3 less at the start
          of a clip, and one less again where the repeated frame is dropped. None: called off.

        Raises:
          SessionError: not started, or an earlier chunk failed; or nothing is kept to go back to;
            or `random_frame` came into `mechanisms` when the stream ran already, and what it takes
            as the reference was not kept; or the cache is too small for `carry`. Then the stream
            stays.
          PositionError: absolute positions, and the clip has become longer than they reach. The
            stream stays: a switch that withdraws the history lets it go on.
        """
        if called_off is not None and not self._marks.maxlen:
            raise SessionError("a session with keep=0 cannot call a chunk off; make it with keep=1")
        with self._chunk_lock:
            state = self._started()
            with self._lock:
                starts_clip = self.mechanisms.withdraw and self._pending.keys() - {"prompt"}
                ahead = int(self.mechanisms.carry)  # the chunk before is written once more
                self._stream.policy.check_length(ahead if starts_clip else state.held)
                if self._pending.keys() & {"garment", "reference"} == {"garment"}:
                    self._check_kept(state)
                pending, self._pending = self._pending, {}
            try:
                self._mark(state, pending)
                switched = {kind: content for kind, (_, content) in pending.items()}
                frames = self._make_chunk(state, switched, called_off)
                if frames is None:
                    self._go_back(state, [self._marks.pop()])
                    return None
            except BaseException:
                self._stop()  # the caches may have been consumed
                raise
            with self._lock:
                for switch, _ in pending.values():
                    switch.effective = self._frames
                self._frames += len(frames)
            return frames

    def rewind(self, frame: int) -> int:
        """Take back the chunks that begin at `frame` or later, as if they had not been made.

        For a player that has chunks which were not shown yet when a switch is asked for: the switch
        then need not wait for them. Frames before the first of these chunks stay as they are. What
        had been asked for, and took effect in them, waits again, unless the same kind was asked for
        since.

        Args:
          frame: frames shown so far.

        Returns:
          Frames that count as handed out now: that of the earliest chunk that can be taken back and
          begins at `frame` or later; what it was, if there is none.

        Raises:
          SessionError: not started.
        """
        with self._chunk_lock:
            state = self._started()
            taken = []
            while self._marks and self._marks[-1].frames >= frame:
                taken.append(self._marks.pop())
            self._go_back(state, taken)
            with self._lock:
                return self._frames

    def switch_garment(self, garment: Any) -> Switch:
        """Wear another garment from the next chunk on.

        Args:
          garment: picture of the garment, as in `start`.

        Returns:
          The record of this switch; `effective` is filled in when the next chunk is handed out.

        Raises:
          ImageError: the picture cannot be used; the stream goes on as it was.
          SessionError: not started; or an encoded picture of another kind or size.
        """
        return self._post("garment", self._picture("garment", garment))

    def switch_reference(self, reference: Any) -> Switch:
        """Show another person from the next chunk on.

        This picture, not the last frame, becomes the reference.

        Arguments, result and errors as for `switch_garment`.
        """
        return self._post("reference", self._picture("reference", reference))

    def switch_prompt(self, prompt: Any) -> Switch:
        """Follow another prompt from the next chunk on.

        Only the K, V of the text are computed anew.

        Args:
          prompt: as in `start`.

        Returns:
          The record of this switch.

        Raises:
          PipelineError: encoded states of another shape, or a string and no text encoder.
          SessionError: not started.
        """
        return self._post("prompt", self.pipeline.encode_prompt(prompt))

    @property
    def frames(self) -> int:
        """Frames handed out since the start."""
        with self._lock:
            if self._frames is None:
                raise SessionError(NOT_RUNNING)
            return self._frames

    @property
    def chunk(self) -> int:
        """Chunks made since the start; waits for the one in progress."""
        with self._chunk_lock:
            return self._started().chunk

    @property
    def length(self) -> int:
        """Latent frames that the cache holds; waits for the chunk in progress."""
        with self._chunk_lock:
            return int(self._started().cache.length)

    @property
    def switches(self) -> list[Switch]:
        """Every switch since the start, in the order they were asked for."""
        with self._lock:
            return [dataclasses.replace(switch) for switch in self._switches]

    def snapshot(self) -> Snapshot:
        """The whole state as a value, on the host.

        Waits for the chunk in progress. The stream is not disturbed.
        """
        with self._chunk_lock:
            state = self._started()
            with self._lock:
                pending, switches, frames = dict(self._pending), list(self._switches), self._frames
                records = [dataclasses.asdict(switch) for switch in switches]
            trees = {
                "cache": state.cache,
                "text_kv": state.text_kv,
                "decoder": state.decoder,
                "z_person": state.z_person,
                "z_reference": state.z_reference,
                "z_garment": state.z_garment,
                "last_chunk": state.last_chunk,
            }
            arrays = {name: np.array(leaf) for name, leaf in named_leaves(trees).items()}
            for name in ("last_frame", "random_frame"):
                if getattr(state, name) is not None:
                    arrays[name] = getattr(state, name)
            arrays |= {
                f"pending.{kind}": np.array(getattr(content, "pixels", content))
                for kind, (_, content) in pending.items()
            }
            number = {id(switch): index for index, switch in enumerate(switches)}
            meta = {
                "version": SNAPSHOT_VERSION,
                "package": __version__,
                "config": identity(self.pipeline.config),
                "mechanisms": dataclasses.asdict(self.mechanisms),
                "seed": state.seed,
                "chunk": state.chunk,
                "held": state.held,
                "frames": frames,
                "clip_started": state.decoder is not None,
                "last_chunk": state.last_chunk is not None,
                "goes_on": state.goes_on,
                "switches": records,
                "pending": {kind: number[id(switch)] for kind, (switch, _) in pending.items()},
            }
            return Snapshot(arrays, meta)

    def restore(self, snapshot: Snapshot) -> None:
        """Continue from a snapshot, in this process or another, with the same bits.

        Frames, switches and mechanisms are those of the snapshot. It may have been made on another
        mesh; then the stream goes on as it would have, up to rounding.

        Raises:
          SnapshotError: it was made with another model, size, cache or sampler.
        """
        meta = snapshot.meta
        theirs, ours = meta["config"], identity(self.pipeline.config)
        if theirs != ours:
            keys = sorted(
                key for key in theirs.keys() | ours.keys() if theirs.get(key) != ours.get(key)
            )
            raise SnapshotError(
                f"the snapshot was made with another config; it differs in {', '.join(keys)}"
            )
        of_media, of_stream = stream_arguments(self._media, self._stream, self.pipeline.config)
        cache, frame, _, kv = of_stream["refresh"]
        decoder = of_media["decode_next"][1] if meta["clip_started"] else None
        trees = {
            "cache": cache,
            "text_kv": kv,
            "decoder": decoder,
            "z_person": frame,
            "z_reference": frame,
            "z_garment": frame,
            "last_chunk": self._stream.new_flight()[0] if meta["last_chunk"] else None,
        }
        with self._chunk_lock:
            self._stop()  # frees the old caches before the new ones are put on the device
            self.pipeline.compile()
            trees = fill(trees, snapshot.arrays)
            switches = [Switch(**switch) for switch in meta["switches"]]
            pending = {
                kind: (switches[i], snapshot.arrays[f"pending.{kind}"])
                for kind, i in meta["pending"].items()
            }
            self.mechanisms = SwitchConfig(**meta["mechanisms"])
            self.timings.clear()
            counters = {name: meta[name] for name in ("seed", "chunk", "held", "goes_on")}
            shown = {name: snapshot.arrays.get(name) for name in ("last_frame", "random_frame")}
            state = _State(**shown, **counters, **trees)
            self._run(state, pending, switches, frames=meta["frames"])

    def _run(self, state: _State, pending: dict, switches: list[Switch], frames: int) -> None:
        self._marks.clear()
        with self._lock:
            self._state, self._frames = state, frames
            self._pending, self._switches = pending, switches

    def _stop(self) -> None:
        self._marks.clear()
        with self._lock:
            self._state, self._frames = None, None
            self._pending, self._switches = {}, []

    def _started(self) -> _State:
        if self._state is None:
            raise SessionError(NOT_RUNNING)
        return self._state

    def _picture(self, kind: str, picture: Any) -> np.ndarray | EncodedPicture:
        """A picture as it waits for its chunk: prepared, or encoded already."""
        if not isinstance(picture, EncodedPicture):
            return PREPARE[kind](picture, self.pipeline.size)
        if (picture.kind, picture.pixels.shape[:2]) != (kind, self.pipeline.size):
            raise SessionError(
                f"an encoded {picture.kind} of {picture.pixels.shape[:2]} pixels; expected a"
                f" {kind} of {self.pipeline.size}, encoded by the pipeline of this session"
            )
        return picture

    def _latent(self, picture: np.ndarray | EncodedPicture) -> jax.Array:
        if isinstance(picture, EncodedPicture):
            return picture.latent
        return self._media.encode_image(picture)

    def _post(self, kind: str, content: Any) -> Switch:
        with self._lock:
            if self._frames is None:
                raise SessionError(NOT_RUNNING)
            if kind in self._pending:
                self._pending[kind][0].superseded = True
            switch = Switch(kind, asked=self._frames)
            self._pending[kind] = (switch, content)
            self._switches.append(switch)
            return switch

    def _make_chunk(
        self,
        state: _State,
        switched: Mapping[str, Any],
        called_off: Callable[[], bool] | None,
    ) -> np.ndarray | None:
        """Apply the switches, make a chunk, bring `state` up to date.

        Returns the frames to hand out; None if the chunk was called off.
        """
        begin = time.perf_counter()
        repeats = self._apply(state, switched)
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
        shown, state.decoder = self._media.decode(latents, decoder)
        if repeats and self.mechanisms.fade:
            shown = self._media.fade(state.last_frame, shown)
        frames = np.array(shown)
        done = time.perf_counter()
        if state.carried:  # what the chunk went on from shows another garment
            self._recall(state, latents)
        elif called_off is not None:
            self._remember(state, flight)
        if repeats and self.mechanisms.drop_repeated_frame and len(frames) > 1:
            frames = frames[1:]
        self._keep_for_reference(state, latents, frames)
        state.chunk += 1
        state.held = 1 if state.carried else state.held + 1
        state.carried = False
        state.last_frame = frames[-1].copy()
        if self._measure:
            self.timings.append(
                Timing(len(frames), applied - begin, denoised - applied, done - denoised)
            )
        return frames

    def _denoise(self, state: _State, called_off: Callable[[], bool]) -> Flight | None:
        """All passes of a chunk but the last; None if it was called off in between."""
        flight, state.cache = self._stream.new_flight(), open_chunk(state.cache)
        for number in range(self._stream.count_passes(state.held == 0) - 1):
            flight, state.cache = self._pass(state, flight, number)
            jax.block_until_ready(flight)
            if called_off():
                return None
        return flight

    def _remember(self, state: _State, flight: Flight) -> None:
        """The last pass of a chunk; nobody waits for it."""
        last = self._stream.count_passes(state.held == 0) - 1
        _, state.cache = self._pass(state, flight, last, self._history_noise(state))
        state.cache = close_chunk(state.cache)

    def _recall(self, state: _State, latents: jax.Array, noise: float = 0.0) -> None:
        """Remember a chunk alone, in the place of the history, under noise of some level."""
        state.cache = open_chunk(withdraw(state.cache))
        flight = latents, self._stream.new_flight()[1]
        last = self._stream.count_passes(True) - 1
        _, state.cache = self._pass(state, flight, last, noise)
        state.cache = close_chunk(state.cache)

    def _pass(
        self, state: _State, flight: Flight, number: int, history_noise: float = 0.0
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

    def _apply(self, state: _State, switched: Mapping[str, Any]) -> bool:
        """Let switches take effect on `state`.

        Returns whether the next frame repeats the pose that was shown last.
        """
        does = self.mechanisms
        if "prompt" in switched:
            state.text_kv = self.pipeline.stream_text(switched["prompt"])
        if not switched.keys() - {"prompt"}:
            if self._anchors(state):
                state.z_reference, state.goes_on = state.z_person, False
                self._refresh(state)
            return False
        if "garment" in switched:
            state.z_garment = self._latent(switched["garment"])
        z_next = None
        if "reference" in switched:
            state.z_person = state.z_reference = self._latent(switched["reference"])
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

    def _anchors(self, state: _State) -> bool:
        """Whether the person's picture comes back with the next chunk that changes no picture."""
        return self.mechanisms.anchor and state.goes_on

    def _history_noise(self, state: _State) -> float:
        """Level of noise under which the chunk that is made is remembered."""
        return self.mechanisms.history_noise if self._anchors(state) else 0.0

    def _refresh(self, state: _State) -> None:
        """Write reference and garment into the cache."""
        state.cache = self._stream.refresh(
            state.cache, state.z_reference, state.z_garment, state.text_kv
        )

    def _next_reference(self, state: _State) -> jax.Array | None:
        """What the stream itself gives as the reference; None: it stays what it is."""
        does, frame = self.mechanisms, None
        if does.last_latent and state.last_chunk is not None:
            return state.last_chunk[:, -1:].astype(state.z_reference.dtype)
        if does.disentangle:
            frame = state.last_frame
        if does.random_frame:
            frame = state.random_frame
        return None if frame is None else self._media.encode_image(frame)

    def _keep_for_reference(self, state: _State, latents: jax.Array, frames: np.ndarray) -> None:
        """Keep of a new chunk what a change may go on from; before it is counted.

        Args:
          state: before the chunk.
          latents: of the chunk, [1, f, h, w, c].
          frames: of the chunk that are handed out, uint8 [t, h, w, 3].
        """
        random_frame = None
        # What was not kept from the first chunk on is no choice among all frames.
        if self.mechanisms.random_frame and (state.chunk == 0 or state.random_frame is not None):
            random_frame = self._draw_frame(state, frames)
        state.last_chunk, state.random_frame = latents, random_frame

    def _draw_frame(self, state: _State, frames: np.ndarray) -> np.ndarray:
        """One of all frames handed out, these included: a reservoir of one (Vitter 1985)."""
        before = self._frames
        key = jax.random.fold_in(
            inference_key(np.uint32(state.seed), "random_frame"), np.int32(state.chunk)
        )
        place = int(jax.random.randint(key, (), 0, before + len(frames))) - before
        return state.random_frame if place < 0 else frames[place].copy()

    def _check_kept(self, state: _State) -> None:
        """Refuse a switch of the garment that has nothing to go on from.

        Raises:
          SessionError: what becomes the reference was not kept, or the cache has no room for the
            chunk before beside a new one.
        """
        policy = self._stream.policy
        least = policy.context + 2 * policy.block
        if self.mechanisms.carry and policy.frames < least:
            raise SessionError(
                f"a cache of {policy.frames} frames has no room for the chunk that carry goes on"
                f" from; set cache.frames to {least} or more, or leave carry out"
            )
        if self.mechanisms.random_frame and state.chunk and state.random_frame is None:
            raise SessionError(
                "the stream ran without random_frame before, so nothing was kept for the"
                " reference; give random_frame to the session before it starts"
            )

    def _mark(self, state: _State, pending: Mapping[str, tuple[Switch, Any]]) -> None:
        """Note what the next chunk changes, so that it can be taken back."""
        if not self._marks.maxlen:
            return
        pictures = pending.keys() - {"prompt"}
        does = self.mechanisms
        refreshes = does.refresh if pictures else self._anchors(state)
        # The slots that the chunk overwrites are those behind a withdrawal, if it begins with one.
        coming = withdraw(state.cache) if pictures and does.withdraw else state.cache
        kept = [self._stream.keep(coming)]
        if does.carry and pictures:  # the chunk before is written in front of the coming one
            kept.append(self._stream.keep(close_chunk(open_chunk(coming))))
        context = self._stream.keep_context(state.cache) if refreshes else None
        decoder = jax.tree.map(jnp.copy, state.decoder)  # the next decoding consumes it
        self._marks.append(
            _Mark(
                frames=self._frames,
                before=dataclasses.replace(state, cache=None, decoder=decoder),
                counters=jax.tree.map(jnp.copy, state.cache.state),  # donated with the cache
                kept=kept,
                context=context,
                pending=dict(pending),
            )
        )

    def _restore(self, state: _State, mark: _Mark) -> None:
        """The state before the chunk of a mark; those of later chunks are restored already."""
        cache = state.cache
        for kept in mark.kept:
            cache = self._stream.put_back(cache, kept)
        if mark.context is not None:
            cache = self._stream.put_context(cache, mark.context)
        for field in dataclasses.fields(_State):
            setattr(state, field.name, getattr(mark.before, field.name))
        state.cache = cache.replace(state=mark.counters)

    def _go_back(self, state: _State, taken: Sequence[_Mark]) -> None:
        """Take back the chunks of some marks, the last one first."""
        for mark in taken:
            self._restore(state, mark)
        with self._lock:
            for mark in taken:
                for kind, (switch, _) in mark.pending.items():
                    switch.effective = None
                    switch.superseded |= kind in self._pending  # what was asked for later counts
                self._pending = mark.pending | self._pending
                self._frames = mark.frames

    def _wait(self, value: Any) -> float:
        if self._measure:
            jax.block_until_ready(value)
        return time.perf_counter()


@dataclasses.dataclass
class _State:
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


@dataclasses.dataclass(frozen=True)
class _Mark:
    """A stream before a chunk.

    Attributes:
      frames: handed out by then.
      before: all but the cache.
      counters: of the cache.
      kept: what is overwritten of the cache, chunk by chunk.
      context: the condition frames of the cache, if the chunk overwrites them.
      pending: switches that take effect in the chunk.
    """

    frames: int
    before: _State
    counters: Any
    kept: list[Any]
    context: Any
    pending: dict[str, tuple[Switch, Any]]

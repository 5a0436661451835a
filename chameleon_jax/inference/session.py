"""A session: what a user holds while a video streams.

    session = pipeline.session()
    session.start(person, garment, "a person walks", seed=0)
    for frames in session:                 # uint8 [t, h, w, 3]: 9 frames, then 12, 12, ...
        show(frames)
        if clicked:
            session.switch_garment(other)  # from any thread; takes effect at the next chunk

What a garment switch does is said in `mechanisms` and done in `chunks`; here is when it happens.

The state is a value: `snapshot()` gives it, a file keeps it, `restore()` continues from it with the
same bits. Random numbers are drawn from (seed, purpose, chunk number) and from nothing else.

Axes: b batch (always 1), t pixel frames, f latent frames, h w grid, c channels.
"""

from __future__ import annotations

import collections
import dataclasses
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from chameleon_jax import __version__
from chameleon_jax.attention.cache import close_chunk, open_chunk, withdraw
from chameleon_jax.errors import UserError
from chameleon_jax.inference.chunks import ChunkMaker, StreamState, Timing
from chameleon_jax.inference.mechanisms import SwitchConfig
from chameleon_jax.inference.pictures import PREPARE, EncodedPicture
from chameleon_jax.inference.programs import stream_arguments
from chameleon_jax.inference.snapshots import (
    SNAPSHOT_VERSION,
    Snapshot,
    SnapshotError,
    fill,
    identity,
    named_leaves,
)
from chameleon_jax.keys import check_seed

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
        self._state: StreamState | None = None
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
            z_reference, z_garment = map(self._maker.encode, (person, worn))
            cache = stream.refresh(stream.new_cache(), z_reference, z_garment, text_kv)
            state = StreamState(int(seed), cache, text_kv, z_reference, z_reference, z_garment)
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
                made = self._maker.make(state, switched, self._frames, called_off)
                if made is None:
                    self._go_back(state, [self._marks.pop()])
                    return None
            except BaseException:
                self._stop()  # the caches may have been consumed
                raise
            if made.timing is not None:
                self.timings.append(made.timing)
            with self._lock:
                for switch, _ in pending.values():
                    switch.effective = self._frames
                self._frames += len(made.frames)
            return made.frames

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
            state = StreamState(**shown, **counters, **trees)
            self._run(state, pending, switches, frames=meta["frames"])

    @property
    def _maker(self) -> ChunkMaker:
        return ChunkMaker(self.pipeline, self.mechanisms, measure=self._measure)

    def _run(self, state: StreamState, pending: dict, switches: list[Switch], frames: int) -> None:
        self._marks.clear()
        with self._lock:
            self._state, self._frames = state, frames
            self._pending, self._switches = pending, switches

    def _stop(self) -> None:
        self._marks.clear()
        with self._lock:
            self._state, self._frames = None, None
            self._pending, self._switches = {}, []

    def _started(self) -> StreamState:
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

    def _check_kept(self, state: StreamState) -> None:
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

    def _mark(self, state: StreamState, pending: Mapping[str, tuple[Switch, Any]]) -> None:
        """Note what the next chunk changes, so that it can be taken back."""
        if not self._marks.maxlen:
            return
        pictures = pending.keys() - {"prompt"}
        does = self.mechanisms
        refreshes = does.refresh if pictures else self._maker.anchors(state)
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

    def _restore(self, state: StreamState, mark: _Mark) -> None:
        """The state before the chunk of a mark; those of later chunks are restored already."""
        cache = state.cache
        for kept in mark.kept:
            cache = self._stream.put_back(cache, kept)
        if mark.context is not None:
            cache = self._stream.put_context(cache, mark.context)
        for field in dataclasses.fields(StreamState):
            setattr(state, field.name, getattr(mark.before, field.name))
        state.cache = cache.replace(state=mark.counters)

    def _go_back(self, state: StreamState, taken: Sequence[_Mark]) -> None:
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
    before: StreamState
    counters: Any
    kept: list[Any]
    context: Any
    pending: dict[str, tuple[Switch, Any]]

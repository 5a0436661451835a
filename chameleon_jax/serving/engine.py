"""The engine: one thread that owns the device, and the streams that it makes in turn.

A stream is made ahead of what is shown by at most `AHEAD` chunks, and of what was sent by as many.
So nothing piles up: a client that does not read, or does not say what it has shown, is waited for.
At a change the chunks that were not shown are taken back (`Session.rewind`) and the stream goes on
from the boundary behind the last shown frame, so that a change does not wait for a queue.

Everything that other threads call only leaves a wish or takes an event; events come through a
callback, in the engine's thread.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from chameleon_jax.inference.pipeline import Pipeline
from chameleon_jax.inference.session import Session, SwitchConfig
from chameleon_jax.serving.encoding import Encoder, Packet

log = logging.getLogger(__name__)

AHEAD = 2  # chunks that are made and not shown
MARGIN = 2  # frames behind the last shown one that a player may have handed on already
MOST_FRAMES = 200_000  # of a recording

Emit = Callable[[str, dict[str, Any], list[bytes] | None], None]


@dataclasses.dataclass(frozen=True)
class Wish:
    """What a stream starts with, or a change of it; None: as it is.

    Attributes:
      number: of the change, given back when it takes effect; None for the start.
      person, garment: pictures uint8 [h, w, 3], as `data.images` prepares them, with their names.
      prompt: text.
      mechanisms: of this and later changes.
      asked: when, in seconds of `time.perf_counter`.
    """

    number: int | None = None
    person: tuple[str, np.ndarray] | None = None
    garment: tuple[str, np.ndarray] | None = None
    prompt: str | None = None
    mechanisms: SwitchConfig | None = None
    asked: float = 0.0

    def over(self, earlier: Wish | None) -> Wish:
        """Both together; what this one says counts."""
        if earlier is None:
            return self
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return dataclasses.replace(
            earlier, **{name: value for name, value in own.items() if value is not None}
        )


class Stream:
    """One live stream. Its methods may be called from any thread.

    Args:
      name: of the stream.
      start: the first wish; person, garment and prompt are given.
      seed: of the noise.
      codec: one of `encoding.CODECS`.
      emit: called in the engine's thread with (type of a message, its values, packets).

    Attributes:
      on_end: called in the engine's thread when nothing more will come.
    """

    def __init__(self, name: str, start: Wish, seed: int, codec: str, emit: Emit):
        self.name, self.seed, self.codec, self.emit = name, seed, codec, emit
        self.start_with = start
        self.on_end: Callable[[], None] = _nothing
        self._next_emit: Emit | None = None
        self._lock = threading.Lock()
        self._wish: Wish | None = None
        self._played = self._unsent = 0
        self._paused = self._stopped = False
        # Of the engine's thread alone.
        self.session: Session | None = None
        self.encoder: Encoder | None = None
        self.worn = start.garment[0] if start.garment else ""
        self.chunks: collections.deque[tuple[int, int]] = collections.deque()  # first frame, index
        self.made = self.index = 0
        self.announced = False
        self.picture, self.fps = (0, 0), 0.0
        self.packets: list[Packet] = []  # by frame, as far as they are not taken back
        self.history: list[dict[str, Any]] = []

    def change(self, wish: Wish) -> None:
        """Ask for a change; it joins one that waits."""
        with self._lock:
            self._wish = wish.over(self._wish)

    def played(self, frame: int) -> None:
        """Frames shown so far; never fewer than before."""
        with self._lock:
            self._played = max(self._played, frame)

    def sent(self) -> None:
        """A chunk is on its way to the client."""
        with self._lock:
            self._unsent = max(0, self._unsent - 1)

    def pause(self, paused: bool) -> None:
        with self._lock:
            self._paused = paused

    def stop(self) -> None:
        with self._lock:
            self._stopped = True

    def come_back(self, emit: Emit) -> None:
        """Go on for a client that was cut off: from the last frame it showed, with a key frame.

        A chunk that is being made now still goes to the old connection.
        """
        with self._lock:
            self._next_emit, self._paused, self._unsent = emit, False, 0
            self._wish = self._wish or Wish()

    @property
    def shown(self) -> list[Packet]:
        """The packets of the frames that were shown."""
        with self._lock:
            return self.packets[: self._played]

    @property
    def film(self) -> tuple[tuple[int, int], float]:
        """(height, width) of the encoded pictures, and frames per second."""
        return self.picture, self.fps

    @property
    def stopped(self) -> bool:
        with self._lock:
            return self._stopped

    def take(self) -> tuple[Wish | None, int, int]:
        """The wish that waits, which then does not wait any more, frames shown, and the first that
        may be taken back: who comes back has nothing behind the last shown one for sure."""
        back = self.connect()
        with self._lock:
            wish, self._wish = self._wish, None
            margin = MARGIN if self._played and not back else 0
            return wish, self._played, self._played + margin

    def connect(self) -> bool:
        """Talk to who has come back from now on; False if nobody has."""
        with self._lock:
            if self._next_emit is None:
                return False
            self.emit, self._next_emit, self.announced = self._next_emit, None, False
            self._unsent = 0
            return True

    def hand_out(self, header: dict[str, Any], packets: list[bytes]) -> None:
        """Emit a chunk, which waits until `sent` is called."""
        with self._lock:
            self._unsent += 1
        self.emit("video.chunk", header, packets)

    def hungry(self) -> bool:
        """Whether a chunk is to be made now."""
        with self._lock:
            if self._stopped or self._unsent >= AHEAD or (self._paused and self._wish is None):
                return False
            waiting = sum(first >= self._played for first, _ in self.chunks)
            return self._wish is not None or waiting < AHEAD


class Engine:
    """Makes the chunks of all streams, in turn, in a thread of its own.

    Args:
      pipeline: the model.

    Attributes:
      ready: set once everything is compiled.
      failed: why it could not be compiled.
      figures: what was counted since the start, by name.
    """

    def __init__(self, pipeline: Pipeline):
        self.pipeline = pipeline
        self.ready = threading.Event()
        self.failed: BaseException | None = None
        self.figures = collections.Counter()
        self._streams: list[Stream] = []
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Compile, then make what is asked for."""
        self._thread.start()

    def close(self, timeout: float = 30.0) -> None:
        """Stop all streams and wait for the chunk in progress."""
        with self._wake:
            self._closing = True
            for stream in self._streams:
                stream.stop()
            self._wake.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout)

    def add(self, stream: Stream) -> None:
        """Make this stream, too."""
        with self._wake:
            self._streams.append(stream)
            self._wake.notify_all()

    def wake(self) -> None:
        """Look again whether something is to be done; call it after a stream was told something."""
        with self._wake:
            self._wake.notify_all()

    @property
    def streams(self) -> int:
        """Streams that are being made."""
        with self._wake:
            return len(self._streams)

    def _run(self) -> None:
        try:
            seconds = self.pipeline.compile()
            self._warm_up()
            log.info("compiled %d programs", len(seconds))
        except BaseException as error:  # told to those who ask whether the server is ready
            self.failed = error
            log.exception("the model cannot be compiled")
        else:
            self.ready.set()
        turn = 0
        while True:
            with self._wake:
                while not self._closing and not any(map(self._to_do, self._streams)):
                    self._wake.wait(timeout=1.0)
                streams = list(self._streams)
                if self._closing and not streams:
                    return
            turn += 1
            for stream in streams[turn % len(streams) :] + streams[: turn % len(streams)]:
                if self.failed is not None:
                    self._refuse(stream)
                elif stream.stopped:
                    self._end(stream)
                elif stream.hungry():
                    self._guarded(stream)
                    break

    def _to_do(self, stream: Stream) -> bool:
        return self.failed is not None or stream.stopped or stream.hungry()

    def _warm_up(self) -> None:
        """Do once what a stream does, so that no viewer waits for a compiler."""
        blank = np.full((*self.pipeline.size, 3), 200, np.uint8)
        session = self.pipeline.session(keep=AHEAD + 1)
        session.start(blank, blank)
        for _ in range(2):
            session.next_chunk()
        session.switch_garment(blank)
        session.next_chunk()
        session.rewind(0)

    def _guarded(self, stream: Stream) -> None:
        """Make a chunk; a fault ends this stream and no other."""
        try:
            self._advance(stream)
        except Exception as error:
            log.exception("stream %s failed", stream.name)
            self.figures["failed"] += 1
            stream.connect()
            stream.emit("session.error", {"code": "failed", "message": _public(error)}, None)
            stream.stop()
            self._end(stream)

    def _refuse(self, stream: Stream) -> None:
        """End a stream that can never begin."""
        said = {"code": "failed", "message": "the model cannot be compiled; the log says why"}
        stream.connect()
        stream.emit("session.error", said, None)
        stream.stop()
        self._end(stream)

    def _end(self, stream: Stream) -> None:
        with self._wake:
            if stream in self._streams:
                self._streams.remove(stream)
        stream.session = stream.encoder = None
        stream.connect()
        stream.emit("session.done", {"frames": stream.made}, None)
        stream.on_end()

    def _advance(self, stream: Stream) -> None:
        """Apply what is wished, make one chunk, and hand it out."""
        if stream.session is None:
            self._open(stream)
        wish, played, free = stream.take()
        while stream.chunks and stream.chunks[0][0] < played:
            stream.chunks.popleft()
        if wish is not None:
            self._apply(stream, wish, free)
        begin = time.perf_counter()
        first = stream.session.frames
        frames = stream.session.next_chunk()
        made = time.perf_counter()
        packets = stream.encoder.encode(frames, key=wish is not None)
        encoded = time.perf_counter()
        stream.made = first + len(frames)
        stream.chunks.append((first, stream.index))
        if len(stream.packets) < MOST_FRAMES:
            stream.packets += packets
        self.figures["chunks"] += 1
        self.figures["frames"] += len(frames)
        if not stream.announced:
            height, width = stream.encoder.size
            start = {"codec": stream.encoder.name, "width": width, "height": height}
            stream.emit("video.start", start | {"fps": stream.fps, "first_frame": first}, None)
            stream.announced = True
        if wish is not None and wish.number is not None:
            waited, took = 1000 * (begin - wish.asked), 1000 * (made - begin)
            applied = {"id": wish.number, "first_frame": first}
            stream.emit("session.applied", applied | {"waited_ms": waited, "made_ms": took}, None)
            stream.history.append(_noted(wish, first))
        header = {
            "index": stream.index,
            "first_frame": first,
            "frames": len(frames),
            "key": packets[0].key,
            "garment": stream.worn,
            "made_ms": 1000 * (made - begin),
            "encoded_ms": 1000 * (encoded - made),
        }
        stream.hand_out(header, [packet.data for packet in packets])
        stream.index += 1

    def _open(self, stream: Stream) -> None:
        start = stream.start_with
        stream.session = self.pipeline.session(start.mechanisms, keep=AHEAD + 1)
        stream.encoder = Encoder(stream.codec, self.pipeline.size, self.pipeline.config.video.fps)
        stream.picture, stream.fps = stream.encoder.size, float(self.pipeline.config.video.fps)
        stream.session.start(start.person[1], start.garment[1], start.prompt or "", stream.seed)
        stream.history.append(_noted(start, 0))

    def _apply(self, stream: Stream, wish: Wish, free: int) -> None:
        """Take back what was made from frame `free` on, and post the change."""
        session = stream.session
        frame = session.rewind(free)
        if frame < stream.made:
            self.figures["taken_back"] += stream.made - frame
            stream.made = frame
            del stream.packets[frame:]
            while stream.chunks and stream.chunks[-1][0] >= frame:
                stream.chunks.pop()
            stream.emit("session.flush", {"from_frame": frame}, None)
        if wish.mechanisms is not None:
            session.mechanisms = wish.mechanisms
        if wish.person is not None:
            session.switch_reference(wish.person[1])
        if wish.garment is not None:
            session.switch_garment(wish.garment[1])
            stream.worn = wish.garment[0]
        if wish.prompt is not None:
            session.switch_prompt(wish.prompt)
        self.figures["changes"] += 1


def _nothing() -> None:
    pass


def _noted(wish: Wish, frame: int) -> Mapping[str, Any]:
    """A wish as the manifest of a recording says it."""
    found: dict[str, Any] = {"frame": frame}
    for name in ("person", "garment"):
        if getattr(wish, name) is not None:
            found[name] = getattr(wish, name)[0]
    if wish.prompt is not None:
        found["prompt"] = wish.prompt
    if wish.mechanisms is not None:
        found["mechanisms"] = dataclasses.asdict(wish.mechanisms)
    return found


def _public(error: Exception) -> str:
    """What a client is told about an error: its kind, never paths or pictures."""
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return "the device has no memory left for this stream; start it again"
    return f"the stream failed ({type(error).__name__}); start it again"

"""The engine: one thread that owns the device, and the streams that it makes in turn.

A stream is made ahead of what is shown by at most `AHEAD` chunks, and of what was sent by as many.
So nothing piles up: a client that does not read, or does not say what it has shown, is waited for.
At a change the chunks that were not shown are taken back (`Session.rewind`) and the stream goes on
from the boundary behind the last shown frame, so that a change does not wait for a queue.

A stream can also be given changes for frames to come: so a stream is made again, exactly, from what
was noted about it.

Everything that other threads call only leaves a wish or takes an event; events come through a
callback, in the engine's thread.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from chameleon_jax.inference.mechanisms import SwitchConfig
from chameleon_jax.inference.pictures import EncodedPicture
from chameleon_jax.inference.pipeline import Pipeline
from chameleon_jax.inference.session import Session
from chameleon_jax.serving.encoding import Encoder
from chameleon_jax.serving.recording import Recording

log = logging.getLogger(__name__)

AHEAD = 2  # chunks that are made and not shown
MARGIN = 2  # frames that a client shows while it is not known yet, unless it says `hold`
ENCODED = 200  # pictures that are kept encoded
PLANNED = 1000  # changes for frames to come, of one stream
KINDS = {"person": "reference", "garment": "garment"}  # what a session calls them

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
      at: the frame from which on it counts; None: as soon as possible.
      hold: the client shows nothing of the chunks that begin at this frame or later before it is
        answered, so that they can be taken back; None: it goes on showing what it has.
    """

    number: int | None = None
    person: tuple[str, np.ndarray] | None = None
    garment: tuple[str, np.ndarray] | None = None
    prompt: str | None = None
    mechanisms: SwitchConfig | None = None
    asked: float = 0.0
    at: int | None = None
    hold: int | None = None

    def begins(self, played: int) -> int:
        """The first frame that it may change, if so many were shown."""
        if self.hold is not None:
            return max(self.hold, played)
        return played + MARGIN if played else 0

    def over(self, earlier: Wish | None) -> Wish:
        """Both together; what this one says counts."""
        if earlier is None:
            return self
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if None not in (self.hold, earlier.hold):
            own["hold"] = min(self.hold, earlier.hold)
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
      paused: make nothing before `pause(False)`.
      emit: called in the engine's thread with (type of a message, its values, packets).

    Attributes:
      on_end: called in the engine's thread when nothing more will come.
    """

    def __init__(
        self, name: str, start: Wish, seed: int, codec: str, emit: Emit, paused: bool = False
    ):
        self.name, self.seed, self.codec, self.emit = name, seed, codec, emit
        self.start_with = start
        self.on_end: Callable[[], None] = _nothing
        self._next_emit: Emit | None = None
        self._lock = threading.Lock()
        self._wish: Wish | None = None
        self._plan: list[Wish] = []  # by frame
        # Numbers of the last changes that were asked for; those of earlier connections.
        self._told: collections.deque[int] = collections.deque(maxlen=PLANNED)
        self._told_before: frozenset[int] = frozenset()
        self._played = self._unsent = 0
        self._paused, self._stopped = paused, False
        # Of the engine's thread alone.
        self.session: Session | None = None
        self.encoder: Encoder | None = None
        self.worn = start.garment[0] if start.garment else ""
        self.chunks: collections.deque[tuple[int, int]] = collections.deque()  # first frame, index
        self.made = self.index = 0
        self.announced = self.called_off = False
        self.picture, self.fps = (0, 0), 0.0
        self.recording = Recording()
        self.history: list[dict[str, Any]] = []  # what took effect, and from which frame on
        # Changes in chunks that may be taken back, with their first frames; changes that were.
        self.in_effect: list[tuple[int, Wish]] = []
        self.taken_back: list[Wish] = []
        self.pictures: dict[str, np.ndarray] = {}  # in the history, by name

    def change(self, wish: Wish) -> bool:
        """Ask for a change; it joins one that waits.

        One that was asked for through an earlier connection is not made again: a client that was
        cut off does not know whether it was heard.

        Returns:
          False: it is for a frame that is there already, or too many wait.
        """
        with self._lock:
            if wish.number is not None and wish.number in self._told_before:
                return True
            done = self._add(wish)
            if done and wish.number is not None:
                self._told.append(wish.number)
            return done

    def _add(self, wish: Wish) -> bool:
        """`change`, under the lock."""
        if wish.at is None:
            self._wish = wish.over(self._wish)
            self._plan.clear()  # who chooses now has another film in mind
            return True
        if wish.at < max(self.made, 1) or len(self._plan) >= PLANNED:
            return False
        self._plan = sorted([*self._plan, wish], key=lambda one: one.at)
        return True

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

    def come_back(self, emit: Emit, hold: int | None = None, paused: bool = False) -> None:
        """Go on for a client that was cut off, with a key frame.

        A chunk that is being made now still goes to the old connection.

        Args:
          emit: talks to the client from now on.
          hold: as in `Wish`; None: it goes on behind the last frame that it is known to have shown.
          paused: make no more than the next chunk before `pause(False)`.
        """
        with self._lock:
            self._next_emit, self._paused, self._unsent = emit, paused, 0
            self._told_before = frozenset(self._told)
            waits = self._wish or Wish()
            self._wish = Wish(asked=waits.asked, hold=hold).over(waits)

    @property
    def shown(self) -> Recording:
        """The recording, with all that was shown by now."""
        with self._lock:
            self.recording.shown(self._played)
        return self.recording

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
            if wish is None or (back and wish.hold is None):
                return wish, self._played, self._played
            return wish, self._played, wish.begins(self._played)

    def wish_again(self, wish: Wish | None) -> None:
        """What was to take effect in a chunk that was called off."""
        if wish is not None:
            with self._lock:
                self._wish = wish if self._wish is None else self._wish.over(wish)

    def unwanted(self, first: int) -> bool:
        """Whether a chunk that begins at a frame would be taken back, or never be seen."""
        with self._lock:
            if self._stopped:
                return True
            if self.called_off:  # never twice in a row: who changes all the time sees something
                return False
            return self._wish is not None and first >= self._wish.begins(self._played)

    def due(self) -> Wish | None:
        """What is planned for the frame that is made next."""
        with self._lock:
            wish = None
            while self._plan and self._plan[0].at <= self.made:
                wish = self._plan.pop(0).over(wish)
            return wish

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

    @property
    def waits(self) -> bool:
        """Whether a viewer waits for a change."""
        with self._lock:
            return self._wish is not None

    def note(self, wish: Wish, frame: int) -> None:
        """A wish took effect at a frame."""
        for picture in (wish.person, wish.garment):
            if picture is not None:
                self.pictures[picture[0]] = picture[1]
        self.history.append(_noted(wish, frame))

    def hungry(self) -> bool:
        """Whether a chunk is to be made now."""
        with self._lock:
            if self._stopped or self._unsent >= AHEAD or (self._paused and self._wish is None):
                return False
            waiting = sum(first >= self._played for first, _ in self.chunks)
            return self._wish is not None or waiting < AHEAD


class Engine:
    """Makes the chunks of all streams, in turn, in a thread of its own.

    Pictures that are told to `prepare` are encoded between chunks, so that a change to one of them
    costs no encoding.

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
        self._encoded: collections.OrderedDict[str, EncodedPicture] = collections.OrderedDict()
        self._to_encode: dict[str, tuple[str, np.ndarray]] = {}
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
        """Make this stream, too; a server that stops ends it at once."""
        with self._wake:
            closing = self._closing
            if not closing:
                self._streams.append(stream)
                self._wake.notify_all()
        if closing:
            self._end(stream)

    def prepare(self, name: str, kind: str, pixels: np.ndarray) -> None:
        """Encode a picture when there is time; `kind` is one of `KINDS`."""
        with self._wake:
            if name not in self._encoded and len(self._to_encode) < ENCODED:
                self._to_encode[name] = (KINDS[kind], pixels)
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
            seconds = self.pipeline.compile(whole_chunks=False)
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
                while not (
                    self._closing or self._to_encode or any(map(self._to_do, self._streams))
                ):
                    self._wake.wait(timeout=1.0)
                streams = list(self._streams)
                if self._closing and not streams:
                    return
            if not any(stream.waits and stream.hungry() for stream in streams):
                self._encode_one()
            turn += 1
            if not streams:
                continue
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
            session.next_chunk(lambda: False)
        session.switch_garment(blank)
        session.next_chunk(lambda: False)
        session.rewind(0)

    def _encode_one(self) -> None:
        """Encode one of the pictures that wait for it."""
        with self._wake:
            if not self._to_encode:
                return
            name = next(iter(self._to_encode))
            kind, pixels = self._to_encode.pop(name)
        try:
            self._encoded[name] = self.pipeline.encode_picture(kind, pixels)
        except Exception:  # a change to it will encode it, and say why it cannot
            log.exception("a picture cannot be encoded ahead")
        while len(self._encoded) > ENCODED:
            self._encoded.popitem(last=False)

    def _best(self, picture: tuple[str, np.ndarray]) -> Any:
        """A picture for a session: encoded, if it is."""
        name, pixels = picture
        if name not in self._encoded:
            return pixels
        self._encoded.move_to_end(name)
        return self._encoded[name]

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
        stream.in_effect = [(first, one) for first, one in stream.in_effect if first >= played]
        stream.recording.shown(played)
        if wish is not None:
            self._rewind(stream, free)
        else:
            wish = stream.due()
        if wish is not None:
            self._apply(stream, wish)
        begin = time.perf_counter()
        first = stream.session.frames
        frames = stream.session.next_chunk(lambda: stream.unwanted(first))
        stream.called_off = frames is None
        if frames is None:
            self.figures["called_off"] += 1
            stream.wish_again(wish)
            return
        made = time.perf_counter()
        packets = stream.encoder.encode(frames, key=wish is not None)
        encoded = time.perf_counter()
        stream.made = first + len(frames)
        stream.chunks.append((first, stream.index))
        stream.recording.add(packets)
        timing = stream.session.timings.pop()
        stream.session.timings.clear()
        opening = not stream.announced
        self.figures["chunks"] += 1
        self.figures["frames"] += len(frames)
        if opening:
            height, width = stream.encoder.size
            start = {"codec": stream.encoder.name, "width": width, "height": height}
            start["format"] = stream.encoder.codec
            stream.emit("video.start", start | {"fps": stream.fps, "first_frame": first}, None)
            stream.announced = True
        changes, stream.taken_back = stream.taken_back, []
        if wish is not None and wish.number is not None:
            changes = [wish]  # with those that were taken back in it
            stream.note(wish, first)
        for change in changes:
            applied = {
                "id": change.number,
                "first_frame": first,
                "waited_ms": 1000 * (begin - change.asked),
                "refresh_ms": 1000 * timing.switch,
                "made_ms": 1000 * (made - begin),
            }
            stream.emit("session.applied", applied, None)
            stream.in_effect.append((first, change))
        header = {
            "index": stream.index,
            "first_frame": first,
            "frames": len(frames),
            "key": packets[0].key,
            "garment": stream.worn,
            "made_ms": 1000 * (made - begin),
            "encoded_ms": 1000 * (encoded - made),
        }
        stream.hand_out(header, stream.encoder.wire(first, packets, opening))
        stream.index += 1

    def _open(self, stream: Stream) -> None:
        start = stream.start_with
        stream.session = self.pipeline.session(start.mechanisms, measure=True, keep=AHEAD + 1)
        stream.encoder = Encoder(stream.codec, self.pipeline.size, self.pipeline.config.video.fps)
        stream.picture, stream.fps = stream.encoder.size, float(self.pipeline.config.video.fps)
        stream.session.start(
            self._best(start.person), self._best(start.garment), start.prompt or "", stream.seed
        )
        stream.note(start, 0)

    def _rewind(self, stream: Stream, frame: int) -> None:
        """Take back the chunks that begin at a frame or later."""
        frame = stream.session.rewind(frame)
        if frame == stream.made:
            return
        self.figures["taken_back"] += stream.made - frame
        stream.made = frame
        stream.recording.take_back(frame)
        while stream.chunks and stream.chunks[-1][0] >= frame:
            stream.chunks.pop()
        for change in stream.history:  # those that had been applied in them wait again
            change["frame"] = min(change["frame"], frame)
        stream.taken_back += [change for first, change in stream.in_effect if first >= frame]
        stream.in_effect = [(first, one) for first, one in stream.in_effect if first < frame]
        stream.emit("session.flush", {"from_frame": frame}, None)

    def _apply(self, stream: Stream, wish: Wish) -> None:
        """Post a change."""
        session = stream.session
        if wish.mechanisms is not None:
            session.mechanisms = wish.mechanisms
        if wish.person is not None:
            session.switch_reference(self._best(wish.person))
        if wish.garment is not None:
            session.switch_garment(self._best(wish.garment))
            stream.worn = wish.garment[0]
        if wish.prompt is not None:
            session.switch_prompt(wish.prompt)
        self.figures["changes"] += 1


def _nothing() -> None:
    pass


def _noted(wish: Wish, frame: int) -> dict[str, Any]:
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

"""The server: pages, pictures and streams over HTTP and WebSocket.

`make_app` puts an engine, a wardrobe and a guard behind one ASGI app (Starlette). asyncio owns the
sockets; the engine's thread hands over messages, of which at most a few wait, because it makes no
chunk that nobody has room for (see `engine`).

Needs the extra `serve`.
"""

from __future__ import annotations

import asyncio
import base64
import collections
import contextlib
import dataclasses
import json
import logging
import os
import secrets
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from chameleon_jax import __version__
from chameleon_jax.errors import UserError
from chameleon_jax.inference.mechanisms import SwitchConfig
from chameleon_jax.serving import films, protocol
from chameleon_jax.serving.encoding import EncodingError
from chameleon_jax.serving.engine import Engine, Stream, Wish
from chameleon_jax.serving.guard import Guard, GuardMiddleware, Rate, bearer
from chameleon_jax.serving.pictures import MAX_BYTES, PictureError, Wardrobe
from chameleon_jax.serving.protocol import ProtocolError, pack, read_message, write_message

log = logging.getLogger(__name__)

PAGE = Path(__file__).parent / "page"
RECONNECT = 10.0  # seconds that a stream waits for a client that was cut off
IDLE = 120.0  # seconds without a word from a client
HELLO = 15.0  # seconds until the first message
KEPT = 20  # streams that have ended, whose films can be downloaded
OPENED = 2  # uploads that are opened at a time
WORDS = 500  # messages of one client in `WINDOW` seconds; the page sends fifty
WINDOW = 5.0
GOING_AWAY = 1001  # the code with which a browser closes when its page is left
UNREAD = 200  # messages that wait for a client
CLOSING = 5.0  # seconds for the last word to one who may not read


@dataclasses.dataclass
class Limits:
    """What one server takes on."""

    sessions: int = 1  # streams at a time
    queue: int = 20  # that wait for one
    starts: Rate = dataclasses.field(default_factory=lambda: Rate(60, 60.0))
    uploads: Rate = dataclasses.field(default_factory=lambda: Rate(30, 60.0))


class Live:
    """The streams of a server and who waits for one.

    Args:
      engine: makes them.
      wardrobe: pictures.
      guard: knows the token.
      limits: see `Limits`.
      record: folder in which the film of every stream is kept, or None.

    Attributes:
      draining: whether the server is about to stop: nothing new begins.
    """

    def __init__(
        self,
        engine: Engine,
        wardrobe: Wardrobe,
        guard: Guard,
        limits: Limits,
        record: Path | None = None,
    ):
        self.engine, self.wardrobe, self.guard, self.limits = engine, wardrobe, guard, limits
        self.record, self.draining = record, False
        self.uploading = asyncio.Semaphore(OPENED)
        self._saving: set[asyncio.Task] = set()
        self.active: dict[str, Stream] = {}
        self.finished: dict[str, Stream] = {}
        self.waiting: list[asyncio.Event] = []
        self.left: dict[str, asyncio.TimerHandle] = {}
        self.outboxes: dict[str, asyncio.Queue] = {}  # by which a stream talks to its client

    async def slot(self, tell: Any) -> bool:
        """Wait until a stream may begin; False if too many wait already, or the server stops."""
        if len(self.active) < self.limits.sessions and not self.waiting:
            return True
        if len(self.waiting) >= self.limits.queue:
            return False
        turn = asyncio.Event()
        self.waiting.append(turn)
        try:
            while len(self.active) >= self.limits.sessions or self.waiting[0] is not turn:
                await tell("session.queued", position=self.waiting.index(turn) + 1)
                turn.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(turn.wait(), 5.0)
                if self.draining:
                    return False
            return True
        finally:
            self.waiting.remove(turn)
            self._next()

    async def take(self, stream: Stream, tell: Any) -> bool:
        """Wait for a slot and begin; False if too many wait already."""
        if not await self.slot(tell):
            return False
        self.begin(stream)
        return True

    def begin(self, stream: Stream) -> None:
        """Take a slot and make the stream."""
        loop = asyncio.get_running_loop()

        def on_end() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server ends
                loop.call_soon_threadsafe(self.ended, stream)

        stream.on_end = on_end
        self.active[stream.name] = stream
        self.engine.add(stream)

    def ended(self, stream: Stream) -> None:
        """The engine has let go of a stream."""
        self.outboxes.pop(stream.name, None)
        if self.active.pop(stream.name, None) is not None:
            self.finished[stream.name] = stream
            while len(self.finished) > KEPT:
                self.finished.pop(next(iter(self.finished))).recording.close()
            if self.record is not None:
                task = asyncio.create_task(asyncio.to_thread(self._save, stream))
                self._saving.add(task)
                task.add_done_callback(self._saving.discard)
        self._next()

    def _save(self, stream: Stream) -> None:
        try:
            films.save(stream, self.engine.pipeline.config, self.record)
        except (OSError, EncodingError) as error:
            log.error("the film of stream %s is lost: %s", stream.name, error)

    def drain(self) -> None:
        """Begin nothing new and end all streams; their films are complete."""
        self.draining = True
        for stream in list(self.active.values()):
            stream.stop()
        self.engine.wake()
        self._next()

    async def drained(self) -> None:
        """Wait until all streams have ended and their films are kept."""
        while self.active or self._saving:
            await asyncio.sleep(0.02)

    async def close(self) -> None:
        """End everything."""
        self.drain()
        await asyncio.to_thread(self.engine.close)
        for stream in list(self.active.values()):  # those that the engine did not come to
            self.ended(stream)
        await asyncio.gather(*self._saving)
        for stream in self.finished.values():
            stream.recording.close()

    def _next(self) -> None:
        for turn in self.waiting:
            turn.set()

    def leave(self, stream: Stream) -> None:
        """A client was cut off: its stream waits a moment, paused."""
        stream.pause(True)
        loop = asyncio.get_running_loop()
        self.left[stream.name] = loop.call_later(RECONNECT, self._give_up, stream)

    def _give_up(self, stream: Stream) -> None:
        self.left.pop(stream.name, None)
        stream.stop()
        self.engine.wake()

    def back(self, name: str) -> Stream | None:
        """The stream of a client that has come back in time.

        Its old connection may still stand, for a network that is gone says nothing; it is left.
        """
        stream = self.active.get(name)
        if stream is None or stream.stopped:
            return None
        timer = self.left.pop(name, None)
        if timer is not None:
            timer.cancel()
        if (outbox := self.outboxes.pop(name, None)) is not None:
            outbox.put_nowait(None)
        return stream


def make_app(
    engine: Engine,
    wardrobe: Wardrobe,
    guard: Guard,
    limits: Limits | None = None,
    record: Path | None = None,
) -> Starlette:
    """The ASGI app; starting it starts the engine. Arguments as for `Live`, which is its
    `state.live`.
    """
    live = Live(engine, wardrobe, guard, limits or Limits(), record)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        for picture in wardrobe.listed():
            engine.prepare(picture.name, picture.kind, picture.pixels)
        engine.start()
        yield
        await live.close()

    routes = [
        Route("/healthz", _health),
        Route("/readyz", _ready),
        Route("/metrics", _metrics),
        Route("/api/wardrobe", _wardrobe),
        Route("/api/schema.json", _schema),
        Route("/api/pictures/{kind}", _upload, methods=["PUT"]),
        Route("/api/streams/{name}/recording.mp4", _recording),
        Route("/api/streams/{name}/manifest.json", _manifest),
        WebSocketRoute("/api/stream", _stream),
        Mount("/", StaticFiles(directory=PAGE, html=True)),
    ]
    app = Starlette(
        routes=routes,
        lifespan=lifespan,
        middleware=[Middleware(GuardMiddleware, guard=guard)],
        exception_handlers={UserError: _user_error},
    )
    app.state.live = live
    return app


def _live(request: Any) -> Live:
    return request.app.state.live


def _error(status: int, code: str, message: str) -> JSONResponse:
    return JSONResponse({"code": code, "message": message}, status)


async def _user_error(request: Request, error: Exception) -> JSONResponse:
    return _error(400, "refused", str(error))


def _unknown(request: Request) -> Response | None:
    """A refusal for a request without the token."""
    if _live(request).guard.knows(bearer(request.headers.get("authorization"))):
        return None
    return _error(401, "token", "expected the token as `Authorization: Bearer TOKEN`")


async def _health(request: Request) -> Response:
    return PlainTextResponse("ok")


async def _ready(request: Request) -> Response:
    live = _live(request)
    engine = live.engine
    if live.draining:
        return _error(503, "stopping", "the server stops")
    if engine.failed is not None:
        return _error(500, "failed", "the model cannot be compiled; the log says why")
    if not engine.ready.is_set():
        return _error(503, "compiling", "the model is being compiled")
    config = engine.pipeline.config
    does = [word for word in protocol.MECHANISMS if config.switch.get(word, False)]
    return JSONResponse({"version": __version__, "model": config.name, "mechanisms": does})


async def _metrics(request: Request) -> Response:
    live = _live(request)
    figures = {
        "chameleon_streams": ("gauge", len(live.active)),
        "chameleon_waiting": ("gauge", len(live.waiting)),
        "chameleon_ready": ("gauge", int(live.engine.ready.is_set())),
    }
    for name in ("chunks", "frames", "taken_back", "called_off", "changes", "failed"):
        figures[f"chameleon_{name}_total"] = ("counter", live.engine.figures[name])
    lines = []
    for name, (kind, value) in figures.items():
        lines += [f"# TYPE {name} {kind}", f"{name} {value}"]
    return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")


async def _schema(request: Request) -> Response:
    return JSONResponse(protocol.schema())


async def _wardrobe(request: Request) -> Response:
    if refusal := _unknown(request):
        return refusal
    return JSONResponse([_described(picture) for picture in _live(request).wardrobe.listed()])


def _described(picture: Any) -> dict[str, str]:
    data = base64.b64encode(picture.thumbnail).decode()
    return {
        "name": picture.name,
        "kind": picture.kind,
        "title": picture.title,
        "thumbnail": f"data:image/png;base64,{data}",
    }


async def _upload(request: Request) -> Response:
    if refusal := _unknown(request):
        return refusal
    live = _live(request)
    if not live.limits.uploads.allows(_address(request)):
        return _error(429, "rate", "too many pictures in a minute; wait a little")
    data = bytearray()
    try:
        async for part in request.stream():
            data += part
            if len(data) > MAX_BYTES:
                return _error(413, "size", f"the picture has more than {MAX_BYTES // 1_000_000} MB")
    except ClientDisconnect:
        return _error(400, "left", "the picture is not complete")
    try:
        async with live.uploading:  # each is opened in a process of its own
            picture = await asyncio.to_thread(
                live.wardrobe.add_upload, request.path_params["kind"], bytes(data)
            )
    except PictureError as error:
        return _error(415, "picture", str(error))
    live.engine.prepare(picture.name, picture.kind, picture.pixels)
    return JSONResponse(_described(picture))


def _found(request: Request) -> Stream | None:
    live, name = _live(request), request.path_params["name"]
    return live.active.get(name) or live.finished.get(name)


async def _recording(request: Request) -> Response:
    if refusal := _unknown(request):
        return refusal
    stream = _found(request)
    if stream is None or not len(stream.shown):
        return _error(404, "stream", "no such stream, or nothing was shown")
    number, path = tempfile.mkstemp(prefix="chameleon_", suffix=".mp4")
    done = BackgroundTask(os.unlink, path)
    try:
        with open(number, "wb+") as out:
            await asyncio.to_thread(films.write_film, stream, out)
    except (OSError, EncodingError) as error:
        os.unlink(path)
        return _error(409, "recording", f"the film cannot be written ({type(error).__name__})")
    return FileResponse(
        path, media_type="video/mp4", filename=f"{stream.name}.mp4", background=done
    )


async def _manifest(request: Request) -> Response:
    if refusal := _unknown(request):
        return refusal
    live, stream = _live(request), _found(request)
    if stream is None:
        return _error(404, "stream", "no such stream")
    return JSONResponse(
        await asyncio.to_thread(films.manifest, stream, live.engine.pipeline.config)
    )


def _address(request: Any) -> str:
    return request.client.host if request.client else "unknown"


class _Refused(Exception):
    """A client that is sent away: code of the close, and of the message."""

    def __init__(self, close: int, code: str, message: str):
        super().__init__(message)
        self.close, self.code, self.message = close, code, message


async def _stream(socket: WebSocket) -> None:
    """One client."""
    live = _live(socket)
    await socket.accept()
    outbox: asyncio.Queue = asyncio.Queue()
    loop = asyncio.get_running_loop()
    stream: Stream | None = None

    def emit(type_: str, values: dict[str, Any], packets: list[bytes] | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server ends
            loop.call_soon_threadsafe(outbox.put_nowait, (type_, values, packets))

    try:
        hello = await _hello(socket, live)
        if hello.get("resume"):
            stream = live.back(hello["resume"])
            if stream is None:
                raise _Refused(4404, "gone", "that stream has ended")
            stream.come_back(emit, hello.get("hold"), hello.get("paused", False))
        else:
            stream = await _begin(socket, live, hello, emit, outbox)
        if stream.name in live.active:  # else it has ended already
            live.outboxes[stream.name] = outbox
        live.engine.wake()
        await socket.send_text(write_message("session.ready", session=stream.name))
        sender = asyncio.create_task(_send_all(socket, live, stream, outbox))
        try:
            await _listen(socket, live, stream, sender, outbox)
        finally:
            sender.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await sender
        if stream.name in live.active and live.outboxes.get(stream.name) is not outbox:
            raise _Refused(4409, "moved", "the stream goes on in another connection")
        with contextlib.suppress(RuntimeError, TimeoutError):
            async with asyncio.timeout(CLOSING):
                await socket.close()
    except _Refused as refused:
        if stream is not None and live.outboxes.get(stream.name) is outbox:
            stream.stop()
            live.engine.wake()
        await _close(socket, refused)
    except WebSocketDisconnect as left:
        # Who leaves the page does not come back; all others may have lost their connection.
        if left.code == GOING_AWAY and stream is not None and stream.name in live.active:
            stream.stop()
            live.engine.wake()
    except TimeoutError:
        pass
    finally:
        # One whose stream has gone on elsewhere has nothing to leave.
        if stream is not None and live.outboxes.get(stream.name) is outbox and not stream.stopped:
            live.leave(stream)


async def _hello(socket: WebSocket, live: Live) -> dict[str, Any]:
    """The first message, which has the token."""
    if not live.limits.starts.allows(_address(socket)):
        raise _Refused(4429, "rate", "too many streams in a minute; wait a little")
    try:
        hello = await _receive(socket, HELLO)
    except TimeoutError:
        raise _Refused(4408, "slow", "expected session.start") from None
    if hello["type"] != "session.start":
        raise _Refused(4400, "order", "expected session.start first")
    authorized = bearer(socket.headers.get("authorization"))
    if not (live.guard.knows(hello.get("token")) or live.guard.knows(authorized)):
        raise _Refused(4401, "token", "the token is missing or wrong")
    if live.engine.failed is not None:
        raise _Refused(1011, "failed", "the model cannot be compiled; the log says why")
    return hello


async def _begin(
    socket: WebSocket, live: Live, hello: dict[str, Any], emit: Any, outbox: asyncio.Queue
) -> Stream:
    """A new stream, in its slot."""
    try:
        start = _wish(live, hello, None)
    except UserError as error:
        raise _Refused(4400, "refused", str(error)) from None
    config = live.engine.pipeline.config
    stream = Stream(
        secrets.token_hex(12),
        start,
        int(hello.get("seed", config.seed)),
        hello.get("codec", "h264"),
        emit,
        hello.get("paused", False),
    )
    if live.draining:
        raise _Refused(1012, "stopping", "the server stops")
    if not await _seated(socket, live, stream, outbox):
        if live.draining:
            raise _Refused(1012, "stopping", "the server stops")
        raise _Refused(4503, "busy", "too many wait for a stream; try again later")
    return stream


async def _seated(socket: WebSocket, live: Live, stream: Stream, outbox: asyncio.Queue) -> bool:
    """Wait for a slot and begin, as long as the client is there: one that left must not get one.

    What it says meanwhile counts once the stream has begun. False if too many wait already.
    """

    async def tell(type_: str, **values: Any) -> None:
        await socket.send_text(write_message(type_, **values))

    seat = asyncio.create_task(live.take(stream, tell))
    seat.add_done_callback(_looked_at)
    try:
        try:
            while True:
                word = await _word(socket, None, seat)
                if word is not None:
                    _obey(live, stream, word.result(), outbox)
                if seat.done():
                    return seat.result()
                if stream.stopped:
                    await tell("session.done", frames=0)
                    await socket.close()
                    raise WebSocketDisconnect(1000)
        finally:
            seat.cancel()
            await asyncio.wait({seat})
    except BaseException:  # also one that comes while the seat is waited for: it has begun, perhaps
        stream.stop()
        live.engine.wake()
        raise


def _wish(live: Live, message: dict[str, Any], number: int | None) -> Wish:
    """A wish of a message.

    Raises:
      PictureError: a picture that is not there.
      UserError: mechanisms that cannot be.
    """
    pictures = {}
    for kind in ("person", "garment"):
        if kind in message:
            picture = live.wardrobe.get(message[kind], kind)
            pictures[kind] = (picture.name, picture.pixels)
    mechanisms = None
    if "mechanisms" in message:
        chosen = message["mechanisms"]
        if "refresh" not in chosen:
            raise PictureError("mechanisms without refresh would never show a new garment")
        default = SwitchConfig.of(live.engine.pipeline.config)
        mechanisms = SwitchConfig.parse(",".join(dict.fromkeys(chosen)), like=default)
    return Wish(
        number=number,
        prompt=message.get("prompt"),
        mechanisms=mechanisms,
        asked=time.perf_counter(),
        at=message.get("at"),
        hold=message.get("hold"),
        **pictures,
    )


async def _receive(socket: WebSocket, timeout: float | None) -> dict[str, Any]:
    """The next message of a client."""
    message = await asyncio.wait_for(socket.receive(), timeout)
    if message["type"] == "websocket.disconnect":
        raise WebSocketDisconnect(message.get("code", 1006))
    try:
        text = message.get("text")
        return read_message(message["bytes"] if text is None else text)
    except ProtocolError as error:
        raise _Refused(4400, "message", str(error)) from None


async def _word(
    socket: WebSocket, timeout: float | None, other: asyncio.Task
) -> asyncio.Task[dict[str, Any]] | None:
    """The task that has received the next message; None if another task is done before."""
    word = asyncio.create_task(_receive(socket, timeout))
    try:
        await asyncio.wait({word, other}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        word.cancel()
        word.add_done_callback(_looked_at)
    await asyncio.wait({word})
    return None if word.cancelled() else word


def _looked_at(task: asyncio.Task) -> None:
    """Keep asyncio from logging what nobody waits for any more."""
    if not task.cancelled():
        task.exception()


async def _listen(
    socket: WebSocket, live: Live, stream: Stream, sender: asyncio.Task, outbox: asyncio.Queue
) -> None:
    """What the client says, until it leaves or the stream ends."""
    times: collections.deque[float] = collections.deque(maxlen=WORDS)
    while not sender.done():
        word = await _word(socket, IDLE, sender)
        if word is None:
            return
        try:
            message = word.result()
        except TimeoutError:
            raise _Refused(4408, "idle", "nothing was heard for a long time") from None
        times.append(time.monotonic())
        if len(times) == WORDS and times[-1] - times[0] < WINDOW:
            raise _Refused(4429, "rate", "too many messages a second")
        _obey(live, stream, message, outbox)
        live.engine.wake()


def _obey(live: Live, stream: Stream, message: dict[str, Any], outbox: asyncio.Queue) -> None:
    """Do what a message says."""
    if outbox.qsize() > UNREAD:
        raise _Refused(4429, "slow", "too much waits to be read")
    match message["type"]:
        case "session.played":
            stream.played(message["frame"])
        case "session.pause":
            stream.pause(True)
        case "session.resume":
            stream.pause(False)
        case "session.stop":
            stream.stop()
        case "session.ping":
            outbox.put_nowait(("session.pong", {}, None))
        case "session.interaction":
            try:
                if not stream.change(_wish(live, message, message["id"])):
                    raise PictureError("that frame is made already, or too many changes wait")
            except UserError as error:
                refused = {"code": "refused", "message": str(error)[: protocol.MAX_TEXT]}
                refused["id"] = message["id"]
                outbox.put_nowait(("session.error", refused, None))
                return
            outbox.put_nowait(("session.interaction.queued", {"id": message["id"]}, None))
        case _:
            raise _Refused(4400, "order", "the stream has started already")


async def _send_all(socket: WebSocket, live: Live, stream: Stream, outbox: asyncio.Queue) -> None:
    """Hand on what the engine says, until the stream ends or goes on elsewhere."""
    while (event := await outbox.get()) is not None:
        type_, values, packets = event
        if type_ == "session.done" and len(stream.shown):
            values = values | {"recording": f"/api/streams/{stream.name}/recording.mp4"}
        await socket.send_text(write_message(type_, **values))
        if packets is not None:
            await socket.send_bytes(pack(packets))
            stream.sent()
            live.engine.wake()
        if type_ == "session.done":
            return


async def _close(socket: WebSocket, refused: _Refused) -> None:
    with contextlib.suppress(RuntimeError, WebSocketDisconnect, TimeoutError):
        if socket.application_state is WebSocketState.CONNECTED:
            async with asyncio.timeout(CLOSING):
                message = refused.message[: protocol.MAX_TEXT]
                await socket.send_text(
                    write_message("session.error", code=refused.code, message=message)
                )
                await socket.close(refused.close, json.dumps(refused.code)[:100])

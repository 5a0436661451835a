"""The server behind real sockets of this machine, and clients that are cut off, slow or rude."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import socket
import struct
import threading
import time

import uvicorn
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from chameleon_jax.machine import memory_in_use
from chameleon_jax.serving.server import settings
from tests.serving.client import TOKEN, Server, Viewer

PATIENCE = 60  # seconds; a machine may be busy
# pytest keeps what is logged, and these records hold every frame that has come.
logging.getLogger("websockets.client").setLevel(logging.WARNING)
BURST = 0.5  # seconds that a narrow network may catch up
SMALL = 16 << 10  # bytes that the system keeps for one who does not read


class Wire(Server):
    """A server with a port. `log` has all that was logged."""

    def __enter__(self):
        self.listener = socket.create_server(("127.0.0.1", 0))
        # Else the system itself would hold megabytes for one who does not read.
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL)
        self.port = self.listener.getsockname()[1]
        sessions = self.live.limits.sessions
        self.uvicorn = uvicorn.Server(settings(self.app, sessions, log_config=None))
        self.stack = contextlib.ExitStack()
        self.log = self.stack.enter_context(logged())
        self.thread = threading.Thread(
            target=self.uvicorn.run, kwargs={"sockets": [self.listener]}, daemon=True
        )
        self.thread.start()
        self.wait_for(lambda: self.uvicorn.started, PATIENCE)
        self.wait_until_compiled()
        return self

    def wait_until_compiled(self):
        assert self.engine.ready.wait(PATIENCE)

    def __exit__(self, *error):
        self.uvicorn.should_exit = True
        self.engine.wake()
        self.thread.join(PATIENCE)
        self.stack.close()
        assert not self.thread.is_alive(), "the server does not end"

    def connect(self, headers=None, lazy=False, path="/api/stream"):
        return Socket(self.port, headers, lazy, path)

    def ask(self, data: bytes, shut=False) -> tuple[int, bytes]:
        """Status and body of the answer to the bytes of a request; 0: there was none."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE) as tcp:
            answer = b""
            with contextlib.suppress(OSError):
                tcp.sendall(data)
                if shut:
                    tcp.shutdown(socket.SHUT_WR)
                while part := tcp.recv(1 << 16):
                    answer += part
        head, _, body = answer.partition(b"\r\n\r\n")
        return (int(head.split()[1]), body) if head.startswith(b"HTTP/") else (0, answer)

    def left(self) -> dict[str, int]:
        """What is still held for clients."""
        return {
            "active": len(self.live.active),
            "waiting": len(self.live.waiting),
            "timers": len(self.live.left),
            "in_the_engine": self.engine.streams,
            "connections": len(self.uvicorn.server_state.connections),
            "tasks": len(self.uvicorn.server_state.tasks),
        }

    def wait_until_empty(self, seconds=PATIENCE) -> float:
        """Wait until nothing is held; returns the seconds."""
        begin = time.monotonic()
        self.wait_for(lambda: not any(self.left().values()), seconds)
        return time.monotonic() - begin


class Socket:
    """A WebSocket with the methods of Starlette's client.

    Args:
      lazy: nothing is read from the TCP socket but what is asked for, and little is kept for it.
    """

    def __init__(self, port, headers=None, lazy=False, path="/api/stream"):
        self.tcp = socket.socket()
        if lazy:
            self.tcp.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL)
        self.tcp.connect(("127.0.0.1", port))
        self.context = connect(
            f"ws://testserver:{port}{path}",
            sock=self.tcp,
            additional_headers=headers or {"origin": f"http://testserver:{port}"},
            compression=None,
            max_size=None,
            max_queue=1 if lazy else 64,
            ping_interval=None,
            close_timeout=1,
            open_timeout=PATIENCE,
            proxy=None,
        )
        self.connection = self.context.__enter__()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.context.__exit__(*error)

    def send_json(self, message):
        self.connection.send(json.dumps(message))

    def receive_text(self):
        message = self.connection.recv(PATIENCE)
        assert isinstance(message, str)
        return message

    def receive_bytes(self):
        message = self.connection.recv(PATIENCE)
        assert isinstance(message, bytes)
        return message

    def cut(self):
        """End the connection as a network does: no close frame, what is on its way is lost."""
        with contextlib.suppress(OSError):
            self.tcp.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.tcp.shutdown(socket.SHUT_RDWR)
        self.tcp.close()

    def closed(self) -> tuple[int, list[dict]]:
        """The code of the close that comes, and the messages before it."""
        messages = []
        try:
            while True:
                message = self.connection.recv(PATIENCE)
                if isinstance(message, str):
                    messages.append(json.loads(message))
        except ConnectionClosed as closed:
            return (closed.rcvd.code if closed.rcvd else 1006), messages


class Narrow:
    """A network that carries so many bytes a second from the server to one client."""

    def __init__(self, port, rate):
        self.server, self.rate = port, rate
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.ends: list[socket.socket] = [self.listener]

    def __enter__(self):
        threading.Thread(target=self._run, daemon=True).start()
        return self

    def __exit__(self, *error):
        for end in self.ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _run(self):
        client, _ = self.listener.accept()
        upstream = socket.socket()
        upstream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL)
        upstream.connect(("127.0.0.1", self.server))
        self.ends += [client, upstream]
        threading.Thread(target=self._carry, args=[client, upstream, 0], daemon=True).start()
        self._carry(upstream, client, 1 / self.rate)

    def _carry(self, source, target, seconds):
        """Bytes from one end to the other, each of which takes some time."""
        due = time.monotonic()
        with contextlib.suppress(OSError):
            while part := source.recv(2048):
                # By the clock: on a busy machine every sleep is longer than it should be.
                due = max(due, time.monotonic() - BURST) + len(part) * seconds
                time.sleep(max(0.0, due - time.monotonic()))
                target.sendall(part)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)


class Player(threading.Thread):
    """A viewer in a thread of its own, who shows every frame at once until `leave`."""

    def __init__(self, server, **hello):
        super().__init__(daemon=True)
        self.server, self.hello = server, hello
        self.leaving, self.error, self.count = threading.Event(), None, 0
        self.viewer = None

    def run(self):
        try:
            with self.server.connect() as one:
                self.viewer = Viewer(one, self.server).start(**self.hello)
                while not self.leaving.is_set():
                    self.count += self.viewer.until("video.chunk")["frames"]
                    self.viewer.frames.clear()
                    del self.viewer.messages[:-20]
                self.viewer.say("session.stop")
                self.viewer.until("session.done", play=False)
        except BaseException as error:
            self.error = error

    def leave(self):
        self.leaving.set()
        self.join(PATIENCE)
        assert self.error is None, self.error
        assert not self.is_alive()


def watch(server, chunks=1, **hello) -> None:
    """See a stream from its start to its end: the server works."""
    with server.connect() as one:
        viewer = Viewer(one, server).start(**hello)
        for _ in range(chunks):
            viewer.until("video.chunk")
        viewer.say("session.stop")
        viewer.until("session.done", play=False)


@contextlib.contextmanager
def logged():
    """All records of this process meanwhile, at every level, but those of the clients."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.addFilter(lambda record: not record.name.startswith("websockets.client"))
    handler.emit = records.append
    root, level = logging.getLogger(), logging.getLogger().level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    try:
        yield records
    finally:
        root.setLevel(level)
        root.removeHandler(handler)


def faults(records) -> list[str]:
    """Errors and tracebacks of a log."""
    formatter = logging.Formatter()
    return [
        formatter.format(record)
        for record in list(records)
        if record.levelno >= logging.ERROR or record.exc_info
    ]


def secrets_in(records) -> list[str]:
    """Lines of a log that have the token."""
    formatter = logging.Formatter()
    return [line for line in map(formatter.format, list(records)) if TOKEN in line]


def memory() -> int:
    """Bytes in use, without what waits to be collected."""
    gc.collect()
    return memory_in_use()

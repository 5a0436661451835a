"""An endpoint on loopback that answers by a script, for tests of what asks one."""

from __future__ import annotations

import dataclasses
import http.server
import json
import threading
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Status:
    """A state of HTTP that is no success, or a body that is not a chat completion."""

    code: int = 200
    body: str = ""
    headers: tuple[tuple[str, str], ...] = ()


class Hang:
    """Nothing is answered until the server stops."""


class Drip:
    """A byte of the body at a time, without end."""


Step = str | dict[str, Any] | Status | Hang | Drip


class ScriptedServer:
    """Answers one step of a script a request; the last step stays.

        with ScriptedServer(["not JSON", Status(429), '{"a": 1}']) as server:
            ask(Endpoint(server.url, "model"), ...)
        server.requests[0]["body"]

    A text becomes a chat completion, a dictionary is sent as it is.
    """

    def __init__(self, script: Sequence[Step]):
        self.script = list(script)
        self.requests: list[dict[str, Any]] = []
        self._stop = threading.Event()
        self._lock = threading.Lock()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                length = int(self.headers.get("Content-Length", 0))
                body = json.loads(self.rfile.read(length))
                with outer._lock:
                    headers = {name.lower(): value for name, value in self.headers.items()}
                    outer.requests.append({"path": self.path, "headers": headers, "body": body})
                    number = min(len(outer.requests), len(outer.script)) - 1
                outer._answer(self, outer.script[number])

            def log_message(self, *_: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def _answer(self, handler: http.server.BaseHTTPRequestHandler, step: Step) -> None:
        if isinstance(step, Hang):
            self._stop.wait(30)
            return
        if isinstance(step, Drip):
            handler.send_response(200)
            handler.end_headers()
            while not self._stop.wait(0.02):
                try:
                    handler.wfile.write(b" ")
                    handler.wfile.flush()
                except OSError:
                    return
            return
        if isinstance(step, str):
            message = {"role": "assistant", "content": step}
            step = {"model": "scripted-1", "choices": [{"message": message}]}
        if isinstance(step, dict):
            step = Status(200, json.dumps(step))
        handler.send_response(step.code)
        for name, value in step.headers:
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(step.body.encode())

    def __enter__(self) -> ScriptedServer:
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

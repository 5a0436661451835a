"""A server in this process, and a client of it."""

from __future__ import annotations

import json
import time

from starlette.testclient import TestClient

from chameleon_jax.serving import protocol
from chameleon_jax.serving.app import Limits, make_app
from chameleon_jax.serving.engine import Engine
from chameleon_jax.serving.guard import Guard, Rate
from chameleon_jax.serving.pictures import Wardrobe

HOST, TOKEN = "http://testserver", "secret"
BEARER = {"authorization": f"Bearer {TOKEN}"}
ORIGIN = {"origin": HOST}


class Server:
    """A server in this process."""

    def __init__(self, pipeline, pictures, record=None, **limits):
        self.wardrobe = Wardrobe(pipeline.size)
        self.names = {
            name: self.wardrobe.add_file(
                "person" if name == "person" else "garment", pictures / f"{name}.png", name
            )
            for name in ("person", "dress", "shirt", "coat")
        }
        self.engine = Engine(pipeline)
        limits = {"starts": Rate(10_000, 60.0), "uploads": Rate(1000, 60.0)} | limits
        self.app = make_app(
            self.engine, self.wardrobe, Guard(TOKEN, ["testserver"]), Limits(**limits), record
        )
        self.live = self.app.state.live

    def __enter__(self):
        self.client = TestClient(self.app).__enter__()
        assert self.engine.ready.wait(60)
        return self

    def __exit__(self, *error):
        self.client.__exit__(*error)

    def connect(self, headers=None):
        return self.client.websocket_connect("/api/stream", headers=headers or ORIGIN)

    def hello(self, **changes):
        start = {"type": "session.start", "version": 1, "token": TOKEN, "seed": 1}
        start |= {"person": self.names["person"], "garment": self.names["dress"]}
        return start | changes

    def wait_for(self, condition, seconds=60):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it did not happen in time"
            time.sleep(0.02)


class Viewer:
    """A client that shows frames at once."""

    def __init__(self, socket, server):
        self.socket, self.server = socket, server
        self.frames: dict[int, bytes] = {}
        self.pieces: list[bytes] = []  # of an MP4
        self.format = ""
        self.messages: list[dict] = []
        self.shown = 0
        self.asked: int | None = None  # a change that was not answered yet: nothing is shown

    def start(self, **changes):
        self.socket.send_json(self.server.hello(**changes))
        return self

    def next(self):
        """The next message; packets of a chunk are kept by frame."""
        message = json.loads(self.socket.receive_text())
        protocol.check_message(message, protocol.SERVER)
        self.messages.append(message)
        if message["type"] == "video.start":
            self.format = message["format"]
        if message["type"] == "video.chunk":
            packets = protocol.unpack(self.socket.receive_bytes())
            if self.format == "mp4":
                assert len(packets) == 1
                self.pieces.append(packets[0])
                return message
            assert len(packets) == message["frames"]
            for number, packet in enumerate(packets):
                self.frames[message["first_frame"] + number] = packet
        if message.get("id") == self.asked and message["type"] != "session.interaction.queued":
            self.asked = None
        if message["type"] == "session.flush":
            assert message["from_frame"] >= self.shown, "a frame that was shown was taken back"
            for frame in [x for x in self.frames if x >= message["from_frame"]]:
                del self.frames[frame]
        return message

    def until(self, type_, play=True):
        for _ in range(500):
            message = self.next()
            if message["type"] == "video.chunk" and play:
                self.play(message["first_frame"] + message["frames"])
            if message["type"] == type_:
                return message
        raise AssertionError(f"no {type_} among {[m['type'] for m in self.messages[-20:]]}")

    def play(self, frame):
        if self.asked is not None:
            return
        self.shown = max(self.shown, frame)
        self.socket.send_json({"type": "session.played", "frame": self.shown})

    def say(self, type_, **values):
        if type_ == "session.interaction" and "at" not in values:
            values.setdefault("hold", self.shown)
            self.asked = values["id"]
        self.socket.send_json({"type": type_, **values})

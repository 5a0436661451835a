"""The server as a process: a stop signal leaves complete films, and nothing else."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from chameleon_jax.data.video import read_clip

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_leaves_complete_films(tmp_path, number):
    command = [sys.executable, "-m", "launch.serve", "--config", "configs/runway_tiny.py:smoke"]
    command += ["--weights", "random", "--port", "0", "--record", str(tmp_path), "--max_sessions"]
    process = subprocess.Popen(
        [*command, "2"],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if found := re.match(r"open (http://(\S+)/)#token=(\S+)", line):
                break
        else:
            raise AssertionError("".join(lines))
        page, host, token = found[1], found[2], found[3]
        wait_until_ready(page)
        bearer = {"Authorization": f"Bearer {token}"}
        wardrobe = read(urllib.request.Request(f"{page}api/wardrobe", headers=bearer))
        chosen = {one["kind"]: one["name"] for one in wardrobe}
        address = f"ws://{host}/api/stream"
        with (
            connect(address, additional_headers=bearer, max_size=1 << 24) as watched,
            connect(address, additional_headers=bearer, max_size=1 << 24) as idle,
        ):
            start = {"type": "session.start", "version": 1, **chosen}
            idle.send(json.dumps(start))  # nothing of it is shown: it leaves no film
            watched.send(json.dumps(start))
            shown = watch(watched, 60)
            before = time.monotonic()
            process.send_signal(number)
            kinds = [message["type"] for message in until_closed(watched)]
            assert "session.done" in kinds
        assert process.wait(30) in (-number, 128 + number)
        took = time.monotonic() - before
        print(f"{signal.Signals(number).name}: the process ended after {took:.1f} s")
        assert took < 20  # the aim is 10 s on an idle machine
    finally:
        process.kill()
        process.stderr.close()
        process.wait()
    (film,) = tmp_path.glob("*.mp4")
    assert len(read_clip(film.read_bytes()).frames) == shown
    assert json.loads(film.with_suffix(".json").read_text())["frames"] == shown
    assert len(list(tmp_path.iterdir())) == 2  # no part of a file


def read(request):
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def wait_until_ready(page):
    end = time.monotonic() + 240
    while time.monotonic() < end:
        try:
            read(f"{page}readyz")
            return
        except urllib.error.HTTPError as error:
            assert error.code == 503
            time.sleep(0.5)
    raise AssertionError("the server is not ready in time")


def watch(socket, frames):
    """Show frames at once; gives how many were shown."""
    shown = 0
    while shown < frames:
        message = json.loads(socket.recv())
        if message["type"] == "video.chunk":
            socket.recv()
            shown = message["first_frame"] + message["frames"]
            socket.send(json.dumps({"type": "session.played", "frame": shown}))
    socket.send(json.dumps({"type": "session.ping"}))
    while json.loads(read_text(socket))["type"] != "session.pong":  # the last word was heard
        pass
    return shown


def read_text(socket):
    while isinstance(found := socket.recv(), bytes):
        pass
    return found


def until_closed(socket):
    try:
        while True:
            yield json.loads(read_text(socket))
    except ConnectionClosed:
        return

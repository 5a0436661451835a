"""The client of endpoints against a server on this machine whose replies are scripted."""

from __future__ import annotations

import base64
import contextlib
import email.parser
import email.policy
import http.server
import json
import socket
import threading
import time

import numpy as np
import pytest

from chameleon_jax.curation.captioner import Captioner
from chameleon_jax.curation.endpoint import Endpoint, NoAnswerError, encode_png
from chameleon_jax.curation.footage import Footage
from chameleon_jax.curation.stage import CurationError
from tests.curation.made import GOOD, clip, scene, write_scene

KEY = "CURATION_TEST_KEY"


def said(content) -> dict:
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    return {"choices": [{"message": {"role": "assistant", "content": text}}]}


class Server:
    """Answers requests in turn; the last reply again and again.

    A reply is (status, headers, body); a body that is no bytes is sent as JSON, "hang" waits,
    "drip" sends a byte now and then.
    """

    def __init__(self, *replies):
        self.replies, self.requests = list(replies), []
        self.stop = threading.Event()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.requests.append((self.path, dict(self.headers), body))
                replies = outer.replies
                reply = replies.pop(0) if len(replies) > 1 else replies[0]
                with contextlib.suppress(OSError):
                    outer.answer(self, *reply)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def answer(self, handler, status, headers, body):
        if body == "hang":
            self.stop.wait(20)
            return
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        if body == "drip":
            handler.end_headers()
            while not self.stop.wait(0.05):
                handler.wfile.write(b" ")
                handler.wfile.flush()
            return
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.stop.set()
        self.server.shutdown()
        self.server.server_close()


@contextlib.contextmanager
def served(*replies, **settings):
    """A server and an endpoint of it, which notes how long it would have waited."""
    waited: list[float] = []
    with Server(*replies) as server:
        known = {"model": "m", "timeout": 5.0, "tries": 3, "sleep": waited.append} | settings
        yield Endpoint(server.url, **known), server, waited


PICTURES = [scene(0, 1)[0]]
OK = (200, {}, said("fine"))


def test_a_question_about_pictures(monkeypatch):
    monkeypatch.setenv(KEY, "secret-1")
    with served(OK, key=KEY) as (endpoint, server, waited):
        assert endpoint.ask("be brief", "what?", PICTURES * 2) == "fine"
    ((path, headers, body),) = server.requests
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret-1"
    request = json.loads(body)
    assert request["model"] == "m" and request["messages"][0]["content"] == "be brief"
    text, *images = request["messages"][1]["content"]
    assert text == {"type": "text", "text": "what?"} and len(images) == 2
    assert images[0]["image_url"]["url"].startswith("data:image/jpeg;base64,")
    assert waited == []


def test_a_busy_server_is_asked_again_after_the_wait_it_asks_for():
    busy = (429, {"Retry-After": "7"}, {"error": "slow down"})
    with served(busy, (503, {}, b"<html>"), OK) as (endpoint, server, waited):
        assert endpoint.ask("", "", []) == "fine"
    assert len(server.requests) == 3 and waited == [7.0, 2.0]


def test_a_wait_of_hours_is_not_kept():
    with (
        served((429, {"Retry-After": "86400"}, {})) as (endpoint, _, waited),
        pytest.raises(NoAnswerError, match="HTTP 429 .*, 3 times"),
    ):
        endpoint.ask("", "", [])
    assert max(waited) <= 60


@pytest.mark.parametrize("body", ["hang", "drip"])
def test_a_server_that_hangs_is_given_up(body):
    began = time.monotonic()
    with served((200, {}, body), timeout=0.3, tries=2) as (endpoint, server, _):
        with pytest.raises(NoAnswerError, match="no answer within 0.3 s, 2 times"):
            endpoint.ask("", "", [])
        assert len(server.requests) == 2
    assert time.monotonic() - began < 5


def test_a_server_that_is_not_there_stops_the_run():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    endpoint = Endpoint(f"http://127.0.0.1:{port}/v1", "m", tries=2, sleep=lambda _: None)
    with pytest.raises(CurationError, match="cannot be reached .*, 2 times; look at the") as e:
        endpoint.ask("", "", [])
    assert not isinstance(e.value, NoAnswerError)


@pytest.mark.parametrize(
    ("status", "why"),
    [
        (401, f"look at the key in {KEY}"),
        (404, "look at the address and at the model's name, m"),
        (302, "which is not followed"),
    ],
)
def test_a_refusal_is_not_asked_again(status, why, monkeypatch):
    monkeypatch.setenv(KEY, "secret-2")
    headers = {"Location": "http://127.0.0.1:1/"}
    with (
        served((status, headers, b"no\nway"), key=KEY) as (endpoint, server, _),
        pytest.raises(CurationError, match=why) as error,
    ):
        endpoint.ask("", "", [])
    assert len(server.requests) == 1
    assert "secret-2" not in str(error.value) and "\n" not in str(error.value)
    assert "secret-2" not in repr(endpoint)


@pytest.mark.parametrize("body", [b"[]", {"choices": []}, said(""), {"choices": [{"message": 7}]}])
def test_an_answer_without_text_is_an_empty_one(body):
    with served((200, {}, body)) as (endpoint, _, _):
        assert endpoint.ask("", "", []) == ""


@pytest.mark.parametrize("body", [b"", b"not json"])
def test_what_is_not_json_is_no_answer(body):
    with (
        served((200, {}, body)) as (endpoint, _, _),
        pytest.raises(NoAnswerError, match="not JSON, 3 times"),
    ):
        endpoint.ask("", "", [])


def test_an_answer_has_a_largest_size(monkeypatch):
    monkeypatch.setattr("chameleon_jax.curation.endpoint.MAX_PICTURE", 1000)
    with (
        served((200, {}, said("x" * 5000)), tries=1) as (endpoint, _, _),
        pytest.raises(NoAnswerError, match="more than 1000 bytes, once"),
    ):
        endpoint.edit(PICTURES, "", 0)


def test_an_edited_picture():
    picture = scene(1, 1)[0]
    reply = {"data": [{"b64_json": base64.b64encode(encode_png(picture)).decode()}]}
    with served((200, {}, reply)) as (endpoint, server, _):
        assert np.array_equal(endpoint.edit(PICTURES * 2, "take it off", 5), picture)
    path, headers, body = server.requests[0]
    assert path == "/v1/images/edits"
    head = f"Content-Type: {headers['Content-Type']}\r\n\r\n".encode()
    form = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(head + body)
    parts = {}
    for part in form.iter_parts():
        name = part.get_param("name", header="content-disposition")
        parts.setdefault(name, []).append(part.get_payload(decode=True))
    assert parts["prompt"] == [b"take it off"] and parts["seed"] == [b"5"]
    assert parts["image[]"] == [encode_png(PICTURES[0])] * 2


@pytest.mark.parametrize(
    "data", [[], [{"url": "http://x"}], [{"b64_json": "bm90IGEgcGljdHVyZQ=="}]]
)
def test_no_picture_is_no_answer(data):
    with (
        served((200, {}, {"data": data})) as (endpoint, _, _),
        pytest.raises(NoAnswerError, match="gave no picture"),
    ):
        endpoint.edit(PICTURES, "", 0)


@pytest.mark.parametrize(
    ("url", "settings", "why"),
    [
        ("ftp://host/v1", {}, "expected http"),
        ("localhost:8000/v1", {}, "expected http"),
        ("https://key@host/v1", {}, "no key in it"),
        ("https://host/v1", {"model": ""}, "no model named"),
        ("https://host/v1", {"key": "NOT_SET_ANYWHERE"}, "NOT_SET_ANYWHERE is empty"),
    ],
)
def test_what_is_no_endpoint(url, settings, why):
    with pytest.raises(CurationError, match=why):
        Endpoint(url, **{"model": "m"} | settings)


def test_captions_through_a_server(tmp_path):
    """Junk, a busy server, clothes, and then a fenced answer; the records hold the last alone."""
    bad = GOOD | {"en_long": ["Her skirt swings.", "A woman."]}
    fenced = "```json\n" + json.dumps(GOOD, ensure_ascii=False) + "\n```"
    replies = [
        (200, {}, said("Sure!")),
        (429, {}, {}),
        (200, {}, said(bad)),
        (200, {}, said(fenced)),
    ]
    write_scene(tmp_path / "a.mp4", [1])
    with served(*replies) as (endpoint, server, _):
        (out,) = Captioner(Footage(tmp_path), endpoint)([clip("a")])
    assert out.made["captions"]["prompt"] == GOOD and out.made["captions"]["model"] == "m"
    assert len(server.requests) == 4

"""HGC, LGC and NTP from a model behind an endpoint: whole numbers from 1 to 5, or missing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from chameleon_jax.evaluation.scores import garment
from chameleon_jax.evaluation.scores.base import Setup
from chameleon_jax.evaluation.scores.garment import KEYS, Garment, marks
from chameleon_jax.vlm import Endpoint, JunkError, VlmError, prompt_hash
from tests.vlm_server import Hang, ScriptedServer, Status

PICTURE = np.full((12, 8, 3), 200, np.uint8)
VIDEO = np.zeros((9, 12, 8, 3), np.uint8)


def reply(*values) -> str:
    return json.dumps(dict(zip(KEYS, values, strict=True)))


def scored(script, video=VIDEO, prompt="", **settings):
    with ScriptedServer(script) as server:
        endpoint = Endpoint(server.url, "judge", **settings)
        setup = Setup(Path(), vlm=endpoint, frames=3, prompt=prompt, sleep=lambda _: None)
        return Garment(setup).score(PICTURE, PICTURE, video, "a person walks"), server.requests


def test_three_marks_of_one_question():
    found, (request,) = scored([reply(5, 4, 3)])
    assert (found["hgc"], found["lgc"], found["ntp"]) == (5, 4, 3)
    assert found["raw"] == [reply(5, 4, 3)] and found["model"] == "scripted-1"
    assert found["prompt"] == prompt_hash(garment.PROMPT)
    system, user = request["body"]["messages"]
    assert system["content"] == garment.PROMPT
    kinds = [part["type"] for part in user["content"]]
    assert kinds == ["text", "image_url", "text", "image_url", "text", *["image_url"] * 3, "text"]
    named = [part["text"] for part in user["content"] if part["type"] == "text"]
    assert named[:3] == ["[Image 1]", "[Image 2]", "[Video 1]"]


def test_the_question_says_keys_range_and_cap():
    for key in KEYS:
        assert garment.PROMPT.count(f'"{key}"') == 2
    words = " ".join(garment.PROMPT.split())
    assert "whole number: 5 is perfect" in words and "this mark is 2 at the most" in words


def test_other_words_are_another_metric():
    setup = Setup(Path(), vlm=Endpoint("http://localhost", "judge"), prompt="Other words.")
    other = Garment(setup)
    assert other.about()["prompt"] == prompt_hash("Other words.") != prompt_hash(garment.PROMPT)
    _, (request,) = scored([reply(1, 1, 1)], prompt="Other words.")
    assert request["body"]["messages"][0]["content"] == "Other words."


def test_fences_limits_and_junk():
    script = [
        Status(429),
        "I'd give it full marks!",
        reply(0, 4, 4),
        f"```json\n{reply(2, 1, 5)}\n```",
    ]
    found, requests = scored(script)
    assert [found[name] for name in ("hgc", "lgc", "ntp")] == [2, 1, 5]
    assert len(requests) == 4 and len(found["raw"]) == 3
    assert "no JSON" in found["faults"][0] and "is 0; expected" in found["faults"][1]


def test_a_sample_without_a_usable_reply_is_missing_and_never_0():
    found, _ = scored([reply(0, 0, 0)], tries=2)
    assert [found[name] for name in ("hgc", "lgc", "ntp")] == [None] * 3
    assert found["raw"] == [reply(0, 0, 0)] * 2 and "no usable reply in 2" in found["why"]


def test_an_endpoint_that_hangs():
    with pytest.raises(VlmError, match="no answer within 0.2 s, 2 times"):
        scored([Hang()], tries=2, timeout=0.2)


@pytest.mark.parametrize(
    ("found", "fault"),
    [
        (dict.fromkeys(KEYS, 6), "is 6; expected a whole number from 1 to 5"),
        (dict.fromkeys(KEYS, 0), "is 0"),
        (dict.fromkeys(KEYS, 4.5), "is 4.5"),
        (dict.fromkeys(KEYS, True), "is True"),
        (dict.fromkeys(KEYS, "4"), "is '4'"),
        (dict.fromkeys(KEYS, None), "is None"),
        (dict.fromkeys(KEYS, 1e999), "is inf"),
        ({key: [4] for key in KEYS}, "is .4."),
        (dict.fromkeys([*KEYS, "notes"], 4), "keys .*notes"),
        (dict.fromkeys([key.upper() for key in KEYS], 4), "keys"),
        ({}, "keys"),
    ],
)
def test_marks_that_are_none(found, fault):
    with pytest.raises(JunkError, match=fault):
        marks(found)


def test_marks_written_as_4_point_0():
    assert marks(dict.fromkeys(KEYS, 4.0)) == {"hgc": 4, "lgc": 4, "ntp": 4}


@pytest.mark.parametrize(("frames", "rate"), [(None, None), (3, 8.0), (99, 24.0)])
def test_gemini_sees_the_whole_video(frames, rate):
    """Of 9 frames at 24 a second, 3 are 8 a second."""
    answer = {"candidates": [{"content": {"parts": [{"text": reply(4, 4, 4)}]}}]}
    with ScriptedServer([answer]) as server:
        setup = Setup(Path(), vlm=Endpoint(server.url, "judge", api="gemini"), frames=frames)
        metric = Garment(setup)
        assert metric.score(PICTURE, PICTURE, VIDEO, "")["hgc"] == 4
    parts = server.requests[0]["body"]["contents"][0]["parts"]
    sent = [part for part in parts if "inline_data" in part]
    kinds = [part["inline_data"]["mime_type"] for part in sent]
    assert kinds == ["image/jpeg", "image/jpeg", "video/mp4"]
    assert sent[2].get("video_metadata", {}).get("fps") == rate
    assert metric.about()["sees"] == ("film" if rate is None else f"{frames} frames of the film")


def test_sixteen_frames_are_sent_unless_told_otherwise():
    setup = Setup(Path(), vlm=Endpoint("http://localhost", "judge"))
    assert Garment(setup).about()["sees"] == "16 frames"

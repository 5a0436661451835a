"""Messages: what stands in the tables is read, everything else is refused with a reason."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from chameleon_jax.serving import protocol
from chameleon_jax.serving.protocol import ProtocolError, read_message, write_message

START = {"type": "session.start", "version": 1, "person": "p", "garment": "g"}
SCHEMA = Path(protocol.__file__).parent / "schema.json"


def test_messages_are_read_as_they_are():
    message = START | {"seed": 3, "prompt": "träumt", "mechanisms": ["refresh", "withdraw"]}
    assert read_message(json.dumps(message)) == message
    said = json.loads(write_message("session.flush", from_frame=12))
    assert said == {"type": "session.flush", "from_frame": 12}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "session.go"}, "unknown type; expected one of session.start"),
        ({"version": 2}, "session.start.version: expected a whole number from 1 to 1"),
        ({"person": None}, "session.start.person: expected a text of at most 64"),
        ({"garment": "g" * 65}, "session.start.garment: expected a text of at most 64"),
        ({"seed": -1}, "seed: expected a whole number from 0"),
        ({"seed": True}, "seed: expected a whole number"),
        ({"seed": 1.5}, "seed: expected a whole number"),
        ({"codec": "vp9"}, "codec: expected one of h264, mp4, jpeg"),
        ({"mechanisms": ["hope"]}, "mechanisms: expected a list of some of refresh"),
        ({"prompt": "\ud800"}, "prompt: expected text without surrogates"),
        ({"extra": 1}, "session.start: unknown key 'extra'"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_reason(change, message):
    with pytest.raises(ProtocolError, match=message):
        read_message(json.dumps(START | change))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "null", '"session.start"', '{"type": NaN}', b"{}", "[" * 100_000]
)
def test_what_is_no_message_is_refused(text):
    with pytest.raises(ProtocolError):
        read_message(text)


def test_a_missing_key_is_named():
    with pytest.raises(ProtocolError, match=r"session\.interaction: id is missing"):
        read_message('{"type": "session.interaction"}')


def test_nothing_breaks_the_reader():
    """5,000 mutated messages: each is read, or refused as a message."""
    rng = random.Random(0)
    seeds = [START, {"type": "session.interaction", "id": 1, "garment": "g"}]
    seeds += [{"type": name} for name in protocol.CLIENT]
    values = [None, True, -1, 2**70, 1e400, "x" * 3000, [], {}, ["refresh"], "\0", [[[]]], 0.5]
    read = 0
    for _ in range(5000):
        message = dict(rng.choice(seeds))
        for _ in range(rng.randrange(4)):
            key = rng.choice([*message, "type", "id", "frame", "x", ""])
            message[key] = rng.choice([*values, rng.choice(list(message.values()))])
        text = json.dumps(message)
        if rng.random() < 0.3:
            cut = rng.randrange(len(text))
            text = text[:cut] + rng.choice(['"', "}", "\x00", "é", ""]) + text[cut + 1 :]
        try:
            read_message(text)
            read += 1
        except ProtocolError as error:
            assert str(error) and len(str(error)) < 500
    assert 100 < read < 4900


def test_packets_of_a_chunk_are_one_message():
    packets = [b"", b"abc", bytes(range(256))]
    assert protocol.unpack(protocol.pack(packets)) == packets
    for wrong in (b"", b"\1", b"\2\0\0\0\1\0\0\0", protocol.pack(packets)[:-1]):
        with pytest.raises(ProtocolError):
            protocol.unpack(wrong)


def test_the_schema_file_is_that_of_the_tables():
    assert json.loads(SCHEMA.read_text(encoding="utf-8")) == protocol.schema()

"""The messages of a live stream: JSON for control, and a binary one after each chunk's header.

One WebSocket carries one stream. What a client may say and what a server says stand in two
tables, from which messages are checked and the JSON schema is written (`schema`); docs/api.md
explains them. A message is an object with `type`; every other key is in its table, or it is
refused.

    client                                     server
    session.start                          ->
                                           <-  session.queued, session.ready, video.start
                                           <-  video.chunk, then its packets as one binary message
    session.played, every 100 ms           ->
    session.interaction                    ->
                                           <-  session.interaction.queued
                                           <-  session.flush, session.applied
    session.stop                           ->
                                           <-  session.done
"""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from chameleon_jax.errors import UserError

VERSION = 1
MAX_TEXT = 2000  # characters of a prompt
MAX_NAME = 64  # of an id
MAX_FRAME = 2**31 - 1
MAX_MESSAGE = 64 * 1024  # bytes of a message from a client


class ProtocolError(UserError):
    """A message that this protocol does not have. The text is safe to be sent back."""


@dataclasses.dataclass(frozen=True)
class Field:
    """One key of a message.

    Attributes:
      kind: "string", "integer", "number", "boolean", or "words" (a list of some of `choices`).
      needed: whether the message must have it.
      least, most: of a number; `most` is also the longest string.
      choices: the only values, if there are any.
    """

    kind: str
    needed: bool = False
    least: float = 0
    most: float = MAX_FRAME
    choices: Sequence[str] = ()

    def fault(self, value: Any) -> str:
        """What is wrong with a value; empty if nothing is."""
        if self.kind == "words":
            if isinstance(value, list) and all(x in self.choices for x in value):
                return ""
            return f"expected a list of some of {', '.join(self.choices)}"
        if self.kind == "string":
            if not isinstance(value, str) or len(value) > self.most:
                return f"expected a text of at most {self.most:g} characters"
            if self.choices and value not in self.choices:
                return f"expected one of {', '.join(self.choices)}"
            return "" if _is_text(value) else "expected text without surrogates or NUL"
        if self.kind == "boolean":
            return "" if isinstance(value, bool) else "expected true or false"
        whole = self.kind == "integer"
        right = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
        if right and self.least <= value <= self.most:
            return ""
        what = "a whole number" if whole else "a number"
        return f"expected {what} from {self.least:g} to {self.most:g}"

    def schema(self) -> dict[str, Any]:
        """The same as JSON schema."""
        if self.kind == "words":
            return {"type": "array", "items": {"enum": list(self.choices)}}
        if self.kind == "string":
            found: dict[str, Any] = {"type": "string", "maxLength": int(self.most)}
            return found | ({"enum": list(self.choices)} if self.choices else {})
        if self.kind == "boolean":
            return {"type": "boolean"}
        return {"type": self.kind, "minimum": self.least, "maximum": self.most}


MECHANISMS = ("refresh", "withdraw", "disentangle", "anchor", "carry")
CODECS = ("h264", "mp4", "jpeg")

_NAME = Field("string", most=MAX_NAME)
_TEXT = Field("string", most=MAX_TEXT)
_FRAME = Field("integer")
_NUMBER = Field("number", most=1e9)


def _needed(field: Field) -> Field:
    return dataclasses.replace(field, needed=True)


CLIENT: dict[str, dict[str, Field]] = {
    "session.start": {
        "version": Field("integer", True, least=VERSION, most=VERSION),
        "token": Field("string", most=256),
        "person": _needed(_NAME),
        "garment": _needed(_NAME),
        "prompt": _TEXT,
        "seed": Field("integer", most=2**32 - 1),
        "codec": Field("string", most=MAX_NAME, choices=CODECS),
        "mechanisms": Field("words", choices=MECHANISMS),
        "paused": Field("boolean"),  # make nothing before `session.resume`
        "resume": _NAME,  # a stream that was left a moment ago
        "hold": Field("integer"),  # with it, as in `session.interaction`
    },
    "session.interaction": {
        "id": _needed(_FRAME),
        "garment": _NAME,
        "person": _NAME,
        "prompt": _TEXT,
        "mechanisms": Field("words", choices=MECHANISMS),
        "at": Field("integer", least=1),  # the frame from which on it counts
        # Nothing of the chunks that begin here or later is shown before it is answered.
        "hold": Field("integer"),
    },
    "session.played": {"frame": _needed(_FRAME)},
    "session.pause": {},
    "session.resume": {},
    "session.stop": {},
    "session.ping": {},
}
SERVER: dict[str, dict[str, Field]] = {
    "session.queued": {"position": _needed(_FRAME)},
    "session.ready": {"session": _needed(_NAME)},
    "video.start": {
        "codec": _needed(Field("string", most=MAX_NAME)),
        "format": _needed(Field("string", most=MAX_NAME, choices=CODECS)),
        "width": _needed(_FRAME),
        "height": _needed(_FRAME),
        "fps": _needed(_NUMBER),
        "first_frame": _needed(_FRAME),
    },
    "video.chunk": {
        "index": _needed(_FRAME),
        "first_frame": _needed(_FRAME),
        "frames": _needed(_FRAME),
        "key": _needed(Field("boolean")),
        "garment": _needed(_NAME),
        "made_ms": _needed(_NUMBER),
        "encoded_ms": _needed(_NUMBER),
    },
    "session.interaction.queued": {"id": _needed(_FRAME)},
    "session.applied": {
        "id": _needed(_FRAME),
        "first_frame": _needed(_FRAME),
        "waited_ms": _needed(_NUMBER),
        "refresh_ms": _needed(_NUMBER),
        "made_ms": _needed(_NUMBER),
    },
    "session.flush": {"from_frame": _needed(_FRAME)},
    "session.error": {
        "code": _needed(Field("string", most=MAX_NAME)),
        "message": _needed(Field("string", most=MAX_TEXT)),
        "id": _FRAME,  # of the change that was refused
    },
    "session.done": {"frames": _needed(_FRAME), "recording": Field("string", most=MAX_TEXT)},
    "session.pong": {},
}


def read_message(text: str | bytes) -> dict[str, Any]:
    """A message of a client.

    Raises:
      ProtocolError: too long, no JSON, or not one of `CLIENT`.
    """
    if isinstance(text, bytes):
        raise ProtocolError("expected a text message; pictures go to /api/pictures")
    if len(text) > MAX_MESSAGE:
        raise ProtocolError(f"a message of {len(text)} characters; expected {MAX_MESSAGE} at most")
    try:
        message = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise ProtocolError("expected a JSON object") from None
    return check_message(message, CLIENT)


def check_message(message: Any, known: Mapping[str, Mapping[str, Field]]) -> dict[str, Any]:
    """The message, if it stands in a table.

    Raises:
      ProtocolError: it does not.
    """
    if not isinstance(message, dict):
        raise ProtocolError("expected a JSON object")
    type_ = message.get("type")
    if not isinstance(type_, str) or type_ not in known:
        raise ProtocolError(f"unknown type; expected one of {', '.join(known)}")
    fields = known[type_]
    for key, value in message.items():
        if key == "type":
            continue
        if key not in fields:
            raise ProtocolError(f"{type_}: unknown key {str(key)[:MAX_NAME]!r}")
        fault = fields[key].fault(value)
        if fault:
            raise ProtocolError(f"{type_}.{key}: {fault}")
    for key, field in fields.items():
        if field.needed and key not in message:
            raise ProtocolError(f"{type_}: {key} is missing")
    return message


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _is_text(value: str) -> bool:
    return "\0" not in value and not any("\ud800" <= x <= "\udfff" for x in value)


def write_message(type_: str, **values: Any) -> str:
    """A message of the server, as text.

    Raises:
      ProtocolError: it is not one of `SERVER`: a fault of this program.
    """
    return json.dumps(check_message({"type": type_, **values}, SERVER), ensure_ascii=False)


def pack(packets: Sequence[bytes]) -> bytes:
    """Packets of a chunk as one binary message: how many, the length of each, then all of them."""
    lengths = struct.pack(f"<I{len(packets)}I", len(packets), *(len(x) for x in packets))
    return lengths + b"".join(packets)


def unpack(message: bytes) -> list[bytes]:
    """The inverse of `pack`.

    Raises:
      ProtocolError: something else.
    """
    try:
        (count,) = struct.unpack_from("<I", message)
        lengths = struct.unpack_from(f"<{count}I", message, 4)
    except struct.error:
        raise ProtocolError("not packets") from None
    start, packets = 4 + 4 * count, []
    for length in lengths:
        packets.append(message[start : start + length])
        start += length
    if start != len(message):
        raise ProtocolError("not packets")
    return packets


def schema() -> dict[str, Any]:
    """All messages as a JSON schema (draft 2020-12)."""

    def one(type_: str, fields: Mapping[str, Field]) -> dict[str, Any]:
        return {
            "title": type_,
            "type": "object",
            "properties": {"type": {"const": type_}}
            | {key: field.schema() for key, field in fields.items()},
            "required": ["type", *(key for key, field in fields.items() if field.needed)],
            "additionalProperties": False,
        }

    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"chameleon_jax live stream, version {VERSION}",
        "$defs": {
            "client": {"oneOf": [one(*item) for item in CLIENT.items()]},
            "server": {"oneOf": [one(*item) for item in SERVER.items()]},
        },
    }

"""Models behind an endpoint that speaks OpenAI's protocol: words about pictures, edited pictures.

OpenAI's own, Gemini's (https://generativelanguage.googleapis.com/v1beta/openai), vLLM, SGLang and
many others answer `chat/completions`; `images/edits` takes pictures and an instruction.

What comes back is data, never trusted: it has a largest size and a longest time, redirections are
not followed, and whoever asks checks the answer. The key is read from the environment and is in no
message and in no record.

Axes: h w pixels.
"""

from __future__ import annotations

import base64
import dataclasses
import http.client
import io
import json
import os
import secrets
import ssl
import time
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from PIL import Image

from chameleon_jax.curation.stage import CurationError
from chameleon_jax.errors import one_line, printable

MAX_TEXT, MAX_PICTURE = 4 * 2**20, 64 * 2**20  # bytes of an answer
LONGEST_WAIT = 60.0  # seconds that an endpoint may ask for before the next try
CONNECTING = 15.0  # seconds until a server has to be reached
FIRST_WAIT = 1.0  # seconds; doubled with each try
JPEG_QUALITY = 90
MODEL_FAULTS = (400, 404, 413, 415, 422)


class NoAnswerError(CurationError):
    """Nobody answered, but the endpoint is there: it is busy, or it hangs. Another try may help."""


class _UnreachableError(Exception):
    """There is nobody at the address."""


class VisionModel(Protocol):
    """Answers questions about pictures.

    Attributes:
      model: its name, for the records.
    """

    model: str

    def ask(self, system: str, text: str, pictures: Sequence[np.ndarray]) -> str:
        """The answer to a question about pictures uint8 [h, w, 3].

        Raises:
          NoAnswerError: there is none now.
          CurationError: there will be none.
        """


class PictureEditor(Protocol):
    """Makes a picture of pictures, as an instruction says.

    Attributes:
      model: its name, for the records.
    """

    model: str

    def edit(self, pictures: Sequence[np.ndarray], text: str, seed: int) -> np.ndarray:
        """A picture uint8 [h, w, 3] made of others; another seed gives another one.

        Raises:
          NoAnswerError: there is none now.
          CurationError: there will be none.
        """


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """Where an OpenAI-compatible server is, and how long it is waited for.

    Attributes:
      url: up to and without `/chat/completions`, e.g. "https://api.openai.com/v1".
      model: name of the model there.
      key: environment variable that holds the key; empty: no key is sent.
      timeout: seconds for one answer, from its first byte to its last.
      tries: how often a busy or silent server is asked.
      sleep: waits; tests replace it.

    Raises:
      CurationError: the address or the key cannot be used.
    """

    url: str
    model: str
    key: str = ""
    timeout: float = 120.0
    tries: int = 4
    sleep: Callable[[float], None] = dataclasses.field(default=time.sleep, repr=False)

    def __post_init__(self):
        parts = urllib.parse.urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
            raise CurationError(
                f"endpoint {printable(self.url)!r}: expected http:// or https://, a host and a path"
                " such as /v1, and no key in it"
            )
        if not self.model:
            raise CurationError(f"endpoint {self.url}: no model named; set the model's name")
        if self.key and not os.environ.get(self.key):
            raise CurationError(
                f"endpoint {self.url}: the environment variable {self.key} is empty; put the key"
                " there, or set the name to '' for a server without keys"
            )

    def ask(self, system: str, text: str, pictures: Sequence[np.ndarray]) -> str:
        """See `VisionModel`."""
        content: list[dict[str, Any]] = [{"type": "text", "text": text}]
        for picture in pictures:
            url = "data:image/jpeg;base64," + base64.b64encode(encode_jpeg(picture)).decode()
            content.append({"type": "image_url", "image_url": {"url": url}})
        request = {
            "model": self.model,
            "messages": [
                {"role": "system", "content": system},
                {"role": "user", "content": content},
            ],
        }
        answer = self._post(
            "chat/completions", json.dumps(request).encode(), "application/json", MAX_TEXT
        )
        try:
            said = answer["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError):
            said = None
        return said if isinstance(said, str) else ""

    def edit(self, pictures: Sequence[np.ndarray], text: str, seed: int) -> np.ndarray:
        """See `PictureEditor`; an answer that is no picture counts as none."""
        from chameleon_jax.data.images import ImageError, open_image

        fields = {"model": self.model, "prompt": text, "seed": str(seed), "n": "1"}
        body, kind = multipart(fields, [encode_png(picture) for picture in pictures])
        answer = self._post("images/edits", body, kind, MAX_PICTURE)
        try:
            data = base64.b64decode(answer["data"][0]["b64_json"], validate=True)
            return np.asarray(open_image(data, name="the edited picture"))
        except (KeyError, IndexError, TypeError, ValueError, ImageError) as error:
            raise NoAnswerError(
                f"{self.url}: images/edits gave no picture ({one_line(error)[:80]}); expected"
                " data[0].b64_json"
            ) from None

    def _post(self, path: str, body: bytes, kind: str, most: int) -> Any:
        """The JSON that a request is answered with, {} where it is none; waits and tries again."""
        wait, why, reached = FIRST_WAIT, "", False
        for attempt in range(self.tries):
            if attempt:
                self.sleep(min(wait, LONGEST_WAIT))
                wait *= 2
            try:
                status, asked_wait, data = self._send(path, body, kind, most)
            except _UnreachableError as error:
                why = one_line(error)
                continue
            except (OSError, http.client.HTTPException) as error:
                why, reached = one_line(error), True
                continue
            reached = True
            if status == 200:
                return _parsed(data)
            why = f"status {status}"
            if status == 429 or status >= 500:
                wait = max(wait, asked_wait)
                continue
            self._refuse(status, data)
        kind_of_error = NoAnswerError if reached else CurationError
        advice = "" if reached else "; see whether the server runs, the same command continues"
        raise kind_of_error(f"{self.url}: no answer after {self.tries} tries ({why}){advice}")

    def _refuse(self, status: int, data: bytes) -> None:
        said = printable(one_line(data[:200].decode("utf-8", "replace")))
        what = "the key is refused" if status in (401, 403) else "the request is refused"
        advice = f"see {self.key or 'whether it wants a key'}"
        if status in MODEL_FAULTS:
            advice = f"see the address and the model {self.model!r}"
        elif 300 <= status < 400:
            advice = "it wants to redirect, which is not followed; give the address itself"
        raise CurationError(f"{self.url}: {what} (status {status}: {said}); {advice}")

    def _send(self, path: str, body: bytes, kind: str, most: int) -> tuple[int, float, bytes]:
        """Status, seconds that the server asks to wait, and the answer.

        Raises:
          OSError, HTTPException: it cannot be reached, or is not through within `timeout`.
        """
        parts = urllib.parse.urlsplit(self.url)
        headers = {"Content-Type": kind, "Accept": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {os.environ[self.key]}"
        deadline = time.monotonic() + self.timeout
        if parts.scheme == "https":
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                parts.hostname or "",
                parts.port,
                timeout=self.timeout,
                context=ssl.create_default_context(),
            )
        else:
            connection = http.client.HTTPConnection(
                parts.hostname or "", parts.port, timeout=self.timeout
            )
        try:
            try:
                connection.timeout = min(CONNECTING, self.timeout)
                connection.connect()
            except OSError as error:
                raise _UnreachableError(one_line(error)) from None
            connection.sock.settimeout(self.timeout)
            connection.request("POST", f"{parts.path.rstrip('/')}/{path}", body, headers)
            response = connection.getresponse()
            data = bytearray()
            # A server that sends a byte now and then must not hold the run for ever.
            while piece := response.read1(2**16):
                data += piece
                if len(data) > most:
                    raise http.client.HTTPException(f"more than {most} bytes")
                if time.monotonic() > deadline:
                    raise TimeoutError(f"not through after {self.timeout:g} s")
            return response.status, _seconds(response.headers.get("Retry-After")), bytes(data)
        finally:
            connection.close()


def _seconds(text: str | None) -> float:
    """What Retry-After says in seconds; dates, which no such server sends, count as 0."""
    try:
        return min(max(float(text or 0), 0.0), LONGEST_WAIT)
    except ValueError:
        return 0.0


def _parsed(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return {}


def multipart(fields: Mapping[str, str], pictures: Sequence[bytes]) -> tuple[bytes, str]:
    """A form with PNG pictures (RFC 7578): the body, and its content type."""
    border = secrets.token_hex(16)
    parts = []
    for name, value in fields.items():
        head = f'Content-Disposition: form-data; name="{name}"\r\n\r\n'
        parts.append(head.encode() + value.encode())
    for number, picture in enumerate(pictures):
        head = (
            f'Content-Disposition: form-data; name="image[]"; filename="{number}.png"\r\n'
            "Content-Type: image/png\r\n\r\n"
        )
        parts.append(head.encode() + picture)
    body = b"".join(b"--" + border.encode() + b"\r\n" + part + b"\r\n" for part in parts)
    return body + f"--{border}--\r\n".encode(), f"multipart/form-data; boundary={border}"


def encode_jpeg(picture: np.ndarray) -> bytes:
    """A picture uint8 [h, w, 3] as JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def encode_png(picture: np.ndarray) -> bytes:
    """A picture uint8 [h, w, 3] as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()

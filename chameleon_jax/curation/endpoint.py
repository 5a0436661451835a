"""Models behind an endpoint that speaks OpenAI's protocol: words about pictures, edited pictures.

`chat/completions` answers questions, `images/edits` takes pictures and an instruction. How they are
sent, waited for and asked again is that of `vlm`. What comes back is data, never trusted: whoever
asks checks the answer. The key is read from the environment and is in no message and in no record.

Axes: h w pixels.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import io
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from PIL import Image

from chameleon_jax import vlm
from chameleon_jax.curation.stage import CurationError
from chameleon_jax.errors import one_line

MAX_PICTURE = 64 * 2**20  # bytes of an answer that holds one
FIRST_WAIT = 1.0  # seconds; doubled with each try
JPEG_QUALITY = 90


class NoAnswerError(CurationError):
    """Nobody answered, but the endpoint is there: it is busy, or it hangs. Another try may help."""


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
        with _named_errors():
            self._opened()  # faults of the settings are named before anything is asked

    def ask(self, system: str, text: str, pictures: Sequence[np.ndarray]) -> str:
        """See `VisionModel`."""
        files = [vlm.Picture(encode_jpeg(picture), "image/jpeg") for picture in pictures]
        with _named_errors():
            return vlm.say(self._opened(), [text, *files], system=system, sleep=self.sleep)

    def edit(self, pictures: Sequence[np.ndarray], text: str, seed: int) -> np.ndarray:
        """See `PictureEditor`; an answer that is no picture counts as none."""
        fields = {"model": self.model, "prompt": text, "seed": str(seed), "n": "1"}
        body, kind = multipart(fields, [encode_png(picture) for picture in pictures])
        with _named_errors():
            opened = self._opened()
            sent = vlm.send(
                opened, f"{opened.url}/images/edits", body, _edited,
                kind=kind, most=MAX_PICTURE, sleep=self.sleep,
            )  # fmt: skip
            if sent.error is not None:
                raise sent.error
        return sent.value

    def _opened(self) -> vlm.Endpoint:
        """The same for `vlm`, with the key."""
        if self.key and not os.environ.get(self.key):
            raise CurationError(
                f"endpoint {self.url}: the environment variable {self.key} is empty; put the key"
                " there, or set the name to '' for a server without keys"
            )
        return vlm.Endpoint.open(
            self.url,
            self.model,
            key_name=self.key or None,
            timeout=self.timeout,
            tries=self.tries,
            wait=FIRST_WAIT,
        )


@contextlib.contextmanager
def _named_errors() -> Iterator[None]:
    """Errors of `vlm` as those of a run: nobody at the address ends it, a busy server does not."""
    try:
        yield
    except vlm.UnreachableError as error:
        raise CurationError(str(error)) from None
    except vlm.UnavailableError as error:
        raise NoAnswerError(str(error)) from None
    except vlm.VlmError as error:
        raise CurationError(str(error)) from None


def _edited(answer: Any) -> np.ndarray:
    """The picture in an answer of `images/edits`.

    Raises:
      JunkError: there is none.
    """
    from chameleon_jax.data.images import ImageError, open_image

    try:
        data = base64.b64decode(answer["data"][0]["b64_json"], validate=True)
        return np.asarray(open_image(data, name="the edited picture"))
    except (KeyError, IndexError, TypeError, ValueError, ImageError) as error:
        raise vlm.JunkError(
            f"images/edits gave no picture ({one_line(error)[:80]}); expected data[0].b64_json"
        ) from None


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

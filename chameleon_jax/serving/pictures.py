"""Pictures of people and garments that a stream can wear: those of the server, and uploads.

An upload is opened by its content, never by its name, in a process of its own with limits on memory
and time, and is kept as prepared pixels only. It is known by the hash of these pixels.

Needs no extra.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import subprocess
import sys
import threading
from collections import OrderedDict
from pathlib import Path

import numpy as np
from PIL import Image

from chameleon_jax.data.images import prepare_garment, prepare_reference
from chameleon_jax.errors import UserError

KINDS = ("person", "garment")
MAX_BYTES = 15_000_000
MAX_PIXELS = 40_000_000
MOST_KEPT = 256_000_000  # bytes of pixels of uploads; the oldest goes
SECONDS = 20  # to open an upload
MEMORY = 1_500_000_000  # bytes of address space of the process that opens it
THUMBNAIL = 160  # pixels of its longer side
FORMATS = {  # first bytes of what is accepted
    "PNG": (b"\x89PNG\r\n\x1a\n",),
    "JPEG": (b"\xff\xd8\xff",),
    "WebP": (b"RIFF",),
}


class PictureError(UserError):
    """A picture that cannot be used. The text is safe to be sent back."""


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture that can be worn, or a person.

    Attributes:
      name: by which it is known: letters, digits and `_`.
      kind: one of `KINDS`.
      title: for people.
      pixels: uint8 [h, w, 3], prepared for the model.
      thumbnail: PNG.
    """

    name: str
    kind: str
    title: str
    pixels: np.ndarray
    thumbnail: bytes


class Wardrobe:
    """All pictures of a server; safe to use from several threads.

    Args:
      size: (height, width) of the model's pictures.
    """

    def __init__(self, size: tuple[int, int]):
        self.size = size
        self._own: dict[str, Picture] = {}
        self._uploads: OrderedDict[str, Picture] = OrderedDict()
        self._lock = threading.Lock()

    def add_file(self, kind: str, path: Path, title: str) -> str:
        """A picture of the server itself. Returns its name.

        Raises:
          ImageError: it cannot be read.
        """
        prepare = prepare_reference if kind == "person" else prepare_garment
        picture = _picture(kind, title, prepare(path, self.size))
        with self._lock:
            self._own[picture.name] = picture
        return picture.name

    def add_upload(self, kind: str, data: bytes) -> Picture:
        """An upload, opened in a process of its own; waits for it.

        Raises:
          PictureError: it is too large, of another format, or damaged.
        """
        check_upload(kind, data)
        picture = _picture(kind, "yours", _opened_apart(kind, data, self.size))
        with self._lock:
            self._uploads[picture.name] = picture
            self._uploads.move_to_end(picture.name)
            while picture.pixels.nbytes * len(self._uploads) > MOST_KEPT:
                self._uploads.popitem(last=False)
        return picture

    def get(self, name: str, kind: str | None = None) -> Picture:
        """A picture by its name.

        Raises:
          PictureError: there is none, or it is of another kind.
        """
        with self._lock:
            picture = self._own.get(name) or self._uploads.get(name)
        if picture is None or kind not in (None, picture.kind):
            raise PictureError(f"no {kind or 'picture'} of that name")
        return picture

    def listed(self) -> list[Picture]:
        """Those of the server; uploads are known to who uploaded them."""
        with self._lock:
            return list(self._own.values())


def check_upload(kind: str, data: bytes) -> None:
    """Raise PictureError for what is refused without opening it."""
    if kind not in KINDS:
        raise PictureError(f"expected one of {', '.join(KINDS)}")
    if not data:
        raise PictureError("the picture is empty")
    if len(data) > MAX_BYTES:
        raise PictureError(f"the picture has more than {MAX_BYTES // 1_000_000} MB")
    known = any(data.startswith(start) for starts in FORMATS.values() for start in starts)
    if not known or (data[:4] == b"RIFF" and data[8:12] != b"WEBP"):
        raise PictureError(f"expected a picture in {', '.join(FORMATS)}")


def _opened_apart(kind: str, data: bytes, size: tuple[int, int]) -> np.ndarray:
    """Prepared pixels of an upload; a damaged or hostile one harms another process only."""
    command = [sys.executable, "-m", __name__, kind, str(size[0]), str(size[1])]
    try:
        done = subprocess.run(command, input=data, capture_output=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        raise PictureError("the picture takes too long to open") from None
    if done.returncode or len(done.stdout) != size[0] * size[1] * 3:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        reason = said[-1] if done.returncode == 3 and said else "it is damaged, or too large"
        raise PictureError(f"the picture cannot be used: {reason[:200]}")
    return np.frombuffer(done.stdout, np.uint8).reshape(*size, 3)


def _picture(kind: str, title: str, pixels: np.ndarray) -> Picture:
    digest = hashlib.sha256(kind.encode() + pixels.tobytes()).hexdigest()[:24]
    image = Image.fromarray(pixels)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return Picture(f"{kind}_{digest}", kind, title, pixels, encode_thumbnail(image))


def encode_thumbnail(image: Image.Image) -> bytes:
    """PNG without anything but pixels."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _main() -> int:
    """Open the picture on stdin and write its prepared pixels to stdout; 3: said why not."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    kind, height, width = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    try:
        image = Image.open(io.BytesIO(sys.stdin.buffer.read()), formats=["PNG", "JPEG", "WEBP"])
        if image.width * image.height > MAX_PIXELS:
            raise PictureError(f"more than {MAX_PIXELS // 1_000_000} megapixels")
        prepare = prepare_reference if kind == "person" else prepare_garment
        pixels = prepare(image, (height, width))
    except (UserError, OSError, ValueError) as error:
        reason = str(error) if isinstance(error, UserError) else "it is damaged"
        print(reason, file=sys.stderr)
        return 3
    sys.stdout.buffer.write(pixels.tobytes())
    return 0


if __name__ == "__main__":
    sys.exit(_main())

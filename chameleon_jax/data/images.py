"""Pictures in: any PNG, JPEG or WebP that a user holds becomes RGB, and then the model's size.

Sizes are (height, width) in pixels everywhere; arrays are uint8 [h, w, 3] unless said otherwise.
FashionChameleon (arXiv 2605.15824) resizes its training set bilinearly and the pictures of a user
with sharper filters; Wan2.2 and LongLive prepare a first frame in ways of their own. Each way is
one of three geometries (`fill`, `fit_on_white`, stretching) with a filter and rules of rounding.
"""

from __future__ import annotations

import io
import math
import os
import struct
import warnings
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from chameleon_jax.errors import UserError, one_line, printable
from chameleon_jax.files import open_to_read

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 50_000_000
MAX_BYTES = 100 * 2**20
# A longer strip has nothing to show, and filling the frame with it would need gigabytes.
MAX_ASPECT = 32
WHITE, BLACK = (255, 255, 255), (0, 0, 0)
Round = Callable[[float], int]  # `int` truncates, `round` goes to the nearest, half to even

# What Pillow's decoders raise on damaged files, beside OSError.
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    EOFError,
    OverflowError,
    MemoryError,
    struct.error,
    zlib.error,
)


class ImageError(UserError):
    """A picture cannot be used. The message is one line: which picture, and what is wrong."""


def open_image(
    source: str | os.PathLike | bytes | Image.Image | np.ndarray,
    *,
    name: str | None = None,
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_BYTES,
) -> Image.Image:
    """Read a picture as 8-bit RGB, upright, with transparency laid over white.

    Size and format are judged from the header, before anything is decoded. The content decides
    about the format, not the file's extension. Of an animation the first frame is taken. Colour
    profiles are not applied.

    Args:
      source: a path, the bytes of a file, a Pillow image, or an array uint8/uint16 [h, w], [h, w,
        1], [h, w, 3] or [h, w, 4] (RGB or RGBA).
      name: what messages call the picture; default the path, or "image".
      max_pixels: largest height * width.
      max_bytes: largest file.

    Returns:
      A Pillow image of mode RGB, fully loaded.

    Raises:
      ImageError: missing, unreadable, empty, truncated, of another format, too large, or too
        elongated.
    """
    if isinstance(source, np.ndarray):
        return _upright_rgb(_from_array(source, name or "image"), name or "image", max_pixels)
    if isinstance(source, Image.Image):
        return _upright_rgb(source, name or "image", max_pixels)
    if isinstance(source, (bytes, bytearray, memoryview)):
        name, data = name or "image", bytes(source)
    elif isinstance(source, (str, os.PathLike)):
        name = name or printable(os.fspath(source))
        data = _read_file(source, name, max_bytes)
    else:
        raise ImageError(
            f"{name or 'image'}: {type(source).__name__}; expected a path, bytes, a Pillow image or"
            " an array"
        )
    if not data:
        raise ImageError(f"{name}: the file is empty (0 bytes)")
    if len(data) > max_bytes:
        raise ImageError(
            f"{name}: {len(data) / 2**20:.1f} MiB; a picture may have at most"
            f" {max_bytes / 2**20:.0f} MiB"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise ImageError(
            f"{name}: far too many pixels; at most {max_pixels:,} are accepted"
        ) from None
    except UnidentifiedImageError:
        raise ImageError(
            f"{name}: not a PNG, JPEG or WebP picture, or damaged at its start"
        ) from None
    except _DECODE_ERRORS as error:
        raise ImageError(f"{name}: not a readable picture ({one_line(error)})") from None
    return _upright_rgb(image, name, max_pixels)


def prepare_reference(image: Any, size: tuple[int, int]) -> np.ndarray:
    """The person's picture as the sampler sees it: fills the frame, Lanczos.

    What is cut off is cut at fractions of a pixel, before scaling (`PIL.ImageOps.fit`).

    Args:
      image: whatever `open_image` takes, here and below.
      size: (height, width), here and below.

    Returns:
      uint8 [height, width, 3], here and below.

    Raises:
      ImageError: the picture cannot be used, here and below.
    """
    height, width = _check_size(size)
    return np.asarray(ImageOps.fit(open_image(image), (width, height), Image.Resampling.LANCZOS))


def prepare_garment(image: Any, size: tuple[int, int]) -> np.ndarray:
    """The garment's picture as the sampler sees it: the whole of it, on white, bicubic."""
    return fit_on_white(open_image(image), size, Image.Resampling.BICUBIC, round, round)


def prepare_training_frame(image: Any, size: tuple[int, int]) -> np.ndarray:
    """A video frame or a person's picture of the training set: fills the frame, bilinear.

    The scaled size is truncated, so that it may come out one pixel short; that pixel is black.
    """
    return fill(open_image(image), size, Image.Resampling.BILINEAR, int, round)


def prepare_training_garment(image: Any, size: tuple[int, int]) -> np.ndarray:
    """A garment's picture of the training set: the whole of it, on white, bilinear.

    An odd pixel of white goes to the right and to the bottom.
    """
    return fit_on_white(open_image(image), size, Image.Resampling.BILINEAR, int, math.floor)


def first_frame(image: Any, size: tuple[int, int]) -> np.ndarray:
    """A picture as the first frame of a clip, as Wan2.2 prepares it: fills the frame, Lanczos."""
    return fill(open_image(image), size, Image.Resampling.LANCZOS, round, math.floor)


def stretched(image: Any, size: tuple[int, int]) -> np.ndarray:
    """A picture as the first frame of a video, as LongLive prepares it: stretched, bilinear."""
    height, width = _check_size(size)
    return np.asarray(open_image(image).resize((width, height), Image.Resampling.BILINEAR))


def fill(
    image: Image.Image,
    size: tuple[int, int],
    resample: Image.Resampling,
    whole: Round,
    middle: Round,
) -> np.ndarray:
    """Scale a picture until it fills a frame, and cut off what stands over; its centre stays.

    Args:
      image: RGB.
      size: (height, width) of the frame.
      resample: filter of the scaling.
      whole: makes whole pixels of the scaled size. `int` may make it one pixel short of the frame;
        that pixel is black.
      middle: makes whole pixels of half of what stands over, which is cut off left and on top.

    Returns:
      uint8 [height, width, 3].
    """
    height, width = _check_size(size)
    scale = max(height / image.height, width / image.width)
    inner = (whole(image.height * scale), whole(image.width * scale))
    offset = (-middle((inner[0] - height) / 2), -middle((inner[1] - width) / 2))
    return _paste(image, inner, offset, size, resample, BLACK)


def fit_on_white(
    image: Image.Image,
    size: tuple[int, int],
    resample: Image.Resampling,
    whole: Round,
    middle: Round,
) -> np.ndarray:
    """Scale a picture until the whole of it is in a frame, centred on white.

    Args:
      image: RGB.
      size: (height, width) of the frame.
      resample: filter of the scaling.
      whole: makes whole pixels of the scaled size.
      middle: makes whole pixels of half of the margin, which goes left and on top.

    Returns:
      uint8 [height, width, 3].
    """
    height, width = _check_size(size)
    scale = min(height / image.height, width / image.width)
    inner = (max(1, whole(image.height * scale)), max(1, whole(image.width * scale)))
    offset = (middle((height - inner[0]) / 2), middle((width - inner[1]) / 2))
    return _paste(image, inner, offset, size, resample, WHITE)


def to_model(x: Any) -> Any:
    """uint8 pixels (NumPy or JAX, any shape) to float32 in [-1, 1]: (x / 255 - 0.5) / 0.5."""
    return (x.astype(np.float32) / 255 - 0.5) / 0.5


def to_uint8(x: Any) -> Any:
    """Float pixels in [-1, 1] (NumPy or JAX, any shape; clipped) to the nearest uint8."""
    return ((x.astype(np.float32).clip(-1, 1) + 1) * 127.5).round().astype(np.uint8)


def encode_image(image: np.ndarray | Image.Image) -> bytes:
    """Lossless WebP bytes of uint8 [h, w, 3] or of an RGB image: about 0.8 times a PNG's size."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", lossless=True, quality=60, method=3)
    return buffer.getvalue()


def _read_file(path: str | os.PathLike, name: str, max_bytes: int) -> bytes:
    with open_to_read(path, ImageError, name) as file:
        try:
            return file.read(max_bytes + 1)
        except OSError as error:
            raise ImageError(f"{name}: cannot be read ({error.strerror or error})") from None


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (3, 4))) or 0 in array.shape:
        raise ImageError(
            f"{name}: array of shape {array.shape}; expected [h, w], [h, w, 3] or [h, w, 4]"
        )
    if array.dtype == np.uint16:
        array = (array.astype(np.uint32) * 255 + 32767) // 65535
    elif array.dtype != np.uint8:
        raise ImageError(
            f"{name}: array of {array.dtype}; expected uint8 (0 to 255) or uint16 (0 to 65535)"
        )
    return Image.fromarray(array.astype(np.uint8))


def _upright_rgb(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError(f"{name}: {width} x {height} pixels; there is nothing in it")
    if width * height > max_pixels:
        raise ImageError(f"{name}: {width} x {height} pixels; at most {max_pixels:,} are accepted")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError(
            f"{name}: {width} x {height} pixels; one side may be at most {MAX_ASPECT} times the"
            " other"
        )
    try:
        if getattr(image, "n_frames", 1) > 1:
            image.seek(0)
        image.load()
        image = _turn_upright(image)
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            image = _from_array(_sixteen_bit(image, name), name)
        if image.has_transparency_data:
            image = image if image.mode == "RGBA" else image.convert("RGBA")
            opaque = Image.new("RGB", image.size, WHITE)
            opaque.paste(image, mask=image.getchannel("A"))
            return opaque
        return image if image.mode == "RGB" else image.convert("RGB")
    except ImageError:
        raise
    except _DECODE_ERRORS as error:
        raise ImageError(
            f"{name}: the picture is truncated or damaged ({one_line(error)})"
        ) from None


def _turn_upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation; damaged EXIF says nothing, and the pixels stay as they are."""
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        return ImageOps.exif_transpose(image) if turned else image
    except _DECODE_ERRORS:
        return image


def _sixteen_bit(image: Image.Image, name: str) -> np.ndarray:
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ImageError(
            f"{name}: pixel mode {image.mode} with values outside 0 to 65535; save it as 8-bit RGB"
        )
    return values.astype(np.uint16)


def _paste(
    image: Image.Image,
    inner: tuple[int, int],
    offset: tuple[int, int],
    size: tuple[int, int],
    resample: Image.Resampling,
    background: tuple[int, int, int],
) -> np.ndarray:
    """A picture scaled to `inner`, its corner at `offset` of a frame; all (rows, columns)."""
    if inner != (image.height, image.width):
        image = image.resize(inner[::-1], resample)
    out = Image.new("RGB", size[::-1], background)
    out.paste(image, offset[::-1])
    return np.asarray(out)


def _check_size(size: tuple[int, int]) -> tuple[int, int]:
    height, width = size
    if height < 1 or width < 1:
        raise ValueError(f"size is {size}; expected (height, width) of at least 1 pixel")
    return height, width

"""What stays of a stream: the film of what was shown, and a manifest that says how it was made.

A manifest holds the seed, the pictures and every change with the frame from which on it counts, so
that the same model makes the same film again (`session.interaction` with `at`).
"""

from __future__ import annotations

import base64
import datetime
import io
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from chameleon_jax import __version__, files
from chameleon_jax.serving import protocol
from chameleon_jax.serving.encoding import jpeg_to_h264, to_mp4
from chameleon_jax.serving.engine import Stream


def write_film(stream: Stream, out: BinaryIO) -> None:
    """The film of the frames that were shown, as MP4.

    Args:
      stream: running or not.
      out: a file that can seek.

    Raises:
      EncodingError: nothing was shown.
    """
    packets = stream.shown.packets()
    if stream.codec == "jpeg":
        packets = jpeg_to_h264(packets, stream.picture, stream.fps)
    to_mp4(packets, stream.fps, out)


def manifest(stream: Stream, config: Any) -> dict[str, Any]:
    """How a stream was made, as JSON values.

    Args:
      stream: running or not.
      config: of the pipeline.
    """
    return {
        "version": protocol.VERSION,
        "chameleon_jax": __version__,
        "model": config.get("name", ""),
        "sampler": config.sampler.to_dict(),
        "dtype": config.dtype,
        "quantize": config.get("quantize", "none"),
        "decoder": "small" if "decoder" in config.model else "vae",
        "seed": stream.seed,
        "fps": float(config.video.fps),
        "frames": len(stream.shown),
        "cut": stream.recording.full,
        "changes": list(stream.history),
        "pictures": {name: _png(pixels) for name, pixels in dict(stream.pictures).items()},
    }


def save(stream: Stream, config: Any, folder: Path) -> Path | None:
    """Write film and manifest of a stream into a folder.

    Returns:
      The film; None if nothing was shown.

    Raises:
      OSError: it cannot be written.
    """
    if not len(stream.shown):
        return None
    now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d_%H%M%S")
    path = folder / f"{now}_{stream.name}.mp4"
    with files.replacing(path) as part, part.open("wb+") as out:
        write_film(stream, out)
    files.write_json(path.with_suffix(".json"), manifest(stream, config))
    return path


def _png(pixels: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"

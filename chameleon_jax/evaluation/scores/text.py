"""Does the video show what the prompt says: cosine between the text and frames.

gme   GME (Alibaba-NLP/gme-Qwen2-VL-7B-Instruct, Apache-2.0) as OpenS2V calls it: 32 frames, the
      text with an instruction; from an endpoint that embeds texts and pictures, such as vLLM
clip  stand-in that a laptop runs: CLIP in two ONNX files, with its tokenizer. It reads no more
      than 77 tokens, fewer than many prompts have; how many it did not read is kept
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from chameleon_jax.errors import one_line
from chameleon_jax.evaluation.scores.base import (
    Metric,
    ModelFile,
    Needs,
    ScoreError,
    Setup,
    cosine,
    spread,
)
from chameleon_jax.evaluation.scores.onnx import CLIP_MEAN, CLIP_STD, OnnxModel, to_nchw
from chameleon_jax.evaluation.scores.pictures import to_send
from chameleon_jax.vlm import embed

FRAMES = 32
INSTRUCTION = "Find an image that matches the given text."  # what OpenS2V gives the text
OTHERWISE = "You are a helpful assistant."  # GME's own instruction, for pictures
CLIP_TOKENS = 77
CLIP_SIDE = 224  # pixels, unless the file says another size


class Gme(Metric):
    """GME from an endpoint: one request for the text, one for each frame."""

    name = "gme"
    columns = ("gme",)
    needs = Needs(endpoint="gme")

    def about(self) -> dict[str, Any]:
        return super().about() | {"model": self.setup.gme.model}

    def score(
        self, reference: np.ndarray, garment: np.ndarray, video: np.ndarray, prompt: str
    ) -> dict[str, Any]:
        ask = {"sleep": self.setup.sleep}
        text = np.array(embed(self.setup.gme, [prompt], system=INSTRUCTION, **ask))
        similar = []
        for i in spread(len(video), FRAMES):
            frame = embed(self.setup.gme, [to_send(video[i])], system=OTHERWISE, **ask)
            if len(frame) != len(text):
                raise ScoreError(
                    f"{self.setup.gme.url}: {len(frame)} numbers for a frame, {len(text)} for the"
                    " text; expected as many"
                )
            similar.append(cosine(text, np.array(frame)))
        return {"gme": float(np.mean(similar))}


class Clip(Metric):
    """CLIP from ONNX files: [n, 3, s, s] and [n, 77] in, vectors out."""

    name = "clip"
    columns = ("clip",)
    needs = Needs(
        ("onnxruntime",),
        tuple(
            ModelFile(name, "MIT", "export it from openai/clip-vit-large-patch14")
            for name in ("clip_image.onnx", "clip_text.onnx", "clip_tokenizer.json")
        ),
    )

    def __init__(self, setup: Setup):
        from tokenizers import Tokenizer

        super().__init__(setup)
        image, text, tokenizer = (setup.models / file.name for file in self.needs.files)
        self._image, self._text = OnnxModel(image), OnnxModel(text, rank=2)
        try:
            self._tokenizer = Tokenizer.from_file(str(tokenizer))
        except Exception as error:  # the library raises plain exceptions
            raise ScoreError(f"{tokenizer}: not a tokenizer ({one_line(error)})") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def score(
        self, reference: np.ndarray, garment: np.ndarray, video: np.ndarray, prompt: str
    ) -> dict[str, Any]:
        ids, left_out = self.ids(prompt)
        text = self._text(ids)[0].ravel()
        similar = []
        for i in spread(len(video), FRAMES):
            pixels = clip_pixels(video[i], self._image.shape[2] or CLIP_SIDE)
            similar.append(cosine(text, self._image(to_nchw(pixels))[0].ravel()))
        return {"clip": float(np.mean(similar)), "tokens_left_out": left_out}

    def ids(self, prompt: str) -> tuple[np.ndarray, int]:
        """Tokens [1, 77] of a text, its end token behind it and as padding; how many were cut."""
        found = self._tokenizer.encode(prompt).ids
        end = found[-1]
        left_out = max(0, len(found) - CLIP_TOKENS)
        kept = [*found[: CLIP_TOKENS - 1], end] if left_out else found
        kept = kept + [end] * (CLIP_TOKENS - len(kept))
        return np.array([kept], np.int64), left_out


def clip_pixels(frame: np.ndarray, side: int) -> np.ndarray:
    """The middle square of a frame as CLIP takes it, scaled bicubically; float32 [s, s, 3]."""
    image = Image.fromarray(frame)
    scale = side / min(image.size)
    size = tuple(max(side, int(length * scale)) for length in image.size)
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = ((length - side) // 2 for length in size)
    square = np.asarray(image.crop((left, top, left + side, top + side)))
    return (square.astype(np.float32) / 255 - CLIP_MEAN) / CLIP_STD

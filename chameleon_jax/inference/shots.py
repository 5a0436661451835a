"""Videos of several shots, streamed: LongLive-2.0 (arXiv 2605.18739).

They are made from prompts, and from a first frame if one is given.

    streams = MultiShot(Pipeline.from_pretrained(FOLDER, load_config("configs/longlive2_5b.py")))
    shots = [Shot("a cat wakes up", 6), Shot("it walks out into the snow", 10)]
    for frames in streams.stream(shots, image="cat.png", seed=0):
        show(frames)                          # uint8 [t, h, w, 3]: 29 frames, then 32, 32, ...

Each chunk gets the prompt of its shot. Where a new shot begins there is a cut: the prompt of its
first chunk says so, in words put in front, and the cache keeps that chunk and leaves a gap in time
(attention/policies.py). A shot without a cut continues the one before it with another prompt.
Memory does not grow with the length of the video.

Axes: b batch (always 1), t pixel frames, f latent frames, h w grid, c channels.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from chameleon_jax.attention.policies import CachePolicy
from chameleon_jax.data.images import stretched
from chameleon_jax.errors import UserError
from chameleon_jax.inference.pipeline import Pipeline
from chameleon_jax.keys import check_seed

CUT_WORDS = "The scene transitions. "  # the published model was trained with them before a cut
PROMPTS_KEPT = 4  # on the device, as K, V: those of two shots, each with and without CUT_WORDS


class MultiShotError(UserError):
    """A video cannot be made as asked. The message is one line."""


@dataclasses.dataclass(frozen=True)
class Shot:
    """A run of chunks with one prompt."""

    prompt: str  # what happens, in any language; without `CUT_WORDS`
    chunks: int
    cut: bool = True  # a new shot begins; False: the one before continues with this prompt


class MultiShot:
    """Makes videos of several shots with the networks of a pipeline.

    Holds prompts that were encoded, no video.

    Args:
      pipeline: networks, tokenizer and config, without condition frames.

    Raises:
      MultiShotError: the config is for another kind of stream.
    """

    def __init__(self, pipeline: Pipeline):
        context = pipeline.config.cache.context
        if context:
            raise MultiShotError(
                f"cache.context is {context}: that stream starts from condition frames, see"
                " inference/session.py; expected 0, as in configs/longlive2_5b.py"
            )
        self.pipeline = pipeline
        self._media, self._stream = pipeline.media, pipeline.stream
        self._text_kv = functools.lru_cache(PROMPTS_KEPT)(
            lambda prompt: pipeline.stream_text(pipeline.encode_prompt(prompt))
        )

    def __repr__(self) -> str:
        return f"MultiShot({self.pipeline!r})"

    def stream(
        self, shots: Sequence[Shot], *, image: Any = None, seed: int = 0
    ) -> Iterator[np.ndarray]:
        """Make a video, a chunk whenever the next one is asked for.

        Everything is checked before the first one. Several streams may go on side by side.

        Args:
          shots: one after the other.
          image: the first frame: whatever `images.open_image` takes; see `stretched`. None: from
            the prompts alone.
          seed: of the noise, in [0, 2**32).

        Returns:
          Frames uint8 [t, h, w, 3] of one chunk after the other, on the host. t is 4 times the
          latent frames of a chunk (Wan2.2's VAE), 3 less in the first one.

        Raises:
          MultiShotError: no shots, or one that cannot be made.
          SeedError: the seed is out of range.
          PositionError: the video is longer than the positions reach.
          ImageError: the image cannot be used.
        """
        shots = list(shots)
        check_shots(shots, self._stream.policy)
        check_seed(int(seed))
        picture = None if image is None else stretched(image, self.pipeline.size)
        return self._chunks(shots, picture, int(seed))

    def _chunks(
        self, shots: list[Shot], picture: np.ndarray | None, seed: int
    ) -> Iterator[np.ndarray]:
        self.pipeline.compile()
        media, stream, decoder = self._media, self._stream, None
        cache = stream.new_cache()
        image = None if picture is None else media.encode_image(picture)
        for number, (prompt, cut) in enumerate(chunk_prompts(shots)):
            latents, cache = stream.shot_chunk(
                cache, self._text_kv(prompt), seed, number, cut=cut, image=image
            )
            image = None  # from now on nothing is given
            shown, decoder = media.decode(latents, decoder)
            yield np.array(shown)


def check_shots(shots: Sequence[Shot], policy: CachePolicy) -> None:
    """Raise before anything is loaded or made if a video cannot be made of these shots.

    Raises:
      MultiShotError: no shots, or one that cannot be made.
      PositionError: the video is longer than the positions reach.
    """
    if not shots:
        raise MultiShotError("no shots; expected at least one")
    for index, shot in enumerate(shots):
        if not isinstance(shot.prompt, str):
            raise MultiShotError(
                f"shot {index}: the prompt is {type(shot.prompt).__name__}; expected a string"
            )
        if shot.prompt.startswith(CUT_WORDS):
            raise MultiShotError(
                f"shot {index}: the prompt begins with {CUT_WORDS!r}, which is put in front of a"
                " cut for you; leave it out"
            )
        if shot.chunks < 1:
            raise MultiShotError(f"shot {index}: {shot.chunks} chunks; expected at least 1")
    chunks, cuts = sum(shot.chunks for shot in shots), sum(shot.cut for shot in shots[1:])
    policy.check_length(chunks - 1, cuts)


def chunk_prompts(shots: Sequence[Shot]) -> Iterator[tuple[str, bool]]:
    """The prompt of each chunk, and whether the chunk begins a new shot."""
    for index, shot in enumerate(shots):
        cut = shot.cut and index > 0
        yield CUT_WORDS + shot.prompt if cut else shot.prompt, cut
        for _ in range(shot.chunks - 1):
            yield shot.prompt, False

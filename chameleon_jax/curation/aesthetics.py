"""How good a clip looks, by a score of single frames.

FashionChameleon (arXiv 2605.15824, appendix A) takes Q-Align. Here it is the aesthetic predictor
on CLIP ViT-L/14 that the paper's reward uses, too (`models/reward.py`), on the device and in
batches. Any other score of frames has a place here: it is one method.

Axes: n frames, h w pixels.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from chameleon_jax.curation.clip import Clip
from chameleon_jax.curation.filters import PictureFilter
from chameleon_jax.curation.footage import Footage, Samples
from chameleon_jax.curation.stage import CurationError, Found, Limits
from chameleon_jax.data.images import fit_on_white
from chameleon_jax.data.sources import file_hash

FRAMES = 4  # of a clip that are scored
FILES = ("clip.safetensors", "aesthetic.safetensors")
WHOLE = "reward.safetensors"


class FrameScorer(Protocol):
    """Scores pictures.

    Another `name`, if it has one, says that the same pictures may have other scores now.
    """

    def score(self, frames: np.ndarray) -> np.ndarray:
        """[n], higher is better, of uint8 [n, h, w, 3], RGB."""


class ClipScorer:
    """CLIP and the aesthetic predictor: scores frames, and says which garments are alike.

    Args:
      folder: holds, itself or in folders, what `python -m converters` makes of the two checkpoints,
        clip.safetensors and aesthetic.safetensors; or both as reward.safetensors.
      sizes: of the image encoder, `models.reward.ClipVisionConfig`'s; None: ViT-L/14.

    Raises:
      CurationError: the files are not there.
      WeightsError: they do not fit.
    """

    def __init__(self, folder: str | os.PathLike, sizes: Mapping[str, int] | None = None):
        import jax
        import jax.numpy as jnp
        from flax import nnx

        from chameleon_jax.models.reward import ClipVisionConfig, Reward, preprocess
        from chameleon_jax.weights.params import check_fit, param_shapes, set_params
        from chameleon_jax.weights.tensors import read_tensors

        files = reward_files(Path(folder))
        self.name = " ".join(["clip", *(file_hash(file) for file in files)])
        config = ClipVisionConfig.vit_l14() if sizes is None else ClipVisionConfig(**sizes)
        model = nnx.eval_shape(lambda: Reward(config, rngs=nnx.Rngs(0)))
        tensors: dict[str, np.ndarray] = {}
        for file in files:
            tensors |= read_tensors(file)
        found = {name: value.shape for name, value in tensors.items()}
        check_fit(param_shapes(model), found, what=str(folder))
        set_params(model, tensors)
        graph, self._state = nnx.split(model)
        self._side = config.image
        self._run = jax.jit(lambda state, frames: nnx.merge(graph, state).score(frames))

        def embed(state, frames):
            x = nnx.merge(graph, state).vision(preprocess(frames, config.image))
            return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

        self._embed = jax.jit(embed)

    def embed(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """See `garment.Embedder`; pictures of any shapes, whole and on white."""
        from PIL import Image

        size = (self._side, self._side)
        whole = [
            fit_on_white(Image.fromarray(picture), size, Image.Resampling.BICUBIC, round, round)
            for picture in pictures
        ]
        # One at a time: one program, however many garments there are.
        return np.concatenate([np.asarray(self._embed(self._state, x[None])) for x in whole])

    def score(self, frames: np.ndarray) -> np.ndarray:
        """See `FrameScorer`; one program for each size and number of frames."""
        return np.asarray(self._run(self._state, frames))


def reward_files(folder: Path) -> list[Path]:
    """The files of CLIP and of the aesthetic predictor in a folder.

    Raises:
      CurationError: one is not there.
    """
    if (folder / WHOLE).is_file():
        return [folder / WHOLE]
    files = []
    for name in FILES:
        found = sorted(folder.rglob(name))  # the converter makes a folder for each
        if not found:
            raise CurationError(
                f"{folder}: no {name} in it; aesthetics need the vision tower of"
                " openai/clip-vit-large-patch14 (MIT) and sac+logos+ava1-l14-linearMSE.pth"
                " (Apache-2.0), converted by `python -m converters IN --to jax --out`"
                f" {folder}/clip and {folder}/head; or leave them out with"
                " --config.aesthetics.weights=none"
            )
        files.append(found[0])
    return files


class AestheticFilter(PictureFilter):
    """Refuses clips of low score; measures `aesthetic`, the mean over some frames.

    Args:
      footage: opens the clips.
      scorer: of frames.
      limits: of what it measures.
    """

    name, version = "aesthetics", "1"
    needs = ("shots",)
    graded = ("aesthetic",)

    def __init__(self, footage: Footage, scorer: FrameScorer, limits: Mapping[str, Limits]):
        super().__init__(footage)
        self.scorer, self.limits = scorer, limits
        name = getattr(scorer, "name", type(scorer).__name__)
        self.settings = {**self.settings, "scorer": name}

    def look(self, clip: Clip, samples: Samples) -> Found:
        """See `PictureFilter`."""
        del clip
        step = max(1, len(samples.frames) // FRAMES)
        scores = self.scorer.score(samples.frames[::step][:FRAMES])
        return Found(values={"aesthetic": float(np.mean(scores))})


def chosen_scorer(weights: str, sizes: Mapping[str, int] | None = None) -> list[ClipScorer]:
    """The scorer of a config; empty if aesthetics are left out (`none`)."""
    return [] if weights == "none" else [ClipScorer(weights, sizes)]

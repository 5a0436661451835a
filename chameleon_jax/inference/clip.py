"""Whole clips from public weights of Wan2.2-TI2V.

They are made from a prompt, or from a prompt and the first frame.

    generator = Generator(Pipeline.from_pretrained(FOLDER, load_config("configs/wan22_ti2v.py")))
    latents = generator.generate("a cat surfs", image="cat.png", seed=0)
    for frames in generator.decode(latents): ...  # uint8 [t, h, w, 3]

Every frame sees every frame (Wan 2.1, arXiv 2503.20314): the clip is denoised as a whole, and
decoded as a stream, so that its pixels never lie on the device all at once.

The first frame is not denoised. Its latent stands in front of the others, at t = 0, as a context
frame of the teacher does (models/dit.py, `bidirectional_forward`); the published model says the
same in other words: it denoises all frames and puts the first one back before every step, and after
the last.

Axes: b batch (always 1), t pixel frames, f latent frames, h w grid, c channels.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from chameleon_jax.attention.positions import MAX_POSITION
from chameleon_jax.data.images import first_frame, open_image
from chameleon_jax.diffusion import flow
from chameleon_jax.diffusion.sampler import NEGATIVE_PROMPT, Model, guided, step_unipc
from chameleon_jax.diffusion.unipc import GRIDS, UniPcState, UniPcTable, unipc_init, unipc_table
from chameleon_jax.errors import UserError
from chameleon_jax.inference.pipeline import Pipeline
from chameleon_jax.keys import check_seed, inference_key
from chameleon_jax.models.build import read_sizes
from chameleon_jax.models.dit import TextKV, bidirectional_forward

Prompt = str | jax.Array | np.ndarray  # text, or encoded states [1, l, m]


class GenerateError(UserError):
    """A clip cannot be made as asked. The message is one line."""


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """How a clip is denoised. The defaults are those of the published model."""

    grid: str = (
        "wan"  # sigmas of the steps, see `unipc.GRIDS`: the original's, or those of diffusers
    )
    steps: int = 50
    shift: float = flow.SHIFT  # more: more of the steps at high noise
    guidance: float = 5.0  # 1: the prompt alone; the negative prompt is not computed
    negative_prompt: str = NEGATIVE_PROMPT

    def __post_init__(self):
        if self.grid not in GRIDS:
            raise GenerateError(f"grid {self.grid!r} is not one of {', '.join(GRIDS)}")
        if not 1 <= self.steps <= flow.ROWS:
            raise GenerateError(f"steps {self.steps}: expected 1 to {flow.ROWS}")
        if not (math.isfinite(self.guidance) and self.guidance >= 0):
            raise GenerateError(
                f"guidance {self.guidance}: expected a number from 0 up; 1 is the prompt alone"
            )
        if not (math.isfinite(self.shift) and self.shift > 0):
            raise GenerateError(
                f"shift {self.shift}: expected a number above 0; the published model has"
                f" {flow.SHIFT}"
            )
        try:
            self.table()
        except ValueError:
            raise GenerateError(
                f"shift {self.shift} with {self.steps} steps: its sigmas are equal;"
                " expected a shift nearer"
                f" to {flow.SHIFT}"
            ) from None

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> GenerateConfig:
        """From the group `generate` of a pipeline's config.

        Raises:
          GenerateError: there is no such group, or it cannot be used.
        """
        if "generate" not in config:
            raise GenerateError(
                f"config {config.get('name', '')} has no group 'generate'; expected one as in"
                " configs/wan22_ti2v.py"
            )
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(config["generate"]) - known)
        if unknown:
            raise GenerateError(
                f"generate.{unknown[0]}: no such key; expected some of {', '.join(sorted(known))}"
            )
        return cls(**config["generate"])

    def table(self) -> UniPcTable:
        """The solver's weights, float32, a row a step."""
        table = unipc_table(GRIDS[self.grid](self.steps, self.shift))
        return jax.tree.map(lambda x: x.astype(np.float32), table)


def latent_shape(
    config: Mapping[str, Any], size: tuple[int, int], frames: int, *, image: bool
) -> tuple[int, int, int, int, int]:
    """Shape [1, f, h, w, c] of a clip's latents.

    Args:
      config: of a pipeline; says by how much the VAE shrinks frames, and what the transformer takes
        as a token.
      size: (height, width) in pixels.
      frames: pixel frames.
      image: is the first frame given? Then there must be others.

    Raises:
      GenerateError: the networks cannot make that size or length; the nearest that they can make is
        named.
    """
    vae = read_sizes("vae", config["model"]["vae"])
    units = size_units(config)
    if any(side < unit or side % unit for side, unit in zip(size, units, strict=True)):
        fitting = [
            max(unit, round(side / unit) * unit) for side, unit in zip(size, units, strict=True)
        ]
        raise GenerateError(
            f"size {size[0]}x{size[1]}: expected a height that is a multiple of {units[0]} and a"
            " width that is one of"
            f" {units[1]}; the nearest size is {fitting[0]}x{fitting[1]}"
        )
    group = vae.temporal_factor
    if frames < 1 or (frames - 1) % group:
        below = max(0, frames - 1) // group * group + 1
        nearest = f"are {below} and {below + group}" if frames > 1 else "is 1"
        raise GenerateError(f"{frames} frames: expected {group}k + 1; the nearest {nearest}")
    if image and frames == 1:
        raise GenerateError(
            "1 frame, which is the image itself: nothing to generate; the shortest clip is"
            f" {group + 1}"
        )
    latents = (frames - 1) // group + 1
    tokens = (latents, size[0] // units[0], size[1] // units[1])
    if max(tokens) > MAX_POSITION:
        most = (MAX_POSITION - 1) * group + 1
        raise GenerateError(
            f"{frames} frames of {size[0]}x{size[1]}: expected at most {most} frames of"
            f" {MAX_POSITION * units[0]}x{MAX_POSITION * units[1]}, as far as positions reach"
        )
    grid = (side // vae.spatial_factor for side in size)
    return 1, latents, *grid, vae.z_dim


def size_units(config: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width in pixels of a token: what the sides of a clip are multiples of."""
    factor = read_sizes("vae", config["model"]["vae"]).spatial_factor
    _, rows, columns = read_sizes("dit", config["model"]["dit"]).patch
    return factor * rows, factor * columns


def best_size(picture: tuple[int, int], area: int, units: tuple[int, int]) -> tuple[int, int]:
    """The (height, width) for a clip that starts with a picture, as the published model chooses it.

    The two candidates take one side of the ideal rectangle, rounded down to a multiple of its unit,
    and as much of the other as the area leaves. The one whose aspect ratio is nearer to the
    picture's wins; if both are as near, the one that began with the height.

    Args:
      picture: (height, width) of the picture.
      area: most pixels of a frame; only a picture so long that a side would come out empty gets
        more.
      units: of height and width.
    """
    unit_h, unit_w = units
    ratio = picture[1] / picture[0]
    ideal_w = (area * ratio) ** 0.5
    ideal_h = area / ideal_w

    def down(side: float, unit: int) -> int:
        return max(unit, int(side // unit) * unit)

    def stretch(size: tuple[int, int]) -> float:
        own = size[1] / size[0]
        return max(ratio / own, own / ratio)

    width, height = down(ideal_w, unit_w), down(ideal_h, unit_h)
    by_width = (down(area / width, unit_h), width)
    by_height = (height, down(area / height, unit_w))
    return by_width if stretch(by_width) < stretch(by_height) else by_height


class Generator:
    """Makes clips with the networks of a pipeline.

    Holds compiled programs, which serve all settings, and no clip.

    Args:
      pipeline: networks, tokenizer and config.
      settings: how to denoise, unless a call says otherwise; default the group `generate` of the
        pipeline's config.

    Raises:
      GenerateError: neither settings nor such a group, or a group that cannot be used; or a
        pipeline with a mesh.
    """

    def __init__(self, pipeline: Pipeline, settings: GenerateConfig | None = None):
        if pipeline.mesh is not None:
            raise GenerateError(
                "a pipeline with a mesh: whole clips are made on one device; load it without one"
            )
        self.pipeline = pipeline
        self.settings = GenerateConfig.read(pipeline.config) if settings is None else settings
        self._media = pipeline.media
        graph = nnx.graphdef(pipeline.dit)

        def step(
            weights: nnx.State,
            x: jax.Array,
            state: UniPcState,
            row: UniPcTable,
            image: jax.Array | None,
            text_kv: TextKV,
            negative_kv: TextKV | None,
            scale: jax.Array,
        ) -> tuple[jax.Array, UniPcState]:
            dit = nnx.merge(graph, weights)

            def with_prompt(kv: TextKV) -> Model:
                # Guidance is a difference of near equals, multiplied: in float32, as is the solver.
                return lambda x, t: bidirectional_forward(dit, image, x, t, kv).astype(jnp.float32)

            model = with_prompt(text_kv)
            if negative_kv is not None:
                model = guided(model, with_prompt(negative_kv), scale)
            return step_unipc(model, row, x, state)

        self._step = jax.jit(step, donate_argnums=(1, 2))

    def __repr__(self) -> str:
        return f"Generator({self.pipeline!r}, {self.settings.steps} steps)"

    def generate(
        self,
        prompt: Prompt,
        *,
        image: str | os.PathLike | bytes | Image.Image | np.ndarray | None = None,
        negative_prompt: Prompt | None = None,
        size: tuple[int, int] | None = None,
        frames: int | None = None,
        seed: int = 0,
        noise: jax.Array | np.ndarray | None = None,
        settings: GenerateConfig | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> jax.Array:
        """Denoise a clip.

        Args:
          prompt: what happens, in any language, or encoded states.
          image: the first frame, or None for a clip from the prompt alone. See `first_frame`.
          negative_prompt: what to keep away from; default that of the settings. Not read if
            guidance is 1.
          size: (height, width). Default that of the config's video, or with an image what
            `best_size` makes of the image and the area of the config's video.
          frames: pixel frames; default those of the config's video.
          seed: of the noise, in [0, 2**32).
          noise: what to start from instead, standard normal [1, f, h, w, c]. With an image its
            first frame is not read.
          settings: how to denoise; default those of the generator.
          on_step: called with (steps done, steps in all): with 0 when the prompts and the image are
            encoded and the first step starts, then after every step. The first step includes
            compilation.

        Returns:
          Scaled latents [1, f, h, w, c], float32; the first frame is that of the image.

        Raises:
          GenerateError: size, length, seed or noise do not fit.
          ImageError: the image cannot be used.
          PipelineError: a prompt cannot be used.
        """
        settings, config = settings or self.settings, self.pipeline.config
        picture = None if image is None else open_image(image)
        if size is None:
            height, width = self.pipeline.size
            size = (
                (height, width)
                if picture is None
                else best_size((picture.height, picture.width), height * width, size_units(config))
            )
        frames = config.video.frames if frames is None else frames
        shape = latent_shape(config, size, frames, image=picture is not None)
        check_seed(seed)
        if noise is not None and np.shape(noise) != shape:
            raise GenerateError(f"noise is {np.shape(noise)}; expected {shape}")

        text_kv, negative_kv, z_image = self._text_kv(prompt), None, None
        if settings.guidance != 1:
            negative_kv = self._text_kv(
                settings.negative_prompt if negative_prompt is None else negative_prompt
            )
        # A copy of noise that was handed in: the solver consumes its sample.
        x = clip_noise(seed, shape) if noise is None else jnp.array(noise, jnp.float32)
        if picture is not None:
            z_image, x = self._media.encode_image(first_frame(picture, size)), x[:, 1:]
        state, table, scale = unipc_init(x), settings.table(), np.float32(settings.guidance)
        jax.block_until_ready((text_kv, negative_kv, z_image))
        for k in range(settings.steps):
            if on_step is not None:
                on_step(k, settings.steps)
            row = jax.tree.map(lambda rows, k=k: rows[k], table)
            x, state = self._step(
                self._media.weights["dit"], x, state, row, z_image, text_kv, negative_kv, scale
            )
            # Else all steps would be started at once, and Ctrl-C would wait for them.
            x.block_until_ready()
        if on_step is not None:
            on_step(settings.steps, settings.steps)
        return x if z_image is None else jnp.concatenate([z_image, x], axis=1)

    def decode(self, latents: jax.Array) -> Iterator[np.ndarray]:
        """Frames uint8 [t, h, w, 3] of a clip, one latent frame after the other.

        1 frame, then 4 each, with Wan2.2's VAE.

        Args:
          latents: from `generate`.
        """
        state = None
        for i in range(latents.shape[1]):
            frames, state = self._media.decode(latents[:, i : i + 1], state)
            yield np.asarray(frames)

    def _text_kv(self, prompt: Prompt) -> TextKV:
        return self._media.text_kv(self.pipeline.encode_prompt(prompt))


def clip_noise(seed: int, shape: tuple[int, ...]) -> jax.Array:
    """What a clip starts from: standard normal, float32, the same for the same seed and shape."""
    key = inference_key(np.uint32(seed), "clip_noise")
    return jax.random.normal(key, shape, jnp.float32)

"""The reward of GR-DMD (FashionChameleon, arXiv 2605.15824): how good a frame looks, as one number.

The image side of CLIP ViT-L/14 (Radford et al., arXiv 2103.00020) embeds a frame; the LAION
aesthetic predictor, a few linear layers on the normalised embedding, scores it. `Reward` is both,
from pixels of any size to the score, on the device.

Axes: b batch, h w pixels, c colours, l tokens (the class token and the patches), n heads, d head
dim, m width.
"""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from chameleon_jax.attention.core import attention
from chameleon_jax.models.checks import check_positive, check_sizes
from chameleon_jax.models.dit import MLP, LayerNorm
from chameleon_jax.sharding import constrain_samples

# Of the colours on which CLIP was trained, for pixels in [0, 1].
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)

HEAD_WIDTHS = (1024, 128, 64, 16, 1)  # outputs of the layers of the aesthetic predictor


@dataclasses.dataclass(frozen=True)
class ClipVisionConfig:
    """Sizes of the image encoder, and how it is computed.

    A value that cannot be used raises a ValueError when the config is made.
    """

    width: int  # channels of the residual stream
    ffn: int  # hidden channels of the feed-forward
    heads: int  # attention heads; width / heads is the head dim
    layers: int  # blocks
    projection: int  # channels of the embedding
    image: int = 224  # rows and columns of a prepared frame
    patch: int = 14  # rows and columns of pixels that make a token
    eps: float = 1e-5  # added to variances in the norms
    attention: str | None = None  # "cudnn", "splash", "xla"; None chooses by platform

    def __post_init__(self):
        check_sizes(self, "width", "ffn", "heads", "layers", "projection", "image", "patch")
        check_positive(self, "eps")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.image % self.patch:
            raise ValueError(f"image {self.image} is not a whole number of patches of {self.patch}")

    @property
    def tokens(self) -> int:
        """The class token and the patches."""
        return 1 + (self.image // self.patch) ** 2

    @classmethod
    def vit_l14(cls) -> ClipVisionConfig:
        """CLIP ViT-L/14 at 224 x 224: 392 tensors, 303,966,208 parameters."""
        return cls(width=1024, ffn=4096, heads=16, layers=24, projection=768)


def preprocess(frames: jax.Array, size: int = 224) -> jax.Array:
    """Prepare frames for CLIP: resize the shortest side to `size`, crop the centre, normalise.

    Resizing is bicubic and antialiased. The frame is rounded to 8 bits three times: before it is
    resized, after its width was changed and after its height was changed. Both image processors of
    transformers 5 do so, that of Pillow and that of torchvision. With random weights the score is
    within 2e-4 of the first and 6e-4 of the second; rounded once or not at all it differs by up to
    2e-2. Where a frame is more than twice as high as wide, Pillow 13 and later change the height
    first; torchvision does not, and neither does this function.

    The rounding passes no gradient.

    Args:
      frames: [b, h, w, 3] of any size, RGB; uint8, or float in [0, 255], which is rounded to whole
        levels.
      size: rows and columns of the result.

    Returns:
      [b, size, size, 3] float32.

    Raises:
      ValueError: the shape or the dtype is another one.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape[1:3]:
        raise ValueError(f"frames are {frames.shape}; expected [b, h, w, 3]")
    if frames.dtype != jnp.uint8 and not jnp.issubdtype(frames.dtype, jnp.floating):
        raise ValueError(f"frames are {frames.dtype}; expected uint8, or float in [0, 255]")
    b, h, w, _ = frames.shape
    rows, columns = (size * side // min(h, w) for side in (h, w))
    # Halves are rounded to even, as when frames are stored.
    x = jnp.clip(jnp.round(frames.astype(jnp.float32)), 0, 255)
    x = _whole_levels(jax.image.resize(x, (b, h, columns, 3), "cubic", antialias=True))
    x = _whole_levels(jax.image.resize(x, (b, rows, columns, 3), "cubic", antialias=True))
    top, left = (rows - size) // 2, (columns - size) // 2
    x = x[:, top : top + size, left : left + size]
    return (x / 255 - MEAN) / STD


def _whole_levels(x: jax.Array) -> jax.Array:
    """Round to 0 .. 255, halves up, as resizing in fixed point does."""
    return jnp.clip(jnp.floor(x + 0.5), 0, 255)


def quick_gelu(x: jax.Array) -> jax.Array:
    """x sigmoid(1.702 x), the approximation of GELU with which CLIP was trained."""
    return x * jax.nn.sigmoid(1.702 * x)


class SelfAttention(nnx.Module):
    """Multi-head attention between all tokens."""

    def __init__(
        self, config: ClipVisionConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype, param_dtype: jnp.dtype
    ):
        kw = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        self.config = config
        self.q, self.k, self.v, self.o = (
            nnx.Linear(config.width, config.width, **kw) for _ in range(4)
        )

    def __call__(self, x_blm: jax.Array) -> jax.Array:
        q, k, v = (
            rearrange(project(x_blm), "b l (n d) -> b l n d", n=self.config.heads)
            for project in (self.q, self.k, self.v)
        )
        y_blnd = attention(q, k, v, backend=self.config.attention)
        return self.o(rearrange(y_blnd, "b l n d -> b l (n d)"))


class Block(nnx.Module):
    """Pre-norm attention and feed-forward, each with a residual."""

    def __init__(
        self, config: ClipVisionConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype, param_dtype: jnp.dtype
    ):
        kw = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        self.norm1 = LayerNorm(config.width, config.eps, param_dtype=param_dtype)
        self.attn = SelfAttention(config, **kw)
        self.norm2 = LayerNorm(config.width, config.eps, param_dtype=param_dtype)
        self.ffn = MLP(config.width, config.ffn, config.width, quick_gelu, **kw)

    def __call__(self, x_blm: jax.Array) -> jax.Array:
        x_blm = x_blm + self.attn(self.norm1(x_blm))
        return x_blm + self.ffn(self.norm2(x_blm))


class ClipVision(nnx.Module):
    """The image encoder of CLIP with its projection: prepared frames to embeddings.

    Args:
      config: sizes.
      rngs: source of the initial weights.
      dtype: of the computation; norms and softmax stay in float32.
      param_dtype: of the parameters.
    """

    def __init__(
        self,
        config: ClipVisionConfig,
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype = jnp.float32,
        param_dtype: jnp.dtype = jnp.float32,
    ):
        kw = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        m, patch = config.width, (config.patch, config.patch)
        self.config, self.dtype = config, dtype
        self.patch_embedding = nnx.Conv(
            3, m, patch, strides=patch, padding="VALID", use_bias=False, **kw
        )
        class_embedding = jax.random.normal(rngs.params(), (m,), param_dtype) * m**-0.5
        positions = jax.random.normal(rngs.params(), (config.tokens, m), param_dtype) * m**-0.5
        self.class_embedding = nnx.Param(class_embedding)
        self.positions = nnx.Param(positions)
        self.norm_in = LayerNorm(m, config.eps, param_dtype=param_dtype)
        self.blocks = nnx.List([Block(config, **kw) for _ in range(config.layers)])
        self.norm_out = LayerNorm(m, config.eps, param_dtype=param_dtype)
        self.proj = nnx.Linear(m, config.projection, use_bias=False, **kw)

    def __call__(self, x_bhwc: jax.Array) -> jax.Array:
        """Embed frames.

        Args:
          x_bhwc: from `preprocess`, [b, image, image, 3].

        Returns:
          [b, projection] in the computing dtype, not normalised.

        Raises:
          ValueError: the frames are of another size.
        """
        image = self.config.image
        if x_bhwc.shape[1:] != (image, image, 3):
            raise ValueError(
                f"frames are {x_bhwc.shape}; expected [b, {image}, {image}, 3]; see preprocess"
            )
        patches = rearrange(self.patch_embedding(x_bhwc.astype(self.dtype)), "b h w m -> b (h w) m")
        first = self.class_embedding.get_value().astype(self.dtype)
        positions = self.positions.get_value().astype(self.dtype)
        first = jnp.broadcast_to(first, (x_bhwc.shape[0], 1, self.config.width))
        x_blm = self.norm_in(jnp.concatenate([first, patches], axis=1) + positions)
        for block in self.blocks:
            x_blm = block(constrain_samples(x_blm))
        return self.proj(self.norm_out(x_blm[:, 0]))


class AestheticHead(nnx.Module):
    """The aesthetic predictor: linear layers without activations in between.

    The original has dropouts, which act only while it is trained.

    Args:
      inputs: channels of the embedding, 768 as published.
      rngs: source of the initial weights.
      param_dtype: of the parameters.
    """

    def __init__(self, inputs: int, *, rngs: nnx.Rngs, param_dtype: jnp.dtype = jnp.float32):
        # Always float32 at full precision: it costs nothing, and the scores of the frames of a clip
        # differ by tenths.
        layers = []
        for i, o in itertools.pairwise((inputs, *HEAD_WIDTHS)):
            layers.append(
                nnx.Linear(
                    i,
                    o,
                    rngs=rngs,
                    dtype=jnp.float32,
                    param_dtype=param_dtype,
                    precision=jax.lax.Precision.HIGHEST,
                )
            )
        self.layers = nnx.List(layers)

    def __call__(self, x_bm: jax.Array) -> jax.Array:
        """Scores [b] of embeddings [b, m] of length 1; float32."""
        for layer in self.layers:
            x_bm = layer(x_bm)
        return x_bm[:, 0]


class Reward(nnx.Module):
    """Scores frames: CLIP's embedding, and the aesthetic predictor on it.

    Args:
      config: sizes of the image encoder.
      rngs: source of the initial weights.
      dtype: in which the image encoder computes; the rest stays in float32.
      param_dtype: of the parameters.
    """

    def __init__(
        self,
        config: ClipVisionConfig,
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype = jnp.float32,
        param_dtype: jnp.dtype = jnp.float32,
    ):
        self.vision = ClipVision(config, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.head = AestheticHead(config.projection, rngs=rngs, param_dtype=param_dtype)

    def score(self, frames: jax.Array) -> jax.Array:
        """Score each frame independently; under jit, one program per batch and frame size.

        Args:
          frames: [b, h, w, 3] of any size, RGB; uint8, or float in [0, 255], which is rounded to
            whole levels.

        Returns:
          [b] float32, higher is better; as published between 1 and 10 or nearly so.

        Raises:
          ValueError: see `preprocess`.
        """
        embedding = self.vision(preprocess(frames, self.vision.config.image)).astype(jnp.float32)
        return self.head(embedding / jnp.linalg.norm(embedding, axis=-1, keepdims=True))

"""Every network that can be converted, and the models that people may take for one of them."""

from __future__ import annotations

import dataclasses

from converters.dit import DIT
from converters.reward import AESTHETIC, CLIP
from converters.taehv import TAEHV, TAEHV_SUPER
from converters.text import TEXT
from converters.vae import VAE

NETWORKS = {
    network.name: network for network in (DIT, VAE, TEXT, TAEHV, TAEHV_SUPER, CLIP, AESTHETIC)
}
PIPELINE = ("dit", "vae", "text")  # what a pipeline needs


@dataclasses.dataclass(frozen=True)
class Foreign:
    """A well-known model that is not for this project.

    Attributes:
      pattern: found in a name that only its checkpoints have.
      title: what it is, for people.
      network: ours that it may be taken for; "" if there is none.
    """

    pattern: str
    title: str
    network: str = ""


FOREIGN = (
    Foreign(
        r"(encoder\.downsamples\.0\.residual\.0\.gamma|encoder\.down_blocks\.0\.norm1\.gamma)$",
        "the VAE of Wan 2.1 (16 latent channels, 8x in space). Wan2.2-TI2V-5B needs"
        " Wan2.2_VAE.pth: 48 channels, 16x",
        "vae",
    ),
    Foreign(
        r"(^|\.)img_emb\.proj\.0\.weight$",
        "an image-to-video transformer with a CLIP branch (Wan 2.1 I2V, 14B)",
        "dit",
    ),
    Foreign(r"(^|\.)face_adapter\.", "Wan-Animate, 14B", "dit"),
    Foreign(
        r"(^|\.)(quantized_weight|weight_scale|scale_weight)(_|$)|\.quantized_weight\w*$"
        r"|(^|\.)scaled_fp8$",
        "packed in 8 or 4 bits; ask for the bfloat16 file",
    ),
    Foreign(
        r"(^|\.)down_blocks\.\d+\.resnets\.\d+\.time_emb_proj\.weight$",
        "a U-Net of Stable Diffusion",
    ),
    Foreign(r"(^|\.)double_blocks\.\d+\.img_mod\.", "a transformer of FLUX or HunyuanVideo"),
)

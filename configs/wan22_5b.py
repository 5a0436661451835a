"""Stream with the paper's model.

    python -m launch.sample --config configs/wan22_5b.py --weights DIR
    python -m launch.bench --config configs/wan22_5b.py --weights random

The authors have released no weights: DIR is a folder that was written by training or by the
converters; speed can be measured with random ones.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from chameleon_jax.diffusion import wan22
from chameleon_jax.models.taehv import TaehvConfig
from configs import common

VARIANTS = ("wan22_5b", "teacher_forced", "taew2_2", "taew2_2_super")
DECODERS = {"taew2_2": TaehvConfig.taew2_2, "taew2_2_super": TaehvConfig.taew2_2_super}


def get_config(variant: str = "wan22_5b") -> ConfigDict:
    """`wan22_5b`: FashionChameleon's streaming setting (arXiv 2605.15824, section 5), for a
    distilled student. `teacher_forced`: for a checkpoint before distillation, with many steps and
    guidance. `taew2_2`, `taew2_2_super`: as `wan22_5b`, decoded by TAEHV, whose weights lie beside
    the others as decoder.safetensors.
    """
    config = _distilled(variant)
    if variant in DECODERS:
        config.model.decoder = common.small_decoder(DECODERS[variant]())
    if variant == "teacher_forced":
        config.sampler = wan22.CAUSAL_SAMPLER
    return config


def _distilled(variant: str) -> ConfigDict:
    return ConfigDict(
        {
            "name": variant,
            "model": common.wan22_5b(),
            "weights": "",  # a folder, or `random`
            "dtype": "bfloat16",
            "video": {
                "height": 1280,
                "width": 704,
                "fps": 24.0,
                "frames": 81,
                # Latent frames that are decoded together, the largest stages frame by frame; 0: all
                # of a chunk at once, which moves less and takes three times the memory.
                "decode_at_once": 1,
            },
            "cache": wan22.CACHE,  # M = 23 latent frames, chunks of 3
            "sampler": wan22.SAMPLER,  # four steps
            "switch": wan22.SWITCH,
            "seed": 0,
        }
    )

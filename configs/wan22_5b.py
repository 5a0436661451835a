"""Stream with the paper's model: `python -m launch.sample --config configs/wan22_5b.py --weights
DIR`.

Benchmark on random weights: `python -m launch.bench --config configs/wan22_5b.py --weights random`.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from chameleon_jax.diffusion import wan22
from configs import common


def get_config(variant: str = "wan22_5b") -> ConfigDict:
    """FashionChameleon's streaming setting (arXiv 2605.15824, section 5): M = 23, chunks of 3
    latent frames, four steps.
    """
    return ConfigDict(
        {
            "name": variant,
            "model": common.MODELS[variant](),
            "weights": "",  # the authors have released none: a folder written by the converters, or `random` for benchmarks
            "dtype": "bfloat16",
            "video": {"height": 1280, "width": 704, "fps": 24, "frames": 81},
            "cache": wan22.CACHE,
            "sampler": wan22.SAMPLER,
            "switch": wan22.SWITCH,
            "seed": 0,
        }
    )

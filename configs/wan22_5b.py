"""Stream with the paper's model: `python -m launch.sample --config configs/wan22_5b.py --weights
DIR`.

Benchmark on random weights: `python -m launch.bench --config configs/wan22_5b.py --weights random`.
"""

from __future__ import annotations

from ml_collections import ConfigDict

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
            "cache": common.CACHES[variant],
            "sampler": {
                "name": "few_step",
                "shift": 5.0,
                "timesteps": (1000, 750, 500, 250),
            },
            "switch": {
                "refresh": True,
                "withdraw": True,
                "disentangle": True,
                "drop_repeated_frame": True,
            },
            "seed": 0,
        }
    )

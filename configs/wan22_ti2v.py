"""Clips from public weights of Wan2.2-TI2V-5B, from a prompt, possibly with a first frame.

    python -m launch.sample --task t2v --weights DIR --prompt "A woman walks along a beach." \
        --out out.mp4
    python -m launch.sample --task i2v --weights DIR --image first.png \
        --prompt "She turns around." --out out.mp4

DIR is whatever `Pipeline.from_pretrained` takes. To see on a CPU, in seconds, that everything is
wired up: `--config configs/wan22_ti2v.py:smoke`.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from chameleon_jax.diffusion import wan22
from configs import common, wan22_5b

VARIANTS = ("wan22_ti2v_5b", "smoke")


def get_config(variant: str = "wan22_ti2v_5b") -> ConfigDict:
    """`wan22_ti2v_5b`: as published. `smoke`: a random model of a few thousand parameters."""
    config = wan22_5b.get_config()
    config.name = variant
    config.update(wan22.SETTINGS)
    return _small(config) if variant == "smoke" else config


def _small(config: ConfigDict) -> ConfigDict:
    """The same with a random model of a few thousand parameters."""
    config.model = common.smoke()
    config.weights = "random"
    config.dtype = "float32"
    config.video.update(height=32, width=48, frames=9)
    config.cache = common.CACHES["smoke"]
    config.generate.steps = 2
    return config

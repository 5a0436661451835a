"""Clips from public weights of Wan2.2-TI2V-5B, from a prompt or from a prompt and the first frame.

    python -m launch.sample --task t2v --weights DIR --prompt "A woman walks along a beach." --out out.mp4
    python -m launch.sample --task i2v --weights DIR --image first.png --prompt "She turns around." --out out.mp4

DIR is whatever `Pipeline.from_pretrained` takes. To see that everything is wired up, on a CPU, in
seconds: `--config configs/wan22_ti2v.py:smoke`.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from chameleon_jax.diffusion import wan22
from configs import common, wan22_5b


def get_config(variant: str = "wan22_ti2v_5b") -> ConfigDict:
    """Variants: `wan22_ti2v_5b` (as published) and `smoke` (a random model of a few thousand
    parameters).
    """
    config = wan22_5b.get_config()
    config.name = variant
    config.update(wan22.SETTINGS)
    config.update(
        {
            "wan22_ti2v_5b": {},
            "smoke": {
                "model": common.MODELS["smoke"](),
                "weights": "random",
                "dtype": "float32",
                "video": {"height": 32, "width": 48, "fps": 24, "frames": 9},
                "cache": common.CACHES["smoke"],
                "generate": {"steps": 2},
            },
        }[variant]
    )
    return config

"""Videos of several shots with LongLive-2.0-5B (arXiv 2605.18739), possibly with a first frame.

    config = load_config("configs/longlive2_5b.py")
    streams = MultiShot(Pipeline.from_pretrained(DIR, config))  # inference/shots.py

DIR is a folder that `Pipeline.from_pretrained` reads. The transformer is that of Wan2.2-TI2V-5B
with other weights; the stream has no condition frames, makes chunks of 8 latent frames, and
remembers 32 frames.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common, wan22_5b

VARIANTS = ("longlive2_5b", "smoke")


def get_config(variant: str = "longlive2_5b") -> ConfigDict:
    """`longlive2_5b`: as published. `smoke`: a random model of a few thousand parameters.

    For the weights that were distilled further, to two steps: `sampler.steps=2`.
    """
    config = wan22_5b.get_config()
    config.name = variant
    # 128 latent frames, 16 chunks
    config.video = {"height": 704, "width": 1280, "fps": 24.0, "frames": 509}
    config.cache = {
        "policy": "shots",
        "frames": 32,
        "context": 0,
        "block": 8,
        "sink": 8,
        "pin": True,
        "shot_offset": 8,
    }
    config.sampler = {"name": "unipc", "steps": 4, "shift": 5.0}
    return _small(config) if variant == "smoke" else config


def _small(config: ConfigDict) -> ConfigDict:
    """The same with a random model of a few thousand parameters."""
    config.model = common.smoke()
    # A byte is a token: room behind the words that mark a cut.
    config.model.text.length = config.model.dit.text_length = 48
    config.weights = "random"
    config.dtype = "float32"
    config.video.update(height=32, width=48, frames=61)
    config.cache.update(frames=8, block=2, sink=2, shot_offset=2)
    config.sampler.steps = 2
    return config

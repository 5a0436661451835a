"""Videos of several shots with LongLive-2.0-5B (arXiv 2605.18739), from prompts and possibly a
first frame.

    streams = MultiShot(Pipeline.from_pretrained(DIR, load_config("configs/longlive2_5b.py")))  # inference/shots.py

DIR is a folder that `Pipeline.from_pretrained` reads. The transformer is that of Wan2.2-TI2V-5B
with other weights; the stream has no condition frames, makes chunks of 8 latent frames, and
remembers 32 frames.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common, wan22_5b


def get_config(variant: str = "longlive2_5b") -> ConfigDict:
    """Variants: `longlive2_5b` (as published) and `smoke` (a random model of a few thousand
    parameters).

    For the weights that were distilled further, to two steps: `sampler.steps=2`.
    """
    small = common.MODELS["smoke"]()
    small.text.length = small.dit.text_length = (
        48  # a byte is a token: room behind the words that mark a cut
    )
    config = wan22_5b.get_config()
    config.name = variant
    config.video = {
        "height": 704,
        "width": 1280,
        "fps": 24,
        "frames": 509,
    }  # 128 latent frames, 16 chunks
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
    config.update(
        {
            "longlive2_5b": {},
            "smoke": {
                "model": small,
                "weights": "random",
                "dtype": "float32",
                "video": {"height": 32, "width": 48, "frames": 61},
                "cache": {"frames": 8, "block": 2, "sink": 2, "shot_offset": 2},
                "sampler": {"steps": 2},
            },
        }[variant]
    )
    return config

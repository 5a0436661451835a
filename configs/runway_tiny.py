"""Stream with the embedded model: `python -m launch.sample --config configs/runway_tiny.py`.

Sizes and weights are those that ship with the project; a laptop CPU streams it about as fast as it
plays, with `--steps 2` faster.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common

VARIANTS = ("runway_tiny", "smoke")


def get_config(variant: str = "runway_tiny") -> ConfigDict:
    """Variants: `runway_tiny` (embedded weights) and `smoke` (a random model of a few thousand
    parameters).
    """
    remembers = common.STREAMS_WITH_SINK if variant == "runway_tiny" else {}
    return ConfigDict(
        {
            "name": variant,
            "model": common.MODELS[variant](),
            "weights": "chameleon_jax/assets/runway_tiny" if variant == "runway_tiny" else "random",
            "dtype": "float32",  # bfloat16 products are slower than float32 ones on a CPU
            "video": {"height": 128, "width": 80, "fps": 16.0, "frames": 81},
            "cache": common.CACHES[variant] | remembers,
            # Not distilled: plain Euler steps along the flow instead of the paper's four re-noised
            # ones.
            "sampler": {
                "name": "euler",
                "steps": 4,
                # Of first chunks, also after a change; 0: as many as others. Two draw them as well,
                # see the model card, and a change is seen sooner.
                "first": 2 if variant == "runway_tiny" else 0,
                "shift": 3.0,
                "guidance": 1.0,  # of the prompt; above 1 a chunk takes twice the time
                "negative_prompt": "",
            },
            # All three mechanisms of the paper, section 4.3, and of ours two that keep the person
            # and one that hides the step from one clip to the next.
            "switch": {
                "refresh": True,
                "withdraw": True,
                "disentangle": True,
                "anchor": True,
                "history_noise": 0.3,
                "carry": False,  # instead of disentangle; the embedded model was not trained for it
                "carry_noise": 0.6,
                "fade": True,
                "drop_repeated_frame": True,
            },
            "seed": 0,
        }
    )

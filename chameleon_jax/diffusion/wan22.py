"""How Wan2.2-TI2V-5B is streamed and sampled: what its public weights do not say of themselves.

One place for the config files (configs/wan22_5b.py, configs/wan22_ti2v.py) and for the converters,
which write these settings into the config.json beside converted weights.
"""

from __future__ import annotations

from chameleon_jax.diffusion.sampler import NEGATIVE_PROMPT

# Streaming: FashionChameleon (arXiv 2605.15824, section 5).
CACHE = {"frames": 23, "context": 2, "block": 3, "sink": 3, "positions": "absolute"}
SAMPLER = {"name": "few_step", "shift": 5.0, "timesteps": (1000, 750, 500, 250)}
# The same before distillation: 50 steps a chunk, with guidance.
CAUSAL_SAMPLER = {
    "name": "unipc",
    "steps": 50,
    "shift": 5.0,
    "guidance": 3.0,
    "negative_prompt": NEGATIVE_PROMPT,
}
SWITCH = {
    "refresh": True,
    "withdraw": True,
    "disentangle": True,
    "anchor": False,  # not of the paper, as are the next four
    "history_noise": 0.0,
    "carry": False,
    "carry_noise": 0.6,
    "fade": False,
    "drop_repeated_frame": True,
}

# Whole clips: Wan2.2-TI2V-5B as published.
VIDEO = {"height": 704, "width": 1280, "fps": 24.0, "frames": 121}
GENERATE = {
    "grid": "wan",  # the original's; `diffusers` is the slightly different one of that library
    "steps": 50,
    "shift": 5.0,  # 3.0 is recommended for videos of 480 lines
    "guidance": 5.0,  # 1: the prompt alone, in half the time
    "negative_prompt": NEGATIVE_PROMPT,
}

# The groups of a config beside `model`, `dtype` and `weights`.
SETTINGS = {
    "video": VIDEO,
    "cache": CACHE,
    "sampler": SAMPLER,
    "switch": SWITCH,
    "generate": GENERATE,
    "seed": 0,
}

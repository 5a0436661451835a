"""The baseline of Table 2: a teacher with its conditions on channels (arXiv 2605.15824).

    python -m launch.train --config configs/teacher_concat.py:runway_tiny \
        --config.data.dir=data/latents --config.data.tokenizer=data/tokenizer.json \
        --config.weights.vae=runs/vae/export --config.workdir=runs/teacher_concat

It differs from configs/teacher.py in nothing else. `init_from` may name the weights of a plain
network, such as Wan2.2-TI2V-5B: what the new channels hold changes nothing at first.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common, teacher

VARIANTS = ("paper", "runway_tiny", "smoke")


def get_config(variant: str = "paper") -> ConfigDict:
    """One of `VARIANTS`."""
    return common.choose(variant, paper, runway_tiny, smoke)


def paper() -> ConfigDict:
    """The paper's model; all weights are trained ("Chan.-Concat + Full FT")."""
    return on_channels(teacher.paper())


def runway_tiny() -> ConfigDict:
    """The small model, from random weights."""
    return on_channels(teacher.runway_tiny())


def smoke() -> ConfigDict:
    """Four steps."""
    return on_channels(teacher.smoke())


def on_channels(config: ConfigDict) -> ConfigDict:
    """The same with person and garment behind the channels of the noisy latents."""
    channels = config.model.vae.z_dim
    config.conditioning = "channels"
    config.model.dit.in_channels = 3 * channels
    config.model.dit.out_channels = channels
    return config

"""Blocks shared by the configs: the sizes of the networks, and the caches of their streams.

The sizes are arguments of the dataclasses that describe the networks in chameleon_jax/models.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from ml_collections import ConfigDict

from chameleon_jax.config import ConfigError
from chameleon_jax.diffusion import wan22
from chameleon_jax.models.dit import DiTConfig
from chameleon_jax.models.reward import ClipVisionConfig
from chameleon_jax.models.taehv import TaehvConfig
from chameleon_jax.models.text import TextConfig
from chameleon_jax.models.vae import VaeConfig

# What differs from model to model; the rest says how a network is computed.
VAE_SIZES = (
    "z_dim",  # channels of the latents
    "enc_width",
    "dec_width",
    "width_mult",
    "enc_blocks",
    "dec_blocks",
    "temporal_down",
    "latent_mean",
    "latent_std",
)
DIT_SIZES = ("in_channels", "width", "ffn", "heads", "layers", "text_width", "text_length")
CLIP_SIZES = ("width", "ffn", "heads", "layers", "projection")
TAEHV_SIZES = ("z_dim", "enc_width", "dec_widths", "temporal_down", "temporal_up", "variant")
TEXT_SIZES = ("vocab", "width", "heads", "head_dim", "ffn", "layers", "length")


def wan22_5b() -> ConfigDict:
    """Wan2.2-TI2V-5B: the paper's backbone, its VAE and its text encoder. 1280x704, 24 frames/s."""
    return ConfigDict(
        {
            "vae": _sizes(VaeConfig.wan22(), VAE_SIZES),
            "dit": _sizes(DiTConfig.wan22_ti2v_5b(), DIT_SIZES),
            "text": _sizes(TextConfig.umt5_xxl(), TEXT_SIZES),
        }
    )


def runway_tiny() -> ConfigDict:
    """The same networks, small, for this project's own synthetic data. 128x80, 16 frames/s."""
    return ConfigDict(
        {
            "vae": {
                "z_dim": 16,
                "enc_width": 24,
                "dec_width": 24,
                "width_mult": (1, 2, 4),
                "enc_blocks": 1,
                "dec_blocks": 2,
                "temporal_down": (True, True),
                # Measured at the end of training; from then on those in the config.json of the
                # weights count.
                "latent_mean": (0.0,) * 16,
                "latent_std": (1.0,) * 16,
            },
            "dit": {
                "patch": (1, 1, 1),
                "says": "velocity",
                "in_channels": 16,
                "width": 256,
                "ffn": 1024,
                "heads": 4,
                "layers": 6,
                "text_width": 128,
                "text_length": 96,
            },
            "text": {
                "vocab": 1024,
                "width": 128,
                "heads": 2,
                "head_dim": 64,
                "ffn": 256,
                "layers": 2,
                "length": 96,
            },
        }
    )


def smoke() -> ConfigDict:
    """A few thousand parameters, to see in seconds that everything is wired up."""
    return ConfigDict(
        {
            "vae": {
                "z_dim": 4,
                "enc_width": 4,
                "dec_width": 4,
                "width_mult": (1, 2, 2),
                "enc_blocks": 1,
                "dec_blocks": 1,
                "temporal_down": (True, True),
                "latent_mean": (0.0,) * 4,
                "latent_std": (1.0,) * 4,
            },
            "dit": {
                "says": "velocity",
                "in_channels": 4,
                "width": 32,
                "ffn": 64,
                "heads": 2,
                "layers": 2,
                "text_width": 16,
                "text_length": 16,
            },
            "text": {
                "vocab": 1024,
                "width": 16,
                "heads": 2,
                "head_dim": 8,
                "ffn": 32,
                "layers": 1,
                "length": 16,
            },
        }
    )


def small_decoder(sizes: TaehvConfig) -> dict[str, Any]:
    """A group `model.decoder`: TAEHV in the place of the VAE's decoder."""
    return {"network": "taehv", **_sizes(sizes, TAEHV_SIZES)}


def clip_vit_l14() -> dict[str, Any]:
    """The image encoder of the aesthetic reward."""
    return _sizes(ClipVisionConfig.vit_l14(), CLIP_SIZES)


MODELS = {"wan22_5b": wan22_5b, "runway_tiny": runway_tiny, "smoke": smoke}

# Cache policies of the streams, see attention/policies.py; teacher forcing forgets as they do.
# The paper's 23 frames have room for the whole of its clips. The small model remembers one chunk of
# three in training, so that the third has forgotten the first, as all later ones of a stream have
# forgotten theirs.
CACHES = {
    "wan22_5b": wan22.CACHE,
    "runway_tiny": {"frames": 8, "context": 2, "block": 3, "sink": 0, "positions": "relative"},
    "smoke": {"frames": 8, "context": 2, "block": 3, "sink": 0, "positions": "relative"},
}
# What differs in its streams: there, colours and faces drift without a sink.
STREAMS_WITH_SINK = {"frames": 11, "sink": 3}


def choose(variant: str, *variants: Callable[[], ConfigDict]) -> ConfigDict:
    """The config of the function that a variant is named after.

    Raises:
      ConfigError: there is none of that name.
    """
    known = {function.__name__: function for function in variants}
    if variant not in known:
        raise ConfigError(f"there is no variant {variant!r}; expected one of {', '.join(known)}")
    return known[variant]()


def _sizes(config: Any, names: Sequence[str]) -> dict[str, Any]:
    values = dataclasses.asdict(config)
    return {name: values[name] for name in names}

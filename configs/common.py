"""Blocks shared by the configs: the two model sizes, said in the terms of the dataclasses that
build the networks.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from chameleon_jax.diffusion import wan22
from chameleon_jax.models.vae import WAN22_LATENT_MEAN, WAN22_LATENT_STD


def wan22_5b() -> ConfigDict:
    """Wan2.2-TI2V-5B: the paper's backbone, its VAE and its text encoder. 1280x704, 24 frames/s."""
    return ConfigDict(
        {
            "vae": {
                "z_dim": 48,
                "enc_width": 160,
                "dec_width": 256,
                "width_mult": (1, 2, 4, 4),
                "enc_blocks": 2,
                "dec_blocks": 3,
                "temporal_down": (False, True, True),
                "latent_mean": WAN22_LATENT_MEAN,
                "latent_std": WAN22_LATENT_STD,
            },
            "dit": {
                "in_channels": 48,
                "width": 3072,
                "ffn": 14336,
                "heads": 24,
                "layers": 30,
                "text_width": 4096,
                "text_length": 512,
            },
            "text": {
                "vocab": 256384,
                "width": 4096,
                "heads": 64,
                "head_dim": 64,
                "ffn": 10240,
                "layers": 24,
                "length": 512,
            },
        }
    )


def runway_tiny() -> ConfigDict:
    """The same networks, small: trained by this project on its own synthetic data. 128x80, 16
    frames/s.
    """
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
                "latent_mean": (0.0,) * 16,
                "latent_std": (1.0,) * 16,
                # until they are measured, at the end of training; from then on those in the
                # config.json of the weights count
            },
            "dit": {
                "patch": (1, 1, 1),
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
    """A few thousand parameters, for tests and for `--config ...:smoke` runs that only show that
    everything is wired up.
    """
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


# Layouts of the streaming cache, see attention/cache.py; teacher forcing remembers what they hold.
# The paper's 23 frames have room for the whole of its clips. The small model remembers one chunk of
# three in training, so that the third has forgotten the first, as all later ones of a stream have
# forgotten theirs.
CACHES = {
    "wan22_5b": wan22.CACHE,
    "runway_tiny": {"frames": 8, "context": 2, "block": 3, "sink": 0, "positions": "relative"},
    "smoke": {"frames": 8, "context": 2, "block": 3, "sink": 0, "positions": "relative"},
}

MODELS = {"wan22_5b": wan22_5b, "runway_tiny": runway_tiny, "smoke": smoke}

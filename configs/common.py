"""Blocks shared by the configs: the two model sizes, said in the terms of the dataclasses that build the networks."""

from __future__ import annotations

from ml_collections import ConfigDict

from chameleon_jax.models.vae import WAN22_LATENT_MEAN, WAN22_LATENT_STD

# Of the embedded VAE's latents, as measured when it was exported; they belong to assets/runway_tiny/vae.safetensors.
RUNWAY_LATENT_MEAN = (
    -0.93862, -1.54050, -1.13356, -2.43073, -1.69939, -0.98758, -0.59276, 1.90061,
    -3.84770, 0.77818, -3.89976, 0.11808, -0.78736, -0.89510, 0.97004, 3.69406,
)  # fmt: skip
RUNWAY_LATENT_STD = (
    2.76558, 2.92298, 4.29490, 2.48007, 2.95140, 3.35283, 2.72078, 5.59556,
    2.82350, 2.56513, 3.63234, 2.96736, 6.29081, 2.34034, 4.29024, 5.17371,
)  # fmt: skip


def wan22_5b() -> ConfigDict:
    """Wan2.2-TI2V-5B: the paper's backbone, its VAE and its text encoder. 1280x704, 24 frames/s."""
    return ConfigDict({
        "vae": {
            "z_dim": 48, "enc_width": 160, "dec_width": 256, "width_mult": (1, 2, 4, 4), "enc_blocks": 2, "dec_blocks": 3,
            "temporal_down": (False, True, True), "latent_mean": WAN22_LATENT_MEAN, "latent_std": WAN22_LATENT_STD,
        },
        "dit": {
            "in_channels": 48, "width": 3072, "ffn": 14336, "heads": 24, "layers": 30, "text_width": 4096, "text_length": 512,
        },
        "text": {"vocab": 256384, "width": 4096, "heads": 64, "head_dim": 64, "ffn": 10240, "layers": 24, "length": 512},
    })  # fmt: skip


def runway_tiny() -> ConfigDict:
    """The same networks, small: trained by this project on its own synthetic data. 128x80, 16 frames/s."""
    return ConfigDict({
        "vae": {
            "z_dim": 16, "enc_width": 24, "dec_width": 24, "width_mult": (1, 2, 4), "enc_blocks": 1, "dec_blocks": 2,
            "temporal_down": (True, True), "latent_mean": RUNWAY_LATENT_MEAN, "latent_std": RUNWAY_LATENT_STD,
        },
        "dit": {
            "in_channels": 16, "width": 256, "ffn": 1024, "heads": 4, "layers": 6, "text_width": 128, "text_length": 96,
        },
        "text": {"vocab": 1024, "width": 128, "heads": 2, "head_dim": 64, "ffn": 256, "layers": 2, "length": 96},
    })  # fmt: skip


def smoke() -> ConfigDict:
    """A few thousand parameters, for tests and for `--config ...:smoke` runs that only show that everything is wired up."""
    return ConfigDict({
        "vae": {
            "z_dim": 4, "enc_width": 4, "dec_width": 4, "width_mult": (1, 2, 2), "enc_blocks": 1, "dec_blocks": 1,
            "temporal_down": (True, True), "latent_mean": (0.0,) * 4, "latent_std": (1.0,) * 4,
        },
        "dit": {"in_channels": 4, "width": 32, "ffn": 64, "heads": 2, "layers": 2, "text_width": 16, "text_length": 16},
        "text": {"vocab": 1024, "width": 16, "heads": 2, "head_dim": 8, "ffn": 32, "layers": 1, "length": 16},
    })  # fmt: skip


MODELS = {"wan22_5b": wan22_5b, "runway_tiny": runway_tiny, "smoke": smoke}

"""Blocks shared by the configs: the two model sizes, said in the terms of the dataclasses that build the networks."""

from __future__ import annotations

from ml_collections import ConfigDict

# Per-channel mean and standard deviation of the Wan2.2 VAE's latents, as published with its weights.
WAN22_LATENT_MEAN = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
    0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
    -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)  # fmt: skip
WAN22_LATENT_STD = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
    0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
    0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)  # fmt: skip


# Those of the embedded VAE, measured on 43 training clips; they belong to assets/runway_tiny/vae.safetensors.
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

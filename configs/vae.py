"""The VAE, trained from scratch: single pictures first, then clips.

    python -m launch.train --config configs/vae.py:runway_tiny --config.data.dir=data/runway \
        --config.workdir=runs/vae_images
    python -m launch.train --config configs/vae.py:runway_tiny_video --config.data.dir=data/runway \
        --config.init_from=runs/vae_images/export --config.workdir=runs/vae

    python -m launch.train --config configs/vae.py:runway_tiny_video --config.data.dir=data/runway \
        --config.init_from=runs/vae/export --config.workdir=runs/decoder \
        --config.loss.inflate=false --config.loss.encoder=false --config.loss.l2=5

The last one improves the decoder alone: latents, and what was trained on them, stay valid.

A network that has learnt pictures with the last tap of its causal convolutions needs a few minutes
to learn motion; one that starts with clips needs many times as long. The released Wan2.2 VAE is
ready to use: `wan22_5b` fine-tunes it on clips and pictures.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common, training

VARIANTS = ("runway_tiny", "runway_tiny_video", "wan22_5b", "smoke", "smoke_video")


def get_config(variant: str = "runway_tiny") -> ConfigDict:
    """One of `VARIANTS`; `_video` trains on clips and pictures, the others on pictures."""
    return common.choose(variant, runway_tiny, runway_tiny_video, wan22_5b, smoke, smoke_video)


def wan22_5b() -> ConfigDict:
    """The released VAE, fine-tuned; these numbers are ours and were not tried at this size."""
    config = training.paper("vae")
    config.train.update(steps=4000, eval_every=250, preview_every=250)
    # Kinds of batch in turn: (frames, height, width, samples).
    config.data.crops = ((17, 256, 256, 32), (1, 1280, 704, 32))
    config.data.batch = 2  # of the held-out batches
    config.loss = {
        # Weights of the parts, see training/stages/vae_loss.py.
        "l1": 1.0,
        "l2": 0.0,
        "gradient": 0.25,
        "laplacian": 0.0,
        "kl": 1e-5,
        "garment": 1.0,  # a pixel of the garment counts so many times as others; needs data.labels
        "head": 1.0,
        "inflate": False,  # start as a network of pictures; false: the weights know clips
        "encoder": True,  # false: train the decoder alone
    }
    config.optimizer = {
        "name": "adamw",
        "b1": 0.9,
        "b2": 0.99,
        "eps": 1e-8,
        "weight_decay": 0.0,
        "clip": 1.0,  # norm of the gradient
    }
    config.schedule = {"name": "constant", "peak": 1e-5, "warmup": 100}
    config.ema.decay = 0.995
    config.preview.update(samples=4, frames=6)
    return config


def runway_tiny() -> ConfigDict:
    """The small one, on pictures, from random weights."""
    config = training.small(wan22_5b())
    config.data.crops = ((1, 64, 48, 8),)
    config.data.batch = 16
    config.loss.inflate = True
    config.optimizer = {
        "name": "muon",
        "momentum": 0.95,
        "b1": 0.9,  # of Adam, for what is not a matrix
        "b2": 0.99,
        "eps": 1e-8,
        "weight_decay": 0.0,
        "clip": 1.0,  # norm of the gradient
    }
    config.schedule = {
        "name": "linear",
        "peak": 2e-3,
        "warmup": 100,  # steps
        "decay_from": 0.5,  # share of the steps
        "final": 0.05,  # share of the peak
    }
    return config


def runway_tiny_video() -> ConfigDict:
    """The small one, on clips, from the weights for pictures."""
    config = runway_tiny()
    config.name = "runway_tiny_video"
    # A network that is trained on few frames only learns how far they are from the first one, hence
    # the longest clips too, in small windows.
    config.data.crops = ((17, 48, 48, 4), (33, 32, 32, 4), (1, 64, 48, 8))
    config.data.batch = 2
    config.schedule.peak = 1e-3
    return config


def smoke() -> ConfigDict:
    """Four steps on pictures."""
    config = training.smoke(runway_tiny())
    config.data.crops = ((1, 32, 32, 4),)
    return config


def smoke_video() -> ConfigDict:
    """Four steps on clips and pictures."""
    config = training.smoke(runway_tiny_video())
    config.name = "smoke_video"
    config.data.crops = ((5, 16, 16, 2), (1, 32, 32, 4))
    return config

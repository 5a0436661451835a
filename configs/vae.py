"""The VAE, trained from scratch: single pictures first, then clips.

    python -m launch.train --config configs/vae.py:runway_tiny --config.data.dir=data/runway \
        --config.workdir=runs/vae_images
    python -m launch.train --config configs/vae.py:runway_tiny_video --config.data.dir=data/runway \
        --config.init_from=runs/vae_images/export --config.workdir=runs/vae

    python -m launch.train --config configs/vae.py:runway_tiny_video --config.data.dir=data/runway \
        --config.init_from=runs/vae/export --config.workdir=runs/decoder --config.loss.inflate=false \
        --config.loss.encoder=false --config.loss.l2=5

The last one polishes the decoder alone: latents, and what was trained on them, stay valid.

A network that has learnt pictures with the last tap of its causal convolutions needs a few minutes
to learn motion; one that starts with clips needs many times as long. The released Wan2.2 VAE is
ready to use: `wan22_5b` is to fine-tune it.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import training


def get_config(variant: str = "runway_tiny") -> ConfigDict:
    """Variants: `runway_tiny`, `wan22_5b`, `smoke`; each also with `_video`, which trains on clips
    and pictures.
    """
    size, clips = (
        (variant[: -len("_video")], True) if variant.endswith("_video") else (variant, False)
    )
    config = training.base("vae", size)
    # Batches in turn: (frames, height, width, samples). A net trained on few frames only learns its
    # distance from the first one, hence the longest clips too, in small windows.
    config.data.crops = (
        ((1, 64, 48, 8),) if not clips else ((17, 48, 48, 4), (33, 32, 32, 4), (1, 64, 48, 8))
    )
    config.data.batch = 2 if clips else 16  # of the held-out batches
    # Weights, see training/stages/vae_loss.py. inflate: start as a network of pictures; false to go
    # on with weights that know clips. encoder: false to train the decoder alone.
    config.loss = {"l1": 1.0, "l2": 0.0, "gradient": 0.25, "laplacian": 0.0, "kl": 1e-5}
    config.loss.update({"inflate": size != "wan22_5b", "encoder": True})
    config.preview.update(samples=4, frames=6)
    config.optimizer.update(name="muon", b2=0.99, weight_decay=0.0)
    config.schedule.update(name="linear", peak=2e-3, decay_from=0.5)
    config.train.update(steps=4000, eval_every=250, preview_every=250)
    if clips:
        config.schedule.update(peak=1e-3)
    if size == "wan22_5b":
        config.data.crops = ((17, 256, 256, 32), (1, 1280, 704, 32))
        config.optimizer.name = "adamw"
        config.schedule.update(name="constant", peak=1e-5)
    if size == "smoke":
        config.data.crops = ((5, 16, 16, 2), (1, 32, 32, 4)) if clips else ((1, 32, 32, 4),)
        training.shorten(config)
    config.name = variant
    return config

"""Blocks shared by the training configs: everything that `chameleon_jax.training` reads has its
default here.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common

VIDEO = {
    "wan22_5b": {"height": 1280, "width": 704, "fps": 24, "frames": 81},
    "runway_tiny": {"height": 128, "width": 80, "fps": 16, "frames": 33},
    "smoke": {"height": 32, "width": 32, "fps": 16, "frames": 9},
}


def base(stage: str, variant: str) -> ConfigDict:
    """A complete training config; stages change what they need."""
    return ConfigDict(
        {
            "stage": stage,
            "name": variant,
            "model": common.MODELS[variant](),
            "dtype": "bfloat16"
            if variant == "wan22_5b"
            else "float32",  # of the computation; trained weights are float32
            "video": VIDEO[variant],
            "cache": common.CACHES[variant],  # of the stream to train for
            "seed": 0,
            "workdir": "",  # checkpoints, metrics and previews; a folder with a checkpoint is gone on from
            "init_from": "",  # folder with <network>.safetensors to start the trained networks from
            "weights": {
                "vae": "",
                "text": "",
            },  # folder or file with the weights of networks that are not trained
            "export_dir": "",  # default <workdir>/export
            "export_dtype": "float32",
            "mesh": {"data": 1, "fsdp": -1, "seq": 1, "tensor": 1},
            "data": {
                "dir": "",  # one folder, or several separated by commas
                "split": "train",
                "validation": "validation",  # split for held-out loss and previews; empty: the first training batches
                "match": "",  # regular expression: only clips with a caption that matches
                "in_memory": variant
                != "wan22_5b",  # read everything once: 4000 tiny clips are 4 GB
                "batch": 8,  # clips a step over all processes
                "lengths": (),  # batches of several kinds in turn: (frames, clips), ...; empty: (video.frames, batch)
                "captions": "mixed",
                "dropout": 0.1,  # share of empty prompts
                "tokenizer": "",  # tokenizer.json
                "threads": 2,
                "prefetch": 2,
                "workers": 0,
            },
            "train": {
                "steps": 1000,
                "max_minutes": 0.0,  # stop, save and export after this long; 0: no limit
                "log_every": 50,
                "eval_every": 500,  # 0: never, as for all of these
                "eval_batches": 4,
                "preview_every": 500,
                "checkpoint_every": 500,
                "keep": 2,
                "remat": variant
                == "wan22_5b",  # recompute blocks in the backward pass: a third more work, a tenth of memory
                "scan_layers": False,
                "text": variant != "wan22_5b",  # train the text encoder too
            },
            "optimizer": {
                "name": "adamw",
                "b1": 0.9,
                "b2": 0.999,
                "eps": 1e-8,
                "weight_decay": 0.01,
                "clip": 1.0,
                "momentum": 0.95,
            },
            # halve_at: "halved"; decay_from and final: "linear" and "cosine". See
            # training/optim.py.
            "schedule": {
                "name": "constant",
                "peak": 1e-3,
                "warmup": 100,
                "halve_at": 1100,
                "decay_from": 0.7,
                "final": 0.05,
            },
            "ema": {"decay": 0.995, "start": 0},
            "loss": {},
            "preview": {"samples": 3, "frames": 6, "steps": 8},
        }
    )


def shorten(config: ConfigDict) -> ConfigDict:
    """What all `smoke` variants share: a few steps that only show that everything is wired up."""
    config.train.update(
        steps=4, log_every=1, eval_every=4, eval_batches=1, preview_every=4, checkpoint_every=2
    )
    config.schedule.update(warmup=2)
    config.data.update(batch=2)
    config.preview.update(samples=1, frames=3, steps=2)
    return config

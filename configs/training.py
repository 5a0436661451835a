"""What all training configs share: each key that `chameleon_jax.training` reads has its value here.

The stages' own numbers are in vae.py, teacher.py and teacher_forcing.py. `paper` is the page;
`small` and `smoke` change what differs for the small models.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common, runway_tiny, wan22_5b


def paper(stage: str) -> ConfigDict:
    """Training the paper's model: 1280x704, 81 frames at 24 frames/s."""
    return ConfigDict(
        {
            "stage": stage,
            "name": "wan22_5b",
            "model": common.wan22_5b(),
            "dtype": "bfloat16",  # of the computation; trained weights are float32
            "video": {"height": 1280, "width": 704, "fps": 24.0, "frames": 81},
            "cache": common.CACHES["wan22_5b"],  # of the stream to train for
            # What the exported config.json says beside the sizes, for inference.
            "streaming": streaming(wan22_5b.get_config()),
            "seed": 0,
            "workdir": "",  # checkpoints, metrics, previews; a checkpoint in it is resumed
            "init_from": "",  # folder of <network>.safetensors that trained networks start from
            # Folder or file with the weights of networks that are not trained.
            "weights": {"vae": "", "text": ""},
            "export_dir": "",  # empty: <workdir>/export
            "export_dtype": "float32",
            # Devices along each axis, see chameleon_jax/sharding.py; -1: all that are left.
            "mesh": {"data": 1, "fsdp": -1, "seq": 1, "tensor": 1},
            "data": {
                "dir": "",  # one folder, or several with commas between
                # Instead of folders: a world of the renderer, whose clips are made on the way.
                "world": "",
                "clips": 4000,  # of the world, to train on
                "people": 1,  # so many neighbouring clips of the world show the same person
                "render_workers": 2,  # processes that render what goes into memory
                "split": "train",
                "validation": "validation",  # split of the held-out batches; empty: `split`
                "match": "",  # regular expression: only clips with a caption that matches
                # Exact labels to read with the pixels, see chameleon_jax/data/labels.py.
                "labels": (),
                "in_memory": False,  # read everything once, before training
                "tokenizer": "",  # tokenizer.json of the text encoder
                "threads": 2,  # that read ahead
                "prefetch": 2,  # batches that are read ahead
                "workers": 0,  # processes that read ahead; 0: the threads of this one
            },
            "train": {
                "max_minutes": 0.0,  # save and export after so long; 0: no limit
                "log_every": 10,  # steps; 0: never, as for the next four
                "eval_every": 500,
                "preview_every": 500,
                "checkpoint_every": 250,
                "eval_batches": 4,  # held-out batches
                "keep": 2,  # newest checkpoints that are kept, beside the last good one (alarms)
                # Metric of the held-out batches, e.g. "eval/loss", whose best checkpoint is kept,
                # too, and saved when it is measured; empty: none.
                "best": "",
                "best_mode": "min",  # the best is the lowest; or "max"
                "accumulate": 1,  # parts of a batch, one after the other: their mean is the step
                # What the backward pass computes again, to save memory: "none", "dots",
                # "attention" or "full", see models/remat.py.
                "remat": "full",
                "scan_layers": False,  # one compiled block in a loop: compiles many times faster
                "text": False,  # train the text encoder too
            },
            "optimizer": {},  # of the stage, see training/optim.py
            "schedule": {},
            "ema": {"decay": 0.0, "start": 0},  # average of the weights, from step `start` on
            "loss": {},
            "preview": {"samples": 3, "frames": 6, "steps": 8},  # clips; of each; of the sampler
            # What stops a run that has gone wrong, see training/alarms.py; a bound of 0: never.
            "alarms": {
                "action": "stop",  # or "warn"
                "explosion": 20.0,  # most that a loss is, in running medians of itself
                "contrast": 0.3,  # least contrast of previews, as a share of the data's
                "motion": 0.7,  # least motion of them
                "colour": 1.15,  # most colour of them
                "checks": 3,  # previews in a row that arm, and that fire for motion and colour
                "arm_after": 0,  # steps after which bounds count in any case; 0: never
            },
        }
    )


def captioned(config: ConfigDict) -> ConfigDict:
    """What the diffusion stages read beside that: captions, and how the transformer is tuned."""
    # (height, width), ...: a clip goes to the nearest aspect ratio; empty: all to the video's size.
    config.data.buckets = ()
    config.data.lengths = ()  # kinds of batch in turn: (frames, clips), ...; empty: all of a clip
    config.data.text = ""  # folder of `prepare text`: stored states, no text encoder in memory
    config.data.captions = "mixed"  # 70 % action alone, else action and scene; "full": always both
    config.data.dropout = 0.1  # share of empty prompts, for classifier-free guidance
    # What changes of the transformer, see training/tuning.py: "full", "attention" (self-attention
    # alone) or "lora". The last two start from the weights in init_from. Their learning rates are
    # not published; a LoRA usually takes ten times that of all weights.
    config.tune = {
        "mode": "full",
        "rank": 128,  # of a LoRA
        "alpha": 128.0,  # a LoRA counts alpha / rank
        "lora": "",  # file or folder of a LoRA to go on with; empty: a new one
    }
    return config


def adamw_without_momentum() -> ConfigDict:
    """The optimiser of all stages behind the teacher, in the paper and in the released code."""
    return ConfigDict(
        {
            "name": "adamw",
            "b1": 0.0,  # no first moment
            "b2": 0.999,
            "eps": 1e-8,
            "weight_decay": 0.01,
            "clip": 10.0,  # norm of the gradient
        }
    )


def small(config: ConfigDict) -> ConfigDict:
    """The same for the small model, on a CPU: 128x80, 33 frames at 16 frames/s."""
    config.name = "runway_tiny"
    config.model = common.runway_tiny()
    config.dtype = "float32"  # bfloat16 products are slower on a CPU
    config.video = {"height": 128, "width": 80, "fps": 16.0, "frames": 33}
    config.cache = common.CACHES["runway_tiny"]
    config.streaming = streaming(runway_tiny.get_config())
    config.streaming.cache = common.STREAMS_WITH_SINK  # what differs from the cache of training
    config.data.in_memory = True  # 4000 clips are 4 GB
    config.train.update(log_every=50, checkpoint_every=500, remat="none", text=True)
    config.ema.decay = 0.995
    # From random weights previews stand still and are grey for long.
    config.alarms.update(contrast=0.0, motion=0.0, colour=0.0)
    return config


def smoke(config: ConfigDict) -> ConfigDict:
    """Four steps of a model of a few thousand parameters, from a config changed by `small`."""
    config.name = "smoke"
    config.model = common.smoke()
    config.video = {"height": 32, "width": 32, "fps": 16.0, "frames": 9}
    config.cache = common.CACHES["smoke"]
    config.streaming = streaming(runway_tiny.get_config("smoke"))
    config.train.update(
        steps=4, log_every=1, eval_every=4, eval_batches=1, preview_every=4, checkpoint_every=2
    )
    config.schedule.warmup = 2
    config.data.batch = 2
    config.preview.update(samples=1, frames=3, steps=2)
    return config


def streaming(inference: ConfigDict) -> ConfigDict:
    """What of a config of inference is not known from the config of training."""
    config = ConfigDict(inference.to_dict())
    del config.model, config.cache
    kept = ("frames", "decode_at_once")
    config.video = {name: inference.video[name] for name in kept if name in inference.video}
    return config

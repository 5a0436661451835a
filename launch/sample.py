"""Stream a video to a file, changing garments on the way; or make a clip from prompts.

    python -m launch.sample --reference person.png --garment first.png \\
        --garment second.png@24 --garment third.png@48 --prompt "a person walks" \\
        --frames 81 --seed 0 --out out.mp4

`path@frame` asks for a garment from that frame on; it takes effect at the first chunk that starts
there or later. Beside the video lie `out.json` (what was asked for, what happened, how fast) and
`out.png` (a contact sheet). Without pictures it runs on the examples that ship with the project.
Ctrl-C keeps what was made so far, as a video that plays.

Plain Wan2.2, bidirectional, from public weights:

    python -m launch.sample --task t2v --weights DIR --prompt "A cat surfs." --out out.mp4
    python -m launch.sample --task i2v --weights DIR --image first.png --prompt "It waves." \\
        --size 704x1280 --frames 121 --out out.mp4

Ctrl-C before the last denoising step leaves nothing; after it, the frames decoded so far.

Several shots in a row with LongLive-2.0-5B, each so many chunks long (1.3 s):

    python -m launch.sample --task shots --weights DIR --shot "A cat wakes up.@6" \\
        --shot "It walks out into the snow.@10" --out out.mp4

A stream can be split over several devices: `--mesh tensor=4`, see docs/serving.md.

The config is the one that lies with the weights, or else that of the task.

Exit codes: 0 done, 2 an input cannot be used (nothing is written), 130 interrupted.
"""

from __future__ import annotations

from collections.abc import Sequence

from chameleon_jax.errors import need
from launch import cli
from launch.cli import UsageError

# Config file of each task.
CONFIGS = {
    "stream": "configs/runway_tiny.py",
    "t2v": "configs/wan22_ti2v.py",
    "i2v": "configs/wan22_ti2v.py",
    "shots": "configs/longlive2_5b.py",
}
GRIDS = ("wan", "diffusers")  # of diffusion/unipc.py
# Flags that not every task has; the others have the same meaning for all of them.
BELONGS_TO = {
    "reference": ("stream",),
    "garment": ("stream",),
    "switch": ("stream",),
    "drop_repeated_frame": ("stream",),
    "negative_prompt": ("t2v", "i2v"),
    "size": ("t2v", "i2v"),
    "guidance": ("t2v", "i2v"),
    "shift": ("t2v", "i2v"),
    "grid": ("t2v", "i2v"),
    "prompt": ("stream", "t2v", "i2v"),
    "frames": ("stream", "t2v", "i2v"),
    "mesh": ("stream", "shots"),
    "image": ("i2v", "shots"),
    "shot": ("shots",),
}


def define_flags(parser: cli.Parser) -> None:
    """The flags of this command."""
    parser.config_flag(
        (CONFIGS["stream"], "for --task stream"),
        (CONFIGS["t2v"], "for t2v and i2v"),
        (CONFIGS["shots"], "for shots"),
        others=["configs/wan22_5b.py"],
    )
    parser.flag(
        "task",
        "stream; plain Wan2.2: t2v (from text), i2v (and a first frame); LongLive: shots",
        kind=cli.one_of(*CONFIGS),
        default="stream",
        metavar="TASK",
    )
    parser.flag(
        "weights",
        "folder of weights, name on the Hugging Face Hub, or random; default that of the config",
        metavar="DIR",
    )
    parser.flag(
        "lora",
        "LoRA to merge, in any naming, with a strength (1 if none is said); may be repeated",
        repeated=True,
        metavar="FILE[@STRENGTH]",
    )
    parser.flag("out", "video to write", default="out/sample.mp4", metavar="FILE")
    parser.flag(
        "seed",
        "of the noise; default that of the config",
        kind=cli.whole_number(0, 2**32 - 1),
        metavar="N",
    )
    parser.flag(
        "steps",
        "denoising steps; default that of the config",
        kind=cli.whole_number(1, 1000),
        metavar="N",
    )
    parser.flag("prompt", "what happens, in any language; may be empty", metavar="TEXT")
    parser.flag(
        "frames",
        "length of the video; default video.frames of the config",
        kind=cli.whole_number(1),
        metavar="N",
    )
    parser.flag(
        "reference", "stream: picture of the person (PNG, JPEG or WebP, any size)", metavar="FILE"
    )
    parser.flag(
        "garment",
        "stream: picture of a garment, and from which frame on; may be repeated",
        repeated=True,
        metavar="FILE[@FRAME]",
    )
    parser.flag(
        "switch",
        "stream: full or some of refresh,withdraw,disentangle, and anchor; for ablations"
        " last_latent or random_frame in place of disentangle; default as in the config",
        metavar="WORDS",
    )
    parser.switch(
        "drop_repeated_frame",
        "stream: leave out the frame that repeats the pose after a full switch; default as in the"
        " config",
        default=None,
    )
    parser.flag(
        "image",
        "i2v, shots: picture of the first frame (PNG, JPEG or WebP, any size)",
        metavar="FILE",
    )
    parser.flag(
        "shot",
        "shots: what happens, and for how many chunks; once for each shot",
        repeated=True,
        metavar="PROMPT@CHUNKS",
    )
    parser.flag(
        "negative_prompt",
        "t2v, i2v: what to keep away from; default that of the config",
        metavar="TEXT",
    )
    parser.flag(
        "size",
        "t2v, i2v: in pixels; default that of the config, for i2v the same area in the image's"
        " shape",
        kind=cli.size,
        metavar="HEIGHTxWIDTH",
    )
    parser.flag(
        "guidance",
        "t2v, i2v: 1 is the prompt alone, in half the time; default as in the config",
        kind=cli.number(least=0),
    )
    parser.flag(
        "shift",
        "t2v, i2v: more of the steps at high noise; default that of the config",
        kind=cli.number(above=0),
    )
    parser.flag(
        "grid",
        "t2v, i2v: noise levels of the original (wan) or of diffusers; default as in the config",
        kind=cli.one_of(*GRIDS),
        metavar="NAME",
    )
    parser.mesh_flag()
    parser.decoder_flag(default="vae")
    parser.quantize_flag()
    parser.compilation_flag()


def check_flags(values: cli.Values) -> None:
    """Every flag that was given belongs to the task."""
    for name, tasks in BELONGS_TO.items():
        given = getattr(values, name) not in (None, [])
        if given and values.task not in tasks:
            raise UsageError(
                f"--{name} is for --task {' or '.join(tasks)}, not for --task {values.task}"
            )


def run(values: cli.Values) -> int:
    """The command. Returns its exit code.

    Raises:
      UserError: an input cannot be used.
    """
    check_flags(values)
    need("av", "video")
    from launch import sample_clip, sample_shots, sample_stream

    cli.start_jax(values)
    tasks = {"stream": sample_stream, "shots": sample_shots}
    return tasks.get(values.task, sample_clip).run(values, CONFIGS[values.task])


def main(argv: Sequence[str] | None = None, program: str = "python -m launch.sample") -> None:
    """Read the command line, run, and end the process."""
    cli.main(program, __doc__, define_flags, run, argv)


if __name__ == "__main__":
    main()

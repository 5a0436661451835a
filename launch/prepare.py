"""Make training data.

    python -m launch.prepare runway --out data/runway --clips 4000 --frames 33 --size 128x80 --workers 2
    python -m launch.prepare runway --out data/runway --clips 200 --seed_start 800000        # the validation split
    python -m launch.prepare latents --data data/runway --weights runs/vae/export --out data/latents

`runway` renders triplets (needs the extra `runway`), `latents` encodes a set with the VAE of a
config. Both can be interrupted at any time; the same command again continues, and with more
`--clips` (or more clips in `--data`) the set grows. `--match 'sways gently|waves' --slot top`
renders only such clips; `--clips` counts what is rendered. Seeds below 800,000 are the train split,
below 900,000 the validation split.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

from chameleon_jax.config import ConfigError, load_config
from chameleon_jax.data import examples, records, sources
from chameleon_jax.errors import UserError

FLAGS = flags.FLAGS
flags.DEFINE_string("out", None, "folder to write")
flags.DEFINE_integer("clips", 4000, "runway: number of clips", lower_bound=1)
flags.DEFINE_integer("frames", 33, "pixel frames a clip, 4k + 1", lower_bound=1)
flags.DEFINE_integer(
    "frames_per_latent",
    4,
    "runway: pixel frames that a latent frame stands for, of the VAE that will encode the clips",
    lower_bound=1,
)
flags.DEFINE_string("size", "128x80", "HEIGHTxWIDTH in pixels")
flags.DEFINE_float("fps", 16, "frames per second", lower_bound=1)
flags.DEFINE_integer("seed_start", 0, "runway: seed of the first clip", lower_bound=0)
flags.DEFINE_string(
    "match", "", "runway: regular expression; only clips with a caption in which it is found"
)
flags.DEFINE_string(
    "slot", "", "runway: only clips whose garment is a top, bottom, dress or outer one"
)
flags.DEFINE_integer(
    "workers", 2, "runway: rendering processes; 0 renders in this one", lower_bound=0
)
flags.DEFINE_integer("shard_size", 40, "records a shard: what a killed run may lose", lower_bound=1)
flags.DEFINE_multi_string(
    "data", [], "latents: folder of a rendered set, or of clips with a table; may be repeated"
)
flags.DEFINE_multi_string("split", ["train"], "latents: splits to encode; may be repeated")
flags.DEFINE_string("config", "configs/runway_tiny.py", "latents: config that describes the VAE")
flags.DEFINE_string(
    "weights",
    None,
    "latents: .safetensors file of the VAE, or the folder that holds vae.safetensors and"
    " config.json",
)
flags.DEFINE_integer("batch", 4, "latents: clips encoded together", lower_bound=1)


def main(argv: list[str]) -> None:
    commands = {"runway": runway, "latents": latents}
    try:
        if len(argv) != 2 or argv[1] not in commands:
            raise ConfigError(
                f"expected one command, {' or '.join(commands)}, got {' '.join(argv[1:]) or 'none'}"
            )
        if not FLAGS.out:
            raise ConfigError("--out, the folder to write, is missing")
        commands[argv[1]](parse_size(FLAGS.size))
    except (UserError, OSError) as error:
        print(f"\n{error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command continues", file=sys.stderr)
        sys.exit(130)


def runway(size: tuple[int, int]) -> None:
    """Render one split."""
    sources.latent_frames(FLAGS.frames, FLAGS.frames_per_latent)  # is it k times as many, and one?
    make = examples.RunwayExamples(
        size=size, frames=FLAGS.frames, fps=FLAGS.fps, match=FLAGS.match, slot=FLAGS.slot
    )
    if FLAGS.match or FLAGS.slot:
        print(f"choosing {FLAGS.clips} clips ...", file=sys.stderr)
    split, count = records.prepare_runway(
        FLAGS.out,
        FLAGS.clips,
        make,
        seed_start=FLAGS.seed_start,
        workers=FLAGS.workers,
        shard_size=FLAGS.shard_size,
        progress=ProgressLine(),
    )
    print(f"\n{FLAGS.out}: {count} clips in split {split}", file=sys.stderr)


def latents(size: tuple[int, int]) -> None:
    """Encode splits of a set."""
    if not FLAGS.data or not FLAGS.weights:
        raise ConfigError("latents needs --data and --weights")
    weights = Path(FLAGS.weights)
    weights = weights / "vae.safetensors" if weights.is_dir() else weights
    encode, frames_per_latent = load_encoder(FLAGS.config, weights)
    for split in FLAGS.split:
        source = sources.open_sources(FLAGS.data, split)
        vae = sources.file_hash(weights)
        make = examples.LatentExamples(
            source,
            encode,
            size,
            FLAGS.frames,
            frames_per_latent,
            batch=FLAGS.batch,
            fps=FLAGS.fps,
            weights=vae,
        )
        count = records.write_latents(FLAGS.out, split, make, progress=ProgressLine())
        print(f"\n{FLAGS.out}: {count} clips in split {split}", file=sys.stderr)


def load_encoder(config_path: str, weights: Path) -> tuple[Callable[[np.ndarray], Any], int]:
    """The VAE's encoder, and its frames per latent frame.

    It makes normalised latents [b, f, h', w', c] of uint8 pixels [b, t, h, w, 3].

    A config.json beside the weights says their sizes and the mean and deviation of their latents;
    without one the config file does.
    """
    import jax
    from flax import nnx

    from chameleon_jax.data.images import to_model
    from chameleon_jax.models.vae import Vae, VaeConfig
    from chameleon_jax.training.export import stored_model
    from chameleon_jax.weights.params import load_params

    config = VaeConfig(
        **(stored_model(weights, "vae") or load_config(config_path).model.vae.to_dict())
    )
    vae = nnx.eval_shape(
        lambda: Vae(config, rngs=nnx.Rngs(0))
    )  # drawing weights to throw them away takes a while
    load_params(weights, vae)
    graph, state = nnx.split(vae)
    encode = jax.jit(lambda state, pixels: nnx.merge(graph, state).encode(to_model(pixels)))
    return functools.partial(encode, state), config.temporal_factor


class ProgressLine:
    """One line on stderr that is written over: records done, records a second, time left."""

    def __init__(self):
        self._start = time.monotonic()
        self._last, self._done = -1.0, -1

    def __call__(self, done: int, found: int, total: int) -> None:
        now = time.monotonic()
        if done == self._done or (now - self._last < 0.5 and done < total):
            return
        self._last, self._done = now, done
        rate = (done - found) / max(now - self._start, 1e-9)
        left = f"{(total - done) / rate / 60:.1f} min left" if rate > 0 else "starting"
        print(
            f"\r{done}/{total} records, {rate:.2f} a second, {left}   ",
            end="",
            file=sys.stderr,
            flush=True,
        )


def parse_size(text: str) -> tuple[int, int]:
    """`128x80` -> (128, 80)."""
    parts = text.split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) for part in parts):
        raise ConfigError(f"--size={text}: expected HEIGHTxWIDTH, such as 128x80")
    return int(parts[0]), int(parts[1])


if __name__ == "__main__":
    app.run(main)

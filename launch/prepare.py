"""Make training data, or a tokenizer.

    python -m launch.prepare runway       render clips of dressed people (extra `runway`)
    python -m launch.prepare latents      encode a set with a VAE (extra `train`)
    python -m launch.prepare text         encode its captions with a text encoder (extra `train`)
    python -m launch.prepare tokenizer    train the small tokenizer on captions

    python -m launch.prepare runway --out data/runway --clips 4000 --frames 33 --size 128x80
    python -m launch.prepare runway --out data/runway --clips 200 --seed_start 800000
    python -m launch.prepare latents --data data/runway --weights runs/vae/export \\
        --out data/latents --split train --split validation
    python -m launch.prepare text --data data/latents --weights weights/wan22 \\
        --tokenizer weights/wan22/tokenizer.json --out data/text --split train --split validation
    python -m launch.prepare tokenizer --out data/tokenizer.json

`python -m launch.prepare COMMAND --help` lists the flags of each. The first three can be
interrupted at any time; the same command again continues, and with more clips the set grows.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from chameleon_jax import places
from chameleon_jax.errors import need
from launch import cli
from launch.cli import UsageError

CONFIG = "configs/runway_tiny.py"
CONTINUES = "the same command continues"

ABOUT_RUNWAY = """Render a split of clips.

A clip is a person in motion, their picture in another garment, and the garment.

    python -m launch.prepare runway --out data/runway --clips 4000 --workers 2
    python -m launch.prepare runway --out data/runway --clips 200 --seed_start 800000
    python -m launch.prepare runway --out data/tops --match 'sways gently|waves' --slot top
    python -m launch.prepare runway --out data/mirror --world mirror

Seeds below 800,000 are the train split, below 900,000 the validation split, the others the test
split. `--clips` counts what is rendered, `--match` and `--slot` choose among the seeds. It can be
interrupted at any time; the same command again continues. Needs the extra `runway`.
"""

ABOUT_LATENTS = """Encode splits of a set with the VAE of a config, for training on latents.

    python -m launch.prepare latents --data data/runway --weights runs/vae/export \\
        --out data/latents --split train --split validation

    python -m launch.prepare latents --data data/clips --weights weights/wan22 --frames 81 \\
        --size 1280x704 --bucket 704x1280 --out data/latents_portrait

    python -m launch.prepare latents --world mirror --clips 8000 --frames 9 \
        --weights runs/vae/export --label labels --label origin --out data/starts

The last one renders clips on the way and stores none of them. The sizes of the VAE are those of the
config.json beside its weights; without one, those of `--config`. With `--bucket` only the clips are
encoded that `--size` suits better than the other sizes: one set for each size, and all of them as
`data.dir`. It can be interrupted at any time; the same command again continues. Needs the extra
`train`, and `runway` for `--world`.
"""

ABOUT_TEXT = """Encode the captions of a set once, for training without the text encoder.

    python -m launch.prepare text --data data/latents --weights weights/wan22 \\
        --tokenizer weights/wan22/tokenizer.json --out data/text --split train --split validation

The states of every caption are stored, with and without what the scene looks like, and those of the
empty and of the negative prompt. Training takes them with `--config.data.text=data/text`. The sizes
of the encoder are those of the config.json beside its weights; without one, those of `--config`. It
can be interrupted at any time; the same command again continues. Needs the extra `train`.
"""

ABOUT_TOKENIZER = """Train the small tokenizer on captions.

    python -m launch.prepare tokenizer --out chameleon_jax/assets/runway_tiny/tokenizer.json
    python -m launch.prepare tokenizer --texts captions.txt --vocab 4096 --out tokenizer.json

Without `--texts` the captions are those of the synthetic scenes (needs the extra `runway`), seeds
of the train split only. The same captions always give the same file.
"""


def runway_flags(parser: cli.Parser) -> None:
    """The flags of `prepare runway`."""
    _clip_flags(parser)
    parser.flag("clips", "clips to render", kind=cli.whole_number(1), default=4000, metavar="N")
    parser.flag(
        "seed_start", "seed of the first clip", kind=cli.whole_number(0), default=0, metavar="N"
    )
    parser.flag(
        "frames_per_latent",
        "pixel frames of a latent frame, of the VAE that will encode the clips",
        kind=cli.whole_number(1),
        default=4,
        metavar="N",
    )
    parser.flag(
        "match",
        "regular expression; only clips with a caption in which it is found",
        default="",
        metavar="REGEX",
    )
    parser.flag(
        "slot",
        "only clips whose garment is worn there: top, bottom, dress or outer",
        default="",
        metavar="SLOT",
    )
    parser.flag(
        "world",
        "what clips are drawn from: open (everything), or mirror (people before a mirror, in tops)",
        default="open",
        metavar="NAME",
    )
    parser.flag(
        "people",
        "so many neighbouring seeds show the same person, in other clothes elsewhere",
        kind=cli.whole_number(1),
        default=1,
        metavar="N",
    )
    parser.switch(
        "labels",
        "store exact labels, too: what each pixel shows, where on the garment's picture it comes"
        " from, and the joints",
        default=False,
    )
    parser.flag(
        "workers",
        "rendering processes; 0 renders in this one",
        kind=cli.whole_number(0, 1024),
        default=2,
        metavar="N",
    )
    parser.flag(
        "shard_size",
        "records a file: what a killed run may lose",
        kind=cli.whole_number(1),
        default=40,
        metavar="N",
    )


def latents_flags(parser: cli.Parser) -> None:
    """The flags of `prepare latents`."""
    _clip_flags(parser)
    parser.config_flag((CONFIG, ""))
    parser.flag(
        "data",
        "folder of a rendered set, or of clips with a table; may be repeated",
        repeated=True,
        metavar="DIR",
    )
    parser.flag(
        "world",
        "instead of --data: render clips of this world, and keep their latents only",
        metavar="NAME",
    )
    parser.flag("clips", "of --world", kind=cli.whole_number(1), default=4000, metavar="N")
    parser.flag(
        "seed_start",
        "of --world: seed of the first clip",
        kind=cli.whole_number(0),
        default=0,
        metavar="N",
    )
    parser.flag(
        "workers",
        "of --world: rendering processes; 0 renders in this one",
        kind=cli.whole_number(0, 1024),
        default=2,
        metavar="N",
    )
    parser.flag("split", "split to encode, default train; may be repeated", repeated=True)
    parser.flag(
        "weights",
        "weights of the VAE: a .safetensors file, or the folder of vae.safetensors and config.json",
        needed=True,
        metavar="DIR",
    )
    parser.flag(
        "bucket",
        "another size that clips may go to; only those that --size suits best are encoded; may be"
        " repeated",
        kind=cli.size,
        repeated=True,
        metavar="HEIGHTxWIDTH",
    )
    parser.flag(
        "label",
        "kind of labels to store too, as those of latent pixels: labels, origin, joints or"
        " attributes; may be repeated",
        kind=cli.one_of("labels", "origin", "joints", "attributes"),
        repeated=True,
        metavar="KIND",
    )
    parser.flag("batch", "clips encoded together", kind=cli.whole_number(1), default=4, metavar="N")
    parser.compilation_flag()


def text_flags(parser: cli.Parser) -> None:
    """The flags of `prepare text`."""
    parser.flag("out", "folder to write", needed=True, metavar="DIR")
    parser.config_flag((CONFIG, ""))
    parser.flag(
        "data",
        "folder of clips or latents; may be repeated",
        repeated=True,
        needed=True,
        metavar="DIR",
    )
    parser.flag("split", "split to encode, default train; may be repeated", repeated=True)
    parser.flag(
        "weights",
        "weights of the text encoder: a .safetensors file, or the folder of text.safetensors and"
        " config.json",
        needed=True,
        metavar="DIR",
    )
    parser.flag("tokenizer", "tokenizer.json of the encoder", needed=True, metavar="FILE")
    parser.flag(
        "dtype",
        "of the encoder and of the states: bfloat16 or float32",
        kind=cli.one_of("bfloat16", "float32"),
        default="bfloat16",
        metavar="DTYPE",
    )
    parser.flag(
        "batch", "prompts encoded together", kind=cli.whole_number(1), default=8, metavar="N"
    )
    parser.compilation_flag()


def tokenizer_flags(parser: cli.Parser) -> None:
    """The flags of `prepare tokenizer`."""
    parser.flag("out", "tokenizer.json to write", needed=True, metavar="FILE")
    parser.flag(
        "texts",
        "text file, one caption a line; default: captions of the synthetic scenes",
        metavar="FILE",
    )
    parser.flag(
        "scenes",
        "synthetic scenes to take captions from",
        kind=cli.whole_number(1, 800_000),
        default=2000,
        metavar="N",
    )
    parser.flag(
        "vocab",
        "most pieces, special tokens and bytes included",
        kind=cli.whole_number(1, 10**6),
        default=1024,
        metavar="N",
    )


def _clip_flags(parser: cli.Parser) -> None:
    parser.flag("out", "folder to write", needed=True, metavar="DIR")
    parser.flag(
        "frames", "pixel frames a clip, 4k + 1", kind=cli.whole_number(1), default=33, metavar="N"
    )
    parser.flag("size", "in pixels", kind=cli.size, default="128x80", metavar="HEIGHTxWIDTH")
    parser.flag("fps", "frames per second", kind=cli.number(above=0), default=16.0)


def prepare_runway(values: cli.Values) -> None:
    """Render one split."""
    for module in ("numba", "av"):
        need(module, "runway")
    need("array_record", "train")
    places.check_writable(Path(values.out) / "dataset_info.json")
    from chameleon_jax.data import examples, records, sources
    from chameleon_jax.data.video import frame_rate

    frame_rate(values.fps)  # refuses what no video has
    sources.latent_frames(values.frames, values.frames_per_latent)  # refuses what no VAE takes
    make = examples.RunwayExamples(
        size=values.size,
        frames=values.frames,
        fps=values.fps,
        match=values.match,
        slot=values.slot,
        world=values.world,
        labels=values.labels,
        people=values.people,
    )
    if values.match or values.slot:
        print(f"choosing {values.clips} clips ...", file=sys.stderr)
    with ProgressLine() as progress:
        split, count = records.prepare_runway(
            values.out,
            values.clips,
            make,
            seed_start=values.seed_start,
            workers=values.workers,
            shard_size=values.shard_size,
            progress=progress,
        )
    print(f"{values.out}: {count} clips in split {split}", file=sys.stderr)


def prepare_latents(values: cli.Values) -> None:
    """Encode splits of a set."""
    need("array_record", "train")
    if bool(values.data) == bool(values.world):
        raise UsageError("give --data (clips on disk) or --world (clips to render), one of them")
    if values.world and (values.split or values.bucket):
        raise UsageError("--split and --bucket belong to --data; the split follows from the seeds")
    if values.data:
        need("av", "video")
    places.check_writable(Path(values.out) / "dataset_info.json")
    from chameleon_jax.data import examples, records, sources

    cli.start_jax(values)
    weights = places.find(values.weights)
    weights = weights / "vae.safetensors" if weights.is_dir() else weights
    encode, vae = load_encoder(values, weights)
    kinds = tuple(values.label)
    print("the first batch compiles the encoder ...", file=sys.stderr)
    for split, source in clip_sources(values, kinds):
        make = examples.LatentExamples(
            source,
            encode,
            values.size,
            values.frames,
            vae.temporal_factor,
            batch=values.batch,
            fps=values.fps,
            weights=sources.file_hash(weights),
            factor=vae.spatial_factor,
            labels=kinds,
        )
        with ProgressLine() as progress:
            count = records.write_latents(values.out, split, make, progress=progress)
        print(f"{values.out}: {count} clips in split {split}", file=sys.stderr)


def clip_sources(values: cli.Values, kinds: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Splits and their clips: of folders, or rendered on the way."""
    from chameleon_jax.data import examples, rendered, sources
    from chameleon_jax.splits import split_of

    if not values.world:
        for split in values.split or ["train"]:
            source = sources.open_sources(values.data, split, kinds)
            if values.bucket:
                source = sources.BucketSource(source, values.size, values.bucket)
            yield split, source
        return
    first, last = values.seed_start, values.seed_start + values.clips
    seeds = examples.check_seeds(range(first, last), first, values.clips)
    yield (
        split_of(values.seed_start),
        rendered.RenderedSource(
            seeds,
            values.size,
            values.fps,
            values.world,
            labels=kinds,
            workers=values.workers,
        ),
    )


def load_encoder(values: cli.Values, weights: Path) -> tuple[Callable[[Any], Any], Any]:
    """The VAE's encoder, and the sizes of the VAE.

    It makes normalised latents [b, f, h', w', c] of uint8 pixels [b, t, h, w, 3]. A config.json
    beside the weights says their sizes and the mean and deviation of their latents; without one the
    config file does.
    """
    import jax
    from flax import nnx

    from chameleon_jax.config import load_config
    from chameleon_jax.data.images import to_model
    from chameleon_jax.models import build
    from chameleon_jax.training.export import stored_model
    from chameleon_jax.weights.params import load_params

    sizes = stored_model(weights, "vae")
    if sizes is None:
        sizes = load_config(values.config or CONFIG, values.overrides).model.vae.to_dict()
    vae = build.abstract("vae", sizes)
    load_params(weights, vae)
    graph, state = nnx.split(vae)
    encode = jax.jit(lambda state, pixels: nnx.merge(graph, state).encode(to_model(pixels)))
    return functools.partial(encode, state), vae.config


def prepare_text(values: cli.Values) -> None:
    """Encode the captions of splits of a set."""
    need("array_record", "train")
    places.check_writable(Path(values.out) / "dataset_info.json")
    from chameleon_jax.data import sources, text_states
    from chameleon_jax.diffusion.sampler import NEGATIVE_PROMPT

    cli.start_jax(values)
    weights = places.find(values.weights)
    weights = weights / "text.safetensors" if weights.is_dir() else weights
    encode, sizes = load_text_encoder(values, weights)
    hashes = [sources.file_hash(path) for path in (weights, places.find(values.tokenizer))]
    print("the first batch compiles the encoder ...", file=sys.stderr)
    for split in values.split or ["train"]:
        source = sources.open_sources(values.data, split)
        make = text_states.TextExamples(
            text_states.read_prompts(source, ("", NEGATIVE_PROMPT)),
            encode,
            sizes.width,
            sizes.length,
            dtype=values.dtype,
            weights=hashes[0],
            tokenizer=hashes[1],
            batch=values.batch,
        )
        with ProgressLine() as progress:
            count = text_states.write_text_states(values.out, split, make, progress=progress)
        print(f"{values.out}: {count} prompts in split {split}", file=sys.stderr)


def load_text_encoder(values: cli.Values, weights: Path) -> tuple[Callable[[Any], Any], Any]:
    """The text encoder as `text_states.Encode`, and its sizes."""
    import jax
    from flax import nnx

    from chameleon_jax.config import load_config
    from chameleon_jax.data.tokenizer import Tokenizer
    from chameleon_jax.models import build
    from chameleon_jax.training.export import stored_model
    from chameleon_jax.weights.params import load_params

    sizes = stored_model(weights, "text")
    if sizes is None:
        sizes = load_config(values.config or CONFIG, values.overrides).model.text.to_dict()
    text = build.abstract("text", sizes, dtype=build.DTYPES[values.dtype])
    load_params(weights, text)
    tokenizer = Tokenizer.from_file(values.tokenizer, text.config.length)
    if tokenizer.vocab > text.config.vocab:
        raise UsageError(
            f"--tokenizer {values.tokenizer} has {tokenizer.vocab} pieces, the encoder knows"
            f" {text.config.vocab}; expected the one that it was trained with"
        )
    graph, state = nnx.split(text)
    run = jax.jit(lambda state, ids, mask: nnx.merge(graph, state)(ids, mask))

    def encode(prompts: Sequence[str]) -> tuple[Any, Any]:
        ids, mask = tokenizer(prompts)
        return run(state, ids, mask), mask

    return encode, text.config


def prepare_tokenizer(values: cli.Values) -> None:
    """Train the tokenizer and write it; prints one line on what was learnt."""
    out = Path(values.out)
    places.check_writable(out)
    from chameleon_jax import files
    from chameleon_jax.data.tokenizer import clean_text, train_pieces

    texts = read_texts(values.texts) if values.texts else scene_captions(values.scenes)
    texts = [clean_text(text) for text in texts]
    try:
        pieces = train_pieces(texts, values.vocab)
    except ValueError as error:  # no text, or no room for it
        raise UsageError(f"the tokenizer cannot be trained: {error}") from None
    out.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(out, pieces.to_str(pretty=False))
    lengths = [len(encoding.ids) for encoding in pieces.encode_batch(texts)]
    print(
        f"{out}: {pieces.get_vocab_size()} pieces, {out.stat().st_size / 1000:.0f} kB;"
        f" {len(texts)} captions take {sum(lengths) / len(lengths):.1f} tokens on average,"
        f" {max(lengths)} at most"
    )


def scene_captions(scenes: int) -> Iterator[str]:
    """Long and short captions of the first scenes of the train split; nothing is rendered."""
    need("numba", "runway")
    from chameleon_jax.runway import sample_spec

    for seed in range(scenes):
        captions = sample_spec(seed).captions()
        yield from (*captions["en_long"], *captions["en_short"])


def read_texts(path: str) -> list[str]:
    """The lines of a UTF-8 text file.

    Raises:
      UsageError: it cannot be read.
    """
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--texts {path}: not a readable UTF-8 text file ({error})") from None


class ProgressLine:
    """One line on stderr that is written over: records done, records a second, time left."""

    def __init__(self):
        self._start = time.monotonic()
        self._last, self._done = -1.0, -1

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, *_: object) -> None:
        if self._done >= 0:
            print(file=sys.stderr)  # what is said next stands on a line of its own

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


COMMANDS = {
    "runway": cli.Command(ABOUT_RUNWAY, runway_flags, prepare_runway, CONTINUES),
    "latents": cli.Command(ABOUT_LATENTS, latents_flags, prepare_latents, CONTINUES),
    "text": cli.Command(ABOUT_TEXT, text_flags, prepare_text, CONTINUES),
    "tokenizer": cli.Command(ABOUT_TOKENIZER, tokenizer_flags, prepare_tokenizer),
}


def main(argv: Sequence[str] | None = None, program: str = "python -m launch.prepare") -> None:
    """Call one of `COMMANDS`, and end the process."""
    cli.choose(program, __doc__ or "", COMMANDS, argv)


if __name__ == "__main__":
    main()

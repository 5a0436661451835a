"""Train the small tokenizer on captions.

    python -m launch.train_tokenizer --out chameleon_jax/assets/runway_tiny/tokenizer.json
    python -m launch.train_tokenizer --texts captions.txt --vocab 4096 --out tokenizer.json

Without `--texts` the captions are those of the synthetic scenes (needs the extra `runway`), seeds
of the train split only. The same captions always give the same file.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from absl import flags

from chameleon_jax import files
from chameleon_jax.data.tokenizer import clean_text, train_pieces
from launch.cli import UsageError, fail, parse


def define_flags() -> flags.FlagValues:
    """The flags of this command."""
    values = flags.FlagValues()
    kw = {"flag_values": values}
    flags.DEFINE_bool("help", False, "say what there is and stop", short_name="h", **kw)
    flags.DEFINE_string("out", None, "tokenizer.json to write", **kw)
    flags.DEFINE_string(
        "texts",
        None,
        "text file, one caption a line; default: captions of the synthetic scenes",
        **kw,
    )
    flags.DEFINE_integer(
        "scenes", 2000, "synthetic scenes to take captions from", lower_bound=1, **kw
    )
    flags.DEFINE_integer("vocab", 1024, "most pieces, special tokens and bytes included", **kw)
    return values


def scene_captions(scenes: int) -> Iterator[str]:
    """The long and the short captions of the first scenes of the train split; nothing is rendered."""
    from chameleon_jax.runway import sample_spec

    for seed in range(scenes):
        spoken = sample_spec(seed).captions()
        yield from (*spoken["en_long"], *spoken["en_short"])


def read_texts(path: str) -> list[str]:
    """The lines of a UTF-8 text file."""
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--texts={path}: not a readable UTF-8 text file ({error})") from None


def main(argv: Sequence[str]) -> None:
    """Train and write; prints one line on what was learnt."""
    values, overrides = parse(define_flags(), argv, __doc__)
    if values.out is None or overrides:
        raise UsageError(
            "this command has no config"
            if overrides
            else "--out is needed: the tokenizer.json to write"
        )
    texts = read_texts(values.texts) if values.texts else scene_captions(values.scenes)
    texts = [clean_text(text) for text in texts]
    pieces = train_pieces(texts, values.vocab)
    out = Path(values.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(out, pieces.to_str(pretty=False))
    lengths = [len(encoding.ids) for encoding in pieces.encode_batch(texts)]
    print(
        f"{out}: {pieces.get_vocab_size()} pieces, {out.stat().st_size / 1000:.0f} kB; {len(texts)}"
        " captions take"
        f" {sum(lengths) / len(lengths):.1f} tokens on average, {max(lengths)} at most"
    )


if __name__ == "__main__":
    try:
        main(sys.argv)
    except (UsageError, ValueError, ImportError) as error:
        fail(error)

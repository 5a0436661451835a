"""States of the frozen text encoder, computed once, so that training need not hold the encoder.

UMT5-XXL has 5.7 billion parameters, the transformer that is trained 5. A folder of text states
holds, in the layout of `records`, one record for each different prompt: its states up to and
including the end token; what follows is zero. Prompts are found by their text, so that one folder
serves clips and latents alike, in any order and any choice of them, and the loader draws captions
as if it were to encode them.

bfloat16 is stored as the uint16 of its bits, for the records know no bfloat16.

Axes: b batch, l tokens, m width of the encoder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from chameleon_jax import files
from chameleon_jax.data import captions, records
from chameleon_jax.data.examples import Record
from chameleon_jax.data.shards import Shards
from chameleon_jax.data.sources import Source, SourceError, import_tfds, read_info
from chameleon_jax.errors import UserError, one_line

NAME = "prompt_states"  # of the dataset
# How the numbers of each kind are stored, and what they are.
DTYPES = {
    "bfloat16": (np.dtype(np.uint16), np.dtype(jnp.bfloat16)),
    "float32": (np.dtype(np.float32), np.dtype(np.float32)),
}
# Prompts to states [b, l, m], zero after each prompt, and mask [b, l], True on it.
Encode = Callable[[Sequence[str]], tuple[Any, np.ndarray]]


class TextError(UserError):
    """Text states cannot be made, read or used as asked. The message is one line."""


def read_prompts(source: Source, others: Iterable[str] = ()) -> list[str]:
    """All different prompts that training on a source can draw, in a lasting order.

    They are `others`, then of each record the dynamic caption and both captions. More records of
    the same source add prompts at the end only.

    Args:
      source: its captions are read once now; a record without readable ones is left out.
      others: prompts that are needed besides: the empty one, and the negative one.
    """
    found = dict.fromkeys(others)
    for index in range(len(source)):
        try:
            both = source.captions(index)
        except ValueError as error:  # the loader replaces such a record, and counts it
            logging.warning("the captions of record %d cannot be read: %s", index, error)
            continue
        found[both["dynamic"]] = found[captions.full(both["static"], both["dynamic"])] = None
    return list(found)


@dataclasses.dataclass(frozen=True)
class TextExamples:
    """Encodes prompts; the keys are their indices. See `examples.Examples`.

    Attributes:
      prompts: different ones, see `read_prompts`.
      encode: see `Encode`.
      width, length: channels of a state, and tokens that the encoder reads.
      dtype: of the states, "bfloat16" or "float32": that of the encoder, so that nothing is lost.
      weights, tokenizer: hashes of their files; a set is not continued with others.
      batch: prompts encoded together.

    Raises:
      TextError: another dtype.
    """

    prompts: Sequence[str]
    encode: Encode
    width: int
    length: int
    dtype: str = "bfloat16"
    weights: str = ""
    tokenizer: str = ""
    batch: int = 8

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise TextError(f"dtype is {self.dtype!r}; expected one of {', '.join(DTYPES)}")

    def __call__(self, keys: Sequence[int]) -> Iterator[tuple[int, Record | None]]:
        stored, real = DTYPES[self.dtype]
        for start in range(0, len(keys), self.batch):
            some = keys[start : start + self.batch]
            prompts = [self.prompts[key] for key in some]
            # The last batch is filled up, so that `encode` is compiled for one shape.
            states, mask = self.encode([*prompts, *[""] * (self.batch - len(prompts))])
            states = np.asarray(states).astype(real)
            lengths = np.asarray(mask).sum(1)
            for row, (key, prompt) in enumerate(zip(some, prompts, strict=True)):
                kept = states[row, : lengths[row]]
                if not np.isfinite(kept.astype(np.float32)).all():
                    raise TextError(
                        f"the states of the prompt {prompt[:60]!r} are not finite: are the weights"
                        " those of this encoder?"
                    )
                yield key, {"prompt": prompt, "states": kept.view(stored)}

    def metadata(self) -> dict[str, Any]:
        """See `examples.Examples`."""
        names = ("width", "length", "dtype", "weights", "tokenizer")
        return {"kind": "text"} | {name: getattr(self, name) for name in names}

    def recipe(self) -> dict[str, Any]:
        """See `examples.Examples`."""
        return self.metadata()

    def digest(self, keys: Sequence[int]) -> str:
        """See `examples.Examples`: of all prompts."""
        hashed = hashlib.sha256()
        for key in keys:
            hashed.update(_digest(self.prompts[key]))
        return hashed.hexdigest()[:16]


def write_text_states(
    out: str | os.PathLike,
    split: str,
    examples: TextExamples,
    *,
    shard_size: int = 500,
    progress: records.Progress | None = None,
) -> int:
    """Encode all prompts into one split of a folder of text states; see `records.write_records`.

    Returns:
      Number of prompts.
    """
    count = records.write_records(
        out,
        split,
        range(len(examples.prompts)),
        examples,
        _features(examples.width, examples.dtype),
        name=NAME,
        shard_size=shard_size,
        progress=progress,
    )
    lines = [_digest(prompt).hex() for prompt in examples.prompts]
    files.write_text(_index_file(Path(out), split), "\n".join(lines) + "\n")
    return count


class TextStates:
    """The text states of a folder, all of its splits. Can be pickled.

    Args:
      folder: written by `write_text_states`.

    Attributes:
      width, length: channels of a state, and tokens of a prompt after padding.
      dtype: "bfloat16" or "float32".
      weights, tokenizer: hashes of the files that made them, see `sources.file_hash`.

    Raises:
      TextError: it holds none, or is not finished.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        try:
            info = read_info(self.folder)
        except SourceError as error:
            raise TextError(f"{error}; expected text states, which `prepare text` makes") from None
        about = dict(info.metadata or {})
        if about.get("kind") != "text":
            raise TextError(f"{folder}: holds no text states; `prepare text` makes them")
        self.width, self.length, self.dtype = about["width"], about["length"], about["dtype"]
        self.weights, self.tokenizer = about["weights"], about["tokenizer"]
        self._features = info.features
        self._places: dict[bytes, tuple[str, int]] = {}
        self._shards: dict[str, Shards] = {}
        for name, split in sorted(info.splits.items()):
            self._shards[name] = Shards(split.filepaths, split.shard_lengths)
            for place, digest in enumerate(self._read_index(name)):
                self._places.setdefault(digest, (name, place))

    def __len__(self) -> int:
        return len(self._places)

    def __repr__(self) -> str:
        return (
            f"TextStates({self.folder}: {len(self)} prompts of at most {self.length} tokens, width"
            f" {self.width}, {self.dtype})"
        )

    def __contains__(self, prompt: str) -> bool:
        return _digest(prompt) in self._places

    def states(self, prompt: str) -> np.ndarray:
        """States [length, width] of a prompt, zero after it, bfloat16 or float32.

        Raises:
          TextError: the prompt is not among those that were encoded.
          ShardError, TextError: the record is damaged.
        """
        place = self._places.get(_digest(prompt))
        if place is None:
            raise TextError(
                f"{self.folder}: has no states of the prompt {prompt[:60]!r}; `prepare text` adds"
                " the prompts of a set"
            )
        split, number = place
        data = self._shards[split][number]
        try:
            record = self._features.deserialize_example_np(data)
        except Exception as error:  # of protobuf, NumPy or tensorflow_datasets
            raise TextError(
                f"{self.folder}: record {number} of {split} is damaged ({one_line(error)})"
            ) from None
        if record["prompt"].decode("utf-8") != prompt:
            raise TextError(
                f"{self.folder}: record {number} of {split} is of another prompt; write the folder"
                " anew"
            )
        kept = record["states"].view(DTYPES[self.dtype][1])
        padded = np.zeros((self.length, self.width), kept.dtype)
        padded[: len(kept)] = kept
        return padded

    def batch(self, prompts: Sequence[str]) -> np.ndarray:
        """States [b, length, width] of some prompts; see `states`."""
        return np.stack([self.states(prompt) for prompt in prompts])

    def _read_index(self, split: str) -> list[bytes]:
        path = _index_file(self.folder, split)
        try:
            digests = [bytes.fromhex(line) for line in path.read_text(encoding="ascii").split()]
        except (OSError, ValueError):
            digests = []
        if not digests or len(digests) > len(self._shards[split]):
            raise TextError(
                f"{path}: not a list of the prompts; the command that began the set continues it"
            )
        return digests


def _features(width: int, dtype: str) -> Any:
    tfds = import_tfds()
    states = tfds.features.Tensor(
        shape=(None, width), dtype=DTYPES[dtype][0], encoding=tfds.features.Encoding.BYTES
    )
    return tfds.features.FeaturesDict({"prompt": tfds.features.Text(), "states": states})


def _index_file(folder: Path, split: str) -> Path:
    """The digests of the prompts of a split, a line each, in the order of the records."""
    return folder / f"prompts.{split}.txt"


def _digest(prompt: str) -> bytes:
    return hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).digest()[:16]

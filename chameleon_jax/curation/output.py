"""What comes out: records as trained on, and the table of clips of the original's authors.

Axes: t frames, h w pixels.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from chameleon_jax import files
from chameleon_jax.curation import garment
from chameleon_jax.curation.captioner import captions_of
from chameleon_jax.curation.clip import Clip
from chameleon_jax.curation.footage import Footage
from chameleon_jax.data import captions, tables
from chameleon_jax.data.examples import Record, clip_features

ORDER = "order.json"
DATASET = "curated_garment"


@dataclasses.dataclass(frozen=True)
class CuratedExamples:
    """Makes records of curated clips, see `data.examples.Examples`; the keys are indices.

    Attributes:
      clips: those that are in, with captions, garment and reference.
      footage: opens them.
      out: folder of the run, which holds the pictures.
      size: (height, width) of the records.
      frames: pixel frames a record.
      fps: frames per second at which the clips are read.
      crf: quality of the stored clip.
      thresholds: of the filters, for the records.
    """

    clips: Sequence[Clip]
    footage: Footage
    out: Path
    size: tuple[int, int]
    frames: int
    fps: float
    crf: int = 12
    thresholds: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __call__(self, keys: Sequence[int]) -> Iterator[tuple[int, Record | None]]:
        for key in keys:
            try:
                yield key, self.record(key)
            except ValueError as error:
                logging.error("clip %s cannot be written: %s", self.clips[key].id, error)
                yield key, None

    def record(self, key: int) -> Record:
        """One record.

        Raises:
          VideoError, ImageError: the clip or its pictures cannot be read.
        """
        from chameleon_jax.data import images
        from chameleon_jax.data.sources import fit_frames
        from chameleon_jax.data.video import encode_video

        clip = self.clips[key]
        frames = fit_frames(self.footage.frames(clip, self.frames, self.fps), self.size)
        pictures = garment.of_clip(clip)
        reference = images.prepare_training_frame(self.out / pictures["reference"], self.size)
        alone = images.prepare_training_garment(self.out / pictures["garment"], self.size)
        said = captions_of(clip)
        texts = captions.from_prompt(said) | {name: list(pair) for name, pair in said.items()}
        return {
            "video": encode_video(frames, self.fps, crf=self.crf, yuv444p=True),
            "reference": images.encode_image(reference),
            "garment": images.encode_image(alone),
            "captions": json.dumps(texts, ensure_ascii=False),
            "spec": json.dumps(provenance(clip, self.thresholds), ensure_ascii=False),
            "seed": key,
            "height": self.size[0],
            "width": self.size[1],
            "frames": self.frames,
            "fps": self.fps,
        }

    def metadata(self) -> dict[str, Any]:
        """See `data.examples.Examples`."""
        return {
            "kind": "pixels",
            "height": self.size[0],
            "width": self.size[1],
            "frames": self.frames,
            "fps": self.fps,
        }

    def recipe(self) -> dict[str, Any]:
        """See `data.examples.Examples`."""
        return self.metadata() | {"crf": self.crf}

    def digest(self, keys: Sequence[int]) -> str:
        """See `data.examples.Examples`."""
        ids = "\n".join(self.clips[key].id for key in keys)
        return hashlib.sha256(ids.encode()).hexdigest()[:16]


def provenance(clip: Clip, thresholds: Mapping[str, Any]) -> dict[str, Any]:
    """Where a record is from, and what decided that it is one."""
    return {
        "clip": clip.id,
        "video": clip.video,
        "licence": clip.licence,
        "source": clip.source,
        "start": round(clip.start, 4),
        "seconds": round(clip.seconds, 4),
        "measured": dict(clip.measured),
        "thresholds": dict(thresholds),
        "versions": dict(clip.versions),
        "captions_by": _without(clip.made["captions"], "prompt"),
        "garment": _without(clip.made["garment"], "file"),
        "reference": _without(clip.made["reference"], "file"),
    }


def _without(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != name}


def in_order(out: Path, clips: Sequence[Clip]) -> list[Clip]:
    """Clips as earlier runs had them, new ones behind: finished shards stay what they are."""
    known: list[str] = []
    if (out / ORDER).exists():
        known = json.loads((out / ORDER).read_text(encoding="utf-8"))
    place = {name: number for number, name in enumerate(known)}
    ordered = sorted(clips, key=lambda clip: (place.get(clip.id, len(place)), clip.id))
    files.write_json(out / ORDER, [clip.id for clip in ordered])
    return ordered


def write_records(examples: CuratedExamples, split: str, shard_size: int, progress: Any) -> int:
    """ArrayRecord shards in `records/`, as `prepare` writes them; how many records.

    Raises:
      RecordError: see `data.records.write_records`.
    """
    from chameleon_jax.data import records

    return records.write_records(
        examples.out / "records",
        split,
        range(len(examples.clips)),
        examples,
        clip_features(),
        name=DATASET,
        shard_size=shard_size,
        progress=progress,
    )


def write_table(examples: CuratedExamples, crf: int) -> Path:
    """The clips as files with a table, in `table/`; see `data.sources.DirectorySource`.

    Clips keep their size and frame rate, and are not encoded again if they are there. The table has
    the columns licence and source, too.

    Returns:
      The table.

    Raises:
      VideoError: a clip cannot be read or written.
    """
    from chameleon_jax.data.video import write_video

    folder = examples.out / "table"
    (folder / "clips").mkdir(parents=True, exist_ok=True)
    rows = []
    for clip in examples.clips:
        target = folder / "clips" / f"{clip.id}.mp4"
        # H.264 that every player shows has even sides.
        height, width = (side - side % 2 for side in clip.size)
        if not target.exists():
            frames = examples.footage.frames(clip)
            write_video(target, frames[:, :height, :width], clip.fps, crf=crf)
        for name, ending in (("reference", "src"), ("garment", "cloth")):
            _copy(examples.out / garment.of_clip(clip)[name], folder, f"{clip.id}_{ending}.png")
        rows.append(
            tables.Row(
                video=f"clips/{clip.id}.mp4",
                size=(height, width),
                fps=clip.fps,
                captions=captions.from_prompt(captions_of(clip)),
            )
        )
    more = [
        {"prompt": json.dumps(captions_of(clip), ensure_ascii=False)}
        | {"licence": clip.licence, "source": clip.source}
        for clip in examples.clips
    ]
    tables.write_table(folder / "table.csv", rows, more)
    return folder / "table.csv"


def _copy(source: Path, folder: Path, name: str) -> None:
    with files.replacing(folder / "clips" / name) as part:
        shutil.copyfile(source, part)

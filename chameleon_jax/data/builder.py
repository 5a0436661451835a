"""Sets of records as `tensorflow_datasets` builders; needs the extra `train`.

The rendered set (extra `runway`):

    builder = RunwayGarment(config="128x80_33f", data_dir="data", file_format="array_record")
    builder.download_and_prepare()
    clips = builder.as_data_source("train")

It renders in one process and from the start. `python -m launch.prepare runway` makes the same
records in several processes, can be interrupted, and its sets can grow.

The curated set, of what `python -m launch.curate` wrote; to import this module registers its name:

    builder = tfds.builder("curated_garment", data_dir="data/tfds", file_format="array_record")
    where = tfds.download.DownloadConfig(manual_dir="data/curated/records")
    builder.download_and_prepare(download_config=where)
    clips = builder.as_data_source("train")
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from chameleon_jax.data.examples import RunwayExamples, clip_features
from chameleon_jax.data.records import DESCRIPTION, VERSION
from chameleon_jax.data.sources import RecordSource, SourceError, import_tfds, read_info
from chameleon_jax.splits import SPLITS

tfds = import_tfds()


@dataclasses.dataclass
class RunwayConfig(tfds.core.BuilderConfig):
    """One variant of the set: size and length of the clips, and how many of them each split has."""

    size: tuple[int, int] = (128, 80)
    frames: int = 33
    fps: float = 16
    clips: tuple[tuple[str, int], ...] = (("train", 4000), ("validation", 200))
    render: Callable[..., Any] | None = None


def _config(size: tuple[int, int], frames: int, train: int) -> RunwayConfig:
    return RunwayConfig(
        name=f"{size[0]}x{size[1]}_{frames}f",
        version=VERSION,
        description=f"{frames} frames of {size[0]} x {size[1]} pixels (height x width).",
        size=size,
        frames=frames,
        clips=(("train", train), ("validation", train // 20)),
    )


class RunwayGarment(tfds.core.GeneratorBasedBuilder):
    """See the module's docstring."""

    VERSION = tfds.core.Version(VERSION)
    BUILDER_CONFIGS = (
        _config((128, 80), 33, 4000),
        _config((128, 80), 81, 4000),
        _config((256, 144), 81, 10000),
    )

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=DESCRIPTION["runway_garment"],
            features=clip_features(),
            metadata=tfds.core.MetadataDict(self._examples().metadata()),
            disable_shuffling=True,
        )

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterable[Any]]:
        del dl_manager  # nothing is downloaded
        clips = self.builder_config.clips
        return {split: self._generate_examples(SPLITS[split], count) for split, count in clips}

    def _generate_examples(self, start: int, count: int) -> Iterator[tuple[int, dict[str, Any]]]:
        for seed, record in self._examples()(range(start, start + count)):
            if record is not None:
                yield seed, record

    def _examples(self) -> RunwayExamples:
        config = self.builder_config
        return RunwayExamples(config.size, config.frames, config.fps, render=config.render)


class CuratedGarment(tfds.core.GeneratorBasedBuilder):
    """Curated records under a name and a version, where `tfds.builder` finds them.

    Raises:
      SourceError: the folder holds no finished records of clips.
    """

    VERSION = tfds.core.Version(VERSION)
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "manual_dir is the folder records/ of a run of `python -m launch.curate`."
    )

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=DESCRIPTION["curated_garment"],
            features=clip_features(),
            metadata=tfds.core.MetadataDict(),
            disable_shuffling=True,
        )

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterable[Any]]:
        folder = Path(dl_manager.manual_dir)
        info = read_info(folder)
        sources = {split: RecordSource(folder, split) for split in info.splits}
        for source in sources.values():
            if source.kind != "pixels":
                raise SourceError(f"{folder}: holds {source.kind}; expected records of clips")
        self.info.metadata.update(info.metadata or {})
        return {split: self._generate_examples(source) for split, source in sources.items()}

    def _generate_examples(self, source: RecordSource) -> Iterator[tuple[int, dict[str, Any]]]:
        for index in range(len(source)):
            yield index, source.raw(index)

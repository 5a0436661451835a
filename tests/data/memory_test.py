"""A source in memory gives what the source on disk gives."""

from __future__ import annotations

import numpy as np
import pytest

from chameleon_jax.data import records, sources
from chameleon_jax.data.examples import RunwayExamples
from chameleon_jax.data.loader import Loader, LoaderConfig
from chameleon_jax.data.memory import InMemorySource

SIZE = (32, 16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from tests.data import fake_renderer

    folder = tmp_path_factory.mktemp("clips")
    examples = RunwayExamples(size=SIZE, frames=9, render=fake_renderer.render)
    records.prepare_runway(folder, 6, examples, workers=0)
    return folder


@pytest.mark.parametrize(("frames", "start"), [(9, 0.0), (5, 0.0), (5, 0.7), (1, 0.999)])
def test_answers_like_the_source(folder, frames, start):
    source = sources.open_sources(folder)
    memory = InMemorySource(source, 9, (SIZE,))
    assert (memory.kind, len(memory)) == (source.kind, len(source))
    np.testing.assert_array_equal(memory.sizes, source.sizes)
    for index in (0, 5):
        expected, found = (
            source.load(index, frames, SIZE, start),
            memory.load(index, frames, SIZE, start),
        )
        assert expected.keys() == found.keys()
        for name in ("video", "reference", "garment"):
            np.testing.assert_array_equal(expected[name], found[name])
        assert expected["captions"] == found["captions"]


def test_each_clip_is_kept_at_the_size_of_its_bucket(folder):
    source = sources.open_sources(folder)
    source.sizes = np.array([(32, 16), (15, 30), (64, 32), (10, 10), (16, 32), (33, 15)])
    buckets = ((32, 16), (16, 32))
    memory = InMemorySource(source, 5, buckets)
    assert memory.sizes.tolist() == [[32, 16], [16, 32], [32, 16], [32, 16], [16, 32], [32, 16]]
    config = LoaderConfig(batch=2, frames=5, buckets=buckets)
    on_disk, kept = iter(Loader(source, config)), iter(Loader(memory, config))
    for _ in range(8):
        expected, found = next(on_disk), next(kept)
        for name in ("video", "reference", "garment", "index"):
            np.testing.assert_array_equal(expected[name], found[name])
    with pytest.raises(sources.SourceError, match=r"of \(16, 32\) are in memory, 5 of \(32, 16\)"):
        memory.load(1, 5, (32, 16))


def test_asking_for_what_was_not_kept_is_an_error(folder):
    memory = InMemorySource(sources.open_sources(folder), 5, (SIZE,))
    with pytest.raises(sources.SourceError, match=r"5 frames of \(32, 16\) are in memory, 9 of "):
        memory.load(0, 9, SIZE)
    with pytest.raises(sources.SourceError, match="were asked"):
        memory.load(0, 5, (64, 32))


class HalfBroken:
    """Latents; record 1 cannot be read."""

    kind = "latents"
    frames_per_latent = 2
    sizes = np.array([[32, 16]] * 2)

    def __len__(self):
        return 2

    def load(self, index, frames, size, start=0.0):
        if index == 1:
            raise sources.SourceError("record 1 is damaged")
        z = np.arange(3, dtype=np.float16).reshape(3, 1, 1, 1)
        return {
            "z_video": z,
            "z_reference": z[:1],
            "z_garment": z[:1],
            "captions": {"static": "A room.", "dynamic": "Walks."},
            "fps": 16.0,
            "seed": 0,
        }


def test_broken_records_raise_when_they_are_loaded_and_latents_are_cut():
    memory = InMemorySource(HalfBroken(), 5, (SIZE,))
    assert memory.load(0, 3, SIZE)["z_video"].shape == (2, 1, 1, 1)
    assert memory.captions(0) == {"static": "A room.", "dynamic": "Walks."}
    for read in (memory.captions, lambda index: memory.load(index, 5, SIZE)):
        with pytest.raises(sources.SourceError, match="record 1 is damaged"):
            read(1)
    assert repr(memory) == "InMemorySource(2 records of latents, 5 frames of 32x16)"

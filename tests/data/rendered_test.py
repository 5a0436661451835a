"""Clips that are rendered when they are asked for are those that a set on disk would hold."""

from __future__ import annotations

import re

import numpy as np
import pytest

from chameleon_jax.data import labels, records, sources
from chameleon_jax.data.examples import LatentExamples, RunwayExamples
from chameleon_jax.data.rendered import RenderedSource
from launch import prepare

SIZE = (32, 32)


def encode(pixels):
    return np.asarray(pixels)[:, ::4, ::8, ::8] / np.float32(100) - 1


@pytest.mark.parametrize("workers", [0, 2])
def test_latents_are_those_of_the_same_clips_on_disk(tmp_path, workers):
    make = RunwayExamples(SIZE, frames=5, crf=0, world="mirror", labels=True, people=2)
    records.prepare_runway(tmp_path / "clips", 5, make, seed_start=800_010, workers=0)
    on_disk = sources.open_sources(tmp_path / "clips", "validation", labels.KINDS)
    seeds = range(800_010, 800_015)
    rendered = RenderedSource(
        seeds, SIZE, world="mirror", people=2, labels=labels.KINDS, workers=workers
    )
    for index in range(5):
        assert rendered.captions(index) == rendered.load(index, 5, SIZE)["captions"]
        assert rendered.captions(index)["static"] == on_disk.captions(index)["static"]
    for name, source in (("disk", on_disk), ("rendered", rendered)):
        latents = LatentExamples(source, encode, SIZE, 5, 4, batch=2, labels=labels.KINDS)
        assert records.write_latents(tmp_path / name, "validation", latents) == 5
    one, other = (
        sources.open_sources(tmp_path / name, "validation", labels.KINDS)
        for name in ("disk", "rendered")
    )
    for index in range(5):
        a, b = one.load(index, 5, SIZE), other.load(index, 5, SIZE)
        assert a["seed"] == b["seed"] == 800_010 + index
        for key in ("z_reference", "z_garment", *labels.KINDS):
            np.testing.assert_array_equal(a[key], b[key])
        np.testing.assert_allclose(a["z_video"], b["z_video"], atol=0.05)  # compressed on disk


def test_what_cannot_be_rendered_is_refused():
    source = RenderedSource(range(3), SIZE)
    with pytest.raises(sources.SourceError, match=r"clips of \(32, 32\) pixels from their first"):
        source.load(0, 5, (64, 64))
    with pytest.raises(sources.SourceError, match="from 0.5 on were asked"):
        source.load(0, 5, SIZE, start=0.5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give --data .clips on disk. or --world"),
        (["--data", "a", "--world", "mirror"], "one of them"),
        (["--world", "mirror", "--split", "train"], "--split and --bucket belong to --data"),
    ],
)
def test_clips_come_from_one_place(tmp_path, capfd, flags, message):
    argv = ["latents", "--out", str(tmp_path), "--weights", "x", *flags]
    with pytest.raises(SystemExit) as ended:
        prepare.main(argv)
    assert ended.value.code == 2

    assert re.search(message, capfd.readouterr().err)

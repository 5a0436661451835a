"""Exact labels: what they say about rendered clips, on disk, in memory and in batches."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from chameleon_jax import runway
from chameleon_jax.data import labels, records, sources
from chameleon_jax.data.examples import RunwayExamples
from chameleon_jax.data.memory import InMemorySource
from chameleon_jax.runway import garments, patterns
from chameleon_jax.runway.colours import GARMENT_COLOURS
from tests.data import fake_renderer

SIZE = (64, 40)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labelled")
    make = RunwayExamples(size=SIZE, frames=5, world="mirror", labels=True)
    records.prepare_runway(folder, 3, make, workers=0)
    return folder


def test_a_garment_taken_from_its_picture_looks_like_the_garment_that_is_worn():
    for seed in range(4):
        triplet = runway.render_triplet(seed, 2, (128, 80), world="mirror", ground_truth=True)
        known = labels.of_clip(triplet.clip, triplet.spec, seed)
        origin = labels.unpack_origin(known["origin"][0])
        found, worn = np.isfinite(origin[..., 0]), known["labels"][0] == labels.GARMENT
        assert (found & worn).sum() > 0.9 * worn.sum() and (found & ~worn).sum() < 0.05 * worn.sum()
        places = np.floor(origin[found] * (80, 128)).astype(int).clip(0, (79, 127))
        there = triplet.garment[places[:, 1], places[:, 0]].astype(float)
        shown = triplet.video[0][found].astype(float)
        straight = triplet.garment[found].astype(float)  # without the warp
        error = np.abs(there - shown).mean()
        assert error < 30 and error < np.abs(straight - shown).mean()


def test_packing_an_origin_keeps_a_third_of_a_pixel():
    origin = np.random.default_rng(0).random((3, 8, 5, 2))
    origin[:, :2] = np.nan
    back = labels.unpack_origin(labels.pack_origin(origin))
    np.testing.assert_allclose(back, origin, atol=0.5 / 254 + 1e-6)


def test_heads_are_above_and_garments_below(folder):
    source = sources.open_sources(folder, labels=labels.KINDS)
    for index in range(3):
        record = source.load(index, 5, SIZE)
        assert record["labels"].shape == record["video"].shape[:3]
        rows = {
            name: np.argwhere(record["labels"] == number)[:, 1].mean()
            for number, name in enumerate(labels.NAMES)
        }
        assert rows["head"] < 0.8 * rows["garment"] < 0.8 * rows["clothes"]
        assert (record["joints"] > 0).any() and record["joints"].shape == (5, 36, 2)


def test_labels_are_those_of_the_frames_that_are_loaded(folder):
    source = sources.open_sources(folder, labels=labels.KINDS)
    memory = InMemorySource(source, 5, (SIZE,))
    whole = source.load(1, 5, SIZE)
    for start, first in ((0.0, 0), (0.5, 2), (0.99, 3)):
        for read in (source, memory):
            part = read.load(1, 2, SIZE, start)
            for name in ("video", *labels.MOVING):
                np.testing.assert_array_equal(part[name], whole[name][first : first + 2])
            np.testing.assert_array_equal(part["attributes"], whole["attributes"])


def test_attributes_say_what_is_worn_by_whom(tmp_path):
    for number, name in enumerate(labels.TYPES):
        assert labels.SLOTS[labels.SLOT_OF[number]] == garments.TYPES[name].slot
    assert set(labels.TYPES) == set(garments.TYPES) and set(labels.SLOTS) == set(garments.SLOTS)
    assert labels.PATTERNS[: len(patterns.NAMES)] == patterns.NAMES
    make = RunwayExamples(size=(32, 32), frames=1, labels=True, people=2)
    records.prepare_runway(tmp_path, 8, make, seed_start=40, workers=0)
    source = sources.open_sources(tmp_path, labels=("attributes",))
    people = []
    for index in range(8):
        found = source.load(index, 1, (32, 32))["attributes"]
        seed = 40 + index
        spec = runway.sample_spec(seed, frames=1, size=(32, 32), person=seed - seed % 2)
        assert labels.TYPES[int(found[1])] == spec.garment.type
        main = np.array(GARMENT_COLOURS[spec.garment.colours[0]]) / 255
        np.testing.assert_allclose(found[3:6], main, rtol=1e-5)
        assert (found[3:6] == found[6:9]).all() == (labels.PATTERNS[int(found[2])] == "plain")
        people.append((int(found[0]), spec.person))
    assert [number for number, _ in people] == [40, 40, 42, 42, 44, 44, 46, 46]
    for (_, one), (_, other), (_, third) in zip(
        people[::2], people[1::2], people[2::2], strict=False
    ):
        assert one == other != third


def test_patterns_that_are_not_of_the_weave():
    rng = np.random.default_rng(0)
    found = set()
    for _ in range(200):
        garment = runway.sample_garment(rng, "top")
        pattern = labels.PATTERNS[int(labels.attributes(dataclasses.asdict(garment), 0)[2])]
        expected = "print" if garment.print else garment.block or garment.pattern
        assert pattern == expected
        found.add(pattern)
    assert {"print", "block", "plain"} <= found


def test_labels_that_are_not_there_are_an_error(folder, tmp_path):
    plain = RunwayExamples(size=SIZE, frames=5, render=fake_renderer.render)
    records.prepare_runway(tmp_path / "plain", 2, plain, workers=0)
    with pytest.raises(sources.SourceError, match="have no origin, joints; make them with"):
        sources.open_sources([folder, tmp_path / "plain"], labels=("origin", "joints"))
    (tmp_path / "table.csv").write_text("video,prompt,width,height\na.mp4,{},8,8\n")
    with pytest.raises(sources.SourceError, match="clips with a table have no labels"):
        sources.open_sources(tmp_path / "table.csv", labels=("labels",))
    with pytest.raises(sources.SourceError, match="labels of 64x40 pixels cannot be resized"):
        sources.open_sources(folder, labels=("labels",)).load(0, 1, (32, 24))
    assert "labels" not in sources.open_sources(folder).load(0, 1, SIZE)
    with pytest.raises(records.RecordError, match="holds records made otherwise .labels"):
        records.prepare_runway(folder, 4, RunwayExamples(SIZE, 5, world="mirror"), workers=0)

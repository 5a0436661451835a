"""Clips that are rendered when they are asked for are those that a set on disk would hold."""

from __future__ import annotations

import os
import re

import numpy as np
import pytest

from chameleon_jax.data import labels, records, sources
from chameleon_jax.data.examples import LatentExamples, RunwayExamples
from chameleon_jax.data.memory import InMemorySource
from chameleon_jax.data.rendered import Recipe, RenderedSource
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


@pytest.mark.slow
def test_a_run_renders_its_own_clips(tmp_path):
    from chameleon_jax.config import ConfigError, load_config
    from chameleon_jax.training.run import open_data, run

    settings = ["data.world=mirror", "data.clips=4", f"workdir={tmp_path}", "train.steps=2"]
    settings += ["data.labels=('labels',)", "loss.garment=2", "data.render_workers=1"]
    config = load_config("configs/vae.py:smoke_video", settings)
    assert len(open_data(config, "train")) == 4
    held_out = open_data(config, "validation")
    assert held_out.seeds[0] == 800_000 and len(held_out) == 64
    run(config)
    assert (tmp_path / "export" / "vae.safetensors").is_file()
    both = load_config("configs/vae.py:smoke_video", [*settings, "data.dir=x"])
    with pytest.raises(ConfigError, match="clips come from one place; leave one of them empty"):
        open_data(both, "train")


def test_a_scene_that_cannot_be_drawn_is_left_out(tmp_path, monkeypatch):
    whole = Recipe.render

    def render(self, seed, frames, size):
        if seed == 7:
            raise ArithmeticError("no such person")
        return whole(self, seed, frames, size)

    monkeypatch.setattr(Recipe, "render", render)
    source = RenderedSource(range(200), SIZE)
    found = list(source.load_many(range(6, 9), 1, SIZE))
    assert found[0]["seed"] == 6 and found[2]["seed"] == 8
    assert isinstance(found[1], sources.SourceError) and "seed 7 cannot be" in str(found[1])
    kept = InMemorySource(RenderedSource(range(6, 9), SIZE), 1, (SIZE,))
    assert kept.load(2, 1, SIZE)["seed"] == 8
    with pytest.raises(sources.SourceError, match="seed 7 cannot be rendered"):
        kept.load(1, 1, SIZE)


def test_a_worker_that_ends_is_an_error_of_one_line():
    source = RenderedSource(range(3), SIZE, workers=1)
    source.recipe = Deadly(16.0, "open", 1, ())
    with pytest.raises(sources.SourceError, match="a rendering process ended"):
        list(source.load_many(range(3), 1, SIZE))


class Deadly(Recipe):
    """Ends its process, as a lack of memory would."""

    def render(self, seed, frames, size):
        os._exit(7)

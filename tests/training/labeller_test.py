"""Labels in training: noisy copies with one clean one, weights of latent pixels, the extra head."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from chameleon_jax.config import ConfigError, load_config
from chameleon_jax.data import labels, records, tokenizer
from chameleon_jax.data.examples import LatentExamples, RunwayExamples
from chameleon_jax.data.sources import open_sources
from chameleon_jax.training.run import run
from chameleon_jax.training.stages import common, labeller, make_stage

SIZE = (64, 64)
EVERYTHING = (
    "data.labels=('labels','origin','joints')",
    "loss.labels=0.2",
    "loss.labels_layer=1",
    "loss.garment=3",
    "loss.copies=2",
    "train.preview_every=0",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Labelled clips of the mirror world as made-up latents, and a tokenizer."""
    folder = tmp_path_factory.mktemp("data")
    make = RunwayExamples(size=SIZE, frames=9, world="mirror", labels=True)

    def encode(pixels):
        small = pixels[:, ::4, ::8, ::8] / np.float32(100) - 1
        return np.concatenate([small, small[..., :1]], -1)

    for start, split in ((0, "train"), (800_000, "validation")):
        records.prepare_runway(folder / "clips", 4, make, seed_start=start, workers=0)
        source = open_sources(folder / "clips", split, labels.KINDS)
        latents = LatentExamples(source, encode, SIZE, 9, 4, batch=4, labels=labels.KINDS)
        records.write_latents(folder / "latents", split, latents)
    texts = [f"A person in garment {i}. Walks {i} steps." for i in range(20)]
    tokenizer.train_pieces(texts, 300).save(str(folder / "tokenizer.json"))
    return folder


def settings(data, workdir, *overrides):
    given = [f"data.dir={data / 'latents'}", f"data.tokenizer={data / 'tokenizer.json'}"]
    given += [
        f"workdir={workdir}",
        "video.frames=9",
        "video.height=64",
        "video.width=64",
        "data.lengths=()",
        *overrides,
    ]
    return load_config("configs/teacher_forcing.py:smoke", given)


def test_latent_pixels_hold_the_means_of_their_pixels():
    rng = np.random.default_rng(0)
    shown = rng.integers(0, len(labels.NAMES), (5, 16, 8)).astype(np.uint8)
    origin = np.full((5, 16, 8, 2), np.nan, np.float32)
    origin[0, :8], origin[1:, 8:, :2] = 0.25, 0.5  # all of a latent pixel; a quarter of one
    joints = rng.random((5, 3, 2)).astype(np.float16)
    found = labels.to_cells(
        {"labels": shown, "origin": labels.pack_origin(origin), "joints": joints}, 4, 8
    )
    assert found["labels"].shape == (2, 2, 1, len(labels.NAMES))
    share = (shown[1:, 8:] == labels.HEAD).mean()
    assert abs(found["labels"][1, 1, 0, labels.HEAD] / 255 - share) < 0.003
    assert abs(found["labels"].astype(int).sum(-1) - 255).max() <= 3
    places = labels.unpack_origin(found["origin"])
    np.testing.assert_allclose(places[0, 0, 0], 0.25, atol=0.003)
    assert np.isnan(places[0, 1]).all() and np.isnan(places[1]).all()
    np.testing.assert_array_equal(found["joints"], joints[[0, 4]])


def test_latents_keep_their_labels(data):
    source = open_sources(data / "latents", "train", labels.KINDS)
    pixels = open_sources(data / "clips", "train", labels.KINDS)
    expected = labels.to_cells({name: pixels.load(2, 9, SIZE)[name] for name in labels.KINDS}, 4, 8)
    for frames, latent in ((9, 3), (5, 2)):
        found = source.load(2, frames, SIZE)
        for name in labels.MOVING:
            np.testing.assert_array_equal(found[name], expected[name][:latent])
        np.testing.assert_array_equal(found["attributes"], expected["attributes"])


def test_weights_of_latent_pixels_have_the_mean_one():
    config = load_config("configs/teacher_forcing.py:smoke", ["loss.garment=3", "loss.head=5"])
    with pytest.raises(ConfigError, match="loss.garment is 3 and loss.head 5: what counts more"):
        common.check_focus(config)
    shares = np.zeros((1, 3, 1, 4, len(labels.NAMES)), np.uint8)
    shares[..., labels.BACKGROUND] = 255
    shares[0, 0, 0, 0] = 255 * np.eye(len(labels.NAMES))[labels.GARMENT]
    shares[0, 1, 0, 0] = 255 * np.eye(len(labels.NAMES))[labels.HEAD]
    found = common.cell_weights(config, {"labels": jnp.asarray(shares)}, 2)
    expected = np.array([[[[3, 1, 1, 1]], [[5, 1, 1, 1]]]]) / 1.75
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    shape = (1, 2, 1, 4, 2)
    x0, noise, v = (jax.random.normal(jax.random.key(i), shape) for i in range(3))
    value, metrics = common.flow_loss(v, x0, noise, jnp.array([[1.0, 2.0]]), found)
    error = np.square(np.asarray(v - (noise - x0))).mean(-1)
    by_hand = error * expected * np.array([1, 2])[None, :, None, None]
    np.testing.assert_allclose(value, by_hand.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["mse"], error.mean(), rtol=1e-5)


def test_a_head_that_knows_the_labels_has_no_loss():
    known = np.zeros((1, 2, 1, 2, len(labels.NAMES)), np.uint8)
    known[..., labels.GARMENT] = 255
    origin = labels.pack_origin(np.full((1, 2, 1, 2, 2), 0.75))
    origin[0, 1] = 0  # not known: does not count
    batch = {"labels": jnp.asarray(known), "origin": jnp.asarray(origin)}

    def says(place):
        def head(x):
            logits = 50.0 * jax.nn.one_hot(labels.GARMENT, len(labels.NAMES))
            return jnp.broadcast_to(logits, (*x.shape[:-1], 5)), jnp.full((*x.shape[:-1], 2), place)

        seen = jnp.zeros((1, 4, 2, 8))  # two copies of two frames
        return labeller.label_loss(head, seen, batch, 2)

    value, metrics = says(0.75)
    assert value < 1e-3 and metrics["labels/right"] == 1
    value, metrics = says(0.65)
    np.testing.assert_allclose(value, 10 * 2 * 0.1**2, rtol=0.05)
    np.testing.assert_allclose(metrics["labels/off"], 0.1 * 2**0.5, rtol=0.03)


def test_the_head_needs_labels_and_a_layer(data, tmp_path):
    for change, message in (
        ("data.labels=('labels',)", "data.labels lacks origin"),
        ("loss.labels_layer=9", "expected a layer from 0 to 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_stage(settings(data, tmp_path, *EVERYTHING, change))
    change = "recycling.clips=0.9"
    with pytest.raises(ConfigError, match="loss.copies is 2, and recycling"):
        make_stage(settings(data, tmp_path, *EVERYTHING, change))


@pytest.mark.slow
def test_a_stage_learns_from_labels_and_exports_no_head(data, tmp_path):
    changes = ("train.steps=30", "train.eval_every=0", "schedule.peak=1e-2", "schedule.warmup=1")
    run(settings(data, tmp_path, *EVERYTHING, *changes, "data.batch=4", "data.dropout=0"))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    right = [line["labels/right"] for line in lines if "labels/right" in line]
    off = [line["labels/off"] for line in lines if "labels/off" in line]
    assert np.mean(right[-5:]) >= np.mean(right[:5]) and np.mean(off[-5:]) < 0.9 * np.mean(off[:5])
    exported = {path.name for path in (tmp_path / "export").iterdir()}
    assert {"dit.safetensors", "text.safetensors"} <= exported
    assert "labeller.safetensors" not in exported


def test_a_labeller_starts_in_the_middle_of_the_picture():
    head = labeller.Labeller(8, rngs=nnx.Rngs(0))
    logits, places = head(jax.random.normal(jax.random.key(0), (2, 3, 8)))
    assert logits.shape == (2, 3, len(labels.NAMES)) and not logits.any()
    np.testing.assert_array_equal(places, 0.5)

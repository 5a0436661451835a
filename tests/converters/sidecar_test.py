"""What a public layout has no place for comes back all the same, or the conversion is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from chameleon_jax.models.dit import DiTConfig
from chameleon_jax.models.reward import ClipVisionConfig
from chameleon_jax.models.taehv import TaehvConfig
from chameleon_jax.models.text import TextConfig
from chameleon_jax.models.vae import VaeConfig
from chameleon_jax.weights.tensors import read_tensors, write_tensors
from converters import sidecar
from converters.families import NETWORKS
from converters.recognise import RecognitionError, recognise
from converters.reward import HeadConfig
from converters.rules import ConversionError
from tests.commands import run_converter
from tests.converters.convert_test import assert_same, tensors_of

RUNWAY_TINY = Path(__file__).parents[2] / "chameleon_jax/assets/runway_tiny"
TAEHV = TaehvConfig(
    z_dim=4,
    enc_width=8,
    dec_widths=(16, 8, 4, 4),
    temporal_down=(True, True, False),
    temporal_up=(False, True, True),
)
# No field has its published value, and none its default.
ODD = {
    "dit": DiTConfig(
        in_channels=3,
        width=30,
        ffn=20,
        heads=5,
        layers=1,
        text_width=8,
        text_length=7,
        patch=(1, 1, 3),
        freq_width=10,
        eps=1e-3,
    ),
    "vae": VaeConfig(
        z_dim=3,
        enc_width=4,
        dec_width=6,
        width_mult=(2, 2),
        enc_blocks=1,
        dec_blocks=3,
        temporal_down=(True,),
        patch=4,
        latent_mean=(0.1, 0.2, 0.3),
        latent_std=(1.5, 2.5, 3.5),
    ),
    "text": TextConfig(
        vocab=11,
        width=8,
        heads=3,
        head_dim=2,
        ffn=5,
        layers=1,
        buckets=6,
        max_distance=9,
        length=13,
        eps=1e-3,
    ),
    "taehv": dataclasses.replace(
        TAEHV,
        blocks=1,
        latent_mean=tuple(0.1 * i for i in range(TAEHV.z_dim)),
        latent_std=tuple(1.0 + i for i in range(TAEHV.z_dim)),
    ),
    "taehv_super": dataclasses.replace(TAEHV, dec_widths=(32, 16, 8, 4), variant="super"),
    "clip": ClipVisionConfig(
        width=12, ffn=10, heads=3, layers=1, projection=5, image=6, patch=2, eps=1e-3
    ),
    "aesthetic": HeadConfig(24),
}


def run(*arguments) -> None:
    run_converter(*arguments)


def in_our_layout(folder: Path, name: str, config) -> Path:
    """A random checkpoint of one network."""
    rng = np.random.default_rng(0)
    shapes = NETWORKS[name].expected(config)
    tensors = {key: rng.standard_normal(shape, np.float32) for key, shape in shapes.items()}
    folder.mkdir()
    write_tensors(folder / f"{name}.safetensors", tensors)
    fields = {"model": {name: sidecar.fields_of(config)}}
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


CASES = [(name, layout) for name in NETWORKS for layout in NETWORKS[name].layouts]


@pytest.mark.parametrize(("name", "layout"), [*CASES, ("dit", "training")])
def test_every_field_comes_back_from_every_layout(tmp_path, name, layout):
    in_our_layout(tmp_path / "ours", name, ODD[name])
    run(tmp_path / "ours", "--to", layout, "--out", tmp_path / "public")
    (part,) = recognise([tmp_path / "public"])
    assert part.layout == ("official" if layout == "training" else layout)
    assert part.config == ODD[name]
    run(tmp_path / "public", "--to", "jax", "--out", tmp_path / "again")
    assert_same(tensors_of(tmp_path / "again"), tensors_of(tmp_path / "ours"))
    (part,) = recognise([tmp_path / "again"])
    assert part.config == ODD[name]


@pytest.mark.parametrize("way", [["official"], ["diffusers", "official"]])
def test_our_own_model_goes_out_and_comes_back_whole(tmp_path, way):
    """The statistics of its latents, the length of its prompts, how it is streamed."""
    last = RUNWAY_TINY
    for layout in (*way, "jax"):
        run(last, "--to", layout, "--out", tmp_path / layout)
        last = tmp_path / layout
    before, after = (json.loads((at / "config.json").read_text()) for at in (RUNWAY_TINY, last))
    model, written = before.pop("model"), after.pop("model")
    for name, fields in model.items():
        assert {key: written[name][key] for key in fields} == fields
    assert after == before | {"weights": ""}
    assert_same(tensors_of(last), tensors_of(RUNWAY_TINY))
    assert (last / "tokenizer.json").read_text() == (RUNWAY_TINY / "tokenizer.json").read_text()


@pytest.mark.parametrize("variant", ["base", "super"])
def test_a_network_that_plays_another_part_keeps_it(tmp_path, variant):
    """A small decoder in the place of the VAE's, as a pipeline saves it."""
    name = "taehv" if variant == "base" else "taehv_super"
    config = ODD[name]
    in_our_layout(tmp_path / "ours", name, config)
    (tmp_path / f"ours/{name}.safetensors").rename(tmp_path / "ours/decoder.safetensors")
    group = {"network": "taehv", **sidecar.fields_of(config)}
    (tmp_path / "ours/config.json").write_text(json.dumps({"model": {"decoder": group}}))
    run(tmp_path / "ours", "--to", "jax", "--out", tmp_path / "copy")
    run(tmp_path / "ours", "--to", "official", "--out", tmp_path / "public")
    run(tmp_path / "public", "--to", "jax", "--out", tmp_path / "again")
    for folder in ("copy", "again"):
        written = json.loads((tmp_path / folder / "config.json").read_text())
        assert written == {"model": {"decoder": group}}
        assert_same(tensors_of(tmp_path / folder), tensors_of(tmp_path / "ours"))


def test_two_networks_for_one_file_are_refused(tmp_path):
    in_our_layout(tmp_path / "a", "vae", ODD["vae"])
    in_our_layout(tmp_path / "b", "vae", ODD["vae"])
    (tmp_path / "b/vae.safetensors").rename(tmp_path / "b/decoder.safetensors")
    group = {"network": "vae", **sidecar.fields_of(ODD["vae"])}
    (tmp_path / "b/config.json").write_text(json.dumps({"model": {"decoder": group}}))
    run(tmp_path / "a", tmp_path / "b", "--to", "jax", "--out", tmp_path / "both")
    assert sorted(path.name for path in (tmp_path / "both").glob("*.safetensors")) == [
        "decoder.safetensors",
        "vae.safetensors",
    ]
    with pytest.raises(ConversionError, match="Wan2.2_VAE.pth would hold .* and .*; convert them"):
        run(tmp_path / "both", "--to", "official", "--out", tmp_path / "public")


def test_a_single_file_is_read_with_the_sidecar_beside_it(tmp_path):
    expected = json.loads((RUNWAY_TINY / "config.json").read_text())["model"]["vae"]
    run(RUNWAY_TINY, "--to", "official", "--out", tmp_path / "official")
    run(tmp_path / "official/Wan2.2_VAE.pth", "--to", "jax", "--out", tmp_path / "vae")
    fields = json.loads((tmp_path / "vae/config.json").read_text())["model"]["vae"]
    assert {key: fields[key] for key in expected} == expected


def test_for_diffusers_the_shift_is_ours_and_a_vae_that_it_cannot_load_is_noted(tmp_path, capsys):
    run(RUNWAY_TINY, "--to", "diffusers", "--out", tmp_path / "theirs")
    assert (
        "note: the weights in vae/diffusion_pytorch_model.safetensors are complete, but the library"
        " of the diffusers layout cannot load this Wan2.2 VAE: stage 2 of the encoder goes from 48"
        " to 96 channels"
    ) in capsys.readouterr().err
    scheduler = json.loads((tmp_path / "theirs/scheduler/scheduler_config.json").read_text())
    assert scheduler["flow_shift"] == 3.0


def test_a_conversion_within_our_layout_keeps_how_the_model_is_streamed(tmp_path):
    run(RUNWAY_TINY, "--dtype", "bfloat16", "--to", "jax", "--out", tmp_path / "half")
    before, after = (
        json.loads((folder / "config.json").read_text())
        for folder in (RUNWAY_TINY, tmp_path / "half")
    )
    for group in ("video", "cache", "sampler", "switch", "name", "seed"):
        assert after[group] == before[group]
    assert after["dtype"] == "bfloat16"


def test_without_a_sidecar_a_checkpoint_is_read_as_before(tmp_path):
    in_our_layout(tmp_path / "ours", "vae", ODD["vae"])
    run(tmp_path / "ours", "--to", "official", "--out", tmp_path / "public")
    (tmp_path / "public" / sidecar.NAME).unlink()
    (part,) = recognise([tmp_path / "public"])
    assert part.config.latent_mean == (0.0, 0.0, 0.0) and part.config.latent_std == (1.0, 1.0, 1.0)


def test_published_sizes_need_no_sidecar(tmp_path):
    in_our_layout(tmp_path / "ours", "aesthetic", ODD["aesthetic"])
    run(tmp_path / "ours", "--to", "official", "--out", tmp_path / "public")
    assert not (tmp_path / "public" / sidecar.NAME).exists()


def test_what_cannot_travel_is_refused_with_its_keys(tmp_path):
    """The numbers of TAEHV's layers follow from the number of blocks, which nothing else says."""
    in_our_layout(tmp_path / "ours", "taehv", dataclasses.replace(TAEHV, blocks=2))
    with pytest.raises(ConversionError, match="official layout cannot carry this .* in blocks, "):
        run(tmp_path / "ours", "--to", "official", "--out", tmp_path / "public")
    assert not (tmp_path / "public").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a readable JSON file"),
        ("[]", "expected an object with `model`"),
        ('{"model": [1]}', "expected an object with `model`"),
        ('{"model": {"vae": 1}}', "expected an object with `model`"),
        ('{"model": {}, "more": {}}', "expected an object with `model`"),
        ('{"groups": {"vae": []}}', "expected an object with `model`"),
        ('{"model": {"vae": {"color": 1}}}', "model.vae: no sizes to be read off it"),
        ('{"model": {"vae": {"latent_mean": [1]}}}', "latent_mean has 1 entries"),
    ],
)
def test_a_sidecar_that_cannot_be_used_is_named(tmp_path, content, message):
    in_our_layout(tmp_path / "ours", "vae", ODD["vae"])
    run(tmp_path / "ours", "--to", "official", "--out", tmp_path / "public")
    (tmp_path / "public" / sidecar.NAME).write_text(content)
    with pytest.raises((sidecar.SidecarError, RecognitionError), match=message) as error:
        recognise([tmp_path / "public"])
    assert f"{tmp_path / 'public' / sidecar.NAME}: " in str(error.value)
    assert "\n" not in str(error.value)
    shutil.rmtree(tmp_path / "public")
    assert read_tensors(tmp_path / "ours/vae.safetensors")

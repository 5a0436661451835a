"""What decodes a stream: the VAE, the small decoder of the weights, or one from elsewhere."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from chameleon_jax.config import load_config
from chameleon_jax.data.images import to_uint8
from chameleon_jax.inference import Pipeline
from chameleon_jax.inference.mechanisms import SwitchConfig
from chameleon_jax.inference.pipeline import PipelineError
from chameleon_jax.inference.settings import check_config
from chameleon_jax.models.build import read_sizes
from chameleon_jax.models.taehv import Taehv, TaehvConfig
from chameleon_jax.models.vae import Vae
from converters import taehv, vae
from converters.rules import invert, shapes_in
from tests.commands import run_converter

ROOT = Path(__file__).parents[2]
GREY = np.full((20, 20, 3), 128, np.uint8)
# An eighth of every width and four channels of latents: the layout of taew2_2 all the same.
TAEW = TaehvConfig(
    z_dim=4,
    enc_width=8,
    dec_widths=(32, 16, 8, 8),
    temporal_down=(True, True, False),
    temporal_up=(False, True, True),
)


def config():
    """A stream in latents as those of Wan2.2: 16x in space, 4x in time."""
    made = load_config(
        f"{ROOT}/configs/runway_tiny.py:smoke", ["video.height=64", "video.width=32"]
    )
    made = made.copy_and_resolve_references().unlock()
    made.model.vae.update(width_mult=(1, 1, 1, 1), temporal_down=(False, True, True))
    return made.lock()


def checkpoint(path: Path, network=taehv, sizes=TAEW, layout="rules") -> Path:
    """A random checkpoint in the public layout."""
    shapes = shapes_in(invert(getattr(network, layout)(sizes)), network.expected_shapes(sizes))
    rng, tensors = np.random.default_rng(7), {}
    for name, shape in shapes.items():
        bias = len(shape) == 1 or name.endswith("gamma")
        x = rng.normal(0.0, 0.1 if bias else math.prod(shape[1:]) ** -0.5, shape)
        tensors[name] = (x + name.endswith("gamma")).astype(np.float32)
    save_file(tensors, path)
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("CHAMELEON_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("decoder") / "weights"
    Pipeline.random(config(), seed=1).save(folder)
    return folder


def streamed(pipeline: Pipeline, chunks: int) -> tuple[list[np.ndarray], list]:
    """Frames of a stream, and its latents."""
    latents = []
    decode = pipeline.media.decode
    pipeline.media.decode = lambda z, state: (latents.append(z), decode(z, state))[1]
    session = pipeline.session(SwitchConfig())
    session.start(GREY, GREY, "a", seed=2)
    frames = [session.next_chunk() for _ in range(chunks)]
    return frames, latents


def whole(pipeline: Pipeline, latents: list) -> np.ndarray:
    """Frames of all latents in one go."""
    decode = nnx.jit(lambda decoder, z: decoder.decode(z))
    return np.asarray(to_uint8(decode(pipeline.decoder, np.concatenate(latents, axis=1))))[0]


@pytest.mark.slow
def test_a_public_file_decodes_a_stream_as_it_decodes_the_whole_clip(weights, tmp_path, cache):
    """Four chunks. The file is converted once."""
    path = checkpoint(tmp_path / "taew2_2.safetensors")
    small = Pipeline.from_pretrained(weights, decoder=path)
    assert isinstance(small.decoder, Taehv) and small.config.model.decoder.network == "taehv"
    frames, latents = streamed(small, 4)
    together, clip = np.concatenate(frames), whole(small, latents)
    assert together.shape == clip.shape == (45, 64, 32, 3)
    assert np.abs(together.astype(int) - clip).max() <= 1
    assert clip.std() > 5 and np.abs(clip[-1].astype(int) - clip[0]).max() > 5
    (kept,) = cache.iterdir()
    made = kept.stat().st_mtime_ns
    Pipeline.from_pretrained(weights, decoder=path)
    assert [one.stat().st_mtime_ns for one in cache.iterdir()] == [made]


@pytest.mark.slow
def test_two_commands_from_public_files_to_a_stream_with_the_small_decoder(weights, tmp_path):
    """The converter gives the decoder beside a whole pipeline the name that pipelines read."""
    path = checkpoint(tmp_path / "taew2_2.safetensors")
    run_converter(weights, path, "--to", "jax", "--out", tmp_path / "both")
    assert (tmp_path / "both" / "decoder.safetensors").is_file()
    stored = json.loads((tmp_path / "both" / "config.json").read_text())
    assert stored["model"]["decoder"]["network"] == "taehv" and "taehv" not in stored["model"]
    expected, _ = streamed(Pipeline.from_pretrained(weights, decoder=path), 2)
    for choice in (None, "small"):
        frames, _ = streamed(Pipeline.from_pretrained(tmp_path / "both", decoder=choice), 2)
        np.testing.assert_array_equal(np.concatenate(frames), np.concatenate(expected))
    given = Pipeline.from_pretrained(tmp_path / "both", config(), decoder="small")
    assert isinstance(given.decoder, Taehv)  # though that config does not name it
    full = Pipeline.from_pretrained(tmp_path / "both", decoder="vae")
    assert full.decoder is None and "decoder" not in full.config.model
    frames, _ = streamed(full, 2)
    plain, _ = streamed(Pipeline.from_pretrained(weights), 2)
    np.testing.assert_array_equal(np.concatenate(frames), np.concatenate(plain))


def test_a_folder_of_ours_is_a_decoder_too(weights, tmp_path, cache):
    path = checkpoint(tmp_path / "taew2_2.safetensors")
    run_converter(path, "--to", "jax", "--out", tmp_path / "small")
    pipeline = Pipeline.from_pretrained(weights, decoder=tmp_path / "small")
    assert dataclasses.asdict(pipeline.decoder.config) == dataclasses.asdict(TAEW)
    assert not cache.exists()  # nothing was to be converted


@pytest.mark.slow
def test_a_narrower_vae_is_a_decoder_too(weights, tmp_path):
    """LightVAE: the VAE with fewer channels in its decoder, in diffusers' names."""
    stored = json.loads((weights / "config.json").read_text())["model"]["vae"]
    sizes = vae.VaeConfig(**stored | {"dec_width": 2})
    path = checkpoint(tmp_path / "light.safetensors", vae, sizes, "diffusers_rules")
    light = Pipeline.from_pretrained(weights, decoder=path)
    assert isinstance(light.decoder, Vae) and light.decoder.config.dec_width == 2
    frames, latents = streamed(light, 2)
    assert np.abs(np.concatenate(frames).astype(int) - whole(light, latents)).max() <= 1


def test_what_is_not_there_is_one_line_that_says_where_to_get_it(weights, tmp_path):
    with pytest.raises(PipelineError, match=r"small decoder .*taew2_2.*python -m converters"):
        Pipeline.from_pretrained(weights, decoder="small")
    with_group = config().copy_and_resolve_references().unlock()
    with_group.model.decoder = {"network": "taehv", **dataclasses.asdict(TAEW)}
    with pytest.raises(PipelineError, match=r"no small decoder \(decoder.safetensors\) in it; dow"):
        Pipeline.from_pretrained(weights, with_group)
    with pytest.raises(PipelineError, match="decoder smal: no such file; expected vae, small, or"):
        Pipeline.from_pretrained(weights, decoder="smal")
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    with pytest.raises(PipelineError, match="decoder .*x.safetensors: .*not a readable"):
        Pipeline.from_pretrained(weights, decoder=tmp_path / "x.safetensors")
    with pytest.raises(PipelineError, match="holds Wan transformer; expected one small decoder"):
        Pipeline.from_pretrained(weights, decoder=weights / "dit.safetensors")
    other = checkpoint(tmp_path / "o.safetensors", sizes=dataclasses.replace(TAEW, z_dim=5))
    with pytest.raises(PipelineError, match="model.decoder has z_dim 5; expected 4"):
        Pipeline.from_pretrained(weights, decoder=other)
    with pytest.raises(PipelineError, match="no model.decoder; .*configs/wan22_5b.py:taew2_2"):
        Pipeline.random(config(), decoder="small")
    with pytest.raises(PipelineError, match="with random weights; expected vae or small"):
        Pipeline.random(config(), decoder="taew2_2.pth")
    assert Pipeline.random(with_group, decoder="vae").decoder is None


@pytest.mark.parametrize("name", ["taew2_2", "taew2_2_super"])
def test_the_5b_config_has_a_variant_with_each_published_decoder(name):
    config = check_config(load_config(f"{ROOT}/configs/wan22_5b.py:{name}"))
    assert read_sizes("decoder", config.model.decoder) == getattr(TaehvConfig, name)()

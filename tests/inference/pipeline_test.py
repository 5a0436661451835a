"""Pipelines: folders of weights, random weights, configs that do not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from chameleon_jax.config import load_config
from chameleon_jax.data.images import prepare_garment, prepare_reference, to_uint8
from chameleon_jax.data.tokenizer import Tokenizer, TokenizerError
from chameleon_jax.inference import Pipeline
from chameleon_jax.inference.pipeline import PipelineError
from chameleon_jax.weights.params import WeightsError, flat_params

ROOT = Path(__file__).parents[2]
GREY = np.full((20, 20, 3), 128, np.uint8)


def smoke(*overrides):
    return load_config(
        f"{ROOT}/configs/runway_tiny.py:smoke", ["video.height=32", "video.width=16", *overrides]
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights")
    Pipeline.random(smoke(), seed=1).save(path)
    return path


def test_saved_and_loaded_pipeline_streams_the_same_bits(folder):
    streams = []
    for pipeline in (Pipeline.random(smoke(), seed=1), Pipeline.from_pretrained(folder)):
        session = pipeline.session()
        session.start(GREY, GREY, "naïve “prompt” 她", seed=2)
        streams.append(session.next_chunk())
    assert np.array_equal(*streams)
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.json",
        "dit.safetensors",
        "text.safetensors",
        "tokenizer.json",
        "vae.safetensors",
    ]


def test_weights_are_as_readable_as_any_new_file(folder, tmp_path):
    (tmp_path / "plain").touch()
    assert {p.stat().st_mode for p in folder.iterdir()} == {(tmp_path / "plain").stat().st_mode}


def test_saving_in_bfloat16_halves_the_files(folder, tmp_path):
    pipeline = Pipeline.from_pretrained(folder)
    pipeline.save(tmp_path, dtype=jnp.bfloat16)
    assert (tmp_path / "dit.safetensors").stat().st_size < 0.6 * (
        folder / "dit.safetensors"
    ).stat().st_size
    loaded = Pipeline.from_pretrained(tmp_path)
    for name, value in flat_params(loaded.dit).items():
        assert value.dtype == jnp.float32  # the config's dtype, not the file's
        assert np.array_equal(
            value, flat_params(pipeline.dit)[name].astype(jnp.bfloat16).astype(jnp.float32)
        )


def test_random_weights_depend_on_the_seed_only_and_leave_nothing_at_zero():
    a, b, c = (
        flat_params(Pipeline.random(smoke(), seed=seed, text=False).dit) for seed in (0, 0, 1)
    )
    assert all(np.array_equal(a[name], b[name]) for name in a)
    assert not any(np.array_equal(a[name], c[name]) for name in a if not name.endswith("scale"))
    assert all(np.asarray(value).any() for value in a.values())


@pytest.mark.slow  # convolutions in bfloat16 take a CPU long to compile
def test_random_weights_in_bfloat16():
    pipeline = Pipeline.random(smoke("dtype=bfloat16"), text=False)
    assert {v.dtype for v in flat_params(pipeline.vae).values()} == {jnp.dtype("bfloat16")}
    session = pipeline.session()
    session.start(GREY, GREY, np.zeros((1, 16, 16), np.float32))
    assert session.next_chunk().shape == (9, 32, 16, 3)


def test_without_text_encoder_prompts_must_be_states():
    pipeline = Pipeline.random(smoke(), text=False)
    with pytest.raises(PipelineError, match="no text encoder"):
        pipeline.encode_prompt("hello")
    with pytest.raises(PipelineError, match="text=True"):
        pipeline.save("unused")


def test_sizes_are_compared_before_any_weights_are_read(folder):
    config = smoke("model.vae.enc_width=8", "model.dit.layers=1", "model.text.ffn=48")
    with pytest.raises(WeightsError) as caught:
        Pipeline.from_pretrained(folder, config)
    message = str(caught.value)
    for part in ("model.vae.enc_width is 8", "model.dit.layers is 1", "model.text.ffn is 48"):
        assert part in message
    assert "tensors" not in message and "\n" not in message


def test_all_mismatches_of_all_networks_in_one_error(folder, tmp_path):
    """Without a config of their own, weights show what they are by their shapes alone."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "config.json").unlink()
    config = smoke("model.vae.enc_width=8", "model.dit.layers=1", "model.text.ffn=48")
    with pytest.raises(WeightsError) as caught:
        Pipeline.from_pretrained(copy, config)
    message = str(caught.value)
    for part in (
        "vae.safetensors: weights of a VAE with encoder width 4; "
        "the config describes encoder width 8",
        "dit.safetensors: weights of a transformer with layers 2; the config describes layers 1",
        "text.safetensors: weights of a text encoder with feed-forward width 32; the config",
    ):
        assert part in message
    assert "\n" not in message


def test_differences_that_shapes_do_not_show(folder):
    with pytest.raises(WeightsError, match=r"model\.dit\.heads is 4, the weights were made with 2"):
        Pipeline.from_pretrained(folder, smoke("model.dit.heads=4"))


def test_latent_statistics_are_those_of_the_weights(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    stored = json.loads((copy / "config.json").read_text())
    stored["model"]["vae"].update(latent_mean=[0.5] * 4, latent_std=[2.0] * 4)
    (copy / "config.json").write_text(json.dumps(stored))
    pipeline = Pipeline.from_pretrained(copy, smoke())
    assert pipeline.vae.config.latent_mean == pipeline.config.model.vae.latent_mean == (0.5,) * 4
    assert pipeline.vae.config.latent_std == pipeline.config.model.vae.latent_std == (2.0,) * 4


def test_config_decides_how_to_stream(folder):
    assert Pipeline.from_pretrained(folder, smoke("sampler.steps=1")).config.sampler.steps == 1


@pytest.mark.parametrize("lost", ["vae.safetensors", "tokenizer.json", "config.json"])
def test_missing_file_is_named(folder, tmp_path, lost):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / lost).unlink()
    with pytest.raises((WeightsError, TokenizerError, PipelineError), match=lost):
        Pipeline.from_pretrained(copy)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a readable JSON"),
        ("[]", "model"),
        ('{"model": {}}', "vae, dit, text"),
        ("\udcff", "JSON"),
    ],
)
def test_bad_config_json(folder, tmp_path, content, message):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "config.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(PipelineError, match=message):
        Pipeline.from_pretrained(copy)


def test_truncated_weights(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    data = (copy / "dit.safetensors").read_bytes()
    (copy / "dit.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(WeightsError, match=r"dit\.safetensors: not a readable"):
        Pipeline.from_pretrained(copy)


def test_tokenizer_with_too_many_pieces(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    content = json.loads((copy / "tokenizer.json").read_text())
    content["model"]["vocab"] |= {f"piece{i}": 1000 + i for i in range(1000)}
    (copy / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(TokenizerError, match="the encoder knows 1024"):
        Pipeline.from_pretrained(copy)


def test_byte_tokenizer_survives_saving(folder):
    prompts = ["", "she walks", "她走 🚶", "x" * 100]
    saved = Tokenizer.from_file(folder / "tokenizer.json", 16)
    built = Pipeline.random(smoke()).tokenizer
    for a, b in zip(saved(prompts), built(prompts), strict=True):
        assert np.array_equal(a, b)
    ids, mask = built(["ab"])
    assert mask.sum() == 3 and len(set(ids[0, :3])) == 3


def test_no_such_folder():
    with pytest.raises(
        PipelineError, match=r"nowhere: no such folder; expected one with config\.json"
    ):
        Pipeline.from_pretrained("nowhere")
    with pytest.raises(PipelineError, match="not a folder"):
        Pipeline.from_pretrained(ROOT / "setup.py")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("video.height=120", "the height must be a multiple of 16 pixels"),
        ("video.width=0", r"video\.width is 0; expected a whole number of at least 1"),
        ("video.fps=0", r"video\.fps is 0\.0; expected a number above 0"),
        ("model.dit.heads=0", r"model\.dit: heads is 0; expected a whole number"),
        ("dtype=float16", "float16"),
        ("model.text.length=8", "text_length"),
        ("sampler.name=few_step", r"sampler\.steps: the sampler 'few_step' has no such setting"),
        ("model.dit.heads=3", "multiple of heads"),
        ("cache.frames=4", "expected room for a chunk of 3"),
    ],
)
def test_config_that_cannot_work(override, message):
    with pytest.raises(PipelineError, match=message):
        Pipeline.random(load_config(f"{ROOT}/configs/runway_tiny.py:smoke", override.split()))


def test_config_without_groups():
    with pytest.raises(PipelineError, match="sampler"):
        Pipeline.random({"model": {}, "dtype": "float32"})


@pytest.mark.slow
def test_full_size_is_described_without_weights():
    """1280x704, 5B: 23 frames of 880 tokens, K and V of 30 layers in bfloat16 are 7.46 GB."""
    pipeline = Pipeline.abstract(load_config(f"{ROOT}/configs/wan22_5b.py"))
    arguments = pipeline.arguments()
    cache, _, seed, number, _ = arguments["chunk"]
    assert (
        sum(leaf.size * leaf.dtype.itemsize for leaf in (*cache.k, *cache.v))
        == 2 * 30 * 23 * 880 * 3072 * 2
    )
    assert (seed.shape, number.shape) == ((), ())
    assert arguments["decode_first"][0].shape == (1, 3, 80, 44, 48)
    assert arguments["encode_image"][0].shape == (1280, 704, 3)
    assert "while" in pipeline.lower("chunk").as_text()  # the four denoising steps are one loop


DECODER = {
    "network": "taehv",
    "z_dim": 4,
    "enc_width": 4,
    "dec_widths": (8, 4, 4),
    "temporal_down": (True, True),
    "temporal_up": (True, True),
}


def with_decoder(**changes):
    config = smoke().copy_and_resolve_references().unlock()
    config.model.decoder = DECODER | changes
    return config


def test_a_small_decoder_takes_the_place_of_the_vae(tmp_path):
    """The same latents, so the same motion; other pixels, which `decoder.decode` gives, too."""
    plain, small = Pipeline.random(smoke(), seed=1), Pipeline.random(with_decoder(), seed=1)
    frames = []
    for pipeline in (plain, small):
        session = pipeline.session()
        session.start(GREY, GREY, "", seed=2)
        frames.append([session.next_chunk(), session.next_chunk()])
    assert [chunk.shape for chunk in frames[1]] == [chunk.shape for chunk in frames[0]]
    assert not np.array_equal(frames[0][0], frames[1][0])

    media, stream = small.media, small.stream
    text_kv = media.text_kv(small.encode_prompt(""))
    person, garment = (
        media.encode_image(prepare(GREY, small.size))
        for prepare in (prepare_reference, prepare_garment)
    )
    cache = stream.refresh(stream.new_cache(), person, garment, text_kv)
    latents = []
    for number in range(2):
        chunk, cache = stream.chunk(cache, text_kv, 2, number)
        latents.append(chunk)
    whole = np.asarray(to_uint8(small.decoder.decode(jnp.concatenate(latents, axis=1))))[0]
    assert np.abs(whole.astype(int) - np.concatenate(frames[1])).max() <= 1

    small.save(tmp_path)
    loaded = Pipeline.from_pretrained(tmp_path)
    session = loaded.session()
    session.start(GREY, GREY, "", seed=2)
    assert np.array_equal(session.next_chunk(), frames[1][0])


@pytest.mark.parametrize("change", [{"z_dim": 5}, {"patch": 1}])
def test_a_decoder_of_other_latents_is_refused(change):
    with pytest.raises(PipelineError, match=r"model\.decoder has .* it decodes the same latents"):
        Pipeline.random(with_decoder(**change))


def test_a_pipeline_says_what_it_is():
    text = repr(Pipeline.random(smoke(), text=False))
    assert text.startswith("Pipeline(smoke: ") and "32x16 pixels, float32, sampler euler" in text


def test_a_prompt_that_is_too_long_is_cut_with_a_warning(caplog):
    pipeline = Pipeline.random(smoke(), seed=1)  # 16 bytes, the end token among them
    assert pipeline.cut_prompt("a red coat") == ("a red coat", "")
    kept, cut = pipeline.cut_prompt("a red coat, she waves")
    assert (kept, cut) == ("a red coat, she", "waves")
    short, long = (pipeline.encode_prompt(text) for text in (kept, "a red coat, she waves"))
    assert np.array_equal(short, long)
    assert [record.message for record in caplog.records] == [
        "the prompt has more than 16 tokens: its end is left out, from 'waves' on; shorten it"
    ]

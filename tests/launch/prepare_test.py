"""The command that makes training data: what it says, and how it ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from chameleon_jax.config import load_config
from chameleon_jax.data import images, records, sources, text_states
from chameleon_jax.data.examples import RunwayExamples
from chameleon_jax.data.tokenizer import Tokenizer, clean_text, train_pieces
from chameleon_jax.diffusion.sampler import NEGATIVE_PROMPT
from chameleon_jax.models.text import TextConfig, TextEncoder
from chameleon_jax.models.vae import Vae, VaeConfig
from chameleon_jax.runway import render_triplet
from chameleon_jax.weights.params import param_shapes, save_params, set_params
from launch import prepare

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "launch.prepare", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "expected a command, runway, latents, text, tokenizer; got none"),
        (["--out", "OUT"], "expected a command, runway, latents, text, tokenizer; got '--out'"),
        (["latent", "--out", "OUT"], "got 'latent'; did you mean latents?"),
        (["runway"], "required: --out"),
        (["runway", "--out", "OUT", "--size", "128"], "--size: '128': expected HEIGHTxWIDTH"),
        (["runway", "--out", "OUT", "--size", "0x80"], "--size: '0x80': expected HEIGHTxWIDTH"),
        (["runway", "--out", "OUT", "--fps", "0"], "--fps: '0': expected a number above 0"),
        (["runway", "--out", "OUT", "--fps", "1e6"], "fps is 1000000.0; expected a number from"),
        (["runway", "--out", "OUT", "--fps", "nan"], "--fps: 'nan': expected a number above 0"),
        (["runway", "--out", "OUT", "--data", "x"], "unknown flag --data"),
        (["runway", "--out", "OUT", "x"], "unexpected argument 'x'"),
        (["runway", "--out", "A" * 300], "File name too long; choose a shorter name"),
        (["runway", "--out", f"{__file__}/x"], "Not a directory"),
        (
            ["runway", "--out", "OUT", "--clips", "1000000000"],
            "belong to several splits",
        ),
        (["runway", "--out", "OUT", "--frames", "32"], "4k + 1"),
        (
            ["runway", "--out", "OUT", "--seed_start", "799999", "--clips", "2"],
            "belong to several splits",
        ),
        (["runway", "--out", "OUT", "--match", "("], "'(' is not a regular expression"),
        (
            ["runway", "--out", "OUT", "--slot", "hat"],
            "slot 'hat'; expected one of top, bottom, dress, outer",
        ),
        (
            ["runway", "--out", "OUT", "--world", "moon"],
            "world is 'moon'; expected one of open, mirror",
        ),
        (["latents", "--out", "OUT"], "required: --weights"),
        (["text", "--out", "OUT"], "required: --data, --weights, --tokenizer"),
        (["text", "--out", "OUT", "--dtype", "int8"], "--dtype: 'int8': expected"),
        (["latents", "--out", "OUT", "--batch", "0"], "--batch: '0': expected a whole number"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_two(tmp_path, capsys, arguments, expected):
    words = [str(tmp_path / "out") if word == "OUT" else word for word in arguments]
    with pytest.raises(SystemExit) as ended:
        prepare.main(words)
    assert ended.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(lines) == 1 and expected in lines[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("world", ["open", "mirror"])
def test_runway_command_renders_the_split_of_its_seeds(tmp_path, world):
    out = str(tmp_path / "clips")
    small = ["--frames", "5", "--size", "64x40", "--fps", "8", "--world", world]
    done = run(
        "runway", "--out", out, "--clips", "2", "--seed_start", "800000", "--workers", "0", *small
    )
    assert done.returncode == 0, done.stderr
    assert "2 clips in split validation" in done.stderr and "2/2 records" in done.stderr
    source = sources.RecordSource(out, "validation")
    triplet = render_triplet(800_001, frames=5, size=(64, 40), fps=8, world=world)
    sample = source.load(1, 5, (64, 40))
    assert sample["seed"] == 800_001 and sample["fps"] == 8
    np.testing.assert_array_equal(sample["reference"], triplet.reference)
    np.testing.assert_array_equal(sample["garment"], triplet.garment)
    assert np.abs(sample["video"].astype(int) - triplet.video).mean() < 3
    assert sample["captions"]["dynamic"] == triplet.captions["dynamic"]
    # A set of one world is not continued with another.
    small[-1] = "open" if world == "mirror" else "mirror"
    other = run(
        "runway", "--out", out, "--clips", "2", "--seed_start", "800000", "--workers", "0", *small
    )
    assert other.returncode == 2 and "world" in other.stderr


def test_latents_command_encodes_with_the_vae_of_the_config(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "data"))
    import fake_renderer

    make = RunwayExamples(size=(32, 16), frames=9, fps=8, render=fake_renderer.render)
    records.prepare_runway(tmp_path / "clips", 3, make, workers=0)
    config = "configs/runway_tiny.py:smoke"
    vae_config = VaeConfig(**load_config(str(ROOT / config)).model.vae.to_dict())
    vae, rng = nnx.eval_shape(lambda: Vae(vae_config, rngs=nnx.Rngs(0))), np.random.default_rng(0)
    set_params(
        vae,
        {name: rng.normal(0, 0.2, shape) for name, shape in param_shapes(vae).items()},
        jnp.float32,
    )
    weights = tmp_path / "vae.safetensors"
    save_params(weights, vae)
    out = str(tmp_path / "latents")
    command = [
        "latents",
        "--data",
        str(tmp_path / "clips"),
        "--out",
        out,
        "--config",
        config,
        "--size",
        "32x16",
    ]
    done = run(*command, "--weights", str(weights), "--frames", "9", "--fps", "8", "--batch", "2")
    assert done.returncode == 0, done.stderr
    clip, latent = (
        sources.RecordSource(folder).load(2, 9, (32, 16)) for folder in (tmp_path / "clips", out)
    )
    for name, pixels in (("z_video", clip["video"]), ("z_garment", clip["garment"][None])):
        expected = nnx.jit(Vae.encode)(vae, images.to_model(pixels[None]))[0]
        np.testing.assert_allclose(latent[name], expected, rtol=2e-3, atol=2e-3)
        assert np.std(expected) > 0.1
    missing = run(*command, "--weights", str(tmp_path / "none.safetensors"))
    assert missing.returncode == 2 and "no such file" in missing.stderr


def test_text_command_encodes_captions_with_the_encoder_of_the_config(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "data"))
    import fake_renderer

    make = RunwayExamples(size=(32, 16), frames=5, fps=8, render=fake_renderer.render)
    for start in (0, 800_000):
        records.prepare_runway(tmp_path / "clips", 3, make, seed_start=start, workers=0)
    source = sources.open_sources(tmp_path / "clips")
    prompts = text_states.read_prompts(source, ("", NEGATIVE_PROMPT))
    pieces = train_pieces([clean_text(prompt) for prompt in prompts if prompt], 400)
    pieces.save(str(tmp_path / "tokenizer.json"))
    config = "configs/runway_tiny.py:smoke"
    sizes = TextConfig(**load_config(str(ROOT / config)).model.text.to_dict())
    text = TextEncoder(sizes, rngs=nnx.Rngs(0))
    save_params(tmp_path / "text.safetensors", text)
    command = ["text", "--data", str(tmp_path / "clips"), "--out", str(tmp_path / "text")]
    command += ["--config", config, "--weights", str(tmp_path), "--dtype", "float32"]
    command += ["--tokenizer", str(tmp_path / "tokenizer.json")]
    done = run(*command, "--split", "train", "--split", "validation")
    assert done.returncode == 0, done.stderr
    assert f"{len(prompts)} prompts in split train" in done.stderr
    states = text_states.TextStates(tmp_path / "text")
    assert states.weights == sources.file_hash(tmp_path / "text.safetensors")
    ids, mask = Tokenizer(pieces, sizes.length)(prompts)
    np.testing.assert_allclose(states.batch(prompts), text(ids, mask), rtol=1e-4, atol=1e-5)
    other = sources.open_sources(tmp_path / "clips", "validation")
    assert all(prompt in states for prompt in text_states.read_prompts(other))


def test_progress_line_tells_rate_and_time(capsys):
    line = prepare.ProgressLine()
    line(10, 10, 20)
    line(20, 10, 20)
    said = capsys.readouterr().err
    assert "10/20 records" in said and "20/20 records" in said and "0.0 min left" in said

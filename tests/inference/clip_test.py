"""Whole clips: parity with diffusers' pipelines and the original's loop, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from flax import nnx
from ml_collections import ConfigDict
from PIL import Image

from chameleon_jax.config import load_config
from chameleon_jax.data.images import first_frame
from chameleon_jax.data.tokenizer import byte_tokenizer
from chameleon_jax.diffusion.unipc import GRIDS, unipc_timesteps
from chameleon_jax.errors import UserError
from chameleon_jax.inference.clip import (
    GenerateConfig,
    GenerateError,
    Generator,
    best_size,
    clip_noise,
    latent_shape,
)
from chameleon_jax.inference.pipeline import Pipeline, PipelineError
from chameleon_jax.models.dit import DiT
from chameleon_jax.models.text import TextEncoder
from chameleon_jax.models.vae import Vae
from chameleon_jax.weights.params import set_params
from converters.families import NETWORKS
from converters.rules import convert
from tests import tiny_wan
from tests.tiny_wan import DIT, TEXT, VAE
from tests.unipc64 import unipc64

ROOT = Path(__file__).parents[2]
SIZE, FRAMES = (32, 48), 9
LATENT = (1, 3, 4, 6, 4)
PROMPT, NEGATIVE = "a “cat” &amp; a  dog", "模糊， blurred"


def smoke(*overrides) -> ConfigDict:
    return load_config(f"{ROOT}/configs/wan22_ti2v.py:smoke", overrides)


@pytest.fixture(scope="module")
def theirs():
    """diffusers' two pipelines in their Wan2.2-5B form, with the same random weights."""
    return {
        "t2v": tiny_wan.pipeline(WanPipeline),
        "i2v": tiny_wan.pipeline(WanImageToVideoPipeline),
    }


@pytest.fixture(scope="module")
def ours(theirs) -> Pipeline:
    """The same networks, converted."""

    def tensors(name):
        return {key: x.numpy() for key, x in getattr(theirs["t2v"], name).state_dict().items()}

    config = smoke().to_dict()
    config["model"] = {
        "vae": dataclasses.asdict(VAE),
        "dit": dataclasses.asdict(DIT),
        "text": dataclasses.asdict(TEXT),
    }
    parts = {
        "vae": (Vae, VAE, NETWORKS["vae"]),
        "transformer": (DiT, DIT, NETWORKS["dit"]),
        "text_encoder": (TextEncoder, TEXT, NETWORKS["text"]),
    }
    networks = []
    for name, (kind, sizes, family) in parts.items():
        layout = family.layouts["diffusers"]
        networks.append(
            nnx.eval_shape(lambda kind=kind, sizes=sizes: kind(sizes, rngs=nnx.Rngs(0)))
        )
        public = layout.prepare(tensors(name))
        params = convert(public, layout.rules(sizes), family.expected(sizes))
        set_params(networks[-1], params)
    return Pipeline(*networks, byte_tokenizer(TEXT.length), config)


@pytest.fixture(scope="module")
def generator(ours) -> Generator:
    """Two steps, guided, unless a test says otherwise."""
    return Generator(ours, GenerateConfig(steps=2))


def picture(height=SIZE[0], width=SIZE[1]) -> Image.Image:
    return Image.fromarray(np.random.default_rng(3).integers(0, 256, (height, width, 3), np.uint8))


def noise(seed=0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(LATENT, np.float32)


def to_torch(x) -> torch.Tensor:
    return torch.from_numpy(np.array(x, np.float32).transpose(0, 4, 1, 2, 3))


def from_torch(x: torch.Tensor) -> np.ndarray:
    return x.numpy().transpose(0, 2, 3, 4, 1)


@pytest.mark.parametrize(("task", "guidance"), [("t2v", 5.0), ("i2v", 5.0), ("t2v", 1.0)])
def test_a_clip_agrees_with_that_of_diffusers(theirs, generator, task, guidance):
    """From prompts to pixels: latents within 1e-4 on a scale of two, pixels within 1/255."""
    image = {"image": picture()} if task == "i2v" else {}
    asked = {
        "prompt": PROMPT,
        "negative_prompt": NEGATIVE,
        "height": SIZE[0],
        "width": SIZE[1],
        "num_frames": FRAMES,
        "num_inference_steps": 5,
        "guidance_scale": guidance,
        "latents": to_torch(noise()),
        "max_sequence_length": TEXT.length,
        **image,
    }
    expected = from_torch(theirs[task](**asked, output_type="latent").frames)
    pixels = theirs[task](**asked, output_type="np").frames[0]
    settings = GenerateConfig(
        grid="diffusers", steps=5, guidance=guidance, negative_prompt=NEGATIVE
    )
    got = generator.generate(
        PROMPT, **image, size=SIZE, frames=FRAMES, noise=noise(), settings=settings
    )
    assert got.shape == LATENT and got.dtype == jnp.float32
    assert 0.3 < expected.std() < 5 and pixels.std() > 0.1
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)
    frames = np.concatenate(list(generator.decode(got)))
    assert frames.shape == (FRAMES, *SIZE, 3) and frames.dtype == np.uint8
    np.testing.assert_allclose(frames / 255, pixels, rtol=0, atol=1 / 255)


def original_grid(steps: int, shift: float) -> tuple[np.ndarray, np.ndarray]:
    """Sigmas and timesteps of the original sampler: its training table in float32, a line through
    it, the shift.
    """
    highest = float((1 - np.linspace(1, 1 / 1000, 1000)[::-1]).astype(np.float32)[0])
    sigmas = np.linspace(highest, 0, steps + 1)[:-1]
    sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
    return np.append(sigmas, 0), (1000 * sigmas).astype(np.int64)


def original_loop(
    transformer, z, mask, states, negative, steps: int, guidance: float, x: np.ndarray
) -> np.ndarray:
    """The published loop in float64 NumPy: all frames are denoised, masked ones put back before and
    after every step.

    Args:
      z: what stands on masked frames, [b, c, f, h, w].
      mask: 0 on frames that are given and 1 on the others, [1, 1, f, 1, 1].
      x: noise, as z.
    """
    sigmas, timesteps = original_grid(steps, 5.0)

    def velocity(k, x):
        times = (
            np.broadcast_to(mask * timesteps[k], (1, 1, *x.shape[2:]))[0, 0, :, ::2, ::2]
            .reshape(1, -1)
            .copy()
        )

        def told(prompt):
            with torch.no_grad():
                sample = torch.from_numpy(x.astype(np.float32))
                v = transformer(sample, torch.tensor(times).float(), prompt, return_dict=False)[0]
            return v.numpy().astype(np.float64)

        v_negative = told(negative)
        return v_negative + guidance * (told(states) - v_negative)

    return unipc64(velocity, x, sigmas, lambda x: (1 - mask) * z + mask * x)[-1]


@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_a_clip_agrees_with_the_loop_of_the_original(theirs, generator, task):
    """On the original's own table of timesteps, which is the default; the solver in float64."""
    pipe, z, mask, image = theirs[task], np.zeros(1), np.ones((1, 1, 3, 1, 1)), None
    with torch.no_grad():
        states = pipe.encode_prompt(PROMPT, NEGATIVE, max_sequence_length=TEXT.length)
        if task == "i2v":
            image, mask[:, :, 0] = picture(), 0
            pixels = torch.tensor(np.asarray(image).transpose(2, 0, 1) / 127.5 - 1).float()[
                None, :, None
            ]
            z = from_torch(pipe.vae.encode(pixels).latent_dist.mean)
            z = to_torch((z - np.array(VAE.latent_mean)) / np.array(VAE.latent_std)).numpy()
    expected = original_loop(pipe.transformer, z, mask, *states, 6, 5.0, to_torch(noise(1)).numpy())
    asked = {"size": SIZE, "frames": FRAMES, "noise": noise(1), "settings": GenerateConfig(steps=6)}
    got = generator.generate(PROMPT, image=image, negative_prompt=NEGATIVE, **asked)
    assert 0.3 < expected.std() < 5
    np.testing.assert_allclose(got, expected.transpose(0, 2, 3, 4, 1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 12.0])
def test_the_table_is_the_original_one_for_every_shift(shift):
    """With shift 1, 1000 sigma falls on whole numbers, and t is what remains of them in the
    original's rounding.
    """
    for steps in (1, 2, 3, 24, 30, 37, 40, 50, 99):
        sigmas, timesteps = original_grid(steps, shift)
        ours = GRIDS["wan"](steps, shift)
        np.testing.assert_allclose(ours, sigmas, rtol=0, atol=1e-12)
        np.testing.assert_array_equal(unipc_timesteps(ours), timesteps)


def test_the_first_frame_is_that_of_the_image_and_its_noise_is_not_read(ours, generator):
    other = noise()
    other[:, 0] = 7
    first, second = (
        generator.generate(PROMPT, image=picture(), size=SIZE, frames=9, noise=n)
        for n in (noise(), other)
    )
    np.testing.assert_array_equal(first, second)
    alone = ours.vae.encode(jnp.asarray(np.asarray(picture()), jnp.float32)[None, None] / 127.5 - 1)
    np.testing.assert_allclose(first[:, :1], alone, atol=1e-5)


def test_with_guidance_1_the_negative_prompt_is_not_read(generator):
    """What could not be read as a prompt does no harm then, and is an error otherwise."""
    asked = {"negative_prompt": np.zeros(3), "size": SIZE, "frames": FRAMES}
    assert (
        generator.generate(PROMPT, **asked, settings=GenerateConfig(steps=1, guidance=1.0)).shape
        == LATENT
    )
    with pytest.raises(PipelineError, match="encoded prompt"):
        generator.generate(PROMPT, **asked)


def test_noise_comes_from_the_seed_and_stays_usable(generator):
    def clip(**kw):
        return np.asarray(generator.generate(PROMPT, size=SIZE, frames=FRAMES, **kw))

    drawn = clip_noise(4, LATENT)
    np.testing.assert_array_equal(clip(seed=4), clip(noise=drawn))
    np.testing.assert_array_equal(
        drawn, clip_noise(4, LATENT)
    )  # not given away with the solver's state
    assert np.abs(clip(seed=4) - clip(seed=5)).max() > 0.1
    assert drawn.dtype == jnp.float32 and 0.8 < float(drawn.std()) < 1.2
    chunk = jax.random.normal(
        jax.random.fold_in(jax.random.fold_in(jax.random.key(4), 0), 0), LATENT
    )
    assert np.abs(chunk - drawn).max() > 0.1


def test_steps_are_reported_one_by_one_and_one_program_serves_all_settings(ours):
    generator, seen = Generator(ours, GenerateConfig(steps=4)), []
    generator.generate(PROMPT, size=SIZE, frames=FRAMES, on_step=lambda *done: seen.append(done))
    assert seen == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]
    settings = GenerateConfig(steps=3, grid="diffusers", shift=3.0, guidance=2.0)
    generator.generate(PROMPT, size=SIZE, frames=FRAMES, settings=settings)
    assert generator._step._cache_size() == 1

    def stop(done, steps):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generator.generate(PROMPT, size=SIZE, frames=FRAMES, on_step=stop)


def test_streamed_frames_are_those_of_the_whole_clip(ours, generator):
    z = jnp.asarray(noise(2))
    parts = list(generator.decode(z))
    assert [len(part) for part in parts] == [1, 4, 4]
    whole = np.asarray(ours.vae.decode(z))[0]
    np.testing.assert_allclose(np.concatenate(parts) / 127.5 - 1, whole, atol=0.51 / 127.5 + 1e-5)


def test_latents_and_guidance_are_float32_when_the_networks_are_not():
    """One step from zero leaves -sigma v: were v rounded after guidance, bfloat16 could hold it."""
    settings = GenerateConfig(steps=1, guidance=2.3)
    pipeline = Pipeline.random(smoke("dtype=bfloat16"))
    latents = Generator(pipeline).generate("a cat", noise=np.zeros(LATENT), settings=settings)
    assert latents.dtype == jnp.float32 and np.isfinite(latents).all()
    v = np.asarray(latents / -settings.table().sigma[0])
    rounded = np.asarray(v.astype(jnp.bfloat16), np.float32)
    assert (np.abs(rounded - v) > 1e-4 * np.abs(v)).mean() > 0.5


def test_size_and_length_follow_the_config_and_with_an_image_its_shape(generator):
    assert generator.generate(PROMPT).shape == LATENT
    assert generator.generate(PROMPT, image=picture(90, 60)).shape == (1, 3, 6, 4, 4)


@pytest.mark.parametrize(
    ("kw", "message"),
    [
        ({"size": (700, 1280)}, "size 700x1280: .* multiple of 16 .* the nearest size is 704x1280"),
        ({"size": (32, 8)}, "the nearest size is 32x16"),
        ({"size": (0, 48)}, "the nearest size is 16x48"),
        ({"frames": 120}, r"120 frames: expected 4k \+ 1; the nearest are 117 and 121"),
        ({"frames": 4}, "the nearest are 1 and 5"),
        ({"frames": 0}, "the nearest is 1"),
        ({"frames": -3}, "the nearest is 1"),
        ({"frames": 1, "image": picture()}, "nothing to generate; the shortest clip is 5"),
        ({"seed": -1}, "seed -1: expected 0 to 4294967295"),
        ({"noise": np.zeros((1, 3, 4, 6))}, r"noise is \(1, 3, 4, 6\); expected \(1, 3, 4, 6, 4\)"),
    ],
)
def test_what_cannot_be_made_is_refused(generator, kw, message):
    with pytest.raises(UserError, match=message):
        generator.generate(PROMPT, **kw)


def test_units_are_those_of_the_networks():
    config = load_config(f"{ROOT}/configs/wan22_ti2v.py")
    assert latent_shape(config, (704, 1280), 121, image=False) == (1, 31, 44, 80, 48)
    assert latent_shape(config, (1280, 704), 1, image=False) == (1, 1, 80, 44, 48)
    with pytest.raises(GenerateError, match="the nearest size is 704x1280"):
        latent_shape(config, (720, 1280), 121, image=False)
    for size, frames in (((704, 1280), 4097), ((32 * 1025, 1280), 121)):
        with pytest.raises(GenerateError, match="expected at most 4093 frames of 32768x32768"):
            latent_shape(config, size, frames, image=False)


@pytest.mark.parametrize(
    ("picture", "size"),
    [
        ((704, 1280), (704, 1280)),
        ((1280, 704), (1280, 704)),
        ((1080, 1920), (704, 1248)),
        ((1920, 1080), (1248, 704)),
        ((512, 512), (928, 960)),  # a tie
        ((3, 4), (800, 1088)),
        ((4032, 3024), (1088, 800)),
        ((2, 3), (768, 1152)),
        ((1000, 352), (1568, 544)),
        ((100, 2000), (192, 4224)),
    ],
)
def test_the_size_for_an_image_is_that_of_the_original(picture, size):
    assert best_size(picture, 704 * 1280, (32, 32)) == size


def test_a_strip_keeps_a_unit_on_its_short_side():
    assert best_size((1, 32), 16 * 16, (16, 16)) == (16, 80)


def test_an_image_fills_the_frame_and_is_cropped_in_the_middle():
    columns = np.broadcast_to(np.arange(101, dtype=np.uint8)[None, :, None], (64, 101, 3))
    got = first_frame(columns, (64, 96))  # 5 columns too many: 2 go on the left
    np.testing.assert_array_equal(got, columns[:, 2:98])
    np.testing.assert_array_equal(
        first_frame(np.swapaxes(columns, 0, 1), (96, 64)), np.swapaxes(columns, 0, 1)[2:98]
    )
    source = picture(100, 77)  # scaled by 64/77 to 83.1 x 64: 83 rows, 19 too many
    scaled = np.asarray(source.resize((64, 83), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(first_frame(source, (64, 64)), scaled[9:73])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"grid": "karras"}, "grid 'karras' is not one of wan, diffusers"),
        ({"steps": 0}, "expected 1 to 1000"),
        ({"steps": 1001}, "expected 1 to 1000"),
        ({"guidance": float("nan")}, "expected a number from 0 up"),
        ({"guidance": -1.0}, "expected a number from 0 up"),
        ({"shift": 0.0}, "expected a number above 0"),
        ({"shift": 1e20}, "expected a shift nearer to 5.0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(GenerateError, match=message):
        GenerateConfig(**settings)


def test_settings_come_from_the_config():
    full = GenerateConfig.read(load_config(f"{ROOT}/configs/wan22_ti2v.py"))
    assert full == GenerateConfig() and (full.steps, full.shift, full.guidance, full.grid) == (
        50,
        5.0,
        5.0,
        "wan",
    )
    assert GenerateConfig.read(smoke("generate.guidance=1")).guidance == 1
    with pytest.raises(
        GenerateError, match="no group 'generate'; expected one as in configs/wan22_ti2v.py"
    ):
        GenerateConfig.read(load_config(f"{ROOT}/configs/wan22_5b.py"))
    with pytest.raises(GenerateError, match="generate.step: no such key"):
        GenerateConfig.read({"generate": {"step": 3}})

"""The reward: preparation of frames, and what is true of scores with any weights.

Parity of the whole with the original is in tests/converters/reward_test.py.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from transformers import CLIPImageProcessorPil

from chameleon_jax.models.reward import MEAN, STD, ClipVisionConfig, Reward, preprocess, quick_gelu

TINY = ClipVisionConfig(width=16, ffn=24, heads=2, layers=2, projection=12, image=32, patch=8)


@functools.partial(jax.jit, static_argnums=0)
def _program(graph: nnx.GraphDef, state: nnx.State, frames: jax.Array) -> jax.Array:
    return nnx.merge(graph, state).score(frames)


def _score(reward: Reward, frames: np.ndarray) -> np.ndarray:
    graph, state = nnx.split(reward)
    return np.asarray(_program(graph, state, frames))


@pytest.fixture(scope="module")
def reward():
    return Reward(TINY, rngs=nnx.Rngs(0))


def _frames(b=3, h=45, w=38, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (b, h, w, 3), dtype=np.uint8)


def _levels(pixels: jax.Array) -> np.ndarray:
    """Prepared pixels as grey levels again."""
    return (np.asarray(pixels) * STD + MEAN) * 255


DOWN = [(640, 352), (352, 640), (300, 300), (448, 448), (225, 901)]
UP = [(150, 100), (100, 150), (60, 60), (64, 96)]


@pytest.mark.parametrize("size", [*DOWN, *UP, (224, 224)])
def test_frames_are_prepared_as_by_transformers(size):
    """Portrait, landscape and square; noise, in which every tap of the filter counts."""
    frames = _frames(2, *size)
    theirs = CLIPImageProcessorPil()(
        images=list(frames), return_tensors="np", input_data_format="channels_last"
    )
    expected = _levels(theirs["pixel_values"].transpose(0, 2, 3, 1))
    got = _levels(preprocess(jnp.asarray(frames)))
    assert got.shape == (2, 224, 224, 3)
    apart = np.abs(got - expected)
    # In levels. A sum close to a half may be rounded up here and down there.
    assert apart.max() < 2.01 and (apart > 0.01).mean() < 0.01


def test_the_crop_is_from_the_centre_and_rounds_down():
    """A frame that is not resized only loses its margins: of 3 extra rows, 1 above and 2 below."""
    frames = _frames(1, 35, 32)
    got = _levels(preprocess(jnp.asarray(frames), 32))
    np.testing.assert_allclose(got, frames[:, 1:33].astype(np.float32), rtol=0, atol=1e-3)


def test_floats_are_the_levels_that_they_round_to():
    frames = _frames()
    expected = preprocess(jnp.asarray(frames))
    off = np.random.default_rng(1).uniform(-0.49, 0.49, frames.shape)
    np.testing.assert_array_equal(preprocess(jnp.asarray(frames + off, jnp.float32)), expected)
    too_bright, white = jnp.full((1, 8, 8, 3), 300.0), jnp.full((1, 8, 8, 3), 255, jnp.uint8)
    np.testing.assert_array_equal(preprocess(too_bright), preprocess(white))


def test_quick_gelu_by_hand():
    x = np.array([-2.0, 0.0, 0.5, 3.0], np.float32)
    np.testing.assert_allclose(quick_gelu(jnp.asarray(x)), x / (1 + np.exp(-1.702 * x)), rtol=1e-6)
    assert np.abs(quick_gelu(jnp.asarray(x)) - jax.nn.gelu(x, approximate=False)).max() > 1e-3


def test_a_batch_scores_as_its_frames_do_one_by_one(reward):
    frames = _frames(5)
    together = _score(reward, frames)
    assert together.shape == (5,) and together.dtype == np.float32
    assert np.diff(np.sort(together)).min() > 1e-4
    one_by_one = np.concatenate([_score(reward, frames[i : i + 1]) for i in range(5)])
    np.testing.assert_allclose(one_by_one, together, rtol=0, atol=1e-6)


def test_the_score_depends_on_the_direction_of_the_embedding_only(reward):
    longer = nnx.clone(reward)
    kernel = longer.vision.proj.kernel
    kernel.set_value(kernel.get_value() * 7)
    np.testing.assert_allclose(
        _score(longer, _frames()), _score(reward, _frames()), rtol=0, atol=1e-6
    )


def test_every_parameter_changes_the_score(reward):
    graph, state = nnx.split(reward)
    weights = np.arange(1.0, 4.0, dtype=np.float32)

    @jax.jit
    @jax.grad
    def gradient(state):
        return (nnx.merge(graph, state).score(_frames()) * weights).sum()

    for path, leaf in nnx.to_flat_state(gradient(state)):
        # The bias of the keys adds the same number to all logits of a query: no effect.
        without_effect = path[-2:] == ("k", "bias")
        assert without_effect or np.abs(leaf.get_value()).max() > 1e-7, path


def test_one_program_per_size_of_frame(reward):
    graph, state = nnx.split(reward)
    program = jax.jit(lambda state, frames: nnx.merge(graph, state).score(frames))
    for seed in range(3):
        program(state, _frames(2, 45, 38, seed))
    assert program._cache_size() == 1
    turned = _frames(2, 38, 45)
    np.testing.assert_allclose(
        program(state, turned), reward.score(jnp.asarray(turned)), rtol=0, atol=1e-5
    )
    assert program._cache_size() == 2


def test_runs_in_bfloat16_up_to_the_embedding(reward):
    low = Reward(TINY, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    scores = _score(low, _frames())
    assert low.vision(jnp.zeros((1, 32, 32, 3))).dtype == jnp.bfloat16
    assert scores.dtype == np.float32
    assert 0 < np.abs(scores - _score(reward, _frames())).max() < 0.02


def test_errors_say_what_was_expected(reward):
    with pytest.raises(ValueError, match=r"frames are \(45, 38, 3\); expected \[b, h, w, 3\]"):
        reward.score(jnp.asarray(_frames()[0]))
    with pytest.raises(ValueError, match=r"expected \[b, h, w, 3\]"):
        reward.score(jnp.zeros((1, 8, 8, 4)))
    with pytest.raises(ValueError, match=r"int32; expected uint8, or float in \[0, 255\]"):
        reward.score(jnp.zeros((1, 8, 8, 3), jnp.int32))
    expected = r"frames are \(1, 40, 40, 3\); expected \[b, 32, 32, 3\]; see preprocess"
    with pytest.raises(ValueError, match=expected):
        reward.vision(jnp.zeros((1, 40, 40, 3)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 10, "heads": 4}, "width 10 is not a multiple of heads 4"),
        ({"image": 224, "patch": 15}, "image 224 is not a whole number of patches of 15"),
        ({"heads": 0}, "heads is 0; expected a whole number of at least 1"),
        ({"width": 0}, "width is 0; expected a whole number of at least 1"),
        ({"patch": -8}, "patch is -8; expected a whole number of at least 1"),
        ({"image": 32.0}, "image is 32.0; expected a whole number of at least 1"),
        ({"layers": 0}, "layers is 0; expected a whole number of at least 1"),
        ({"projection": None}, "projection is None; expected a whole number of at least 1"),
        ({"eps": float("nan")}, "eps is nan; expected a positive, finite number"),
    ],
)
def test_configs_that_cannot_be_built_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)

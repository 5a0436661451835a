"""The transformer: parity with diffusers, causality, slices against a dense mask, full size."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from einops import rearrange
from flax import nnx

from chameleon_jax.attention.core import bidirectional
from chameleon_jax.attention.policies import Ring
from chameleon_jax.attention.positions import rope
from chameleon_jax.models.dit import (
    LEAST_NOISE,
    SAYS,
    DiT,
    DiTConfig,
    bidirectional_forward,
    self_forcing_forward,
    teacher_forcing_features,
    teacher_forcing_forward,
    timestep_embedding,
    token_grid,
)
from chameleon_jax.models.remat import POLICIES
from chameleon_jax.weights.params import flat_params, param_count, param_shapes, set_params
from converters.dit import DIFFUSERS_RULES, expected_shapes
from converters.rules import convert
from tests import tiny_dit, tiny_wan
from tests.dense_masks import teacher_forcing_table
from tests.tiny_dit import CONFIG, TOKENS, latents, prompt


@pytest.fixture(scope="module")
def reference():
    """diffusers' transformer with random weights, in the shape of ours, and ours with the same
    weights.
    """
    torch.manual_seed(0)
    model = tiny_wan.transformer().eval()
    with torch.no_grad():
        for name, x in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                x.copy_(1 + 0.2 * torch.randn_like(x))
            elif x.ndim > 1 and "table" not in name:
                x.copy_(torch.randn_like(x) * x[0].numel() ** -0.5)
            else:
                x.copy_(0.3 * torch.randn_like(x))
    tensors = {name: x.numpy() for name, x in model.state_dict().items()}
    dit = DiT(CONFIG, rngs=nnx.Rngs(0))
    set_params(dit, convert(tensors, DIFFUSERS_RULES, expected_shapes(CONFIG)))
    return model, dit


def _torch_forward(model, x, t_bf, text):
    """diffusers takes a timestep per token; here every token of a frame has that of the frame."""
    timestep = t_bf.repeat_interleave(TOKENS, dim=1)
    out = model(rearrange(x, "b f h w c -> b c f h w"), timestep, text, return_dict=False)[0]
    return rearrange(out, "b c f h w -> b f h w c")


# Timesteps of two samples of seven frames: two context frames at 0, then all alike, and all
# different.
TIMES = np.array([[0, 0, 625, 625, 625, 625, 625], [0, 0, 1000, 937, 500, 33, 1]], np.float32)


TEXTS = jnp.concatenate([prompt(), prompt(words=3)[..., ::-1]])


def test_parity_with_diffusers(reference):
    model, dit = reference
    x, text = latents(0, 7, batch=2), TEXTS
    with torch.no_grad():
        expected = _torch_forward(
            model, *(torch.tensor(np.asarray(y)) for y in (x, TIMES, text))
        ).numpy()
    got = bidirectional_forward(
        dit, x[:, :2], x[:, 2:], jnp.asarray(TIMES[:, 2:]), dit.text_kv(text)
    )
    assert 0.5 < expected.std() < 2
    np.testing.assert_allclose(got, expected[:, 2:], atol=1e-4)


def test_parity_of_gradients_with_diffusers(reference):
    model, dit = reference
    x, text, weight = latents(0, 7, batch=2), TEXTS, latents(1, 7, batch=2)
    inputs = [torch.tensor(np.asarray(y)).requires_grad_() for y in (x, text)]
    out = _torch_forward(model, inputs[0], torch.tensor(TIMES), inputs[1])
    (out * torch.tensor(np.asarray(weight)))[:, 2:].sum().backward()

    def loss(x, text):
        v = bidirectional_forward(
            dit, x[:, :2], x[:, 2:], jnp.asarray(TIMES[:, 2:]), dit.text_kv(text)
        )
        return (v * weight[:, 2:]).sum()

    for ours, theirs in zip(jax.jit(jax.grad(loss, argnums=(0, 1)))(x, text), inputs, strict=True):
        assert theirs.grad.abs().mean() > 0.05
        np.testing.assert_allclose(ours, theirs.grad.numpy(), atol=1e-4)


def test_without_context_it_is_plain_text_to_video(reference):
    model, dit = reference
    x, text, t = latents(3, 3), prompt(), np.full((1, 3), 800.0, np.float32)
    with torch.no_grad():
        expected = _torch_forward(
            model, *(torch.tensor(np.asarray(y)) for y in (x, t, text))
        ).numpy()
    got = bidirectional_forward(dit, None, x, jnp.asarray(t), dit.text_kv(text))
    np.testing.assert_allclose(got, expected, atol=1e-4)


@pytest.mark.parametrize("compiled", [False, True])
def test_timestep_embedding_by_hand(compiled):
    embed = jax.jit(timestep_embedding, static_argnums=1) if compiled else timestep_embedding
    times = np.float32([*np.linspace(0, 1000, 1001), 937.5, 833.3333, 625, 0.37])
    got = np.asarray(embed(jnp.asarray(times)[None], 256))[0]
    assert (got[0, :128] == 1).all() and (got[0, 128:] == 0).all()
    angle = times.astype(np.float64)[:, None] * 10000 ** (-np.arange(128) / 128)
    expected = np.concatenate([np.cos(angle), np.sin(angle)], axis=-1)
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-7)


CONTEXT, CLEAN, NOISY = latents(0, 2), latents(1, 9), latents(2, 9)
# Nothing is forgotten in clips of three chunks.
teacher_forced = functools.partial(teacher_forcing_forward, policy=Ring())
self_forced = functools.partial(self_forcing_forward, policy=Ring())
BLOCK_TIMES = jnp.repeat(jnp.array([[900.0, 400.0, 37.0]]), 3, axis=1)


def dense_teacher_forcing(dit, context, clean, noisy, t_bf, text_kv):
    """The layout as published, both copies with their context, under one dense mask."""
    x = jnp.concatenate([context, clean, context, noisy], axis=1)
    t = jnp.concatenate([jnp.zeros((1, 13)), t_bf], axis=1)
    attend = tiny_dit.dense([*range(11), *range(11)], teacher_forcing_table(2, 11, 3))
    return dit(x, t, text_kv, attend)[0][:, 13:]


def test_slices_equal_the_dense_mask_forward_and_gradient():
    dit = tiny_dit.tiny_dit()
    graph, params = nnx.split(dit)
    text = prompt()

    def run(function):
        def loss(params, context, clean, noisy, text):
            dit = nnx.merge(graph, params)
            v = function(dit, context, clean, noisy, BLOCK_TIMES, dit.text_kv(text))
            return jnp.sin(v).sum(), v

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3, 4), has_aux=True))(
            params, CONTEXT, CLEAN, NOISY, text
        )

    (gradients, v), (expected_gradients, expected) = (
        run(teacher_forced),
        run(dense_teacher_forcing),
    )
    assert expected.std() > 0.5
    np.testing.assert_allclose(v, expected, atol=1e-5)
    for ours, theirs in zip(
        jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), strict=True
    ):
        assert jnp.abs(theirs).max() > 1e-3
        np.testing.assert_allclose(ours, theirs, atol=2e-4, rtol=1e-3)


def test_noisy_copies_share_the_clean_one():
    """Several copies behind each other say what each says alone, and show what a layer saw."""
    dit, text = tiny_dit.tiny_dit(), prompt()
    other, times = latents(3, 9), BLOCK_TIMES[:, ::-1]

    def one(noisy, t):
        return teacher_forcing_features(
            dit, CONTEXT, CLEAN, noisy, t, dit.text_kv(text), policy=Ring(), layers=(1,)
        )

    pairs = ((NOISY, BLOCK_TIMES), (other, times))
    expected = [jax.jit(one)(*pair) for pair in pairs]
    v, (seen,) = jax.jit(one)(
        *(jnp.concatenate(parts, axis=1) for parts in zip(*pairs, strict=True))
    )
    np.testing.assert_allclose(v, jnp.concatenate([x for x, _ in expected], 1), atol=1e-5)
    np.testing.assert_allclose(seen, jnp.concatenate([x for _, (x,) in expected], 1), atol=1e-5)
    alone = teacher_forced(dit, CONTEXT, CLEAN, NOISY, BLOCK_TIMES, dit.text_kv(text))
    np.testing.assert_allclose(alone, expected[0][0], atol=1e-5)
    with pytest.raises(ValueError, match="13 noisy latent frames; expected one or several copies"):
        one(latents(3, 13), jnp.zeros((1, 13)))


def test_the_first_chunk_can_have_a_context_of_its_own():
    """It says what it says with that context alone, and the others hear of it through it only."""
    dit, opening = tiny_dit.tiny_dit(), latents(7, 2)
    text_kv = dit.text_kv(prompt())

    def run(context, opening=None, clean=CLEAN, form=teacher_forced):
        run = functools.partial(form, dit, z_opening=opening)
        return jax.jit(run)(context, clean, NOISY, BLOCK_TIMES, text_kv)

    v = run(CONTEXT, opening)
    np.testing.assert_allclose(v[:, :3], run(opening)[:, :3], atol=1e-5)
    assert jnp.abs(v[:, 3:] - run(opening)[:, 3:]).max() > 1e-2
    assert jnp.abs(v[:, 3:] - run(CONTEXT)[:, 3:]).max() > 1e-4
    np.testing.assert_allclose(run(CONTEXT, CONTEXT), run(CONTEXT), atol=1e-5)
    np.testing.assert_allclose(run(CONTEXT, opening, form=self_forced), v, atol=1e-5)
    with pytest.raises(ValueError, match="1 condition frames; the cache has 2 of them"):
        run(CONTEXT, opening[:, :1])


def test_a_network_that_says_clean_frames_gives_velocities():
    sizes = tiny_dit.tiny_dit().config
    plain, clean = (DiT(dataclasses.replace(sizes, says=says), rngs=nnx.Rngs(0)) for says in SAYS)
    for dit in (plain, clean):
        dit.head.proj.bias.set_value(jnp.arange(dit.head.proj.bias.get_value().size) / 10.0)
    t_bf = jnp.array([[1000.0, 500.0, 20.0, 0.0]])
    x = latents(0, 4)
    said, _ = plain(x, t_bf, plain.text_kv(prompt()), attend_all(plain, x))
    v, _ = clean(x, t_bf, clean.text_kv(prompt()), attend_all(clean, x))
    sigma = np.array([1, 0.5, LEAST_NOISE, LEAST_NOISE])[None, :, None, None, None]
    np.testing.assert_allclose(v, (x - said) / sigma, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="says is 'noise'; expected one of velocity, clean"):
        dataclasses.replace(sizes, says="noise")


def attend_all(dit, x):
    turn = rope(np.arange(x.shape[1]), *token_grid(dit.config, x), dit.config.head_dim)
    return bidirectional(turn)


def test_causality_by_gradient():
    """A noisy block listens to the clean blocks before it and to itself, and to nothing else."""
    dit = tiny_dit.tiny_dit()
    text_kv = dit.text_kv(prompt())

    def blocks(clean, noisy):
        v = teacher_forced(dit, CONTEXT, clean, noisy, BLOCK_TIMES, text_kv)
        return jnp.square(v).reshape(3, -1).sum(axis=1)

    for gradient, listens in zip(
        jax.jit(jax.jacrev(blocks, argnums=(0, 1)))(CLEAN, NOISY),
        (np.tri(3, k=-1, dtype=bool), np.eye(3, dtype=bool)),
        strict=True,
    ):
        size = jnp.abs(gradient.reshape(3, 3, -1)).max(axis=-1)  # [block of v, block of the input]
        assert (size[listens] > 1e-3).all()
        assert (size[~listens] == 0).all()


def test_bidirectional_listens_to_everything():
    dit = tiny_dit.tiny_dit()

    def last_frame(x):
        v = bidirectional_forward(
            dit, x[:, :2], x[:, 2:], jnp.full((1, 3), 500.0), dit.text_kv(prompt())
        )
        return jnp.square(v[:, -1]).sum()

    gradient = jnp.abs(jax.jit(jax.grad(last_frame))(latents(0, 5))).max(axis=(0, 2, 3, 4))
    assert (gradient > 1e-3).all()


@pytest.mark.parametrize("forward", ["bidirectional", "teacher_forcing", "self_forcing"])
def test_scan_and_remat_change_nothing(forward):
    """Neither the output nor any gradient; the parameters are the same ones, stored per layer."""
    states = nnx.split(tiny_dit.tiny_dit())[1]
    results = {}
    ways = [{"remat": name, "scan_layers": False} for name in ("none", "full")]
    ways += [{"remat": name, "scan_layers": True} for name in POLICIES]
    for way in ways:
        graph, other = nnx.split(tiny_dit.tiny_dit(**way))
        assert jax.tree.structure(other) == jax.tree.structure(states)

        def loss(params, text, graph=graph):
            dit = nnx.merge(graph, params)
            kv = dit.text_kv(text)
            if forward == "bidirectional":
                v = bidirectional_forward(dit, CONTEXT, NOISY[:, :3], BLOCK_TIMES[:, :3], kv)
            else:
                form = teacher_forced if forward == "teacher_forcing" else self_forced
                v = form(dit, CONTEXT, CLEAN[:, :6], NOISY[:, :6], BLOCK_TIMES[:, :6], kv)
            return jnp.square(v).sum(), v

        lowered = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True)).lower(states, prompt())
        # the ways really differ: a loop for scan, a barrier against reuse for remat
        assert ("stablehlo.while" in lowered.as_text()) == way["scan_layers"]
        assert ("optimization_barrier" in lowered.as_text()) == (way["remat"] != "none")
        results[str(way)] = jax.tree.leaves(lowered.compile()(states, prompt()))
    plain = results.pop(str(ways[0]))
    for leaves in results.values():
        for ours, expected in zip(leaves, plain, strict=True):
            np.testing.assert_allclose(ours, expected, atol=1e-4, rtol=1e-4)


def test_bfloat16_is_close_to_float32():
    full, half = tiny_dit.tiny_dit(), tiny_dit.tiny_dit(dtype=jnp.bfloat16)
    assert {x.dtype for x in flat_params(half).values()} == {jnp.dtype(jnp.bfloat16)}
    v, expected = (
        teacher_forced(dit, CONTEXT, CLEAN, NOISY, BLOCK_TIMES, dit.text_kv(prompt()))
        for dit in (half, full)
    )
    assert v.dtype == jnp.bfloat16
    error = jnp.abs(v.astype(jnp.float32) - expected)
    assert error.mean() < 0.03 * expected.std() and error.max() < 0.3 * expected.std()


def test_an_untrained_network_says_zero():
    dit = DiT(CONFIG, rngs=nnx.Rngs(0))
    v = bidirectional_forward(dit, CONTEXT, NOISY, BLOCK_TIMES, dit.text_kv(prompt()))
    assert v.shape == NOISY.shape and (v == 0).all()


@pytest.mark.parametrize("width", [60, 240, 960])
def test_an_untrained_network_hears_the_prompt_at_any_width(width):
    """What `text_embedding` makes of unit states: as published, 4096 channels of deviation 0.02 and
    then 3072, at 3072.
    """
    config = dataclasses.replace(CONFIG, width=width, text_width=width, layers=1)
    dit = DiT(config, rngs=nnx.Rngs(0))
    states = jax.random.normal(jax.random.key(1), (200, width))
    hidden = 0.02 * 4096**0.5 * jax.random.normal(jax.random.key(2), (100_000,))
    published = 0.02 * 3072**0.5 * float(jnp.square(jax.nn.gelu(hidden)).mean() ** 0.5)
    assert float(dit.text_embedding(states).std()) == pytest.approx(published, rel=0.35)


def test_jit_through_split_and_merge():
    dit = tiny_dit.tiny_dit()
    graph, state = nnx.split(dit)

    @jax.jit
    def forward(state, x, t):
        dit = nnx.merge(graph, state)
        return bidirectional_forward(dit, CONTEXT, x, t, dit.text_kv(prompt()))

    got = forward(state, NOISY, BLOCK_TIMES)
    np.testing.assert_allclose(
        got,
        bidirectional_forward(dit, CONTEXT, NOISY, BLOCK_TIMES, dit.text_kv(prompt())),
        atol=1e-5,
    )


def test_the_published_size_is_built_abstractly():
    dit = nnx.eval_shape(
        lambda: DiT(DiTConfig.wan22_ti2v_5b(), rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16)
    )
    assert param_count(dit) == 4_999_787_712 and len(param_shapes(dit)) == 825
    assert {x.dtype for x in flat_params(dit).values()} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch": (2, 2, 2)}, "every latent frame has its own t"),
        ({"heads": 7}, "60 is not a multiple of heads 7"),
        ({"heads": 4}, "cannot be rotated in pairs"),
        ({"freq_width": 33}, "freq_width 33 is odd"),
        ({"heads": 0}, "heads is 0; expected a whole number of at least 1"),
        ({"width": 60.0}, "width is 60.0; expected a whole number"),
        ({"layers": -2}, "layers is -2"),
        ({"in_channels": True}, "in_channels is True"),
        ({"out_channels": 0}, "out_channels is 0"),
    ],
)
def test_impossible_sizes_are_an_error(change, message):
    with pytest.raises(ValueError, match=message):
        DiTConfig(**(CONFIG.__dict__ | change))


def test_more_channels_may_go_in_than_come_out():
    """New input channels whose weights are zero change nothing, whatever they hold."""
    plain, wide = tiny_dit.tiny_dit(), tiny_dit.tiny_dit(in_channels=7)
    assert wide.config.out_channels == 4 and DiTConfig(**WIDE).out_channels == 7
    kernel = jnp.zeros_like(wide.patch_embedding.kernel.get_value())
    kernel = kernel.at[:, :, :, :4].set(plain.patch_embedding.kernel.get_value())
    set_params(wide, flat_params(plain) | {"patch_embedding.kernel": kernel})
    extra = jax.random.normal(jax.random.key(5), (1, 9, *tiny_dit.LATENT, 3))
    v = bidirectional_forward(
        wide,
        jnp.pad(CONTEXT, ((0, 0),) * 4 + ((0, 3),)),
        jnp.concatenate([NOISY, extra], axis=-1),
        BLOCK_TIMES,
        wide.text_kv(prompt()),
    )
    expected = bidirectional_forward(plain, CONTEXT, NOISY, BLOCK_TIMES, plain.text_kv(prompt()))
    np.testing.assert_allclose(v, expected, atol=1e-6)


WIDE = {name: value for name, value in CONFIG.__dict__.items() if name != "out_channels"} | {
    "in_channels": 7
}


def test_misshaped_inputs_are_an_error():
    dit = tiny_dit.tiny_dit()
    kv = dit.text_kv(prompt())
    with pytest.raises(ValueError, match=r"expected one per frame, \(1, 11\)"):
        bidirectional_forward(dit, CONTEXT, NOISY, BLOCK_TIMES[:, :5], kv)
    with pytest.raises(ValueError, match="expected 4 channels"):
        bidirectional_forward(dit, None, NOISY[..., :3], BLOCK_TIMES, kv)
    with pytest.raises(ValueError, match="patches of 2x2 divide"):
        bidirectional_forward(dit, None, NOISY[:, :, :3], BLOCK_TIMES, kv)
    with pytest.raises(ValueError, match="multiple of 3"):
        teacher_forced(dit, CONTEXT, CLEAN[:, :8], NOISY[:, :8], BLOCK_TIMES[:, :8], kv)
    with pytest.raises(ValueError, match="1 condition frames; the cache has 2"):
        teacher_forced(dit, CONTEXT[:, :1], CLEAN, NOISY, BLOCK_TIMES, kv)

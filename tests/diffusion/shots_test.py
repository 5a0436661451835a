"""Videos of several shots against the transformer in float64 that remembers nothing; UniPC."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from chameleon_jax.attention.policies import Shots
from chameleon_jax.diffusion import flow, rollout, unipc
from chameleon_jax.diffusion.rollout import Held, make_sampler
from chameleon_jax.weights.params import flat_params
from tests import tiny_dit
from tests.tiny_dit import LATENT, latents, prompt
from tests.unipc64 import unipc64

# Videos of several shots, as LongLive-2.0 makes them: four chunks of two frames are remembered.
SHOTS = Shots(frames=8, context=0, block=2, sink=2, pin=True, shot_offset=8)
UNIPC = make_sampler("unipc", steps=4)


def visible(cuts, chunks, capacity=4):
    """Which earlier chunks each chunk sees: when one needs room, the oldest goes that is not 0 and
    not pinned.
    """
    held, pinned, rows = [], None, []
    for chunk in range(chunks):
        if len(held) == capacity:
            held.remove(next(old for old in held if old not in (0, pinned)))
        rows.append(tuple(held))
        held.append(chunk)
        pinned = chunk if chunk in cuts else pinned
    return rows


def test_the_rule_of_what_is_visible():
    assert visible((), 7)[4:] == [(0, 2, 3), (0, 3, 4), (0, 4, 5)]
    assert visible((5,), 10)[5:] == [(0, 3, 4), (0, 4, 5), (0, 5, 6), (0, 5, 7), (0, 5, 8)]
    assert visible((4, 5), 8)[6:] == [(0, 4, 5), (0, 5, 6)]
    assert visible((1,), 6)[4:] == [(0, 1, 3), (0, 1, 4)]


def norm64(x):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)


def silu64(x):
    return x / (1 + np.exp(-x))


def gelu64(x):
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def attention64(q, k, v, mask=True):
    logits = np.where(mask, np.einsum("lnd,snd->nls", q, k) / np.sqrt(20), -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("nls,snd->lnd", weights / weights.sum(-1, keepdims=True), v).reshape(
        len(q), 60
    )


def turned64(x, positions):
    """Rotated by (frame, row, column): 4, 3 and 3 pairs of the 20 channels of a head."""
    axes = [
        np.repeat(positions, 6),
        np.tile([0, 0, 0, 1, 1, 1], len(positions)),
        np.tile([0, 1, 2], 2 * len(positions)),
    ]
    angle = [
        at[:, None] * 10000.0 ** (-np.arange(n) / n) for at, n in zip(axes, (4, 3, 3), strict=True)
    ]
    z = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * np.concatenate(angle, 1))[:, None]
    return np.stack([z.real, z.imag], -1).reshape(x.shape)


def velocity64(weights, x, t, texts, positions, seen):
    """The tiny transformer in float64 NumPy, written from the description of the published one.

    Args:
      weights: by name.
      x: latents [f, 4, 6, 4].
      t, positions: timestep and RoPE position of every frame, [f].
      texts: text states of every frame, a list.
      seen: bool [f, f], row = query frame.
    """

    def linear(name, x):
        return x @ weights[f"{name}.kernel"] + weights[f"{name}.bias"]

    def heads(name, x, scale=None):
        y = linear(name, x)
        if scale is not None:
            y = y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-6) * weights[f"{scale}.scale"]
        return y.reshape(len(x), 3, 20)

    frame = np.repeat(np.arange(len(x)), 6)  # of every token
    patches = x.reshape(-1, 2, 2, 3, 2, 4).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 16)
    tokens = (
        patches @ weights["patch_embedding.kernel"].reshape(16, 60)
        + weights["patch_embedding.bias"]
    )
    angle = t[:, None] * 10000.0 ** (-np.arange(16) / 16)
    e = silu64(linear("time_embedding.fc1", np.concatenate([np.cos(angle), np.sin(angle)], 1)))
    e = linear("time_embedding.fc2", e)
    e0 = linear("time_projection", silu64(e)).reshape(-1, 6, 60)
    states = [
        linear("text_embedding.fc2", gelu64(linear("text_embedding.fc1", text))) for text in texts
    ]
    for i in range(2):
        shift1, scale1, gate1, shift2, scale2, gate2 = (weights[f"blocks.{i}.modulation"] + e0)[
            frame
        ].transpose(1, 0, 2)
        name = f"blocks.{i}.self_attn"
        y = norm64(tokens) * (1 + scale1) + shift1
        q, k = (turned64(heads(f"{name}.{p}", y, f"{name}.norm_{p}"), positions) for p in "qk")
        y = attention64(q, k, heads(f"{name}.v", y), np.kron(seen, np.ones((6, 6))) > 0)
        tokens = tokens + gate1 * linear(f"{name}.o", y)
        name = f"blocks.{i}.cross_attn"
        y = (
            norm64(tokens) * weights[f"blocks.{i}.cross_norm.scale"]
            + weights[f"blocks.{i}.cross_norm.bias"]
        )
        q = heads(f"{name}.q", y, f"{name}.norm_q")
        y = [
            attention64(
                q[frame == f], heads(f"{name}.k", text, f"{name}.norm_k"), heads(f"{name}.v", text)
            )
            for f, text in enumerate(states)
        ]
        tokens = tokens + linear(f"{name}.o", np.concatenate(y))
        y = norm64(tokens) * (1 + scale2) + shift2
        tokens = tokens + gate2 * linear(
            f"blocks.{i}.ffn.fc2", gelu64(linear(f"blocks.{i}.ffn.fc1", y))
        )
    shift, scale = (weights["head.modulation"] + e[:, None])[frame].transpose(1, 0, 2)
    out = linear("head.proj", norm64(tokens) * (1 + scale) + shift)
    return out.reshape(-1, 2, 3, 2, 2, 4).transpose(0, 1, 3, 2, 4, 5).reshape(x.shape)


def video64(weights, noises, texts, cuts, image):
    """All chunks [2, 4, 6, 4] of a video. For every step of every chunk, the clean chunks before it
    are computed anew.
    """
    rows = visible(cuts, len(noises))
    seen = (
        np.kron(
            [[b == a or b in rows[a] for b in range(len(rows))] for a in range(len(rows))],
            np.ones((2, 2)),
        )
        > 0
    )
    shot = np.repeat([sum(cut <= chunk for cut in cuts) for chunk in range(len(rows))], 2)
    positions = np.arange(2 * len(rows)) + 8 * shot
    made = np.zeros((0, 4, 6, 4))
    sigmas = flow.shift_sigma(np.linspace(float(np.float32(0.999)), 0, 5), 5.0)
    for chunk, noise in enumerate(noises):
        clean, frames = len(made), 2 * chunk + 2
        given = np.zeros(frames, bool)
        given[0] = image is not None

        def put_back(x, given=given[clean:]):
            return np.where(given[:, None, None, None], 0 if image is None else image, x)

        def velocity(k, x, made=made, clean=clean, frames=frames, given=given):
            times = np.where((np.arange(frames) < clean) | given, 0.0, np.floor(1000 * sigmas[k]))
            text = [texts[f // 2] for f in range(frames)]
            x = np.concatenate([made, x])
            return velocity64(weights, x, times, text, positions[:frames], seen[:frames, :frames])[
                clean:
            ]

        made = np.concatenate([made, unipc64(velocity, noise, sigmas, put_back)[-1]])
    return made.reshape(len(noises), 2, 4, 6, 4)


class ShotStream:
    """`denoise_chunk` as a program of one trace, whatever is cut and held."""

    def __init__(self, config=SHOTS, sampler=UNIPC):
        self.config = config
        self.dit = tiny_dit.tiny_dit()
        self.weights = {
            name: np.asarray(value, np.float64) for name, value in flat_params(self.dit).items()
        }
        self.traces = 0
        graph, state = nnx.split(self.dit)

        def chunk(state, cache, text, key, cut, held):
            self.traces += 1
            dit = nnx.merge(graph, state)
            return rollout.denoise_chunk(
                dit, cache, dit.text_kv(text), key, sampler=sampler, cut=cut, held=held
            )

        program = jax.jit(chunk, donate_argnums=1)
        self.chunk = lambda cache, *args: program(state, cache, *args)

    def new_cache(self):
        return rollout.new_cache(self.dit, self.config, 1, LATENT)

    def video(self, texts, cuts=(), image=None):
        """All chunks [2, 4, 6, 4] of a video, and the noise that they were made of."""
        z = np.zeros((1, 2, *LATENT, 4), np.float32)
        z[:, 0] = 0 if image is None else image
        cache, made, noises = self.new_cache(), [], []
        for number, text in enumerate(texts):
            held = Held(z, np.array([number == 0 and image is not None, False]))
            x0, cache = self.chunk(
                cache, text[None], jax.random.key(number), np.bool_(number in cuts), held
            )
            made.append(np.asarray(x0[0]))
            noises.append(
                jax.random.normal(jax.random.fold_in(jax.random.key(number), 0), z.shape)[0]
            )
        return np.stack(made), np.asarray(noises, np.float64)


@functools.cache
def shot_stream():
    return ShotStream()


def text(seed):
    """Text states [12, 16] of a prompt of seven words."""
    return np.asarray(
        jax.random.normal(jax.random.key(1000 + seed), (12, 16)) * (np.arange(12) < 7)[:, None]
    )


IMAGE = np.asarray(latents(77, 1))[0, 0]
VIDEOS = {  # prompts of the chunks, cuts, first frame
    "one shot, which forgets": ((0,) * 9, (), None),
    "a first frame": ((0,) * 6, (), IMAGE),
    "a cut at 5": ((0,) * 5 + (1,) + (2,) * 5, (5,), None),
    "cuts at 4 and 5": ((0,) * 4 + (1, 2) + (3,) * 4, (4, 5), None),
    "an early cut": ((0, 1) + (2,) * 6, (1,), None),
    "a first frame and cuts at 2, 3 and 7": ((0, 0, 1, 2, 3, 3, 3, 4, 5, 5, 5), (2, 3, 7), IMAGE),
    "prompts that change without a cut": ((0, 0, 1, 1, 2, 3, 3), (), None),
}


@pytest.mark.parametrize("video", VIDEOS)
def test_a_video_equals_one_that_remembers_nothing(video):
    prompts, cuts, image = VIDEOS[video]
    stream, texts = shot_stream(), [text(seed) for seed in prompts]
    got, noises = stream.video(texts, cuts, image)
    expected = video64(stream.weights, noises, texts, cuts, image)
    assert 0.5 < expected.std() < 2 and all(chunk.std() > 0.5 for chunk in expected)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)
    assert stream.traces == 1
    if image is not None:
        np.testing.assert_array_equal(got[0, 0], image)
        assert np.abs(got[0, 1] - image).max() > 0.5


def test_any_frame_may_be_held():
    stream, z = shot_stream(), np.repeat(IMAGE[None, None], 2, axis=1)
    held = Held(z, np.array([False, True]))
    x0, _ = stream.chunk(
        stream.new_cache(), text(0)[None], jax.random.key(0), np.bool_(False), held
    )
    np.testing.assert_array_equal(x0[:, 1], z[:, 1])
    noisy, t = jnp.ones((1, 2, *LATENT, 4)), jnp.full((1, 2), 500.0)
    x, times = rollout.hold(held, noisy, t)
    np.testing.assert_array_equal(times, [[500.0, 0.0]])
    np.testing.assert_array_equal(x[:, 0], noisy[:, 0])
    np.testing.assert_array_equal(x[:, 1], z[:, 1])


def test_unipc_by_name():
    np.testing.assert_allclose(UNIPC.sigmas, [0.99980, 0.93727, 0.83306, 0.62469, 0], atol=1e-5)
    for dtype in (
        jnp.float32,
        jnp.bfloat16,
    ):  # never cast to the dtype of the network, where 999 would be 1000
        np.testing.assert_array_equal(UNIPC.rows(dtype).timestep, [999, 937, 833, 624, 0])
    np.testing.assert_array_equal(
        make_sampler("unipc", steps=2).rows(jnp.float32).timestep, [999, 833, 0]
    )
    assert hash(UNIPC) == hash(make_sampler("unipc", steps=4, shift=5.0))  # static
    with pytest.raises(
        ValueError, match="the sampler 'unipc' has no such setting; it has steps, shift"
    ):
        make_sampler("unipc", round_timesteps=True)
    with pytest.raises(ValueError, match="sigmas must fall"):
        make_sampler("unipc", steps=4, shift=1e20)


def test_every_chunk_starts_its_solver_afresh():
    """Whatever the past that the first step is handed, it has no weight; the last row leaves the
    sample as it is.
    """
    rows, noise = UNIPC.rows(jnp.float32), latents(0, 2)
    fresh, other = (UNIPC.init(noise), unipc.UniPcState(*(latents(seed, 2) for seed in (1, 2, 3))))

    def run(past, x=noise):
        for k in range(5):
            row = jax.tree.map(lambda column, k=k: column[k], rows)
            before = x
            x, past = UNIPC.step(row, past, x, jnp.tanh(x) + row.timestep / 1000, None)
        np.testing.assert_array_equal(before, x)
        return x

    np.testing.assert_array_equal(run(fresh), run(other))


def test_unipc_keeps_its_state_in_float32_under_a_bfloat16_network():
    dit = tiny_dit.tiny_dit(dtype=jnp.bfloat16)
    cache = rollout.new_cache(dit, SHOTS, 1, LATENT)
    assert cache.k[0].dtype == jnp.bfloat16
    noise = latents(0, 2)
    row = jax.tree.map(lambda column: column[0], UNIPC.rows(dit.dtype))
    x, past = UNIPC.step(row, UNIPC.init(noise), noise, noise.astype(dit.dtype), None)
    assert {leaf.dtype for leaf in (x, *past)} == {jnp.dtype(jnp.float32)}
    chunk = functools.partial(rollout.denoise_chunk, dit, sampler=UNIPC)
    x0, after = jax.eval_shape(chunk, cache, dit.text_kv(prompt()), jax.random.key(0))
    assert x0.dtype == jnp.float32 and after.k[0].dtype == jnp.bfloat16

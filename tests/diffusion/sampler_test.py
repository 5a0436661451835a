"""The many-step samplers: known fields, guidance, one trace."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from chameleon_jax.diffusion import flow, sampler, unipc

SHAPE = (2, 3, 4, 2, 5)


def sample_unipc(model, noise, table):
    """All steps of a table, as one loop of the compiler."""

    def step(carry, row):
        return sampler.step_unipc(model, row, *carry), None

    rows = jax.tree.map(jnp.asarray, table)
    (x, _), _ = jax.lax.scan(step, (noise, unipc.unipc_init(noise)), rows)
    return x


def _samplers():
    table = unipc.unipc_table(unipc.unipc_sigmas(8))
    return {
        "unipc": lambda model, noise: sample_unipc(model, noise, table),
        "euler": lambda model, noise: sampler.sample_euler(model, noise, flow.euler_sigmas(8)),
    }


def _noise():
    return jax.random.normal(jax.random.key(0), SHAPE)


@pytest.mark.parametrize("name", ["unipc", "euler"])
def test_the_field_of_a_point_mass_leads_to_the_point(name):
    """When all data are one point p, v = (x - p) / sigma. The timestep is an integer for UniPC,
    hence the tolerance.
    """
    point = jax.random.normal(jax.random.key(1), SHAPE[1:])
    sigmas = unipc.unipc_sigmas(8)

    def model(x, t_bf):
        if name == "euler":
            sigma = t_bf / 1000
        else:  # the network is told floor(1000 sigma); the exact field needs sigma itself
            told = jnp.asarray(unipc.unipc_timesteps(sigmas))
            sigma = jnp.asarray(sigmas[:-1], jnp.float32)[
                jnp.argmin(jnp.abs(t_bf[..., None] - told), axis=-1)
            ]
        return flow.velocity_from_x0(x, jnp.broadcast_to(point, x.shape), sigma)

    out = jax.jit(lambda noise: _samplers()[name](model, noise))(_noise())
    np.testing.assert_allclose(out, np.broadcast_to(point, SHAPE), atol=2e-5)


def test_the_model_is_traced_once():
    seen = []

    def model(x, t_bf):
        seen.append((x.shape, t_bf.shape, t_bf.dtype))
        return x

    _samplers()["unipc"](model, _noise())
    assert seen == [(SHAPE, SHAPE[:2], jnp.float32)]  # traced once, whatever the number of steps


def test_unipc_sampler_equals_its_steps_in_a_python_loop():
    table = unipc.unipc_table(unipc.unipc_sigmas(5))
    model = lambda x, t: jnp.sin(3 * x) + flow.expand(t, x) / 1000  # noqa: E731
    x, state = _noise(), unipc.unipc_init(_noise())
    for k in range(5):
        row = jax.tree.map(lambda a, k=k: a[k], table)
        x, state = unipc.unipc_step(row, state, x, model(x, jnp.full(SHAPE[:2], table.timestep[k])))
    np.testing.assert_allclose(sample_unipc(model, _noise(), table), x, atol=1e-5)


def test_euler_and_unipc_converge_to_the_same_sample():
    """On a smooth field (Gaussian data of standard deviation 0.5) with many steps; the exact factor
    is 0.5.
    """

    def model(x, t_bf):
        s = flow.expand(t_bf / 1000, x)
        return (s - (1 - s) * 0.25) / ((1 - s) ** 2 * 0.25 + s**2) * x

    fine = sampler.sample_euler(model, _noise(), flow.euler_sigmas(2000))
    np.testing.assert_allclose(fine, 0.5 * _noise(), atol=5e-3)
    errors = []
    for n in (30, 60, 120):
        few = sample_unipc(model, _noise(), unipc.unipc_table(unipc.unipc_sigmas(n)))
        errors.append(float(jnp.abs(few - 0.5 * _noise()).max()))
    # few steps: the last one, of order 1, from a sigma near 5/n to 0; many steps: the timestep
    # being told as an integer
    assert errors[0] < 0.06 and max(errors[1:]) < 0.01, errors


def test_guidance():
    cond, uncond = jnp.array([1.0, 2.0]), jnp.array([0.0, 5.0])
    np.testing.assert_allclose(sampler.guidance(cond, uncond, 3.0), [3.0, -4.0])
    np.testing.assert_allclose(sampler.guidance(cond, uncond, 1.0), cond)
    np.testing.assert_allclose(sampler.guidance(cond, uncond, 0.0), uncond)
    # cond + 3 (cond - uncond), as distillation writes it, is scale 4
    np.testing.assert_allclose(sampler.guidance(cond, uncond, 4.0), cond + 3 * (cond - uncond))


def test_guided_calls_both_models():
    calls = []

    def model(name, value):
        return lambda x, t: calls.append(name) or jnp.full_like(x, value)

    x, t = jnp.zeros(SHAPE), jnp.zeros(SHAPE[:2])
    assert (sampler.guided(model("cond", 2.0), model("uncond", 1.0), 3.0)(x, t) == 4.0).all()
    assert calls == ["cond", "uncond"]


def test_a_module_can_be_the_model_under_jit():
    layer = nnx.Linear(5, 5, rngs=nnx.Rngs(0))
    graph, state = nnx.split(layer)
    run = jax.jit(
        lambda state, noise: _samplers()["unipc"](lambda x, t: nnx.merge(graph, state)(x), noise)
    )
    np.testing.assert_allclose(
        run(state, _noise()), _samplers()["unipc"](lambda x, t: layer(x), _noise()), atol=1e-5
    )


def test_negative_prompt():
    phrases = sampler.NEGATIVE_PROMPT.split("，")
    assert len(phrases) == 28 and phrases[0] == "色调艳丽" and phrases[-1] == "倒着走"
    assert "JPEG压缩残留" in phrases

"""What the backward pass keeps: less and less memory, and no attention kernel twice."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from chameleon_jax.attention import core
from chameleon_jax.models.dit import DiTConfig, bidirectional_forward
from chameleon_jax.models.remat import POLICIES, remat_name, rematerialized
from tests.tiny_dit import CONFIG, prompt, tiny_dit


@pytest.mark.slow
def test_each_policy_needs_less_memory_than_the_one_before():
    """Bytes beside inputs and outputs, of a gradient as XLA plans it."""
    z, t_bf = jnp.ones((1, 6, 8, 8, 4)), jnp.full((1, 4), 500.0)
    needed = {}
    for name in ("none", "dots", "attention", "full"):
        graph, params = nnx.split(tiny_dit(remat=name, scan_layers=True, layers=4))

        def loss(params, graph=graph):
            dit = nnx.merge(graph, params)
            text_kv = dit.text_kv(prompt())
            return jnp.square(bidirectional_forward(dit, z[:, :2], z[:, 2:], t_bf, text_kv)).sum()

        compiled = jax.jit(jax.grad(loss)).lower(params).compile()
        needed[name] = compiled.memory_analysis().temp_size_in_bytes
    assert list(needed) == list(POLICIES)
    assert needed["none"] > 1.5 * needed["dots"]
    assert needed["dots"] > needed["attention"] > needed["full"]


@pytest.mark.parametrize(
    ("backend", "forward", "backward"),
    [
        ("cudnn", "dot_product_attention_fwd", "dot_product_attention_bwd"),
        ("splash", "splash_mha_fwd", "splash_mha_dkv"),
    ],
)
def test_attention_runs_once_where_its_output_is_kept(monkeypatch, backend, forward, backward):
    monkeypatch.setattr(core, "_installed", lambda name: True)
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: True)
    x = jnp.ones((1, 128, 2, 128), jnp.bfloat16)
    count = {}
    for name in POLICIES:

        def block(q, k, v):
            return jnp.sin(core.attention(jnp.sin(q), k, v, backend=backend))

        def loss(*qkv, name=name):
            return rematerialized(block, name)(*qkv).astype(jnp.float32).sum()

        kernels = list(calls(jax.make_jaxpr(jax.grad(loss))(x, x, x)))
        assert sum(kernel.startswith(backward) for kernel in kernels) == 1
        count[name] = sum(kernel.startswith(forward) for kernel in kernels)
    assert count == {"none": 1, "dots": 2, "attention": 1, "full": 2}


def calls(program) -> Iterator[str]:
    """Names of what a program calls and uses: what has no output is thrown away by the compiler."""
    for equation in program.eqns:
        if not equation.outvars:
            continue
        yield equation.params.get("name") or equation.primitive.name
        if equation.primitive.name == "pallas_call":
            continue
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from calls(inner)


def test_earlier_configs_had_a_switch():
    assert DiTConfig(**(CONFIG.__dict__ | {"remat": True})).remat == "full"
    assert DiTConfig(**(CONFIG.__dict__ | {"remat": False})).remat == "none"
    assert remat_name("dots") == "dots"
    with pytest.raises(ValueError, match="remat is 'dot'; expected one of none, dots, attention"):
        DiTConfig(**(CONFIG.__dict__ | {"remat": "dot"}))

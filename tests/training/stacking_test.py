"""Blocks stored stacked: the same training, without a copy of all parameters in every step."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from ml_collections import ConfigDict

from chameleon_jax.models.dit import DiT, DiTConfig, bidirectional_forward
from chameleon_jax.sharding import make_mesh
from chameleon_jax.training import optim
from chameleon_jax.training.networks import Network
from chameleon_jax.training.stacking import stack, unstack
from chameleon_jax.training.tuning import Tuned, TunedLora, TunedStack, stored
from chameleon_jax.weights.params import save_params
from chameleon_jax.weights.random import fill_randomly

SIZES = DiTConfig(
    in_channels=4, width=64, ffn=256, heads=2, layers=4, text_width=16, text_length=4, remat="full"
)
Z, T_BF, TEXT = jnp.ones((1, 3, 2, 2, 4)), jnp.full((1, 3), 500.0), jnp.ones((1, 4, 16))


def network(*, scan: bool) -> Network:
    values = SIZES.__dict__ | {"scan_layers": scan}
    return Network(lambda rngs: DiT(DiTConfig(**values), rngs=rngs))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "dit.safetensors"
    module = nnx.eval_shape(network(scan=False).build, nnx.Rngs(0))
    fill_randomly(module, (0,))
    save_params(path, module)
    return path


def loss(dit) -> jax.Array:
    v = bidirectional_forward(dit, None, Z, T_BF, dit.text_kv(TEXT))
    return jnp.square(v).sum()


def compiled_step(tuned: Tuned, shapes):
    """Plain gradient descent in place."""

    def step(params):
        grads = jax.grad(lambda params: loss(tuned.bind(params)))(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)

    return jax.jit(step, donate_argnums=0).lower(shapes).compile()


def test_networks_that_scan_are_stored_stacked(file):
    plain, scanned = Tuned(network(scan=False)), stored(Tuned(network(scan=True)))
    assert stored(plain) is plain and isinstance(scanned, TunedStack)
    shapes = scanned.changing.shapes
    assert shapes["blocks.ffn.fc1.kernel"].shape == (4, 64, 256)
    assert shapes["head.proj.kernel"].shape == (64, 16)
    mesh = make_mesh({"data": 1, "fsdp": -1, "tensor": 1}, jax.devices()[:1])
    params = plain.changing.load(file)
    for loaded in (scanned.changing.load(file), scanned.changing.load(file, mesh=mesh)):
        assert {k: v.shape for k, v in loaded.items()} == {k: v.shape for k, v in shapes.items()}
        whole = scanned.whole(loaded)
        assert list(whole) == list(params)
        for name, value in params.items():
            np.testing.assert_array_equal(whole[name], value)
    key = jax.random.key(1)
    drawn, expected = unstack(scanned.changing.init(key)), plain.changing.init(key)
    for name, value in expected.items():
        np.testing.assert_array_equal(drawn[name], value)


def test_a_step_has_no_copy_of_the_blocks_and_does_the_same(file):
    results, needed = {}, {}
    tuned = Tuned(network(scan=True))
    for way in (tuned, stored(tuned)):
        params = way.changing.load(file)
        compiled = compiled_step(way, way.changing.shapes)
        needed[type(way)] = compiled.memory_analysis().temp_size_in_bytes
        results[type(way)] = way.whole(compiled(params))
    blocks = sum(leaf.size for name, leaf in tuned.changing.shapes.items() if "blocks" in name)
    assert needed[Tuned] - needed[TunedStack] > 0.6 * 4 * blocks
    for name, value in results[Tuned].items():
        np.testing.assert_allclose(results[TunedStack][name], value, atol=1e-5, rtol=1e-5)


def test_a_lora_is_stacked_too(file):
    by_block = TunedLora(network(scan=True), 4, 2.0)
    stacked = stored(by_block)
    assert stacked.added
    assert stacked.changing.shapes["blocks.ffn.fc1.lora_a"].shape == (4, 64, 4)
    key = jax.random.key(0)
    changing = {k: v + 0.1 for k, v in by_block.changing.init(key).items()}
    fixed = by_block.fixed.load(file)
    expected = loss(by_block.bind(changing, fixed))
    alone, whole = by_block.adapters(changing)["lora"], by_block.whole(changing, fixed)
    changing, fixed = stack(dict(changing)), stack(dict(fixed))
    np.testing.assert_allclose(loss(stacked.bind(changing, fixed)), expected, rtol=1e-5)
    assert stacked.adapters(changing)["lora"].keys() == alone.keys()
    for name, value in stacked.whole(changing, fixed).items():
        np.testing.assert_allclose(value, whole[name], rtol=1e-6)


def test_muon_takes_every_block_for_itself():
    config = ConfigDict(
        {
            "name": "muon",
            "momentum": 0.95,
            "b1": 0.9,
            "b2": 0.999,
            "eps": 1e-8,
            "weight_decay": 0.1,
            "clip": 1.0,
        }
    )
    optimizer = optim.make_optimizer(config, lambda step: 0.1)
    shapes = {"ffn.fc1.kernel": (6, 4), "ffn.fc1.bias": (4,), "modulation": (6, 4)}
    rng = np.random.default_rng(0)
    params = {
        f"blocks.{i}.{name}": jnp.asarray(rng.standard_normal(shape), jnp.float32)
        for i in range(3)
        for name, shape in shapes.items()
    }

    def after(params):
        state = optimizer.init({"dit": params})
        grads = jax.tree.map(lambda p: jnp.sin(3 * p), {"dit": params})
        updates, _ = optimizer.update(grads, state, {"dit": params})
        return optax.apply_updates({"dit": params}, updates)["dit"]

    stacked = unstack(after(stack(dict(params))))
    for name, value in after(params).items():
        np.testing.assert_allclose(stacked[name], value, rtol=1e-5, atol=1e-6)

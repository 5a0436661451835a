"""8-bit linear layers: the arithmetic, the layers and their names, what the programs compute."""

from __future__ import annotations

import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from chameleon_jax.config import load_config
from chameleon_jax.inference import Pipeline
from chameleon_jax.inference.pipeline import PipelineError
from chameleon_jax.models.dit import bidirectional_forward
from chameleon_jax.weights import lora
from chameleon_jax.weights.params import flat_params
from chameleon_jax.weights.quantize import (
    QUANTIZE,
    TYPES,
    QuantizedLinear,
    QuantizeError,
    is_quantized,
    quantize,
    quantized_dot,
    rounded,
)
from chameleon_jax.weights.tensors import WeightsError
from launch import cli, sample
from tests import tiny_dit
from tests.devices import run_on

ROOT = Path(__file__).parents[2]
BOTH = pytest.mark.parametrize("name", TYPES)
GREY = np.full((20, 20, 3), 128, np.uint8)
# Of one block; the keys and values of the text are made once per prompt, and stay.
LARGE = [f"self_attn.{x}" for x in "qkvo"] + ["cross_attn.q", "cross_attn.o", "ffn.fc1", "ffn.fc2"]


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def smoke(name: str, **kw) -> Pipeline:
    config = load_config(
        f"{ROOT}/configs/runway_tiny.py:smoke", ["video.height=32", "video.width=16"]
    )
    return Pipeline.random(config.to_dict() | {"quantize": name}, seed=1, **kw)


@BOTH
def test_every_row_uses_the_whole_range_and_is_off_by_half_a_step(name):
    dtype, largest = TYPES[name]
    x = normal(0, 5, 300) * np.asarray([[1e-6], [1], [1e6], [0], [3]], np.float32)
    numbers, scale = rounded(jnp.asarray(x), -1, name)
    assert (numbers.dtype, scale.shape) == (dtype, (5, 1))
    q = np.asarray(numbers, np.float32)
    rows = [0, 1, 2, 4]
    np.testing.assert_array_equal(np.abs(q).max(1)[rows], largest)
    assert not q[3].any() and scale[3, 0] == 1
    error = np.abs(q * np.asarray(scale) - x) / np.asarray(scale)
    # int8 has one step everywhere; e4m3 has three bits behind the leading one, and none below 2^-9.
    step = 1 if name == "int8" else np.maximum(np.abs(q) / 8, 2.0**-9)
    assert (error <= 0.5 * step * 1.001 + 1e-3).all()


@BOTH
def test_the_product_is_that_of_the_rounded_numbers(name):
    """Against float64: only sums are rounded, and for int8 they are exact."""
    x, w = normal(1, 2, 7, 64), normal(2, 64, 24)
    kernel, scale = rounded(jnp.asarray(w), 0, name)
    assert scale.shape == (1, 24)
    y = quantized_dot(jnp.asarray(x), kernel, scale[0], name)
    q, s = (np.asarray(z, np.float64) for z in rounded(jnp.asarray(x), -1, name))
    wide = np.asarray(kernel, np.float64) * np.asarray(scale, np.float64)
    np.testing.assert_allclose(y, q * s @ wide, rtol=1e-5, atol=1e-5)
    exact = x @ w
    relative = np.linalg.norm(y - exact) / np.linalg.norm(exact)
    assert 0.001 < relative < {"int8": 0.02, "fp8": 0.06}[name]


@BOTH
def test_the_large_layers_of_the_blocks_and_no_others_are_changed(name):
    dit = tiny_dit.tiny_dit()
    before = flat_params(dit)
    quantize(dit, name)
    after = flat_params(dit)
    kernels = {f"blocks.{i}.{layer}.kernel" for i in range(2) for layer in LARGE}
    assert {key for key, x in after.items() if x.dtype == TYPES[name][0]} == kernels
    scales = {f"{kernel}_scale" for kernel in kernels}
    assert after.keys() == before.keys() | scales
    for key, x in before.items():
        if key in kernels:
            assert after[key].shape == x.shape
            near = np.asarray(after[key], np.float32) * np.asarray(after[f"{key}_scale"])
            assert np.abs(near - x).max() < 0.04 * np.abs(np.asarray(x)).max()
        else:
            assert after[key] is x
    assert is_quantized(dit) and not is_quantized(tiny_dit.tiny_dit())
    quantize(dit, name)  # what is done is left alone
    assert all(flat_params(dit)[key] is x for key, x in after.items())


@pytest.mark.parametrize(("name", "bound"), [("int8", 0.03), ("fp8", 0.1)])
@pytest.mark.parametrize("scan", [False, True])
def test_the_network_says_nearly_the_same(name, bound, scan):
    dit = tiny_dit.tiny_dit(scan_layers=scan)
    z, t = tiny_dit.latents(1, 3), jnp.full((1, 3), 500.0)

    def forward(dit):
        return bidirectional_forward(dit, None, z, t, dit.text_kv(tiny_dit.prompt()))

    plain = forward(dit)
    quantize(dit, name)
    error = jnp.linalg.norm(forward(dit) - plain) / jnp.linalg.norm(plain)
    assert 1e-4 < error < bound


def test_a_lora_kept_apart_stays_in_full_precision_and_comes_before():
    change = lora.Change(normal(3, 60, 4), normal(4, 4, 96), 4.0)
    added = lora.Lora({"blocks.1.ffn.fc1": change})
    dit = tiny_dit.tiny_dit()
    lora.attach(dit, added)
    quantize(dit, "int8")
    layer = dit.blocks[1].ffn.fc1
    assert isinstance(layer, QuantizedLinear) and len(lora.lora_params(dit)) == 2
    x = jnp.asarray(normal(5, 9, 60))
    plain = tiny_dit.tiny_dit()
    quantize(plain, "int8")
    expected = plain.blocks[1].ffn.fc1(x) + x @ change.delta(1.0)
    np.testing.assert_allclose(layer(x), expected, rtol=1e-4, atol=1e-3)
    for put in (lora.attach, lora.merge):
        with pytest.raises(WeightsError, match=r"blocks.1.ffn.fc1 is quantized; add the LoRA bef"):
            put(plain, added)


def test_other_names_and_other_networks_are_refused():
    with pytest.raises(QuantizeError, match="quantize 'int4'; expected one of none, int8, fp8"):
        quantize(tiny_dit.tiny_dit(), "int4")
    with pytest.raises(QuantizeError, match="Linear has none of a transformer's layers"):
        quantize(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), "int8")
    with pytest.raises(PipelineError, match="quantize is 'int4'; expected one of none, int8, fp8"):
        smoke("int4")


def test_the_flag_knows_the_same_names():
    for name in QUANTIZE:
        assert cli.read(sample.define_flags, ["--quantize", name]).quantize == name
    with pytest.raises(cli.UsageError, match="int4': expected one of none, int8, fp8"):
        cli.read(sample.define_flags, ["--quantize", "int4"])


FOUR_DEVICES = """
import jax, numpy as np
from flax import nnx
from chameleon_jax.sharding import make_mesh, param_shardings, spec_of
from chameleon_jax.weights.params import flat_params
from chameleon_jax.weights.quantize import quantize
from tests.tiny_dit import tiny_dit

mesh = make_mesh({"fsdp": 2, "tensor": 2})
for name in ("int8", "fp8"):
    split, alone = (tiny_dit(width=64, ffn=128, heads=4, layers=1) for _ in range(2))
    state = nnx.state(split, nnx.Param)
    places = param_shardings(flat_params(split), mesh, min_size=1)
    for path, leaf in nnx.to_flat_state(state):
        leaf.set_value(jax.device_put(leaf.get_value(), places[".".join(map(str, path))]))
    nnx.update(split, state)
    quantize(split, name)
    quantize(alone, name)
    expected, scales = flat_params(alone), 0
    for key, x in flat_params(split).items():
        np.testing.assert_array_equal(np.asarray(x), np.asarray(expected[key]))
        assert x.sharding.spec == spec_of(key, x.shape, mesh, min_size=1), key
        scales += key.endswith("kernel_scale")
    assert scales == 8
print("equal")
"""


@pytest.mark.slow
def test_on_a_mesh_numbers_and_scales_lie_where_the_kernel_lay():
    run_on(4, FOUR_DEVICES)


PRODUCT = re.compile(r"dot_general .*: \(tensor<[\dx]+x(\w+)>, tensor<[\dx]+x(\w+)>\)")


@pytest.mark.parametrize(("name", "dtype"), [("int8", "i8"), ("fp8", "f8E4M3FN")])
def test_the_program_of_a_chunk_multiplies_8_bit_numbers(name, dtype):
    """As often as the plain one multiplies by a large kernel; abstract, as for another chip."""
    lowered = smoke(name, text=False).lower("chunk").as_text()
    plain = smoke("none", text=False).lower("chunk").as_text()
    pairs, others = PRODUCT.findall(lowered), PRODUCT.findall(plain)
    assert len(pairs) == len(others) and set(others) == {("f32", "f32")}
    # Two blocks of 8 layers denoise; the clean pass needs of its last block the keys and values.
    assert pairs.count((dtype, dtype)) >= 2 * len(LARGE)
    assert set(pairs) == {(dtype, dtype), ("f32", "f32")}


def test_a_stream_of_8_bit_layers_is_near_the_plain_one():
    plain, near = smoke("none"), smoke("int8")
    frames = []
    for pipeline in (plain, near):
        session = pipeline.session()
        session.start(GREY, GREY, "a", seed=2)
        frames.append(session.next_chunk().astype(int))
    assert 0 < np.abs(frames[0] - frames[1]).mean() < 2
    with pytest.raises(PipelineError, match="layers are int8 by now; save right after loading"):
        near.save("nowhere")


def test_weights_saved_with_the_option_are_whole_and_load_with_it(tmp_path):
    """The file has full precision; the 8-bit numbers are made when the programs are."""
    smoke("int8").save(tmp_path)
    loaded = Pipeline.from_pretrained(tmp_path)
    assert loaded.config.quantize == "int8" and not is_quantized(loaded.dit)
    assert loaded.stream.weights and is_quantized(loaded.dit)
    layer = loaded.dit.blocks[0].ffn.fc1
    assert layer.kernel.get_value().dtype == jnp.int8

"""Where parameters lie, and that it changes no result."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from chameleon_jax import sharding
from tests.devices import run_on


class FakeMesh:
    """Only the sizes: rules need no devices."""

    shape = {"data": 1, "fsdp": 4, "tensor": 2}  # noqa: RUF012


@dataclasses.dataclass(frozen=True)
class FakeChip:
    """What a device says of where it is."""

    id: int
    coords: tuple[int, ...]
    slice_index: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v6 lite"
    core_on_chip: int = 0

    @property
    def process_index(self) -> int:
        return self.id // 4


def chips(sides: tuple[int, ...], slices: int = 1, **about: str) -> list[FakeChip]:
    places = [(*place, 0) for place in itertools.product(*map(range, sides))]
    numbered = enumerate(itertools.product(range(slices), places))
    return [FakeChip(i, place, number, **about) for i, (number, place) in numbered]


@pytest.mark.parametrize("shape", [(1, 64, 4, 1), (1, 64, 2, 2), (2, 32, 4, 1), (1, 256, 1, 1)])
def test_a_torus_of_other_sides_than_the_mesh_is_split(shape):
    devices = chips((16, 16))
    made = sharding.in_order(shape, devices)
    assert made.shape == shape and set(made.flat) == set(devices)
    # Those that share the tokens of a clip lie within four by four chips.
    for group in made.reshape(-1, shape[2] * shape[3]):
        places = np.array([chip.coords[:2] for chip in group])
        assert (np.ptp(places, axis=0) <= 3).all()


def test_slices_lie_along_the_axes_of_samples():
    devices = chips((2, 2), slices=2)
    for shape, axis in (((2, 1, 2, 2), 0), ((1, 4, 2, 1), 1), ((4, 2, 1, 1), 0)):
        made = sharding.in_order(shape, devices)
        assert set(made.flat) == set(devices)
        for half, part in enumerate(np.split(made, 2, axis=axis)):
            assert {chip.slice_index for chip in part.flat} == {half}
    with pytest.raises(sharding.MeshError, match="make data or fsdp a multiple of 2"):
        sharding.in_order((1, 1, 4, 2), devices)


def test_hosts_with_gpus_keep_their_order():
    devices = chips((8,), slices=2, platform="gpu", device_kind="NVIDIA H200")
    made = sharding.in_order((1, 8, 1, 2), devices)
    assert [chip.id for chip in made.flat] == list(range(16))


@pytest.mark.parametrize(
    ("path", "shape", "expected"),
    [
        ("blocks.0.self_attn.q.kernel", (64, 128), P("fsdp", "tensor")),
        ("blocks.0.self_attn.o.kernel", (128, 64), P("tensor", "fsdp")),
        ("blocks.0.self_attn.q.kernel", (64, 129), P("fsdp", None)),  # not divisible: whole
        ("blocks.self_attn.q.kernel", (30, 64, 128), P(None, "fsdp", "tensor")),  # stacked layers
        ("blocks.0.self_attn.q.lora_a", (64, 128), P("fsdp", None)),
        ("blocks.0.self_attn.q.lora_b", (128, 64), P("fsdp", "tensor")),
        ("blocks.0.ffn.fc2.lora_a", (64, 128), P("tensor", "fsdp")),
        ("blocks.0.ffn.fc2.lora_b", (128, 64), P(None, "fsdp")),
        ("blocks.0.cross_attn.v.bias", (8192,), P("tensor")),
        ("encoder.conv.kernel", (3, 3, 3, 64, 128), P(None, None, None, None, "fsdp")),
        ("encoder.conv.kernel", (3, 3, 3, 128, 63), P(None, None, None, "fsdp", None)),
        ("patch.kernel", (81, 63), P()),  # nothing divides
        ("blocks.0.norm.scale", (64,), P()),  # small
    ],
)
def test_rules(path, shape, expected):
    assert sharding.spec_of(path, shape, FakeMesh()) == expected


def test_one_device_is_a_mesh_too():
    mesh = sharding.make_mesh({"data": 1, "fsdp": -1, "tensor": 1}, jax.devices()[:1])
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "seq": 1, "tensor": 1}


def test_wrong_meshes_are_refused():
    one = jax.devices()[:1]
    with pytest.raises(sharding.MeshError, match="does not fit 1 devices"):
        sharding.make_mesh({"data": 2, "fsdp": 1, "tensor": 1}, one)
    with pytest.raises(sharding.MeshError, match="at most one -1"):
        sharding.make_mesh({"data": -1, "fsdp": -1, "tensor": 1}, one)
    with pytest.raises(sharding.MeshError, match="expected data, fsdp, seq, tensor"):
        sharding.make_mesh({"data": 1, "rows": 1}, one)
    assert sharding.make_mesh({}, one).size == 1  # what is not named is 1


def test_what_does_not_divide_is_named():
    mesh = FakeMesh()
    mesh.shape = {"data": 1, "fsdp": 1, "seq": 2, "tensor": 3}
    sharding.check_network(24, 880, mesh)
    with pytest.raises(sharding.MeshError, match="16 attention heads .* seq x tensor = 6 devices"):
        sharding.check_network(16, 880, mesh)
    with pytest.raises(sharding.MeshError, match=r"35 tokens .* mesh\.seq = 2; choose"):
        sharding.check_network(24, 35, mesh)


FOUR_DEVICES = """
import jax, numpy as np, pytest
from chameleon_jax import sharding
from chameleon_jax.keys import training_key
from tests.training import toy

assert len(jax.devices()) == 4
jax.config.update("jax_default_matmul_precision", "highest")
sharding.MIN_SIZE = 0
stage = toy.stage(toy.config("", 8))
step = stage.steps["toy"]

def run(sizes, count):
    mesh = sharding.make_mesh(sizes, jax.devices()[:count])
    state = stage.init({"toy": stage.trained["toy"].init(training_key(0, "init"))})
    placement = sharding.param_shardings(state, mesh, min_size=0)
    state = jax.device_put(state, placement)
    jitted = jax.jit(step, out_shardings=(placement, sharding.replicated(mesh)), donate_argnums=0)
    feed = toy.ToyFeed()
    for _ in range(4):
        state, metrics = jitted(state, {}, sharding.put_batch(next(feed), mesh))
    return state

whole = run({"data": 1, "fsdp": 1, "tensor": 1}, 1)
for sizes in ({"data": 1, "fsdp": 4, "tensor": 1}, {"data": 2, "fsdp": 2, "tensor": 1}):
    split = run(sizes, 4)
    kernel = split.params["toy"]["layers.0.kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (16, 64 // sizes["fsdp"]), kernel.sharding
    moment = split.opt_state[1][0].nu["toy"]["layers.0.kernel"]
    assert moment.sharding.shard_shape(moment.shape) == (16, 64 // sizes["fsdp"]), moment.sharding
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(split), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-5, atol=1e-6)
    for a, b in zip(jax.tree.leaves(sharding.to_host(split)), jax.tree.leaves(split), strict=True):
        assert type(a) is np.ndarray
        np.testing.assert_array_equal(a, b)
mesh = sharding.make_mesh({"data": 1, "fsdp": 4, "tensor": 1})
with pytest.raises(sharding.MeshError, match="a batch of 6 does not divide among data x fsdp = 4"):
    sharding.put_batch({"x": np.zeros((6, 2))}, mesh)
print("equal")
"""


def test_four_devices_compute_what_one_does():
    run_on(4, FOUR_DEVICES)


def test_batches_are_split_over_data_and_fsdp():
    mesh = sharding.make_mesh({"data": 1, "fsdp": -1, "tensor": 1}, jax.devices()[:1])
    placed = sharding.put_batch({"x": np.arange(6).reshape(3, 2)}, mesh)["x"]
    assert placed.sharding.spec == sharding.BATCH
    np.testing.assert_array_equal(placed, np.arange(6).reshape(3, 2))


EIGHT_DEVICES = """
import functools
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from chameleon_jax import sharding
from chameleon_jax.attention.policies import Ring
from chameleon_jax.models import dit as networks
from tests import tiny_dit

jax.config.update("jax_default_matmul_precision", "highest")
policy = Ring(frames=8, positions="relative")
latents = functools.partial(tiny_dit.latents, batch=2)
context, clean, noisy = latents(0, 2), latents(1, 6), latents(2, 6)
t_bf, text = jnp.full((2, 6), 700.0), tiny_dit.prompt(2)
graph, state = nnx.split(tiny_dit.tiny_dit(heads=6, remat="full"))
forwards = {
    "bidirectional": lambda d, kv: networks.bidirectional_forward(d, context, noisy, t_bf, kv),
    "teacher forcing": lambda d, kv: networks.teacher_forcing_forward(
        d, context, clean, noisy, t_bf, kv, policy=policy
    ),
    "self-forcing": lambda d, kv: networks.self_forcing_forward(
        d, context, clean, noisy, t_bf, kv, policy=policy
    ),
}

def differentiate(forward, mesh):
    def loss(state):
        dit = nnx.merge(graph, state)
        return jnp.square(forward(dit, dit.text_kv(text))).mean()

    everywhere = sharding.replicated(mesh)
    with sharding.activations_over(mesh):
        step = jax.jit(jax.value_and_grad(loss), in_shardings=everywhere)
        compiled = step.lower(state).compile()
    return compiled(jax.device_put(state, everywhere)), compiled.as_text()

for name, forward in forwards.items():
    (value, grads), _ = differentiate(forward, sharding.make_mesh({}, jax.devices()[:1]))
    for sizes in ({"seq": 2, "tensor": 3}, {"seq": 3, "fsdp": 2}, {"data": 2, "tensor": 3}):
        mesh = sharding.make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
        (split_value, split_grads), text_of = differentiate(forward, mesh)
        np.testing.assert_allclose(split_value, value, rtol=1e-5)
        for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(split_grads), strict=True):
            np.testing.assert_allclose(np.asarray(b), np.asarray(a), atol=1e-5, err_msg=name)
        # From tokens to heads and back; the compiler chooses by which collective.
        moved = [word in text_of for word in ("all-to-all", "all-gather", "collective-permute")]
        assert any(moved) or sizes.get("seq", 1) == 1, (name, sizes)
print("equal")
"""


@pytest.mark.slow
def test_tokens_and_heads_over_devices_compute_what_one_does():
    run_on(8, EIGHT_DEVICES)


VAE_OVER_DEVICES = """
import math, re
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from chameleon_jax import sharding
from chameleon_jax.models.vae import Vae, VaeConfig

config = VaeConfig(
    z_dim=4, enc_width=16, dec_width=16, width_mult=(1, 2, 2), enc_blocks=1, dec_blocks=1,
    temporal_down=(True, True), conv=CONV,
)
vae = Vae(config, rngs=nnx.Rngs(0))
graph, state = nnx.split(vae)
x = jax.random.uniform(jax.random.key(0), (8, 5, 32, 32, 3), minval=-1)

def run(state, x):
    vae = nnx.merge(graph, state)
    return vae.decode(vae.encode(x)[..., :4], clamp=False)

expected = jax.jit(run)(state, x)
mesh = sharding.make_mesh({"data": 2, "fsdp": 4}, jax.devices())
places = jax.tree.map(
    lambda leaf: sharding.NamedSharding(mesh, sharding.spec_of("kernel", leaf.shape, mesh)), state
)
assert any("fsdp" in place.spec for place in jax.tree.leaves(places))
batch = sharding.NamedSharding(mesh, sharding.BATCH)
with sharding.activations_over(mesh):
    compiled = jax.jit(run, in_shardings=(places, batch)).lower(state, x).compile()
made = compiled(jax.device_put(state, places), jax.device_put(x, batch))
np.testing.assert_allclose(made, expected, atol=1e-4)
assert made.sharding.spec[0] == sharding.SAMPLES
# What is gathered are kernels, never the activations of other devices' samples.
largest = max(leaf.size for leaf in jax.tree.leaves(state))
shapes = re.findall(r"= f32\\[([0-9,]+)\\][^=]*? all-gather", compiled.as_text())
sizes = [math.prod(map(int, shape.split(","))) for shape in shapes]
assert sizes and max(sizes) <= largest, (max(sizes), largest)
print("equal")
"""


@pytest.mark.slow
@pytest.mark.parametrize("conv", ["conv3d", "stacked", "columns"])
def test_the_vae_over_devices_moves_kernels_and_no_videos(conv):
    run_on(8, VAE_OVER_DEVICES.replace("CONV", repr(conv)))

"""Eight devices: a state is restored on any mesh, and no network is ever whole on one device."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import devices

MESHES = """
import sys, pathlib
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from chameleon_jax import sharding
from chameleon_jax.training import about
from chameleon_jax.training.checkpoints import Checkpoints

folder = pathlib.Path(sys.argv[1])
rng = np.random.default_rng(0)
values = {
    "params": {"a.kernel": rng.normal(size=(16, 24)).astype(np.float32)},
    "moments": (rng.normal(size=(8, 3, 16)).astype(jnp.bfloat16), rng.random(8) < 0.5),
    "step": np.int32(7),
    "key": np.asarray(jax.random.key_data(jax.random.key(3))),
}
specs = {
    "params": {"a.kernel": P("fsdp", "tensor")}, "moments": (P("fsdp", None, "tensor"), P("fsdp")),
    "step": P(), "key": P(),
}
leaf = lambda node: isinstance(node, P)

def places(count):
    sizes = {"data": 1, "fsdp": -1, "tensor": 2 if count > 1 else 1}
    mesh = sharding.make_mesh(sizes, jax.devices()[:count])
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=leaf)

digests = set()
for saved in (1, 2, 4, 8):
    state = jax.tree.map(jax.device_put, values, places(saved))
    with Checkpoints(folder / str(saved)) as checkpoints:
        checkpoints.save(1, state, {"stage": "x", "config": {}, "data": {}})
    arrays = about.read_about(folder / str(saved), 1, "x")["arrays"]
    digests.add(tuple(arrays.items()))
    for wanted in (1, 2, 4, 8):
        like = jax.tree.map(
            lambda v, place: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=place),
            values, places(wanted),
        )
        with Checkpoints(folder / str(saved), read_only=True) as checkpoints:
            step, found, _ = checkpoints.restore_newest(like, "x", strict=True)
        pairs = zip(*map(jax.tree.leaves, (values, found, like)), strict=True)
        for expected, array, shape in pairs:
            assert array.sharding == shape.sharding, (saved, wanted)
            assert np.asarray(array).tobytes() == expected.tobytes(), (saved, wanted)
assert len(digests) == 1, digests  # they do not depend on the mesh
print("equal")
"""

SHARDS = """
import sys, pathlib
import jax, numpy as np
from chameleon_jax import sharding
from chameleon_jax.config import load_config
from chameleon_jax.keys import training_key
from chameleon_jax.training import loop
from chameleon_jax.training.networks import build_network
from chameleon_jax.training.stage import simple_stage
from chameleon_jax.weights import params as reading
from chameleon_jax.weights.params import save_params

def held():
    "Most bytes on a device; a part is also an array of its own, in the same place."
    buffers = {}
    for array in jax.live_arrays():
        for shard in array.addressable_shards:
            where = shard.device, shard.data.unsafe_buffer_pointer()
            buffers[where] = max(shard.data.nbytes, buffers.get(where, 0))
    counts = dict.fromkeys(jax.devices(), 0)
    for (device, _), size in buffers.items():
        counts[device] += size
    return max(counts.values())

config = load_config("configs/teacher_forcing.py:runway_tiny")
network = build_network("dit", config)
mesh = sharding.make_mesh(config.mesh)
whole = sum(4 * int(np.prod(s.shape)) for s in network.shapes.values())
places = sharding.param_shardings(network.shapes, mesh)
part = sum(
    4 * int(np.prod(places[name].shard_shape(s.shape))) for name, s in network.shapes.items()
)
assert dict(mesh.shape)["fsdp"] == 8 and part < whole / 7

file = pathlib.Path(sys.argv[1]) / "dit.safetensors"
params = network.init(jax.random.key(0))
save_params(file, network.bind(params))
del params
assert held() == 0

# Read: on the way, too, no device holds more than its part.
seen, count = [], 0
place = reading._place
def watched(*given):
    global count
    array = place(*given)
    count += 1
    if count % 16 == 0:
        seen.append(held())
    return array
reading._place = watched
params = network.load(file, mesh=mesh)
assert count == len(network.shapes) and max(seen) <= part, (max(seen), part)
del params

# Random: the same.
params = loop._random(network, jax.random.key(0), mesh)
assert held() <= part
for name, array in params.items():
    assert array.sharding == places[name]
del params

# The state before the first step: parameters, their average, one moment; the parameters that were
# placed are used again, not copied.
def loss(params, frozen, batch, key):
    raise AssertionError("not called")

stage = simple_stage(
    config, "dit", trained={"dit": network}, weights={"dit": file}, loss=loss, preview=None,
    batches=None, eval_batches=None,
)
like = loop.blueprint(stage, mesh)
state_part = sum(
    leaf.dtype.itemsize * int(np.prod(leaf.sharding.shard_shape(leaf.shape)))
    for leaf in jax.tree.leaves(like)
)
state = loop.first_state(config, stage, like, mesh)
assert held() <= state_part + part / 10, (held(), state_part)
outs = jax.tree.map(lambda leaf: leaf.sharding, like)
given = {
    name: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=places[name])
    for name, s in network.shapes.items()
}
init = jax.jit(stage.init, out_shardings=outs, donate_argnums=0)
memory = init.lower({"dit": given}).compile().memory_analysis()
assert memory.alias_size_in_bytes == part and memory.temp_size_in_bytes < part / 10, memory
print("parts")
"""


def run_on_eight(program: str, folder: Path) -> str:
    done = devices.start(8, "-c", program, folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


def test_a_state_is_restored_on_any_mesh(tmp_path):
    assert run_on_eight(MESHES, tmp_path) == "equal"


@pytest.mark.slow
def test_no_network_is_whole_on_one_device(tmp_path):
    assert run_on_eight(SHARDS, tmp_path) == "parts"

"""Programs traced from shapes alone, on the devices of this machine in the place of a target's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from chameleon_jax import sharding
from chameleon_jax.config import load_config
from chameleon_jax.inference import Pipeline
from chameleon_jax.targets import programs
from chameleon_jax.targets.machines import TargetError
from chameleon_jax.training.ahead import batch_shapes
from chameleon_jax.training.flops import count_jaxpr

STAGES = {
    "teacher": ["teacher"],
    "teacher_forcing": ["teacher_forcing"],
    "consistency": ["consistency"],
    "dmd": ["critic", "both", "critic 1+1", "both 1+1"],
}


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh({}, jax.devices()[:1])


@pytest.mark.parametrize("stage", STAGES)
def test_the_steps_of_a_stage_are_traced_without_any_file(stage, mesh):
    config = load_config(f"configs/{stage}.py:smoke")
    assert sorted(programs.names(config)) == sorted(STAGES[stage])
    made = programs.of_stage(config, mesh)
    traced = made.traced[STAGES[stage][0]]()
    flops = count_jaxpr(traced.jaxpr)
    assert flops.model > 0
    assert not flops.unknown
    assert made.resident == {}


def test_a_batch_has_the_labels_that_the_loss_reads(mesh):
    overrides = ["data.labels=('labels','origin')", "loss.garment=3.0", "loss.labels=.1"]
    config = load_config("configs/teacher_forcing.py:smoke", [*overrides, "loss.labels_layer=0"])
    batch = batch_shapes(config, mesh)
    assert {"ids", "mask"} < set(batch) and "text" not in batch
    b, f, h, w, _ = batch["z_video"].shape
    assert batch["labels"].shape == (b, f, h, w, 5) and batch["labels"].dtype == jnp.uint8
    assert batch["origin"].shape == (b, f, h, w, 2) and batch["origin"].dtype == jnp.uint8
    made = programs.of_stage(config, mesh)
    assert count_jaxpr(made.traced["teacher_forcing"]().jaxpr).model > 0


def test_the_config_is_not_changed(mesh):
    config = load_config("configs/teacher.py:smoke")
    before = config.to_dict()
    programs.of_stage(config, mesh)
    assert config.to_dict() == before


def test_a_stage_that_reads_pixels_is_refused():
    with pytest.raises(TargetError, match="'vae' reads pixels; targets knows teacher"):
        programs.names(load_config("configs/vae.py:smoke"))


def test_what_is_resident_is_what_a_pipeline_holds(mesh):
    config = load_config("configs/runway_tiny.py:smoke")
    made = programs.of_stream(config, mesh)
    assert list(made.traced) == programs.names(config)
    pipeline = Pipeline.random(config)
    for name, weights in pipeline.media.weights.items():
        assert made.resident[name] == sum(leaf.nbytes for leaf in jax.tree.leaves(weights))
    cache = pipeline.stream.new_cache()
    assert made.resident["cache"] == sum(leaf.nbytes for leaf in jax.tree.leaves(cache))


def test_bytes_of_a_device_are_those_of_its_shard():
    place = jax.sharding.NamedSharding(
        sharding.make_mesh({}, jax.devices()[:1]), jax.sharding.PartitionSpec("tensor")
    )
    split = jax.ShapeDtypeStruct((4, 3), jnp.bfloat16, sharding=place)
    assert programs.device_bytes([split, jax.ShapeDtypeStruct((5,), jnp.float32)]) == 24 + 20

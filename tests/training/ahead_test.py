"""Steps that are compiled ahead: the same bits, and refused where they were made for others."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from chameleon_jax import sharding
from chameleon_jax.training import ahead, loop
from chameleon_jax.training.ahead import AheadError, Step
from tests.training import toy

OPTIONS = {"xla_backend_optimization_level": 1}


def make_step(**changes) -> tuple[Step, object]:
    """The step of the toy stage, and the state that it begins with."""
    config = toy.config("", 4)
    config.update(changes)
    mesh = sharding.make_mesh(config.mesh)
    stage = toy.stage(config)
    place = NamedSharding(mesh, sharding.BATCH)
    batch = {
        name: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=place)
        for name, value in next(toy.ToyFeed()).items()
    }
    step = Step.of(stage, "toy", config, batch, mesh)
    return step, loop.first_state(config, stage, step.like, mesh)


def train(ready: ahead.Ready, step: Step, state) -> tuple[list[np.ndarray], dict[str, float]]:
    """The arrays after three steps, and the last metrics."""
    feed = toy.ToyFeed()
    for _ in range(3):
        batch = {
            name: jax.device_put(value, step.batch[name].sharding)
            for name, value in next(feed).items()
        }
        state, metrics = ready(state, {}, batch)
    return [np.asarray(x) for x in jax.tree.leaves(state)], jax.device_get(metrics)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    step, _ = make_step()
    ready, path = step.compile(OPTIONS), tmp_path_factory.mktemp("steps") / "toy.step"
    ahead.save(path, step, ready, OPTIONS)
    return path, ready


def test_a_loaded_step_computes_the_same_bits(stored):
    path, compiled = stored
    step, state = make_step()
    loaded = ahead.load(path, step, OPTIONS)
    assert loaded.flops == compiled.flops and loaded.flops.model > 0
    one, metrics = train(compiled, step, make_step()[1])
    two, others = train(loaded, step, state)
    assert len(one) == len(two) > 8
    assert all(a.tobytes() == b.tobytes() for a, b in zip(one, two, strict=True))
    assert metrics == others and metrics["loss"] > 0
    start = [np.asarray(x) for x in jax.tree.leaves(make_step()[1])]
    assert any((a != b).any() for a, b in zip(one, start, strict=True))  # the steps did something


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schedule": {"peak": 2e-2}}, "config '"),
        ({"optimizer": {"by_clock": True}}, "config '"),
        ({"ema": {"decay": 0.0}}, "config '"),
    ],
)
def test_a_step_of_another_config_is_refused(stored, change, message):
    with pytest.raises(AheadError, match=message):
        ahead.load(stored[0], make_step(**change)[0], OPTIONS)


def test_other_batches_are_refused(stored):
    step, _ = make_step()
    x = step.batch["x"]
    more = jax.ShapeDtypeStruct((16, *x.shape[1:]), jnp.float32, sharding=x.sharding)
    with pytest.raises(AheadError, match="config '"):
        ahead.load(stored[0], dataclasses.replace(step, batch=step.batch | {"x": more}), OPTIONS)


def test_other_options_are_refused(stored):
    with pytest.raises(AheadError, match="options"):
        ahead.load(stored[0], make_step()[0], {})


@pytest.mark.parametrize("name", ["format", "jax", "jaxlib", "platform", "chip", "source"])
def test_a_step_made_elsewhere_is_refused(stored, tmp_path, name):
    line, _, rest = stored[0].read_bytes().partition(b"\n")
    head = json.loads(line)
    other = tmp_path / "other.step"
    other.write_bytes(json.dumps(head | {name: "others"}).encode() + b"\n" + rest)
    with pytest.raises(AheadError) as raised:
        ahead.load(other, make_step()[0], OPTIONS)
    assert str(raised.value) == (
        f"{other}: made for {name} 'others' instead of {head[name]!r}; compile it again with these"
    )


def test_broken_files_are_refused(stored, tmp_path):
    step, _ = make_step()
    content = stored[0].read_bytes()
    for name, part, message in (
        ("none", None, "no such file"),
        ("empty", b"", "not a compiled step"),
        ("cut", content[: len(content) // 2], "cannot be loaded"),
        ("noise", content.partition(b"\n")[0] + b"\nnoise", "cannot be loaded"),
    ):
        path = tmp_path / name
        if part is not None:
            path.write_bytes(part)
        with pytest.raises(AheadError, match=message):
            ahead.load(path, step, OPTIONS)


def test_the_source_counts():
    digest = ahead.source_digest()
    assert len(digest) == 16 and int(digest, 16) >= 0

"""The ways to fine-tune: what changes, what is stored, and what is exported."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from chameleon_jax.config import ConfigError, load_config
from chameleon_jax.models.dit import bidirectional_forward
from chameleon_jax.training import loop
from chameleon_jax.training.export import export
from chameleon_jax.training.networks import build_network
from chameleon_jax.training.run import run
from chameleon_jax.training.stages import make_stage
from chameleon_jax.training.tuning import fixed_name, tune
from chameleon_jax.weights.lora import Lora, merge
from chameleon_jax.weights.params import WeightsError, save_params
from chameleon_jax.weights.random import fill_randomly
from chameleon_jax.weights.tensors import read_tensors
from tests.training.toy import ToyFeed

MODES = ("full", "attention", "lora")
CHANGED = {
    "full": lambda name: True,
    "attention": lambda name: ".self_attn." in name,
    "lora": lambda name: name.startswith("blocks.") and name.endswith(".kernel"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with random weights of the small networks; nothing is zero."""
    folder = tmp_path_factory.mktemp("base")
    config = settings(folder, "full")
    for name in ("dit", "text"):
        module = nnx.eval_shape(build_network(name, config).build, nnx.Rngs(0))
        fill_randomly(module, (0,))
        save_params(folder / f"{name}.safetensors", module)
    return folder


def noise(seed: int, shape) -> jax.Array:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def settings(base, mode: str, *overrides: str, workdir="unused"):
    given = [
        f"workdir={workdir}",
        "data.dir=y",
        f"init_from={base}",
        f"weights.text={base}",
        "train.text=false",
        "train.preview_every=0",
        "train.eval_every=0",
        "schedule.warmup=0",
        f"tune.mode={mode}",
        "tune.rank=4",
        "tune.alpha=2",
        "model.dit.layers=1",
    ]
    return load_config("configs/teacher.py:smoke", [*given, *overrides])


@functools.cache
def batch() -> dict[str, jax.Array]:
    z = noise(7, (2, 5, 4, 4, 4))
    return {
        "z_reference": z[:, :1],
        "z_garment": z[:, 1:2],
        "z_video": z[:, 2:],
        "ids": np.ones((2, 16), np.int32),
        "mask": np.ones((2, 16), bool),
    }


@jax.jit
def forward(dit) -> jax.Array:
    z, t_bf = noise(8, (1, 5, 4, 4, 4)), jnp.array([[900.0, 500.0, 20.0]])
    text_kv = dit.text_kv(noise(9, (1, 16, 16)))
    return bidirectional_forward(dit, z[:, :2], z[:, 2:], t_bf, text_kv)


def start(base, mode: str, *overrides: str):
    """(the tuned network, its changing parameters, its fixed ones) before the first step."""
    tuned = tune("dit", settings(base, mode, *overrides))
    if mode == "lora":
        changing = tuned.changing.init(jax.random.key(3))
    else:
        changing = tuned.changing.load(base / "dit.safetensors")
    return tuned, changing, tuned.fixed and tuned.fixed.load(base / "dit.safetensors")


def after_steps(base, mode: str, count: int = 2):
    """(stage, state, frozen parameters) after some steps of the teacher."""
    stage = make_stage(settings(base, mode))
    frozen = {name: net.load(stage.weights[name]) for name, net in stage.frozen.items()}
    params = {
        name: net.load(stage.weights[name])
        if name in stage.weights
        else net.init(jax.random.key(3))
        for name, net in stage.trained.items()
    }
    state = stage.init(params)
    step = jax.jit(stage.steps["teacher"])
    for _ in range(count):
        state, metrics = step(state, frozen, batch())
        assert np.isfinite(metrics["loss"])
    return stage, state, frozen


@pytest.mark.parametrize("scan", ["false", "true"])
@pytest.mark.parametrize("mode", ["attention", "lora"])
def test_training_starts_from_the_base_to_the_bit(base, mode, scan):
    tuned, changing, fixed = start(base, mode, f"train.scan_layers={scan}")
    plain = build_network("dit", settings(base, "full", f"train.scan_layers={scan}"))
    expected = forward(plain.bind(plain.load(base / "dit.safetensors")))
    assert expected.std() > 0.1
    np.testing.assert_array_equal(forward(tuned.bind(changing, fixed)), expected)


@pytest.mark.parametrize("mode", MODES)
def test_only_what_the_mode_says_changes(base, mode):
    stage, state, frozen = after_steps(base, mode)
    before = read_tensors(base / "dit.safetensors")
    after = stage.exported(state, frozen)["dit"]
    assert list(after) == list(build_network("dit", settings(base, "full")).shapes)
    changed = {name for name, value in after.items() if not np.array_equal(value, before[name])}
    assert changed == {name for name in before if CHANGED[mode](name)}


@pytest.mark.parametrize("mode", MODES)
def test_state_has_nothing_for_what_does_not_change(base, mode):
    stage, state, _ = after_steps(base, mode, 0)
    sizes = {name: leaf.size for name, leaf in stage.trained["dit"].shapes.items()}
    count = sum(sizes.values())
    whole = sum(leaf.size for leaf in build_network("dit", settings(base, "full")).shapes.values())
    assert count == whole if mode == "full" else 0 < count < whole
    # Masters, two moments of Adam and the average, all float32, and a few counters.
    arrays = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert sum(leaf.nbytes for leaf in arrays) == 4 * 4 * count
    paths = jax.tree_util.tree_flatten_with_path(state.opt_state)[0]
    named = {str(path[-1].key) for path, leaf in paths if leaf.ndim}
    assert named == set(sizes)


def test_what_is_fixed_is_kept_once_in_the_computing_dtype(base):
    for mode in ("attention", "lora"):
        tuned, changing, fixed = start(base, mode, "dtype=bfloat16")
        assert {value.dtype for value in fixed.values()} == {jnp.dtype(jnp.bfloat16)}
        assert {value.dtype for value in changing.values()} == {jnp.dtype(jnp.float32)}
        assert not set(changing) & set(fixed)
        assert forward(tuned.bind(changing, fixed)).dtype == jnp.bfloat16


@pytest.mark.parametrize("scan", ["false", "true"])
def test_a_lora_is_exported_merged_and_alone(base, tmp_path, scan):
    tuned, changing, fixed = start(base, "lora", f"train.scan_layers={scan}")
    changing = {name: value + 0.1 * noise(5, value.shape) for name, value in changing.items()}
    trained = forward(tuned.bind(changing, fixed))
    plain = build_network("dit", settings(base, "full"))
    before = plain.bind(plain.load(base / "dit.safetensors"))
    assert jnp.abs(trained - forward(before)).max() > 0.1
    merged = forward(plain.bind(tuned.whole(changing, fixed)))
    np.testing.assert_allclose(merged, trained, atol=1e-5)

    config = settings(base, "lora", f"train.scan_layers={scan}")
    stage = make_stage(config)
    frozen = {fixed_name("dit"): fixed}
    files = stage.exported(stage.init({"dit": changing}), frozen)
    export(tmp_path, files, stage, config)
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json",
        "dit.safetensors",
        "lora.safetensors",
        "text.safetensors",
    }
    stored = plain.bind(plain.load(tmp_path / "dit.safetensors"))
    np.testing.assert_array_equal(forward(stored), merged)
    merge(before, Lora.load(tmp_path / "lora.safetensors"))
    np.testing.assert_allclose(forward(before), trained, atol=1e-5)


def test_a_lora_can_be_gone_on_with(base, tmp_path):
    """Also one of another alpha: the product stays the same."""
    tuned, changing, fixed = start(base, "lora")
    changing = {name: value + 0.1 * noise(5, value.shape) for name, value in changing.items()}
    config = settings(base, "lora")
    stage = make_stage(config)
    files = stage.exported(stage.init({"dit": changing}), {fixed_name("dit"): fixed})
    export(tmp_path, files, stage, config)
    for alpha in ("2", "8"):
        config = settings(base, "lora", f"tune.alpha={alpha}", f"tune.lora={tmp_path}")
        stage = make_stage(config)
        other = tune("dit", config)
        loaded = other.changing.load(stage.weights["dit"])
        np.testing.assert_allclose(
            forward(other.bind(loaded, fixed)), forward(tuned.bind(changing, fixed)), atol=1e-5
        )
    with pytest.raises(WeightsError, match=r"lora_a is \(32, 4\), expected \(32, 8\)"):
        tune("dit", settings(base, "lora", "tune.rank=8")).changing.load(stage.weights["dit"])


def test_a_new_lora_is_drawn_as_published(base):
    tuned, changing, _ = start(base, "lora", "tune.rank=64")
    assert len(changing) == 10 * 2  # a block of ten linear layers
    for name, value in changing.items():
        if name.endswith("lora_b"):
            assert not np.any(value)
        else:
            most = value.shape[0] ** -0.5
            assert np.abs(value).max() <= most
            np.testing.assert_allclose(np.std(value), most / 3**0.5, rtol=0.1)
    assert len({float(value[0, 0]) for value in changing.values() if np.any(value)}) == 10
    assert tuned.changing.init(jax.random.key(3)).keys() == changing.keys()


@pytest.mark.slow
def test_the_loop_resumes_a_lora_to_the_bit(base, tmp_path):
    def train(workdir, steps, **options):
        # Of a schedule that knows the number of steps each run would have a program of its own.
        overrides = f"train.steps={steps}", "schedule.name=constant"
        config = settings(base, "lora", *overrides, workdir=tmp_path / workdir)
        return loop.train(config, make_stage(config), Latents(), **options)

    whole = train("whole", 4)
    train("parts", 2)
    resumed = train("parts", 4, resume_with_changes=True)
    for a, b in zip(jax.tree.leaves(whole.state), jax.tree.leaves(resumed.state), strict=True):
        np.testing.assert_array_equal(a, b)
    config = settings(base, "lora", workdir=tmp_path / "parts")
    parts = loop.load_parts(config, make_stage(config))
    assert list(parts) == ["dit_fixed"]
    for name, value in resumed.frozen["dit_fixed"].items():
        np.testing.assert_array_equal(parts["dit_fixed"][name], value)


class Latents(ToyFeed):
    """The same latents again and again."""

    def __next__(self):
        self.count += 1
        return {name: np.asarray(value) for name, value in batch().items()}


def test_wrong_settings_are_named(base):
    with pytest.raises(ConfigError, match=r"tune\.mode is 'half'; expected one of full, attention"):
        tune("dit", settings(base, "half"))
    for mode in ("attention", "lora"):
        with pytest.raises(ConfigError, match=f"tune.mode is '{mode}', and init_from is not set"):
            tune("dit", settings(base, mode, "init_from="))
    config = settings(base, "half")
    config.unlock()
    del config.tune  # as in the configs of other stages
    assert tune("dit", config).fixed is None


def test_weights_that_are_not_there_are_named(base, tmp_path):
    (tmp_path / "text.safetensors").touch()
    for overrides, message in {
        (f"init_from={tmp_path}", f"weights.text={base}"): "init_from: .*dit.safetensors does not",
        (f"tune.lora={tmp_path}",): "tune.lora: .*lora.safetensors does not exist",
        (f"weights.text={tmp_path / 'none'}",): "weights.text: .*text.safetensors does not exist",
    }.items():
        with pytest.raises(ConfigError, match=message):
            run(settings(base, "lora", *overrides, workdir=tmp_path / "run"))

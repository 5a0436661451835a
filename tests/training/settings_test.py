"""Values that no run can have are named before anything is loaded."""

from __future__ import annotations

import importlib

import pytest

from chameleon_jax.config import ConfigError, load_config
from chameleon_jax.training.settings import Range, check_settings


def settings(tmp_path, *overrides):
    given = [f"workdir={tmp_path / 'run'}", "data.dir=data", *overrides]
    return load_config("configs/teacher_forcing.py:smoke", given)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps=-5", "train.steps is -5; expected 0 or more"),
        ("train.eval_batches=-1", "train.eval_batches is -1; expected 1 or more"),
        ("train.keep=0", "train.keep is 0; expected 1 or more"),
        ("train.log_every=-1", "train.log_every is -1; expected 0 or more"),
        ("train.accumulate=0", "train.accumulate is 0; expected 1 or more"),
        ("tune.rank=0", "tune.rank is 0; expected 1 or more"),
        ("tune.alpha=0", "tune.alpha is 0.0; expected above 0"),
        ("train.best_mode=low", "train.best_mode is 'low'; expected min or max"),
        ("data.batch=0", "data.batch is 0; expected 1 or more"),
        ("data.threads=0", "data.threads is 0; expected 1 or more"),
        ("data.dropout=1.5", "data.dropout is 1.5; expected 0 to 1"),
        ("schedule.peak=0", "schedule.peak is 0.0; expected above 0"),
        ("optimizer.b2=1.0", "optimizer.b2 is 1.0; expected 0 to below 1"),
        ("ema.decay=-0.1", "ema.decay is -0.1; expected 0 to below 1"),
        ("video.fps=0", "video.fps is 0.0; expected above 0"),
        ("seed=-1", "seed is -1; expected 0 to 4294967295"),
        ("preview.samples=0", "preview.samples is 0; expected 1 or more"),
        ("dtype=float16", "dtype is 'float16'; expected one of float32, bfloat16"),
        ("export_dtype=half", "export_dtype is 'half'; expected one of float32, bfloat16"),
        ("alarms.action=ask", "alarms.action is 'ask'; expected one of stop, warn"),
        ("alarms.motion=7", "alarms.motion is 7.0; expected 0 to 1"),
        ("alarms.checks=0", "alarms.checks is 0; expected 1 or more"),
        ("data.dir=", "data.dir is not set; give it as --config.data.dir=FOLDER"),
        ("data.lengths=((9,),)", r"data.lengths has the entry \(9,\); expected entries \(frames,"),
        ("data.lengths=((9, 0),)", r"data.lengths has the entry \(9, 0\)"),
    ],
)
def test_impossible_values_are_named(tmp_path, override, message):
    with pytest.raises(ConfigError, match=message):
        check_settings(settings(tmp_path, override))


@pytest.mark.parametrize("key", ["schedule.peak", "model.vae.latent_std", "loss.shift"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_named(tmp_path, key, value):
    config = settings(tmp_path)
    group, _, leaf = key.rpartition(".")
    node = config[group] if "." not in group else config.model.vae
    node[leaf] = (value, *node[leaf][1:]) if isinstance(node[leaf], tuple) else value
    with pytest.raises(ConfigError, match=f"{key} is .*(nan|inf)"):
        check_settings(config)


def test_eight_bit_layers_are_not_trained(tmp_path):
    config = settings(tmp_path).copy_and_resolve_references().unlock()
    config.quantize = "int8"
    with pytest.raises(ConfigError, match="quantize is 'int8'; expected none: .* no gradient"):
        check_settings(config)


def test_all_faults_are_named_at_once(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.batch is 0.*; train\.steps is -1") as error:
        check_settings(settings(tmp_path, "data.batch=0", "train.steps=-1"))
    assert "\n" not in str(error.value)


def test_a_best_needs_evaluations(tmp_path):
    check_settings(settings(tmp_path, "train.best=eval/loss"))
    with pytest.raises(ConfigError, match="it needs evaluations: set train.eval_every"):
        check_settings(settings(tmp_path, "train.best=eval/loss", "train.eval_every=0"))


def test_a_workdir_that_is_a_file_is_named(tmp_path):
    (tmp_path / "run").write_text("notes")
    with pytest.raises(ConfigError, match=r"workdir is .*run: .*run is not a folder"):
        check_settings(settings(tmp_path))
    with pytest.raises(ConfigError, match="export_dir is .*: .*run is not a folder"):
        nested = tmp_path / "run" / "export"
        check_settings(settings(tmp_path, f"workdir={tmp_path}", f"export_dir={nested}"))


@pytest.mark.parametrize(
    "stage", ["vae", "teacher", "teacher_concat", "teacher_forcing", "consistency", "dmd"]
)
def test_our_own_values_pass(tmp_path, stage):
    given = [f"workdir={tmp_path}", "data.dir=data"]
    for variant in importlib.import_module(f"configs.{stage}").VARIANTS:
        check_settings(load_config(f"configs/{stage}.py:{variant}", given))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("critic.every=0", "critic.every is 0; expected 1 or more"),
        ("critic.schedule.peak=0", r"critic.schedule.peak is 0.*; expected above 0"),
        ("scores.high=2000", "scores.high is 2000.0; expected 0 to 1000"),
        ("reward.tau=0", r"reward.tau is 0.*; expected above 0"),
        ("gan.weight=-1", r"gan.weight is -1.*; expected 0 or more"),
    ],
)
def test_values_of_distillation_are_checked(tmp_path, override, message):
    given = [f"workdir={tmp_path}", "data.dir=data", override]
    with pytest.raises(ConfigError, match=message):
        check_settings(load_config("configs/dmd.py:smoke", given))


def test_ranges_say_what_they_hold():
    assert [str(Range(1)), str(Range(0, above=True))] == ["1 or more", "above 0"]
    assert [str(Range(0, 1)), str(Range(0, 1, below=True))] == ["0 to 1", "0 to below 1"]
    assert 0 in Range(0) and 0 not in Range(0, above=True)
    assert 1 in Range(0, 1) and 1 not in Range(0, 1, below=True)

"""Runs that really go wrong: they are stopped, and their last good checkpoint is there."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest

from chameleon_jax.errors import UserError
from chameleon_jax.training import loop
from chameleon_jax.training.alarms import AlarmError
from tests.training import toy, two_networks_test
from tests.training.two_networks_test import weights  # noqa: F401, a fixture


def saved(workdir):
    folder = workdir / "checkpoints"
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def train(workdir, steps, *overrides, stage=None, changed=False):
    given = ["mesh.fsdp=1", "train.log_every=1", *overrides]
    settings = toy.config(workdir, steps, given)
    made = stage or toy.stage(settings)
    return loop.train(settings, made, toy.ToyFeed(), resume_with_changes=changed)


def test_a_critic_that_explodes(tmp_path, weights):  # noqa: F811
    """Its learning rate becomes absurd when the run is resumed; the next checkpoints are bad."""
    given = ("train.keep=1", "train.checkpoint_every=30")
    healthy = two_networks_test.make_stage(weights)
    assert train(tmp_path, 30, *given, stage=healthy).step == 30
    broken = two_networks_test.make_stage(weights, critic_rate=1.0)
    given = ("train.keep=1", "train.checkpoint_every=1")
    with pytest.raises(AlarmError, match="training runs away: critic/") as stopped:
        train(tmp_path, 60, *given, stage=broken, changed=True)
    assert isinstance(stopped.value, UserError)
    message = str(stopped.value)
    step = int(message.split(":")[0].removeprefix("step "))
    assert 32 <= step <= 36 and "\n" not in message
    # Step 31 was the first with the new rate, 32 the first that saw what became of the weights.
    assert saved(tmp_path) == [30, step - 1]
    assert f"step 30 in {tmp_path / 'checkpoints'} is the last good checkpoint" in message

    shutil.rmtree(tmp_path / "checkpoints" / str(step - 1))
    assert train(tmp_path, 60, *given, stage=healthy, changed=True).step == 60


def test_pictures_that_turn_flat(tmp_path):
    """Weights that decay far too fast, from a healthy run on."""
    given = ("train.preview_every=5", "train.checkpoint_every=5", "train.keep=1")
    assert train(tmp_path, 40, *given).step == 40
    with pytest.raises(AlarmError, match="the picture turns flat: sample/contrast_ratio was"):
        train(tmp_path, 400, *given, "optimizer.weight_decay=30", changed=True)
    good, *later = saved(tmp_path)
    assert good >= 40 and len(later) <= 1


def test_healthy_runs_are_left_alone(tmp_path, weights):  # noqa: F811
    given = ("train.preview_every=5", "train.checkpoint_every=20")
    assert train(tmp_path / "one", 80, *given).reason == "finished"
    stage = two_networks_test.make_stage(weights)
    assert train(tmp_path / "two", 80, stage=stage).reason == "finished"


def with_motion(ratios):
    """A stage whose previews, every second step, have these ratios."""
    settings = toy.config("unused", 1)
    picture = np.zeros((4, 4, 3), np.uint8)

    def preview(state, *_):
        return picture, {"sample/motion_ratio": ratios[int(state.step) // 2 - 1]}

    return dataclasses.replace(toy.stage(settings), preview=preview)


def test_the_last_good_step_outlives_the_bad_ones_over_a_resume(tmp_path):
    given = ("train.preview_every=2", "train.checkpoint_every=2", "train.keep=1")
    stage = with_motion([1, 1, 1, 0.5, 0.5, 0.5])
    for _ in range(2):  # the same command again resumes at the bad step, and ends as before
        with pytest.raises(AlarmError, match="step 12: motion dies") as stopped:
            train(tmp_path, 20, *given, stage=stage)
        assert saved(tmp_path) == [6, 10]
        assert "step 6 in " in str(stopped.value) and "remove those of later" in str(stopped.value)
    shutil.rmtree(tmp_path / "checkpoints" / "10")
    mended = with_motion([1.0] * 10)
    assert train(tmp_path, 20, *given, "alarms.explosion=0", stage=mended).step == 20
    assert saved(tmp_path) == [20]


def test_checkpoints_between_two_previews_do_not_push_out_the_last_good_one(tmp_path):
    given = ("train.preview_every=6", "train.checkpoint_every=1", "train.keep=2")
    stage = with_motion({2: 1, 5: 1, 8: 1, 11: 0.5, 14: 0.5, 17: 0.5})
    with pytest.raises(AlarmError, match="step 36: motion dies.* step 18 in "):
        train(tmp_path, 40, *given, stage=stage)
    assert saved(tmp_path) == [18, 34, 35]


def test_what_was_only_suspicious_keeps_nothing(tmp_path):
    given = ("train.preview_every=2", "train.checkpoint_every=2", "train.keep=1")
    stage = with_motion([1, 1, 1, 0.5, 0.5, 1, 1])
    assert train(tmp_path, 14, *given, "alarms.explosion=0", stage=stage).step == 14
    assert saved(tmp_path) == [14]


def test_a_run_that_only_warns_goes_on(tmp_path, caplog):
    given = ("train.preview_every=2", "alarms.action=warn")
    stage = with_motion([1, 1, 1, 0.5, 0.5, 0.5, 0.5])
    assert train(tmp_path, 14, *given, stage=stage).reason == "finished"
    assert caplog.text.count("alarm: step 12: motion dies") == 1

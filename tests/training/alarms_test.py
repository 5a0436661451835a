"""Alarms on curves that are made up: each fires on its own fault, and on nothing else."""

from __future__ import annotations

import json

import numpy as np
import pytest
from ml_collections import ConfigDict

from chameleon_jax.config import load_config
from chameleon_jax.training.alarms import FEWEST, Alarms
from configs import training

MOTION, COLOUR, CONTRAST = (f"sample/{name}_ratio" for name in ("motion", "colour", "contrast"))


def alarms(state=None, **changes) -> Alarms:
    return Alarms(ConfigDict(training.paper("teacher").alarms.to_dict() | changes), state)


def see(watched: Alarms, metric: str, values, start: int = 1, every: int = 1) -> int | None:
    """The step at which an alarm fires; None if it does not."""
    for index, value in enumerate(values):
        watched.see(start + index * every, {metric: value, "other": -1e9})
        if watched.fired:
            return start + index * every
    return None


HEALTHY = [0.9, 0.95, 1.0, 0.97]


@pytest.mark.parametrize(
    ("metric", "values", "step"),
    [
        (MOTION, [*HEALTHY, 0.65, 0.6, 0.5], 7),
        (MOTION, [*HEALTHY, 0.65, 0.75, 0.6, 0.5, 0.72, 0.9], None),  # not three in a row
        (MOTION, [*HEALTHY, 1.6, 3.0, 2.0, 2.0], None),  # more motion is no dying one
        (COLOUR, [*HEALTHY, 1.2, 1.3, 1.4], 7),
        (COLOUR, [*HEALTHY, 1.2, 1.1, 1.3, 1.4, 1.1], None),
        (CONTRAST, [*HEALTHY, 0.1], 5),
        (CONTRAST, [*HEALTHY, 0.5, 0.4], None),
    ],
)
def test_bounds_of_previews(metric, values, step):
    assert see(alarms(), metric, values) == step


@pytest.mark.parametrize(
    ("metric", "values"),
    [
        (MOTION, [2.5, 2.0, 0.3, 0.2, 0.2, 0.1, 0.3, 0.5, 0.65, 0.8, 0.9, 0.95, 1.0]),
        (COLOUR, [2.0, 1.5, 1.4, 0.1, 0.1, 0.2, 0.4, 0.7, 0.9, 1.0, 1.0]),
        (CONTRAST, [0.01, 0.02, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0]),
        (CONTRAST, [0.9, 0.01, 0.02, 0.1, 0.2, 0.9, 0.9]),  # noise may look healthy once
    ],
)
def test_an_untrained_network_is_not_armed(metric, values):
    """Noise, then grey, then pictures: what a network from random weights goes through."""
    assert see(alarms(), metric, values) is None
    assert see(alarms(arm_after=5), metric, [values[0]] * 4 + [0.9]) is None


def test_armed_after_some_steps_whatever_was_before():
    flat = alarms(arm_after=500)
    assert see(flat, CONTRAST, [0.1] * 9, start=100, every=100) == 500
    assert flat.good_step == 400  # nobody had looked before
    first = alarms(arm_after=500)
    see(first, MOTION, [0.1], start=700)
    assert first.good_step == 699


def test_a_bound_of_zero_is_off():
    watched = alarms(motion=0.0, colour=0.0, contrast=0.0, explosion=0.0)
    for metric in (MOTION, COLOUR, CONTRAST, "critic/loss"):
        assert see(watched, metric, [*HEALTHY * 10, *[1e9, 0.0, 1e9] * 5]) is None
    assert watched.get_state() == {}


@pytest.mark.parametrize("metric", ["critic/loss", "critic/grad_norm", "generator/loss", "loss"])
def test_an_explosion_fires_on_the_third_step(metric):
    rng = np.random.default_rng(0)
    normal = 0.3 * np.exp(rng.normal(0, 0.5, 500))
    watched = alarms()
    assert see(watched, metric, normal) is None
    assert see(watched, metric, [9.0, 30.0, 200.0], start=501) == 503
    assert watched.good_step == 499  # step 501 looked at the weights of step 500
    assert "critic" not in metric or f"{metric} was 9, 30, 200" in watched.fired


def test_no_explosion_where_there_is_none():
    rng = np.random.default_rng(1)
    falling = 5 * np.exp(-np.arange(800) / 100) * np.exp(rng.normal(0, 0.6, 800))
    single = np.where(np.arange(800) % 50 == 49, 100.0, 1.0) * np.exp(rng.normal(0, 0.3, 800))
    rising = np.linspace(0.1, 3, 800)  # as the critic's loss does when the student moves
    zero = np.r_[np.zeros(100), 1, 1, 1, 1]
    early = np.r_[np.full(FEWEST // 2 - 1, 1e-3), np.full(30, 1.0)]
    for values in (falling, single, rising, zero, early):
        assert see(alarms(), "critic/loss", values) is None


def test_the_last_good_step_is_from_before_the_first_bad_one():
    watched = alarms()
    assert watched.good_step is None
    see(watched, MOTION, HEALTHY, start=100, every=100)
    assert watched.good_step == 400
    see(watched, MOTION, [0.6, 0.6], start=500, every=50)
    assert watched.good_step == 400
    see(watched, COLOUR, HEALTHY, start=450, every=10)
    see(watched, COLOUR, [1.5], start=490)
    assert watched.good_step == 400
    see(watched, MOTION, [0.9], start=600)
    assert watched.good_step == 480  # of the colours, which are still suspicious
    see(watched, COLOUR, [1.0], start=700)
    assert watched.good_step == 600


def test_messages_are_one_line_and_name_what_to_change():
    watched = alarms()
    see(watched, MOTION, [*HEALTHY, 0.65, 0.6, 0.5])
    assert watched.fired == (
        "step 7: motion dies: sample/motion_ratio was 0.65, 0.6, 0.5, expected 0.7 or more"
        " (alarms.motion)"
    )


def test_a_warning_goes_on_and_does_not_repeat_itself(caplog):
    watched = alarms(action="warn")
    assert see(watched, MOTION, [*HEALTHY, *[0.5] * 12]) is None
    assert caplog.text.count("alarm: step 7: motion dies") == caplog.text.count("alarm:") == 1
    see(watched, MOTION, [*HEALTHY, *[0.5] * 3], start=50)  # armed again
    assert caplog.text.count("alarm:") == 2


@pytest.mark.parametrize("cut", range(1, 31))
def test_a_resumed_run_remembers(cut):
    """Wherever it is cut in two, the alarm fires at the same step, with the same last good one."""
    values = [*np.full(25, 1.0), 50.0, 60.0, 1.0, 50.0, 60.0, 70.0]
    whole = alarms()
    assert see(whole, "critic/loss", values) == 31
    first = alarms()
    see(first, "critic/loss", values[:cut])
    state = json.loads(json.dumps(first.get_state()))
    second = alarms(state)
    assert see(second, "critic/loss", values[cut:], start=cut + 1) == 31
    assert (second.fired, second.good_step) == (whole.fired, whole.good_step)


def test_a_state_of_other_alarms_is_no_trouble():
    see(watched := alarms(), MOTION, HEALTHY)
    assert see(alarms(watched.get_state(), motion=0.0), MOTION, [0.1] * 5) is None
    assert see(alarms({"another": {"good": 1}}), MOTION, HEALTHY) is None


def test_small_models_start_from_random_weights():
    for name in ("runway_tiny", "smoke"):
        config = load_config(f"configs/teacher.py:{name}").alarms
        assert (config.contrast, config.motion, config.colour) == (0, 0, 0)
        assert config.explosion > 1

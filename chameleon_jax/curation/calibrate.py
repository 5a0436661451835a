"""Thresholds by percentile: which limits keep a wanted share of clips.

Absolute numbers of the filters mean little for other cameras and other codecs. So limits of graded
values can be taken from a sample: all of them at the same percentile, the one at which the wanted
share of those clips passes all of them that the other filters have let through.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from chameleon_jax.curation.clip import Clip
from chameleon_jax.curation.runner import SerialRunner
from chameleon_jax.curation.stage import CurationError, Limits, Stage

# Which side of a graded value is a matter of taste; the other one keeps its limit.
SIDES = {"flow": "least", "sharpness": "least", "aesthetic": "least", "blocks": "most"}
LEAST_SAMPLE = 5  # clips


def open_limits(stages: Sequence[Stage]) -> dict[str, Mapping[str, Limits]]:
    """The limits of stages, those that are to be chosen taken away; by the stage's name."""
    return {
        stage.name: {
            name: _with(limits, name, None) if name in stage.graded else limits
            for name, limits in stage.limits.items()
        }
        for stage in stages
    }


def calibrate(
    runner: SerialRunner, groups: Sequence[Sequence[Stage]], clips: Sequence[Clip], keep: float
) -> dict[str, float]:
    """Measure clips with open limits, and choose limits that keep a share of them.

    What is measured stays in the journal: the run behind it does not look twice.

    Args:
      runner: of the filters.
      groups: the groups of filters to run, in order.
      clips: the sample.
      keep: share in (0, 1].

    Returns:
      The limit of each graded value.

    Raises:
      CurationError: too few clips are left to choose by.
    """
    stages = [stage for group in groups for stage in group]
    saved = {stage.name: stage.limits for stage in stages}
    for stage in stages:
        stage.limits = open_limits([stage])[stage.name]
    try:
        for group in groups:
            clips = runner.run_group(group, clips)
    finally:
        for stage in stages:
            stage.limits = saved[stage.name]
    left = [clip for clip in clips if clip.rejection is None]
    if len(left) < LEAST_SAMPLE:
        raise CurationError(
            f"--keep: {len(left)} clips of the sample pass the other filters, at least"
            f" {LEAST_SAMPLE} are needed to choose thresholds by; give more videos, or a larger"
            " --sample"
        )
    names = [name for stage in stages for name in stage.graded]
    values = {name: np.array([clip.measured[name] for clip in left]) for name in names}
    return choose_limits(values, keep)


def choose_limits(values: Mapping[str, np.ndarray], keep: float) -> dict[str, float]:
    """Limits at one percentile for all values, so that `keep` of the clips pass all of them.

    Args:
      values: [clips] by name; which side is limited is said by `SIDES`.
      keep: share in (0, 1].
    """
    low, high = 0.0, 1.0  # share that each value alone cuts off
    for _ in range(40):
        middle = (low + high) / 2
        if _passing(values, _limits_at(values, middle)) >= keep:
            low = middle
        else:
            high = middle
    return _limits_at(values, low)


def apply(stages: Sequence[Stage], chosen: Mapping[str, float]) -> None:
    """Give stages limits that were chosen."""
    for stage in stages:
        stage.limits = {
            name: _with(limits, name, chosen[name])
            if name in stage.graded and name in chosen
            else limits
            for name, limits in stage.limits.items()
        }


def _limits_at(values: Mapping[str, np.ndarray], cut: float) -> dict[str, float]:
    return {
        name: float(np.quantile(found, cut if SIDES[name] == "least" else 1 - cut))
        for name, found in values.items()
    }


def _passing(values: Mapping[str, np.ndarray], limits: Mapping[str, float]) -> float:
    passing = np.ones(len(next(iter(values.values()))), bool)
    for name, found in values.items():
        within = found >= limits[name] if SIDES[name] == "least" else found <= limits[name]
        passing &= within
    return float(passing.mean())


def _with(limits: Limits, name: str, value: float | None) -> Limits:
    return dataclasses.replace(limits, **{SIDES[name]: value})

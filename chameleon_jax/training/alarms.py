"""Alarms: what the curves of a run look like when it has gone wrong, and what is done then.

    alarms = Alarms(config.alarms)
    alarms.see(step, {"sample/motion_ratio": 0.4})    # whenever there are new numbers
    if alarms.fired: ...                               # one line that says what is wrong

Two kinds of curves are watched. Measures of the previews (`diagnosis`) must stay within a bound.
Losses and gradient norms must not run away from their own running median.

An alarm is armed late, for an untrained network breaks every bound: a measure counts after
`alarms.checks` healthy previews in a row, or after `alarms.arm_after` steps. Healthy is stricter
than not bad: if motion of 0.7 of the data's is asked for, healthy is 0.7 to 1 / 0.7. Noise moves,
but not as the data do.

What is wrong is certain only after some bad values in a row, and previews are rare. `good_step`
says up to which step all was well, so that the checkpoint of that time can be kept meanwhile.
"""

from __future__ import annotations

import dataclasses
import logging
import statistics
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from chameleon_jax.errors import UserError

log = logging.getLogger(__name__)

ACTIONS = ("stop", "warn")
SPIKES = ("loss", "generator/loss", "critic/loss", "critic/grad_norm")
SPIKES_IN_A_ROW = 3  # one alone comes from an unlucky batch
FEWEST, MOST = 20, 200  # values of a running median


class AlarmError(UserError):
    """A run has gone wrong, though its numbers are finite. The message is one line."""


@dataclasses.dataclass
class Curve:
    """What is remembered of one curve; plain values, for checkpoints.

    Attributes:
      good: the newest step whose weights were not suspicious; None before there was one.
      healthy: healthy values in a row, up to the number that arms.
      bad: suspicious values in a row, as [step, value].
      history: earlier values, for the running median.
    """

    good: int | None = None
    healthy: int = 0
    bad: list[list[float]] = dataclasses.field(default_factory=list)
    history: list[float] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Bound:
    """A measure of the previews that must stay on one side of a bound."""

    what: str  # what is wrong if it does not
    key: str  # of the config
    limit: float
    above: bool  # too much is bad; else too little
    checks: int  # bad values in a row that fire
    arming: int  # healthy values in a row that arm
    arm_after: int  # steps after which the measure counts in any case; 0: never

    def judge(self, step: int, value: float, curve: Curve) -> bool:
        """Is a value suspicious? Notes whether it is healthy."""
        low, high = sorted((self.limit, 1 / self.limit))
        late = bool(self.arm_after) and step >= self.arm_after
        armed = late or curve.healthy >= self.arming
        bad = value > self.limit if self.above else value < self.limit
        if not armed:
            curve.healthy = curve.healthy + 1 if low <= value <= high else 0
        return bad and armed

    def good_before(self, step: int) -> int:
        """The weights that a value of this step judges: a preview shows those after the step."""
        return step

    def expected(self, curve: Curve) -> str:
        return f"expected {self.limit:g} or {'less' if self.above else 'more'}"


@dataclasses.dataclass(frozen=True)
class Spike:
    """A metric of the steps that must not exceed its running median by a factor."""

    factor: float
    what: str = "training runs away"
    key: str = "explosion"
    checks: int = SPIKES_IN_A_ROW

    def judge(self, step: int, value: float, curve: Curve) -> bool:
        """Is a value suspicious? Others go into the median."""
        del step
        if len(curve.history) >= FEWEST:
            median = statistics.median(curve.history)
            if median > 0 and value > self.factor * median:
                return True
        curve.history = [*curve.history[1 - MOST :], value]
        return False

    def good_before(self, step: int) -> int:
        """The weights that a value of this step judges: metrics are of those before the step."""
        return step - 1

    def expected(self, curve: Curve) -> str:
        median = statistics.median(curve.history)
        return f"expected at most {self.factor:g} times the median of before, {median:.3g}"


Rule = Bound | Spike


class Alarms:
    """All alarms of a run.

    Args:
      config: group `alarms`, see configs/training.py; a bound of 0 switches an alarm off.
      state: from `get_state`, of the run that is resumed.

    Attributes:
      fired: what is wrong, one line without an end; empty as long as nothing is.
    """

    def __init__(self, config: ConfigDict, state: Mapping[str, Any] | None = None):
        self._rules = _rules(config)
        self._warn = config.action == "warn"
        self._curves = {name: Curve() for name in self._rules}
        for name, values in (state or {}).items():
            if name in self._curves:
                self._curves[name] = Curve(**values)
        self.fired = ""

    def get_state(self) -> dict[str, Any]:
        """What a resumed run has to know; JSON values."""
        return {name: dataclasses.asdict(curve) for name, curve in self._curves.items()}

    def see(self, step: int, values: Mapping[str, float]) -> None:
        """Look at the numbers of a step; those that no alarm is about are passed over."""
        for name in self._rules.keys() & values.keys():
            self._judge(step, name, values[name])

    def _judge(self, step: int, name: str, value: float) -> None:
        rule, curve = self._rules[name], self._curves[name]
        if not rule.judge(step, value, curve):
            curve.good, curve.bad = rule.good_before(step), []
            return
        curve.bad.append([step, value])
        if len(curve.bad) < rule.checks:
            return
        message = _message(name, rule, curve)
        if self._warn:
            log.warning("alarm: %s; see docs/training_diagnosis.md", message)
            self._curves[name] = Curve()  # once is enough, until it is armed again
        elif not self.fired:
            self.fired = message

    @property
    def good_step(self) -> int | None:
        """Steps after which every alarm found nothing; None if none has seen a number yet."""
        seen = (curve for curve in self._curves.values() if curve.bad or curve.good is not None)
        return min(map(_last_good, seen), default=None)


def _last_good(curve: Curve) -> int:
    return int(curve.bad[0][0]) - 1 if curve.good is None else curve.good


def _message(name: str, rule: Rule, curve: Curve) -> str:
    (step, _), *_ = reversed(curve.bad)
    values = ", ".join(f"{value:.3g}" for _, value in curve.bad)
    return (
        f"step {int(step)}: {rule.what}: {name} was {values}, {rule.expected(curve)}"
        f" (alarms.{rule.key})"
    )


def _rules(config: ConfigDict) -> dict[str, Rule]:
    """The alarms that are on, by the metric that they watch."""
    rules: dict[str, Rule] = {}
    if config.explosion:
        rules |= {name: Spike(config.explosion) for name in SPIKES}
    checks = config.checks
    bounds = (
        ("sample/contrast_ratio", "the picture turns flat", "contrast", False, 1),
        ("sample/motion_ratio", "motion dies", "motion", False, checks),
        ("sample/colour_ratio", "colours run over", "colour", True, checks),
    )
    for metric, what, key, above, rows in bounds:
        if config[key]:
            rules[metric] = Bound(what, key, config[key], above, rows, checks, config.arm_after)
    return rules

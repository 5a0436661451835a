"""What the tests of faults measure, and how large they are.

    CHAMELEON_LIVE_PROOF=full        the sizes of the second column instead of the first
    CHAMELEON_LIVE_FIGURES=FILE      the figures are written there as JSON, too

What is counted (streams that leak, wrong frames, crashes) is asserted exactly. Times depend on the
machine: they are said, and only `SLACK` times more than is meant to be is a failure.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

FULL = os.environ.get("CHAMELEON_LIVE_PROOF") == "full"
FILE = "CHAMELEON_LIVE_FIGURES"
SLACK = 10

SIZES = {  # in every run, before a release
    "S1 cuts at each stage": (2, 20),
    "S2 slow readers": (3, 3),
    "S2 seconds": (5, 600),
    "S2 chunks for who reads nothing": (12, 60),
    "S3 places": (2, 4),
    "S3 clients": (20, 40),
    "S3 seconds": (2, 10),
    "S4 seconds": (3, 60),
    "S5 switches": (20, 1000),
    "S5 switches whose frames are compared": (19, 250),
    "S6 seconds": (6, 600),
    "S7 errors": (4, 10),
    "S9 cuts": (4, 20),
    "X1 fixed pictures over HTTP": (5, 100),
    "X1 mutated pictures over HTTP": (3, 200),
    "X1 mutated pictures": (40, 1800),
    "X6 fuzzed messages": (300, 5000),
    "X6 seconds of a flood": (1, 10),
}

_noted: dict[str, dict[str, Any]] = {}
_shown: set[str] = set()


def size(name: str) -> int:
    """How large a test is in this run."""
    return SIZES[name][FULL]


def note(name: str, done: str, rule: str, **figures: Any) -> None:
    """Keep one line of figures.

    Args:
      name: of the test, e.g. `S1 queued`.
      done: what was done, with its size.
      rule: what passes.
      figures: what was measured.
    """
    rounded = {key: round(x, 2) if isinstance(x, float) else x for key, x in figures.items()}
    _noted[name] = {"done": done, "figures": rounded, "rule": rule}
    print(_line(name))
    if path := os.environ.get(FILE):
        file = Path(path)
        kept = json.loads(file.read_text()) if file.exists() else {}
        kept[name] = _noted[name] | {"full": FULL}
        file.write_text(json.dumps(kept, indent=1) + "\n")


def show(config: Any) -> None:
    """Write what was noted since the last time into the terminal of pytest."""
    terminal = config.pluginmanager.getplugin("terminalreporter")
    new = [name for name in _noted if name not in _shown]
    _shown.update(new)
    if terminal is None or not new:
        return
    with config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        terminal.write_line("")
        for name in new:
            terminal.write_line(_line(name))


def percentile(values: Any, share: float) -> float:
    """Of at least one value; `share` in percent."""
    return float(np.percentile(np.asarray(list(values), float), share))


def _line(name: str) -> str:
    one = _noted[name]
    figures = ", ".join(f"{key.replace('_', ' ')} {x}" for key, x in one["figures"].items())
    return f"{name}: {one['done']}: {figures} [{one['rule']}]"

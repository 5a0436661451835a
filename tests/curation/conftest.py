"""Tests on Ray run where it is installed; elsewhere it is said that they did not."""

from __future__ import annotations

import importlib.util

NOT_RUN: list[str] = []


def pytest_collection_modifyitems(config, items):
    """Leave out what needs Ray where there is none."""
    if importlib.util.find_spec("ray"):
        return
    left = [item for item in items if item.get_closest_marker("ray")]
    items[:] = [item for item in items if item not in left]
    NOT_RUN.extend(item.nodeid for item in left)
    config.hook.pytest_deselected(items=left)


def pytest_terminal_summary(terminalreporter):
    """Say what did not run."""
    if NOT_RUN:
        terminalreporter.write_line(
            f"NOT RUN: {len(NOT_RUN)} tests on Ray, which is not installed (extra `ray`)",
            yellow=True,
        )

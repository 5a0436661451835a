"""Scripts on several fake devices, in a process of their own: it has them from its start on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def run_on(devices: int, script: str, *arguments: Any) -> None:
    """Run a script on so many fake devices; it prints "equal" at its end.

    Args:
      devices: how many.
      script: Python; it raises if something is not as it should be.
      arguments: its `sys.argv[1:]`.
    """
    done = start(devices, "-c", script, *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "equal"


def start(devices: int, *arguments: Any) -> subprocess.CompletedProcess[str]:
    """Python with these arguments, on so many fake devices."""
    command = [sys.executable, *(str(argument) for argument in arguments)]
    return subprocess.run(
        command, cwd=ROOT, env=environment(devices), capture_output=True, text=True, timeout=600
    )


def environment(devices: int) -> dict[str, str]:
    """Of a process on so many fake devices."""
    flags = os.environ.get("XLA_FLAGS", "")
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices}",
    }

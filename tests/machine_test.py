"""What is said about the machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from chameleon_jax import __version__, machine

ROOT = Path(__file__).parents[1]


def test_versions_are_those_that_are_installed():
    found = machine.versions()
    assert found["chameleon_jax"] == __version__ and found["jax"] == jax.__version__
    assert {"python", "jaxlib", "flax", "numpy"} <= found.keys()
    assert "nvidia-cudnn-cu99" not in found


def test_hardware():
    found = machine.hardware()
    assert (found["platform"], found["device"]) == (
        jax.devices()[0].platform,
        jax.devices()[0].device_kind,
    )
    assert found["cpu"] and 1 <= found["cores"] <= os.cpu_count()


def test_memory_grows_with_what_is_held():
    before = machine.memory_in_use()
    held = np.ones(2**27, np.uint8)
    assert machine.memory_in_use() > before + 2**26
    del held
    assert machine.peak_memory() == machine.peak_resident() > before + 2**26


@pytest.mark.parametrize("platforms", ["nonsense", "cuda"])
def test_a_device_that_is_not_there_is_one_line(platforms):
    if platforms == "cuda" and any(device.platform == "gpu" for device in jax.devices()):
        pytest.skip("this machine has one")
    code = "from chameleon_jax import machine; from launch import cli; cli.finish(machine.device)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": platforms},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    error = done.stderr.splitlines()[-1]
    assert error.startswith("error: JAX finds no device")
    assert error.endswith(f"JAX_PLATFORMS is {platforms!r}; change it, or install what it names")

"""The training program: errors of one line, and a restart by the same command."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def launch(*arguments: str) -> subprocess.CompletedProcess:
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "launch.train", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "configs/teachr.py"], "did you mean"),
        (["--config", "configs/runway_tiny.py:runway_tny"], "no variant 'runway_tny'"),
        (
            ["--config.train.step=3"],
            "unknown config key 'train.step'; the nearest is 'train.steps'",
        ),
        (
            [
                "--config.workdir=x",
                "--config.data.dir=/nowhere",
                "--config.weights.vae=y",
                "--config.weights.text=y",
            ],
            "weights.vae: y/vae.safetensors does not exist",
        ),
        (
            ["--config=configs/vae.py", "--config.workdir=x", "--config.data.dir=/nowhere"],
            "/nowhere: no such folder",
        ),
        (["--profile=5"], "--profile: '5': expected FIRST:LAST, from 1 up, such as 20:25"),
    ],
)
def test_faults_are_one_line(arguments, message):
    done = launch(*arguments)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_help_says_what_there_is():
    done = launch("--help")
    assert done.returncode == 0
    assert "--config.KEY" in done.stdout and "--export_only" in done.stdout

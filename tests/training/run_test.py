"""The training program as a script sees it: what it leaves, what it says, and its exit codes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from chameleon_jax.data import records
from chameleon_jax.training.loop import Outcome
from chameleon_jax.training.run import EXIT_CODES, stopped_message

ROOT = Path(__file__).parents[2]


def start(*arguments: str) -> subprocess.Popen:
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "launch.train", "--config", "configs/vae.py:smoke"]
    return subprocess.Popen(
        [*command, *arguments], cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    from tests.data import fake_renderer

    folder = tmp_path_factory.mktemp("clips")
    examples = records.RunwayExamples(size=(32, 32), frames=9, render=fake_renderer.render)
    for first, count in ((0, 8), (800_000, 4)):
        records.prepare_runway(folder, count, examples, seed_start=first, workers=0)
    return folder


@pytest.mark.slow
def test_a_stopped_run_is_no_success_and_can_be_exported_or_resumed(tmp_path, clips):
    given = [f"--config.workdir={tmp_path}", f"--config.data.dir={clips}"]
    endless = [*given, "--config.train.steps=1000000", "--config.train.eval_every=0"]
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        run = start(*endless, "--config.train.preview_every=0", "--config.train.log_every=100")
        lines = []
        for line in run.stderr:
            lines.append(line)
            if "steps/s" in line:
                run.send_signal(number)
                break
        lines += run.stderr.readlines()
        assert run.wait(60) == code, "".join(lines)
        assert f"stopped by {number.name} at step" in lines[-1]
        assert "nothing was exported" in lines[-1] and "--export_only" in lines[-1]
    assert not (tmp_path / "export").exists()
    assert any("resumed at step" in line for line in lines)
    exported = start(*endless, "--export_only")
    assert exported.wait(120) == 0, exported.stderr.read()
    assert (tmp_path / "export" / "vae.safetensors").is_file()


def test_an_earlier_export_is_named(tmp_path):
    config = ConfigDict({"workdir": str(tmp_path), "export_dir": "", "train": {"steps": 9}})
    outcome = Outcome(state=None, step=4, reason="SIGINT")
    message = stopped_message(config, outcome)
    assert "stopped by SIGINT at step 4 of 9" in message and "earlier" not in message
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "config.json").touch()
    assert "holds the weights of an earlier export" in stopped_message(config, outcome)


def test_only_a_run_with_an_export_succeeds():
    assert EXIT_CODES == {"finished": 0, "time": 0, "SIGINT": 130, "SIGTERM": 143}


@pytest.mark.slow
def test_a_second_signal_stops_at_once(tmp_path, clips):
    run = start(f"--config.workdir={tmp_path}", f"--config.data.dir={clips}")
    for line in run.stderr:
        if "compiling step" in line:
            break
    begin = time.monotonic()
    for _ in range(2):
        run.send_signal(signal.SIGINT)
        time.sleep(0.5)
    assert run.wait(60) == 130
    assert time.monotonic() - begin < 60

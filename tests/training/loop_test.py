"""The loop on a toy stage: stop, kill, resume, refuse, diverge, a full disk.

Programs run as a user would run them.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from chameleon_jax.training import loop
from chameleon_jax.training.checkpoints import CheckpointError
from chameleon_jax.training.report import TrainingDivergedError
from chameleon_jax.weights.params import WeightsError, save_params
from tests.devices import start
from tests.training import toy

HERE = Path(__file__).parent


def run_program(workdir: Path, *arguments: str, devices: int = 1) -> subprocess.CompletedProcess:
    return start(devices, HERE / "toy.py", workdir, *arguments)


def saved_params(workdir: Path) -> dict[str, np.ndarray]:
    return dict(np.load(workdir / "params.npz"))


def metrics(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("unbroken")
    done = run_program(workdir, "6")
    assert done.stdout.strip() == "6 finished", done.stderr[-2000:]
    return workdir


def test_killed_and_resumed_is_unbroken_to_the_bit(tmp_path, unbroken):
    killed = run_program(tmp_path, "6", "kill=4")
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "params.npz").exists()
    resumed = run_program(tmp_path, "6")
    assert resumed.stdout.strip() == "6 finished", resumed.stderr[-2000:]
    expected, found = saved_params(unbroken), saved_params(tmp_path)
    assert expected.keys() == found.keys() and len(expected) == 8
    for name, value in expected.items():
        np.testing.assert_array_equal(value, found[name], err_msg=name)
    # Nothing twice, nothing missing.
    losses = [
        [(line["step"], line["loss"]) for line in metrics(run)] for run in (tmp_path, unbroken)
    ]
    assert losses[0] == losses[1]
    assert f"resumed at step 3 in {tmp_path}" in resumed.stderr


@pytest.mark.parametrize(("given", "name"), [("term", "SIGTERM"), ("int", "SIGINT")])
def test_a_signal_saves_and_says_so(tmp_path, unbroken, given, name):
    stopped = run_program(tmp_path, "6", f"{given}=4", "train.checkpoint_every=100")
    assert stopped.stdout.strip() == f"5 {name}", stopped.stderr[-2000:]
    assert f"{name}: saving after this step" in stopped.stderr
    assert (tmp_path / "checkpoints" / "5").is_dir()
    assert run_program(tmp_path, "6").returncode == 0
    for name, value in saved_params(unbroken).items():
        np.testing.assert_array_equal(value, saved_params(tmp_path)[name], err_msg=name)


def test_restores_onto_four_devices(tmp_path, unbroken):
    assert run_program(tmp_path, "3").stdout.strip() == "3 finished"
    resumed = run_program(tmp_path, "6", "changed=1", "mesh.fsdp=2", "mesh.data=2", devices=4)
    assert resumed.stdout.strip() == "6 finished", resumed.stderr[-2000:]
    for name, value in saved_params(unbroken).items():
        np.testing.assert_allclose(
            value, saved_params(tmp_path)[name], rtol=1e-5, atol=1e-6, err_msg=name
        )


def run_two(workdir: Path, *arguments: str) -> list[str]:
    """Two processes of one run; what each says at the end."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    with ThreadPoolExecutor(2) as pool:
        both = list(
            pool.map(
                lambda rank: run_program(workdir, *arguments, f"rank={rank}", f"port={port}"),
                range(2),
            )
        )
    assert [done.returncode for done in both] == [0, 0], (
        both[0].stderr[-3000:] + both[1].stderr[-3000:]
    )
    return [done.stdout.strip().splitlines()[-1] for done in both]


@pytest.mark.slow
def test_two_processes_train_what_one_does(tmp_path, unbroken):
    seen = ["mesh.fsdp=2", "eval=2", "train.eval_every=3", "train.preview_every=3"]
    assert run_two(tmp_path, "3", *seen) == ["3 finished"] * 2
    assert run_two(tmp_path, "6", "changed=1", *seen) == ["6 finished"] * 2
    for name, value in saved_params(unbroken).items():
        np.testing.assert_allclose(
            value, saved_params(tmp_path)[name], rtol=1e-5, atol=1e-6, err_msg=name
        )
    # Only one of them writes; it sees the whole of what is spread over both.
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3, 3, 3, 4, 5, 6, 6, 6]
    assert Image.open(tmp_path / "previews" / "step_0000006.png").size == (16, 8)


@pytest.mark.slow
def test_two_processes_pass_by_a_damaged_checkpoint(tmp_path, unbroken):
    """Both of them, whichever reads the damaged part; what a killed run left behind is removed."""
    assert run_two(tmp_path, "6", "mesh.fsdp=2") == ["6 finished"] * 2
    newest = tmp_path / "checkpoints" / "6"
    files = sorted((newest / "state").rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(files[-1].read_bytes())
    content[len(content) // 2] ^= 1
    files[-1].write_bytes(content)
    left = tmp_path / "checkpoints" / "9.orbax-checkpoint-tmp"
    left.mkdir()
    assert run_two(tmp_path, "6", "mesh.fsdp=2") == ["6 finished"] * 2
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"3", "6", "6.damaged"}
    for name, value in saved_params(unbroken).items():
        np.testing.assert_allclose(
            value, saved_params(tmp_path)[name], rtol=1e-5, atol=1e-6, err_msg=name
        )


@pytest.mark.slow
def test_ctrl_c_in_one_process_stops_both_at_the_same_step(tmp_path):
    given = ["int=4", "mesh.fsdp=2", "train.log_every=0", "train.checkpoint_every=0"]
    first, second = run_two(tmp_path, "1000000", *given)
    step, name = first.split()
    assert name == "SIGINT" and second == f"{step} SIGTERM"
    assert (tmp_path / "checkpoints" / step).is_dir()


def config(workdir, steps, *overrides):
    return toy.config(workdir, steps, [*overrides, "mesh.fsdp=1"])


def train(settings, feed=None, held_out=(), name="toy", changed=False):
    feed = feed or toy.ToyFeed()
    stage = toy.stage(settings, name)
    return loop.train(settings, stage, feed, held_out, resume_with_changes=changed)


def test_a_checkpoint_of_another_stage_is_refused(tmp_path):
    train(config(tmp_path, 2))
    with pytest.raises(
        CheckpointError, match=r"of the stage 'toy', this run is 'other'.*init_from"
    ):
        train(config(tmp_path, 4), name="other", changed=True)


def test_a_checkpoint_of_another_optimiser_is_refused(tmp_path):
    train(config(tmp_path, 2))
    with pytest.raises(
        CheckpointError, match=r"another model or optimiser: unexpected opt_state.*mu"
    ):
        train(config(tmp_path, 4, "optimizer.b1=0.0"), changed=True)


def test_changed_settings_are_named_and_refused_or_accepted(tmp_path, caplog):
    train(config(tmp_path, 2))
    other = config(tmp_path, 4, "schedule.peak=2e-2", "seed=3")
    with pytest.raises(CheckpointError, match="--resume_with_changes") as refused:
        train(other)
    message = str(refused.value)
    for change in ("seed 0 -> 3", "schedule.peak 0.01 -> 0.02", "train.steps 2 -> 4"):
        assert change in message
    assert "\n" not in message and "workdir" not in message.split("Set them back")[0]
    with caplog.at_level("WARNING", logger="chameleon_jax"):
        assert train(other, changed=True).step == 4
    assert "seed 0 -> 3" in caplog.text
    # From now on they are the settings of the run.
    free = ["train.log_every=2", "train.keep=5", "train.max_minutes=9", "train.checkpoint_every=1"]
    assert train(config(tmp_path, 4, "schedule.peak=2e-2", "seed=3", *free)).step == 4


def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_saved(tmp_path):
    with pytest.raises(TrainingDivergedError, match=r"step 5: .*loss.*not finite"):
        train(config(tmp_path, 6, "train.checkpoint_every=1"), toy.ToyFeed(poison=4))
    saved = sorted(
        int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()
    )
    assert saved == [3, 4]


def test_time_limit_saves(tmp_path):
    outcome = train(config(tmp_path, 1000, "train.max_minutes=1e-9"))
    assert (outcome.step, outcome.reason) == (1, "time")
    assert (tmp_path / "checkpoints" / "1").is_dir()


def test_learns_writes_and_shows(tmp_path, caplog):
    overrides = [
        "train.preview_every=10",
        "train.eval_every=10",
        "train.log_every=10",
        "train.checkpoint_every=10",
    ]
    with caplog.at_level("INFO", logger="chameleon_jax"):
        outcome = train(config(tmp_path, 60, *overrides), held_out=[next(toy.ToyFeed())])
    lines = metrics(tmp_path)
    losses = [line["loss"] for line in lines if "loss" in line]
    held_out = [line["eval/loss"] for line in lines if "eval/loss" in line]
    assert losses[-1] < 0.5 * losses[0] and held_out[-1] < held_out[0]
    assert len(losses) == len(held_out) == 6
    assert sorted(path.name for path in (tmp_path / "previews").iterdir())[0] == "step_0000010.png"
    assert any(path.name.startswith("events") for path in (tmp_path / "tensorboard").iterdir())
    assert outcome.reason == "finished"
    # The average lags behind, and keeps its warm-up away from the random start.
    a, b = (tree["toy"]["layers.0.kernel"] for tree in (outcome.state.params, outcome.state.ema))
    assert 0 < np.abs(np.asarray(a - b)).max() < 0.2
    # What is compiled is said, once, with the time that it took.
    for what in ("step 'toy'", "evaluation", "preview"):
        assert caplog.text.count(f"compiling {what} for x [8, 16]") == 1
        assert caplog.text.count(f"compiled {what}: ") == 1


def test_a_finished_run_does_nothing_more(tmp_path):
    first = train(config(tmp_path, 3))
    again = train(config(tmp_path, 3))
    assert again.step == 3 and again.reason == "finished"
    for a, b in zip(jax.tree.leaves(first.state), jax.tree.leaves(again.state), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_state_can_be_read_without_touching_the_run(tmp_path):
    outcome = train(config(tmp_path, 3))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    settings = config(tmp_path, 100)
    state, step = loop.load_state(settings, toy.stage(settings))
    assert step == 3
    for a, b in zip(jax.tree.leaves(outcome.state), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(a, b)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    with pytest.raises(CheckpointError, match="no such folder of checkpoints"):
        loop.load_state(config(tmp_path / "none", 1), toy.stage(settings))


def test_starts_from_exported_weights_and_refuses_others(tmp_path):
    network = toy.stage(config(tmp_path, 0)).trained["toy"]
    params = network.init(jax.random.key(7))
    save_params(tmp_path / "toy.safetensors", network.bind(params))
    outcome = train(config(tmp_path / "run", 0, f"init_from={tmp_path}"))
    for name, value in params.items():
        np.testing.assert_array_equal(outcome.state.params["toy"][name], value)
        np.testing.assert_array_equal(outcome.state.ema["toy"][name], value)
    with pytest.raises(WeightsError, match="no such file"):
        train(config(tmp_path / "none", 1, f"init_from={tmp_path / 'nowhere'}"))


def test_a_full_disk_is_one_line_before_anything_is_written(tmp_path, monkeypatch):
    train(config(tmp_path, 3))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10_000))
    with pytest.raises(
        CheckpointError, match=r"no space left on the disk: 0\.001 GB .*step 3 is complete\. Make"
    ):
        train(config(tmp_path, 9), changed=True)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["3"]


FULL_DISK = """
import resource, sys, time
from pathlib import Path
from chameleon_jax.errors import UserError
from chameleon_jax.training import loop
from tests.training import toy

workdir = Path(sys.argv[1])

class Feed(toy.ToyFeed):
    def __next__(self):
        if self.count == 4:  # step 3 is safe; from now on no file may grow beyond 4000 bytes
            while not (workdir / "checkpoints" / "3").is_dir():
                time.sleep(0.02)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
        return super().__next__()

settings = toy.config(workdir, 9, ["mesh.fsdp=1", "train.log_every=0"])
try:
    loop.train(settings, toy.stage(settings), Feed())
except UserError as error:
    print(f"error: {error}")
"""


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path):
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(HERE.parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "a checkpoint could not be saved" in done.stdout, done.stderr[-3000:]
    assert "step 3 is complete" in done.stdout
    assert done.stdout.count("\n") == 1
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["3"]
    resumed = run_program(tmp_path, "9", "train.log_every=0", "mesh.fsdp=1")
    assert resumed.stdout.strip() == "9 finished", resumed.stderr[-2000:]

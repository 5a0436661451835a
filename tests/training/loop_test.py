"""The loop: stop, kill, resume, refuse, diverge. On a toy stage; programs run as a user would run
them.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest

from chameleon_jax.training import loop
from chameleon_jax.training.checkpoints import CheckpointError
from chameleon_jax.weights.params import WeightsError, save_params
from tests.training import toy

HERE = Path(__file__).parent


def run_program(workdir: Path, *arguments: str, devices: int = 1) -> subprocess.CompletedProcess:
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(HERE.parents[1])}
    env["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    command = [sys.executable, str(HERE / "toy.py"), str(workdir), *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)


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
    losses = [(line["step"], line["loss"]) for line in metrics(tmp_path)]
    assert losses == [
        (line["step"], line["loss"]) for line in metrics(unbroken)
    ]  # nothing twice, nothing missing
    assert "going on from step 3" in resumed.stderr


def test_sigterm_saves_and_exits_with_zero(tmp_path, unbroken):
    stopped = run_program(tmp_path, "6", "term=4", "train.checkpoint_every=100")
    assert stopped.returncode == 0 and stopped.stdout.strip() == "5 signal", stopped.stderr[-2000:]
    assert (tmp_path / "checkpoints" / "5").is_dir()
    assert run_program(tmp_path, "6").returncode == 0
    for name, value in saved_params(unbroken).items():
        np.testing.assert_array_equal(value, saved_params(tmp_path)[name], err_msg=name)


def test_restores_onto_four_devices(tmp_path, unbroken):
    assert run_program(tmp_path, "3").stdout.strip() == "3 finished"
    resumed = run_program(tmp_path, "6", "mesh.fsdp=2", "mesh.data=2", devices=4)
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
    assert run_two(tmp_path, "3", "mesh.fsdp=2") == ["3 finished"] * 2
    assert run_two(tmp_path, "6", "mesh.fsdp=2") == ["6 finished"] * 2
    for name, value in saved_params(unbroken).items():
        np.testing.assert_allclose(
            value, saved_params(tmp_path)[name], rtol=1e-5, atol=1e-6, err_msg=name
        )
    assert [line["step"] for line in metrics(tmp_path)] == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]  # only one of them writes


def config(workdir, steps, *overrides):
    return toy.config(workdir, steps, [*overrides, "mesh.fsdp=1"])


def test_a_checkpoint_of_another_stage_is_refused(tmp_path):
    loop.train(config(tmp_path, 2), toy.stage(), toy.ToyFeed())
    with pytest.raises(
        CheckpointError, match=r"of the stage 'toy', this run is 'other'.*init_from"
    ):
        loop.train(config(tmp_path, 4), toy.stage("other"), toy.ToyFeed())


def test_a_checkpoint_of_another_optimiser_is_refused(tmp_path):
    loop.train(config(tmp_path, 2), toy.stage(), toy.ToyFeed())
    with pytest.raises(
        CheckpointError, match=r"another model or optimiser: unexpected opt_state.*mu"
    ):
        loop.train(config(tmp_path, 4, "optimizer.b1=0.0"), toy.stage(), toy.ToyFeed())


def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_saved(tmp_path):
    with pytest.raises(loop.TrainingDivergedError, match=r"step 5: .*loss.*not finite"):
        loop.train(
            config(tmp_path, 6, "train.checkpoint_every=1"), toy.stage(), toy.ToyFeed(poison=4)
        )
    saved = sorted(
        int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()
    )
    assert saved == [3, 4]


def test_time_limit_saves(tmp_path):
    outcome = loop.train(
        config(tmp_path, 1000, "train.max_minutes=1e-9"), toy.stage(), toy.ToyFeed()
    )
    assert (outcome.step, outcome.reason) == (1, "time")
    assert (tmp_path / "checkpoints" / "1").is_dir()


def test_learns_writes_and_shows(tmp_path):
    overrides = [
        "train.preview_every=10",
        "train.eval_every=10",
        "train.log_every=10",
        "train.checkpoint_every=10",
    ]
    outcome = loop.train(
        config(tmp_path, 60, *overrides), toy.stage(), toy.ToyFeed(), [next(toy.ToyFeed())]
    )
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


def test_a_finished_run_does_nothing_more(tmp_path):
    first = loop.train(config(tmp_path, 3), toy.stage(), toy.ToyFeed())
    again = loop.train(config(tmp_path, 3), toy.stage(), toy.ToyFeed())
    assert again.step == 3 and again.reason == "finished"
    for a, b in zip(jax.tree.leaves(first.state), jax.tree.leaves(again.state), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_state_can_be_read_without_touching_the_run(tmp_path):
    outcome = loop.train(config(tmp_path, 3), toy.stage(), toy.ToyFeed())
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    state = loop.load_state(config(tmp_path, 100), toy.stage())
    for a, b in zip(jax.tree.leaves(outcome.state), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(a, b)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    with pytest.raises(CheckpointError, match="no such folder of checkpoints"):
        loop.load_state(config(tmp_path / "none", 1), toy.stage())


def test_starts_from_exported_weights_and_refuses_others(tmp_path):
    network = toy.stage().trained["toy"]
    params = network.init(jax.random.key(7))
    save_params(tmp_path / "toy.safetensors", network.bind(params))
    outcome = loop.train(
        config(tmp_path / "run", 0, f"init_from={tmp_path}"), toy.stage(), toy.ToyFeed()
    )
    for name, value in params.items():
        np.testing.assert_array_equal(outcome.state.params["toy"][name], value)
        np.testing.assert_array_equal(outcome.state.ema["toy"][name], value)
    with pytest.raises(WeightsError, match="no such file"):
        loop.train(
            config(tmp_path / "none", 1, f"init_from={tmp_path / 'nowhere'}"),
            toy.stage(),
            toy.ToyFeed(),
        )

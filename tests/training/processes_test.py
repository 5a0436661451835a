"""Several processes of the training command: what they compute, and what happens when one dies."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from chameleon_jax import processes
from chameleon_jax.config import load_config
from chameleon_jax.data import records, tokenizer
from chameleon_jax.data.examples import RunwayExamples
from chameleon_jax.processes import LOST, Meeting, ProcessError
from chameleon_jax.training.networks import build_network
from chameleon_jax.weights.params import save_params

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> list[str]:
    """Overrides of a run of teacher forcing at its smallest: clips, tokenizer, a random VAE."""
    from tests.data import fake_renderer

    folder = tmp_path_factory.mktemp("inputs")
    examples = RunwayExamples(size=(32, 32), frames=21, render=fake_renderer.render)
    for start, clips in ((0, 8), (800_000, 4)):
        records.prepare_runway(folder / "clips", clips, examples, seed_start=start, workers=0)
    texts = [f"A person in garment {i}. Walks {i} steps." for i in range(20)]
    tokenizer.train_pieces(texts, 300).save(str(folder / "tokenizer.json"))
    network = build_network("vae", load_config("configs/teacher_forcing.py:smoke"))
    save_params(folder / "vae.safetensors", network.bind(network.init(jax.random.key(0))))
    return [
        f"data.dir={folder / 'clips'}",
        f"data.tokenizer={folder / 'tokenizer.json'}",
        f"weights.vae={folder / 'vae.safetensors'}",
        "data.lengths=((21,4),)",
        "data.batch=4",
        "optimizer.name=adamw",  # compiles sooner
        "train.eval_every=2",
        "preview.samples=3",
    ]


def start(overrides, *flags: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "launch.train", "--config=configs/teacher_forcing.py:smoke"]
    command += [f"--config.{override}" for override in overrides]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [*command, *flags], cwd=ROOT, env=env, stdout=pipe, stderr=pipe, text=True
    )


@contextlib.contextmanager
def several(count: int, overrides):
    """That many processes of one run; all are dead at the end."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    meeting = [f"--coordinator=localhost:{port}", f"--processes={count}"]
    started = [start(overrides, *meeting, f"--process_id={rank}") for rank in range(count)]
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def end_of(process: subprocess.Popen, seconds: float = 900) -> tuple[int, list[str]]:
    """Exit code and lines on stderr."""
    _, said = process.communicate(timeout=seconds)
    return process.returncode, said.splitlines()


def metrics(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(inputs, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("alone")
    code, said = end_of(start([*inputs, f"workdir={workdir}"]))
    assert code == 0, said
    return workdir


@pytest.mark.slow
def test_several_processes_train_what_one_does(inputs, alone, tmp_path):
    count = 4
    with several(count, [*inputs, f"workdir={tmp_path}"]) as started:
        ends = [end_of(process) for process in started]
    assert [code for code, _ in ends] == [0] * count, ends
    assert "step 4/4" in "".join(ends[0][1])
    for _, said in ends[1:]:  # only the first one tells how it goes
        assert not [line for line in said if "step " in line or "compil" in line]
    expected, found = metrics(alone), metrics(tmp_path)
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    assert len([line for line in found if "eval/loss" in line]) == 2
    for one, other in zip(expected, found, strict=True):
        for name in ("loss", "eval/loss", "grad_norm"):
            if name in one:
                np.testing.assert_allclose(other[name], one[name], rtol=1e-5, err_msg=f"{one}")
    shown = [
        np.asarray(Image.open(run / "previews" / "step_0000004.png"), int)
        for run in (alone, tmp_path)
    ]
    assert shown[0].shape == shown[1].shape and np.abs(shown[0] - shown[1]).max() <= 2
    names = {path.name for path in (alone / "export").iterdir()}
    assert {path.name for path in (tmp_path / "export").iterdir()} == names


@pytest.mark.slow
@pytest.mark.parametrize(("count", "victim", "goes_on"), [(2, 0, True), (3, 1, False)])
def test_when_one_is_killed_all_end_and_the_run_goes_on(inputs, tmp_path, count, victim, goes_on):
    given = [*inputs, f"workdir={tmp_path}", "train.steps=100000", "train.log_every=0"]
    given += [f"data.batch={count}", f"data.lengths=((21,{count}),)", f"preview.samples={count}"]
    given += ["train.eval_every=0", "train.preview_every=0", "train.checkpoint_every=5"]
    with several(count, given) as started:
        deadline = time.monotonic() + 600
        while not (tmp_path / "checkpoints" / "10").is_dir():
            assert time.monotonic() < deadline and started[victim].poll() is None
            time.sleep(0.1)
        started[victim].send_signal(signal.SIGKILL)
        begin = time.monotonic()
        others = [process for process in started if process is not started[victim]]
        for process in others:
            code, said = end_of(process, 60 - (time.monotonic() - begin))
            assert code == LOST, said
            assert "another process of this run was lost" in said[-1]
            assert "The same command on all hosts resumes the run" in said[-1]
    if not goes_on:  # shown for two processes
        return
    with several(count, [*given, "train.max_minutes=0.01"]) as started:
        ends = [end_of(process) for process in started]
    assert [code for code, _ in ends] == [0] * count, ends
    (resumed,) = [line for line in ends[0][1] if "resumed at step" in line]
    assert int(resumed.split("step ")[1].split()[0]) >= 10
    assert (tmp_path / "export" / "dit.safetensors").is_file()


@pytest.mark.slow
def test_a_signal_to_one_process_saves_and_ends_all(inputs, tmp_path):
    """Also when it comes twice, as from Slurm, which signals parents and children."""
    given = [*inputs, f"workdir={tmp_path}", "train.steps=100000", "train.log_every=0"]
    given += ["train.eval_every=0", "train.preview_every=0", "train.checkpoint_every=5"]
    with several(2, given) as started:
        deadline = time.monotonic() + 600
        while not (tmp_path / "checkpoints" / "5").is_dir():
            assert time.monotonic() < deadline and started[1].poll() is None
            time.sleep(0.1)
        started[1].send_signal(signal.SIGTERM)
        time.sleep(0.2)
        started[1].send_signal(signal.SIGTERM)
        ends = [end_of(process) for process in started]
    assert [code for code, _ in ends] == [143] * 2, ends
    assert "stopped by SIGTERM" in ends[0][1][-1]


def test_an_error_of_one_process_says_which(inputs, tmp_path):
    """The error is of all of them here; each says its number, and none waits for the others."""
    with several(2, [*inputs, f"workdir={tmp_path}", "mesh.tensor=3"]) as started:
        ends = [end_of(process, 120) for process in started]
    assert [code for code, _ in ends if code != LOST] and {code for code, _ in ends} <= {2, LOST}
    said = [line for _, lines in ends for line in lines if line.startswith("error: process ")]
    assert said and "of 2: mesh" in said[0] and "does not fit 2 devices" in said[0]


def test_without_a_cluster_it_is_one_quick_line():
    begin = time.monotonic()
    code, said = end_of(start(["workdir=x", "data.dir=y"], "--distributed"), 60)
    assert code == 2 and time.monotonic() - begin < 60
    assert len(said) == 1 and said[0].startswith("error: --distributed: no cluster is found here")
    assert "--coordinator HOST:PORT --processes N --process_id I" in said[0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("host:1", 2, None), "--process_id I is missing; give all of"),
        ((None, 2, 0), "--coordinator HOST:PORT is missing"),
        (("host", 2, 0), "--coordinator is 'host'; expected HOST:PORT"),
        (("host:99999", 2, 0), "expected HOST:PORT"),
        (("host:1", 2, 2), "--process_id is 2 of 2 --processes; expected 0 to 1"),
    ],
)
def test_half_a_meeting_is_refused(given, message):
    with pytest.raises(ProcessError, match=message):
        Meeting(*given)


SUPERVISED = """
import os, signal, sys, time
from chameleon_jax import processes

def work():
    {work}

sys.exit(processes.supervise(work, "waiting for nobody"))
"""


@pytest.mark.parametrize(
    ("work", "code", "last"),
    [
        ("return 143", 143, ""),
        ("sys.exit(2)", 2, ""),
        ("1 / 0", 1, "ZeroDivisionError: division by zero"),
        ("os.abort()", LOST, "another process of this run was lost, or did not come (waiting for"),
        ("os._exit(1)", LOST, "another process of this run was lost"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "error: this process was killed (SIGKILL)"),
        ("os.kill(os.getppid(), signal.SIGTERM); time.sleep(20)", 143, "killed (SIGTERM)"),
    ],
)
def test_the_parent_says_how_its_child_ended(work, code, last):
    done = subprocess.run(
        [sys.executable, "-c", SUPERVISED.format(work=work)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == code, done.stderr
    assert last in (done.stderr.splitlines() or [""])[-1]


def test_a_process_that_does_not_come_is_one_line():
    work = "processes.connect(processes.Meeting('localhost:1', 2, 1), timeout=3)"
    done = subprocess.run(
        [sys.executable, "-c", SUPERVISED.format(work=work)],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == LOST, done.stderr
    assert "lost, or did not come (waiting for nobody)" in done.stderr.splitlines()[-1]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child with its parent")
def test_a_killed_parent_takes_its_child_along():
    work = "print(os.getpid(), flush=True); time.sleep(60)"
    parent = subprocess.Popen(
        [sys.executable, "-c", SUPERVISED.format(work=work)], cwd=ROOT, stdout=subprocess.PIPE
    )
    child = int(parent.stdout.readline())
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 20
    while is_running(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(child)


def is_running(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def test_the_constants_leave_room_for_a_minute():
    assert processes.HEARTBEAT < 60

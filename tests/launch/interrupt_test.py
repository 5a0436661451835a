"""Ctrl-C in every command: one line, exit code 130, at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from chameleon_jax.weights.tensors import write_tensors

ROOT = Path(__file__).parents[2]

SLOW_CONVERSION = """
import sys, time
from converters import writing
from launch import convert
def slow(*arguments):
    print("writing", file=sys.stderr, flush=True)
    time.sleep(100)
writing.write_with_progress = slow
convert.main(sys.argv[1:])
"""


def interrupted(argv, marker):
    """Start a command, press Ctrl-C once `marker` is on stderr. Code, stderr, seconds."""
    process = subprocess.Popen(
        [sys.executable, *argv],
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": "1", "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,  # a group of its own, as a shell gives a command
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    seen = b""
    try:
        while marker not in seen:
            piece = process.stderr.read1(4096)
            assert piece, seen.decode()
            seen += piece
        begin = time.monotonic()
        os.killpg(process.pid, signal.SIGINT)
        rest = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    return process.returncode, (seen + rest).decode(), time.monotonic() - begin


def test_rendering(tmp_path):
    small = ["--frames=5", "--size=64x40", "--workers=1"]
    argv = ["-m", "launch.prepare", "runway", f"--out={tmp_path}", "--clips=4000", *small]
    code, stderr, seconds = interrupted(argv, b"records")
    assert code == 130 and seconds < 30
    assert stderr.splitlines()[-1] == "interrupted; the same command continues"
    assert "Traceback" not in stderr


@pytest.mark.slow
def test_encoding_what_is_rendered_on_the_way(tmp_path):
    """The workers end, too: one that waited for its parent held stderr open for good."""
    small = ["--frames=5", "--workers=1", "--batch=2", "--clips=400", "--world=mirror"]
    weights = "--weights=chameleon_jax/assets/runway_tiny"
    argv = ["-m", "launch.prepare", "latents", f"--out={tmp_path}", weights, *small]
    code, stderr, seconds = interrupted(argv, b" left")
    assert code == 130 and seconds < 30
    assert stderr.splitlines()[-1] == "interrupted; the same command continues"
    assert "Traceback" not in stderr


def test_timing_of_the_renderer():
    argv = ["-m", "launch.runway", "bench", "--clips=1000", "--workers=1"]
    code, stderr, seconds = interrupted(argv, b"rendering in 1 processes ...\n")
    assert (code, stderr.splitlines()[-1]) == (130, "interrupted")
    assert seconds < 30 and "Traceback" not in stderr


def test_converting(tmp_path):
    rank = np.ones((4, 32), np.float32)
    name = "diffusion_model.blocks.0.ffn.0"
    tensors = {f"{name}.lora_A.weight": rank, f"{name}.lora_B.weight": np.ones((64, 4), np.float32)}
    write_tensors(tmp_path / "style.safetensors", tensors)
    argv = [f"{tmp_path}/style.safetensors", "--to=kohya", f"--out={tmp_path}/out"]
    code, stderr, _ = interrupted(["-c", SLOW_CONVERSION, *argv], b"writing\n")
    assert (code, stderr.splitlines()[-1]) == (130, "interrupted; nothing was written")
    assert [path.name for path in tmp_path.iterdir()] == ["style.safetensors"]


@pytest.mark.parametrize(
    ("module", "out"), [("launch.sample", "o.mp4"), ("launch.bench", "o.json")]
)
def test_before_anything_is_loaded(module, out, tmp_path):
    """While JAX is imported, too."""
    code = f"""
import signal, sys, os
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "jax":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
import importlib
importlib.import_module({module!r}).main(["--out={tmp_path}/{out}"])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")
    assert list(tmp_path.iterdir()) == []

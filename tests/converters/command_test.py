"""The command itself: help, exit codes, one line for what is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from converters import __main__ as command

ROOT = Path(__file__).parents[2]
RUNWAY_TINY = ROOT / "chameleon_jax/assets/runway_tiny"


def failed(capsys, *argv: str) -> str:
    """What is said of a command line that cannot be used."""
    with pytest.raises(SystemExit) as stop:
        command.main([str(item) for item in argv])
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_help_imports_neither_numpy_nor_jax():
    script = (
        "import sys\n"
        "from converters import __main__ as command\n"
        "try:\n"
        "    command.main(['--help'])\n"
        "except SystemExit:\n"
        "    print(sorted({'numpy', 'jax', 'flax', 'torch', 'safetensors'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    *lines, imported = done.stdout.splitlines()
    assert imported == "[]"
    for flag in ("--to LAYOUT", "--dtype NAME", "--part NAME", "--variant NAME", "--lora FILE"):
        assert any(line.startswith(f"  {flag}") for line in lines)
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: IN, --to, --out"),
        (["x", "--to", "jaks", "--out", "y"], "--to: 'jaks': expected one of jax, official"),
        (
            ["x", "--to", "jax", "--out", "y", "--dtpe", "keep"],
            "unknown flag --dtpe; did you mean --dtype?",
        ),
        (["x", "--to", "jax", "--out", "y", "--lora", "z"], "x: no such file or folder"),
    ],
)
def test_a_command_line_that_is_wrong_is_one_line(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    said = failed(capsys, *argv)
    assert said.startswith("error: ") and message in said and said.count("\n") == 1
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("strength", ["nan", "inf", "much"])
def test_a_strength_that_is_no_number_is_one_line(strength, tmp_path, capsys):
    dit = RUNWAY_TINY / "dit.safetensors"
    lora = f"{dit}@{strength}"
    said = failed(capsys, dit, "--lora", lora, "--to", "jax", "--out", tmp_path / "out")
    assert said == (
        f"error: --lora {lora}: {strength!r} is not a strength; expected a number, as in FILE@0.8\n"
    )


def test_a_name_that_is_not_utf_8_is_refused_before_anything_is_written(tmp_path):
    out = os.fsencode(tmp_path / "out") + b"\xff"
    weights = os.fsencode(RUNWAY_TINY / "vae.safetensors")
    done = subprocess.run(
        [sys.executable, "-m", "converters", weights, "--to", "jax", "--out", out],
        cwd=ROOT,
        capture_output=True,
    )
    assert done.returncode == 2 and b"not UTF-8; expected" in done.stderr
    assert done.stderr.count(b"\n") == 1 and os.listdir(tmp_path) == []

"""The console script `chameleon`, and modules of `launch` that are no commands."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from chameleon_jax import __version__
from launch import __main__ as chameleon

ROOT = Path(__file__).parents[2]


def run(*argv: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "launch", *argv],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


def test_help_lists_every_command():
    done = run("--help")
    assert done.returncode == 0 and done.stderr == ""
    for name in chameleon.MODULES:
        assert f"chameleon {name} " in done.stdout


def test_version(capsys):
    chameleon.main(["--version"])
    assert capsys.readouterr().out == f"chameleon_jax {__version__}\n"


def test_commands_are_called_from_anywhere(tmp_path):
    assert "flags:" in run("sample", "--help", cwd=tmp_path).stdout
    assert "seeds of the rows" in run("runway", "sheet", "--help", cwd=tmp_path).stdout
    done = run("runway", "sheet", "--sed=1", cwd=tmp_path)
    assert done.returncode == 2 and "did you mean --seeds?" in done.stderr
    done = run("sampel", cwd=tmp_path)
    assert done.returncode == 2 and "did you mean sample?" in done.stderr


@pytest.mark.parametrize("name", ["sample_stream", "sample_clip", "sample_shots", "bench_stream"])
def test_a_part_of_a_command_says_which_command(name, capsys):
    with pytest.raises(SystemExit) as exit_:
        runpy.run_module(f"launch.{name}", run_name="__main__")
    stderr = capsys.readouterr().err
    assert exit_.value.code == 2
    # Before it Python may warn that the module has been imported in this process.
    error = stderr[stderr.index("error:") :]
    assert error.startswith(f"error: launch.{name} is a part of a command; run python -m launch.")


def test_the_script_is_declared():
    assert '"chameleon=launch.__main__:main"' in (ROOT / "setup.py").read_text()

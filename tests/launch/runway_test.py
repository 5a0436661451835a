"""The contact sheet and the benchmark, as commands."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]


def command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "launch.runway", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_sheet(tmp_path):
    out = tmp_path / "made" / "sheet.png"
    small = ["--height", "32", "--width", "20", "--frames", "5", "--enlarge", "1"]
    done = command("sheet", "--seeds", "1,2", "--out", str(out), *small)
    assert done.returncode == 0, done.stderr
    assert "2/2" in done.stderr
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == ["1", "2", str(out)]
    with Image.open(out) as picture:
        assert picture.size == ((2 + 6 + 1 + 6) * (20 + 2), 2 * (32 + 2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected a command, sheet, bench; got none"),
        (["sheet", "--seeds", "one"], "--seeds: 'one': expected whole numbers"),
        (["sheet", "--seeds", ""], "expected whole numbers"),
        (["sheet", "--seeds", "²"], "expected whole numbers"),
        (["sheet", "--fps", "0"], "--fps: '0': expected a number above 0"),
        (["sheet", "--frames", "1000000000"], "expected a whole number from 1 to 100000"),
        (["sheet", "--out", "sheet.xyz"], "expected a name that ends in .png"),
        (["bench", "--workers", "0"], "expected a whole number from 1 to 1024"),
        (["bench", "--seeds", "1"], "unknown flag --seeds"),
    ],
)
def test_bad_requests_get_one_line(arguments, message):
    done = command(*arguments)
    assert done.returncode == 2
    assert message in done.stderr and len(done.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_bench_prints_a_line_and_json():
    small = "--clips 1 --workers 1 --frames 2 --height 32 --width 20"
    done = command("bench", *small.split())
    assert done.returncode == 0, done.stderr
    line, text = done.stdout.strip().splitlines()
    result = json.loads(text)
    assert result["triplets_per_hour"] > 0 and str(result["triplets_per_hour"]) in line

"""Curves on a picture: what is read, what is drawn where, what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from chameleon_jax.training import curves
from chameleon_jax.training.curves import Curve, CurvesError
from launch import curves as command


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    lines = [
        {"step": step, "seconds": 2.0 * step, "loss": 1 / step, "note": "text"}
        for step in range(1, 41)
    ]
    lines += [{"step": 40, "seconds": 90.0, "sample/motion_ratio": 0.9, "bad": float("nan")}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + '{"step": 41, "lo')  # still being written
    return folder


def test_curves_are_read_by_step_or_seconds(run):
    found = curves.read_curves(run)
    assert found.keys() == {"loss", "sample/motion_ratio"}
    np.testing.assert_array_equal(found["loss"].x, np.arange(1, 41))
    np.testing.assert_allclose(found["loss"].y, 1 / np.arange(1, 41))
    by_time = curves.read_curves(run / "metrics.jsonl", "seconds")
    np.testing.assert_array_equal(by_time["loss"].x, 2 * np.arange(1, 41))


def test_what_cannot_be_read_is_one_line(tmp_path):
    with pytest.raises(CurvesError, match="expected the workdir of a run"):
        curves.read_curves(tmp_path / "nothing")
    (tmp_path / "metrics.jsonl").write_text("\n[1]\nnotes\n")
    with pytest.raises(CurvesError, match="no metrics with a step yet"):
        curves.read_curves(tmp_path)


def test_metrics_are_chosen_by_patterns_in_their_order(run):
    runs = {"a": curves.read_curves(run)}
    assert curves.choose(runs) == ["loss", "sample/motion_ratio"]
    assert curves.choose(runs, ["*_ratio", "*"]) == ["sample/motion_ratio", "loss"]
    with pytest.raises(CurvesError, match=r"no metric matches losss; expected some of loss, "):
        curves.choose(runs, ["losss"])


def test_an_average_starts_where_the_values_do():
    np.testing.assert_allclose(curves.smoothed(np.full(5, 3.0), 0.9), 3.0)
    np.testing.assert_allclose(curves.smoothed(np.array([1.0, 2, 4]), 0.5), [1, 5 / 3, 3])
    noisy = np.random.default_rng(0).normal(size=500)
    assert curves.smoothed(noisy, 0.95)[100:].std() < 0.3


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0, 2000, [0, 500, 1000, 1500, 2000]), (-3, 4, [-2, 0])],
)
def test_ticks_are_round_numbers(low, high, expected):
    found = curves.ticks(low, high, 5)
    np.testing.assert_allclose(found[: len(expected)], expected, atol=1e-9)
    assert low <= found[0] and found[-1] <= high and 3 <= len(found) <= 8


def test_numbers_on_axes():
    texts = [curves.short(x) for x in (0.25, 1500, 20_000, 1e-15, 3e-5, 1e9)]
    assert texts == ["0.25", "1500", "20k", "0", "3e-05", "1e+09"]


def rows_of(picture: Image.Image, colour: str, column: int) -> np.ndarray:
    """Rows in which a column of pixels has a colour."""
    rgb = np.asarray(picture)[:, column].astype(int)
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return np.flatnonzero(np.abs(rgb - wanted).max(axis=-1) < 60)


def test_every_run_has_its_line_where_its_values_are():
    x = np.arange(101.0)
    runs = {
        "rising": {"loss": Curve(x, x / 100)},
        "falling": {"loss": Curve(x, 1 - x / 100)},
    }
    picture = curves.draw(runs, ["loss"])
    assert picture.size == (curves.WIDTH, curves.HEIGHT + curves.LEGEND)
    left, right = curves.LEFT + 15, curves.WIDTH - curves.RIGHT - 15
    rising, falling = curves.PALETTE[:2]
    tops = curves.LEGEND + curves.TOP  # below the title
    heights = {
        (colour, column): np.mean([r for r in rows_of(picture, colour, column) if r > tops])
        for colour in (rising, falling)
        for column in (left, right)
    }
    assert heights[rising, left] > heights[rising, right] + 100
    assert heights[falling, right] > heights[falling, left] + 100
    assert abs(heights[rising, left] - heights[falling, right]) < 3


def test_an_explosion_is_drawn_on_a_logarithmic_axis():
    x = np.arange(1.0, 101)
    flat = np.where(x < 90, 1.0, 1.1)
    for y, log in ((np.where(x < 90, 1.0, 1e4), True), (flat, False), (flat - 1, False)):
        assert curves._axes([Curve(x, y)], []).log is log
    steep = curves.draw({"a": {"loss": Curve(x, 10.0 ** (x / 10 - 5))}}, ["loss"])
    columns = [curves.LEFT + 80, curves.LEFT + 160, curves.LEFT + 240]
    rows = [rows_of(steep, curves.PALETTE[0], column).mean() for column in columns]
    assert abs((rows[0] - rows[1]) - (rows[1] - rows[2])) < 4  # a straight line


def test_single_points_and_constant_curves_are_drawn():
    curve = {"one": Curve(np.array([5.0]), np.array([2.0]))}
    constant = {"same": Curve(np.arange(3.0), np.zeros(3))}
    for metrics in (curve, constant):
        picture = np.asarray(curves.draw({"a": metrics}, list(metrics)))
        assert (picture.min(axis=-1) < 200).any()


def test_the_command_draws_runs_side_by_side(run, tmp_path, capsys):
    out = tmp_path / "curves.png"
    with pytest.raises(SystemExit) as stopped:
        command.main([str(run), "--smooth=0.9", "--x=seconds", f"--out={out}"])
    assert not stopped.value.code and f"written to {out}" in capsys.readouterr().out
    assert Image.open(out).size == (2 * curves.WIDTH, curves.HEIGHT)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out=a.jpg"], "expected the name of a file that ends in .png"),
        (["--smooth=1"], "expected a number below 1"),
        (["--metrics=nothing"], "no metric matches nothing"),
        (["elsewhere"], "elsewhere: expected the workdir of a run"),
    ],
)
def test_faults_of_the_command_are_one_line(run, tmp_path, arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        command.main([str(run), *arguments])
    assert stopped.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


def test_names_tell_runs_apart():
    assert command._names(["runs/a", "runs/b/metrics.jsonl"]) == ["a", "b"]
    assert command._names(["old/dmd", "new/dmd"]) == ["old/dmd", "new/dmd"]
    with pytest.raises(ValueError, match="expected each run once"):
        command._names(["a", "a"])

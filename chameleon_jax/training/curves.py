"""The curves of one or several runs on one picture, from their metrics.jsonl.

    curves = {"teacher": read_curves("runs/teacher")}
    draw(curves, choose(curves, ["loss", "sample/*_ratio"])).save("curves.png")

TensorBoard shows the same numbers; this is for a quick look, and for a document. Everything is
drawn three times too large and then made smaller, which smooths the lines.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from chameleon_jax.errors import UserError, one_line

# What tells a healthy run from another one, in the order of the panels.
PATTERNS = (
    "loss",
    "eval/loss",
    "generator/loss",
    "critic/loss",
    "grad_norm",
    "*/grad_norm",
    "grad_norm/*",
    "dmd/*",
    "reward/mean",
    "sample/*_ratio",
    "sample/latent_shift",
    "x/*",
)
# Dashed lines: what the data have. Red lines: where the alarms of configs/training.py are.
DATA = {"_ratio": 1.0}
LIMITS = {
    "sample/motion_ratio": 0.7,
    "sample/colour_ratio": 1.15,
    "sample/contrast_ratio": 0.3,
}
# Colours that people with colour blindness can tell apart (Okabe and Ito, 2008).
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
INK, GREY, GRID, RED, WHITE = "#222222", "#666666", "#e4e4e4", "#c00000", "#ffffff"

SCALE = 3  # how much larger everything is drawn
WIDTH, HEIGHT = 420, 250  # pixels of a panel
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 30, 26  # around the axes
LEGEND = 28  # height
MANY = 30  # a curve of fewer points is not smoothed
STEEP = 30  # a curve whose largest value is so many medians is drawn on a logarithmic axis


class CurvesError(UserError):
    """There is nothing to draw. The message is one line."""


@dataclasses.dataclass(frozen=True)
class Curve:
    """Values of a metric, [n], at steps or seconds [n]."""

    x: np.ndarray
    y: np.ndarray


Curves = dict[str, Curve]  # by the name of the metric


def read_curves(run: str | os.PathLike, x: str = "step") -> Curves:
    """The curves of a run, which may still be going on.

    Args:
      run: its workdir, or a metrics.jsonl.
      x: "step" or "seconds".

    Raises:
      CurvesError: it cannot be read, or there is nothing in it.
    """
    path = Path(run) / "metrics.jsonl" if Path(run).is_dir() else Path(run)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CurvesError(
            f"{run}: expected the workdir of a run, or its metrics.jsonl ({one_line(error)})"
        ) from None
    points: dict[str, list[tuple[float, float]]] = {}
    for line in lines:
        values = _numbers(line)
        if x not in values:
            continue
        for name in values.keys() - {"step", "seconds"}:
            points.setdefault(name, []).append((values[x], values[name]))
    if not points:
        raise CurvesError(f"{path}: no metrics with a {x} yet")
    return {name: Curve(*np.array(found, float).T) for name, found in sorted(points.items())}


def _numbers(line: str) -> dict[str, float]:
    """The finite numbers of a line; none of one that is not whole yet."""
    try:
        values = json.loads(line)
    except ValueError:
        return {}
    if not isinstance(values, dict):
        return {}
    numbers = {k: v for k, v in values.items() if isinstance(v, (int, float))}
    return {name: value for name, value in numbers.items() if math.isfinite(value)}


def choose(runs: Mapping[str, Curves], patterns: Iterable[str] = PATTERNS) -> list[str]:
    """Names of metrics, in the order of the patterns that they match (`*` for anything).

    Raises:
      CurvesError: no run has such a metric.
    """
    known = sorted({name for curves in runs.values() for name in curves})
    patterns = list(patterns)
    found = [name for pattern in patterns for name in fnmatch.filter(known, pattern)]
    if not found:
        raise CurvesError(
            f"no metric matches {', '.join(patterns)}; expected some of {', '.join(known)}"
        )
    return list(dict.fromkeys(found))


def smoothed(y: np.ndarray, weight: float) -> np.ndarray:
    """Exponential average of [n] values, without the pull towards a start at zero.

    Args:
      y: the values.
      weight: of the past, in [0, 1).
    """
    average, total, result = 0.0, 0.0, np.empty(len(y))
    for index, value in enumerate(y):
        average = weight * average + (1 - weight) * value
        total = weight * total + 1 - weight
        result[index] = average / total
    return result


def draw(
    runs: Mapping[str, Curves],
    names: Sequence[str],
    *,
    columns: int = 3,
    smooth: float = 0.0,
) -> Image.Image:
    """One panel a metric, one colour a run.

    Args:
      runs: curves by the name of the run.
      names: of the metrics.
      columns: panels side by side, at most.
      smooth: see `smoothed`; above 0 the values of long curves are drawn pale, with their average.

    Returns:
      RGB, `WIDTH` x `HEIGHT` pixels a panel.
    """
    columns = min(columns, len(names))
    rows = -(-len(names) // columns)
    legend = LEGEND if len(runs) > 1 else 0
    size = (columns * WIDTH * SCALE, (rows * HEIGHT + legend) * SCALE)
    sheet = Image.new("RGB", size, WHITE)
    colours = {run: PALETTE[i % len(PALETTE)] for i, run in enumerate(runs)}
    if legend:
        _draw_legend(ImageDraw.Draw(sheet), colours)
    for index, name in enumerate(names):
        row, column = divmod(index, columns)
        found = {colours[run]: curves[name] for run, curves in runs.items() if name in curves}
        panel = _panel(name, found, smooth)
        sheet.paste(panel, (column * WIDTH * SCALE, (row * HEIGHT + legend) * SCALE))
    return sheet.resize((size[0] // SCALE, size[1] // SCALE), Image.Resampling.LANCZOS)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size * SCALE)


def _draw_legend(canvas: ImageDraw.ImageDraw, colours: Mapping[str, str]) -> None:
    x, y, font = LEFT * SCALE, LEGEND * SCALE // 2, _font(12)
    for run, colour in colours.items():
        canvas.line([(x, y), (x + 22 * SCALE, y)], colour, 3 * SCALE)
        x += 28 * SCALE
        canvas.text((x, y), run, INK, font, anchor="lm")
        x += int(canvas.textlength(run, font)) + 20 * SCALE


@dataclasses.dataclass(frozen=True)
class _Axes:
    """From numbers to pixels of a panel."""

    x: tuple[float, float]
    y: tuple[float, float]
    log: bool

    def points(self, x: np.ndarray, y: np.ndarray) -> list[tuple[float, float]]:
        high = np.log10(y) if self.log else y
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (high - self.y[0]) / (self.y[1] - self.y[0])
        px = SCALE * (LEFT + across * (WIDTH - LEFT - RIGHT))
        py = SCALE * (HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM))
        return list(zip(px.tolist(), py.tolist(), strict=True))

    def level(self, value: float) -> float | None:
        """Pixel row of a value; None if it is outside."""
        if self.log and value <= 0:
            return None
        high = math.log10(value) if self.log else value
        if not self.y[0] <= high <= self.y[1]:
            return None
        return self.points(np.array([self.x[0]]), np.array([value]))[0][1]


def _axes(curves: Iterable[Curve], limits: Sequence[float]) -> _Axes:
    x = np.concatenate([curve.x for curve in curves])
    y = np.concatenate([curve.y for curve in curves])
    log = bool(y.min() > 0 and y.max() > STEEP * np.median(y))
    heights = np.log10(y) if log else np.r_[y, list(limits)]
    low, high = float(heights.min()), float(heights.max())
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    right = float(x.max()) if x.max() > x.min() else float(x.min()) + 1
    return _Axes((float(x.min()), right), (low - margin, high + margin), log)


def _panel(name: str, curves: Mapping[str, Curve], smooth: float) -> Image.Image:
    panel = Image.new("RGB", (WIDTH * SCALE, HEIGHT * SCALE), WHITE)
    canvas = ImageDraw.Draw(panel)
    data = next((value for end, value in DATA.items() if name.endswith(end)), None)
    limit = LIMITS.get(name)
    axes = _axes(curves.values(), [v for v in (data, limit) if v is not None])
    title = f"{name} (log)" if axes.log else name
    canvas.text((LEFT * SCALE, TOP * SCALE // 2), title, INK, _font(13), anchor="lm")
    _draw_grid(canvas, axes)
    for value, colour in ((data, GREY), (limit, RED)):
        row = None if value is None else axes.level(value)
        if row is not None:
            _draw_dashes(canvas, row, colour)
    for colour, curve in curves.items():
        lines = [(curve.y, colour)]
        if smooth and len(curve.y) >= MANY:
            lines = [(curve.y, _pale(colour)), (smoothed(curve.y, smooth), colour)]
        for y, ink in lines:
            _draw_line(canvas, axes.points(curve.x, y), ink)
    return panel


def _draw_grid(canvas: ImageDraw.ImageDraw, axes: _Axes) -> None:
    font, right, foot = _font(10), (WIDTH - RIGHT) * SCALE, (HEIGHT - BOTTOM) * SCALE
    for value in _powers(*axes.y) if axes.log else ticks(*axes.y, 5):
        row = axes.level(value)
        if row is not None:
            canvas.line([(LEFT * SCALE, row), (right, row)], GRID, SCALE)
            canvas.text((LEFT * SCALE - 6 * SCALE, row), short(value), GREY, font, anchor="rm")
    for value in ticks(*axes.x, 5):
        ((column, _),) = axes.points(np.array([value]), np.array([1.0]))
        canvas.line([(column, TOP * SCALE), (column, foot)], GRID, SCALE)
        canvas.text((column, foot + 6 * SCALE), short(value), GREY, font, anchor="mt")
    canvas.line([(LEFT * SCALE, foot), (right, foot)], GREY, SCALE)


def _draw_dashes(canvas: ImageDraw.ImageDraw, row: float, colour: str) -> None:
    for start in range(LEFT * SCALE, (WIDTH - RIGHT) * SCALE, 8 * SCALE):
        end = min(start + 4 * SCALE, (WIDTH - RIGHT) * SCALE)
        canvas.line([(start, row), (end, row)], colour, SCALE)


def _draw_line(canvas: ImageDraw.ImageDraw, points: list[tuple[float, float]], colour: str) -> None:
    if len(points) == 1:
        ((x, y),) = points
        canvas.circle((x, y), 2.5 * SCALE, colour)
    else:
        canvas.line(points, colour, round(1.6 * SCALE), joint="curve")


def _pale(colour: str) -> str:
    parts = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{255 - (255 - part) * 3 // 10:02x}" for part in parts)


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers from `low` to `high`: 1, 2 or 5 times a power of ten apart."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * unit for unit in (1, 2, 5, 10) if power * unit >= 0.75 * rough)
    first = math.ceil(low / step - 1e-9)
    return [step * n for n in range(first, math.floor(high / step + 1e-9) + 1)]


def _powers(low: float, high: float) -> list[float]:
    """Powers of ten, as many as fit on an axis of decimal logarithms."""
    every = max(1, math.ceil((high - low) / 6))
    exponents = range(math.ceil(low), math.floor(high) + 1, every)
    return [10.0**n for n in exponents] or [10.0 ** ((low + high) / 2)]


def short(value: float) -> str:
    """A number for an axis: 0.25, 1500, 20k, 3e-05."""
    value = 0.0 if abs(value) < 1e-12 else value
    if abs(value) >= 10_000 and abs(value) < 1e7 and value == round(value, -2):
        return f"{value / 1000:g}k"
    return f"{value:.4g}"

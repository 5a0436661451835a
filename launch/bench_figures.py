"""Figures of a benchmark: all values, what is typical, and how far they spread."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from chameleon_jax.chips import Chip
from launch import cli


@dataclasses.dataclass(frozen=True)
class Figure:
    """Something that was measured several times.

    Attributes:
      label: what it is, in the table.
      unit: of the values.
      values: all of them, in the order in which they were taken.
    """

    label: str
    unit: str
    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return float(np.median(self.values))

    def summary(self) -> dict[str, Any]:
        """For JSON."""
        p10, p90, p95 = (float(np.percentile(self.values, share)) for share in (10, 90, 95))
        return {
            "label": self.label,
            "unit": self.unit,
            "median": self.median,
            "p10": p10,
            "p90": p90,
            "p95": p95,
            "min": min(self.values),
            "max": max(self.values),
            "values": list(self.values),
        }


Figures = Mapping[str, Figure]
LABEL = 48  # columns


def milliseconds(label: str, seconds: Sequence[float]) -> Figure:
    """From seconds."""
    return Figure(label, "ms", tuple(1000 * value for value in seconds))


def rates(label: str, frames: int, seconds: Sequence[float]) -> Figure:
    """Frames a second, of runs that took so many seconds."""
    return Figure(label, "frames/s", tuple(frames / value for value in seconds))


def table(figures: Figures) -> str:
    """A row for each figure: median, then where most values and all values lie."""
    names = ("median", "p10", "p90", "p95", "min", "max")
    rows = [f"{'':{LABEL}s} {' '.join(f'{name:>9s}' for name in names)}    n"]
    for figure in figures.values():
        found = figure.summary()
        values = [found[name] for name in names]
        columns = " ".join(f"{value:9.{_digits(value)}f}" for value in values)
        count = len(figure.values)
        rows.append(f"{figure.label:{LABEL}s} {columns} {count:4d} {figure.unit}")
    return "\n".join(rows)


def work_rows(
    flops: Mapping[str, float], figures: Figures, chip: Chip | None, devices: int
) -> dict[str, dict[str, float]]:
    """Operations of what was timed, how fast they were done, and the share of the limits.

    Args:
      flops: of a run, by the key of the figure in milliseconds that timed it.
      figures: may lack some of them; `product_flops` is the limit that was measured, of one device.
      chip: the data sheet of a device, if it is known.
      devices: how many were used.

    Returns:
      By key: `flops`, `flops_per_second`, and shares `of_data_sheet` and `of_product`.
    """
    rows = {}
    for key, count in flops.items():
        if key not in figures:
            continue
        rate = count / (figures[key].median / 1000)
        rows[key] = {"flops": count, "flops_per_second": rate}
        if chip is not None:
            rows[key]["of_data_sheet"] = rate / (devices * chip.flops)
        if "product_flops" in figures:
            rows[key]["of_product"] = rate / (devices * figures["product_flops"].median * 1e9)
    return rows


def work_table(rows: Mapping[str, Mapping[str, float]], figures: Figures) -> str:
    """The rows of `work_rows`."""
    head = f"{'':{LABEL}s} {'GFLOP':>11s} {'GFLOP/s':>11s}  of the data sheet, of a product here"
    lines = [head]
    for key, row in rows.items():
        shares = ["-", "-"]
        for index, name in enumerate(("of_data_sheet", "of_product")):
            if name in row:
                shares[index] = f"{100 * row[name]:.1f} %"
        numbers = f"{row['flops'] / 1e9:11.1f} {row['flops_per_second'] / 1e9:11.1f}"
        lines.append(f"{figures[key].label:{LABEL}s} {numbers}  {shares[0]:>17s}, {shares[1]:>17s}")
    return "\n".join(lines)


def _digits(value: float) -> int:
    return 3 if abs(value) < 10 else 2 if abs(value) < 100 else 1


if __name__ == "__main__":
    cli.library_module("bench_figures", "python -m launch.bench")

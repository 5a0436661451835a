"""The third stage of a benchmark: means over the samples, beside what others have published.

    OUT/81/table.md, table.json    all models in a folder

Every cell says its mean, its 95 % interval by the bootstrap, and n, the samples that have the
figure: a missing score is never a 0. Figures of a model are used only if they were all made by the
same metric, the one of the last line of its file, from the videos that are there now.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chameleon_jax import files
from chameleon_jax.data.sources import file_hash
from chameleon_jax.evaluation.benches import Bench, BenchError, Column, Row, Sample
from chameleon_jax.evaluation.generation import SPEEDS, video_path
from chameleon_jax.evaluation.intervals import Interval, interval
from chameleon_jax.evaluation.scores.base import Setup
from chameleon_jax.evaluation.scores.registry import METRICS, TITLES
from chameleon_jax.evaluation.scoring import Cache

NOT_RUN = "not run"


@dataclasses.dataclass(frozen=True)
class Summary:
    """The figures of a model.

    Attributes:
      figures: by name, see `registry.TITLES`.
      missing: by name, samples that were scored but have no figure.
      about: what each metric was, by its name.
      devices: on which the videos were made.
      videos: how many there are.
      lengths: frames of the videos that were scored, each once.
    """

    figures: Mapping[str, Interval]
    missing: Mapping[str, int]
    about: Mapping[str, Any]
    devices: Sequence[str]
    videos: int
    lengths: Sequence[int]


def summarize(bench: Bench, samples: Sequence[Sample], folder: Path) -> Summary:
    """The figures of the model whose videos lie in a folder."""
    paths = {sample.index: video_path(folder, sample.index) for sample in samples}
    hashes = {index: file_hash(path) for index, path in paths.items() if path.is_file()}
    figures: dict[str, Interval] = {}
    missing: dict[str, int] = {}
    about: dict[str, Any] = {}
    lengths: set[int] = set()
    for name in bench.metrics:
        cache = Cache(folder, name)
        records = [
            record
            for index, record in cache.records.items()
            if record["about"] == cache.latest and record["video"] == hashes.get(index)
        ]
        if not records:
            continue
        used = [record["values"] for record in records]
        lengths |= {record["frames"] for record in records if "frames" in record}
        about[name] = cache.latest
        for column in METRICS[name].columns:
            values = [one.get(column) for one in used]
            missing[column] = sum(value is None for value in values)
            _put(figures, column, [value for value in values if value is not None])
    reports = [
        json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        for index, path in paths.items()
        if index in hashes and path.with_suffix(".json").is_file()
    ]
    for name in SPEEDS:
        _put(figures, name, [report[name] for report in reports if name in report])
    devices = sorted({report["device"] for report in reports if "device" in report})
    return Summary(figures, missing, about, devices, len(hashes), sorted(lengths))


def _put(figures: dict[str, Interval], name: str, values: Sequence[float]) -> None:
    found = interval(values)
    if found is not None:
        figures[name] = found


def write(bench: Bench, samples: Sequence[Sample], folder: Path, frames: int, setup: Setup) -> str:
    """Write the table of all models in a folder.

    Args:
      bench: says the columns.
      samples: that count.
      folder: whose folders are models.
      frames: of the videos.
      setup: says why something was not run.

    Returns:
      The table, as Markdown.

    Raises:
      BenchError: there are no videos in the folder.
    """
    models = {
        place.name: summarize(bench, samples, place)
        for place in sorted(folder.iterdir())
        if place.is_dir() and any(place.glob("output_*.mp4"))
    }
    if not models:
        raise BenchError(f"{folder}: no videos of a model in it; make them with --stage generate")
    text = _markdown(bench, len(samples), models, frames, setup)
    files.write_text(folder / "table.md", text)
    files.write_json(folder / "table.json", _json(bench, len(samples), models, frames))
    return text


def _json(bench: Bench, samples: int, models: Mapping[str, Summary], frames: int) -> dict[str, Any]:
    return {
        "bench": bench.title,
        "frames": frames,
        "samples": samples,
        "models": {
            name: {
                "videos": model.videos,
                "devices": list(model.devices),
                "figures": {key: dataclasses.asdict(one) for key, one in model.figures.items()},
                "missing": {key: count for key, count in model.missing.items() if count},
                "about": dict(model.about),
            }
            for name, model in models.items()
        },
        "published": [
            {"model": row.model, "table": row.table, "values": dict(row.values)}
            for row in bench.rows.get(frames, ())
        ],
    }


def _markdown(
    bench: Bench, samples: int, models: Mapping[str, Summary], frames: int, setup: Setup
) -> str:
    parts = [
        f"# {bench.title}, {frames} frames",
        f"{samples} samples. A cell is a mean (95 % interval, bootstrap), n samples that have it.",
    ]
    if bench.columns:
        parts += ["## Beside the paper", _beside(bench, models, frames)]
    parts += ["## All figures", _all_figures(models)]
    left_out = _left_out(bench, models, setup)
    if left_out:
        parts += ["## Not run", left_out]
    parts += ["## Made with", _made_with(models, frames)]
    if bench.notes:
        parts += ["## Notes", "\n".join(f"- {note}" for note in bench.notes)]
    return "\n\n".join(parts) + "\n"


def cell(model: Summary, name: str) -> str:
    """A figure of a model in a table."""
    one, missing = model.figures.get(name), model.missing.get(name, 0)
    if one is not None:
        text = f"{one.mean:.4f} ({one.low:.4f} to {one.high:.4f}), n {one.count}"
    else:
        text = "n 0" if missing else NOT_RUN
    return f"{text}, missing {missing}" if missing else text


def _beside(bench: Bench, models: Mapping[str, Summary], frames: int) -> str:
    """Models and published rows, in the published columns.

    A column that several of our figures may be held to stands there once for each that was made.
    """
    columns = [(column, name) for column in bench.columns for name in _shown(column, models)]
    heads = [f"{column.title} (`{name}`)" for column, name in columns]
    lines = [f"| model | {' | '.join(heads)} |", f"|---|{'---|' * len(columns)}"]
    for name, model in models.items():
        cells = [cell(model, figure) for _, figure in columns]
        lines.append(f"| **{name}** | {' | '.join(cells)} |")
    for row in bench.rows.get(frames, ()):
        cells = [_published(row, column) for column, _ in columns]
        lines.append(f"| {row.model} ({row.table}) | {' | '.join(cells)} |")
    return "\n".join(lines)


def _shown(column: Column, models: Mapping[str, Summary]) -> list[str]:
    made = [name for name in column.figures if any(name in one.figures for one in models.values())]
    return made or [column.figures[0]]


def _published(row: Row, column: Column) -> str:
    value = row.values.get(column.title)
    return "" if value is None else f"{value:.{column.digits}f}"


def _all_figures(models: Mapping[str, Summary]) -> str:
    lines = [f"| figure | {' | '.join(models)} |", f"|---|{'---|' * len(models)}"]
    for name, title in TITLES.items():
        if not any(name in model.figures or model.missing.get(name) for model in models.values()):
            continue
        cells = [cell(model, name) for model in models.values()]
        lines.append(f"| {title} (`{name}`) | {' | '.join(cells)} |")
    return "\n".join(lines)


def _left_out(bench: Bench, models: Mapping[str, Summary], setup: Setup) -> str:
    """A line for each metric that no model has, and why."""
    lines = []
    for name in bench.metrics:
        if any(name in model.about for model in models.values()):
            continue
        metric = METRICS[name]
        reason = metric.lacking(setup) or f"{name} lacks nothing: score with it, --stage score"
        terms = "" if metric.needs.commercial else " Not for commercial use."
        lines.append(f"- {reason}.{terms}")
    return "\n".join(lines)


def _made_with(models: Mapping[str, Summary], frames: int) -> str:
    lines = []
    for name, model in models.items():
        devices = ", ".join(model.devices) or "unknown"
        lines.append(f"- {name}: {model.videos} videos, made on {devices}")
        if set(model.lengths) - {frames}:
            found = ", ".join(map(str, model.lengths))
            lines.append(f"    - **not all of {frames} frames, but of {found}**")
        for metric, about in model.about.items():
            needs = METRICS[metric].needs
            files_ = "; ".join(
                f"{file.name} {about['files'].get(file.name, '?')} ({file.licence})"
                for file in needs.files
            )
            other = ", ".join(
                f"{key} {value}" for key, value in about.items() if key not in ("version", "files")
            )
            said = ", ".join(filter(None, (f"version {about['version']}", files_, other)))
            lines.append(f"    - `{metric}`: {said}")
    return "\n".join(lines)

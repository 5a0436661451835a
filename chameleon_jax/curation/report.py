"""What became of the clips: counts by stage and reason, histograms, pictures of the refused ones.

`funnel.json` is for programs, `report.html` for people: one file, no scripts, nothing from outside.
"""

from __future__ import annotations

import base64
import collections
import dataclasses
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from chameleon_jax import files
from chameleon_jax.curation.clip import Clip
from chameleon_jax.curation.footage import Footage
from chameleon_jax.curation.runner import Spent
from chameleon_jax.curation.stage import Stage

FUNNEL, REPORT = "funnel.json", "report.html"
SHOWN = 64  # refused clips of a reason that are shown
SIDE = 96  # pixels, longest side of such a picture
COLUMNS = 16
BINS = 24


@dataclasses.dataclass(frozen=True)
class Step:
    """What a stage did with the clips that reached it.

    Attributes:
      stage: its name.
      entered, left: clips that reached it, and of them those that went on.
      reasons: refused ones by reason.
    """

    stage: str
    entered: int
    left: int
    reasons: Mapping[str, int]


def funnel(stages: Sequence[Stage], clips: Sequence[Clip]) -> list[Step]:
    """The steps, in order. A stage that cuts videos into clips is counted in clips."""
    steps, inside = [], list(clips)
    for stage in stages:
        refused = [clip.rejection for clip in inside if _refused_by(clip, stage.name)]
        reasons = collections.Counter(rejection.reason for rejection in refused if rejection)
        left = len(inside) - len(refused)
        steps.append(Step(stage.name, len(inside), left, dict(reasons.most_common())))
        inside = [clip for clip in inside if not _refused_by(clip, stage.name)]
    return steps


def _refused_by(clip: Clip, stage: str) -> bool:
    return clip.rejection is not None and clip.rejection.stage == stage


def histograms(stages: Sequence[Stage], clips: Sequence[Clip]) -> dict[str, dict[str, Any]]:
    """By the name of a measured value: edges, counts, and the limits that it was held to."""
    found = {}
    for stage in stages:
        for name, limits in stage.limits.items():
            values = np.array([clip.measured[name] for clip in clips if name in clip.measured])
            values = values[np.isfinite(values)]
            if not len(values):
                continue
            low, high = np.percentile(values, [0.5, 99.5])
            span = (low, high) if high > low else (low - 0.5, low + 0.5)
            counts, edges = np.histogram(np.clip(values, *span), BINS, span)
            found[name] = {
                "edges": [float(edge) for edge in edges],
                "counts": [int(count) for count in counts],
                "least": limits.least,
                "most": limits.most,
                "median": float(np.median(values)),
            }
    return found


def write_report(
    out: Path,
    stages: Sequence[Stage],
    clips: Sequence[Clip],
    footage: Footage,
    spent: Mapping[str, Spent],
    *,
    videos: int,
    more: Mapping[str, Any],
) -> dict[str, Any]:
    """Write `funnel.json` and `report.html`, and what the first of them holds.

    Args:
      out: folder of the run.
      stages: in order.
      clips: all of them, those that were refused too.
      footage: opens the clips, for their pictures.
      spent: by stage, of this run.
      videos: that were given.
      more: for both files, e.g. what a calibration chose.
    """
    steps = funnel(stages, clips)
    kept = [clip for clip in clips if clip.rejection is None]
    summary = {
        "videos": videos,
        "clips": len(clips),
        "kept": len(kept),
        "seconds_kept": round(sum(clip.seconds for clip in kept), 2),
        "steps": [dataclasses.asdict(step) for step in steps],
        "measured": histograms(stages, clips),
        "speed": {name: speed(one) for name, one in spent.items() if one.clips},
        "licences": dict(collections.Counter(clip.licence for clip in kept)),
        **more,
    }
    files.write_json(out / FUNNEL, summary)
    pictures = rejected_sheets(clips, footage)
    files.write_text(out / REPORT, page(summary, pictures))
    return summary


def speed(spent: Spent) -> dict[str, float]:
    """Clips a stage looked at in this run, its seconds, and clips an hour of one process."""
    return {
        "clips": spent.clips,
        "seconds": round(spent.seconds, 3),
        "clips_an_hour": round(3600 * spent.clips / max(spent.seconds, 1e-9)),
    }


def rejected_sheets(clips: Sequence[Clip], footage: Footage) -> dict[str, Image.Image]:
    """A contact sheet by "stage: reason", of at most `SHOWN` clips, evenly chosen."""
    by_reason: dict[str, list[Clip]] = collections.defaultdict(list)
    for clip in clips:
        if clip.rejection is not None and clip.frames:
            by_reason[f"{clip.rejection.stage}: {clip.rejection.reason}"].append(clip)
    sheets = {}
    for reason, some in by_reason.items():
        chosen = np.linspace(0, len(some) - 1, min(SHOWN, len(some))).round().astype(int)
        shown = [_thumbnail(some[i], footage) for i in chosen]
        sheets[reason] = _sheet([picture for picture in shown if picture is not None])
    return {reason: sheet for reason, sheet in sheets.items() if sheet is not None}


def _thumbnail(clip: Clip, footage: Footage) -> Image.Image | None:
    from chameleon_jax.data.video import VideoError

    middle = dataclasses.replace(clip, first=clip.first + clip.frames // 2, frames=1)
    try:
        picture = Image.fromarray(footage.frames(middle, 1)[0])
    except VideoError:
        return None
    picture.thumbnail((SIDE, SIDE))
    return picture


def _sheet(pictures: Sequence[Image.Image]) -> Image.Image | None:
    if not pictures:
        return None
    width = max(picture.width for picture in pictures) + 2
    height = max(picture.height for picture in pictures) + 2
    columns = min(COLUMNS, len(pictures))
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height), (255, 255, 255))
    for number, picture in enumerate(pictures):
        sheet.paste(picture, (number % columns * width, number // columns * height))
    return sheet


_STYLE = """body{font:15px/1.45 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em;
color:#1a1a1a}table{border-collapse:collapse}td,th{padding:.25em .8em;text-align:left;
border-bottom:1px solid #ddd}td.n{text-align:right;font-variant-numeric:tabular-nums}
.bar{background:#3a6ea5;height:1em;display:block}figure{margin:1em 0}img{max-width:100%}
.charts{display:flex;flex-wrap:wrap;gap:1.5em}.charts figure{width:270px;margin:0}
figcaption{color:#555}"""


def page(summary: Mapping[str, Any], sheets: Mapping[str, Image.Image]) -> str:
    """The report; every text from outside is escaped."""
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'>",
        "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none';",
        " img-src data:; style-src 'unsafe-inline'\">",
        f"<title>Curation</title><style>{_STYLE}</style><h1>Curation</h1>",
        f"<p>{summary['videos']} videos, {summary['clips']} clips, {summary['kept']} kept"
        f" ({summary['seconds_kept']:g} s).</p>",
        "<h2>Funnel</h2>",
        _table(_funnel_rows(summary), ("stage", "reached", "kept", "", "refused for")),
    ]
    if summary.get("chosen"):
        chosen = ", ".join(f"{name} {value:.4g}" for name, value in summary["chosen"].items())
        parts.append(f"<p>Thresholds by --keep: {html.escape(chosen)}.</p>")
    parts += ["<h2>Measured</h2><div class='charts'>"]
    parts += [_chart(name, found) for name, found in summary["measured"].items()]
    parts += ["</div><h2>Refused</h2>"]
    parts += [_figure(reason, sheet) for reason, sheet in sheets.items()]
    if summary["speed"]:
        rows = [
            (name, one["clips"], f"{one['seconds']:.1f}", one["clips_an_hour"])
            for name, one in summary["speed"].items()
        ]
        parts.append("<h2>Time of this run</h2>")
        parts.append(_table(rows, ("stage", "clips", "seconds", "clips an hour")))
    licences = [(name, count) for name, count in summary["licences"].items()]
    parts.append("<h2>Licences of what was kept</h2>")
    parts.append(_table(licences, ("licence", "clips")))
    return "".join(parts) + "\n"


def _funnel_rows(summary: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    rows = []
    for step in summary["steps"]:
        width = 20 * step["left"] / max(summary["clips"], 1)
        reasons = ", ".join(f"{reason} {count}" for reason, count in step["reasons"].items())
        rows.append((step["stage"], step["entered"], step["left"], _Bar(width), reasons))
    return rows


@dataclasses.dataclass(frozen=True)
class _Bar:
    width: float


def _table(rows: Iterable[Sequence[Any]], head: Sequence[str]) -> str:
    lines = ["<table><tr>", *(f"<th>{html.escape(name)}</th>" for name in head), "</tr>"]
    for row in rows:
        lines += ["<tr>", *(_cell(value) for value in row), "</tr>"]
    return "".join(lines) + "</table>"


def _cell(value: Any) -> str:
    if isinstance(value, _Bar):
        return f"<td><span class='bar' style='width:{value.width:.2f}em'></span></td>"
    kind = " class='n'" if isinstance(value, (int, float)) else ""
    return f"<td{kind}>{html.escape(str(value))}</td>"


def _chart(name: str, found: Mapping[str, Any]) -> str:
    """A histogram as SVG, with its limits as red lines."""
    width, height = 260, 90
    edges, counts = found["edges"], found["counts"]
    step, top = width / len(counts), max(max(counts), 1)
    bars = "".join(
        f"<rect x='{i * step:.1f}' y='{height - height * count / top:.1f}' width='{step - 1:.1f}'"
        f" height='{height * count / top:.1f}' fill='#3a6ea5'/>"
        for i, count in enumerate(counts)
    )
    lines = ""
    for limit in (found["least"], found["most"]):
        if limit is not None and edges[0] <= limit <= edges[-1]:
            x = width * (limit - edges[0]) / (edges[-1] - edges[0])
            lines += f"<path d='M{x:.1f} 0V{height}' stroke='#c0392b' stroke-width='2'/>"
    limits = ", ".join(
        f"{word} {found[word]:.4g}" for word in ("least", "most") if found[word] is not None
    )
    return (
        f"<figure><svg viewBox='0 0 {width} {height}' width='{width}' height='{height}'>{bars}"
        f"{lines}</svg><figcaption>{html.escape(name)}: {edges[0]:.3g} to {edges[-1]:.3g}, median"
        f" {found['median']:.3g}; {html.escape(limits or 'no limit')}</figcaption></figure>"
    )


def _figure(reason: str, sheet: Image.Image) -> str:
    buffer = io.BytesIO()
    sheet.save(buffer, "JPEG", quality=85)
    data = base64.b64encode(buffer.getvalue()).decode()
    said = html.escape(reason, quote=True)
    return (
        f"<figure><figcaption>{said}</figcaption>"
        f"<img alt='{said}' src='data:image/jpeg;base64,{data}'></figure>"
    )

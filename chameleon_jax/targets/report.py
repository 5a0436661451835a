"""Reports of compiled programs as a table for people, and what a whole stream needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

GB = 1e9
# Programs that run for each chunk of a stream, in turn.
EVERY_CHUNK = ("chunk", "decode_next")
ENCODER = "text"  # of what is resident, what a stream can do without: prompts encoded elsewhere

Report = Mapping[str, Any]  # see `compiling.report`


@dataclasses.dataclass(frozen=True)
class Stream:
    """What all programs of a stream need together on one device.

    Attributes:
      resident: bytes of weights, cache and states; the text encoder left out.
      encoder: bytes of the text encoder.
      working: most bytes that one program needs beside its arguments.
      memory: of the device.
      least_seconds: of a chunk with its decoding; nothing computes it faster.
      frames: that such a chunk shows.
    """

    resident: int
    encoder: int
    working: int
    memory: float
    least_seconds: float
    frames: int

    @property
    def bytes(self) -> int:
        """At the fullest moment, prompts encoded elsewhere."""
        return self.resident + self.working

    @property
    def fits(self) -> bool:
        return self.bytes <= self.memory

    @property
    def frames_a_second(self) -> float:
        """At most."""
        return self.frames / self.least_seconds


def of_stream(reports: Sequence[Report], frames: int) -> Stream | None:
    """What a stream needs, from the reports of its programs on one target; None if some lack.

    Args:
      reports: of one config on one target.
      frames: that a chunk shows.
    """
    whole = {report["program"]: report for report in reports if "bytes" in report}
    if not set(EVERY_CHUNK) <= set(whole):
        return None
    resident = dict(whole["chunk"]["resident"])
    encoder = resident.pop(ENCODER, 0)
    working = [
        sum(report["bytes"].values()) - 2 * report["bytes"]["alias"] - report["bytes"]["argument"]
        for name, report in whole.items()
        if name != "encode_text"
    ]
    return Stream(
        resident=sum(resident.values()),
        encoder=encoder,
        working=max(working),
        memory=whole["chunk"]["device_bytes"],
        least_seconds=sum(least_seconds(whole[name]) for name in EVERY_CHUNK),
        frames=frames,
    )


def least_seconds(report: Report) -> float:
    """What a program takes at the least: its products at the peak, or its memory read once."""
    return max(report["least_seconds"].values())


def fits(report: Report) -> bool:
    """Does a program fit the device, with all that it is given?"""
    return report["peak_bytes"] <= report["device_bytes"]


def table(rows: Sequence[tuple[str, Report]]) -> str:
    """A table in Markdown.

    Args:
      rows: name of the config, report.
    """
    head = (
        "config", "target", "program", "mesh", "GB", "of", "least ms", "collectives", "kernels",
        "large moves", "compiled in",
    )  # fmt: skip
    lines = [head, tuple("---" for _ in head)]
    lines += [_cells(name, report) for name, report in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cells(name: str, report: Report) -> tuple[str, ...]:
    mesh = " ".join(f"{axis} {size}" for axis, size in report["mesh"].items()) or "-"
    options = "".join(f" {key}={value}" for key, value in report.get("options", {}).items())
    about = (name, report["target"], report["program"] + options, mesh)
    if "error" in report:
        verdict = "does not fit" if report.get("too_large") else report["error"]
        return (*about, verdict, *([""] * 6))
    peak, memory = report["peak_bytes"] / GB, report["device_bytes"] / GB
    flops = report["flops"]
    least = "not all counted" if flops["not_counted"] else _number(1000 * least_seconds(report))
    kernels = ", ".join(f"{count} {kind}" for kind, count in sorted(report["kernels"].items()))
    return (
        *about,
        f"{_number(peak)}{'' if fits(report) else ' (too large)'}",
        f"{memory:.0f}",
        least,
        _tallies(report["collectives"]),
        kernels or "-",
        _tallies(report["moves"]),
        f"{report['compile_seconds']:.0f} s",
    )


def stream_line(name: str, target: str, stream: Stream) -> str:
    """What a stream needs, in one sentence."""
    verdict = "fits" if stream.fits else f"{(stream.bytes - stream.memory) / GB:.1f} GB too large"
    return (
        f"{name} on {target}: a stream holds {stream.resident / GB:.1f} GB and works in"
        f" {stream.working / GB:.1f} GB more, of {stream.memory / GB:.0f} GB a device: {verdict}"
        f" (its text encoder would be {stream.encoder / GB:.1f} GB); at most"
        f" {stream.frames_a_second:.1f} frames/s, decoded"
    )


def _tallies(tallies: Mapping[str, Mapping[str, int]]) -> str:
    parts = [
        f"{tally['count']} {kind} ({_number(tally['bytes'] / GB)} GB)"
        for kind, tally in sorted(tallies.items())
    ]
    return ", ".join(parts) or "-"


def _number(value: float) -> str:
    """Three digits."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.3g}"

"""metrics.jsonl and TensorBoard after a kill; lines that are not ours; writing on a full disk."""

from __future__ import annotations

import builtins
import json
import struct
import sys

import numpy as np
import pytest

from chameleon_jax.errors import MissingPackageError
from chameleon_jax.training.flops import Flops
from chameleon_jax.training.report import MetricsWriter, Progress, ReportError, keep_until

OURS = "".join(json.dumps({"step": step, "loss": 0.5}) + "\n" for step in (1, 2, 3))


@pytest.mark.parametrize(
    ("content", "step", "expected"),
    [
        (OURS, 3, OURS),
        (OURS, 2, "".join(OURS.splitlines(True)[:2])),
        (OURS, 0, ""),
        (OURS + '{"step": 4, "lo', 9, OURS),  # cut short by a kill
        (OURS.rstrip("\n"), 9, OURS),  # only the end of the line is missing
        (OURS.replace("\n", "\n\n"), 9, OURS),
        ("", 9, ""),
    ],
    ids=["all", "later", "from the start", "cut short", "no last end", "blank lines", "empty"],
)
def test_what_was_written_by_us_needs_no_backup(tmp_path, content, step, expected):
    path = tmp_path / "metrics.jsonl"
    path.write_text(content)
    keep_until(path, step)
    assert path.read_text() == expected
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    "foreign",
    [
        b"[1, 2]\n",
        b"3\n",
        b'{"loss": 1.0}\n',
        b'{"step": null}\n',
        b'{"step": true}\n',
        b"notes of mine\n",
        b"\xff\xfe\n",
        b"[" * 100_000 + b"\n",
    ],
    ids=["list", "number", "no step", "null", "true", "text", "bytes", "deep"],
)
def test_lines_that_are_not_ours_are_dropped_and_kept_aside(tmp_path, foreign, caplog):
    path = tmp_path / "metrics.jsonl"
    first, *others = OURS.encode().splitlines(True)
    content = first + foreign + b"".join(others)
    path.write_bytes(content)
    (tmp_path / "metrics.jsonl.bak").write_text("older")
    keep_until(path, 2)
    assert path.read_bytes() == first + others[0]
    assert (tmp_path / "metrics.jsonl.bak2").read_bytes() == content
    assert (tmp_path / "metrics.jsonl.bak").read_text() == "older"
    assert "1 lines are not of a training run" in caplog.text


def test_a_disk_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    with MetricsWriter(tmp_path, 0) as writer:
        writer.scalars(1, {"loss": 1.0})
        monkeypatch.setattr(writer, "_file", FullFile())
        with pytest.raises(
            ReportError, match="No space left on device.*the newest checkpoint stays"
        ):
            writer.scalars(2, {"loss": 1.0})
        (tmp_path / "previews").rmdir()
        with pytest.raises(ReportError, match="metrics and previews cannot be written"):
            writer.picture(2, np.zeros((2, 2, 3), np.uint8))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "metrics.jsonl").mkdir()
    with pytest.raises(ReportError, match="Is a directory"):
        MetricsWriter(tmp_path / "taken", 0)


class FullFile:
    def write(self, text):
        raise OSError(28, "No space left on device")

    def close(self):
        raise OSError(28, "No space left on device")


def test_without_tensorboard_the_extra_is_named(tmp_path, monkeypatch):
    def refuse(name, *rest, **named):
        if name == "tensorboardX":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return original(name, *rest, **named)

    original = builtins.__import__
    monkeypatch.delitem(sys.modules, "tensorboardX", raising=False)
    monkeypatch.setattr(builtins, "__import__", refuse)
    monkeypatch.setattr("importlib.import_module", refuse)
    with pytest.raises(MissingPackageError, match="the extra 'train'"):
        MetricsWriter(tmp_path, 0)


def shown_in_tensorboard(folder):
    """Steps of the curve `loss` that TensorBoard shows: a start drops the steps from its own on."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    steps = []
    for path in sorted(folder.glob("events*"), key=lambda path: path.stat().st_mtime_ns):
        content, place = path.read_bytes(), 0
        while place < len(content):  # records: length, its checksum, bytes, their checksum
            (size,) = struct.unpack_from("<Q", content, place)
            event = Event.FromString(content[place + 12 : place + 12 + size])
            place += 16 + size
            if event.session_log.status == SessionLog.START:
                steps = [step for step in steps if step < event.step]
            steps += [event.step for value in event.summary.value if value.tag == "loss"]
    return steps


def test_curves_of_a_killed_and_resumed_run_have_no_gap_and_no_double(tmp_path):
    for first, last in ((1, 5), (4, 6)):  # killed after step 5, with a checkpoint of step 3
        with MetricsWriter(tmp_path, first - 1, seconds=100.0 * (first - 1)) as writer:
            for step in range(first, last + 1):
                writer.scalars(step, {"loss": 1.0})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert shown_in_tensorboard(tmp_path / "tensorboard") == [1, 2, 3, 4, 5, 6]
    seconds = [line["seconds"] for line in lines]
    assert 0 <= seconds[0] <= seconds[2] < 60 and 300 <= seconds[3] <= seconds[5] < 360


def test_metrics_are_averaged_and_counts_are_not(tmp_path):
    with MetricsWriter(tmp_path, 0) as writer:
        progress = Progress(writer, ("loss",), 0, 4, 2)
        for step in range(1, 5):
            counts = {"data/broken": 10.0 * step}
            progress.add(step, {"loss": np.float32(step)}, 1, Flops(), counts)
        progress.drain()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    found = [(line["step"], line["loss"], line["data/broken"]) for line in lines]
    assert found == [(2, 1.5, 20.0), (4, 3.5, 40.0)]

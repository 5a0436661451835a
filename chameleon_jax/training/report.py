"""What a run writes and says: metrics.jsonl, TensorBoard events, previews, the progress line.

Only the first process writes.
"""

from __future__ import annotations

import collections
import contextlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import jax
import numpy as np
from PIL import Image

from chameleon_jax import chips, files, machine
from chameleon_jax.errors import UserError, need
from chameleon_jax.training.flops import Flops
from chameleon_jax.training.state import Metrics

log = logging.getLogger(__name__)


class ReportError(UserError):
    """The metrics or previews of a run cannot be written. The message is one line."""


class TrainingDivergedError(UserError):
    """A metric is not finite any more. The newest checkpoint is from before."""


class MetricsWriter:
    """Writes into a run's folder; a context manager.

    Args:
      folder: gets metrics.jsonl, tensorboard/ and previews/.
      step: that the run starts or is resumed at; lines of later steps are removed, for they come
        again.
      seconds: that the run had taken by then.

    Raises:
      MissingPackageError: tensorboardX is not installed.
      ReportError: the folder cannot be written to.
    """

    def __init__(self, folder: str | os.PathLike, step: int, seconds: float = 0.0):
        self._begin = time.monotonic() - seconds
        self._writes = jax.process_index() == 0
        if not self._writes:
            return
        tensorboard = need("tensorboardX", "train")
        self.folder = Path(folder)
        path = self.folder / "metrics.jsonl"
        with _named_failure(self.folder):
            (self.folder / "previews").mkdir(parents=True, exist_ok=True)
            keep_until(path, step)
            self._file = path.open("a", encoding="utf-8")
            # A queue without an end: TensorBoard's thread dies when the disk is full, and a full
            # queue would then wait for it for ever.
            # Files are named by the second: two starts within one would share theirs.
            self._board = tensorboard.SummaryWriter(
                str(self.folder / "tensorboard"),
                purge_step=step + 1,
                flush_secs=30,
                max_queue=0,
                filename_suffix=f".{step}",
            )

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._writes:
            return
        for target in (self._file, self._board):
            with contextlib.suppress(OSError):  # every line was flushed, or has raised, before
                target.close()

    @property
    def seconds(self) -> float:
        """That the run has taken, all its starts together; not what a killed one did in vain."""
        return round(time.monotonic() - self._begin, 3)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One line of metrics.jsonl, with `seconds`, and one point of each curve.

        Raises:
          ReportError: it cannot be written.
        """
        if not self._writes or not values:
            return
        with _named_failure(self.folder):
            line = {"step": step, "seconds": self.seconds, **values}
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def picture(self, step: int, picture: np.ndarray) -> None:
        """A preview, uint8 [h, w, 3].

        Raises:
          ReportError: it cannot be written.
        """
        if not self._writes:
            return
        path = self.folder / "previews" / f"step_{step:07d}.png"
        with _named_failure(self.folder), files.replacing(path) as part:
            Image.fromarray(picture).save(part, "PNG")
        self._board.add_image("preview", picture, step, dataformats="HWC")


class Progress:
    """Metrics of the steps, their means at intervals, and the line that says how far a run is.

    Metrics are collected one step late, so that the host never waits for the step that it has just
    started. Beside their means an interval gets

      steps_per_second, samples_per_second
      tflops_per_second      of one device, by the model's operations, see `flops`
      mfu, hfu               by the model's and the hardware's operations: shares of the peak of
                             bfloat16 products, where that of the device is known
      memory_gb, memory_peak_gb    see `machine.memory_in_use`

    Args:
      writer: gets the means.
      shown: names of the metrics on the progress line.
      start: steps taken before.
      last: the last step of the run.
      every: steps between two lines; 0: none.
      devices: that share a step.
      watch: is called with the metrics of every step, once they are there.
    """

    def __init__(
        self,
        writer: MetricsWriter,
        shown: Sequence[str],
        start: int,
        last: int,
        every: int,
        *,
        devices: int = 1,
        watch: Callable[[int, Mapping[str, float]], None] | None = None,
    ):
        self._writer, self._shown = writer, shown
        self._last, self._every, self._first = last, every, start + 1
        self._devices, self._watch = devices, watch
        self._pending: tuple[int, Metrics] | None = None
        self._values: dict[str, list[float]] = collections.defaultdict(list)
        self._counts: dict[str, float] = {}
        self._restart()

    def _restart(self) -> None:
        self._samples, self._steps, self._since = 0, 0, time.monotonic()
        self._flops = Flops()

    def add(
        self,
        step: int,
        metrics: Metrics,
        samples: int,
        flops: Flops,
        counts: Mapping[str, float] | None = None,
    ) -> None:
        """Note the metrics of a step that is still running, its operations, and its counts.

        Counts are not averaged.
        """
        self.drain()
        self._counts = dict(counts or {})
        self._pending = (step, metrics)
        self._samples += samples
        self._flops += flops
        self._steps += 1

    def drain(self) -> None:
        """Wait for the last step and look at its metrics.

        Raises:
          TrainingDivergedError: one of them is not finite.
        """
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        check_finite(step, values)
        if self._watch is not None:
            self._watch(step, values)
        for name, value in values.items():
            self._values[name].append(value)
        if step == self._first:  # the first step warms everything up: it would spoil the rate
            self._restart()
        if is_due(step, self._every, self._last):
            self._report(step)

    def _report(self, step: int) -> None:
        means = _means(self._values) | self._counts
        parts = [f"step {step}/{self._last}"]
        parts += [f"{name} {means[name]:.4g}" for name in self._shown if name in means]
        if self._steps:
            seconds = max(time.monotonic() - self._since, 1e-9)
            means["steps_per_second"] = self._steps / seconds
            means["samples_per_second"] = self._samples / seconds
            means |= utilisation(self._flops, seconds, self._devices)
            left = (self._last - step) * seconds / self._steps
            parts.append(f"| {means['steps_per_second']:.3g} steps/s,")
            parts.append(f"{means['samples_per_second']:.3g} samples/s")
            if "mfu" in means:
                parts.append(f"| MFU {100 * means['mfu']:.1f} %")
            parts.append(f"| {_duration(left)} left")
        means["memory_gb"] = machine.memory_in_use() / 1e9
        means["memory_peak_gb"] = machine.peak_memory() / 1e9
        log.info(" ".join(parts))
        self._writer.scalars(step, means)
        self._values.clear()
        self._restart()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time within does not count for the rate."""
        self.drain()
        begin = time.monotonic()
        yield
        self._since += time.monotonic() - begin

    def skip(self, seconds: float) -> None:
        """So many seconds that have just passed do not count for the rate."""
        self._since += seconds


def utilisation(flops: Flops, seconds: float, devices: int) -> dict[str, float]:
    """Operations a second of each device, and shares of its peak; see `Progress`.

    Empty if the operations are not known; without shares if the peak is not.

    Args:
      flops: of all devices.
      seconds: that they took.
      devices: how many there are, all of one kind.
    """
    if flops.unknown or not flops.hardware:
        return {}
    found = {"tflops_per_second": flops.model / seconds / devices / 1e12}
    peak = chips.peak_flops(jax.local_devices()[0].device_kind)
    if peak is not None:
        share = seconds * devices * peak
        found |= {"mfu": flops.model / share, "hfu": flops.hardware / share}
    return found


def check_finite(step: int, values: dict[str, float]) -> dict[str, float]:
    """The metrics of a step as they are.

    Raises:
      TrainingDivergedError: one of them is NaN or infinite, or says that something is
        (`sample/nonfinite`, a share).
    """
    bad = [
        name
        for name, value in values.items()
        if not math.isfinite(value) or (name.endswith("nonfinite") and value)
    ]
    if bad:
        raise TrainingDivergedError(
            f"step {step}: {', '.join(bad)} not finite; the newest checkpoint is from before."
            " Lower schedule.peak or optimizer.clip and start again"
        )
    return values


def held_out_means(batches: Sequence[Metrics]) -> dict[str, float]:
    """Means over held-out batches, as `eval/NAME`; they are shown as well."""
    values: dict[str, list[float]] = collections.defaultdict(list)
    for metrics in batches:
        for name, value in jax.device_get(metrics).items():
            values[name].append(float(value))
    means = _means(values)
    if means:
        log.info(
            "  held out: %s", ", ".join(f"{name} {value:.4g}" for name, value in means.items())
        )
    return {f"eval/{name}": value for name, value in means.items()}


def is_due(step: int, every: int, last: int) -> bool:
    """Is something due after `step` that comes every `every` steps and at the last? 0: never."""
    return bool(every) and (step % every == 0 or step == last)


def keep_until(path: Path, step: int) -> None:
    """Drop from metrics.jsonl the lines of later steps, and a last one that a kill cut short.

    Lines that are not of a training run are dropped too; the file as it was is then kept beside it.
    """
    if not path.exists():
        return
    content = path.read_bytes()
    *lines, rest = content.split(b"\n")
    if _step_of(rest) is not None:  # a whole line of which only the end of line is missing
        lines, rest = [*lines, rest], b""
    kept, later, foreign = [], 0, 0
    for line in filter(None, lines):
        of = _step_of(line)
        if of is None:
            foreign += 1
        elif of > step:
            later += 1
        else:
            kept.append(line + b"\n")
    if rest and not rest.startswith(b'{"step": '):
        foreign += 1
    if foreign:
        backup = _free_name(path)
        files.write_bytes(backup, content)
        log.warning(
            "%s: %d lines are not of a training run and are dropped; %s keeps the file as it was",
            path,
            foreign,
            backup,
        )
    if later:
        log.info("%s: %d lines after step %d are dropped, they come again", path, later, step)
    remaining = b"".join(kept)
    if remaining != content:
        files.write_bytes(path, remaining)


def _step_of(line: bytes) -> int | None:
    """Step of a line of metrics.jsonl; None if it is not one."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):  # not JSON, or not UTF-8
        return None
    step = values.get("step") if isinstance(values, dict) else None
    return step if isinstance(step, int) and not isinstance(step, bool) else None


def _free_name(path: Path) -> Path:
    """`path`.bak, or `path`.bak2 and so on if that exists."""
    backup, number = path.with_name(f"{path.name}.bak"), 2
    while backup.exists():
        backup, number = path.with_name(f"{path.name}.bak{number}"), number + 1
    return backup


@contextlib.contextmanager
def _named_failure(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        why = error.strerror or str(error)
        raise ReportError(
            f"{folder}: metrics and previews cannot be written ({why}); the newest checkpoint"
            " stays. Make it possible to write there, and start the same command again"
        ) from None


def _means(values: dict[str, list[float]]) -> dict[str, float]:
    return {name: sum(numbers) / len(numbers) for name, numbers in values.items()}


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d}" if minutes >= 60 else f"{seconds / 60:.1f} min"

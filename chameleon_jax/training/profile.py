"""A profile of some steps of a run, in the format that JAX's profiler writes.

Steps are counted from the start of the process, so that a resumed run can be profiled as well.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import jax

log = logging.getLogger(__name__)

Steps = tuple[int, int]  # the first and the last one, from 1 up


class Profile:
    """Writes what the devices and the host do in some steps; a context manager.

    Args:
      folder: gets the profile.
      steps: which ones; None: none.
    """

    def __init__(self, folder: Path, steps: Steps | None):
        self._folder, self._steps = folder, steps
        self._done, self._running = 0, False

    def __enter__(self) -> Profile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._running:
            self._stop(self._done)
        elif self._steps is not None and self._done < self._steps[0]:
            log.warning(
                "no profile: this start took %d steps, the first to profile is %d",
                self._done,
                self._steps[0],
            )

    def run(self, program: Callable[..., Any], *inputs: Any) -> Any:
        """One step: calls the program, and profiles it if it is its turn."""
        self._done += 1
        number = self._done
        if self._steps is None or not self._steps[0] <= number <= self._steps[1]:
            return program(*inputs)
        if not self._running:
            jax.block_until_ready(inputs)  # what was started before does not belong to it
            jax.profiler.start_trace(str(self._folder))
            self._running = True
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            result = program(*inputs)
        if number == self._steps[1]:
            jax.block_until_ready(result)
            self._stop(number)
        return result

    def _stop(self, last: int) -> None:
        jax.profiler.stop_trace()
        self._running = False
        log.info(
            "profile of the steps %d to %d of this start: %s; look at it by `pip install xprof` and"
            " `xprof --logdir %s`, or open its .trace.json.gz at https://ui.perfetto.dev",
            self._steps[0],
            last,
            self._folder,
            self._folder,
        )

"""Stopping a run between two steps: by a signal, or when its time is over."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from chameleon_jax import interrupts

log = logging.getLogger(__name__)


class StopRequest:
    """Turns SIGINT (Ctrl-C) and SIGTERM into a question that the loop asks after each step.

    A context manager. A second signal raises KeyboardInterrupt at once. With several processes all
    of them get the same answer at the same step, or their collectives would wait for ever: a signal
    that one of them gets is passed on by JAX, whose preemption notice listens to SIGTERM.
    """

    def __init__(self):
        self._asked = ""  # name of the signal
        self._start = time.monotonic()
        self._former: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._former[signal.SIGINT] = signal.signal(signal.SIGINT, self._note)
            if jax.process_count() == 1:
                self._former[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self._asked:
            interrupts.interrupt()
        self._asked = signal.Signals(number).name
        log.warning("%s: saving after this step; once more stops at once", self._asked)
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def reason(self, step: int, max_minutes: float) -> str:
        """Why to stop after this step: "SIGINT", "SIGTERM" or "time"; "" to go on."""
        over = bool(max_minutes) and time.monotonic() - self._start > 60 * max_minutes
        asked = self._asked
        if jax.process_count() > 1:
            if multihost_utils.reached_preemption_sync_point(step):
                asked = asked or "SIGTERM"
            else:
                asked = ""
            if max_minutes:
                over = bool(np.any(multihost_utils.process_allgather(np.array(over))))
        if asked:
            return asked
        return "time" if over else ""

"""What every worker process does first."""

from __future__ import annotations

import os
import signal
import threading
import time


def settle(parent: int) -> None:
    """Leave Ctrl-C to the parent, and end when it is gone.

    Ctrl-C reaches the whole group of processes; the parent ends its workers. One that is killed
    cannot: so each looks for itself.

    Args:
      parent: number of the process that started this one.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with, args=(parent,), daemon=True).start()


def _exit_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)

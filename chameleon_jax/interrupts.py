"""Ctrl-C that is not lost.

Python drops an exception that a signal raises while a callback of the garbage collector, a
destructor or some C++ code runs, and JAX registers such callbacks: while it traces and compiles,
about one Ctrl-C in ten does nothing. Inside `noticed()` it is raised again until the main thread
handles it.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NoReturn

AGAIN = 0.2  # seconds after which it is raised again

_bell: int | None = None  # what is written here wakes the thread of `noticed`


@contextlib.contextmanager
def noticed() -> Iterator[None]:
    """Raise KeyboardInterrupt at Ctrl-C, and again until the main thread handles it.

    Does nothing in other threads, or where SIGINT has a handler that is not Python's own.
    """
    global _bell
    ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if not ours:
        yield
        return
    listener, _bell = os.pipe()
    former_hook = sys.unraisablehook

    def quiet(dropped: Any) -> None:
        if dropped.exc_type is not KeyboardInterrupt:
            former_hook(dropped)

    # A thread that already waits: to start one in a signal handler could wait for its own lock.
    threading.Thread(target=_repeat, args=(listener,), name="interrupts", daemon=True).start()
    signal.signal(signal.SIGINT, lambda *_: interrupt())
    sys.unraisablehook = quiet
    try:
        yield
    finally:
        sys.unraisablehook = former_hook
        signal.signal(signal.SIGINT, signal.default_int_handler)
        bell, _bell = _bell, None
        os.close(bell)


def interrupt() -> NoReturn:
    """For signal handlers: raise KeyboardInterrupt; inside `noticed` until it is handled."""
    if _bell is not None:
        os.write(_bell, b"!")
    raise KeyboardInterrupt


def _repeat(listener: int) -> None:
    """Wait for `interrupt`; if the main thread goes on as if nothing were, send it the signal."""
    with os.fdopen(listener, "rb", buffering=0) as calls:
        while calls.read(1):
            time.sleep(AGAIN)
            while _is_handled():
                time.sleep(AGAIN)
            if _bell is not None:
                _thread.interrupt_main(signal.SIGINT)


def _is_handled() -> bool:
    """Whether the main thread is in the `except`, `finally` or `with` of a KeyboardInterrupt."""
    active = sys._current_exceptions().get(threading.main_thread().ident)
    error = active[1] if isinstance(active, tuple) else active  # a tuple before Python 3.12
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__context__
    return False

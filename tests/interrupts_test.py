"""Ctrl-C is handled, wherever it arrives."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Each presses Ctrl-C where Python drops the exception, and then goes on for a while.
LOST_IN = {
    "collector": """
def on_collection(phase, info):
    if phase == "stop":
        gc.callbacks.remove(on_collection)
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(10_000): pass
gc.callbacks.append(on_collection)
gc.collect()
""",
    "destructor": """
class Held:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(10_000): pass
Held()
""",
    "caught": """
try:
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(10_000): pass
except BaseException:
    pass
""",
}
WORK = "for _ in range(1000): time.sleep(0.01)\nprint('lost')"


def run(code: str) -> subprocess.CompletedProcess:
    lines = ["import gc, os, signal, sys, time", "from chameleon_jax.interrupts import noticed"]
    code = "\n".join([*lines, code])
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def indented(code: str) -> str:
    return "\n".join(f"    {line}" for line in code.strip().splitlines())


@pytest.mark.parametrize("place", LOST_IN)
def test_one_that_python_drops_is_raised_again(place):
    done = run(f"""
try:
  with noticed():
{indented(LOST_IN[place])}
{indented(WORK)}
except KeyboardInterrupt:
    print("handled")
time.sleep(1)  # and not once more
""")
    assert (done.returncode, done.stdout, done.stderr) == (0, "handled\n", "")


def test_without_it_python_drops_one():
    done = run(LOST_IN["collector"] + "print('lost')")
    assert done.stdout == "lost\n" and "KeyboardInterrupt" in done.stderr


def test_cleaning_up_is_not_interrupted():
    done = run("""
try:
    with noticed():
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)
        finally:
            try:
                raise OSError("a fault while cleaning up")
            except OSError:
                time.sleep(1)
            print("clean")
except KeyboardInterrupt:
    print("handled")
""")
    assert (done.returncode, done.stdout, done.stderr) == (0, "clean\nhandled\n", "")


def test_other_exceptions_that_python_drops_are_shown():
    done = run("""
class Held:
    def __del__(self):
        raise ValueError("seen")
with noticed():
    Held()
""")
    assert done.returncode == 0 and "ValueError: seen" in done.stderr


def test_a_handler_of_somebody_else_stays():
    done = run("""
def mine(*_): pass
signal.signal(signal.SIGINT, mine)
with noticed():
    assert signal.getsignal(signal.SIGINT) is mine
signal.signal(signal.SIGINT, signal.default_int_handler)
with noticed():
    assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
""")
    assert (done.returncode, done.stderr) == (0, "")

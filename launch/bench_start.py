"""The first frame of a process: from its start until frames are on the host.

`measure` starts the benchmark again as a process of its own (`--first_frame`), with an empty folder
for compiled programs, and then with the same folder once more: cold and warm. The process itself
says what took how long.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from chameleon_jax import compilation
from chameleon_jax.errors import ROOT, UserError
from launch import cli
from launch.bench_figures import Figure

CHUNKS = 3  # of a start: the second one must not wait for a compiler
STARTED = "CHAMELEON_BENCH_STARTED"  # when the process was started, seconds of the system's clock


class StartError(UserError):
    """A process that was started failed. The message is its own last line."""


def measure(flags: Sequence[str], starts: int, folder: Path) -> dict[str, Any]:
    """Start a process as often, cold and warm in turn.

    Args:
      flags: of the benchmark: config and weights.
      starts: of each kind.
      folder: gets the compiled programs of the last cold start.

    Returns:
      `cold` and `warm`, lists of what `first_frame` says, with `seconds` from start to frames.

    Raises:
      StartError: a process failed.
    """
    found: dict[str, Any] = {"cold": [], "warm": []}
    for number in range(starts):
        last = number == starts - 1
        with tempfile.TemporaryDirectory() as other:
            cache = folder if last else Path(other)
            for kind in ("cold", "warm"):
                found[kind].append(_start(flags, cache))
    return found


def first_frame(run: Callable[[dict[str, float]], Any]) -> dict[str, Any]:
    """In a process of its own: what took how long.

    Args:
      run: makes a pipeline, notes seconds in the dictionary that it is given, and returns a
        function that makes the next chunk.

    Returns:
      `seconds` from the start of the process to its first frames; `parts` of them; of the first
      `CHUNKS` chunks the seconds, `chunks`, and the `programs` that were compiled while they were
      made, which should be none.
    """
    began = float(os.environ.get(STARTED, time.time()))
    parts: dict[str, float] = {"imports": time.time() - began}
    next_chunk = run(parts)
    chunks, programs = [], []
    total = None
    for _ in range(CHUNKS):
        begin = time.perf_counter()
        with compilation.watched() as seen:
            next_chunk()
        chunks.append(time.perf_counter() - begin)
        programs.append(len(seen.seconds))
        total = time.time() - began if total is None else total
    parts["first_chunk"] = chunks[0]
    return {"seconds": total, "parts": parts, "chunks": chunks, "programs": programs}


def figures(found: dict[str, Any]) -> dict[str, Figure]:
    """From what `measure` returns."""
    made = {}
    for kind, words in (("cold", "nothing compiled before"), ("warm", "programs on disk")):
        runs = found[kind]
        seconds = tuple(run["seconds"] for run in runs)
        made[f"start_{kind}_s"] = Figure(f"process to first frame, {words}", "s", seconds)
        compiled = tuple(run["parts"]["compile"] for run in runs)
        made[f"compile_{kind}_s"] = Figure(f"  compiling, {words}", "s", compiled)
        more = tuple(1000 * (run["chunks"][1] - run["chunks"][2]) for run in runs)
        made[f"second_chunk_{kind}_ms"] = Figure("  second chunk longer than third", "ms", more)
    return made


def _start(flags: Sequence[str], cache: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "start.json"
        argv = [sys.executable, "-m", "launch.bench", *flags, "--first_frame", f"--out={out}"]
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        # What JAX was told already stays, see `compilation.use_cache`; the folder is ours.
        env = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": str(compilation.SHORTEST)}
        env |= os.environ | {
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "PYTHONPATH": path,
            STARTED: repr(time.time()),
        }
        done = subprocess.run(argv, env=env, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise StartError(
                last.removeprefix("error: ")
                if done.returncode == 2
                else f"a process that was started ended with code {done.returncode}: {last}"
            )
        return json.loads(out.read_text(encoding="utf-8"))


if __name__ == "__main__":
    cli.library_module("bench_start", "python -m launch.bench")

"""JAX's cache of compiled programs on disk, and what is said while programs are compiled.

    compilation.use_cache()
    with compilation.announced("the programs of the stream"):
        pipeline.compile()

A program is compiled once on a machine; later processes read it from disk and compute the same
bits. The commands of this project switch the cache on, a program that uses the library calls
`use_cache` itself. The cache is only for its user: who can write to it can run code.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from chameleon_jax import machine, places

SHORTEST = 0.1  # seconds: what is compiled faster than that is not kept
SUFFIX = "-cache"  # of the files that JAX writes
COMPILED = "/jax/core/compile/backend_compile_duration"  # JAX also reports it for a program it read
READ = "/jax/compilation_cache/cache_hits"
# JAX's warning about a file that it cannot read or write; names the program.
FAULT = re.compile(r"Error (?:reading|writing) persistent compilation cache entry for '([^']+)'")


@dataclasses.dataclass
class Compiled:
    """What was compiled so far, in this context."""

    seconds: list[float] = dataclasses.field(default_factory=list)  # of each program
    cached: int = 0  # programs of these that were read from the cache


def use_cache(folder: str | os.PathLike | None = None) -> Path | None:
    """Keep compiled programs on disk, and use those that are there, from now on in this process.

    What JAX was told already stays: a folder in JAX_COMPILATION_CACHE_DIR or `jax.config`, or
    JAX_ENABLE_COMPILATION_CACHE=false.

    Args:
      folder: where to keep them; default the folder `compiled` of `places.cache_folder`.

    Returns:
      The folder; None if the cache is off, or if the folder cannot be written to, which is one
      note on stderr.
    """
    if not jax.config.jax_enable_compilation_cache:
        return None
    if jax.config.jax_compilation_cache_dir:
        return Path(jax.config.jax_compilation_cache_dir)
    folder = places.cache_folder() / "compiled" if folder is None else Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        places.check_writable(folder / f"program{SUFFIX}")
    except (OSError, places.PlaceError) as error:
        print(f"note: compiled programs are not kept ({error})", file=sys.stderr)
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", SHORTEST)
    return folder


def turn_off() -> None:
    """Neither read nor keep compiled programs in this process."""
    jax.config.update("jax_enable_compilation_cache", False)


@contextlib.contextmanager
def watched() -> Iterator[Compiled]:
    """What is compiled while the context lasts, counted as it happens.

    What is wrong with files of the cache is said at the end.
    """
    seen = Compiled()

    def on_duration(event: str, duration: float, **_: Any) -> None:
        if event == COMPILED:
            seen.seconds.append(duration)

    def on_event(event: str, **_: Any) -> None:
        if event == READ:
            seen.cached += 1

    jax.monitoring.register_event_duration_secs_listener(on_duration)
    jax.monitoring.register_event_listener(on_event)
    try:
        with _cache_faults():
            yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(on_duration)
        jax.monitoring.unregister_event_listener(on_event)


@contextlib.contextmanager
def announced(what: str) -> Iterator[Compiled]:
    """Say on stderr what is compiled, and afterwards how long it took and what was on disk.

    Args:
      what: e.g. "the programs of the stream".
    """
    print(f"compiling {what} for {machine.device().device_kind} ...", file=sys.stderr, flush=True)
    begin = time.perf_counter()
    with watched() as seen:
        yield seen
    print(f"  {summary(seen, time.perf_counter() - begin)}", file=sys.stderr, flush=True)


def summary(seen: Compiled, seconds: float) -> str:
    """One line on what was compiled in so many seconds."""
    count = len(seen.seconds)
    text = f"{count} program{'' if count == 1 else 's'} in {seconds:.1f} s"
    if not seen.cached:
        return text
    number = "all" if seen.cached == count else seen.cached
    return f"{text}, {number} from {jax.config.jax_compilation_cache_dir}"


@contextlib.contextmanager
def _cache_faults() -> Iterator[None]:
    """One note instead of JAX's warnings about files of the cache; the files are removed.

    JAX writes them in place. One that was cut off, by a full disk or a process that was killed,
    would be met again at every start: JAX compiles the program anew, but never writes over it.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    programs = set()
    for warning in caught:
        fault = FAULT.match(str(warning.message))
        if fault is None:
            about = (warning.message, warning.category, warning.filename, warning.lineno)
            warnings.warn_explicit(*about)
        else:
            programs.add(fault[1])
    if not programs:
        return
    folder = Path(jax.config.jax_compilation_cache_dir)
    for program in programs:
        for path in folder.glob(f"{glob.escape(program)}-*{SUFFIX}"):
            path.unlink(missing_ok=True)
    print(
        f"note: compiled programs in {folder} that could not be read or written were removed:"
        f" {', '.join(sorted(programs))}",
        file=sys.stderr,
    )

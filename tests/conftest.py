"""Settings shared by all tests."""

from __future__ import annotations

import ctypes
import gc
import os
import signal

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

# Thousands of programs are compiled here and run once. Those that are hardly optimised compute the
# same and compile in about half of the time; commands that tests start compile so, too.
QUICK = "JAX_DISABLE_MOST_OPTIMIZATIONS"
jax.config.update(QUICK.lower(), os.environ.setdefault(QUICK, "1") == "1")
# XLA's older way of writing code for CPUs compiles twice as fast as its fusion emitters; JAX 0.11
# has the new one alone.
if os.environ[QUICK] == "1" and jax.__version_info__ < (0, 11):
    FLAGS = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{FLAGS} --xla_cpu_use_fusion_emitters=false".strip()
jax.config.update("jax_default_matmul_precision", "highest")  # on every backend
# A job in the background of a shell ignores Ctrl-C, and so would the commands that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """No test, and no command that a test starts, reads or fills the cache of the user.

    Equal programs are compiled once in the whole run, by all its processes and commands together:
    that saves a quarter of the time of a test that trains.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # of all workers
    settings = {
        "jax_compilation_cache_dir": str(folder / "compiled"),
        "jax_persistent_cache_min_compile_time_secs": 0.05,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before, environment = {name: getattr(jax.config, name) for name in settings}, dict(os.environ)
    os.environ["CHAMELEON_CACHE"] = str(folder / "cache")
    for name, value in settings.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)
    compilation_cache.reset_cache()  # of what was compiled while tests were collected
    yield
    os.environ.clear()
    os.environ.update(environment)
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """The programs of a file are of no use to the next one, and those of the suite take 6 GB in
    each process.
    """
    yield
    jax.clear_caches()
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:  # glibc gives memory back to the system only when it is told to
        trim(0)


def pytest_collection_modifyitems(config, items):
    """Tests in a browser run where there is one, or fail where one is needed."""
    if not no_browser():
        return
    left = [item for item in items if item.get_closest_marker("browser")]
    items[:] = [item for item in items if item not in left]
    config.hook.pytest_deselected(items=left)


def pytest_terminal_summary(terminalreporter):
    """Say what did not run."""
    if no_browser():
        terminalreporter.write_line(
            "NOT RUN: tests of the page in a browser, for there is none; Debian and Ubuntu have it"
            " in the package `chromium`",
            yellow=True,
        )


def no_browser() -> bool:
    """Whether tests in a browser are left out."""
    from tests.serving import chromium

    return not (chromium.find() or chromium.needed())

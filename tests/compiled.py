"""Compiling in tests: once for equal programs."""

from __future__ import annotations

import os

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache


@pytest.fixture(scope="package", autouse=True)
def share_compiled_programs(tmp_path_factory):
    """Compiled programs are kept in a folder for the whole run, also for child processes."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.getbasetemp() / "compiled"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    environment = dict(os.environ)
    for name, value in settings.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)
    yield
    os.environ.clear()
    os.environ.update(environment)
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()

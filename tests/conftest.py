"""Settings shared by all tests: float32 products at full precision on every backend."""

from __future__ import annotations

import os

import jax
import pytest

jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """No test, and no command that a test starts, reads or fills the cache of the user."""
    former = os.environ.get("CHAMELEON_CACHE")
    os.environ["CHAMELEON_CACHE"] = str(tmp_path_factory.getbasetemp() / "cache")
    yield
    if former is None:
        del os.environ["CHAMELEON_CACHE"]
    else:
        os.environ["CHAMELEON_CACHE"] = former

"""One small pipeline, whose programs are compiled once for all tests of sessions."""

from __future__ import annotations

import pytest

from tests.inference.streams import make_pipeline


@pytest.fixture(scope="session")
def pipeline():
    return make_pipeline()

"""Compiled programs are shared among these tests."""

from tests.compiled import share_compiled_programs  # noqa: F401

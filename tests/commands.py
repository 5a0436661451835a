"""Commands called in the process of a test, whose errors are raised."""

from __future__ import annotations

from typing import Any

from launch import cli
from launch import convert as command


def run_converter(*arguments: Any) -> None:
    """`python -m converters` with these arguments.

    Raises:
      UserError: what the command would print.
    """
    command.run(cli.read(command.define_flags, [str(argument) for argument in arguments]))

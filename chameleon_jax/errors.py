"""What is said when something that a user gave, or something on their machine, cannot be used.

Every error that a user can cause is a `UserError`. Its message says what was wrong, what was
expected and what to do, so that a command prints it and stops (launch/cli.py) and a server sends
it. Any other exception is a fault of this project and keeps its traceback.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]  # of a clone; of an installed package, site-packages


class UserError(ValueError):
    """An input, a setting or the machine cannot be used as asked. The message is for the user.

    Attributes:
      keeps_lines: the message is a list of faults, a line each; others are one line.
    """

    keeps_lines = False


class MissingPackageError(UserError):
    """An optional package is not installed. The message names the command that installs it."""


def need(module: str, extra: str) -> ModuleType:
    """Import an optional module.

    Args:
      module: its import name, e.g. "av".
      extra: the extra of setup.py that brings it, e.g. "video".

    Raises:
      MissingPackageError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise  # something that the module itself needs: its own message says more
        raise MissingPackageError(
            f"{module} is not installed; it comes with the extra {extra!r}:"
            f" {install_command(extra)}"
        ) from None


def install_command(extra: str) -> str:
    """The command that installs an extra, for a clone as for an installed package."""
    if (ROOT / "setup.py").is_file():
        return f'python -m pip install -e "{ROOT}[{extra}]"'
    return f'python -m pip install "chameleon-jax[{extra}]"'


def one_line(error: BaseException | str) -> str:
    """A message without line breaks; the name of the class if there is no message."""
    return " ".join(str(error).split()) or type(error).__name__


def printable(name: str | bytes) -> str:
    """A name or path as a message shows it: quoted and escaped if it would break the line."""
    if isinstance(name, bytes) or not name.isprintable():
        return repr(name)
    return name

"""What the entry points share: flags of one's own, `--config.a.b=value` overrides, and errors of
one line.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from absl import flags
from ml_collections import ConfigDict

from chameleon_jax.config import load_config
from chameleon_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


class UsageError(UserError):
    """The command line asks for something impossible. The message is one line."""


def define(flag_values: flags.FlagValues, default_config: str) -> None:
    """Define `--config` and `--help`."""
    flags.DEFINE_string(
        "config",
        default_config,
        "configs/FILE.py or configs/FILE.py:VARIANT",
        flag_values=flag_values,
    )
    flags.DEFINE_bool(
        "help", False, "say what there is and stop", short_name="h", flag_values=flag_values
    )


def parse(
    flag_values: flags.FlagValues, argv: Sequence[str], doc: str
) -> tuple[flags.FlagValues, list[str]]:
    """Read a command line.

    Args:
      flag_values: the flags defined, among them those of `define`.
      argv: the program's name first.
      doc: printed for `--help`, before the list of flags.

    Returns:
      The flags, and the overrides of the config as `a.b=value`.

    Raises:
      UsageError: an unknown flag (the nearest is named), a value of the wrong kind, a stray
        argument.
      SystemExit: after `--help`.
    """
    plain, overrides = [argv[0]], []
    rest = iter(argv[1:])
    for item in rest:
        name = item.lstrip("-")
        if not (item.startswith("-") and name.startswith("config.")):
            plain.append(item)
        elif "=" in name:
            overrides.append(name.removeprefix("config."))
        else:
            overrides.append(f"{name.removeprefix('config.')}={next(rest, '')}")
    try:
        stray = flag_values(plain)[1:]
    except flags.Error as error:
        raise UsageError(" ".join(str(error).split())) from None
    if flag_values.help:
        lines = [
            f"  --{flag.name:22s}{flag.help}" for flag in map(flag_values.__getitem__, flag_values)
        ]
        print(
            f"{doc}\nFlags:\n"
            + "\n".join(lines)
            + "\n  --config.KEY=VALUE      change one key of the config"
        )
        raise SystemExit(0)
    if stray:
        raise UsageError(
            f"unexpected argument {stray[0]!r}; every input is given by a flag, see --help"
        )
    return flag_values, overrides


def read_config(path: str, overrides: Sequence[str]) -> ConfigDict:
    """Load a config; a path that does not exist here is looked for beside the package too."""
    file, colon, variant = path.partition(":")
    if not Path(file).exists() and (ROOT / file).exists():
        path = f"{ROOT / file}{colon}{variant}"
    return load_config(path, overrides)


def fail(error: BaseException | str, code: int = 2) -> NoReturn:
    """One line on stderr, and out."""
    print("error: " + " ".join(str(error).split()), file=sys.stderr)
    sys.exit(code)

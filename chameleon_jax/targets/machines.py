"""Chips to compile for, by name: `v6e-4` is four chips of a TPU v6e, `h200-8` eight H200.

The number counts devices as JAX does: chips. (Google names slices of v5p by their cores, two a
chip: the `v5p-64` here is Google's `v5p-128`.)
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from pathlib import Path
from typing import Any

from chameleon_jax import chips
from chameleon_jax.attention.core import HOW_TO_INSTALL, is_installed
from chameleon_jax.chips import Chip
from chameleon_jax.errors import UserError

# What the device-less CUDA compiler must know of the chip.
DESCRIPTION = Path(__file__).parent / "h200.textproto"
GPUS_A_HOST = 8


class TargetError(UserError):
    """A target is unknown, or its compiler is not installed. The message is one line."""


@dataclasses.dataclass(frozen=True)
class Compiler:
    """What makes programs for some kinds of chip.

    Attributes:
      platform: as `jax.experimental.topologies` names it.
      attention: the backend that its programs use, which needs the same packages.
    """

    platform: str
    attention: str


TPU, CUDA = Compiler("tpu", "splash"), Compiler("cuda", "cudnn")
COMPILERS = {"v5e": TPU, "v5p": TPU, "v6e": TPU, "h200": CUDA}  # by the names of `chips`


@dataclasses.dataclass(frozen=True)
class Target:
    """Some chips of one kind.

    Attributes:
      name: e.g. "v6e-4".
      chip: of which kind.
      count: how many.
      compiler: makes their programs.
    """

    name: str
    chip: Chip
    count: int
    compiler: Compiler


def find(name: str) -> Target:
    """A target by its name: CHIP-COUNT.

    Raises:
      TargetError: no such chip, or a number of them that no slice has.
    """
    found = re.fullmatch(r"([a-z0-9]+)-([1-9][0-9]{0,3})", name)
    if found is None or found[1] not in COMPILERS:
        known = ", ".join(f"{chip}-N" for chip in COMPILERS)
        raise TargetError(
            f"target {name!r}: expected a chip and how many of them, {known}; e.g. v6e-4"
        )
    chip, count = found[1], int(found[2])
    _topology(chip, count)
    return Target(name, chips.named(chip), count, COMPILERS[chip])


def check_installed(target: Target) -> None:
    """Raise a TargetError unless the compiler of a target is installed."""
    backend = target.compiler.attention
    if not is_installed(backend):
        raise TargetError(
            f"target {target.name}: its compiler is not installed; {HOW_TO_INSTALL[backend]}"
        )


def devices(target: Target) -> list[Any]:
    """Descriptions of the devices, to place abstract arrays on.

    Raises:
      TargetError: the compiler is not installed.
    """
    from jax.experimental import topologies

    check_installed(target)
    chip = target.name.partition("-")[0]
    shape = _topology(chip, target.count)
    if target.compiler is CUDA:
        description = topologies.get_topology_desc(
            chip, CUDA.platform, target_config=DESCRIPTION.read_text(), topology=shape
        )
    else:
        # One chip is a part of a host, which has four of them.
        bounds = {"chips_per_host_bounds": [1, 1, 1]} if target.count == 1 else {}
        description = topologies.get_topology_desc(f"{chip}:{shape}", TPU.platform, **bounds)
    return list(description.devices)


def _topology(chip: str, count: int) -> str:
    """How the chips are connected: rows x columns, of v5p a box; of GPUs slices, hosts, chips."""
    if COMPILERS[chip] is CUDA:
        hosts, rest = divmod(count, GPUS_A_HOST)
        if count <= GPUS_A_HOST:
            return f"1x1x{count}"
        if rest:
            raise TargetError(
                f"target {chip}-{count}: expected at most {GPUS_A_HOST}, or a multiple of it: whole"
                " hosts"
            )
        return f"1x{hosts}x{GPUS_A_HOST}"
    known = _boxes() if chip == "v5p" else _rectangles()
    if count not in known:
        counts = ", ".join(str(n) for n in sorted(known))
        raise TargetError(f"target {chip}-{count}: no such slice; expected one of {counts} chips")
    return "x".join(str(side) for side in known[count])


@functools.cache
def _rectangles() -> dict[int, tuple[int, ...]]:
    """Slices of v5e and v6e by their number of chips."""
    sides = [(1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)]
    return {math.prod(side): side for side in sides}


@functools.cache
def _boxes() -> dict[int, tuple[int, ...]]:
    """Slices of v5p by their number of chips."""
    sides = [
        (1, 1, 1), (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8),
        (8, 8, 8),
    ]  # fmt: skip
    return {math.prod(side): side for side in sides}

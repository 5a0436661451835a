"""What accelerators can do at most, by their data sheets: operations, memory, bandwidth.

    chips.of_kind(jax.devices()[0].device_kind)   what a program runs on
    chips.named("v6e")                            what a program is planned for

Every figure is of one device as JAX counts devices, which is a chip, except for TPU v7x, where it
is one of the two cores of a chip.

Sources: data sheets of NVIDIA (A100, H100, H200, HGX B200, GH200, L4, L40S; of the operations half
of what they say "with sparsity"), NVIDIA's white papers of Ampere and Ada for the GeForce cards
(bfloat16 with float32 sums), and Google's pages on the TPU versions
(docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e, tpu7x). A kind that is not here has no known
limits.
"""

from __future__ import annotations

import dataclasses
import re

from chameleon_jax.errors import UserError


class ChipError(UserError):
    """A chip that is not in the table. The message is one line."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """Limits of one device.

    Attributes:
      name: as people call it.
      kind: pattern of its `device_kind`.
      flops: dense matrix products in bfloat16, operations a second.
      memory: bytes of its own memory.
      bandwidth: of that memory, bytes a second.
      cores: devices of JAX that one chip is.
    """

    name: str
    kind: str
    flops: float
    memory: float
    bandwidth: float
    cores: int = 1


def _chip(
    name: str, kind: str, tera: float, giga: float, giga_a_second: float, **more: int
) -> Chip:
    return Chip(name, kind, tera * 1e12, giga * 1e9, giga_a_second * 1e9, **more)


# The first one whose pattern matches a kind counts.
CHIPS = (
    _chip("v4", r"^TPU v4$", 275, 32, 1200),
    _chip("v5e", r"^TPU v5 lite$|^TPU v5e$", 197, 16, 819),
    _chip("v5p", r"^TPU v5p?$", 459, 95, 2765),
    _chip("v6e", r"^TPU v6 lite$|^TPU v6e$", 918, 32, 1600),
    _chip("v7x", r"^TPU7x$", 2307 / 2, 192 / 2, 7380 / 2, cores=2),
    _chip("B200", r"\bB200\b", 2250, 180, 8000),
    _chip("H200 NVL", r"\bH200 NVL\b", 835, 141, 4800),
    _chip("H100 NVL", r"\bH100 NVL\b", 835, 94, 3900),
    _chip("H100 PCIe", r"\bH100 PCIe\b", 756, 80, 2000),
    _chip("GH200", r"\bGH200\b", 989, 96, 4000),
    _chip("H200", r"\bH200\b", 989, 141, 4800),
    _chip("H100", r"\bH100\b", 989, 80, 3350),
    _chip("A100 80GB", r"\bA100\b.*\b80GB\b", 312, 80, 1935),
    _chip("A100", r"\bA100\b", 312, 40, 1555),
    _chip("L40S", r"\bL40S\b", 362, 48, 864),
    _chip("L4", r"\bL4\b", 121, 24, 300),
    _chip("RTX 4090", r"\bRTX 4090$", 165, 24, 1008),
    _chip("RTX 3090", r"\bRTX 3090$", 71, 24, 936),
)


def of_kind(kind: str) -> Chip | None:
    """Limits of a device; None if they are not known.

    Args:
      kind: `device_kind` of a device. No CPU has known limits, nor has a part of a GPU (MIG).
    """
    if "MIG" in kind:
        return None
    return next((chip for chip in CHIPS if re.search(chip.kind, kind)), None)


def peak_flops(kind: str) -> float | None:
    """Largest number of bfloat16 operations a second of one device; None if it is not known."""
    chip = of_kind(kind)
    return None if chip is None else chip.flops


def named(name: str) -> Chip:
    """Limits of a chip by its name, of any case.

    Raises:
      ChipError: it is not in the table.
    """
    for chip in CHIPS:
        if chip.name.lower() == name.lower():
            return chip
    known = ", ".join(chip.name for chip in CHIPS)
    raise ChipError(f"no chip is called {name!r}; expected one of {known}")

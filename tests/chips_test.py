"""The table of what accelerators can do."""

from __future__ import annotations

import pytest

from chameleon_jax import chips
from chameleon_jax.chips import ChipError


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU7x", 1153.5e12),  # a core, which is what JAX counts
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA L40", None),
        ("TPU v3", None),
        ("cpu", None),
    ],
)
def test_peaks_of_devices(kind, peak):
    assert chips.peak_flops(kind) == peak


@pytest.mark.parametrize(
    ("name", "memory", "bandwidth"),
    [
        ("v5e", 16e9, 819e9),
        ("V6E", 32e9, 1600e9),
        ("h100", 80e9, 3350e9),
        ("H200", 141e9, 4800e9),
    ],
)
def test_chips_by_name(name, memory, bandwidth):
    chip = chips.named(name)
    assert (chip.memory, chip.bandwidth, chip.cores) == (memory, bandwidth, 1)


def test_two_cores_of_v7x_are_one_chip():
    core = chips.named("v7x")
    assert core.cores * core.flops == 2307e12 and core.cores * core.memory == 192e9


def test_an_unknown_name_is_one_line():
    with pytest.raises(ChipError, match=r"no chip is called 'v9'; expected one of v4, v5e"):
        chips.named("v9")

"""Targets by name."""

from __future__ import annotations

import pytest

from chameleon_jax.attention import core
from chameleon_jax.targets import machines
from chameleon_jax.targets.machines import TargetError


def test_a_target_is_a_chip_and_how_many():
    target = machines.find("v6e-4")
    assert (target.count, target.chip.memory, target.compiler.attention) == (4, 32e9, "splash")
    assert machines.find("h200-16").compiler.attention == "cudnn"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("tpu", "v5e-N, v5p-N, v6e-N, h200-N"),
        ("v6e", "e.g. v6e-4"),
        ("v6e-0", "e.g. v6e-4"),
        ("b300-8", "v5e-N, v5p-N, v6e-N, h200-N"),
        ("v6e-3", "one of 1, 4, 8, 16, 32, 64, 128, 256 chips"),
        ("v5p-9", "no such slice"),
        ("h200-12", "a multiple of it: whole hosts"),
    ],
)
def test_what_is_no_target_is_refused_with_those_that_there_are(name, said):
    with pytest.raises(TargetError, match="expected") as refused:
        machines.find(name)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_compiler_that_is_not_installed_is_named_with_how_to_get_it(monkeypatch):
    monkeypatch.setattr(core, "_installed", lambda module: False)
    with pytest.raises(TargetError, match=r"v6e-1.*pip install 'jax\[tpu\]'"):
        machines.check_installed(machines.find("v6e-1"))
    with pytest.raises(TargetError, match=r"pip install 'jax\[cuda13\]'"):
        machines.check_installed(machines.find("h200-1"))

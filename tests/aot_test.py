"""The 5B chunk step compiles for a TPU v6e and an H200, fits them and uses their attention kernels.

The compilers run in processes of their own: the platform of a process is chosen once, and a
compiler takes gigabytes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import aot_compile

SCRIPT = Path(aot_compile.__file__)
LAYERS = 30


@pytest.mark.slow
def test_the_5b_step_fits_one_tpu_v6e():
    report = compiled("v6e")
    assert report["attention_kernels"] >= LAYERS
    assert report["total_bytes"] <= 32e9


@pytest.mark.slow
@pytest.mark.skipif(
    not any(aot_compile.installed(name) for name in aot_compile.TARGETS["h200"]["needs"]),
    reason="gigabytes: needs pip install 'jax[cuda13]'",
)
def test_the_5b_step_fits_one_h200_and_never_copies_the_cache():
    report = compiled("h200")
    assert report["cudnn_flash"] >= LAYERS
    assert report["total_bytes"] <= 24e9
    assert report["layer_sized_operations"] == {}


def test_layer_sized_operations_are_found_and_updates_in_place_are_not():
    hlo = """HloModule step

%inside (p: bf16[4,6]) -> bf16[24] {
  %p = bf16[4,6]{1,0} parameter(0)
  ROOT %copy.9 = bf16[24]{0} copy(%p)
}

ENTRY %main (cache: bf16[4,6], new: bf16[1,6]) -> bf16[4,6] {
  %cache = bf16[4,6]{1,0} parameter(0)
  %new = bf16[1,6]{1,0} parameter(1)
  %moved = bf16[4,6]{0,1} copy(%cache)
  %fused = bf16[24]{0} fusion(%moved), kind=kLoop, calls=%inside
  %small = bf16[1,6]{1,0} negate(%new)
  ROOT %updated = bf16[4,6]{1,0} dynamic-update-slice(%cache, %small)
}
"""
    assert aot_compile.large_operations(hlo, 24) == {"copy": 1, "fusion:copy": 1}


def compiled(target: str) -> dict:
    """The report of `aot_compile` for a target, from a process of its own."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), target], capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])

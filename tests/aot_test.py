"""The 5B chunk step compiles for a TPU v6e, four v5e and an H200, and uses their attention kernels.

The compilers run in processes of their own: the platform of a process is chosen once, and a
compiler takes gigabytes.
"""

from __future__ import annotations

import json
import os
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


OVER_FOUR = """
import collections, json, re
from jax.experimental import topologies
from chameleon_jax import sharding
from chameleon_jax.config import load_config
from chameleon_jax.inference import Pipeline

devices = topologies.get_topology_desc("v5e:2x2", "tpu").devices
mesh = sharding.make_mesh({"tensor": 4}, devices)
config = load_config("configs/wan22_5b.py", ["model.dit.layers=1"])
compiled = Pipeline.abstract(config, mesh=mesh).lower("chunk").compile()
hlo = compiled.as_text()
moved = re.findall(r" (all-[a-z]+|collective-permute|reduce-scatter)(?:-start)?\\(", hlo)
print(json.dumps({
    "kernels": hlo.count('custom_call_target="tpu_custom_call"'),
    "moved": collections.Counter(moved),
    "in_place": compiled.memory_analysis().alias_size_in_bytes,
}))
"""


@pytest.mark.slow
def test_a_layer_of_the_5b_step_compiles_for_four_tpu_v5e():
    """Kernels on the heads of each, the cache in its place, and sums behind the projections only:
    three of activations, and one each for the norms of self- and cross-attention.
    """
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(SCRIPT.parents[1]),
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    }
    done = subprocess.run(
        [sys.executable, "-c", OVER_FOUR],
        capture_output=True,
        text=True,
        timeout=1800,
        env=env,
        cwd=SCRIPT.parents[1],
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.strip().splitlines()[-1])
    assert report["kernels"] == 2  # self- and cross-attention
    assert report["moved"] == {"all-reduce": 5}
    keys_and_values = 2 * 23 * 880 * 3072 * 2 // 4
    assert keys_and_values <= report["in_place"] < keys_and_values + 10**4


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

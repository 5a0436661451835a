"""Programs compiled for chips that are not here, by their own compilers.

Each in a process of its own: the platform of a process is chosen once, and a compiler takes
gigabytes.
"""

from __future__ import annotations

import pytest

from chameleon_jax.attention.core import is_installed
from chameleon_jax.config import load_config
from chameleon_jax.errors import UserError
from chameleon_jax.targets import machines
from chameleon_jax.targets.compiling import Job, run

LAYERS, PASSES = 30, 5  # of the published transformer; of a chunk
CUDA = is_installed(machines.CUDA.attention)


def job(config: str, *args, **kwargs) -> Job:
    return Job(load_config(config).to_dict(), *args, **kwargs)


def test_a_small_chunk_for_four_tpus_says_what_they_send_each_other():
    found = run(
        Job(
            load_config("configs/runway_tiny.py:smoke", ["model.dit.heads=4"]).to_dict(),
            "v5e-4",
            "chunk",
            {"tensor": 2, "seq": 2},
        ),
        minutes=15,
    )
    assert "error" not in found
    assert found["mesh"] == {"seq": 2, "tensor": 2}
    assert found["kernels"]["splash attention"] >= 10
    assert found["collectives"]["all-reduce"]["count"] >= 10
    assert found["flops"]["not_counted"] == []
    assert found["bytes"]["alias"] >= found["resident"]["cache"]  # written in place


def test_a_mesh_that_does_not_divide_is_refused_with_the_number_to_change():
    with pytest.raises(UserError, match="2 attention heads do not divide among seq x tensor = 4"):
        run(job("configs/runway_tiny.py:smoke", "v5e-4", "chunk"), minutes=15)


def test_a_program_that_there_is_not_is_refused_with_those_that_there_are():
    with pytest.raises(UserError, match="'chunks': expected one of .*chunk"):
        run(job("configs/runway_tiny.py:smoke", "v6e-1", "chunks"), minutes=15)


def test_a_compiler_that_takes_too_long_is_ended():
    found = run(job("configs/runway_tiny.py:smoke", "v6e-1", "chunk"), minutes=0.001)
    assert found["error"] == "not compiled within 0.001 minutes"
    assert (found["target"], found["program"]) == ("v6e-1", "chunk")


@pytest.mark.slow
def test_the_5b_chunk_fits_one_tpu_v6e_and_never_copies_the_cache():
    found = run(job("configs/wan22_5b.py", "v6e-1", "chunk"), minutes=60)
    assert "error" not in found
    # Of the clean pass the last layer only writes.
    assert found["kernels"]["splash attention"] >= 2 * (LAYERS * PASSES - 1)
    assert found["peak_bytes"] <= 32e9
    assert not found["moves"]


@pytest.mark.slow
def test_a_layer_of_the_5b_step_compiles_for_four_tpu_v5e():
    """Kernels on the heads of each, the cache in its place, and sums behind the projections only:
    three of activations a layer, and one each for the norms of self- and cross-attention.
    """
    config = load_config("configs/wan22_5b.py", ["model.dit.layers=1"]).to_dict()
    found = run(Job(config, "v5e-4", "chunk"), minutes=60)
    assert "error" not in found
    assert found["mesh"] == {"tensor": 4}
    assert found["kernels"]["splash attention"] >= 2 * (PASSES - 1)
    assert set(found["collectives"]) == {"all-reduce"}
    assert found["collectives"]["all-reduce"]["count"] <= 5 * PASSES + 5
    assert found["bytes"]["alias"] >= found["resident"]["cache"]


@pytest.mark.slow
@pytest.mark.skipif(not CUDA, reason="gigabytes: needs pip install 'jax[cuda13]'")
def test_the_5b_chunk_fits_one_h200_and_never_copies_the_cache():
    found = run(job("configs/wan22_5b.py", "h200-1", "chunk"), minutes=60)
    assert "error" not in found
    assert found["kernels"]["cuDNN attention"] >= LAYERS * PASSES
    assert found["peak_bytes"] <= 24e9
    assert found["moves"] == {}

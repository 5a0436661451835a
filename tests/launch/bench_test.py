"""`launch.bench` on a random model of a few thousand parameters, on a machine that has the bare
core only.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch import bench

ROOT = Path(__file__).parents[2]
SMALL = [
    f"--config={ROOT}/configs/runway_tiny.py:smoke",
    "--config.video.height=32",
    "--config.video.width=16",
    "--config.sampler.steps=1",
]

# Everything that a bare accelerator machine may not have is made unimportable before anything else
# happens.
BARE = """
import sys
FORBIDDEN = (
    "av", "grain", "tensorflow_datasets", "tensorflow", "orbax", "torch", "tokenizers",
    "safetensors", "ftfy", "tqdm", "numba", "diffusers", "transformers", "array_record",
    "tensorboardX",
)
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in FORBIDDEN:
            raise ModuleNotFoundError(f"{name} is not here", name=name)
sys.meta_path.insert(0, Refuse())
import chameleon_jax.inference
from launch import bench
try:
    bench.main(sys.argv[1:])
except SystemExit as error:
    assert not error.code
assert not [name for name in sys.modules if name.split(".")[0] in FORBIDDEN]
"""


def test_runs_where_only_the_core_is_installed(tmp_path):
    out = tmp_path / "results" / "bench.json"
    argv = [
        sys.executable,
        "-c",
        BARE,
        *SMALL,
        "--frames=33",
        "--repeats=2",
        "--switches=3",
        f"--out={out}",
    ]
    done = subprocess.run(
        argv,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    results = report["results"]
    assert results["frames"] == 33 and results["chunks"] == 3 and results["switches"] == 3
    assert len(results["denoise_seconds"]) == len(results["delivered_seconds"]) == 2
    assert results["denoise_fps"] > 0 and results["delivered_fps"] > 0
    assert results["switch_p95_ms"] >= results["switch_p50_ms"] > 0
    assert (
        results["first_frame_ms"] > 0
        and results["peak_mib"] > 50
        and results["compile_seconds"] > 0
    )
    assert (
        report["hardware"]["platform"]
        and report["versions"]["jax"]
        and report["config"]["sampler"]["steps"] == 1
    )
    for label in (
        "denoise only, whole video",
        "with decoding",
        "first frame",
        "garment switch, p95",
        "peak memory",
        "compilation",
    ):
        assert label in done.stdout


def test_length_independence_report(tmp_path, capsys):
    out = tmp_path / "bench.json"
    with pytest.raises(SystemExit) as exit_:
        bench.main([*SMALL, "--length_independence", "--chunks=150", f"--out={out}"])
    assert not exit_.value.code
    results = json.loads(out.read_text())["results"]
    assert results["chunks"] == 150 and results["frames"] == 12 * 150 - 3
    assert (
        len(results["ms_by_50"]) == len(results["mib_by_50"]) == len(results["programs_by_50"]) == 3
    )
    assert results["programs_compiled"] == 0
    assert results["time_ratio"] == pytest.approx(results["late_ms"] / results["early_ms"])
    assert "late / early, time" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("--config.cache.frmes=1", "cache.frames"),
        ("--weights=nowhere", "nowhere: no such folder"),
        ("--repeats=0", "repeats"),
        ("--out=x.txt", "ends in .json"),
        ("--chunks=20", "chunks"),
    ],
)
def test_bad_input_is_one_line(extra, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        bench.main([*SMALL, extra])
    stderr = capsys.readouterr().err
    assert exit_.value.code == 2
    assert stderr.startswith("error: ") and len(stderr.splitlines()) == 1 and message in stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_cost_per_chunk_does_not_grow_with_the_stream(tmp_path):
    """500 chunks of the embedded model, in small pictures, run the same programs on arrays of the
    same sizes, in the same memory.

    Programs of fixed shapes do the same work every time; how long that takes is the benchmark's to
    say, not a test's.
    """
    out = tmp_path / "bench.json"
    with pytest.raises(SystemExit) as exit_:
        bench.main(
            [
                f"--config={ROOT}/configs/runway_tiny.py",
                "--config.sampler.steps=1",
                "--config.video.height=32",
                "--config.video.width=32",
                "--length_independence",
                f"--out={out}",
            ]
        )
    assert not exit_.value.code
    results = json.loads(out.read_text())["results"]
    assert results["chunks"] == 500 and len(results["array_bytes_by_50"]) == 10
    assert results["programs_compiled"] == 0
    assert len(set(results["array_bytes_by_50"])) == 1
    assert results["memory_ratio"] < 1.01

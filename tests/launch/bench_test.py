"""`launch.bench` on a random model of a few thousand parameters, on a machine that has the bare
core only.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from chameleon_jax import chips, machine
from chameleon_jax.inference.flops import StreamFlops
from chameleon_jax.models.build import read_sizes
from chameleon_jax.models.taehv import TaehvConfig
from chameleon_jax.models.vae import VaeConfig
from launch import bench, bench_figures, bench_stream

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
class Hidden:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in FORBIDDEN:
            return None
        return self.finder.find_spec(name, path, target)
sys.meta_path[:] = [Hidden(finder) for finder in sys.meta_path]
import chameleon_jax.inference
from launch import bench
try:
    bench.main(sys.argv[1:])
except SystemExit as error:
    assert not error.code
assert not [name for name in sys.modules if name.split(".")[0] in FORBIDDEN]
"""


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """The whole benchmark where only the core is installed: its report, and what it printed."""
    folder = tmp_path_factory.mktemp("bare")
    out, trace = folder / "results" / "bench.json", folder / "trace"
    argv = [
        *SMALL,
        "--frames=33",
        "--repeats=2",
        "--switches=3",
        "--skip=start",
        f"--out={out}",
        f"--profile={trace}",
    ]
    done = subprocess.run(
        [sys.executable, "-c", BARE, *argv],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    assert list(trace.rglob("*.xplane.pb"))
    return json.loads(out.read_text()), done.stdout


def test_runs_where_only_the_core_is_installed(bare):
    report, printed = bare
    figures = report["figures"]
    for key, count in {
        "denoise_fps": 2,
        "steady_fps": 6,
        "with_vae_fps": 6,
        "with_small_fps": 6,
        "decode_vae_ms": 6,
        "decode_small_ms": 6,
        "first_frame_ms": 2,
        "switch_ms": 3,
        "product_flops": 6,
    }.items():
        figure = figures[key]
        assert len(figure["values"]) == count, key
        assert 0 < figure["min"] <= figure["p10"] <= figure["median"], key
        assert figure["median"] <= figure["p90"] <= figure["max"], key
        assert figure["label"] in printed
    assert figures["denoise_fps"]["label"] == "denoising alone, 33 frames"
    assert report["results"]["peak_host_mib"] > 50 and report["results"]["compile_seconds"] > 0
    assert report["results"]["peak_device_mib"] is None or report["hardware"]["platform"] != "cpu"


def test_what_cannot_be_measured_is_said_and_has_no_number(bare):
    report, printed = bare
    assert report["not_measured"].keys() == {"delivered_vae", "delivered_small"}
    assert not [key for key in report["figures"] if "delivered" in key or "encode" in key]
    for key, reason in report["not_measured"].items():
        assert "av is not installed" in reason and f"{key}: not measured: {reason}" in printed


def test_the_report_says_what_it_was_made_on(bare):
    report, printed = bare
    assert report["versions"]["jax"] and report["versions"]["jax"] in printed
    assert report["hardware"]["platform"] and report["config"]["sampler"]["steps"] == 1
    assert len(report["load"]["before"]) == len(report["load"]["after"]) == 3
    assert report["commit"] == machine.commit()
    assert report["settings"]["JAX_PLATFORMS"] == os.environ["JAX_PLATFORMS"]


@pytest.mark.slow
def test_starts_of_a_process_cold_and_warm(tmp_path):
    """The second one compiles nothing, nor does this process, nor does any chunk."""
    out = tmp_path / "bench.json"
    argv = [*SMALL, "--only=start", "--starts=1", f"--out={out}"]
    subprocess.run(
        [sys.executable, "-c", BARE, *argv],
        check=True,
        # Every program is kept, however fast this machine compiles it.
        env=os.environ
        | {"PYTHONPATH": str(ROOT), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"},
        cwd=tmp_path,
    )
    report = json.loads(out.read_text())
    for kind in ("cold", "warm"):
        (start,) = report["starts"][kind]
        assert start["programs"] == [0, 0, 0] and start["seconds"] > start["parts"]["compile"] > 0
        assert report["figures"][f"start_{kind}_s"]["values"] == [start["seconds"]]
    assert report["programs_from_cache"] == len(report["compile_seconds_by_program"])


def test_a_start_that_fails_is_one_line(tmp_path, capsys):
    argv = [*SMALL, "--only=start", f"--weights={tmp_path}", f"--out={tmp_path}/b.json"]
    with pytest.raises(SystemExit) as exit_:
        bench.main(argv)
    assert exit_.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {tmp_path}") and len(said.splitlines()) == 1


def test_work_is_counted_from_the_config(bare):
    report, _ = bare
    work = StreamFlops.of(report["config"])
    steady = report["work"]["steady_ms"]
    assert steady["flops"] == work.chunk()
    seconds = report["figures"]["steady_ms"]["median"] / 1000
    assert steady["flops_per_second"] == pytest.approx(work.chunk() / seconds)
    product = report["figures"]["product_flops"]["median"] * 1e9
    assert steady["of_product"] == pytest.approx(steady["flops_per_second"] / product)
    assert report["work"]["denoise_ms"]["flops"] == work.video(33)


def test_shares_of_a_data_sheet():
    figures = {"steady_ms": bench_figures.milliseconds("a chunk", [0.5, 0.25, 1.0])}
    rows = bench_figures.work_rows({"steady_ms": 989e12 / 4}, figures, chips.named("H200"), 2)
    assert rows["steady_ms"]["of_data_sheet"] == pytest.approx(0.25)
    assert "25.0 %" in bench_figures.work_table(rows, figures)


def test_cases_run_in_turn():
    seen: list[str] = []
    cases = {name: lambda name=name: seen.append(name) or [1.0] for name in "abc"}
    found = bench_stream.in_turn(cases, 4, lambda: seen.append("|"))
    assert "".join(seen) == "|abc|bca|cab|abc" and found["a"] == [1.0] * 4


def test_the_small_decoder_of_the_published_vae_is_the_published_one():
    group = bench_stream.small_decoder(VaeConfig.wan22())
    assert read_sizes("decoder", group) == TaehvConfig.taew2_2()


def test_frames_count_as_delivered_when_all_are_encoded():
    class Encoder:
        def encode(self, frames):
            time.sleep(0.05)

    encoding: list[float] = []
    seconds = bench_stream.delivered_seconds(lambda: np.zeros(3), Encoder(), 4, encoding)
    assert len(encoding) == 4 and seconds >= 0.05


@pytest.mark.parametrize("text", ["denoise,decode,start,latency,delivered", ""])
def test_no_group_of_figures_is_left(text, capsys):
    with pytest.raises(SystemExit):
        bench.main([*SMALL, f"--skip={text}", "--only=denoise" if text else "--only="])
    assert "leave no group of figures" in capsys.readouterr().err


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
        ("--only=denise", "did you mean denoise?"),
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
    """500 chunks of a narrow model run the same programs on arrays of the same sizes, in the same
    memory.

    Programs of fixed shapes do the same work every time; how long that takes is the benchmark's to
    say, not a test's.
    """
    out = tmp_path / "bench.json"
    with pytest.raises(SystemExit) as exit_:
        bench.main(
            [
                f"--config={ROOT}/configs/runway_tiny.py:smoke",
                "--config.sampler.steps=1",
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

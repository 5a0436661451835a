"""What a run says of its speed and memory, and its profile."""

from __future__ import annotations

import dataclasses
import json

import jax
import pytest

from chameleon_jax import chips, machine
from chameleon_jax.errors import UserError
from chameleon_jax.training import loop, report
from chameleon_jax.training.flops import Flops
from tests.training import toy


def train(workdir, steps, *overrides, profile=None, **options):
    settings = toy.config(workdir, steps, ["mesh.fsdp=1", *overrides])
    stage = toy.stage(settings)
    return loop.train(settings, stage, toy.ToyFeed(), profile=profile, **options)


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_step_says_what_it_costs(tmp_path, caplog):
    with caplog.at_level("INFO", logger="chameleon_jax"):
        train(tmp_path, 4)
    # Forward and backward of 16 -> 64 -> 16 for 8 samples, without the gradient of the input.
    by_hand = 2 * 8 * 16 * 64 * 5
    (said,) = [r.getMessage() for r in caplog.records if "compiled step 'toy'" in r.getMessage()]
    assert f"; {by_hand / 1e12:.4g} TFLOP a step; " in said
    assert " GB on a device (arguments " in said and "in the place of arguments)" in said
    assert "compiling" in caplog.text and caplog.text.count("compiled step") == 1
    for line in lines(tmp_path)[1:]:
        expected = line["steps_per_second"] * by_hand / 1e12
        assert line["tflops_per_second"] == pytest.approx(expected)
        assert 0.01 < line["memory_gb"] <= line["memory_peak_gb"] * 1.001
        assert "mfu" not in line  # nobody knows the peak of a CPU


def test_utilisation_is_a_share_of_the_peak(monkeypatch):
    flops = Flops(model=4e12, hardware=6e12)
    assert report.utilisation(flops, 2.0, 4) == {"tflops_per_second": 0.5}
    monkeypatch.setattr(chips, "peak_flops", lambda kind: 2e12)
    assert report.utilisation(flops, 2.0, 4) == {
        "tflops_per_second": 0.5,
        "mfu": 0.25,
        "hfu": 0.375,
    }
    unknown = Flops(model=4e12, hardware=6e12, unknown=frozenset({"kernel"}))
    assert report.utilisation(unknown, 2.0, 4) == report.utilisation(Flops(), 2.0, 4) == {}


def test_mfu_is_on_the_progress_line_and_in_the_metrics(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(chips, "peak_flops", lambda kind: 1e9)
    with caplog.at_level("INFO", logger="chameleon_jax"):
        train(tmp_path, 3)
    last = lines(tmp_path)[-1]
    assert last["mfu"] == last["hfu"] == pytest.approx(1e3 * last["tflops_per_second"])
    assert f"| MFU {100 * last['mfu']:.1f} %" in caplog.text


def test_work_that_cannot_be_counted_is_said(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(
        "chameleon_jax.training.programs.count_jaxpr",
        lambda jaxpr: Flops(1.0, 1.0, frozenset({"mystery"})),
    )
    train(tmp_path, 3)
    assert "work that cannot be counted (mystery): no figures" in caplog.text
    assert not [line for line in lines(tmp_path) if "tflops_per_second" in line]


def test_memory_is_that_of_the_fullest_accelerator(monkeypatch):
    class Device:
        def __init__(self, used):
            self.stats = {"bytes_in_use": used, "peak_bytes_in_use": 2 * used}

        def memory_stats(self):
            return self.stats

    monkeypatch.setattr(jax, "local_devices", lambda: [Device(3), Device(5)])
    assert (machine.memory_in_use(), machine.peak_memory()) == (5, 10)


def test_a_profile_appears_and_says_where(tmp_path, caplog):
    with caplog.at_level("INFO", logger="chameleon_jax"):
        train(tmp_path, 6, profile=(3, 4))
    files = {path.name.split(".", 1)[1] for path in (tmp_path / "profile").rglob("*.*")}
    assert {"xplane.pb", "trace.json.gz"} <= files
    assert f"profile of the steps 3 to 4 of this start: {tmp_path / 'profile'}" in caplog.text
    assert "https://ui.perfetto.dev" in caplog.text


def test_a_resumed_run_is_profiled_by_its_own_steps(tmp_path, caplog):
    train(tmp_path, 3)
    caplog.clear()
    train(tmp_path, 5, profile=(2, 9), resume_with_changes=True)  # ends before the ninth
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_a_run_that_is_too_short_for_its_profile_says_so(tmp_path, caplog):
    train(tmp_path, 2, profile=(5, 6))
    assert "no profile: this start took 2 steps, the first to profile is 5" in caplog.text
    assert not (tmp_path / "profile").exists()


def test_seconds_go_on_over_a_resume_and_curves_have_no_gap(tmp_path):
    train(tmp_path, 3)
    before = lines(tmp_path)
    kept = before[-1]["seconds"]
    (tmp_path / "metrics.jsonl").open("a").write('{"step": 4, "seconds": 1e6, "loss": 1.0}\n')
    train(tmp_path, 6, resume_with_changes=True)
    found = lines(tmp_path)
    assert found[:3] == before
    assert [line["step"] for line in found] == [1, 2, 3, 4, 5, 6]
    seconds = [line["seconds"] for line in found]
    assert seconds == sorted(seconds) and kept <= seconds[3] < kept + 60


@pytest.mark.parametrize(
    ("name", "value"), [("sample/motion", float("nan")), ("sample/nonfinite", 0.25)]
)
def test_previews_that_are_not_finite_stop_the_run(tmp_path, name, value):
    settings = toy.config(tmp_path, 4, ["mesh.fsdp=1", "train.preview_every=2"])
    stage = toy.stage(settings)

    def broken(*inputs):
        picture, _ = stage.preview(*inputs)
        return picture, {name: value}

    with pytest.raises(report.TrainingDivergedError, match=f"step 2: {name} not finite"):
        loop.train(settings, dataclasses.replace(stage, preview=broken), toy.ToyFeed())
    assert issubclass(report.TrainingDivergedError, UserError)
    assert all(name not in line for line in lines(tmp_path))

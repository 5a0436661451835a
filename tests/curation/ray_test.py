"""The runner on a real Ray: the same records as the serial one, also when a worker is killed."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path

import pytest

from chameleon_jax.curation import intake, pipeline
from chameleon_jax.curation.runner import SerialRunner
from chameleon_jax.curation.stage import CurationError
from tests.curation.made import Numbered, OnePerson, clip, write_scene

pytestmark = [pytest.mark.ray, pytest.mark.slow]

NAMES = [f"{i:02d}" for i in range(16)]
VALUES = {name: float(i) for i, name in enumerate(NAMES)}


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """One cluster for all of these tests; workers find the tests, too."""
    root = str(Path(__file__).parents[2])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = root if before is None else f"{root}{os.pathsep}{before}"
    from chameleon_jax.curation import ray_runner

    ray_runner.start(ray_runner.LOCAL, 2)
    yield
    ray_runner.stop()
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


class Noted(Numbered):
    """Writes down what it was asked, and where; dies once at a clip."""

    def __init__(self, name, log: Path, dies_at: str = ""):
        super().__init__(name, VALUES, least=4.0)
        self.log, self.dies_at = log, dies_at

    def measure(self, clips):
        for one in clips:
            with self.log.open("a") as file:
                file.write(f"{self.name} {one.id} {os.getpid()}\n")
            died = self.log.with_suffix(".died")
            if one.id == self.dies_at and not died.exists():
                died.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return super().measure(clips)


@dataclasses.dataclass
class Groups:
    """Builds the stages in each worker."""

    log: Path
    dies_at: str = ""

    def __call__(self):
        first = [Noted("one", self.log, self.dies_at), Noted("two", self.log)]
        return [first, [Noted("three", self.log)]]


def clips():
    return [clip(name) for name in NAMES]


def asked(log: Path) -> list[str]:
    return [" ".join(line.split()[:2]) for line in log.read_text().splitlines()]


def ray_run(build: Groups, out: Path, progress=None):
    from chameleon_jax.curation.ray_runner import RayRunner

    runner = RayRunner(build(), out, build, workers=1, batch=2, progress=progress)
    return runner(clips())


def test_the_same_as_in_one_process_also_when_a_worker_is_killed(tmp_path):
    serial = SerialRunner(Groups(tmp_path / "serial.log")(), tmp_path / "serial")(clips())
    log = tmp_path / "ray.log"
    assert ray_run(Groups(log, dies_at="09"), tmp_path / "ray") == serial
    assert log.with_suffix(".died").exists()
    lines = log.read_text().splitlines()
    assert str(os.getpid()) not in {line.split()[2] for line in lines}
    assert asked(log).count("one 09") == 2  # before and after its death
    assert sorted(set(asked(log))) == sorted(asked(tmp_path / "serial.log"))


class Killed(Exception):
    """What stands for a signal to the driver."""


def test_a_driver_that_ends_goes_on_and_so_does_the_serial_runner(tmp_path):
    log, out = tmp_path / "log", tmp_path / "out"

    def stop(name, done, total):
        if done == 6:
            raise Killed

    with pytest.raises(Killed):
        ray_run(Groups(log), out, stop)
    known = (out / "journal/one.jsonl").read_text().count("\n")
    assert known >= 6
    log = tmp_path / "later"  # a worker may still write to the first
    again = SerialRunner(Groups(log)(), out)(clips())
    assert asked(log).count("one 00") == 0
    assert sum(line.startswith("one") for line in asked(log)) == len(NAMES) - known
    log.unlink()
    assert ray_run(Groups(log), out) == again
    assert not log.exists()  # nothing was left to look at


@dataclasses.dataclass
class Scenes:
    """The filters on made footage."""

    config: str
    folder: Path
    out: Path

    def __call__(self):
        config = pipeline.from_json(self.config)
        models = pipeline.Models(OnePerson())
        return pipeline.Pipeline(config, self.folder, self.out, models).groups


def test_footage_gives_the_same_clips(tmp_path):
    from chameleon_jax.curation.ray_runner import RayRunner
    from tests.curation.pipeline_test import config

    folder = tmp_path / "footage"
    write_scene(folder / "one.mp4", [1, 2])
    write_scene(folder / "two.mp4", [3], frames=30)
    (folder / "broken.mp4").write_bytes(b"\0\0\0\x20ftypisom" + bytes(99))
    videos = intake.find_videos(folder, "own", "us")

    def curated(out: Path, make_runner):
        stages = pipeline.Pipeline(config(), folder, out, pipeline.Models(OnePerson()))
        return pipeline.run(stages, videos, make_runner=make_runner)

    def on_ray(groups, out, progress):
        build = Scenes(pipeline.to_json(config()), folder, out)
        return RayRunner(groups, out, build, workers=1, progress=progress)

    serial = curated(tmp_path / "serial", pipeline.serial)
    spread = curated(tmp_path / "ray", on_ray)
    assert spread.clips == serial.clips and len(spread.clips) == 4
    assert spread.summary["steps"] == serial.summary["steps"]
    assert spread.summary["speed"]["motion"]["clips"] == 3


def test_a_cluster_that_is_not_there(monkeypatch):
    from chameleon_jax.curation import ray_runner

    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with pytest.raises(CurationError, match="--ray 127.0.0.1:1: no cluster there"):
        ray_runner.start("127.0.0.1:1", 1)

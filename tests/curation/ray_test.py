"""The runner on a real Ray: the same records as the serial one, also when a worker is killed."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path

import pytest

from chameleon_jax.curation import intake, pipeline
from chameleon_jax.curation.garment import LookEmbedder
from chameleon_jax.curation.runner import SerialRunner
from chameleon_jax.curation.stage import CurationError
from tests.curation.made import Numbered, OnePerson, clip, refused, write_scene

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
    """Writes down what it was asked, and where; dies at a clip, once or always."""

    def __init__(self, name, log: Path, dies_at: str = "", always: bool = False):
        super().__init__(name, VALUES, least=4.0)
        self.log, self.dies_at, self.always = log, dies_at, always

    def measure(self, clips):
        for one in clips:
            with self.log.open("a") as file:
                file.write(f"{self.name} {one.id} {os.getpid()}\n")
            died = self.log.with_suffix(".died")
            if one.id == self.dies_at and (self.always or not died.exists()):
                died.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return super().measure(clips)


@dataclasses.dataclass
class Groups:
    """Builds the stages in each worker."""

    log: Path
    dies_at: str = ""
    always: bool = False

    def __call__(self):
        first = [Noted("one", self.log, self.dies_at, self.always), Noted("two", self.log)]
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


def test_a_clip_that_kills_every_worker_is_refused_and_tried_again_later(tmp_path):
    from chameleon_jax.curation import ray_runner

    log, out = tmp_path / "log", tmp_path / "out"
    found = {one.id: one for one in ray_run(Groups(log, dies_at="09", always=True), out)}
    why = refused(found.pop("09"))
    assert (why.stage, why.reason) == ("one", ray_runner.DIED)
    assert (why.value, why.threshold) == (ray_runner.RESTARTS + 1, ray_runner.RESTARTS)
    assert asked(log).count("one 09") == ray_runner.RESTARTS + 1
    serial = SerialRunner(Groups(tmp_path / "serial.log")(), tmp_path / "serial")(clips())
    assert list(found.values()) == [one for one in serial if one.id != "09"]
    assert SerialRunner(Groups(log)(), out)(clips()) == serial  # 09 is looked at now


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
    assert spread.summary["speed"]["shots"]["clips"] == 4


@dataclasses.dataclass
class Dressed:
    """All stages on made footage, with models that answer from the pictures; notes who embeds."""

    config: str
    folder: Path
    out: Path
    log: Path
    garments: tuple = ()
    dies: bool = False

    def __call__(self):
        from tests.curation.pipeline_test import Editor, Model

        editor = Editor()
        if self.dies:
            editor = DyingEditor(self.log.with_suffix(".died"))
        models = pipeline.Models(
            OnePerson(),
            vision=Model(),
            editor=editor,
            embedder=NotedEmbedder(self.log),
            garments=self.garments,
        )
        config = pipeline.from_json(self.config)
        return pipeline.Pipeline(config, self.folder, self.out, models).groups


class NotedEmbedder(LookEmbedder):
    """Writes down which process asked it, and about how many pictures."""

    def __init__(self, log: Path):
        self.log = log

    def embed(self, pictures):
        with self.log.open("a") as file:
            file.write(f"{os.getpid()}\n" * len(pictures))
        return super().embed(pictures)


class DyingEditor:
    """Ends its process when it is first asked to put something on."""

    model = "paints"

    def __init__(self, died: Path):
        self.died = died

    def edit(self, pictures, text, seed):
        from tests.curation.pipeline_test import Editor

        if len(pictures) == 2 and not self.died.exists():
            self.died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return Editor().edit(pictures, text, seed)


def test_references_are_found_by_several_workers_as_by_one(tmp_path):
    """The index is made once, of what each worker says of its share; the records are the same.

    One of the workers is killed on the way.
    """
    from chameleon_jax.curation.garment import Garment, save_picture
    from chameleon_jax.curation.ray_runner import RayRunner
    from tests.curation.garment_test import cloth
    from tests.curation.pipeline_test import config

    folder = tmp_path / "footage"
    for number in range(4):
        write_scene(folder / f"{number}.mp4", [2 * number, 2 * number + 1])
    save_picture(tmp_path, "own.png", cloth(77))
    own = (Garment("own", "", "upper", tmp_path / "pictures/own.png"),)
    videos = intake.find_videos(folder, "own", "us")

    def curated(name: str, on_ray: bool):
        out, log = tmp_path / name, tmp_path / f"{name}.log"
        build = Dressed(pipeline.to_json(config()), folder, out, log, own, on_ray)
        groups = build()
        if on_ray:
            runner = RayRunner(groups, out, build, workers=2, batch=2)
        else:
            runner = SerialRunner(groups, out)
        done = runner(videos)
        return done, out, log.read_text().split()

    serial, serial_out, _ = curated("serial", on_ray=False)
    spread, spread_out, embedded = curated("ray", on_ray=True)
    assert len(serial) == 8 and all(one.rejection is None for one in serial)
    assert [one.to_json() for one in spread] == [one.to_json() for one in serial]
    for one in serial:
        for made in ("garment", "reference"):
            file = one.made[made]["file"]
            assert (spread_out / file).read_bytes() == (serial_out / file).read_bytes()
    # Each garment once, however many workers there are; the driver does its own alone.
    assert embedded.count(str(os.getpid())) == len(own)
    assert len(embedded) == len(own) + len(serial)
    assert (tmp_path / "ray.died").exists()


def test_a_cluster_that_is_not_there(monkeypatch):
    from chameleon_jax.curation import ray_runner

    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with pytest.raises(CurationError, match="--ray 127.0.0.1:1: no cluster there"):
        ray_runner.start("127.0.0.1:1", 1)

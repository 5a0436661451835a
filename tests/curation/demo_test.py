"""The demo: footage of which everything is known, and figures that follow from it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from chameleon_jax.curation import demo, demo_footage, pose
from chameleon_jax.curation.clip import Rejection
from chameleon_jax.curation.demo_footage import FAULTS, Rendered, Take, TakeRenderer
from chameleon_jax.curation.stage import CurationError
from tests.curation.made import clip

ROOT = Path(__file__).parents[2]


def flat(take: Take, level: int) -> Rendered:
    frames = np.full((take.frames, 16, 16, 3), level, np.uint8)
    return Rendered(frames, [[(0.2, 0.2, 0.8, 0.8)] for _ in range(take.frames)])


def two_takes() -> demo_footage.Video:
    """A cross-fade of 4 frames from take 1 to take 2, and a cut to take 3."""
    takes = [(Take(1, "good", 24), 4), (Take(2, "still", 30), 0), (Take(3, "short", 10), 0)]
    rendered = [flat(take, 50 * take.seed) for take, _ in takes]
    return demo_footage.join("a.mp4", takes, rendered)


def test_takes_are_joined_as_planned():
    video = two_takes()
    assert [(span.first, span.last) for span in video.spans] == [(0, 20), (24, 50), (50, 60)]
    assert len(video.frames) == len(video.people) == 60
    levels = video.frames[:, 0, 0, 0]
    assert levels[[19, 20, 23, 24, 49, 50]].tolist() == [50, 60, 90, 100, 100, 150]
    assert len(video.people[19]) == 1 and len(video.people[21]) == 2


def test_every_fault_comes_up_and_half_of_the_takes_have_none():
    takes = [take for video in demo_footage.plan(4, 6) for take, _ in video]
    assert {take.fault for take in takes} == {*FAULTS, *demo_footage.GOOD}
    assert 8 <= sum(take.fault not in FAULTS for take in takes) <= 16
    assert len({take.seed for take in takes}) == len(takes)


def test_pictures_are_known_again_and_strangers_are_not():
    video = two_takes()
    truth = demo.Truth([video])
    assert truth.shown(video.frames[30] + 1).take.fault == "still"
    assert truth.shown(video.frames[3]).take.seed == 1
    with pytest.raises(CurationError, match="none of the footage"):
        truth.shown(np.full((16, 16, 3), 250, np.uint8))


def test_what_a_clip_shows():
    truth = demo.Truth([two_takes()])

    def shown(first: int, frames: int):
        take, alone = truth.span_of(clip("a", first=first, frames=frames))
        return take and take.seed, alone

    assert shown(0, 20) == (1, True)
    assert shown(0, 21) == (1, True)  # a frame of the cross-fade
    assert shown(24, 26) == (2, True)
    assert shown(10, 20) == (None, False) or shown(10, 20)[1] is False


def test_boundaries_are_scored():
    truth = demo.Truth([two_takes()])
    right = demo.score_joints(truth, {"a.mp4": [(19, 24), (49, 50)]})
    assert right["cuts"].to_json()["precision"] == right["cuts"].to_json()["recall"] == 1
    assert right["cross-fades"].right == 1
    wrong = demo.score_joints(truth, {"a.mp4": [(10, 11), (30, 36), (49, 50)]})
    assert (wrong["cuts"].right, wrong["cuts"].wrong, wrong["cuts"].missed) == (1, 1, 0)
    fades = wrong["cross-fades"]
    assert (fades.right, fades.wrong, fades.missed) == (0, 1, 1)


def test_filters_are_scored_on_what_reached_them():
    truth = demo.Truth([two_takes()])

    def out(stage):
        return Rejection(stage, "x", 0, 1)

    clips = [
        clip("a", first=0, frames=20, rejection=out("motion")),  # good: wrongly refused
        clip("a", first=24, frames=26),  # still: missed by motion
        clip("a", first=50, frames=10, rejection=out("shots")),  # short: right
    ]
    scores = demo.score_filters(truth, clips, ["shots", "motion"])
    assert scores["shots"] == demo.Score(1, 0, 0)
    assert scores["motion"] == demo.Score(0, 1, 1)
    assert scores["motion"].to_json()["precision"] == 0
    assert demo.Score(0, 0, 0).to_json()["recall"] is None


def test_faults_are_what_they_are_called():
    renders = {
        fault: TakeRenderer(Take(1, fault, 30)).render(only=[0, 12])
        for fault in ("good", "two", "background", "far", "cut")
    }
    areas = {
        fault: [(box[2] - box[0]) * (box[3] - box[1]) for box in shown.people[0]]
        for fault, shown in renders.items()
    }
    assert len(areas["good"]) == 1 and len(areas["two"]) == len(areas["background"]) == 2
    assert areas["two"][1] > 0.3 * areas["two"][0]
    assert areas["background"][1] < 0.15 * areas["background"][0]
    assert areas["far"][0] < 0.2 * areas["good"][0]
    assert renders["cut"].people[0][0][1] == 0 < renders["good"].people[0][0][1]
    still = TakeRenderer(Take(1, "still", 30)).render(only=[0, 12]).frames
    assert np.array_equal(still[0], still[1])


def test_poses_are_those_of_who_is_rendered():
    """Joints lie on the person, and say which way the take is turned."""
    turned = {"good": (0, 35), "back": (145, 180), "side": (65, 115), "cut": (0, 60)}
    for fault, (least, most) in turned.items():
        renderer = TakeRenderer(Take(4, fault, 30))  # who squats
        shown, there = renderer.render(only=[10]), renderer.pose(10)
        angle = pose.turned_by(there, demo_footage.SIZE, 0.3)
        assert least <= angle <= most, fault
        (left, top, right, bottom), *_ = shown.people[0]
        body = there.joints[5:]
        inside = (body > (left, top)).all(1) & (body < (right, bottom)).all(1)
        assert pose.is_whole(there, ("head", "shoulders", "hips"), 0.3) is (fault != "cut")
        assert inside.all() or fault == "cut"
        seen = there.scores[demo_footage.NOSE_AND_EYES] > 0.3
        assert seen.all() if fault == "good" else fault != "back" or not seen.any()
    moved = [TakeRenderer(Take(4, fault, 30)).pose(10).joints for fault in ("good", "far", "two")]
    assert moved[1] == pytest.approx(0.35 + 0.3 * moved[0])
    assert moved[2] == pytest.approx(moved[0] - (demo_footage.ASIDE, 0))
    still = TakeRenderer(Take(4, "still", 30))
    assert still.pose(0).joints == pytest.approx(still.pose(20).joints)


def run_demo(out: Path, *more: str) -> list[str]:
    arguments = ["--demo", "--out", str(out), "--demo_videos", "2", "--demo_takes", "10"]
    return [sys.executable, "-m", "launch.curate", *arguments, *more]


@pytest.mark.slow
def test_the_demo_finds_what_there_is_and_goes_on_after_a_kill(tmp_path):
    out = tmp_path / "out"
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    killed = subprocess.Popen(
        run_demo(out), cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    journal = out / "journal/captions.jsonl"
    deadline = time.monotonic() + 300
    while not (journal.exists() and journal.stat().st_size):
        assert killed.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (out / "demo.json").exists()
    before = {path.name: path.read_bytes() for path in journal.parent.iterdir()}
    done = subprocess.run(
        run_demo(out), cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for name, data in before.items():  # nothing was looked at twice
        whole = data[: data.rfind(b"\n") + 1]
        after = (journal.parent / name).read_bytes()
        assert after.startswith(whole)
        clips = [json.loads(line)["clip"] for line in after.splitlines()]
        assert len(set(clips)) == len(clips)
    found = json.loads((out / "demo.json").read_text())
    for name, score in found["found"].items():
        assert score["recall"] in (1, None) and score["precision"] in (1, None), name
    for name, check in found["records"].items():
        assert check["right"] == check["of"] >= 5, name
    assert found["spoilt"]["not taken off"] and found["spoilt"]["not put on"]
    assert sum(found["spoilt"].get(kind, 0) for kind in ("clothes", "junk", "injected"))
    assert "cross-fades" in done.stdout

"""Scores of videos: each once, whatever happens in between."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from chameleon_jax.data.video import write_video
from chameleon_jax.evaluation import generation, scoring
from chameleon_jax.evaluation.benches import BenchError, Sample
from chameleon_jax.evaluation.scores.base import Metric, ScoreError, Setup
from chameleon_jax.vlm import UnavailableError


class Brightness(Metric):
    """Mean of the video's pixels; what `answers` says instead, if there is any left."""

    name = "brightness"
    columns = ("brightness",)
    answers: tuple = ()

    def __init__(self, answers=()):
        super().__init__(Setup(Path()))
        self.answers, self.calls, self.said = list(answers), 0, {}

    def score(self, reference, garment, video, prompt):
        self.calls += 1
        answer = self.answers.pop(0) if self.answers else float(video.mean())
        if isinstance(answer, BaseException):
            raise answer
        return {"brightness": answer, "prompt": prompt, "size": list(reference.shape)}


def make_videos(folder: Path, count: int) -> list[Sample]:
    """Samples with still videos of 3 frames, each lighter than the one before."""
    picture = folder / "picture.png"
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("L", (4, 6), 90).save(picture)
    for index in range(count):
        level = np.full((3, 16, 16, 3), 40 * index, np.uint8)
        write_video(generation.video_path(folder, index), level, 8)
    return [Sample(index, picture, picture, f"prompt {index}") for index in range(count)]


def lines(folder: Path) -> list[dict]:
    text = (folder / "scores" / "brightness.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_a_line_a_video(tmp_path):
    samples = make_videos(tmp_path, 3)
    tally = scoring.score(samples, tmp_path, Brightness())
    assert (tally.scored, tally.known, tally.missing) == (3, 0, 0)
    found = lines(tmp_path)
    assert [line["sample"] for line in found] == [0, 1, 2]
    levels = [line["values"]["brightness"] for line in found]
    assert levels == pytest.approx([0, 40, 80], abs=3)
    assert found[1]["prompt"] == "prompt 1" and found[0]["size"] == [6, 4, 3]
    assert found[2]["frames"] == 3
    assert found[0]["about"] == {"version": 1, "files": {}} and len(found[0]["video"]) == 16


def test_equal_videos_have_equal_figures(tmp_path):
    """Determinism: the same files in two folders, scored in another order."""
    one, two = tmp_path / "one", tmp_path / "two"
    samples = make_videos(one, 3)
    make_videos(two, 3)
    scoring.score(samples, one, Brightness())
    scoring.score(samples[::-1], two, Brightness())
    assert sorted(lines(one), key=str) == sorted(lines(two), key=str)


def test_what_is_known_is_not_scored_again(tmp_path):
    samples, metric = make_videos(tmp_path, 3), Brightness()
    scoring.score(samples[:2], tmp_path, metric)
    tally = scoring.score(samples, tmp_path, metric)
    assert (tally.scored, tally.known, metric.calls) == (1, 2, 3)


def test_another_video_or_version_is_scored_again(tmp_path):
    samples, metric = make_videos(tmp_path, 2), Brightness()
    scoring.score(samples, tmp_path, metric)
    write_video(generation.video_path(tmp_path, 1), np.full((3, 16, 16, 3), 200, np.uint8), 8)
    assert scoring.score(samples, tmp_path, metric).scored == 1
    metric.version = 2
    assert scoring.score(samples, tmp_path, metric).scored == 2


def test_a_killed_run_goes_on(tmp_path):
    """It was killed within a line, whose text holds a separator that is no line end."""
    samples, metric = make_videos(tmp_path, 3), Brightness()
    scoring.score(samples[:2], tmp_path, metric)
    path = tmp_path / "scores" / "brightness.jsonl"
    whole = path.read_bytes().replace(b"prompt 0", "prompt\u20280".encode())
    path.write_bytes(whole[:-30])
    tally = scoring.score(samples, tmp_path, metric)
    assert (tally.scored, tally.known) == (2, 1)
    texts = path.read_bytes().decode().split("\n")[:-1]
    assert [json.loads(text)["sample"] for text in texts] == [0, 1, 2]


def test_a_line_that_somebody_broke_is_named(tmp_path):
    samples, metric = make_videos(tmp_path, 2), Brightness()
    scoring.score(samples, tmp_path, metric)
    path = tmp_path / "scores" / "brightness.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"sample": 1', b'"sample" 1'))
    with pytest.raises(ScoreError, match="brightness.jsonl: line 2 cannot be read; delete it"):
        scoring.score(samples, tmp_path, metric)


def test_missing_figures_are_kept_and_asked_for_again_if_wished(tmp_path):
    samples, metric = make_videos(tmp_path, 2), Brightness([None, float("nan")])
    assert scoring.score(samples, tmp_path, metric).missing == 2
    assert [line["values"]["brightness"] for line in lines(tmp_path)] == [None, None]
    assert scoring.score(samples, tmp_path, metric).known == 2
    tally = scoring.score(samples, tmp_path, metric, retry_missing=True)
    assert (tally.scored, tally.missing) == (2, 0)


def test_videos_that_are_not_there_yet(tmp_path):
    samples = make_videos(tmp_path, 2)
    generation.video_path(tmp_path, 0).unlink()
    tally = scoring.score(samples, tmp_path, Brightness())
    assert (tally.scored, tally.absent) == (1, 1)


def test_an_endpoint_that_is_silent_once_does_not_stop_the_run(tmp_path):
    samples = make_videos(tmp_path, 4)
    silent = UnavailableError("http://localhost: no answer")
    tally = scoring.score(samples, tmp_path, Brightness([silent, 1.0, silent, 2.0]))
    assert (tally.scored, tally.unanswered) == (2, 2)
    assert scoring.score(samples, tmp_path, Brightness()).scored == 2


def test_an_endpoint_that_stays_silent_stops_the_run(tmp_path):
    samples = make_videos(tmp_path, 4)
    metric = Brightness([UnavailableError("http://localhost: no answer")] * 9)
    with pytest.raises(UnavailableError, match="no answer"):
        scoring.score(samples, tmp_path, metric)
    assert metric.calls == 3


def test_a_video_that_does_not_suit_is_named(tmp_path):
    samples = make_videos(tmp_path, 1)
    with pytest.raises(ScoreError, match="brightness of .*output_0.mp4: too short"):
        scoring.score(samples, tmp_path, Brightness([ScoreError("too short")]))


def frames_of(count: int) -> np.ndarray:
    return np.full((count, 16, 16, 3), 90, np.uint8)


def generated(samples, folder, make):
    return generation.generate(
        samples, folder, make, size=(16, 16), fps=8, common={"seed": 42, "weights": "hash"}
    )


def test_videos_are_made_once_with_what_they_are_made_of(tmp_path):
    samples, calls = make_videos(tmp_path / "pictures", 3), []

    def make(sample, write):
        calls.append(sample.index)
        write(frames_of(2))
        if len(calls) == 2:
            raise KeyboardInterrupt
        write(frames_of(1))
        return {"fps_paper": 12.5}

    folder = tmp_path / "model"
    folder.mkdir()
    with pytest.raises(KeyboardInterrupt):
        generated(samples, folder, make)
    assert sorted(path.name for path in folder.iterdir()) == ["output_0.json", "output_0.mp4"]
    assert generated(samples, folder, make) == 2 and calls == [0, 1, 1, 2]
    report = json.loads((folder / "output_1.json").read_text())
    assert (report["frames"], report["seed"], report["fps_paper"]) == (3, 42, 12.5)
    assert report["prompt"] == "prompt 1" and report["weights"] == "hash"


def test_a_video_without_its_json_is_made_again(tmp_path):
    samples = make_videos(tmp_path, 1)
    assert not generation.is_finished(tmp_path, 0)

    def make(_, write):
        write(frames_of(2))
        return {}

    assert generated(samples, tmp_path, make) == 1 and generation.is_finished(tmp_path, 0)


def test_videos_made_otherwise_are_not_gone_on_with(tmp_path):
    recipe = {"weights": {"dit": "1"}, "frames": 81, "sizes": (1, 2)}
    generation.check_recipe(tmp_path / "a", recipe)
    generation.check_recipe(tmp_path / "a", recipe)
    with pytest.raises(
        BenchError, match="made with another weights, frames; choose another --name"
    ):
        generation.check_recipe(tmp_path / "a", recipe | {"weights": {}, "frames": 165})
    make_videos(tmp_path / "theirs", 1)
    with pytest.raises(BenchError, match="not made by this command; .* --stage score,table"):
        generation.check_recipe(tmp_path / "theirs", recipe)


def test_frames_a_second():
    chunks = [
        {"frames": 9, "denoise": 0.4, "decode": 0.1},
        {"frames": 12, "denoise": 0.6, "decode": 0.2},
    ]
    assert generation.speeds(chunks) == {"fps_paper": 21, "fps_denoise": 20, "fps_decoded": 15}

"""From a folder of videos to records, a table and a report, without a renderer or a network."""

from __future__ import annotations

import json

import numpy as np
import pytest

from chameleon_jax.config import load_config
from chameleon_jax.curation import intake, pipeline
from chameleon_jax.curation.garment import own_garments, save_picture
from chameleon_jax.curation.report import page
from chameleon_jax.curation.stage import CurationError
from chameleon_jax.data.sources import DirectorySource, RecordSource
from tests.curation.garment_test import GOOD_GARMENT, GOOD_REFERENCE, cloth
from tests.curation.made import GOOD, OnePerson, write_scene


class Model:
    """Answers every question well."""

    model = "always"

    def ask(self, system, text, pictures):
        if "textural" in text:
            answer = GOOD_GARMENT
        elif "unchanged" in text:
            answer = GOOD_REFERENCE
        elif '"type"' in text:
            answer = {"type": "upper"}
        else:
            answer = GOOD
        return json.dumps(answer, ensure_ascii=False)


class Editor:
    """Another garment for each clip; the person changed within the box."""

    model = "paints"

    def edit(self, pictures, text, seed):
        if len(pictures) == 1:
            return cloth(int(pictures[0].astype(int).sum()) % 1000)
        out = pictures[0].copy()
        out[20:40, 16:32] = 255 - out[20:40, 16:32]
        return out


@pytest.fixture
def footage(tmp_path):
    folder = tmp_path / "footage"
    write_scene(folder / "one.mp4", [1, 2])
    write_scene(folder / "deep/two.MP4", [3], frames=30)
    (folder / "broken.mp4").write_bytes(b"\0\0\0\x20ftypisom" + bytes(99))
    (folder / "notes.txt").write_text("no video")
    return folder


def config(**changes):
    found = load_config("configs/curation.py:demo")
    found.unlock()
    found.out.update(size=(32, 24), frames=25, fps=8.0, shard_size=2)
    for name in ("motion", "blur", "technical"):
        for value in found[name].limits:
            found[name].limits[value] = (None, None)
    for name, value in changes.items():
        found.update_from_flattened_dict({name: value})
    return found


def run(footage, out, models=None, made=None, **more):
    if models is None:
        models = pipeline.Models(OnePerson(), vision=Model(), editor=Editor())
    stages = pipeline.Pipeline(made or config(), footage, out, models)
    return pipeline.run(stages, intake.find_videos(footage, "CC0-1.0", "our own"), **more)


def test_records_and_a_table_come_out(footage, tmp_path):
    out = tmp_path / "out"
    result = run(footage, out)
    assert result.records == 3
    assert [clip.rejection is None for clip in result.clips].count(False) == 1  # the broken one
    records = RecordSource(out / "records", "train")
    table = DirectorySource(out / "table")
    assert len(records) == len(table) == 3
    for index in range(3):
        one, other = records.load(index, 25, (32, 24)), table.load(index, 25, (32, 24))
        assert one["captions"]["dynamic"] == GOOD["en_long"][0]
        assert one["captions"]["dynamic"] == other["captions"]["dynamic"]
        for name in ("reference", "garment"):
            assert np.array_equal(one[name], other[name])
        # The table halves the colours; another clip would differ by 60.
        assert np.abs(one["video"].astype(int) - other["video"]).mean() < 8
        said = json.loads(records.raw(index)["spec"])
        assert said["licence"] == "CC0-1.0" and said["source"] == "our own"
        assert said["captions_by"]["model"] == "always" and said["garment"]["editor"] == "paints"
        assert said["reference"]["garment"] != said["clip"]
        assert said["thresholds"]["people"] == [1.0, 1.0]
        assert set(said["versions"]) >= {"shots", "person", "motion", "captions", "reference"}
    text = (out / "table/table.csv").read_text()
    assert text.splitlines()[0] == "video,prompt,width,height,fps,licence,source"


def test_a_tfds_builder_finds_the_records_by_their_name(footage, tmp_path):
    """The lines of docs/data.md."""
    import tensorflow_datasets as tfds

    import chameleon_jax.data.builder  # noqa: F401
    from chameleon_jax.data.sources import SourceError

    out = tmp_path / "out"
    run(footage, out)
    there = tfds.builder_from_directory(out / "records").as_data_source("train")
    made = tfds.builder("curated_garment", data_dir=tmp_path / "tfds", file_format="array_record")
    nowhere = tfds.download.DownloadConfig(manual_dir=footage)
    with pytest.raises(SourceError, match="there is no dataset_info.json in it"):
        made.download_and_prepare(download_config=nowhere)
    where = tfds.download.DownloadConfig(manual_dir=out / "records")
    made.download_and_prepare(download_config=where)
    again = tfds.builder("curated_garment", data_dir=tmp_path / "tfds")
    found = again.as_data_source("train")
    assert len(found) == len(there) == 3
    for index in range(3):
        assert found[index].keys() == there[index].keys()
        assert all(found[index][name] == there[index][name] for name in found[index])
    assert again.info.metadata["fps"] == 8 and again.info.metadata["kind"] == "pixels"
    # What training reads is either of the two.
    source = RecordSource(again.data_path, "train")
    assert source.load(1, 25, (32, 24))["video"].shape == (25, 32, 24, 3)


def test_the_funnel_and_the_report_say_what_became_of_each(footage, tmp_path):
    out = tmp_path / "out"
    strict = config(**{"technical.limits": {"brightness": (None, 0.0)}})
    strict.technical.limits.update(blocks=(None, None), clipped=(None, None))
    result = run(footage, out, made=strict)
    funnel = json.loads((out / "funnel.json").read_text())
    steps = {step["stage"]: step for step in funnel["steps"]}
    assert steps["shots"]["entered"] == 4 and steps["shots"]["left"] == 3
    assert steps["shots"]["reasons"] == {"video cannot be read": 1}
    assert steps["technical"]["reasons"] == {"brightness too high": 3}
    assert steps["captions"]["entered"] == 0 and funnel["kept"] == 0 and result.records == 0
    assert sum(funnel["measured"]["brightness"]["counts"]) == 3
    assert funnel["speed"]["technical"]["clips"] == 3 and "captions" not in funnel["speed"]
    assert funnel["speed"]["shots"]["clips"] == 4  # of three videos
    report = (out / "report.html").read_text()
    assert "technical: brightness too high" in report and "data:image/jpeg" in report
    lines = [json.loads(line) for line in (out / "clips.jsonl").read_text().splitlines()]
    assert len(lines) == 4 and all(line["rejection"] for line in lines)


def test_the_report_escapes_what_comes_from_outside():
    summary = {
        "videos": 1,
        "clips": 1,
        "kept": 1,
        "seconds_kept": 3.0,
        "steps": [],
        "measured": {},
        "speed": {},
        "licences": {"<script>alert(1)</script>": 1},
    }
    text = page(summary, {})
    assert "<script>" not in text and "&lt;script&gt;" in text


class Counting:
    """Counts what a detector is asked."""

    def __init__(self):
        self.asked = 0

    def detect(self, frames):
        self.asked += 1
        return OnePerson().detect(frames)


def test_stages_can_be_added_to_a_finished_run(footage, tmp_path):
    out, detector = tmp_path / "out", Counting()
    result = run(footage, out, pipeline.Models(detector))
    assert result.records is None and result.summary["kept"] == 3 and detector.asked == 3
    result = run(footage, out, pipeline.Models(detector, vision=Model()))
    assert result.records is None and not (out / "records").exists()
    result = run(footage, out, pipeline.Models(detector, vision=Model(), editor=Editor()))
    assert result.records == 3 and detector.asked == 3


def test_more_videos_make_the_set_grow(footage, tmp_path):
    out = tmp_path / "out"
    run(footage, out)
    shard = out / "records/curated_garment-train.array_record-00000"
    before = shard.stat().st_mtime_ns
    first = RecordSource(out / "records", "train").raw(0)["spec"]
    write_scene(footage / "aaa.mp4", [7, 8])  # comes first by its name
    assert run(footage, out).records == 5
    assert shard.stat().st_mtime_ns == before
    assert RecordSource(out / "records", "train").raw(0)["spec"] == first
    assert len(DirectorySource(out / "table")) == 5


def test_an_unreadable_shard_is_made_again(footage, tmp_path, caplog):
    out = tmp_path / "out"
    run(footage, out)
    shard = out / "records/curated_garment-train.array_record-00000"
    good = shard.read_bytes()
    shard.write_bytes(b"no shard" + good[8:100])
    assert run(footage, out).records == 3
    assert shard.read_bytes() == good
    assert f"{shard.name}" in caplog.text and "it is made again" in caplog.text


def test_keep_is_chosen_once(footage, tmp_path):
    for number in range(4):
        write_scene(footage / f"more{number}.mp4", [20 + number])
    out = tmp_path / "out"
    models = pipeline.Models(OnePerson())
    first = run(footage, out, models, keep=0.5)
    chosen = json.loads((out / "thresholds.json").read_text())
    assert set(chosen["chosen"]) == {"flow", "sharpness", "blocks"}
    assert 3 <= first.summary["kept"] <= 4  # of 7
    assert first.summary["chosen"] == chosen["chosen"]
    again = run(footage, out, models, keep=0.5)
    assert again.summary["kept"] == first.summary["kept"]


def test_records_that_are_longer_than_clips(footage, tmp_path):
    with pytest.raises(CurationError, match="81 frames at 8 a second are 10.12 s; clips have at"):
        run(footage, tmp_path / "out", made=config(**{"out.frames": 81}))


def test_an_editor_needs_somebody_who_checks():
    found = config(**{"editor.url": "http://127.0.0.1:1/v1"})
    with pytest.raises(CurationError, match="nobody would check the pictures; set vision.url"):
        pipeline.real_models(found)


@pytest.mark.parametrize(
    ("table", "why"),
    [
        ("video,licence,source\none.mp4,CC0,us\n", "broken.mp4 and 1 more: no licence"),
        ("video,licence\n", "column source is missing"),
        ("video,licence,source\none.mp4,unknown,us\n", "broken.mp4 and 2 more: no licence"),
    ],
)
def test_a_licence_is_required(footage, table, why):
    (footage / "sources.csv").write_text(table)
    with pytest.raises(CurationError, match=why):
        intake.find_videos(footage)


def test_origins_of_a_table_come_before_those_of_flags(footage):
    (footage / "sources.csv").write_text(
        "﻿video, licence, source\ndeep\\two.MP4, CC-BY-4.0, an archive\n", encoding="utf-8"
    )
    videos = {one.video: one for one in intake.find_videos(footage, "own", "us")}
    assert videos["deep/two.MP4"].licence == "CC-BY-4.0" and videos["one.mp4"].licence == "own"
    with pytest.raises(CurationError, match="no source; name it in"):
        intake.find_videos(footage, "own")


def test_a_video_that_is_replaced_is_another_one(footage):
    def ids():
        return {one.video: one.id for one in intake.find_videos(footage, "own", "us")}

    before = ids()
    (footage / "one.mp4").touch()
    assert ids() == before
    write_scene(footage / "one.mp4", [9])
    after = ids()
    assert after["one.mp4"] != before["one.mp4"] and after["broken.mp4"] == before["broken.mp4"]


def test_garments_of_a_folder(tmp_path):
    save_picture(tmp_path, "a.png", cloth(1))
    (tmp_path / "pictures").rename(tmp_path / "upper")
    assert own_garments(tmp_path)[0].file == tmp_path / "upper/a.png"

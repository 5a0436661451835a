"""Records: what the writer makes is what `tensorflow_datasets` reads, however often the writer was
killed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from chameleon_jax import runway
from chameleon_jax.data import images, records, sources, video
from chameleon_jax.data.records import RecordError, RunwayExamples

HERE = Path(__file__).parent
SIZE = (32, 16)


@pytest.fixture
def renderer(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))  # worker processes inherit sys.path
    import fake_renderer

    return fake_renderer


def examples(render) -> RunwayExamples:
    return RunwayExamples(size=SIZE, frames=9, fps=8, render=render)


def contents(folder: Path) -> tuple[dict[str, bytes], list[dict]]:
    """The descriptions, byte for byte, and the records (whose fields protobuf orders differently in
    each process).
    """
    described = {path.name: path.read_bytes() for path in folder.glob("*.json")}
    return described, list(tfds.builder_from_directory(folder).as_data_source("train"))


def test_records_come_back_through_tfds(tmp_path, renderer):
    assert records.prepare_runway(
        tmp_path, 5, examples(renderer.render), workers=0, shard_size=2
    ) == ("train", 5)
    builder = tfds.builder_from_directory(tmp_path)
    assert builder.info.splits["train"].shard_lengths == [2, 2, 1]
    data = builder.as_data_source("train")
    assert "tensorflow" not in sys.modules
    for seed in range(5):
        record, triplet = data[seed], renderer.render(seed, 9, SIZE, 8)
        assert record["seed"] == seed and record["fps"] == 8 and record["frames"] == 9
        assert json.loads(record["captions"]) == triplet.captions and json.loads(
            record["spec"]
        ) == {"seed": seed}
        np.testing.assert_array_equal(
            np.asarray(images.open_image(record["reference"])), triplet.reference
        )
        np.testing.assert_array_equal(
            np.asarray(images.open_image(record["garment"])), triplet.garment
        )
        error = np.abs(video.read_video(record["video"]).astype(int) - triplet.video)
        assert error.mean() < 3


def test_splits_follow_the_seeds(tmp_path, renderer):
    assert [records.split_of(s) for s in (0, 799_999, 800_000, 899_999, 900_000)] == [
        "train",
        "train",
        "validation",
        "validation",
        "test",
    ]
    make = examples(renderer.render)
    records.prepare_runway(tmp_path, 3, make, workers=0)
    assert records.prepare_runway(tmp_path, 2, make, seed_start=800_000, workers=0) == (
        "validation",
        2,
    )
    info = tfds.builder_from_directory(tmp_path).info
    assert {name: split.num_examples for name, split in info.splits.items()} == {
        "train": 3,
        "validation": 2,
    }
    assert tfds.builder_from_directory(tmp_path).as_data_source("validation")[1]["seed"] == 800_001
    with pytest.raises(RecordError, match="several splits"):
        records.prepare_runway(tmp_path, 2, make, seed_start=799_999, workers=0)


def test_clips_are_chosen_by_caption_and_slot_before_they_are_rendered(
    tmp_path, renderer, monkeypatch
):
    make = dataclasses.replace(
        examples(renderer.render), match="sways gently.*camera stands still", slot="top"
    )
    assert records.prepare_runway(tmp_path, 3, make, seed_start=50, workers=0) == ("train", 3)
    seeds = [
        record["seed"] for record in tfds.builder_from_directory(tmp_path).as_data_source("train")
    ]
    wanted = []
    for seed in range(50, max(seeds) + 1):
        spec = runway.sample_spec(seed, frames=9, size=SIZE, fps=8)
        moves = spec.captions()["dynamic"]
        if spec.slot == "top" and "sways gently" in moves and "camera stands still" in moves:
            wanted.append(seed)
    assert seeds == wanted
    with pytest.raises(
        RecordError,
        match=r"made otherwise \(match: sways.* None asked; slot: top there, None asked\)",
    ):
        records.prepare_runway(
            tmp_path, 3, examples(renderer.render), seed_start=800_000, workers=0
        )
    with pytest.raises(RecordError, match="several splits"):
        make.seeds(799_995, 3)
    monkeypatch.setattr(records, "RAREST", 20)
    with pytest.raises(RecordError, match="no clip of seeds 0 to 20 matches 'unicorn'"):
        dataclasses.replace(make, match="unicorn").seeds(0, 3)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [({"match": "("}, "regular expression"), ({"slot": "hat"}, "top, bottom, dress, outer")],
)
def test_impossible_choices_are_refused(chosen, message):
    with pytest.raises(RecordError, match=message):
        RunwayExamples(**chosen)


def test_same_command_continues_and_another_is_refused(tmp_path, renderer):
    make = examples(renderer.render)
    records.prepare_runway(tmp_path, 6, make, workers=0, shard_size=2)
    shards = sorted(tmp_path.glob("*.array_record-*"))
    kept = shards[0].stat().st_mtime_ns
    content = shards[1].read_bytes()
    shards[1].unlink()
    seen = []
    records.prepare_runway(
        tmp_path, 6, make, workers=0, shard_size=2, progress=lambda *args: seen.append(args)
    )
    assert seen == [(4, 4, 6), (5, 4, 6), (6, 4, 6)]
    assert shards[0].stat().st_mtime_ns == kept and shards[1].read_bytes() == content
    with pytest.raises(RecordError, match="frames: 9 there, 5 asked"):
        records.prepare_runway(
            tmp_path, 6, RunwayExamples(SIZE, 5, 8, render=renderer.render), workers=0, shard_size=2
        )
    with pytest.raises(RecordError, match="clips: 6 there, 7 asked"):
        records.prepare_runway(tmp_path, 7, make, workers=0, shard_size=2)
    other = RunwayExamples((16, 16), 9, 8, render=renderer.render)
    with pytest.raises(RecordError, match="height: 32 there, 16 asked"):
        records.prepare_runway(tmp_path, 6, other, seed_start=800_000, workers=0)


def test_workers_write_the_same_records(tmp_path, renderer):
    make = examples(renderer.render)
    for workers, folder in ((0, tmp_path / "a"), (2, tmp_path / "b")):
        records.prepare_runway(folder, 8, make, workers=workers, shard_size=3)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_killed_run_continues_to_the_same_records(tmp_path, renderer):
    program = (
        "import fake_renderer\n"
        "from chameleon_jax.data import records\n"
        "if __name__ == '__main__':\n"
        "    make = records.RunwayExamples(size=(32, 16), frames=9, fps=8,"
        " render=fake_renderer.slow)\n"
        f"    records.prepare_runway({str(tmp_path / 'killed')!r}, 24, make, workers=2,"
        " shard_size=4)\n"
    )
    script = tmp_path / "run.py"
    script.write_text(program)
    paths = os.pathsep.join([str(HERE), str(HERE.parents[1])])
    command, env = [sys.executable, str(script)], os.environ | {"PYTHONPATH": paths}
    process = subprocess.Popen(command, env=env)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("killed/*.array_record-00000-of-00006")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with pytest.raises(sources.SourceError, match="not finished"):
        sources.RecordSource(tmp_path / "killed")
    assert 0 < len(list(tmp_path.glob("killed/*-of-00006"))) < 6
    subprocess.run(command, env=env, check=True, timeout=60)
    records.prepare_runway(
        tmp_path / "whole", 24, examples(renderer.render), workers=0, shard_size=4
    )
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_broken_scenes_are_left_out_and_counted(tmp_path, renderer):
    few, make = tmp_path / "few", examples(renderer.broken)
    seeds = [0, 101, *range(200, 1000, 4)]  # one of 202 fails
    features = records.clip_features()
    assert (
        records.write_records(
            few, "train", seeds, make, features, name="runway_garment", shard_size=100
        )
        == 201
    )
    source = sources.RecordSource(few)
    assert [source.load(i, 1, SIZE)["seed"] for i in range(3)] == [0, 200, 204] and len(
        source
    ) == 201
    for workers in (0, 2):
        many = tmp_path / f"many{workers}"
        with pytest.raises(RecordError, match="records of split train failed, of at most 1% of 8"):
            records.prepare_runway(many, 8, make, workers=workers, shard_size=4)
        with pytest.raises(sources.SourceError, match="not finished"):
            sources.RecordSource(many)
        mended = examples(renderer.render)
        assert records.prepare_runway(many, 8, mended, workers=workers, shard_size=4) == (
            "train",
            8,
        )


def test_a_split_of_several_folders_is_what_those_have_that_have_it(tmp_path, renderer):
    make = examples(renderer.render)
    for folder, first in (("both", 0), ("both", 800_000), ("more", 50)):
        records.prepare_runway(tmp_path / folder, 3, make, seed_start=first, workers=0)
    folders = [tmp_path / "both", tmp_path / "more"]
    train, validation = (sources.open_sources(folders, split) for split in ("train", "validation"))
    assert [train.load(i, 1, SIZE)["seed"] for i in range(6)] == [0, 1, 2, 50, 51, 52]
    assert len(validation) == 3 and validation.load(0, 1, SIZE)["seed"] == 800_000
    with pytest.raises(sources.SourceError, match="no split 'test', there are"):
        sources.open_sources(folders, "test")


def test_a_dead_worker_is_an_error(tmp_path, renderer):
    with pytest.raises(RecordError, match="exit code 7"):
        records.prepare_runway(tmp_path, 8, examples(renderer.deadly), workers=2, shard_size=2)


def test_frames_must_suit_the_vae():
    with pytest.raises(RecordError, match=r"4k \+ 1"):
        RunwayExamples(frames=32)


def test_latents_come_back_exactly(tmp_path, renderer):
    records.prepare_runway(tmp_path / "clips", 5, examples(renderer.render), workers=0)
    source = sources.open_sources(tmp_path / "clips")

    def encode(pixels):  # a stand-in for the VAE: every fourth frame, every eighth pixel
        return pixels[:, ::4, ::8, ::8].astype(np.float32) / 255

    make = records.LatentExamples(source, encode, SIZE, 9, batch=2, fps=8, weights="abc")
    assert records.write_latents(tmp_path / "latents", "train", make, shard_size=3) == 5
    latents = sources.open_sources(tmp_path / "latents")
    assert latents.kind == "latents" and len(latents) == 5
    for index in range(5):
        clip, latent = source.load(index, 9, SIZE), latents.load(index, 9, SIZE)
        assert latent["z_video"].dtype == np.float16
        np.testing.assert_array_equal(
            latent["z_video"], encode(clip["video"][None])[0].astype(np.float16)
        )
        np.testing.assert_array_equal(
            latent["z_reference"], encode(clip["reference"][None, None])[0].astype(np.float16)
        )
        np.testing.assert_array_equal(
            latent["z_garment"], encode(clip["garment"][None, None])[0].astype(np.float16)
        )
        assert latent["captions"] == clip["captions"] and latent["seed"] == index
    assert latents.load(0, 5, SIZE)["z_video"].shape == (2, 4, 2, 3)
    assert latents.load(0, 5, SIZE)["z_reference"].shape == (1, 4, 2, 3)
    other = records.LatentExamples(source, encode, SIZE, 9, batch=2, fps=8, weights="other")
    with pytest.raises(RecordError, match="weights: abc there, other asked"):
        records.write_latents(tmp_path / "latents", "train", other, shard_size=3)


def test_builder_makes_the_official_layout(tmp_path, renderer):
    config = records.RunwayConfig(
        name="tiny",
        version=records.VERSION,
        size=SIZE,
        frames=5,
        fps=8,
        clips=(("train", 3), ("validation", 2)),
        render=renderer.render,
    )
    builder = records.RunwayGarment(config=config, data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    assert builder.as_data_source("validation")[0]["seed"] == 800_000
    source = sources.RecordSource(tmp_path / "runway_garment" / "tiny" / records.VERSION)
    assert len(source) == 3 and source.load(1, 5, SIZE)["video"].shape == (5, *SIZE, 3)
    assert "tensorflow" not in sys.modules

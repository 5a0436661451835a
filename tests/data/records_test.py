"""Records: what the writer makes is what `tensorflow_datasets` reads, however often the writer was
killed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from chameleon_jax import runway
from chameleon_jax.data import builder, images, records, sources, video
from chameleon_jax.data import examples as example_kinds
from chameleon_jax.data.examples import ExampleError, LatentExamples, RunwayExamples
from chameleon_jax.data.loader import DataError, Loader, LoaderConfig
from chameleon_jax.data.records import RecordError
from chameleon_jax.errors import UserError

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


def test_clips_go_to_the_split_of_their_seeds(tmp_path, renderer):
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
    with pytest.raises(ExampleError, match="several splits"):
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
    with pytest.raises(ExampleError, match="several splits"):
        make.seeds(799_995, 3)
    monkeypatch.setattr(example_kinds, "SEEDS_WITHOUT_MATCH", 20)
    with pytest.raises(ExampleError, match="no clip of seeds 0 to 20 matches 'unicorn'"):
        dataclasses.replace(make, match="unicorn").seeds(0, 3)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [({"match": "("}, "regular expression"), ({"slot": "hat"}, "top, bottom, dress, outer")],
)
def test_impossible_choices_are_refused(chosen, message):
    with pytest.raises(UserError, match=message):
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
    with pytest.raises(RecordError, match="first_key: 0 there, 1 asked"):
        records.prepare_runway(tmp_path, 6, make, seed_start=1, workers=0, shard_size=2)
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
        "from chameleon_jax.data import examples, records\n"
        "if __name__ == '__main__':\n"
        "    make = examples.RunwayExamples(size=(32, 16), frames=9, fps=8,"
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
    while not list(tmp_path.glob("killed/*.array_record-00000")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with pytest.raises(sources.SourceError, match="not finished"):
        sources.RecordSource(tmp_path / "killed")
    assert 0 < len(list(tmp_path.glob("killed/*.array_record-?????"))) < 6
    subprocess.run(command, env=env, check=True, timeout=600)
    records.prepare_runway(
        tmp_path / "whole", 24, examples(renderer.render), workers=0, shard_size=4
    )
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_a_set_grows_and_is_readable_all_the_while(tmp_path, renderer):
    make = examples(renderer.render)
    records.prepare_runway(tmp_path, 5, make, workers=0, shard_size=2)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.array_record-*")}
    lengths = []

    def look(done: int, found: int, total: int) -> None:
        lengths.append((done, len(sources.RecordSource(tmp_path))))

    grown = records.prepare_runway(tmp_path, 9, make, workers=0, shard_size=3, progress=look)
    assert grown == ("train", 9)
    assert lengths == [(5, 5), (6, 5), (7, 5), (8, 5), (9, 5)]
    after = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.array_record-*")}
    assert before.items() <= after.items()
    info = tfds.builder_from_directory(tmp_path).info
    assert info.splits["train"].shard_lengths == [2, 2, 1, 3, 1]
    seeds = [
        record["seed"] for record in tfds.builder_from_directory(tmp_path).as_data_source("train")
    ]
    assert seeds == list(range(9))
    with pytest.raises(RecordError) as caught:
        records.prepare_runway(tmp_path, 8, make, workers=0)
    expected = "split train has 9 clips, 8 are asked; ask for at least 9, or choose another folder"
    assert str(caught.value) == f"{tmp_path}: {expected}"
    # The other split knows nothing of it, and both stay readable.
    records.prepare_runway(tmp_path, 2, make, seed_start=800_000, workers=0)
    assert len(sources.RecordSource(tmp_path)) == 9
    assert len(sources.RecordSource(tmp_path, "validation")) == 2


def test_a_run_killed_while_the_set_grows_loses_nothing(tmp_path, renderer):
    program = (
        "import sys, fake_renderer\n"
        "from chameleon_jax.data import examples, records\n"
        "if __name__ == '__main__':\n"
        "    make = examples.RunwayExamples(size=(32, 16), frames=9, fps=8,"
        " render=fake_renderer.slow)\n"
        "    records.prepare_runway(sys.argv[1], 24, make, workers=0, shard_size=4)\n"
    )
    script, out = tmp_path / "run.py", tmp_path / "killed"
    script.write_text(program)
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1])])}
    command = [sys.executable, str(script), str(out)]
    records.prepare_runway(out, 6, examples(renderer.render), workers=0, shard_size=4)
    process = subprocess.Popen(command, env=env)
    deadline = time.monotonic() + 60
    while not (out / "runway_garment-train.array_record-00002").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [sources.RecordSource(out).load(i, 1, SIZE)["seed"] for i in range(6)] == [*range(6)]
    assert len(list(out.glob("*.array_record-?????"))) < 7
    with pytest.raises(RecordError, match="split train has 6 clips, 5 are asked"):
        records.prepare_runway(out, 5, examples(renderer.render), workers=0)
    records.prepare_runway(out, 24, examples(renderer.render), workers=0, shard_size=4)
    whole = tmp_path / "whole"
    records.prepare_runway(whole, 24, examples(renderer.render), workers=0, shard_size=4)
    assert contents(out)[1] == contents(whole)[1]
    assert sorted(path.name for path in out.iterdir() if ".array_record" in path.name) == [
        f"runway_garment-train.array_record-{number:05d}" for number in range(7)
    ]


def test_an_unfinished_set_may_be_finished_with_fewer_clips(tmp_path, renderer):
    make = examples(renderer.render)

    def stop(done: int, found: int, total: int) -> None:
        if done == 11:
            raise KeyboardInterrupt

    def made() -> list[int]:
        return [record["seed"] for record in contents(tmp_path)[1]]

    for finished, asked in ((0, 7), (7, 9), (9, 9)):  # from nothing, and while it grows
        with pytest.raises(KeyboardInterrupt):
            records.prepare_runway(tmp_path, 4000, make, workers=0, shard_size=4, progress=stop)
        if finished:
            assert made() == [*range(finished)]
        records.prepare_runway(tmp_path, asked, make, workers=0, shard_size=4)
        assert made() == [*range(asked)]
    lengths = tfds.builder_from_directory(tmp_path).info.splits["train"].shard_lengths
    assert lengths == [4, 3, 2]
    assert len(list(tmp_path.glob("*.array_record-*"))) == 3


def as_older_versions_wrote_it(folder: Path, split: str) -> None:
    """Give a split's shards and recipe the form that they had before sets could grow."""
    shards = sorted(folder.glob(f"*-{split}.array_record-*"))
    for shard in shards:
        shard.rename(f"{shard}-of-{len(shards):05d}")
    path = folder / f"recipe.{split}.json"
    recipe = json.loads(path.read_text())
    clips = [shard["clips"] for shard in recipe.pop("shards")]
    old = {"clips": sum(clips), "shard_size": clips[0]}
    path.write_text(json.dumps(recipe | old))
    path = folder / "dataset_info.json"
    info = json.loads(path.read_text())
    for described in info["splits"]:
        if described["name"] == split:
            described["filepathTemplate"] = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    path.write_text(json.dumps(info))


def test_a_set_of_an_older_version_is_read_and_grows(tmp_path, renderer):
    make = examples(renderer.render)
    for start in (0, 800_000):
        records.prepare_runway(tmp_path, 5, make, seed_start=start, workers=0, shard_size=2)
    shards = {path.name: path.stat().st_ino for path in tmp_path.glob("*-train.array_record-*")}
    for split in ("train", "validation"):
        as_older_versions_wrote_it(tmp_path, split)
    old = sources.RecordSource(tmp_path)
    assert len(old) == 5 and old.load(4, 1, SIZE)["seed"] == 4
    counts = []

    def look(*numbers: int) -> None:
        counts.append(len(sources.RecordSource(tmp_path)))

    records.prepare_runway(tmp_path, 7, make, workers=0, shard_size=2, progress=look)
    assert set(counts) == {5}
    for split, count in (("train", 7), ("validation", 5)):
        source = sources.RecordSource(tmp_path, split)
        assert [source.load(i, 1, SIZE)["seed"] % 800_000 for i in range(count)] == [*range(count)]
    after = {path.name: path.stat().st_ino for path in tmp_path.glob("*-train.array_record-*")}
    assert shards.items() <= after.items() and not list(tmp_path.glob("*-train*-of-*"))
    assert len(list(tmp_path.glob("*-validation.array_record-*-of-00003"))) == 3


def test_one_writer_at_a_time(tmp_path, renderer):
    make = examples(renderer.render)

    def second(*numbers: int) -> None:
        with pytest.raises(RecordError) as caught:
            records.prepare_runway(tmp_path, 3, make, workers=0)
        refused.append(str(caught.value))

    refused: list[str] = []
    records.prepare_runway(tmp_path, 2, make, workers=0, progress=second)
    line = (
        f"{tmp_path}: another process writes to this folder; wait for it, or choose another folder"
    )
    assert refused == [line] * 3
    records.prepare_runway(tmp_path, 3, make, workers=0)


def test_a_disk_that_is_full_is_one_line_and_leaves_no_part(tmp_path, renderer):
    """A limit on the size of files stands for the disk."""
    program = (
        "import resource, sys, fake_renderer\n"
        "from chameleon_jax.data import examples, records\n"
        "if __name__ == '__main__':\n"
        "    make = examples.RunwayExamples((32, 16), 9, 8, render=fake_renderer.render)\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, -1))\n"
        "    try:\n"
        "        workers = int(sys.argv[2])\n"
        "        records.prepare_runway(sys.argv[1], 4, make, workers=workers, shard_size=2)\n"
        "    except records.RecordError as error:\n"
        "        print(error)\n"
    )
    (tmp_path / "run.py").write_text(program)
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1])])}
    for workers in ("0", "2"):
        out = tmp_path / workers
        command = [sys.executable, str(tmp_path / "run.py"), str(out), workers]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line]
        assert all(line.endswith("the same command continues") for line in lines), lines
        # Of two workers the first that meets the limit ends the run.
        why = r"0000[01]: cannot be written \(write\(\) failed: File too large"
        assert any(re.search(why, line) for line in lines)
        assert len(lines) in ([1] if workers == "0" else [2, 3])  # a worker each, and the run
        assert sorted(path.name for path in out.iterdir()) == [".lock", "recipe.train.json"]
        assert records.prepare_runway(
            out, 4, examples(renderer.render), workers=0, shard_size=2
        ) == ("train", 4)


def test_broken_scenes_are_left_out_and_counted(tmp_path, renderer):
    few, make = tmp_path / "few", examples(renderer.broken)
    seeds = [0, 101, *range(200, 1000, 4)]  # one of 202 fails
    features = example_kinds.clip_features()
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


def test_latents_come_back_exactly(tmp_path, renderer):
    records.prepare_runway(tmp_path / "clips", 5, examples(renderer.render), workers=0)
    source = sources.open_sources(tmp_path / "clips")

    def encode(pixels):  # a stand-in for the VAE: every fourth frame, every eighth pixel
        return pixels[:, ::4, ::8, ::8].astype(np.float32) / 255

    make = LatentExamples(source, encode, SIZE, 9, 4, batch=2, fps=8, weights="abc")
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
    assert latents.frames_per_latent == 4
    assert repr(latents) == (
        f"RecordSource({tmp_path / 'latents'}, train: 5 records of latents,"
        " 9 frames of 32x16 at 8 fps)"
    )
    other = LatentExamples(source, encode, SIZE, 9, 4, batch=2, fps=8, weights="other")
    with pytest.raises(RecordError, match="weights: abc there, other asked"):
        records.write_latents(tmp_path / "latents", "train", other, shard_size=3)
    with pytest.raises(ExampleError, match="is encoded already; expected clips of pixels"):
        LatentExamples(latents, encode, SIZE, 9, 4)


def test_latents_of_a_vae_with_another_factor(tmp_path, renderer):
    records.prepare_runway(tmp_path / "clips", 4, examples(renderer.render), workers=0)
    source = sources.open_sources(tmp_path / "clips")

    def encode(pixels):  # a stand-in for a VAE that halves time
        return pixels[:, ::2, ::8, ::8].astype(np.float32) / 255

    make = LatentExamples(source, encode, SIZE, 9, 2)
    records.write_latents(tmp_path / "latents", "train", make)
    latents = sources.open_sources(tmp_path / "latents")
    assert latents.frames_per_latent == 2 and latents.load(0, 9, SIZE)["z_video"].shape[0] == 5
    assert latents.load(0, 7, SIZE)["z_video"].shape[0] == 4
    with pytest.raises(sources.SourceError, match="takes 2k"):
        latents.load(0, 6, SIZE)
    with pytest.raises(sources.SourceError, match="has 5 latent frames of 6"):
        latents.load(0, 11, SIZE)
    settings = LoaderConfig(batch=2, frames=5, buckets=(SIZE,))
    assert next(iter(Loader(latents, settings)))["z_video"].shape[1] == 3
    with pytest.raises(DataError, match="have 2 frames per latent frame, the VAE of the config"):
        Loader(latents, dataclasses.replace(settings, frames_per_latent=4))
    with pytest.raises(ExampleError, match="9 frames became 5 latent frames; expected 3 with 4"):
        records.write_latents(
            tmp_path / "more", "train", dataclasses.replace(make, frames_per_latent=4)
        )
    with pytest.raises(sources.SourceError, match="8 frames; a VAE with 2"):
        dataclasses.replace(make, frames=8)
    # Sets of older versions do not say it; theirs is 4.
    path = tmp_path / "latents" / "metadata.json"
    metadata = json.loads(path.read_text())
    del metadata["frames_per_latent"]
    path.write_text(json.dumps(metadata))
    older = sources.open_sources(tmp_path / "latents")
    assert older.frames_per_latent == 4
    with pytest.raises(sources.SourceError, match="latents with 2 .* and latents with 4 frames"):
        sources.JoinedSource([latents, older])


def test_latents_grow_with_their_source_and_notice_another(tmp_path, renderer):
    make = examples(renderer.render)
    for name, start, clips in (("one", 0, 3), ("two", 100, 2)):
        records.prepare_runway(tmp_path / name, clips, make, seed_start=start, workers=0)

    def encode(pixels):
        return pixels[:, ::4, ::8, ::8].astype(np.float32) / 255

    def write(out: str, *names: str) -> list[int]:
        source = sources.open_sources([tmp_path / name for name in names])
        kind = LatentExamples(source, encode, SIZE, 9, 4)
        count = records.write_latents(tmp_path / out, "train", kind, shard_size=2)
        latents = sources.open_sources(tmp_path / out)
        return [latents.load(i, 9, SIZE)["seed"] for i in range(count)]

    assert write("latents", "one") == [0, 1, 2]
    assert write("latents", "one", "two") == [0, 1, 2, 100, 101]
    records.prepare_runway(tmp_path / "two", 4, make, seed_start=100, workers=0)
    assert write("latents", "one", "two") == [0, 1, 2, 100, 101, 102, 103]
    records.prepare_runway(tmp_path / "one", 4, make, workers=0)  # what follows has moved
    changed = "latents: clips 3 to 4 are not those that split train was made from; choose"
    with pytest.raises(RecordError, match=changed):
        write("latents", "one", "two")
    with pytest.raises(RecordError, match="clips 0 to 1 are not those"):
        write("latents", "two", "two")
    assert write("others", "one", "two") == [0, 1, 2, 3, 100, 101, 102, 103]


def test_builder_makes_the_official_layout(tmp_path, renderer):
    config = builder.RunwayConfig(
        name="tiny",
        version=records.VERSION,
        size=SIZE,
        frames=5,
        fps=8,
        clips=(("train", 3), ("validation", 2)),
        render=renderer.render,
    )
    made = builder.RunwayGarment(config=config, data_dir=tmp_path, file_format="array_record")
    made.download_and_prepare()
    assert made.as_data_source("validation")[0]["seed"] == 800_000
    source = sources.RecordSource(tmp_path / "runway_garment" / "tiny" / records.VERSION)
    assert len(source) == 3 and source.load(1, 5, SIZE)["video"].shape == (5, *SIZE, 3)
    assert "tensorflow" not in sys.modules

"""The loader: same seed, same batches, on any number of processes, before and after a kill."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from chameleon_jax.data import loader as loader_lib
from chameleon_jax.data import records, sources
from chameleon_jax.data.examples import LatentExamples, RunwayExamples, latent_features
from chameleon_jax.data.loader import BatchPlan, DataError, Loader, LoaderConfig

HERE = Path(__file__).parent
SIZE = (32, 16)


class NumberSource:
    """Record i is a clip of the number i; `broken` ones raise."""

    kind = "pixels"
    frames_per_latent = None

    def __init__(self, sizes, broken=()):
        self.sizes, self.broken = np.asarray(sizes), set(broken)

    def __len__(self):
        return len(self.sizes)

    def captions(self, index):
        return {"static": f"static {index}", "dynamic": f"dynamic {index}"}

    def load(self, index, frames, size, start=0.0):
        if index in self.broken:
            raise sources.SourceError(f"record {index} is damaged")
        full = np.full((frames, *size, 3), index % 256, np.uint8)
        return {
            "video": full,
            "reference": full[0],
            "garment": full[0],
            "captions": self.captions(index),
            "fps": 16,
            "seed": index,
        }


def config(**changes) -> LoaderConfig:
    return LoaderConfig(**{"batch": 4, "frames": 5, "buckets": (SIZE,), "seed": 3} | changes)


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def take(batches, count):
    return [next(batches) for _ in range(count)]


def test_shapes_and_contents():
    batch = next(iter(Loader(NumberSource([SIZE] * 10), config())))
    assert batch["video"].shape == (4, 5, *SIZE, 3) and batch["video"].dtype == np.uint8
    assert batch["reference"].shape == batch["garment"].shape == (4, *SIZE, 3)
    np.testing.assert_array_equal(batch["video"][:, 2, 3, 4, 1], batch["index"])
    assert all(p == "" or str(i) in p for p, i in zip(batch["prompt"], batch["index"], strict=True))
    assert set(batch) == {"video", "reference", "garment", "prompt", "index", "fps"}


def test_an_epoch_sees_every_record_once_and_epochs_differ():
    plan = BatchPlan(np.array([SIZE] * 10), (SIZE,), 4, seed=0)
    assert plan.batches_per_epoch == 2
    epochs = [np.concatenate([plan(step)[1] for step in (2 * e, 2 * e + 1)]) for e in range(6)]
    assert all(len(set(epoch)) == 8 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert set(np.concatenate(epochs)) == set(range(10))


def test_seed_decides_everything():
    source = NumberSource([SIZE] * 20)
    first, again, other = (take(iter(Loader(source, config(seed=s))), 7) for s in (3, 3, 4))
    assert all(map(same, first, again))
    assert not any(map(same, first, other))


def test_read_ahead_changes_nothing():
    source = NumberSource([SIZE] * 20)
    plain = take(iter(Loader(source, config(threads=1, prefetch=1))), 6)
    assert all(map(same, plain, take(iter(Loader(source, config(threads=4, prefetch=8))), 6)))


def test_batches_have_one_bucket_and_incomplete_ones_are_dropped():
    buckets = ((32, 16), (16, 32), (24, 24))
    sizes = [(320, 160)] * 9 + [(160, 330)] * 6 + [(100, 105)] * 3
    source = NumberSource(sizes)
    assert list(loader_lib.nearest_bucket(source.sizes, buckets)) == [0] * 9 + [1] * 6 + [2] * 3
    loader = Loader(source, config(buckets=buckets))
    assert loader.plan.batches_per_epoch == 3  # two, one and none
    batches = take(iter(loader), 30)
    for batch in batches:
        size = batch["video"].shape[2:4]
        assert {
            tuple(buckets[loader_lib.nearest_bucket(source.sizes[[i]], buckets)[0]])
            for i in batch["index"]
        } == {size}
    assert {batch["video"].shape[2:4] for batch in batches} == {(32, 16), (16, 32)}


def test_of_two_buckets_of_one_shape_the_nearer_in_size_is_taken():
    sizes = np.array([(32, 16), (60, 30), (640, 300), (16, 30)])
    buckets = ((32, 16), (64, 32), (16, 32))
    assert loader_lib.nearest_bucket(sizes, buckets).tolist() == [0, 1, 1, 2]
    assert loader_lib.equal_bucket(sizes, buckets).tolist() == [0, -1, -1, -1]


def latents_of(size, tmp_path, name, clips=8):
    """A set of latents of clips of `size`; the one of clip i holds i / 100."""
    clips = NumberSource([size] * clips)

    def encode(pixels):
        return pixels[:, ::4, ::8, ::8] / np.float32(100)

    records.write_latents(
        tmp_path / name, "train", LatentExamples(clips, encode, size, 9, 4, batch=4)
    )
    return tmp_path / name


def test_sets_of_latents_of_several_sizes_are_joined(tmp_path):
    folders = [latents_of(size, tmp_path, f"{size[0]}") for size in ((32, 16), (16, 32))]
    source = sources.open_sources(folders)
    buckets = ((32, 16), (16, 32))
    batches = take(iter(Loader(source, config(buckets=buckets))), 8)
    shapes = {batch["z_video"].shape[2:4] for batch in batches}
    assert shapes == {(4, 2), (2, 4)}
    for batch in batches:
        np.testing.assert_allclose(
            batch["z_video"][:, 1, 1, 1, 2], batch["index"] % 8 / 100, rtol=1e-3
        )
    with pytest.raises(
        DataError,
        match=r"8 of 16 latents are of 16x32 pixels, which no bucket has \(they are 32x16\): add",
    ):
        Loader(source, config())
    only = take(iter(Loader(source, config(leave_others=True))), 4)
    assert {batch["z_video"].shape[2:4] for batch in only} == {(4, 2)}
    with pytest.raises(DataError, match="no bucket has the 4 records of one batch"):
        Loader(source, config(buckets=((64, 32),), leave_others=True))


def test_a_bucket_that_is_never_full_is_said(caplog):
    BatchPlan(np.array([SIZE] * 10 + [(16, 32)] * 3), (SIZE, (16, 32)), 4, seed=0)
    assert "bucket 16x32 has 3 records, fewer than a batch of 4" in caplog.text


def test_processes_share_a_batch():
    buckets = ((32, 16), (16, 32))
    source = NumberSource([(32, 16)] * 20 + [(16, 32)] * 20)
    whole = take(iter(Loader(source, config(buckets=buckets))), 8)
    parts = [
        take(iter(Loader(source, config(buckets=buckets), process_index=p, process_count=2)), 8)
        for p in range(2)
    ]
    for step in range(8):
        assert parts[0][step]["video"].shape == parts[1][step]["video"].shape
        joined = {k: np.concatenate([parts[0][step][k], parts[1][step][k]]) for k in whole[step]}
        assert same(joined, whole[step])
    with pytest.raises(DataError, match="does not divide"):
        Loader(source, config(), process_count=3)


def test_saved_state_goes_on_with_the_same_bits():
    source = NumberSource([SIZE] * 300, broken=[5])
    batches = iter(Loader(source, config()))
    take(batches, 5)
    state = json.loads(json.dumps(batches.get_state()))
    expected = take(batches, 80)
    fresh = iter(Loader(source, config()))
    fresh.set_state(state)
    assert all(map(same, take(fresh, 80), expected))
    assert fresh.get_state() == batches.get_state()
    batches.set_state(state)  # and back, in a running one
    assert all(map(same, take(batches, 80), expected))


def test_state_survives_a_killed_process(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))
    import fake_renderer

    make = RunwayExamples(size=SIZE, frames=9, fps=8, render=fake_renderer.render)
    records.prepare_runway(tmp_path / "clips", 12, make, workers=0)
    program = (
        "import hashlib, json, os, sys\n"
        "from chameleon_jax.data import loader, sources\n"
        "folder, state, count = sys.argv[1], sys.argv[2], int(sys.argv[3])\n"
        "cfg = loader.LoaderConfig(batch=4, frames=5, buckets=((32, 16),), seed=3)\n"
        "batches = iter(loader.Loader(sources.open_sources(folder + '/clips'), cfg))\n"
        "if os.path.exists(state): batches.set_state(json.load(open(state)))\n"
        "for _ in range(count):\n"
        "    batch = next(batches)\n"
        "    digest = hashlib.sha256(batch['video'].tobytes() + batch['garment'].tobytes())\n"
        "    print(digest.hexdigest(), batch['prompt'], flush=True)\n"
        "json.dump(batches.get_state(), open(state, 'w'))\n"
        "os.kill(os.getpid(), 9)\n"
    )

    def run(state: str, count: int) -> list[str]:
        command = [sys.executable, "-c", program, str(tmp_path), str(tmp_path / state), str(count)]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=600, cwd=HERE.parents[1]
        )
        assert done.returncode == -9, done.stderr
        return done.stdout.splitlines()

    unbroken = run("one", 9)
    assert len(set(unbroken)) == 9
    assert run("two", 4) + run("two", 5) == unbroken


def test_broken_records_are_replaced_the_same_way_every_time():
    source = NumberSource([SIZE] * 400, broken=[17, 230])
    first, again = iter(Loader(source, config(threads=1))), iter(Loader(source, config(threads=3)))
    a, b = take(first, 100), take(again, 100)
    assert all(map(same, a, b))
    assert set(first.broken) == {17, 230} == set(again.broken)
    assert not {17, 230} & set(np.concatenate([batch["index"] for batch in a]).tolist())
    clean = take(iter(Loader(NumberSource([SIZE] * 400), config())), 100)
    assert sum(not same(x, y) for x, y in zip(a, clean, strict=True)) == 2


def test_run_stops_above_one_percent():
    fine = iter(Loader(NumberSource([SIZE] * 400, broken=range(4)), config()))
    take(fine, 100)
    assert len(fine.broken) == 4
    batches = iter(Loader(NumberSource([SIZE] * 400, broken=range(5)), config()))
    with pytest.raises(DataError, match="5 of 400 records are broken, more than 1%"):
        take(batches, 100)
    with pytest.raises(DataError, match="in a row"):
        next(iter(Loader(NumberSource([SIZE] * 8, broken=range(8)), config())))


def test_random_start_takes_other_frames(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))
    import fake_renderer

    make = RunwayExamples(size=SIZE, frames=9, fps=8, crf=0, render=fake_renderer.render)
    records.prepare_runway(tmp_path, 4, make, workers=0)
    source = sources.open_sources(tmp_path)
    whole = [source.load(i, 9, SIZE)["video"] for i in range(4)]
    seen = set()
    for batch in take(iter(Loader(source, config(random_start=True))), 12):
        for index, clip in zip(batch["index"], batch["video"], strict=True):
            starts = [s for s in range(5) if np.array_equal(whole[index][s : s + 5], clip)]
            assert starts
            seen |= set(starts)
    assert seen == {0, 1, 2, 3, 4}


def test_captions_and_dropout():
    source = NumberSource([SIZE] * 400)
    prompts = [
        p for batch in take(iter(Loader(source, config(frames=1))), 300) for p in batch["prompt"]
    ]
    assert abs(prompts.count("") / len(prompts) - 0.1) < 0.03
    texts = [p for p in prompts if p]
    assert abs(sum("static" not in p for p in texts) / len(texts) - 0.7) < 0.05
    full = next(iter(Loader(source, config(captions="full", dropout=0))))
    assert full["prompt"] == [f"dynamic {i} static {i}" for i in full["index"]]


def test_records_and_latents_give_the_same_order(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))
    import fake_renderer

    make = RunwayExamples(size=SIZE, frames=9, fps=8, render=fake_renderer.render)
    records.prepare_runway(tmp_path / "clips", 10, make, workers=0, shard_size=4)
    clips = sources.open_sources(tmp_path / "clips")
    encode = LatentExamples(
        clips, lambda x: x[:, ::4, ::8, ::8] / np.float32(255), SIZE, 9, 4, batch=4
    )
    records.write_latents(tmp_path / "latents", "train", encode)
    pixels = next(iter(Loader(clips, config())))
    latents = next(iter(Loader(sources.open_sources(tmp_path / "latents"), config())))
    assert latents["z_video"].shape == (4, 2, 4, 2, 3) and latents["z_video"].dtype == np.float16
    assert latents["z_reference"].shape == latents["z_garment"].shape == (4, 1, 4, 2, 3)
    with pytest.raises(DataError, match="random_start needs pixels"):
        Loader(sources.open_sources(tmp_path / "latents"), config(random_start=True))
    assert list(pixels["index"]) == list(latents["index"]) and pixels["prompt"] == latents["prompt"]
    expected = (pixels["video"][:, ::4, ::8, ::8] / np.float32(255)).astype(np.float16)
    np.testing.assert_array_equal(latents["z_video"], expected)


class OddLatents:
    """Records of latents; that of key 3 holds what no number is. See `examples.Examples`."""

    def __call__(self, keys):
        for key in keys:
            z = np.full((2, 4, 2, 3), np.nan if key == 3 else key / 100, np.float16)
            texts = json.dumps({"static": "A room.", "dynamic": "Walks."})
            pictures = {"z_reference": z[:1], "z_garment": np.zeros_like(z[:1])}
            yield key, {"z_video": z, **pictures, "captions": texts, "seed": key, "fps": 16}

    def metadata(self):
        size = {"height": 32, "width": 16, "frames": 5, "fps": 16}
        return {"kind": "latents", "frames_per_latent": 4} | size

    def recipe(self):
        return self.metadata()

    def digest(self, keys):
        return str(list(keys))


def test_latents_that_are_not_finite_are_a_broken_record(tmp_path):
    features = latent_features((2, 4, 2, 3))
    records.write_records(
        tmp_path, "train", range(100), OddLatents(), features, name="runway_latents"
    )
    batches = iter(Loader(sources.open_sources(tmp_path), config()))
    taken = take(batches, 30)
    assert all(np.isfinite(batch["z_video"]).all() for batch in taken)
    assert list(batches.broken) == [3] and "latents that are not finite" in batches.broken[3]


def test_an_encoder_that_makes_no_numbers_makes_no_records():
    def encode(pixels):
        z = pixels[:, ::4, ::8, ::8].astype(np.float32)
        return np.where(z == 2, 1e6, z)  # more than float16 holds

    make = LatentExamples(NumberSource([SIZE] * 4), encode, SIZE, 5, 4, batch=2)
    assert [record is None for _, record in make(range(4))] == [False, False, True, False]


def test_worker_process_gives_the_same_batches(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))
    import fake_renderer

    make = RunwayExamples(size=SIZE, frames=5, fps=8, render=fake_renderer.render)
    records.prepare_runway(tmp_path, 10, make, workers=0)
    source = sources.open_sources(tmp_path)
    here = take(iter(Loader(source, config())), 3)
    assert all(map(same, here, take(iter(Loader(source, config(workers=1))), 3)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 0}, "batch is 0; expected at least 1"),
        ({"frames": -3}, "frames is -3"),
        ({"threads": 0}, "threads is 0"),
        ({"workers": -1}, "workers is -1; expected at least 0"),
        ({"seed": -1}, "seed is -1"),
        ({"dropout": 1.5}, "dropout is 1.5; expected a share from 0 to 1"),
        ({"dropout": float("nan")}, "dropout is nan"),
        ({"buckets": ()}, "buckets are"),
        ({"buckets": ((0, 16),)}, "buckets are"),
        ({"captions": "all"}, "mixed, full, dynamic"),
    ],
)
def test_impossible_settings_are_one_line(change, message):
    with pytest.raises(DataError, match=message):
        config(**change)


def test_too_few_records_and_odd_frames():
    with pytest.raises(DataError, match="no bucket has the 4 records"):
        Loader(NumberSource([SIZE] * 3), config())
    with pytest.raises(ValueError, match=r"6 frames; a VAE with 4 .* takes 4k \+ 1: 1, 5, 9"):
        Loader(NumberSource([SIZE] * 8), config(frames=6, frames_per_latent=4))
    with pytest.raises(ValueError, match=r"takes 8k \+ 1: 1, 9, 17"):
        Loader(NumberSource([SIZE] * 8), config(frames=5, frames_per_latent=8))
    batch = next(iter(Loader(NumberSource([SIZE] * 8), config(frames=6))))  # no VAE is named
    assert batch["video"].shape[1] == 6

"""Shards: damaged bytes cost the records that they lie in, and a lost shard its own records."""

from __future__ import annotations

import logging
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from chameleon_jax.data import records, sources
from chameleon_jax.data.examples import RunwayExamples
from chameleon_jax.data.loader import Loader, LoaderConfig
from chameleon_jax.data.shards import ShardError, Shards, array_record, count_records

SIZE = (32, 16)
RECORD = 20_000  # bytes
HERE = Path(__file__).parent


def write_shard(path: Path, seed: int, count: int) -> list[bytes]:
    contents = [np.random.default_rng([seed, i]).bytes(RECORD) for i in range(count)]
    writer = array_record().ArrayRecordWriter(str(path), "group_size:1")
    for content in contents:
        writer.write(content)
    writer.close()
    return contents


def test_records_of_several_shards_in_any_order(tmp_path):
    contents = write_shard(tmp_path / "a", 0, 5) + write_shard(tmp_path / "b", 1, 3)
    shards = Shards([tmp_path / "a", tmp_path / "b"], [5, 3])
    assert len(shards) == 8 and not shards.unreadable and count_records(tmp_path / "b") == 3
    again = pickle.loads(pickle.dumps(shards))
    for index in (7, 0, 4, 5, 5):
        assert shards[index] == again[index] == contents[index]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(shards.__getitem__, [*range(8)] * 20)) == contents * 20
    for index in (-1, 8):
        with pytest.raises(IndexError):
            shards[index]


@pytest.mark.parametrize("run", [1, 100, 3 * RECORD])
def test_damaged_bytes_cost_the_records_they_lie_in(tmp_path, run):
    contents = write_shard(tmp_path / "whole", 0, 30)
    whole = (tmp_path / "whole").read_bytes()
    rng, lost_before = np.random.default_rng(run), set()
    for start in rng.integers(100, 29 * RECORD - run, 12):
        damaged = bytearray(whole)
        damaged[start : start + run] = bytes(255 - byte for byte in damaged[start : start + run])
        (tmp_path / "damaged").write_bytes(damaged)
        shards, lost = Shards([tmp_path / "damaged"], [30]), []
        for index in [*range(30), *reversed(range(30))]:  # a fault spoils no later reading
            try:
                assert shards[index] == contents[index]
            except ShardError as error:
                assert str(error).startswith(f"{tmp_path / 'damaged'}: record {index} is damaged")
                assert str(error).isprintable()
                lost.append(index)
        assert len(lost) % 2 == 0 and len(set(lost)) == len(lost) // 2
        assert len(set(lost)) <= run // RECORD + 2
        assert all(abs(index - start // RECORD) <= run // RECORD + 1 for index in lost)
        lost_before |= set(lost)
    assert len(lost_before) > 5


@pytest.mark.parametrize("harm", ["missing", "empty", "short", "index", "fewer", "folder"])
def test_a_shard_that_cannot_be_opened_costs_its_own_records(tmp_path, harm):
    paths = [tmp_path / name for name in "abc"]
    contents = [write_shard(path, seed, 3) for seed, path in enumerate(paths)]
    whole = paths[1].read_bytes()
    paths[1].unlink()
    expected = "its index is damaged"
    if harm == "missing":
        expected = "no such file"
    elif harm == "folder":
        paths[1].mkdir()
        expected = "no such file"
    elif harm == "fewer":
        write_shard(paths[1], 1, 2)
        expected = "holds 2 records instead of 3"
    else:
        last = len(whole) - 65536  # the last block begins with what leads to the index
        other = bytes(255 - byte for byte in whole[last : last + 200])
        damaged = {
            "empty": b"",
            "short": whole[: len(whole) // 2],
            "index": whole[:last] + other + whole[last + 200 :],
        }
        paths[1].write_bytes(damaged[harm])
    shards = Shards(paths, [3, 3, 3])
    assert list(shards.unreadable) == [paths[1]] and shards.lost == 3
    assert [shards[i] for i in (0, 2, 6, 8)] == [
        contents[0][0],
        contents[0][2],
        contents[2][0],
        contents[2][2],
    ]
    for index in (3, 5):
        with pytest.raises(ShardError, match=f"^{paths[1]}: {expected}"):
            shards[index]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """120 clips, one a shard."""
    monkeypatch.syspath_prepend(str(HERE))
    import fake_renderer

    make = RunwayExamples(size=SIZE, frames=1, fps=8, render=fake_renderer.render)
    records.prepare_runway(tmp_path / "clips", 120, make, workers=0, shard_size=1)
    return tmp_path / "clips"


def test_training_goes_on_without_a_lost_shard_and_stops_above_one_percent(folder, caplog):
    shards = sorted(folder.glob("*.array_record-*"))
    shards[7].write_bytes(shards[7].read_bytes()[:1000])
    caplog.set_level(logging.WARNING)
    source = sources.open_sources(folder)
    assert len(source) == 120
    assert f"1 of 120 records are lost: {shards[7]}: its index is damaged" in caplog.text
    batches = iter(Loader(source, LoaderConfig(batch=4, frames=1, buckets=(SIZE,))))
    seen = {int(index) for _ in range(40) for index in next(batches)["index"]}
    assert list(batches.broken) == [7] and str(shards[7]) in batches.broken[7]
    assert seen >= set(range(120)) - {7} and 7 not in seen
    chosen = sources.MatchingSource(source, "garment 11[0-9]")
    assert len(chosen) == 11  # the lost one might match; it stays for the loader to count
    shards[9].unlink()
    with pytest.raises(sources.SourceError) as caught:
        sources.open_sources(folder)
    message = str(caught.value)
    assert message.startswith(f"2 of 120 records are lost: {shards[7]}: its index is damaged")
    assert "and 1 more shard(s); the command that made the set makes what is missing" in message


def test_the_same_command_makes_lost_shards_again(folder, monkeypatch, caplog):
    import fake_renderer

    whole = sources.open_sources(folder).load(9, 1, SIZE)
    shards = sorted(folder.glob("*.array_record-*"))
    shards[7].write_bytes(shards[7].read_bytes()[:1000])
    shards[9].unlink()
    make = RunwayExamples(size=SIZE, frames=1, fps=8, render=fake_renderer.render)
    done = []
    records.prepare_runway(
        folder, 120, make, workers=0, shard_size=1, progress=lambda *x: done.append(x)
    )
    assert done == [(118, 118, 120), (119, 118, 120), (120, 118, 120)]
    assert f"{shards[7]}: its index is damaged" in caplog.text
    again = sources.open_sources(folder).load(9, 1, SIZE)
    np.testing.assert_array_equal(again["video"], whole["video"])

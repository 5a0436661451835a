"""Snapshots: a stream goes on in another session, or another process, bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from chameleon_jax.inference import Session, Snapshot, SnapshotError, SwitchConfig
from chameleon_jax.inference.snapshots import identity
from tests.inference.streams import (
    COAT,
    DRESS,
    LATENT,
    OVERRIDES,
    PERSON,
    RANDOM,
    ROOT,
    SHIRT,
    chunks,
    make_pipeline,
    same,
    started,
)


def test_a_restored_stream_is_compiled_before_its_first_chunk(pipeline):
    snapshot, other = started(pipeline).snapshot(), make_pipeline()
    Session(other).restore(snapshot)
    assert other.compile() == {}


def test_snapshot_and_restore_give_the_same_bits(pipeline, tmp_path):
    session = started(pipeline)
    chunks(session, 2)
    session.switch_garment(SHIRT)
    chunks(session, 2)
    session.switch_garment(COAT)  # still waiting when the snapshot is taken
    session.switch_prompt("he jumps")
    value = session.snapshot()
    value.save(tmp_path / "session.safetensors")
    rest = chunks(session, 3)
    assert [p.name for p in tmp_path.iterdir()] == ["session.safetensors"]
    for snapshot in (value, Snapshot.load(tmp_path / "session.safetensors")):
        other = Session(
            pipeline, SwitchConfig.parse("refresh")
        )  # the snapshot's mechanisms replace these
        other.restore(snapshot)
        assert same(rest, chunks(other, 3))
        assert other.switches == session.switches and other.frames == session.frames
    session.restore(value)  # and back in time in the same session
    assert same(rest, chunks(session, 3))


@pytest.mark.parametrize("mechanisms", [LATENT, RANDOM])
def test_snapshot_and_rewind_with_other_references(pipeline, tmp_path, mechanisms):
    """What becomes the reference comes back with the stream: from a file, and by going back."""
    plain, ahead = started(pipeline, mechanisms), Session(pipeline, mechanisms, keep=3)
    ahead.start(PERSON, DRESS, "she walks", 0)
    shown = chunks(plain, 3)
    assert same(shown, chunks(ahead, 3))
    frames = ahead.frames
    chunks(ahead, 3)
    assert ahead.rewind(frames) == frames
    ahead.snapshot().save(tmp_path / "ahead.safetensors")
    again = Session(pipeline)
    again.restore(Snapshot.load(tmp_path / "ahead.safetensors"))
    assert again.mechanisms == mechanisms
    for name in ("last_chunk", "random_frame"):
        of_plain, of_again = (getattr(one._state, name) for one in (plain, again))
        assert (of_plain is None) == (of_again is None)
        assert of_plain is None or np.array_equal(of_plain, of_again)
    every = (plain, ahead, again)
    for garment in (SHIRT, COAT):
        for session in every:
            session.switch_garment(garment)
        expected, *others = (chunks(session, 3) for session in every)
        assert all(same(expected, other) for other in others)
    assert plain.switches == ahead.switches == again.switches


def test_a_snapshot_without_the_latent_that_it_promises_is_refused(pipeline):
    session = started(pipeline, LATENT)
    chunks(session, 1)
    value = session.snapshot()
    del value.arrays["last_chunk"]
    with pytest.raises(SnapshotError, match="last_chunk"):
        session.restore(value)


@pytest.mark.parametrize("before", [0, 1])
def test_snapshot_at_the_very_start(pipeline, before):
    session = started(pipeline)
    chunks(session, before)
    other = Session(pipeline)
    other.restore(session.snapshot())
    assert same(chunks(session, 2), chunks(other, 2))


CONTINUE = """
import sys, jax, numpy as np
jax.config.update("jax_default_matmul_precision", "highest")
from chameleon_jax.config import load_config
from chameleon_jax.inference import Pipeline, Session, Snapshot
config, snapshot, out, *overrides = sys.argv[1:]
session = Session(Pipeline.random(load_config(config, overrides), seed=3))
session.restore(Snapshot.load(snapshot))
np.savez(out, *[session.next_chunk() for _ in range(2)])
"""


def test_snapshot_continues_in_a_new_process(pipeline, tmp_path):
    session = started(pipeline)
    chunks(session, 2)
    session.switch_garment(SHIRT)
    session.snapshot().save(tmp_path / "s.safetensors")
    rest = chunks(session, 2)
    command = [
        sys.executable,
        "-c",
        CONTINUE,
        f"{ROOT}/configs/runway_tiny.py:smoke",
        tmp_path / "s.safetensors",
        tmp_path / "frames.npz",
        *OVERRIDES,
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": jax.default_backend()}
    subprocess.run(list(map(str, command)), check=True, cwd=tmp_path, env=environment)
    with np.load(tmp_path / "frames.npz") as file:
        assert same(rest, [file[name] for name in file.files])


def test_what_a_config_leaves_unsaid_of_the_sampler_is_no_other_config(pipeline):
    short = pipeline.config.copy_and_resolve_references().unlock()
    del short.sampler.first, short.sampler.guidance
    assert identity(short) == identity(pipeline.config)
    short.sampler.first = 6
    assert identity(short) != identity(pipeline.config)


def test_snapshot_of_another_config_is_refused(pipeline):
    snapshot = started(pipeline).snapshot()
    other = Session(make_pipeline("sampler.steps=3"))
    with pytest.raises(SnapshotError, match=r"sampler\.steps"):
        other.restore(snapshot)


def test_damaged_snapshots_are_refused(pipeline, tmp_path):
    session = started(pipeline)
    good = tmp_path / "good.safetensors"
    session.snapshot().save(good)
    data = good.read_bytes()
    for name, content in {
        "cut": data[: len(data) // 2],
        "empty": b"",
        "text": b"hello, this is not it",
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(SnapshotError, match=name):
            Snapshot.load(tmp_path / name)
    with pytest.raises(SnapshotError, match="no such file"):
        Snapshot.load(tmp_path / "absent")
    value = Snapshot.load(good)
    del value.arrays["cache.k.0"]
    with pytest.raises(SnapshotError, match=r"cache\.k\.0"):
        session.restore(value)

"""Sessions: bits, switches, mechanisms, snapshots. A random model of a few thousand parameters,
64x48 pixels.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from chameleon_jax.attention.positions import PositionError
from chameleon_jax.config import load_config
from chameleon_jax.data.images import ImageError
from chameleon_jax.diffusion.rollout import make_sampler
from chameleon_jax.inference import (
    Pipeline,
    Session,
    SessionError,
    Snapshot,
    SnapshotError,
    SwitchConfig,
    SwitchError,
)
from chameleon_jax.inference.pipeline import PipelineError
from chameleon_jax.inference.programs import REWIND
from chameleon_jax.inference.snapshots import identity

ROOT = Path(__file__).parents[2]
OVERRIDES = [
    "video.height=64",
    "video.width=48",
    "sampler.steps=2",
    "cache.frames=23",
    "cache.sink=3",
]
ALL_BUT_DROP = SwitchConfig(drop_repeated_frame=False)
LATENT = SwitchConfig(disentangle=False, last_latent=True)
RANDOM = SwitchConfig(disentangle=False, random_frame=True)
FULL, ANCHOR = SwitchConfig(), SwitchConfig(anchor=True)


def make_pipeline(*overrides):
    return Pipeline.random(
        load_config(f"{ROOT}/configs/runway_tiny.py:smoke", [*OVERRIDES, *overrides]), seed=3
    )


@pytest.fixture(scope="module")
def pipeline():
    return make_pipeline()


def picture(seed, size=(70, 50)):
    """Smooth random colours, so that resizing keeps most of it."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 4, 3), np.uint8)
    return np.asarray(small.repeat(size[0] // 5, 0).repeat(size[1] // 4, 1))


PERSON, DRESS, SHIRT, COAT = (picture(seed) for seed in range(4))


def started(pipeline, mechanisms=None, seed=0, garment=DRESS, prompt="she walks", keep=0):
    session = Session(pipeline, mechanisms, keep=keep)
    session.start(PERSON, garment, prompt, seed)
    return session


def chunks(session, count):
    return [session.next_chunk() for _ in range(count)]


def in_parts(session, count):
    """The same from the programs of chunks that can be called off; they round in their own way."""
    return [session.next_chunk(lambda: False) for _ in range(count)]


def same(a, b):
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def switch_now(session, garment):
    """What next_chunk does before it makes a chunk."""
    session.switch_garment(garment)
    pending, session._pending = session._pending, {}
    session._apply(session._state, {kind: content for kind, (_, content) in pending.items()})


def cache_arrays(session):
    return [np.array(x) for x in (*session._state.cache.k, *session._state.cache.v)]


def context_slots(session):
    """Keys of the two condition frames, per layer."""
    tokens = session._state.cache.k[0].shape[1] // session.pipeline.config.cache.frames
    return [np.array(k[:, : 2 * tokens]) for k in session._state.cache.k]


def test_chunks_are_uint8_frames_of_9_then_12(pipeline):
    frames = chunks(started(pipeline), 4)
    assert [len(x) for x in frames] == [9, 12, 12, 12]
    assert all(x.dtype == np.uint8 and x.shape[1:] == (64, 48, 3) for x in frames)
    assert frames[1].std() > 1


def test_iteration_is_next_chunk(pipeline):
    stream = iter(started(pipeline))
    assert same([next(stream), next(stream)], chunks(started(pipeline), 2))


def test_same_seed_and_switches_same_bits_and_everything_matters(pipeline):
    def run(seed=0, garment=DRESS, prompt="she walks", other=SHIRT, at=2):
        session = started(pipeline, seed=seed, garment=garment, prompt=prompt)
        frames = chunks(session, at)
        session.switch_garment(other)
        return frames + chunks(session, 5 - at)

    first = run()
    assert same(first, run())
    for other in (run(seed=1), run(garment=COAT), run(prompt="he turns")):
        assert not np.array_equal(first[0], other[0])
    assert same(first[:2], run(other=COAT)[:2])
    assert not np.array_equal(first[2], run(other=COAT)[2])
    assert not np.array_equal(first[2], run(at=3)[2])


def test_noise_differs_from_chunk_to_chunk(pipeline):
    """With the history gone and nothing changed, only the noise can tell two first chunks apart."""
    session = started(pipeline, SwitchConfig(disentangle=False))
    first = session.next_chunk()
    session.switch_garment(DRESS)
    assert not np.array_equal(first, session.next_chunk())


def test_last_switch_wins_and_is_recorded(pipeline):
    a, b = started(pipeline), started(pipeline)
    chunks(a, 2), chunks(b, 2)
    lost = a.switch_garment(COAT)
    a.switch_prompt("he jumps")
    won = a.switch_garment(SHIRT)
    b.switch_prompt("he jumps")
    b.switch_garment(SHIRT)
    assert same(chunks(a, 2), chunks(b, 2))
    assert (lost.asked, lost.effective, lost.superseded) == (21, None, True)
    assert (won.asked, won.effective, won.superseded) == (21, 21, False)
    assert [s.kind for s in a.switches] == ["garment", "prompt", "garment"]


def test_switch_from_another_thread_takes_effect_at_the_next_chunk(pipeline, monkeypatch):
    session = started(pipeline)
    session.next_chunk()
    asked = []

    def chunk_while_someone_clicks(*args, original=pipeline.stream.chunk):
        if not asked:
            thread = threading.Thread(target=lambda: asked.append(session.switch_garment(SHIRT)))
            thread.start()
            thread.join(timeout=30)  # does not wait for the chunk in progress
            assert asked
        return original(*args)

    monkeypatch.setattr(pipeline.stream, "chunk", chunk_while_someone_clicks)
    undisturbed = started(pipeline)
    monkeypatch.undo()
    chunks(undisturbed, 1)
    monkeypatch.setattr(pipeline.stream, "chunk", chunk_while_someone_clicks)
    during = session.next_chunk()
    monkeypatch.undo()
    assert asked[0].effective is None
    assert np.array_equal(during, undisturbed.next_chunk())
    assert len(session.next_chunk()) == 8
    assert (asked[0].asked, asked[0].effective) == (9, 21)


def test_many_threads_switching_leave_a_consistent_record(pipeline):
    session = started(pipeline)
    stop = threading.Event()

    def storm(garment):
        while not stop.is_set():
            session.switch_garment(garment)

    threads = [threading.Thread(target=storm, args=(g,)) for g in (SHIRT, COAT)]
    [t.start() for t in threads]
    frames = chunks(session, 4)
    stop.set()
    [t.join() for t in threads]
    effective = [s for s in session.switches if s.effective is not None]
    assert sum(map(len, frames)) == session.frames
    assert len({s.effective for s in effective}) == len(effective) <= 4
    assert all(s.superseded or s.effective is not None for s in session.switches[:-1])
    assert not any(s.superseded and s.effective is not None for s in session.switches)


def test_full_switch_starts_a_new_clip_and_drops_the_repeated_frame(pipeline):
    session, keeps = started(pipeline), started(pipeline, ALL_BUT_DROP)
    for s in (session, keeps):
        chunks(s, 3)
        assert s.length == 11
        s.switch_garment(SHIRT)
    dropped, kept = session.next_chunk(), keeps.next_chunk()
    assert (len(dropped), len(kept)) == (8, 9)
    assert np.array_equal(dropped, kept[1:])
    assert session.length == 5  # two condition frames and the new sink
    assert len(session.next_chunk()) == 12


def test_a_repeated_frame_that_is_the_only_one_is_shown():
    """With chunks of one latent frame, the first chunk of a clip is one frame."""
    session = started(make_pipeline("cache.block=1", "cache.frames=8", "cache.sink=1"))
    first = chunks(session, 2)
    session.switch_garment(SHIRT)
    assert [len(x) for x in (*first, *chunks(session, 2))] == [1, 4, 1, 4]


def test_refresh_alone_keeps_history_and_decoder(pipeline):
    session, undisturbed = started(pipeline, SwitchConfig.parse("refresh")), started(pipeline)
    chunks(session, 2), chunks(undisturbed, 2)
    before, slots = cache_arrays(session), context_slots(session)
    switch_now(session, SHIRT)
    after = cache_arrays(session)
    tokens = before[0].shape[1] // 23
    assert all(
        np.array_equal(x[:, 2 * tokens :], y[:, 2 * tokens :])
        for x, y in zip(before, after, strict=True)
    )
    assert all(not np.array_equal(x, y) for x, y in zip(slots, context_slots(session), strict=True))
    assert session.length == 8 and session._state.decoder is not None
    frames = session.next_chunk()
    assert len(frames) == 12 and session.length == 11
    assert not np.array_equal(frames, undisturbed.next_chunk())


def test_withdraw_alone_forgets_history_and_keeps_the_conditions(pipeline):
    session = started(pipeline, SwitchConfig.parse("withdraw"))
    chunks(session, 2)
    slots = context_slots(session)
    switch_now(session, SHIRT)
    assert session.length == 2 and session._state.decoder is None
    assert all(np.array_equal(x, y) for x, y in zip(slots, context_slots(session), strict=True))
    assert len(session.next_chunk()) == 9


def test_disentangle_encodes_the_last_frame_shown_as_one_image(pipeline):
    session, without = started(pipeline), started(pipeline, SwitchConfig.parse("refresh,withdraw"))
    last = chunks(session, 2)[-1][-1]
    chunks(without, 2)
    old = np.array(session._state.z_reference)
    for s in (session, without):
        switch_now(s, SHIRT)
    assert np.array_equal(session._state.z_reference, pipeline.media.encode_image(last))
    assert not np.array_equal(session._state.z_reference, old)
    assert np.array_equal(without._state.z_reference, old)
    assert session._state.z_reference.shape[1] == 1


def test_last_latent_is_the_reference_as_it_was_made(pipeline, monkeypatch):
    session, full = started(pipeline, LATENT), started(pipeline)
    made = []

    def chunk(*args, original=pipeline.stream.chunk):
        latents, cache = original(*args)
        made.append(np.array(latents))
        return latents, cache

    chunks(full, 2)
    with monkeypatch.context() as patched:
        patched.setattr(pipeline.stream, "chunk", chunk)
        chunks(session, 2)
    keys = context_slots(session)
    for one in (session, full):
        switch_now(one, SHIRT)
    reference = np.array(session._state.z_reference)
    assert np.array_equal(reference, made[-1][:, -1:])
    assert not np.array_equal(reference, made[0][:, -1:])
    assert reference.shape == full._state.z_reference.shape
    assert reference.dtype == full._state.z_reference.dtype
    assert not np.allclose(reference, full._state.z_reference, atol=1e-3)  # not encoded anew
    for before, now, of_full in zip(keys, context_slots(session), context_slots(full), strict=True):
        assert not np.array_equal(now, before) and not np.array_equal(now, of_full)


def test_anchor_brings_the_picture_of_the_person_back(pipeline):
    """The first chunk goes on from the last frame; behind it the person's picture counts again."""
    session, full, fresh = started(pipeline, ANCHOR), started(pipeline, FULL), started(pipeline)
    for one in (session, full):
        chunks(one, 2)
        one.switch_garment(SHIRT)
    assert same(chunks(session, 1), chunks(full, 1))
    for now, of_full in zip(context_slots(session), context_slots(full), strict=True):
        assert np.array_equal(now, of_full)
    assert session.length == full.length == 5
    back, without = session.next_chunk(), full.next_chunk()
    assert not np.array_equal(back, without) and session.length == full.length == 8
    # The conditions are those of a stream that began with this person in this garment.
    fresh.start(PERSON, SHIRT, "she walks", 0)
    for now, begun, of_full in zip(
        *(context_slots(one) for one in (session, fresh, full)), strict=True
    ):
        assert np.array_equal(now, begun) and not np.array_equal(now, of_full)
    kept = context_slots(session)
    session.next_chunk()
    assert all(np.array_equal(a, b) for a, b in zip(kept, context_slots(session), strict=True))


@pytest.mark.parametrize("change", ["garment", "prompt"])
def test_anchor_waits_for_a_chunk_without_new_pictures(pipeline, change):
    session, fresh = started(pipeline, ANCHOR), started(pipeline, garment=COAT, prompt="he jumps")
    chunks(session, 2)
    session.switch_garment(SHIRT if change == "garment" else COAT)
    session.next_chunk()
    if change == "garment":
        session.switch_garment(COAT)  # goes on from the last frame, too
        session.switch_prompt("he jumps")
        session.next_chunk()
        assert session._state.goes_on and session.length == 5
    else:
        session.switch_prompt("he jumps")  # takes effect in the chunk of the anchor
    session.next_chunk()
    assert not session._state.goes_on and session.length == 8
    slots = zip(context_slots(session), context_slots(fresh), strict=True)
    assert all(np.array_equal(now, begun) for now, begun in slots)


def test_anchor_keeps_to_the_person_who_came_last(pipeline):
    session, fresh = started(pipeline, ANCHOR), started(pipeline)
    chunks(session, 1)
    session.switch_reference(COAT)
    session.next_chunk()
    session.switch_garment(SHIRT)
    chunks(session, 2)
    fresh.start(COAT, SHIRT, "she walks", 0)
    slots = zip(context_slots(session), context_slots(fresh), strict=True)
    assert all(np.array_equal(now, begun) for now, begun in slots)


def test_an_anchor_that_was_taken_back_left_nothing(pipeline):
    """Without the mechanism the chunk is made with the last frame, as if there had been none."""
    plain, ahead = started(pipeline, FULL), started(pipeline, ANCHOR, keep=1)
    for one in (plain, ahead):
        chunks(one, 2)
        one.switch_garment(SHIRT)
        one.next_chunk()
    frames = ahead.frames
    ahead.next_chunk()
    assert ahead.rewind(frames) == frames
    ahead.mechanisms = FULL
    assert same(chunks(plain, 2), chunks(ahead, 2))


@pytest.mark.parametrize("further", [1, 2, 3])
def test_anchor_goes_back_and_into_files(pipeline, tmp_path, further):
    """Snapshots between a change and its anchor, and chunks taken back over one or both."""
    plain, ahead = started(pipeline, ANCHOR), started(pipeline, ANCHOR, keep=3)
    for one in (plain, ahead):
        chunks(one, 2)
        one.switch_garment(SHIRT)
        one.next_chunk()
    if further == 3:  # over a second change and its anchor, which are asked for again
        chunks(ahead, 1), chunks(plain, 1)
        frames = ahead.frames
        ahead.switch_garment(COAT)
        chunks(ahead, 2)
        plain.switch_garment(COAT)
    else:
        frames = ahead.frames
        chunks(ahead, further)
    assert ahead.rewind(frames) == frames
    assert ahead._state.goes_on == plain._state.goes_on
    ahead.snapshot().save(tmp_path / "ahead.safetensors")
    again = Session(pipeline)
    again.restore(Snapshot.load(tmp_path / "ahead.safetensors"))
    expected = chunks(plain, 4)
    assert same(expected, chunks(ahead, 4)) and same(expected, chunks(again, 4))


def test_the_repeated_frame_is_dropped_where_a_frame_repeats(pipeline):
    """The last latent shows the last pose again; a frame of some earlier time does not."""
    for mechanisms, expected in ((LATENT, 8), (RANDOM, 9)):
        session = started(pipeline, mechanisms)
        chunks(session, 2)
        session.switch_garment(SHIRT)
        assert len(session.next_chunk()) == expected, mechanisms


def test_random_frame_is_one_that_was_handed_out(pipeline):
    session = started(pipeline, RANDOM)
    shown = []
    for _ in range(4):
        shown += list(session.next_chunk())
        assert any(np.array_equal(session._state.random_frame, frame) for frame in shown)
    chosen = session._state.random_frame
    switch_now(session, SHIRT)
    assert np.array_equal(session._state.z_reference, pipeline.media.encode_image(chosen))


def test_every_frame_is_chosen_as_often_and_by_the_seed_alone(pipeline):
    """The reservoir over chunks of 2, 3 and 1 frames: 6 frames, 300 seeds."""
    session, zeros = started(pipeline, RANDOM), np.zeros((1, 1, 1, 1, 1), np.float32)
    chosen = []
    for seed in [*range(300), 5, 6]:
        session._state.seed, session._state.random_frame, session._frames = seed, None, 0
        for number, frames in enumerate(np.split(np.arange(6), [2, 5])):
            session._state.chunk = number
            session._keep_for_reference(session._state, zeros, frames)
            session._frames += len(frames)
        chosen.append(int(session._state.random_frame))
    assert chosen[300:] == chosen[5:7]
    counts = np.bincount(chosen[:300], minlength=6)
    assert counts.sum() == 300 and (abs(counts - 50) < 26).all(), counts  # 4 deviations


@pytest.mark.parametrize(
    ("mechanisms", "kept"), [(None, set()), (LATENT, {"last_latent"}), (RANDOM, {"random_frame"})]
)
def test_nothing_is_kept_for_the_reference_unless_it_is_asked_for(pipeline, mechanisms, kept):
    session = started(pipeline, mechanisms)
    chunks(session, 2)
    names = {"last_latent", "random_frame"}
    assert {name for name in names if getattr(session._state, name) is not None} == kept
    assert session.snapshot().arrays.keys() & names == kept


@pytest.mark.parametrize("mechanisms", [LATENT, RANDOM])
def test_a_reference_that_was_not_kept_is_refused_and_the_stream_stays(pipeline, mechanisms):
    session, plain = started(pipeline), started(pipeline)
    chunks(session, 2), chunks(plain, 2)
    session.mechanisms = mechanisms
    session.switch_garment(SHIRT)
    with pytest.raises(SessionError, match="before it starts"):
        session.next_chunk()
    session.mechanisms = plain.mechanisms
    plain.switch_garment(SHIRT)
    assert same(chunks(session, 2), chunks(plain, 2))
    session.mechanisms = mechanisms
    session.switch_garment(COAT)
    session.switch_reference(COAT)  # nothing kept is needed
    assert len(session.next_chunk()) == 9


def test_withdraw_forgets_everything_but_the_conditions(pipeline):
    """Two histories, then the same conditions and the same noise: the same chunk."""
    a, b = (started(pipeline, SwitchConfig(disentangle=False), garment=g) for g in (DRESS, COAT))
    chunks(a, 2), chunks(b, 2)
    a.switch_garment(SHIRT), b.switch_garment(SHIRT)
    assert same(chunks(a, 2), chunks(b, 2))


def test_reference_given_by_the_user_is_the_reference(pipeline):
    session = started(pipeline)
    chunks(session, 2)
    session.switch_garment(SHIRT)
    session.switch_reference(COAT)
    frames = session.next_chunk()
    fresh = started(pipeline, ALL_BUT_DROP)
    assert len(frames) == 9  # it does not repeat the last pose, so nothing is dropped
    fresh.start(COAT, SHIRT, "she walks", seed=0)
    assert np.array_equal(fresh._state.z_reference, session._state.z_reference)


def test_prompt_switch_changes_the_text_only(pipeline):
    session, undisturbed = started(pipeline), started(pipeline)
    chunks(session, 2), chunks(undisturbed, 2)
    before = cache_arrays(session)
    session.switch_prompt("he jumps")
    pending = {"prompt": session._pending["prompt"][1]}
    session._apply(session._state, pending)
    assert same(before, cache_arrays(session)) and session.length == 8
    frames = session.next_chunk()
    assert len(frames) == 12 and not np.array_equal(frames, undisturbed.next_chunk())


def test_prompts_of_every_kind(pipeline):
    session = started(pipeline, prompt="")
    states = np.array(pipeline.encode_prompt("她在走路 🚶 " * 100))
    session.switch_prompt("Она идёт")
    session.next_chunk()
    session.switch_prompt(states)
    session.next_chunk()
    with pytest.raises(PipelineError, match=r"expected \(1, 16, 16\)"):
        session.switch_prompt(states[:, :3])
    session.next_chunk()


def test_switch_before_the_first_chunk_equals_starting_with_it(pipeline):
    session = started(pipeline)
    session.switch_garment(SHIRT)
    assert same(chunks(session, 2), chunks(started(pipeline, garment=SHIRT), 2))


def test_a_picture_encoded_ahead_gives_the_same_bits(pipeline, tmp_path):
    person = pipeline.encode_picture("reference", PERSON)
    dress, shirt = (pipeline.encode_picture("garment", one) for one in (DRESS, SHIRT))
    plain, ahead = started(pipeline), Session(pipeline)
    ahead.start(person, dress, "she walks", 0)
    assert same(chunks(plain, 2), chunks(ahead, 2))
    plain.switch_garment(SHIRT)
    ahead.switch_garment(shirt)
    ahead.snapshot().save(tmp_path / "waiting.safetensors")  # while the picture waits
    expected = chunks(plain, 2)
    assert same(expected, chunks(ahead, 2))
    again = pipeline.session()
    again.restore(Snapshot.load(tmp_path / "waiting.safetensors"))
    assert same(expected, chunks(again, 2))


def test_a_picture_that_was_encoded_as_something_else_is_refused(pipeline):
    with pytest.raises(PipelineError, match="kind 'shoe'"):
        pipeline.encode_picture("shoe", DRESS)
    session = started(pipeline)
    with pytest.raises(SessionError, match="encoded reference .* expected a garment"):
        session.switch_garment(pipeline.encode_picture("reference", PERSON))
    large = dataclasses.replace(
        pipeline.encode_picture("garment", DRESS), pixels=np.zeros((80, 60, 3), np.uint8)
    )
    with pytest.raises(SessionError, match=r"\(80, 60\) pixels; expected"):
        session.switch_garment(large)
    assert session.switches == []


def test_long_stream_keeps_its_cache_and_compiles_once():
    pipeline = make_pipeline("video.height=16", "video.width=16")
    session = started(pipeline)
    chunks(session, 9)
    assert session.length == 23
    session.switch_garment(SHIRT)
    chunks(session, 9)
    session.switch_prompt("he jumps")
    chunks(session, 2)
    for programs in (pipeline.media, pipeline.stream):  # compiled before the first chunk, for good
        usual = set(programs.names) - set(REWIND)
        assert {name for name, _ in programs._compiled} == usual
        assert len(programs._compiled) == len(usual)
        assert not any(programs._jitted[name][1]._cache_size() for name in usual)


def test_compiling_ahead_gives_the_same_bits(pipeline):
    ahead, lazy = make_pipeline(), make_pipeline()
    lazy._compiled = True  # so that its programs are compiled when they are first called
    seconds = ahead.compile()
    assert ahead.compile() == {}
    assert set(seconds) == {
        "encode_text",
        "text_kv",
        "encode_image",
        "new_cache",
        "refresh",
        "chunk",
        "decode_first",
        "decode_next",
    }
    assert same(chunks(started(ahead), 2), chunks(started(lazy), 2))
    assert not lazy.stream._compiled and ahead.stream._compiled


def test_threads_compile_a_pipeline_once_and_all_wait_for_it():
    pipeline = make_pipeline()

    def compile_in_thread(_: int) -> tuple[int, bool]:
        return len(pipeline.compile()), "chunk" in {name for name, _ in pipeline.stream._compiled}

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(compile_in_thread, range(2))) == [(0, True), (8, True)]


def test_a_restored_stream_is_compiled_before_its_first_chunk(pipeline):
    snapshot, other = started(pipeline).snapshot(), make_pipeline()
    Session(other).restore(snapshot)
    assert other.compile() == {}


def test_sessions_of_one_pipeline_do_not_disturb_each_other(pipeline):
    alone = chunks(started(pipeline, seed=5), 3)
    a, b = started(pipeline, seed=5), started(pipeline, seed=6, garment=COAT)
    mixed = []
    for _ in range(3):
        mixed.append(a.next_chunk())
        b.next_chunk()
    assert same(alone, mixed)


def test_bad_picture_is_refused_and_the_stream_goes_on(pipeline, tmp_path):
    session, undisturbed = started(pipeline), started(pipeline)
    chunks(session, 1), chunks(undisturbed, 1)
    (tmp_path / "empty.png").touch()
    for bad in (tmp_path / "none.png", tmp_path / "empty.png", b"", np.zeros((3, 3), np.float32)):
        with pytest.raises(ImageError):
            session.switch_garment(bad)
        with pytest.raises(ImageError):
            session.switch_reference(bad)
    assert session.switches == []
    assert np.array_equal(session.next_chunk(), undisturbed.next_chunk())


def test_not_started(pipeline):
    session = Session(pipeline)
    for call in (
        session.next_chunk,
        session.snapshot,
        lambda: session.switch_garment(SHIRT),
        lambda: session.frames,
    ):
        with pytest.raises(SessionError, match="start"):
            call()
    for seed in (-1, 2**32):
        with pytest.raises(ValueError, match="seed"):
            session.start(PERSON, DRESS, "", seed)


def test_absolute_positions_end_and_a_switch_starts_them_again():
    pipeline = make_pipeline("video.height=16", "video.width=16", "cache.positions=absolute")
    session = started(pipeline)
    session.next_chunk()
    session._state.held = 340  # as if so many chunks had been made
    for _ in range(2):
        with pytest.raises(PositionError, match="relative"):
            session.next_chunk()
    session.switch_garment(SHIRT)
    assert len(session.next_chunk()) == 8


def test_failed_chunk_ends_the_stream_and_a_new_start_works(pipeline, monkeypatch):
    session = started(pipeline)
    session.next_chunk()
    monkeypatch.setattr(
        pipeline.media, "decode", lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory"))
    )
    with pytest.raises(RuntimeError, match="out of memory"):
        session.next_chunk()
    monkeypatch.undo()
    with pytest.raises(SessionError):
        session.next_chunk()
    session.start(PERSON, DRESS, "she walks", 0)
    assert same(chunks(session, 2), chunks(started(pipeline), 2))


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
    for name in ("last_latent", "random_frame"):
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
    del value.arrays["last_latent"]
    with pytest.raises(SnapshotError, match="last_latent"):
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


def test_measure_keeps_one_timing_a_chunk(pipeline):
    session = pipeline.session(measure=True)
    session.start(PERSON, DRESS)
    chunks(session, 3)
    assert [t.frames for t in session.timings] == [9, 12, 12]
    assert all(t.denoise > 0 and t.decode > 0 for t in session.timings)


def test_the_embedded_model_uses_all_mechanisms_of_the_paper_and_keeps_the_person():
    """By its config, and by the copy of it that lies with the weights."""
    beside_weights = ROOT / "chameleon_jax/assets/runway_tiny/config.json"
    config, copy = (
        load_config(f"{ROOT}/configs/runway_tiny.py"),
        json.loads(beside_weights.read_text()),
    )
    for switch in (config.switch, copy["switch"]):
        assert SwitchConfig(**switch) == SwitchConfig.parse("full,anchor")
    assert make_sampler(**config.sampler) == make_sampler(**copy["sampler"])


@pytest.mark.parametrize(
    ("switch", "message"),
    [
        ({"disentangel": True}, "switch.disentangel is no setting; expected some of anchor, dis"),
        ({"withdraw": "no"}, "switch.withdraw is 'no'; expected True or False"),
        ({"anchor": True, "refresh": False}, "add refresh, or leave anchor out"),
    ],
)
def test_what_a_config_says_of_switches_is_checked_before_weights_are_made(switch, message):
    config = load_config(f"{ROOT}/configs/runway_tiny.py").to_dict() | {"switch": switch}
    with pytest.raises(PipelineError, match=re.escape(message)):
        Pipeline.random(ConfigDict(config), 0)


def test_mechanisms_from_text():
    assert SwitchConfig.parse("full") == SwitchConfig() == FULL
    assert SwitchConfig.parse("full, anchor") == ANCHOR
    assert SwitchConfig.parse("anchor,refresh,withdraw,disentangle") == ANCHOR
    assert SwitchConfig.parse("refresh, withdraw") == SwitchConfig(disentangle=False)
    assert SwitchConfig.parse("refresh,withdraw,random_frame") == RANDOM
    assert SwitchConfig.parse("refresh,last_latent").last_latent


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("refrsh", "unknown switch mechanism 'refrsh'; expected a list of full, refresh, withdraw"),
        ("full,last_latent", "with disentangle and last_latent: .* choose one"),
        ("full,refresh", "switch mechanism 'refresh' is named twice"),
        ("withdraw,anchor", "with anchor and without refresh: .* add refresh"),
        ("refresh,", "unknown switch mechanism ''"),
        ("refresh,withdraw,refresh", "switch mechanism 'refresh' is named twice"),
        ("refresh,last_latent,disentangle", "with disentangle and last_latent: .* choose one"),
        ("last_latent,random_frame", "with last_latent and random_frame: .* choose one"),
    ],
)
def test_mechanisms_that_cannot_be(text, message):
    with pytest.raises(SwitchError, match=message) as caught:
        SwitchConfig.parse(text)
    assert "\n" not in str(caught.value)


def test_guidance_streams_over_two_caches(pipeline):
    """Guidance by a prompt that says the same changes nothing; by another one it does."""
    plain = chunks(started(pipeline), 2)
    same_prompt = make_pipeline("sampler.guidance=3", "sampler.negative_prompt=she walks")
    session = started(same_prompt)
    assert session._state.cache.k[0].shape[0] == 2
    for a, b in zip(plain, chunks(session, 2), strict=True):
        assert np.abs(a.astype(int) - b).max() <= 1  # rounding of the sum
    other = make_pipeline("sampler.guidance=3", "sampler.negative_prompt=a red coat")
    session = started(other)
    guided = chunks(session, 2)
    assert np.abs(plain[1].astype(int) - guided[1]).max() > 3
    # A snapshot goes on with the same bits, through a switch of garment and prompt.
    again = Session(other)
    again.restore(session.snapshot())
    for one in (session, again):
        one.switch_garment(COAT)
        one.switch_prompt("he sits")
    assert same(chunks(session, 2), chunks(again, 2))


@pytest.mark.parametrize("overrides", [(), ("cache.frames=8", "cache.sink=0")])
def test_a_stream_that_went_back_is_one_that_never_went_ahead(pipeline, overrides):
    """Bit for bit, around the ring, over one chunk or several, with and without a switch."""
    made_by = make_pipeline(*overrides) if overrides else pipeline
    plain, ahead = started(made_by), Session(made_by, keep=3)
    ahead.start(PERSON, DRESS, "she walks", 0)
    for shown, further in ((1, 2), (9, 1), (2, 3)):  # more chunks than the ring holds
        assert same(chunks(plain, shown), chunks(ahead, shown))
        frames = ahead.frames
        chunks(ahead, further)
        assert ahead.rewind(frames) == frames == plain.frames
    for session in (plain, ahead):
        session.switch_garment(SHIRT)
    assert same(chunks(plain, 3), chunks(ahead, 3))
    assert plain.switches == ahead.switches and plain.length == ahead.length


def test_a_switch_that_was_not_shown_yet_waits_again(pipeline):
    plain, ahead = started(pipeline), Session(pipeline, keep=4)
    ahead.start(PERSON, DRESS, "she walks", 0)
    assert same(chunks(plain, 2), chunks(ahead, 2))
    frames = ahead.frames
    ahead.next_chunk()
    first, prompt = ahead.switch_garment(SHIRT), ahead.switch_prompt("she sits")
    chunks(ahead, 2)
    assert first.effective is not None
    second = ahead.switch_garment(COAT)  # while the shirt has not been seen
    assert ahead.rewind(frames) == frames
    assert first.superseded and first.effective is None and prompt.effective is None
    plain.switch_garment(COAT)
    plain.switch_prompt("she sits")
    assert same(chunks(plain, 4), chunks(ahead, 4))
    assert second.effective == prompt.effective == frames


def test_of_two_switches_that_were_not_shown_the_later_one_waits(pipeline):
    session = Session(pipeline, keep=3)
    session.start(PERSON, DRESS, "", 0)
    session.next_chunk()
    frames = session.frames
    first = session.switch_garment(SHIRT)
    session.next_chunk()
    second = session.switch_garment(COAT)
    session.next_chunk()
    assert session.rewind(frames) == frames
    assert first.superseded and not second.superseded
    assert first.effective is None and second.effective is None
    session.next_chunk()
    assert first.effective is None and second.effective == frames


def test_a_chunk_that_was_called_off_was_never_begun(pipeline):
    plain, session = started(pipeline, keep=1), started(pipeline, keep=1)
    assert session.next_chunk(lambda: True) is None and session.frames == 0
    assert same(in_parts(plain, 2), in_parts(session, 2))
    for one in (plain, session):
        one.switch_garment(SHIRT)
    assert session.next_chunk(lambda: True) is None
    assert session.switches[0].effective is None and session.length == plain.length
    assert same(chunks(plain, 2), chunks(session, 2)) and plain.switches == session.switches
    with pytest.raises(SessionError, match="keep=0 cannot call a chunk off"):
        started(pipeline).next_chunk(lambda: True)


@pytest.mark.parametrize("overrides", [(), ("sampler.first=1",)])
def test_a_chunk_in_parts_is_the_whole_one(overrides):
    pipeline = make_pipeline(*overrides)
    whole, parts = started(pipeline), started(pipeline, keep=1)
    for number in range(4):
        if number == 3:
            for one in (whole, parts):
                one.switch_garment(SHIRT)
        (a,), (b,) = chunks(whole, 1), in_parts(parts, 1)
        assert np.abs(a.astype(int) - b).max() <= 1  # two programs: up to rounding
    assert whole.switches == parts.switches


@pytest.mark.parametrize("overrides", [(), ("sampler.first=1",)])
def test_a_chunk_can_be_called_off_after_every_step(overrides):
    """The stream goes on as if it had never begun; first chunks may have other steps."""
    pipeline = make_pipeline(*overrides)
    plain, session = started(pipeline, keep=1), started(pipeline, keep=1)
    steps = []
    for number in range(4):
        if number == 3:
            for one in (plain, session):
                one.switch_garment(SHIRT)
        for step in itertools.count():  # called off behind this one, until it is made
            asked = itertools.count()
            frames = session.next_chunk(lambda asked=asked, step=step: next(asked) == step)
            if frames is not None:
                break
        steps.append(step)
        assert same([frames], in_parts(plain, 1))
    few = 1 if overrides else 2
    assert steps == [few, 2, 2, few] and plain.switches == session.switches


def test_frames_of_a_chunk_that_can_be_called_off_do_not_wait_for_its_last_pass(
    pipeline, monkeypatch
):
    session, calls = Session(pipeline, keep=1), []
    session.start(PERSON, DRESS, "she walks", 0)
    for owner, name in ((session._stream, "passes"), (session._media, "decode")):
        method = getattr(owner, name)

        def noted(*args, name=name, method=method):
            calls.append(name)
            return method(*args)

        monkeypatch.setattr(owner, name, noted)
    session.next_chunk(lambda: False)
    assert calls == ["passes", "passes", "decode", "passes"]


def test_what_is_kept_says_how_far_back(pipeline):
    session = Session(pipeline, keep=2)
    session.start(PERSON, DRESS, "", 0)
    with pytest.raises(SessionError):
        Session(pipeline, keep=2).rewind(0)
    ends = [0]
    for _ in range(4):
        session.next_chunk()
        ends.append(session.frames)
    assert session.rewind(ends[4]) == ends[4]  # nothing lies behind
    assert session.rewind(ends[2] + 1) == ends[3]  # a boundary, not the middle of a chunk
    session.next_chunk()
    assert session.rewind(0) == ends[2]  # no further than was kept
    assert session.rewind(0) == ends[2]
    plain = started(pipeline)
    plain.next_chunk()
    assert plain.rewind(0) == plain.frames  # keeps nothing
    session.start(PERSON, DRESS, "", 0)
    assert session.rewind(0) == 0


def test_an_error_leaves_nothing_to_go_back_to(pipeline, monkeypatch):
    session = Session(pipeline, keep=2)
    session.start(PERSON, DRESS, "", 0)
    session.next_chunk()
    with monkeypatch.context() as patched:
        patched.setattr(session._stream, "chunk", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            session.next_chunk()
    with pytest.raises(SessionError):
        session.rewind(0)
    session.start(PERSON, DRESS, "", 0)
    plain = started(pipeline, prompt="")
    assert same(chunks(session, 2), chunks(plain, 2))

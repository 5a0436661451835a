"""Sessions: bits, switches of garment and prompt, pictures encoded ahead, compiling, errors."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import threading

import numpy as np
import pytest

from chameleon_jax.attention.positions import PositionError
from chameleon_jax.data.images import ImageError
from chameleon_jax.inference import Session, SessionError, Snapshot, SwitchConfig
from chameleon_jax.inference.pipeline import PipelineError
from chameleon_jax.inference.programs import REWIND
from tests.inference.streams import (
    COAT,
    DRESS,
    PERSON,
    SHIRT,
    cache_arrays,
    chunks,
    make_pipeline,
    same,
    started,
)


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


def test_prompt_switch_changes_the_text_only(pipeline):
    session, undisturbed = started(pipeline), started(pipeline)
    chunks(session, 2), chunks(undisturbed, 2)
    before = cache_arrays(session)
    session.switch_prompt("he jumps")
    pending = {"prompt": session._pending["prompt"][1]}
    session._maker.apply(session._state, pending)
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
        "fade",
    }
    assert same(chunks(started(ahead), 2), chunks(started(lazy), 2))
    assert not lazy.stream._compiled and ahead.stream._compiled


def test_threads_compile_a_pipeline_once_and_all_wait_for_it():
    pipeline = make_pipeline()

    def compile_in_thread(_: int) -> tuple[int, bool]:
        return len(pipeline.compile()), "chunk" in {name for name, _ in pipeline.stream._compiled}

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(compile_in_thread, range(2))) == [(0, True), (9, True)]


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


def test_measure_keeps_one_timing_a_chunk(pipeline):
    session = pipeline.session(measure=True)
    session.start(PERSON, DRESS)
    chunks(session, 3)
    assert [t.frames for t in session.timings] == [9, 12, 12]
    assert all(t.denoise > 0 and t.decode > 0 for t in session.timings)


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

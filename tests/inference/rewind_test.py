"""Going back: what was not shown is taken back, and chunks that are made in parts or called off."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from chameleon_jax.inference import Session, SessionError
from tests.inference.streams import (
    COAT,
    DRESS,
    PERSON,
    SHIRT,
    chunks,
    in_parts,
    make_pipeline,
    same,
    started,
)


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

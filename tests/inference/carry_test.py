"""A change of garment that goes on from the last chunk, remembered under noise."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from chameleon_jax.attention.cache import close_chunk, open_chunk, withdraw
from chameleon_jax.inference import Session, SessionError, Snapshot, SwitchConfig
from tests.inference.streams import (
    COAT,
    FULL,
    SHIRT,
    cache_arrays,
    chunks,
    context_slots,
    in_parts,
    make_pipeline,
    same,
    started,
)

CARRY = SwitchConfig(disentangle=False, carry=True)


def test_a_change_that_carries_is_its_definition(pipeline):
    """The chunk before is remembered under noise, alone, then a chunk is made, then forgotten."""
    session, by_hand = started(pipeline, CARRY), started(pipeline, FULL)
    shown = chunks(session, 2)
    assert same(shown, chunks(by_hand, 1) + (seen := chunks(by_hand, 1)))
    stream, state = pipeline.stream, session._state
    before, text_kv = state.last_chunk, state.text_kv
    decoder = by_hand._state.decoder
    session.switch_garment(SHIRT)
    frames = session.next_chunk()
    assert len(frames) == len(seen[0]) == 12

    fresh = started(pipeline, FULL, garment=SHIRT)
    cache, last = fresh._state.cache, stream.count_passes(True) - 1
    empty = stream.new_flight()
    _, cache = stream.passes(
        open_chunk(cache), text_kv, 0, 2, (before, empty[1]), last, last + 1, 0.6
    )
    latents, cache = stream.chunk(close_chunk(cache), text_kv, 0, 2)
    flight = latents, empty[1]
    made, _ = pipeline.media.decode(latents, decoder)
    assert np.array_equal(frames, np.array(made))
    _, cache = stream.passes(open_chunk(withdraw(cache)), text_kv, 0, 2, flight, last, last + 1)
    cache = close_chunk(cache)
    expected = [np.array(x) for x in (*cache.k, *cache.v)]
    assert all(np.array_equal(x, y) for x, y in zip(expected, cache_arrays(session), strict=True))
    assert session.length == 2 + 3


def test_the_picture_of_the_person_stays_the_reference(pipeline):
    session = started(pipeline, CARRY)
    fresh = started(pipeline, garment=COAT)
    for garment in (SHIRT, COAT):
        chunks(session, 1)
        session.switch_garment(garment)
        chunks(session, 1)
    slots = zip(context_slots(session), context_slots(fresh), strict=True)
    assert all(np.array_equal(now, begun) for now, begun in slots)


def test_the_noise_hides_what_was_worn(pipeline):
    """All but hidden, the chunk before says next to nothing; clean, it says the most."""
    made = []
    for level in (0.0, 0.6, 0.99):
        session = started(pipeline, dataclasses.replace(CARRY, carry_noise=level))
        chunks(session, 2)
        session.switch_garment(SHIRT)
        made.append(session.next_chunk().astype(float))
    assert not any(np.array_equal(a, b) for a, b in itertools.pairwise(made))


def test_a_new_person_and_the_first_chunk_carry_nothing(pipeline):
    """Both begin with the picture that was given, as without the mechanism."""
    plain, session = started(pipeline, FULL), started(pipeline, CARRY)
    for one in (plain, session):
        one.switch_garment(SHIRT)  # before there is a chunk
        chunks(one, 2)
        one.switch_reference(COAT)
        one.switch_garment(SHIRT)
    assert same(chunks(plain, 2), chunks(session, 2))


@pytest.mark.parametrize("overrides", [(), ("cache.frames=8", "cache.sink=0")])
@pytest.mark.parametrize("further", [1, 2, 3])
def test_a_carried_change_goes_back_and_into_files(pipeline, tmp_path, further, overrides):
    made_by = make_pipeline(*overrides) if overrides else pipeline
    plain, ahead = started(made_by, CARRY), started(made_by, CARRY, keep=3)
    for one in (plain, ahead):
        chunks(one, 4)
    frames = ahead.frames
    ahead.switch_garment(SHIRT)
    chunks(ahead, further)
    assert ahead.rewind(frames) == frames
    ahead.snapshot().save(tmp_path / "ahead.safetensors")
    again = Session(made_by)
    again.restore(Snapshot.load(tmp_path / "ahead.safetensors"))
    assert again.mechanisms == CARRY
    plain.switch_garment(SHIRT)
    expected = chunks(plain, 3)
    assert same(expected, chunks(ahead, 3)) and same(expected, chunks(again, 3))


def test_a_carried_change_that_was_called_off_was_never_begun(pipeline):
    plain, session = started(pipeline, CARRY, keep=1), started(pipeline, CARRY, keep=1)
    assert same(in_parts(plain, 2), in_parts(session, 2))
    session.switch_garment(SHIRT)
    for stop in range(2):
        calls = iter([False] * stop + [True])
        assert session.next_chunk(lambda calls=calls: next(calls)) is None
    plain.switch_garment(SHIRT)
    assert same(in_parts(plain, 3), in_parts(session, 3))


def test_a_cache_without_room_for_the_chunk_before_is_refused_and_the_stream_stays():
    made_by = make_pipeline("cache.frames=5", "cache.sink=0")
    session, plain = started(made_by, CARRY), started(made_by, FULL)
    chunks(session, 2), chunks(plain, 2)
    session.switch_garment(SHIRT)
    with pytest.raises(SessionError, match="cache of 5 frames has no room .* cache.frames to 8"):
        session.next_chunk()
    session.mechanisms = FULL
    plain.switch_garment(SHIRT)
    assert same(chunks(session, 2), chunks(plain, 2))


def test_a_stream_can_begin_to_carry_at_any_change(pipeline):
    always, late = started(pipeline, CARRY), started(pipeline, FULL)
    for one in (always, late):
        chunks(one, 2)
        one.mechanisms = CARRY
        one.switch_garment(SHIRT)
    assert same(chunks(always, 2), chunks(late, 2))

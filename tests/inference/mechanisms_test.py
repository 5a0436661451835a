"""What a switch does: refresh, withdraw, disentangle, anchor, and the other references."""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import pytest
from ml_collections import ConfigDict

from chameleon_jax.config import load_config
from chameleon_jax.diffusion.rollout import make_sampler
from chameleon_jax.inference import (
    Pipeline,
    Session,
    SessionError,
    Snapshot,
    SwitchConfig,
    SwitchError,
)
from chameleon_jax.inference.fade import fade
from chameleon_jax.inference.pipeline import PipelineError
from tests.inference.streams import (
    ALL_BUT_DROP,
    ANCHOR,
    COAT,
    DRESS,
    FADE,
    FULL,
    LATENT,
    NOISED,
    PERSON,
    RANDOM,
    ROOT,
    SHIRT,
    cache_arrays,
    chunks,
    context_slots,
    make_pipeline,
    same,
    started,
    switch_now,
)


def test_full_switch_starts_a_new_clip_and_drops_the_repeated_frame(pipeline):
    session, keeps = started(pipeline, FULL), started(pipeline, ALL_BUT_DROP)
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


def test_the_chunk_before_the_anchor_is_remembered_under_noise(pipeline):
    """It is shown as ever, and what it leaves in the cache is what the device program leaves."""
    plain, noised = started(pipeline, ANCHOR), started(pipeline, NOISED)
    assert same(chunks(plain, 2), chunks(noised, 2))
    for one in (plain, noised):
        one.switch_garment(SHIRT)
    assert same(chunks(plain, 1), chunks(noised, 1))
    clean, seen = cache_arrays(plain), cache_arrays(noised)
    assert not all(np.array_equal(x, y) for x, y in zip(clean, seen, strict=True))
    differs, again = chunks(plain, 2), chunks(noised, 2)
    assert not any(np.array_equal(x, y) for x, y in zip(differs, again, strict=True))

    by_hand = started(pipeline, FULL)
    chunks(by_hand, 2)
    switch_now(by_hand, SHIRT)
    state = by_hand._state
    _, cache = pipeline.stream.chunk(state.cache, state.text_kv, 0, 2, 0.3)
    expected = [np.array(x) for x in (*cache.k, *cache.v)]
    assert all(np.array_equal(x, y) for x, y in zip(seen, expected, strict=True))


def test_nothing_else_is_remembered_under_noise(pipeline):
    """A person of the user's own, a prompt, the start, the anchored chunk, and without anchor."""
    plain, noised = started(pipeline, ANCHOR), started(pipeline, NOISED)
    without = started(pipeline, dataclasses.replace(NOISED, anchor=False))
    full = started(pipeline, FULL)
    for one in (plain, noised):
        one.next_chunk()
        one.switch_prompt("he turns")
        one.next_chunk()
        one.switch_reference(COAT)
    assert same(chunks(plain, 3), chunks(noised, 3))
    for one in (without, full):
        one.next_chunk()
        one.switch_garment(SHIRT)
    assert same(chunks(without, 3), chunks(full, 3))


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


@pytest.mark.parametrize("mechanisms", [ANCHOR, NOISED], ids=["anchor", "noise"])
@pytest.mark.parametrize("further", [1, 2, 3])
def test_anchor_goes_back_and_into_files(pipeline, tmp_path, further, mechanisms):
    """Snapshots between a change and its anchor, and chunks taken back over one or both."""
    plain, ahead = started(pipeline, mechanisms), started(pipeline, mechanisms, keep=3)
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
            session._maker.keep_for_reference(session._state, zeros, frames, session._frames)
            session._frames += len(frames)
        chosen.append(int(session._state.random_frame))
    assert chosen[300:] == chosen[5:7]
    counts = np.bincount(chosen[:300], minlength=6)
    assert counts.sum() == 300 and (abs(counts - 50) < 26).all(), counts  # 4 deviations


@pytest.mark.parametrize("mechanisms", [None, RANDOM])
def test_no_frame_is_kept_for_the_reference_unless_it_is_asked_for(pipeline, mechanisms):
    session = started(pipeline, mechanisms)
    chunks(session, 2)
    assert (session._state.random_frame is not None) == (mechanisms is RANDOM)
    assert ("random_frame" in session.snapshot().arrays) == (mechanisms is RANDOM)


def test_a_reference_that_was_not_kept_is_refused_and_the_stream_stays(pipeline):
    session, plain = started(pipeline), started(pipeline)
    chunks(session, 2), chunks(plain, 2)
    session.mechanisms = RANDOM
    session.switch_garment(SHIRT)
    with pytest.raises(SessionError, match="before it starts"):
        session.next_chunk()
    session.mechanisms = plain.mechanisms
    plain.switch_garment(SHIRT)
    assert same(chunks(session, 2), chunks(plain, 2))
    session.mechanisms = RANDOM
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


def test_what_a_switch_does_not_change_fades_from_the_old_clip_to_the_new_one(pipeline):
    """The first chunk behind a switch as `fade` makes it; all else as it was."""
    plain, faded = started(pipeline, FULL), started(pipeline, FADE)
    whole = started(pipeline, dataclasses.replace(FULL, drop_repeated_frame=False))
    first = [chunks(one, 2) for one in (plain, faded, whole)]
    assert same(first[0], first[1])
    last = first[0][-1][-1]
    for one in (plain, faded, whole):
        one.switch_garment(SHIRT)
    old, new, repeated = (one.next_chunk() for one in (plain, faded, whole))
    expected = np.asarray(fade(last, repeated))[1:]
    assert len(new) == len(old) == 8 and not np.array_equal(new, old)
    np.testing.assert_array_equal(new, expected)
    assert same(chunks(plain, 2), chunks(faded, 2))


def test_nothing_fades_where_no_pose_is_repeated(pipeline):
    """A prompt, a picture of a person, and a switch that keeps the history."""
    plain, faded = started(pipeline, FULL), started(pipeline, FADE)
    for change in ("switch_prompt", "switch_reference"):
        for one in (plain, faded):
            one.next_chunk()
            getattr(one, change)("he sits" if change == "switch_prompt" else COAT)
        assert same(chunks(plain, 1), chunks(faded, 1))
    kept = [started(pipeline, SwitchConfig.parse("refresh", like=one)) for one in (FULL, FADE)]
    for one in kept:
        one.next_chunk()
        one.switch_garment(SHIRT)
    assert same(*(chunks(one, 2) for one in kept))


def test_the_embedded_model_uses_all_mechanisms_of_the_paper_and_keeps_the_person():
    """By its config, and by the copy of it that lies with the weights."""
    beside_weights = ROOT / "chameleon_jax/assets/runway_tiny/config.json"
    config, copy = (
        load_config(f"{ROOT}/configs/runway_tiny.py"),
        json.loads(beside_weights.read_text()),
    )
    for switch in (config.switch, copy["switch"]):
        assert SwitchConfig(**switch) == dataclasses.replace(NOISED, fade=True)
    assert make_sampler(**config.sampler) == make_sampler(**copy["sampler"])


@pytest.mark.parametrize(
    ("switch", "message"),
    [
        ({"disentangel": True}, "switch.disentangel is no setting; expected some of anchor, carry"),
        ({"withdraw": "no"}, "switch.withdraw is 'no'; expected True or False"),
        ({"anchor": True, "refresh": False}, "add refresh, or leave anchor out"),
        ({"history_noise": True}, "switch.history_noise is True; expected a number"),
        ({"fade": 1}, "switch.fade is 1; expected True or False"),
        ({"history_noise": 1.0}, "history_noise=1.0: expected a level of noise of at least 0"),
        ({"carry_noise": -0.1}, "carry_noise=-0.1: expected a level of noise of at least 0"),
        ({"carry": True}, "with disentangle and carry: each says what the new clip takes its"),
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
    assert SwitchConfig.parse("withdraw,refresh,carry").carry
    kept = {"fade": True, "drop_repeated_frame": False, "history_noise": 0.3}
    parsed = SwitchConfig.parse("full", like=SwitchConfig(**kept, anchor=True))
    assert parsed == dataclasses.replace(FULL, **kept)


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
        ("refresh,carry", "with carry, and without refresh or withdraw: .* add both"),
        ("full,carry", "with disentangle and carry: .* choose one"),
    ],
)
def test_mechanisms_that_cannot_be(text, message):
    with pytest.raises(SwitchError, match=message) as caught:
        SwitchConfig.parse(text)
    assert "\n" not in str(caught.value)

"""Streams of a random model of a few thousand parameters, 64x48 pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from chameleon_jax.config import load_config
from chameleon_jax.inference import Pipeline, Session, SwitchConfig

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
FULL, ANCHOR, FADE = SwitchConfig(), SwitchConfig(anchor=True), SwitchConfig(fade=True)
NOISED = SwitchConfig(anchor=True, history_noise=0.3)


def make_pipeline(*overrides):
    return Pipeline.random(
        load_config(f"{ROOT}/configs/runway_tiny.py:smoke", [*OVERRIDES, *overrides]), seed=3
    )


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
    session._maker.apply(session._state, {kind: content for kind, (_, content) in pending.items()})


def cache_arrays(session):
    return [np.array(x) for x in (*session._state.cache.k, *session._state.cache.v)]


def context_slots(session):
    """Keys of the two condition frames, per layer."""
    tokens = session._state.cache.k[0].shape[1] // session.pipeline.config.cache.frames
    return [np.array(k[:, : 2 * tokens]) for k in session._state.cache.k]

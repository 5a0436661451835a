"""Recordings on disk."""

from __future__ import annotations

import numpy as np

from chameleon_jax.serving.encoding import Packet
from chameleon_jax.serving.recording import Recording


def packet(number: int) -> Packet:
    size = int(np.random.default_rng(number).integers(1, 5000))
    return Packet(np.random.default_rng(number).bytes(size), number % 7 == 0)


def test_what_was_shown_comes_back():
    recording, packets = Recording(), [packet(number) for number in range(40)]
    recording.add(packets[:20])
    recording.shown(9)
    recording.add(packets[20:])
    assert list(recording.packets()) == packets[:9]
    recording.shown(33)
    recording.shown(12)  # nobody takes back what was seen
    assert list(recording.packets()) == packets[:33] and len(recording) == 33
    recording.shown(1000)
    assert list(recording.packets()) == packets


def test_what_was_taken_back_is_not_in_it():
    recording, packets = Recording(), [packet(number) for number in range(30)]
    recording.add(packets[:20])
    recording.shown(10)
    recording.take_back(15)
    recording.add(packets[20:])
    recording.take_back(3)  # shown already: stays
    assert list(recording.packets()) == packets[:10]
    recording.add(packets[20:25])
    recording.shown(100)
    assert list(recording.packets()) == packets[:10] + packets[20:25]


def test_reading_while_it_grows():
    recording, packets = Recording(), [packet(number) for number in range(20)]
    recording.add(packets[:10])
    recording.shown(10)
    reader, found = recording.packets(), []
    for number in range(10, 20):
        found.append(next(reader))
        recording.add([packets[number]])
        recording.shown(number + 1)
    assert found == packets[:10] and list(recording.packets()) == packets


def test_it_has_an_end():
    recording = Recording(most=10_000)
    recording.add([Packet(bytes(4000), True)] * 5)
    recording.shown(1)
    assert not recording.full
    recording.shown(5)
    assert recording.full and len(recording) == 2
    recording.add([Packet(b"x", True)])
    recording.shown(9)
    assert len(list(recording.packets())) == 2
    recording.close()
    assert list(recording.packets()) == []

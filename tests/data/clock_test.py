"""Regular times from irregular ones."""

from __future__ import annotations

from fractions import Fraction

import pytest

from chameleon_jax.data import clock


def taken(times, interval, last_for=None) -> list[int]:
    frames = [(Fraction(time), index) for index, time in enumerate(times)]
    return list(clock.at_regular_times(frames, Fraction(interval), Fraction(last_for or interval)))


@pytest.mark.parametrize(
    ("times", "interval"),
    [
        ([0, 2, 4, 6], 2),
        ([0, 2, 4, 8, 10], 2),  # a lost frame
        ([0, 2, 4, 500, 502, 504], 2),  # a pause
        ([0, 41, 83, 125, 167], Fraction(167, 4)),  # rounded
        ([5, 5, 5], None),
        ([5], None),
    ],
)
def test_usual_interval(times, interval):
    assert clock.usual_interval([Fraction(time) for time in times]) == interval


@pytest.mark.parametrize(
    ("times", "interval", "expected"),
    [
        ([0, 1, 2, 3], 1, [0, 1, 2, 3]),
        ([7, 8, 9], 1, [0, 1, 2]),
        ([0, 1, 2, 3], 2, [0, 2]),
        ([0, 2, 4], 1, [0, 0, 1, 1, 2]),  # of two as near ones the earlier
        ([0, 1, 4, 5], 1, [0, 1, 1, 2, 2, 3]),
        ([0, "9/10", "21/10", 3], 1, [0, 1, 2, 3]),
        ([0, 1, 1, 2], 1, [0, 1, 3]),  # a time that stands still
        ([0, 1, "1/2", 2], 1, [0, 1, 3]),  # or goes back
        ([], 1, []),
    ],
)
def test_the_nearest_frame_is_taken(times, interval, expected):
    assert taken(times, interval, last_for=1) == expected


def test_frames_come_as_early_as_they_can():
    read = []

    def frames():
        for index in range(100):
            read.append(index)
            yield Fraction(index), index

    regular = clock.at_regular_times(frames(), Fraction(1), Fraction(1))
    assert [next(regular) for _ in range(5)] == [0, 1, 2, 3, 4]
    assert read == [0, 1, 2, 3, 4]


def test_regular_times_may_begin_between_frames():
    frames = [(Fraction(time), time) for time in range(6)]
    found = clock.at_regular_times(frames, Fraction(1), Fraction(1), first=Fraction(12, 5))
    assert list(found) == [2, 3, 4, 5]

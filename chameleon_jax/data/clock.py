"""From frames at any times to frames at regular times: phones and screen recorders write clips of
which no two frames are the same time apart.

Times are in seconds, as exact fractions.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from typing import TypeVar

Frame = TypeVar("Frame")


def usual_interval(times: Sequence[Fraction]) -> Fraction | None:
    """Time from one frame to the next, as it usually is: 1 / the rate of the clip.

    It is the mean of those intervals that differ from the median by at most half of it. So neither
    a pause, nor a lost frame, nor times that are rounded to milliseconds change it.

    Args:
      times: of all frames, in order.

    Returns:
      None if there are fewer than two different times.
    """
    steps = sorted(later - earlier for earlier, later in itertools.pairwise(times))
    steps = [step for step in steps if step > 0]
    if not steps:
        return None
    median = steps[len(steps) // 2]
    usual = [step for step in steps if abs(step - median) <= median / 2]
    return sum(usual, Fraction(0)) / len(usual)


def at_regular_times(
    frames: Iterable[tuple[Fraction, Frame]],
    interval: Fraction,
    last_for: Fraction,
    first: Fraction | None = None,
) -> Iterator[Frame]:
    """Of each regular time the frame that is nearest to it; of two, the earlier one.

    A frame may come several times or not at all. Frames that are regular already come once each.

    Args:
      frames: with their times; those whose time does not go on are left out.
      interval: between two regular times.
      last_for: how long the last frame is shown.
      first: of the regular times; None: that of the first frame.

    Yields:
      Frames, as soon as it is known that no later one is nearer.
    """
    before: tuple[Fraction, Frame] | None = None
    wanted = first
    for time, frame in frames:
        if wanted is None:
            wanted = time
        if before is not None and time <= before[0]:
            continue
        while wanted <= time:
            nearer = before is not None and wanted - before[0] <= time - wanted
            yield before[1] if nearer else frame
            wanted += interval
        before = (time, frame)
    while before is not None and wanted is not None and wanted < before[0] + last_for / 2:
        yield before[1]
        wanted += interval

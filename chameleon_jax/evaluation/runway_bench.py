"""The measures of Runway-Bench: a made video against the truth of its scenario.

`measure` gives plain numbers for one scenario, `summarize` their means over all scenarios with 95 %
intervals. What the judge reads is compared with what the judge reads of the truth or with exact
labels, never with what a person would say.

    garment    is the right one worn: type and pattern by the judge, colours by the pixels; never
               mind the frames right after a change, `SETTLE` of them
    wrong      share of frames after a change whose colours are nearer to the garment before
    person     the same one as on the reference, at the end
    kept       background and other clothes as in the truth
    jump       how much more the joints, the place of the head, the pixels of the background and of
               the head change at a change of garment than usually
    sharpness  of garment and head in the last chunk over the first one
    prompt     the gesture that is asked for, with that hand, and the side of a step

Axes: t frames, h w pixels, j joints.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from chameleon_jax.data.labels import BACKGROUND, CLOTHES, GARMENT, HEAD
from chameleon_jax.evaluation.intervals import Interval, interval
from chameleon_jax.evaluation.judge import Readings
from chameleon_jax.evaluation.metrics import palette, palette_distance, to_lab, unit
from chameleon_jax.evaluation.scenarios import Scenario, Truth, arm_poses
from chameleon_jax.runway import asset

SETTLE = 9  # frames after a change before a garment is judged
CHUNK = 12  # frames that are the first, and the last, of a video; or that are looked at in the end
USUAL = 12  # frames on each side of a change that say how much usually changes
# Palettes at most so far apart (CIELAB) are those of one garment. In the truth of 14 scenarios, one
# garment is at most 5.5 from itself at another time, 99 of 100 pairs of two garments at least 13.
COLOURS_RIGHT = 10.0

# What a change of garment is judged by.
OF_A_CHANGE = (
    "changed_type",
    "changed_pattern",
    "changed_colours",
    "changed_type_and_colours",
    "wrong_frames",
)

JUMPS = ("jump_joints", "jump_place", "jump_background", "jump_head")

Figures = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Made:
    """A video that a model made for a scenario.

    Attributes:
      video: uint8 [t, h, w, 3].
      seen: what the judge reads in it.
      starts: frame from which each garment is worn, 0 first: when a change really took effect.
    """

    video: np.ndarray
    seen: Readings
    starts: tuple[int, ...]


def measure(
    scenario: Scenario,
    truth: Truth,
    made: Made,
    reference: Readings,
    card: Mapping[str, object],
) -> Figures:
    """All figures of one scenario that it has.

    Args:
      scenario: what was asked for.
      truth: how it looks.
      made: what a model made of it.
      reference: what the judge reads in the picture of the person.
      card: of the judge, see `judge.check`.

    Raises:
      ValueError: the video has another length or size than the truth.
    """
    if made.video.shape != truth.video.shape:
        raise ValueError(f"video is {made.video.shape}; expected {truth.video.shape}")
    figures = garment_figures(scenario, truth, made)
    figures |= person_figures(made, reference, float(card["same_person"]))
    figures |= kept_figures(truth, made)
    figures |= sharpness_figures(made)
    figures |= prompt_figures(scenario, truth, made)
    return figures | _means([jump_figures(made, start) for start in made.starts[1:]])


def garment_figures(scenario: Scenario, truth: Truth, made: Made) -> Figures:
    """Whether each garment is the right one, in its last frames; `first_` and `changed_` apart."""
    found = []
    palettes = _palettes(scenario, truth)
    ends = (*made.starts[1:], len(made.video))
    for number, (start, end) in enumerate(zip(made.starts, ends, strict=True)):
        first = max(start, end - CHUNK)
        if number:
            first = max(first, min(start + SETTLE, end - 1))
        kind = "changed" if number else "first"
        right = _right(made, slice(first, end), truth.attributes[number], palettes[number])
        found.append({f"{kind}_{name}": value for name, value in right.items()})
        if number:
            settled = range(min(start + SETTLE, end - 1), end)
            share = _nearer(made, settled, palettes[number], palettes[number - 1])
            found.append({"wrong_frames": share})
    figures = _means(found)
    figures["first_garment_psnr"] = _region_psnr(
        truth.video[:SETTLE], made.video[:SETTLE], truth.labels[:SETTLE] == GARMENT
    )
    return figures


def _palettes(scenario: Scenario, truth: Truth) -> list[np.ndarray]:
    """The colours of each garment as it is worn in the truth, in its last frames."""
    found = []
    for start, end in zip(scenario.starts, (*scenario.starts[1:], len(truth.video)), strict=True):
        frames = slice(max(start, end - CHUNK), end)
        found.append(palette(truth.video[frames], truth.labels[frames] == GARMENT))
    return found


def _right(made: Made, frames: slice, attributes: np.ndarray, colours: np.ndarray) -> Figures:
    """Whether some frames show the garment of these attributes and this palette."""
    seen = made.seen.part(frames)
    type_ = seen.types.mean(0).argmax() == int(attributes[1])
    pattern = seen.patterns.mean(0).argmax() == int(attributes[2])
    worn = seen.labels == GARMENT
    distance = math.inf
    if worn.any():
        distance = palette_distance(palette(made.video[frames], worn), colours)
    colour = distance < COLOURS_RIGHT
    figures = {"type": type_, "pattern": pattern, "colours": colour}
    figures["type_and_colours"] = type_ and colour
    return {name: float(value) for name, value in figures.items()} | (
        {"colour_distance": distance} if worn.any() else {}
    )


def _nearer(made: Made, frames: Sequence[int], now: np.ndarray, before: np.ndarray) -> float:
    """Share of frames that show a garment whose palette is nearer to the one before."""
    found = []
    for t in frames:
        worn = made.seen.labels[t] == GARMENT
        shown = palette(made.video[t], worn) if worn.any() else now
        found.append(palette_distance(shown, before) < palette_distance(shown, now))
    return float(np.mean(found))


def person_figures(made: Made, reference: Readings, line: float) -> Figures:
    """Cosine between the last frames and the reference, and whether that is one person."""
    mean = made.seen.person[-CHUNK:].mean(0)
    cosine = float(mean @ reference.person[0] / max(np.linalg.norm(mean), 1e-6))
    return {"person_cosine": cosine, "person_same": float(cosine > line)}


def kept_figures(truth: Truth, made: Made) -> Figures:
    """What should not change with a garment, in the last frames.

    The background where both show it, in dB; and the distance of the mean colours of the other
    clothes.
    """
    last = slice(-CHUNK, None)
    both = (truth.labels[last] == BACKGROUND) & (made.seen.labels[last] == BACKGROUND)
    figures = {"background_psnr": _region_psnr(truth.video[last], made.video[last], both)}
    masks = truth.labels[last] == CLOTHES, made.seen.labels[last] == CLOTHES
    if min(mask.sum() for mask in masks) > 50:
        one, other = (
            to_lab(video[last][mask]).mean(0)
            for video, mask in zip((truth.video, made.video), masks, strict=True)
        )
        figures["clothes_distance"] = float(np.linalg.norm(one - other))
    return figures


def sharpness_figures(made: Made) -> Figures:
    """Mean gradient of garment and head in the last frames, over that in the first."""
    figures = {}
    for name, label in (("garment", GARMENT), ("head", HEAD)):
        first, last = (
            _gradient(made.video[part], made.seen.labels[part] == label)
            for part in (slice(0, CHUNK), slice(-CHUNK, None))
        )
        # A patterned garment after a plain one has more edges: only what is worn all the time.
        if first > 0 and (name == "head" or len(made.starts) == 1):
            figures[f"{name}_sharpness"] = last / first
    return figures


def jump_figures(made: Made, start: int) -> Figures:
    """How much changes from the frame before `start` to it, over what usually changes around it."""
    first, last = max(start - USUAL, 1), min(start + USUAL, len(made.video) - 1)
    around = [t for t in range(first, last) if abs(t - start) > 1]
    if not around:
        return {}
    frames = unit(made.video[first - 1 : last + 1])
    labels = made.seen.labels[first - 1 : last + 1]

    def change(t: int) -> tuple[float, ...]:
        i = t - (first - 1)
        difference = np.abs(frames[i] - frames[i - 1]).mean(-1)
        background = (labels[i] == BACKGROUND) & (labels[i - 1] == BACKGROUND)
        head = (labels[i] == HEAD) | (labels[i - 1] == HEAD)
        moved = np.linalg.norm(made.seen.joints[t] - made.seen.joints[t - 1], axis=-1)
        place, before = (_place(labels[j] == HEAD) for j in (i, i - 1))
        return (
            float(np.median(moved)),
            float(np.linalg.norm(place - before)),
            _mean(difference, background),
            _mean(difference, head),
        )

    usual = np.median([change(t) for t in around], axis=0)
    ratios = np.array(change(start)) / np.maximum(usual, (2e-4, 2e-4, 1e-3, 1e-3))
    return dict(zip(JUMPS, ratios.tolist(), strict=True))


def _place(mask: np.ndarray) -> np.ndarray:
    """The middle of a region, x and y as shares of width and height; NaN if it is empty."""
    if not mask.any():
        return np.full(2, math.nan)
    y, x = np.nonzero(mask)
    return np.array([x.mean() / mask.shape[1], y.mean() / mask.shape[0]])


def prompt_figures(scenario: Scenario, truth: Truth, made: Made) -> Figures:
    """Whether the arms do what the prompt says, and a shift of the weight goes to its side."""
    figures = {}
    bones = asset.load().bone
    asked, poses, frame = arm_poses(scenario)
    until = scenario.prompts[1][0] if len(scenario.prompts) > 1 else scenario.frames
    if frame + 4 < until:
        seen = made.seen.joints[frame - 4 : frame + 5].mean(0)
        arms = [bones[f"{name}.{side}"] for name in ("lowerarm01", "wrist") for side in "LR"]
        shoulders = [bones[f"upperarm01.{side}"] for side in "LR"]

        def layout(joints: np.ndarray) -> np.ndarray:
            return (joints[arms] - joints[shoulders].mean(0)).ravel()

        distances = {
            name: np.linalg.norm(layout(seen) - layout(joints)) for name, joints in poses.items()
        }
        figures["prompt_arms"] = float(min(distances, key=distances.__getitem__) == asked)
    if scenario.spec.motion.locomotion == "shift" and until > 32:
        root = bones["root"]
        true, found = (
            joints[26:33, root, 0].mean() - joints[:3, root, 0].mean()
            for joints in (truth.joints, made.seen.joints)
        )
        figures["prompt_side"] = float(
            np.sign(true) == np.sign(found) and abs(found) > 0.4 * abs(true)
        )
    return figures


def _means(figures: Sequence[Figures]) -> Figures:
    """Mean of each figure over those that have it."""
    names = dict.fromkeys(name for one in figures for name in one)
    return {name: float(np.mean([one[name] for one in figures if name in one])) for name in names}


def _region_psnr(a: np.ndarray, b: np.ndarray, mask: np.ndarray) -> float:
    if not mask.any():
        return math.nan
    error = np.square(unit(a)[mask] - unit(b)[mask]).mean()
    return float(-10 * np.log10(max(error, 1e-9)))


def _gradient(video: np.ndarray, mask: np.ndarray) -> float:
    """Mean absolute difference of neighbouring pixels of a region."""
    grey = unit(video).mean(-1)
    rows = _mean(np.abs(np.diff(grey, axis=1)), mask[:, 1:] & mask[:, :-1])
    columns = _mean(np.abs(np.diff(grey, axis=2)), mask[:, :, 1:] & mask[:, :, :-1])
    return rows + columns


def _mean(values: np.ndarray, mask: np.ndarray) -> float:
    return float(values[mask].mean()) if mask.any() else 0.0


def summarize(
    figures: Sequence[Figures], rng: np.random.Generator | None = None
) -> dict[str, Interval]:
    """Mean of each figure over the scenarios that have it, and its interval by the bootstrap."""
    rng = rng or np.random.default_rng(0)
    summary = {}
    for name in dict.fromkeys(key for one in figures for key in one):
        found = interval([one[name] for one in figures if name in one], rng)
        if found is not None:
            summary[name] = found
    return summary


def blind(truth: Mapping[str, Interval], unchanged: Mapping[str, Interval]) -> list[str]:
    """Figures of a change that do not tell the truth from the truth in the garment before.

    They say more about the judge than about a model, and are not used.

    Args:
      truth: summary of the truth.
      unchanged: of the truth in the garment of the start all the time.

    Returns:
      Those of `OF_A_CHANGE` whose intervals meet.
    """
    return [
        name
        for name in OF_A_CHANGE
        if name in truth
        and name in unchanged
        and truth[name].low <= unchanged[name].high
        and unchanged[name].low <= truth[name].high
    ]


def table(columns: Mapping[str, Mapping[str, Interval]], format_name: Callable[[str], str]) -> str:
    """Several summaries beside each other, as a Markdown table."""
    names = dict.fromkeys(name for column in columns.values() for name in column)
    lines = [
        f"| figure | {' | '.join(columns)} |",
        f"|---|{'---|' * len(columns)}",
    ]
    for name in names:
        cells = []
        for column in columns.values():
            one = column.get(name)
            text = "" if one is None else f"{one.mean:.3g} ({one.low:.3g} to {one.high:.3g})"
            cells.append(text)
        lines.append(f"| {format_name(name)} | {' | '.join(cells)} |")
    return "\n".join(lines)

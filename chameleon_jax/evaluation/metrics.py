"""Measures of frames: fidelity, motion, and the colour of a masked region.

Pure functions of NumPy arrays. Frames are uint8 in [0, 255] or float in [0, 1]; the two arrays of
a comparison may differ in form. Results are in units of full scale (1 is white), in decibels
(PSNR), or in CIELAB units (colours).

Axes: t pixel frames, h w pixels, 3 colours (sRGB). Leading axes may be more or none.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

# IEC 61966-2-1
_LINEAR_TO_XYZ = np.array(
    [
        (0.4124, 0.3576, 0.1805),
        (0.2126, 0.7152, 0.0722),
        (0.0193, 0.1192, 0.9505),
    ]
)
_WHITE = _LINEAR_TO_XYZ.sum(axis=1)  # D65
_DIRECTIONS, _QUANTILES = 16, 64  # of a palette


def unit(frames: np.ndarray) -> np.ndarray:
    """Frames as float64 in [0, 1].

    Raises:
      ValueError: for another dtype, or for floats outside [0, 1] by more than rounding, such as the
        model's [-1, 1].
    """
    frames = np.asarray(frames)
    if frames.dtype == np.uint8:
        return frames / 255.0
    if not np.issubdtype(frames.dtype, np.floating):
        raise ValueError(f"frames are {frames.dtype}; expected uint8 or float in [0, 1]")
    in_range = frames.size == 0 or (frames.min() >= -1e-3 and frames.max() <= 1 + 1e-3)
    if not in_range:  # NaN is not in range either
        raise ValueError(
            f"frames run from {frames.min():.3g} to {frames.max():.3g}; expected floats in [0, 1]"
        )
    return np.clip(frames.astype(np.float64), 0, 1)


def _pair(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both as `unit` gives them; a ValueError if their shapes differ."""
    a, b = unit(a), unit(b)
    if a.shape != b.shape:
        raise ValueError(f"frames of shape {a.shape} cannot be compared with {b.shape}")
    return a, b


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio over all pixels, -10 log10(mean (a - b)^2), in dB.

    Infinite if they are equal. This is the definition for finished frames; the VAE's loss computes
    its own inside a compiled step, from an error on the model's scale [-1, 1].

    Raises:
      ValueError: see `unit`, or the shapes differ.
    """
    a, b = _pair(a, b)
    error = np.mean((a - b) ** 2)
    return float("inf") if error == 0 else float(-10 * np.log10(error))


def psnr_per_frame(a_thw3: np.ndarray, b_thw3: np.ndarray) -> np.ndarray:
    """`psnr` of each frame, [t]."""
    return np.array([psnr(x, y) for x, y in zip(*_pair(a_thw3, b_thw3), strict=True)])


class Motion(NamedTuple):
    """How much a clip moves.

    Both are taken from the mean absolute difference of each frame to the one before, in units of
    full scale.
    """

    mean: float  # of all differences; 0 for a still picture
    least: float  # smallest difference: 0 if any frame repeats
    most: float  # largest difference: a cut or a flash
    jump: float  # `most` over the median: about 1 for smooth motion, large where a clip is cut
    still: float  # share of the differences that are below half a level of 255


def frame_differences(frames_thw3: np.ndarray, mask_thw: np.ndarray | None = None) -> np.ndarray:
    """Mean absolute difference of each frame to the one before, [t - 1].

    Args:
      frames_thw3: a clip of at least two frames.
      mask_thw: where to look, bool; a pixel counts if it is set in both frames. None looks
        everywhere.

    Returns:
      The differences; NaN where no pixel counts.

    Raises:
      ValueError: for fewer than two frames, or a mask of another size.
    """
    frames = unit(frames_thw3)
    if frames.ndim != 4 or len(frames) < 2:
        raise ValueError(
            f"frames have shape {frames.shape}; expected [t, h, w, 3] with t of at least 2"
        )
    change = np.abs(np.diff(frames, axis=0)).mean(axis=-1)
    if mask_thw is None:
        return change.mean(axis=(1, 2))
    mask = _mask(mask_thw, frames)
    both = mask[1:] & mask[:-1]
    count = both.sum(axis=(1, 2))
    return np.where(count > 0, (change * both).sum(axis=(1, 2)) / np.maximum(count, 1), np.nan)


def motion(frames_thw3: np.ndarray) -> Motion:
    """Statistics of the frame differences of a clip of at least two frames."""
    change = frame_differences(frames_thw3)
    median = float(np.median(change))
    most = float(change.max())
    if median > 0:
        jump = most / median
    else:
        jump = 1.0 if most == 0 else float("inf")
    return Motion(
        mean=float(change.mean()),
        least=float(change.min()),
        most=most,
        jump=jump,
        still=float(np.mean(change < 0.5 / 255)),
    )


def _mask(mask: np.ndarray, frames: np.ndarray) -> np.ndarray:
    """The mask as an array; a ValueError if it does not fit the frames."""
    mask = np.asarray(mask)
    if mask.dtype != bool or mask.shape != frames.shape[:-1]:
        raise ValueError(f"mask is {mask.dtype} {mask.shape}; expected bool {frames.shape[:-1]}")
    return mask


def to_lab(rgb: np.ndarray) -> np.ndarray:
    """sRGB (uint8, or float in [0, 1]) to CIELAB under D65 (CIE 15:2004).

    Equal distances look about equally different; 2.3 is just noticeable.

    Args:
      rgb: [..., 3].

    Returns:
      [..., 3]: L in [0, 100], a and b about [-110, 110].
    """
    x = unit(rgb)
    linear = np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
    ratio = linear @ _LINEAR_TO_XYZ.T / _WHITE
    f = np.where(ratio > (6 / 29) ** 3, np.cbrt(ratio), ratio / (3 * (6 / 29) ** 2) + 4 / 29)
    f_x, f_y, f_z = f[..., 0], f[..., 1], f[..., 2]
    return np.stack([116 * f_y - 16, 500 * (f_x - f_y), 200 * (f_y - f_z)], axis=-1)


def mean_colour(rgb: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Mean CIELAB colour of the pixels in a mask, [3].

    Args:
      rgb: picture or clip [..., h, w, 3].
      mask: bool [..., h, w], not empty.

    Raises:
      ValueError: if the mask is empty or of another size.
    """
    return to_lab(_masked(np.asarray(rgb), mask)).mean(axis=0)


def _masked(frames: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The pixels in a mask, [n, 3]; a ValueError if there is none."""
    mask = _mask(mask, frames)
    if not mask.any():
        raise ValueError("the mask is empty: there is no colour to measure")
    return frames[mask]


def colour_distance(a: np.ndarray, mask_a: np.ndarray, b: np.ndarray, mask_b: np.ndarray) -> float:
    """Distance of the mean colours of two masked regions in CIELAB (CIE 1976 delta E).

    It shows whether the right garment is worn: 0 for the same mean colour, 100 from black to white.
    The regions may differ in size.

    Raises:
      ValueError: a mask is empty or of another size than its picture.
    """
    return float(np.linalg.norm(mean_colour(a, mask_a) - mean_colour(b, mask_b)))


def palette(rgb: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The colours of a masked region, whatever their places, for `palette_distance`.

    Args:
      rgb: picture or clip [..., h, w, 3].
      mask: bool [..., h, w], not empty.

    Returns:
      Quantiles of the CIELAB colours along fixed directions, [quantiles, directions].

    Raises:
      ValueError: if the mask is empty or of another size.
    """
    along = to_lab(_masked(np.asarray(rgb), mask)) @ _directions().T
    return np.quantile(along, (np.arange(_QUANTILES) + 0.5) / _QUANTILES, axis=0)


def palette_distance(a: np.ndarray, b: np.ndarray) -> float:
    """How far the colours of one region have to be moved to be those of another, in CIELAB units.

    The sliced Wasserstein distance (Bonneel et al. 2015, section 3) of order 1, times two, so that
    colours that all differ by d are d apart. Unlike a mean it tells stripes from a plain mixture of
    their colours.

    Args:
      a, b: of two regions, see `palette`.
    """
    # The mean of |cos| over all directions of space is a half.
    return float(2 * np.abs(a - b).mean())


def _directions() -> np.ndarray:
    """Directions of CIELAB, evenly over half a sphere (a Fibonacci lattice), [n, 3]."""
    number = np.arange(_DIRECTIONS) + 0.5
    z = 1 - number / _DIRECTIONS
    angle = np.pi * (1 + 5**0.5) * number
    radius = np.sqrt(1 - z**2)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle), z], axis=-1)


def masked_colour_error(a: np.ndarray, b: np.ndarray, mask: np.ndarray) -> float:
    """Mean CIELAB distance pixel by pixel inside a mask, for frames that should be equal.

    Raises:
      ValueError: if the mask is empty, or anything is of another size.
    """
    a, b = _pair(a, b)
    difference = to_lab(_masked(a, mask)) - to_lab(_masked(b, mask))
    return float(np.linalg.norm(difference, axis=-1).mean())

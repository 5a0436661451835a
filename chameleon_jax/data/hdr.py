"""Frames of high dynamic range or wide gamut as ordinary BT.709 pictures.

Phones record in HLG or PQ with BT.2020 primaries, some in Display P3. Taken for BT.709 such frames
look grey and flat. Steps, all in light as a display emits it:

  1. code values to light: HLG with its OOTF for a display of 1000 cd/m2, PQ (both ITU-R BT.2100),
     or a display of ordinary range (ITU-R BT.1886, gamma 2.4)
  2. high range only: the tone curve of ITU-R BT.2390 (section "EETF") from 1000 to 203 cd/m2, the
     level of diffuse white (ITU-R BT.2408), by the largest of R, G and B, so that hues stay
  3. BT.2020 or P3 to BT.709 primaries; what lies outside of BT.709 is clipped
  4. light to code values of an ordinary display (BT.1886)

Everything that depends on one number is a table, so that a frame of 1920 x 1080 pixels takes about
a quarter of a second.
"""

from __future__ import annotations

import functools

import numpy as np

# Numbers of ITU-T H.273, as FFmpeg uses them.
UNKNOWN = 2
PQ, HLG = 16, 18  # transfer characteristics
BT709, BT2020, DISPLAY_P3 = 1, 9, 12  # primaries

PEAK = 1000.0  # cd/m2, of the clip; what is brighter is shown as bright as this
WHITE = 203.0  # cd/m2, of the ordinary picture
GAMMA = 2.4
CODES = 2**16

# Chromaticities (x, y) of red, green and blue; white is D65 for all.
CHROMATICITIES = {
    BT709: ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06)),
    BT2020: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),
    DISPLAY_P3: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
}
D65 = (0.3127, 0.3290)
LUMINANCE = np.array((0.2627, 0.6780, 0.0593), np.float32)  # of BT.2020 red, green, blue


def needs_conversion(transfer: int, primaries: int) -> bool:
    """Whether frames tagged so are no ordinary BT.709 pictures."""
    return transfer in (PQ, HLG) or primaries in (BT2020, DISPLAY_P3)


def to_bt709(rgb: np.ndarray, transfer: int, primaries: int) -> np.ndarray:
    """Frames as an ordinary display shows them.

    Args:
      rgb: uint16 [..., 3], full range, as coded.
      transfer, primaries: their tags; of a clip of high range without primaries BT.2020 is assumed.

    Returns:
      uint8 [..., 3].
    """
    if primaries == UNKNOWN and transfer in (PQ, HLG):
        primaries = BT2020
    light = _light(rgb, transfer)
    if primaries in (BT2020, DISPLAY_P3):
        light = light @ _to_bt709_primaries(primaries).T
    return _encoded()[_index(light)]


def _light(rgb: np.ndarray, transfer: int) -> np.ndarray:
    """Light of the ordinary picture, float32 [..., 3]: 1 is white; still in the clip's primaries.

    For PQ the tone curve follows from the largest code value at once. The OOTF of HLG multiplies
    all three by a power of the luminance, so that there the largest light has to be known first.
    """
    if transfer == PQ:
        light = _pq_light()[rgb]
        return light * _pq_gain()[rgb.max(-1, keepdims=True)]
    if transfer == HLG:
        scene = _hlg_scene()[rgb]
        ootf = _hlg_ootf()[_index(scene @ LUMINANCE)][..., None]
        largest = scene.max(-1, keepdims=True) * ootf
        return scene * ootf * (PEAK / WHITE) * _peak_gain()[_index(largest)]
    return _sdr_light()[rgb]


def tone_curve(light: np.ndarray, peak: float = PEAK, white: float = WHITE) -> np.ndarray:
    """The EETF of ITU-R BT.2390, black staying black: light in and out, in cd/m2."""
    top = _pq_encode(np.float64(peak))
    value = _pq_encode(np.minimum(light, peak)) / top
    most = _pq_encode(np.float64(white)) / top
    knee = 1.5 * most - 0.5
    t = np.maximum(value - knee, 0) / (1 - knee)
    spline = (
        (2 * t**3 - 3 * t**2 + 1) * knee
        + (t**3 - 2 * t**2 + t) * (1 - knee)
        + (-2 * t**3 + 3 * t**2) * most
    )
    return _pq_decode(np.where(value < knee, value, spline) * top)


def _pq_decode(value: np.ndarray) -> np.ndarray:
    """EOTF of BT.2100 PQ: code values in [0, 1] to cd/m2."""
    m1, m2 = 2610 / 16384, 2523 / 4096 * 128
    c1, c2, c3 = 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32
    root = np.asarray(value, np.float64) ** (1 / m2)
    return 10000 * (np.maximum(root - c1, 0) / (c2 - c3 * root)) ** (1 / m1)


def _pq_encode(light: np.ndarray) -> np.ndarray:
    """The inverse of `_pq_decode`."""
    m1, m2 = 2610 / 16384, 2523 / 4096 * 128
    c1, c2, c3 = 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32
    power = (np.asarray(light, np.float64) / 10000) ** m1
    return ((c1 + c2 * power) / (1 + c3 * power)) ** m2


def _hlg_inverse(value: np.ndarray) -> np.ndarray:
    """Inverse OETF of BT.2100 HLG: code values in [0, 1] to light of the scene in [0, 1]."""
    a = 0.17883277
    b, c = 1 - 4 * a, 0.5 - a * np.log(4 * a)
    return np.where(value <= 0.5, value**2 / 3, (np.exp((value - c) / a) + b) / 12)


def _index(x: np.ndarray) -> np.ndarray:
    """Places in a table whose entries stand for equal steps of the root of [0, 1], clipped."""
    return (np.sqrt(np.clip(x, 0, 1)) * (CODES - 1) + 0.5).astype(np.uint16)


@functools.cache
def _roots() -> np.ndarray:
    """What the entries of such a table stand for."""
    return (np.arange(CODES) / (CODES - 1)) ** 2


@functools.cache
def _codes() -> np.ndarray:
    """What code values of 16 bits stand for."""
    return np.arange(CODES) / (CODES - 1)


@functools.cache
def _pq_light() -> np.ndarray:
    return (_pq_decode(_codes()) / WHITE).astype(np.float32)


@functools.cache
def _pq_gain() -> np.ndarray:
    return _gain(_pq_decode(_codes()))


@functools.cache
def _hlg_scene() -> np.ndarray:
    return _hlg_inverse(_codes()).astype(np.float32)


@functools.cache
def _hlg_ootf() -> np.ndarray:
    """Y^(gamma - 1) with the system gamma 1.2 of a display of 1000 cd/m2, in a table of roots."""
    return (_roots() ** 0.2).astype(np.float32)


@functools.cache
def _peak_gain() -> np.ndarray:
    return _gain(PEAK * _roots())


@functools.cache
def _sdr_light() -> np.ndarray:
    return (_codes() ** GAMMA).astype(np.float32)


@functools.cache
def _encoded() -> np.ndarray:
    return (255 * _roots() ** (1 / GAMMA)).round().astype(np.uint8)


def _gain(light: np.ndarray) -> np.ndarray:
    """By what the tone curve multiplies light; float32."""
    return (tone_curve(light) / np.maximum(light, 1e-6)).astype(np.float32)


@functools.cache
def _to_bt709_primaries(primaries: int) -> np.ndarray:
    """Matrix from light in some primaries to light in those of BT.709, float32 [3, 3]."""
    return (np.linalg.inv(_to_xyz(BT709)) @ _to_xyz(primaries)).astype(np.float32)


def _to_xyz(primaries: int) -> np.ndarray:
    """Matrix from light to CIE XYZ, float64 [3, 3] (SMPTE RP 177): white is (1, 1, 1)."""
    colours = np.array([_xyz(*chromaticity) for chromaticity in CHROMATICITIES[primaries]]).T
    return colours * np.linalg.solve(colours, _xyz(*D65))


def _xyz(x: float, y: float) -> np.ndarray:
    return np.array((x / y, 1.0, (1 - x - y) / y))

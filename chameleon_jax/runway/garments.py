"""What a garment is: a plain record that can be drawn, named, compared and stored as JSON.

Colours, pattern and type alone make about 10^5 different garments. One in twenty combinations of
type, pattern and main colour is held out: validation clips may contain it, training clips never do.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from chameleon_jax.runway import patterns, prints
from chameleon_jax.runway.colours import GARMENT_COLOURS, luma
from chameleon_jax.runway.worlds import World

SLOTS = ("top", "bottom", "dress", "outer")
HELD_OUT_SHARE = 0.05
SKIRTS = ("midi_skirt", "mini_skirt", "pleated_skirt", "maxi_skirt")
BUTTONED = ("shirt", "polo", "shirt_dress")


@dataclasses.dataclass(frozen=True)
class GarmentType:
    """The name of a type, how often it is drawn within its slot, and what it may look like.

    Attributes:
      slot, noun: where it is worn, and its name.
      share: relative frequency.
      sleeves: ranges of the sleeve's length as a share of the arm, one is drawn; (0, 0) is
        sleeveless.
      necks: necklines, one is drawn.
      patterned: whether it can have a pattern.
      printable: whether a plain one can have a print.
      plural: whether the noun is plural, and has no article.
    """

    slot: str
    noun: str
    share: float
    sleeves: tuple[tuple[float, float], ...] = ((0.0, 0.0),)
    necks: tuple[str, ...] = ("crew",)
    patterned: bool = True
    printable: bool = False
    plural: bool = False


_ROUND = ("crew", "crew", "v", "scoop", "boat")
TYPES: dict[str, GarmentType] = {
    "tshirt": GarmentType("top", "T-shirt", 2, ((0.28, 0.42),), _ROUND, printable=True),
    "long_sleeve": GarmentType("top", "long-sleeve top", 1, ((0.9, 0.98),), _ROUND, printable=True),
    "tank": GarmentType("top", "tank top", 1, ((0, 0),), ("scoop", "square"), printable=True),
    "shirt": GarmentType("top", "shirt", 1, ((0.97, 0.97), (0.34, 0.34), (0.62, 0.62)), ("v",)),
    "sweater": GarmentType("top", "sweater", 1, ((0.99, 0.99),), _ROUND, printable=True),
    "hoodie": GarmentType("top", "sweatshirt", 1, ((1.0, 1.0),), ("crew",), printable=True),
    "polo": GarmentType("top", "polo shirt", 1, ((0.3, 0.4),), ("v",)),
    "turtleneck": GarmentType("top", "turtleneck", 1, ((0.99, 0.99),), ("turtle",)),
    "blouse": GarmentType(
        "top", "blouse", 1, ((0.2, 0.2), (0.55, 0.55), (0.95, 0.95)), ("v", "boat", "scoop")
    ),
    "sundress": GarmentType("dress", "sleeveless dress", 1, ((0, 0),), ("scoop", "square", "v")),
    "tshirt_dress": GarmentType("dress", "T-shirt dress", 1, ((0.2, 0.4),), _ROUND, printable=True),
    "long_dress": GarmentType("dress", "long dress", 1, ((0.95, 0.95), (0.5, 0.5)), _ROUND),
    "shirt_dress": GarmentType("dress", "shirt dress", 1, ((0.35, 0.35), (0.95, 0.95)), ("v",)),
    "jacket": GarmentType("outer", "open jacket", 1, ((1.0, 1.0),), ("v",)),
    "cardigan": GarmentType("outer", "open cardigan", 1, ((1.0, 1.0),), ("v",)),
    "jeans": GarmentType("bottom", "jeans", 2.0, patterned=False, plural=True),
    "trousers": GarmentType("bottom", "trousers", 1.7, plural=True),
    "shorts": GarmentType("bottom", "shorts", 1.4, plural=True),
    "joggers": GarmentType("bottom", "joggers", 0.8, patterned=False, plural=True),
    "wide_trousers": GarmentType("bottom", "wide-leg trousers", 1.0, plural=True),
    "leggings": GarmentType("bottom", "leggings", 0.4, patterned=False, plural=True),
    "midi_skirt": GarmentType("bottom", "midi skirt", 1.0),
    "mini_skirt": GarmentType("bottom", "mini skirt", 0.8),
    "pleated_skirt": GarmentType("bottom", "pleated skirt", 1.0),
    "maxi_skirt": GarmentType("bottom", "maxi skirt", 0.5),
}
# Shares of the patterns, for legs and for everything else, in the order of patterns.NAMES.
_TROUSER_SHARES = (0.62, 0.0, 0.12, 0.05, 0.10, 0.0, 0.0, 0.0, 0.0, 0.0, 0.06, 0.05)
_CLOTH_SHARES = (0.28, 0.16, 0.08, 0.08, 0.09, 0.09, 0.04, 0.05, 0.04, 0.06, 0.02, 0.01)
# Lengths after which a pattern repeats, in metres; none below 3 cm, which would vanish in small
# pictures.
_PERIODS = {
    "plain": (0.05,),
    "horizontal stripes": (0.045, 0.06, 0.08, 0.11),
    "vertical stripes": (0.045, 0.06, 0.08),
    "gingham": (0.04, 0.05, 0.07),
    "tartan": (0.09, 0.12, 0.16),
    "polka dots": (0.05, 0.065, 0.09),
    "diagonal stripes": (0.07, 0.09),
    "zigzag": (0.08, 0.10),
    "argyle": (0.11, 0.13),
    "floral": (0.08, 0.10, 0.14),
    "camouflage": (0.12, 0.15),
    "houndstooth": (0.05, 0.06),
}
_DENIM = ("navy", "blue", "sky blue", "black", "grey")
_KNITTED = ("plain", "horizontal stripes", "argyle", "zigzag")
_BLOCKABLE = ("tshirt", "long_sleeve", "sweater", "hoodie", "tank")
_BANDED = ("tshirt", "long_sleeve", "sweater", "polo")
# Share of trousers with a stripe down the side, by type.
_SIDE_STRIPE_SHARES = {"joggers": 0.6, "trousers": 0.15, "shorts": 0.2, "wide_trousers": 0.15}
# How the pattern is called in a description.
_ADJECTIVES = {
    "plain": "",
    "horizontal stripes": "horizontally striped",
    "vertical stripes": "vertically striped",
    "gingham": "gingham",
    "tartan": "tartan",
    "polka dots": "polka dot",
    "diagonal stripes": "diagonally striped",
    "zigzag": "zigzag",
    "argyle": "argyle",
    "floral": "floral",
    "camouflage": "camouflage",
    "houndstooth": "houndstooth",
}
_BLOCK_ADJECTIVES = {"block": "colour-block", "ombre": "ombre"}


@dataclasses.dataclass(frozen=True)
class GarmentSpec:
    """One garment. Shares and strengths are in [0, 1] unless a unit is given.

    Attributes:
      slot, type: see `TYPES`.
      colours: main, second, third and accent colour, names from `colours.GARMENT_COLOURS`.
      pattern, period, duty: name from `patterns.NAMES`, metres, share of the second colour.
      print, print_size: motif from `prints.NAMES` or "", half its height in metres.
      sleeve, neck, neck_depth: length as a share of the arm, shape, and how deep within what the
        shape allows.
      length, fit: short to long and tight to loose, within what the type allows.
      contrast_trim, hem_trim: collars and cuffs in the accent colour; a band at the hem.
      raglan: sleeves in the third colour.
      chest_band: stripes only across the chest.
      block, block_height: "", "block" (two halves) or "ombre", and where the change is.
      rib, pocket, side_stripe, buckle: details.
      belt: "", "tone" or "contrast".
      open_width: how far an outer garment is open.
      flare, pleats, pleat_depth: shape of a skirt.
      sheen: from dull to satin.
      seed: folds and random patterns.
    """

    slot: str
    type: str
    colours: tuple[str, str, str, str]
    pattern: str
    period: float
    duty: float
    print: str
    print_size: float
    sleeve: float
    neck: str
    neck_depth: float
    length: float
    fit: float
    contrast_trim: bool
    hem_trim: bool
    raglan: bool
    chest_band: bool
    block: str
    block_height: float
    rib: bool
    pocket: bool
    side_stripe: bool
    belt: str
    buckle: bool
    open_width: float
    flare: float
    pleats: int
    pleat_depth: float
    sheen: float
    seed: int

    def __repr__(self) -> str:
        return f"GarmentSpec({self.slot}, {describe(self, article=False)!r}, seed={self.seed})"

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> GarmentSpec:
        """Inverse of `dataclasses.asdict`."""
        fields = dict(values)
        fields["colours"] = tuple(fields["colours"])
        return cls(**fields)


def belongs_to(garment: GarmentSpec, world: World) -> bool:
    """Whether a world has garments of this type and pattern."""
    types, known = world.types.get(garment.slot), world.patterns.get(garment.slot)
    fine = garment.pattern != "plain" and garment.period < world.least_period
    return (
        (types is None or garment.type in types)
        and (known is None or garment.pattern in known)
        and not fine
    )


def held_out(garment: GarmentSpec) -> bool:
    """Whether the combination of type, pattern and main colour is kept for validation."""
    key = f"{garment.type}|{garment.pattern}|{garment.colours[0]}"
    number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")
    return number < HELD_OUT_SHARE * 2**64


def sample_garment(
    rng: np.random.Generator,
    slot: str,
    skirts: float = 0.5,
    accept: Callable[[GarmentSpec], bool] | None = None,
) -> GarmentSpec:
    """Draw a garment.

    Args:
      rng: source of randomness.
      slot: one of `SLOTS`.
      skirts: factor on the share of skirts among the bottoms.
      accept: draw again until it returns True.

    Raises:
      ValueError: there is no such slot.
    """
    if slot not in SLOTS:
        raise ValueError(f"slot is {slot!r}; expected one of {', '.join(SLOTS)}")
    while True:
        garment = _draw(rng, slot, skirts)
        if accept is None or accept(garment):
            return garment


def _draw(rng: np.random.Generator, slot: str, skirts: float) -> GarmentSpec:
    names = [name for name, kind in TYPES.items() if kind.slot == slot]
    weights = [TYPES[name].share * (skirts if name in SKIRTS else 1.0) for name in names]
    name = str(rng.choice(names, p=np.array(weights) / sum(weights)))
    kind = TYPES[name]

    shares = _TROUSER_SHARES if slot == "bottom" and name not in SKIRTS else _CLOTH_SHARES
    pattern = str(rng.choice(patterns.NAMES, p=shares))
    knitted = str(rng.choice(_KNITTED, p=(0.5, 0.3, 0.1, 0.1)))
    if not kind.patterned:
        pattern = "plain"
    elif name in ("sweater", "hoodie") and pattern not in _KNITTED:
        pattern = knitted
    plain = pattern == "plain"

    low, high = kind.sleeves[int(rng.integers(len(kind.sleeves)))]
    sleeve = float(rng.uniform(low, high))
    neck = str(rng.choice(kind.necks))
    motif = str(rng.choice(prints.NAMES))
    has_print = bool(rng.random() < 0.6) and plain and kind.printable
    block = str(rng.choice(["", "block", "ombre"], p=[0.62, 0.28, 0.10]))
    blockable = plain and not has_print and (slot == "dress" or name in _BLOCKABLE)
    side_stripe_share = _SIDE_STRIPE_SHARES.get(name, 0.0)
    u = rng.random(12)
    return GarmentSpec(
        slot=slot,
        type=name,
        colours=_draw_colours(rng, name),
        pattern=pattern,
        period=float(rng.choice(_PERIODS[pattern])),
        duty=float(rng.choice([0.35, 0.5, 0.5, 0.25])),
        print=motif if has_print else "",
        print_size=round(float(rng.uniform(0.06, 0.10)), 4),
        sleeve=round(sleeve, 4),
        neck=neck,
        neck_depth=round(float(u[0]), 4),
        length=round(float(u[1]), 4),
        fit=round(float(u[2]), 4),
        contrast_trim=bool(u[3] < 0.38),
        hem_trim=bool(u[4] < 0.28),
        raglan=bool(u[5] < 0.18) and plain and name in ("tshirt", "long_sleeve", "hoodie"),
        chest_band=bool(u[6] < 0.3) and pattern == "horizontal stripes" and name in _BANDED,
        block=block if blockable else "",
        block_height=round(float(u[7]), 4),
        rib=bool(u[8] < 0.5) and plain and name in ("sweater", "turtleneck", "cardigan"),
        pocket=bool(u[9] < 0.5),
        side_stripe=bool(u[10] < side_stripe_share),
        belt=str(rng.choice(["", "tone", "contrast"], p=[0.4, 0.25, 0.35])),
        buckle=bool(u[11] < 0.5),
        open_width=round(float(rng.random()), 4),
        flare=round(float(rng.random()), 4),
        pleats=int(rng.integers(5, 12)),
        pleat_depth=round(float(rng.random()), 4),
        sheen=round(float(rng.random()), 4),
        seed=int(rng.integers(1 << 30)),
    )


def _draw_colours(rng: np.random.Generator, name: str) -> tuple[str, str, str, str]:
    """Main, second, third and accent; brightness of the second and the accent differs from main."""
    every_colour = list(GARMENT_COLOURS)
    main = str(rng.choice(_DENIM if name == "jeans" else every_colour))

    def draw(contrast: float) -> str:
        """A colour whose brightness differs from that of the main one by `contrast` or more."""
        fitting = [c for c in every_colour if abs(luma(c) - luma(main)) >= contrast]
        return str(rng.choice(fitting))

    second, third, accent = draw(45), draw(0), draw(40)
    return main, second, third, accent


def describe(garment: GarmentSpec, article: bool = True) -> str:
    """A noun phrase, for example "a coral and green floral long dress" or "navy jeans"."""
    kind = TYPES[garment.type]
    main, second, _, accent = garment.colours
    if garment.block:
        adjective = _BLOCK_ADJECTIVES[garment.block]
    else:
        adjective = _ADJECTIVES[garment.pattern]
    two_coloured = garment.pattern != "plain" or garment.block
    colour = f"{main} and {second}" if two_coloured else main
    phrase = " ".join(word for word in (colour, adjective, kind.noun) if word)
    if garment.print:
        phrase += f" with {indefinite(f'{accent} {garment.print} print')}"
    return indefinite(phrase) if article and not kind.plural else phrase


def indefinite(phrase: str) -> str:
    """The phrase with "a" or "an" before it."""
    article = "an" if phrase[0].lower() in "aeiou" else "a"
    return f"{article} {phrase}"

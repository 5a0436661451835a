"""From the record of a garment to its meshes and its look.

Says which cut each type has, and where collars and pockets are. Lengths are for a person of 1.72 m;
`fit.size` scales them.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from chameleon_jax.runway import colours, looks, parts, patterns, prints
from chameleon_jax.runway.drape import (
    LEG_RADIUS,
    SKIRT_RADIUS,
    SLEEVE_RADIUS,
    ClothMesh,
    SkirtCut,
    Styling,
    TopCut,
    TrouserCut,
    make_skirt,
    make_top,
    make_trousers,
)
from chameleon_jax.runway.garments import BUTTONED, SKIRTS, GarmentSpec
from chameleon_jax.runway.measure import Fit
from chameleon_jax.runway.parts import FAR, HEM

# Neckline: depth, how much deeper it may be, width.
_NECKS = {
    "crew": (0.030, 0.0, 0.072),
    "turtle": (0.030, 0.0, 0.072),
    "v": (0.10, 0.05, 0.075),
    "scoop": (0.075, 0.035, 0.085),
    "boat": (0.012, 0.0, 0.115),
    "square": (0.08, 0.0, 0.08),
}
_COLLARED_NECK = (0.052, 0.0, 0.064)
_EVERYWHERE = 9.0  # a height that no garment reaches
# Shift across, in periods, that makes a pattern symmetric about the centre line; vertical stripes
# need half of their duty.
_PATTERN_SHIFTS = {"gingham": 0.25, "tartan": 0.21, "argyle": 0.5}
# Flare of a skirt in metres per metre: the least, and how much more it may be.
_SKIRT_FLARES = {
    "midi_skirt": (0.04, 0.12),
    "mini_skirt": (0.05, 0.20),
    "pleated_skirt": (0.28, 0.15),
    "maxi_skirt": (0.16, 0.14),
}
_LIGHT_BUTTONS, _DARK_BELT, _BROWN_BELT = (235, 235, 230), (24, 24, 26), (120, 80, 48)
_GOLD_BUCKLE, _STEEL_BUCKLE = (214, 180, 90), (190, 180, 150)


def make_garment(
    fit: Fit, garment: GarmentSpec, styling: Styling
) -> tuple[list[ClothMesh], np.ndarray]:
    """Cut a garment for a person.

    Args:
      fit: the person's measurements.
      garment: what to make.
      styling: how the outfit is worn.

    Returns:
      Meshes in the rest pose, and one `looks.CLOTH` record.
    """
    rng = np.random.default_rng(garment.seed)
    if garment.slot in ("top", "outer"):
        return _top(fit, garment, styling, rng)
    if garment.slot == "dress":
        return _dress(fit, garment, rng)
    if garment.type in SKIRTS:
        return _skirt(fit, garment, styling, rng)
    return _trousers(fit, garment, styling, rng)


def _look(fit: Fit, garment: GarmentSpec) -> np.ndarray:
    """The part of the look that does not depend on the type."""
    main, second, third, accent = (colours.garment(name) for name in garment.colours)
    if garment.pattern == "vertical stripes":
        shift = 0.5 * garment.duty
    else:
        shift = _PATTERN_SHIFTS.get(garment.pattern, 0.0)
    return looks.record(
        looks.CLOTH,
        main=main,
        second=second,
        third=third,
        block=second,
        stripe=accent,
        button=accent,
        print_colour=accent,
        shine=0.03,
        gloss=12,
        pattern=patterns.NAMES.index(garment.pattern),
        period=garment.period,
        duty=garment.duty,
        pattern_seed=garment.seed % 1000,
        pattern_u=garment.period * shift,
        trim=accent if garment.contrast_trim else 0.82 * main,
        print=prints.NAMES.index(garment.print) if garment.print else -1,
        print_v=fit.chest - fit.waist - 0.01,
        print_size=garment.print_size * fit.size,
        sleeves=garment.sleeve > 0,
        sleeve_radius=SLEEVE_RADIUS * fit.size,
        wrap_radius=SKIRT_RADIUS * fit.size,
    )


def _neck(garment: GarmentSpec) -> tuple[float, float]:
    """Depth and width of the neckline."""
    depth, deeper, width = _COLLARED_NECK if garment.type in BUTTONED else _NECKS[garment.neck]
    return depth + deeper * garment.neck_depth, width


def _top(
    fit: Fit, garment: GarmentSpec, styling: Styling, rng: np.random.Generator
) -> tuple[list[ClothMesh], np.ndarray]:
    size, fit_share, kind = fit.size, garment.fit, garment.type
    outer = garment.slot == "outer"
    depth, width = _neck(garment)
    cut = TopCut(
        sleeve=garment.sleeve,
        hem=fit.crotch + (0.055 + 0.085 * garment.length) * size,
        ease=0.008 + 0.016 * fit_share,
        taper=0.30 - 0.24 * fit_share,
        neck=garment.neck,
        neck_depth=depth,
        neck_width=width,
        sleeve_flare=0.006 + 0.016 * fit_share,
        folds=0.0022 + 0.0016 * fit_share,
    )
    look = _look(fit, garment)
    change: dict[str, float] = {}
    chest = fit.chest - fit.waist
    if kind == "tank":
        change = {"ease": 0.006 + 0.006 * fit_share, "taper": 0.35}
        look["neck_trim"] = look["cuff_trim"] = 0.012
    elif kind in ("tshirt", "long_sleeve"):
        look["neck_trim"] = 0.016
        if kind == "long_sleeve":
            change = {"ease": 0.007 + 0.008 * fit_share, "sleeve_flare": 0.0}
    elif kind == "polo":
        look["neck_trim"], look["cuff_trim"], look["placket"] = 0.028, 0.02, 0.014
        look["buttoned"] = 1
        look["button_low"] = fit.neck - 0.16 - fit.waist
        look["button_high"] = chest + 0.3
    elif kind == "shirt":
        change = {"sleeve_flare": 0.006}
        look["neck_trim"] = 0.026
        look["cuff_trim"] = 0.045 if garment.sleeve > 0.5 else 0.02
        _button_all_the_way(look, garment)
        if garment.pocket:
            _pockets(look, u=0.075, v=chest + 0.02, width=0.042, height=0.05)
    elif kind in ("sweater", "turtleneck"):
        change = {"ease": 0.012 + 0.016 * fit_share, "sleeve_flare": 0.002, "folds": 0.003}
        look["neck_trim"], look["hem_trim"], look["cuff_trim"] = 0.022, 0.045, 0.045
        look["grain"], look["rib"] = 0.35, garment.rib
    elif kind == "hoodie":
        change = {"ease": 0.022 + 0.012 * fit_share, "sleeve_flare": 0.004, "folds": 0.0036}
        look["neck_trim"], look["hem_trim"], look["cuff_trim"] = 0.03, 0.05, 0.05
        _pockets(look, u=0.0, v=-0.02 * size, width=0.105, height=0.075)
    elif kind == "blouse":
        change = {"ease": 0.012, "sleeve_flare": 0.03 * garment.flare}
        look["shine"], look["gloss"] = 0.05 + 0.1 * garment.sheen, 18
    elif outer:
        change = {
            "ease": 0.010 + 0.010 * fit_share,
            "sleeve_flare": 0.004 + 0.006 * fit_share,
            "opening": 0.03 + 0.05 * garment.open_width,
            "neck_depth": 0.16,
            "neck_width": 0.085,
            "hem": fit.crotch + (0.045 + 0.04 * garment.length) * size,
        }
        look["cuff_trim"] = 0.03
        _pockets(look, u=0.10, v=-0.06 * size, width=0.05, height=0.012)
        if kind == "cardigan":
            look["neck_trim"] = 0.018
            look["grain"], look["rib"] = 0.35, garment.rib
        else:
            look["neck_trim"] = 0.03
            look["hem_trim"] = 0.04
            look["shine"] = 0.12 if garment.sheen > 0.6 else 0.03
    if garment.hem_trim and kind in ("tshirt", "long_sleeve", "blouse"):
        look["hem_trim"] = 0.025
    look["raglan"] = garment.raglan
    if garment.chest_band:
        look["banded"], look["band_low"], look["band_high"] = 1, chest - 0.10, chest + 0.06
    if garment.block:
        look["blocked"], look["block_v"] = 1, chest - 0.06 - 0.1 * garment.block_height
        look["block_soft"] = 0.06 if garment.block == "ombre" else 0.0

    if outer:
        change["extra"] = 0.020
    else:
        if styling.tucked:
            change |= {"tucked": True, "extra": 0.0, "hem": fit.waist - 0.10 * size}
        else:
            change |= {"over_bottom": True, "extra": 0.004}
        if styling.layered:  # slim, to fit under an outer garment
            change["ease"] = min(change.get("ease", cut.ease), 0.010)
            change["sleeve_flare"] = 0.0
    cut = dataclasses.replace(cut, **change)
    return [make_top(fit, cut, rng, parts.SLOTS[garment.slot])], look


def _dress(
    fit: Fit, garment: GarmentSpec, rng: np.random.Generator
) -> tuple[list[ClothMesh], np.ndarray]:
    size, kind, length = fit.size, garment.type, garment.length
    hems = {
        "sundress": fit.knee + 0.12 * size * (1 - length) + 0.03,
        "tshirt_dress": fit.knee + 0.14 * size * (1 - 0.6 * length),
        "long_dress": fit.ankle + 0.08 * size + 0.2 * size * (1 - length),
        "shirt_dress": fit.knee + 0.10 * size * (1 - length),
    }
    depth, width = _neck(garment)
    ease = 0.006 + 0.01 * garment.fit
    upper = TopCut(
        sleeve=garment.sleeve,
        hem=fit.waist - 0.03 * size,
        ease=ease,
        taper=0.45 - 0.2 * garment.fit,
        neck=garment.neck,
        neck_depth=depth,
        neck_width=width,
        sleeve_flare=0.012,
        folds=0.0018,
    )
    if kind == "tshirt_dress":
        flare = 0.05
    elif garment.flare < 1 / 3:
        flare = 0.10
    elif garment.flare < 2 / 3:
        flare = 0.22
    else:
        flare = 0.38
    waist = fit.waist + 0.015 * size
    lower = SkirtCut(
        waist=waist,
        hem=hems[kind],
        ease=ease + 0.004,
        flare=flare,
        flare_from=waist - 0.06 * size,
        pleats=garment.pleats,
        pleat_depth=0.006 + 0.016 * garment.pleat_depth,
    )
    bodice = make_top(fit, upper, rng, parts.DRESS)
    bodice.attributes[:, HEM] = FAR  # no seam where the skirt begins
    skirt = make_skirt(fit, lower, rng, parts.DRESS, waistband=False)

    look = _look(fit, garment)
    look["shine"], look["gloss"] = 0.10 * garment.sheen, 16
    if garment.belt:
        look["belt_width"] = 0.016 + 0.014 * garment.block_height
        look["belt"] = look["third"] if garment.belt == "contrast" else 0.6 * look["main"]
        look["buckled"], look["buckle"] = garment.buckle, colours.linear(_GOLD_BUCKLE)
    if kind == "shirt_dress":
        look["neck_trim"] = 0.026
        _button_all_the_way(look, garment)
    elif kind == "sundress":
        look["neck_trim"] = look["cuff_trim"] = 0.010
    if garment.hem_trim:
        look["hem_trim"] = 0.03
    if garment.block:
        look["blocked"] = look["block_sleeves"] = 1
        look["block_soft"] = 0.12 if garment.block == "ombre" else 0.0
    return [bodice, skirt], look


def _skirt(
    fit: Fit, garment: GarmentSpec, styling: Styling, rng: np.random.Generator
) -> tuple[list[ClothMesh], np.ndarray]:
    size, kind, length = fit.size, garment.type, garment.length
    hems = {
        "midi_skirt": fit.knee - 0.02 * size + 0.1 * size * (0.5 - length),
        "mini_skirt": fit.crotch - 0.12 * size - 0.06 * size * length,
        "pleated_skirt": fit.knee + 0.13 * size * (1 - length),
        "maxi_skirt": fit.ankle + 0.08 * size + 0.1 * size * (1 - length),
    }
    flare, more = _SKIRT_FLARES[kind]
    if styling.tucked:
        waist, ease = fit.waist + 0.01 * size, 0.014
        flare_from = waist - 0.06 * size
    else:
        waist, ease = fit.waist - 0.03 * size, 0.008
        flare_from = fit.crotch + 0.06 * size  # below an untucked top
    if kind == "pleated_skirt":
        pleats, pleat_depth = 16, 0.016
    else:
        pleats, pleat_depth = garment.pleats, 0.003 + 0.012 * garment.pleat_depth
    cut = SkirtCut(
        waist=waist,
        hem=hems[kind],
        ease=ease,
        flare=flare + more * garment.flare,
        flare_from=flare_from,
        pleats=pleats,
        pleat_depth=pleat_depth,
    )
    look = _look(fit, garment)
    look["cuff_trim"] = 0.028
    if garment.hem_trim:
        look["hem_trim"] = 0.03
    if kind == "midi_skirt" and garment.pocket:
        look["buttoned"], look["placket"] = 1, 0.014
        look["button_low"], look["button_high"] = -_EVERYWHERE, -0.02
    return [make_skirt(fit, cut, rng, parts.BOTTOM, waistband=True)], look


def _trousers(
    fit: Fit, garment: GarmentSpec, styling: Styling, rng: np.random.Generator
) -> tuple[list[ClothMesh], np.ndarray]:
    size, kind, share = fit.size, garment.type, garment.fit
    hems = {
        "jeans": fit.ankle - 0.005,
        "trousers": fit.ankle - 0.015,
        "shorts": fit.knee + (0.02 + 0.16 * garment.length) * size,
        "joggers": fit.ankle + 0.02,
        "wide_trousers": fit.ankle - 0.03,
        "leggings": fit.ankle + 0.02,
    }
    hem = hems[kind]
    if kind == "leggings" and garment.length < 0.3:
        hem += 0.15 * size
    eases_and_widths = {
        "jeans": (0.006 + 0.008 * share, -0.52 + 0.22 * share),
        "trousers": (0.010 + 0.008 * share, -0.46 + 0.24 * share),
        "shorts": (0.014 + 0.012 * share, 0.0),
        "joggers": (0.014, -0.45),
        "wide_trousers": (0.014, 0.12 + 0.2 * share),
        "leggings": (0.003, -0.9),
    }
    ease, widen = eases_and_widths[kind]
    if kind == "jeans" and garment.flare < 0.4:  # skinny jeans
        ease, widen = 0.004, -0.8
    cut = TrouserCut(
        waist=fit.waist if styling.tucked else fit.waist - 0.045 * size,
        hem=hem,
        ease=ease,
        widen=widen,
        folds=0.0006 if kind == "leggings" else 0.0028,
        tucked=styling.tucked,
    )
    look = _look(fit, garment)
    look["wrap_radius"] = LEG_RADIUS * size
    look["cuff_trim"] = 0.034
    if kind == "jeans":
        look["grain"] = 0.45
    if kind == "joggers":
        look["hem_trim"] = 0.035
    look["stripe_width"] = 0.014 if garment.side_stripe else 0.0
    if garment.belt and kind in ("jeans", "trousers", "shorts"):
        look["belt_v"], look["belt_width"] = cut.waist - fit.waist - 0.019, 0.016
        look["belt"] = colours.linear(_DARK_BELT if garment.belt == "tone" else _BROWN_BELT)
        look["buckled"], look["buckle"] = 1, colours.linear(_STEEL_BUCKLE)
    return [make_trousers(fit, cut, rng, parts.BOTTOM)], look


def _button_all_the_way(look: np.ndarray, garment: GarmentSpec) -> None:
    """Buttons from the neck to the hem: light ones on dark cloth, else in the accent colour."""
    look["buttoned"], look["placket"] = 1, 0.016
    look["button_low"], look["button_high"] = -_EVERYWHERE, _EVERYWHERE
    if colours.luma(garment.colours[0]) < 150:
        look["button"] = colours.linear(_LIGHT_BUTTONS)
    else:
        look["button"] = colours.garment(garment.colours[3])


def _pockets(look: np.ndarray, u: float, v: float, width: float, height: float) -> None:
    """Two pockets at +u and -u; width and height are half sizes."""
    look["pocket_u"], look["pocket_v"] = u, v
    look["pocket_width"], look["pocket_height"] = width, height

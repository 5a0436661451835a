"""Garments: names, held-out combinations, captions."""

from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import pytest

from chameleon_jax import runway
from chameleon_jax.runway import garments, patterns, prints
from chameleon_jax.runway.colours import GARMENT_COLOURS


def clothes(spec: runway.ClipSpec) -> list[runway.GarmentSpec]:
    """Everything worn in a clip and in its reference."""
    return [*spec.outfit.values(), spec.reference_garment]


def test_training_and_test_clips_never_show_a_held_out_garment():
    for seed in [*range(300), *range(900_000, 900_100)]:
        assert not any(runway.held_out(garment) for garment in clothes(runway.sample_spec(seed)))


def test_half_of_the_validation_targets_are_held_out():
    specs = [runway.sample_spec(seed) for seed in range(800_000, 800_200)]
    share = np.mean([runway.held_out(spec.garment) for spec in specs])
    assert 0.38 < share < 0.62
    for spec in specs:
        others = [garment for slot, garment in spec.outfit.items() if slot != spec.slot]
        others.append(spec.reference_garment)
        assert not any(runway.held_out(garment) for garment in others)


def test_about_one_combination_in_twenty_is_held_out():
    base = runway.sample_spec(0).garment
    found = []
    for kind, pattern, colour in itertools.product(garments.TYPES, patterns.NAMES, GARMENT_COLOURS):
        colours = (colour, "white", "red", "blue")
        garment = dataclasses.replace(base, type=kind, pattern=pattern, colours=colours)
        found.append(runway.held_out(garment))
    assert 0.045 < np.mean(found) < 0.055
    other_details = dataclasses.replace(base, seed=base.seed + 1, fit=0.123)
    assert runway.held_out(base) == runway.held_out(other_details)


def test_garments_are_within_bounds_and_survive_json():
    rng = np.random.default_rng(0)
    seen = set()
    for number in range(400):
        garment = garments.sample_garment(rng, garments.SLOTS[number % 4])
        seen.add(garment.type)
        assert garments.TYPES[garment.type].slot == garment.slot
        assert garment.period >= 0.03 and garment.pattern in patterns.NAMES
        assert garment.print == "" or garment.print in prints.NAMES
        assert len(garment.colours) == 4 and set(garment.colours) <= set(GARMENT_COLOURS)
        assert garment.colours[0] != garment.colours[1]
        stored = json.loads(json.dumps(dataclasses.asdict(garment)))
        assert garments.GarmentSpec.from_json(stored) == garment
    assert seen == set(garments.TYPES)
    with pytest.raises(ValueError, match="slot is 'hat'"):
        garments.sample_garment(rng, "hat")


def test_descriptions_name_colour_pattern_type_and_print():
    base = runway.sample_spec(0).garment
    plain = dataclasses.replace(
        base,
        slot="top",
        type="tshirt",
        pattern="plain",
        print="star",
        block="",
        colours=("orange", "navy", "red", "white"),
    )
    assert runway.describe(plain) == "an orange T-shirt with a white star print"
    striped = dataclasses.replace(plain, pattern="horizontal stripes", print="")
    assert runway.describe(striped) == "an orange and navy horizontally striped T-shirt"
    jeans = dataclasses.replace(plain, slot="bottom", type="jeans", print="")
    assert runway.describe(jeans) == "orange jeans"


@pytest.mark.parametrize("seed", range(60))
def test_captions_are_sentences_that_name_the_garment(seed):
    spec = runway.sample_spec(seed)
    captions = spec.captions()
    for garment in spec.outfit.values():
        assert runway.describe(garment) in captions["static"]
        assert garment.colours[0] in captions["static"]
        assert garments.TYPES[garment.type].noun in captions["static"]
        if garment.pattern != "plain":
            assert garment.colours[1] in captions["static"]
            assert garment.pattern.split()[0].rstrip("s")[:6] in captions["static"]
    assert captions["en_long"] == (captions["dynamic"], captions["static"])
    texts = [captions["static"], captions["dynamic"], *captions["en_short"]]
    for text in texts:
        assert text[0].isupper() and text.endswith(".") and "  " not in text
        assert not {"{", "}", "_"} & set(text)
        assert " a a" not in text and " a o" not in text and " a e" not in text
    assert len(captions["en_short"][0]) <= len(captions["dynamic"])
    assert runway.describe(spec.garment) not in captions["dynamic"]


def test_swapping_the_garment_changes_its_words_only():
    spec = runway.sample_spec(7)
    before, after = spec.captions(), spec.with_garment(spec.reference_garment).captions()
    assert before["dynamic"] == after["dynamic"]
    old, new = runway.describe(spec.garment), runway.describe(spec.reference_garment)
    assert before["static"].replace(old, new) == after["static"]


def test_every_print_is_drawn():
    atlas = prints.atlas(32)
    assert atlas.shape == (len(prints.NAMES), 32, 32)
    cover = atlas.mean((1, 2))
    assert (cover > 0.05).all() and (cover < 0.85).all()
    assert len({tile.tobytes() for tile in atlas}) == len(atlas)

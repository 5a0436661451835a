"""The transformer's tables: the full-size listings in both directions, and the two layouts of the
same weights.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from chameleon_jax.models.dit import DiTConfig
from chameleon_jax.weights.params import flat_params
from converters import dit
from converters.rules import ConversionError, convert, invert, rename
from tests import tiny_dit

LISTINGS = Path(__file__).parent.parent / "data_files"
TABLES = {"official": dit.OFFICIAL_RULES, "diffusers": dit.DIFFUSERS_RULES}


@pytest.mark.parametrize("layout", TABLES)
def test_the_full_size_fits_the_published_listing_exactly(layout):
    rules = TABLES[layout]
    listing = json.loads((LISTINGS / f"wan22_ti2v_5b_dit_{layout}.json").read_text())
    config = DiTConfig.wan22_ti2v_5b()
    expected = dit.expected_shapes(config)
    published = {name: tuple(shape) for name, shape in listing["tensors"].items()}
    assert len(published) == len(expected) == 825
    assert (
        sum(int(np.prod(shape)) for shape in expected.values())
        == listing["num_params"]
        == 4_999_787_712
    )
    # broadcast views stand for the tensors: the right shapes without the memory
    theirs = {name: np.broadcast_to(np.float32(0), shape) for name, shape in published.items()}
    ours = convert(theirs, rules, expected)
    assert {name: x.shape for name, x in ours.items()} == expected
    back = convert(ours, invert(rules), published)
    assert {name: x.shape for name, x in back.items()} == published


@pytest.mark.parametrize("layout", TABLES)
def test_there_and_back_gives_the_same_tensors(layout):
    rules = TABLES[layout]
    params = {name: np.asarray(x) for name, x in flat_params(tiny_dit.tiny_dit()).items()}
    targets = rename(params, invert(rules))[0]
    shapes = {
        target: transform.forward(params[name]).shape
        for name, (target, transform) in targets.items()
    }
    theirs = convert(params, invert(rules), shapes)
    assert len(theirs) == len(params)
    again = convert(theirs, rules, dit.expected_shapes(tiny_dit.CONFIG))
    for name, x in params.items():
        np.testing.assert_array_equal(again[name], x)


def test_every_fault_is_listed():
    config = tiny_dit.CONFIG
    params = {name: np.asarray(x) for name, x in flat_params(tiny_dit.tiny_dit()).items()}
    targets = rename(params, invert(dit.OFFICIAL_RULES))[0]
    theirs = {
        target: transform.forward(params[name]) for name, (target, transform) in targets.items()
    }
    theirs["blocks.0.ffn.0.weight"] = theirs["blocks.0.ffn.0.weight"].T
    theirs["blocks.2.modulation"] = theirs["blocks.1.modulation"]
    theirs["img_emb.proj.0.weight"] = np.ones(3)
    del theirs["head.head.bias"]
    with pytest.raises(ConversionError, match="4 faults") as error:
        convert(theirs, dit.OFFICIAL_RULES, dit.expected_shapes(config))
    for line in (
        "wrong shape: blocks.0.ffn.0.weight is (60, 96), expected (96, 60): it is transposed",
        "missing: head.head.bias (nearest: ",
        "unexpected: img_emb.proj.0.weight",
        "unexpected: blocks.2.modulation (nearest: blocks.1.modulation)",
    ):
        assert line in str(error.value)

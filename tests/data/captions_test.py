"""Captions: the filling rules of the prompt column, and the shares in which they are mixed."""

from __future__ import annotations

import json

import numpy as np
import pytest

from chameleon_jax.data import captions
from chameleon_jax.data.captions import CaptionError


def test_missing_language_is_filled_before_missing_length():
    filled = captions.parse_prompt({"cn_long": ["走", "街"], "en_short": ["walks", "street"]})
    assert filled["en_long"] == ("走", "街")
    assert filled["cn_short"] == ("walks", "street")


@pytest.mark.parametrize("only", ["en_long", "cn_long", "en_short", "cn_short"])
def test_one_field_fills_all(only):
    filled = captions.parse_prompt(json.dumps({only: ["a", "b"]}))
    assert set(filled.values()) == {("a", "b")} and len(filled) == 4


def test_long_english_is_used():
    prompt = {"en_long": ["She walks.", "A street."], "en_short": ["walk", "street"]}
    assert captions.from_prompt(prompt) == {"dynamic": "She walks.", "static": "A street."}
    assert captions.full("A street.", "She walks.") == "She walks. A street."


@pytest.mark.parametrize(
    "bad",
    ["", "{", "[1]", "{}", '{"en_long": ["a"]}', '{"en_long": ["a", 3]}', '{"fr": ["a", "b"]}'],
)
def test_bad_prompts_are_refused(bad):
    with pytest.raises(CaptionError):
        captions.parse_prompt(bad)


def test_shares():
    both = {"dynamic": "walks", "static": "street"}
    draws = [
        captions.choose(both, "mixed", np.random.default_rng([0, i]), dropout=0.1)
        for i in range(4000)
    ]
    share = {text: draws.count(text) / len(draws) for text in set(draws)}
    assert share.keys() == {"", "walks", "walks street"}
    assert abs(share[""] - 0.1) < 0.02
    assert abs(share["walks"] - 0.7 * 0.9) < 0.03
    rng = np.random.default_rng(0)
    assert {captions.choose(both, "full", rng) for _ in range(50)} == {"walks street"}
    assert {captions.choose(both, "dynamic", rng) for _ in range(50)} == {"walks"}
    with pytest.raises(CaptionError, match="mixed, full, dynamic"):
        captions.choose(both, "long", rng)

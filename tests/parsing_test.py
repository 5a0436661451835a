"""Numbers and sizes as people write them."""

from __future__ import annotations

import pytest

from chameleon_jax import parsing
from chameleon_jax.parsing import ParseError


def test_whole_numbers():
    assert parsing.whole_number("12") == 12
    assert parsing.whole_number("-3") == -3
    assert parsing.whole_number("007", 1, 10) == 7


@pytest.mark.parametrize(
    "text", ["", " 1", "1.0", "+1", "1_000", "²", "٣", "１", "--1", "0x1", "1e3", "9" * 5000]
)
def test_no_whole_numbers(text):
    assert not parsing.is_whole_number(text)
    with pytest.raises(ParseError, match="expected a whole number"):
        parsing.whole_number(text)


def test_bounds_are_said():
    with pytest.raises(ParseError, match=r"'0': expected a whole number from 1 up"):
        parsing.whole_number("0", 1)
    with pytest.raises(ParseError, match=r"'7': expected a whole number from 1 to 6"):
        parsing.whole_number("7", 1, 6)
    with pytest.raises(ParseError, match=r"'-1': expected a number from 0 up"):
        parsing.number("-1", least=0)
    with pytest.raises(ParseError, match=r"'0': expected a number above 0"):
        parsing.number("0", above=0)


def test_numbers():
    assert parsing.number("23.976") == 23.976
    assert parsing.number("1e-3", above=0) == 0.001
    assert parsing.number("0", least=0) == 0.0


@pytest.mark.parametrize("text", ["", "nan", "inf", "-inf", "1e999", "many", "²", "1,5"])
def test_no_numbers(text):
    with pytest.raises(ParseError, match="expected a number"):
        parsing.number(text)


def test_sizes():
    assert parsing.size("128x80") == (128, 80)


@pytest.mark.parametrize("text", ["128", "0x80", "axb", "1x2x3", "-1x5", "128x", "²x2", "720p"])
def test_no_sizes(text):
    with pytest.raises(ParseError, match="expected HEIGHTxWIDTH"):
        parsing.size(text)


def test_spans():
    assert parsing.span("20:25") == (20, 25) and parsing.span("3:3") == (3, 3)


@pytest.mark.parametrize("text", ["", "20", "25:20", "0:5", "a:b", "1:2:3", ":5", "5:", "-1:5"])
def test_no_spans(text):
    with pytest.raises(ParseError, match="expected FIRST:LAST, from 1 up, such as 20:25"):
        parsing.span(text)

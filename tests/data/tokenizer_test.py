"""The small tokenizer: deterministic, complete over Unicode, in the layout of UMT5."""

from __future__ import annotations

import random
import unicodedata

import numpy as np
import pytest

from chameleon_jax.data.tokenizer import BYTES, SPECIAL, train_pieces
from chameleon_jax.models.text import Tokenizer, clean_text

WORDS = [
    "a",
    "the",
    "woman",
    "man",
    "walks",
    "slowly",
    "towards",
    "camera",
    "red",
    "blue",
    "striped",
    "jacket",
    "turns",
]


def _texts(n=300):
    draw = random.Random(0)
    return [" ".join(draw.choices(WORDS, k=9)).capitalize() + ", then she nods." for _ in range(n)]


def test_the_same_texts_give_the_same_file_in_any_order():
    texts = _texts()
    first = train_pieces(texts, 400).to_str()
    assert all(
        train_pieces(random.Random(seed).sample(texts, len(texts)), 400).to_str() == first
        for seed in range(4)
    )
    assert train_pieces(texts[:100], 400).to_str() != first


def test_special_tokens_and_bytes_come_first():
    pieces = train_pieces(_texts(), 400)
    assert [pieces.id_to_token(k) for k in range(3)] == list(SPECIAL)
    assert [pieces.id_to_token(3 + k) for k in range(256)] == list(BYTES)
    assert 259 < pieces.get_vocab_size() <= 400
    assert sorted(pieces.get_vocab().values()) == list(range(pieces.get_vocab_size()))


def test_known_words_are_one_piece_whatever_their_case():
    tokenizer = Tokenizer(train_pieces(_texts(), 600), 16)
    ids, mask = tokenizer(["the woman walks", "THE  Woman walks"])
    assert mask.sum(axis=1).tolist() == [4, 4] and ids[0, 3] == 1
    np.testing.assert_array_equal(ids[0], ids[1])


def test_any_text_has_an_encoding_without_unknowns_that_reads_back():
    draw = random.Random(1)
    planes = [
        (0x20, 0x7F),
        (0xA0, 0x500),
        (0x590, 0x700),
        (0x900, 0xE00),
        (0x3040, 0x3100),
        (0x4E00, 0x9FFF),
        (0xAC00, 0xD7A0),
    ]
    prompts = [
        "".join(chr(draw.randrange(*draw.choice(planes))) for _ in range(12)) for _ in range(200)
    ]
    prompts += [
        "女人走向镜头，慢慢地",
        "امرأة تمشي",
        "👩🏽‍🦰🧥",
        "\ud800 broken",
        "\x00\x07",
        "naïve café",
        "𝒻𝒶𝓃𝒸𝓎",
        "ß İ ﬁ",
    ]
    pieces = train_pieces(_texts(), 400)
    tokenizer = Tokenizer(pieces, 128)
    ids, mask = tokenizer(prompts)
    assert not (ids == 2).any()
    assert (ids[~mask] == 0).all() and (ids[np.arange(len(ids)), mask.sum(axis=1) - 1] == 1).all()
    for prompt, row, keep in zip(prompts, ids, mask, strict=True):
        folded = unicodedata.normalize("NFKC", clean_text(prompt)).lower()
        if keep.sum() < 128:
            assert "".join(pieces.decode(row[keep].tolist()).split()) == "".join(folded.split()), (
                prompt
            )


def test_file_round_trip(tmp_path):
    pieces = train_pieces(_texts(), 400)
    pieces.save(str(tmp_path / "tokenizer.json"))
    expected = Tokenizer(pieces, 32)(["the man turns", "Ünbekannt"])
    got = Tokenizer.from_file(tmp_path / "tokenizer.json", 32)(["the man turns", "Ünbekannt"])
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_faults():
    with pytest.raises(ValueError, match="no room for pieces"):
        train_pieces(["a"], 259)
    with pytest.raises(ValueError, match="no text"):
        train_pieces(["", " "])

"""Prompts to ids: cleaning, padding, what does not fit; and the small tokenizer's training."""

from __future__ import annotations

import json
import random
import unicodedata

import numpy as np
import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from chameleon_jax.data.tokenizer import (
    BYTES,
    SPECIAL,
    Tokenizer,
    TokenizerError,
    byte_tokenizer,
    clean_text,
    train_pieces,
)

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
CORPUS = [
    "a woman walks slowly towards the camera",
    "a man in a red jacket turns around while the camera follows",
    "she waves, then nods; blue striped shirt, wide trousers",
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


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("a  red\n\tcoat \u3000 and\u00a0hat ", "a red coat and hat"),
        ("black &amp;amp; white", "black & white"),
        ("&amp;lt;b&amp;gt;", "<b>"),
        (
            "<b> black &amp;amp; white",
            "<b> black & white",
        ),  # ftfy leaves entities alone beside a tag
        ("size &lt; 40", "size < 40"),
        ("色调艳丽，过曝，静态", "色调艳丽,过曝,静态"),
        ("Ｆｕｌｌ ｗｉｄｔｈ！", "Full width!"),
        ("\u201cjeans\u201d and the model\u2019s coat", '"jeans" and the model\'s coat'),
        ("cafÃ© rouge", "café rouge"),
        ("", ""),
        (" \n ", ""),
    ],
)
def test_clean_text(raw, clean):
    assert clean_text(raw) == clean
    assert clean_text(clean) == clean


def _train(path):
    pieces = tokenizers.Tokenizer(tokenizers.models.Unigram())
    pieces.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    pieces.decoder = tokenizers.decoders.Metaspace()
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=80,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    pieces.train_from_iterator(CORPUS, trainer)
    pieces.save(str(path))
    return path


@pytest.mark.parametrize("end_in_file", [True, False])
def test_tokenizer_agrees_with_transformers_on_the_same_file(tmp_path, end_in_file):
    """Also when the file does not ask for the end token, as that of UMT5 does."""
    plain, full = _train(tmp_path / "plain.json"), tmp_path / "full.json"
    pieces = tokenizers.Tokenizer.from_file(str(plain))
    pieces.post_processor = tokenizers.processors.TemplateProcessing(
        "$A </s>", special_tokens=[("</s>", 1)]
    )
    pieces.save(str(full))
    prompts = [*CORPUS, "", "turns"]
    ids, mask = Tokenizer.from_file(full if end_in_file else plain, 24)(prompts)
    assert ids.shape == mask.shape == (5, 24) and ids.dtype == np.int32 and mask.dtype == bool
    theirs = PreTrainedTokenizerFast(
        tokenizer_file=str(full), pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    expected = theirs(
        prompts, padding="max_length", truncation=True, max_length=24, return_tensors="np"
    )
    np.testing.assert_array_equal(ids, expected["input_ids"])
    np.testing.assert_array_equal(mask, expected["attention_mask"].astype(bool))


def test_a_long_prompt_keeps_its_end_token_and_an_empty_one_is_the_end_token(tmp_path):
    tokenizer = Tokenizer.from_file(_train(tmp_path / "tokenizer.json"), 6)
    ids, mask = tokenizer([CORPUS[0], "", "   "])
    assert mask[0].all() and ids[0, 5] == tokenizer.end == 1 and (ids[0, :5] != 1).all()
    np.testing.assert_array_equal(
        ids[0, :5], Tokenizer(tokenizer.pieces, 64)([CORPUS[0]])[0][0, :5]
    )
    np.testing.assert_array_equal(ids[1], [1, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(ids[2], ids[1])
    assert mask[1].tolist() == [True] + [False] * 5


def test_settings_saved_in_the_file_do_not_interfere(tmp_path):
    path = _train(tmp_path / "tokenizer.json")
    expected = Tokenizer.from_file(path, 24)(CORPUS)[0]
    saved = tokenizers.Tokenizer.from_file(str(path))
    saved.enable_truncation(3)
    saved.enable_padding(length=50, pad_id=9, pad_token="<pad>")
    saved.save(str(path))
    np.testing.assert_array_equal(Tokenizer.from_file(path, 24)(CORPUS)[0], expected)


def test_prompts_are_cleaned_first(tmp_path):
    tokenizer = Tokenizer.from_file(_train(tmp_path / "tokenizer.json"), 24)
    ids, _ = tokenizer(["a woman  walks\n", "a woman walks"])
    np.testing.assert_array_equal(ids[0], ids[1])


def test_tokenizer_errors_say_what_to_do(tmp_path):
    with pytest.raises(TokenizerError, match="no such file; expected a tokenizer"):
        Tokenizer.from_file(tmp_path / "none.json", 8)
    (tmp_path / "broken.json").write_text('{"version": ')
    with pytest.raises(TokenizerError, match="not a tokenizer"):
        Tokenizer.from_file(tmp_path / "broken.json", 8)
    path = _train(tmp_path / "tokenizer.json")
    renamed = json.loads(path.read_text().replace("</s>", "<end>"))
    (tmp_path / "renamed.json").write_text(json.dumps(renamed))
    with pytest.raises(TokenizerError, match="has no </s>"):
        Tokenizer.from_file(tmp_path / "renamed.json", 8)
    with pytest.raises(TypeError, match="wrap it in a list"):
        Tokenizer.from_file(path, 8)("a prompt")
    with pytest.raises(TokenizerError, match="no room for the end token"):
        Tokenizer.from_file(path, 0)


def test_what_does_not_fit_is_said():
    tokenizer = Tokenizer(train_pieces(_texts(), 600), 5)
    prompts = [
        "The  woman walks slowly towards the camera",
        "the man turns",
        "",
        "a red jacket, she",
    ]
    encoded = tokenizer.encode(prompts)
    assert encoded.kept == ("The woman walks slowly", "the man turns", "", "a red jacket,")
    assert encoded.cut == ("towards the camera", "", "", "she")
    for array, expected in zip((encoded.ids, encoded.mask), tokenizer(prompts), strict=True):
        np.testing.assert_array_equal(array, expected)
    # What was cut has no influence, and what was kept is all that has.
    np.testing.assert_array_equal(tokenizer(list(encoded.kept))[0], encoded.ids)


@pytest.mark.parametrize("length", [1, 2, 3, 5, 9, 30])
def test_kept_and_cut_are_the_whole_prompt(length):
    prompts = ["naïve ﬁne 👩🏽‍🦰 café", "女人走向镜头，慢慢地", "turns", "ß İ walks", "a &amp; b"]
    for pieces in (train_pieces(_texts(), 400), byte_tokenizer(8).pieces):
        tokenizer, whole = Tokenizer(pieces, length), Tokenizer(pieces, 200)
        for prompt, kept, cut in zip(prompts, *tokenizer.encode(prompts)[2:], strict=True):
            assert "".join((kept + cut).split()) == "".join(clean_text(prompt).split())
            fits = whole([prompt])[1].sum() <= length
            assert fits == (cut == "")


def test_a_character_that_lost_one_of_its_bytes_is_cut():
    assert byte_tokenizer(6).encode(["女人"])[2:] == (("女",), ("人",))  # 3 bytes each, and the end


def test_faults():
    with pytest.raises(TokenizerError, match="no room for pieces; expected at least 260"):
        train_pieces(["a"], 259)
    with pytest.raises(TokenizerError, match="no text"):
        train_pieces(["", " "])

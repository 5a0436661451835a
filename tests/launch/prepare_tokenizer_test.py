"""The command that trains the small tokenizer, and the tokenizer that ships with the project."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import chameleon_jax
from chameleon_jax.data.tokenizer import BYTES, SPECIAL, Tokenizer
from launch import train_tokenizer
from launch.cli import UsageError

SHIPPED = Path(chameleon_jax.__file__).parent / "assets" / "runway_tiny" / "tokenizer.json"


def _run(*argv):
    train_tokenizer.main(["train_tokenizer", *map(str, argv)])


def test_writes_a_tokenizer_that_loads_and_the_same_bytes_again(tmp_path, capsys):
    texts = tmp_path / "captions.txt"
    texts.write_text(
        "A woman walks  slowly.\nThe man&amp;woman turn; the camera follows.\n" * 3,
        encoding="utf-8",
    )
    _run("--texts", texts, "--out", tmp_path / "a" / "tokenizer.json", "--vocab", 300)
    _run("--texts", texts, "--out", tmp_path / "b.json", "--vocab", 300)
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert "6 captions take" in capsys.readouterr().out
    ids, mask = Tokenizer.from_file(tmp_path / "b.json", 16)(["a woman"])
    assert mask.sum() >= 3 and ids[0, mask.sum() - 1] == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b.json", "captions.txt"]


def test_faults_are_one_line(tmp_path):
    with pytest.raises(UsageError, match="--out is needed"):
        _run("--texts", "x")
    with pytest.raises(UsageError, match="not a readable"):
        _run("--texts", tmp_path / "none.txt", "--out", tmp_path / "t.json")
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match="no text"):
        _run("--texts", tmp_path / "empty.txt", "--out", tmp_path / "t.json")
    assert not (tmp_path / "t.json").exists()


def test_the_shipped_tokenizer_is_small_complete_and_fits_the_model():
    assert SHIPPED.stat().st_size < 150_000
    tokenizer = Tokenizer.from_file(SHIPPED, 64)
    assert tokenizer.vocab <= 1024
    vocab = json.loads(SHIPPED.read_text(encoding="utf-8"))["model"]["vocab"]
    assert [vocab[name] for name in (*SPECIAL, *BYTES)] == list(range(259))
    ids, mask = tokenizer(
        ["She walks slowly towards the camera.", "女人走向镜头", "👗", "امرأة", ""]
    )
    assert not (ids == 2).any() and mask.any(axis=1).all()
    assert mask[0].sum() <= 9  # one piece a word, the full stop and the end

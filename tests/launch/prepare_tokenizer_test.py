"""The command that trains the small tokenizer, and the tokenizer that ships with the project."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import chameleon_jax
from chameleon_jax.data.tokenizer import BYTES, SPECIAL, Tokenizer
from launch import prepare

SHIPPED = Path(chameleon_jax.__file__).parent / "assets" / "runway_tiny" / "tokenizer.json"


def _run(*argv):
    """Exit code of the command."""
    with pytest.raises(SystemExit) as exit_:
        prepare.main(["tokenizer", *map(str, argv)])
    return exit_.value.code or 0


def test_writes_a_tokenizer_that_loads_and_the_same_bytes_again(tmp_path, capsys):
    texts = tmp_path / "captions.txt"
    texts.write_text(
        "A woman walks  slowly.\nThe man&amp;woman turn; the camera follows.\n" * 3,
        encoding="utf-8",
    )
    flags = ("--texts", texts, "--vocab", 300)
    assert _run(*flags, "--out", tmp_path / "a" / "tokenizer.json") == 0
    assert _run(*flags, "--out", tmp_path / "b.json") == 0
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert "6 captions take" in capsys.readouterr().out
    ids, mask = Tokenizer.from_file(tmp_path / "b.json", 16)(["a woman"])
    assert mask.sum() >= 3 and ids[0, mask.sum() - 1] == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b.json", "captions.txt"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--texts=x"], "required: --out"),
        (["--texts=none.txt", "--out=t.json"], "not a readable UTF-8 text file"),
        (["--texts=empty.txt", "--out=t.json"], "no text"),
        (["--out=t.json", "--vocab=many"], "--vocab: 'many': expected a whole number"),
        (["--out=t.json", "--config.seed=1"], "unknown flag --config.seed"),
    ],
)
def test_faults_are_one_line(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n")
    assert _run(*flags) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("error: ") and len(stderr.splitlines()) == 1 and message in stderr
    assert [path.name for path in tmp_path.iterdir()] == ["empty.txt"]


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

"""The text encoder, the tokenizer and the cleaning of prompts."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import torch
from flax import nnx
from transformers import PreTrainedTokenizerFast
from transformers.models.umt5.modeling_umt5 import UMT5Attention, UMT5Config

from chameleon_jax.models.text import (
    TextConfig,
    TextEncoder,
    Tokenizer,
    TokenizerError,
    clean_text,
    relative_buckets,
)
from chameleon_jax.weights.params import flat_params, set_params

TINY = TextConfig(vocab=61, width=24, heads=3, head_dim=5, ffn=40, layers=2, length=12)
CORPUS = [
    "a woman walks slowly towards the camera",
    "a man in a red jacket turns around while the camera follows",
    "she waves, then nods; blue striped shirt, wide trousers",
]


def _encoder(**kw) -> TextEncoder:
    return TextEncoder(TINY, rngs=nnx.Rngs(0), **kw)


def _ids(b=2, l=12):
    return jax.random.randint(jax.random.key(7), (b, l), 0, TINY.vocab)


def test_buckets_by_hand():
    d = relative_buckets(400)  # [query, key]
    assert d[0, 0] == 0
    assert [d[200, 200 + k] for k in (1, 7, 8, 11, 12, 15, 16, 127, 199)] == [
        17,
        23,
        24,
        24,
        25,
        25,
        26,
        31,
        31,
    ]
    assert [d[200, 200 - k] for k in (1, 7, 8, 15, 16, 127, 128, 200)] == [
        1,
        7,
        8,
        9,
        10,
        15,
        15,
        15,
    ]


def test_buckets_agree_with_transformers_at_full_length():
    config = UMT5Config(
        relative_attention_num_buckets=32,
        relative_attention_max_distance=128,
        d_model=8,
        num_heads=1,
    )
    theirs = UMT5Attention(config, has_relative_attention_bias=True)
    distance = torch.arange(512)[None, :] - torch.arange(512)[:, None]
    expected = theirs._relative_position_bucket(distance).numpy()
    np.testing.assert_array_equal(relative_buckets(512), expected)


def test_states_after_the_prompt_are_exactly_zero():
    mask = jnp.arange(12)[None, :] < jnp.array([[5], [12]])
    out = _encoder()(_ids(), mask)
    assert out.shape == (2, 12, 24)
    assert (
        (out[0, 5:] == 0).all()
        and (out[0, :5] != 0).any(axis=-1).all()
        and (out[1] != 0).any(axis=-1).all()
    )


def test_padding_changes_nothing():
    """Neither the tokens under the padding nor the amount of padding."""
    encoder, ids = _encoder(), _ids()
    mask = jnp.broadcast_to(jnp.arange(12) < 5, (2, 12))
    out = encoder(ids, mask)
    np.testing.assert_array_equal(encoder(ids.at[:, 5:].set(3), mask), out)
    np.testing.assert_allclose(encoder(ids[:, :5], mask[:, :5]), out[:, :5], atol=1e-5)
    assert np.abs(encoder(ids.at[:, 4].add(1) % TINY.vocab, mask) - out)[:, 0].max() > 1e-4


def test_order_matters_in_both_directions_and_in_every_layer():
    encoder, ids = _encoder(), _ids()
    mask = jnp.ones((2, 12), bool)
    out = encoder(ids, mask)
    np_flipped = encoder(ids[:, ::-1], mask)[:, ::-1]
    assert np.abs(out - np_flipped).max() > 1e-3
    for block in encoder.blocks:  # each layer reads its own table
        table = block.pos_embedding.embedding
        before = table.get_value()
        table.set_value(before.at[17].add(1.0))
        assert np.abs(encoder(ids, mask) - out).max() > 1e-4
        table.set_value(before)
    np.testing.assert_array_equal(encoder(ids, mask), out)


def test_runs_in_bfloat16_under_jit_with_split_and_merge():
    low = _encoder(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    assert {x.dtype for x in flat_params(low).values()} == {jnp.dtype(jnp.bfloat16)}
    set_params(low, flat_params(_encoder()))
    graph, state = nnx.split(low)
    mask = jnp.ones((2, 12), bool)
    out = jax.jit(lambda state, ids, mask: nnx.merge(graph, state)(ids, mask))(state, _ids(), mask)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), _encoder()(_ids(), mask), atol=0.1)


def test_states_at_initialisation_have_unit_scale():
    config = TextConfig(vocab=1024, width=128, heads=2, head_dim=64, ffn=256, layers=2, length=64)
    ids = jax.random.randint(jax.random.key(0), (1, 64), 0, 1024)
    out = TextEncoder(config, rngs=nnx.Rngs(0))(ids, jnp.ones((1, 64)))
    assert 0.9 < float(jnp.sqrt(jnp.mean(out**2))) < 1.1


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
    """Also when the file does not say that the end token is to be appended, as that of UMT5 does."""
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
    with pytest.raises(ValueError, match="no room for the end token"):
        Tokenizer.from_file(path, 0)

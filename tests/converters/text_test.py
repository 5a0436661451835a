"""The UMT5 tables: parity with transformers through the converter, and the full-size listings in
both directions.
"""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import UMT5Config, UMT5EncoderModel

from chameleon_jax.models.text import TextConfig, TextEncoder
from chameleon_jax.weights.params import set_params
from chameleon_jax.weights.tensors import write_tensors
from converters import __main__ as command
from converters import text
from converters.recognise import recognise
from converters.rules import ConversionError, convert, invert, rename, shapes_in

LISTINGS = Path(__file__).parent.parent / "data_files"
TINY = TextConfig(vocab=97, width=32, heads=4, head_dim=6, ffn=48, layers=3)


def _reference() -> UMT5EncoderModel:
    config = UMT5Config(
        vocab_size=97,
        d_model=32,
        d_kv=6,
        d_ff=48,
        num_layers=3,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    torch.manual_seed(0)
    model = UMT5EncoderModel(config).eval()
    with torch.no_grad():
        for (
            name,
            x,
        ) in model.named_parameters():  # norms and biases away from their initial ones and zeros
            x.copy_(
                1 + 0.2 * torch.randn_like(x)
                if "norm" in name
                else torch.randn_like(x) * x.shape[-1] ** -0.5
            )
    return model


def _tensors(model) -> dict[str, np.ndarray]:
    return {name: x.detach().numpy() for name, x in model.state_dict().items()}


def _from_hf(tensors, config: TextConfig = TINY) -> dict[str, np.ndarray]:
    return convert(text.untied(tensors), text.HF_RULES, text.expected_shapes(config))


def _encoder(params) -> TextEncoder:
    encoder = TextEncoder(TINY, rngs=nnx.Rngs(0))
    set_params(encoder, params)
    return encoder


def test_parity_with_transformers():
    model = _reference()
    encoder = _encoder(_from_hf(_tensors(model)))
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 97, (3, 150))  # long enough for the last, open bucket
    mask = np.arange(150)[None, :] < np.array([[150], [1], [40]])
    with torch.no_grad():
        expected = model(
            torch.from_numpy(ids), torch.from_numpy(mask.astype(np.int64))
        ).last_hidden_state.numpy()
    got = np.asarray(encoder(jnp.asarray(ids), jnp.asarray(mask)))
    assert np.sqrt(np.mean(expected**2)) > 0.5
    np.testing.assert_allclose(got[mask], expected[mask], atol=1e-4)
    assert (got[~mask] == 0).all()


def test_the_two_layouts_give_the_same_parameters():
    params = _from_hf(_tensors(_reference()))
    shapes = {
        name: params[target].T.shape if "kernel" in target else params[target].shape
        for target, (name, _) in rename(params, invert(text.OFFICIAL_RULES))[0].items()
    }
    official = convert(params, invert(text.OFFICIAL_RULES), shapes)
    assert (
        "blocks.2.ffn.gate.0.weight" in official
        and "blocks.0.pos_embedding.embedding.weight" in official
    )
    again = convert(official, text.OFFICIAL_RULES, text.expected_shapes(TINY))
    for name, x in params.items():
        np.testing.assert_array_equal(again[name], x)


def test_the_token_table_may_have_either_name_or_both():
    tensors = _tensors(_reference())
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"]
    expected = _from_hf(tensors)["token_embedding.embedding"]
    for name in ("shared.weight", "encoder.embed_tokens.weight"):
        one = {k: v for k, v in tensors.items() if k != name}
        np.testing.assert_array_equal(_from_hf(one)["token_embedding.embedding"], expected)
    with pytest.raises(ConversionError, match="differ; expected one tied token table"):
        _from_hf({**tensors, "shared.weight": expected + 1})


def test_a_decoder_is_left_out_and_faults_are_listed(tmp_path):
    tensors = _tensors(_reference())
    whole = {
        **tensors,
        "decoder.block.0.layer.0.layer_norm.weight": np.ones(32),
        "lm_head.weight": np.ones((97, 32)),
    }
    write_tensors(tmp_path / "whole.safetensors", whole)
    (part,) = recognise([tmp_path / "whole.safetensors"])
    assert part.network is text.TEXT and part.tensors.keys() == text.untied(tensors).keys()
    del tensors["encoder.final_layer_norm.weight"]
    tensors["encoder.block.0.layer.0.SelfAttention.q.bias"] = np.ones(24)
    with pytest.raises(ConversionError) as error:
        _from_hf(tensors)
    assert "missing: encoder.final_layer_norm.weight" in str(error.value)
    assert "unexpected: encoder.block.0.layer.0.SelfAttention.q.bias" in str(error.value)


@pytest.mark.parametrize("layout", ["official", "hf"])
def test_the_full_size_encoder_fits_the_published_listing_exactly(layout):
    listing = json.loads((LISTINGS / f"umt5_xxl_encoder_{layout}.json").read_text())
    expected = text.expected_shapes(TextConfig.umt5_xxl())
    assert (
        sum(int(np.prod(shape)) for shape in expected.values())
        == listing["num_params"]
        == 5_680_910_336
    )
    published = {
        name: tuple(shape) for name, shape in listing["tensors"].items() if name != text.HF_TIED
    }
    assert len(published) == len(expected) == 242
    rules = text.OFFICIAL_RULES if layout == "official" else text.HF_RULES
    # broadcast views stand for the tensors: the right shapes without the memory
    theirs = {name: np.broadcast_to(np.float32(0), shape) for name, shape in published.items()}
    ours = convert(theirs, rules, expected)
    assert {name: x.shape for name, x in ours.items()} == expected
    back = convert(ours, invert(rules), published)
    assert {name: x.shape for name, x in back.items()} == published


TIED = text.HF_TIED
FORMS = {
    "plain": lambda tensors: tensors,
    "a tokenizer of SentencePiece in it": lambda tensors: {
        **tensors,
        "spiece_model": np.arange(40, dtype=np.uint8),
    },
    "a tokenizer.json in it": lambda tensors: {
        **tensors,
        "tokenizer_json": np.arange(40, dtype=np.uint8),
    },
    "the table under both names": lambda tensors: {**tensors, TIED: tensors["shared.weight"]},
    "the table under the second name": lambda tensors: {
        TIED if name == "shared.weight" else name: x for name, x in tensors.items()
    },
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("prefix", ["", "text_encoder."])
@pytest.mark.parametrize("pickled", [False, True])
def test_an_encoder_is_read_in_every_form(tmp_path, form, prefix, pickled):
    plain = text.untied(_tensors(_reference()))
    tensors = {prefix + name: x for name, x in FORMS[form](plain).items()}
    path = tmp_path / ("umt5.pth" if pickled else "umt5.safetensors")
    if pickled:
        torch.save({name: torch.from_numpy(x) for name, x in tensors.items()}, path)
    else:
        write_tensors(path, tensors)
    (part,) = recognise([path])
    assert part.network is text.TEXT and part.config == TINY
    expected, got = _from_hf(plain), _from_hf({k: x.array() for k, x in part.tensors.items()})
    assert got.keys() == expected.keys()
    assert all(np.array_equal(got[name], x) for name, x in expected.items())
    assert "float32, 0.00 GB" in part.describe()


def test_a_tokenizer_in_the_original_layout_is_passed_over_too(tmp_path):
    params = _from_hf(_tensors(_reference()))
    shapes = shapes_in(invert(text.OFFICIAL_RULES), text.expected_shapes(TINY))
    tensors = convert(params, invert(text.OFFICIAL_RULES), shapes)
    write_tensors(tmp_path / "x.safetensors", {**tensors, "spiece_model": np.ones(9, np.uint8)})
    (part,) = recognise([tmp_path / "x.safetensors"])
    assert part.layout == "official" and part.tensors.keys() == tensors.keys()


def test_float8_without_scales_is_one_line(tmp_path, capsys):
    small = {
        name: x.astype(ml_dtypes.float8_e4m3fn) if x.ndim == 2 else x
        for name, x in text.untied(_tensors(_reference())).items()
    }
    write_tensors(tmp_path / "umt5_fp8.safetensors", small)
    arguments = [
        str(tmp_path / "umt5_fp8.safetensors"),
        "--to",
        "jax",
        "--out",
        str(tmp_path / "x"),
    ]
    with pytest.raises(SystemExit) as stop:
        command.main(arguments)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "the checkpoint does not fit: wrong dtype: 25 tensors are float8_e4m3fn (" in line
    assert line.endswith("is not read, take the bfloat16 or float16 file")

"""The reward's tables: parity with transformers through the converter, and the full-size listings
in both directions.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModelWithProjection

from chameleon_jax.models.reward import ClipVision, ClipVisionConfig, Reward
from chameleon_jax.weights.params import set_params
from chameleon_jax.weights.tensors import write_tensors
from converters import reward
from converters.recognise import recognise
from converters.rules import ConversionError, convert, invert

LISTINGS = Path(__file__).parent.parent / "data_files"
TINY = ClipVisionConfig(width=32, ffn=56, heads=4, layers=3, projection=24, patch=28)


def _clip() -> CLIPVisionModelWithProjection:
    """Random weights that keep the scale, norms and biases too; the class token listens to the
    patches.
    """
    config = CLIPVisionConfig(
        hidden_size=TINY.width,
        intermediate_size=TINY.ffn,
        num_hidden_layers=TINY.layers,
        num_attention_heads=TINY.heads,
        image_size=TINY.image,
        patch_size=TINY.patch,
        projection_dim=TINY.projection,
    )
    model = CLIPVisionModelWithProjection(config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, x in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                x.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                x.normal_(0, 0.1)
            elif "class_embedding" in name or "position" in name:
                x.normal_(0, 0.5)
            else:
                x.normal_(0, math.prod(x.shape[1:]) ** -0.5)
    return model


class _Head(torch.nn.Module):
    """The aesthetic predictor from the facts: linear layers, and dropouts that do nothing after
    training.
    """

    def __init__(self, inputs: int):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(inputs, 1024),
            torch.nn.Dropout(0.2),
            torch.nn.Linear(1024, 128),
            torch.nn.Dropout(0.2),
            torch.nn.Linear(128, 64),
            torch.nn.Dropout(0.1),
            torch.nn.Linear(64, 16),
            torch.nn.Linear(16, 1),
        )
        torch.manual_seed(1)
        with torch.no_grad():
            for x in self.parameters():
                x.normal_(0, 0.1 if x.ndim == 1 else x.shape[1] ** -0.5)
            self.layers[0].weight.mul_(inputs**0.5)  # an embedding of length 1 has small numbers
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x / x.norm(dim=-1, keepdim=True))[:, 0]


def _tensors(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: x.detach().numpy() for name, x in model.state_dict().items()}


def _from_hf(tensors, config: ClipVisionConfig = TINY) -> dict[str, np.ndarray]:
    shapes = reward.part_shapes(config, "vision.")
    return convert(tensors, reward.HF_RULES, shapes, reward.HF_BUFFERS)


def _from_aesthetic(tensors, config: ClipVisionConfig = TINY) -> dict[str, np.ndarray]:
    return convert(tensors, reward.AESTHETIC_RULES, reward.part_shapes(config, "head."))


def _frames(h: int, w: int) -> np.ndarray:
    """Tinted blotches under stripes as fine as pixels, which only an antialiased resize takes well;
    uint8 [4, h, w, 3].
    """
    rng = np.random.default_rng(3)
    frames = []
    for i in range(4):
        few = (rng.integers(0, 256, (5, 4, 3)) * rng.uniform(size=3)).astype(np.uint8)
        blotches = np.asarray(
            Image.fromarray(few).resize((w, h), Image.Resampling.BICUBIC), np.float32
        )
        stripes = np.sign(
            np.sin(np.arange(h)[:, None] * (2.7 - 0.2 * i) + np.arange(w) * (0.4 + 0.3 * i))
        )
        frames.append(np.clip(blotches + 60 * stripes[:, :, None], 0, 255))
    return np.stack(frames).astype(np.uint8)


@pytest.fixture(scope="module")
def clip():
    return _clip()


@pytest.fixture(scope="module")
def head():
    return _Head(TINY.projection)


def test_the_embedding_agrees_with_transformers(clip):
    vision = ClipVision(TINY, rngs=nnx.Rngs(0))
    params = _from_hf(_tensors(clip))
    set_params(vision, {name.removeprefix("vision."): x for name, x in params.items()})
    pixels = np.random.default_rng(0).normal(size=(3, 224, 224, 3)).astype(np.float32)
    with torch.no_grad():
        expected = clip(torch.from_numpy(pixels.transpose(0, 3, 1, 2))).image_embeds.numpy()
    assert 0.5 < expected.std() < 2
    np.testing.assert_allclose(vision(jnp.asarray(pixels)), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "size", [(1280, 704), (300, 300), (224, 224), (250, 401), (96, 60), (225, 640)]
)
def test_the_score_of_raw_frames_agrees_with_transformers(clip, head, size):
    """Its image processor and its CLIP, and a head in torch. Of sizes that Pillow 13 too resizes
    width first.
    """
    ours = Reward(TINY, rngs=nnx.Rngs(0))
    set_params(ours, _from_hf(_tensors(clip)) | _from_aesthetic(_tensors(head)))
    frames = _frames(*size)
    pixels = CLIPImageProcessorPil()(
        images=list(frames), return_tensors="pt", input_data_format="channels_last"
    )
    with torch.no_grad():
        expected = head(clip(**pixels).image_embeds).numpy()
    assert np.abs(expected[:, None] - expected)[np.triu_indices(4, 1)].min() > 0.03
    np.testing.assert_allclose(ours.score(jnp.asarray(frames)), expected, rtol=0, atol=1e-3)


def test_there_and_back_gives_the_same_tensors(clip, head):
    for theirs, rules, to_ours in (
        (_tensors(clip), reward.HF_RULES, _from_hf),
        (_tensors(head), reward.AESTHETIC_RULES, _from_aesthetic),
    ):
        shapes = {name: x.shape for name, x in theirs.items()}
        back = convert(to_ours(theirs), invert(rules), shapes)
        assert back.keys() == theirs.keys()
        for name, x in theirs.items():
            np.testing.assert_array_equal(back[name], x)


def test_the_full_size_fits_the_published_listings_exactly():
    config, ours = ClipVisionConfig.vit_l14(), {}
    for listing, rules, to_ours, count, scalars in (
        ("clip_vit_l14_vision_hf", reward.HF_RULES, _from_hf, 392, 303_966_208),
        ("aesthetic_mlp_head", reward.AESTHETIC_RULES, _from_aesthetic, 10, 927_969),
    ):
        published = json.loads((LISTINGS / f"{listing}.json").read_text())
        shapes = {name: tuple(shape) for name, shape in published["tensors"].items()}
        assert len(shapes) == count
        assert (
            sum(math.prod(shape) for shape in shapes.values()) == published["num_params"] == scalars
        )
        # broadcast views stand for the tensors: the right shapes without the memory
        part = to_ours(
            {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}, config
        )
        back = convert(part, invert(rules), shapes)
        assert {name: x.shape for name, x in back.items()} == shapes
        ours |= part
    assert {name: x.shape for name, x in ours.items()} == reward.expected_shapes(config)
    assert len(ours) == 402


def test_a_whole_clip_model_is_taken_and_its_text_side_left_out(clip, tmp_path):
    tensors = _tensors(clip)
    whole = {
        **tensors,
        "vision_model.embeddings.position_ids": np.arange(65)[None],
        "text_model.embeddings.position_ids": np.arange(77)[None],
        "text_model.final_layer_norm.weight": np.ones(8),
        "text_projection.weight": np.ones((24, 8)),
        "logit_scale": np.array(4.6),
    }
    write_tensors(tmp_path / "model.safetensors", whole)
    about = {"vision_config": {"num_attention_heads": TINY.heads}}
    (tmp_path / "config.json").write_text(json.dumps(about))
    (part,) = recognise([tmp_path / "model.safetensors"])
    assert part.network is reward.CLIP and part.config == TINY
    expected = _from_hf(tensors)
    got = _from_hf({name: tensor.read() for name, tensor in part.tensors.items()})
    assert got.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_array_equal(got[name], x)


def test_every_fault_is_listed(clip, head):
    tensors = _tensors(clip)
    del tensors["vision_model.post_layernorm.bias"]
    tensors["visual_projection.bias"] = np.ones(24)
    tensors["vision_model.embeddings.position_embedding.weight"] = np.ones((50, 32))
    with pytest.raises(ConversionError, match="3 faults") as error:
        _from_hf(tensors)
    for line in (
        "missing: vision_model.post_layernorm.bias",
        "unexpected: visual_projection.bias",
        "wrong shape: vision_model.embeddings.position_embedding.weight is (50, 32), expected (65,"
        " 32)",
    ):
        assert line in str(error.value)
    tensors = _tensors(head)
    tensors["layers.1.weight"] = tensors.pop("layers.2.weight")
    with pytest.raises(ConversionError, match="2 faults") as error:
        _from_aesthetic(tensors)
    assert "unexpected: layers.1.weight" in str(error.value)
    assert "missing: layers.2.weight" in str(error.value)

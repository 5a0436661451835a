"""Text against frames: GME from an endpoint, CLIP from files made of a checkpoint."""

from __future__ import annotations

import base64
import dataclasses
import io
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from chameleon_jax.evaluation.scores import text
from chameleon_jax.evaluation.scores.base import MissingNeedError, ScoreError, Setup
from chameleon_jax.vlm import Endpoint
from tests.vlm_server import ScriptedServer

PICTURE = np.zeros((8, 8, 3), np.uint8)


def vector(*values: float) -> dict:
    return {"data": [{"embedding": list(values)}]}


def frames(*levels: int) -> np.ndarray:
    return np.stack([np.full((12, 8, 3), level, np.uint8) for level in levels])


def test_gme_is_the_mean_cosine_of_32_frames_to_the_text():
    """The text is (2, 0); 16 chosen frames point its way, the others at a right angle."""
    script = [vector(2, 0), *[vector(3, 0)] * 16, *[vector(0, 1)] * 16]
    with ScriptedServer(script) as server:
        setup = Setup(Path(), gme=Endpoint(server.url, "gme"))
        found = text.Gme(setup).score(PICTURE, PICTURE, frames(0, 90, 180, 255), "a dog")
    assert found == {"gme": pytest.approx(0.5)}
    assert len(server.requests) == 33
    first, second = (request["body"]["messages"] for request in server.requests[:2])
    assert first[0]["content"] == "Find an image that matches the given text."
    assert first[1]["content"] == [{"type": "text", "text": "a dog"}]
    assert second[0]["content"] == "You are a helpful assistant."
    _, _, data = second[1]["content"][0]["image_url"]["url"].partition("base64,")
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (8, 12)


def test_gme_of_vectors_that_do_not_fit():
    with ScriptedServer([vector(1, 0), vector(1, 0, 0)]) as server:
        gme = text.Gme(Setup(Path(), gme=Endpoint(server.url, "gme")))
        with pytest.raises(ScoreError, match="3 numbers for a frame, 2 for the text"):
            gme.score(PICTURE, PICTURE, frames(0), "a dog")


def test_gme_without_an_endpoint(tmp_path):
    with pytest.raises(MissingNeedError, match="give --gme_url and --gme_model"):
        text.Gme(Setup(tmp_path))


def tokenizer(path: Path) -> Path:
    """Words as tokens, the way CLIP's file has them: a start and an end around."""
    words = {"<|startoftext|>": 0, "<|endoftext|>": 1, "<unk>": 2, "red": 3, "blue": 4}
    made = Tokenizer(models.WordLevel(words, "<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>",
        special_tokens=[("<|startoftext|>", 0), ("<|endoftext|>", 1)],
    )
    made.save(str(path))
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A random CLIP of a few thousand parameters, exported as docs/evaluation.md says."""
    import torch
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "projection_dim": 8,
    }
    words = {"vocab_size": 5, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = CLIPConfig(
        text_config=sizes | words,
        vision_config=sizes | {"image_size": 32, "patch_size": 8},
        projection_dim=8,
    )
    model = CLIPModel(config).eval()
    folder = tmp_path_factory.mktemp("clip")
    namespace = {"model": model, "folder": folder}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch about its exporter, of transformers' branches
        exec(export_of_the_document(), namespace)
    tokenizer(folder / "clip_tokenizer.json")
    return folder, model


def export_of_the_document() -> str:
    """The lines of docs/evaluation.md that export CLIP, but for where the model comes from."""
    document = Path(__file__).parents[2] / "docs" / "evaluation.md"
    (block,) = [
        part.partition("```")[0]
        for part in document.read_text(encoding="utf-8").split("```python\n")[1:]
        if "clip_image.onnx" in part.partition("```")[0]
    ]
    lines = block.splitlines()
    return "\n".join(line for line in lines if not line.startswith(("model =", "folder =", "Auto")))


@pytest.mark.slow
def test_clip_gives_the_cosine_of_the_checkpoint(clip):
    import torch

    folder, model = clip
    rng = np.random.default_rng(0)
    video = rng.integers(0, 255, (1, 32, 32, 3), np.uint8)
    metric = text.Clip(Setup(folder))
    found = metric.score(PICTURE, PICTURE, video, "red blue red")
    ids, left_out = metric.ids("red blue red")
    assert ids[0, :5].tolist() == [0, 3, 4, 3, 1] and ids[0, 5:].tolist() == [1] * 72
    pixels = torch.tensor(text.clip_pixels(video[0], 32).transpose(2, 0, 1)[None])
    with torch.no_grad():
        out = model(input_ids=torch.tensor(ids), pixel_values=pixels)
    expected = (out.text_embeds @ out.image_embeds.T).item()
    assert found["clip"] == pytest.approx(expected, abs=1e-4)
    assert (left_out, found["tokens_left_out"]) == (0, 0)


@pytest.mark.slow
def test_clip_reads_77_tokens(clip):
    folder, _ = clip
    ids, left_out = text.Clip(Setup(folder)).ids("red " * 100)
    assert ids.shape == (1, 77) and left_out == 102 - 77
    assert ids[0, 0] == 0 and set(ids[0, 1:-1].tolist()) == {3} and ids[0, -1] == 1


def test_pixels_of_clip_are_the_middle_square():
    frame = np.zeros((40, 20, 3), np.uint8)
    frame[10:30] = 255
    shown = text.clip_pixels(frame, 20)
    np.testing.assert_allclose(
        shown, np.broadcast_to((1 - text.CLIP_MEAN) / text.CLIP_STD, (20, 20, 3))
    )


def test_a_model_of_another_name_is_another_metric():
    gme = text.Gme(Setup(Path(), gme=Endpoint("http://localhost", "gme-2B")))
    other = text.Gme(dataclasses.replace(gme.setup, gme=Endpoint("http://localhost", "gme-7B")))
    assert gme.about() != other.about()

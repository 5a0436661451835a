"""Training on stored text states is training on prompts, without the encoder."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chameleon_jax.config import ConfigError, load_config
from chameleon_jax.data import records, sources, text_states, tokenizer
from chameleon_jax.data.examples import LatentExamples
from chameleon_jax.training.networks import build_network
from chameleon_jax.training.run import open_data, run
from chameleon_jax.training.stages import common, make_stage
from chameleon_jax.training.state import TrainState
from chameleon_jax.training.texts import Texts
from chameleon_jax.weights.tensors import write_tensors


class Clips:
    """Clips of noise."""

    kind, frames_per_latent = "pixels", None
    sizes = np.array([(32, 32)] * 8)

    def __len__(self):
        return 8

    def captions(self, index):
        return {"static": f"A room of colour {index}.", "dynamic": f"Walks {index} steps."}

    def load(self, index, frames, size, start=0.0):
        pixels = np.random.default_rng(index).integers(0, 255, (frames, *size, 3), np.uint8)
        pictures = {"video": pixels, "reference": pixels[0], "garment": pixels[-1]}
        return pictures | {"captions": self.captions(index), "fps": 16, "seed": index}


def encode_pixels(pixels):
    small = pixels[:, ::4, ::8, ::8] / np.float32(100) - 1
    return np.concatenate([small, small[..., :1]], -1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Latents of both splits, a tokenizer, weights of a text encoder, and its states."""
    folder = tmp_path_factory.mktemp("data")
    texts = [text for index in range(8) for text in Clips().captions(index).values()]
    tokenizer.train_pieces(texts, 300).save(str(folder / "tokenizer.json"))
    for split in ("train", "validation"):
        examples = LatentExamples(Clips(), encode_pixels, (32, 32), 9, 4)
        records.write_latents(folder / "latents", split, examples)
    config = load_config("configs/teacher.py:smoke")
    network = build_network("text", config)
    params = network.init(jax.random.key(0))
    write_tensors(folder / "text.safetensors", {k: np.asarray(v) for k, v in params.items()})
    make_states(folder / "states", folder, config, network.bind(params))
    return folder


def make_states(out, folder, config, network, prompts=None, **changes):
    encode_ids = tokenizer.Tokenizer.from_file(folder / "tokenizer.json", 16)
    run = jax.jit(lambda ids, mask: network(ids, mask))

    def encode(prompts):
        ids, mask = encode_ids(prompts)
        return run(ids, mask), mask

    sizes = config.model.text
    about = {
        "weights": sources.file_hash(folder / "text.safetensors"),
        "tokenizer": sources.file_hash(folder / "tokenizer.json"),
        "dtype": "float32",
    }
    prompts = text_states.read_prompts(Clips(), ("", "bad")) if prompts is None else prompts
    examples = text_states.TextExamples(
        prompts, encode, sizes.width, sizes.length, **(about | changes)
    )
    text_states.write_text_states(out, "train", examples)


def settings(data, *overrides: str):
    given = [
        f"data.dir={data / 'latents'}",
        f"data.tokenizer={data / 'tokenizer.json'}",
        "train.text=false",
        "train.preview_every=0",
        "data.dropout=0.4",
        "workdir=unused",
    ]
    return load_config("configs/teacher.py:smoke", [*given, *overrides])


@pytest.mark.slow
def test_stored_states_give_the_loss_of_the_prompts(data):
    values = {}
    for name, override in (
        ("ids", f"weights.text={data}"),
        ("text", f"data.text={data / 'states'}"),
    ):
        stage = make_stage(settings(data, override))
        frozen = {n: network.load(stage.weights[n]) for n, network in stage.frozen.items()}
        assert set(frozen) == ({"text"} if name == "ids" else set())
        params = {n: network.init(jax.random.key(1)) for n, network in stage.trained.items()}
        # The head starts at zero, and would give the same for every text.
        params = jax.tree.map(
            lambda p: p + 0.1 * jax.random.normal(jax.random.key(2), p.shape), params
        )
        state = TrainState(jnp.zeros((), jnp.int32), params, None, {})
        evaluate = jax.jit(stage.evaluate)
        feed = stage.batches(open_data(settings(data), "train"))
        batches = [next(feed) for _ in range(6)]
        assert all((name in batch) and ("prompt" not in batch) for batch in batches)
        values[name] = [
            float(evaluate(state, frozen, batch, jax.random.key(3))["loss"]) for batch in batches
        ]
        if name == "text":
            other = [dict(batch, text=jnp.zeros_like(batch["text"])) for batch in batches]
            blank = [float(evaluate(state, {}, b, jax.random.key(3))["loss"]) for b in other]
    np.testing.assert_allclose(values["text"], values["ids"], rtol=1e-5)
    assert np.abs(np.subtract(blank, values["text"])).min() > 1e-3  # the text matters


def test_single_prompts_come_either_way(data):
    ids = Texts(settings(data))(["", "bad"])
    assert set(ids) == {"ids", "mask"} and ids["ids"].shape == (2, 16)
    text = Texts(settings(data, f"data.text={data / 'states'}"))(["", "bad"])["text"]
    assert text.shape == (2, 16, 16) and np.abs(text).sum((1, 2)).min() > 0
    network = build_network("text", settings(data))
    expected = network.bind(network.load(data / "text.safetensors"))(ids["ids"], ids["mask"])
    np.testing.assert_allclose(text, expected, rtol=1e-5, atol=1e-6)


def test_weights_of_the_encoder_are_exported_but_not_loaded(data):
    stored = f"data.text={data / 'states'}"
    without, given = (
        common.networks(settings(data, stored, *more)) for more in ((), (f"weights.text={data}",))
    )
    assert set(without.modules) == set(given.modules) == {"dit"}
    assert without.copied == () and given.copied == ("text",)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.text.width=32", "have width 16, model.text.width is 32; expected those of one enc"),
        ("model.text.length=8", "have length 16, model.text.length is 8; expected"),
        ("weights.text=OTHER", r"were made with another file than weights\.text .*OTHER"),
        ("data.tokenizer=OTHER", r"were made with another file than data\.tokenizer .*OTHER"),
        ("train.text=true", "data.text names states of a frozen one; set train.text=false, or"),
        ("data.text=EMPTY", "has no states of the empty prompt"),
        ("data.text=NONE", "no dataset_info.json in it; expected text states"),
    ],
)
def test_states_that_do_not_fit_are_refused(data, tmp_path, override, message):
    other = tmp_path / "OTHER.safetensors"
    other.write_bytes(b"other weights")
    config = settings(data)
    if "EMPTY" in override:
        network = build_network("text", config)
        encoder = network.bind(network.init(jax.random.key(0)))
        make_states(tmp_path / "EMPTY", data, config, encoder, prompts=["bad"])
    override = override.replace("OTHER", str(other))
    for name in ("EMPTY", "NONE"):
        override = override.replace(name, str(tmp_path / name))
    with pytest.raises(ValueError, match=message) as caught:
        config = settings(data, f"data.text={data / 'states'}", override)
        make_stage(config).batches(open_data(config, "train"))
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, (ConfigError, text_states.TextError))


@pytest.mark.slow
def test_a_teacher_trains_on_stored_states(data, tmp_path):
    run(settings(data, f"data.text={data / 'states'}", f"workdir={tmp_path}", "train.steps=2"))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert all(np.isfinite(line["loss"]) for line in lines if "loss" in line)
    exported = {path.name for path in (tmp_path / "export").iterdir()}
    assert exported == {"config.json", "dit.safetensors", "tokenizer.json"}

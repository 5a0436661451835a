"""The real stages at smoke size: they start, learn something, show it, export it, and resume."""

from __future__ import annotations

import functools
import importlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from chameleon_jax.config import ConfigError, load_config
from chameleon_jax.data import records, tokenizer
from chameleon_jax.data.examples import LatentExamples, RunwayExamples
from chameleon_jax.diffusion import flow
from chameleon_jax.diffusion.rollout import make_sampler
from chameleon_jax.inference import Pipeline
from chameleon_jax.sharding import MeshError
from chameleon_jax.training.export import inference_config, stored_model
from chameleon_jax.training.networks import build_network
from chameleon_jax.training.run import held_out_batches, open_data, run, with_stored_sizes
from chameleon_jax.training.stages import STAGES, common, make_stage, teacher_forcing
from chameleon_jax.weights.params import flat_params
from tests.training import by_hand

SIZE = (32, 32)
INFERENCE = {
    "runway_tiny": "configs/runway_tiny.py",
    "wan22_5b": "configs/wan22_5b.py",
    "smoke": "configs/runway_tiny.py:smoke",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Clips of a moving square with both splits, and a tokenizer."""
    from tests.data import fake_renderer

    folder = tmp_path_factory.mktemp("data")
    examples = RunwayExamples(size=SIZE, frames=21, render=fake_renderer.render)
    for start, clips in ((0, 8), (800_000, 4)):
        records.prepare_runway(folder / "clips", clips, examples, seed_start=start, workers=0)
    texts = [f"A person in garment {i}. Walks {i} steps." for i in range(20)]
    tokenizer.train_pieces(texts, 300).save(str(folder / "tokenizer.json"))
    return folder


def settings(data, stage: str, workdir, *overrides: str):
    common = [
        f"data.dir={data / 'clips'}",
        f"data.tokenizer={data / 'tokenizer.json'}",
        f"workdir={workdir}",
    ]
    return load_config(f"configs/{stage}", [*common, *overrides])


@pytest.fixture(scope="module")
def vae_export(data, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("vae")
    run(settings(data, "vae.py:smoke", workdir))
    return workdir / "export"


@pytest.mark.slow
def test_vae_pictures_then_clips(data, vae_export, tmp_path):
    assert {path.name for path in vae_export.iterdir()} >= {"vae.safetensors", "config.json"}
    run(settings(data, "vae.py:smoke_video", tmp_path, f"init_from={vae_export}"))
    preview = np.asarray(Image.open(tmp_path / "previews" / "step_0000004.png"))
    assert preview.ndim == 3 and preview.std() > 0
    sizes = stored_model(tmp_path / "export", "vae")
    assert np.ptp(sizes["latent_std"]) > 0 and min(sizes["latent_std"]) > 0


@pytest.mark.slow
def test_exported_latents_are_normal(data, vae_export):
    """The statistics in the exported config bring the latents to mean 0, deviation 1."""
    config = settings(
        data, "vae.py:smoke", vae_export, f"weights.vae={vae_export}", "data.in_memory=false"
    )
    config = with_stored_sizes(config)
    network = build_network("vae", config, frozen=True)
    params = network.load(vae_export / "vae.safetensors")
    batch = held_out_batches(config, make_stage(config))[0]
    z = np.asarray(network.bind(params).encode(batch["video"].astype(np.float32) / 127.5 - 1))
    np.testing.assert_allclose(z.mean((0, 1, 2, 3)), 0, atol=1e-2)
    np.testing.assert_allclose(z.std((0, 1, 2, 3)), 1, atol=1e-2)


@pytest.mark.slow
def test_teacher_then_teacher_forcing(data, vae_export, tmp_path):
    overrides = [f"weights.vae={vae_export}", "video.frames=21"]
    run(settings(data, "teacher.py:smoke", tmp_path / "teacher", *overrides))
    lines = [
        json.loads(line)
        for line in (tmp_path / "teacher" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert all(np.isfinite(line["eval/loss"]) for line in lines if "eval/loss" in line)
    norms = [[line[f"grad_norm{of}"] for of in ("", "/dit", "/text")] for line in lines[:1]]
    np.testing.assert_allclose(norms[0][0], np.hypot(*norms[0][1:]), rtol=1e-5)
    (sample,) = [line for line in lines if "sample/motion" in line]
    # Ratios may be missing: what a VAE of four steps decodes can be flat.
    assert {"sample/colour", "sample/contrast", "sample/latent_shift"} <= sample.keys()
    assert sample["sample/nonfinite"] == 0 and sample["sample/latent_std"] > 0
    assert all("tflops_per_second" in line for line in lines if "steps_per_second" in line)
    export = tmp_path / "teacher" / "export"
    assert {path.name for path in export.iterdir()} == {
        "config.json",
        "dit.safetensors",
        "text.safetensors",
        "tokenizer.json",
        "vae.safetensors",
    }
    assert (
        json.loads((export / "config.json").read_text())["model"]["vae"]
        == json.loads((vae_export / "config.json").read_text())["model"]["vae"]
    )
    workdir = tmp_path / "forcing"
    run(settings(data, "teacher_forcing.py:smoke", workdir, *overrides, f"init_from={export}"))
    assert (workdir / "export" / "dit.safetensors").is_file()
    assert (workdir / "previews" / "step_0000004.png").is_file()


@pytest.mark.slow
def test_a_pipeline_reads_what_a_run_of_a_lora_exports(data, tmp_path):
    base, export = tmp_path / "base", tmp_path / "run" / "export"
    Pipeline.random(load_config("configs/runway_tiny.py:smoke"), seed=1).save(base)
    overrides = [
        f"init_from={base}",
        f"weights.vae={base}",
        f"weights.text={base}",
        "train.text=false",
        "train.preview_every=0",
        "train.accumulate=2",
        "train.remat=attention",
        "train.scan_layers=true",
        "tune.mode=lora",
        "tune.rank=4",
    ]
    run(settings(data, "teacher.py:smoke", tmp_path / "run", *overrides))
    whole = flat_params(Pipeline.from_pretrained(export).dit)
    pipeline = Pipeline.from_pretrained(base)
    before = flat_params(pipeline.dit)
    pipeline.add_lora(export / "lora.safetensors")
    for name, value in flat_params(pipeline.dit).items():
        np.testing.assert_allclose(value, whole[name], atol=1e-6)
        linear = name.startswith("blocks.") and name.endswith(".kernel")
        assert np.array_equal(value, before[name]) != linear

    again = settings(
        data, "teacher.py:smoke", tmp_path / "run", *overrides, f"export_dir={tmp_path / 'again'}"
    )
    run(again, export_only=True)
    for name in ("dit.safetensors", "lora.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (export / name).read_bytes()


class PixelVae:
    """Four latent channels, of which three are colours; four pixel frames a latent one."""

    def bind(self, params, fixed=None):
        del params, fixed
        return self

    def decode(self, z):
        pixels = jnp.repeat(z[..., :3], 4, axis=1)[:, 3:]
        return pixels + 0.01 * jnp.arange(pixels.shape[1])[:, None, None, None]


def test_previews_are_measured_against_true_clips_and_by_chunk():
    config = load_config("configs/teacher_forcing.py:smoke", ["preview.samples=2"])
    nets = common.Networks({}, {}, {}, {"vae": PixelVae()})
    z = 0.4 * jax.random.normal(jax.random.key(0), (2, 8, 4, 4, 4))
    batch = {"z_reference": z[:, :1], "z_garment": z[:, 1:2], "z_video": z[:, 2:]}

    def generate(params, frozen, batch, key):  # the second chunk stands still
        made = batch["z_video"]
        return made.at[:, 3:].set(made[:, 2:3])

    preview = common.make_preview(config, nets, generate)
    picture, found = preview({}, {"vae": {}}, batch, jax.random.key(0))
    assert picture.dtype == np.uint8 and picture.ndim == 3
    assert found["sample/first/motion_ratio"] > 0.9 and found["sample/last/motion_ratio"] < 0.3
    assert found["sample/last/motion_ratio"] < found["sample/motion_ratio"] < 0.9
    assert 0.5 < found["sample/contrast_ratio"] < 2 and found["sample/nonfinite"] == 0
    assert all(isinstance(value, float) and np.isfinite(value) for value in found.values())


def test_batches_of_several_lengths_come_in_turn(data, tmp_path):
    config = settings(data, "teacher_forcing.py:smoke", tmp_path)
    source = open_data(config, "train")
    feed = common.batches(config, source)
    assert [next(feed)["video"].shape[:2] for _ in range(4)] == [(2, 21), (4, 9)] * 2
    assert next(common.eval_batches(config, source))["video"].shape[:2] == (2, 21)
    config.data.lengths = ((25, 2),)
    with pytest.raises(ConfigError, match=r"clips of \[25\] frames; video\.frames allows 21"):
        common.batches(config, source)
    config.data.lengths, config.train.preview_every = ((5, 2),), 0
    with pytest.raises(ConfigError, match="5 frames are 2 latent ones, a block is 3"):
        teacher_forcing.make_stage(config)
    config.cache.update(frames=6, block=2)  # chunks belong to the stream, not to the transformer
    teacher_forcing.make_stage(config)


def write_latents(folder, size, clips=8, fill=None):
    """Both splits of a set of latents for the smoke model, of clips of 9 frames."""

    class Clips:
        kind, frames_per_latent = "pixels", None
        sizes = np.array([size] * clips)

        def __len__(self):
            return clips

        def captions(self, index):
            return {"static": "A room.", "dynamic": f"Walks {index} steps."}

        def load(self, index, frames, size, start=0.0):
            pixels = np.random.default_rng(index).integers(0, 255, (frames, *size, 3), np.uint8)
            pictures = {"video": pixels, "reference": pixels[0], "garment": pixels[-1]}
            return pictures | {"captions": self.captions(index), "fps": 16, "seed": index}

    def encode(pixels):
        small = pixels[:, ::4, ::8, ::8] / np.float32(100) - 1
        return np.concatenate([small, small[..., :1]], -1)

    for split in ("train", "validation"):
        examples = LatentExamples(Clips(), encode, size, 9, 4, batch=4)
        records.write_latents(folder, split, examples)


@pytest.mark.slow
def test_a_teacher_trains_over_two_buckets(data, tmp_path):
    for size in ((32, 32), (32, 64)):
        write_latents(tmp_path / f"{size[1]}", size)
    config = settings(
        data,
        "teacher.py:smoke",
        tmp_path / "run",
        f"data.dir={tmp_path / '32'},{tmp_path / '64'}",
        "data.buckets=((32, 32), (32, 64))",
        "train.preview_every=0",
    )
    stage = make_stage(config)
    feed = stage.batches(open_data(config, "train"))
    shapes = {next(feed)["z_video"].shape[2:4] for _ in range(8)}
    assert shapes == {(4, 4), (4, 8)}
    held_out = stage.eval_batches(open_data(config, "validation"))
    assert {next(held_out)["z_video"].shape[2:4] for _ in range(4)} == {(4, 4)}
    run(config)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 4 and np.isfinite(losses).all()
    assert {line["data/broken"] for line in lines if "loss" in line} == {0.0}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "data.buckets=((32, 32), (40, 64))",
            r"data.buckets has the entry \(40, 64\); expected multiples of \(16, 16\).* \(32, 64\)",
        ),
        ("video.width=8", r"video.width are \(32, 8\); expected multiples .* \(32, 16\)"),
        ("data.buckets=((32,),)", r"data.buckets has the entry \(32,\); expected entries"),
        ("data.buckets=((32, 0),)", r"data.buckets has the entry \(32, 0\); expected entries"),
    ],
)
def test_sizes_that_no_token_fits_are_named_with_the_nearest_that_one_fits(
    data, tmp_path, override, message
):
    with pytest.raises(ConfigError, match=message):
        run(settings(data, "teacher.py:smoke", tmp_path, override))


def test_a_transformer_goes_on_saying_what_it_says(data, tmp_path):
    """Weights do not show whether they are of velocities or of clean frames; the export does."""
    (tmp_path / "dit.safetensors").touch()
    for stored, asked, found in (
        ({"says": "clean"}, "velocity", "clean"),
        ({}, "clean", "velocity"),  # of an older version, which knew nothing else
        (None, "clean", "clean"),  # weights without a config
    ):
        described = tmp_path / "config.json"
        described.unlink(missing_ok=True)
        if stored is not None:
            described.write_text(json.dumps({"model": {"dit": {"width": 32} | stored}}))
        config = settings(
            data,
            "teacher_forcing.py:smoke",
            tmp_path / "run",
            f"init_from={tmp_path}",
            f"model.dit.says={asked}",
        )
        assert with_stored_sizes(config).model.dit.says == found


def test_history_noise_is_of_one_level_per_clip_and_off_by_default():
    z = jax.random.normal(jax.random.key(0), (3, 6, 8, 8, 4))
    assert teacher_forcing.disturbed(z, 0.0, jax.random.key(1)) is z
    change = np.asarray(teacher_forcing.disturbed(z, 0.3, jax.random.key(1)) - z)
    # x - x0 = level (noise - x0), of deviation level sqrt(2)
    levels = change.std((2, 3, 4)) / 2**0.5
    assert (levels < 0.33).all() and np.ptp(levels.mean(1)) > 0.02
    np.testing.assert_allclose(
        levels, np.broadcast_to(levels.mean(1, keepdims=True), levels.shape), rtol=0.15
    )


def test_each_noise_disturbs_its_own_frames(monkeypatch):
    """A clip of one block has no history, but a reference; the second of two blocks has both.

    Resampling changes the history alone, too.
    """
    losses = by_hand.Losses(jax.random.normal(jax.random.key(0), (2, 6, 4, 4, 4)))
    names = {"history_noise", "reference_noise"}

    def loss(frames, resampled=0.0, hidden=0.0, **noise):
        config = by_hand.settings("train.text=true")
        config.resampling.update(clips=resampled, noise=hidden)
        config.loss.update({name: noise.get(name, 0.0) for name in names})
        return losses(config, frames)

    assert loss(3, history_noise=0.3) == loss(3) != loss(3, reference_noise=0.3)
    assert len({loss(6), loss(6, history_noise=0.3), loss(6, reference_noise=0.3)}) == 3
    assert loss(3, resampled=1.0) == loss(3) and loss(6, resampled=1.0) != loss(6)
    assert loss(6, resampled=1.0, hidden=0.5) not in {loss(6), loss(6, resampled=1.0)}
    # What hides reference and history from the predictions does not hide them from the loss; and
    # noise comes on top of what is predicted. So all is as without, if that is the clip itself.
    monkeypatch.setattr(teacher_forcing, "resampled", lambda forward, z, *rest: z)
    assert loss(6, resampled=1.0, hidden=0.5) == loss(6)
    assert loss(6, resampled=1.0, history_noise=0.3) == loss(6, history_noise=0.3)


def test_flow_loss_weights_each_frame():
    shape = (2, 3, 4, 4, 2)
    x0, noise, v = (jax.random.normal(jax.random.key(i), shape) for i in range(3))
    t_bf = jnp.array([[1000.0, 500.0, 4.98], [500.0, 500.0, 500.0]])
    config = load_config("configs/teacher.py:paper")
    loss, metrics = common.flow_loss(v, x0, noise, common.loss_weights(config)(t_bf))
    error = np.square(np.asarray(v) - (np.asarray(noise) - np.asarray(x0))).mean((2, 3, 4))
    weights = np.asarray(flow.training_weight_of(t_bf, 5.0))
    assert weights[0, 0] == 0 and weights[0, 1] > 2
    np.testing.assert_allclose(loss, (weights * error).mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["mse"], error.mean(), rtol=1e-5)
    config.loss.weights = "none"
    np.testing.assert_array_equal(common.loss_weights(config)(t_bf), np.ones((2, 3)))
    config.loss.weights = "bel"
    with pytest.raises(ConfigError, match=r"loss\.weights is 'bel'; expected bell or none"):
        common.loss_weights(config)


def test_missing_inputs_are_named(data, tmp_path):
    with pytest.raises(ConfigError, match=r"workdir is not set; give it as --config\.workdir"):
        run(load_config("configs/teacher.py:smoke", ["data.dir=x"]))
    with pytest.raises(ConfigError, match=r"weights\.vae is not set: previews"):
        run(settings(data, "teacher.py:smoke", tmp_path))
    with pytest.raises(ConfigError, match=r"weights\.text is not set, and train\.text is false"):
        run(
            settings(
                data, "teacher.py:smoke", tmp_path, "train.preview_every=0", "train.text=false"
            )
        )


@pytest.mark.parametrize("missing", ["init_from", "weights.vae"])
def test_weights_that_are_not_there_are_named(data, tmp_path, missing):
    given = {"weights.vae": data / "vae.safetensors", missing: tmp_path / "nowhere"}
    (data / "vae.safetensors").touch()
    overrides = [f"{key}={path}" for key, path in given.items()]
    with pytest.raises(ConfigError, match=rf"{missing}: .*nowhere.*\.safetensors does not exist"):
        run(settings(data, "teacher.py:smoke", tmp_path, *overrides))


def test_a_mesh_that_does_not_fit_is_named_before_anything_is_loaded(data, tmp_path):
    with pytest.raises(MeshError, match="mesh .* does not fit 1 devices"):
        run(settings(data, "vae.py:smoke", tmp_path, "mesh.data=3"))


def test_unknown_stages_are_refused(data, tmp_path):
    with pytest.raises(ConfigError, match="stage is 'sft'; expected one of vae, teacher, teacher_"):
        run(settings(data, "teacher.py:smoke", tmp_path, "stage=sft"))


FILES = ("vae", "teacher", "teacher_concat", "teacher_forcing", "consistency", "dmd")
RUNS = [
    (file, variant)
    for file in FILES
    for variant in importlib.import_module(f"configs.{file}").VARIANTS
]


@functools.cache
def shapes(name, sizes):
    """Of the network of that name; seconds at full size, and most configs have the same sizes."""
    return build_network(name, ConfigDict(json.loads(sizes))).shapes


@pytest.mark.parametrize(("file", "variant"), RUNS)
def test_every_config_describes_a_run(file, variant):
    config = load_config(
        f"configs/{file}.py:{variant}",
        ["workdir=x", "data.dir=y", "weights.vae=z", "weights.text=z"],
    )
    assert config.stage in STAGES
    for name in ("vae", "dit", "text"):
        train = {key: config.train[key] for key in ("remat", "scan_layers")}
        built = {"model": {name: config.model[name]}, "dtype": config.dtype, "train": train}
        assert shapes(name, ConfigDict(built).to_json(sort_keys=True))
    # What is exported is a config of inference, at the size that was trained.
    exported = inference_config(config).to_dict()
    size = next((size for size in ("smoke", "runway_tiny") if size in variant), "wan22_5b")
    inference = load_config(INFERENCE[size]).to_dict()
    assert exported.keys() == inference.keys()
    networks = {name: config.model[name].to_dict() for name in ("vae", "dit", "text")}
    assert exported["model"] == networks
    assert exported["cache"] == inference["cache"] | {"block": config.cache.block}  # 1 for stills
    frames = {"frames": inference["video"]["frames"]}
    assert exported["video"] == inference["video"] | config.video.to_dict() | frames
    # How it is sampled: in few steps where these are trained, before that in many.
    names = {
        "teacher_forcing": {"unipc", "euler"},
        "consistency": {"few_step"},
        "dmd": {"few_step"},
    }
    assert exported["sampler"]["name"] in names.get(file, {inference["sampler"]["name"]})
    make_sampler(**exported["sampler"])


def test_streams_of_the_small_model_have_a_sink_that_training_lacks():
    config = load_config("configs/teacher_forcing.py:runway_tiny", ["cache.block=2"])
    assert (config.cache.frames, config.cache.sink) == (8, 0)
    cache = inference_config(config).cache
    assert (cache.frames, cache.sink, cache.block) == (11, 3, 2)


@pytest.mark.parametrize("file", FILES)
def test_variants_of_the_configs(file):
    module = importlib.import_module(f"configs.{file}")
    for variant in module.VARIANTS:
        assert module.get_config(variant).name == variant
    with pytest.raises(ConfigError, match="no variant 'tiny'; expected one of "):
        module.get_config("tiny")

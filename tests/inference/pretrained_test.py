"""`Pipeline.from_pretrained`: our folders, public layouts, the Hub's cache, several devices."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import jax
import numpy as np
import pytest
import torch

from chameleon_jax import places
from chameleon_jax.data.tokenizer import byte_tokenizer
from chameleon_jax.inference import Pipeline
from chameleon_jax.inference.pipeline import PipelineError
from chameleon_jax.weights import tensors
from chameleon_jax.weights.params import WeightsError, flat_params
from converters import writing
from tests import tiny_wan
from tests.commands import run_converter
from tests.devices import run_on

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def public(tmp_path_factory) -> dict[str, Path]:
    """The same tiny Wan2.2 in every layout."""
    root = tmp_path_factory.mktemp("public")
    tiny_wan.pipeline().save_pretrained(root / "diffusers")
    for layout in ("jax", "official"):
        run_converter(root / "diffusers", "--to", layout, "--out", root / layout)
    return {name: root / name for name in ("jax", "official", "diffusers")}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("CHAMELEON_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def params(pipeline: Pipeline) -> dict[str, np.ndarray]:
    networks = {name: getattr(pipeline, name) for name in ("vae", "dit", "text")}
    return {
        f"{n}.{k}": np.asarray(x)
        for n, network in networks.items()
        for k, x in flat_params(network).items()
    }


def test_every_layout_gives_the_same_pipeline(public):
    expected = params(Pipeline.from_pretrained(public["jax"]))
    assert len(expected) == 203
    for layout in ("official", "diffusers"):
        pipeline = Pipeline.from_pretrained(public[layout])
        got = params(pipeline)
        assert got.keys() == expected.keys()
        assert all(np.array_equal(got[name], x) for name, x in expected.items())
        np.testing.assert_array_equal(
            pipeline.tokenizer(["a dog"])[0], byte_tokenizer(512)(["a dog"])[0]
        )


def test_a_public_layout_is_converted_once_and_again_when_a_file_changes(
    public, cache, tmp_path, monkeypatch
):
    folder = tmp_path / "copy"
    shutil.copytree(public["diffusers"], folder)
    written = []
    write = writing.write
    monkeypatch.setattr(
        writing, "write", lambda plan, out, *args: (written.append(out), write(plan, out, *args))
    )
    Pipeline.from_pretrained(folder)
    Pipeline.from_pretrained(folder)
    assert len(written) == 1 and [path.name for path in cache.iterdir()] == [written[0].name]
    config = json.loads((folder / "vae/config.json").read_text())
    config["latents_mean"][0] = 0.25
    (folder / "vae/config.json").write_text(json.dumps(config))
    assert Pipeline.from_pretrained(folder).config.model.vae.latent_mean[0] == 0.25
    assert len(written) == 2


def test_a_shard_of_pickles_that_changes_is_converted_again(public, cache, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(public["diffusers"], folder)
    (single,) = (folder / "transformer").glob("*.safetensors")
    state = {name: torch.from_numpy(x) for name, x in tensors.read_tensors(single).items()}
    single.unlink()
    stem = "diffusion_pytorch_model"
    shard = folder / "transformer" / f"{stem}-00001-of-00001.bin"
    torch.save(state, shard)
    index = {"weight_map": dict.fromkeys(state, shard.name)}
    shard.with_name(f"{stem}.bin.index.json").write_text(json.dumps(index))
    Pipeline.from_pretrained(folder)
    assert len(list(cache.iterdir())) == 1
    os.utime(shard, (0, 0))
    Pipeline.from_pretrained(folder)
    assert len(list(cache.iterdir())) == 2


def test_the_dtype_may_be_chosen(public):
    pipeline = Pipeline.from_pretrained(public["jax"], dtype="bfloat16")
    assert {x.dtype for x in flat_params(pipeline.dit).values()} == {jax.numpy.dtype("bfloat16")}
    assert pipeline.config.dtype == "bfloat16" and pipeline.dit.dtype == jax.numpy.bfloat16
    with pytest.raises(PipelineError, match="float16"):
        Pipeline.from_pretrained(public["jax"], dtype="float16")


def test_what_the_hub_fetched_before_is_found_without_a_network(public, tmp_path, monkeypatch):
    """The layout of the Hub's own cache, as `hf download` leaves it."""
    import huggingface_hub.constants

    hub = tmp_path / "hub/models--somebody--tiny"
    (hub / "refs").mkdir(parents=True)
    (hub / "refs/main").write_text("0123456789abcdef0123456789abcdef01234567")
    shutil.copytree(public["diffusers"], hub / "snapshots/0123456789abcdef0123456789abcdef01234567")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    got, expected = (
        params(Pipeline.from_pretrained("somebody/tiny")),
        params(Pipeline.from_pretrained(public["jax"])),
    )
    assert all(np.array_equal(got[name], x) for name, x in expected.items())


@pytest.mark.parametrize(
    ("name", "files"),
    [
        (
            "Wan-AI/Wan2.2-TI2V-5B",
            ("Wan2.2_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth", "google/umt5-xxl/tokenizer.json"),
        ),
        (
            "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
            ("transformer/", "text_encoder/", "tokenizer/tokenizer.json"),
        ),
        (
            "somebody/else",
            ("config.json", "dit.safetensors", "vae.safetensors", "text.safetensors"),
        ),
    ],
)
def test_without_a_network_a_hub_name_says_which_files_to_put_where(
    name, files, tmp_path, monkeypatch
):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PipelineError) as error:
        Pipeline.from_pretrained(name)
    message = str(error.value)
    assert f"hf download {name} --local-dir DIR" in message and "\n" not in message
    assert all(file in message for file in files)


def test_a_part_of_a_pipeline_says_what_is_missing(public, tmp_path):
    shutil.copytree(public["diffusers"], tmp_path / "part")
    shutil.rmtree(tmp_path / "part/text_encoder")
    with pytest.raises(
        PipelineError, match="no text among its checkpoints; a pipeline needs all three"
    ):
        Pipeline.from_pretrained(tmp_path / "part")
    shutil.copytree(public["diffusers"], tmp_path / "mute")
    shutil.rmtree(tmp_path / "mute/tokenizer")
    with pytest.raises(PipelineError, match=r"no tokenizer\.json beside .*google/umt5-xxl"):
        Pipeline.from_pretrained(tmp_path / "mute")


def test_no_room_for_the_conversion_is_one_line(public, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(PipelineError, match="the conversion has no place: .* needs"):
        Pipeline.from_pretrained(public["diffusers"])


TWO_PROCESSES = """
import os, sys
os.getpid = lambda: 7  # as in two containers
from chameleon_jax.inference import pretrained
from converters import writing
write = writing.write_entries
def slow(path, *args):
    print("begun", flush=True)
    sys.stdin.readline()
    write(path, *args)
writing.write_entries = slow
print(pretrained.find_weights(sys.argv[1]), flush=True)
"""


def test_two_processes_that_convert_at_once_both_have_the_whole(public, cache):
    """Both have begun before either goes on; the second to finish finds the folder there."""
    children = []
    for _ in range(2):
        child = subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, str(public["diffusers"])],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        children.append(child)
    for child in children:
        assert child.stdout.readline() == "begun\n"
    places = set()
    for child in children:
        out, err = child.communicate("\n\n\n")
        assert child.returncode == 0, err
        places.add(out.split()[-1])
    assert [str(path) for path in cache.iterdir()] == list(places)
    got, expected = (params(Pipeline.from_pretrained(at)) for at in (*places, public["jax"]))
    assert got.keys() == expected.keys()
    assert all(np.array_equal(got[name], x) for name, x in expected.items())


FOUR_DEVICES = """
import json, sys
import jax, numpy as np
from chameleon_jax.inference import Pipeline
from chameleon_jax import sharding
from chameleon_jax.weights.params import flat_params

jax.config.update("jax_default_matmul_precision", "highest")
folder = sys.argv[1]
mesh = sharding.make_mesh({"tensor": 3}, jax.devices()[:3])
video = {"height": 16, "width": 16, "frames": 9, "fps": 24}
config = json.load(open(folder + "/config.json")) | {"video": video}
split = Pipeline.from_pretrained(folder, config, mesh=mesh)
whole = Pipeline.from_pretrained(folder, config)
for name, x in flat_params(split.dit).items():
    assert x.sharding.spec == sharding.spec_of(name, x.shape, mesh), name
fc1 = "blocks.0.ffn.fc1.kernel"
assert flat_params(split.dit)[fc1].addressable_shards[0].data.shape == (60, 32)
assert flat_params(whole.dit)[fc1].devices() == {jax.devices()[0]}
streams = []
for pipeline in (split, whole):
    pipeline.compile()
    session = pipeline.session()
    person, garment = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    session.start(person, garment, "a dog", seed=3)
    streams.append(np.concatenate([session.next_chunk() for _ in range(2)]))
assert np.std(streams[1]) > 10
assert np.abs(streams[0].astype(int) - streams[1]).max() <= 1
print("equal")
"""


@pytest.mark.slow
def test_on_a_mesh_every_parameter_lies_on_its_shards_and_the_stream_is_the_same(public):
    run_on(4, FOUR_DEVICES, public["jax"])


def test_a_file_of_ours_that_does_not_fit_is_reported_as_before(public, tmp_path):
    shutil.copytree(public["jax"], tmp_path / "bad")
    (tmp_path / "bad/dit.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(WeightsError, match=r"dit\.safetensors: not a readable safetensors file"):
        Pipeline.from_pretrained(tmp_path / "bad")
    (tmp_path / "bad/config.json").unlink()
    with pytest.raises(PipelineError, match=r"no config\.json; expected one beside the weights"):
        Pipeline.from_pretrained(tmp_path / "bad")
    assert places.cache_folder().exists() is False  # nothing was taken for a public checkpoint


def test_a_lora_in_any_naming_is_added_to_a_pipeline(public, tmp_path):
    from tests.converters import lora_test

    path = lora_test.save(tmp_path / "lora/x.safetensors", "kohya")
    plain, merged, apart = (Pipeline.from_pretrained(public["jax"]) for _ in range(3))
    merged.add_lora(path, 0.5)
    apart.add_lora(path, 0.5, merged=False)
    before, after = flat_params(plain.dit), flat_params(merged.dit)
    changed = {
        name.removesuffix(".kernel")
        for name in before
        if not np.array_equal(before[name], after[name])
    }
    assert changed == set(lora_test.LAYERS)
    kept = flat_params(apart.dit)
    assert all(np.array_equal(kept[name], x) for name, x in before.items())
    np.testing.assert_allclose(
        lora_test._forward(apart.dit), lora_test._forward(merged.dit), atol=1e-4
    )
    with pytest.raises(PipelineError, match="not a LoRA, but a Wan2.2 VAE"):
        plain.add_lora(public["diffusers"] / "vae")
    with pytest.raises(PipelineError, match="no such file"):
        plain.add_lora(tmp_path / "nothing")
    plain.stream  # noqa: B018 (makes the programs)
    with pytest.raises(PipelineError, match="used already; add the LoRA right after loading"):
        plain.add_lora(path)


def test_no_host_copy_of_a_whole_network_exists(public, monkeypatch):
    """Tensors are read one at a time: none is still held when the next one is asked for."""
    alive, most = weakref.WeakSet(), []
    read = tensors.LazyTensor.read

    class Tracked(np.ndarray):
        """NumPy's own arrays cannot be kept in a set."""

        __hash__ = object.__hash__

    def tracked(self, *rows):
        most.append(len(alive))
        value = read(self, *rows).view(Tracked)
        alive.add(value)
        return value

    monkeypatch.setattr(tensors.LazyTensor, "read", tracked)
    Pipeline.from_pretrained(public["jax"])
    assert len(most) == 203 and max(most) <= 1

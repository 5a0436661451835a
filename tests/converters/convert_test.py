"""The converter as a whole: every network through every layout, in the reference library, and back,
bit for bit.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from chameleon_jax.config import load_config
from chameleon_jax.inference.settings import check_config, model_differences
from chameleon_jax.models.dit import DiTConfig
from chameleon_jax.models.reward import ClipVisionConfig
from chameleon_jax.models.taehv import TaehvConfig
from chameleon_jax.models.text import TextConfig
from chameleon_jax.models.vae import VaeConfig
from chameleon_jax.weights.tensors import (
    DTYPES,
    ArrayTensor,
    WeightsError,
    open_tensors,
    read_tensors,
)
from converters import convert, dit, writing
from converters.families import NETWORKS
from converters.layouts import Network
from converters.pickles import open_pickle
from converters.recognise import Part, recognise
from converters.reward import HeadConfig
from converters.rules import invert, shapes_in
from tests import tiny_wan
from tests.commands import run_converter

BF16 = DTYPES["BF16"]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A tiny pipeline, as diffusers saves it."""
    folder = tmp_path_factory.mktemp("tiny") / "diffusers"
    tiny_wan.pipeline().save_pretrained(folder)
    return folder


def run(*arguments) -> None:
    run_converter(*arguments)


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor in a folder by "file/name"."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".safetensors":
            found |= {
                f"{path.relative_to(folder)}/{name}": x for name, x in read_tensors(path).items()
            }
        elif path.suffix in (".pth", ".pt"):
            found |= {
                f"{path.relative_to(folder)}/{name}": np.array(t.array())
                for name, t in open_pickle(path).items()
            }
    return found


def assert_same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape, name
        assert a[name].tobytes() == b[name].tobytes(), name


@pytest.mark.parametrize("layout", ["official", "diffusers"])
def test_a_pipeline_goes_out_and_comes_back_bit_for_bit(source, tmp_path, layout):
    run(source, "--to", "jax", "--out", tmp_path / "ours")
    run(tmp_path / "ours", "--to", layout, "--out", tmp_path / layout)
    run(tmp_path / layout, "--to", "jax", "--out", tmp_path / "again")
    assert len(tensors_of(tmp_path / "ours")) == 203
    assert_same(tensors_of(tmp_path / "again"), tensors_of(tmp_path / "ours"))
    assert (tmp_path / "again/tokenizer.json").read_text() == (
        tmp_path / "ours/tokenizer.json"
    ).read_text()
    ours, again = (
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("ours", "again")
    )
    assert (
        tuple(ours["model"]["vae"]["latent_mean"]) == tiny_wan.VAE.latent_mean
    )  # only the config.json knows them
    assert tuple(ours["model"]["vae"]["latent_std"]) == tiny_wan.VAE.latent_std
    assert ours == again


def test_diffusers_loads_what_is_written_for_it(source, tmp_path):
    run(source, "--to", "official", "--out", tmp_path / "official")
    run(source, "--to", "jax", "--out", tmp_path / "ours")
    run(tmp_path / "ours", "--to", "diffusers", "--out", tmp_path / "theirs")
    theirs, original = (
        WanPipeline.from_pretrained(tmp_path / "theirs"),
        WanPipeline.from_pretrained(source),
    )
    for name in ("transformer", "vae", "text_encoder"):
        got, expected = getattr(theirs, name).state_dict(), getattr(original, name).state_dict()
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[key], expected[key]) for key in expected)
    assert theirs.config.expand_timesteps and theirs.scheduler.config.flow_shift == 5.0
    prompt = "a “cat” &amp; a dog"
    assert theirs.tokenizer(prompt).input_ids == original.tokenizer(prompt).input_ids
    picture = {
        "height": 16,
        "width": 16,
        "num_frames": 5,
        "num_inference_steps": 2,
        "max_sequence_length": 12,
    }
    same = [
        made(prompt, **picture, generator=torch.Generator().manual_seed(0), output_type="np").frames
        for made in (theirs, original)
    ]
    np.testing.assert_array_equal(*same)


def test_the_official_files_are_what_the_original_code_opens(source, tmp_path):
    """config.json and safetensors for the transformer; one flat dictionary in each .pth."""
    run(source, "--to", "official", "--out", tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["dim"], config["num_heads"], config["num_layers"], config["text_dim"]) == (
        60,
        3,
        2,
        16,
    )
    vae = torch.load(tmp_path / "out/Wan2.2_VAE.pth", weights_only=True)
    encoder = torch.load(
        tmp_path / "out/models_t5_umt5-xxl-enc-bf16.pth", weights_only=True, mmap=True
    )
    assert (
        vae["conv2.weight"].shape == (4, 4, 1, 1, 1)
        and "encoder.downsamples.0.downsamples.0.residual.0.gamma" in vae
    )
    assert encoder["blocks.0.pos_embedding.embedding.weight"].shape == (32, 2)
    reference = WanTransformer3DModel.from_pretrained(source / "transformer").state_dict()
    ours = open_tensors(tmp_path / "out/diffusion_pytorch_model.safetensors")
    assert np.array_equal(
        ours["blocks.1.cross_attn.k.weight"].array(), reference["blocks.1.attn2.to_k.weight"]
    )


def random_checkpoint(
    network: Network, config, layout: str, seed: int = 0
) -> dict[str, np.ndarray]:
    """Random tensors in a public layout."""
    shapes = shapes_in(invert(network.layouts[layout].rules(config)), network.expected(config))
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def tiny_clip() -> CLIPVisionModelWithProjection:
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=28,
            patch_size=14,
            projection_dim=20,
            hidden_act="quick_gelu",
        )
    )


def test_clip_goes_out_and_comes_back_in_transformers(tmp_path):
    model = tiny_clip()
    model.save_pretrained(tmp_path / "clip")
    run(tmp_path / "clip", "--to", "jax", "--out", tmp_path / "ours")
    run(tmp_path / "ours", "--to", "diffusers", "--out", tmp_path / "back")
    again = CLIPVisionModelWithProjection.from_pretrained(tmp_path / "back/image_encoder")
    for name, x in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], x), name
    assert again.config.num_attention_heads == 4 and again.config.hidden_act == "quick_gelu"


SMALL = {
    "taehv": TaehvConfig(
        z_dim=4,
        enc_width=8,
        dec_widths=(16, 8, 4, 4),
        temporal_down=(True, True, False),
        temporal_up=(False, True, True),
    ),
    "taehv_super": TaehvConfig(
        z_dim=4,
        enc_width=8,
        dec_widths=(32, 16, 8, 4),
        temporal_down=(True, True, False),
        temporal_up=(False, True, True),
        variant="super",
    ),
    "aesthetic": HeadConfig(24),
}


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_single_networks_go_out_and_come_back(tmp_path, name, suffix):
    network = NETWORKS[name]
    tensors = {
        key: torch.from_numpy(x)
        for key, x in random_checkpoint(network, SMALL[name], "official").items()
    }
    path = tmp_path / f"some_name{suffix}"
    torch.save(tensors, path) if suffix == ".pth" else save_file(tensors, path)
    run(path, "--to", "jax", "--out", tmp_path / "ours")
    (part,) = recognise([tmp_path / "ours"])
    assert part.network is network and part.config == SMALL[name]
    run(tmp_path / "ours", "--to", "official", "--out", tmp_path / "back")
    back = torch.load(tmp_path / "back" / network.layouts["official"].file, weights_only=True)
    assert back.keys() == tensors.keys() and all(
        torch.equal(back[key], x) for key, x in tensors.items()
    )


def test_a_cast_is_that_of_the_dtype_and_no_cast_changes_nothing(source, tmp_path):
    run(source, "--to", "jax", "--dtype", "bfloat16", "--out", tmp_path / "half")
    run(tmp_path / "half", "--to", "jax", "--dtype", "float32", "--out", tmp_path / "wide")
    run(source, "--to", "jax", "--out", tmp_path / "ours")
    ours, half, wide = (tensors_of(tmp_path / name) for name in ("ours", "half", "wide"))
    for name, x in ours.items():
        expected = np.asarray(jnp.asarray(x).astype(jnp.bfloat16))
        assert half[name].dtype == BF16 and half[name].tobytes() == expected.tobytes()
        np.testing.assert_array_equal(wide[name], expected.astype(np.float32))
    assert json.loads((tmp_path / "half/config.json").read_text())["dtype"] == "bfloat16"
    run(tmp_path / "half", "--to", "official", "--out", tmp_path / "kept")  # a .pth in bfloat16
    vae = torch.load(tmp_path / "kept/Wan2.2_VAE.pth", weights_only=True)
    assert {x.dtype for x in vae.values()} == {torch.bfloat16}


def test_large_networks_are_cut_into_shards_that_diffusers_reads(source, tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "SHARD", 100_000)
    run(source, "--to", "diffusers", "--out", tmp_path / "theirs")
    names = sorted(path.name for path in (tmp_path / "theirs/transformer").glob("*.safetensors"))
    assert (
        len(names) > 3
        and names[0] == f"diffusion_pytorch_model-00001-of-{len(names):05d}.safetensors"
    )
    theirs = WanTransformer3DModel.from_pretrained(tmp_path / "theirs/transformer").state_dict()
    for name, x in (
        WanTransformer3DModel.from_pretrained(source / "transformer").state_dict().items()
    ):
        assert torch.equal(theirs[name], x)
    run(tmp_path / "theirs", "--to", "jax", "--out", tmp_path / "again")
    run(source, "--to", "jax", "--out", tmp_path / "ours")
    assert_same(tensors_of(tmp_path / "again"), tensors_of(tmp_path / "ours"))


def official_dit(seed: int = 0) -> dict[str, torch.Tensor]:
    tensors = random_checkpoint(dit.DIT, tiny_wan.DIT, "official", seed)
    return {name: torch.from_numpy(x) for name, x in tensors.items()}


def write_about(folder: Path) -> None:
    about = dit.DIT.layouts["official"].about(tiny_wan.DIT)
    (folder / "config.json").write_text(json.dumps(about))


WRAPPED = {
    "model": lambda name: f"model.{name}",
    "FSDP": lambda name: (
        f"model._fsdp_wrapped_module.{name.replace('blocks.1.', 'blocks.1._fsdp_wrapped_module.')}"
    ),
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "checkpointing": lambda name: name.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module."),
    "DDP": lambda name: f"module.{name}",
    "ComfyUI": lambda name: f"model.diffusion_model.{name}",
}


@pytest.mark.parametrize("wrapped", WRAPPED)
def test_prefixes_and_wrappers_are_taken_off(tmp_path, wrapped):
    plain = official_dit()
    torch.save({WRAPPED[wrapped](name): x for name, x in plain.items()}, tmp_path / "model.pt")
    write_about(tmp_path)
    (part,) = recognise([tmp_path / "model.pt"])
    assert (
        part.network is dit.DIT
        and part.layout == "official"
        and part.tensors.keys() == plain.keys()
    )
    assert all(np.array_equal(part.tensors[name].array(), x.numpy()) for name, x in plain.items())


def test_of_a_training_checkpoint_the_average_is_taken_unless_another_part_is_named(
    tmp_path, capsys
):
    """Four stages' worth of parts, and beside them what is not a network: a step, an optimiser's
    state.
    """
    parts = {
        name: official_dit(seed)
        for seed, name in enumerate(("generator", "critic", "generator_ema"))
    }
    stored = {
        name: {f"model.{key}": x for key, x in tensors.items()} for name, tensors in parts.items()
    }
    optimiser = {
        "state": {0: {"exp_avg": torch.ones(3), "step": torch.tensor(7.0)}},
        "param_groups": [{"lr": 1e-4}],
    }
    torch.save(stored | {"step": 3, "optimizer": optimiser}, tmp_path / "model.pt")
    write_about(tmp_path)
    run(tmp_path / "model.pt", "--to", "official", "--out", tmp_path / "default")
    said = capsys.readouterr().out
    assert "behind 'generator_ema.model.'" in said and "generator, critic too" in said
    run(tmp_path / "model.pt", "--part", "critic", "--to", "official", "--out", tmp_path / "critic")
    for folder, part in (("default", "generator_ema"), ("critic", "critic")):
        written = read_tensors(tmp_path / folder / "diffusion_pytorch_model.safetensors")
        assert written.keys() == parts[part].keys()
        assert all(np.array_equal(written[key], x.numpy()) for key, x in parts[part].items())


def test_the_layout_of_training_checkpoints_goes_out_and_comes_back(source, tmp_path):
    run(
        source / "transformer",
        "--to",
        "training",
        "--part",
        "generator_ema",
        "--out",
        tmp_path / "out",
    )
    content = torch.load(tmp_path / "out/model.pt", weights_only=True)
    assert (
        content.keys() == {"generator_ema"}
        and "model.blocks.0.self_attn.q.weight" in content["generator_ema"]
    )
    run(tmp_path / "out/model.pt", "--to", "diffusers", "--out", tmp_path / "back")
    back = read_tensors(tmp_path / "back/transformer/diffusion_pytorch_model.safetensors")
    assert_same(back, read_tensors(source / "transformer/diffusion_pytorch_model.safetensors"))


def test_the_table_that_names_everything_finds_the_published_sizes():
    """From the listings of the full-size checkpoints alone, without a config.json."""
    folder = Path(__file__).parent.parent / "data_files"
    listings = {
        "dit": ["wan22_ti2v_5b_dit_official", "wan22_ti2v_5b_dit_diffusers"],
        "vae": ["wan22_vae_official", "wan22_vae_diffusers"],
        "text": ["umt5_xxl_encoder_official", "umt5_xxl_encoder_hf"],
        "taehv": ["taehv_taew2_2"],
        "taehv_super": ["taehv_taew2_2_super"],
        "clip": ["clip_vit_l14_vision_hf"],
    }
    full = {
        "dit": DiTConfig.wan22_ti2v_5b(),
        "vae": VaeConfig.wan22(),
        "text": TextConfig.umt5_xxl(),
        "taehv": TaehvConfig.taew2_2(),
        "taehv_super": TaehvConfig.taew2_2_super(),
        "clip": ClipVisionConfig.vit_l14(),
    }
    for name, files in listings.items():
        for file in files:
            listing = json.loads((folder / f"{file}.json").read_text())["tensors"]
            shapes = {key: tuple(shape) for key, shape in listing.items()}
            layout = NETWORKS[name].layouts[
                "official" if "official" in file or "taehv" in name else "diffusers"
            ]
            assert NETWORKS[name].sizes(shapes_in(layout.rules(None), shapes), {}) == full[name]


@pytest.mark.parametrize("piece", [64, 4096])
def test_tensors_written_in_pieces_are_whole(tmp_path, monkeypatch, piece):
    from chameleon_jax.weights import tensors

    monkeypatch.setattr(tensors, "PIECE", piece)
    rng = np.random.default_rng(0)
    values = {
        "tall": rng.standard_normal((301, 7), np.float32),
        "wide": rng.standard_normal((3, 999)).astype(BF16),
        "turned": np.arange(24.0).reshape(4, 6).T,
        "scalar": np.float32(2.5).reshape(()),
        "empty": np.zeros((0, 4), np.float16),
    }
    tensors.write_tensors(tmp_path / "x.safetensors", values, {"who": "me"})
    assert_same(
        {k: np.ascontiguousarray(v) for k, v in read_tensors(tmp_path / "x.safetensors").items()},
        {k: np.ascontiguousarray(v) for k, v in values.items()},
    )
    assert tensors.read_metadata(tmp_path / "x.safetensors") == {"who": "me"}


def test_a_strided_or_shared_tensor_of_a_pickle_is_read_as_torch_reads_it(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    content = {
        "turned": base.T,
        "rows": base[1:3],
        "column": base[:, 2],
        "parameter": torch.nn.Parameter(base[0].clone()),
        "nested": {"list": [torch.ones(2, dtype=torch.bfloat16)]},
    }
    torch.save(content, tmp_path / "x.pt")
    found = open_pickle(tmp_path / "x.pt")
    for name in ("turned", "rows", "column", "parameter"):
        np.testing.assert_array_equal(found[name].array(), content[name].detach().numpy())
    np.testing.assert_array_equal(found["nested.list.0"].array().astype(np.float32), [1, 1])


def test_a_killed_conversion_leaves_nothing_that_looks_whole_and_the_next_one_clears_it_away(
    source, tmp_path
):
    """Killed while it writes: the first tensor takes for ever."""
    script = (
        "import sys, time\n"
        "from converters import writing\n"
        "from tests.commands import run_converter\n"
        "write = writing.write_entries\n"
        "def slow(path, entries, *args):\n"
        "    write(path, entries, *args); print('begun', flush=True); time.sleep(60)\n"
        "writing.write_entries = slow\n"
        f"run_converter({str(source)!r}, '--to', 'jax', '--out', {str(tmp_path / 'out')!r})\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    while child.stdout.readline().strip() != "begun":
        assert child.poll() is None
    child.kill()
    child.wait()
    (left,) = tmp_path.iterdir()
    assert left.name.startswith("out.part-")
    run(source, "--to", "jax", "--out", tmp_path / "out")
    assert left.exists()  # it might still be growing, on another machine
    make_old(left)
    run(source, "--to", "jax", "--out", tmp_path / "again")
    assert left.exists()  # of another folder
    shutil.rmtree(tmp_path / "out")
    run(source, "--to", "jax", "--out", tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["again", "out"]


def make_old(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        os.utime(path, (0, 0))


def test_a_folder_that_is_locked_is_no_leftover_however_old_it_is(source, tmp_path):
    growing = tmp_path / "out.part-0123"
    growing.mkdir()
    with open(growing / writing.LOCK, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        make_old(growing)
        run(source / "vae", "--to", "jax", "--out", tmp_path / "out")
        assert growing.exists()
    shutil.rmtree(tmp_path / "out")
    run(source / "vae", "--to", "jax", "--out", tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]


def test_a_folder_that_appears_meanwhile_is_kept(source, tmp_path, monkeypatch):
    fill = writing._fill

    def slow(part, *args):
        fill(part, *args)
        (tmp_path / "out").mkdir()
        (tmp_path / "out/mine").write_text("keep")

    monkeypatch.setattr(writing, "_fill", slow)
    with pytest.raises(writing.DestinationError, match="exists already"):
        run(source / "vae", "--to", "jax", "--out", tmp_path / "out")
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["out", "out/mine"]


def test_a_symbolic_link_as_the_destination_is_followed(source, tmp_path):
    (tmp_path / "disk/empty").mkdir(parents=True)
    for name, target in (("new", "disk/new"), ("empty", "disk/empty")):
        (tmp_path / name).symlink_to(tmp_path / target)
        run(source / "vae", "--to", "jax", "--out", tmp_path / name)
        assert (tmp_path / name).is_symlink()
        assert sorted(os.listdir(tmp_path / target)) == ["config.json", "vae.safetensors"]
    with pytest.raises(writing.DestinationError, match="exists already"):
        run(source / "vae", "--to", "jax", "--out", tmp_path / "new")


@pytest.mark.parametrize("bad", ["x" * 300, "x" * 300 + "/out", "file/out", "file"])
def test_a_name_that_no_folder_can_have_is_refused_at_once(source, tmp_path, bad):
    (tmp_path / "file").touch()
    with pytest.raises(writing.DestinationError, match="choose a(nother| shorter) name") as e:
        run(source / "vae", "--to", "jax", "--out", tmp_path / bad)
    assert "\n" not in str(e.value)
    assert os.listdir(tmp_path) == ["file"]


def test_a_name_as_long_as_names_can_be_is_taken(source, tmp_path):
    run(source / "vae", "--to", "jax", "--out", tmp_path / ("ü" * 127))
    assert os.listdir(tmp_path) == ["ü" * 127]


def test_folders_made_on_the_way_vanish_with_a_failed_conversion(source, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing, "write_entries", full)
    with pytest.raises(writing.DestinationError, match="No space left on device.*nothing was left"):
        run(source / "vae", "--to", "jax", "--out", tmp_path / "a/b/out")
    assert os.listdir(tmp_path) == []


def test_a_fault_on_the_disk_is_found_when_it_is_read_back(source, tmp_path, monkeypatch):
    write = writing.write_entries

    def spoil(path, *args):
        write(path, *args)
        with open(path, "r+b") as file:
            file.seek(-5, os.SEEK_END)
            file.write(b"\x7f")

    monkeypatch.setattr(writing, "write_entries", spoil)
    with pytest.raises(WeightsError, match="is not what was written"):
        run(source / "vae", "--to", "jax", "--out", tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_of_a_whole_clip_only_the_vision_side_is_taken(tmp_path):
    tensors = {name: x.clone() for name, x in tiny_clip().state_dict().items()}
    more = {
        "text_model.embeddings.token_embedding.weight": torch.ones(9, 4),
        "text_projection.weight": torch.ones(4, 4),
        "logit_scale": torch.tensor(1.0),
        "vision_model.embeddings.position_ids": torch.arange(5)[None],
    }
    save_file(tensors | more, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"vision_config": {"num_attention_heads": 4}}))
    run(tmp_path, "--to", "jax", "--out", tmp_path / "ours")
    assert len(read_tensors(tmp_path / "ours/clip.safetensors")) == len(tensors)


def test_lazy_and_plain_tensors_give_the_same_plan():
    """The engine looks at shapes and dtypes only."""
    tensors = random_checkpoint(dit.DIT, tiny_wan.DIT, "official")
    rules, expected = dit.OFFICIAL_RULES, dit.DIT.expected(tiny_wan.DIT)
    lazy = {name: ArrayTensor(x) for name, x in tensors.items()}
    assert convert.plan(tensors, rules, expected) == convert.plan(lazy, rules, expected)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_checkpoint(tmp_path, monkeypatch):
    """Five layers of the 5B transformer, 1.8 GB in bfloat16, less than half of it resident."""
    from tests.converters import full_size

    monkeypatch.setitem(
        full_size.SIZES, "dit", dataclasses.replace(DiTConfig.wan22_ti2v_5b(), layers=5)
    )
    nbytes = full_size.write_random("dit", "official", "BF16", tmp_path / "public")
    *_, there = full_size.measure(
        str(tmp_path / "public"), "--to", "jax", "--out", str(tmp_path / "ours")
    )
    shutil.rmtree(tmp_path / "public")
    *_, back = full_size.measure(
        str(tmp_path / "ours"), "--to", "official", "--out", str(tmp_path / "back")
    )
    assert nbytes > 1.75e9 and max(there, back) < 0.85


@pytest.mark.parametrize("config", ["wan22_ti2v", "wan22_5b", "longlive2_5b"])
def test_the_public_checkpoint_is_what_the_5b_configs_ask_for(config):
    """Sizes as converted, without any weights: `launch.sample --config` takes the folder."""
    full = {
        "dit": DiTConfig.wan22_ti2v_5b(),
        "vae": VaeConfig.wan22(),
        "text": TextConfig.umt5_xxl(),
    }
    parts = {
        name: Part(NETWORKS[name], "official", {}, sizes, Path("x"), "", "")
        for name, sizes in full.items()
    }
    stored = json.loads(json.dumps(convert.our_config(parts)))
    asked = check_config(load_config(f"{Path(__file__).parents[2]}/configs/{config}.py"))
    assert model_differences(asked, stored) == ""
    check_config(stored)


def test_files_from_several_places_make_one_pipeline(source, tmp_path):
    """A transformer that others trained, with the VAE and the text encoder of the base model."""
    run(source, "--to", "official", "--out", tmp_path / "base")
    tensors = official_dit(seed=5)
    torch.save(
        {"generator": {f"model.{name}": x for name, x in tensors.items()}, "merged_lora": True},
        tmp_path / "model.pt",
    )
    write_about(tmp_path)
    files = [
        tmp_path / "base" / name for name in ("Wan2.2_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth")
    ]
    run(tmp_path / "model.pt", *files, "--to", "jax", "--out", tmp_path / "ours")
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == [
        "config.json",
        "dit.safetensors",
        "text.safetensors",
        "tokenizer.json",
        "vae.safetensors",
    ]
    kernel = read_tensors(tmp_path / "ours/dit.safetensors")["blocks.1.ffn.fc1.kernel"]
    np.testing.assert_array_equal(kernel, tensors["blocks.1.ffn.0.weight"].numpy().T)

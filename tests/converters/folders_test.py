"""Folders as they come from the Hub: variants, copies, stray files, LoRAs beside a model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from chameleon_jax.inference import Pipeline, PipelineError
from chameleon_jax.weights.tensors import read_tensors, write_tensors
from converters import __main__ as command
from converters import folders
from converters.recognise import RecognitionError, find_lora, look
from tests import tiny_wan
from tests.converters import lora_test
from tests.converters.hostile_test import Evil

TRANSFORMER = "transformer/diffusion_pytorch_model"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A tiny pipeline as diffusers saves it: full precision, and the variant fp16 in shards."""
    folder = tmp_path_factory.mktemp("tiny") / "diffusers"
    made = tiny_wan.pipeline()
    made.save_pretrained(folder)
    made.to(torch.float16).save_pretrained(folder, variant="fp16", max_shard_size="100KB")
    return folder


@pytest.fixture
def folder(source, tmp_path) -> Path:
    return shutil.copytree(source, tmp_path / "in")


def kinds(found) -> dict[str, set[str]]:
    return {
        part.network.name: {tensor.dtype.name for tensor in part.tensors.values()}
        for part in found.parts
    }


def test_the_library_names_variants_as_we_read_them(source):
    """diffusers and transformers wrote these names."""
    names = {str(path.relative_to(source)) for path in source.rglob("*.json")}
    assert f"{TRANSFORMER}.safetensors.index.fp16.json" in names
    checkpoints, leftovers = folders.find(source)
    assert leftovers == [] and not any(checkpoint.lacking for checkpoint in checkpoints)
    assert {checkpoint.variant for checkpoint in checkpoints} == {"", "fp16"}
    assert len({checkpoint.copy_of for checkpoint in checkpoints}) == 3


def test_full_precision_is_used_and_the_variant_named(source):
    found = look([source])
    assert kinds(found) == {name: {"float32"} for name in ("dit", "vae", "text")}
    said = "\n".join(found.notes)
    assert f"{TRANSFORMER}.safetensors.index.fp16.json: another copy of" in said
    assert len(found.notes) == 3


def test_a_variant_is_used_if_it_is_asked_for(source, tmp_path, capsys):
    found = look([source], variant="fp16")
    assert kinds(found) == {name: {"float16"} for name in ("dit", "vae", "text")}
    with pytest.raises(RecognitionError, match="no variant 'fp8'; it has fp16"):
        look([source], variant="fp8")
    arguments = [source / "transformer", "--variant", "fp16", "--to", "jax"]
    lora_test.run(*arguments, "--out", tmp_path / "out")
    written = read_tensors(tmp_path / "out/dit.safetensors")
    assert {x.dtype.name for x in written.values()} == {"float16"}
    assert "note: not used: " in capsys.readouterr().err


def test_a_variant_alone_is_used(folder):
    for path in folder.rglob("*.safetensors"):
        if "fp16" not in path.name:
            path.unlink()
    found = look([folder])
    assert kinds(found)["dit"] == {"float16"} and found.notes == []


@pytest.mark.parametrize("index", [True, False])
def test_of_shards_of_two_variants_the_complete_ones_are_used(folder, index):
    """The full one in shards too, one of which is missing; with and without its index."""
    whole = folder / f"{TRANSFORMER}.safetensors"
    tensors, place = read_tensors(whole), {}
    whole.unlink()
    for i in range(2):
        name = f"diffusion_pytorch_model-{i + 1:05d}-of-00002.safetensors"
        part = {key: x for j, (key, x) in enumerate(tensors.items()) if j % 2 == i}
        place |= dict.fromkeys(part, name)
        write_tensors(folder / "transformer" / name, part)
    if index:
        text = json.dumps({"weight_map": place})
        (folder / f"{TRANSFORMER}.safetensors.index.json").write_text(text)
    assert kinds(look([folder]))["dit"] == {"float32"}
    second = folder / f"{TRANSFORMER}-00002-of-00002.safetensors"
    second.unlink()
    found = look([folder])
    assert kinds(found)["dit"] == {"float16"}
    assert "another copy" in "; ".join(found.notes) and len(found.notes) == 3
    for path in (folder / "transformer").glob("*fp16-00001*"):
        path.unlink()
    with pytest.raises(folders.WeightsError, match="shards are missing") as error:
        look([folder])
    assert second.name in str(error.value) and "download" not in str(error.value)


@pytest.mark.parametrize("late", [False, True])
def test_shards_of_both_ways_of_naming_a_variant_need_no_index(folder, late):
    (index,) = (folder / "transformer").glob("*.index.fp16.json")
    index.unlink()
    (folder / f"{TRANSFORMER}.safetensors").unlink()
    if late:  # as older releases of diffusers name them
        for path in (folder / "transformer").glob("*.fp16-*"):
            name = path.name.replace(".fp16-", "-").replace(".safetensors", ".fp16.safetensors")
            path.rename(path.with_name(name))
    assert kinds(look([folder], variant="fp16"))["dit"] == {"float16"}


def test_safetensors_come_before_pickles(folder):
    """Pickles with code beside them are not even opened; without them pickles are read."""
    torch.save({"x": Evil("true")}, folder / f"{TRANSFORMER}.bin")
    torch.save({"x": Evil("true")}, folder / "text_encoder/pytorch_model.bin")
    found = look([folder])
    assert kinds(found) == {name: {"float32"} for name in ("dit", "vae", "text")}
    assert f"{folder / TRANSFORMER}.bin: another copy of" in "\n".join(found.notes)
    tensors = read_tensors(folder / "text_encoder/model.safetensors")
    for path in (folder / "text_encoder").glob("model.*"):
        path.unlink()
    place = {}
    for i in range(2):
        name = f"pytorch_model-{i + 1:05d}-of-00002.bin"
        part = {key: torch.tensor(x) for j, (key, x) in enumerate(tensors.items()) if j % 2 == i}
        place |= dict.fromkeys(part, name)
        torch.save(part, folder / "text_encoder" / name)
    index = folder / "text_encoder/pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": place}))
    (part,) = (part for part in look([folder]).parts if part.network.name == "text")
    assert part.path == index
    assert {name: x.shape for name, x in part.tensors.items()} == {
        name: x.shape for name, x in tensors.items()
    }


def test_a_damaged_copy_is_named_and_a_sound_one_used(folder):
    (folder / f"{TRANSFORMER}.safetensors").write_bytes(b"\0" * 50)
    found = look([folder])
    assert kinds(found)["dit"] == {"float16"}
    assert "diffusion_pytorch_model.safetensors: not a readable" in "\n".join(found.notes)


def test_stray_pickles_are_named(folder):
    for name in ("optimizer.bin", "training_args.bin", "my_state.pt"):
        torch.save({"x": Evil("true")}, folder / "transformer" / name)
    torch.save({"step": torch.ones(3)}, folder / "transformer/progress.pt")
    found = look([folder])
    assert len(found.parts) == 3
    said = "\n".join(found.notes)
    for name in ("optimizer.bin", "training_args.bin", "my_state.pt", "progress.pt"):
        assert f"/{name}: " in said


def test_a_published_file_that_cannot_be_read_is_never_left_aside(source, tmp_path):
    lora_test.run(source, "--to", "official", "--out", tmp_path / "official")
    torch.save({"x": Evil("true")}, tmp_path / "official/Wan2.2_VAE.pth")
    with pytest.raises(folders.WeightsError, match=r"Wan2.2_VAE.pth: refused"):
        look([tmp_path / "official"])
    (tmp_path / "official/Wan2.2_VAE.pth").write_bytes(b"PK")
    with pytest.raises(folders.WeightsError, match=r"Wan2.2_VAE.pth: the archive is cut off"):
        look([tmp_path / "official"])


def test_a_foreign_model_beside_ours_is_named_and_in_its_place_refused(source, tmp_path):
    lora_test.run(source, "--to", "official", "--out", tmp_path / "official")
    foreign = {"encoder.downsamples.0.residual.0.gamma": torch.ones(4)}
    torch.save(foreign, tmp_path / "official/Wan2.1_VAE.pth")
    found = look([tmp_path / "official"])
    assert len(found.parts) == 3 and "this is the VAE of Wan 2.1" in "\n".join(found.notes)
    (tmp_path / "official/Wan2.2_VAE.pth").unlink()
    with pytest.raises(RecognitionError, match="this is the VAE of Wan 2.1"):
        look([tmp_path / "official"])


def test_a_lora_beside_the_model_is_named_and_merged_if_asked(folder, tmp_path, capsys):
    path = lora_test.save(folder / "style.safetensors", "kohya")
    found = look([folder])
    assert [part.network.name for part in found.parts].count("lora") == 0
    assert f"{path}: a LoRA that lies beside the model is not used; --lora" in found.notes[-1]
    lora_test.run(folder / "transformer", "--to", "jax", "--out", tmp_path / "plain")
    lora_test.run(folder, "--lora", folder, "--to", "jax", "--out", tmp_path / "styled")
    names = sorted(path.name for path in (tmp_path / "styled").iterdir())
    assert "lora.safetensors" not in names and "dit.safetensors" in names
    plain, styled = (
        read_tensors(tmp_path / name / "dit.safetensors") for name in ("plain", "styled")
    )
    changed = {name for name in plain if not np.array_equal(plain[name], styled[name])}
    assert changed == {f"{layer}.kernel" for layer in lora_test.LAYERS}
    assert f"note: {path}: a LoRA that lies beside" in capsys.readouterr().err


def test_of_two_loras_in_a_folder_one_must_be_named(tmp_path):
    for name in ("a", "b"):
        lora_test.save(tmp_path / f"{name}.safetensors", "official")
    with pytest.raises(RecognitionError, match="holds 2 LoRAs; name one of them: .*a.*, .*b") as e:
        find_lora(tmp_path)
    assert "\n" not in str(e.value)
    with pytest.raises(RecognitionError, match="2 candidates for the LoRA"):
        look([tmp_path])
    (tmp_path / "b.safetensors").unlink()
    assert find_lora(tmp_path).path == tmp_path / "a.safetensors"


def test_a_lora_is_found_whatever_lies_beside_it(tmp_path):
    path = lora_test.save(tmp_path / "style.safetensors", "official")
    save_file({"a": torch.ones(3)}, tmp_path / "other.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"\0")
    torch.save({"x": Evil("true")}, tmp_path / "optimizer.pt")
    assert find_lora(tmp_path).path == path


def test_a_pipeline_takes_folders_and_loras_by_the_same_rules(
    folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("CHAMELEON_CACHE", str(tmp_path / "cache"))
    lora_test.save(folder / "style.safetensors", "kohya")
    torch.save({"x": Evil("true")}, folder / f"{TRANSFORMER}.bin")
    pipeline = Pipeline.from_pretrained(folder)
    assert "note: not used: " in capsys.readouterr().err
    pipeline.add_lora(folder)
    lora_test.save(folder / "other.safetensors", "kohya")
    with pytest.raises(PipelineError, match="holds 2 LoRAs; name one of them"):
        Pipeline.from_pretrained(folder).add_lora(folder)


@pytest.mark.parametrize("path", ["x" * 300, "nothing", "a_file/x"])
def test_a_path_that_is_not_there_is_one_line(tmp_path, path, monkeypatch, capsys):
    (tmp_path / "a_file").touch()
    arguments = [str(tmp_path / path), "--to", "jax", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stop:
        command.main(arguments)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1

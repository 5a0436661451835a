"""What people really have on their disks: each is refused with a message that says what it is, and
nothing is written.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from chameleon_jax.models.dit import DiTConfig
from chameleon_jax.models.text import TextConfig
from chameleon_jax.weights.tensors import write_tensors
from converters import pickles, writing
from converters.dit import DIT
from converters.rules import invert, shapes_in
from converters.text import TEXT
from launch import convert as command
from tests import tiny_wan
from tests.commands import run_converter


def shapes_of(config, layout: str = "official") -> dict[str, tuple[int, ...]]:
    return shapes_in(invert(DIT.layouts[layout].rules(config)), DIT.expected(config))


@pytest.fixture(scope="module")
def good() -> dict[str, np.ndarray]:
    """A transformer that fits, in the original layout."""
    rng = np.random.default_rng(0)
    return {
        name: rng.standard_normal(shape, np.float32)
        for name, shape in shapes_of(tiny_wan.DIT).items()
    }


@pytest.fixture
def folder(tmp_path) -> Path:
    """Where the hostile thing lies, with the config.json of the tiny transformer."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in/config.json").write_text(
        json.dumps(DIT.layouts["official"].about(tiny_wan.DIT))
    )
    return tmp_path / "in"


@pytest.fixture
def refused(folder, monkeypatch, capsys):
    """Run the command; it must fail with code 2, one message, and leave everything as it was."""

    def check(path: Path, *flags: str) -> str:
        before = sorted(folder.parent.rglob("*"))
        arguments = [str(path), "--to", "jax", "--out", str(folder.parent / "out"), *flags]
        monkeypatch.setattr(sys, "argv", ["converters", *arguments])
        with pytest.raises(SystemExit) as error:
            command.main()
        assert error.value.code == 2
        assert sorted(folder.parent.rglob("*")) == before
        said = capsys.readouterr().err
        assert "error: " in said and "Traceback" not in said
        return said[said.index("error: ") :]

    return check


def test_the_good_one_is_taken(good, folder):
    """Otherwise the tests below show nothing."""
    write_tensors(folder / "dit.safetensors", good)
    run_converter(folder, "--to", "jax", "--out", folder.parent / "out")


@pytest.mark.parametrize("kept", [0, 5, 100, 0.5, 0.999])
def test_truncated_safetensors(good, folder, refused, kept):
    path = folder / "dit.safetensors"
    write_tensors(path, good)
    size = path.stat().st_size
    os.truncate(path, int(kept * size) if isinstance(kept, float) else kept)
    assert "dit.safetensors: not a readable safetensors file" in refused(path)


@pytest.mark.parametrize("length", [2**30, 2**63, 2**64 - 1])
def test_a_header_of_a_gigabyte(folder, refused, length):
    path = folder / "dit.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{" + b" " * 1000)
    assert "not a readable safetensors file" in refused(path)


def test_a_header_that_is_not_true(folder, refused):
    for about in (
        {"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 400]}},
        {"x": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 16]}},
        {"x": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}},
        {name: {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} for name in "ab"},
        ["x"],
    ):
        text = json.dumps(about).encode()
        (folder / "dit.safetensors").write_bytes(
            len(text).to_bytes(8, "little") + text + b"\0" * 16
        )
        assert "not a readable safetensors file" in refused(folder / "dit.safetensors")


def test_wrong_dtype(good, folder, refused):
    tensors = good | {"blocks.0.ffn.0.weight": good["blocks.0.ffn.0.weight"].astype(np.int8)}
    write_tensors(folder / "dit.safetensors", tensors)
    assert "wrong dtype: blocks.0.ffn.0.weight is int8, expected float32" in refused(folder)


def test_transposed_matrix(good, folder, refused):
    write_tensors(
        folder / "x.safetensors", good | {"blocks.1.ffn.2.weight": good["blocks.1.ffn.2.weight"].T}
    )
    assert "blocks.1.ffn.2.weight is (96, 60), expected (60, 96): it is transposed" in refused(
        folder
    )


def test_all_faults_come_together(good, folder, refused):
    tensors = {name: x for name, x in good.items() if not name.startswith("head.head")}
    tensors |= {
        "blocks.0.self_atn.q.bias": tensors.pop("blocks.0.self_attn.q.bias"),
        "head.modulation": np.ones((1, 3, 60)),
    }
    write_tensors(folder / "x.safetensors", tensors)
    said = refused(folder)
    assert "(5 faults)" in said
    assert "missing: blocks.0.self_attn.q.bias (nearest: blocks.0.self_atn.q.bias)" in said
    assert "unexpected: blocks.0.self_atn.q.bias (nearest: blocks.0.self_attn.q.bias)" in said
    assert "missing: head.head.weight" in said and "missing: head.head.bias" in said
    assert "wrong shape: head.modulation is (1, 3, 60), expected (1, 2, 60)" in said


def _shards(good, folder: Path, lacking: int | None = None, index: bool = True) -> None:
    place = {}
    for i in range(3):
        name = f"diffusion_pytorch_model-{i + 1:05d}-of-00003.safetensors"
        part = {key: x for j, (key, x) in enumerate(good.items()) if j % 3 == i}
        place |= dict.fromkeys(part, name)
        if i != lacking:
            write_tensors(folder / name, part)
    if index:
        (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(
            json.dumps({"weight_map": place})
        )


def test_a_missing_shard(good, folder, refused):
    _shards(good, folder, lacking=1)
    said = refused(folder)
    assert "1 of 3 shards are missing: diffusion_pytorch_model-00002-of-00003.safetensors" in said


def test_a_missing_shard_without_an_index_and_one_shard_alone(good, folder, refused):
    _shards(good, folder, lacking=2, index=False)
    said = refused(folder)
    assert "1 of 3 shards are missing: diffusion_pytorch_model-00003-of-00003.safetensors" in said
    said = refused(folder / "diffusion_pytorch_model-00001-of-00003.safetensors")
    assert "one shard of 3; give its folder" in said


def test_an_index_that_lies(good, folder, refused):
    _shards(good, folder)
    path = folder / "diffusion_pytorch_model.safetensors.index.json"
    place = json.loads(path.read_text())["weight_map"]
    path.write_text(
        json.dumps(
            {
                "weight_map": place
                | {"blocks.9.x": "diffusion_pytorch_model-00001-of-00003.safetensors"}
            }
        )
    )
    assert "index and shards disagree: blocks.9.x is not in" in refused(folder)
    path.write_text(json.dumps({"weight_map": place | {"a": "../../secret.safetensors"}}))
    assert "names files outside its folder" in refused(path)
    path.write_text("[]")
    assert "not an index of shards" in refused(path)


def _sparse(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A checkpoint of any size that takes no room on the disk."""
    header, start = {}, 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape, dtype=np.int64))
        header[name] = {
            "dtype": "BF16",
            "shape": list(shape),
            "data_offsets": [start, start + size],
        }
        start += size
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + start)


def test_a_14b_checkpoint_given_for_5b(folder, refused):
    big = DiTConfig(
        in_channels=16, width=5120, ffn=13824, heads=40, layers=1, text_width=4096, text_length=512
    )
    _sparse(folder / "x.safetensors", shapes_of(big))
    (folder / "config.json").unlink()
    said = refused(folder)
    assert "this is the 14B text-to-video transformer of Wan 2.1 or 2.2 (width 5120" in said
    assert "This project runs Wan2.2-TI2V-5B" in said


def test_a_vae_2_1_given_for_2_2(folder, refused):
    names = {
        "encoder.conv1.weight": (96, 3, 3, 3, 3),
        "encoder.downsamples.0.residual.0.gamma": (96, 1, 1, 1),
    }
    torch.save(
        {name: torch.ones(shape) for name, shape in names.items()}, folder / "Wan2.1_VAE.pth"
    )
    assert "this is the VAE of Wan 2.1 (16 latent channels, 8x in space)" in refused(
        folder / "Wan2.1_VAE.pth"
    )


class Evil:
    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("name", ["evil.pth", "evil.pt", "evil.bin"])
def test_a_pickle_with_code(folder, refused, name):
    torch.save({"model": Evil(f"touch {folder.parent / 'PWNED'}")}, folder / name)
    said = refused(folder / name)
    assert "posix.system" in said and "nothing in it was run" in said
    assert not (folder.parent / "PWNED").exists()


def test_a_pickle_with_code_in_other_wrappings(folder, refused):
    evil = Evil(f"touch {folder.parent / 'PWNED'}")
    (folder / "plain.pth").write_bytes(pickle.dumps(evil))
    assert "not an archive of torch.save" in refused(folder / "plain.pth")
    torch.save(evil, folder / "old.pth", _use_new_zipfile_serialization=False)
    assert "not an archive of torch.save" in refused(folder / "old.pth")
    with zipfile.ZipFile(folder / "zip.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(evil))
    assert "is compressed" in refused(folder / "zip.pth")
    with zipfile.ZipFile(folder / "bare.pth", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(evil))
    assert "bare.pth: " in refused(folder / "bare.pth")
    assert not (folder.parent / "PWNED").exists()


def test_a_web_page_saved_as_pth(folder, refused):
    (folder / "x.pth").write_text(
        "\n\n<!DOCTYPE html>\n<html><head><title>404</title></head></html>"
    )
    assert "a web page, not a checkpoint; download the file itself" in refused(folder / "x.pth")
    (folder / "y.pth").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 134217728\n"
    )
    assert "a Git LFS pointer" in refused(folder / "y.pth")


@pytest.mark.parametrize("kept", [0.3, 0.98])
def test_a_truncated_pth(good, folder, refused, kept):
    path = folder / "x.pth"
    torch.save({name: torch.from_numpy(x) for name, x in good.items()}, path)
    os.truncate(path, int(kept * path.stat().st_size))
    assert "cut off; download it again" in refused(path)


def test_a_folder_without_anything_and_a_file_of_something_else(folder, refused):
    assert "no checkpoint in it" in refused(folder)
    write_tensors(
        folder / "x.safetensors", {"layers.0.attention.wq.weight": np.ones((4, 4), np.float32)}
    )
    said = refused(folder)
    assert "not a checkpoint that is known here" in said and "layers.0.attention.wq.weight" in said
    assert "no such file or folder" in refused(folder / "nothing")
    (folder / "x.onnx").write_bytes(b"\0")
    assert "expected a folder, .safetensors" in refused(folder / "x.onnx")


def test_two_copies_of_a_network_are_ambiguous(good, folder, refused):
    write_tensors(folder / "a.safetensors", good)
    write_tensors(folder / "b.safetensors", {name: 2 * x for name, x in good.items()})
    said = refused(folder)
    assert "ambiguous: 2 candidates" in said and "Name the one file that you mean" in said
    assert "a.safetensors: " in said and "b.safetensors: " in said
    pair = {
        f"{part}.{name}": torch.from_numpy(x)
        for part in ("left", "right")
        for name, x in good.items()
    }
    torch.save(pair, folder / "pair.pt")
    said = refused(folder / "pair.pt")
    assert "ambiguous, 2 copies" in said and "'left', 'right'" in said and "--part" in said
    assert "no part 'middle'; it has left, right" in refused(folder / "pair.pt", "--part", "middle")


def test_a_config_that_is_no_config(good, folder, refused):
    write_tensors(folder / "x.safetensors", good)
    (folder / "config.json").write_text("{")
    assert "config.json: not a readable JSON file" in refused(folder)
    (folder / "config.json").write_text("[1]")
    assert "expected a JSON object" in refused(folder)
    (folder / "config.json").unlink()
    assert "put a config.json with num_heads beside the file" in refused(folder)


def test_a_destination_that_is_there(good, folder, monkeypatch, capsys):
    write_tensors(folder / "x.safetensors", good)
    out = folder.parent / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    monkeypatch.setattr(sys, "argv", ["converters", str(folder), "--to", "jax", "--out", str(out)])
    with pytest.raises(SystemExit):
        command.main()
    assert "exists already; choose another name, or remove it" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


def test_a_disk_without_room_is_seen_before_anything_is_written(good, folder, refused, monkeypatch):
    write_tensors(folder / "x.safetensors", good)
    usage = type("Usage", (), {"free": 100_000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    assert "GB free" in refused(folder)


@pytest.mark.parametrize("layout", ["jax", "training"])
def test_a_disk_that_fills_up_on_the_way_leaves_nothing(good, folder, layout):
    """Writes beyond 100 kB fail, as on a full disk: safetensors and pickles."""
    write_tensors(folder / "x.safetensors", good)
    script = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        f"sys.argv = ['converters', {str(folder)!r}, '--to', {layout!r}, '--out',"
        f" {str(folder.parent / 'out')!r}]\n"
        "from launch import convert as command; command.main()"
    )
    done = subprocess.run([sys.executable, "-B", "-c", script], capture_output=True, text=True)
    assert done.returncode == 2
    assert "could not be written" in done.stderr and "nothing was left behind" in done.stderr
    assert done.stderr[done.stderr.index("error: ") :].count("\n") == 1
    assert "Traceback" not in done.stderr
    assert [path.name for path in folder.parent.iterdir()] == ["in"]


def test_a_torch_that_can_be_tricked_is_not_used(good, folder, refused, monkeypatch):
    torch.save({name: torch.from_numpy(x) for name, x in good.items()}, folder / "x.pth")
    monkeypatch.setattr(torch, "__version__", "2.5.1+cu121")
    assert "can be made to run code by a checkpoint" in refused(folder / "x.pth")


def test_without_torch_a_pickle_says_what_to_install(good, folder, refused, monkeypatch):
    torch.save({name: torch.from_numpy(x) for name, x in good.items()}, folder / "x.pth")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(pickles.WeightsError, match=r"pip install .*\[convert\]"):
        pickles.import_torch()
    assert "PyTorch reads and writes .pth, .pt and .bin files" in refused(folder / "x.pth")


def test_without_torch_a_layout_with_pickles_is_refused_before_anything_is_written(
    good, folder, monkeypatch
):
    write_tensors(folder / "x.safetensors", good)
    monkeypatch.setitem(sys.modules, "torch", None)
    written = []
    monkeypatch.setattr(writing, "_fill", lambda *args: written.append(args))
    with pytest.raises(pickles.WeightsError, match=r"pip install .*\[convert\]"):
        run_converter(folder, "--to", "training", "--out", folder.parent / "out")
    assert written == []


def test_what_training_leaves_beside_the_weights_is_not_read(good, folder):
    """Its pickles want code, and would be refused."""
    write_tensors(folder / "model.safetensors", good)
    for name in ("training_args.bin", "optimizer.pt", "rng_state_0.pth"):
        torch.save({"x": Evil("true")}, folder / name)
    run_converter(folder, "--to", "jax", "--out", folder.parent / "out")


def test_sizes_that_make_no_network(folder, refused):
    config = TextConfig(vocab=9, width=8, heads=2, head_dim=4, ffn=8, layers=1)
    shapes = shapes_in(invert(TEXT.layouts["official"].rules(config)), TEXT.expected(config))
    for shape in ((32,), (32, 0), ()):
        tensors = {name: np.ones(size, np.float32) for name, size in shapes.items()}
        tensors["blocks.0.pos_embedding.embedding.weight"] = np.ones(shape, np.float32)
        write_tensors(folder / "t5.safetensors", tensors)
        assert "no sizes to be read off it" in refused(folder / "t5.safetensors")


def test_a_write_that_fails_leaves_no_part_of_a_file(tmp_path):
    class Broken:
        shape, dtype = (3,), np.dtype(np.float32)

        def __array__(self, *args, **kw):
            raise OSError("the device is gone")

    with pytest.raises(OSError, match="the device is gone"):
        write_tensors(tmp_path / "x.safetensors", {"x": Broken()})
    assert list(tmp_path.iterdir()) == []

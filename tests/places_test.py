"""Where files lie, and what is seen before work is done for a place that cannot be written to."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import chameleon_jax
from chameleon_jax import places
from chameleon_jax.config import load_config
from chameleon_jax.data.tokenizer import Tokenizer
from chameleon_jax.inference.pretrained import find_weights
from chameleon_jax.places import PlaceError
from chameleon_jax.training.export import stored_model
from chameleon_jax.training.networks import weights_file

ROOT = Path(chameleon_jax.__file__).parents[1]


def test_a_path_is_found_here_or_beside_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert places.find("configs/common.py") == ROOT / "configs" / "common.py"
    assert places.find("configs/nothing.py") == Path("configs/nothing.py")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "common.py").touch()
    assert places.find("configs/common.py") == Path("configs/common.py")


def test_what_ships_is_found_from_every_folder(tmp_path, monkeypatch):
    """The example tokenizer and the embedded weights, as the documents name them."""
    monkeypatch.chdir(tmp_path)
    folder = "chameleon_jax/assets/runway_tiny"
    assert Tokenizer.from_file(f"{folder}/tokenizer.json", 96).vocab > 256
    assert weights_file(folder, "vae").is_file()
    assert weights_file(f"{folder}/vae.safetensors", "vae").is_file()
    assert stored_model(folder, "vae") == stored_model(ROOT / folder, "vae")
    assert stored_model(folder, "vae")
    assert find_weights(folder) == ROOT / folder
    assert load_config("configs/runway_tiny.py").weights == folder


def test_the_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("CHAMELEON_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert places.cache_folder() == tmp_path / ".cache" / "chameleon_jax"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert places.cache_folder() == Path("/x/chameleon_jax")
    monkeypatch.setenv("CHAMELEON_CACHE", "/y")
    assert places.cache_folder() == Path("/y")


def test_a_place_that_can_be_written_to_is_left_as_it_was(tmp_path):
    (tmp_path / "old.txt").write_text("old")
    places.check_writable(tmp_path / "new.txt")
    places.check_writable(tmp_path / "old.txt")
    places.check_writable(tmp_path / "a" / "b" / "new.txt", nbytes=1)
    assert [path.name for path in tmp_path.iterdir()] == ["old.txt"]
    assert (tmp_path / "old.txt").read_text() == "old"


def test_a_link_is_followed(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "file")
    places.check_writable(tmp_path / "link")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop" / "x")
    with pytest.raises(PlaceError):
        places.check_writable(tmp_path / "loop" / "file")


def test_places_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").touch()
    cases = {
        tmp_path: "is a folder; expected the name of a file",
        tmp_path / "file" / "x": "Not a directory; choose another name",
        tmp_path / ("x" * 300): "File name too long; choose a shorter name",
        tmp_path / ("x" * 250): "File name too long; choose a shorter name",
        Path("/proc/x"): "/proc/x: ",
    }
    for path, message in cases.items():
        with pytest.raises(PlaceError) as error:
            places.check_writable(path)
        assert message in str(error.value) and "\n" not in str(error.value)
        assert len(str(error.value)) < 250
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_cannot_be_made_leaves_none_above_it(tmp_path):
    with pytest.raises(PlaceError, match="too long"):
        places.check_writable(tmp_path / "a" / ("b" * 300) / "c")
    assert list(tmp_path.iterdir()) == []


def test_room_is_compared(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(PlaceError, match=r"needs about .* GB, and .* GB are free; free some space"):
        places.check_writable(tmp_path / "x", nbytes=2 * free)


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_a_folder_without_permission(tmp_path):
    """Asked as another user, for root may write anywhere."""
    code = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from chameleon_jax import places
if os.getuid() == 0:
    os.setuid(65534)
try:
    places.check_writable({str(tmp_path / "closed" / "x")!r})
except places.PlaceError as error:
    print(error)
"""
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    (tmp_path / "closed").mkdir()
    (tmp_path / "closed").chmod(0o555)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "Permission denied; choose a place that you may write to" in done.stdout, done.stderr


def test_an_error_of_the_system_in_words():
    error = OSError(errno.ENOSPC, "No space left on device", "/x/y")
    text = "/x/y: No space left on device; free some space, or write to another disk"
    assert places.explain(error) == text
    assert places.explain(error, "y").startswith("y: No space")
    assert places.explain(OSError(errno.ENOSPC, "full")).startswith("full; free")

"""The images: what they copy, install and start exists. Building one needs Docker."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from launch import cli, serve

ROOT = Path(__file__).parents[2]
IMAGES = sorted((ROOT / "launch" / "docker").glob("*.Dockerfile"))


def steps(path: Path) -> list[tuple[str, str]]:
    """Instructions of a file with what follows them."""
    text = re.sub(r"^#.*\n", "", path.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]


def test_there_is_one_for_each_kind_of_machine():
    assert [path.name for path in IMAGES] == ["cpu.Dockerfile", "cuda.Dockerfile"]


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.stem)
def test_what_an_image_needs_is_there(path):
    found = steps(path)
    copied = {name for word, rest in found if word == "COPY" for name in rest.split()[:-1]}
    assert all((ROOT / name).exists() for name in copied)
    packages = {one.name for one in ROOT.iterdir() if (one / "__init__.py").exists()} - {"tests"}
    assert packages <= copied
    setup = (ROOT / "setup.py").read_text()
    for extra in re.search(r'"\.\[(.+?)\]"', path.read_text())[1].split(","):
        assert f'"{extra}": [' in setup
    # Nobody is root when pictures of others are opened.
    words = [word for word, _ in found]
    assert words.index("USER") < words.index("ENTRYPOINT")


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.stem)
def test_what_an_image_starts_is_understood(path):
    (entry,) = [rest for word, rest in steps(path) if word == "ENTRYPOINT"]
    program, command, *flags = json.loads(entry)
    assert (program, command) == ("chameleon", "serve")
    example = ["--config", "configs/runway_tiny.py", "--weights", "w", "--wardrobe", "w"]
    values = cli.read(serve.define_flags, [*flags, *example])
    assert values.host == "0.0.0.0" and values.port == 8000

"""Configs: files, variants, overrides; what is wrong with one is one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from chameleon_jax.config import ConfigError, flatten, load_config, save_config, split_path
from launch import cli

ROOT = Path(__file__).parents[1]
STREAMS = ("runway_tiny", "wan22_5b", "wan22_ti2v", "longlive2_5b")
RUNS = (*STREAMS, "vae", "teacher", "teacher_forcing")

PLAIN = """
from ml_collections import ConfigDict

VARIANTS = ("large", "small")


def get_config(variant="large"):
    sizes = {"large": 3, "small": 1}
    size = sizes[variant]
    return ConfigDict({"size": size, "rate": 0.5, "on": True, "name": "a", "pair": (1, 2)})
"""


@pytest.fixture
def plain(tmp_path):
    (tmp_path / "plain.py").write_text(PLAIN)
    return tmp_path / "plain.py"


@pytest.mark.parametrize("run", RUNS)
def test_every_variant_loads_and_the_first_is_the_default(run):
    file = f"configs/{run}.py"
    names = cli.variants(file)
    assert names and load_config(file) == load_config(f"{file}:{names[0]}")
    for name in names:
        config = load_config(f"{file}:{name}")
        assert config.name == name and isinstance(config.video.fps, float)


def test_variants_of_a_file(plain, tmp_path):
    assert load_config(plain).size == 3 and load_config(f"{plain}:small").size == 1
    with pytest.raises(ConfigError, match="no variant 'smal'; expected one of large, small; did"):
        load_config(f"{plain}:smal")
    assert cli.variants(str(plain)) == ["large", "small"]


def test_a_name_with_a_colon(tmp_path):
    file = tmp_path / "12:30.py"
    file.write_text(PLAIN)
    assert split_path(file) == (str(file), "")
    assert load_config(file).size == 3 and load_config(f"{file}:small").size == 1


BROKEN = {
    "key": ('sizes["medium"]', "KeyError: 'medium'"),
    "name": ("nothing", "NameError: name 'nothing' is not defined"),
    "import": ("__import__('nothing_of_that_name')", "ModuleNotFoundError"),
    "syntax": ("(", "SyntaxError"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_fault_of_the_file_is_named_with_its_line(tmp_path, name):
    """It is not taken for a missing variant."""
    code, message = BROKEN[name]
    file = tmp_path / "broken.py"
    text = PLAIN.replace("    return", f"    x = {code}\n    return")
    file.write_text(text)
    line = 1 + text.splitlines().index(f"    x = {code}")
    for path in (file, f"{file}:small"):
        with pytest.raises(ConfigError) as error:
            load_config(path)
        assert f"error in the config file {file}, line {line}: {message}" in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "has no function get_config"),
        ("def get_config():\n    return 3", "returned int; expected a ConfigDict"),
        ("def get_config(a, b):\n    return 3", "TypeError"),
    ],
)
def test_a_file_that_is_no_config(tmp_path, text, message):
    file = tmp_path / "none.py"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(file)


def test_no_such_file(tmp_path):
    with pytest.raises(ConfigError, match=r"teachr.py does not exist; did you mean .*teacher.py"):
        load_config("configs/teachr.py")
    with pytest.raises(ConfigError, match="expected a Python file"):
        (tmp_path / "notes.txt").write_text("x")
        load_config(tmp_path / "notes.txt")


def test_files_beside_a_config_are_found_and_hide_nothing(tmp_path, monkeypatch):
    """`from configs import x` means the files beside it, then ours; `sys.path` stays as it is."""
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "shared.py").write_text("SIZE = 7")
    (tmp_path / "numpy.py").write_text("raise ImportError('the wrong numpy')")
    (folder / "mine.py").write_text(
        PLAIN.replace(
            "\n\n\ndef", "\nfrom configs import common, shared\nimport numpy\n\ndef"
        ).replace("sizes[variant]", "shared.SIZE")
    )
    before = list(sys.path)
    ours = sys.modules.get("configs")
    assert load_config(folder / "mine.py").size == 7
    assert sys.path == before and sys.modules.get("configs") is ours
    (folder / "shared.py").write_text("SIZE = 70")
    assert load_config(folder / "mine.py").size == 70


def test_our_configs_load_beside_a_package_of_the_same_name(tmp_path):
    """As from the folder of another project that has a package `configs`, too."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "__init__.py").write_text("")
    code = (
        "import sys; sys.path.insert(0, '');"
        f"sys.path.append({str(ROOT)!r})\n"
        "from chameleon_jax.config import load_config\n"
        "print(load_config('configs/runway_tiny.py:smoke').name)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.strip() == "smoke", done.stderr


OVERRIDES = {
    "size=4": ("size", 4),
    "rate=4": ("rate", 4.0),
    "rate=1e-3": ("rate", 1e-3),
    "on=false": ("on", False),
    "name=3": ("name", "3"),
    "pair=(3, 4)": ("pair", (3, 4)),
    "pair=[3,4]": ("pair", (3, 4)),
}


@pytest.mark.parametrize("item", OVERRIDES)
def test_an_override_keeps_the_type(plain, item):
    key, value = OVERRIDES[item]
    found = load_config(plain, [item])[key]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("sze=4", "unknown config key 'sze'; the nearest is 'size'"),
        ("size", "has no value"),
        ("size.x=4", "size is a value, not a group"),
        ("size=4.5", "size is int (3), cannot be set to '4.5'"),
        ("size=true", "size is int (3), cannot be set to 'true'"),
        ("size=none", "size is int (3), cannot be set to 'none'"),
        ("size=²", "size is int (3), cannot be set to '²'"),
        ("size=many", "size is int (3), cannot be set to 'many'"),
        ("size=" + "9" * 30, "expected finite numbers, each within 64 bits"),
        ("size=" + "9" * 5000, "size is int (3), cannot be set to"),
        ("size=" + "(" * 5000, "size is int (3), cannot be set to"),
        ("on=1", "on is bool (True), cannot be set to '1'"),
        ("rate=nan", "rate is float (0.5), cannot be set to 'nan'"),
        ("rate=1e999", "expected finite numbers"),
        ("rate=-1e999", "expected finite numbers"),
        ("rate=true", "rate is float (0.5), cannot be set to 'true'"),
        ("pair=3", "pair is tuple ((1, 2)), cannot be set to '3'"),
        ("pair=(1,'a')", "pair is tuple ((1, 2)), cannot be set to"),
        ("pair=(1,1e999)", "expected finite numbers"),
    ],
)
def test_an_override_that_cannot_be_used_is_one_line(plain, item, message):
    with pytest.raises(ConfigError) as error:
        load_config(plain, [item])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_frames_per_second_may_be_a_fraction():
    for run in RUNS:
        fps = load_config(f"configs/{run}.py", ["video.fps=23.976"]).video.fps
        assert fps == 23.976


def test_a_saved_config_is_a_config(plain, tmp_path):
    config = load_config(plain, ["size=5"])
    save_config(tmp_path / "config.json", config)
    again = load_config(tmp_path / "config.json", ["pair=(5, 6)"])
    assert flatten(again) == {**flatten(config), "pair": (5, 6)}
    (tmp_path / "list.json").write_text(json.dumps([1]))
    (tmp_path / "cut.json").write_text('{"a": ')
    for name in ("list", "cut"):
        with pytest.raises(ConfigError, match=name):
            load_config(tmp_path / f"{name}.json")


def test_help_reads_what_the_configs_say():
    """The list of variants that is read without running the file is the one that it has."""
    for run in RUNS:
        namespace: dict = {}
        text = (ROOT / "configs" / f"{run}.py").read_text()
        line = next(line for line in text.splitlines() if line.startswith("VARIANTS"))
        exec(line, namespace)
        assert list(namespace["VARIANTS"]) == cli.variants(f"configs/{run}.py")

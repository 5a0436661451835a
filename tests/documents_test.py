"""What the documents name exists: commands, their flags, configs with their keys, files, links."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from chameleon_jax import __version__
from chameleon_jax.config import load_config
from launch.__main__ import MODULES

ROOT = Path(__file__).parents[1]
DOCUMENTS = (
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "docs/api.md",
    "docs/architecture.md",
    "docs/checkpoints.md",
    "docs/clusters.md",
    "docs/data.md",
    "docs/evaluation.md",
    "docs/performance.md",
    "docs/serving.md",
    "docs/training.md",
    "docs/training_diagnosis.md",
    "chameleon_jax/assets/runway_tiny/MODEL_CARD.md",
)
OURS = ("launch", "converters")  # packages with commands
PROBES = [  # a wrong command and the word that the message has to name
    ("python -m launch.smaple --out a.mp4", "launch.smaple"),
    ("chameleon smaple --out a.mp4", "smaple"),
    ("python -m launch.sample --refrence a.png", "refrence"),
    ("python -m launch.train --config configs/vae.py:giant", "giant"),
    ("python -m launch.train --config configs/vae.py:runway_tiny --config.data.dri=x", "dri"),
]


def read(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def commands(text: str) -> list[list[str]]:
    """Our commands in the bash blocks: the module, then the words behind it."""
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    found = []
    for line in lines:
        words = shlex.split(line, comments=True)
        if words[:2] == ["python", "-m"]:
            found.append(words[2:])
        if words[:1] == ["chameleon"]:
            found.append([MODULES.get(words[1], words[1]), *words[2:]])
    return found


def problems(words: list[str]) -> list[str]:
    """What is wrong with a command; empty if nothing is."""
    module, *rest = words
    sources = command_sources(module)
    if module.split(".")[0] not in OURS or not sources:
        return [f"no such command: {module}"]
    names = re.findall(r"--([\w.]+)", " ".join(rest))
    known = {"config", "help"}
    unknown = [
        name
        for name in names
        if name not in known
        and not name.startswith("config.")
        and not re.search(rf"""["'](--)?{name}["']""", sources)
    ]
    return [f"{module} has no flag --{name}" for name in unknown] + config_problems(rest)


def command_sources(module: str) -> str:
    """The source of a command with all files of its package; empty if there is no such command."""
    if module == "converters":
        module = "launch.convert"
    file = ROOT / (module.removesuffix(".__main__").replace(".", "/") + ".py")
    entry = file if file.exists() else file.with_suffix("") / "__main__.py"
    if not entry.exists():
        return ""
    return "\n".join(source.read_text(encoding="utf-8") for source in entry.parent.glob("*.py"))


def config_problems(words: list[str]) -> list[str]:
    """Whether `--config` names a config that can be loaded with the overrides beside it."""
    text = " ".join(words)
    config = re.search(r"--config[ =](\S+)", text)
    overrides = re.findall(r"--config\.([\w.]+=\S+)", text)
    if config is None:
        return []
    try:
        load_config(str(ROOT / config.group(1)), overrides)
    except (ValueError, KeyError) as error:
        return [str(error)]
    return []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_exists_with_its_flags_and_config(document):
    faults = [fault for words in commands(read(document)) for fault in problems(words)]
    assert faults == []


def test_readme_has_commands():
    assert len(commands(read("README.md"))) > 10


@pytest.mark.parametrize(("command", "named"), PROBES)
def test_a_wrong_command_is_found(command, named):
    (words,) = commands(f"```bash\n{command}\n```")
    assert named in " ".join(problems(words))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_leads_to_a_file(document):
    folder = (ROOT / document).parent
    links = re.findall(r"\]\(([^)#\s]+)", read(document))
    ours = [link for link in links if "://" not in link]
    assert [link for link in ours if not (folder / link).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_source_file_that_is_named_exists(document):
    """`models/dit.py` may stand for `chameleon_jax/models/dit.py`."""
    named = set(re.findall(r"`((?:[\w.]+/)+\w+\.(?:py|md|json))`", read(document)))
    places = (ROOT, ROOT / "chameleon_jax", ROOT / "chameleon_jax/training")
    missing = [name for name in named if not any((place / name).exists() for place in places)]
    assert missing == []


@pytest.mark.parametrize("document", [name for name in DOCUMENTS if "checkpoints" not in name])
def test_prose_is_at_most_100_columns_wide(document):
    lines = read(document).splitlines()
    wide = [line for line in lines if len(line) > 100 and not line.startswith(("|", "!["))]
    assert wide == []


def test_version_and_citation_agree():
    citation = yaml.safe_load(read("CITATION.cff"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == __version__
    assert f"## [{__version__}] - {citation['date-released']}" in read("CHANGELOG.md")
    assert all(reference["authors"] for reference in citation["references"])

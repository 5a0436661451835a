"""The rooms of the project and the arrows between them: docs/architecture.md against the source.

A room is a folder with code; the files that lie directly in `chameleon_jax/` are the room `base`.
An arrow is an import, also one inside a function. The table in the document names the rooms from
the lowest to the highest, and what each imports.
"""

from __future__ import annotations

import ast
import functools
import re
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("chameleon_jax", "configs", "converters", "launch")
LIBRARY = "chameleon_jax"


def read_sources() -> dict[str, Path]:
    """Files of the project by the name of their module."""
    files = [file for package in PACKAGES for file in (ROOT / package).rglob("*.py")]
    return {module_name(file): file for file in files}


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imported_names(source: str, *, types: bool = True) -> set[str]:
    """Dotted names that a file imports, wherever in the file; all imports here are absolute.

    Args:
      source: of the file.
      types: also what only type checkers import, under `if TYPE_CHECKING:`.
    """
    names = set()
    waiting: list[ast.AST] = [ast.parse(source)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not types:
            waiting += node.orelse
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; expected an absolute one"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        waiting += ast.iter_child_nodes(node)
    return names


@functools.cache
def read_imports(*, types: bool = True) -> dict[str, set[str]]:
    """Modules of the project that each module imports; `types` as in `imported_names`."""
    sources = read_sources()
    imports = {}
    for module, file in sources.items():
        names = imported_names(file.read_text(encoding="utf-8"), types=types)
        imports[module] = {nearest_module(name, sources) for name in names} - {"", module}
    return imports


def nearest_module(name: str, modules: dict[str, Path]) -> str:
    """`a.b` for `a.b.Thing`; empty for a module of others."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name


def room_of(module: str) -> str:
    """`attention` for `chameleon_jax.attention.core`, `base` for `chameleon_jax.errors`.

    `converters/__main__.py`, which nothing imports, is a command: it belongs to `launch`.
    """
    package, *rest = module.split(".")
    if rest == ["__main__"]:
        return "launch"
    if package != LIBRARY:
        return package
    return rest[0] if rest and (ROOT / LIBRARY / rest[0]).is_dir() else "base"


def read_arrows() -> dict[str, set[str]]:
    """Rooms that each room imports."""
    arrows: dict[str, set[str]] = defaultdict(set)
    for module, imported in read_imports().items():
        arrows[room_of(module)] |= {room_of(other) for other in imported}
    return {room: others - {room} for room, others in arrows.items()}


def documented_arrows() -> dict[str, set[str]]:
    """Rooms and what they import by the table of docs/architecture.md, lowest room first."""
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w/]+)` \|.*\| ([\w, ]+) \|$", text, flags=re.MULTILINE)
    return {
        room.rstrip("/").removeprefix(f"{LIBRARY}/"): set(imports.split(", ")) - {"nothing"}
        for room, imports in rows
    }


def test_the_document_names_every_room_and_every_arrow():
    written = {room: sorted(imports) for room, imports in documented_arrows().items()}
    found = {room: sorted(imports) for room, imports in read_arrows().items()}
    assert written == found, "update the table in docs/architecture.md, or drop an import"


def test_no_arrow_leads_upwards():
    """So there is no circle of rooms either, and the library knows no command and no config."""
    rooms = list(documented_arrows())
    height = {room: number for number, room in enumerate(rooms)}
    upwards = [
        f"{module} imports {other}"
        for module, imported in read_imports().items()
        for other in imported
        if height[room_of(other)] > height[room_of(module)]
    ]
    assert upwards == []
    assert rooms[-2:] == ["configs", "launch"]


def test_no_circle_of_files():
    """Two files of a room may name each other's types; what they run goes one way."""
    imports = read_imports(types=False)
    finished: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module in finished:
            return
        for other in sorted(imports[module]):
            visit(other, (*path, module))
        finished.add(module)

    for module in imports:
        visit(module, ())


def test_one_file_of_the_library_knows_the_converters():
    users = {
        module
        for module, imported in read_imports().items()
        if module.startswith(LIBRARY) and any(room_of(other) == "converters" for other in imported)
    }
    assert users == {"chameleon_jax.inference.pretrained"}


def test_converters_know_neither_commands_nor_configs():
    assert not read_arrows()["converters"] & {"launch", "configs"}


def test_nothing_imports_the_tests():
    for module, file in read_sources().items():
        names = imported_names(file.read_text(encoding="utf-8"))
        assert not any(name.split(".")[0] == "tests" for name in names), module


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("import a.b", {"a.b"}),
        ("from a.b import c, d", {"a.b.c", "a.b.d"}),
        ("def f():\n    from a import b\n", {"a.b"}),
    ],
)
def test_imports_are_found_everywhere(source, names):
    assert imported_names(source) == names


def test_imports_for_types_alone_can_be_left_out():
    source = "if TYPE_CHECKING:\n    import a\nelse:\n    import b\nimport c\n"
    assert imported_names(source) == {"a", "b", "c"}
    assert imported_names(source, types=False) == {"b", "c"}

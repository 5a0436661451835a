"""The notebook of the documentation runs, from its first cell to its last."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs" / "live_session.ipynb"


def cells(kind: str) -> list[dict]:
    """The cells of a kind."""
    return [
        cell
        for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
        if cell["cell_type"] == kind
    ]


def test_it_was_run_in_order_and_its_pictures_are_there():
    assert [cell["execution_count"] for cell in cells("code")] == list(
        range(1, len(cells("code")) + 1)
    )
    outputs = [output for cell in cells("code") for output in cell["outputs"]]
    assert sum("image/png" in output["data"] for output in outputs) == 3
    assert not any(output["output_type"] == "error" for output in outputs)
    assert NOTEBOOK.stat().st_size < 400_000


@pytest.mark.slow
def test_it_runs(tmp_path):
    """Its simple results are those that stand in it."""
    lines = ["found = []"]
    for cell in cells("code"):
        tree = ast.parse("".join(cell["source"]))
        if isinstance(tree.body[-1], ast.Expr):
            value = ast.unparse(tree.body[-1].value)
            tree.body[-1] = ast.parse(f"found.append(repr({value}))").body[0]
        else:
            tree.body += ast.parse("found.append('')").body
        lines.append(ast.unparse(tree))
    lines.append("import json; print(json.dumps(found))")
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        cwd=tmp_path,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for cell, value in zip(cells("code"), found, strict=True):
        texts = ["".join(one["data"]["text/plain"]) for one in cell["outputs"]]
        if texts and not texts[0].startswith("<PIL"):
            assert texts == [value]
    assert (tmp_path / "out" / "session.mp4").stat().st_size > 10_000

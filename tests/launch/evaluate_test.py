"""The command that evaluates: figures of one name are those of one model."""

from __future__ import annotations

import json

import pytest

from launch import cli, evaluate, evaluate_runway
from launch.cli import UsageError


def values(judge, *flags: str) -> cli.Values:
    return cli.read(evaluate.define_flags, ["--judge", str(judge), *flags])


def test_figures_that_were_made_otherwise_are_not_gone_on_with(tmp_path):
    judge, other = tmp_path / "judge", tmp_path / "other"
    for number, folder in enumerate((judge, other)):
        folder.mkdir()
        (folder / "judge.safetensors").write_bytes(b"weights" * number)
        (folder / "dit.safetensors").write_bytes(b"dit" * number)
    check, out = evaluate_runway._check_recipes, tmp_path / "out"
    check(out, values(judge, "--weights", str(judge)))
    check(out, values(judge, "--weights", str(judge)))
    check(out, values(judge, "--weights", str(other), "--name", "b"))
    with pytest.raises(UsageError, match="made with another weights; choose another --name"):
        check(out, values(judge, "--weights", str(other)))
    with pytest.raises(UsageError, match="made with another switch, steps; choose another --name"):
        check(out, values(judge, "--weights", str(judge), "--switch", "refresh", "--steps", "2"))
    with pytest.raises(UsageError, match="made with another judge; choose another --out"):
        check(out, values(other, "--weights", str(judge)))


def test_a_table_has_the_models_that_have_all_scenarios(tmp_path):
    for model, scenarios in (("truth", 2), ("unchanged", 2), ("mine", 2), ("half", 1)):
        for number in range(scenarios):
            path = tmp_path / model / f"one_{number}.json"
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps({"starts": [0], "figures": {"first_type": number}}))
    table = evaluate_runway.write_table(tmp_path, {"one_0", "one_1"}, "mine")
    assert table.splitlines()[0] == "| figure | truth | unchanged | mine |"
    assert "| first garment, type, by the judge | 0.5 (0 to 1) |" in table
    assert table in (tmp_path / "table.md").read_text()
    assert json.loads((tmp_path / "mine.json").read_text())["first_type"]["count"] == 2


def test_a_figure_that_does_not_tell_the_truth_from_the_garment_before_is_left_out(tmp_path):
    figures = {
        "truth": {"changed_type": 1.0, "changed_pattern": 0.4},
        "unchanged": {"changed_type": 0.1, "changed_pattern": 0.5},
        "mine": {"changed_type": 0.7, "changed_pattern": 0.9},
    }
    for model, means in figures.items():
        for number in range(20):
            path = tmp_path / model / f"two_{number}.json"
            path.parent.mkdir(exist_ok=True)
            noise = 0.3 * (-1) ** number
            found = {name: mean + noise for name, mean in means.items()}
            path.write_text(json.dumps({"starts": [0, 27], "figures": found}))
    table = evaluate_runway.write_table(tmp_path, {f"two_{number}" for number in range(20)}, "mine")
    assert "| after a change, type | 1 (" in table and "| after a change, pattern |" not in table
    assert "Left out" in table and table.endswith("by them: after a change, pattern.")


def test_reserved_names_and_missing_judges(tmp_path):
    for name in ("truth", "unchanged", "mine_vae"):
        with pytest.raises(UsageError, match=f"--name {name}: stands for another column"):
            evaluate_runway.run_bench(values(tmp_path, "--name", name), evaluate.CONFIG)
    with pytest.raises(ValueError, match="expected judge.safetensors and config.json"):
        evaluate.run(values(tmp_path))

"""The command that says where a chunk looks, with the smoke model."""

from __future__ import annotations

import json

import numpy as np
import pytest

from chameleon_jax.evaluation import scenarios
from launch import cli, evaluate, evaluate_attention
from launch.cli import UsageError

SMOKE = ("--config", "configs/runway_tiny.py:smoke")


def values(*flags: str) -> cli.Values:
    return cli.read(evaluate.define_flags, ["--bench", "attention", *flags])


@pytest.mark.slow
def test_it_looks_before_and_after_a_change_and_streams_what_is_streamed(
    tmp_path, monkeypatch, capsys
):
    made, render = [], scenarios.render

    class Seen(evaluate_attention.NotingPrograms):
        def chunk(self, *args):
            latents, cache = super().chunk(*args)
            made.append(np.array(latents))
            return latents, cache

    monkeypatch.setattr(evaluate_attention, "NotingPrograms", Seen)
    rendered = []
    monkeypatch.setattr(
        scenarios, "render", lambda one: rendered.append(render(one)) or rendered[0]
    )
    assert evaluate.run(values(*SMOKE, "--scenarios", "1", "--out", str(tmp_path))) == 0
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "attention.json").read_text())
    assert printed.strip() == (tmp_path / "table.md").read_text().strip()
    numbered = [f"chunk {number}" for number in (1, 2, 3)]
    last = [f"chunk 4, {name}" for name in ("no change", "refresh", "full")]
    assert list(found["chunks"]) == [*numbered, *last]
    tokens = {name: chunk["tokens"] for name, chunk in found["chunks"].items()}
    assert tokens["chunk 1"][2] == tokens["chunk 4, full"][2] == 0  # no history
    assert tokens["chunk 2"] == tokens["chunk 4, refresh"] == tokens["chunk 4, no change"]
    assert tokens["chunk 2"][2] == tokens["chunk 2"][3] == 3 * tokens["chunk 2"][0]
    shares = {name: np.array(chunk["shares"]) for name, chunk in found["chunks"].items()}
    assert all(abs(share.sum() - 1) < 1e-4 for share in shares.values())
    refreshed = shares["chunk 4, refresh"] - shares["chunk 4, no change"]
    assert np.abs(refreshed).max() > 1e-6  # the new garment is looked at
    assert len(made) == 6 and not np.array_equal(made[3], made[4])
    scenario, truth = scenarios.scenarios("mirror", kinds=["two"])[0], rendered[0]
    pipeline, _, seed = evaluate_attention.evaluate_runway.load_model(
        values(*SMOKE), evaluate.CONFIG
    )
    session, plain = pipeline.session(), []
    session.start(truth.reference, truth.pictures[0], scenario.prompts[0][1], seed)
    chunk = pipeline.stream.chunk

    def noting(*args):
        latents, cache = chunk(*args)
        plain.append(np.array(latents))
        return latents, cache

    monkeypatch.setattr(pipeline.stream, "chunk", noting)
    for _ in range(4):
        session.next_chunk()
    assert all(np.array_equal(a, b) for a, b in zip(plain, made[:4], strict=True))


def test_flags_that_are_not_for_it():
    for flags, message in (
        (("--judge", "x"), "--judge is not for --bench attention"),
        (("--kind", "one"), "--kind is not for --bench attention"),
        (("--switch", "full"), "--switch is not for --bench attention"),
        (("--scenarios", "33", *SMOKE), "--scenarios 33: there are 32 of them"),
    ):
        with pytest.raises(UsageError, match=message):
            evaluate.run(values(*flags))

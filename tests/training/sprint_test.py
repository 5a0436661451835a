"""Training by the clock: the rate falls with it, stages share a state, a toy runs to its end."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from chameleon_jax import sharding
from chameleon_jax.config import ConfigError, load_config
from chameleon_jax.data.scenes import SceneError
from chameleon_jax.training import ahead, loop, optim, scene_feed
from chameleon_jax.training.scene_feed import Batches
from chameleon_jax.training.sprint import SprintError, rate_scale, run
from chameleon_jax.training.sprint_kinds import (
    Programs,
    check,
    check_same,
    kinds_in_turn,
    make_kind,
    step_file,
)
from configs import sprint as configs
from tests.training import toy

ROOT = Path(__file__).parents[2]


def test_the_rate_falls_with_the_clock():
    scales = [rate_scale(t, 100.0, 0.4, 0.05) for t in (0, 59, 60, 80, 100, 130)]
    np.testing.assert_allclose(scales, [1, 1, 1, 0.525, 0.05, 0.05])
    assert rate_scale(99.0, 100.0, 0.0, 0.05) == 1.0


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_compiled_step_follows_the_rate_that_is_set(name):
    config = toy.config("", 4)
    config.optimizer.update(name=name, by_clock=True)
    if name == "muon":
        config.optimizer.momentum = 0.95
    config.schedule.warmup = 0
    mesh, stage = sharding.make_mesh(config.mesh), toy.stage(config)
    step = jax.jit(stage.steps["toy"])
    batch = sharding.put_batch(next(toy.ToyFeed()), mesh)
    like = loop.blueprint(stage, mesh)
    state = loop.first_state(config, stage, like, mesh)

    def moved(scale: float) -> tuple[np.ndarray, float]:
        after, metrics = step(optim.with_rate_scale(state, scale), {}, batch)
        change = jax.tree.map(lambda a, b: a - b, after.params, state.params)
        flat = [np.asarray(x).ravel() for x in jax.tree.leaves(change)]
        return np.concatenate(flat), float(metrics["learning_rate"])

    (whole, rate), (half, half_rate), (none, _) = moved(1.0), moved(0.5), moved(0.0)
    assert rate == pytest.approx(1e-2) and half_rate == pytest.approx(5e-3)
    assert np.abs(whole).max() > 1e-3 and not none.any()
    np.testing.assert_allclose(half, whole / 2, atol=1e-6)
    assert step._cache_size() == 1  # no step was compiled again


def test_an_optimiser_that_does_not_follow_the_clock():
    config = toy.config("", 4)
    stage = toy.stage(config)
    mesh = sharding.make_mesh(config.mesh)
    state = loop.first_state(config, stage, loop.blueprint(stage, mesh), mesh)
    assert float(optim.rate_scale(state)) == 1.0
    with pytest.raises(ConfigError, match="optimizer.by_clock=true"):
        optim.with_rate_scale(state, 0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("order=('starts',)", "stages.starts.begins is 'state'; the first stage begins from one"),
        ("order=()", "order is empty"),
        ("order=('stils',)", "order has 'stils'; expected some of"),
        ("stages.clips.turn=('clip',)", "stages.clips.turn is"),
        ("stages.clips.seconds=0", "leave it out of order"),
        ("stages.clips.fall=1.5", "stages.clips.fall is 1.5; expected 0 to 1"),
        ("stages.clips.begins=nothing", "stages.clips.begins is 'nothing'"),
        (
            "stages.starts.teacher=clips",
            "stages.starts.teacher is 'clips'; expected a stage before",
        ),
        ("order=('stils','starts')", "order has 'stils'; expected some of"),
        (
            "order=('stills','starts','clips') stages.clips.begins=export",
            "stages.clips.turn has 'starts', and so has a stage before it",
        ),
        ("scenes.stills=6001", "scenes.stills is 6001; expected a multiple of scenes.together"),
        ("scenes.stills=0", "scenes.stills is 0; expected a multiple"),
    ],
)
def test_configs_that_cannot_be(change, message):
    with pytest.raises(ConfigError, match=message):
        check(load_config("configs/sprint.py:h200", change.split()))


def test_the_stages_of_the_embedded_model_share_a_state(tmp_path):
    """Only shapes are made: no step is compiled."""
    config = configs.get_config("h200")
    config.order += ("consistency", "dmd")
    check(config)
    assert kinds_in_turn(config) == ["stills", "starts", "clips", "consistency", "dmd"]
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    kinds = {name: make_kind(config, name, tmp_path, mesh) for name in kinds_in_turn(config)}
    check_same("clips", kinds["stills"].step.like, [kinds["starts"], kinds["clips"]])
    with pytest.raises(ConfigError, match="consistency has another state"):
        check_same("consistency", kinds["clips"].step.like, [kinds["consistency"]])
    frames = {name: kind.step.batch["z_video"].shape[:2] for name, kind in kinds.items()}
    assert frames == {
        "stills": (128, 1), "starts": (64, 3), "clips": (48, 9), "consistency": (48, 9),
        "dmd": (48, 9),
    }  # fmt: skip
    assert "labels" in kinds["clips"].step.batch
    assert "labels" not in kinds["consistency"].step.batch
    weights = kinds["consistency"].stage.weights
    assert weights["dit"] == weights["teacher"] == tmp_path / "clips/export/dit.safetensors"
    weights = kinds["dmd"].stage.weights
    assert weights["generator"] == tmp_path / "consistency/export/dit.safetensors"
    assert weights["critic"] == weights["real"] == tmp_path / "clips/export/dit.safetensors"

    steps = list(kinds["dmd"].steps)
    assert steps == ["both", "critic", "both 3+0", "critic 3+0"]
    files = {step_file(tmp_path, kinds["dmd"], step).name for step in steps}
    assert files == {f"dmd_{n}.step" for n in ("both", "critic", "both_3+0", "critic_3+0")}


def test_changes_begin_from_the_weights_of_the_config(tmp_path):
    config = configs.get_config("changes")
    check(config)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    kind = make_kind(config, "changes", tmp_path, mesh)
    for name in ("dit", "text"):
        assert str(kind.stage.weights[name]) == f"{config.weights}/{name}.safetensors"
    batch = kind.step.batch
    assert batch["z_before"].shape == batch["z_video"].shape == (4, 6, 16, 10, 16)


def test_what_is_compiled_ahead_does_not_depend_on_the_workdir(tmp_path):
    config = configs.get_config("toy")
    config.order += ("consistency",)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    one, two = (
        make_kind(config, "consistency", tmp_path / name, mesh).step.about({}) for name in "ab"
    )
    assert one == two
    config.kinds.consistency.loss.steps = 12
    assert make_kind(config, "consistency", tmp_path, mesh).step.about({}) != one


def test_a_step_that_cannot_be_loaded_is_compiled_here(tmp_path, monkeypatch, caplog):
    config = configs.get_config("toy")
    config.order = ("stills",)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    (tmp_path / "stills.step").write_bytes(b"{}\n")
    made = ahead.Ready(None, None)
    monkeypatch.setattr(ahead.Step, "compile", lambda step, options: made)
    programs = Programs(config, tmp_path, mesh, tmp_path)
    kind, ready = programs["stills"]
    programs.close()
    assert ready == {"teacher_forcing": made} and kind.name == "stills"
    assert "stills.step: not a compiled step" in caplog.text
    assert "it is compiled here now" in caplog.text


def test_a_second_run_in_a_folder_is_refused(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(SprintError, match="there is a run already"):
        run(configs.get_config("toy"), tmp_path)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give --workdir DIR to train"),
        (["--compile", "h200-1"], "--compile needs --programs"),
        (["--compile", "h200-1", "--programs", "x", "--prepare_stills", "a.npz"], "one of them"),
        (["--prepare_stills", "stills"], "ends in .npz"),
        (["--workdir", "x", "--programs", "nowhere"], "--programs nowhere: does not exist"),
        (["--workdir", "x", "--stills", "nowhere"], "--stills nowhere: does not exist"),
    ],
)
def test_flags_that_do_not_go_together(flags, message):
    from launch import cli, sprint

    with pytest.raises(cli.UsageError, match=message):
        sprint.run(cli.read(sprint.define_flags, flags))


def test_what_goes_wrong_in_a_thread_is_raised_where_batches_are_taken(tmp_path):
    config = configs.get_config("toy")
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    kind = make_kind(config, "stills", tmp_path, mesh)
    empty = SimpleNamespace(long_enough=lambda frames: [], matched=False)
    kinds = {"stills": (kind.config, kind.step.batch)}
    with (
        Batches(empty, kinds, (0, 0)) as batches,
        pytest.raises(SceneError, match="no scene to draw from"),
    ):
        batches.next("stills")


def test_training_waits_for_the_encoder(tmp_path, monkeypatch):
    """Also where stills were made before: compiling beside a training takes nine times as long."""
    config = configs.get_config("toy")
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    go = threading.Event()

    class NoRenderers(contextlib.nullcontext):
        check = staticmethod(lambda: None)

    monkeypatch.setattr(scene_feed, "Renderers", lambda *given: NoRenderers())
    monkeypatch.setattr(scene_feed.Encoder, "compile", lambda self, *shapes: go.wait(60))
    with scene_feed.SceneFeed(config, 96, mesh, tmp_path, 0) as feed:
        waiting = threading.Thread(target=feed.wait, args=(1, 0))
        waiting.start()
        waiting.join(0.5)
        assert waiting.is_alive()
        go.set()
        waiting.join(60)
        assert not waiting.is_alive()


def test_what_the_encoder_raises_is_raised_where_scenes_are_waited_for(tmp_path, monkeypatch):
    config = configs.get_config("toy")
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])

    def fail(self, *shapes):
        raise SceneError("no engine")

    monkeypatch.setattr(scene_feed, "Renderers", lambda *given: contextlib.nullcontext())
    monkeypatch.setattr(scene_feed.Encoder, "compile", fail)
    with scene_feed.SceneFeed(config, 96, mesh, tmp_path, 0) as feed:
        feed._thread.join(60)
        with pytest.raises(SceneError, match="no engine"):
            feed.wait(1, 1)


def launch(*arguments: str) -> str:
    """Run the command. Returns what it says."""
    done = subprocess.run(
        [sys.executable, "-m", "launch.sprint", "--config", "configs/sprint.py:toy", *arguments],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


@pytest.mark.slow
def test_a_toy_trains_to_the_end(tmp_path):
    """Stills and their step made before, distillation compiled here; each leaves a usable folder.

    The stage of starts takes the steps of stills here: one step less to compile.
    """
    programs, stills, work = (tmp_path / name for name in ("programs", "stills.npz", "run"))
    launch("--compile=here", f"--programs={programs}", "--config.order=('stills',)")
    assert [path.name for path in programs.iterdir()] == ["stills.step"]
    launch(f"--prepare_stills={stills}")
    said = launch(
        f"--workdir={work}",
        f"--programs={programs}",
        f"--stills={stills}",
        "--config.order=('stills','starts','dmd')",
        "--config.stages.starts.turn=('stills',)",
        "--config.stages.starts.seconds=8",
        "--config.stages.starts.fall=1.0",
        "--config.stages.dmd.teacher=starts",
        "--config.kinds.dmd.video.frames=9",
    )
    assert "step stills loaded in" in said
    assert said.count("it is compiled here now") == 2
    assert not (work / "scenes").exists()
    lines = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    keys = {
        "stills": "stills/loss",
        "starts": "starts/stills/loss",
        "dmd": "dmd/generator/loss",
    }
    for stage, key in keys.items():
        losses = [line[key] for line in lines if key in line]
        assert losses and np.isfinite(losses).all()
        names = {path.name for path in (work / stage / "export").iterdir()}
        weights = {f"{name}.safetensors" for name in ("dit", "text", "vae")}
        assert names == {*weights, "config.json", "tokenizer.json"}
    key = "starts/stills/learning_rate"
    rates = [line[key] for line in lines if key in line]
    assert rates[-1] < 0.95 * 2e-3  # the peak

    from chameleon_jax.inference import Pipeline

    pipeline = Pipeline.from_pretrained(work / "dmd/export")
    assert pipeline.config.sampler.name == "few_step"
    session = pipeline.session()
    example = ROOT / "chameleon_jax/assets/examples"
    session.start(example / "person.png", example / "first.png", "She waves.", seed=0)
    frames = next(iter(session))
    assert frames.shape[1:] == (128, 80, 3) and frames.std() > 0

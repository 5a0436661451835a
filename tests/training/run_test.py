"""A whole run as a script sees it: what it leaves, what it says, and its exit code."""

from __future__ import annotations

import json
import os
import signal

import numpy as np
import pytest

from chameleon_jax.config import ConfigError, load_config
from chameleon_jax.data import records
from chameleon_jax.data.examples import RunwayExamples
from chameleon_jax.training import loop, stages
from chameleon_jax.training import run as runs
from chameleon_jax.training.checkpoints import CheckpointError
from chameleon_jax.training.export import ExportError
from chameleon_jax.training.run import run
from chameleon_jax.training.stage import Stage
from launch import train
from tests.training import toy


class SignallingFeed(toy.ToyFeed):
    """Sends signals to this process while its batches are made: {batch: signals}."""

    def __init__(self, signals):
        super().__init__()
        self.signals = signals

    def __next__(self):
        for number in self.signals.get(self.count, ()):
            os.kill(os.getpid(), number)
        return super().__next__()


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    from tests.data import fake_renderer

    folder = tmp_path_factory.mktemp("clips")
    examples = RunwayExamples(size=(32, 32), frames=9, render=fake_renderer.render)
    for first, count in ((0, 8), (800_000, 4)):
        records.prepare_runway(folder, count, examples, seed_start=first, workers=0)
    return folder


@pytest.fixture
def settings(clips, tmp_path, monkeypatch):
    """Settings of a run of the toy stage, whose feed sends the given signals."""

    def make(*overrides, signals=None):
        def make_stage(config) -> Stage:
            return toy.stage(config, feed=lambda source: SignallingFeed(signals or {}))

        monkeypatch.setitem(stages.STAGES, "toy", make_stage)
        given = ["stage=toy", f"workdir={tmp_path / 'run'}", f"data.dir={clips}", *overrides]
        return load_config("configs/vae.py:smoke", ["train.steps=6", *given])

    return make


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["ctrl-c", "term"]
)
def test_a_stopped_run_is_saved_and_no_success(settings, tmp_path, caplog, number, code):
    folder = tmp_path / "run"
    outcome = run(settings(signals={3: [number]}))
    assert outcome.step == 4 and runs.EXIT_CODES[outcome.reason] == code
    message = caplog.records[-1].getMessage()
    assert f"stopped by {number.name} at step 4 of 6: the state is saved in" in message
    assert "nothing was exported. The same command resumes the run" in message
    assert not (folder / "export").exists()

    # The weights of the stopped run, if they are wanted; then the rest of the run.
    assert runs.EXIT_CODES[run(settings(), export_only=True).reason] == 0
    early = (folder / "export" / "toy.safetensors").read_bytes()
    assert run(settings()).reason == "finished"
    assert (folder / "export" / "toy.safetensors").read_bytes() != early
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").open()]
    assert sorted(set(steps)) == [1, 2, 3, 4, 5, 6]


def test_an_earlier_export_is_named(settings, tmp_path, caplog):
    run(settings())
    changed = settings("train.steps=9", signals={7: [signal.SIGINT]})
    run(changed, resume_with_changes=True)
    message = caplog.records[-1].getMessage()
    assert f"{tmp_path / 'run' / 'export'} holds the weights of an earlier export" in message


def test_a_signal_during_the_last_step_changes_nothing(settings, tmp_path):
    outcome = run(settings(signals={5: [signal.SIGINT]}))
    assert (outcome.step, outcome.reason) == (6, "finished")
    assert (tmp_path / "run" / "export" / "toy.safetensors").is_file()


def test_a_second_signal_stops_at_once(settings):
    with pytest.raises(KeyboardInterrupt):
        run(settings(signals={2: [signal.SIGINT, signal.SIGINT]}))


def test_the_time_limit_exports(settings, tmp_path):
    outcome = run(settings("train.max_minutes=1e-9"))
    assert (outcome.step, outcome.reason, runs.EXIT_CODES[outcome.reason]) == (1, "time", 0)
    assert (tmp_path / "run" / "export" / "toy.safetensors").is_file()


def test_changed_settings_are_refused_before_anything_is_read(settings, monkeypatch):
    run(settings())

    def refuse(*_):
        raise AssertionError("data were opened")

    monkeypatch.setattr(runs, "open_data", refuse)
    with pytest.raises(CheckpointError, match=r"data\.batch 2 -> 4; train\.steps 6 -> 8"):
        run(settings("train.steps=8", "data.batch=4"))


def test_an_export_that_fails_leaves_the_one_before(settings, tmp_path, monkeypatch):
    run(settings())
    folder = tmp_path / "run" / "export"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def refuse(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("chameleon_jax.training.export.inference_config", refuse)
    changed = settings("train.steps=8")
    with pytest.raises(ExportError, match=r"the weights cannot be written \(No space left"):
        run(changed, resume_with_changes=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_the_command_gives_the_exit_code(monkeypatch):
    monkeypatch.setattr(runs, "start_logging", lambda: None)
    for reason, code in {"finished": 0, "time": 0, "SIGINT": 130, "SIGTERM": 143}.items():
        outcome = runs.Outcome(None, 1, reason)
        monkeypatch.setattr(runs, "run", lambda config, outcome=outcome, **_: outcome)
        with pytest.raises(SystemExit) as stopped:
            train.main(["--config=configs/vae.py:smoke", "--nocompilation_cache"])
        assert stopped.value.code == code


def test_what_is_exported_is_the_average(settings, tmp_path):
    outcome = run(settings())
    network = toy.stage(settings()).trained["toy"]
    exported = network.load(tmp_path / "run" / "export" / "toy.safetensors")
    for name, value in exported.items():
        np.testing.assert_array_equal(value, outcome.state.ema["toy"][name])


def test_the_best_can_be_exported(settings, tmp_path):
    """At the end, or later. The loss falls: with "max" the best is not the last."""
    config = settings("train.best=eval/loss", "train.best_mode=max", "train.eval_every=2")
    outcome = run(config, export_best=True)
    network = toy.stage(config).trained["toy"]

    def exported():
        return network.load(tmp_path / "run" / "export" / "toy.safetensors")

    best, step = loop.load_state(config, toy.stage(config), best=True)
    assert outcome.step == 6 and step < 6
    at_the_end = exported()
    run(config, export_only=True)
    last = exported()
    run(config, export_only=True, export_best=True)
    for name, value in exported().items():
        np.testing.assert_array_equal(value, best.inference_params["toy"][name])
        np.testing.assert_array_equal(value, at_the_end[name])
        np.testing.assert_array_equal(value, outcome.state.inference_params["toy"][name])
    assert any((last[name] != value).any() for name, value in at_the_end.items())
    with pytest.raises(ConfigError, match=r"train\.best is not set: there is no best checkpoint"):
        run(settings(), export_best=True)


def test_strict_refuses_a_damaged_checkpoint(settings, tmp_path, caplog):
    run(settings())
    newest = tmp_path / "run" / "checkpoints" / "6"
    (newest / "about" / "metadata").write_text("{}")
    with pytest.raises(CheckpointError, match=r"6/about/metadata: damaged.*without --strict"):
        run(settings(), strict=True)
    run(settings(), export_only=True)
    assert "step 4 is used instead" in caplog.text

"""Checkpoints hold what was saved, or are refused: digests, damage, the best one, other meshes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chameleon_jax.config import ConfigError
from chameleon_jax.training import about, loop
from chameleon_jax.training.about import CheckpointError, DamagedError
from chameleon_jax.training.checkpoints import Checkpoints
from chameleon_jax.training.digests import digests_of
from tests.training import toy

ROOT = Path(__file__).parents[2]
FLIPS = 40


def config(workdir, steps, *overrides):
    return toy.config(workdir, steps, ["mesh.fsdp=1", "train.log_every=0", *overrides])


def train(workdir, steps, *overrides, **options):
    settings = config(workdir, steps, *overrides)
    held_out = [next(toy.ToyFeed())]
    return loop.train(settings, toy.stage(settings), toy.ToyFeed(), held_out, **options)


def load(workdir, *overrides, **options):
    settings = config(workdir, 6, "train.best=eval/loss", *overrides)
    return loop.load_state(settings, toy.stage(settings), **options)


def same_bits(a, b) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << (bit % 8)
    path.write_bytes(content)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run with the checkpoints 3 and 6, and their states."""
    workdir = tmp_path_factory.mktemp("saved")
    states = {3: train(workdir, 3).state, 6: None}
    states[6] = train(workdir, 6, resume_with_changes=True).state
    return workdir, states


@pytest.fixture
def run(saved, tmp_path):
    """A copy of that run, to be damaged."""
    shutil.copytree(saved[0], tmp_path / "run")
    return tmp_path / "run"


def files_of(run: Path, step: int = 6) -> list[Path]:
    return sorted(path for path in (run / "checkpoints" / str(step)).rglob("*") if path.is_file())


# --- digests


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "int8", "float8_e4m3fn"])
def test_every_bit_counts(dtype):
    plain = np.random.default_rng(0).normal(size=(3, 5)).astype(jnp.dtype(dtype))
    arrays = {"plain": plain}
    for bit in range(8 * plain.nbytes):
        raw = bytearray(plain.tobytes())
        raw[bit // 8] ^= 1 << (bit % 8)
        arrays[str(bit)] = np.frombuffer(bytes(raw), plain.dtype).reshape(plain.shape)
    assert len(set(digests_of(arrays).values())) == len(arrays)


def test_places_count():
    x = np.zeros((4, 6), np.float32)
    x[1, 2] = 1
    moved = [np.roll(x, shift, axis) for axis, n in ((0, 4), (1, 6)) for shift in range(1, n)]
    digests = digests_of({str(i): value for i, value in enumerate([x, *moved, x.T])})
    assert len(set(digests.values())) == 2 + len(moved)
    assert len(set(digests_of({"a": np.bool_(True), "b": np.bool_(False)}).values())) == 2
    keys = jax.random.split(jax.random.key(0), 2)
    assert len(set(digests_of({"a": keys[0], "b": keys[1]}).values())) == 2


# --- damage


def test_no_flipped_bit_goes_unseen(saved, tmp_path):
    """Of a state that is restored, every number is what was saved, whichever bit was flipped."""
    _, states = saved
    rng = np.random.default_rng(0)
    # Half of them where the arrays are, half in any file. Orbax spreads the arrays over a few files
    # whose names and sizes differ in each run, and never reads many of the others.
    names = files_of(saved[0])
    arrays = [path.stat().st_size * ("ocdbt.process_0/d" in str(path)) for path in names]
    chosen = [*rng.choice(len(names), FLIPS // 2, p=np.array(arrays) / sum(arrays))]
    chosen += [*rng.permutation(np.resize(np.arange(len(names)), FLIPS - len(chosen)))]
    refused = set()
    for number, index in enumerate(chosen):
        run = tmp_path / str(number)
        shutil.copytree(saved[0], run)
        path = run / names[index].relative_to(saved[0])
        flip(path, int(rng.integers(8 * path.stat().st_size)))
        try:
            state, _ = load(run, strict=True)
        except DamagedError as error:
            refused.add(number)
            assert "\n" not in str(error) and str(run / "checkpoints" / "6") in str(error)
            assert "without --strict the newest intact step is used" in str(error)
            state, step = load(run)
            assert step == 3 and same_bits(state, states[3])
        else:
            assert same_bits(state, states[6]), path
        shutil.rmtree(run)
    assert len(refused & set(range(FLIPS // 2))) > FLIPS // 4  # few bytes there are unused


def test_no_flipped_bit_of_the_description_goes_unseen(run):
    path = about.about_path(run / "checkpoints", 6)
    before, content = about.read_about(run / "checkpoints", 6, "toy"), path.read_bytes()
    for bit in range(0, 8 * len(content), 61):
        flip(path, bit)
        try:
            assert about.read_about(run / "checkpoints", 6, "toy") == before
        except DamagedError as error:
            assert str(path) in str(error) and "\n" not in str(error)
        path.write_bytes(content)


@pytest.mark.parametrize("damage", ["missing", "cut short", "empty"])
def test_no_damaged_file_goes_unseen(saved, tmp_path, damage):
    _, states = saved
    refused = 0
    for number, name in enumerate(files_of(saved[0])):
        run = tmp_path / str(number)
        shutil.copytree(saved[0], run)
        path = run / name.relative_to(saved[0])
        if damage == "missing":
            path.unlink()
        else:
            size = path.stat().st_size // 2 if damage == "cut short" else 0
            path.write_bytes(path.read_bytes()[:size])
        try:
            state, _ = load(run, strict=True)
        except DamagedError as error:
            refused += 1
            assert "\n" not in str(error) and str(run / "checkpoints" / "6") in str(error)
        else:
            assert same_bits(state, states[6]), path
    assert refused >= 3


LATE = """
import logging, sys
from chameleon_jax.training.checkpoints import Checkpoints

class Read:
    def __init__(self, says): self.says = says
    def __del__(self): raise RuntimeError(self.says)

Checkpoints(sys.argv[1], read_only=True)
for says in ("Event loop is closed", "seen one"):
    read = Read(says)
    del read
    sys.excepthook(RuntimeError, RuntimeError(says), None)
sys.excepthook(IndexError, IndexError("array index 3, of this program"), None)
for module in ("orbax/checkpoint", "seen_two"):
    text = f"Task exception was never retrieved\\nfuture: <Task coro=<read() at {module}.py:1>>"
    logging.getLogger("asyncio").error(text)
"""


def test_reads_that_end_too_late_say_nothing_and_others_do(run):
    """Of a checkpoint that is damaged, reads go on in threads after the first has failed."""
    command = [sys.executable, "-c", LATE, str(run / "checkpoints")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert "closed" not in done.stderr and "orbax" not in done.stderr
    assert done.stderr.count("RuntimeError: seen one") == 2 and "seen_two" in done.stderr
    assert "IndexError: array index 3, of this program" in done.stderr


def test_the_intact_step_before_is_used_and_the_run_goes_on(run, saved, caplog):
    data = max(files_of(run), key=lambda path: path.stat().st_size)
    flip(data, 8 * 2000)
    with caplog.at_level("WARNING", logger="chameleon_jax"):
        done = train(run, 6)
    (line,) = [record.getMessage() for record in caplog.records]
    assert "6: damaged" in line and "step 3 is used instead" in line and "\n" not in line
    assert done.step == 6 and same_bits(done.state, saved[1][6])  # trained again from step 3
    left = {path.name for path in (run / "checkpoints").iterdir()}
    assert left == {"3", "6", "6.damaged"}
    with pytest.raises(DamagedError, match="no step is intact"):
        for step in (3, 6):
            shutil.rmtree(run / "checkpoints" / str(step) / "state")
        train(run, 6)


def test_strict_refuses(run):
    shutil.rmtree(run / "checkpoints" / "6" / "state")
    with pytest.raises(DamagedError, match=r"checkpoints/6.*without --strict the newest intact"):
        train(run, 6, strict=True)
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"3", "6"}


def test_a_checkpoint_of_the_first_version_is_read_with_a_warning(run, caplog):
    """It has no digests."""
    path = about.about_path(run / "checkpoints", 6)
    today = about.read_about(run / "checkpoints", 6, "toy")
    plain = {key: today[key] for key in ("stage", "config", "data")}
    path.write_text(json.dumps(plain))
    with caplog.at_level("WARNING", logger="chameleon_jax"):
        _, step = load(run)
    assert step == 6 and "saved without digests" in caplog.text
    path.write_text(json.dumps(plain | {"array": {}}))  # not of the first version either
    assert load(run)[1] == 3


# --- the best


def scores(workdir) -> dict[int, float | None]:
    folder = workdir / "checkpoints"
    return {step: about.read_score(folder, step, "eval/loss") for step in about.steps_in(folder)}


def test_the_best_is_kept_beside_the_latest(tmp_path):
    # The rate is so high that the loss rises.
    given = ["train.eval_every=2", "train.best=eval/loss", "train.checkpoint_every=1", "seed=1"]
    given += ["schedule.peak=0.05", "train.keep=2", "optimizer.clip=0", "ema.decay=0"]
    done = train(tmp_path, 9, *given)
    kept = scores(tmp_path)
    best, step = load(tmp_path, *given, best=True)
    assert step not in (8, 9) and set(kept) == {step, 8, 9} and kept[9] is not None
    assert kept[step] < kept[8] and kept[step] < kept[9]
    assert not same_bits(best, done.state)
    # The same after a restart; "max" chooses among those that are left.
    train(tmp_path, 10, *given, resume_with_changes=True)
    assert set(scores(tmp_path)) == {step, 9, 10}
    with Checkpoints(tmp_path / "checkpoints", best="eval/loss", best_mode="max") as checkpoints:
        assert checkpoints.best() != step


def test_the_best_is_saved_when_it_is_measured(tmp_path):
    given = ["train.eval_every=2", "train.best=eval/loss", "train.checkpoint_every=0"]
    train(tmp_path, 5, *given)
    assert set(scores(tmp_path)) == {4, 5}
    assert load(tmp_path, best=True)[1] == 5


def test_an_unknown_metric_is_named_before_the_first_step(tmp_path):
    with pytest.raises(
        ConfigError, match=r"train\.best is 'loss'; expected one of eval/error, eval/loss"
    ):
        train(tmp_path, 2, "train.eval_every=1", "train.best=loss")


def test_a_run_without_a_best_says_so(run):
    with pytest.raises(CheckpointError, match=r"no checkpoint with a value of 'eval/loss'"):
        load(run, best=True)

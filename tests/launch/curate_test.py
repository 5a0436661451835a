"""The command that curates: what it says of bad input, each in one line."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from chameleon_jax.errors import UserError
from launch import cli, curate
from tests.curation.made import write_scene

ROOT = Path(__file__).parents[2]
OPEN = [
    "--config.aesthetics.weights=none",
    "--config.out.frames=25",
    "--config.out.fps=8",
]


def run(*arguments: str) -> None:
    curate.run(cli.read(curate.define_flags, [str(argument) for argument in arguments]))


@pytest.fixture
def footage(tmp_path):
    write_scene(tmp_path / "footage/one.mp4", [1])
    return tmp_path / "footage"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--out", "OUT"], "give --videos (a folder) or --demo, one of them"),
        (["--out", "OUT", "--demo", "--videos", "x"], "give --videos (a folder) or --demo"),
        (["--demo"], "required: --out"),
        (["--out", "OUT", "--videos", "nowhere"], "nowhere: no such folder"),
        (["--out", "OUT", "--videos", "EMPTY"], "no videos in it; expected files such as *.mp4"),
        (["--out", "OUT", "--videos", "FOOTAGE"], "one.mp4: no licence; name it in"),
        (["--out", "OUT", "--videos", "FOOTAGE", "--keep", "2"], "--keep 2: expected a share"),
        (["--out", "OUT", "--videos", "FOOTAGE", "--keep", "0"], "expected a number above 0"),
        (["--out", "OUT", "--videos", "x", "--lisence", "own"], "unknown flag --lisence"),
        (["--out", f"{__file__}/x", "--videos", "x"], "Not a directory"),
    ],
)
def test_bad_input_has_its_line(tmp_path, footage, arguments, expected):
    (tmp_path / "empty").mkdir()
    places = {"OUT": tmp_path / "out", "EMPTY": tmp_path / "empty", "FOOTAGE": footage}
    with pytest.raises((UserError, OSError)) as error:
        run(*(str(places.get(word, word)) for word in arguments))
    assert expected in str(error.value) and "\n" not in str(error.value)


def given(tmp_path, footage, *more: str) -> list[str]:
    where = ["--videos", str(footage), "--out", str(tmp_path / "out")]
    return [*where, "--licence", "own", "--source", "us", *OPEN, *more]


def test_missing_models_are_named(tmp_path, footage):
    weights = f"--config.person.weights={tmp_path}/yolox_s.onnx"
    with pytest.raises(UserError, match="yolox_s.onnx: no such file; the detector of people"):
        run(*given(tmp_path, footage, weights))


def test_an_endpoint_needs_its_model(tmp_path, footage):
    with pytest.raises(UserError, match="no model named"):
        run(*given(tmp_path, footage, "--config.vision.url=http://127.0.0.1:1/v1"))


def test_an_endpoint_that_is_not_there_stops_the_run_and_keeps_what_was_found(
    tmp_path, footage, monkeypatch, capsys
):
    from chameleon_jax.curation import pipeline
    from tests.curation.made import OnePerson

    monkeypatch.setattr(pipeline, "YoloxDetector", lambda *_: OnePerson())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    limits = [f"--config.{name}=(0.0,9.0)" for name in ("motion.limits.flow",)]
    vision = {
        "url": f"http://127.0.0.1:{port}/v1",
        "model": "m",
        "tries": "1",
    }
    flags = [f"--config.vision.{name}={value}" for name, value in vision.items()]
    filters = given(
        tmp_path,
        footage,
        *limits,
        "--config.person.limits.cut=(None,1.0)",
        "--config.technical.limits.blocks=(None,1.0)",
    )
    with pytest.raises(UserError, match="no answer after 1 tries.*the same command continues"):
        run(*filters, *flags)
    before = (tmp_path / "out/journal/person.jsonl").read_bytes()
    capsys.readouterr()
    run(*filters)  # without captions
    assert (tmp_path / "out/journal/person.jsonl").read_bytes() == before
    said = capsys.readouterr().out
    assert "1 clips pass; no records yet" in said and "report.html" in said


def test_help_needs_no_heavy_module():
    code = (
        "import sys\nfrom launch import curate\n"
        "try:\n    curate.main(['--help'])\nexcept SystemExit: pass\n"
        "assert not {'jax', 'cv2', 'scenedetect'} & set(sys.modules), 'heavy'"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--videos" in done.stdout and max(map(len, done.stdout.splitlines())) <= 100

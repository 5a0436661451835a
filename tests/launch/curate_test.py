"""The command that curates: what it says of bad input, each in one line."""

from __future__ import annotations

import base64
import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from chameleon_jax.curation.endpoint import encode_png
from chameleon_jax.data import sources
from chameleon_jax.data.images import open_image
from chameleon_jax.errors import UserError
from launch import cli, curate
from tests.curation import onnx_file
from tests.curation.endpoint_test import Server, said
from tests.curation.garment_test import GOOD_GARMENT, GOOD_REFERENCE, cloth
from tests.curation.made import GOOD, write_scene
from tests.curation.pose_test import SIZE, simcc, standing

ROOT = Path(__file__).parents[2]
OPEN = [
    "--config.aesthetics.weights=none",
    "--config.pose.weights=none",
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
    out = np.zeros((1, 8400, 85), np.float32)
    (tmp_path / "yolox_s.onnx").write_bytes(onnx_file.constant((1, 3, 640, 640), output=out))
    joints = f"--config.pose.weights={tmp_path}/rtmpose_m.onnx"
    with pytest.raises(UserError, match="rtmpose_m.onnx: no such file; joints are found by"):
        run(*given(tmp_path, footage, weights, joints))


def test_an_endpoint_needs_its_model(tmp_path, footage):
    with pytest.raises(UserError, match="no model named"):
        run(*given(tmp_path, footage, "--config.vision.url=http://127.0.0.1:1/v1"))


def test_a_missing_key_is_named(tmp_path, footage, monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    weights = tmp_path / "yolox_s.onnx"
    out = np.zeros((1, 8400, 85), np.float32)
    weights.write_bytes(onnx_file.constant((1, 3, 640, 640), output=out))
    vision = {"url": "https://example.org/v1", "model": "m", "key": "NO_SUCH_KEY"}
    flags = [f"--config.vision.{name}={value}" for name, value in vision.items()]
    with pytest.raises(UserError, match="NO_SUCH_KEY") as error:
        run(*given(tmp_path, footage, f"--config.person.weights={weights}", *flags))
    assert "\n" not in str(error.value)


def test_a_full_disk_is_told_in_one_line_and_the_run_goes_on(tmp_path):
    """The largest file that a process may write stands for what is left of the disk."""
    for number in range(3):
        write_scene(tmp_path / f"footage/v{number}.mp4", [number, 10 + number])
    out = np.zeros((1, 8400, 85), np.float32)
    (tmp_path / "net.onnx").write_bytes(onnx_file.constant((1, 3, 640, 640), output=out))
    weights = f"--config.person.weights={tmp_path}/net.onnx"
    flags = given(tmp_path, tmp_path / "footage", weights)

    def curated(left: int | None) -> subprocess.CompletedProcess:
        code = (
            "import resource, sys\nfrom launch import curate\n"
            "if sys.argv[1] != 'None':\n"
            "    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)\n"
            "curate.main(sys.argv[2:])"
        )
        command = [sys.executable, "-c", code, str(left), *flags]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    full = curated(150)
    assert full.returncode == 2 and not full.stdout
    said = full.stderr.strip().splitlines()[-1]
    assert "shots.jsonl: cannot be written" in said and "the same command continues" in said
    assert "Traceback" not in full.stderr
    again = curated(None)
    assert again.returncode == 0, again.stderr
    lines = (tmp_path / "out/journal/shots.jsonl").read_text().splitlines()
    assert sorted({json.loads(line)["clip"][:2] for line in lines}) == ["v0", "v1", "v2"]


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
    with pytest.raises(UserError, match="cannot be reached .*, once; .*the same command continues"):
        run(*filters, *flags)
    before = (tmp_path / "out/journal/person.jsonl").read_bytes()
    capsys.readouterr()
    run(*filters)  # without captions
    assert (tmp_path / "out/journal/person.jsonl").read_bytes() == before
    said = capsys.readouterr().out
    assert "1 clips pass; no records yet" in said and "report.html" in said


class Models(Server):
    """A captioner and an editor that do well, every fourth time only when they are asked again."""

    def answer(self, handler, status, headers, body):
        path, _, request = self.requests[-1]
        if len(self.requests) % 4 == 0:
            return super().answer(handler, 429, {"Retry-After": "0"}, {})
        if path.endswith("images/edits"):
            made = base64.b64encode(encode_png(self.edited(request))).decode()
            return super().answer(handler, 200, {}, {"data": [{"b64_json": made}]})
        asked = json.loads(request)["messages"][1]["content"][0]["text"]
        answers = {'"type"': {"type": "upper"}, "textural": GOOD_GARMENT, '"worn"': GOOD_REFERENCE}
        found = [answer for word, answer in answers.items() if word in asked]
        return super().answer(handler, 200, {}, said(found[-1] if found else GOOD))

    def edited(self, request: bytes) -> np.ndarray:
        """A garment of the only picture, or the first of two in another one."""
        starts = [found.start() for found in re.finditer(re.escape(b"\x89PNG"), request)]
        frame = np.asarray(open_image(request[starts[0] :])).copy()
        if len(starts) == 1:
            return cloth(int(frame.sum()) % 999)
        frame[20:40, 18:30] = 255 - frame[20:40, 18:30]
        return frame


def test_a_whole_run_with_an_onnx_file_and_endpoints(tmp_path, monkeypatch, capsys):
    """All that a user has, but small: the detector by OpenCV, the models behind a server."""
    monkeypatch.setattr("chameleon_jax.curation.endpoint.FIRST_WAIT", 0.0)
    out = np.zeros((1, 8400, 85), np.float32)  # a person in the middle of every picture
    out[0, 80 * 80 + 20 * 40 + 16, :6] = (0.0, 0.0, np.log(20), np.log(30), 0.95, 0.95)
    (tmp_path / "net.onnx").write_bytes(onnx_file.constant((1, 3, 640, 640), output=out))
    along_x, along_y = simcc(standing(at=(96, 80), trunk=60).joints * SIZE[::-1], np.full(17, 0.9))
    joints = onnx_file.constant((1, 3, 256, 192), simcc_x=along_x, simcc_y=along_y)
    (tmp_path / "joints.onnx").write_bytes(joints)
    for number in range(2):
        write_scene(tmp_path / f"footage/v{number}.mp4", [number, 10 + number])
    settings = {
        "person.weights": tmp_path / "net.onnx",
        "pose.weights": tmp_path / "joints.onnx",
        "aesthetics.weights": "none",
        "technical.limits.blocks": "(None,1.0)",
        "motion.limits.flow": "(0.0,9.0)",
        "blur.limits.sharpness": "(0.0,1.0)",
        "out.size": "(64,48)",
    }
    flags = [f"--config.{name}={value}" for name, value in settings.items()]
    where = ["--videos", tmp_path / "footage", "--out", tmp_path / "out"]
    licence = ["--licence", "own", "--source", "us", "--config", "configs/curation.py:demo"]
    with Models((200, {}, {})) as server:
        urls = [f"--config.{name}.url={server.url}" for name in ("vision", "editor")]
        run(*where, *licence, *flags, *urls)
        asked = len(server.requests)
        run(*where, *licence, *flags, *urls)  # all of it is there
        assert len(server.requests) == asked
    assert "records: 4 records" in capsys.readouterr().out.replace("records'", "records")
    records = sources.open_sources(tmp_path / "out/records", "train")
    table = sources.open_sources(tmp_path / "out/table")
    assert len(records) == len(table) == 4
    assert records.load(0, 25, (64, 48))["captions"]["dynamic"] == GOOD["en_long"][0]
    spec = json.loads(records.raw(0)["spec"])
    assert spec["captions_by"]["model"] == "scripted"
    assert spec["measured"]["front"] == spec["measured"]["whole"] == 1


def test_help_needs_no_heavy_module():
    code = (
        "import sys\nfrom launch import curate\n"
        "try:\n    curate.main(['--help'])\nexcept SystemExit: pass\n"
        "assert not {'jax', 'cv2', 'scenedetect'} & set(sys.modules), 'heavy'"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--videos" in done.stdout and max(map(len, done.stdout.splitlines())) <= 100

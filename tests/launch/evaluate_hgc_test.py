"""`launch.evaluate --bench hgc`: three stages on a small benchmark, and what stops them."""

from __future__ import annotations

import csv
import json
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from chameleon_jax import vlm
from chameleon_jax.data.video import read_video, write_video
from chameleon_jax.evaluation.benches import hgc
from chameleon_jax.evaluation.scores.garment import KEYS
from launch import evaluate
from tests.vlm_server import ScriptedServer

ROOT = Path(__file__).parents[2]
SMOKE = "--config=configs/runway_tiny.py:smoke"
GRADES = json.dumps(dict(zip(KEYS, (5, 4, 3), strict=True)))


def run(*words: str) -> int:
    """The command in this process. Returns its exit code."""
    with pytest.raises(SystemExit) as ended:
        evaluate.main(["--bench=hgc", *words])
    return ended.value.code


@pytest.fixture
def bench(tmp_path) -> Path:
    """Two samples: one picture with an alpha channel, one in grey."""
    folder = tmp_path / "HGC-Bench"
    folder.mkdir()
    Image.new("RGBA", (40, 90), (200, 30, 30, 255)).save(folder / "person.png")
    Image.new("L", (60, 30), 90).save(folder / "garment.png")
    with (folder / hgc.TABLE).open("w", encoding="utf-8-sig", newline="") as file:
        table = csv.writer(file)
        table.writerow(hgc.COLUMNS)
        for text in ("a person walks", 'a "person", waiting'):
            prompt = json.dumps({"caption": {"en_short": text}})
            table.writerow(["HGC-Bench/person.png", "HGC-Bench/garment.png", prompt])
    return folder


@pytest.fixture
def made(bench, tmp_path) -> list[str]:
    """Flags of a model whose videos, of another program, are there."""
    folder = tmp_path / "out" / "9" / "theirs"
    folder.mkdir(parents=True)
    for index in range(2):
        rng = np.random.default_rng(index)
        video = rng.integers(0, 255, (9, 32, 32, 3), np.uint8)
        write_video(folder / f"output_{index}.mp4", video, 8)
    models = str(tmp_path / "models")
    return [
        f"--data={bench}",
        f"--out={tmp_path / 'out'}",
        "--name=theirs",
        "--frames=9",
        f"--models={models}",
    ]


def test_videos_are_made_once_and_say_how(bench, tmp_path, capfd):
    flags = [f"--data={bench}", f"--out={tmp_path / 'out'}", "--frames=9", SMOKE]
    assert run(*flags, "--stage=generate") == 0
    assert "2 videos made, 2 are there" in capfd.readouterr().out
    folder = tmp_path / "out" / "9" / "model"
    first = (folder / "output_0.mp4").read_bytes()
    assert run(*flags, "--stage=generate") == 0
    assert "all 2 videos are there" in capfd.readouterr().out
    assert (folder / "output_0.mp4").read_bytes() == first
    reports = [json.loads((folder / f"output_{index}.json").read_text()) for index in range(2)]
    assert [report["seed"] for report in reports] == [42, 42]
    assert reports[1]["prompt"] == 'a "person", waiting'
    assert reports[0]["weights"] == {"random": "42"} and reports[0]["config"]["name"] == "smoke"
    assert reports[0]["fps_paper"] > reports[0]["fps_decoded"] > 0
    assert sum(chunk["frames"] for chunk in reports[0]["chunks"]) == 9
    assert len(read_video(folder / "output_0.mp4")) == 9 == reports[0]["frames"]
    assert run(*flags, "--stage=generate", "--steps=1") == 2
    assert "made with another config; choose another --name" in capfd.readouterr().err


def test_videos_of_others_are_scored_by_an_endpoint(made, tmp_path, capfd):
    """A limit of the endpoint, junk, then a reply; the second sample gets junk alone."""
    with ScriptedServer(
        ["junk", f"```json\n{GRADES}\n```", "no", "no", "no", "no", "no"]
    ) as server:
        vlm_flags = [f"--vlm_url={server.url}", "--vlm_model=judge"]
        endpoint = vlm.Endpoint.open
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(vlm.Endpoint, "open", lambda *a, **k: endpoint(*a, **k, wait=0.0))
            code = run(*made, *vlm_flags, "--stage=score", "--metric=garment")
    assert code == 0 and len(server.requests) == 7
    assert "2 videos scored, 0 known, 1 without a figure" in capfd.readouterr().out
    path = tmp_path / "out" / "9" / "theirs" / "scores" / "garment.jsonl"
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    assert first["values"] == {"hgc": 5, "lgc": 4, "ntp": 3} and first["raw"][0] == "junk"
    assert first["about"]["model"] == "judge" and len(first["about"]["prompt"]) == 16
    assert second["values"] == {"hgc": None, "lgc": None, "ntp": None}
    assert run(*made, *vlm_flags, "--stage=table") == 0
    assert "n 1, missing 1" in capfd.readouterr().out


def test_metrics_run_in_processes_of_their_own(made, tmp_path, capfd):
    flags = [*made, "--stage=score,table", "--metric=vq_sharpness", "--metric=amp_paper"]
    assert run(*flags) == 0
    out = capfd.readouterr().out
    assert "vq_sharpness: 2 videos scored" in out and "amp_paper: 2 videos scored" in out
    assert (tmp_path / "out" / "9" / "table.md").read_text() in out and "| **theirs** |" in out
    assert run(*made, "--stage=score", "--metric=amp_paper") == 0
    assert "amp_paper: 0 videos scored, 2 known" in capfd.readouterr().out
    assert run(*made, "--stage=generate", SMOKE) == 2
    assert "not made by this command" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--stage=score", "--metric=cur"], "cur needs in .*models: face_detection_yunet"),
        (["--stage=score", "--metric=garment"], "garment needs an endpoint: give --vlm_url"),
        (["--stage=score", "--metric=curr"], "'curr': expected one of .*; did you mean cur?"),
        (["--stage=scor"], "'scor': expected one of .*; did you mean score?"),
        (["--vlm_url=http://localhost"], "--vlm_url and --vlm_model belong together"),
        (["--vlm_url=https://example.com", "--vlm_model=m"], "no key; put it into .*_VLM_KEY"),
        (["--gme_url=https://example.com", "--gme_model=m"], "no key; put it into .*_GME_KEY"),
        (["--vlm_prompt=nowhere.txt"], "--vlm_prompt nowhere.txt: cannot be read"),
        (["--name=../theirs"], "--name ../theirs: expected the name of a folder"),
        (["--judge=x"], "--judge is not for --bench hgc; leave it out"),
        (["--stage=score", "--metric=amp_paper", "--name=new"], "no videos in it; make them"),
    ],
)
def test_what_stops_the_command_is_one_line(made, capfd, monkeypatch, flags, message):
    for name in (vlm.KEY, "CHAMELEON_GME_KEY"):
        monkeypatch.delenv(name, raising=False)
    if "--gme_model=m" in flags:
        monkeypatch.setenv(vlm.KEY, "of another server")
    assert run(*made, *flags) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error")]
    assert re.search(message, line)


def test_no_benchmark(tmp_path, capfd):
    assert run() == 2
    assert "--bench hgc needs --data, the folder of HGC-Bench" in capfd.readouterr().err
    assert run(f"--data={tmp_path}") == 2
    assert "no meta_data.csv in it" in capfd.readouterr().err


def test_an_endpoint_that_is_not_there(made, capfd, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    endpoint = vlm.Endpoint.open
    monkeypatch.setattr(vlm.Endpoint, "open", lambda *a, **k: endpoint(*a, **k, tries=1))
    flags = [f"--vlm_url={url}", "--vlm_model=judge", "--stage=score", "--metric=garment"]
    monkeypatch.setattr("chameleon_jax.evaluation.scoring.PATIENCE", 1)
    assert run(*made, *flags) == 2
    assert "cannot be reached" in capfd.readouterr().err


def test_flags_of_hgc_are_not_for_runway(tmp_path, capfd):
    with pytest.raises(SystemExit) as ended:
        evaluate.main([f"--judge={tmp_path}", "--metric=cur"])
    assert ended.value.code == 2
    assert "--metric is not for --bench runway; leave it out" in capfd.readouterr().err
    with pytest.raises(SystemExit) as ended:
        evaluate.main(["--bench=judge"])
    assert "--bench judge needs --judge" in capfd.readouterr().err


@pytest.mark.slow
def test_a_killed_run_goes_on(bench, tmp_path, capfd):
    flags = [f"--data={bench}", f"--out={tmp_path / 'out'}", "--frames=45", SMOKE]
    command = [sys.executable, "-m", "launch.evaluate", "--bench=hgc", *flags, "--stage=generate"]
    folder = tmp_path / "out" / "45" / "model"
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as running:
        while not (folder / "output_0.json").exists():
            assert running.poll() is None
            time.sleep(0.01)
        running.kill()
    assert not (folder / "output_1.json").exists(), "too fast to be killed in between"
    first = (folder / "output_0.mp4").read_bytes()
    assert run(*flags, "--stage=generate") == 0
    assert "1 videos made, 2 are there" in capfd.readouterr().out
    assert (folder / "output_0.mp4").read_bytes() == first
    whole = subprocess.run([*command, "--name=whole"], cwd=ROOT, stderr=subprocess.DEVNULL)
    assert whole.returncode == 0
    for index in range(2):
        again = read_video(folder.with_name("whole") / f"output_{index}.mp4")
        np.testing.assert_array_equal(read_video(folder / f"output_{index}.mp4"), again)


@pytest.mark.slow
def test_the_demo_with_the_embedded_model(tmp_path):
    """All that a user types: make the small benchmark, and measure the model on it."""
    demo, out = tmp_path / "demo", tmp_path / "out"

    def command(*words: str) -> str:
        words = (sys.executable, "-m", "launch.evaluate", "--bench", "hgc", *words)
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr
        return done.stdout

    command("--make_demo", str(demo), "--samples", "2")
    samples = hgc.read(demo)
    assert len(samples) == 2 and "wearing" in samples[0].prompt
    with ScriptedServer([GRADES]) as server:
        words = ["--data", str(demo), "--out", str(out), "--frames", "9"]
        words += ["--models", str(tmp_path), "--vlm_url", server.url, "--vlm_model", "judge"]
        text = command(*words)
        assert len(server.requests) == 2
        assert command(*words)[-len(text) // 2 :] == text[-len(text) // 2 :]
        assert len(server.requests) == 2
    row = next(line for line in text.splitlines() if line.startswith("| **model** |"))
    assert "5.0000 (5.0000 to 5.0000), n 2" in row
    found = json.loads((out / "9" / "table.json").read_text())["models"]["model"]
    ours = {"amp_paper", "amp_opens2v", "smoo_flow", "vq_sharpness", "hgc", "lgc", "ntp"}
    assert set(found["figures"]) == ours | {"fps_paper", "fps_denoise", "fps_decoded"}
    assert all(figure["count"] == 2 for figure in found["figures"].values())
    assert found["figures"]["amp_paper"]["mean"] > 0.02  # people move

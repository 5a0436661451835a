"""`launch.sample` from end to end on a random model of a few thousand parameters: outputs, bad
inputs, Ctrl-C.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from chameleon_jax.config import load_config
from chameleon_jax.data.video import read_video
from chameleon_jax.inference import Pipeline
from launch import sample

ROOT = Path(__file__).parents[2]
CONFIG = f"{ROOT}/configs/runway_tiny.py:smoke"
SMALL = [f"--config={CONFIG}", "--config.video.height=64", "--config.video.width=48", "--steps=1"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for seed, name in enumerate(("person.png", "first.png", "second.jpg", "third.webp")):
        pixels = np.random.default_rng(seed).integers(0, 256, (90 + 7 * seed, 60, 3), np.uint8)
        Image.fromarray(pixels).save(folder / name)
    (folder / "empty.png").touch()
    (folder / "cut.png").write_bytes((folder / "first.png").read_bytes()[:400])
    (folder / "notes.png").write_text("this is not a picture")
    Image.new("1", (30_000, 30_000)).save(folder / "huge.png")
    return folder


def command(pictures, out, *extra, reference="person.png", garments=("first.png",)):
    return [
        *SMALL,
        f"--reference={pictures / reference}",
        *(f"--garment={pictures / g}" for g in garments),
        f"--out={out}",
        *extra,
    ]


def call(argv, capsys):
    """Exit code, stdout, stderr."""
    with pytest.raises(SystemExit) as exit_:
        sample.main(argv)
    streams = capsys.readouterr()
    return exit_.value.code or 0, streams.out, streams.err


def test_the_main_job(pictures, tmp_path, capsys):
    out = tmp_path / "new" / "folder" / "out.mp4"
    garments = ("first.png", "third.webp@24", "second.jpg@10")
    argv = command(pictures, out, "--prompt=她 walks", "--frames=50", "--seed=7", garments=garments)
    code, stdout, stderr = call(argv, capsys)
    assert code == 0
    assert str(out) in stdout
    assert "50/50" in stderr and "frames/s" in stderr
    assert sorted(p.name for p in out.parent.iterdir()) == ["out.json", "out.mp4", "out.png"]
    frames = read_video(out)
    assert frames.shape == (50, 64, 48, 3)
    report = json.loads(out.with_suffix(".json").read_text())
    assert (report["frames"], report["size"], report["seed"], report["prompt"]) == (
        50,
        [64, 48],
        7,
        "她 walks",
    )
    # chunks start at 0, 9, 21, then 29 (8 frames after the first switch), ...
    assert [(Path(s["path"]).name, s["asked"], s["effective"]) for s in report["switches"]] == [
        ("second.jpg", 10, 21),
        ("third.webp", 24, 29),
    ]
    assert report["config"]["sampler"]["steps"] == 1 and report["config"]["video"]["height"] == 64
    assert report["denoise_fps"] > report["delivered_fps"] > 0
    assert set(report["seconds"]) == {"load", "compile", "stream", "first_frame"}
    assert {"jax", "flax", "chameleon_jax", "python"} <= set(report["versions"])
    assert not report["interrupted"]
    with Image.open(out.with_suffix(".png")) as sheet:
        assert sheet.size[0] >= 8 * 48 and sheet.size[1] >= 4 * 64


def test_same_command_same_video_and_existing_files_are_replaced(pictures, tmp_path, capsys):
    videos = []
    for name in ("a.mp4", "b.mp4", "b.mp4"):
        argv = command(pictures, tmp_path / name, "--frames=9", "--switch=refresh")
        assert call(argv, capsys)[0] == 0
        videos.append(read_video(tmp_path / name))
    assert np.array_equal(videos[0], videos[1]) and np.array_equal(videos[1], videos[2])


def test_last_of_several_switches_in_one_chunk_wins(pictures, tmp_path, capsys):
    garments = ("first.png", "second.jpg@10", "third.webp@12", "second.jpg@12")
    code, stdout, stderr = call(
        command(pictures, tmp_path / "o.mp4", "--frames=30", garments=garments), capsys
    )
    assert code == 0
    assert re.search(
        r"note: two garments at frame 12: .*second\.jpg replaces .*third\.webp", stderr
    )
    switches = json.loads((tmp_path / "o.json").read_text())["switches"]
    assert [(s["asked"], s["effective"], s["superseded"]) for s in switches] == [
        (10, None, True),
        (12, 21, False),
    ]
    assert "None" not in stdout


def test_refresh_alone_keeps_the_rhythm(pictures, tmp_path, capsys):
    argv = command(
        pictures,
        tmp_path / "o.mp4",
        "--frames=40",
        "--switch=refresh",
        garments=("first.png", "second.jpg@10"),
    )
    assert call(argv, capsys)[0] == 0
    report = json.loads((tmp_path / "o.json").read_text())
    assert report["mechanisms"] == {
        "refresh": True,
        "withdraw": False,
        "disentangle": False,
        "drop_repeated_frame": True,
        "last_latent": False,
        "random_frame": False,
        "anchor": False,
        "history_noise": 0.3,
        "carry": False,
        "carry_noise": 0.6,
        "fade": True,
    }
    assert report["switches"][0]["effective"] == 21 and report["frames"] == 40


def test_a_prompt_that_is_too_long_is_reported(pictures, tmp_path, capsys, caplog):
    """The smoke model reads 16 bytes, its end token among them."""
    argv = command(pictures, tmp_path / "o.mp4", "--frames=9", "--prompt=a red coat, she waves")
    assert call(argv, capsys)[0] == 0
    assert "more than 16 tokens: its end is left out, from 'waves' on" in caplog.text
    assert json.loads((tmp_path / "o.json").read_text())["prompts_left_out"] == ["waves"]


BAD = {
    "no such picture": (["--reference={p}/nobody.png"], "nobody.png: no such file"),
    "empty file": (["--garment={p}/empty.png@9"], "empty.png: the file is empty"),
    "truncated": (["--garment={p}/cut.png@9"], "cut.png"),
    "not a picture": (["--reference={p}/notes.png"], "notes.png"),
    "enormous": (["--reference={p}/huge.png"], "huge.png"),
    "frame too late": (
        ["--garment={p}/second.jpg@33"],
        "there is no frame 33; the video has frames 0 to 32",
    ),
    "negative frame": (["--garment={p}/second.jpg@-3"], "there is no frame -3"),
    "too late to be seen": (
        ["--garment={p}/second.jpg@30"],
        "the last chunk of 33 frames starts at frame 21",
    ),
    "two to start with": (["--garment={p}/second.jpg"], "say from when"),
    "unknown key": (["--config.sampler.stepz=3"], "sampler.steps"),
    "wrong kind of value": (["--config.sampler.steps=many"], "sampler.steps is int"),
    "unknown flag": (["--garmnet=x.png"], "garmnet"),
    "stray argument": (["person.png"], "unexpected argument 'person.png'"),
    "no frames": (["--frames=0"], "'0': expected a whole number from 1 up"),
    "frames not a number": (["--frames=many"], "frames"),
    "no steps": (["--steps=0"], "expected a whole number from 1 to 1000"),
    "stream too long for absolute positions": (
        ["--frames=5000", "--config.cache.positions=absolute"],
        "cache.positions='relative'",
    ),
    "cache without room for a chunk": (["--config.cache.frames=4"], "room for a chunk of 3"),
    "unknown sampler": (["--config.sampler.name=ddim"], "'ddim' is not one of"),
    "networks that do not fit together": (["--config.model.vae.z_dim=5"], "latent_mean"),
    "seed out of range": (["--seed=-1"], "expected a whole number from 0 to 4294967295"),
    "unknown mechanism": (["--switch=refrsh"], "'refrsh'"),
    "switch without refresh": (["--switch=withdraw"], "add refresh"),
    "no such config": (["--config={p}/nothing.py"], "nothing.py does not exist"),
    "no such variant": ([f"--config={ROOT}/configs/runway_tiny.py:smokey"], "smokey"),
    "no such weights": (["--weights={p}/nowhere"], "nowhere: no such folder"),
    "size that does not fit": (["--config.video.height=70"], "multiple of 16"),
    "not a video name": (["--out={o}/out.gif"], "ends in .mp4"),
    "folder that cannot be made": (["--out={p}/notes.png/out.mp4"], "Not a directory"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(name, pictures, tmp_path, capsys):
    extra, message = BAD[name]
    extra = [item.format(p=pictures, o=tmp_path) for item in extra]
    code, stdout, stderr = call(
        command(pictures, tmp_path / "deep" / "out.mp4", "--frames=33", *extra), capsys
    )
    lines = [line for line in stderr.splitlines() if not line.startswith("note: ")]
    assert code == 2 and stdout == ""
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]
    assert list(tmp_path.iterdir()) == []


def test_reference_without_garment(pictures, tmp_path, capsys):
    code, _, stderr = call([*SMALL, f"--reference={pictures / 'person.png'}"], capsys)
    assert code == 2 and "--garment" in stderr
    code, _, stderr = call(command(pictures, tmp_path / "o.mp4", garments=("first.png@9",)), capsys)
    assert code == 2 and "to start with" in stderr


def test_weights_that_do_not_fit_list_every_mismatch(pictures, tmp_path, capsys):
    Pipeline.random(load_config(CONFIG), seed=0).save(tmp_path / "weights")
    extra = [
        f"--weights={tmp_path / 'weights'}",
        "--config.model.dit.layers=1",
        "--config.model.vae.dec_width=8",
    ]
    code, _, stderr = call(command(pictures, tmp_path / "out.mp4", *extra), capsys)
    assert code == 2 and len(stderr.splitlines()) == 1
    assert "model.vae.dec_width is 8, the weights were made with 4" in stderr
    assert "model.dit.layers is 1, the weights were made with 2" in stderr
    assert [p.name for p in tmp_path.iterdir()] == ["weights"]


def test_saved_weights_stream(pictures, tmp_path, capsys):
    Pipeline.random(load_config(CONFIG), seed=0).save(tmp_path / "weights")
    weights = f"--weights={tmp_path / 'weights'}"
    code, _, _ = call(
        command(pictures, tmp_path / "out.mp4", "--frames=3", "--prompt=", weights), capsys
    )
    assert code == 0 and len(read_video(tmp_path / "out.mp4")) == 3


def run_until(condition, process, seconds=240):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_ctrl_c_leaves_a_playable_file(pictures, tmp_path):
    def written() -> bool:
        parts = tmp_path.glob("out.*.part.mp4")
        return any(part.stat().st_size > 20_000 for part in parts)

    argv = [
        sys.executable,
        "-m",
        "launch.sample",
        *command(pictures, tmp_path / "out.mp4", "--frames=100000"),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        argv, cwd=ROOT, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        run_until(written, process)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in stderr and "interrupted" in stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.json", "out.mp4", "out.png"]
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["interrupted"] and report["frames_asked"] == 100000
    assert len(read_video(tmp_path / "out.mp4")) == report["frames"] >= 9


def test_ctrl_c_before_the_first_frame_leaves_nothing(pictures, tmp_path):
    argv = [sys.executable, "-m", "launch.sample", *command(pictures, tmp_path / "out.mp4")]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "JAX_PLATFORMS": "cpu",
    }
    process = subprocess.Popen(
        argv,
        cwd=ROOT,
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # a shell's background jobs ignore it
    )
    try:
        assert "compiling" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == 130
    assert stderr.strip() == "interrupted"
    assert list(tmp_path.iterdir()) == []

"""`launch.sample --task t2v` and `i2v` from end to end on a random model: outputs, bad inputs,
Ctrl-C.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from chameleon_jax.config import load_config
from chameleon_jax.data.video import read_video
from chameleon_jax.diffusion.sampler import NEGATIVE_PROMPT
from chameleon_jax.inference import Pipeline
from chameleon_jax.weights.tensors import write_tensors
from launch import sample

ROOT = Path(__file__).parents[2]
CONFIG = f"{ROOT}/configs/wan22_ti2v.py:smoke"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    pixels = np.random.default_rng(0).integers(0, 256, (70, 40, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "tall.png")
    (folder / "empty.png").touch()
    return folder


def command(task, out, *extra, prompt="她 walks"):
    argv = [f"--task={task}", f"--config={CONFIG}", "--steps=1", f"--out={out}", *extra]
    return argv if prompt is None else [*argv, f"--prompt={prompt}"]


def call(argv, capsys):
    """Exit code, stdout, stderr."""
    with pytest.raises(SystemExit) as exit_:
        sample.main(argv)
    streams = capsys.readouterr()
    return exit_.value.code or 0, streams.out, streams.err


def test_text_to_video(tmp_path, capsys):
    out = tmp_path / "new" / "out.mp4"
    asked = (
        "--size=48x32",
        "--frames=13",
        "--steps=3",
        "--seed=7",
        "--guidance=2.5",
        "--shift=3",
        "--grid=diffusers",
    )
    code, stdout, stderr = call(command("t2v", out, *asked, "--negative_prompt=blurred"), capsys)
    assert code == 0
    assert f"{out}: 13 frames of 48x32, 3 steps in " in stdout
    assert "3/3" in stderr and "13/13" in stderr
    assert sorted(p.name for p in out.parent.iterdir()) == ["out.json", "out.mp4", "out.png"]
    assert read_video(out).shape == (13, 48, 32, 3)
    report = json.loads(out.with_suffix(".json").read_text())
    expected = {
        "task": "t2v",
        "interrupted": False,
        "frames": 13,
        "frames_asked": 13,
        "size": [48, 32],
        "fps": 24,
        "seed": 7,
        "prompt": "她 walks",
        "negative_prompt": "blurred",
        "image": None,
        "grid": "diffusers",
        "steps": 3,
        "shift": 3.0,
        "guidance": 2.5,
        "weights": "random",
    }
    assert {key: report[key] for key in expected} == expected
    assert report["config"]["generate"]["steps"] == 3 and report["config"]["video"]["height"] == 48
    assert set(report["seconds"]) == {"load", "encode", "first_step", "denoise", "decode", "total"}
    assert {"jax", "flax", "chameleon_jax", "python"} <= set(report["versions"])
    with Image.open(out.with_suffix(".png")) as sheet:
        assert sheet.size[0] >= 8 * 32 and 2 * 48 <= sheet.size[1] < 3 * 48 + 50


def test_image_to_video(pictures, tmp_path, capsys):
    """The size follows the image; its picture heads the contact sheet."""
    out = tmp_path / "out.mp4"
    code, stdout, _ = call(command("i2v", out, f"--image={pictures / 'tall.png'}"), capsys)
    assert code == 0 and "9 frames of 48x32" in stdout
    assert read_video(out).shape == (9, 48, 32, 3)
    report = json.loads(out.with_suffix(".json").read_text())
    assert (report["task"], report["image"], report["size"]) == (
        "i2v",
        f"{pictures / 'tall.png'}",
        [48, 32],
    )
    assert report["negative_prompt"] == NEGATIVE_PROMPT and report["grid"] == "wan"
    with Image.open(out.with_suffix(".png")) as sheet:
        assert sheet.size[1] >= 3 * 48
    code, _, _ = call(
        command("i2v", out, f"--image={pictures / 'tall.png'}", "--size=32x48"), capsys
    )
    assert code == 0 and read_video(out).shape == (9, 32, 48, 3)


def test_same_seed_same_bits_and_an_empty_prompt_is_a_prompt(tmp_path, capsys):
    videos = []
    for name, seed in (("a.mp4", 1), ("b.mp4", 1), ("b.mp4", 2)):
        argv = command(
            "t2v", tmp_path / name, f"--seed={seed}", "--frames=5", "--guidance=1", prompt=""
        )
        assert call(argv, capsys)[0] == 0
        videos.append((tmp_path / name).read_bytes())
    assert videos[0] == videos[1] != videos[2]
    assert json.loads((tmp_path / "b.json").read_text())["negative_prompt"] is None


def test_a_negative_prompt_that_is_not_read_is_remarked_on(tmp_path, capsys):
    argv = command(
        "t2v", tmp_path / "o.mp4", "--frames=1", "--guidance=1", "--negative_prompt=blurred"
    )
    code, _, stderr = call(argv, capsys)
    assert code == 0 and "note: --negative_prompt is not used" in stderr
    assert len(read_video(tmp_path / "o.mp4")) == 1


def test_saved_weights_bring_their_settings(tmp_path, capsys):
    Pipeline.random(load_config(CONFIG), seed=0).save(tmp_path / "weights")
    argv = command("t2v", tmp_path / "out.mp4", f"--weights={tmp_path / 'weights'}", "--frames=5")
    assert call(argv, capsys)[0] == 0
    assert len(read_video(tmp_path / "out.mp4")) == 5


IMAGE = "--image={p}/tall.png"
BAD = {
    "size that does not fit": ("t2v", ["--size=33x48"], "the nearest size is 32x48"),
    "size that is none": ("t2v", ["--size=720p"], "--size: '720p': expected HEIGHTxWIDTH"),
    "frames that do not fit": ("t2v", ["--frames=12"], "expected 4k + 1; the nearest are 9 and 13"),
    "no frames": ("t2v", ["--frames=0"], "'0': expected a whole number from 1 up"),
    "nothing after the image": ("i2v", [IMAGE, "--frames=1"], "the shortest clip is 5"),
    "no image": ("i2v", [], "--task i2v needs --image"),
    "no such image": ("i2v", ["--image={p}/nobody.png"], "nobody.png: no such file"),
    "empty image": ("i2v", ["--image={p}/empty.png"], "empty.png: the file is empty"),
    "image without a use": (
        "t2v",
        [IMAGE],
        "--image is for --task i2v or shots, not for --task t2v",
    ),
    "garment": ("t2v", ["--garment=a.png"], "--garment is for --task stream, not for --task t2v"),
    "reference": ("i2v", [IMAGE, "--reference=a.png"], "--reference is for --task stream"),
    "mechanisms": ("t2v", ["--switch=full"], "--switch is for --task stream"),
    "repeated frame": (
        "t2v",
        ["--nodrop_repeated_frame"],
        "--drop_repeated_frame is for --task stream",
    ),
    "guidance of a stream": (
        "stream",
        ["--guidance=3"],
        "--guidance is for --task t2v or i2v, not for --task stream",
    ),
    "size of a stream": ("stream", ["--size=32x48"], "--size is for --task t2v or i2v"),
    "shift of a stream": ("stream", ["--shift=3"], "--shift is for --task t2v or i2v"),
    "grid of a stream": ("stream", ["--grid=wan"], "--grid is for --task t2v or i2v"),
    "negative prompt of a stream": (
        "stream",
        ["--negative_prompt=x"],
        "--negative_prompt is for --task t2v or i2v",
    ),
    "unknown task": ("t2i", [], "expected one of stream, t2v, i2v, shots"),
    "unknown grid": ("t2v", ["--grid=karras"], "expected one of wan, diffusers"),
    "no steps": ("t2v", ["--steps=0"], "expected a whole number from 1 to 1000"),
    "no shift": ("t2v", ["--shift=0"], "expected a number above 0"),
    "impossible guidance": ("t2v", ["--guidance=nan"], "expected a number from 0 up"),
    "seed out of range": ("t2v", ["--seed=-1"], "expected a whole number from 0 to 4294967295"),
    "config of a stream": (
        "t2v",
        [f"--config={ROOT}/configs/runway_tiny.py:smoke"],
        "no group 'generate'",
    ),
    "no weights": (
        "t2v",
        [f"--config={ROOT}/configs/wan22_ti2v.py"],
        "comes without weights; give --weights",
    ),
    "no such weights": ("t2v", ["--weights={p}/nowhere"], "nowhere: no such folder"),
    "unknown key": ("t2v", ["--config.generate.step=3"], "generate.steps"),
    "not a video name": ("t2v", ["--out={o}/out.gif"], "ends in .mp4"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(name, pictures, tmp_path, capsys):
    task, extra, message = BAD[name]
    extra = [item.format(p=pictures, o=tmp_path) for item in extra]
    code, stdout, stderr = call(command(task, tmp_path / "deep" / "out.mp4", *extra), capsys)
    assert code == 2 and stdout == ""
    assert len(stderr.splitlines()) == 1 and stderr.startswith("error: ") and message in stderr
    assert list(tmp_path.iterdir()) == []


def test_a_clip_without_a_prompt_is_refused_and_the_config_is_that_of_the_task(tmp_path, capsys):
    code, _, stderr = call(command("t2v", tmp_path / "out.mp4", prompt=None), capsys)
    assert code == 2 and "--task t2v needs --prompt" in stderr
    code, _, stderr = call(["--task=t2v", "--prompt=x", f"--out={tmp_path / 'out.mp4'}"], capsys)
    assert code == 2 and "config wan22_ti2v_5b comes without weights" in stderr
    assert list(tmp_path.iterdir()) == []


def interrupt(argv, marker):
    """Run the command, send SIGINT once `marker` is on stderr. Exit code and stderr."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "JAX_PLATFORMS": "cpu",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.sample", *argv],
        cwd=ROOT,
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    seen = b""
    try:
        while marker not in seen:
            piece = process.stderr.read1(4096)
            assert piece, seen.decode()
            seen += piece
        process.send_signal(signal.SIGINT)
        rest = process.communicate(timeout=600)[1]
    finally:
        process.kill()
    return process.returncode, (seen + rest).decode()


def test_ctrl_c_while_denoising_leaves_nothing(tmp_path):
    long = ("--steps=1000", "--size=128x128", "--frames=81")
    code, stderr = interrupt(command("t2v", tmp_path / "new" / "out.mp4", *long), b"| 1/1000")
    assert code == 130
    assert stderr.splitlines()[-1] == "interrupted" and "Traceback" not in stderr
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_while_decoding_leaves_a_playable_file(tmp_path):
    code, stderr = interrupt(
        command("t2v", tmp_path / "out.mp4", "--frames=401", "--size=128x128"), b"| 5/401"
    )
    assert code == 130 and "Traceback" not in stderr
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["interrupted"] and report["frames_asked"] == 401 and 5 <= report["frames"] < 401
    assert f"interrupted: {report['frames']} of 401 frames were made" in stderr
    assert len(read_video(tmp_path / "out.mp4")) == report["frames"]
    assert (tmp_path / "out.png").is_file()


def test_a_lora_changes_the_clip_and_is_named_in_the_report(tmp_path, capsys):
    rng = np.random.default_rng(0)
    sizes = {"ffn.0": (32, 64), "ffn.2": (64, 32)}
    tensors = {}
    for name, (inputs, outputs) in sizes.items():
        tensors[f"diffusion_model.blocks.1.{name}.lora_A.weight"] = rng.standard_normal(
            (4, inputs)
        ).astype(np.float32)
        tensors[f"diffusion_model.blocks.1.{name}.lora_B.weight"] = rng.standard_normal(
            (outputs, 4)
        ).astype(np.float32)
    style = tmp_path / "style.safetensors"
    write_tensors(style, tensors)
    clips = []
    for name, flags in (
        ("plain", ()),
        ("styled", (f"--lora={style}@0.5",)),
        ("off", (f"--lora={style}@0",)),
    ):
        assert call(command("t2v", tmp_path / f"{name}.mp4", *flags), capsys)[0] == 0
        clips.append(read_video(tmp_path / f"{name}.mp4").astype(int))
    assert np.abs(clips[1] - clips[0]).mean() > 1
    np.testing.assert_array_equal(clips[2], clips[0])
    assert json.loads((tmp_path / "styled.json").read_text())["loras"] == [
        {"path": str(style), "strength": 0.5}
    ]
    code, _, stderr = call(
        command("t2v", tmp_path / "bad.mp4", f"--lora={tmp_path}/nothing.safetensors"), capsys
    )
    assert code == 2 and "no such file or folder" in stderr and not (tmp_path / "bad.mp4").exists()

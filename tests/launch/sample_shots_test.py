"""`launch.sample --task shots` from end to end on a random model: outputs, bad inputs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from chameleon_jax.data.video import read_video
from launch import sample
from launch.sample_shots import parse_shot

CONFIG = f"{Path(__file__).parents[2]}/configs/longlive2_5b.py:smoke"


def call(capsys, *flags):
    """Exit code, stdout, stderr."""
    with pytest.raises(SystemExit) as exit_:
        sample.main(["--task=shots", f"--config={CONFIG}", *flags])
    streams = capsys.readouterr()
    return exit_.value.code or 0, streams.out, streams.err


def test_two_shots_with_a_first_frame(tmp_path, capsys):
    picture, out = tmp_path / "first.png", tmp_path / "new/out.mp4"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 70, 3), np.uint8)).save(picture)
    flags = ("--shot=a cat@2", "--shot=a dog @ home", f"--image={picture}", "--seed=3", "--steps=1")
    code, stdout, _ = call(capsys, *flags, f"--out={out}")
    assert (
        code == 0 and f"{out}: 21 frames in 2 shots" in stdout
    )  # 3 chunks of 2 latent frames: 4 * 5 + 1
    assert sorted(path.name for path in out.parent.iterdir()) == ["out.json", "out.mp4", "out.png"]
    video = read_video(out)
    assert video.shape == (21, 32, 48, 3)
    report = json.loads(out.with_suffix(".json").read_text())
    assert report["shots"] == [
        {"prompt": "a cat", "chunks": 2},
        {"prompt": "a dog @ home", "chunks": 1},
    ]
    assert (report["seed"], report["image"], report["config"]["sampler"]["steps"]) == (
        3,
        str(picture),
        1,
    )
    call(capsys, *flags, f"--out={tmp_path / 'again.mp4'}")
    np.testing.assert_array_equal(read_video(tmp_path / "again.mp4"), video)
    call(capsys, *flags[:1], "--shot=a bird", *flags[2:], f"--out={tmp_path / 'other.mp4'}")
    other = read_video(tmp_path / "other.mp4")
    changed = np.abs(other.astype(int) - video).reshape(21, -1).max(axis=1)
    assert (changed[:13] == 0).all() and changed[
        13:
    ].max() > 0  # the first shot does not know the second


def test_a_shot_is_a_prompt_and_a_number_of_chunks():
    for text, prompt, chunks in (
        ("a@12", "a", 12),
        ("a", "a", 1),
        ("a@b", "a@b", 1),
        ("@3", "", 3),
        ("a@b@2", "a@b", 2),
    ):
        shot = parse_shot(text)
        assert (shot.prompt, shot.chunks) == (prompt, chunks)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "needs --shot 'PROMPT@CHUNKS'"),
        (("--shot=a@0",), "0 chunks; expected at least 1"),
        (("--shot=a@9999",), "is beyond the 512 that absolute positions reach there"),
        (("--shot=The scene transitions. a@2",), "put in front of a cut for you"),
        (
            ("--shot=a", "--prompt=b"),
            "--prompt is for --task stream or t2v or i2v, not for --task shots",
        ),
        (("--shot=a", "--garment=x.png"), "--garment is for --task stream"),
        (("--shot=a", "--image=nothing.png"), "nothing.png"),
        (("--shot=a", "--config.cache.context=2"), "context is 2"),
    ],
)
def test_what_cannot_be_used_is_one_line_and_writes_nothing(tmp_path, capsys, flags, message):
    code, _, stderr = call(capsys, *flags, f"--out={tmp_path / 'out.mp4'}")
    error = stderr[stderr.index("error: ") :]
    assert code == 2 and message in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []

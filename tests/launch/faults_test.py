"""What goes wrong around `launch.sample`: names, disks, missing packages, weights of other sizes.

Whatever can be seen before work starts is seen then: one line, exit code 2, nothing written.
"""

from __future__ import annotations

import collections
import json
import os
import subprocess
import sys
import tracemalloc
from fractions import Fraction
from pathlib import Path

import av
import pytest

from chameleon_jax.config import load_config
from chameleon_jax.data.video import read_video
from chameleon_jax.inference import Pipeline
from chameleon_jax.models.taehv import Taehv
from launch import cli, jobs, sample
from launch.sample_shots import is_for_shots

ROOT = Path(__file__).parents[2]
CONFIG = f"{ROOT}/configs/runway_tiny.py:smoke"
SMALL = [f"--config={CONFIG}", "--config.video.height=64", "--config.video.width=48", "--steps=1"]


def call(argv, capsys):
    """Exit code, stdout, stderr."""
    with pytest.raises(SystemExit) as exit_:
        sample.main(argv)
    streams = capsys.readouterr()
    return exit_.value.code or 0, streams.out, streams.err


@pytest.mark.parametrize("name", ["take:3.mp4", "12:30.mp4", "data:x.mp4", "file:x.mp4", "%d.mp4"])
def test_names_that_look_like_addresses_or_patterns(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, stdout, _ = call([*SMALL, "--frames=1", f"--out={name}"], capsys)
    assert code == 0 and stdout.startswith(f"{name}: 1 frames")
    stem = name.removesuffix(".mp4")
    names = [f"{stem}.json", f"{stem}.mp4", f"{stem}.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert len(read_video(name)) == 1


@pytest.mark.parametrize("flag", ["--prompt", "--reference", "--garment", "--out", "--weights"])
def test_bytes_that_are_no_text_are_refused_before_any_work(flag, tmp_path):
    """As typed: an argument in an old encoding reaches Python as surrogates."""
    argv = [sys.executable, "-m", "launch.sample", *SMALL, f"--out={tmp_path}/o.mp4"]
    done = subprocess.run(
        [*(os.fsencode(item) for item in argv), flag.encode() + b"=M\xfcller.mp4"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    message = f"error: {flag}=M\\udcfcller.mp4: not UTF-8; expected text and file names in UTF-8\n"
    assert done.stderr == message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--out=/proc/x.mp4"], "/proc/x.mp4: "),
        (["--out=" + "x" * 300 + ".mp4"], "File name too long; choose a shorter name"),
        (["--out=" + "x" * 248 + ".mp4"], "File name too long; choose a shorter name"),
        (["--out=folder.mp4"], "folder.mp4: is a folder; expected the name of a file"),
        (["--out=taken.mp4"], "taken.json: is a folder; expected the name of a file"),
        (["--config=" + "x" * 300 + ".py"], "File name too long"),
        (["--config.video.fps=0"], "fps is 0.0; expected a number from 0.01 to 1000"),
        (["--config.video.fps=1e6"], "fps is 1000000.0; expected a number from 0.01 to 1000"),
        (["--config.video.fps=nan"], "cannot be set to 'nan'"),
        (["--config.video.frames=0"], "video.frames is 0; expected a whole number of at least 1"),
        (["--config.video.height=-64"], "video.height is -64"),
        (["--config.video.height=0"], "video.height is 0"),
        (["--config.model.dit.heads=0"], "heads"),
        (["--config.model.dit.heads=-2"], "heads"),
        (["--config.seed=-1"], "seed -1: expected 0 to 4294967295"),
        (["--config.seed=true"], "cannot be set to 'true'"),
        (["--seed=²"], "'²': expected a whole number"),
        (["--reference=x.png", "--garment=x.png@²"], "x.png"),
    ],
)
def test_values_that_cannot_be_used(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "taken.json").mkdir()
    code, _, stderr = call([*SMALL, "--frames=9", "--out=o.mp4", *flags], capsys)
    assert code == 2
    assert len(stderr.splitlines()) == 1 and stderr.startswith("error: ") and message in stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.mp4", "taken.json"]


def test_a_billion_frames_are_refused_without_a_list_of_their_chunks(tmp_path, capsys):
    argv = [*SMALL, "--frames=1000000000", "--config.cache.positions=absolute"]
    tracemalloc.start()
    code, _, stderr = call([*argv, f"--out={tmp_path}/o.mp4"], capsys)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert code == 2 and "is beyond the 340 that absolute positions reach" in stderr
    assert peak < 50e6
    shots = [
        "--task=shots",
        f"--config={ROOT}/configs/longlive2_5b.py:smoke",
        "--shot=a@1000000000",
    ]
    code, _, stderr = call([*shots, f"--out={tmp_path}/o.mp4"], capsys)
    assert code == 2 and "absolute positions reach" in stderr
    clip = ["--task=t2v", f"--config={ROOT}/configs/wan22_ti2v.py:smoke", "--frames=1000000001"]
    code, _, stderr = call([*clip, "--prompt=a", f"--out={tmp_path}/o.mp4"], capsys)
    assert code == 2 and "expected at most 4093 frames of" in stderr
    assert list(tmp_path.iterdir()) == []


def test_a_video_for_which_there_is_no_room(tmp_path, monkeypatch, capsys):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10**10, 10**10, 10**7))
    code, _, stderr = call([*SMALL, "--frames=1000000", f"--out={tmp_path}/o.mp4"], capsys)
    assert code == 2 and "needs about 0.0 GB" in stderr
    assert list(tmp_path.iterdir()) == []


def test_a_link_is_followed(tmp_path, capsys):
    (tmp_path / "real").mkdir()
    (tmp_path / "link.mp4").symlink_to(tmp_path / "real" / "film.mp4")
    code, _, _ = call([*SMALL, "--frames=1", f"--out={tmp_path}/link.mp4"], capsys)
    assert code == 0 and (tmp_path / "link.mp4").is_symlink()
    assert len(read_video(tmp_path / "real" / "film.mp4")) == 1
    assert [path.name for path in (tmp_path / "real").iterdir()] == ["film.mp4"]


def test_frames_per_second_of_a_camera(tmp_path, capsys):
    argv = [*SMALL, "--frames=3", "--config.video.fps=23.976", f"--out={tmp_path}/o.mp4"]
    assert call(argv, capsys)[0] == 0
    assert json.loads((tmp_path / "o.json").read_text())["fps"] == 23.976
    with av.open(str(tmp_path / "o.mp4")) as video:
        assert video.streams.video[0].average_rate == Fraction(24000, 1001)


# A limit on the size of files stands for a full disk: writing fails in the middle.
FULL_DISK = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))
from launch import sample
sample.main(sys.argv[1:])
"""


def test_a_disk_that_fills_up_keeps_what_was_made(tmp_path):
    argv = [*SMALL, "--frames=3000", "--config.video.height=128", f"--out={tmp_path}/o.mp4"]
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, *argv, "--nocompilation_cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    error = done.stderr.splitlines()[-1]
    assert error.startswith(f"error: {tmp_path}/o.mp4: cannot be written (File too large)")
    assert error.endswith("; it ends where it failed, and plays")
    assert [path.name for path in tmp_path.iterdir()] == ["o.mp4"]
    assert 1 < len(read_video(tmp_path / "o.mp4")) < 3000


WITHOUT = """
import sys
missing, module, *argv = sys.argv[1:]
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == missing:
            raise ModuleNotFoundError(f"{name} is not here", name=name)
sys.meta_path.insert(0, Refuse())
import importlib
try:
    importlib.import_module(module).main(argv)
finally:
    assert "jax" not in sys.modules
"""


@pytest.mark.parametrize(
    ("missing", "module", "argv", "extra"),
    [
        ("av", "launch.sample", [], "video"),
        ("av", "launch.sample", ["--task=t2v"], "video"),
        ("av", "launch.prepare", ["latents", "--out=o", "--data=d", "--weights=w"], "video"),
        ("av", "launch.prepare", ["runway", "--out=o"], "runway"),
        ("numba", "launch.prepare", ["runway", "--out=o"], "runway"),
        ("array_record", "launch.prepare", ["runway", "--out=o"], "train"),
        ("numba", "launch.runway", ["sheet"], "runway"),
        ("numba", "launch.runway", ["bench"], "runway"),
    ],
)
def test_a_missing_package_is_named_with_its_extra_before_any_work(
    missing, module, argv, extra, tmp_path
):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, missing, module, *argv],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr == (
        f"error: {missing} is not installed; it comes with the extra {extra!r}: python -m pip"
        f' install -e "{ROOT}[{extra}]"\n'
    )
    assert list(tmp_path.iterdir()) == []


def test_weights_bring_their_config(tmp_path, capsys):
    """Sizes, video and sampler are those of the folder; flags change them."""
    config = load_config(CONFIG, ["video.height=32", "video.width=48", "sampler.steps=1"])
    Pipeline.random(config, seed=0).save(tmp_path / "weights")
    argv = [f"--weights={tmp_path / 'weights'}", f"--out={tmp_path}/o.mp4", "--frames=3"]
    assert call([*argv, "--config.video.fps=7.5"], capsys)[0] == 0
    assert read_video(tmp_path / "o.mp4").shape == (3, 32, 48, 3)
    report = json.loads((tmp_path / "o.json").read_text())
    assert report["config"]["model"]["dit"]["width"] == config.model.dit.width
    assert (report["fps"], report["config"]["sampler"]["steps"]) == (7.5, 1)
    code, _, stderr = call([*argv, f"--config={ROOT}/configs/runway_tiny.py"], capsys)
    assert code == 2 and "the weights were made with" in stderr and len(stderr.splitlines()) == 1
    (tmp_path / "weights" / "config.json").write_text("{")
    code, _, stderr = call(argv, capsys)
    assert code == 2 and "config.json: not a readable JSON file" in stderr


class _Values:
    config = None
    overrides = ("video.frames=9",)
    quantize = None

    def __init__(self, weights):
        self.weights = weights


def test_decoder_and_8_bit_layers_reach_the_pipeline(tmp_path, capsys):
    group = {
        "network": "taehv",
        "z_dim": 4,
        "enc_width": 4,
        "dec_widths": [8, 4, 4],
        "temporal_down": [True, True],
        "temporal_up": [True, True],
    }
    config = load_config(CONFIG).to_dict()
    config["model"]["decoder"] = group
    path = tmp_path / "small.json"
    path.write_text(json.dumps(config))

    def pipeline(*flags):
        values = cli.read(sample.define_flags, [f"--config={path}", "--weights=random", *flags])
        config = jobs.read_config(values, CONFIG, jobs.is_for_streams)
        job = jobs.Job(**jobs.check_common(values, config), out=tmp_path / "x.mp4")
        return jobs.load_pipeline(job)

    made = pipeline("--quantize=int8")
    assert made.config.quantize == "int8" and made.decoder is None  # a file is decoded in full
    made = pipeline("--decoder=small")
    assert isinstance(made.decoder, Taehv) and "quantize" not in made.config
    code, _, stderr = call([*SMALL, "--decoder=small", f"--out={tmp_path / 'x.mp4'}"], capsys)
    assert code == 2 and "the config has no model.decoder; choose one that has" in stderr
    assert not (tmp_path / "x.mp4").exists()


def test_weights_of_another_task_bring_their_networks_only(tmp_path):
    """A stream of shots runs as its config says, with the networks of the folder."""
    stored = load_config(CONFIG)
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(stored.to_dict()))
    shots = load_config("configs/longlive2_5b.py")
    config = jobs.read_config(_Values(str(folder)), "configs/longlive2_5b.py", is_for_shots)
    assert config.model.dit.width == stored.model.dit.width and config.dtype == stored.dtype
    assert config.cache == shots.cache and config.video.frames == 9
    for text in ('{"_class_name": "WanTransformer"}', '{"model": {"vae": {"z_dim": 4}}}'):
        (folder / "config.json").write_text(text)  # of a public layout; of the VAE alone
        config = jobs.read_config(_Values(str(folder)), "configs/longlive2_5b.py", is_for_shots)
        assert config.model == shots.model

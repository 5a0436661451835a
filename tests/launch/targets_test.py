"""`launch.targets`: what it asks the compilers, what it says, what it keeps."""

from __future__ import annotations

import json

import pytest

from chameleon_jax.targets import compiling
from launch import targets
from tests.targets.report_test import made

SMALL = ["--config=configs/runway_tiny.py:smoke", "--target=v6e-1"]


@pytest.fixture
def asked(monkeypatch):
    """The jobs that would be compiled; nothing is."""
    jobs = []

    def run(job, minutes, hlo=None):
        jobs.append((job, minutes, hlo))
        return made(job.program, target=job.target)

    monkeypatch.setattr(compiling, "run", run)
    return jobs


def call(*argv: str) -> int:
    with pytest.raises(SystemExit) as ended:
        targets.main(list(argv))
    return ended.value.code


def test_all_programs_of_a_config_are_compiled_and_kept(tmp_path, asked, capsys):
    out = tmp_path / "made" / "targets.json"
    assert call(*SMALL, f"--out={out}", "--minutes=3") == 0
    named = [job.program for job, _, _ in asked]
    assert {"encode_text", "refresh", "chunk", "decode_first", "decode_next"} <= set(named)
    assert {(job.target, minutes) for job, minutes, _ in asked} == {("v6e-1", 3.0)}
    said = capsys.readouterr()
    assert "| configs/runway_tiny.py:smoke | v6e-1 | chunk |" in said.out
    assert "a stream holds 18.0 GB" in said.out
    assert len(json.loads(out.read_text())) == len(named)
    asked.clear()
    assert call(*SMALL, f"--out={out}") == 0  # nothing is compiled twice
    assert asked == []
    assert call(*SMALL, f"--out={out}", "--programs=chunk", "--again") == 0
    assert [job.program for job, _, _ in asked] == ["chunk"]


def test_what_is_changed_is_compiled_anew(tmp_path, asked):
    out = f"--out={tmp_path / 'targets.json'}"
    assert call(*SMALL, out, "--programs=chunk") == 0
    assert call(*SMALL, out, "--programs=chunk", "--config.cache.frames=9") == 0
    assert call(*SMALL, out, "--programs=chunk", "--mesh=tensor=1") == 0
    assert call(*SMALL, out, "--programs=chunk", "--xla=xla_a=true", "--xla=xla_b=x") == 0
    assert len(asked) == 4
    assert asked[1][0].config["cache"]["frames"] == 9
    assert asked[3][0].options == {"xla_a": True, "xla_b": "x"}


def test_texts_of_programs_have_a_file_each(tmp_path, asked):
    assert call(*SMALL, f"--out={tmp_path / 't.json'}", f"--hlo={tmp_path / 'hlo'}") == 0
    files = [hlo for _, _, hlo in asked]
    assert len(set(files)) == len(files)
    assert files[0].startswith(str(tmp_path / "hlo"))


def test_a_program_that_was_not_compiled_is_a_row_and_an_exit_code(tmp_path, monkeypatch, capsys):
    failed = {"target": "v6e-1", "program": "chunk", "mesh": {}, "error": "the compiler failed (x)"}
    monkeypatch.setattr(compiling, "run", lambda *args: failed)
    assert call(*SMALL, f"--out={tmp_path / 't.json'}", "--programs=chunk") == 1
    assert "the compiler failed (x)" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"a": 1}'])
def test_a_file_of_something_else_is_not_overwritten(text, tmp_path, asked, capsys):
    out = tmp_path / "other.json"
    out.write_text(text)
    assert call(*SMALL, f"--out={out}", "--programs=chunk") == 2
    assert "not a file of this command" in capsys.readouterr().err
    assert out.read_text() == text and asked == []


def test_a_list_of_cases_is_read(tmp_path, asked):
    out = f"--out={tmp_path / 't.json'}"
    assert call("--cases=configs/targets.py:small", out) == 0
    assert {job.target for job, _, _ in asked} == {"v6e-1", "v5e-4", "v6e-4"}
    split = next(job for job, _, _ in asked if job.target == "v5e-4")
    assert split.mesh == {"tensor": 2, "seq": 2}
    assert asked[-1][0].config["train"]["scan_layers"] is True


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "give --target CHIP-N"),
        (["--target=v9-1"], "expected a chip and how many of them, v5e-N, v5p-N, v6e-N, h200-N"),
        ([*SMALL, "--programs=chunks"], "smoke has encode_image, text_kv"),
        ([*SMALL, "--mesh=tensor"], "--mesh"),
        ([*SMALL, "--xla=fast"], "--xla fast: expected NAME=VALUE"),
        ([*SMALL, "--out=x.txt"], "ends in .json"),
        (["--cases=configs/targets.py:small", "--target=v6e-1"], "give it alone"),
        (["--cases=configs/teacher.py:smoke"], "expected a list like that of"),
        (["--target=v6e-1", "--config=configs/vae.py:smoke"], "'vae' reads pixels"),
    ],
)
def test_what_cannot_be_is_one_line(argv, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call(*argv) == 2
    error = capsys.readouterr().err.strip()
    assert said in error
    assert "\n" not in error

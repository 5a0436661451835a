"""The cache of compiled programs: on by default, the same bits, and never in the way."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from chameleon_jax import compilation

ROOT = Path(__file__).parents[1]

PROGRAM = """
import sys
import jax, jax.numpy as jnp
from chameleon_jax import compilation
print("folder", compilation.use_cache())
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

@jax.jit
def program(x):
    for _ in range(20):
        x = jnp.sin(x @ x.T) @ x
    return x.sum()

x = jax.block_until_ready(jnp.arange(12.0).reshape(4, 3) / 12)
with compilation.announced("a program") as seen:
    print("result", program(x).tobytes().hex())
print("counts", len(seen.seconds), seen.cached)
"""


def run(**environment: str) -> subprocess.CompletedProcess:
    names = [name for name in os.environ if "CACHE" in name]
    clean = {name: value for name, value in os.environ.items() if name not in names}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        env=clean | {"JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def lines(done: subprocess.CompletedProcess) -> dict[str, str]:
    assert done.returncode == 0, done.stderr
    return dict(line.split(maxsplit=1) for line in done.stdout.splitlines())


def test_a_second_process_reads_what_the_first_compiled(tmp_path):
    first, second = (run(CHAMELEON_CACHE=str(tmp_path)) for _ in range(2))
    folder = str(tmp_path / "compiled")
    assert lines(first)["folder"] == lines(second)["folder"] == folder
    assert lines(first)["counts"] == "1 0" and lines(second)["counts"] == "1 1"
    assert lines(first)["result"] == lines(second)["result"]
    assert first.stderr.startswith("compiling a program for cpu ...\n  1 program in ")
    assert first.stderr.endswith(" s\n")
    assert second.stderr.endswith(f" s, all from {folder}\n")
    assert os.stat(folder).st_mode & 0o077 == 0  # its files are run: nobody else may write them


def test_files_that_were_cut_off_are_removed_with_a_note(tmp_path):
    first = run(CHAMELEON_CACHE=str(tmp_path))
    (kept,) = (tmp_path / "compiled").glob("jit_program-*")
    kept.write_bytes(kept.read_bytes()[:100])
    second = run(CHAMELEON_CACHE=str(tmp_path))
    assert lines(second)["result"] == lines(first)["result"]
    assert lines(second)["counts"] == "1 0"
    assert "note: compiled programs in" in second.stderr and "jit_program" in second.stderr
    assert "Warning" not in second.stderr and not kept.exists()
    assert lines(run(CHAMELEON_CACHE=str(tmp_path)))["counts"] == "1 0"
    assert lines(run(CHAMELEON_CACHE=str(tmp_path)))["counts"] == "1 1"


def test_a_folder_that_cannot_be_written_is_one_note(tmp_path):
    (tmp_path / "file").touch()
    done = run(CHAMELEON_CACHE=str(tmp_path / "file"))
    assert lines(done)["folder"] == "None" and lines(done)["counts"] == "1 0"
    note = done.stderr.splitlines()[0]
    assert note.startswith("note: compiled programs are not kept (") and "Not a directory" in note


def test_what_jax_was_told_stays(tmp_path):
    done = run(JAX_COMPILATION_CACHE_DIR=str(tmp_path / "jax"), CHAMELEON_CACHE=str(tmp_path))
    assert lines(done)["folder"] == str(tmp_path / "jax")
    done = run(JAX_ENABLE_COMPILATION_CACHE="false", CHAMELEON_CACHE=str(tmp_path))
    assert lines(done)["folder"] == "None"
    assert not (tmp_path / "compiled").exists()


def test_compilations_are_counted():
    with compilation.watched() as seen:
        jax.jit(lambda x: 3 * x + 41)(jnp.arange(7.0))
        assert seen.seconds
        before = len(seen.seconds)
        jax.jit(lambda x: 5 * x + 43)(jnp.arange(7.0))
        assert len(seen.seconds) > before
    after = len(seen.seconds)
    jax.jit(lambda x: 7 * x + 47)(jnp.arange(7.0))
    assert len(seen.seconds) == after


def test_other_warnings_are_not_lost(recwarn):
    with compilation.watched():
        np.float32(1) / np.zeros(1, np.float32)
    assert [str(warning.message) for warning in recwarn] == ["divide by zero encountered in divide"]


def test_the_summary():
    seen = compilation.Compiled()
    assert compilation.summary(seen, 0.04) == "0 programs in 0.0 s"
    seen.seconds += [1.0, 2.0]
    assert compilation.summary(seen, 2.26) == "2 programs in 2.3 s"
    seen.cached = 1
    assert compilation.summary(seen, 2.26).startswith("2 programs in 2.3 s, 1 from ")

"""What all commands share: how flags are read, what help needs, how commands end."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from chameleon_jax.diffusion.unipc import GRIDS
from chameleon_jax.errors import UserError
from launch import cli, sample

ROOT = Path(__file__).parents[2]
COMMANDS = (
    "sample",
    "bench",
    "train",
    "convert",
    "evaluate",
    "prepare runway",
    "prepare latents",
    "prepare tokenizer",
    "runway sheet",
    "runway bench",
)


def define_flags(parser):
    parser.config_flag(("configs/runway_tiny.py", ""))
    parser.flag("frames", "length", kind=cli.whole_number(1))
    parser.flag("size", "in pixels", kind=cli.size, default="128x80")
    parser.flag("task", "which", kind=cli.one_of("stream", "shots"), default="stream")
    parser.flag("prompt", "100 % of what happens")
    parser.flag("lora", "several", repeated=True)
    parser.switch("fast", "or not", default=True)
    parser.switch("tidy", "as in the config", default=None)


def read(*argv):
    parser = cli.Parser("program", "About.")
    define_flags(parser)
    return parser.read(argv)


def test_defaults():
    values = read()
    assert (values.frames, values.size, values.task, values.prompt) == (
        None,
        (128, 80),
        "stream",
        None,
    )
    assert (values.lora, values.fast, values.tidy) == ([], True, None)
    assert (values.config, values.overrides) == (None, [])


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--frames=3"], "frames", 3),
        (["--frames", "3"], "frames", 3),
        (["--size", "32x16"], "size", (32, 16)),
        (["--prompt", "--frames=3"], "prompt", "--frames=3"),
        (["--prompt="], "prompt", ""),
        (["--prompt", ""], "prompt", ""),
        (["--prompt", "a = b"], "prompt", "a = b"),
        (["--prompt", "--nofast"], "prompt", "--nofast"),
        (["--lora=a", "--lora", "b"], "lora", ["a", "b"]),
        (["--nofast"], "fast", False),
        (["--no_fast"], "fast", False),
        (["--fast=false"], "fast", False),
        (["--nofast", "--fast"], "fast", True),
        (["--tidy"], "tidy", True),
        (["--notidy"], "tidy", False),
        (["--config", "x.py:small"], "config", "x.py:small"),
        (["--config.a.b=1", "--config.c", "2", "--frames=3"], "overrides", ["a.b=1", "c=2"]),
        (["--config.a=b=c"], "overrides", ["a=b=c"]),
    ],
)
def test_forms_of_flags(argv, name, value):
    assert getattr(read(*argv), name) == value


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--frmes=3"], "unknown flag --frmes; did you mean --frames?; see --help"),
        (["--nofst"], "unknown flag --nofst; did you mean --fast?"),
        (["--frame=3"], "unknown flag --frame; did you mean --frames?"),  # nothing is abbreviated
        (["-frames=3"], "unknown flag -frames"),
        (["x.png"], "unexpected argument 'x.png'; every input is given by a flag"),
        (["--frames"], "--frames needs a value"),
        (["--config.a"], "--config.a needs a value"),
        (["--frames=many"], "--frames: 'many': expected a whole number from 1 up"),
        (["--frames=²"], "--frames: '²': expected a whole number"),
        (["--frames=0"], "--frames: '0': expected a whole number from 1 up"),
        (["--size=720p"], "--size: '720p': expected HEIGHTxWIDTH"),
        (["--task=streams"], "expected one of stream, shots; did you mean stream?"),
        (["--fast=maybe"], "--fast=maybe: expected --fast or --nofast"),
        (["--nofast=true"], "--nofast"),
        (["--prompt=a \udce4"], "--prompt=a \\udce4: not UTF-8"),
        (["--lora", "\udcff.png"], "not UTF-8; expected text and file names in UTF-8"),
    ],
)
def test_what_cannot_be_read_is_one_line(argv, message):
    with pytest.raises(cli.UsageError) as error:
        read(*argv)
    assert message in str(error.value) and "\n" not in str(error.value)
    str(error.value).encode("utf-8")


def test_help_shows_flags_defaults_and_variants(capsys):
    with pytest.raises(SystemExit) as exit_:
        read("--frames=3", "--help")
    text = capsys.readouterr().out
    assert not exit_.value.code and text.startswith("About.\n")
    for part in (
        "--config.KEY",
        "--frames",
        "in pixels (default: 128x80)",
        "which (default: stream)",
        "100 % of what happens",
        "--fast, --nofast",
        "or not (default: on)",
        "configs/runway_tiny.py: runway_tiny, smoke",
    ):
        assert part in text
    assert max(map(len, text.splitlines())) <= cli.WIDTH


# Runs the help of every command where no library can be imported that takes long, or that an extra
# brings.
HELP = """
import importlib, sys
SLOW = {"jax", "jaxlib", "flax", "numpy", "PIL", "ml_collections", "absl", "tensorflow_datasets"}
EXTRA = {"av", "numba", "array_record", "torch", "tensorboardX", "tqdm"}
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in SLOW | EXTRA:
            raise ModuleNotFoundError(f"{name} is not here", name=name)
sys.meta_path.insert(0, Refuse())
for command in sys.argv[1:]:
    module, *rest = command.split()
    for words in ([*rest, "--help"], ["--help"]):
        try:
            importlib.import_module(f"launch.{module}").main(words)
        except SystemExit as ended:
            assert not ended.code, command
print("all loaded:", sorted(SLOW & set(sys.modules)))
"""


def test_help_imports_neither_jax_nor_any_extra():
    done = subprocess.run(
        [sys.executable, "-c", HELP, *COMMANDS], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "all loaded: []"
    assert (
        done.stdout.count("--help, -h") == len(COMMANDS) + 5
    )  # those without commands of their own: twice


def test_choices_in_the_flags_are_those_of_the_library():
    assert tuple(GRIDS) == sample.GRIDS


def end(code: str, **options) -> subprocess.CompletedProcess:
    """A process that ends as `cli.finish` lets a command end whose body is `code`."""
    lines = ["import errno, os, signal, sys, threading, time", "from launch import cli"]
    lines += ["from chameleon_jax.errors import UserError", "def command():"]
    lines += [f"    {line}" for line in code.splitlines()] + ["cli.finish(command)"]
    return subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        timeout=600,
        **{"stdout": subprocess.PIPE, **options},
    )


@pytest.mark.parametrize(
    ("code", "exit_code", "stderr"),
    [
        ("return None", 0, ""),
        ("return 130", 130, ""),
        ("raise UserError('two\\nlines')", 2, "error: two lines\n"),
        (
            "raise OSError(errno.ENOSPC, 'No space left on device', 'x.mp4')",
            2,
            "error: x.mp4: No space left on device; free some space, or write to another disk\n",
        ),
        (
            "open('/dev/null/x', 'w')",
            2,
            "error: /dev/null/x: Not a directory; choose another name\n",
        ),
        (
            "open('x' * 300, 'w')",
            2,
            f"error: {'x' * 120}...: File name too long; choose a shorter name\n",
        ),
        ("raise KeyboardInterrupt", 130, "interrupted\n"),
        ("os.kill(os.getpid(), signal.SIGINT)\ntime.sleep(30)", 130, "interrupted\n"),
        (
            # As compilers do: a thread that does not end must not keep the process.
            "threading.Thread(target=time.sleep, args=(50,)).start()\nraise KeyboardInterrupt",
            130,
            "interrupted\n",
        ),
        ("raise BrokenPipeError", cli.OUTPUT_CLOSED, ""),
        (
            "raise RuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.')",
            2,
            "error: not enough memory (RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.);"
            " choose smaller sizes, fewer frames or a smaller batch\n",
        ),
    ],
)
def test_how_a_command_ends(code, exit_code, stderr):
    done = end(code)
    assert (done.returncode, done.stderr) == (exit_code, stderr)


@pytest.mark.parametrize(
    "fault",
    [
        "ValueError('x')",
        "RuntimeError('x')",
        "KeyError('x')",
        "FileNotFoundError(errno.ENOENT, 'x', 'y')",
    ],
)
def test_a_fault_of_the_project_keeps_its_traceback(fault):
    done = end(f"raise {fault}")
    assert done.returncode == 1 and "Traceback" in done.stderr


def test_output_that_nobody_reads(tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    done = end("print('x' * 100_000)", stdout=writing)
    os.close(writing)
    assert (done.returncode, done.stderr) == (cli.OUTPUT_CLOSED, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_output_that_cannot_be_written():
    with open("/dev/full", "w") as full:
        done = end("print('x')", stdout=full)
    assert done.returncode == 2
    assert done.stderr == (
        "error: No space left on device; free some space, or write to another disk\n"
    )


def test_output_in_a_terminal_of_another_encoding():
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = end("print('她.mp4')", env=environment)
    assert (done.returncode, done.stdout) == (0, "\\u5979.mp4\n")


def test_several_commands(capsys):
    called = []
    commands = {"one": lambda argv, program: called.append((argv, program)), "two": None}
    cli.choose("program", "About.", commands, ["one", "--a", "two"])
    assert called == [(["--a", "two"], "program one")]
    for argv, message in (
        ([], "expected a command, one, two; got none"),
        (["tow"], "expected a command, one, two; got 'tow'; did you mean two?"),
        (["\udcff"], "not UTF-8"),
    ):
        with pytest.raises(SystemExit) as exit_:
            cli.choose("program", "About.", commands, argv)
        assert exit_.value.code == 2 and message in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit_:
        cli.choose("program", "About.", commands, ["--help"])
    assert not exit_.value.code and capsys.readouterr().out == "About.\n"


def test_errors_that_a_machine_causes_are_those_with_advice():
    from chameleon_jax import places

    assert {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.ENAMETOOLONG} <= set(
        places.ADVICE
    )
    assert errno.ENOENT not in places.ADVICE  # a file that is missing is a fault of ours
    assert issubclass(places.PlaceError, UserError)

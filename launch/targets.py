"""What a stream or a stage of training needs on hardware that is not here, and how fast it can be.

    python -m launch.targets --target v6e-1
    python -m launch.targets --target v5e-4,h200-1 --programs refresh,chunk
    python -m launch.targets --config configs/dmd.py:paper --target v6e-64 --mesh fsdp=64 \\
        --config.train.scan_layers=true
    python -m launch.targets --cases configs/targets.py:streams --out out/streams.json

Programs are compiled ahead of time, from shapes, by the compilers of the chips: no weights, no
accelerator. A target is a chip and how many of them: v5e-N, v5p-N, v6e-N (needs pip install
'chameleon-jax[tpu]'), h200-N (needs 'chameleon-jax[cuda13]').

The table says for each program what one device holds at its fullest, in GB, of how many; the time
that it takes at the least, by the operations of its matrix products or by the bytes that it reads,
whichever is more; what the devices send each other; kernels that are not the compiler's own; copies
of more than 16 MiB that the compiler has added; and how long compiling took here.

At the published size a program takes minutes and gigabytes to compile, one after the other. What is
in --out already is not compiled again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chameleon_jax import files, places
from launch import cli
from launch.cli import UsageError

if TYPE_CHECKING:
    from ml_collections import ConfigDict

CONFIG = "configs/wan22_5b.py"
CASES = "configs/targets.py"


@dataclasses.dataclass(frozen=True)
class Case:
    """A config on a target."""

    name: str  # of the config, as it was given
    config: ConfigDict
    target: str
    mesh: dict[str, int]
    programs: tuple[str, ...]  # empty: all
    options: dict[str, Any]  # of the compiler

    def key(self, program: str, versions: dict[str, str]) -> str:
        """What a report is kept under: the same again would say the same."""
        about = [self.config.to_dict(), self.target, self.mesh, program, self.options, versions]
        text = json.dumps(about, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def define_flags(parser: cli.Parser) -> None:
    """The flags of this command."""
    others = ("configs/teacher.py", "configs/teacher_forcing.py", "configs/consistency.py")
    parser.config_flag((CONFIG, ""), others=[*others, "configs/dmd.py", CASES])
    parser.flag("target", "chips, with commas between; see above", metavar="CHIP-N,...")
    parser.flag("programs", "which programs, with commas between; default all", metavar="NAME,...")
    parser.flag(
        "mesh",
        "devices along each axis of sharding.py; default tensor for a stream, else the config's",
        kind=cli.counts,
        metavar="AXIS=N,...",
    )
    parser.flag(
        "cases",
        "a list of configs on targets, instead of --config, --target, --programs and --mesh",
        metavar="FILE:VARIANT",
    )
    parser.flag("out", "JSON file of all reports", default="out/targets.json", metavar="FILE")
    parser.flag(
        "minutes",
        "most that compiling one program may take",
        kind=cli.number(above=0.0),
        default=60.0,
        metavar="N",
    )
    parser.flag(
        "xla",
        "an option of the compiler, for all programs; may be given several times",
        repeated=True,
        metavar="NAME=VALUE",
    )
    parser.flag("hlo", "folder for the texts of the compiled programs", metavar="DIR")
    parser.switch("again", "compile what is in --out already, too", default=False)


def run(values: cli.Values) -> int:
    """The command. Returns its exit code: 1 if a program was not compiled.

    Raises:
      UserError: an input cannot be used.
    """
    out = Path(values.out)
    if out.suffix != ".json":
        raise UsageError(f"--out {out}: expected the name of a file that ends in .json")
    places.check_writable(out)
    from chameleon_jax.targets import compiling

    os.environ.update(compiling.ENVIRONMENT)  # before JAX looks for devices
    cases = list(_cases(values))

    from chameleon_jax import machine
    from chameleon_jax.targets import report

    versions = machine.versions()
    kept = _read_kept(out)
    rows, failed = [], False
    for case in cases:
        for program in _programs(case):
            key = case.key(program, versions)
            if key not in kept or values.again:
                print(f"compiling {program} of {case.name} for {case.target}", file=sys.stderr)
                job = compiling.Job(
                    case.config.to_dict(), case.target, program, case.mesh, case.options
                )
                found = compiling.run(job, values.minutes, _text_file(values.hlo, case, program))
                kept[key] = {"config": case.name, **found}
                out.parent.mkdir(parents=True, exist_ok=True)
                files.write_json(out, kept)
            rows.append((case.name, kept[key]))
            failed |= "error" in kept[key]
    print(report.table(rows))
    for line in _streams(cases, [found for _, found in rows]):
        print(line)
    print(f"written to {out}")
    return int(failed)


def _read_kept(out: Path) -> dict[str, Any]:
    """The reports of an earlier call."""
    if not out.is_file():
        return {}
    try:
        kept = json.loads(out.read_text(encoding="utf-8"))
    except ValueError:
        kept = None
    if not isinstance(kept, dict) or not all(isinstance(one, dict) for one in kept.values()):
        raise UsageError(f"--out {out}: not a file of this command; name another, or remove it")
    return kept


def _cases(values: cli.Values) -> Iterator[Case]:
    """What was asked for, checked."""
    from chameleon_jax.config import load_config
    from chameleon_jax.targets import machines

    asked = values.target, values.programs, values.mesh, values.config
    if values.cases:
        if any(item is not None for item in asked) or values.overrides:
            raise UsageError(
                "--cases says config, target, programs and mesh; give it alone, or not at all"
            )
        listed = load_config(values.cases).get("cases")
        if listed is None:
            raise UsageError(f"--cases {values.cases}: expected a list like that of {CASES}")
        rows = [
            (name, target, cli.counts(mesh) if mesh else {}, overrides, tuple(programs))
            for name, target, mesh, overrides, programs in listed
        ]
    else:
        if not values.target:
            raise UsageError("give --target CHIP-N, e.g. v6e-1, or --cases; see --help")
        programs = tuple(filter(None, (values.programs or "").split(",")))
        name = values.config or CONFIG
        rows = [
            (name, target, values.mesh or {}, values.overrides, programs)
            for target in values.target.split(",")
        ]
    for name, target, mesh, overrides, programs in rows:
        machines.check_installed(machines.find(target))
        config = load_config(name, overrides)
        yield Case(name, config, target, mesh, programs, _options(values.xla))


def _options(given: Sequence[str]) -> dict[str, Any]:
    """Options of the compiler from `--xla`."""
    options: dict[str, Any] = {}
    for item in given:
        name, equals, value = item.partition("=")
        if not name or not equals:
            raise UsageError(f"--xla {item}: expected NAME=VALUE")
        options[name] = cli.WORDS.get(value.lower(), value)
    return options


def _programs(case: Case) -> Sequence[str]:
    """The programs of a case, by name."""
    from chameleon_jax.targets import programs

    known = programs.names(case.config)
    for name in case.programs:
        if name not in known:
            raise UsageError(f"--programs {name}: {case.name} has {', '.join(known)}")
    return case.programs or known


def _streams(cases: Sequence[Case], reports: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A line on each stream whose programs for a chunk were compiled."""
    from chameleon_jax.inference.schedule import ChunkFrames
    from chameleon_jax.targets import programs, report

    for case in cases:
        if programs.is_training(case.config):
            continue
        own = [
            found
            for found in reports
            if found["config"] == case.name and found["target"] == case.target
        ]
        stream = report.of_stream(own, ChunkFrames.of(case.config).later)
        if stream is not None:
            yield report.stream_line(case.name, case.target, stream)


def _text_file(folder: str | None, case: Case, program: str) -> str | None:
    if folder is None:
        return None
    Path(folder).mkdir(parents=True, exist_ok=True)
    name = case.name.replace("/", ".").replace(":", ".")
    return str(Path(folder).absolute() / f"{name}.{case.target}.{program.replace(' ', '_')}.hlo")


def main(argv: Sequence[str] | None = None, program: str = "python -m launch.targets") -> None:
    """Read the command line, run, and end the process."""
    cli.main(program, __doc__, define_flags, run, argv)


if __name__ == "__main__":
    main()

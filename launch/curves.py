"""Draw the curves of training runs on one picture.

    python -m launch.curves runs/teacher
    python -m launch.curves runs/dmd runs/dmd_second --smooth 0.9 --out out/curves.png
    python -m launch.curves runs/dmd --metrics "critic/*,sample/*_ratio"

Each run is a workdir of `launch.train`, or a metrics.jsonl; the run may still be going on. Dashed
grey lines are what the data have, red ones where an alarm would be. docs/training_diagnosis.md says
what the curves mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from chameleon_jax import files, places
from launch import cli
from launch.cli import UsageError


def define_flags(parser: cli.Parser) -> None:
    """The flags of this command."""
    parser.inputs("runs", "workdirs of runs", metavar="RUN")
    parser.flag(
        "metrics",
        "names with commas between, * for anything; default: what tells a healthy run",
        metavar="NAME,...",
    )
    parser.flag("x", "step or seconds", kind=cli.one_of("step", "seconds"), default="step")
    parser.flag(
        "smooth",
        "share of the past in a running average, 0 to 1",
        kind=cli.number(least=0.0),
        default=0.0,
        metavar="W",
    )
    parser.flag("out", "PNG file to write", default="out/curves.png", metavar="FILE")


def run(values: cli.Values) -> None:
    """The command.

    Raises:
      UserError: an input cannot be used.
    """
    out = Path(values.out)
    if out.suffix != ".png":
        raise UsageError(f"--out {out}: expected the name of a file that ends in .png")
    if values.smooth >= 1:
        raise UsageError(f"--smooth {values.smooth:g}: expected a number below 1")
    places.check_writable(out)

    from chameleon_jax.training import curves

    names = _names(values.runs)
    runs = {
        name: curves.read_curves(path, values.x)
        for name, path in zip(names, values.runs, strict=True)
    }
    patterns = values.metrics.split(",") if values.metrics else curves.PATTERNS
    picture = curves.draw(runs, curves.choose(runs, patterns), smooth=values.smooth)
    out.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(out) as part:
        picture.save(part, "PNG")
    print(f"written to {out}")


def _names(runs: Sequence[str]) -> list[str]:
    """Short names of runs: the last parts of their paths that tell them apart."""
    paths = [Path(run).parent if Path(run).name == "metrics.jsonl" else Path(run) for run in runs]
    for length in range(1, 1 + max(len(path.parts) for path in paths)):
        names = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    raise UsageError(f"{', '.join(runs)}: expected each run once")


def main(argv: Sequence[str] | None = None, program: str = "python -m launch.curves") -> None:
    """Read the command line, draw, and end the process."""
    cli.main(program, __doc__, define_flags, run, argv)


if __name__ == "__main__":
    main()

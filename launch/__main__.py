"""Real-time, interactive garment video in JAX.

    chameleon sample     stream a video to a file, or make a clip from prompts
    chameleon serve      a live stream in a browser: click a garment, see it change
    chameleon bench      measure how fast a stream is on this machine
    chameleon targets    what a program needs on chips that are not here, and how fast it can be
    chameleon evaluate   measure a model on HGC-Bench or Runway-Bench
    chameleon train      train one stage
    chameleon sprint     train several stages by the clock: the small model in minutes of a GPU
    chameleon curves     draw the curves of training runs
    chameleon prepare    make training data, or a tokenizer
    chameleon curate     make training data of a folder of videos
    chameleon runway     look at the synthetic data
    chameleon convert    read and write public checkpoints and LoRAs

`chameleon COMMAND --help` says more. Without the console script: `python -m launch`, or
`python -m launch.sample` and so on; `convert` is `python -m converters`.

    chameleon --version
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Sequence

from chameleon_jax import __version__
from launch import cli

MODULES = {
    "sample": "launch.sample",
    "serve": "launch.serve",
    "bench": "launch.bench",
    "targets": "launch.targets",
    "evaluate": "launch.evaluate",
    "train": "launch.train",
    "sprint": "launch.sprint",
    "curves": "launch.curves",
    "prepare": "launch.prepare",
    "curate": "launch.curate",
    "runway": "launch.runway",
    "convert": "launch.convert",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Call the command that the command line names, and end the process."""
    argv = sys.argv[1:] if argv is None else argv
    if list(argv) == ["--version"]:
        print(f"chameleon_jax {__version__}")
        return
    commands: dict[str, Callable[[Sequence[str], str], None]] = {
        name: functools.partial(_call, module) for name, module in MODULES.items()
    }
    cli.choose("chameleon", __doc__ or "", commands, argv)


def _call(module: str, argv: Sequence[str], program: str) -> None:
    importlib.import_module(module).main(argv, program)


if __name__ == "__main__":
    main()

"""Measure a model on a benchmark, or the judge that measures it.

    python -m launch.evaluate --bench hgc --data HGC-Bench --weights weights/chameleon \\
        --out out/hgc --vlm_url https://host/v1 --vlm_model NAME
    python -m launch.evaluate --bench hgc --make_demo out/demo_bench
    python -m launch.evaluate --bench runway --weights runs/dmd/export --out out/bench
    python -m launch.evaluate --bench judge --judge runs/judge/export
    python -m launch.evaluate --bench attention --weights weights/chameleon

HGC-Bench (and every other file in chameleon_jax/evaluation/benches) has three stages, each of which
goes on where it stopped: `generate` streams a video for every sample, `score` measures the videos,
each metric in a process of its own, `table` writes the means beside those of the paper. Weights of
metrics are never bundled; what is absent is one line that says which file to put where. Keys of
endpoints are read from CHAMELEON_VLM_KEY. See docs/evaluation.md.

Runway-Bench streams fixed scenarios of the synthetic world (one garment, two and five changes, long
streams, a change of the prompt) with any model that `launch.sample` can stream, and compares each
with the exact truth. Beside the model it measures the truth itself, and the truth in the garment of
the start all the time: a figure of a change that does not tell these two apart is left out of the
table. What a frame shows is read by a judge, a small network; one for each world (`--world mirror`
or `open`) is part of the project. Needs the extra `runway`.

`attention` says how much of the attention of a new chunk goes to the person's picture, the garment,
the history and the chunk itself, before and after a change (the right of the paper's Figure 4).

What is finished is kept in `--out`; the same command goes on.
"""

from __future__ import annotations

from collections.abc import Sequence

from chameleon_jax.evaluation import benches
from launch import cli, evaluate_attention, evaluate_pictures, evaluate_runway
from launch.cli import UsageError

CONFIG = "configs/runway_tiny.py"
CONTINUES = "the same command continues"
# Benchmarks that are no files in evaluation/benches, and the flags that not all others have, too.
OTHERS = {
    "runway": evaluate_runway.FLAGS,
    "judge": evaluate_runway.FLAGS,
    "attention": evaluate_attention.FLAGS,
}


def define_flags(parser: cli.Parser) -> None:
    """The flags of this command."""
    pictures = benches.names()
    parser.config_flag((CONFIG, ""), others=["configs/wan22_5b.py"])
    parser.flag(
        "bench",
        f"{', '.join(pictures)} or runway: measure a model; judge: measure the judge;"
        " attention: where a model looks",
        kind=cli.one_of(*OTHERS, *pictures),
        default="runway",
        metavar="BENCH",
    )
    parser.flag(
        "weights",
        "folder of weights, or random; default that of the config",
        metavar="DIR",
    )
    parser.flag("name", "of the model in the table", default="model", metavar="NAME")
    parser.flag(
        "out",
        "folder to write; default out/BENCH, for runway and judge out/runway_bench",
        metavar="DIR",
    )
    parser.flag(
        "switch",
        "full or some of refresh,withdraw,disentangle, and anchor; for ablations last_latent or"
        " random_frame in place of disentangle; default as in the config",
        metavar="WORDS",
    )
    parser.flag(
        "steps",
        "denoising steps; default that of the config",
        kind=cli.whole_number(1, 1000),
        metavar="N",
    )
    parser.flag(
        "seed",
        "of the noise; default that of the benchmark (hgc: 42), else of the config",
        kind=cli.whole_number(0, 2**32 - 1),
        metavar="N",
    )
    parser.flag(
        "data",
        "hgc: its folder, with meta_data.csv; judge: set of labelled clips, its validation split;"
        " default: clips of --world, rendered now",
        metavar="DIR",
    )
    evaluate_pictures.define_flags(parser)
    evaluate_runway.define_flags(parser)
    parser.quantize_flag()
    parser.compilation_flag()


def run(values: cli.Values) -> int:
    """The command. Returns the exit code.

    Raises:
      UserError: an input cannot be used.
    """
    theirs = OTHERS.get(values.bench, evaluate_pictures.FLAGS)
    for name in (*evaluate_runway.FLAGS, *evaluate_pictures.FLAGS):
        if getattr(values, name) not in (None, [], False) and name not in theirs:
            raise UsageError(f"--{name} is not for --bench {values.bench}; leave it out")
    if values.bench == "attention":
        return evaluate_attention.run(values, CONFIG)
    if values.bench in OTHERS:
        return evaluate_runway.run(values, CONFIG)
    return evaluate_pictures.run(values, CONFIG)


def main(argv: Sequence[str] | None = None, program: str = "python -m launch.evaluate") -> None:
    """The command line."""
    cli.main(program, __doc__, define_flags, run, argv, interrupted=CONTINUES)


if __name__ == "__main__":
    main()

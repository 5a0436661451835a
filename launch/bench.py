"""How fast a stream is, anywhere JAX runs.

    python -m launch.bench --config configs/runway_tiny.py
    python -m launch.bench --config configs/wan22_5b.py --weights random
    python -m launch.bench --config configs/wan22_5b.py --weights random --mesh tensor=4
    python -m launch.bench --length_independence --chunks 500

Measured after everything is compiled, each figure a median over `--repeats` runs:

    denoise        81 frames from filled slots to the last clean pass, no VAE: the paper's protocol
    steady         one chunk against a full cache, no VAE
    delivered      81 frames decoded, as uint8 on the host
    first frame    pictures and prompt in, first frames out
    switch         garment asked for while a chunk is being made, until its first frame is there

`--length_independence` streams many chunks and compares the late ones with the early ones, in time
and memory. Needs jax, flax, numpy, pillow and small pure-Python packages. Random weights are made
on the device.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chameleon_jax import files, places
from launch import cli
from launch.cli import UsageError

CONFIG = "configs/runway_tiny.py"


def define_flags(parser: cli.Parser) -> None:
    """The flags of this command."""
    parser.config_flag((CONFIG, ""), others=["configs/wan22_5b.py"])
    parser.flag(
        "weights",
        "random, or a folder of weights; speed does not depend on it",
        default="random",
        metavar="DIR",
    )
    parser.flag(
        "frames",
        "frames of the denoise and delivered figures",
        kind=cli.whole_number(1, 10**6),
        default=81,
        metavar="N",
    )
    parser.flag(
        "repeats",
        "runs whose median is reported",
        kind=cli.whole_number(1, 10**4),
        default=3,
        metavar="N",
    )
    parser.flag(
        "switches", "garment switches", kind=cli.whole_number(1, 10**4), default=20, metavar="N"
    )
    parser.switch(
        "length_independence", "compare late chunks with early ones instead", default=False
    )
    parser.flag(
        "chunks",
        "chunks of --length_independence",
        kind=cli.whole_number(150, 10**7),
        default=500,
        metavar="N",
    )
    parser.flag("out", "JSON file to write", default="out/bench.json", metavar="FILE")
    parser.mesh_flag()
    parser.decoder_flag()
    parser.quantize_flag()
    parser.compilation_flag()


def table(results: dict[str, Any]) -> str:
    """The figures as lines."""
    rows = [
        ("denoise_fps", "denoise only, whole video", "frames/s"),
        ("steady_fps", "denoise only, full cache", "frames/s"),
        ("steady_ms", "one chunk, full cache", "ms"),
        ("delivered_fps", "with decoding, on the host", "frames/s"),
        ("first_frame_ms", "first frame", "ms"),
        ("switch_p50_ms", "garment switch, p50", "ms"),
        ("switch_p95_ms", "garment switch, p95", "ms"),
        ("early_ms", "chunks 50 to 100", "ms a chunk"),
        ("late_ms", "last 50 chunks", "ms a chunk"),
        ("time_ratio", "late / early, time", ""),
        ("processor_ms", "processor time", "ms a chunk"),
        ("processor_time_ratio", "late / early, processor time", ""),
        ("early_mib", "memory, chunks 50 to 100", "MiB"),
        ("late_mib", "memory, last 50 chunks", "MiB"),
        ("memory_ratio", "late / early, memory", ""),
        ("programs_compiled", "programs compiled meanwhile", ""),
        ("peak_mib", "peak memory", "MiB"),
        ("compile_seconds", "compilation", "s"),
        ("load_seconds", "weights", "s"),
    ]
    return "\n".join(
        f"{label:28s} {results[key]:10.{3 if 'ratio' in key else 1}f} {unit}".rstrip()
        for key, label, unit in rows
        if key in results
    )


def run(values: cli.Values) -> None:
    """The command.

    Raises:
      UserError: an input cannot be used.
    """
    out = Path(values.out)
    if out.suffix != ".json":
        raise UsageError(f"--out {out}: expected the name of a file that ends in .json")
    places.check_writable(out)

    import jax
    import numpy as np

    from chameleon_jax import compilation, machine
    from chameleon_jax.diffusion.rollout import make_sampler
    from chameleon_jax.inference.pipeline import Pipeline
    from chameleon_jax.inference.settings import check_config
    from launch import bench_stream, jobs

    cli.start_jax(values)
    config = check_config(jobs.read_config(values, CONFIG, jobs.is_for_streams))
    mesh = jobs.stream_mesh(values.mesh)
    rng = np.random.default_rng(0)
    begin = time.perf_counter()
    if values.weights == "random":
        pipeline = Pipeline.random(config, seed=0, text=False, decoder=values.decoder, mesh=mesh)
        states = (1, config.model.dit.text_length, config.model.dit.text_width)
        prompt = rng.standard_normal(states, np.float32)
    else:
        pipeline = Pipeline.from_pretrained(
            values.weights, config, decoder=values.decoder, mesh=mesh
        )
        prompt = "a person walks"
    jax.block_until_ready((pipeline.stream.weights, pipeline.media.weights))
    loaded = time.perf_counter()
    with compilation.announced(f"the programs of {config.name}") as seen:
        programs = pipeline.compile()
    compiled = time.perf_counter()
    pictures = list(rng.integers(0, 256, (2 + values.switches, *pipeline.size, 3), np.uint8))
    if values.length_independence:
        session = pipeline.session()
        session.start(*pictures[:2], prompt, seed=0)
        results = bench_stream.length_independence(session, values.chunks)
    else:
        results = bench_stream.measure(pipeline, pictures, prompt, values.frames, values.repeats)
    results |= {
        "peak_mib": machine.peak_memory() / 2**20,
        "compile_seconds": compiled - loaded,
        "load_seconds": loaded - begin,
    }
    hardware = machine.hardware(1 if mesh is None else mesh.size)
    report = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": hardware,
        "mesh": jobs.split_axes(mesh),
        "versions": machine.versions(),
        "results": results,
        "compile_seconds_by_program": programs,
        "programs_from_cache": seen.cached,
        "repeats": values.repeats,
        "weights": values.weights,
        "config": pipeline.config.to_dict(),
    }
    height, width = pipeline.size
    steps, used = make_sampler(**config.sampler).steps, hardware["devices_used"]
    print(
        f"{config.name}, {height}x{width}, {config.dtype}, {steps} steps, on"
        f" {f'{used} x ' if used > 1 else ''}{hardware['device']} ({hardware['cores']} cores of"
        f" {hardware['cpu']})"
    )
    print(table(results))
    out.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(out, report)
    print(f"written to {out}")


def main(argv: Sequence[str] | None = None, program: str = "python -m launch.bench") -> None:
    """Read the command line, run, and end the process."""
    cli.main(program, __doc__, define_flags, run, argv)


if __name__ == "__main__":
    main()

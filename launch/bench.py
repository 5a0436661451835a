"""How fast a stream is, anywhere JAX runs.

    python -m launch.bench --config configs/runway_tiny.py
    python -m launch.bench --config configs/wan22_5b.py --weights random
    python -m launch.bench --config configs/wan22_5b.py --weights random --mesh tensor=4
    python -m launch.bench --only denoise --repeats 10
    python -m launch.bench --length_independence --chunks 500

Figures come in groups, of which --only and --skip choose:

    start      from the start of a process to its first frames, with nothing compiled before, and
               with the programs on disk; what of it is compilation
    denoise    81 frames from filled slots to the last clean pass, no VAE: the paper's protocol; and
               chunks against a full cache
    decode     a chunk of frames on the host, with the full VAE and with the small decoder; decoding
               alone
    delivered  the same as H.264, encoded by a thread beside the stream, as a server does
    latency    pictures and prompt in, first frames out, all compiled; and garment asked for while a
               chunk is being made, until its first frame is there

What is compared is run in turn, in --repeats rounds. Every figure has its median, and says how far
its values spread; all values are in the JSON file, with the load of the machine, commit, versions
and flags. Operations are counted from the config (inference/flops.py) and compared with the data
sheet, where there is one, and with a plain matrix product that is timed in the same rounds.

`--length_independence` streams many chunks and compares the late ones with the early ones, in time
and memory. Needs jax, flax, numpy, pillow and small pure-Python packages; H.264 also needs PyAV.
Random weights are made on the device.
"""

from __future__ import annotations

import contextlib
import datetime
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from chameleon_jax import files, places
from launch import cli
from launch.cli import UsageError

CONFIG = "configs/runway_tiny.py"
GROUPS = ("start", "denoise", "decode", "delivered", "latency")
PROMPT = "a person walks"


def groups_of(text: str) -> list[str]:
    """A kind of flag: names of groups, separated by commas; empty for none."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    return [cli.one_of(*GROUPS)(name) for name in names]


def define_flags(parser: cli.Parser) -> None:
    """The flags of this command."""
    parser.config_flag((CONFIG, ""), others=["configs/wan22_5b.py"])
    parser.flag(
        "weights",
        "random, or a folder of weights; speed does not depend on it",
        default="random",
        metavar="DIR",
    )
    parser.flag("only", f"groups of figures: {', '.join(GROUPS)}", kind=groups_of, metavar="A,B")
    parser.flag("skip", "groups of figures that are left out", kind=groups_of, metavar="A,B")
    parser.flag(
        "frames",
        "frames of the clip that is denoised",
        kind=cli.whole_number(1, 10**6),
        default=81,
        metavar="N",
    )
    parser.flag(
        "repeats",
        "rounds in which everything is run in turn",
        kind=cli.whole_number(1, 10**4),
        default=5,
        metavar="N",
    )
    parser.flag(
        "switches", "garment switches", kind=cli.whole_number(1, 10**4), default=50, metavar="N"
    )
    parser.flag(
        "starts",
        "processes started with nothing compiled, and as many with the programs on disk",
        kind=cli.whole_number(1, 100),
        default=2,
        metavar="N",
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
    parser.switch(
        "first_frame", "make the first frames in this process, and nothing else", default=False
    )
    parser.flag("out", "JSON file to write", default="out/bench.json", metavar="FILE")
    parser.mesh_flag()
    parser.decoder_flag()
    parser.quantize_flag()
    parser.flag("profile", "folder for a profile of some chunks (default: none)", metavar="DIR")
    parser.compilation_flag()


def chosen_groups(values: cli.Values) -> list[str]:
    """Groups of figures that are asked for.

    Raises:
      UsageError: none is left.
    """
    chosen = [
        name
        for name in (GROUPS if values.only is None else values.only)
        if name not in (values.skip or [])
    ]
    if not chosen:
        raise UsageError("--only and --skip leave no group of figures; leave one of them out")
    return chosen


LENGTH_ROWS = (
    ("early_ms", "chunks 50 to 100", "ms a chunk"),
    ("late_ms", "last 50 chunks", "ms a chunk"),
    ("time_ratio", "late / early, time", ""),
    ("processor_ms", "processor time", "ms a chunk"),
    ("processor_time_ratio", "late / early, processor time", ""),
    ("early_mib", "memory, chunks 50 to 100", "MiB"),
    ("late_mib", "memory, last 50 chunks", "MiB"),
    ("memory_ratio", "late / early, memory", ""),
    ("programs_compiled", "programs compiled meanwhile", ""),
)
PROCESS_ROWS = (
    ("peak_device_mib", "peak memory of the device", "MiB"),
    ("peak_host_mib", "peak memory of the process", "MiB"),
    ("load_seconds", "weights", "s"),
    ("compile_seconds", "compilation in this process", "s"),
)


def rows(results: dict[str, Any], known: Sequence[tuple[str, str, str]]) -> str:
    """Single figures as lines."""
    return "\n".join(
        f"{label:48s} {results[key]:9.{3 if 'ratio' in key else 1}f} {unit}".rstrip()
        for key, label, unit in known
        if results.get(key) is not None
    )


def load_pipeline(values: cli.Values, config: Any) -> tuple[Any, Any]:
    """The pipeline, its weights on the device; and a prompt that it can read."""
    import jax
    import numpy as np

    from chameleon_jax.inference.pipeline import Pipeline
    from launch import jobs

    mesh = jobs.stream_mesh(values.mesh)
    if values.weights == "random":
        pipeline = Pipeline.random(config, seed=0, text=False, decoder=values.decoder, mesh=mesh)
        states = (1, config.model.dit.text_length, config.model.dit.text_width)
        prompt = np.random.default_rng(1).standard_normal(states, np.float32)
    else:
        pipeline = Pipeline.from_pretrained(
            values.weights, config, decoder=values.decoder, mesh=mesh
        )
        prompt = PROMPT
    jax.block_until_ready((pipeline.stream.weights, pipeline.media.weights))
    return pipeline, prompt


def made_pictures(size: tuple[int, int], count: int) -> list[Any]:
    """Pictures of noise: what is in them does not change how long anything takes."""
    import numpy as np

    return list(np.random.default_rng(0).integers(0, 256, (count, *size, 3), np.uint8))


def first_frame(values: cli.Values, config: Any) -> dict[str, Any]:
    """The figures of a start of this process."""
    from launch import bench_start

    def begin(parts: dict[str, float]) -> Callable[[], Any]:
        before = time.perf_counter()
        pipeline, prompt = load_pipeline(values, config)
        loaded = time.perf_counter()
        pipeline.compile()
        compiled = time.perf_counter()
        session = pipeline.session()
        session.start(*made_pictures(pipeline.size, 2), prompt, seed=0)
        parts |= {
            "weights": loaded - before,
            "compile": compiled - loaded,
            "start": time.perf_counter() - compiled,
        }
        return session.next_chunk

    cli.start_jax(values)
    return bench_start.first_frame(begin)


def config_flags(values: cli.Values) -> list[str]:
    """The flags that say what is measured, for another process."""
    flags = [f"--config.{item}" for item in values.overrides]
    mesh = values.mesh and ",".join(f"{axis}={size}" for axis, size in values.mesh.items())
    named = {"config": values.config, "weights": values.weights, "mesh": mesh}
    named |= {name: getattr(values, name) for name in ("decoder", "quantize")}
    return flags + [f"--{name}={value}" for name, value in named.items() if value]


def run(values: cli.Values) -> None:
    """The command.

    Raises:
      UserError: an input cannot be used.
    """
    out = Path(values.out)
    if out.suffix != ".json":
        raise UsageError(f"--out {out}: expected the name of a file that ends in .json")
    groups = chosen_groups(values)
    places.check_writable(out)

    from chameleon_jax.inference.settings import check_config
    from launch import jobs

    config = check_config(jobs.read_config(values, CONFIG, jobs.is_for_streams))
    with contextlib.ExitStack() as stack:
        if values.first_frame:
            report = first_frame(values, config)
        else:
            report = measured(values, config, groups, stack)
    out.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(out, report)
    print(f"written to {out}")


def measured(
    values: cli.Values, config: Any, groups: Sequence[str], stack: contextlib.ExitStack
) -> dict[str, Any]:
    """The whole report; tables are printed as they are made."""
    import jax

    from chameleon_jax import chips, compilation, machine
    from launch import bench_figures, bench_start, bench_stream, jobs

    load_before = machine.load()
    figures: dict[str, bench_figures.Figure] = {}
    starts: dict[str, Any] = {}
    if "start" in groups and not values.length_independence:
        # Before this process takes the device. It reads what the last start has compiled.
        kept = compilation.use_cache() if values.compilation_cache else None
        if kept is None or (kept.exists() and any(kept.iterdir())):
            kept = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        starts = bench_start.measure(config_flags(values), values.starts, kept)
        figures |= bench_start.figures(starts)
        jax.config.update("jax_compilation_cache_dir", str(kept))
    cli.start_jax(values)
    begin = time.perf_counter()
    pipeline, prompt = load_pipeline(values, config)
    loaded = time.perf_counter()
    with compilation.announced(f"the programs of {config.name}") as seen:
        programs = pipeline.compile()
    compiled = time.perf_counter()
    pictures = made_pictures(pipeline.size, 2 + values.switches)
    results: dict[str, Any] = {}
    flops: dict[str, float] = {}
    missing: dict[str, str] = {}
    if values.length_independence:
        session = pipeline.session()
        session.start(*pictures[:2], prompt, seed=0)
        results = bench_stream.length_independence(session, values.chunks)
    else:
        if set(groups) & {"denoise", "decode", "delivered"}:
            made = bench_stream.throughput(
                pipeline, pictures[:2], prompt, values.frames, values.repeats, groups
            )
            figures, flops, missing = figures | made.figures, made.flops, made.missing
        if "latency" in groups:
            figures |= bench_stream.latency(pipeline, pictures, prompt, values.repeats)
    if values.profile:
        bench_stream.trace(pipeline, pictures[:2], prompt, values.profile)
    hardware = machine.hardware(1 if pipeline.mesh is None else pipeline.mesh.size)
    work = bench_figures.work_rows(
        flops, figures, chips.of_kind(hardware["device"]), hardware["devices_used"]
    )
    peak_device, peak_host = machine.peak_device_memory(), machine.peak_resident()
    results |= {
        "peak_device_mib": None if peak_device is None else peak_device / 2**20,
        "peak_host_mib": None if peak_host is None else peak_host / 2**20,
        "compile_seconds": compiled - loaded,
        "load_seconds": loaded - begin,
    }
    report = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": hardware,
        "mesh": jobs.split_axes(pipeline.mesh),
        "versions": machine.versions(),
        "commit": machine.commit(),
        "settings": machine.settings(),
        "load": {"before": load_before, "after": machine.load()},
        "figures": {key: figure.summary() for key, figure in figures.items()},
        "work": work,
        "not_measured": missing,
        "starts": starts,
        "results": results,
        "compile_seconds_by_program": programs,
        "programs_from_cache": seen.cached,
        "repeats": values.repeats,
        "weights": values.weights,
        "config": pipeline.config.to_dict(),
    }
    print_report(report, figures, missing)
    return report


def print_report(report: dict[str, Any], figures: Any, missing: dict[str, str]) -> None:
    """The tables, and what they were made on."""
    from chameleon_jax.diffusion.rollout import make_sampler
    from launch import bench_figures

    config, hardware = report["config"], report["hardware"]
    used = hardware["devices_used"]
    video, load = config["video"], report["load"]
    print(
        f"{config['name']}, {video['height']}x{video['width']}, {config['dtype']},"
        f" {make_sampler(**config['sampler']).steps} steps,"
        f" on {f'{used} x ' if used > 1 else ''}{hardware['device']}"
        f" ({hardware['cores']} cores of {hardware['cpu']})"
    )
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    print(f"commit {report['commit'] or 'unknown'}; {versions}")
    settings = " ".join(f"{name}={value}" for name, value in report["settings"].items())
    print(f"settings: {settings or 'none'}; load {load['before']} before, {load['after']} after")
    if figures:
        print("\n" + bench_figures.table(figures))
    for key, reason in missing.items():
        print(f"{key}: not measured: {reason}")
    if report["work"]:
        print("\n" + bench_figures.work_table(report["work"], figures))
    print("\n" + rows(report["results"], (*LENGTH_ROWS, *PROCESS_ROWS)))


def main(argv: Sequence[str] | None = None, program: str = "python -m launch.bench") -> None:
    """Read the command line, run, and end the process."""
    cli.main(program, __doc__, define_flags, run, argv)


if __name__ == "__main__":
    main()

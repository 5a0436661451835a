"""How fast a stream is, anywhere JAX runs.

    python -m launch.bench --config configs/runway_tiny.py
    python -m launch.bench --config configs/wan22_5b.py --weights random
    python -m launch.bench --length_independence --chunks 500

Measured after everything is compiled, each figure a median over `--repeats` runs:

    denoise        81 frames from filled slots to the last clean pass, no VAE: the protocol of the paper's FPS
    steady         one chunk against a full cache, no VAE
    delivered      81 frames decoded, as uint8 on the host
    first frame    pictures and prompt in, first frames out
    switch         garment asked for while a chunk is being made, until its first frame is on the host

`--length_independence` streams many chunks and compares the late ones with the early ones, in time
and memory. Needs jax, flax, numpy, pillow and small pure-Python packages. Random weights are made
on the device.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import math
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from chameleon_jax import __version__, files
from chameleon_jax.config import ConfigError
from chameleon_jax.diffusion.rollout import make_sampler
from chameleon_jax.inference.pipeline import Pipeline, PipelineError
from chameleon_jax.inference.session import Session
from launch import cli
from launch.cli import UsageError

WARM_UP = 2  # chunks run before anything is timed


def define_flags() -> flags.FlagValues:
    """The flags of this command, apart from those of any other."""
    values = flags.FlagValues()
    cli.define(values, "configs/runway_tiny.py")
    kw = {"flag_values": values}
    flags.DEFINE_string(
        "weights", "random", "random, or a folder of weights; speed does not depend on it", **kw
    )
    flags.DEFINE_integer(
        "frames", 81, "frames of the denoise and delivered figures", lower_bound=1, **kw
    )
    flags.DEFINE_integer("repeats", 3, "runs whose median is reported", lower_bound=1, **kw)
    flags.DEFINE_integer("switches", 20, "garment switches", lower_bound=1, **kw)
    flags.DEFINE_bool(
        "length_independence", False, "compare late chunks with early ones instead", **kw
    )
    flags.DEFINE_integer("chunks", 500, "chunks of --length_independence", lower_bound=150, **kw)
    flags.DEFINE_string("out", "out/bench.json", "JSON file to write", **kw)
    return values


def denoise_seconds(stream: Any, inputs: tuple, chunks: int) -> float:
    """Seconds from an empty cache over the condition frames to the last of `chunks` clean passes,
    without the VAE.
    """
    reference, garment, text_kv = inputs
    cache = jax.block_until_ready(stream.new_cache())
    begin = time.perf_counter()
    cache = stream.refresh(cache, reference, garment, text_kv)
    for number in range(chunks):
        latents, cache = stream.chunk(cache, text_kv, 0, number)
    jax.block_until_ready((latents, cache))
    return time.perf_counter() - begin


def steady_seconds(stream: Any, inputs: tuple, fill: int, count: int) -> list[float]:
    """Seconds of each of `count` chunks after `fill` have filled the cache, without the VAE."""
    reference, garment, text_kv = inputs
    cache = stream.refresh(stream.new_cache(), reference, garment, text_kv)
    seconds = []
    for number in range(fill + count):
        begin = time.perf_counter()
        latents, cache = stream.chunk(cache, text_kv, 0, number)
        jax.block_until_ready((latents, cache))
        seconds.append(time.perf_counter() - begin)
    return seconds[fill:]


def stream_seconds(
    session: Session, start: Callable[[], None], frames: int
) -> tuple[float, float, int]:
    """Seconds to the first frames on the host, seconds from the start of the first chunk to the
    last frame, frames.
    """
    begin = time.perf_counter()
    start()
    started = time.perf_counter()
    session.next_chunk()
    first = time.perf_counter() - begin
    while session.frames < frames:
        session.next_chunk()
    return first, time.perf_counter() - started, session.frames


def switch_seconds(
    session: Session, pictures: Sequence[np.ndarray], chunk_seconds: float
) -> list[float]:
    """Latency of each of `pictures` as a new garment.

    The requests come from another thread, spread evenly over the time that a chunk takes, so that
    the wait for the chunk in progress is part of the latency.
    """
    latencies = []
    for index, picture in enumerate(pictures):
        session.next_chunk()
        posted = []

        def ask(picture=picture, posted=posted):
            posted.append(time.perf_counter())
            session.switch_garment(picture)

        timer = threading.Timer(chunk_seconds * (index + 0.5) / len(pictures), ask)
        timer.start()
        session.next_chunk()
        timer.join()
        session.next_chunk()
        latencies.append(time.perf_counter() - posted[0])
    return latencies


@contextlib.contextmanager
def compilations() -> Iterator[list[float]]:
    """Seconds of every compilation while the context lasts, as they happen."""
    seconds = []

    def listen(event: str, duration: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seconds.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seconds
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def length_independence(session: Session, chunks: int) -> dict[str, Any]:
    """Stream `chunks` chunks; time and memory of the last 50 against chunks 50 to 100.

    Processor time is compared too: on a busy machine it says more than the clock on the wall. What
    does not depend on the machine at all is counted: programs compiled, and bytes of the arrays
    alive on the devices.
    """
    seconds, processor, memory, alive, programs = [], [], [], [], []
    with compilations() as compiled:
        for number in range(chunks):
            begin, begin_processor = time.perf_counter(), time.process_time()
            session.next_chunk()
            seconds.append(time.perf_counter() - begin)
            processor.append(time.process_time() - begin_processor)
            memory.append(memory_in_use())
            if number % 50 == 49:
                alive.append(sum(array.nbytes for array in jax.live_arrays()))
                programs.append(len(compiled) - sum(programs))
                print(
                    f"  chunks {number - 49:4d} to {number:4d}:"
                    f" {1000 * np.median(seconds[-50:]):8.1f} ms a chunk,"
                    f" {memory[-1] / 2**20:9.1f} MiB",
                    file=sys.stderr,
                )
    early, late = np.array(seconds[50:100]), np.array(seconds[-50:])
    return {
        "chunks": chunks,
        "frames": session.frames,
        "early_ms": 1000 * float(np.median(early)),
        "late_ms": 1000 * float(np.median(late)),
        "time_ratio": float(np.median(late) / np.median(early)),
        "time_ratio_of_means": float(late.mean() / early.mean()),
        "processor_time_ratio": float(np.median(processor[-50:]) / np.median(processor[50:100])),
        "processor_ms": 1000 * float(np.median(processor)),
        "early_mib": max(memory[50:100]) / 2**20,
        "late_mib": max(memory[-50:]) / 2**20,
        "memory_ratio": max(memory[-50:]) / max(memory[50:100]),
        "ms_by_50": [1000 * float(np.median(seconds[i : i + 50])) for i in range(0, chunks, 50)],
        "mib_by_50": [max(memory[i : i + 50]) / 2**20 for i in range(0, chunks, 50)],
        "array_bytes_by_50": alive,
        "programs_by_50": programs,
        "programs_compiled": sum(programs[1:]),
    }


def measure(pipeline: Pipeline, values: flags.FlagValues, inputs: dict[str, Any]) -> dict[str, Any]:
    """All figures but those of `length_independence`."""
    stream, media, block = pipeline.stream, pipeline.media, pipeline.config.cache.block
    chunks = 1 + math.ceil(max(0, values.frames - (4 * block - 3)) / (4 * block))
    capacity = pipeline.config.cache.frames - pipeline.config.cache.context
    fill = -(-capacity // block)
    frames = 4 * block * chunks - 3
    text_kv = media.text_kv(pipeline.encode_prompt(inputs["prompt"]))
    latents = [media.encode_image(picture) for picture in inputs["pictures"][:2]]
    device_inputs = jax.block_until_ready((*latents, text_kv))

    denoise_seconds(stream, device_inputs, WARM_UP)
    denoise = [denoise_seconds(stream, device_inputs, chunks) for _ in range(values.repeats)]
    steady = steady_seconds(stream, device_inputs, fill, 3 * values.repeats)
    session = pipeline.session()
    start = lambda: session.start(*inputs["pictures"][:2], inputs["prompt"], seed=0)  # noqa: E731
    stream_seconds(session, start, frames=4 * block * WARM_UP)
    session.switch_garment(inputs["pictures"][2])
    session.next_chunk()
    runs = [stream_seconds(session, start, values.frames) for _ in range(values.repeats)]
    begin = time.perf_counter()
    session.next_chunk()
    latency = switch_seconds(session, inputs["pictures"][2:], time.perf_counter() - begin)
    return {
        "frames": frames,
        "chunks": chunks,
        "denoise_fps": frames / float(np.median(denoise)),
        "denoise_seconds": denoise,
        "steady_fps": 4 * block / float(np.median(steady)),
        "steady_ms": 1000 * float(np.median(steady)),
        "delivered_fps": float(np.median([made / seconds for _, seconds, made in runs])),
        "delivered_seconds": [seconds for _, seconds, _ in runs],
        "first_frame_ms": 1000 * float(np.median([first for first, _, _ in runs])),
        "switches": len(latency),
        "switch_p50_ms": 1000 * float(np.percentile(latency, 50)),
        "switch_p95_ms": 1000 * float(np.percentile(latency, 95)),
    }


def memory_in_use() -> int:
    """Bytes in use now: on the accelerator, or the process's resident memory on a CPU."""
    stats = jax.devices()[0].memory_stats() or {}
    if "bytes_in_use" in stats:
        return stats["bytes_in_use"]
    if Path("/proc/self/statm").exists():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return peak_memory()


def peak_memory() -> int:
    """Largest number of bytes that were in use, as in `memory_in_use`."""
    stats = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def hardware() -> dict[str, Any]:
    """What it ran on."""
    device = jax.devices()[0]
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "devices_used": 1,
        "cpu": cpu,
        "cores": cores,
    }


def versions() -> dict[str, str]:
    """Versions of what the figures depend on; accelerator plug-ins where they are installed."""
    names = (
        "jax",
        "jaxlib",
        "flax",
        "numpy",
        "jax-cuda13-plugin",
        "jax-cuda12-plugin",
        "nvidia-cudnn-cu13",
        "nvidia-cudnn-cu12",
        "libtpu",
    )
    found = {"chameleon_jax": __version__, "python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


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


def run(argv: Sequence[str]) -> None:
    """The command.

    Raises:
      UsageError, ConfigError, PipelineError, ...: an input cannot be used.
    """
    values, overrides = cli.parse(define_flags(), argv, __doc__)
    config = cli.read_config(values.config, overrides)
    out = Path(values.out)
    if out.is_dir() or out.suffix != ".json":
        raise UsageError(f"--out {out}: expected the name of a file that ends in .json")
    rng = np.random.default_rng(0)
    begin = time.perf_counter()
    if values.weights == "random":
        pipeline = Pipeline.random(config, seed=0, text=False)
        prompt = rng.standard_normal(
            (1, config.model.dit.text_length, config.model.dit.text_width), np.float32
        )
    else:
        pipeline = Pipeline.from_pretrained(values.weights, config)
        prompt = "a person walks"
    jax.block_until_ready((pipeline.stream.weights, pipeline.media.weights))
    loaded = time.perf_counter()
    print(f"{config.name}: compiling for {jax.devices()[0].device_kind} ...", file=sys.stderr)
    programs = pipeline.compile()
    compiled = time.perf_counter()
    pictures = list(rng.integers(0, 256, (2 + values.switches, *pipeline.size, 3), np.uint8))
    if values.length_independence:
        session = pipeline.session()
        session.start(*pictures[:2], prompt, seed=0)
        results = length_independence(session, values.chunks)
    else:
        results = measure(pipeline, values, {"pictures": pictures, "prompt": prompt})
    results |= {
        "peak_mib": peak_memory() / 2**20,
        "compile_seconds": compiled - loaded,
        "load_seconds": loaded - begin,
    }
    report = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": hardware(),
        "versions": versions(),
        "results": results,
        "compile_seconds_by_program": programs,
        "repeats": values.repeats,
        "weights": values.weights,
        "config": pipeline.config.to_dict(),
    }
    height, width = pipeline.size
    machine = report["hardware"]
    print(
        f"{config.name}, {height}x{width}, {config.dtype}, {make_sampler(**config.sampler).steps} steps,"
        f" on {machine['device']} ({machine['cores']} cores of {machine['cpu']})"
    )
    print(table(results))
    out.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(out, report)
    print(f"written to {out}")


def main(argv: Sequence[str] = tuple(sys.argv)) -> None:
    """Run, and turn whatever is wrong with the input into one line."""
    try:
        run(argv)
    except (UsageError, ConfigError, PipelineError) as error:
        cli.fail(error)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr, flush=True)
        os._exit(130)  # at once: a normal exit would wait for compilers that run in threads
    except ValueError as error:
        if type(error).__module__.startswith(
            "chameleon_jax."
        ):  # weights and tokenizer: imported where used
            cli.fail(error)
        raise


if __name__ == "__main__":
    main()

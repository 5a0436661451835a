"""What `launch.bench` measures: times and memory of a stream, after everything is compiled."""

from __future__ import annotations

import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from chameleon_jax import compilation, machine
from chameleon_jax.inference.pipeline import Pipeline
from chameleon_jax.inference.schedule import ChunkFrames
from chameleon_jax.inference.session import Session
from launch import cli

WARM_UP = 2  # chunks run before anything is timed
GROUP = 50  # chunks whose median is one figure of `length_independence`


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
        posted: list[float] = []

        def ask(picture: np.ndarray = picture, posted: list[float] = posted) -> None:
            posted.append(time.perf_counter())
            session.switch_garment(picture)

        timer = threading.Timer(chunk_seconds * (index + 0.5) / len(pictures), ask)
        timer.start()
        session.next_chunk()
        timer.join()
        session.next_chunk()
        latencies.append(time.perf_counter() - posted[0])
    return latencies


def length_independence(session: Session, chunks: int) -> dict[str, Any]:
    """Stream `chunks` chunks; time and memory of the last 50 against chunks 50 to 100.

    Processor time is compared too: on a busy machine it says more than the clock on the wall. What
    does not depend on the machine at all is counted: programs compiled, and bytes of the arrays
    alive on the devices.
    """
    seconds, processor, memory, alive, programs = [], [], [], [], []
    with compilation.watched() as seen:
        for number in range(chunks):
            begin, begin_processor = time.perf_counter(), time.process_time()
            session.next_chunk()
            seconds.append(time.perf_counter() - begin)
            processor.append(time.process_time() - begin_processor)
            memory.append(machine.memory_in_use())
            if number % GROUP == GROUP - 1:
                alive.append(sum(array.nbytes for array in jax.live_arrays()))
                programs.append(len(seen.seconds) - sum(programs))
                print(
                    f"  chunks {number - GROUP + 1:4d} to {number:4d}:"
                    f" {1000 * np.median(seconds[-GROUP:]):8.1f} ms a chunk,"
                    f" {memory[-1] / 2**20:9.1f} MiB",
                    file=sys.stderr,
                )
    early, late = slice(GROUP, 2 * GROUP), slice(-GROUP, None)
    groups = [slice(first, first + GROUP) for first in range(0, chunks, GROUP)]
    return {
        "chunks": chunks,
        "frames": session.frames,
        "early_ms": 1000 * statistics.median(seconds[early]),
        "late_ms": 1000 * statistics.median(seconds[late]),
        "time_ratio": statistics.median(seconds[late]) / statistics.median(seconds[early]),
        "time_ratio_of_means": statistics.mean(seconds[late]) / statistics.mean(seconds[early]),
        "processor_time_ratio": statistics.median(processor[late])
        / statistics.median(processor[early]),
        "processor_ms": 1000 * statistics.median(processor),
        "early_mib": max(memory[early]) / 2**20,
        "late_mib": max(memory[late]) / 2**20,
        "memory_ratio": max(memory[late]) / max(memory[early]),
        "ms_by_50": [1000 * statistics.median(seconds[group]) for group in groups],
        "mib_by_50": [max(memory[group]) / 2**20 for group in groups],
        "array_bytes_by_50": alive,
        "programs_by_50": programs,
        "programs_compiled": sum(programs[1:]),
    }


def measure(
    pipeline: Pipeline, pictures: Sequence[np.ndarray], prompt: Any, frames: int, repeats: int
) -> dict[str, Any]:
    """All figures but those of `length_independence`.

    Args:
      pipeline: compiled.
      pictures: uint8 [h, w, 3]: person, first garment, then one for each garment switch.
      prompt: text or encoded states.
      frames: of the denoise and delivered figures, at least.
      repeats: runs whose median is reported.
    """
    stream, media = pipeline.stream, pipeline.media
    cache, rhythm = pipeline.config.cache, ChunkFrames.of(pipeline.config)
    chunks = rhythm.chunks(frames)
    fill = -(-(cache.frames - cache.context) // cache.block)  # chunks until the cache is full
    text_kv = pipeline.stream_text(pipeline.encode_prompt(prompt))
    latents = [media.encode_image(picture) for picture in pictures[:2]]
    device_inputs = jax.block_until_ready((*latents, text_kv))

    denoise_seconds(stream, device_inputs, WARM_UP)
    denoise = [denoise_seconds(stream, device_inputs, chunks) for _ in range(repeats)]
    steady = statistics.median(steady_seconds(stream, device_inputs, fill, 3 * repeats))
    session = pipeline.session()

    def start() -> None:
        session.start(*pictures[:2], prompt, seed=0)

    stream_seconds(session, start, rhythm.later * WARM_UP)
    session.switch_garment(pictures[2])
    session.next_chunk()
    runs = [stream_seconds(session, start, frames) for _ in range(repeats)]
    begin = time.perf_counter()
    session.next_chunk()
    latency = switch_seconds(session, pictures[2:], time.perf_counter() - begin)
    return {
        "frames": rhythm.total(chunks),
        "chunks": chunks,
        "denoise_fps": rhythm.total(chunks) / statistics.median(denoise),
        "denoise_seconds": denoise,
        "steady_fps": rhythm.later / steady,
        "steady_ms": 1000 * steady,
        "delivered_fps": statistics.median([made / seconds for _, seconds, made in runs]),
        "delivered_seconds": [seconds for _, seconds, _ in runs],
        "first_frame_ms": 1000 * statistics.median([first for first, _, _ in runs]),
        "switches": len(latency),
        "switch_p50_ms": 1000 * float(np.percentile(latency, 50)),
        "switch_p95_ms": 1000 * float(np.percentile(latency, 95)),
    }


if __name__ == "__main__":
    cli.library_module("bench_stream", "python -m launch.bench")

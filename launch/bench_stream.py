"""What `launch.bench` measures: times and memory of a stream, after everything is compiled.

    Loop       the programs of a stream without a session: what a chunk and its frames cost
    latency    a session, as a user holds it: first frame, switch of the garment
    delivered  frames that are encoded in H.264 by a thread beside the stream, as a server does

What is compared is measured in turn, in rounds, each of which begins with another one.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from chameleon_jax import compilation, machine
from chameleon_jax.inference.flops import StreamFlops
from chameleon_jax.inference.pipeline import Pipeline
from chameleon_jax.inference.programs import MediaPrograms, compile_all
from chameleon_jax.inference.schedule import ChunkFrames
from chameleon_jax.inference.session import Session
from chameleon_jax.models import build
from chameleon_jax.models.build import DTYPES
from chameleon_jax.models.taehv import TaehvConfig
from chameleon_jax.models.vae import VaeConfig
from chameleon_jax.weights.random import fill_randomly
from launch import cli
from launch.bench_figures import Figure, milliseconds, rates

CHUNKS = 3  # of a case in a round
DELIVERED = 4  # chunks of a round that are encoded
WARM_UP = 2  # chunks run before anything is timed
GROUP = 50  # chunks whose median is one figure of `length_independence`

Case = Callable[[], list[float]]  # runs something a few times; seconds of each

DECODERS = {"vae": "full VAE", "small": "small decoder"}


def small_decoder(vae: VaeConfig) -> dict[str, Any]:
    """The group `model.decoder` of a TAEHV for the latents of a VAE.

    Its stages are those of the VAE, its widths those of taew2_2 against Wan2.2's VAE: for that VAE
    it is taew2_2.
    """
    published, reference = TaehvConfig.taew2_2(), VaeConfig.wan22()
    stages = len(vae.temporal_down)
    scale = vae.dec_width / reference.dec_width
    widths = published.dec_widths[: stages + 1]
    widths += widths[-1:] * (stages + 1 - len(widths))
    return {
        "network": "taehv",
        "z_dim": vae.z_dim,
        "enc_width": max(1, round(scale * published.enc_width)),
        "dec_widths": tuple(max(1, round(scale * width)) for width in widths),
        "temporal_down": tuple(reversed(vae.temporal_down)),
        "temporal_up": vae.temporal_down,
        "patch": vae.patch,
    }


def decoders(pipeline: Pipeline) -> dict[str, MediaPrograms]:
    """What decodes, by name: `vae` and `small`, with their programs compiled.

    The small one is the pipeline's own decoder; if it has none, one with random weights, which is
    as fast.
    """
    if pipeline.decoder is None:
        group = small_decoder(pipeline.vae.config)
        small = build.abstract("decoder", group, dtype=DTYPES[pipeline.config.dtype])
        fill_randomly(small, (0, len(DECODERS)), pipeline.mesh)
        found = {"vae": pipeline.media, "small": pipeline.media_with(small)}
    else:
        found = {"vae": pipeline.media_with(None), "small": pipeline.media}
    (latents,) = pipeline.arguments()["decode_first"]
    for media in found.values():
        if media is not pipeline.media:
            _, state = media.result("decode_first", latents)
            args = {"decode_first": (latents,), "decode_next": (latents, state)}
            compile_all([(media, args)])
    return found


class Loop:
    """The programs of a stream, called as a session calls them.

    Args:
      pipeline: compiled.
      pictures: uint8 [h, w, 3]: person and garment.
      prompt: text or encoded states.
    """

    def __init__(self, pipeline: Pipeline, pictures: Sequence[np.ndarray], prompt: Any):
        self.stream, self.cache, self.number = pipeline.stream, None, 0
        cache, self.rhythm = pipeline.config.cache, ChunkFrames.of(pipeline.config)
        self.fill = -(-(cache.frames - cache.context) // cache.block)  # chunks until it is full
        self.text_kv = pipeline.stream_text(pipeline.encode_prompt(prompt))
        self.context = [pipeline.media.encode_image(picture) for picture in pictures]
        jax.block_until_ready((self.context, self.text_kv))
        self.states: dict[MediaPrograms, Any] = {}

    def restart(self, chunks: int) -> float:
        """A new clip of so many chunks, or as many as fill the cache; the last of them stays.

        Returns:
          Seconds from the empty cache over the condition frames to the last of `chunks` clean
          passes, without the VAE.
        """
        self.cache = None
        cache = jax.block_until_ready(self.stream.new_cache())
        begin = time.perf_counter()
        cache = self.stream.refresh(cache, *self.context, self.text_kv)
        for number in range(chunks):
            latents, cache = self.stream.chunk(cache, self.text_kv, 0, number)
        jax.block_until_ready((latents, cache))
        seconds = time.perf_counter() - begin
        self.cache, self.number = cache, chunks
        for _ in range(self.fill - chunks):
            self.chunk()
        return seconds

    def chunk(self) -> jax.Array:
        """The next latents; waits for them."""
        latents, self.cache = self.stream.chunk(self.cache, self.text_kv, 0, self.number)
        self.number += 1
        jax.block_until_ready((latents, self.cache))
        return latents

    def decode(self, media: MediaPrograms, latents: jax.Array) -> jax.Array:
        """Frames on the device; waits for them."""
        shown, self.states[media] = media.decode(latents, self.states.get(media))
        return jax.block_until_ready(shown)

    def frames(self, media: MediaPrograms) -> np.ndarray:
        """The next frames on the host. The device is not waited for in between."""
        latents, self.cache = self.stream.chunk(self.cache, self.text_kv, 0, self.number)
        self.number += 1
        shown, self.states[media] = media.decode(latents, self.states.get(media))
        return np.asarray(shown)


def timed(function: Callable[[], Any], count: int) -> list[float]:
    """Seconds of each of so many calls."""
    seconds = []
    for _ in range(count):
        begin = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - begin)
    return seconds


def in_turn(cases: Mapping[str, Case], rounds: int, before: Callable[[], None]) -> dict[str, list]:
    """Seconds of every case from all rounds; each round begins with the next case.

    Args:
      cases: by name.
      rounds: how many.
      before: called at the beginning of each round.
    """
    names = list(cases)
    found: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        before()
        first = number % len(names) if names else 0
        for name in names[first:] + names[:first]:
            found[name] += cases[name]()
    return found


def product_case(dtype: Any, size: int) -> Case:
    """A plain matrix product of two squares: what this device can do now, in practice."""
    left = jax.random.normal(jax.random.key(0), (size, size), dtype)
    product = jax.jit(jnp.matmul)
    jax.block_until_ready(product(left, left))
    return lambda: timed(lambda: jax.block_until_ready(product(left, left)), CHUNKS)


def delivered_seconds(
    make: Callable[[], np.ndarray], encoder: Any, chunks: int, encoding: list[float]
) -> float:
    """Seconds of a chunk until its frames are H.264, on average over `chunks`.

    A thread encodes what is there while the next chunk is made, as a server does.

    Args:
      make: the next frames.
      encoder: see serving/encoding.py.
      chunks: how many.
      encoding: gets the seconds that each chunk takes to be encoded.
    """

    def encode(frames: np.ndarray) -> None:
        encoding.extend(timed(lambda: encoder.encode(frames), 1))

    begin = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        jobs = [pool.submit(encode, make()) for _ in range(chunks)]
    for job in jobs:
        job.result()
    return (time.perf_counter() - begin) / chunks


@dataclasses.dataclass
class Throughput:
    """What the figures of a running stream are made of.

    Attributes:
      figures: by key.
      flops: of what a figure in milliseconds timed, by the same key.
      missing: why a figure was not measured, by key.
    """

    figures: dict[str, Figure]
    flops: dict[str, float]
    missing: dict[str, str]


def throughput(
    pipeline: Pipeline,
    pictures: Sequence[np.ndarray],
    prompt: Any,
    frames: int,
    rounds: int,
    groups: Sequence[str],
) -> Throughput:
    """Denoising alone, decoding alone, both, and delivered as H.264.

    Args:
      pipeline: compiled.
      pictures: uint8 [h, w, 3]: person and garment.
      prompt: text or encoded states.
      frames: of the clip that is denoised, at least.
      rounds: in which all cases are run in turn.
      groups: of figures: "denoise", "decode", "delivered".
    """
    loop = Loop(pipeline, pictures, prompt)
    chunks = loop.rhythm.chunks(frames)
    total, later = loop.rhythm.total(chunks), loop.rhythm.later
    made = Throughput({}, {}, {})
    cases: dict[str, Case] = {}
    if "denoise" in groups:
        cases["steady"] = lambda: timed(loop.chunk, CHUNKS)
    media = decoders(pipeline) if {"decode", "delivered"} & set(groups) else {}
    loop.restart(chunks)
    latents = loop.chunk()
    for name, programs in media.items():
        for _ in range(WARM_UP):
            loop.frames(programs)
        if "decode" in groups:
            cases[f"decode_{name}"] = lambda p=programs: timed(
                lambda: loop.decode(p, latents), CHUNKS
            )
            cases[f"with_{name}"] = lambda p=programs: timed(lambda: loop.frames(p), CHUNKS)
    encoding: list[float] = []
    if "delivered" in groups:
        reason = _encoder_lacks(pipeline)
        for name, programs in media.items():
            if reason:
                made.missing[f"delivered_{name}"] = reason
                continue
            encoder = _encoder(pipeline)
            cases[f"delivered_{name}"] = lambda p=programs, e=encoder: [
                delivered_seconds(lambda: loop.frames(p), e, DELIVERED, encoding)
            ]
    size = 2048 if jax.default_backend() == "cpu" else 8192
    cases["product"] = product_case(DTYPES[pipeline.config.dtype], size)
    clips: list[float] = []
    seconds = in_turn(cases, rounds, lambda: clips.append(loop.restart(chunks)))
    figures = made.figures
    if "denoise" in groups:
        figures["denoise_fps"] = rates(f"denoising alone, {total} frames", total, clips)
        figures["denoise_ms"] = milliseconds(f"denoising {total} frames", clips)
        figures["steady_fps"] = rates("denoising alone, full cache", later, seconds["steady"])
        figures["steady_ms"] = milliseconds("denoising a chunk", seconds["steady"])
    for name, words in DECODERS.items():
        if f"with_{name}" in seconds:
            figures[f"with_{name}_fps"] = rates(f"with {words}", later, seconds[f"with_{name}"])
            figures[f"decode_{name}_ms"] = milliseconds(
                f"decoding a chunk, {words}", seconds[f"decode_{name}"]
            )
    for name, words in DECODERS.items():
        if f"delivered_{name}" in seconds:
            figures[f"delivered_{name}_fps"] = rates(
                f"delivered as H.264, {words}", later, seconds[f"delivered_{name}"]
            )
    if encoding:
        figures["encode_ms"] = milliseconds("encoding a chunk as H.264", encoding)
    operations = 2.0 * size**3
    figures["product_flops"] = Figure(
        f"product of {size}x{size}",
        "GFLOP/s",
        tuple(operations / value / 1e9 for value in seconds["product"]),
    )
    made.flops = _flops(pipeline, total)
    return made


def _flops(pipeline: Pipeline, frames: int) -> dict[str, float]:
    """Of what the figures in milliseconds timed."""
    work = StreamFlops.of(pipeline.config)
    own = pipeline.config.model.get("decoder")
    group = small_decoder(work.vae) if own is None else own
    small = dataclasses.replace(work, decoder=build.read_sizes("decoder", group))
    return {
        "denoise_ms": work.video(frames),
        "steady_ms": work.chunk(),
        "decode_vae_ms": dataclasses.replace(work, decoder=work.vae).decode(),
        "decode_small_ms": small.decode(),
    }


def _encoder_lacks(pipeline: Pipeline) -> str:
    """Why there is no H.264 on this machine; empty if there is."""
    from chameleon_jax.errors import UserError

    try:
        _encoder(pipeline)
    except UserError as error:
        return str(error)
    return ""


def _encoder(pipeline: Pipeline) -> Any:
    """H.264 as the live server makes it.

    Raises:
      UserError: PyAV is not installed, or has no encoder for it.
    """
    from chameleon_jax.serving.encoding import Encoder

    return Encoder("h264", pipeline.size, pipeline.config.video.fps)


def latency(
    pipeline: Pipeline, pictures: Sequence[np.ndarray], prompt: Any, rounds: int
) -> dict[str, Figure]:
    """First frame and garment switch of a session whose programs are compiled.

    Args:
      pipeline: compiled.
      pictures: uint8 [h, w, 3]: person, first garment, then one for each garment switch.
      prompt: text or encoded states.
      rounds: starts of a session.
    """
    session = pipeline.session()

    def start() -> None:
        session.start(*pictures[:2], prompt, seed=0)
        session.next_chunk()

    start()
    first = timed(start, rounds)
    session.next_chunk()
    session.switch_garment(pictures[2])
    session.next_chunk()
    (chunk,) = timed(session.next_chunk, 1)
    switches = switch_seconds(session, pictures[2:], chunk)
    return {
        "first_frame_ms": milliseconds("first frame, all compiled", first),
        "switch_ms": milliseconds("garment switch", switches),
    }


def trace(pipeline: Pipeline, pictures: Sequence[np.ndarray], prompt: Any, folder: str) -> None:
    """A profile of some chunks with decoding, in the format of JAX's profiler.

    Args:
      pipeline, pictures, prompt: as for `Loop`.
      folder: gets it.
    """
    loop = Loop(pipeline, pictures, prompt)
    loop.restart(1)
    for _ in range(WARM_UP):
        loop.frames(pipeline.media)
    with jax.profiler.trace(folder):
        for _ in range(CHUNKS):
            loop.frames(pipeline.media)


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


if __name__ == "__main__":
    cli.library_module("bench_stream", "python -m launch.bench")

"""What 8-bit layers do to the videos of a model, and to its speed and memory; run by hand.

    python -m tests.inference.quantization                       # the embedded model, four streams
    python -m tests.inference.quantization --names int8 --streams 8 --chunks 12

Each stream is made with every kind of layers: the same person, garments, prompt and noise, and a
change of garment in the middle. Compared are the frames, chunk by chunk, with those of the plain
layers, as PSNR over all pixels; and the plain stream with one of another seed, to know how far
apart two videos of a model are. Chunks are timed in turn, a chunk of each kind after the other.
"""

from __future__ import annotations

import argparse
import statistics
import time

import jax
import numpy as np

from chameleon_jax.config import load_config
from chameleon_jax.errors import ROOT
from chameleon_jax.inference import Pipeline
from chameleon_jax.weights.params import flat_params

EXAMPLES = ROOT / "chameleon_jax" / "assets" / "examples"
GARMENTS = ("first", "second", "third")
PROMPTS = ("a person walks", "a person waves", "a person turns around", "")


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Of two videos in uint8, in dB."""
    error = np.mean((a.astype(np.float64) - b) ** 2)
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)


def stream(pipeline: Pipeline, number: int, chunks: int, seed: int) -> list[np.ndarray]:
    """The chunks of one stream, with a change of garment in the middle."""
    first, second = (EXAMPLES / f"{GARMENTS[(number + i) % 3]}.png" for i in range(2))
    session = pipeline.session()
    session.start(EXAMPLES / "person.png", first, PROMPTS[number % len(PROMPTS)], seed)
    made = []
    for index in range(chunks):
        if index == chunks // 2:
            session.switch_garment(second)
        made.append(session.next_chunk())
    return made


def seconds(pipelines: dict[str, Pipeline], chunks: int) -> dict[str, list[float]]:
    """Seconds of each chunk without its decoding, in turn."""
    times: dict[str, list[float]] = {name: [] for name in pipelines}
    inputs = {}
    for name, pipeline in pipelines.items():
        text = pipeline.stream_text(pipeline.encode_prompt(PROMPTS[0]))
        picture = np.zeros((*pipeline.size, 3), np.uint8)
        frame = pipeline.media.encode_image(picture)
        cache = pipeline.stream.refresh(pipeline.stream.new_cache(), frame, frame, text)
        inputs[name] = text, cache
    for number in range(chunks):
        order = list(pipelines)
        for name in order[number % len(order) :] + order[: number % len(order)]:
            text, cache = inputs[name]
            begin = time.perf_counter()
            latents, cache = pipelines[name].stream.chunk(cache, text, 0, number)
            jax.block_until_ready((latents, cache))
            times[name].append(time.perf_counter() - begin)
            inputs[name] = text, cache
    return times


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/runway_tiny.py")
    parser.add_argument("--weights", default="chameleon_jax/assets/runway_tiny")
    parser.add_argument("--names", nargs="+", default=["int8", "fp8"])
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--timed", type=int, default=24, help="chunks of each kind; 0: none")
    args = parser.parse_args()

    config = load_config(args.config).to_dict()
    pipelines = {}
    for name in ("none", *args.names):
        pipelines[name] = Pipeline.from_pretrained(args.weights, config | {"quantize": name})
        pipelines[name].compile()
        params = flat_params(pipelines[name].dit)
        print(f"{name}: the denoiser's parameters take {sum(x.nbytes for x in params.values())} B")

    found: dict[str, list[list[float]]] = {name: [] for name in (*args.names, "other seed")}
    for number in range(args.streams):
        plain = stream(pipelines["none"], number, args.chunks, seed=number)
        others = {name: stream(pipelines[name], number, args.chunks, number) for name in args.names}
        others["other seed"] = stream(pipelines["none"], number, args.chunks, number + 1000)
        for name, made in others.items():
            found[name].append([psnr(a, b) for a, b in zip(made, plain, strict=True)])
    for name, table in found.items():
        means = np.mean(table, axis=0)
        listed = " ".join(f"{value:.1f}" for value in means)
        print(
            f"{name}: PSNR to none, dB: first chunk {means[0]:.1f}, later {means[1:].mean():.1f},"
            f" worst of all {np.min(table):.1f}; by chunk {listed}"
        )
    if not args.timed:
        return
    for name, times in seconds(pipelines, args.timed).items():
        print(
            f"{name}: {1000 * statistics.median(times):.1f} ms a chunk (median),"
            f" {1000 * min(times):.1f} at best"
        )


if __name__ == "__main__":
    main()

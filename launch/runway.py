"""Look at the synthetic data, and measure how fast it is made.

    python -m launch.runway sheet --seeds 1,2,3 --out sheet.png
    python -m launch.runway bench --clips 8 --workers 2

A row of the sheet: reference, garment, six frames; then the reference's garment and the same frames
in it. `bench` prints one line, and the same as JSON.
"""

from __future__ import annotations

import concurrent.futures
import json
import multiprocessing
import os
import platform
import sys
import time
from pathlib import Path

import numpy as np
from absl import app, flags
from PIL import Image

FLAGS = flags.FLAGS
flags.DEFINE_list("seeds", ["1", "2", "3", "4"], "sheet: seeds of the rows")
flags.DEFINE_string("out", "out/sheet.png", "sheet: picture to write")
flags.DEFINE_integer("height", 128, "pixels", lower_bound=8)
flags.DEFINE_integer("width", 80, "pixels", lower_bound=8)
flags.DEFINE_integer("frames", 81, "frames a clip", lower_bound=1)
flags.DEFINE_integer("fps", 16, "frames per second", lower_bound=1)
flags.DEFINE_integer("enlarge", 2, "sheet: pixels are shown as squares of this size", lower_bound=1)
flags.DEFINE_integer("clips", 8, "bench: triplets a worker", lower_bound=1)
flags.DEFINE_integer("workers", 2, "bench: processes", lower_bound=1)

SHOWN = 6  # frames of a clip on the sheet
GAP = 2  # pixels between groups


def main(argv: list[str]) -> None:
    commands = {"sheet": sheet, "bench": bench}
    if len(argv) != 2 or argv[1] not in commands:
        fail(f"expected one command, {' or '.join(commands)}, got {' '.join(argv[1:]) or 'none'}")
    commands[argv[1]]()


def sheet() -> None:
    """Draw one row per seed."""
    if not FLAGS.seeds or not all(seed.strip().isdigit() for seed in FLAGS.seeds):
        fail(f"--seeds={','.join(FLAGS.seeds)}: expected whole numbers such as 1,2,3")
    rows = [
        sheet_row(int(seed), FLAGS.frames, (FLAGS.height, FLAGS.width), FLAGS.fps)
        for seed in FLAGS.seeds
    ]
    picture = Image.fromarray(np.concatenate(rows))
    picture = picture.resize(
        (picture.width * FLAGS.enlarge, picture.height * FLAGS.enlarge), Image.Resampling.NEAREST
    )
    out = Path(FLAGS.out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        picture.save(out)
    except (OSError, ValueError) as error:
        fail(f"{out}: cannot be written ({error})")
    print(f"{out}: {len(rows)} rows, {picture.width} x {picture.height} pixels")


def sheet_row(seed: int, frames: int, size: tuple[int, int], fps: float) -> np.ndarray:
    """uint8 [h, w, 3]: reference | garment | frames | other garment | the same frames."""
    from chameleon_jax import runway

    triplet = runway.render_triplet(seed, frames, size, fps)
    spec = runway.sample_spec(seed, frames=frames, size=size, fps=fps)
    shown = np.linspace(0, frames - 1, SHOWN).round().astype(int)
    other = runway.render_clip(
        spec.with_garment(spec.reference_garment), only=shown.tolist()
    ).frames
    picture = runway.garment_picture(spec.reference_garment, size)
    groups = [triplet.reference, triplet.garment, *triplet.video[shown], picture, *other]
    gap = np.full((size[0], GAP, 3), 255, np.uint8)
    columns = [part for group in groups for part in (group, gap)]
    row = np.concatenate(columns, 1)
    print(f"{seed}: {triplet.captions['static']} {triplet.captions['dynamic']}")
    return np.concatenate([row, np.full((GAP, row.shape[1], 3), 255, np.uint8)])


def bench() -> None:
    """Render triplets in several processes; the first one of each compiles and is not counted."""
    jobs = [
        (worker * 1000, FLAGS.clips, FLAGS.frames, (FLAGS.height, FLAGS.width), FLAGS.fps)
        for worker in range(FLAGS.workers)
    ]
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(FLAGS.workers, mp_context=spawn) as pool:
        list(pool.map(render_some, [(first, 1, *rest) for first, _, *rest in jobs]))
        start = time.monotonic()
        cpu = list(pool.map(render_some, jobs))
        seconds = time.monotonic() - start
    count = FLAGS.clips * FLAGS.workers
    result = {
        "triplets_per_hour": round(3600 * count / seconds),
        "seconds_per_triplet_and_process": round(seconds / FLAGS.clips, 3),
        "cpu_seconds_per_triplet": round(sum(cpu) / count, 3),
        "ms_per_frame": round(1000 * sum(cpu) / count / FLAGS.frames, 2),
        "size": [FLAGS.height, FLAGS.width],
        "frames": FLAGS.frames,
        "workers": FLAGS.workers,
        "triplets": count,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }
    print(
        f"{result['triplets_per_hour']} triplets an hour, {result['ms_per_frame']} ms a frame on"
        " one core"
    )
    print(json.dumps(result))


def render_some(job: tuple[int, int, int, tuple[int, int], float]) -> float:
    """Render `count` triplets from seed `first` on; returns the processor time."""
    from chameleon_jax import runway

    first, count, frames, size, fps = job
    start = time.process_time()
    for seed in range(first, first + count):
        runway.render_triplet(seed, frames, size, fps)
    return time.process_time() - start


def fail(message: str) -> None:
    """One line on stderr, exit code 2."""
    print(message, file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    app.run(main)

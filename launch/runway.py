"""Look at the synthetic data, and measure how fast it is made (extra `runway`).

    python -m launch.runway sheet    draw clips of some seeds on one picture
    python -m launch.runway bench    render in several processes and time it

    python -m launch.runway sheet --seeds 1,2,3 --out sheet.png
    python -m launch.runway bench --clips 8 --workers 2

`python -m launch.runway COMMAND --help` lists the flags of each.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from chameleon_jax import files, parsing, places
from chameleon_jax.errors import need
from launch import cli
from launch.cli import UsageError

if TYPE_CHECKING:
    import numpy as np

SHOWN = 6  # frames of a clip on the sheet
GAP = 2  # pixels between groups
MAX_FRAMES = 100_000  # of a clip
MAX_SIDE = 4096  # pixels

ABOUT_SHEET = """Draw one row per seed.

A row is the person's picture, the garment and six frames of the clip; then the garment that the
person wears in their picture, and the same frames in it.

    python -m launch.runway sheet --seeds 1,2,3 --out sheet.png
"""

ABOUT_BENCH = """Render clips in several processes, and time it.

The first clip of each process compiles and is not counted.

    python -m launch.runway bench --clips 8 --workers 2

Prints one line, and the same as JSON.
"""


def sheet_flags(parser: cli.Parser) -> None:
    """The flags of `runway sheet`."""
    _clip_flags(parser)
    parser.flag("seeds", "seeds of the rows", kind=_seeds, default="1,2,3,4", metavar="N,N,...")
    parser.flag("out", "picture to write", default="out/sheet.png", metavar="FILE")
    parser.flag(
        "enlarge",
        "pixels are shown as squares of this size",
        kind=cli.whole_number(1, 64),
        default=2,
        metavar="N",
    )


def bench_flags(parser: cli.Parser) -> None:
    """The flags of `runway bench`."""
    _clip_flags(parser)
    parser.flag("clips", "clips a process", kind=cli.whole_number(1), default=8, metavar="N")
    parser.flag("workers", "processes", kind=cli.whole_number(1, 1024), default=2, metavar="N")


def _clip_flags(parser: cli.Parser) -> None:
    side = cli.whole_number(8, MAX_SIDE)
    parser.flag("height", "pixels", kind=side, default=128, metavar="N")
    parser.flag("width", "pixels", kind=side, default=80, metavar="N")
    frames = cli.whole_number(1, MAX_FRAMES)
    parser.flag("frames", "frames a clip", kind=frames, default=81, metavar="N")
    parser.flag("fps", "frames per second", kind=cli.number(above=0), default=16.0)
    parser.flag(
        "world", "what clips are drawn from: open or mirror", default="open", metavar="NAME"
    )


def _seeds(text: str) -> list[int]:
    """`1,2,3`."""
    words = [word.strip() for word in text.split(",")]
    if not all(parsing.is_whole_number(word) and int(word) >= 0 for word in words):
        raise UsageError(f"{text!r}: expected whole numbers such as 1,2,3")
    return [int(word) for word in words]


def sheet(values: cli.Values) -> None:
    """Draw one row per seed."""
    out = Path(values.out)
    if out.suffix.lower() != ".png":
        raise UsageError(f"--out {out}: expected a name that ends in .png")
    places.check_writable(out)
    need("numba", "runway")
    import numpy as np
    from PIL import Image
    from tqdm import tqdm

    size = (values.height, values.width)
    rows = []
    for seed in tqdm(values.seeds, unit=" rows", file=sys.stderr, dynamic_ncols=True):
        row, captions = sheet_row(seed, values.frames, size, values.fps, values.world)
        rows.append(row)
        tqdm.write(f"{seed}: {captions}", file=sys.stdout)
    picture = Image.fromarray(np.concatenate(rows))
    picture = picture.resize(
        (picture.width * values.enlarge, picture.height * values.enlarge), Image.Resampling.NEAREST
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(out) as part:
        picture.save(part, "PNG")
    print(f"{out}: {len(rows)} rows, {picture.width} x {picture.height} pixels")


def sheet_row(
    seed: int, frames: int, size: tuple[int, int], fps: float, world: str
) -> tuple[np.ndarray, str]:
    """reference | garment | frames | other garment | the same frames, uint8 [h, w, 3]; and what
    the clip shows, in words.
    """
    import numpy as np

    from chameleon_jax import runway

    triplet = runway.render_triplet(seed, frames, size, fps, world)
    spec = runway.sample_spec(seed, frames=frames, size=size, fps=fps, world=world)
    shown = np.linspace(0, frames - 1, SHOWN).round().astype(int)
    other = runway.render_clip(
        spec.with_garment(spec.reference_garment), only=shown.tolist()
    ).frames
    picture = runway.garment_picture(spec.reference_garment, size, world=world)
    groups = [triplet.reference, triplet.garment, *triplet.video[shown], picture, *other]
    gap = np.full((size[0], GAP, 3), 255, np.uint8)
    columns = [part for group in groups for part in (group, gap)]
    row = np.concatenate(columns, 1)
    row = np.concatenate([row, np.full((GAP, row.shape[1], 3), 255, np.uint8)])
    return row, f"{triplet.captions['static']} {triplet.captions['dynamic']}"


def bench(values: cli.Values) -> None:
    """Render triplets in several processes; the first one of each compiles and is not counted."""
    need("numba", "runway")
    import concurrent.futures
    import multiprocessing

    from chameleon_jax.data.workers import settle

    print(f"rendering in {values.workers} processes ...", file=sys.stderr, flush=True)
    size = (values.height, values.width)
    clip = (values.frames, size, values.fps, values.world)
    firsts = [1000 * worker for worker in range(values.workers)]
    pool = concurrent.futures.ProcessPoolExecutor(
        values.workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=settle,
        initargs=(os.getpid(),),
    )
    try:
        list(pool.map(render_some, [(first, 1, *clip) for first in firsts]))
        start = time.monotonic()
        cpu = list(pool.map(render_some, [(first, values.clips, *clip) for first in firsts]))
        seconds = time.monotonic() - start
    except KeyboardInterrupt:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    count = values.clips * values.workers
    result = {
        "triplets_per_hour": round(3600 * count / seconds),
        "seconds_per_triplet_and_process": round(seconds / values.clips, 3),
        "cpu_seconds_per_triplet": round(sum(cpu) / count, 3),
        "ms_per_frame": round(1000 * sum(cpu) / count / values.frames, 2),
        "size": list(size),
        "frames": values.frames,
        "workers": values.workers,
        "triplets": count,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }
    print(
        f"{result['triplets_per_hour']} triplets an hour, {result['ms_per_frame']} ms a frame on"
        " one core"
    )
    print(json.dumps(result))


def render_some(job: tuple[int, int, int, tuple[int, int], float, str]) -> float:
    """Render `count` triplets from seed `first` on; returns the processor time."""
    from chameleon_jax import runway

    first, count, frames, size, fps, world = job
    start = time.process_time()
    for seed in range(first, first + count):
        runway.render_triplet(seed, frames, size, fps, world)
    return time.process_time() - start


COMMANDS = {
    "sheet": cli.Command(ABOUT_SHEET, sheet_flags, sheet),
    "bench": cli.Command(ABOUT_BENCH, bench_flags, bench),
}


def main(argv: Sequence[str] | None = None, program: str = "python -m launch.runway") -> None:
    """Call one of `COMMANDS`, and end the process."""
    cli.choose(program, __doc__ or "", COMMANDS, argv)


if __name__ == "__main__":
    main()

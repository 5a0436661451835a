"""From the click to the changed pixel: the time a change takes on the page, over many changes.

    python -m tests.serving.latency --switches 50 --out out/latency.json

Starts the server with the embedded model and a Chromium, clicks garments at times that have nothing
to do with the chunks, and reads the canvas at every frame. A frame shows the new garment if the
colour where the garment is lies nearer to that of the frames before the next click than to that of
the frames before this one. So the figures do not rest on what the page says about itself, except
for the parts into which a change is split. Prints a table and writes JSON.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from chameleon_jax import files, machine
from tests.serving.chromium import Chromium

ROOT = Path(__file__).parents[2]
SETTLED = 5  # frames whose colour stands for a garment
PER_STREAM = 5  # changes, then a new stream: the embedded model does not stand many in a row
DIFFERENT = 20  # of 255: colours of two garments that can be told apart
# Every frame that is shown: time, number, mean colour of the middle of the picture.
RECORDER = """(() => {
  const screen = document.getElementById("screen");
  const pen = new OffscreenCanvas(8, 8).getContext("2d", { willReadFrequently: true });
  window.seen = [];
  let last = -1;
  const look = (now) => {
    requestAnimationFrame(look);
    if (window.chameleon.shown === last) return;
    last = window.chameleon.shown;
    const [w, h] = [screen.width, screen.height];
    pen.drawImage(screen, w * .4, h * .32, w * .2, h * .18, 0, 0, 8, 8);
    const { data } = pen.getImageData(0, 0, 8, 8);
    const sum = [0, 0, 0];
    for (let i = 0; i < data.length; i += 4) for (let c = 0; c < 3; c++) sum[c] += data[i + c] / 64;
    window.seen.push([performance.now(), last - 1, ...sum]);
  };
  requestAnimationFrame(look);
})()"""
CLICK = """(() => {{
  const now = performance.now();
  document.querySelectorAll('#garments button[data-name]')[{}].click();
  return now;
}})()"""
PARTS = {
    "chunk in progress": "until the engine begins with it: the chunk that is being made",
    "refresh": "the last frame encoded, the conditions written anew",
    "chunk": "denoising and decoding",
    "encode": "H.264",
    "sockets": "messages both ways, threads",
    "screen": "decoding in the browser, and frames that were still to be shown",
}


def measure(address: str, switches: int, codec: str) -> dict[str, Any]:
    """Everything about so many changes on the page at an address."""
    pauses = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder, Chromium(Path(folder)) as page:
        page.open(address)
        page.until("document.getElementById('status')?.textContent === 'ready'", 300)
        page.run(f"document.getElementById('codec').value = '{codec}'")
        page.run(RECORDER)
        clicks, ends = [], []
        for number in range(switches):
            if number % PER_STREAM == 0:
                page.run("document.getElementById('start').click()")
                page.until("window.chameleon.shown > 12", 120)
                worn = 0
            worn = (worn + 1) % 3
            clicks.append(page.run(CLICK.format(worn)))
            page.until(f"window.chameleon.latencies.length === {number + 1}", 120)
            time.sleep(pauses.uniform(1.0, 2.5))
            ends.append(page.run("performance.now()"))
        seen, parts = page.run("window.seen"), page.run("window.chameleon.applied")
        # While the model is compiled the page asks, and is told to wait.
        if errors := [text for text in page.errors if "/readyz" not in text]:
            raise RuntimeError(f"the page says: {errors}")
    return judge(np.array(seen), clicks, ends, parts)


def judge(
    seen: np.ndarray, clicks: list[float], ends: list[float], parts: list[dict]
) -> dict[str, Any]:
    """Times and wrong frames from what was seen.

    Args:
      seen: [n, 5], time in milliseconds, number of the frame, mean red, green, blue.
      clicks, ends: of each change, when it was asked for, and until when it was looked at.
      parts: of each change what the page noted, `first_frame` and milliseconds.
    """
    times, frames, colours = seen[:, 0], seen[:, 1], seen[:, 2:]
    took, wrong = [], 0
    for click, end, part in zip(clicks, ends, parts, strict=True):
        old = np.median(colours[times <= click][-SETTLED:], 0)
        after = (times > click) & (times < end)
        new = np.median(colours[after & (frames >= part["first_frame"])][-SETTLED:], 0)
        is_new = np.linalg.norm(colours - new, axis=-1) < np.linalg.norm(colours - old, axis=-1)
        if np.linalg.norm(new - old) < DIFFERENT:
            raise RuntimeError(f"the click at {click:.0f} ms changed nothing that can be seen")
        took.append(float(times[after & is_new][0] - click))
        wrong += int((after & ~is_new & (frames >= part["first_frame"])).sum())
    seconds = (times[-1] - times[0]) / 1000
    return {
        "click_to_pixel_ms": took,
        "parts_ms": split(parts),
        "wrong_garment_frames": wrong,
        "frames_seen": len(seen),
        "frames_a_second": len(seen) / seconds,
    }


def split(parts: list[dict]) -> dict[str, list[float]]:
    """Milliseconds of each part, by change."""
    found: dict[str, list[float]] = {name: [] for name in PARTS}
    for one in parts:
        made = one["waited_ms"] + one["made_ms"] + one["encoded_ms"]
        values = (
            one["waited_ms"],
            one["refresh_ms"],
            one["made_ms"] - one["refresh_ms"],
            one["encoded_ms"],
            one["came"] - one["clicked"] - made,
            one["shown"] - one["came"],
        )
        for name, value in zip(PARTS, values, strict=True):
            found[name].append(value)
    return found


def table(found: dict[str, Any]) -> str:
    """The result for people."""
    lines = ["| milliseconds | p50 | p95 | |", "|---|---|---|---|"]

    def row(name: str, values: list[float], what: str) -> None:
        middle, most = np.percentile(values, [50, 95])
        lines.append(f"| {name} | {middle:.0f} | {most:.0f} | {what} |")

    row("click to changed pixel", found["click_to_pixel_ms"], "read from the canvas")
    for name, what in PARTS.items():
        row(name, found["parts_ms"][name], what)
    changes = len(found["click_to_pixel_ms"])
    lines += [
        "",
        f"{changes} changes, {found['frames_a_second']:.1f} frames/s shown,"
        f" {found['wrong_garment_frames']} frames of a wrong garment behind the mark of a change",
    ]
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--switches", type=int, default=50)
    parser.add_argument("--codec", default="h264", choices=["h264", "jpeg"])
    parser.add_argument("--address", help="of a server that runs; default one of its own")
    parser.add_argument("--out", type=Path, help="JSON file")
    values = parser.parse_args()
    process, address = None, values.address
    if address is None:
        process = subprocess.Popen(
            [sys.executable, "-m", "launch.serve", "--port", "0"],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        said = ""
        while not (opened := re.search(r"open (\S+)", said)):
            if not (line := process.stderr.readline()):
                sys.exit(said)
            said += line
        address = opened[1]
    try:
        found = measure(address, values.switches, values.codec)
    finally:
        if process is not None:
            process.terminate()
            process.stderr.close()
            process.wait(60)
    found["hardware"] = machine.hardware()
    found["load_average"] = os.getloadavg()
    print(table(found))
    if values.out:
        values.out.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(values.out, found)


if __name__ == "__main__":
    main()

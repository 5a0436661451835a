"""The page in a real browser, with the embedded model: a click changes what the canvas shows."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from chameleon_jax.data.images import prepare_garment
from tests.serving import chromium
from tests.serving.chromium import Chromium

ROOT = Path(__file__).parents[2]
# Mean colour of a place where the garment is: on the chest, beside the print of the third one.
COLOUR = """(() => {
  const film = document.getElementById("film"), screen = document.getElementById("screen");
  const [w, h] = film.hidden ? [screen.width, screen.height] : [film.videoWidth, film.videoHeight];
  const pen = new OffscreenCanvas(w, h).getContext("2d");
  pen.drawImage(film.hidden ? screen : film, 0, 0);
  const part = pen.getImageData(w * .28, h * .42, w * .09, h * .12).data;
  const sum = [0, 0, 0];
  for (let i = 0; i < part.length; i += 4) for (let c = 0; c < 3; c++) sum[c] += part[i + c];
  return sum.map((x) => 4 * x / part.length);
})()"""
# withdraw, disentangle, anchor, carry
BOXES = "[...document.querySelectorAll('fieldset input')].map((box) => box.checked)"

pytestmark = [pytest.mark.slow, pytest.mark.browser]


@pytest.fixture(scope="module")
def address():
    """A server of its own process, ready."""
    fast = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "XLA_FLAGS": ""}  # undoes tests/conftest.py
    environment = os.environ | {"JAX_PLATFORMS": "cpu"} | fast
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.serve", "--port", "0"],
        cwd=ROOT,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    lines = []
    for line in process.stderr:
        lines.append(line)
        if found := re.match(r"open (\S+)", line):
            break
    else:
        raise AssertionError("".join(lines))
    yield found[1]
    process.terminate()
    process.stderr.close()
    assert process.wait(60) in (0, -15, 143)


def open_ready(page, address):
    """Open the page, and wait until a stream may begin."""
    page.open(address)
    page.until("document.getElementById('status')?.textContent === 'ready'", 240)


@pytest.mark.parametrize("codec", ["h264", "mp4", "jpeg"])
def test_a_click_changes_the_garment(address, tmp_path, codec):
    with Chromium(tmp_path) as page:
        open_ready(page, address)
        assert "token" not in page.run("document.documentElement.outerHTML")
        assert page.run(BOXES) == [True, True, True, False]  # as the model's config has it
        page.run(f"document.getElementById('codec').value = '{codec}'")
        page.run("document.getElementById('start').click()")
        page.until("window.chameleon.shown > 4", 120)
        first = page.run(COLOUR)
        page.until("window.chameleon.shown > 16", 120)
        garments = [np.array(garment_colour(name)) for name in ("first", "second", "third")]
        worn = 0
        for number, wanted in enumerate((2, 0, 2), 1):
            page.run(f"document.querySelectorAll('#garments button')[{wanted}].click()")
            page.until(f"window.chameleon.latencies.length === {number}", 120)
            shown = page.run("window.chameleon.shown")
            page.until(f"window.chameleon.shown > {shown + 6}", 120)
            now = np.array(page.run(COLOUR))
            to_wanted, to_worn = (np.abs(now - garments[i]).mean() for i in (wanted, worn))
            assert to_wanted < to_worn, f"change {number}: {now} is nearer to the garment before"
            worn = wanted
        latencies = page.run("window.chameleon.latencies")
        print("click to changed frame, ms:", [round(one) for one in latencies])
        assert page.run("document.getElementById('timeline').children.length") == 4
        assert page.run("document.getElementById('notice').textContent") == ""
        # While the model is compiled the page asks, and is told to wait.
        assert [text for text in page.errors if "/readyz" not in text] == [] and len(first) == 3


def test_a_change_that_goes_on_from_the_motion(address, tmp_path):
    """Boxes that do not go together take each other out, and the server does what they say."""
    with Chromium(tmp_path) as page:
        open_ready(page, address)
        for word, expected in (
            ("carry", [True, False, True, True]),
            ("disentangle", [True, True, True, False]),
            ("carry", [True, False, True, True]),
            ("withdraw", [False, False, True, False]),
            ("carry", [True, False, True, True]),
        ):
            page.run(f"document.getElementById('{word}').click()")
            assert page.run(BOXES) == expected, word
        page.run("document.getElementById('start').click()")
        page.until("window.chameleon.shown > 16", 120)
        page.run("document.querySelectorAll('#garments button')[2].click()")
        page.until("window.chameleon.latencies.length === 1", 120)
        shown = page.run("window.chameleon.shown")
        page.until(f"window.chameleon.shown > {shown + 16}", 120)
        assert page.run("document.getElementById('notice').textContent") == ""


def garment_colour(name: str) -> np.ndarray:
    """Mean colour of a garment on its picture."""
    path = ROOT / "chameleon_jax" / "assets" / "examples" / f"{name}.png"
    pixels = prepare_garment(path, (128, 80))
    return pixels[(pixels < 245).any(-1)].mean(0)


def test_the_page_on_a_phone_and_in_the_dark(address, tmp_path):
    with Chromium(tmp_path, (390, 844), dark=True) as page:
        open_ready(page, address)
        width = page.run("document.documentElement.scrollWidth")
        assert width <= page.run("window.innerWidth")  # nothing sticks out
        ground = page.run("getComputedStyle(document.body).backgroundColor")
        assert ground == "rgb(21, 21, 23)"
        unnamed = page.run(
            "[...document.querySelectorAll('button, input, select')].filter((x) =>"
            " !(x.labels?.length || x.textContent.trim() || x.ariaLabel)).length"
        )
        assert unnamed == 0  # a screen reader has a name for everything
        assert page.picture()[:4] == b"\x89PNG"


def test_a_browser_without_a_decoder_is_told_and_served(address, tmp_path):
    with Chromium(tmp_path) as page:
        page.before("delete window.VideoDecoder")
        open_ready(page, address)
        page.run("document.getElementById('start').click()")
        page.until("window.chameleon.shown > 4", 120)
        assert page.run("document.getElementById('codec').value") == "mp4"
        assert not page.run("document.getElementById('film').hidden")
        assert page.errors == []


def test_a_video_that_cannot_be_decoded_is_said(address, tmp_path):
    with Chromium(tmp_path) as page:
        page.before(
            """const Plain = EncodedVideoChunk;
            window.EncodedVideoChunk = class {
              constructor(init) { return new Plain({ ...init, data: new Uint8Array(40) }); }
            };"""
        )
        open_ready(page, address)
        page.run("document.getElementById('start').click()")
        page.until("document.getElementById('notice').textContent.includes('cannot be shown')", 60)


@pytest.mark.parametrize("codec", ["h264", "mp4", "jpeg"])
def test_a_lost_connection_comes_back_to_the_same_stream(address, tmp_path, codec):
    with Chromium(tmp_path) as page:
        page.before(
            """window.sockets = [];
            const Plain = WebSocket;
            window.WebSocket = class extends Plain {
              constructor(...all) { super(...all); sockets.push(this); }
            };"""
        )
        open_ready(page, address)
        page.run(f"document.getElementById('codec').value = '{codec}'")
        page.run(
            """(() => {
              let shown = 0;
              window.frames_shown = [];
              Object.defineProperty(window.chameleon, "shown", {
                get: () => shown, set: (value) => { shown = value; frames_shown.push(value); }
              });
            })()"""
        )
        page.run("document.getElementById('start').click()")
        for number, shown in enumerate((12, 30), 2):
            page.until(f"window.chameleon.shown > {shown}", 120)
            page.run("sockets.at(-1).close()")
            page.until(f"sockets.length === {number} && sockets.at(-1).readyState === 1", 30)
        shown = page.run("window.chameleon.shown")
        page.until(f"window.chameleon.shown > {shown + 12}", 120)
        assert page.run("document.getElementById('status').textContent") == "live"
        # Every frame, once; a video element leaves some out where it is slow.
        steps = np.diff(page.run("frames_shown"))
        assert steps.min() == 1 and steps.max() <= (1 if codec != "mp4" else 6)
        # Who chooses before the page is back gets it, too.
        page.run("sockets.at(-1).close()")
        page.until("document.getElementById('status').textContent === 'coming back'", 10)
        page.run("document.querySelectorAll('#garments button')[1].click()")
        page.until("window.chameleon.latencies.length === 1", 120)
        # And whose change took effect in a chunk that was lost.
        page.run(
            """sockets.at(-1).addEventListener("message", ({ data, target }) => {
              if (typeof data !== "string") return;
              if (JSON.parse(data).type === "session.applied") target.close();
            })"""
        )
        page.run("document.querySelectorAll('#garments button')[0].click()")
        page.until("window.chameleon.latencies.length === 2", 120)
        assert page.run("document.getElementById('change').textContent").endswith(" ms")
        assert page.run("document.getElementById('notice').textContent") == ""


def test_a_stream_is_seen_again_from_its_manifest(address, tmp_path):
    with Chromium(tmp_path) as page:
        page.before(
            """const plain = URL.createObjectURL;
            window.kept = [];
            URL.createObjectURL = (one) => { window.kept.push(one); return plain(one); };"""
        )
        open_ready(page, address)
        page.run("document.getElementById('start').click()")
        page.until("window.chameleon.shown > 10", 120)
        page.run("document.querySelectorAll('#garments button')[1].click()")
        page.until("window.chameleon.latencies.length === 1", 120)
        shown = page.run("window.chameleon.shown")
        page.until(f"window.chameleon.shown > {shown + 3}", 120)
        page.run("document.getElementById('pause').click()")
        page.run("document.getElementById('download').click()")
        page.until("window.kept.length === 2", 60)
        manifest = json.loads(page.run("window.kept[1].text()"))
        assert len(manifest["changes"]) == 2 and manifest["frames"] > 10
        page.run(
            """(() => {
              const data = new DataTransfer();
              data.items.add(new File([window.kept[1]], "chameleon.json"));
              document.getElementById("manifest").files = data.files;
              document.getElementById("manifest").dispatchEvent(new Event("change"));
            })()"""
        )
        page.until("document.getElementById('notice').textContent.startsWith('that was')", 120)
        assert page.run("window.chameleon.shown") >= manifest["frames"]
        assert page.run("document.getElementById('timeline').children.length") == 2
        page.run("document.getElementById('pause').click()")  # and it goes on
        page.until(f"window.chameleon.shown > {manifest['frames'] + 6}", 120)


def test_pictures_of_ones_own(address, tmp_path):
    """Dropped onto the page, and from the camera."""
    with Chromium(tmp_path) as page:
        open_ready(page, address)
        count = "document.querySelectorAll('#{} button[data-name]').length"
        garments, people = (page.run(count.format(name)) for name in ("garments", "people"))
        page.run(
            """(async () => {
              const canvas = new OffscreenCanvas(60, 90);
              const pen = canvas.getContext("2d");
              pen.fillStyle = "teal"; pen.fillRect(10, 10, 40, 60);
              const data = new DataTransfer();
              data.items.add(new File([await canvas.convertToBlob()], "../x.svg"));
              document.querySelector("#garments label.upload").dispatchEvent(
                new DragEvent("drop", { dataTransfer: data, bubbles: true }));
            })()"""
        )
        page.until(f"{count.format('garments')} === {garments + 1}")
        page.run("document.querySelector('#people button.upload').click()")
        page.until("document.getElementById('viewfinder').videoWidth > 0")
        page.run("document.getElementById('take').click()")
        page.until(f"{count.format('people')} === {people + 1}")
        chosen = "document.querySelector('#people [aria-selected=true] span').textContent"
        assert page.run(chosen) == "yours"
        assert page.run("document.getElementById('notice').textContent") == ""


def test_a_page_of_another_site_reaches_nothing(address, tmp_path):
    port = re.search(r":(\d+)/", address)[1]
    with Chromium(tmp_path) as page:
        page.open("data:text/html,<title>evil</title>")
        page.until("document.title === 'evil'")
        opened = page.run(
            f"new Promise((done) => {{ const s = new WebSocket('ws://127.0.0.1:{port}/api/stream');"
            " s.onopen = () => done('open'); s.onerror = () => done('refused'); })"
        )
        assert opened == "refused"
        read = page.run(
            f"fetch('http://127.0.0.1:{port}/healthz').then(() => 'read', () => 'refused')"
        )
        assert read == "refused"
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz") as answer:
        assert answer.read() == b"ok"


def test_where_the_browser_is():
    assert chromium.find()

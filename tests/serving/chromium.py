"""A headless Chromium, driven over its debugging protocol; no package and no download of one.

Where none is installed (Debian: `apt install chromium`), tests that need one do not run, and the
end of the test run says so; with CHAMELEON_BROWSER=needed its absence is a failure.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

from websockets.sync.client import connect

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
NEEDED = "CHAMELEON_BROWSER"
FLAGS = (
    "--headless=new",
    "--no-sandbox",  # tests may run as root
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
    "--remote-debugging-port=0",
)


def find() -> str | None:
    """The program, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Chromium:
    """One page of a browser.

    Args:
      profile: an empty folder.
      size: width and height of the window.
      dark: whether pages are told that the user wants dark colours.
    """

    def __init__(self, profile: Path, size: tuple[int, int] = (1280, 900), dark: bool = False):
        self.errors: list[str] = []
        self._numbers = itertools.count(1)
        command = [find(), *FLAGS, f"--window-size={size[0]},{size[1]}"]
        self._process = subprocess.Popen(
            [*command, f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._open = contextlib.ExitStack()
        self._socket = self._open.enter_context(connect(self._page(profile), max_size=1 << 27))
        for domain in ("Runtime", "Log", "Page"):
            self.call(f"{domain}.enable")
        if dark:
            media = [{"name": "prefers-color-scheme", "value": "dark"}]
            self.call("Emulation.setEmulatedMedia", features=media)

    def __enter__(self) -> Chromium:
        return self

    def __exit__(self, *error: object) -> None:
        # One that is killed leaves a folder of its own behind, beside the profile.
        self._socket.send(json.dumps({"id": next(self._numbers), "method": "Browser.close"}))
        try:
            self._process.wait(20)
        finally:
            self._open.close()
            self._process.kill()
            self._process.wait()

    def _page(self, profile: Path) -> str:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            try:
                port = (profile / "DevToolsActivePort").read_text().split()[0]
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/json", timeout=5) as answer:
                    pages = [one for one in json.load(answer) if one["type"] == "page"]
                return pages[0]["webSocketDebuggerUrl"]
            except (OSError, IndexError):
                time.sleep(0.2)
        raise RuntimeError("the browser does not answer")

    def call(self, method: str, **values: Any) -> dict[str, Any]:
        """One call of the protocol; what pages complain about on the way is kept in `errors`."""
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": values}))
        while True:
            message = json.loads(self._socket.recv(timeout=60))
            if message.get("method") == "Runtime.exceptionThrown":
                self.errors.append(json.dumps(message["params"])[:500])
            if message.get("method") == "Log.entryAdded":
                entry = message["params"]["entry"]
                if entry["level"] == "error":
                    self.errors.append(f"{entry['text']} {entry.get('url', '')}")
            if message.get("id") == number:
                return message.get("result", {})

    def open(self, address: str) -> None:
        self.call("Page.navigate", url=address)

    def before(self, script: str) -> None:
        """JavaScript that runs in every page before its own."""
        self.call("Page.addScriptToEvaluateOnNewDocument", source=script)

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression in the page."""
        result = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        if "exceptionDetails" in result:
            raise RuntimeError(result["exceptionDetails"]["text"])
        return result["result"].get("value")

    def until(self, script: str, seconds: float = 60.0) -> Any:
        """Wait until an expression is true.

        Raises:
          AssertionError: it is not in time.
        """
        end = time.monotonic() + seconds
        while not (value := self.run(script)):
            assert time.monotonic() < end, f"never true: {script}; errors: {self.errors}"
            time.sleep(0.1)
        return value

    def picture(self) -> bytes:
        """The page as PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])


def needed() -> bool:
    """Whether the absence of a browser is a failure."""
    return os.environ.get(NEEDED) == "needed"

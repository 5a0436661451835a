"""uvicorn with settings for video, and a stop that leaves complete films.

Needs the extra `serve`.
"""

from __future__ import annotations

import asyncio
import contextlib
from types import FrameType
from typing import Any

import uvicorn
from starlette.applications import Starlette

DRAIN = 5.0  # seconds that running streams have to end at a stop


def settings(app: Starlette, sessions: int, **others: Any) -> uvicorn.Config:
    """How the app is served.

    Args:
      app: from `app.make_app`.
      sessions: streams at a time.
      others: further settings of uvicorn.
    """
    return uvicorn.Config(
        app,
        # At "info" who opens a stream is in the log, and a token that is put into an address.
        log_level="warning",
        access_log=False,
        ws="websockets-sansio",
        ws_max_size=1 << 20,
        ws_max_queue=8,
        ws_ping_timeout=60.0,  # a ping waits behind chunks, on a slow network for long
        ws_per_message_deflate=False,  # video does not become smaller
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=5,
        limit_concurrency=64 + 4 * sessions,
        h11_max_incomplete_event_size=16 << 10,
        **others,
    )


class Server(uvicorn.Server):
    """At the first stop signal nothing new begins, streams end, and then the server; a second one
    does not wait.
    """

    _drain: asyncio.Task | None = None

    async def serve(self, sockets: Any = None) -> None:
        """Until a signal."""
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal has come."""
        if self._drain is not None:
            super().handle_exit(sig, frame)
            return
        self._loop.call_soon_threadsafe(self._begin_drain, sig)

    def _begin_drain(self, sig: int) -> None:
        if self._drain is None:
            self._drain = asyncio.create_task(self._drained(sig))

    async def _drained(self, sig: int) -> None:
        live = self.config.app.state.live
        live.drain()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(live.drained(), DRAIN)
        super().handle_exit(sig, None)

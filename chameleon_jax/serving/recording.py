"""What was shown of a stream, on disk: packets in a file, so that long streams need no memory.

Packets of frames that were not shown yet are kept in memory, a few chunks at most: a change may
take them back.

Needs the extra `serve`.
"""

from __future__ import annotations

import array
import collections
import logging
import tempfile
import threading
from collections.abc import Iterator, Sequence

from chameleon_jax.serving.encoding import Packet

log = logging.getLogger(__name__)

MOST_BYTES = 4 << 30  # of one recording; what comes later is not kept


class Recording:
    """The packets of one stream. Its methods may be called from any thread.

    Args:
      most: bytes that are kept.
    """

    def __init__(self, most: int = MOST_BYTES):
        self._most = most
        self._lock = threading.Lock()
        # Open as long as the recording is kept; without a name, so that nothing is left behind.
        self._file = tempfile.TemporaryFile(prefix="chameleon_", buffering=1 << 16)  # noqa: SIM115
        self._lengths, self._keys = array.array("I"), bytearray()
        self._waiting: collections.deque[Packet] = collections.deque()
        self._bytes, self._full = 0, False

    def __len__(self) -> int:
        """Frames in the file: shown, and kept."""
        return len(self._lengths)

    @property
    def full(self) -> bool:
        """Whether it has ended before the stream: too many bytes, or the disk is full."""
        return self._full

    def add(self, packets: Sequence[Packet]) -> None:
        """Packets of the next frames."""
        with self._lock:
            if not self._full:
                self._waiting.extend(packets)

    def take_back(self, frame: int) -> None:
        """Forget the frames from `frame` on; they were not shown."""
        with self._lock:
            while self._waiting and len(self) + len(self._waiting) > frame:
                self._waiting.pop()

    def shown(self, frames: int) -> None:
        """The first `frames` frames were shown: put them into the file."""
        with self._lock:
            while self._waiting and len(self) < frames and not self._file.closed:
                packet = self._waiting.popleft()
                try:
                    if self._bytes + len(packet.data) > self._most:
                        raise OSError("the recording has reached its limit")
                    self._file.write(packet.data)
                except OSError as error:  # a full disk is no reason to end the stream
                    log.warning("the recording ends after %d frames: %s", len(self), error)
                    self._full = True
                    self._waiting.clear()
                    return
                self._bytes += len(packet.data)
                self._lengths.append(len(packet.data))
                self._keys.append(packet.key)

    def packets(self) -> Iterator[Packet]:
        """What is in the file now."""
        with self._lock:
            lengths, keys = self._lengths[:], bytes(self._keys)
        at = 0
        for length, key in zip(lengths, keys, strict=True):
            with self._lock:
                if self._file.closed:
                    return
                end = self._file.seek(0, 2)
                self._file.seek(at)
                data = self._file.read(length)
                self._file.seek(end)
            at += length
            yield Packet(data, bool(key))

    def close(self) -> None:
        """Forget everything."""
        with self._lock:
            self._file.close()
            self._waiting.clear()

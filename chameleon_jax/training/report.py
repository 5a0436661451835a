"""What a run writes down: metrics.jsonl, TensorBoard events, preview pictures. Only the first
process writes.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType

import jax
import numpy as np
from PIL import Image

from chameleon_jax import files


class MetricsWriter:
    """Writes into a run's folder; a context manager.

    Args:
      folder: gets metrics.jsonl, tensorboard/ and previews/.
      step: where the run goes on; what an interrupted run wrote for later steps is removed, for it
        will come again.
    """

    def __init__(self, folder: str | os.PathLike, step: int):
        self._writes = jax.process_index() == 0
        if not self._writes:
            return
        from tensorboardX import SummaryWriter

        self.folder = Path(folder)
        (self.folder / "previews").mkdir(parents=True, exist_ok=True)
        path = self.folder / "metrics.jsonl"
        _keep_until(path, step)
        self._file = path.open("a")
        self._board = SummaryWriter(
            str(self.folder / "tensorboard"), purge_step=step + 1, flush_secs=30
        )

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ):
        if self._writes:
            self._file.close()
            self._board.close()

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """One line of metrics.jsonl, one point of each curve."""
        if not self._writes:
            return
        self._file.write(json.dumps({"step": step} | values) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def picture(self, step: int, picture: np.ndarray) -> None:
        """A preview, uint8 [h, w, 3]."""
        if not self._writes:
            return
        Image.fromarray(picture).save(self.folder / "previews" / f"step_{step:07d}.png")
        self._board.add_image("preview", picture, step, dataformats="HWC")


def _keep_until(path: Path, step: int) -> None:
    """Drop the lines after `step`, and one that a kill cut short."""
    if not path.exists():
        return
    lines = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                lines.append(line + "\n")
        except json.JSONDecodeError:
            break
    files.write_text(path, "".join(lines))

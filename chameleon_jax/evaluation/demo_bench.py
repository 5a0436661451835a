"""A small benchmark in the layout of HGC-Bench, made of Runway's people: to try all stages without
the published one. Needs the extra `runway`.
"""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

from PIL import Image

from chameleon_jax import files
from chameleon_jax.evaluation.benches import hgc
from chameleon_jax.splits import SPLITS

SIZE = (128, 80)  # of the pictures: what the embedded model streams
WORLD = "mirror"  # what it knows
FIRST = SPLITS["validation"] + 60_000  # seed of the first sample; Runway-Bench uses those before


def make_demo(folder: Path, count: int, size: tuple[int, int] = SIZE) -> None:
    """Write a benchmark.

    Args:
      folder: to write; its table names pictures as the published one does, beginning with the
        folder's own name.
      count: samples.
      size: (height, width) of the pictures.
    """
    from chameleon_jax import runway
    from chameleon_jax.runway.clip import ClipRenderer

    rows = io.StringIO(newline="")
    table = csv.writer(rows)
    table.writerow(hgc.COLUMNS)
    for kind in ("src", "cloth"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for index in range(count):
        spec = runway.sample_spec(FIRST + index, frames=1, size=size, world=WORLD)
        pictures = {
            "src": ClipRenderer(spec).reference(spec),
            "cloth": runway.garment_picture(spec.garment, size, 3, spec.world),
        }
        names = []
        for kind, picture in pictures.items():
            path = folder / kind / f"{index:03d}.png"
            with files.replacing(path) as part:
                Image.fromarray(picture).save(part, "PNG")
            names.append(f"{folder.resolve().name}/{kind}/{path.name}")
        captions = spec.captions()
        text = f"{captions['static']} {captions['dynamic']}"
        prompt = json.dumps({"caption": {"en_short": text, "cn_short": ""}}, ensure_ascii=False)
        table.writerow([*names, prompt])
    files.write_text(folder / hgc.TABLE, rows.getvalue())

"""The converters at full size: random checkpoints in the real layouts, there and back, compared
tensor by tensor.

    python -m tests.converters.full_size --network dit --layout official --folder /big/disk

Writes a checkpoint of random bits (10 GB for the transformer in bfloat16), converts it to our
layout and back in processes of their own, compares every tensor with the first file, and deletes
all of it. Prints a table and JSON: seconds and peak resident memory of each conversion. Not part of
the tests: it needs 2 to 3 times the checkpoint on the disk.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from chameleon_jax.models.dit import DiTConfig
from chameleon_jax.models.text import TextConfig
from chameleon_jax.models.vae import VaeConfig
from chameleon_jax.weights.tensors import DTYPES, Entry, same_numbers, write_entries
from converters import convert
from converters.families import NETWORKS
from converters.pickles import write_pickle
from converters.recognise import recognise
from converters.rules import invert, shapes_in

SIZES = {"dit": DiTConfig.wan22_ti2v_5b(), "vae": VaeConfig.wan22(), "text": TextConfig.umt5_xxl()}


def write_random(network: str, layout: str, dtype: str, folder: Path) -> int:
    """A checkpoint of random bits, with the files that the published one has. Returns its bytes."""
    table, config, kind = NETWORKS[network], SIZES[network], DTYPES[dtype]
    shapes = shapes_in(invert(table.layouts[layout].rules(config)), table.expected(config))
    entries = []
    for seed, (name, shape) in enumerate(shapes.items()):

        def load(rows: slice, seed: int = seed, shape: tuple[int, ...] = shape) -> np.ndarray:
            """The same rows of random bits at any time, whatever pieces are asked for."""
            count = max(1, (rows.stop - rows.start) * int(np.prod(shape[1:])))
            bits = np.random.default_rng((seed, rows.start)).bytes(kind.itemsize * count)
            return np.frombuffer(bits, kind).reshape(rows.stop - rows.start, *shape[1:])

        entries.append(Entry(name, shape, kind, load))
    files, index = convert.cut_into_files(table.layouts[layout].file, entries, sharded=True)
    for file in files:
        path = folder / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        (write_pickle if file.is_pickle else write_entries)(path, file.entries)
    for name, text in index.items():
        (folder / name).write_text(text)
    return sum(file.nbytes for file in files)


def measure(*arguments: str) -> tuple[float, float, float]:
    """Seconds, seconds of processor, and peak gigabytes of a conversion in a process of its own.

    The peak is what the command says of itself: the system's accounts of a child begin with the
    size of its parent.
    """
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "converters", *arguments], stdout=subprocess.PIPE, text=True
    )
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"the conversion failed: {arguments}")
    peak = float(re.search(r"peak memory ([\d.]+) GB", done.stdout).group(1))
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, peak


def compare(a: Path, b: Path) -> int:
    """Number of tensors, all of which must be the same in two folders."""
    (left,), (right,) = recognise([a]), recognise([b])
    if left.tensors.keys() != right.tensors.keys():
        raise SystemExit("names differ")
    for name, tensor in left.tensors.items():
        other = right.tensors[name]
        pieces = (Entry(name, t.shape, t.dtype, t.read).pieces() for t in (tensor, other))
        if not all(same_numbers(*pair) for pair in zip(*pieces, strict=True)):
            raise SystemExit(f"{name} differs")
    return len(left.tensors)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", choices=SIZES, required=True)
    parser.add_argument("--layout", choices=("official", "diffusers"), required=True)
    parser.add_argument("--dtype", choices=("BF16", "F32"), default="BF16")
    parser.add_argument("--folder", type=Path, required=True)
    options = parser.parse_args()
    work = options.folder / f"full_size_{options.network}_{options.layout}"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        nbytes = write_random(options.network, options.layout, options.dtype, work / "public")
        rows = {"to jax": measure(str(work / "public"), "--to", "jax", "--out", str(work / "ours"))}
        rows["back"] = measure(
            str(work / "ours"), "--to", options.layout, "--out", str(work / "back")
        )
        tensors = compare(work / "public", work / "back")
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(
        f"{options.network}, {options.layout}, {options.dtype}: {nbytes / 1e9:.2f} GB, {tensors}"
        " tensors the same"
    )
    for name, (seconds, processor, peak) in rows.items():
        print(f"  {name:8s} {seconds:7.1f} s, processor {processor:7.1f} s   peak {peak:5.2f} GB")
    keys = ("seconds", "processor_seconds", "peak_gb")
    figures = {name: dict(zip(keys, row, strict=True)) for name, row in rows.items()}
    print(
        json.dumps(
            {
                "network": options.network,
                "layout": options.layout,
                "bytes": nbytes,
                "tensors": tensors,
            }
            | figures
        )
    )


if __name__ == "__main__":
    main()

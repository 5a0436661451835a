"""Public checkpoints to this project's layout, and back.

    python -m converters Wan2.2-TI2V-5B --to jax --out weights/wan22
    python -m converters weights/wan22 --to diffusers --out Wan2.2-TI2V-5B-Diffusers
    python -m converters model.pt --part generator_ema --to official --out generator
    python -m converters Wan2.2-TI2V-5B --lora style.safetensors@0.8 --to jax --out weights/styled
    python -m converters style.safetensors --to kohya --out style_kohya

What is given is recognised by the names in it: a folder, a file, shards with their index;
.safetensors, or .pth, .pt and .bin through PyTorch's restricted loader. Nothing is written unless
every tensor fits, and the result is read back and compared before it gets its name. What a public
layout has no place for lies in chameleon.json beside the weights.

Exit codes: 0 done, 2 an input or the destination cannot be used (nothing is written), 130
interrupted.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from chameleon_jax.errors import UserError, one_line
from converters.layouts import LAYOUTS
from launch import cli
from launch.cli import UsageError

if TYPE_CHECKING:
    from converters.convert import Merge

CASTS = {"bfloat16": "BF16", "float32": "F32", "keep": None}  # as safetensors name them


def define_flags(parser: cli.Parser) -> None:
    """The flags of this command."""
    parser.inputs("inputs", "folder, file, or index of shards", kind=Path)
    parser.flag(
        "to",
        f"layout to write: {', '.join(LAYOUTS)}; training is for transformers, peft and kohya for"
        " LoRAs",
        kind=cli.one_of(*LAYOUTS),
        needed=True,
        metavar="LAYOUT",
    )
    parser.flag("out", "folder to make; must not exist", kind=Path, needed=True, metavar="DIR")
    parser.flag(
        "dtype",
        f"cast the weights: {', '.join(CASTS)}; keep is bit for bit",
        kind=cli.one_of(*CASTS),
        default="keep",
        metavar="NAME",
    )
    parser.flag(
        "part",
        "part of a training checkpoint: generator, generator_ema, critic, ...; or one of several"
        " adapters; default generator_ema, else generator",
        metavar="NAME",
    )
    parser.flag(
        "variant",
        "of several copies in a folder the one to use, such as fp16; default full precision",
        metavar="NAME",
    )
    parser.flag(
        "lora",
        "merge into the transformer, with a strength (1 if none is said); may be repeated",
        repeated=True,
        metavar="FILE[@STRENGTH]",
    )


def run(values: cli.Values) -> None:
    """The command.

    Raises:
      UserError: an input or the destination cannot be used.
    """
    from chameleon_jax.machine import peak_resident
    from chameleon_jax.weights.tensors import DTYPES
    from converters import convert, recognise, writing

    begin = time.perf_counter()
    cast = CASTS[values.dtype]
    dtype = None if cast is None else DTYPES[cast]
    writing.check_destination(values.out, 0)
    found = recognise.look(values.inputs, values.part, values.variant)
    for part in found.parts:
        print(part.describe())
    merges = [read_merge(text) for text in values.lora]
    for merge in merges:
        print(f"{merge.part.describe()}; merged with strength {merge.strength:g}")
    folder, remarks = convert.prepare(
        found.parts, values.to, dtype=dtype, merges=merges, label=values.part or "generator"
    )
    for note in (*found.notes, *remarks):
        print(f"note: {note}", file=sys.stderr)
    writing.write_with_progress(folder, values.out)
    seconds = time.perf_counter() - begin
    tensors = sum(len(file.entries) for file in folder.files)
    how = "bit for bit" if dtype is None and not merges else "against its source"
    peak = peak_resident()
    memory = "peak memory unknown" if peak is None else f"peak memory {peak / 1e9:.2f} GB"
    print(
        f"{values.out}: {tensors} tensors, {folder.nbytes / 1e9:.2f} GB, read back and compared"
        f" {how}; {seconds:.0f} s, {memory}"
    )
    for file in folder.files:
        print(f"  {file.path}")


def read_merge(text: str) -> Merge:
    """A LoRA to merge, `file` or `file@strength`.

    Raises:
      UserError: no such file, not a LoRA, or several.
    """
    from chameleon_jax.weights.lora import parse_strength
    from converters.convert import Merge
    from converters.recognise import find_lora

    try:
        path, strength = parse_strength(text)
        return Merge(find_lora(path), strength)
    except UserError as error:
        raise UsageError(f"--lora {text}: {one_line(error)}") from None


def main(argv: Sequence[str] | None = None, program: str = "python -m converters") -> None:
    """Read the command line, convert, and end the process."""
    cli.main(program, __doc__, define_flags, run, argv, interrupted="nothing was written")


if __name__ == "__main__":
    main()

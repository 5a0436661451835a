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

import argparse
import functools
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from chameleon_jax.errors import UserError, one_line
from converters.layouts import LAYOUTS

if TYPE_CHECKING:  # --help imports neither NumPy nor JAX
    from converters.convert import Merge

CASTS = {"keep": None, "bfloat16": "BF16", "float32": "F32"}  # as safetensors names the types
WIDTH = 100  # most columns of the help text


class UsageError(UserError):
    """The command line asks for something impossible. The message is one line."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message.removeprefix('argument ')}; see --help")


def parser(program: str = "python -m converters") -> argparse.ArgumentParser:
    """The command line."""
    made = _Parser(
        program,
        usage=argparse.SUPPRESS,
        description=(__doc__ or "").strip(),
        formatter_class=functools.partial(
            argparse.RawDescriptionHelpFormatter, max_help_position=30, width=WIDTH
        ),
        allow_abbrev=False,
        add_help=False,
    )
    made.add_argument(
        "inputs", nargs="+", type=Path, metavar="IN", help="folder, file, or index of shards"
    )
    flags = made.add_argument_group("flags")
    flags.add_argument("--help", "-h", action="help", help="show this text and stop")
    flags.add_argument(
        "--to",
        required=True,
        choices=LAYOUTS,
        metavar="LAYOUT",
        help=f"layout to write: {', '.join(LAYOUTS)}; training is for transformers, peft and kohya"
        " for LoRAs",
    )
    flags.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="folder to make; must not exist"
    )
    flags.add_argument(
        "--dtype",
        choices=CASTS,
        default="keep",
        metavar="TYPE",
        help=f"{', '.join(CASTS)}: cast the weights, or keep them bit for bit (default: keep)",
    )
    flags.add_argument(
        "--part",
        metavar="NAME",
        help="part of a training checkpoint: generator, generator_ema, critic, ...; or one of"
        " several adapters (default: generator_ema, else generator)",
    )
    flags.add_argument(
        "--variant",
        metavar="NAME",
        help="of several copies in a folder the one to use, such as fp16 (default: full precision)",
    )
    flags.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[@STRENGTH]",
        help="merge a LoRA into the transformer, with a strength (default: 1); may be repeated",
    )
    return made


def run(argv: Sequence[str], program: str = "python -m converters") -> int:
    """The command. Returns its exit code.

    Raises:
      UserError: an input or the destination cannot be used.
    """
    options = parser(program).parse_args(argv)
    from chameleon_jax.weights.tensors import DTYPES
    from converters import convert, recognise, writing

    begin = time.perf_counter()
    dtype = DTYPES.get(CASTS[options.dtype])
    writing.check_destination(options.out, 0)
    found = recognise.look(options.inputs, options.part, options.variant)
    for part in found.parts:
        print(part.describe())
    merges = [_merge(text) for text in options.lora]
    for merge in merges:
        print(f"{merge.part.describe()}; merged with strength {merge.strength:g}")
    folder, remarks = convert.prepare(
        found.parts, options.to, dtype=dtype, merges=merges, label=options.part or "generator"
    )
    for note in (*found.notes, *remarks):
        print(f"note: {note}", file=sys.stderr)
    writing.write_with_progress(folder, options.out)
    seconds = time.perf_counter() - begin
    tensors = sum(len(file.entries) for file in folder.files)
    how = "bit for bit" if dtype is None and not merges else "against its source"
    print(
        f"{options.out}: {tensors} tensors, {folder.nbytes / 1e9:.2f} GB, read back and compared"
        f" {how}; {seconds:.0f} s{_peak_memory()}"
    )
    for file in folder.files:
        print(f"  {file.path}")
    return 0


def _peak_memory() -> str:
    from chameleon_jax.machine import peak_resident

    peak = peak_resident()
    return "" if peak is None else f", peak memory {peak / 1e9:.2f} GB"


def _merge(text: str) -> Merge:
    """`file` or `file@strength`."""
    from chameleon_jax.weights.lora import parse_strength
    from converters.convert import Merge
    from converters.recognise import find_lora

    try:
        path, strength = parse_strength(text)
        return Merge(find_lora(path), strength)
    except UserError as error:
        raise UsageError(f"--lora {text}: {one_line(error)}") from None


def main(argv: Sequence[str] | None = None, program: str = "python -m converters") -> NoReturn:
    """Run the command, and end the process with its exit code.

    Args:
      argv: the command line without the program's name; default that of the process.
      program: what the user types to call it.
    """
    sys.stdout.reconfigure(errors="backslashreplace")  # file names may hold any bytes
    try:
        code = run(sys.argv[1:] if argv is None else argv, program)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    main()

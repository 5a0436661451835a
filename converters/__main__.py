"""Public checkpoints to this project's layout, and back.

    python -m converters Wan2.2-TI2V-5B --to jax --out weights/wan22
    python -m converters weights/wan22 --to diffusers --out Wan2.2-TI2V-5B-Diffusers
    python -m converters model.pt --part generator_ema --to official --out generator
    python -m converters Wan2.2-TI2V-5B --lora style.safetensors@0.8 --to jax --out weights/styled
    python -m converters style.safetensors --to kohya --out style_kohya

What is given is recognised by the names in it: a folder, a file, shards with their index;
.safetensors, or .pth, .pt and .bin through PyTorch's restricted loader. Nothing is written unless
every tensor fits, and the result is read back and compared before it gets its name.

Exit codes: 0 done, 2 an input or the destination cannot be used (nothing is written), 130
interrupted.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from chameleon_jax.data.tokenizer import TokenizerError
from chameleon_jax.weights.lora import parse_strength
from chameleon_jax.weights.tensors import DTYPES, WeightsError
from converters import convert, writing
from converters.layouts import LAYOUTS
from converters.lora import LoraPart
from converters.recognise import RecognitionError, recognise
from converters.rules import ConversionError

CASTS = {"bfloat16": DTYPES["BF16"], "float32": DTYPES["F32"], "keep": None}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    about, _, rest = (__doc__ or "").partition("\n\n")
    made = argparse.ArgumentParser(
        prog="python -m converters",
        description=about,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "inputs", nargs="+", type=Path, metavar="IN", help="folder, file, or index of shards"
    )
    made.add_argument(
        "--to",
        required=True,
        choices=LAYOUTS,
        help="layout to write; training is for transformers, peft and kohya for LoRAs",
    )
    made.add_argument("--out", required=True, type=Path, help="folder to make; must not exist")
    made.add_argument(
        "--dtype",
        choices=CASTS,
        default="keep",
        help="cast the weights; default: keep them, bit for bit",
    )
    made.add_argument(
        "--part", help="part of a training checkpoint: generator, generator_ema, critic, ..."
    )
    made.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[@STRENGTH]",
        help="merge into the transformer",
    )
    return made


def run(argv: Sequence[str]) -> int:
    """The command. Returns its exit code.

    Raises:
      RecognitionError, ConversionError, WeightsError, TokenizerError, DestinationError: an input
        cannot be used.
    """
    options = parser().parse_args(argv)
    begin = time.perf_counter()
    dtype = CASTS[options.dtype]
    writing.check_destination(options.out, 0)
    parts = recognise(options.inputs, options.part)
    for part in parts:
        print(part.describe())
    merges = [_merge(text) for text in options.lora]
    for merge in merges:
        print(f"{merge.part.describe()}; merged with strength {merge.strength:g}")
    folder, remarks = convert.prepare(
        parts, options.to, dtype=dtype, merges=merges, label=options.part or "generator"
    )
    for remark in remarks:
        print(f"note: {remark}", file=sys.stderr)
    writing.write_with_progress(folder, options.out)
    seconds = time.perf_counter() - begin
    tensors = sum(len(file.entries) for file in folder.files)
    how = "bit for bit" if dtype is None and not merges else "against its source"
    print(
        f"{options.out}: {tensors} tensors, {folder.nbytes / 1e9:.2f} GB, read back and compared"
        f" {how};"
        f" {seconds:.0f} s, {peak_memory()}"
    )
    for file in folder.files:
        print(f"  {file.path}")
    return 0


def peak_memory() -> str:
    """Peak resident memory of this process, in words."""
    try:
        status = Path("/proc/self/status").read_text()
        peak = 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", status).group(1))
    except (OSError, AttributeError):  # not on Linux
        try:
            import resource
        except ModuleNotFoundError:  # on Windows
            return "peak memory unknown"
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
            1 if sys.platform == "darwin" else 1024
        )
    return f"peak memory {peak / 1e9:.2f} GB"


def _merge(text: str) -> convert.Merge:
    """`file` or `file@strength`."""
    try:
        path, strength = parse_strength(text)
    except ValueError as error:
        raise RecognitionError(f"--lora {text}: {error}") from None
    (part,) = recognise([path])
    if not isinstance(part, LoraPart):
        raise RecognitionError(f"--lora {text}: not a LoRA, but a {part.network.title}")
    return convert.Merge(part, strength)


def main() -> None:
    """Run, and turn whatever is wrong with the input into a message."""
    try:
        sys.exit(run(sys.argv[1:]))
    except (
        RecognitionError,
        ConversionError,
        WeightsError,
        TokenizerError,
        writing.DestinationError,
    ) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("error: interrupted; nothing was written", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()

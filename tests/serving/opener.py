"""Opens pictures as the server's child process does, many of them without a new Python for each.

    python -m tests.serving.opener FOLDER HEIGHT WIDTH

Each file of the folder is opened by a fork of its own, through the very function of the child, with
its limits. Says one JSON object a file: how it ended (exit code, or minus the signal), how much
came out, what was said, seconds of the processor, and the peak of its memory.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from pathlib import Path

from chameleon_jax.serving import pictures


def main() -> None:
    folder, size = Path(sys.argv[1]), sys.argv[2:4]
    for path in sorted(folder.iterdir()):
        print(json.dumps({"name": path.name} | opened(path, size)), flush=True)


def opened(path: Path, size: list[str]) -> dict:
    with (
        path.open("rb") as data,
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as said,
    ):
        child = os.fork()
        if child == 0:
            for number, file in enumerate((data, out, said)):
                os.dup2(file.fileno(), number)
            os._exit(run(size))
        _, status, usage = os.wait4(child, 0)
        said.seek(0)
        lines = said.read().decode(errors="replace").strip().splitlines()
        return {
            "status": os.waitstatus_to_exitcode(status),
            "bytes": os.fstat(out.fileno()).st_size,
            "said": lines[-1] if lines else "",
            "seconds": usage.ru_utime + usage.ru_stime,
            "peak": 1024 * usage.ru_maxrss,
        }


def run(size: list[str]) -> int:
    """As a Python that runs the module would end."""
    sys.argv = ["pictures", "garment", *size]
    try:
        code = pictures._main()
        sys.stdout.flush()
        return code
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stderr.flush()


if __name__ == "__main__":
    main()

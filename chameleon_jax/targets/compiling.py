"""One program compiled for a target, and what its compiler says of it.

    python -m chameleon_jax.targets.compiling '{"config": {...}, "target": "v6e-1", ...}'

prints the report as JSON. A program is compiled in a process of its own, because a process chooses
its platform once and a compiler keeps gigabytes.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chameleon_jax.errors import UserError, one_line

# For the compilers, before JAX is imported: this machine's own devices do not matter; libtpu need
# not ask a metadata server what they are, and other processes may use it, too.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v6e-1",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "JAX_TRACEBACK_FILTERING": "off",  # the last line of a traceback is then the exception's
}


class TooLargeError(UserError):
    """A program needs more memory than the device has. The message is the compiler's."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A program to compile.

    Attributes:
      config: as a dictionary.
      target: its name.
      program: of a stream, or the step of a stage.
      mesh: sizes of the axes; empty: see `programs.mesh_for`.
      options: of the compiler, beside its defaults.
    """

    config: Mapping[str, Any]
    target: str
    program: str
    mesh: Mapping[str, int] = dataclasses.field(default_factory=dict)
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def report(job: Job, hlo: str | None = None) -> dict[str, Any]:
    """Trace, compile and describe a program, as JSON values.

    Bytes are of one device, operations of all of them.

    Args:
      job: what to compile.
      hlo: file to write the text of the compiled program to.

    Raises:
      TargetError, MeshError, ConfigError: the job cannot be done; see `programs.of_config`.
      TooLargeError: the compiler has found that the program does not fit the device.
    """
    import jax
    from ml_collections import ConfigDict

    from chameleon_jax import machine
    from chameleon_jax.targets import hlo as reading
    from chameleon_jax.targets import machines, programs
    from chameleon_jax.training.flops import count_jaxpr

    target = machines.find(job.target)
    made = programs.of_config(ConfigDict(dict(job.config)), target, job.mesh)
    if job.program not in made.traced:
        raise machines.TargetError(
            f"program {job.program!r}: expected one of {', '.join(made.traced)}"
        )
    begin = time.monotonic()
    traced = made.traced[job.program]()
    lowered = traced.lower()
    lowering = time.monotonic()
    try:
        compiled = lowered.compile(compiler_options=dict(job.options) or None)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise TooLargeError(one_line(error)) from None  # the TPU's compiler refuses such a program
    done = time.monotonic()
    flops, text = count_jaxpr(traced.jaxpr), compiled.as_text()
    if hlo:
        Path(hlo).write_text(text, encoding="utf-8")
    program = reading.read(text)
    memory = _memory(compiled)
    cost = compiled.cost_analysis() or {}
    return {
        "target": target.name,
        "program": job.program,
        "mesh": {axis: size for axis, size in made.mesh.shape.items() if size > 1},
        "options": dict(job.options),
        "trace_seconds": round(lowering - begin, 1),
        "compile_seconds": round(done - lowering, 1),
        "bytes": memory,
        "peak_bytes": sum(memory.values()) - 2 * memory["alias"],
        "device_bytes": target.chip.memory,
        "resident": dict(made.resident),
        "flops": {
            "model": flops.model,
            "hardware": flops.hardware,
            "not_counted": sorted(flops.unknown),
            "by_compiler": cost.get("flops"),  # of one device; without custom kernels
        },
        "least_seconds": {
            "compute": flops.hardware / (target.count * target.chip.flops),
            "memory": (memory["argument"] + memory["output"]) / target.chip.bandwidth,
        },
        "collectives": {
            name: dataclasses.asdict(tally) for name, tally in reading.collectives(program).items()
        },
        "kernels": reading.kernels(program),
        "dots": reading.dots(program),
        "moves": {
            name: dataclasses.asdict(tally) for name, tally in reading.moves(program).items()
        },
        "unknown_loops": program.unknown_loops,
        "versions": machine.versions(),
    }


def _memory(compiled: Any) -> dict[str, int]:
    """Bytes on one device; `alias` are outputs in the place of arguments."""
    stats = compiled.memory_analysis()
    names = {"argument": "argument", "output": "output", "alias": "alias", "temporary": "temp"}
    found = {key: getattr(stats, f"{name}_size_in_bytes") for key, name in names.items()}
    return found | {"program": stats.generated_code_size_in_bytes}


def run(job: Job, minutes: float, hlo: str | None = None) -> dict[str, Any]:
    """The report of a job from a process of its own.

    Args:
      job: what to compile.
      minutes: most time that it may take.
      hlo: as for `report`.

    Returns:
      As `report`; or `target`, `program` and `error`, one line: why there is none. `too_large` is
      true if that is because the program does not fit the device.

    Raises:
      UserError: the job cannot be done on any machine with this installation.
    """
    asked = json.dumps(dataclasses.asdict(job) | {"hlo": hlo})
    command = [sys.executable, "-m", __spec__.name, asked]
    failed = {"target": job.target, "program": job.program, "mesh": dict(job.mesh)}
    try:
        done = subprocess.run(
            command, env=os.environ | ENVIRONMENT, capture_output=True, timeout=60 * minutes
        )
    except subprocess.TimeoutExpired:
        return failed | {"error": f"not compiled within {minutes:g} minutes"}
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines() or ["no word"]
        return failed | {"error": f"the compiler failed ({said[-1][:300]})"}
    found = json.loads(done.stdout.decode().strip().splitlines()[-1])
    if "refused" in found:
        raise UserError(found["refused"])
    return failed | found


def main() -> int:
    """Compile the job on the command line. Returns the exit code."""
    fields = json.loads(sys.argv[1])
    hlo = fields.pop("hlo", None)
    try:
        found = report(Job(**fields), hlo)
    except TooLargeError as error:
        found = {"error": str(error), "too_large": True}
    except UserError as error:
        found = {"refused": str(error)}
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    os.environ.update(ENVIRONMENT)
    sys.exit(main())

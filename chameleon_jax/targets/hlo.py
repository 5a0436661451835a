"""What a compiled program holds, read from its text (HLO, the language of XLA).

Everything is counted as often as it runs: the body of a loop as often as the loop goes round, which
the compiler notes (`known_trip_count`, for GPUs) or the condition of the loop says: loops of JAX
count from zero to a constant. A loop of which neither is known counts once, and is counted in
`unknown_loops`.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

# Bits of an element, by the names that HLO has for types.
BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "f8e4m3fn": 8, "f8e5m2": 8, "s16": 16,
    "u16": 16, "f16": 16, "bf16": 16, "s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64,
    "f64": 64, "c64": 64,
}  # fmt: skip
COLLECTIVES = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute",
)  # fmt: skip
# Operations that move numbers and compute nothing.
MOVES = ("copy", "pad", "transpose", "concatenate")
# Kernels that are not the compiler's own, by a part of their names.
KERNELS = {
    "cuDNN attention": r"__cudnn\$fmha",
    "cuDNN convolution": r"__cudnn\$conv",
    "cuBLAS fp8": r"__cublas\$lt\$matmul\$f8",
    "cuBLAS": r"__cublas|__cublas\$lt\$matmul(?!\$f8)",
    "Triton": r"__gpu\$xla\.gpu\.triton|triton_kernel_call",
    "splash attention": r"splash_m[hq]a",
    "Pallas": r"tpu_custom_call",
}
# Custom calls that are no kernels: room, and what the compiler notes for itself.
NOTES = (
    "AllocateBuffer",
    "ConcatBitcast",
    "Sharding",
    "SPMDFullToShardShape",
    "SPMDShardToFullShape",
)
LARGE = 16 * 2**20  # bytes: smaller moves are not worth a line

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_OPERATION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.+?) ([a-z][\w\-]*)\((.*)$")
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Operation:
    """One line of a program: `name = shape kind(rest`."""

    name: str
    shape: str
    kind: str
    rest: str

    @property
    def bytes(self) -> int:
        """Of what it makes; of a tuple all parts."""
        return shape_bytes(self.shape)

    def called(self, key: str) -> str | None:
        """The computation that stands behind `key=`."""
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.rest)
        return found[1] if found else None


@dataclasses.dataclass(frozen=True)
class Program:
    """A program's computations, and how often each of them runs.

    Attributes:
      computations: their operations, by name.
      times: how often each runs as code of its own; those inside of fusions are left out.
      unknown_loops: loops that count once because nothing says how often they go round.
    """

    computations: dict[str, list[Operation]]
    times: dict[str, int]
    unknown_loops: int

    def operations(self) -> Iterator[tuple[int, Operation]]:
        """(How often it runs, operation) of all that runs as code of its own."""
        for name, times in self.times.items():
            for operation in self.computations[name]:
                yield times, operation


@dataclasses.dataclass
class Tally:
    """Operations of one kind: how many run, and the bytes that they make."""

    count: int = 0
    bytes: int = 0

    def add(self, times: int, size: int) -> None:
        self.count += times
        self.bytes += times * size


def read(text: str) -> Program:
    """A program from `compiled.as_text()`.

    Raises:
      ValueError: the text has no entry.
    """
    computations: dict[str, list[Operation]] = {}
    entry = None
    current: list[Operation] = []
    for line in text.splitlines():
        head = _COMPUTATION.match(line)
        if head:
            current = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
            continue
        found = _OPERATION.match(line)
        if found:
            current.append(Operation(*found.groups()))
    if entry is None:
        raise ValueError("no entry in the text of the program; expected that of compiled HLO")
    times: dict[str, int] = collections.defaultdict(int)
    unknown = 0

    def visit(name: str, count: int) -> None:
        nonlocal unknown
        times[name] += count
        for operation in computations.get(name, ()):
            if operation.kind == "while":
                trips = _trips(computations, operation)
                unknown += trips is None
                body = operation.called("body")
                if body:
                    visit(body, count * (trips or 1))
            elif operation.kind == "conditional":
                for branch in _branches(operation.rest):
                    visit(branch, count)
            elif operation.kind in ("call", "async-start"):
                inner = operation.called("to_apply") or operation.called("calls")
                if inner:
                    visit(inner, count)

    visit(entry, 1)
    return Program(computations, dict(times), unknown)


def shape_bytes(shape: str) -> int:
    """Bytes of `bf16[2,3]{1,0}`, or of all parts of `(f32[4], s32[])`; unknown types count 0."""
    total = 0
    for kind, sides in _SHAPE.findall(shape):
        if kind in BITS:
            total += BITS[kind] * math.prod(int(side) for side in sides.split(",") if side) // 8
    return total


def collectives(program: Program) -> dict[str, Tally]:
    """What the devices send each other, by kind; the bytes are those that one device ends up with.

    An asynchronous one counts where it starts; its shape then names input and output, so half of
    it is taken.
    """
    found: dict[str, Tally] = collections.defaultdict(Tally)
    for times, operation in program.operations():
        for kind in COLLECTIVES:
            if operation.kind == kind:
                found[kind].add(times, operation.bytes)
            elif operation.kind == f"{kind}-start":
                halved = operation.shape.startswith("(") and kind != "all-reduce"
                found[kind].add(times, operation.bytes // (2 if halved else 1))
    return dict(found)


def kernels(program: Program) -> dict[str, int]:
    """Custom calls by the names of `KERNELS`; others by the name of their target."""
    found: dict[str, int] = collections.defaultdict(int)
    for times, operation in program.operations():
        if operation.kind != "custom-call":
            continue
        text = f"{operation.name} {operation.rest}"
        known = [name for name, part in KERNELS.items() if re.search(part, text)]
        target = re.search(r'custom_call_target="([^"]+)"', operation.rest)
        name = known[0] if known else target[1] if target else "?"
        if name not in NOTES:
            found[name] += times
    return dict(found)


def moves(program: Program, least: int = LARGE) -> dict[str, Tally]:
    """Copies, pads, transposes and concatenations that make at least so many bytes, by kind.

    Alone, or as what a fusion ends in. Those that the compiler does inside of other work, on the
    way, cost little and are not counted, nor are updates in place, nor what is brought into a
    chip's own memory ahead of its use: the work itself would read it.
    """
    found: dict[str, Tally] = collections.defaultdict(Tally)
    for times, operation in program.operations():
        kind, size = operation.kind.removesuffix("-start"), operation.bytes
        if operation.kind == "copy-start":
            output, source = operation.shape.split("}")[:2]  # (output, input, context)
            if _space(output) != _space(source):
                continue
            size = shape_bytes(output)
        if kind == "fusion":
            kind = _last(program, operation.called("calls"))
        if kind in MOVES and size >= least:
            found[kind].add(times, size)
    return dict(found)


def _space(shape: str) -> str:
    """Which memory a value lies in, by its layout; on a TPU 0 is the large one, 1 the chip's."""
    noted = re.search(r"S\((\d+)\)", shape)
    return noted[1] if noted else "0"


def dots(program: Program) -> dict[str, int]:
    """Matrix products and convolutions by the type of their first operand, fusions included."""
    found: dict[str, int] = collections.defaultdict(int)
    for operations in program.computations.values():
        types = {operation.name: operation.shape for operation in operations}
        for operation in operations:
            if operation.kind in ("dot", "convolution"):
                first = re.match(r"\s*(?:([a-z]\w*)\[[\d,]*\]\S* )?%?([\w.\-]+)", operation.rest)
                kind = first[1] or _SHAPE.match(types.get(first[2], ""))
                found[kind if isinstance(kind, str) else kind[1] if kind else "?"] += 1
    return dict(found)


def _trips(computations: dict[str, list[Operation]], loop: Operation) -> int | None:
    """How often a loop goes round; None if it cannot be told."""
    noted = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest)
    if noted:
        return int(noted[1])
    waiting, operations = [loop.called("condition")], []
    while waiting:
        inside = computations.get(waiting.pop() or "", [])
        operations += inside
        waiting += [operation.called("calls") for operation in inside if operation.kind == "fusion"]
    ends = {op.rest.partition(")")[0] for op in operations if op.kind == "constant"}
    compared = [op for op in operations if op.kind == "compare" and "direction=LT" in op.rest]
    if len(ends) == len(compared) == 1 and (end := ends.pop()).isdigit():
        return int(end)
    return None


def _last(program: Program, computation: str | None) -> str:
    """The kind of operation that a fused computation ends in; reshapes say nothing."""
    operations = program.computations.get(computation or "", [])
    for operation in reversed(operations):
        if operation.kind not in ("bitcast", "reshape", "tuple", "get-tuple-element"):
            return operation.kind
    return ""


def _branches(rest: str) -> list[str]:
    listed = re.search(r"branch_computations=\{([^}]*)\}", rest)
    if listed:
        return [name.strip().lstrip("%") for name in listed[1].split(",")]
    return re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", rest)

"""A network as an ONNX file, written by hand: it gives constants, whatever it is shown.

The fields are those of onnx.proto (ONNX 1.x, Apache-2.0); numbers beside them are their tags.
"""

from __future__ import annotations

import numpy as np

FLOAT, INT64 = 1, 7


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def number(tag: int, value: int) -> bytes:
    return varint(tag << 3) + varint(value)


def message(tag: int, *parts: bytes | str) -> bytes:
    body = b"".join(part.encode() if isinstance(part, str) else part for part in parts)
    return varint(tag << 3 | 2) + varint(len(body)) + body


def tensor(name: str, value: np.ndarray) -> bytes:
    """An initialiser of a graph."""
    kind = FLOAT if value.dtype == np.float32 else INT64
    dims = b"".join(number(1, side) for side in value.shape)
    return message(5, dims, number(2, kind), message(8, name), message(9, value.tobytes()))


def node(kind: str, inputs: list[str], output: str) -> bytes:
    named = b"".join(message(1, name) for name in inputs)
    return message(1, named, message(2, output), message(3, output), message(4, kind))


def value(tag: int, name: str, shape: tuple[int, ...]) -> bytes:
    """An input (11) or an output (12) of a graph."""
    dims = b"".join(message(1, number(1, side)) for side in shape)
    return message(
        tag, message(1, name), message(2, message(1, number(1, FLOAT), message(2, dims)))
    )


def constant(shape: tuple[int, int, int, int], **outputs: np.ndarray) -> bytes:
    """A network from pictures of a shape [1, 3, h, w] to outputs [1, a, c], by their names."""
    graph = [
        node("GlobalAveragePool", ["images"], "mean"),
        node("Flatten", ["mean"], "flat"),
        node("MatMul", ["flat", "zeros"], "zero"),
        node("Reshape", ["zero", "shape"], "point"),
        *(node("Add", ["point", f"{name} told"], name) for name in outputs),
        message(2, "constant"),
        tensor("zeros", np.zeros((3, 1), np.float32)),
        tensor("shape", np.array([1, 1, 1], np.int64)),
        *(tensor(f"{name} told", out.astype(np.float32)) for name, out in outputs.items()),
        value(11, "images", shape),
        *(value(12, name, out.shape) for name, out in outputs.items()),
    ]
    return number(1, 8) + message(8, number(2, 13)) + message(7, *graph)

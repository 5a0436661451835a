"""Small ONNX files in the forms that the scores of videos read, for tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Shape = Sequence[int | str]


def write(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, Shape],
    outputs: Mapping[str, Shape],
    constants: Mapping[str, Any],
    *,
    whole: bool = False,
) -> Path:
    """A file with a graph; its inputs are float32, or int64 if `whole`."""
    kind = TensorProto.INT64 if whole else TensorProto.FLOAT
    graph = helper.make_graph(
        list(nodes),
        "graph",
        [helper.make_tensor_value_info(name, kind, shape) for name, shape in inputs.items()],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
            for name, shape in outputs.items()
        ],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)
    return path


def colour_embedder(path: Path, side: int = 112) -> Path:
    """Pictures [n, 3, s, s] to the mean of each colour, [n, 3]."""
    node = helper.make_node("ReduceMean", ["x"], ["y"], axes=[2, 3], keepdims=0)
    return write(path, [node], {"x": ["n", 3, side, side]}, {"y": ["n", 3]}, {})


def red_detector(path: Path) -> Path:
    """In the form of YuNet: a face of 64 x 64 pixels in each cell of 32 x 32 that is all red.

    Its points are those of a cross around the cell's corner.
    """
    points = np.array([(-1, -1), (1, -1), (0, 0), (-1, 1), (1, 1)], np.float32).reshape(1, 1, 10)
    constants: dict[str, Any] = {
        "red": np.array([-0.5, -0.5, 1], np.float32).reshape(1, 3, 1, 1) / 255,
        "low": np.float32(0),
        "high": np.float32(1),
        "as_cells": np.array([1, 400, 1], np.int64),
        "bbox_32": np.full((1, 400, 4), np.log(2), np.float32) * [0, 0, 1, 1],
        "kps_32": np.tile(points, (1, 400, 1)),
    }
    constants["bbox_32"] = constants["bbox_32"].astype(np.float32)
    for stride, cells in ((8, 6400), (16, 1600)):
        for head, size in (("cls", 1), ("obj", 1), ("bbox", 4), ("kps", 10)):
            constants[f"{head}_{stride}"] = np.zeros((1, cells, size), np.float32)
    nodes = [
        helper.make_node("Conv", ["input", "red"], ["redness"]),
        helper.make_node(
            "AveragePool", ["redness"], ["mean"], kernel_shape=[32, 32], strides=[32, 32]
        ),
        helper.make_node("Clip", ["mean", "low", "high"], ["clipped"]),
        helper.make_node("Reshape", ["clipped", "as_cells"], ["found"]),
    ]
    outputs = {}
    for stride, cells in ((8, 6400), (16, 1600), (32, 400)):
        for head, size in (("cls", 1), ("obj", 1), ("bbox", 4), ("kps", 10)):
            name = f"{head}_{stride}"
            source = "found" if name in ("cls_32", "obj_32") else name
            if source == name:
                constants[f"{name}_value"] = constants.pop(name)
                source = f"{name}_value"
            nodes.append(helper.make_node("Identity", [source], [name]))
            outputs[name] = [1, cells, size]
    return write(path, nodes, {"input": [1, 3, 640, 640]}, outputs, constants)

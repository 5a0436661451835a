"""Where arrays live: one mesh with named axes, and a table that places every parameter on it.

    data    the batch is split, the weights are copied
    fsdp    the batch is split, and so are weights, optimiser state and EMA (ZeRO stage 3, arXiv
            1910.02054)
    seq     the tokens of a frame are split; in attention the heads are (DeepSpeed-Ulysses, arXiv
            2309.14509): for clips whose activations do not fit one device
    tensor  heads and hidden channels are split (Megatron-LM, arXiv 1909.08053)

In the VAE, which has no tokens and no heads, seq and tensor both split the rows of the frames.

A single device is the mesh (1, 1, 1, 1): there is no other code path. Parameters and batches are
placed by the caller. Networks say how activations are split, with `constrain` and `per_device`;
these act while a mesh is set (`activations_over`), and do nothing else. A rule says what would be
split; an array axis that the mesh axis does not divide stays whole, because a few odd-shaped
parameters must not forbid a mesh.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from chameleon_jax.errors import UserError

AXES = ("data", "fsdp", "seq", "tensor")
SAMPLES = ("data", "fsdp")  # the axes over which a batch is split
BATCH = PartitionSpec(SAMPLES)  # the leading axis of everything in a batch
TOKENS = PartitionSpec(SAMPLES, None, "seq")  # [b, f, p, m]: the tokens of each frame
TOKENS_OF_HEADS = PartitionSpec(SAMPLES, None, "seq", "tensor")  # [b, f, p, n, d]
HEADS = PartitionSpec(SAMPLES, None, None, ("seq", "tensor"))  # [b, f, p, n, d]
ROWS = PartitionSpec(SAMPLES, None, ("seq", "tensor"))  # [b, t, h, w, c]
SEQUENCE_HEADS = PartitionSpec(SAMPLES, None, ("seq", "tensor"))  # [b, l, n, d]
HEADS_SEQUENCE = PartitionSpec(SAMPLES, ("seq", "tensor"))  # [b, n, s, d]
SEQUENCE_TENSOR = PartitionSpec(SAMPLES, None, "tensor")  # [b, s, n, d]
LARGEST = "largest"  # the rule that splits the largest axis that fsdp divides
MIN_SIZE = 4096  # smaller parameters are kept whole: sending them around costs more than they take

# First match wins. Kernels are [in, out]: the tensor axis splits what a head or a hidden channel
# owns, so that one all-reduce after `o` and after the last layer of the feed-forward is all that it
# costs.
RULES: tuple[tuple[str, PartitionSpec | str], ...] = (
    (r"attn\.(q|k|v)\.kernel$", PartitionSpec("fsdp", "tensor")),
    (r"attn\.(q|k|v)\.bias$", PartitionSpec("tensor")),
    (r"attn\.o\.kernel$", PartitionSpec("tensor", "fsdp")),
    (r"ffn\.(fc1|gate|up)\.kernel$", PartitionSpec("fsdp", "tensor")),
    (r"ffn\.(fc1|gate|up)\.bias$", PartitionSpec("tensor")),
    (r"ffn\.(fc2|down)\.kernel$", PartitionSpec("tensor", "fsdp")),
    # Scales of an 8-bit kernel (weights/quantize.py) are split as its output channels are.
    (r"(attn\.(q|k|v)|ffn\.(fc1|gate|up))\.kernel_scale$", PartitionSpec("tensor")),
    (r"(attn\.o|ffn\.(fc2|down))\.kernel_scale$", PartitionSpec("fsdp")),
    # A LoRA is split as its kernel is; between its two matrices are r channels, which stay whole
    # unless nothing else can be split over fsdp.
    (r"(attn\.(q|k|v)|ffn\.(fc1|gate|up))\.lora_a$", PartitionSpec("fsdp", None)),
    (r"(attn\.(q|k|v)|ffn\.(fc1|gate|up))\.lora_b$", PartitionSpec("fsdp", "tensor")),
    (r"(attn\.o|ffn\.(fc2|down))\.lora_a$", PartitionSpec("tensor", "fsdp")),
    (r"(attn\.o|ffn\.(fc2|down))\.lora_b$", PartitionSpec(None, "fsdp")),
    (r".*", LARGEST),
)


class MeshError(UserError):
    """The mesh does not fit the devices or the batch. The message is one line."""


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices.

    Args:
      sizes: size of each of `AXES`, 1 if it is not named; at most one is -1: it takes what is left.
      devices: default all devices of all processes.

    Raises:
      MeshError: unknown axes, sizes whose product is not the number of devices, or see `in_order`.
    """
    devices = jax.devices() if devices is None else list(devices)
    if not set(sizes) <= set(AXES):
        raise MeshError(f"mesh has the axes {sorted(sizes)}; expected {', '.join(AXES)}")
    shape = [int(sizes.get(axis, 1)) for axis in AXES]
    known = math.prod(n for n in shape if n != -1)
    if shape.count(-1) > 1 or known < 1 or min(shape) < -1:
        found = dict(zip(AXES, shape, strict=True))
        raise MeshError(f"mesh sizes {found}; expected positive numbers and at most one -1")
    if -1 in shape and len(devices) % known == 0:
        shape[shape.index(-1)] = len(devices) // known
    if math.prod(shape) != len(devices):
        raise MeshError(
            f"mesh {dict(zip(AXES, shape, strict=True))} does not fit {len(devices)} devices"
        )
    if len(devices) < len(jax.devices()):
        return Mesh(np.array(devices).reshape(shape), AXES)
    return Mesh(in_order(shape, devices), AXES)


def in_order(shape: Sequence[int], devices: Sequence[jax.Device]) -> np.ndarray:
    """Devices as an array of this shape, in an order that suits what joins them.

    Neighbours on a TPU's torus become neighbours along an axis; an axis of the mesh may take a part
    of an axis of the torus. Slices of TPUs, which only a network joins, lie along data, or else
    along fsdp. GPUs keep their order, hosts outermost.

    Args:
      shape: size of each of `AXES`.
      devices: as many as the shape has places.

    Raises:
      MeshError: neither data nor fsdp is a multiple of the number of slices.
    """
    split = {"allow_split_physical_axes": True}
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if devices[0].platform != "tpu" or slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, **split)
    for axis in (AXES.index(name) for name in SAMPLES):
        if shape[axis] % slices == 0:
            outer, inner = [1] * len(shape), list(shape)
            outer[axis], inner[axis] = slices, shape[axis] // slices
            return mesh_utils.create_hybrid_device_mesh(inner, outer, devices, **split)
    raise MeshError(
        f"mesh {dict(zip(AXES, shape, strict=True))}: only a network joins the {slices} slices of"
        f" these TPUs, and samples go over it, not parts of them; make data or fsdp a multiple of"
        f" {slices}"
    )


def spec_of(
    path: str, shape: Sequence[int], mesh: Mesh, *, min_size: int = MIN_SIZE
) -> PartitionSpec:
    """Placement of the parameter at a dotted path, by the first rule of `RULES` that matches."""
    if math.prod(shape) < min_size:
        return PartitionSpec()
    rule = next(rule for pattern, rule in RULES if re.search(pattern, path))
    if rule == LARGEST:
        fit = [axis for axis, size in enumerate(shape) if size % mesh.shape["fsdp"] == 0]
        if not fit:
            return PartitionSpec()
        largest = max(fit, key=lambda axis: (shape[axis], axis))
        rule = PartitionSpec(*(["fsdp" if axis == largest else None for axis in range(len(shape))]))
    # A network that scans over its layers stacks them on a leading axis: rules speak of the
    # trailing ones.
    lead = [None] * (len(shape) - len(rule))
    if len(rule) > len(shape):
        raise MeshError(f"the rule for {path} has {len(rule)} axes, the parameter {len(shape)}")
    axes = [*lead, *rule]
    return PartitionSpec(
        *(a if a and n % mesh.shape[a] == 0 else None for a, n in zip(axes, shape, strict=True))
    )


def param_shardings(params: Any, mesh: Mesh, *, min_size: int = MIN_SIZE) -> Any:
    """Shardings of parameters, EMA or optimiser state: trees whose paths end in dotted names.

    Optimiser statistics carry the name and shape of their parameter and so land where it lies;
    scalars are replicated.
    """

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = next(
            (str(key.key) for key in reversed(path) if isinstance(key, jax.tree_util.DictKey)), ""
        )
        return NamedSharding(mesh, spec_of(name, leaf.shape, mesh, min_size=min_size))

    return jax.tree_util.tree_map_with_path(place, params)


def check_batch(size: int, mesh: Mesh) -> None:
    """Can a batch of `size` samples, over all processes, be split over the mesh?

    Raises:
      MeshError: it cannot.
    """
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if size % ways:
        raise MeshError(
            f"a batch of {size} does not divide among data x fsdp = {ways} devices; choose a"
            " multiple of it, or a smaller mesh.data or mesh.fsdp (and a larger mesh.tensor)"
        )


def check_network(heads: int, tokens: int, mesh: Mesh) -> None:
    """Can the activations of a transformer be split over the mesh?

    Args:
      heads: of its attention.
      tokens: of a latent frame.
      mesh: the mesh.

    Raises:
      MeshError: they cannot; the number to change is named.
    """
    seq, tensor = mesh.shape["seq"], mesh.shape["tensor"]
    if heads % (seq * tensor):
        raise MeshError(
            f"{heads} attention heads do not divide among seq x tensor = {seq * tensor} devices;"
            f" choose mesh.seq and mesh.tensor whose product divides {heads}"
        )
    if tokens % seq:
        raise MeshError(
            f"{tokens} tokens of a latent frame do not divide among mesh.seq = {seq}; choose a"
            f" mesh.seq that divides {tokens}"
        )


def activations_over(mesh: Mesh) -> contextlib.AbstractContextManager[Any]:
    """Split the activations of the networks over a mesh, in what is traced meanwhile.

    What is not traced stays where it is; so does what a program is made of.
    """
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def is_split() -> bool:
    """Is a mesh of several devices set, over which activations are split?"""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.axis_names == AXES and mesh.size > 1


def constrain(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    """Say how an activation is split over the mesh that is set; without one, `x` as it is."""
    return jax.lax.with_sharding_constraint(x, spec) if is_split() else x


def constrain_samples(x: jax.Array) -> jax.Array:
    """Each device keeps its own samples of [b, ...]; as it is if there are not enough for all.

    Without it the compiler may rather move activations than a kernel whose channels are split over
    the same devices: then each holds the videos of the whole batch.
    """
    if not is_split():
        return x
    shape = jax.sharding.get_abstract_mesh().shape
    devices = math.prod(shape[axis] for axis in SAMPLES)
    return x if x.shape[0] % devices else constrain(x, BATCH)


def constrain_frames(x_bthwc: jax.Array) -> jax.Array:
    """`constrain_samples` for frames, whose rows are split too if they divide."""
    spec = spec_of_frames(x_bthwc.shape)
    return x_bthwc if spec is None else constrain(x_bthwc, spec)


def constrain_columns(x_thnc: jax.Array, b: int) -> jax.Array:
    """`constrain_frames` where the columns of all `b` samples are one axis, samples outermost."""
    spec = spec_of_frames((b, *x_thnc.shape))
    if spec is None:
        return x_thnc
    rows = ROWS[2] if spec == ROWS else None
    return constrain(x_thnc, PartitionSpec(None, rows, SAMPLES))


def spec_of_frames(shape: Sequence[int]) -> PartitionSpec | None:
    """How frames [b, t, h, w, c] are split over the mesh that is set; None: not at all."""
    if not is_split():
        return None
    sizes = jax.sharding.get_abstract_mesh().shape
    if shape[0] % math.prod(sizes[axis] for axis in SAMPLES):
        return None
    return BATCH if shape[2] % (sizes["seq"] * sizes["tensor"]) else ROWS


def per_device(
    function: Callable[..., jax.Array], inputs: Sequence[PartitionSpec], output: PartitionSpec
) -> Callable[..., jax.Array]:
    """The same function on each device's own part, for kernels that the compiler cannot split.

    Args:
      function: of arrays; each part of its result depends on the same parts of its arguments.
      inputs: how the arguments are split.
      output: how the result is.

    Returns:
      `function` itself while no mesh of several devices is set.
    """
    if not is_split():
        return function
    return jax.shard_map(function, in_specs=tuple(inputs), out_specs=output, check_vma=False)


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's part of a batch to the devices, split along its leading axis.

    Raises:
      MeshError: the batch does not divide among the devices.
    """
    sharding = NamedSharding(mesh, BATCH)
    placed = {}
    for name, value in batch.items():
        check_batch(value.shape[0] * jax.process_count(), mesh)
        placed[name] = jax.make_array_from_process_local_data(sharding, np.ascontiguousarray(value))
    return placed


def to_host(tree: Any) -> Any:
    """The same tree with whole NumPy arrays, also of arrays that are spread over processes.

    With several processes all of them must call it, with the same tree.
    """

    def fetch(value: jax.Array | np.ndarray) -> np.ndarray:
        if isinstance(value, jax.Array) and not value.is_fully_addressable:
            return multihost_utils.process_allgather(value, tiled=True)
        return np.asarray(value)

    return jax.tree.map(fetch, tree)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, PartitionSpec())

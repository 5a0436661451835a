"""Low-rank changes of a transformer's linear layers: W' = W + strength alpha / r A B.

This is LoRA (Hu et al., arXiv 2106.09685). A file holds, for each changed layer, `<layer>.lora_a`
[in, r], `<layer>.lora_b` [r, out] and `<layer>.alpha`, named as the layers of the network are:
`blocks.0.self_attn.q`. The converters make it from the published layouts.

    lora = Lora.load("lora.safetensors")
    attach(dit, lora, 0.8)         kept apart: two thin products more in each layer
    detach(dit)                    takes them off again
    merge(dit, lora, 0.8)          or added to the weights: nothing more to compute, no way back
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from chameleon_jax.weights.tensors import WeightsError, all_finite, listed, read_tensors

PARTS = ("lora_a", "lora_b", "alpha")
LISTED = 10  # faults written out; a LoRA of another model has hundreds


@dataclasses.dataclass(frozen=True)
class Change:
    """What is added to one kernel [in, out]."""

    a: np.ndarray  # [in, r]
    b: np.ndarray  # [r, out]
    alpha: float  # the product counts alpha / r

    @property
    def rank(self) -> int:
        return self.a.shape[1]

    def scale(self, strength: float) -> np.float32:
        """The factor of the product, strength alpha / r.

        Raises:
          WeightsError: it is not finite in float32.
        """
        factor = strength * self.alpha / self.rank
        if not abs(factor) <= float(np.finfo(np.float32).max):
            raise WeightsError(
                f"a strength of {strength:g} with an alpha of {self.alpha:g} is not a finite"
                " factor; expected a number such as 0.8"
            )
        return np.float32(factor)

    def delta(self, strength: float) -> np.ndarray:
        """strength alpha / r A B in float32, [in, out].

        Raises:
          WeightsError: as `scale`.
        """
        return (self.a.astype(np.float32) * self.scale(strength)) @ self.b.astype(np.float32)

    def not_finite(self) -> list[str]:
        """Which of its three parts hold infinity or NaN."""
        values = {"lora_a": self.a, "lora_b": self.b, "alpha": np.float64(self.alpha)}
        return [part for part, value in values.items() if not all_finite(np.asarray(value))]


@dataclasses.dataclass(frozen=True)
class Lora:
    """Changes by the path of the layer."""

    changes: Mapping[str, Change]

    @classmethod
    def load(cls, path: str | os.PathLike) -> Lora:
        """Read a file written by the converters.

        Raises:
          WeightsError: unreadable, not a LoRA in our layout, or with numbers that are not finite.
        """
        layers: dict[str, dict[str, np.ndarray]] = {}
        faults = []
        for name, value in read_tensors(path).items():
            layer, _, part = name.rpartition(".")
            if part not in PARTS:
                faults.append(f"unexpected {name}")
            layers.setdefault(layer, {})[part] = value
        for layer, parts in layers.items():
            faults += [f"missing {layer}.{part}" for part in PARTS if part not in parts]
            if "alpha" in parts and parts["alpha"].size != 1:
                faults.append(f"{layer}.alpha has the shape {parts['alpha'].shape}, expected ()")
        if faults or not layers:
            found = listed(faults, LISTED) if faults else "it is empty"
            raise WeightsError(f"{path}: not a LoRA in this project's layout: {found}")
        changes = {}
        for layer, parts in layers.items():
            alpha = float(parts["alpha"].reshape(()))
            changes[layer] = Change(parts["lora_a"], parts["lora_b"], alpha)
        check_finite(path, changes)
        return cls(changes)


def check_finite(path: str | os.PathLike, changes: Mapping[str, Change]) -> None:
    """Raise WeightsError, with the tensors named, if a number in a LoRA is infinite or NaN."""
    names = [f"{layer}.{part}" for layer, one in changes.items() for part in one.not_finite()]
    if names:
        raise WeightsError(
            f"{path}: {listed(names, LISTED)}: not finite (infinity or NaN); its training diverged,"
            " or the file is damaged; use another LoRA"
        )


def parse_strength(text: str) -> tuple[Path, float]:
    """`file@0.8` as path and strength; 1 if none is said, or if a file has that very name.

    Raises:
      WeightsError: what stands behind the @ is no finite number.
    """
    head, at, tail = text.rpartition("@")
    if not at or os.path.exists(text):
        return Path(text), 1.0
    try:
        strength = float(tail)
    except ValueError:
        strength = math.nan
    if not math.isfinite(strength):
        raise WeightsError(f"{tail!r} is not a strength; expected a number, as in FILE@0.8")
    return Path(head), strength


def merge(module: nnx.Module, lora: Lora, strength: float = 1.0) -> None:
    """Add a LoRA to the kernels, in place; summed in float32, kept in each kernel's dtype.

    Raises:
      WeightsError: layers that the module does not have, or of another size, all of them listed;
        or a strength that is not finite. Nothing is changed then.
    """
    for _, _, linear, change in _layers(module, lora, strength):
        kernel = linear.kernel.get_value()
        total = kernel.astype(jnp.float32) + change.delta(strength)
        linear.kernel.set_value(total.astype(kernel.dtype))


def attach(module: nnx.Module, lora: Lora, strength: float = 1.0) -> None:
    """Put a LoRA beside the kernels, in place.

    The layers become `nnx.LoRALinear`, the kernels stay as they are.

    Raises:
      WeightsError: as `merge`; or a LoRA is attached already.
    """
    for parent, key, linear, change in _layers(module, lora, strength):
        if isinstance(linear, nnx.LoRALinear):
            raise WeightsError(
                "a LoRA is attached already; detach it first, or merge one of the two"
            )
        kernel = linear.kernel.get_value()
        changed = _with_lora(linear, change.rank)
        changed.kernel, changed.bias = linear.kernel, linear.bias
        b = change.b.astype(np.float32) * change.scale(strength)
        changed.lora.lora_a.set_value(jnp.asarray(change.a, kernel.dtype))
        changed.lora.lora_b.set_value(jnp.asarray(b, kernel.dtype))
        setattr(parent, key, changed)


def detach(module: nnx.Module) -> None:
    """Take off what `attach` put on, in place."""
    for _, parent in list(nnx.iter_modules(module)):
        for key, child in list(vars(parent).items()):
            if isinstance(child, nnx.LoRALinear):
                linear = _without_lora(child)
                linear.kernel, linear.bias = child.kernel, child.bias
                setattr(parent, key, linear)


def linear_layers(module: nnx.Module, within: str) -> list[str]:
    """Paths of the linear layers below `within`, e.g. "blocks", in the order of the module."""
    paths = [path for path, layer in nnx.iter_modules(module) if isinstance(layer, nnx.Linear)]
    return [".".join(map(str, path)) for path in paths if path and path[0] == within]


def open_places(module: nnx.Module, layers: Sequence[str], rank: int) -> None:
    """Give layers of an abstract module (`nnx.eval_shape`) a place for a LoRA, in place."""
    for path in layers:
        parent, key = _parent(module, path)
        linear = getattr(parent, key)
        opened = _with_lora(linear, rank)
        opened.kernel, opened.bias = linear.kernel, linear.bias
        setattr(parent, key, opened)


def _with_lora(linear: nnx.Linear, rank: int) -> nnx.LoRALinear:
    """A layer of the same sizes with a place for a LoRA; abstract."""

    def build() -> nnx.LoRALinear:
        return nnx.LoRALinear(
            *linear.kernel.get_value().shape,
            lora_rank=rank,
            use_bias=linear.bias is not None,
            dtype=linear.dtype,
            lora_dtype=linear.dtype,
            param_dtype=linear.param_dtype,
            lora_param_dtype=linear.param_dtype,
            rngs=nnx.Rngs(0),
        )

    return nnx.eval_shape(build)


def _without_lora(linear: nnx.LoRALinear) -> nnx.Linear:
    """A plain layer of the same sizes; abstract."""

    def build() -> nnx.Linear:
        return nnx.Linear(
            *linear.kernel.get_value().shape,
            use_bias=linear.bias is not None,
            dtype=linear.dtype,
            param_dtype=linear.param_dtype,
            rngs=nnx.Rngs(0),
        )

    return nnx.eval_shape(build)


def _layers(
    module: nnx.Module, lora: Lora, strength: float
) -> Iterator[tuple[Any, str, nnx.Linear, Change]]:
    """(parent, attribute, layer, change), after a check of all of them."""
    found, faults = [], []
    for path, change in lora.changes.items():
        change.scale(strength)
        try:
            parent, key = _parent(module, path)
            linear = getattr(parent, key)
            shape = tuple(linear.kernel.get_value().shape)
        except (AttributeError, IndexError, KeyError):
            faults.append(f"there is no layer {path}")
            continue
        if not jnp.issubdtype(linear.kernel.get_value().dtype, jnp.floating):
            faults.append(f"{path} is quantized; add the LoRA before")
            continue
        a, b = change.a.shape, change.b.shape
        if shape != (a[0], b[1]) or a[1] != b[0]:
            faults.append(f"{path} is {shape}, the LoRA changes {a} x {b}")
        found.append((parent, key, linear, change))
    if faults:
        raise WeightsError(f"the LoRA does not fit the network: {listed(faults, LISTED)}")
    return iter(found)


def _parent(module: nnx.Module, path: str) -> tuple[Any, str]:
    """What holds the layer at a dotted path, and the layer's name there."""
    *parents, key = path.split(".")
    parent: Any = module
    for name in parents:
        parent = parent[int(name)] if name.isdigit() else getattr(parent, name)
    return parent, key


def lora_params(module: nnx.Module) -> dict[str, jax.Array]:
    """What is attached, by path; empty after `detach`."""
    flat = nnx.to_flat_state(nnx.state(module, nnx.LoRAParam))
    return {".".join(map(str, path)): leaf.get_value() for path, leaf in flat}

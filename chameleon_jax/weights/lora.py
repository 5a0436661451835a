"""Low-rank changes of a transformer's linear layers: W' = W + strength alpha / r A B (LoRA, Hu et
al., arXiv 2106.09685).

A file holds, for each changed layer, `<layer>.lora_a` [in, r], `<layer>.lora_b` [r, out] and
`<layer>.alpha`, named as the layers of the network are: `blocks.0.self_attn.q`. The converters make
it from the published layouts.

    lora = Lora.load("lora.safetensors")
    attach(dit, lora, 0.8)         kept apart: two thin products more in each layer; detach(dit) takes them off again
    merge(dit, lora, 0.8)          or added to the weights: nothing more to compute, no way back
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from chameleon_jax.weights.tensors import WeightsError, read_tensors

PARTS = ("lora_a", "lora_b", "alpha")


@dataclasses.dataclass(frozen=True)
class Change:
    """What is added to one kernel [in, out]."""

    a: np.ndarray  # [in, r]
    b: np.ndarray  # [r, out]
    alpha: float  # the product counts alpha / r

    @property
    def rank(self) -> int:
        return self.a.shape[1]

    def delta(self, strength: float) -> np.ndarray:
        """strength alpha / r A B in float32, [in, out]."""
        scale = np.float32(strength * self.alpha / self.rank)
        return (self.a.astype(np.float32) * scale) @ self.b.astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Lora:
    """Changes by the path of the layer."""

    changes: Mapping[str, Change]

    @classmethod
    def load(cls, path: str | os.PathLike) -> Lora:
        """Read a file written by the converters.

        Raises:
          WeightsError: unreadable, or not a LoRA in our layout.
        """
        tensors = read_tensors(path)
        layers: dict[str, dict[str, np.ndarray]] = {}
        faults = []
        for name, value in tensors.items():
            layer, _, part = name.rpartition(".")
            if part not in PARTS:
                faults.append(f"unexpected {name}")
            layers.setdefault(layer, {})[part] = value
        faults += [
            f"missing {layer}.{part}"
            for layer, parts in layers.items()
            for part in PARTS
            if part not in parts
        ]
        if faults or not layers:
            raise WeightsError(
                f"{path}: not a LoRA in this project's layout:"
                f" {'; '.join(faults[:5]) or 'it is empty'}"
            )
        return cls(
            {
                layer: Change(p["lora_a"], p["lora_b"], float(p["alpha"]))
                for layer, p in layers.items()
            }
        )


def merge(module: nnx.Module, lora: Lora, strength: float = 1.0) -> None:
    """Add a LoRA to the kernels, in place; summed in float32, kept in each kernel's dtype.

    Raises:
      WeightsError: layers that the module does not have, or of another size; all are listed.
    """
    for _, _, linear, change in _layers(module, lora):
        kernel = linear.kernel.get_value()
        linear.kernel.set_value(
            (kernel.astype(jnp.float32) + change.delta(strength)).astype(kernel.dtype)
        )


def attach(module: nnx.Module, lora: Lora, strength: float = 1.0) -> None:
    """Put a LoRA beside the kernels, in place: the layers become `nnx.LoRALinear`, the kernels stay
    as they are.

    Raises:
      WeightsError: as `merge`; or a LoRA is attached already.
    """
    for parent, key, linear, change in _layers(module, lora):
        if isinstance(linear, nnx.LoRALinear):
            raise WeightsError(
                "a LoRA is attached already; detach it first, or merge one of the two"
            )
        kernel = linear.kernel.get_value()
        changed = nnx.eval_shape(
            lambda linear=linear, change=change: nnx.LoRALinear(
                *linear.kernel.get_value().shape,
                lora_rank=change.rank,
                use_bias=linear.bias is not None,
                dtype=linear.dtype,
                lora_dtype=linear.dtype,
                param_dtype=linear.param_dtype,
                lora_param_dtype=linear.param_dtype,
                rngs=nnx.Rngs(0),
            )
        )
        changed.kernel, changed.bias = linear.kernel, linear.bias
        scale = np.float32(strength * change.alpha / change.rank)
        changed.lora.lora_a.set_value(jnp.asarray(change.a, kernel.dtype))
        changed.lora.lora_b.set_value(
            jnp.asarray(change.b.astype(np.float32) * scale, kernel.dtype)
        )
        setattr(parent, key, changed)


def detach(module: nnx.Module) -> None:
    """Take off what `attach` put on, in place."""
    for _, parent in list(nnx.iter_modules(module)):
        for key, child in list(vars(parent).items()):
            if isinstance(child, nnx.LoRALinear):
                linear = nnx.eval_shape(
                    lambda child=child: nnx.Linear(
                        *child.kernel.get_value().shape,
                        use_bias=child.bias is not None,
                        dtype=child.dtype,
                        param_dtype=child.param_dtype,
                        rngs=nnx.Rngs(0),
                    )
                )
                linear.kernel, linear.bias = child.kernel, child.bias
                setattr(parent, key, linear)


def _layers(module: nnx.Module, lora: Lora) -> Iterator[tuple[Any, str, nnx.Linear, Change]]:
    """(parent, attribute, layer, change), after a check of all of them."""
    found, faults = [], []
    for path, change in lora.changes.items():
        *parents, key = path.split(".")
        try:
            parent: Any = module
            for name in parents:
                parent = parent[int(name)] if name.isdigit() else getattr(parent, name)
            linear = getattr(parent, key)
            shape = tuple(linear.kernel.get_value().shape)
        except (AttributeError, IndexError, KeyError):
            faults.append(f"there is no layer {path}")
            continue
        if (
            shape != (change.a.shape[0], change.b.shape[1])
            or change.a.shape[1] != change.b.shape[0]
        ):
            faults.append(
                f"{path} is {shape}, the LoRA changes {change.a.shape} x {change.b.shape}"
            )
        found.append((parent, key, linear, change))
    if faults:
        more = f" and {len(faults) - 10} more" if len(faults) > 10 else ""
        raise WeightsError(f"the LoRA does not fit the network: {'; '.join(faults[:10])}{more}")
    return iter(found)


def lora_params(module: nnx.Module) -> dict[str, jax.Array]:
    """What is attached, by path; empty after `detach`."""
    flat = nnx.to_flat_state(nnx.state(module, nnx.LoRAParam))
    return {".".join(map(str, path)): leaf.get_value() for path, leaf in flat}

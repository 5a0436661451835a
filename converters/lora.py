"""LoRAs for the Wan transformer, in the four ways in which they are named.

    peft       base_model.model.blocks.0.self_attn.q.lora_A.weight          alpha in adapter_config.json
    diffusers  transformer.blocks.0.attn1.to_q.lora_A.weight                alpha in the header
    official   diffusion_model.blocks.0.self_attn.q.lora_A.weight           alpha as a tensor
    kohya      lora_unet_blocks_0_self_attn_q.lora_down.weight              alpha as a tensor

Prefixes, `lora_down` for `lora_A` and `lora_up` for `lora_B` are mixed freely in the wild: all
mixtures are read. Where no alpha is given, it is the rank: the product counts once.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from chameleon_jax.weights.lora import Change, Lora
from chameleon_jax.weights.tensors import ArrayTensor, Entry, WeightsError, read_metadata
from converters.dit import DIFFUSERS_RULES, OFFICIAL_RULES
from converters.layouts import OURS
from converters.rules import LINEAR, ConversionError, Rule, rename
from converters.writing import OutFile

METADATA = (
    "lora_adapter_metadata"  # key in the header under which diffusers keeps the adapter's settings
)
ENDS = {
    ".lora_A.weight": "A",
    ".lora_A.default.weight": "A",
    ".lora_down.weight": "A",
    ".lora.down.weight": "A",
    ".lora_B.weight": "B",
    ".lora_B.default.weight": "B",
    ".lora_up.weight": "B",
    ".lora.up.weight": "B",
    ".alpha": "alpha",
}
FILES = {
    OURS: "lora.safetensors",
    "diffusers": "pytorch_lora_weights.safetensors",
    "official": "lora.safetensors",
    "kohya": "lora.safetensors",
    "peft": "adapter_model.safetensors",
}
PREFIX = {
    "peft": "base_model.model.",
    "diffusers": "transformer.",
    "official": "diffusion_model.",
    "kohya": "lora_unet_",
}
PREFIXES = (
    "base_model.model.",
    "diffusion_model.",
    "transformer.",
    "lora_unet_",
    "lora_transformer_",
    "model.",
)
OTHER_KINDS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "hada_w1_a": "LoHa",
    "lokr_w1": "LoKr",
    "oft_blocks": "OFT",
    ".diff": "full differences",
    ".diff_b": "full differences",
}


@dataclasses.dataclass(frozen=True)
class LoraNetwork:
    """Stands where a `Network` stands for other parts."""

    name: str = "lora"
    title: str = "LoRA for the Wan transformer"


@dataclasses.dataclass(frozen=True)
class LoraPart:
    """A LoRA found in a file: changes by our layer names, in the file's own dtype."""

    changes: Mapping[str, Change]
    layout: str
    path: Path
    evidence: str
    network: LoraNetwork = LoraNetwork()

    def describe(self) -> str:
        """One line for people."""
        ranks = sorted({change.rank for change in self.changes.values()})
        kinds = sorted({change.a.dtype.name for change in self.changes.values()})
        return (
            f"{self.path}: {self.network.title}, {self.layout} naming ({self.evidence});"
            f" {len(self.changes)} layers, rank"
            f" {', '.join(map(str, ranks))}, {', '.join(kinds)}"
        )


def parse_strength(text: str) -> tuple[Path, float]:
    """`file@0.8` as path and strength; 1 if none is said, or if a file has that very name.

    Raises:
      ValueError: what stands behind the @ is no number.
    """
    head, at, tail = text.rpartition("@")
    if not at or Path(text).exists():
        return Path(text), 1.0
    try:
        return Path(head), float(tail)
    except ValueError:
        raise ValueError(f"{tail!r} is not a strength; expected FILE@0.8") from None


def looks_like_lora(names: Iterable[str]) -> bool:
    """Do the names speak of low-rank changes, or of their relatives?"""
    marks = (
        *(end.removesuffix(".weight") for end in ENDS if end != ".alpha"),
        ".lora_a",
        *OTHER_KINDS,
    )
    return any(mark in name for name in names for mark in marks if mark not in (".diff", ".diff_b"))


def module_rules(layout: str) -> list[Rule]:
    """Names of the layers in a layout, without its prefix, and ours: every linear layer of the
    transformer.
    """
    table = DIFFUSERS_RULES if layout == "diffusers" else OFFICIAL_RULES
    rows = [
        (r.source.removesuffix(".weight"), r.target.removesuffix(".kernel"))
        for r in table
        if r.transform is LINEAR
    ]
    return [
        Rule(source.replace(".", "_") if layout == "kohya" else source, target)
        for source, target in rows
    ]


def recognise(path: Path, tensors: Mapping[str, Any], part: str | None = None) -> LoraPart:
    """Read a LoRA; see the top of this file for what is understood.

    Args:
      path: where it lies, for messages and for the settings beside it.
      tensors: by name.
      part: of a training checkpoint that holds several, "generator" (the default) or "critic".

    Raises:
      ConversionError: names that belong to no layer, halves without their other half, ranks that
        disagree; all listed.
      WeightsError: another kind of low-rank change.
    """
    kinds = {
        kind
        for mark, kind in OTHER_KINDS.items()
        for name in tensors
        if name.endswith(mark) or f"{mark}." in name
    }
    if kinds:
        raise WeightsError(
            f"{path}: this is {', '.join(sorted(kinds))}; only plain LoRA (A and B) is read"
        )
    tensors = _one_part(path, tensors, part)
    evidence = f"{len(tensors)} names"
    if any(name.endswith(".lora_a") for name in tensors):
        return LoraPart(Lora.load(path).changes, "jax", path, evidence)
    modules: dict[str, dict[str, np.ndarray]] = {}
    faults = []
    for raw, tensor in tensors.items():
        name = _normalised(raw)
        module, part = next(
            ((name.removesuffix(end), key) for end, key in ENDS.items() if name.endswith(end)),
            (name, ""),
        )
        if not part:
            faults.append(f"unexpected: {raw}")
        elif part in modules.setdefault(module, {}):
            faults.append(f"matched twice: {module}, the second time by {raw}")
        else:
            modules[module][part] = tensor.array()
    layout = _layout(tensors, modules)
    mapping, unknown = rename(modules, module_rules(layout))
    faults += unknown
    settings = _settings(path)
    changes = {}
    for module, (layer, _) in mapping.items():
        parts = modules[module]
        faults += [f"missing: {module}.lora_{half}" for half in "AB" if half not in parts]
        a, b = parts.get("A"), parts.get("B")
        if a is None or b is None:
            continue
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            faults.append(
                f"wrong shape: {module} is {b.shape} x {a.shape}; expected [out, r] x [r, in]"
            )
            continue
        alpha = float(parts["alpha"]) if "alpha" in parts else _alpha(settings, module, a.shape[0])
        changes[layer] = Change(np.ascontiguousarray(a.T), np.ascontiguousarray(b.T), alpha)
    if faults or not changes:
        lines = "\n  ".join(sorted(faults)[:50])
        raise ConversionError(
            f"{path}: the LoRA does not fit the Wan transformer ({len(faults)} faults):\n  {lines}"
        )
    return LoraPart(
        dict(sorted(changes.items(), key=lambda item: _natural(item[0]))), layout, path, evidence
    )


def _one_part(path: Path, tensors: Mapping[str, Any], part: str | None) -> Mapping[str, Any]:
    """Those of one network, where a training checkpoint keeps several: "generator_lora.",
    "critic_lora.".
    """
    parts = sorted({name.split(".")[0] for name in tensors if name.split(".")[0].endswith("_lora")})
    if not parts:
        return tensors
    wanted = f"{(part or 'generator').removesuffix('_lora')}_lora"
    if wanted not in parts:
        raise WeightsError(f"{path}: no part {wanted!r}; it has {', '.join(parts)}")
    return {
        name.removeprefix(f"{wanted}."): x
        for name, x in tensors.items()
        if name.startswith(f"{wanted}.")
    }


def out_file(part: LoraPart, to: str, dtype: np.dtype | None) -> OutFile:
    """The file of a LoRA in a layout.

    Raises:
      ConversionError: a LoRA has no such layout.
    """
    if to not in FILES:
        raise ConversionError(f"a LoRA has no layout {to!r}; it is known in {', '.join(FILES)}")
    tensors, metadata = to_layout(part.changes, to)
    entries = []
    for name, value in tensors.items():
        kind = value.dtype if dtype is None or name.endswith(".alpha") else np.dtype(dtype)
        entries.append(Entry(name, value.shape, kind, ArrayTensor(value).read))
    return OutFile(FILES[to], tuple(entries), metadata)


def out_texts(part: LoraPart, to: str) -> dict[str, str]:
    """The small files beside it, by name."""
    if to != "peft":
        return {}
    settings = {"peft_type": "LORA"} | adapter_config(part.changes, to)
    return {"adapter_config.json": json.dumps(settings, indent=2) + "\n"}


def to_layout(
    changes: Mapping[str, Change], layout: str
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Tensors by name in a layout, and the metadata of the file's header.

    Args:
      changes: by layer.
      layout: "jax", "peft", "diffusers", "official" or "kohya".
    """
    tensors: dict[str, np.ndarray] = {}
    if layout == "jax":
        for layer, change in changes.items():
            tensors |= {f"{layer}.lora_a": change.a, f"{layer}.lora_b": change.b}
            tensors[f"{layer}.alpha"] = np.float32(change.alpha).reshape(())
        return tensors, {}
    a, b = ("lora_down", "lora_up") if layout == "kohya" else ("lora_A", "lora_B")
    names = _module_names(changes, layout)
    for layer, change in changes.items():
        name = PREFIX[layout] + names[layer]
        tensors |= {f"{name}.{a}.weight": change.a.T, f"{name}.{b}.weight": change.b.T}
        if layout in ("official", "kohya"):
            tensors[f"{name}.alpha"] = np.float32(change.alpha).reshape(())
    metadata = {"format": "pt"}
    if layout == "diffusers":
        settings = {
            f"transformer.{key}": value for key, value in adapter_config(changes, layout).items()
        }
        metadata[METADATA] = json.dumps(settings, indent=2, sort_keys=True)
    return tensors, metadata


def adapter_config(changes: Mapping[str, Change], layout: str) -> dict[str, Any]:
    """The settings that PEFT needs to know beside the tensors."""
    names = _module_names(changes, layout)
    ranks = {names[layer]: change.rank for layer, change in changes.items()}
    alphas = {names[layer]: _whole(change.alpha) for layer, change in changes.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(ranks),
        "bias": "none",
        "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
    }


def _module_names(layers: Iterable[str], layout: str) -> dict[str, str]:
    """Name of each layer's module in a layout."""
    mapping, faults = rename(
        layers, [Rule(rule.target, rule.source) for rule in module_rules(layout)]
    )
    if faults:
        raise ConversionError(f"not layers of the Wan transformer: {'; '.join(faults[:10])}")
    return {layer: target for layer, (target, _) in mapping.items()}


def _normalised(name: str) -> str:
    while prefix := next((prefix for prefix in PREFIXES if name.startswith(prefix)), ""):
        name = name.removeprefix(prefix)
    return name


def _layout(names: Iterable[str], modules: Iterable[str]) -> str:
    """Which naming: kohya's by its prefix, the others by which table knows more."""
    if any(name.startswith(("lora_unet_", "lora_transformer_")) for name in names):
        return "kohya"
    known = {
        layout: len(rename(modules, module_rules(layout))[0])
        for layout in ("official", "diffusers")
    }
    if known["diffusers"] > known["official"]:
        return "diffusers"
    return "peft" if any("base_model.model." in name for name in names) else "official"


def _settings(path: Path) -> dict[str, Any]:
    """PEFT's settings of the adapter: of the file beside, or of the header; {} without any."""
    beside = path.parent / "adapter_config.json"
    try:
        if beside.is_file():
            return json.loads(beside.read_text(encoding="utf-8"))
        if path.suffix == ".safetensors":
            stored = json.loads(read_metadata(path).get(METADATA, "{}"))
            return {key.removeprefix("transformer."): value for key, value in stored.items()}
    except (ValueError, AttributeError) as error:
        raise WeightsError(f"{path}: unreadable settings of the adapter ({error})") from None
    return {}


def _alpha(settings: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha of a module, such that the product counts alpha / rank."""
    alpha = settings.get("lora_alpha", rank)
    for pattern, value in (settings.get("alpha_pattern") or {}).items():
        if re.search(rf"(^|\.){pattern}$", module):
            alpha = value
    return float(alpha) * rank**0.5 if settings.get("use_rslora") else float(alpha)


def _whole(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value


def _natural(name: str) -> list[Any]:
    """A key that sorts block 10 behind block 9."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]

"""LoRAs for the Wan transformer, in the four ways in which they are named.

    peft       base_model.model.blocks.0.self_attn.q.lora_A.weight    alpha in adapter_config.json
    diffusers  transformer.blocks.0.attn1.to_q.lora_A.weight          alpha in the header
    official   diffusion_model.blocks.0.self_attn.q.lora_A.weight     alpha as a tensor
    kohya      lora_unet_blocks_0_self_attn_q.lora_down.weight        alpha as a tensor

Trainers mix these freely, with more prefixes, with dots in kohya's names, with the adapter's name
behind `lora_A`: all mixtures are read. Where no alpha is given, it is the rank: the product counts
once.
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

from chameleon_jax.weights.lora import Change, Lora, check_finite
from chameleon_jax.weights.tensors import ArrayTensor, Entry, WeightsError, read_metadata
from converters.dit import DIFFUSERS_RULES, OFFICIAL_RULES
from converters.layouts import OURS
from converters.rules import LINEAR, ConversionError, Rule, rename, wrong_dtypes
from converters.writing import OutFile

METADATA = "lora_adapter_metadata"  # in the header: where diffusers keeps the adapter's settings
HALF = re.compile(
    r"(?P<module>.+)\."
    r"(?P<half>lora_A|lora_B|lora_down|lora_up|lora(?:_linear_layer)?\.(?:down|up))"
    r"(?:(?:\.(?P<adapter>[^.]+))?\.weight)?"
)
ALPHA = re.compile(r"(?P<module>.+)\.alpha")
FIRST = ("lora_A", "lora_down", "lora.down", "lora_linear_layer.down")  # the half [r, in]
FILES = {
    OURS: "lora.safetensors",
    "diffusers": "pytorch_lora_weights.safetensors",
    "official": "lora.safetensors",
    "kohya": "lora.safetensors",
    "peft": "adapter_model.safetensors",
}
PREFIX = {  # as we write it
    "peft": "base_model.model.",
    "diffusers": "transformer.",
    "official": "diffusion_model.",
    "kohya": "lora_unet_",
}
# What trainers put before the name of a layer, once or several of them, with dots or underscores.
PREFIXES = (
    "base_model_",
    "diffusion_model_",
    "transformer_",
    "model_",
    "unet_",
    "pipe_",
    "dit_",
    "lora_",
    "lycoris_",
)
KOHYA = ("lora_unet_", "lora_transformer_", "lycoris_")  # marks of names with underscores
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
    group: str = "lora"

    def describe(self) -> str:
        """One line for people."""
        ranks = sorted({change.rank for change in self.changes.values()})
        kinds = sorted({change.a.dtype.name for change in self.changes.values()})
        return (
            f"{self.path}: {self.network.title}, {self.layout} naming ({self.evidence});"
            f" {len(self.changes)} layers, rank"
            f" {', '.join(map(str, ranks))}, {', '.join(kinds)}"
        )


def looks_like_lora(names: Iterable[str]) -> bool:
    """Are there low-rank changes among the names, or their relatives?"""
    return any(map(_is_of_lora, names))


def _is_of_lora(name: str) -> bool:
    if HALF.fullmatch(name) or name.endswith(".lora_a"):
        return True
    marks = [mark for mark in OTHER_KINDS if mark not in (".diff", ".diff_b")]
    return any(mark in name for mark in marks)


def module_rules(layout: str) -> list[Rule]:
    """Names of the layers in a layout, without its prefix, and ours: every linear layer."""
    rules = []
    for rule in DIFFUSERS_RULES if layout == "diffusers" else OFFICIAL_RULES:
        if rule.transform is not LINEAR:
            continue
        source = rule.source.removesuffix(".weight")
        if layout == "kohya":
            source = source.replace(".", "_")
        rules.append(Rule(source, rule.target.removesuffix(".kernel")))
    return rules


def recognise(path: Path, tensors: Mapping[str, Any], part: str | None = None) -> LoraPart:
    """Read a LoRA; see the top of this file for what is understood.

    Args:
      path: where it lies, for messages and for the settings beside it.
      tensors: by name.
      part: of a training checkpoint that holds several, "generator" (the default) or "critic"; of
        a file with several adapters, the name of one.

    Raises:
      ConversionError: names that belong to no layer, halves without their other half, ranks that
        disagree; all listed.
      WeightsError: another kind of low-rank change, several adapters, numbers that are not finite.
    """
    kinds = set()
    for mark, kind in OTHER_KINDS.items():
        if any(name.endswith(mark) or f"{mark}." in name for name in tensors):
            kinds.add(kind)
    if kinds:
        raise WeightsError(
            f"{path}: this is {', '.join(sorted(kinds))}; only plain LoRA (A and B) is read"
        )
    tensors = _one_part(path, tensors, part)
    evidence = f"{len(tensors)} names"
    if any(name.endswith(".lora_a") for name in tensors):
        return LoraPart(Lora.load(path).changes, OURS, path, evidence)
    modules, faults = _modules(_one_adapter(path, tensors, part))
    layout, layers = _layers(tensors, modules)
    faults += [f"unexpected: {module}" for module in modules if module not in layers]
    settings = _settings(path)
    changes = {}
    for module, layer in layers.items():
        found = _faults(module, modules[module])
        if layer in changes:
            found.append(f"matched twice: {layer}, the second time by {module}")
        faults += found
        if not found:
            changes[layer] = _change(path, module, modules[module], settings)
    if faults or not changes:
        lines = "\n  ".join(sorted(faults)[:50])
        raise ConversionError(
            f"{path}: the LoRA does not fit the Wan transformer ({len(faults)} faults):\n  {lines}"
        )
    check_finite(path, changes)
    ordered = dict(sorted(changes.items(), key=lambda item: _natural(item[0])))
    return LoraPart(ordered, layout, path, evidence)


def _one_adapter(path: Path, tensors: Mapping[str, Any], part: str | None) -> Mapping[str, Any]:
    """Those of one adapter, where PEFT kept several in a file."""
    adapters = {}
    for name in tensors:
        match = HALF.fullmatch(name)
        adapters[name] = match["adapter"] if match else None
    several = sorted(set(adapters.values()) - {None})
    if len(several) < 2:
        return tensors
    if part not in several:
        raise WeightsError(
            f"{path}: holds several adapters: {', '.join(several)}; convert one with --part NAME"
        )
    return {name: x for name, x in tensors.items() if adapters[name] in (None, part)}


def _modules(tensors: Mapping[str, Any]) -> tuple[dict[str, dict[str, np.ndarray]], list[str]]:
    """The parts A, B and alpha of every layer, by the layer's name in the file; and faults."""
    modules: dict[str, dict[str, np.ndarray]] = {}
    faults = wrong_dtypes(tensors)
    for name, tensor in tensors.items():
        match = HALF.fullmatch(name) or ALPHA.fullmatch(name)
        if not match:
            faults.append(f"unexpected: {name}")
            continue
        half = match.groupdict().get("half")
        part = "alpha" if half is None else "A" if half in FIRST else "B"
        parts = modules.setdefault(match["module"], {})
        if part in parts:
            faults.append(f"matched twice: {match['module']}, the second time by {name}")
        parts[part] = tensor.array()
    return modules, faults


def _layers(names: Iterable[str], modules: Iterable[str]) -> tuple[str, dict[str, str]]:
    """Which naming it is, and our layer of each module that the naming knows."""
    plain = {module: _without_prefixes(module) for module in modules}
    known = {}
    for layout in ("official", "diffusers"):
        rules = [Rule(rule.source.replace(".", "_"), rule.target) for rule in module_rules(layout)]
        known[layout] = rename(set(plain.values()), rules)[0]
    layout = "official"
    if len(known["diffusers"]) > len(known["official"]):
        layout = "diffusers"
    layers = {
        module: known[layout][name][0] for module, name in plain.items() if name in known[layout]
    }
    names = list(names)
    if any(name.startswith(KOHYA) for name in names):
        return "kohya", layers
    if layout == "official" and any("base_model.model." in name for name in names):
        return "peft", layers
    return layout, layers


def _without_prefixes(module: str) -> str:
    """The name with underscores for dots, and without anything before the layer's own name."""
    name = module.replace(".", "_")
    prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
    while prefix is not None:
        name = name.removeprefix(prefix)
        prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
    return name


def _faults(module: str, parts: Mapping[str, np.ndarray]) -> list[str]:
    """What is wrong with the parts of one layer."""
    faults = [f"missing: {module}.lora_{half}" for half in "AB" if half not in parts]
    if faults:
        return faults
    a, b = parts["A"], parts["B"]
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
        faults.append(
            f"wrong shape: {module} is {b.shape} x {a.shape}; expected [out, r] x [r, in]"
        )
    if "alpha" in parts and parts["alpha"].size != 1:
        faults.append(f"wrong shape: {module}.alpha is {parts['alpha'].shape}; expected one number")
    return faults


def _change(
    path: Path, module: str, parts: Mapping[str, np.ndarray], settings: Mapping[str, Any]
) -> Change:
    a, b = parts["A"], parts["B"]
    if "alpha" in parts:
        alpha = float(parts["alpha"].reshape(()))
    else:
        alpha = _alpha(path, settings, module, a.shape[0])
    return Change(np.ascontiguousarray(a.T), np.ascontiguousarray(b.T), alpha)


def _one_part(path: Path, tensors: Mapping[str, Any], part: str | None) -> Mapping[str, Any]:
    """Those of one network, where a training checkpoint keeps several.

    They stand behind "generator_lora." and "critic_lora.".
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


def _settings(path: Path) -> dict[str, Any]:
    """PEFT's settings of the adapter: of the file beside, or of the header; {} without any."""
    beside, settings = path.parent / "adapter_config.json", {}
    try:
        if beside.is_file():
            settings = dict(json.loads(beside.read_text(encoding="utf-8")))
        elif path.suffix == ".safetensors":
            stored = dict(json.loads(read_metadata(path).get(METADATA, "{}")))
            settings = {key.removeprefix("transformer."): value for key, value in stored.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise WeightsError(f"{path}: unreadable settings of the adapter ({error})") from None
    return settings


def _alpha(path: Path, settings: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha of a module, such that the product counts alpha / rank."""
    alpha = settings.get("lora_alpha", rank)
    try:
        for pattern, value in (settings.get("alpha_pattern") or {}).items():
            if re.search(rf"(^|\.){pattern}$", module):
                alpha = value
        alpha = float(alpha)
    except (re.error, TypeError, ValueError, AttributeError) as error:
        raise WeightsError(
            f"{path}: the settings of the adapter give no alpha for {module} ({error})"
        ) from None
    return alpha * rank**0.5 if settings.get("use_rslora") else alpha


def _whole(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value


def _natural(name: str) -> list[Any]:
    """A key that sorts block 10 behind block 9."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]

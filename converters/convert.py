"""From recognised networks to a folder in another layout, planned whole.

Nothing is written before every tensor has its place: see `writing` for what happens then.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from chameleon_jax.diffusion import wan22
from chameleon_jax.weights.lora import Change
from chameleon_jax.weights.tensors import INDEX_SUFFIX, Entry, WeightsError
from converters import companions, lora, sidecar
from converters.dit import DIT
from converters.families import PIPELINE
from converters.identify import Part, RecognitionError, identify, layout_of
from converters.layouts import OURS, TRAINING, Layout
from converters.rules import IDENTITY, ConversionError, Transform, invert, plan, shapes_in
from converters.sidecar import Sidecar
from converters.taehv import TAEHV
from converters.text import TEXT
from converters.writing import Folder, OutFile

SHARD = 5 * 10**9  # bytes of a shard in the public layouts, as Hugging Face cuts them


@dataclasses.dataclass(frozen=True)
class Merge:
    """A LoRA to be added to the transformer."""

    part: lora.LoraPart
    strength: float


def prepare(
    parts: Sequence[Part | lora.LoraPart],
    to: str,
    *,
    dtype: np.dtype | None = None,
    merges: Sequence[Merge] = (),
    label: str = "generator",
) -> tuple[Folder, list[str]]:
    """Work out every file from headers alone.

    Args:
      parts: from `recognise`.
      to: one of LAYOUTS.
      dtype: cast the weights to it; None keeps every tensor as it is, bit for bit.
      merges: added to the transformer.
      label: under which the "training" layout keeps it.

    Returns:
      The folder, and remarks for the user.

    Raises:
      ConversionError: tensors that do not fit; all of them are listed, of all networks.
      RecognitionError: a layout that a network does not have, a LoRA without a transformer.
    """
    if merges and not any(part.network is DIT for part in parts):
        raise RecognitionError("--lora: there is no transformer among the inputs to add it to")
    planned: list[_Planned] = []
    faults, remarks = [], []
    if to == OURS:
        parts = with_decoder(parts)
    for part in parts:
        try:
            planned.append(_planned(part, to, dtype, merges, label))
        except (ConversionError, WeightsError) as error:
            faults.append(f"{part.path}: {error}")
    by_file: dict[str, list[str]] = {}
    for one in planned:
        by_file.setdefault(one.name, []).append(str(one.part.path))
    for name, paths in by_file.items():
        if len(paths) > 1:
            faults.append(f"{name} would hold {' and '.join(paths)}; convert them one by one")
    if faults:
        raise ConversionError("\n".join(faults))
    files, texts = [], _sidecars(planned)
    for one in planned:
        files += one.files
        texts |= one.texts
        remarks += one.remarks
    networks = {part.group: part for part in parts if isinstance(part, Part)}
    if to in companions.TOKENIZER_FOLDERS and TEXT.name in networks:
        tokenizer, remark = companions.tokenizer_files(networks[TEXT.name], to)
        texts |= tokenizer
        remarks += remark
    if to == OURS and networks:
        of_dit = [entry for one in planned if one.part.network is DIT for entry in one.entries]
        texts["config.json"] = _json(our_config(networks, of_dit, cast=dtype is not None))
    if to == "diffusers" and set(PIPELINE) <= networks.keys():
        texts |= companions.diffusers_pipeline(networks["dit"].settings)
    return Folder(tuple(files), texts), remarks


def with_decoder(parts: Sequence[Part | lora.LoraPart]) -> list[Part | lora.LoraPart]:
    """The same parts; a small decoder beside a whole pipeline gets the name that pipelines read."""
    groups = {part.group for part in parts if isinstance(part, Part)}
    if not set(PIPELINE) <= groups:
        return list(parts)

    def renamed(part: Part | lora.LoraPart) -> Part | lora.LoraPart:
        small = isinstance(part, Part) and part.network.kind == TAEHV.kind
        alone = small and part.group == part.network.name
        return dataclasses.replace(part, group="decoder") if alone else part

    return [renamed(part) for part in parts]


@dataclasses.dataclass(frozen=True)
class _Planned:
    """What is to be written of one part.

    Attributes:
      part: a network or a LoRA.
      name: its file; the files are shards of it where it is large.
      files: of tensors.
      texts: small files beside them, by path.
      beside: what the layout has no place for.
      remarks: for the user.
    """

    part: Part | lora.LoraPart
    name: str
    files: Sequence[OutFile]
    texts: Mapping[str, str]
    beside: Sidecar
    remarks: Sequence[str] = ()

    @property
    def entries(self) -> list[Entry]:
        return [entry for file in self.files for entry in file.entries]


def _planned(
    part: Part | lora.LoraPart,
    to: str,
    dtype: np.dtype | None,
    merges: Sequence[Merge],
    label: str,
) -> _Planned:
    if isinstance(part, lora.LoraPart):
        file = lora.out_file(part, to, dtype)
        return _Planned(part, file.path, [file], lora.out_texts(part, to), Sidecar())
    layout = _target(part, to)
    name = f"{part.group}.safetensors" if to == OURS else layout.file
    entries, shapes = _entries(part, to, dtype, merges if part.network is DIT else (), label)
    files, texts = cut_into_files(name, entries, sharded=to != OURS)
    if layout.about is not None:
        texts[str(Path(name).parent / "config.json")] = _json(layout.about(part.config))
    beside = Sidecar() if to == OURS else not_carried(part, to, shapes, entries)
    remarks, obstacle = [], layout.obstacle(part.config)
    if obstacle:
        remarks.append(
            f"the weights in {name} are complete, but the library of the {to} layout cannot load"
            f" this {part.network.title}: {obstacle}"
        )
    return _Planned(part, name, files, texts, beside, remarks)


def _sidecars(planned: Sequence[_Planned]) -> dict[str, str]:
    """The sidecars by path: one for all networks in a folder, where it says anything."""
    by_folder: dict[Path, list[Sidecar]] = {}
    for one in planned:
        by_folder.setdefault(Path(one.name).parent, []).append(one.beside)
    merged = {folder: sidecar.merged(found) for folder, found in by_folder.items()}
    return {
        str(folder / sidecar.NAME): one.text() for folder, one in merged.items() if one != Sidecar()
    }


def not_carried(
    part: Part, to: str, shapes: Mapping[str, tuple[int, ...]], entries: Sequence[Entry]
) -> Sidecar:
    """What of a part a public layout has no place for.

    The files are recognised from their names, shapes and config.json, as a reader will do it, and
    the config that comes out is compared with the part's, key by key.

    Args:
      part: the network.
      to: the layout.
      shapes: of all tensors, by their names in it.
      entries: what will be written.

    Raises:
      ConversionError: with the keys named, if not even a sidecar brings them back.
    """
    target, tensors = _target(part, to), _shaped(shapes)
    written = part.path.with_name(Path(target.file).name)
    about = sidecar.plain(target.about(part.config)) if target.about else {}

    def read_back(beside: Sidecar) -> Any:
        """The config that a reader gets, None if it recognises another network or none."""
        try:
            found = identify(written, "", tensors, about, beside)
        except RecognitionError:
            return None
        if not isinstance(found, Part) or found.network is not part.network:
            return None
        return found.config

    name, title = part.network.name, part.network.title
    found = read_back(Sidecar())
    if found is None:
        published = part.network.sizes({}, {})
        keys = ", ".join(sorted(sidecar.differences(part.config, published)))
        raise ConversionError(
            f"the {to} layout cannot carry this {title}: it would not be recognised again. It"
            f" differs from the published one in {keys}"
        )
    fields = sidecar.differences(part.config, found)
    if fields:
        found = read_back(Sidecar({name: fields}))
    if found is None or sidecar.differences(part.config, found):
        raise ConversionError(
            f"the {to} layout cannot carry {', '.join(sorted(fields))} of this {title}"
        )
    model = {name: fields} if fields else {}
    groups = {name: part.group} if part.group != name else {}
    settings = sidecar.plain(part.settings if part.network is DIT else {})
    if settings == sidecar.plain(default_settings(entries)):
        settings = {}
    return Sidecar(model, settings, groups)


def our_config(
    networks: Mapping[str, Part], entries: Sequence[Entry] = (), *, cast: bool = False
) -> dict[str, Any]:
    """config.json of our layout: the sizes; for a whole pipeline also how it is sampled.

    Args:
      networks: by their group in the config.
      entries: of the transformer, as it will be written.
      cast: its dtype was asked for, and becomes that of the computation.
    """
    model = {group: sidecar.fields_of(part.config) for group, part in networks.items()}
    for group, part in networks.items():
        if group != part.network.name:
            model[group] = {"network": part.network.kind or part.network.name} | model[group]
    if {"dit", "text"} <= model.keys():
        # No public text encoder says how long its prompts are.
        model["text"]["length"] = model["dit"]["text_length"]
    settings = dict(networks["dit"].settings) if "dit" in networks else {}
    if set(PIPELINE) <= model.keys():
        settings = settings or default_settings(entries)
        settings["weights"] = ""
    if settings and cast:
        settings["dtype"] = default_settings(entries)["dtype"]
    return {**settings, "model": model}


def default_settings(entries: Sequence[Entry]) -> dict[str, Any]:
    """The groups of a config beside `model` and `weights`: as Wan2.2 is streamed and sampled.

    Args:
      entries: of the transformer: what is stored in bfloat16 is computed in bfloat16.
    """
    kinds = {entry.dtype.name for entry in entries}
    dtype = "bfloat16" if kinds == {"bfloat16"} else "float32"
    return {"name": "converted", **wan22.SETTINGS, "dtype": dtype}


def _json(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"


def _target(part: Part, to: str) -> Layout:
    if to == TRAINING and part.network is DIT:
        return dataclasses.replace(layout_of(DIT, "official"), file="model.pt")
    return layout_of(part.network, to)


def _entries(
    part: Part, to: str, dtype: np.dtype | None, merges: Sequence[Merge], label: str
) -> tuple[list[Entry], dict[str, tuple[int, ...]]]:
    """What to write of one network, each tensor with the whole way that it goes.

    Returns:
      The entries, and the shapes by name in the target layout.
    """
    source, target = layout_of(part.network, part.layout), _target(part, to)
    try:
        ours = part.network.expected(part.config)
    except (ValueError, TypeError, ArithmeticError) as error:
        raise ConversionError(
            f"the sizes read off it make no {part.network.title} ({error})"
        ) from None
    moves = plan(part.tensors, source.rules(part.config), ours, source.ignore)
    back = invert(target.rules(part.config))
    shapes = shapes_in(back, ours)
    onward = {move.source: move for move in plan(_shaped(ours), back, shapes)}
    changes = _changes(part, merges)
    entries = []
    for move in moves:
        tensor, last = part.tensors[move.source], onward[move.target]
        name = f"{label}//model.{last.target}" if to == TRAINING else last.target
        kind = np.dtype(dtype or tensor.dtype)
        of_layer = changes.get(move.target.removesuffix(".kernel"), [])
        load = _loader(tensor, move.transform, last.transform, of_layer)
        entries.append(Entry(name, shapes[last.target], kind, load))
    return entries, shapes


def _loader(
    tensor: Any, forward: Transform, onward: Transform, changes: Sequence[tuple[Change, float]]
) -> Callable[[slice], np.ndarray]:
    """Rows of a tensor as it will be written.

    They come straight from the file where nothing is to be done to them.
    """
    if forward is IDENTITY and onward is IDENTITY and not changes:
        return tensor.read

    def load(rows: slice) -> np.ndarray:
        value = forward.forward(tensor.read())
        if changes:
            total = value.astype(np.float32)
            for change, strength in changes:
                total += change.delta(strength)
            value = total.astype(tensor.dtype)
        value = onward.forward(value)
        return value[rows] if value.shape else value

    return load


def _changes(part: Part, merges: Sequence[Merge]) -> dict[str, list[tuple[Change, float]]]:
    """LoRAs by the layer that they change.

    Raises:
      ConversionError: layers that the network does not have, or of another size; all are listed.
      WeightsError: a strength that is not finite.
    """
    shapes = part.network.expected(part.config) if merges else {}
    changes: dict[str, list[tuple[Change, float]]] = {}
    faults = []
    for merge in merges:
        for layer, change in merge.part.changes.items():
            shape = shapes.get(f"{layer}.kernel")
            if shape != (change.a.shape[0], change.b.shape[1]):
                faults.append(
                    f"{merge.part.path}: {layer} is {shape}, the LoRA changes {change.a.shape} x"
                    f" {change.b.shape}"
                )
            change.scale(merge.strength)
            changes.setdefault(layer, []).append((change, merge.strength))
    if faults:
        more = f"\n  and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise ConversionError(
            "the LoRA does not fit the transformer:\n  " + "\n  ".join(faults[:20]) + more
        )
    return changes


def _shaped(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Stand-ins that take no memory."""
    return {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}


def cut_into_files(
    path: str, entries: Sequence[Entry], *, sharded: bool
) -> tuple[list[OutFile], dict[str, str]]:
    """One file; or, if it were larger than SHARD, several and their index."""
    whole = OutFile(path, tuple(entries), {"format": "pt"} if sharded else {})
    if not sharded or whole.is_pickle or whole.nbytes <= SHARD:
        return [whole], {}
    groups: list[list[Entry]] = [[]]
    for entry in entries:
        if groups[-1] and sum(e.nbytes for e in groups[-1]) + entry.nbytes > SHARD:
            groups.append([])
        groups[-1].append(entry)
    stem = path.removesuffix(".safetensors")
    files = [
        OutFile(f"{stem}-{i:05d}-of-{len(groups):05d}.safetensors", tuple(group), {"format": "pt"})
        for i, group in enumerate(groups, 1)
    ]
    place = {entry.name: Path(file.path).name for file in files for entry in file.entries}
    index = {"metadata": {"total_size": whole.nbytes}, "weight_map": dict(sorted(place.items()))}
    return files, {stem + INDEX_SUFFIX: _json(index)}

"""From recognised networks to a folder in another layout: planned whole, written in pieces,
verified, then renamed.

Nothing is written before every tensor has its place and the disk has room. The folder grows under a
temporary name; it gets its own when all of it has been read back and compared. A conversion that
was killed leaves nothing that looks whole.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from chameleon_jax.data.tokenizer import Tokenizer
from chameleon_jax.errors import UserError
from chameleon_jax.weights.lora import Change
from chameleon_jax.weights.tensors import (
    INDEX_SUFFIX,
    ArrayTensor,
    Entry,
    WeightsError,
    open_tensors,
    raw,
    write_entries,
)
from converters import lora
from converters.networks import DIT, TEXT, Layout
from converters.pickles import SUFFIXES, open_pickle, write_pickle
from converters.recognise import OURS, Part, RecognitionError, layout_of
from converters.rules import IDENTITY, ConversionError, Transform, invert, plan, shapes_in

TRAINING = "training"  # the transformer as a training run of this family saves it
LAYOUTS = (OURS, "official", "diffusers", TRAINING, "peft", "kohya")
LORA_FILES = {
    OURS: "lora.safetensors",
    "diffusers": "pytorch_lora_weights.safetensors",
    "official": "lora.safetensors",
    "kohya": "lora.safetensors",
    "peft": "adapter_model.safetensors",
}
TOKENIZER_FOLDERS = {OURS: "", "official": "google/umt5-xxl", "diffusers": "tokenizer"}
SHARD = 5 * 10**9  # bytes of a shard in the public layouts, as Hugging Face cuts them
PIPELINE = ("dit", "vae", "text")
# Fields of the networks' configs that are not sizes.
HOW_TO_COMPUTE = ("conv", "remat", "scan_layers", "attention", "context", "block")
MARGIN = 2**24  # bytes that must stay free on the disk

OnBytes = Callable[[str, int], None]  # (what is being done, bytes done)


class DestinationError(UserError):
    """The folder cannot be written: it exists, or the disk is full. The message says what to do."""


@dataclasses.dataclass(frozen=True)
class OutFile:
    """A file of tensors about to be written."""

    path: str  # in the folder
    entries: tuple[Entry, ...]
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries)

    @property
    def is_pickle(self) -> bool:
        return self.path.endswith(SUFFIXES)


@dataclasses.dataclass(frozen=True)
class Merge:
    """A LoRA to be added to the transformer."""

    part: lora.LoraPart
    strength: float


@dataclasses.dataclass(frozen=True)
class Folder:
    """Everything that a conversion will write."""

    files: tuple[OutFile, ...]
    texts: Mapping[str, str]  # small files by their path in the folder

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files) + sum(
            len(text) for text in self.texts.values()
        )


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
    files, texts, faults, remarks = [], {}, [], []
    if merges and not any(part.network is DIT for part in parts):
        raise RecognitionError("--lora: there is no transformer among the inputs to add it to")
    for part in parts:
        try:
            if isinstance(part, lora.LoraPart):
                files.append(_lora_file(part, to, dtype))
                texts |= _lora_texts(part, to)
                continue
            entries = _entries(part, to, dtype, merges if part.network is DIT else (), label)
        except (ConversionError, WeightsError) as error:
            faults.append(f"{part.path}: {error}")
            continue
        layout = _target(part, to)
        made, index = cut_into_files(layout.file, entries, sharded=to != OURS)
        files += made
        texts |= index
        if layout.about is not None:
            about = json.dumps(layout.about(part.config), indent=2) + "\n"
            texts[str(Path(layout.file).parent / "config.json")] = about
    if faults:
        raise ConversionError("\n".join(faults))
    networks = {part.network.name: part for part in parts if isinstance(part, Part)}
    if to in TOKENIZER_FOLDERS and TEXT.name in networks:
        tokenizer, remark = _tokenizer(networks[TEXT.name], to)
        texts |= tokenizer
        remarks += remark
    if to == OURS and networks:
        texts["config.json"] = json.dumps(our_config(networks, files), indent=2) + "\n"
    if to == "diffusers" and set(PIPELINE) <= networks.keys():
        texts |= _diffusers_pipeline()
    return Folder(tuple(files), texts), remarks


def write(folder: Folder, out: Path, on_bytes: OnBytes = lambda what, count: None) -> None:
    """Write, read everything back, compare it with what was sent, rename.

    Args:
      folder: from `prepare`.
      out: must not exist, or be an empty folder.
      on_bytes: told of progress: "write" and "verify" with the bytes just done.

    Raises:
      DestinationError: `out` is there already, or the disk has no room.
      WeightsError: what was read back is not what was written.
    """
    check_destination(out, folder.nbytes)
    part, digests = out.with_name(f"{out.name}.part-{os.getpid()}"), {}
    _remove_leftovers(out)
    try:
        part.mkdir(parents=True)
        for file in folder.files:
            path = part / file.path
            path.parent.mkdir(parents=True, exist_ok=True)
            digests[file.path] = _write_file(path, file, lambda count: on_bytes("write", count))
        for name, text in folder.texts.items():
            (part / name).parent.mkdir(parents=True, exist_ok=True)
            (part / name).write_text(text, encoding="utf-8")
        for file in folder.files:
            _verify(part / file.path, digests[file.path], lambda count: on_bytes("verify", count))
        if out.exists():
            out.rmdir()  # empty: checked above
        os.replace(part, out)
    except OSError as error:
        raise DestinationError(
            f"{out}: could not be written ({error}); nothing was left behind"
        ) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_with_progress(folder: Folder, out: Path) -> None:
    """`write`, with a bar on stderr."""
    total = sum(file.nbytes for file in folder.files)
    with tqdm(
        total=2 * total, unit="B", unit_scale=True, file=sys.stderr, dynamic_ncols=True
    ) as bar:

        def report(what: str, count: int) -> None:
            bar.set_description({"write": "writing", "verify": "reading back"}[what], refresh=False)
            bar.update(count)

        write(folder, out, report)


def check_destination(out: Path, nbytes: int) -> None:
    """Raise DestinationError unless a folder of that size can be made there."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DestinationError(f"{out}: exists already; choose another name, or remove it")
    place = next(parent for parent in out.absolute().parents if parent.exists())
    if not os.access(place, os.W_OK):
        raise DestinationError(f"{out}: {place} cannot be written to")
    free = shutil.disk_usage(place).free
    if free < nbytes + MARGIN:
        raise DestinationError(
            f"{out}: needs {nbytes / 1e9:.2f} GB, and {place} has {free / 1e9:.2f} GB free"
        )


def our_config(networks: Mapping[str, Part], files: Sequence[OutFile] = ()) -> dict[str, Any]:
    """config.json of our layout: the sizes; for a whole pipeline also how Wan2.2 is sampled."""
    model = {}
    for name, part in networks.items():
        fields = dataclasses.asdict(part.config)
        model[name] = {key: value for key, value in fields.items() if key not in HOW_TO_COMPUTE}
    if {"dit", "text"} <= model.keys():
        model["text"]["length"] = model["dit"][
            "text_length"
        ]  # no public text encoder says how long its prompts are
    if not set(PIPELINE) <= model.keys():
        return {"model": model}
    from configs.wan22_ti2v import get_config

    kinds = {
        entry.dtype.name
        for file in files
        if file.path == "dit.safetensors"
        for entry in file.entries
    }
    config = get_config().to_dict()
    return config | {
        "name": "converted",
        "model": model,
        "dtype": "bfloat16" if kinds == {"bfloat16"} else "float32",
    }


def _target(part: Part, to: str) -> Layout:
    if to == TRAINING and part.network is DIT:
        return dataclasses.replace(layout_of(DIT, "official"), file="model.pt")
    return layout_of(part.network, to)


def _entries(
    part: Part, to: str, dtype: np.dtype | None, merges: Sequence[Merge], label: str
) -> list[Entry]:
    """What to write of one network, each tensor with the whole way that it goes."""
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
        load = _loader(
            tensor,
            move.transform,
            last.transform,
            changes.get(move.target.removesuffix(".kernel"), []),
        )
        entries.append(Entry(name, shapes[last.target], kind, load))
    return entries


def _loader(
    tensor: Any, forward: Transform, onward: Transform, changes: Sequence[tuple[Change, float]]
) -> Callable[[slice], np.ndarray]:
    """Rows of a tensor as it will be written, straight from the file where nothing is to be done to
    it.
    """
    if forward is IDENTITY and onward is IDENTITY and not changes:
        return tensor.read

    def load(rows: slice) -> np.ndarray:
        value = forward.forward(tensor.read())
        if changes:
            total = value.astype(np.float32) + sum(
                change.delta(strength) for change, strength in changes
            )
            value = total.astype(tensor.dtype)
        value = onward.forward(value)
        return value[rows] if value.shape else value

    return load


def _changes(part: Part, merges: Sequence[Merge]) -> dict[str, list[tuple[Change, float]]]:
    """LoRAs by the layer that they change.

    Raises:
      ConversionError: layers that the network does not have, or of another size; all are listed.
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
    return files, {stem + INDEX_SUFFIX: json.dumps(index, indent=2) + "\n"}


def _write_file(path: Path, file: OutFile, on_bytes: Callable[[int], None]) -> dict[str, bytes]:
    """Write a file; returns a digest of each tensor as it was sent to the disk."""
    hashes = {entry.name: hashlib.blake2b() for entry in file.entries}

    def on_piece(name: str, piece: memoryview) -> None:
        hashes[name].update(piece)
        on_bytes(piece.nbytes)

    if file.is_pickle:
        write_pickle(path, file.entries, on_piece)
    else:
        write_entries(path, file.entries, file.metadata, on_piece)
    return {name.replace("//", "."): digest.digest() for name, digest in hashes.items()}


def _verify(path: Path, digests: Mapping[str, bytes], on_bytes: Callable[[int], None]) -> None:
    """Read a file back and compare every tensor with what was sent.

    Raises:
      WeightsError: anything differs.
    """
    written = open_pickle(path) if path.name.endswith(SUFFIXES) else open_tensors(path)
    if written.keys() != digests.keys():
        raise WeightsError(f"{path}: holds other names than were written; the disk may be faulty")
    for name, tensor in written.items():
        digest = hashlib.blake2b()
        for piece in Entry(name, tensor.shape, tensor.dtype, tensor.read).pieces():
            digest.update(raw(piece))
            on_bytes(piece.nbytes)
        if digest.digest() != digests[name]:
            raise WeightsError(f"{path}: {name} is not what was written; the disk may be faulty")


def _remove_leftovers(out: Path) -> None:
    """Folders of conversions to the same place that were killed."""
    for path in out.parent.glob(f"{out.name}.part-*"):
        number = path.name.rpartition("-")[2]
        if number.isdigit() and not _is_running(int(number)):
            shutil.rmtree(path, ignore_errors=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _lora_file(part: lora.LoraPart, to: str, dtype: np.dtype | None) -> OutFile:
    if to not in LORA_FILES:
        raise RecognitionError(
            f"a LoRA has no layout {to!r}; it is known in {', '.join(LORA_FILES)}"
        )
    tensors, metadata = lora.to_layout(part.changes, to)
    entries = []
    for name, value in tensors.items():
        kind = value.dtype if dtype is None or name.endswith(".alpha") else np.dtype(dtype)
        entries.append(Entry(name, value.shape, kind, ArrayTensor(value).read))
    return OutFile(LORA_FILES[to], tuple(entries), metadata)


def _lora_texts(part: lora.LoraPart, to: str) -> dict[str, str]:
    if to != "peft":
        return {}
    settings = {"peft_type": "LORA"} | lora.adapter_config(part.changes, to)
    return {"adapter_config.json": json.dumps(settings, indent=2) + "\n"}


def _tokenizer(part: Part, to: str) -> tuple[dict[str, str], list[str]]:
    """The tokenizer that lies with the text encoder, and a remark if there is none.

    Raises:
      TokenizerError: it cannot be used.
    """
    beside = part.path.parent
    places = (beside, beside / "tokenizer", beside.parent / "tokenizer", beside / "google/umt5-xxl")
    found = next(
        (place / "tokenizer.json" for place in places if (place / "tokenizer.json").is_file()), None
    )
    if found is None:
        return {}, [
            f"no tokenizer.json beside {part.path}: put the one of google/umt5-xxl, or of the"
            " folder `tokenizer` of the"
            " diffusers copy, into the new folder before you use prompts"
        ]
    tokenizer = Tokenizer.from_file(found, part.config.length)
    if tokenizer.vocab > part.config.vocab:
        raise ConversionError(
            f"{found}: {tokenizer.vocab} pieces, the text encoder knows {part.config.vocab}"
        )
    folder = TOKENIZER_FOLDERS[to]
    texts = {str(Path(folder) / "tokenizer.json"): found.read_text(encoding="utf-8")}
    if to != OURS:
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": "<pad>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "model_max_length": part.config.length,
            "clean_up_tokenization_spaces": False,
        }
        beside_it = found.with_name("tokenizer_config.json")
        text = (
            beside_it.read_text(encoding="utf-8")
            if beside_it.is_file()
            else json.dumps(settings, indent=2) + "\n"
        )
        texts[str(Path(folder) / "tokenizer_config.json")] = text
    return texts, []


def _diffusers_pipeline() -> dict[str, str]:
    """model_index.json and the scheduler of Wan2.2-TI2V-5B."""
    index = {
        "_class_name": "WanPipeline",
        "_diffusers_version": "0.35.0",
        "expand_timesteps": True,
        "boundary_ratio": None,
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": [None, None],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    scheduler = {
        "_class_name": "UniPCMultistepScheduler",
        "num_train_timesteps": 1000,
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": 5.0,
        "solver_order": 2,
        "solver_type": "bh2",
        "predict_x0": True,
        "lower_order_final": True,
        "final_sigmas_type": "zero",
        "timestep_spacing": "linspace",
    }
    return {
        "model_index.json": json.dumps(index, indent=2) + "\n",
        "scheduler/scheduler_config.json": json.dumps(scheduler, indent=2) + "\n",
    }

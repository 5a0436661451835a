"""From a name to a folder of weights in our layout. The one file that knows the converters.

A name is a folder here, in our layout or a public one, or a repository of the Hugging Face Hub.
What is not in our layout is converted once and kept, so that only the first start is slow; see
`places.cache_folder`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chameleon_jax import places
from chameleon_jax.errors import UserError, one_line

if TYPE_CHECKING:
    from chameleon_jax.weights.lora import Lora
    from converters.writing import Folder

CACHE_VERSION = 1  # of our layout; a new one leaves older conversions aside
# Of our layout.
FILES = ("config.json", "vae.safetensors", "dit.safetensors", "text.safetensors", "tokenizer.json")
NAME_LENGTH = 50  # characters of a folder's name that stand in that of its conversion
PATTERNS = ("*.json", "*.safetensors", "*.pth")  # what is fetched from the Hub

# What to put where, if the Hub cannot be reached.
KNOWN_FILES = {
    "Wan-AI/Wan2.2-TI2V-5B": (
        "config.json",
        "diffusion_pytorch_model.safetensors.index.json",
        "diffusion_pytorch_model-00001-of-00003.safetensors (and 00002, 00003)",
        "Wan2.2_VAE.pth",
        "models_t5_umt5-xxl-enc-bf16.pth",
        "google/umt5-xxl/tokenizer.json",
    ),
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": (
        "model_index.json",
        "transformer/",
        "vae/",
        "text_encoder/ (each with config.json and all *.safetensors)",
        "tokenizer/tokenizer.json",
    ),
}


class PipelineError(UserError):
    """A pipeline cannot be built. The message is one line."""


def find_weights(name: str | os.PathLike) -> Path:
    """A folder in our layout: as given, beside the package, from the Hub, or converted.

    Args:
      name: a folder in our layout or in a public one, or "owner/repository" of the Hub.

    Raises:
      PipelineError: nothing is found, or it cannot be converted; the message says which files to
        put where.
    """
    folder = _find_folder(name)
    return folder if _is_ours(folder) else _converted(folder)


def find_decoder(name: str | os.PathLike) -> tuple[Path, dict[str, Any]]:
    """A small decoder: its file in our layout, and its group of a config.

    Args:
      name: a file or folder, in our layout or a public one, that holds a TAEHV or a narrower VAE
        (LightVAE); what is not in our layout is converted once, as pipelines are.

    Raises:
      PipelineError: no such file, or something else in it.
    """
    from converters import convert, folders, recognise
    from converters.layouts import OURS

    path = places.find(name)
    if not path.exists():
        raise PipelineError(
            f"decoder {name}: no such file; expected vae, small, or a file or folder with a small"
            " decoder, such as taew2_2.safetensors"
        )
    try:
        found = recognise.look([path]).parts
        small = [part for part in found if getattr(part, "group", "") == "decoder"]
        small = small or [part for part in found if part.network.kind == "taehv"]
        small = small or [part for part in found if part.network.name == "vae"]
        if len(small) != 1:
            titles = ", ".join(part.network.title for part in small or found)
            raise PipelineError(f"decoder {name}: holds {titles}; expected one small decoder")
        part = dataclasses.replace(small[0], group="decoder")
        sizes = convert.our_config({"decoder": part})["model"]["decoder"]
        if part.layout == OURS:
            return part.path, sizes
        files = [part.path] if path.is_dir() else folders.at(path).files
        place = _place(part.path, files)
        if not place.is_dir():
            _write(convert.prepare([part], OURS)[0], part.path, place)
        return place / "decoder.safetensors", sizes
    except PipelineError:
        raise
    except UserError as error:
        raise PipelineError(f"decoder {name}: {one_line(error)}") from None


def _find_folder(name: str | os.PathLike) -> Path:
    folder = places.find(name)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise PipelineError(
            f"{name}: not a folder; expected one with config.json and *.safetensors"
        )
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        return _from_hub(str(name))
    raise PipelineError(
        f"{name}: no such folder; expected one with {', '.join(FILES)}, or a public checkpoint"
    )


def _from_hub(name: str) -> Path:
    """Fetch a repository, or find what was fetched before."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(PATTERNS)))
    except Exception as error:  # the library, its HTTP client and the disk raise two dozen kinds
        reason = " ".join(str(error).split())[:160]
        files = "; ".join(KNOWN_FILES.get(name, FILES))
        raise PipelineError(
            f"{name}: no such folder here, and not to be had from the Hugging Face Hub ({reason})."
            f" Where there is a network, fetch it (hf download {name} --local-dir DIR) and pass"
            f" DIR. It must hold: {files}"
        ) from None


def _is_ours(folder: Path) -> bool:
    """Does the folder hold a config of ours, or a file of ours?

    Then whatever else is wrong with it is reported of our layout.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return any((folder / name).is_file() for name in FILES if name.endswith(".safetensors"))
    return isinstance(config, dict) and "model" in config


def _converted(folder: Path) -> Path:
    """The conversion of a public checkpoint, made now or before.

    Raises:
      PipelineError: it is not the whole of a pipeline, or does not fit.
    """
    from converters import convert, folders, recognise
    from converters.families import PIPELINE
    from converters.layouts import OURS

    try:
        checkpoints, _ = folders.find(folder)
        files = [file for one in checkpoints for file in (one.path, *one.files)]
        place = _place(folder, [*files, *folder.rglob("*.json"), *folder.rglob("*.safetensors")])
        if place.is_dir():
            return place
        found = recognise.look([folder])
        for note in found.notes:
            print(f"note: {note}", file=sys.stderr)
        lacking = set(PIPELINE) - {part.group for part in found.parts}
        if lacking:
            raise PipelineError(
                f"{folder}: no {', '.join(sorted(lacking))} among its checkpoints; a pipeline needs"
                f" all three{_listed(found.notes)}"
            )
        plan, remarks = convert.prepare(found.parts, OURS)
        if remarks:
            raise PipelineError(f"{folder}: {remarks[0]}")
        _write(plan, folder, place)
    except PipelineError:
        raise
    except UserError as error:
        raise PipelineError(f"{folder}: {one_line(error)}") from None
    return place


def _place(source: Path, files: Iterable[Path]) -> Path:
    """Where the conversion of a file or folder lies; another place if any of the files changes."""
    name = source.resolve().name[:NAME_LENGTH]
    return places.cache_folder() / f"{name}-{_fingerprint(source, files)}"


def _write(plan: Folder, source: Path, place: Path) -> None:
    """Write a conversion to its place.

    Raises:
      PipelineError: there is no room for it.
    """
    from converters import writing

    print(f"converting {source} ({plan.nbytes / 1e9:.1f} GB), once, to {place}", file=sys.stderr)
    try:
        writing.write_with_progress(plan, place)
    except writing.DestinationError as error:
        if not place.is_dir():  # else another process was faster, and made the same
            raise PipelineError(
                f"{source}: the conversion has no place: {one_line(error)}; another folder for"
                " conversions is named by CHAMELEON_CACHE"
            ) from None


def _listed(notes: list[str]) -> str:
    return f" ({'; '.join(notes)})" if notes else ""


def read_lora(path: str | os.PathLike) -> Lora:
    """A LoRA for the denoiser, in any naming that the converters know.

    Args:
      path: a file, or a folder that holds one.

    Raises:
      PipelineError: no such file, not a LoRA, or several; numbers in it that are not finite.
    """
    from chameleon_jax.weights.lora import Lora
    from converters.recognise import find_lora

    try:
        return Lora(find_lora(Path(path)).changes)
    except UserError as error:
        raise PipelineError(one_line(error)) from None


def _fingerprint(source: Path, files: Iterable[Path]) -> str:
    """Changes when any of the files does."""
    lines = [f"{CACHE_VERSION} {source.resolve()}"]
    for path in sorted(set(files)):
        about = path.stat()
        name = os.path.relpath(path, source)
        lines.append(f"{name} {about.st_size} {about.st_mtime_ns}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]

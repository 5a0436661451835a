"""From a name to a folder of weights in our layout: a folder here, a repository of the Hugging Face
Hub, a public layout.

What is not in our layout is converted once and kept, so that only the first start is slow:

    $CHAMELEON_CACHE, or $XDG_CACHE_HOME/chameleon_jax, or ~/.cache/chameleon_jax
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from chameleon_jax.errors import UserError, one_line

if TYPE_CHECKING:
    from chameleon_jax.weights.lora import Lora

ROOT = Path(__file__).parents[2]  # config files name folders of weights from here
CACHE_VERSION = 1  # of our layout; a new one leaves older conversions aside
FILES = (
    "config.json",
    "vae.safetensors",
    "dit.safetensors",
    "text.safetensors",
    "tokenizer.json",
)  # of our layout
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
    """A folder in our layout: as given, beside the package, from the Hub, or converted from a
    public layout.

    Args:
      name: a folder in our layout or in a public one, or "owner/repository" of the Hub.

    Raises:
      PipelineError: nothing is found, or it cannot be converted; the message says which files to
        put where.
    """
    folder = _find_folder(name)
    return folder if _is_ours(folder) else _converted(folder)


def cache_folder() -> Path:
    """Where conversions are kept."""
    if os.environ.get("CHAMELEON_CACHE"):
        return Path(os.environ["CHAMELEON_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "chameleon_jax"


def _find_folder(name: str | os.PathLike) -> Path:
    for candidate in (Path(name), ROOT / name):
        if candidate.is_dir():
            return candidate
    if Path(name).exists():
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
            " Where there is a network,"
            f" fetch it (hf download {name} --local-dir DIR) and pass DIR. It must hold: {files}"
        ) from None


def _is_ours(folder: Path) -> bool:
    """Does the folder hold a config of ours, or a file of ours? Then whatever else is wrong is to
    be said about that.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return any((folder / name).is_file() for name in FILES if name.endswith(".safetensors"))
    return "model" in config


def _converted(folder: Path) -> Path:
    """The conversion of a public checkpoint, made now or before.

    Raises:
      PipelineError: it is not the whole of a pipeline, or does not fit.
    """
    from converters import convert, writing
    from converters.families import PIPELINE
    from converters.layouts import OURS
    from converters.recognise import checkpoint_files, recognise

    try:
        files = checkpoint_files(folder)
        place = cache_folder() / f"{folder.resolve().name}-{_fingerprint(folder, files)}"
        if place.is_dir():
            return place
        parts = recognise([folder])
        lacking = set(PIPELINE) - {part.network.name for part in parts}
        if lacking:
            raise PipelineError(
                f"{folder}: no {', '.join(sorted(lacking))} among its checkpoints; a pipeline needs"
                " all three"
            )
        plan, remarks = convert.prepare(parts, OURS)
        if remarks:
            raise PipelineError(f"{folder}: {remarks[0]}")
        print(
            f"converting {folder} ({plan.nbytes / 1e9:.1f} GB), once, to {place}", file=sys.stderr
        )
        writing.write_with_progress(plan, place)
    except PipelineError:
        raise
    except writing.DestinationError as error:
        if not place.is_dir():  # else another process was faster, and made the same
            raise PipelineError(
                f"{folder}: the conversion has no place: {one_line(error)}; another folder for"
                " conversions is named by CHAMELEON_CACHE"
            ) from None
    except UserError as error:
        raise PipelineError(f"{folder}: {one_line(error)}") from None
    return place


def read_lora(path: str | os.PathLike) -> Lora:
    """A LoRA for the denoiser, in any naming that the converters know.

    Args:
      path: a file or folder.

    Raises:
      PipelineError: no such file, or not a LoRA.
    """
    from chameleon_jax.weights.lora import Lora
    from converters.lora import LoraPart
    from converters.recognise import recognise

    try:
        (part,) = recognise([Path(path)])
    except UserError as error:
        raise PipelineError(one_line(error)) from None
    if not isinstance(part, LoraPart):
        raise PipelineError(f"{path}: not a LoRA, but a {part.network.title}")
    return Lora(part.changes)


def _fingerprint(folder: Path, files: list[Path]) -> str:
    """Changes when any file of the checkpoint does."""
    lines = [f"{CACHE_VERSION} {folder.resolve()}"]
    for path in sorted({*files, *folder.rglob("*.json"), *folder.rglob("*.safetensors")}):
        about = path.stat()
        lines.append(f"{path.relative_to(folder)} {about.st_size} {about.st_mtime_ns}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]

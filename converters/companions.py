"""The small files beside the weights of a pipeline: its tokenizer, and what diffusers wants."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chameleon_jax.data.tokenizer import Tokenizer
from chameleon_jax.diffusion import wan22
from converters.identify import Part
from converters.layouts import OURS
from converters.rules import ConversionError

TOKENIZER_FOLDERS = {OURS: "", "official": "google/umt5-xxl", "diffusers": "tokenizer"}


def tokenizer_files(part: Part, to: str) -> tuple[dict[str, str], list[str]]:
    """The tokenizer that lies with the text encoder, and a remark if there is none.

    Args:
      part: the text encoder.
      to: a layout of TOKENIZER_FOLDERS.

    Returns:
      Contents by path in the new folder, and remarks for the user.

    Raises:
      TokenizerError: it cannot be used.
      ConversionError: it knows more pieces than the encoder.
    """
    beside = part.path.parent
    places = (beside, beside / "tokenizer", beside.parent / "tokenizer", beside / "google/umt5-xxl")
    files = [place / "tokenizer.json" for place in places]
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        remark = (
            f"no tokenizer.json beside {part.path}: put the one of google/umt5-xxl, or of the"
            " folder `tokenizer` of the diffusers copy, into the new folder before you use prompts"
        )
        return {}, [remark]
    tokenizer = Tokenizer.from_file(found, part.config.length)
    if tokenizer.vocab > part.config.vocab:
        raise ConversionError(
            f"{found}: {tokenizer.vocab} pieces, the text encoder knows {part.config.vocab}"
        )
    folder = TOKENIZER_FOLDERS[to]
    texts = {str(Path(folder) / "tokenizer.json"): _read(found)}
    if to != OURS:
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": "<pad>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "model_max_length": part.config.length,
            "clean_up_tokenization_spaces": False,
        }
        text = json.dumps(settings, indent=2) + "\n"
        given = found.with_name("tokenizer_config.json")
        if given.is_file():
            text = _read(given)
        texts[str(Path(folder) / "tokenizer_config.json")] = text
    return texts, []


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path}: not readable as text ({error})") from None


def diffusers_pipeline(settings: Mapping[str, Any]) -> dict[str, str]:
    """model_index.json and the scheduler, by path.

    Args:
      settings: groups of our config.json, or none: then those of Wan2.2-TI2V-5B.
    """
    settings = settings or wan22.SETTINGS
    sampling = settings.get("generate") or settings.get("sampler") or {}
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
        "flow_shift": sampling.get("shift", wan22.GENERATE["shift"]),
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

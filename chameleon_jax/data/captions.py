"""Captions: what moves (dynamic) and what stays (static), and which of them a sample gets.

FashionChameleon (arXiv 2605.15824, appendix "Dataset Configuration"): the teacher sees the dynamic
caption alone in 70 % of the samples, so that it takes the person and the scene from the reference
picture instead of from words; teacher forcing and distillation see both.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from chameleon_jax.errors import UserError

DYNAMIC_ONLY = 0.7  # share of the samples that get the dynamic caption alone, mode "mixed"
# By mode, the share of the samples that get the dynamic caption alone.
SHARES = {"mixed": DYNAMIC_ONLY, "full": 0.0, "dynamic": 1.0}
MODES = tuple(SHARES)
_FIELDS = ("en_long", "cn_long", "en_short", "cn_short")


class CaptionError(UserError):
    """A caption is missing or not in the expected form. The message is one line."""


def parse_prompt(prompt: str | Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """The prompt column of a table of clips, with every field filled.

    Args:
      prompt: JSON (or its parsed form) with any of en_long, cn_long, en_short, cn_short, each a
        pair [what happens, what it looks like].

    Returns:
      All four fields as (dynamic, static). A missing one is filled from the other language; if a
      length is missing in both, long is filled from short and short from long.

    Raises:
      CaptionError: not JSON, no usable field, or a field that is not a pair of strings.
    """
    if isinstance(prompt, str):
        try:
            prompt = json.loads(prompt)
        except json.JSONDecodeError as error:
            raise CaptionError(f"prompt is not JSON ({error}): {prompt[:60]!r}") from None
    if not isinstance(prompt, Mapping):
        raise CaptionError(
            f"prompt is {type(prompt).__name__}; expected an object with {', '.join(_FIELDS)}"
        )
    fields = {}
    for name in _FIELDS:
        pair = prompt.get(name)
        if not pair:
            continue
        if not _is_pair(pair):
            raise CaptionError(
                f"{name} of the prompt is {pair!r}; expected two strings, [dynamic, static]"
            )
        fields[name] = (pair[0].strip(), pair[1].strip())
    if not fields:
        raise CaptionError(f"prompt has none of {', '.join(_FIELDS)}")
    for length in ("long", "short"):
        for mine, other in (("en", "cn"), ("cn", "en")):
            if f"{mine}_{length}" not in fields and f"{other}_{length}" in fields:
                fields[f"{mine}_{length}"] = fields[f"{other}_{length}"]
    for length, other in (("long", "short"), ("short", "long")):
        for language in ("en", "cn"):
            if f"{language}_{length}" not in fields:
                fields[f"{language}_{length}"] = fields[f"{language}_{other}"]
    return {name: fields[name] for name in _FIELDS}


def _is_pair(value: Any) -> bool:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        return False
    return all(isinstance(text, str) for text in value)


def from_prompt(prompt: str | Mapping[str, Any]) -> dict[str, str]:
    """The captions that training uses, {"dynamic": ..., "static": ...}: the long English ones.

    Raises:
      CaptionError: see `parse_prompt`.
    """
    dynamic, static = parse_prompt(prompt)["en_long"]
    return {"dynamic": dynamic, "static": static}


def full(static: str, dynamic: str) -> str:
    """Dynamic caption, a space, static caption."""
    return f"{dynamic} {static}".strip()


def mix(
    static: str, dynamic: str, rng: np.random.Generator, dynamic_only: float = DYNAMIC_ONLY
) -> str:
    """The dynamic caption with probability `dynamic_only`, otherwise both; one draw."""
    return dynamic if rng.random() < dynamic_only else full(static, dynamic)


def dynamic_share(mode: str) -> float:
    """Share of the samples that get the dynamic caption alone.

    Raises:
      CaptionError: there is no such mode.
    """
    if mode not in SHARES:
        raise CaptionError(f"caption mode is {mode!r}; expected one of {', '.join(MODES)}")
    return SHARES[mode]


def choose(
    captions: Mapping[str, str], mode: str, rng: np.random.Generator, dropout: float = 0.0
) -> str:
    """The prompt of one training sample.

    Args:
      captions: with "static" and "dynamic".
      mode: "mixed" (70 % dynamic alone), "full" (always both), "dynamic".
      rng: two numbers are drawn, whatever the mode.
      dropout: probability of the empty prompt, which trains the unconditional half of
        classifier-free guidance.
    """
    prompt = mix(captions["static"], captions["dynamic"], rng, dynamic_share(mode))
    return "" if rng.random() < dropout else prompt


def compile_match(pattern: str) -> re.Pattern[str]:
    """A regular expression that chooses clips by their captions, for `mentions`.

    Raises:
      CaptionError: it is none.
    """
    try:
        return re.compile(pattern)
    except re.error as error:
        raise CaptionError(f"{pattern!r} is not a regular expression: {error}") from None


def mentions(captions: Mapping[str, str | Sequence[str]], pattern: re.Pattern[str]) -> bool:
    """Whether the pattern is found in one of the captions; a caption may be several texts."""
    texts: list[str] = []
    for value in captions.values():
        if isinstance(value, str):
            texts.append(value)
        else:
            texts.extend(value)
    return any(pattern.search(text) for text in texts)

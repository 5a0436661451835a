"""What a vision model said, read as data: one JSON object, or nothing.

Models wrap JSON in fences, put words around it, and repeat what stands in a picture. An answer is
used only if it holds exactly one object and that has exactly the fields that were asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from chameleon_jax.errors import UserError
from chameleon_jax.vlm import JunkError, find_json

MAX_ANSWER = 40_000  # characters; four captions have a tenth of it


class AnswerError(UserError):
    """An answer is not of the form that was asked for. The message is one line."""


def read_object(answer: str) -> dict[str, Any]:
    """The JSON object in an answer, which may stand in a fence or between words.

    Raises:
      AnswerError: there is none, or more than one: then it is not known which is meant.
    """
    if len(answer) > MAX_ANSWER:
        raise AnswerError(f"{len(answer)} characters; at most {MAX_ANSWER} are read")
    try:
        return find_json(answer)
    except JunkError as error:
        raise AnswerError(str(error)) from None


def read_verdict(answer: str, questions: Sequence[str]) -> dict[str, bool]:
    """Answers true or false to all questions, and nothing else.

    Raises:
      AnswerError: one is missing or neither true nor false, or there is another field.
    """
    found = read_object(answer)
    if set(found) != set(questions):
        raise AnswerError(f"fields {sorted(found)}; expected {sorted(questions)}")
    for name, value in found.items():
        if not isinstance(value, bool):
            raise AnswerError(f"{name} is {value!r}; expected true or false")
    return found


def read_choice(answer: str, field: str, words: Sequence[str]) -> str:
    """One of some words.

    Raises:
      AnswerError: it is none, or there is another field.
    """
    found = read_object(answer)
    if set(found) != {field} or found[field] not in words:
        raise AnswerError(f"{found!r}"[:120] + f"; expected {field} and one of {', '.join(words)}")
    return found[field]

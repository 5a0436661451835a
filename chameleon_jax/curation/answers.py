"""What a vision model said, read as data: one JSON object, or nothing.

Models wrap JSON in fences, put words around it, and repeat what stands in a picture. An answer is
used only if it holds exactly one object and that has exactly the fields that were asked for.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from chameleon_jax.errors import UserError

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
    decoder, found, place = json.JSONDecoder(object_pairs_hook=_once_each), [], 0
    while (place := answer.find("{", place)) >= 0:
        try:
            value, place = decoder.raw_decode(answer, place)
        except ValueError as error:
            if isinstance(error, AnswerError):
                raise
            place += 1
            continue
        except RecursionError:
            raise AnswerError("JSON that is nested too deep") from None
        found.append(value)
    if len(found) != 1:
        raise AnswerError(f"{len(found)} JSON objects in it; expected one")
    return found[0]


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


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise AnswerError("a field is there twice")
    return found

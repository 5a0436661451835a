"""Vision-language models behind an HTTP endpoint: a question with pictures in, checked JSON out.

    endpoint = Endpoint.open("https://host/v1", "some-model")  # key from CHAMELEON_VLM_KEY
    reply = ask(endpoint, [Picture(png), "Which colour? Answer as JSON."], check)
    reply.value      # what `check` made of the JSON; None if every try gave junk
    reply.raw        # every reply as it came, junk included

Two ways to talk are known: `openai`, the chat completions that most servers speak (OpenAI, vLLM,
SGLang, llama.cpp, and Gemini at https://generativelanguage.googleapis.com/v1beta/openai), and
`gemini`, Google's own generateContent, which also takes whole videos.

What passes is tried again: 429, faults of the server, time-outs, lost connections, replies that are
no JSON or fail the check. Waits double from try to try; a longer `Retry-After` counts. What does
not pass (a wrong key, an unknown model) is one line at once. Replies are data: nothing in them is
followed, and redirections, which would carry the key elsewhere, are refused.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import http.client
import ipaddress
import json
import math
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any

from chameleon_jax.errors import UserError, one_line

KEY = "CHAMELEON_VLM_KEY"  # variable of the environment that holds the key
APIS = ("openai", "gemini")
MAX_REPLY = 8 * 2**20  # bytes of a reply that are read
SHOWN = 200  # characters of a server's complaint in a message
ABOUT_ONE_QUESTION = (400, 413, 422)  # its words, its pictures or its size may be the reason
PASSING = (408, 409, 425, 429, 500, 502, 503, 504, 529)  # states of HTTP that are tried again


class VlmError(UserError):
    """An endpoint cannot be used. The message is one line."""


class UnavailableError(VlmError):
    """An endpoint gave no answer to a question; later, or to another question, it may."""


class UnreachableError(UnavailableError):
    """Nobody was at the address in any try."""


class JunkError(UserError):
    """A reply is not what was asked for. The message is one line: what is wrong with it."""


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture as the bytes of a file."""

    data: bytes
    kind: str = "image/png"


@dataclasses.dataclass(frozen=True)
class Film:
    """A whole video as the bytes of a file; for `gemini` alone.

    Attributes:
      data: of the file.
      kind: its media type.
      fps: frames that are looked at, a second of the video, at most 24; None: as many as the server
        chooses, which is 1 at Google.
    """

    data: bytes
    kind: str = "video/mp4"
    fps: float | None = None


Part = str | Picture | Film
Check = Callable[[dict[str, Any]], Any]  # raises JunkError if the JSON is not as asked for


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """Where a model answers, and how patiently it is asked.

    Attributes:
      url: up to and without `/chat/completions` (openai) or `/models/...` (gemini).
      model: its name there.
      key: sent with every request; None: none is.
      key_name: variable of the environment that it comes from, for messages.
      api: one of `APIS`.
      timeout: seconds that one try may take, in all.
      tries: at most so many requests for one question.
      wait: seconds before the second try; it doubles from try to try.
      longest_wait: seconds, at most, before any try.
      temperature: None leaves it to the server.
    """

    url: str
    model: str
    key: str | None = dataclasses.field(default=None, repr=False)
    key_name: str = KEY
    api: str = "openai"
    timeout: float = 180.0
    tries: int = 5
    wait: float = 2.0
    longest_wait: float = 60.0
    temperature: float | None = None

    @classmethod
    def open(cls, url: str, model: str, *, key_name: str | None = KEY, **settings: Any) -> Endpoint:
        """An endpoint with the key from the environment; one on this machine needs none.

        Args:
          url, model: see the class.
          key_name: variable that holds the key; None: a server without keys.
          settings: other fields of the class.

        Raises:
          VlmError: not an address or an API that can be used, or the key is missing.
        """
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
            raise VlmError(
                f"{url!r} is no endpoint; expected http:// or https://, a host and a path such as"
                " /v1, and no key in it"
            )
        if not model:
            raise VlmError(f"{url}: no model named; expected its name at this endpoint")
        if settings.get("api", "openai") not in APIS:
            raise VlmError(f"API {settings['api']!r}: expected {' or '.join(APIS)}")
        if key_name is None:
            return cls(url.rstrip("/"), model, **settings)
        key = os.environ.get(key_name, "").strip() or None
        if key is None and not _is_local(parts.hostname):
            raise VlmError(f"{url}: no key; put it into the variable {key_name} of the environment")
        return cls(url.rstrip("/"), model, key, key_name, **settings)


@dataclasses.dataclass(frozen=True)
class Reply:
    """What became of a question.

    Attributes:
      value: what the check made of the JSON; None: every try gave junk.
      raw: the texts of all replies, in order; the last one is that of `value`.
      faults: what was wrong with each reply that was not taken.
      model: as the endpoint calls it; what was asked for if it does not say.
      requests: sent in all.
    """

    value: Any
    raw: tuple[str, ...]
    faults: tuple[str, ...]
    model: str
    requests: int


def ask(
    endpoint: Endpoint,
    parts: Sequence[Part],
    check: Check,
    *,
    system: str = "",
    sleep: Callable[[float], None] = time.sleep,
) -> Reply:
    """Ask until a reply holds JSON that passes the check, `endpoint.tries` times at most.

    Args:
      endpoint: who is asked.
      parts: text, pictures and films, in order.
      check: makes a value of the JSON object, or raises JunkError.
      system: the system prompt; empty for none.
      sleep: waits for some seconds.

    Raises:
      VlmError: the endpoint cannot be used.
      UnavailableError: it refuses this question, or some tries got no reply and the others junk.
    """
    url, body = _REQUESTS[endpoint.api](endpoint, parts, system)
    raw: list[str] = []
    faults: list[str] = []
    model = endpoint.model

    def take(answer: Any) -> Any:
        nonlocal model
        raw.append(json.dumps(answer, ensure_ascii=False))  # until there is a text in it
        try:
            raw[-1], name = _TEXTS[endpoint.api](answer)
            model = name or model
            return check(find_json(raw[-1]))
        except JunkError as error:
            faults.append(one_line(error))
            raise

    sent = send(endpoint, url, _encoded(body), take, sleep=sleep)
    if sent.value is None and len(faults) < sent.requests:  # some tries did not even get a reply
        raise sent.error
    return Reply(sent.value, tuple(raw), tuple(faults), model, sent.requests)


def embed(
    endpoint: Endpoint,
    parts: Sequence[Part],
    *,
    system: str = "",
    sleep: Callable[[float], None] = time.sleep,
) -> tuple[float, ...]:
    """The embedding of one message, from `/embeddings` with `messages` as vLLM serves it.

    Raises:
      VlmError: the endpoint cannot be used.
      UnavailableError: it refuses this message, or gives no vector in all tries.
    """
    body: dict[str, Any] = {"model": endpoint.model, "messages": _messages(parts, system)}
    body["encoding_format"] = "float"

    def take(answer: Any) -> tuple[float, ...]:
        try:
            vector = tuple(float(value) for value in answer["data"][0]["embedding"])
        except (KeyError, IndexError, TypeError, ValueError):
            vector = ()
        if not vector or not all(map(math.isfinite, vector)):
            raise JunkError("the reply holds no embedding")
        return vector

    sent = send(endpoint, f"{endpoint.url}/embeddings", _encoded(body), take, sleep=sleep)
    if sent.error is not None:
        raise sent.error
    return sent.value


def say(
    endpoint: Endpoint,
    parts: Sequence[Part],
    *,
    system: str = "",
    sleep: Callable[[float], None] = time.sleep,
) -> str:
    """The text of one reply, whatever it is; empty if there is none in it.

    Args:
      endpoint, parts, system, sleep: as for `ask`.

    Raises:
      VlmError: the endpoint cannot be used.
      UnavailableError: it refuses this question, or gives no reply in all tries.
    """
    url, body = _REQUESTS[endpoint.api](endpoint, parts, system)

    def take(answer: Any) -> str:
        try:
            return _TEXTS[endpoint.api](answer)[0]
        except JunkError:
            return ""

    sent = send(endpoint, url, _encoded(body), take, sleep=sleep)
    if sent.error is not None:
        raise sent.error
    return sent.value


def find_json(text: str) -> dict[str, Any]:
    """The one JSON object in a reply, with or without fences and words around it.

    Raises:
      JunkError: none, several that differ, a key that stands twice, or numbers that are none.
    """
    decoder = json.JSONDecoder(object_pairs_hook=_once, parse_constant=_no_constant)
    found: list[dict[str, Any]] = []
    start = text.find("{")
    while start >= 0:
        try:
            value, end = decoder.raw_decode(text, start)
            if value not in found:
                found.append(value)
        except json.JSONDecodeError:
            end = start + 1
        except RecursionError:
            raise JunkError("JSON that is nested too deeply") from None
        start = text.find("{", end)
    if len(found) != 1:
        what = "no JSON object" if not found else f"{len(found)} different JSON objects"
        raise JunkError(f"{what} in the reply; expected one")
    return found[0]


def prompt_hash(*texts: str) -> str:
    """A name for the words of a question, 16 hexadecimal digits; other words, another name."""
    joined = json.dumps(texts, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return hashlib.sha256(joined).hexdigest()[:16]


class _Passing(Exception):
    """Something that may pass.

    Attributes:
      least: seconds that should be waited for it.
      reached: whether somebody was at the address.
    """

    def __init__(self, message: str, least: float = 0.0, *, reached: bool = True):
        super().__init__(message)
        self.least, self.reached = least, reached


@dataclasses.dataclass(frozen=True)
class Sent:
    """What became of a request.

    Attributes:
      value: what was made of its answer; None if all tries failed.
      requests: sent in all.
      error: why there is no value; None if there is one.
    """

    value: Any
    requests: int
    error: UnavailableError | None = None


def send(
    endpoint: Endpoint,
    url: str,
    body: bytes,
    take: Callable[[Any], Any],
    *,
    kind: str = "application/json",
    most: int = MAX_REPLY,
    sleep: Callable[[float], None] = time.sleep,
) -> Sent:
    """Send a request until its answer is taken, `endpoint.tries` times at most.

    Args:
      endpoint: who is asked.
      url: where, behind `endpoint.url`.
      body: what is sent.
      take: makes a value of the JSON of the answer, or raises JunkError: then it is sent again.
      kind: media type of the body.
      most: bytes of an answer that are read.
      sleep: waits for some seconds.

    Raises:
      VlmError: the endpoint cannot be used.
      UnavailableError: it refuses this request.
    """
    trouble, least, reached = "", 0.0, False
    for number in range(endpoint.tries):
        if number:
            doubled = endpoint.wait * 2 ** (number - 1)
            sleep(min(max(doubled, least), endpoint.longest_wait))
        try:
            return Sent(take(_post(endpoint, url, body, kind, most)), number + 1)
        except _Passing as error:
            trouble, least, reached = str(error), error.least, reached or error.reached
        except JunkError as error:
            trouble, least, reached = one_line(error), 0.0, True
    times = f"{endpoint.tries} times" if endpoint.tries > 1 else "once"
    failed = UnavailableError if reached else UnreachableError
    advice = "look at the endpoint, the same command continues"
    error = failed(f"{endpoint.url}: {trouble}, {times}; {advice}")
    return Sent(None, endpoint.tries, error)


def _encoded(body: dict[str, Any]) -> bytes:
    return json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def _post(endpoint: Endpoint, url: str, body: bytes, kind: str, most: int) -> Any:
    """Send a body and read JSON, within the time of the endpoint.

    Raises:
      VlmError: refused for good.
      _Passing: it may work later.
    """
    headers = {"Content-Type": kind, "Accept": "application/json"}
    if endpoint.key is not None:
        gemini = endpoint.api == "gemini"
        name = "x-goog-api-key" if gemini else "Authorization"
        headers[name] = endpoint.key if gemini else f"Bearer {endpoint.key}"
    handlers: list[Any] = [_NoRedirect]
    if _is_local(urllib.parse.urlsplit(url).hostname or ""):
        handlers.append(urllib.request.ProxyHandler({}))  # no proxy reaches this machine
    deadline = time.monotonic() + endpoint.timeout
    try:
        request = urllib.request.Request(url, body, headers, method="POST")
        opener = urllib.request.build_opener(*handlers)
        with opener.open(request, timeout=endpoint.timeout) as response:
            return json.loads(_read(response, deadline, most))
    except urllib.error.HTTPError as error:
        with error:
            raise _refusal(endpoint, error) from None
    except urllib.error.URLError as error:  # before anything was answered: nobody is there
        why = one_line(str(error.reason) or repr(error))
        raise _Passing(f"cannot be reached ({why})", reached=False) from None
    except TimeoutError:
        raise _Passing(f"no answer within {endpoint.timeout:g} s") from None
    except (http.client.HTTPException, OSError) as error:
        raise _Passing(f"cannot be reached ({one_line(str(error) or repr(error))})") from None
    except (ValueError, RecursionError):
        raise _Passing("answered with something that is not JSON") from None


def _read(response: http.client.HTTPResponse, deadline: float, most: int) -> bytes:
    """A body, also if it drips in: within the deadline, and not without end."""
    found = b""
    while chunk := response.read1(2**16):
        found += chunk
        if time.monotonic() > deadline:
            raise TimeoutError
        if len(found) > most:
            raise _Passing(f"answered with more than {most} bytes")
    return found


def _refusal(endpoint: Endpoint, error: urllib.error.HTTPError) -> Exception:
    """What an error of HTTP means."""
    try:
        said = error.read(2**16).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        said = ""
    shown = one_line(said)[:SHOWN] if said.strip() else str(error.reason)
    if endpoint.key:
        shown = shown.replace(endpoint.key, "***")
    if error.code in PASSING:
        return _Passing(f"HTTP {error.code} ({shown})", _retry_after(error))
    advice = {
        401: f"; look at the key in {endpoint.key_name}",
        403: f"; look at the key in {endpoint.key_name}",
        404: f"; look at the address and at the model's name, {endpoint.model}",
    }.get(error.code, "")
    if 300 <= error.code < 400:
        advice = "; it wants to redirect, which is not followed: give the address itself"
    kind = UnavailableError if error.code in ABOUT_ONE_QUESTION else VlmError
    return kind(f"{endpoint.url}: HTTP {error.code} ({shown}){advice}")


def _retry_after(error: urllib.error.HTTPError) -> float:
    """Seconds that the server asks to wait; 0 if it does not say, or gives a date."""
    try:
        seconds = float(error.headers.get("Retry-After", 0))
    except ValueError:
        return 0.0
    return seconds if math.isfinite(seconds) and seconds > 0 else 0.0


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _messages(parts: Sequence[Part], system: str) -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = []
    for part in parts:
        if isinstance(part, str):
            content.append({"type": "text", "text": part})
        elif isinstance(part, Picture):
            url = f"data:{part.kind};base64,{_base64(part.data)}"
            content.append({"type": "image_url", "image_url": {"url": url}})
        else:
            raise VlmError("whole videos are for the API gemini; send frames, or choose it")
    messages = [{"role": "system", "content": system}] if system else []
    return [*messages, {"role": "user", "content": content}]


def _openai_request(
    endpoint: Endpoint, parts: Sequence[Part], system: str
) -> tuple[str, dict[str, Any]]:
    body: dict[str, Any] = {"model": endpoint.model, "messages": _messages(parts, system)}
    if endpoint.temperature is not None:
        body["temperature"] = endpoint.temperature
    return f"{endpoint.url}/chat/completions", body


def _gemini_request(
    endpoint: Endpoint, parts: Sequence[Part], system: str
) -> tuple[str, dict[str, Any]]:
    content: list[dict[str, Any]] = []
    for part in parts:
        if isinstance(part, str):
            content.append({"text": part})
            continue
        content.append({"inline_data": {"mime_type": part.kind, "data": _base64(part.data)}})
        if isinstance(part, Film) and part.fps is not None:
            content[-1]["video_metadata"] = {"fps": part.fps}
    body: dict[str, Any] = {"contents": [{"role": "user", "parts": content}]}
    if system:
        body["system_instruction"] = {"parts": [{"text": system}]}
    if endpoint.temperature is not None:
        body["generationConfig"] = {"temperature": endpoint.temperature}
    model = urllib.parse.quote(endpoint.model.removeprefix("models/"), safe="")
    return f"{endpoint.url}/models/{model}:generateContent", body


def _openai_text(answer: Any) -> tuple[str, str | None]:
    """The text of a chat completion, and the model's name."""
    try:
        content = answer["choices"][0]["message"]["content"]
        if isinstance(content, list):
            content = "".join(part.get("text", "") for part in content)
    except (KeyError, IndexError, TypeError, AttributeError):
        content = None
    return _text(content), _name(answer, "model")


def _gemini_text(answer: Any) -> tuple[str, str | None]:
    """The text of Google's reply, and the model's name; thoughts are left out."""
    try:
        parts = answer["candidates"][0]["content"]["parts"]
        content = "".join(part.get("text", "") for part in parts if not part.get("thought"))
    except (KeyError, IndexError, TypeError, AttributeError):
        content = None
    return _text(content), _name(answer, "modelVersion")


def _text(content: Any) -> str:
    if not isinstance(content, str) or not content.strip():
        raise JunkError("the reply has no text in it")
    return content


def _name(answer: Any, key: str) -> str | None:
    name = answer.get(key) if isinstance(answer, dict) else None
    return name if isinstance(name, str) and name else None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise JunkError("a key stands twice in the JSON of the reply")
    return found


def _no_constant(name: str) -> None:
    raise JunkError(f"{name} in the JSON of the reply; expected numbers")


_REQUESTS = {"openai": _openai_request, "gemini": _gemini_request}
_TEXTS = {"openai": _openai_text, "gemini": _gemini_text}

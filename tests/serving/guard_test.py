"""Who may talk to the server."""

from __future__ import annotations

import pytest

from chameleon_jax.serving.guard import Guard, Rate, bearer, new_token


def test_tokens():
    token = new_token()
    guard = Guard(token, ["127.0.0.1"])
    assert guard.knows(token) and len(token) > 40 and token != new_token()
    for wrong in ("", None, token[:-1], token + "x", "é" * 40, token.swapcase()):
        assert not guard.knows(wrong)
    assert Guard(None, []).knows("")
    assert bearer(f"Bearer {token}") == token and bearer(f"bearer  {token} ") == token
    assert bearer(None) is None and bearer(f"Basic {token}") is None


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("127.0.0.1", True),
        ("127.0.0.1:8000", True),
        ("LOCALHOST:1", True),
        ("[::1]:8000", True),
        ("", False),
        ("evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("localhost@evil.example", False),
        ("[::1", False),
        ("[::2]", False),
    ],
)
def test_hosts(host, allowed):
    assert Guard("t", ["127.0.0.1", "localhost", "[::1]"]).host(host) == allowed


@pytest.mark.parametrize(
    ("origin", "host", "authorized", "allowed"),
    [
        ("http://localhost:8000", "localhost:8000", False, True),
        ("http://localhost:8000", "localhost:9000", True, False),
        ("https://localhost:8000", "localhost:8000", True, False),
        ("http://evil.example", "localhost:8000", True, False),
        ("http://evil.example", "evil.example", True, False),
        ("null", "localhost:8000", True, False),
        ("", "localhost:8000", True, False),
        (None, "localhost:8000", True, True),
        (None, "localhost:8000", False, False),
    ],
)
def test_origins(origin, host, authorized, allowed):
    assert Guard("t", ["localhost"]).origin(origin, host, "http", authorized) == allowed


def test_a_rate_is_one_of_each_address():
    rate = Rate(3, 10.0)
    assert [rate.allows("a", t) for t in (0, 1, 2, 3)] == [True, True, True, False]
    assert rate.allows("b", 3)
    assert rate.allows("a", 10.5) and not rate.allows("a", 10.6)
    for number in range(20_000):
        rate.allows(f"x{number}", 20.0)
    assert len(rate._times) <= 10_000

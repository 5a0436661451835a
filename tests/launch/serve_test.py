"""The command that serves: what cannot be is said before the model is loaded."""

from __future__ import annotations

import socket

import pytest

from chameleon_jax.serving.pictures import Wardrobe
from launch import cli, serve
from launch.cli import UsageError


def values(*flags: str) -> cli.Values:
    return cli.read(serve.define_flags, flags)


def test_a_port_that_is_taken_is_said_at_once():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"--port {port}: cannot listen there .*another port"):
            serve.serve(values("--port", str(port), "--weights", "no/such/folder"))
    with pytest.raises(UsageError, match="--host 192.0.2.1 --port 0: cannot listen there"):
        serve.listen("192.0.2.1", 0)  # an address that no machine has
    with serve.listen("127.0.0.1", 0) as found:
        assert found.getsockname()[1] > 0


def test_others_need_the_token():
    with pytest.raises(UsageError, match="--noauth with --host 0.0.0.0: only this machine"):
        serve.serve(values("--noauth", "--host", "0.0.0.0"))


def test_a_wardrobe_has_people_and_garments(tmp_path):
    wardrobe = Wardrobe((64, 48))
    serve.fill(wardrobe, None)
    assert [one.kind for one in wardrobe.listed()] == ["person"] + ["garment"] * 3
    (tmp_path / "people").mkdir()
    (tmp_path / "people" / "her_face.png").write_bytes((serve.EXAMPLES / "person.png").read_bytes())
    other = Wardrobe((64, 48))
    with pytest.raises(UsageError, match="no pictures in .*garments; expected some of .png"):
        serve.fill(other, tmp_path)
    assert other.listed()[0].title == "her face"

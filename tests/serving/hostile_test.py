"""The live server against hostile input: pictures, names, hosts and origins, tokens, messages.

Sizes stand in `tests/serving/figures.py`.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import io
import json
import os
import random
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from starlette.websockets import WebSocketDisconnect

from chameleon_jax.errors import ROOT
from chameleon_jax.serving import app as serving
from chameleon_jax.serving import guard as guards
from chameleon_jax.serving import pictures as opening
from chameleon_jax.serving import protocol
from chameleon_jax.serving.guard import Guard
from tests.serving import figures
from tests.serving.client import BEARER, TOKEN, Server, Viewer
from tests.serving.figures import SLACK, note, size
from tests.serving.wire import (
    PATIENCE,
    Player,
    Wire,
    faults,
    logged,
    memory,
    secrets_in,
    watch,
)

MB = 1e6


@pytest.fixture(scope="module", autouse=True)
def table(request):
    yield
    figures.show(request.config)


@pytest.fixture(scope="module")
def server(pipeline, pictures):
    with Server(pipeline, pictures) as running:
        yield running


@pytest.fixture(scope="module")
def wire(pipeline, pictures):
    with Wire(pipeline, pictures) as running:
        yield running


# X1: pictures.

MODES = ("RGB", "RGBA", "L", "LA", "P", "1", "I;16")
SIGNATURES = {"png": b"\x89PNG\r\n\x1a\n", "jpeg": b"\xff\xd8\xff", "webp": b"RIFF"}


def picture(mode="RGB", size=(40, 56), seed=0):
    pixels = np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), np.uint8)
    if mode == "I;16":
        return Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    return Image.fromarray(pixels).convert(mode)


def encoded(image, format_, **options):
    buffer = io.BytesIO()
    image.save(buffer, format_, **options)
    return buffer.getvalue()


def png_of(width, height, *chunks):
    """A PNG with a header and what is said; the sums are right."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IEND", b"")]
    return SIGNATURES["png"] + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in parts
    )


@functools.cache
def good_pictures() -> dict[str, bytes]:
    """Those that are to be used."""
    plain = picture()
    found = {f"png {mode}": encoded(picture(mode), "PNG") for mode in MODES}
    for turn in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = turn
        found[f"turned {turn}"] = encoded(plain, "JPEG", exif=exif)
    many = {"save_all": True, "append_images": [picture(seed=i) for i in range(1, 9)]}
    much = zlib.compress(b"\0" * 60_000_000, 9)
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "<script>alert(1)</script>" * 20)
    palette = picture("P")
    palette.info["transparency"] = 0
    found |= {
        "jpeg CMYK": encoded(plain.convert("CMYK"), "JPEG"),
        "jpeg grey": encoded(plain.convert("L"), "JPEG"),
        "jpeg progressive": encoded(plain, "JPEG", progressive=True),
        "jpeg with a script": encoded(plain, "JPEG", comment=b"<script>alert(1)</script>"),
        "webp": encoded(plain, "WEBP"),
        "webp alpha": encoded(picture("RGBA"), "WEBP", lossless=True),
        "webp animated": encoded(plain, "WEBP", **many),
        "png animated": encoded(plain, "PNG", **many),
        "png palette alpha": encoded(palette, "PNG"),
        "png with text": encoded(plain, "PNG", pnginfo=text),
        "png damaged profile": encoded(plain, "PNG", icc_profile=b"no profile"),
        "png and a zip": encoded(plain, "PNG") + b"PK\x03\x04" + b"\0" * 500,
        "png and a page": encoded(plain, "PNG") + b"<html><script>alert(1)</script>",
        "png with more data than pixels": png_of(40, 40, (b"IDAT", much)),
        "a pixel png": encoded(picture(size=(1, 1)), "PNG"),
        "a pixel jpeg": encoded(picture(size=(1, 1)), "JPEG"),
        "a pixel webp": encoded(picture(size=(1, 1)), "WEBP"),
        "39 megapixels": encoded(Image.new("RGB", (6200, 6300), "red"), "JPEG"),
        "39 megapixels alpha": encoded(Image.new("RGBA", (6200, 6300)), "PNG", compress_level=1),
    }
    return found


@functools.cache
def bad_pictures() -> dict[str, bytes]:
    """Those that are to be refused."""
    plain = picture(size=(80, 100))
    png, jpeg, webp = (encoded(plain, name) for name in ("PNG", "JPEG", "WEBP"))
    start = jpeg.find(b"\xff\xc0") + 5
    large = jpeg[:start] + struct.pack(">HH", 65500, 65500) + jpeg[start + 4 :]
    huge = zlib.compress(b"\0" * 60_000_000, 9)
    found = {f"only the start of {name}": start for name, start in SIGNATURES.items()}
    for name, data in (("png", png), ("jpeg", jpeg), ("webp", webp)):
        found[f"half a {name}"] = data[: len(data) // 2]
        found[f"all but the start of {name}"] = data[4:]
    found |= {
        "nothing": b"",
        "a byte": b"\x89",
        "81 megapixels": encoded(Image.new("1", (9000, 9000)), "PNG"),
        "400 megapixels": png_of(20_000, 20_000, (b"IDAT", huge)),
        "4 gigapixels": png_of(65_535, 65_535, (b"IDAT", b"")),
        "a line": encoded(Image.new("L", (65_000, 1)), "PNG"),
        "a column": encoded(Image.new("L", (1, 65_000)), "PNG"),
        "no width": png_of(0, 10, (b"IDAT", b"")),
        "most pixels there can be": png_of(2**31 - 1, 2**31 - 1, (b"IDAT", b"")),
        "no data": png_of(40, 40),
        "a text that unfolds": png_of(40, 40, (b"zTXt", b"x\0\0" + huge), (b"IDAT", b"")),
        "a jpeg that says 65500 x 65500": large,
        "a wrong sum": png[:29] + b"0000" + png[33:],
        "sound": b"RIFF\x24\0\0\0WAVEfmt " + b"\0" * 40,
        "more than 15 MB": SIGNATURES["png"] + b"\0" * 15_000_000,
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg'><script/></svg>",
        "svg with a head": b"<?xml version='1.0'?><!DOCTYPE svg [<!ENTITY x SYSTEM 'file:///'>]>",
        "svg, packed": gzip.compress(b"<svg/>"),
        "gif": encoded(plain, "GIF"),
        "bmp": encoded(plain, "BMP"),
        "tiff": encoded(plain, "TIFF"),
        "ico": encoded(plain, "ICO"),
        "pdf": encoded(plain, "PDF"),
        "heic": b"\0\0\0\x18ftypheic" + b"\0" * 40,
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n(/etc/passwd) run",
        "fits": b"SIMPLE  =                    T",
        "a page": b"<!doctype html><script>alert(1)</script>",
        "a program": b"MZ" + b"\0" * 200,
        "a gif that goes on as png": b"GIF89a" + png,
        "a png that goes on as gif": SIGNATURES["png"] + encoded(plain, "GIF"),
    }
    return found


def mutated(count):
    """Damaged pictures, always the same ones."""
    random_ = random.Random(1)
    small = [data for data in good_pictures().values() if len(data) < 50_000]
    for _ in range(count):
        data = bytearray(random_.choice(small))
        for _ in range(random_.randrange(1, 12)):
            spot = random_.randrange(len(data) + 1)
            match random_.randrange(5):
                case 0:
                    data[spot : spot + 1] = random_.randbytes(1)
                case 1:  # a length, or a size
                    data[spot : spot + 4] = random_.choice(
                        [b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\1"]
                    )
                case 2:
                    data[spot:spot] = data[: random_.randrange(64)]
                case 3:
                    del data[spot : spot + random_.randrange(1, 32)]
                case 4 if len(data) > 60:
                    del data[random_.randrange(40, len(data)) :]
        yield bytes(data)


@pytest.mark.slow
def test_bad_pictures_are_refused_and_good_ones_used(server):
    """Through the server: some in every run, all before a release."""
    good, bad, random_ = good_pictures(), bad_pictures(), random.Random(2)
    names = random_.sample([*good, *bad], min(len(good | bad), size("X1 fixed pictures over HTTP")))
    names += [name for name in bad if not could_open(bad[name]) and name not in names]
    answers, took = {}, {}
    with logged() as log:
        for name in names:
            begin = time.monotonic()
            answers[name] = put(server, (good | bad)[name])
            took[name] = time.monotonic() - begin
        strange = [put(server, data) for data in mutated(size("X1 mutated pictures over HTTP"))]
    refused = max((took[name] for name in names if name in bad), default=0.0)
    note(
        "X1 pictures over HTTP",
        f"{len(names)} fixed, {len(strange)} mutated",
        "4xx in <= 1 s each",
        s_refused_max=refused,
        s_used_max=max((took[name] for name in names if name in good), default=0.0),
        mutated_used=sum(status == 200 for status, _ in strange),
    )
    wrong = {
        name: answer
        for name, answer in answers.items()
        if answer[0] not in ((200,) if name in good else (413, 415))
    }
    assert wrong == {} and {status for status, _ in strange} <= {200, 415}
    assert not any("/" in said or "Traceback" in said for _, said in strange)
    assert faults(log) == [] and refused < SLACK


def put(server, data, kind="garment") -> tuple[int, str]:
    answer = server.client.put(f"/api/pictures/{kind}", content=data, headers=BEARER)
    return answer.status_code, answer.json().get("message", "")


def could_open(data) -> bool:
    """Whether it is opened at all, in a process of its own."""
    try:
        opening.check_upload("garment", data)
    except opening.PictureError:
        return False
    return True


@pytest.mark.slow
def test_no_picture_breaks_the_process_that_opens_it(tmp_path):
    """All of them, through the function of the child process, with its limits."""
    good, bad = good_pictures(), bad_pictures()
    files = {f"good {name}": data for name, data in good.items()}
    files |= {f"bad {name}": data for name, data in bad.items() if could_open(data)}
    files |= {f"mutated {i}": x for i, x in enumerate(mutated(size("X1 mutated pictures")))}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    command = [sys.executable, "-m", "tests.serving.opener", tmp_path, "64", "48"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True)
    found = {one["name"]: one for one in map(json.loads, done.stdout.splitlines())}
    assert found.keys() == files.keys()
    slow = max(found.values(), key=lambda one: one["seconds"])
    fat = max(found.values(), key=lambda one: one["peak"])
    killed = {name: one for name, one in found.items() if one["status"] < 0}
    note(
        "X1 pictures in the child",
        f"{len(good)} good, {len(bad)} bad, {size('X1 mutated pictures')} mutated",
        "<= 1 s each, peak < 512 MB, 0 killed",
        killed=len(killed),
        used=sum(one["status"] == 0 for one in found.values()),
        s_max=slow["seconds"],
        slowest=slow["name"],
        mb_max=fat["peak"] / MB,
        fattest=fat["name"],
    )
    assert killed == {}
    for name, one in found.items():
        kind, used = name.split()[0], one["status"] == 0
        assert used == (one["bytes"] == 64 * 48 * 3), one
        assert kind == "mutated" or used == (kind == "good"), one
        assert one["status"] in (0, 3) or "Error" in one["said"], one
        assert one["seconds"] < SLACK and one["peak"] < 512 * MB, one


def test_an_upload_that_breaks_off_is_nobodys_fault(wire):
    head = (
        f"PUT /api/pictures/garment HTTP/1.1\r\nHost: testserver\r\nContent-Length: 100000\r\n"
        f"Authorization: Bearer {TOKEN}\r\n\r\n"
    )
    logged_before = len(faults(wire.log))
    for sent in (0, 10, 90_000):
        wire.ask(head.encode() + b"\x89PNG" + b"\0" * sent, shut=True)
    wire.wait_until_empty()
    assert faults(wire.log)[logged_before:] == []
    watch(wire)


# X3: names and paths.

NAMES = (
    *("../secret.txt", "../../secret.txt", "..%2fsecret.txt", "%2e%2e/secret.txt"),
    *("%2e%2e%2fsecret.txt", "%252e%252e%252fsecret.txt", "....//secret.txt", "./../secret.txt"),
    *("..\\secret.txt", "..%5csecret.txt", "..%5c..%5csecret.txt", "%5c%5chost%5cshare"),
    *("/etc/passwd", "//etc/passwd", "%2fetc%2fpasswd", "file:///etc/passwd", "C:%5cwin.ini"),
    *("link.txt", "folder/secret.txt", "folder", "folder/", "link.txt/", "main.js/../link.txt"),
    *("%00", "main.js%00", "main.js%00.txt", "..%00/secret.txt", "%0d%0aX-Injected:%201"),
    *("%e2%80%a5/secret.txt", "%ef%bc%8e%ef%bc%8e/secret.txt", "%c0%ae%c0%ae/secret.txt"),
    *("%ff%fe", "tr%c3%a4umt", "%f0%9f%91%97", "a" * 4096, "../" * 1000 + "etc/passwd"),
    *("/dev/zero", "dev/stdin", "/proc/self/environ", "CON", "NUL", "aux.txt", "COM1:"),
    *(".", "..", "~root", "$(id)", ";id", "index.html/../../secret.txt", "con::$DATA"),
)
ROUTES = (
    ("GET", "/{}"),
    ("HEAD", "/{}"),
    ("PUT", "/api/pictures/{}"),
    ("GET", "/api/streams/{}/recording.mp4"),
    ("GET", "/api/streams/{}/manifest.json"),
)
_opened: list[str] | None = None  # files that this process opens, while they are listed
_hooked = False


def _note_open(event, args):
    if _opened is not None and event == "open" and isinstance(args[0], (str, bytes)):
        _opened.append(os.fsdecode(args[0]))


@contextlib.contextmanager
def opened_files():
    global _opened, _hooked
    if not _hooked:  # it cannot be taken away again
        sys.addaudithook(_note_open)
        _hooked = True
    _opened = found = []
    try:
        yield found
    finally:
        _opened = None


@pytest.mark.slow
def test_no_name_leads_out_of_the_page(pipeline, pictures, tmp_path, monkeypatch):
    page = tmp_path / "page"
    shutil.copytree(serving.PAGE, page)
    (tmp_path / "secret.txt").write_text("of nobody's business")
    (page / "link.txt").symlink_to(tmp_path / "secret.txt")
    (page / "folder").symlink_to(tmp_path)
    monkeypatch.setattr(serving, "PAGE", page)
    data = (pictures / "coat.png").read_bytes()
    own = {
        path.read_bytes() for path in page.iterdir() if path.is_file() and "link" not in path.name
    }
    answers: dict[int, int] = {}
    with Wire(pipeline, pictures) as server:
        ask(server, "GET", "/main.js")
        before = tree(tmp_path)
        with opened_files() as opened:
            for method, route in ROUTES:
                for name in NAMES:
                    status, body = ask(server, method, route.format(name), data)
                    answers[status] = answers.get(status, 0) + 1
                    assert status in (200, 307, 400, 404, 405, 415, 431), (method, route, name)
                    assert status != 200 or body == b"" or body in own, (method, route, name)
                    assert b"of nobody" not in body and b"root:" not in body
            assert ask(server, "GET", "/main.js")[1] in own
        assert tree(tmp_path) == before
        outside = {path for path in opened if os.path.isabs(path) and is_outside(path, page)}
        for name in ("../secret.txt", "/etc/passwd", "person_\0", "garment_" + "0" * 24):
            with server.connect() as one:
                code, messages = greeted(server, one, garment=name)
                assert code == 4400 and messages[-1]["type"] == "session.error"
        assert faults(server.log) == []
    count = len(NAMES) * len(ROUTES)
    note(
        "X3 names",
        f"{len(NAMES)} names on {len(ROUTES)} routes",
        "0 files outside of the page are read or written",
        outside=len(outside),
        answers=count,
        **{f"status_{status}": number for status, number in sorted(answers.items())},
    )
    assert outside == set() and any(str(page) in path for path in opened)


def is_outside(path, page) -> bool:
    """Whether a file belongs neither to the page nor to Python and this project."""
    real = os.path.realpath(path)
    inside = (os.path.realpath(page), sys.prefix, sys.base_prefix, str(ROOT), "/proc/self/statm")
    return not real.startswith(inside)


def tree(folder) -> dict[str, float]:
    """Every file below with its time."""
    return {
        str(path): path.lstat().st_mtime for path in sorted([*folder.rglob("*"), *ROOT.iterdir()])
    }


def ask(server, method, path, data=b"", headers=()):
    """One request of raw bytes; a body for PUT only."""
    data = data if method == "PUT" else b""
    lines = [
        f"{method} {path} HTTP/1.1",
        "Host: testserver",
        f"Authorization: Bearer {TOKEN}",
        f"Content-Length: {len(data)}",
        "Connection: close",
        *headers,
    ]
    return server.ask("\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + data)


def greeted(server, one, **hello):
    Viewer(one, server).start(**hello)
    return one.closed()


# X4: hosts and origins.

OTHER_HOSTS = (
    *("evil.example", "testserver.evil.example", "eviltestserver", "testserver.", "sub.testserver"),
    *(
        "127.0.0.1",
        "localhost",
        "0.0.0.0",
        "[::1]",
        "[::1].evil.example",
        "testserver@evil.example",
    ),
    *("testserver:evil.example", "testserver:80:80", "testserver:", "testserver,evil.example"),
    *("", "testserver evil.example", "xn--testserver-1fa", "testserver/evil.example", "*"),
)
OTHER_ORIGINS = (
    *("http://evil.example", "null", "", "{host}", "https://{host}", "http://testserver"),
    *("http://{host}.evil.example", "http://{host}@evil.example", "http://sub.{host}"),
    *("http://testserver:1", "http://{host}/", "file://", "http://evil.example#{host}"),
    *("chrome-extension://abc", "http://{host} http://evil.example", "http://127.0.0.1:{port}"),
)


@pytest.mark.slow
def test_other_hosts_and_origins_are_refused(wire):
    host, right = f"testserver:{wire.port}", f"http://testserver:{wire.port}"
    token = f"Authorization: Bearer {TOKEN}"
    begun, asked = wire.engine.figures.total(), 0

    def refused(name, *lines):
        nonlocal asked
        asked += 1
        if "Upgrade: websocket" not in lines:
            lines += ("Connection: close",)
        status, _ = wire.ask("\r\n".join([*lines, "", ""]).encode("latin-1"))
        assert status in (400, 403), (name, lines, status)

    for one in OTHER_HOSTS:
        for method in ("GET", "PUT"):
            refused(one, f"{method} /api/wardrobe HTTP/1.1", f"Host: {one}", token)
        refused(one, *handshake(one), f"Origin: {right}", token)
        refused(one, *handshake(one), f"Origin: http://{one}", token)  # DNS rebinding
    refused("none", "GET / HTTP/1.1", token)
    refused("two", *handshake(host), f"Host: {host}", f"Origin: {right}")
    for one in OTHER_ORIGINS:
        origin = "Origin: " + one.format(host=host, port=wire.port)
        refused(one, *handshake(host), origin)
        refused(one, *handshake(host), origin, token)
        refused(one, "PUT /api/pictures/garment HTTP/1.1", f"Host: {host}", origin, token)
    refused("missing", *handshake(host))
    refused("missing", *handshake(host), "Authorization: Bearer wrong")
    for two in ((right, "http://evil.example"), ("http://evil.example", right)):
        refused("two", *handshake(host), *(f"Origin: {one}" for one in two))
    assert upgraded(wire, *handshake(host), f"Origin: {right}")
    assert upgraded(wire, *handshake(host), token)
    assert wire.engine.figures.total() == begun and faults(wire.log) == []
    note(
        "X4 hosts and origins", f"{asked} requests", "all refused, before any device work", let_in=0
    )


def handshake(host, path="/api/stream"):
    return (
        f"GET {path} HTTP/1.1",
        f"Host: {host}",
        "Upgrade: websocket",
        "Connection: Upgrade",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    )


def upgraded(wire, *lines) -> bool:
    with socket.create_connection(("127.0.0.1", wire.port), timeout=PATIENCE) as tcp:
        tcp.sendall("\r\n".join([*lines, "", ""]).encode())
        return tcp.recv(100).startswith(b"HTTP/1.1 101")


@pytest.mark.parametrize(
    "host",
    ["[::1].evil.example", "[::1]evil", "[::1]:80:80", "[::1]:x", "localhost:x", "localhost:80@e"],
)
def test_what_looks_like_an_allowed_host_is_not(host):
    guard = Guard("t", ["localhost", "[::1]"])
    assert not guard.host(host)
    assert guard.host("[::1]:80") and guard.host("localhost:80")


@pytest.mark.parametrize("path", ["/", "/main.js", "/api/wardrobe", "/api/streams/x/manifest.json"])
def test_no_other_path_has_a_websocket(wire, path):
    right = f"Origin: http://testserver:{wire.port}"
    with_key = handshake(f"testserver:{wire.port}", path)
    status, _ = wire.ask("\r\n".join([*with_key, right, "", ""]).encode())
    assert status in (403, 404) and faults(wire.log) == []


# X5: tokens.

WRONG = ("", "x", TOKEN[:-1], TOKEN + "x", TOKEN + "\x01", TOKEN.swapcase(), "é" * 6, "a" * 256)
HEADERS = (
    "X-None: 1",
    *(f"Authorization: Bearer {word}" for word in WRONG if word.isascii() and word.isprintable()),
    *(f"Authorization: {scheme} {TOKEN}" for scheme in ("Basic", "Token", "Bearerx")),
    *(f"Authorization: {TOKEN}", f"Cookie: token={TOKEN}", f"X-Token: {TOKEN}"),
)


@pytest.mark.slow
def test_without_the_token_nothing_is_done(pipeline, pictures, monkeypatch):
    opened, compared = [], []
    monkeypatch.setattr(opening, "_opened_apart", lambda *args: opened.append(args))
    compare = guards.hmac.compare_digest
    monkeypatch.setattr(
        guards.hmac, "compare_digest", lambda *args: compared.append(args) or compare(*args)
    )
    data, asked = (pictures / "coat.png").read_bytes(), 0
    with Wire(pipeline, pictures) as server:
        before = server.engine.figures.copy()
        host, right = f"Host: testserver:{server.port}", f"Origin: http://testserver:{server.port}"
        routes = ("GET /api/wardrobe", "PUT /api/pictures/garment")
        routes += ("GET /api/streams/x/recording.mp4", "GET /api/streams/x/manifest.json")
        for header in HEADERS:
            for route in routes:
                for query in ("", f"?token={TOKEN}", f"?access_token={TOKEN}"):
                    lines = [f"{route}{query} HTTP/1.1", host, right, header, "Connection: close"]
                    body = data if route.startswith("PUT") else b""
                    lines += [f"Content-Length: {len(body)}", "", ""]
                    status, _ = server.ask("\r\n".join(lines).encode() + body)
                    assert status == 401, (route, header)
                    asked += 1
        for word in (*WRONG, None):
            with server.connect(path=f"/api/stream?token={TOKEN}") as one:
                code, messages = greeted(server, one, token=word or "")
                assert code == (4400 if word == TOKEN + "\0" else 4401)
                assert [x["type"] for x in messages] == ["session.error"]
                asked += 1
        assert server.engine.figures == before and opened == []
        assert not server.live.active and not server.live.finished
        watch(server)
        assert secrets_in(server.log) == [] and faults(server.log) == []
    assert len(compared) >= asked
    note("X5 tokens", f"{asked} requests", "refused, nothing done, in no log", let_in=0)


# X6: messages.


def masked(opcode, data, first=0x80, mask=True):
    """A frame of a WebSocket."""
    length = len(data)
    head = bytes([first | opcode])
    bit = 0x80 if mask else 0
    if length < 126:
        head += bytes([bit | length])
    elif length < 65_536:
        head += bytes([bit | 126]) + struct.pack(">H", length)
    else:
        head += bytes([bit | 127]) + struct.pack(">Q", length)
    return head + (b"\0\0\0\0" if mask else b"") + data  # a key of zeros leaves it as it is


def rude_messages(server) -> dict[str, tuple[bytes, set[int]]]:
    """Frames, and the codes with which the server may close."""
    hello = json.dumps(server.hello()).encode()
    wrong, text, binary = {4400}, 1, 2
    deep = b'{"type": ' * 20_000 + b"1" + b"}" * 20_000
    long = b'{"type": "session.start", "prompt": "' + b"x" * 100_000 + b'"}'
    found = {
        "16 MB": (masked(text, b" " * 16_000_000), {1009}),
        "16 MB binary": (masked(binary, b" " * 16_000_000), {1009}),
        "2 MB in parts": (
            masked(text, b" " * 500_000, 0) + masked(0, b" " * 500_000, 0) * 3,
            {1009},
        ),
        "the length of all": (b"\x81\xff" + b"\xff" * 8 + b"\0" * 4, {1002, 1009}),
        "100 KB": (masked(text, long), wrong),
        "binary first": (masked(binary, b"\x89PNG"), wrong),
        "a hello in binary": (masked(binary, hello), wrong),
        "no frame": (b"GET / HTTP/1.1\r\n\r\n", {1002}),
        "not masked": (masked(text, hello, mask=False), {1002}),
        "reserved bits": (masked(text, hello, 0xF0), {1002}),
        "unknown opcode": (masked(7, b"x"), {1002}),
        "a long ping": (masked(9, b"x" * 200), {1002}),
        "a part of nothing": (masked(0, b"x"), {1002}),
        "a close of one byte": (masked(8, b"x"), {1002}),
        "a close with a wrong code": (masked(8, b"\0\1"), {1002}),
        "a close that says what": (masked(8, struct.pack(">H", 4400) + b"x"), {4400}),
        "no text": (masked(text, b"\xff\xfe"), {1007}),
        "deep": (masked(text, b"[" * 60_000), wrong),
        "deep objects": (masked(text, deep[:60_000]), wrong),
    }
    words = ("", " ", "null", "3", '"x"', "[]", "{}", "{", '{"type": NaN}', '{"type": 1e999}')
    words += ('{"type": ["session.start"]}', '{"type": {"a": 1}}', '{"type": "session.go"}')
    words += ('{"type": "session.ping"}', '{"type": "session.ping", "x": 1}', "1" * 5000)
    words += ('{"type": "\\ud800"}', '{"\\u0000": 1}', '{"type": "session.played", "frame": -1}')
    words += ('{"type": "session.start", "version": 1}', '{"type": "session.start", "type": 3}')
    return found | {word[:40]: (masked(text, word.encode()), wrong) for word in words}


@pytest.mark.slow
def test_rude_messages_close_their_own_connection(wire, monkeypatch):
    monkeypatch.setattr(serving, "RECONNECT", 0.0)
    messages = rude_messages(wire)
    codes = {}
    for started in (False, True):
        for name, (data, allowed) in messages.items():
            if started and name == '{"type": "session.ping"}':
                continue
            with wire.connect() as one:
                if started:
                    Viewer(one, wire).start().until("session.ready")
                with contextlib.suppress(OSError):
                    one.tcp.sendall(data)
                code, said = one.closed()
                codes[code] = codes.get(code, 0) + 1
                assert code in allowed, (name, code)
                assert code != 4400 or allowed == {4400} or said or started, name
            wire.wait_until_empty()
    watch(wire)
    wire.wait_until_empty()
    # uvicorn itself says so of text that is none.
    assert [line for line in faults(wire.log) if "Invalid UTF-8" not in line] == []
    note(
        "X6 rude messages",
        f"{sum(codes.values())}, first and in a stream",
        "a close code, 0 exceptions in the log",
        **{f"code_{code}": count for code, count in sorted(codes.items())},
    )


def valid(random_, type_, server) -> dict:
    """A message that the tables allow."""
    names = list(server.names.values())
    message = {"type": type_}
    for key, field in protocol.CLIENT[type_].items():
        if not field.needed and random_.random() < 0.5:
            continue
        message[key] = {
            "string": random_.choice([*names, "", "x" * int(min(field.most, 64)), "träumt"]),
            "integer": random_.choice([int(field.least), int(field.most), 7]),
            "number": 0.5,
            "boolean": True,
            "words": list(field.choices[: random_.randrange(4)]),
        }[field.kind]
        if field.choices and field.kind == "string":
            message[key] = random_.choice(field.choices)
    if type_ == "session.start":
        message |= {"version": 1, "token": TOKEN, "person": names[0], "garment": names[1]}
    return message


HOSTILE = (
    None,
    True,
    -1,
    2**70,
    1e308,
    "x" * 3000,
    "\0",
    "\ud800",
    [],
    {},
    [[[[]]]],
    0.5,
    "refresh",
)


def fuzzed(random_, type_, server) -> str:
    """A message of a client, damaged in its values or its text."""
    message = valid(random_, type_, server)
    for _ in range(random_.randrange(3)):
        key = random_.choice([*message, "type", "id", "frame", "garment", "x", ""])
        if random_.random() < 0.3:
            message.pop(key, None)
        else:
            message[key] = random_.choice([*HOSTILE, *message.values()])
    text = json.dumps(message)
    for _ in range(random_.randrange(3) if random_.random() < 0.4 else 0):
        spot = random_.randrange(len(text) + 1)
        text = (
            text[:spot]
            + random_.choice(['"', "}", "{", "\x00", "é", "9" * 50, ""])
            + (text[spot + random_.randrange(3) :])
        )
    return text


@pytest.mark.slow
def test_fuzzed_messages_are_answered(server, monkeypatch):
    """Each is obeyed, or refused with an error; the next client is served."""
    monkeypatch.setattr(serving, "RECONNECT", 0.0)
    random_, count = random.Random(6), size("X6 fuzzed messages")
    types = list(protocol.CLIENT)
    heard: dict[str, int] = {}
    sent = 0
    with logged() as log:
        while sent < count:
            first = random_.random() < 0.9
            with server.connect() as one:
                if not first:
                    Viewer(one, server).start().until("session.ready")
                for _ in range(1 if first else 30):
                    type_ = "session.start" if first and random_.random() < 0.6 else None
                    one.send_text(fuzzed(random_, type_ or random_.choice(types), server))
                    sent += 1
                    answer = answered(one, first)
                    heard[answer] = heard.get(answer, 0) + 1
                    if answer.startswith("closed") or answer == "session.done":
                        break
            server.wait_for(lambda: not server.live.active and not server.engine.streams)
        watch(server)
    assert faults(log) == [] and server.engine.figures["failed"] == 0
    assert not server.live.waiting and not server.live.left
    note(
        "X6 fuzzed messages",
        f"{sent} messages",
        "an answer to each, 0 exceptions in the log, the next client is served",
        **heard,
    )
    assert heard["closed 4400"] > count // 10 and heard["obeyed"] + heard["session.ready"] > 10


def answered(one, first) -> str:
    """What the server says to a message: of an error the code of the close that follows."""
    if not first:
        one.send_text('{"type": "session.ping"}')
    try:
        while True:
            message = one.receive()
            one._raise_on_close(message)
            type_ = json.loads(message["text"])["type"] if message.get("text") else ""
            if type_ == "session.pong":
                return "obeyed"
            if type_ == "session.done" or (first and type_ in ("session.ready", "session.queued")):
                return type_
    except WebSocketDisconnect as closed:
        return f"closed {closed.code}"


@pytest.mark.slow
def test_a_flood_of_messages_disturbs_nobody(pipeline, pictures):
    """1,000 a second, of a client that reads its answers."""
    seconds, sent = size("X6 seconds of a flood"), 0
    with Wire(pipeline, pictures, sessions=2) as server:
        player = Player(server, seed=2)
        player.start()
        server.wait_for(lambda: player.count, PATIENCE)
        alone, begin = player.count, time.monotonic()
        time.sleep(seconds)
        alone = (player.count - alone) / (time.monotonic() - begin)
        with server.connect() as one:
            viewer = Viewer(one, server).start()
            viewer.until("session.ready")
            codes = []
            reader = threading.Thread(target=lambda: codes.append(one.closed()[0]), daemon=True)
            reader.start()
            before, count, begin = memory(), player.count, time.monotonic()
            frames = [
                masked(1, json.dumps(message).encode())
                for message in (
                    {"type": "session.ping"},
                    {"type": "session.played", "frame": 0},
                    {"type": "session.interaction", "id": 1, "garment": server.names["coat"]},
                    {"type": "session.interaction", "id": 2, "garment": "none"},
                )
            ]
            with contextlib.suppress(OSError):
                while time.monotonic() < begin + seconds:
                    for _ in range(5):
                        one.tcp.sendall(b"".join(frames))
                        sent += len(frames)
                    time.sleep(0.02)
            took = time.monotonic() - begin
            disturbed, grown = (player.count - count) / took, memory() - before
            with contextlib.suppress(OSError):
                one.tcp.sendall(masked(1, b'{"type": "session.stop"}'))
            reader.join(PATIENCE)
        player.leave()
        server.wait_until_empty()
        watch(server)
        assert faults(server.log) == []
    note(
        "X6 flood",
        f"{sent / took:.0f} messages a second for {took:.1f} s",
        "the others go on, memory +- 50 MB",
        closed_with=codes[0] if codes else "none",
        frames_per_s_of_another=alone,
        in_the_flood=disturbed,
        memory_mb=grown / MB,
    )
    assert codes and codes[0] in (1000, 1005, 1006, 4429)
    assert disturbed > 0 and grown < 50 * MB

"""Reports as a table, and what a whole stream needs."""

from __future__ import annotations

import pytest

from chameleon_jax.targets import report

GB = 10**9


def made(program: str, **changes) -> dict:
    """A report as `compiling.report` makes it."""
    found = {
        "target": "v6e-1",
        "program": program,
        "mesh": {"tensor": 4},
        "compile_seconds": 12.3,
        "bytes": {"argument": 18 * GB, "output": 8 * GB, "alias": 7 * GB, "temporary": 2 * GB,
                  "program": 0},
        "peak_bytes": 21 * GB,
        "device_bytes": 32e9,
        "resident": {"dit": 10 * GB, "vae": GB, "text": 11 * GB, "cache": 7 * GB},
        "flops": {"model": 1.0, "hardware": 1.0, "not_counted": [], "by_compiler": 1.0},
        "least_seconds": {"compute": 0.2, "memory": 0.1},
        "collectives": {"all-reduce": {"count": 300, "bytes": 5 * GB}},
        "kernels": {"splash attention": 300},
        "moves": {},
    }  # fmt: skip
    return found | changes


def test_a_stream_needs_what_is_resident_and_the_most_that_a_program_works_in():
    decode = made(
        "decode_next",
        bytes={"argument": 4 * GB, "output": 4 * GB, "alias": 3 * GB, "temporary": 6 * GB,
               "program": GB},
        least_seconds={"compute": 0.1, "memory": 0.3},
    )  # fmt: skip
    encode = made("encode_text", bytes=made("x")["bytes"] | {"temporary": 90 * GB})
    stream = report.of_stream([encode, made("chunk"), decode], frames=12)
    assert stream.resident == 18 * GB  # without the text encoder
    assert stream.working == (4 - 3 + 6 + 1) * GB  # what is encoded elsewhere does not count
    assert stream.bytes == 26 * GB
    assert stream.fits
    assert stream.frames_a_second == pytest.approx(12 / (0.2 + 0.3))
    line = report.stream_line("a.py", "v6e-1", stream)
    assert "fits" in line
    assert "24.0 frames/s" in line
    assert "text encoder would be 11.0 GB" in line


def test_a_stream_that_does_not_fit_says_by_how_much():
    reports = [made("chunk", device_bytes=16e9), made("decode_next", device_bytes=16e9)]
    stream = report.of_stream(reports, frames=12)
    assert not stream.fits
    assert "5.0 GB too large" in report.stream_line("a.py", "v5e-1", stream)


def test_nothing_is_said_of_a_stream_of_which_a_program_lacks():
    failed = {"target": "v6e-1", "program": "decode_next", "mesh": {}, "error": "no"}
    assert report.of_stream([made("chunk")], 12) is None
    assert report.of_stream([made("chunk"), failed], 12) is None


def test_the_table_says_what_fits_and_what_failed():
    lines = report.table(
        [
            ("a.py", made("chunk")),
            ("a.py", made("big", peak_bytes=40 * GB)),
            ("a.py", {**made("x"), "error": "no memory", "too_large": True}),
            ("a.py", {**made("y"), "error": "not compiled within 3 minutes"}),
        ]
    ).splitlines()
    assert len(lines) == 6
    assert len({line.count("|") for line in lines}) == 1
    assert (
        "| 21.0 | 32 | 200 | 300 all-reduce (5 GB) | 300 splash attention | - | 12 s |" in lines[2]
    )
    assert "40.0 (too large)" in lines[3]
    assert "does not fit" in lines[4]
    assert "not compiled within 3 minutes" in lines[5]


def test_a_program_with_work_that_is_not_counted_claims_no_time():
    flops = made("x")["flops"] | {"not_counted": ["mystery"]}
    assert "not all counted" in report.table([("a.py", made("chunk", flops=flops))])

"""What is read from the text of compiled programs: written ones, and those of this machine."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from chameleon_jax.targets import hlo

WRITTEN = """HloModule step, is_scheduled=true

%inside (p: bf16[4,6]) -> bf16[24] {
  %p = bf16[4,6]{1,0} parameter(0)
  ROOT %copy.9 = bf16[24]{0} copy(%p)
}

%added (p.1: bf16[4,6]) -> bf16[4,6] {
  %p.1 = bf16[4,6]{1,0} parameter(0)
  %copy.8 = bf16[4,6]{0,1} copy(%p.1)
  ROOT %add.1 = bf16[4,6]{1,0} add(%copy.8, %copy.8)
}

%condition (state: (s32[], bf16[4,6])) -> pred[] {
  %state = (s32[], /*index=1*/bf16[4,6]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %end = s32[] constant(5)
  ROOT %less = pred[] compare(%i, %end), direction=LT
}

%body (state.1: (s32[], bf16[4,6])) -> (s32[], bf16[4,6]) {
  %state.1 = (s32[], bf16[4,6]{1,0}) parameter(0)
  %x = bf16[4,6]{1,0} get-tuple-element(%state.1), index=1
  %splash_mha_fwd.3 = bf16[4,6]{1,0} custom-call(%x), custom_call_target="tpu_custom_call"
  %reduced = bf16[4,6]{1,0} all-reduce(%splash_mha_fwd.3), replica_groups={{0,1}}, to_apply=%sum
  ROOT %next = (s32[], bf16[4,6]{1,0}) tuple(%reduced)
}

ENTRY %main (cache: bf16[4,6], new: bf16[1,6]) -> bf16[4,6] {
  %cache = bf16[4,6]{1,0} parameter(0)
  %new = bf16[1,6]{1,0} parameter(1)
  %moved = bf16[4,6]{0,1} copy(%cache)
  %fused = bf16[24]{0} fusion(%moved), kind=kLoop, calls=%inside
  %worked = bf16[4,6]{1,0} fusion(%moved), kind=kLoop, calls=%added
  %small = bf16[1,6]{1,0} transpose(%new), dimensions={0,1}
  %room = bf16[4,6]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  %seen = bf16[4,6]{1,0} custom-call(%moved), custom_call_target="__cudnn$fmhaSoftmax"
  %loop = (s32[], bf16[4,6]{1,0}) while(%start), condition=%condition, body=%body
  %gathered = (bf16[2,6]{1,0}, bf16[4,6]{1,0}) all-gather-start(%small), dimensions={0}
  ROOT %updated = bf16[4,6]{1,0} dynamic-update-slice(%cache, %small)
}
"""
CACHE = 4 * 6 * 2  # bytes


def test_moves_count_where_they_run_as_code_of_their_own():
    found = hlo.moves(hlo.read(WRITTEN), CACHE)
    # %moved and %fused; %copy.8 is on the way of %worked, %small is small, %updated is in place.
    assert found == {"copy": hlo.Tally(2, 2 * CACHE)}
    assert hlo.moves(hlo.read(WRITTEN), 1)["transpose"] == hlo.Tally(1, 12)


COPIES = """HloModule step

ENTRY %main (kernel: bf16[4,6]) -> bf16[4,6] {
  %kernel = bf16[4,6]{1,0:T(8,128)(2,1)} parameter(0)
  %ahead = (bf16[4,6]{1,0:T(8,128)(2,1)S(1)}, bf16[4,6]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) \
copy-start(%kernel)
  %there = bf16[4,6]{1,0:T(8,128)(2,1)S(1)} copy-done(%ahead)
  %begun = (bf16[4,6]{1,0:T(8,128)(2,1)}, bf16[4,6]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) \
copy-start(%kernel)
  ROOT %copied = bf16[4,6]{1,0:T(8,128)(2,1)} copy-done(%begun)
}
"""


def test_what_is_brought_to_the_chip_ahead_is_no_move():
    assert hlo.moves(hlo.read(COPIES), CACHE) == {"copy": hlo.Tally(1, CACHE)}


def test_what_a_loop_does_counts_as_often_as_it_goes_round():
    program = hlo.read(WRITTEN)
    assert program.unknown_loops == 0
    assert hlo.kernels(program) == {"splash attention": 5, "cuDNN attention": 1}
    assert hlo.collectives(program)["all-reduce"] == hlo.Tally(5, 5 * CACHE)


def test_an_asynchronous_collective_counts_once_and_without_its_input():
    found = hlo.collectives(hlo.read(WRITTEN))["all-gather"]
    assert found.count == 1
    assert found.bytes == (2 * 6 * 2 + CACHE) // 2


def test_a_loop_without_a_known_end_is_named():
    unknown = WRITTEN.replace("constant(5)", "parameter(1)")
    program = hlo.read(unknown)
    assert program.unknown_loops == 1
    assert hlo.kernels(program)["splash attention"] == 1
    noted = unknown.replace(
        "body=%body\n", 'body=%body, backend_config={"known_trip_count":{"n":"7"}}\n'
    )
    assert hlo.kernels(hlo.read(noted))["splash attention"] == 7


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("bf16[2,3]{1,0:T(8,128)(2,1)S(1)}", 12),
        ("f32[]", 4),
        ("(s32[], /*index=1*/f8e4m3fn[10]{0}, pred[3])", 4 + 10 + 3),
        ("s4[6]", 3),
        ("token[]", 0),
    ],
)
def test_bytes_of_shapes(shape, size):
    assert hlo.shape_bytes(shape) == size


def test_a_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="no entry"):
        hlo.read("HloModule nothing\n")


def test_the_loop_of_a_real_program_is_found():
    def body(x, w):
        return jnp.tanh(x @ w), None

    def run(x, ws):
        return jax.lax.scan(body, x, ws)[0]

    shapes = jax.ShapeDtypeStruct((8, 8), jnp.float32), jax.ShapeDtypeStruct((6, 8, 8), jnp.float32)
    program = hlo.read(jax.jit(run).lower(*shapes).compile().as_text())
    assert program.unknown_loops == 0
    assert 6 in program.times.values()
    assert sum(hlo.dots(program).values()) >= 1


def test_dots_are_told_by_the_type_of_what_they_multiply():
    text = """HloModule m

ENTRY %main (a: s8[2,3], b: s8[3,4]) -> s32[2,4] {
  %a = s8[2,3]{1,0} parameter(0)
  %b = s8[3,4]{1,0} parameter(1)
  %c = bf16[2,3]{1,0} convert(%a)
  %d = f32[2,2]{1,0} dot(%c, %c), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  ROOT %e = s32[2,4]{1,0} dot(s8[2,3]{1,0} %a, s8[3,4]{1,0} %b), lhs_contracting_dims={1}
}
"""
    assert hlo.dots(hlo.read(text)) == {"bf16": 1, "s8": 1}

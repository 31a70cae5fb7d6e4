"""The reader of compiled programs, on short texts that are counted by hand."""

import pytest

from experiments.benchmark import hlo


def parts(text, full_size=None):
    return dict(hlo.read(text, full_size).parts())


def counts(kernels, num_bytes, passes=0, collectives=0):
    return hlo.Counts(kernels, num_bytes, passes, collectives)


def test_kernels_and_free_instructions():
    """Two kernels; an operand that appears twice is read once."""
    text = """
HloModule jit_f, is_scheduled=true, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%fused (p: f32[8], q: bf16[8]) -> (f32[8], pred[8]) {
  %p = f32[8]{0} parameter(0)
  %q = bf16[8]{0} parameter(1)
  %converted = f32[8]{0} convert(%q)
  %sum = f32[8]{0} add(%p, %converted)
  %zero = pred[8]{0} compare(%sum, %p), direction=EQ
  ROOT %out = (f32[8]{0}, pred[8]{0}) tuple(%sum, %zero)
}

ENTRY %main.3 (x.1: f32[8], y.1: bf16[4,2]) -> f32[8] {
  %x.1 = f32[8]{0} parameter(0), metadata={op_name="x (an argument)"}
  %y.1 = bf16[4,2]{1,0} parameter(1)
  %bitcast = bf16[8]{0} bitcast(%y.1)
  %pair = (f32[8]{0}, pred[8]{0}) fusion(%x.1, /*index=1*/%bitcast), calls=%fused
  %first = f32[8]{0} get-tuple-element(%pair), index=0
  ROOT %square = f32[8]{0} multiply(%first, %first)
}
"""
    # The fusion: f32 and bf16 in, f32 and pred out. The product: one in, one out.
    expected = (32 + 16 + 32 + 8) + (32 + 32)
    assert parts(text) == {"entry": counts(2, expected)}
    # Arrays of eight elements: 2 + 2 and 1 + 1. None has nine.
    assert hlo.read(text, full_size=8).counts.passes == 6
    assert hlo.read(text, full_size=9).counts.passes == 0
    # A larger array is one pass, too.
    assert hlo.read(text, full_size=4).counts.passes == 6


def test_only_what_is_gathered_counts():
    """Of a table, what a kernel reads; the whole table where it also reads that."""
    text = """
%lookup (table: f32[1000,4], i: s32[2]) -> f32[2,4] {
  %table = f32[1000,4]{1,0} parameter(0)
  %i = s32[2]{0} parameter(1)
  %view = f32[1000,4]{1,0} bitcast(%table)
  ROOT %rows = f32[2,4]{1,0} gather(%view, %i), offset_dims={1}, slice_sizes={1,4}
}

%both (table: f32[1000,4], i: s32[]) -> f32[1000,4] {
  %table.1 = f32[1000,4]{1,0} parameter(0)
  %i.1 = s32[] parameter(1)
  %row = f32[1,4]{1,0} dynamic-slice(%table.1, %i.1, %i.1), dynamic_slice_sizes={1,4}
  %rows.1 = f32[1000,4]{1,0} broadcast(%row), dimensions={0,1}
  ROOT %sum = f32[1000,4]{1,0} add(%table.1, %rows.1)
}

%outer (table: f32[1000,4], i: s32[2]) -> f32[2,4] {
  %i.2 = s32[2]{0} parameter(1)
  %table.2 = f32[1000,4]{1,0} parameter(0)
  ROOT %inner = f32[2,4]{1,0} fusion(%table.2, %i.2), kind=kLoop, calls=%lookup
}

ENTRY %main (t: f32[1000,4], i: s32[2], j: s32[]) -> f32[1000,4] {
  %t = f32[1000,4]{1,0} parameter(0)
  %i.3 = s32[2]{0} parameter(1)
  %j = s32[] parameter(2)
  %a = f32[2,4]{1,0} fusion(%t, %i.3), kind=kLoop, calls=%lookup
  %b = f32[2,4]{1,0} fusion(%t, %i.3), kind=kCustom, calls=%outer
  %c = f32[1,4]{1,0} dynamic-slice(%t, %j, %j), dynamic_slice_sizes={1,4}
  ROOT %d = f32[1000,4]{1,0} fusion(%t, %j), kind=kLoop, calls=%both
}
"""
    rows = 32 + 8 + 32
    one_row = 16 + 4 + 16
    whole = 16_000 + 4 + 16_000
    assert parts(text)["entry"] == counts(4, rows + rows + one_row + whole)
    # Parts of a full array count as parts: 2 + 2 + 1 rows of 1000 are read.
    assert hlo.read(text, full_size=4000).counts.passes == pytest.approx(2.005)


def test_only_what_is_updated_counts():
    text = """
%write (stack: f32[100,4], row: f32[4], i: s32[]) -> (f32[100,4], f32[4]) {
  %stack = f32[100,4]{1,0} parameter(0)
  %row = f32[4]{0} parameter(1)
  %i = s32[] parameter(2)
  %new = f32[1,4]{1,0} bitcast(%row)
  %updated = f32[100,4]{1,0} dynamic-update-slice(%stack, %new, %i, %i)
  %twice = f32[4]{0} add(%row, %row)
  ROOT %out = (f32[100,4]{1,0}, f32[4]{0}) tuple(%updated, %twice)
}

ENTRY %main (s: f32[100,4], r: f32[4], i: s32[], k: s32[2,1]) -> f32[100,4] {
  %s = f32[100,4]{1,0} parameter(0)
  %r = f32[4]{0} parameter(1)
  %i.1 = s32[] parameter(2)
  %k = s32[2,1]{1,0} parameter(3)
  %u = f32[2,4]{1,0} parameter(4)
  %pair = (f32[100,4]{1,0}, f32[4]{0}) fusion(%s, %r, %i.1), kind=kLoop, calls=%write
  %stack.1 = f32[100,4]{1,0} get-tuple-element(%pair), index=0
  ROOT %scattered = f32[100,4]{1,0} scatter(%stack.1, %k, %u), to_apply=%add
}
"""
    fusion = 0 + 16 + 4 + 16 + 16
    # The old rows, their numbers and the new rows in; the sums out.
    scatter = 32 + 8 + 32 + 32
    assert parts(text)["entry"] == counts(2, fusion + scatter)


LOOPS = """
%body (state: (f32[4], pred[])) -> (f32[4], pred[]) {
  %state = (f32[4]{0}, pred[]) parameter(0)
  %x = f32[4]{0} get-tuple-element(%state), index=0
  %flag = pred[] get-tuple-element(%state), index=1
  %sine = f32[4]{0} sine(%x)
  %y = f32[4]{0} conditional(%flag, %sine, %sine), branch_computations={%cheap, %dear}
  ROOT %next = (f32[4]{0}, pred[]) tuple(%y, %flag)
}

%cheap (a: f32[4]) -> f32[4] {
  ROOT %a = f32[4]{0} parameter(0)
}

%dear (b: f32[4]) -> f32[4] {
  %b = f32[4]{0} parameter(0)
  %c = f32[4]{0} cosine(%b)
  ROOT %d = f32[4]{0} sine(%c)
}

%condition (state: (f32[4], pred[])) -> pred[] {
  %state.1 = (f32[4]{0}, pred[]) parameter(0)
  ROOT %go = pred[] get-tuple-element(%state.1), index=1
}

%command_buffer (v: f32[4], w: f32[4]) -> f32[4] {
  %v = f32[4]{0} parameter(0)
  %w = f32[4]{0} parameter(1)
  %vw = f32[4]{0} multiply(%v, %w)
  ROOT %vvw = f32[4]{0} multiply(%vw, %v)
}

%wrapped (f: f32[4]) -> f32[4] {
  %f = f32[4]{0} parameter(0)
  ROOT %floor = f32[4]{0} floor(%f)
}

ENTRY %main (x: f32[4], flag: pred[]) -> f32[4] {
  %x.1 = f32[4]{0} parameter(0)
  %flag.1 = pred[] parameter(1)
  %start = (f32[4]{0}, pred[]) tuple(%x.1, %flag.1)
  %loop = (f32[4]{0}, pred[]) while(%start), condition=%condition, body=%body, TRIPS
  %z = f32[4]{0} get-tuple-element(%loop), index=0
  %graph = f32[4]{0} call(%z, %x.1), to_apply=%command_buffer
  %begun = ((f32[4]{0}), f32[4]{0}, u32[]) async-start(%graph), calls=%wrapped
  %running = ((f32[4]{0}), f32[4]{0}, u32[]) async-update(%begun)
  %ended = f32[4]{0} async-done(%running)
  ROOT %out = f32[4]{0} negate(%ended)
}
"""


def test_loops_and_branches_are_parts():
    """A CUDA graph and an asynchronous computation are parts of what calls them."""
    ten_trips = LOOPS.replace("TRIPS", 'backend_config={"known_trip_count":{"n":"10"}}')
    assert parts(ten_trips) == {
        "entry": counts(4, 48 + 48 + 32 + 32),
        "loop 1 ×10": counts(1, 32),
        "loop 1 ×10, conditional 1 branch 0": counts(0, 0),
        "loop 1 ×10, conditional 1 branch 1": counts(2, 64),
    }
    # All iterations, each with its dearest branch.
    assert hlo.read(ten_trips).total() == counts(4 + 10 * 3, 160 + 10 * 96)

    unknown_trips = LOOPS.replace("TRIPS", "backend_config={}")
    assert "loop 1 ×?" in parts(unknown_trips)
    assert hlo.read(unknown_trips).total() == counts(4 + 3, 160 + 96)


def test_collectives():
    """An all-reduce of two arrays is one, and a collective is no kernel."""
    text = """
%exchange (g: f32[4]) -> f32[4] {
  %g = f32[4]{0} parameter(0)
  ROOT %inside = f32[4]{0} all-reduce(%g), replica_groups={}, to_apply=%add
}

ENTRY %main (x: f32[4], y: f32[2]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  %y = f32[2]{0} parameter(1)
  %pair = (f32[4]{0}, f32[2]{0}) all-reduce-start(%x, %y), to_apply=%add
  %both = (f32[4]{0}, f32[2]{0}) all-reduce-done(%pair)
  %first = f32[4]{0} get-tuple-element(%both), index=0
  %gathered = f32[8]{0} all-gather(%first), dimensions={0}
  ROOT %fused = f32[4]{0} fusion(%first), kind=kCustom, calls=%exchange
}
"""
    assert parts(text)["entry"] == counts(1, 32, collectives=3)


def test_the_memory_of_a_tpu_core_is_free():
    text = """
ENTRY %main (x: bf16[64,128]) -> bf16[64,128] {
  %x = HBM parameter(0)
  %copying = (CORE, HBM, u32[]{:S(2)}) copy-start(%x)
  %half = ((HBM), HALF, s32[]{:S(2)}) slice-start(%x), slice={[0:32], [0:128]}
  %copy = CORE copy-done(%copying)
  %half.1 = HALF slice-done(%half)
  %all = CORE custom-call(%half.1, %half.1), custom_call_target="ConcatBitcast"
  ROOT %sum = HBM add(%copy, %all)
}
"""
    text = text.replace("HBM", "bf16[64,128]{1,0:T(8,128)(2,1)}")
    text = text.replace("CORE", "bf16[64,128]{1,0:T(8,128)(2,1)S(1)}")
    text = text.replace("HALF", "bf16[32,128]{1,0:T(8,128)(2,1)S(1)}")
    size = 64 * 128
    block = hlo.read(text, full_size=size)
    # Read once as a whole and once by half, and written once.
    assert block.counts == counts(3, 2 * size + size + 2 * size, passes=2.5)


def test_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.read("module @jit_f {}")

"""The counters of offline.py, on kernels whose counts are known."""

import offline
import pytest
import triton
import triton.language as tl


@triton.jit
def add_one(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at, mask=at < n) + 1, mask=at < n)


@triton.jit
def sum_all(x_ptr, y_ptr, tiles, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    at = tl.arange(0, BLOCK)
    for _ in range(tiles):
        total += tl.load(x_ptr + at)
        at += BLOCK
    tl.store(y_ptr, tl.sum(total, 0))


@pytest.mark.parametrize("architecture", offline.ARCHITECTURES)
def test_counts(architecture):
    pointers, block = {"x_ptr": "*fp32", "y_ptr": "*fp32"}, {"BLOCK": 1024}
    kernels = [
        offline.Kernel("test_offline:add_one", {**pointers, "n": "i64"}, block),
        offline.Kernel("test_offline:sum_all", {**pointers, "tiles": "i32"}, block, ("x_ptr",)),
    ]
    one, loop = offline.compile_all(kernels, architecture)
    assert one.count("LDG") == one.count("STG") == 8
    assert (one.spills, one.shared, one.loops()) == (0, 0, [])
    assert 16 <= one.registers <= 40
    assert loop.count(r"BAR\.SYNC") >= 1
    assert loop.shared > 0
    bodies = loop.innermost_loops()
    assert bodies
    assert any("FADD" in line for line in bodies[0])

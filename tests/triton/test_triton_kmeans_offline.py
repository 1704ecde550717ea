"""The clustering kernels compiled for sm_80, 90, 100 and 120: no spills in loops, and budgets that an upgrade must keep.

An H100 runs 29.6e12 lane-instructions a second and reads 0.75e12 fp32 values a second: a pass over fp32 values stays bound by
memory up to 39 lane-instructions a value. The counts below are of all that a thread runs for a whole aligned tile, divided by
its values.
"""

import re

import offline
import pytest

from kmq_kernels.triton_kernels import assign as triton_assign
from kmq_kernels.triton_kernels.kmeans import histogram
from kmq_kernels.triton_kernels.kmeans.rows import PART as ROWS_PART

P = "kmq_kernels.triton_kernels."
TILES = {"table_ptr": "*i64", "problem_ptr": "*i32", "tile_ptr": "*i32"}
SOLVE = {
    "points_ptr": "*fp64", "cells_ptr": "*i32", "cell_ptr": "*fp64", "grown_ptr": "*fp32", "bounds_ptr": "*i32",
    "choice_ptr": "*i16", "best_ptr": "*fp32", "c_ptr": "*fp64", "centroids_ptr": "*fp32", "pivots_ptr": "*fp32",
    "unit_ptr": "*fp32", "doubt_ptr": "*i8", "check_ptr": "*i32", "iterations_ptr": "*i64",
}  # fmt: skip
BINS = {"bins_ptr": "*i64", "ends_ptr": "*i64", "zoom_ptr": "*i32"}
SIZES = {"K": "i32", "count": "i32", "stride_cells": "i32", "max_iter": "i32"}


def kernel(name, signature, constexprs, **options):
    pointers = tuple(arg for arg, kind in signature.items() if kind.startswith("*"))
    return offline.Kernel(P + name, signature, constexprs, pointers, **options)


def assign(levels, packed, dtype="tl.float32", weighted=False, error=None):
    signature = {
        **TILES, "pivots_ptr": "*fp32", "centroids_ptr": "*fp32", "unit_ptr": "*fp32", "error_ptr": "*fp64", "K": "i32"
    }  # fmt: skip
    flags = {"DTYPE": dtype, "LEVELS": levels, "TILE": 4096, "PACKED": packed, "WEIGHTED": weighted}
    flags["ERROR"] = packed if error is None else error
    return kernel("assign:assign_kernel", signature, flags, **triton_assign.options(packed))


def count(dtype, weighted):
    signature = {
        **TILES, "frame_ptr": "*fp32", "middle_ptr": "*i32", "largest_ptr": "*i32", "status_ptr": "*i32", "bins_ptr": "*i64",
        "ends_ptr": "*i64", "bins": "i32",
    }  # fmt: skip
    flags = {"DTYPE": dtype, "BITS": 11, "TILE": 4096, "WEIGHTED": weighted}
    return kernel("kmeans.histogram:count_kernel", signature, flags, num_warps=8)


FRAME = {"frame_ptr": "*fp32", "middle_ptr": "*i32"}
SPLIT = {"first_ptr": "*i32", "map_ptr": "*fp32"}


def look(weighted=True):
    flags = {"BITS": 12, "CHUNK": 1024, "WEIGHTED": weighted}
    return kernel("kmeans.histogram:look_kernel", {"frame_ptr": "*fp32", **BINS, "bins": "i32", "K": "i32"}, flags, num_warps=8)


def split(weighted=True):
    flags = {"ROUND": 2, "BITS": 12, "CHUNK": 1024, "WEIGHTED": weighted}
    signature = {"frame_ptr": "*fp32", **BINS, **SPLIT, "low_ptr": "*fp32", "width_ptr": "*fp32", "bins": "i32", "K": "i32"}
    return kernel("kmeans.histogram:split_kernel", signature, flags, num_warps=8)


def zoom(turn=2, weighted=True):
    flags = {"ROUND": turn, "BITS": 12, "TILE": 4096, "WEIGHTED": weighted}
    signature = {**TILES, "frame_ptr": "*fp32", "largest_ptr": "*i32", **BINS, **SPLIT, "bins": "i32"}
    return kernel("kmeans.histogram:zoom_kernel", signature, flags, num_warps=8)


def sample(half=False):
    if half:
        return kernel("kmeans.histogram:sample_half_kernel", {"table_ptr": "*i64", "middle_ptr": "*i32"}, {}, num_warps=8)
    return kernel("kmeans.histogram:sample_kernel", {"table_ptr": "*i64", **FRAME}, {"BITS": 11}, num_warps=8)


def largest_weight():
    return kernel(
        "kmeans.histogram:weight_kernel", {**TILES, "largest_ptr": "*i32", "status_ptr": "*i32"}, {"TILE": 4096}, num_warps=8
    )


def solve(levels, dtype="tl.float32", weighted=False):
    signature = {"frame_ptr": "*fp32", "status_ptr": "*i32", **BINS, "low_ptr": "*fp32", "width_ptr": "*fp32", **SOLVE}
    signature |= {"bins": "i32", **SIZES}
    flags = {"DTYPE": dtype, "BITS": 11 if levels <= 4 else 12, "WEIGHTED": weighted, "LEVELS": levels}
    flags |= {"WIDTH": 128 if levels <= 5 else 64, "GROUPS": 2048 if levels <= 4 else 4096}
    flags |= {"CHUNK": 1024, "SPLITS": 8, "PART": histogram.PART}
    return kernel("kmeans.edges:solve_kernel", signature, flags, num_warps=8, maxnreg=255)


def rows_kernel(size, levels=4, dtype="tl.float32", weighted=True):
    signature = {"table_ptr": "*i64", "status_ptr": "*i32", **SOLVE, "problems": "i32", **SIZES}
    flags = {"DTYPE": dtype, "WEIGHTED": weighted, "SIZE": size, "LEVELS": levels, "WIDTH": 128 if levels <= 5 else 64}
    flags |= {"GROUPS": max(2, size // 16), "CHUNK": min(size, 1024), "SPLITS": 8, "PART": ROWS_PART}
    return kernel("kmeans.rows:rows_kernel", signature, flags, num_warps=8, maxnreg=255)


def update(levels, fused, dtype="tl.float32", weighted=False):
    flags = {"DTYPE": dtype, "LEVELS": levels, "TILE": 16384, "WEIGHTED": weighted}
    signature = {**TILES, "pivots_ptr": "*fp32", "sums_ptr": "*fp64"}
    return kernel("update:update_kernel", signature, {**flags, "FUSED": fused}, num_warps=4, maxnreg=255)


# name: kernel, registers and bytes of shared memory at most on any architecture
BUDGETS = {
    "assign, K=16": (assign(4, False), 80, 4096),
    "assign, K=256": (assign(8, False), 80, 4096),
    "assign, K=256, bf16": (assign(8, False, "tl.bfloat16"), 80, 4096),
    "labels, K=16, packed, with errors": (assign(4, True), 168, 4096),
    "labels, K=256, packed, with errors": (assign(8, True), 168, 4096),
    "labels, K=16, packed, with errors and weights": (assign(4, True, weighted=True), 224, 4096),
    "labels, K=256, packed, with errors and weights": (assign(8, True, weighted=True), 224, 4096),
    "histogram": (count("tl.float32", False), 255, 1024),
    "histogram, bf16": (count("tl.bfloat16", False), 128, 1024),
    "histogram, weights": (count("tl.float32", True), 255, 1024),
    "largest weight": (largest_weight(), 80, 1024),
    "sample": (sample(), 128, 1024),
    "look at the bins": (look(), 128, 1024),
    "split bins": (split(), 255, 4096),
    "count in split bins": (zoom(), 255, 1024),
    "solve, K=16": (solve(4), 255, 16384),
    "solve, K=256": (solve(8), 255, 32768),
    "rows of 1024": (rows_kernel(1024), 255, 16384),
    "rows of 16384": (rows_kernel(16384), 255, 49152),
    "update, K=16": (update(4, False), 255, 4096),
    "update, K=16, weights": (update(4, False, weighted=True), 255, 4096),
    "update, K=256": (update(8, False), 255, 45056),
    "fused step, K=16": (update(4, True), 255, 4096),
    "fused step, K=256": (update(8, True), 255, 49152),
}


def whole_tile(built):
    """Instructions run for a tile whose values are read 16 bytes at a time."""
    return built.executed(r"LDG\S*\.128")


def counted_tile(built):
    """Instructions run for a whole tile without a value far out and without a frequent value."""
    return built.executed(r"\bREDG?\b")


def summed_part(built):
    """Instructions run for one part of a tile of `update`, 32 values of a thread: those of the loop over parts with fewest, in
    which the loop over steps runs until the part is done."""
    totals = []
    for outer in built.loops():
        for inner, steps in [(one, 16 if any("HMMA" in text for text in one) else 4) for one in built.innermost_loops()]:
            if len(inner) < len(outer) and "\n".join(inner) in "\n".join(outer):
                totals.append(len(outer) + (steps - 1) * len(inner))
    return min(totals)


def everything(built):
    return len(built.sass)


# name: what is counted, values that a thread handles in it, most instructions a value on sm_80, 90, 100, 120. On an H100 a pass
# stays bound by memory up to 39 for the 4 bytes of an fp32 value, 49 with a label of a byte, 78 and 88 with fp32 weights beside.
# The sums miss that: Triton gives no addition to shared memory, which is why they are masks, or products of matrices.
INSTRUCTIONS = {
    "assign, K=16": (whole_tile, 16, 17, 19, 18, 19),
    "assign, K=256": (whole_tile, 16, 30, 36, 33, 37),
    "assign, K=256, bf16": (whole_tile, 16, 31, 37, 34, 39),
    "labels, K=16, packed, with errors": (whole_tile, 32, 20, 24, 24, 24),
    "labels, K=256, packed, with errors": (whole_tile, 32, 33, 39, 41, 41),
    "labels, K=16, packed, with errors and weights": (whole_tile, 32, 22, 26, 26, 26),
    "labels, K=256, packed, with errors and weights": (whole_tile, 32, 36, 43, 43, 43),
    "histogram": (counted_tile, 16, 20, 22, 22, 24),
    "histogram, bf16": (counted_tile, 16, 16, 20, 20, 21),
    "histogram, weights": (counted_tile, 16, 39, 43, 43, 44),
    "largest weight": (everything, 16, 33, 33, 33, 33),
    "update, K=16": (summed_part, 32, 48, 49, 58, 49),
    "update, K=16, weights": (summed_part, 32, 61, 62, 81, 62),
    "update, K=256": (summed_part, 32, 340, 335, 340, 343),
    "fused step, K=16": (summed_part, 32, 63, 67, 74, 65),
    "fused step, K=256": (summed_part, 32, 370, 385, 385, 376),
}
# Of the kernels that solve, the whole code: a problem's size does not say how often a part of it runs.
CODE = {
    "solve, K=16": (11000, 10500, 10700, 15800), "solve, K=256": (11100, 10300, 10400, 15700),
    "rows of 1024": (7300, 6600, 6800, 9800), "rows of 16384": (10200, 8500, 8700, 11400),
}  # fmt: skip
COLUMNS = (*offline.ARCHITECTURES, *offline.NEWER)
SPILLS = {(120, "fused step, K=256"): 8}  # there should be none; these are outside of its loops


@pytest.mark.parametrize(
    "architecture", [*offline.ARCHITECTURES, *(pytest.param(n, marks=pytest.mark.slow) for n in offline.NEWER)]
)
def test_budgets(architecture):
    built = dict(zip(BUDGETS, offline.compile_all([one for one, _, _ in BUDGETS.values()], architecture), strict=True))
    measured = {name: (one.registers, one.shared, one.spills) for name, one in built.items()}
    counts = {name: counted(built[name]) / values for name, (counted, values, *_) in INSTRUCTIONS.items()}
    codes = {name: len(built[name].sass) for name in CODE}
    print(f"sm_{architecture}", measured, counts, codes, sep="\n")
    for name, (_, registers, shared) in BUDGETS.items():
        assert measured[name][2] <= SPILLS.get((architecture, name), 0), (name, measured)
        assert not any(re.search(r"\b(LDL|STL)\b", line) for body in built[name].loops() for line in body), name
        assert measured[name][0] <= registers, (name, measured)
        assert measured[name][1] <= shared, (name, measured)
    at = COLUMNS.index(architecture)
    for name, (_, _, *most) in INSTRUCTIONS.items():
        assert counts[name] <= most[at], (name, counts)
    for name, most in CODE.items():
        assert codes[name] <= most[at], (name, codes)


def mark(levels):
    signature = {**TILES, "pivots_ptr": "*fp32", "doubt_ptr": "*i8", "used_ptr": "*i8", "check_ptr": "*i32", "K": "i32"}
    return kernel("kmeans.edges:mark_kernel", signature, {"DTYPE": "tl.float32", "LEVELS": levels, "TILE": 4096}, num_warps=8)


def finish(levels):
    signature = {
        "table_ptr": "*i64", "unit_ptr": "*fp32", "error_ptr": "*fp64", "status_ptr": "*i32", "doubt_ptr": "*i8",
        "used_ptr": "*i8", "check_ptr": "*i32", "inertia_ptr": "*fp64", "bound_ptr": "*fp64",
        "K": "i32", "problems": "i32", "tiles": "i32",
    }  # fmt: skip
    return kernel("kmeans.edges:finish_kernel", signature, {"KP": 1 << levels, "CHUNK": 256})


def add_tiles(levels):
    signature = {"table_ptr": "*i64", "sums_ptr": "*fp64", "out_ptr": "*fp64", "weights_ptr": "*fp64"}
    signature |= {"K": "i32", "problems": "i32", "tiles": "i32"}
    return kernel("update:add_tiles_kernel", signature, {"KP": 1 << levels, "DEPTH": 16})


HALVES = ("tl.bfloat16", "tl.float16")


@pytest.mark.slow
def test_every_variant_compiles():
    """What a device would compile when it is first asked to."""
    levels = range(1, 9)
    kernels = [assign(n, packed, error=error) for n in levels for packed in (False, True) for error in (False, True)]
    kernels += [assign(n, packed, dtype, True) for n in (3, 4, 8) for packed in (False, True) for dtype in HALVES]
    kernels += [count(dtype, weighted) for dtype in ("tl.float32", *HALVES) for weighted in (False, True)]
    kernels += [sample(), sample(half=True), largest_weight(), look(False), split(False)]
    kernels += [zoom(turn, False) for turn in range(3)]
    kernels += [made(n) for n in levels for made in (solve, mark, finish, add_tiles)]
    kernels += [solve(n, dtype, weighted) for n in (4, 8) for dtype in HALVES for weighted in (False, True)]
    kernels += [rows_kernel(64 << n) for n in range(9)] + [rows_kernel(1024, n, weighted=False) for n in levels]
    kernels += [rows_kernel(512, 4, dtype) for dtype in HALVES]
    kernels += [update(n, fused, dtype, weighted) for n in levels for fused in (False, True)
                for dtype, weighted in (("tl.float32", False), ("tl.bfloat16", True))]  # fmt: skip
    for one in offline.compile_all(kernels, 90):
        assert one.sass


def test_one_tile_in_all_is_a_plain_number_to_triton():
    """An integer argument that is 1 is no tensor in a compiled kernel, which the interpreter does not show."""
    kernels = []
    for one in (finish(4), add_tiles(4)):
        constexprs = {**one.constexprs, "tiles": 1, "problems": 1}
        kernels.append(offline.Kernel(one.kernel, one.signature, constexprs, one.aligned))
    for built in offline.compile_all(kernels, 90):
        assert built.spills == 0

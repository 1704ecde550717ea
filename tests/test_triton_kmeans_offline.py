"""The clustering kernels compiled for sm_80 and sm_90: no spills, and budgets that a Triton upgrade must not break.

An H100 runs 29.6e12 lane-instructions a second and reads 0.75e12 fp32 values a second: a pass over fp32 values stays bound by
memory up to 39 lane-instructions a value. The counts below are of the path of whole aligned tiles, divided by the values that a
thread labels or counts.
"""

import re

import offline
import pytest

from kmq_kernels.triton_kernels import kmeans as triton_kmeans
from kmq_kernels.triton_kernels import kmeans_rows

P = "kmq_kernels.triton_kernels."
TILES = {"table_ptr": "*i64", "problem_ptr": "*i32", "tile_ptr": "*i32"}
SOLVE = {
    "points_ptr": "*fp64", "cells_ptr": "*i32", "cell_ptr": "*fp64", "grown_ptr": "*fp32", "bounds_ptr": "*i32",
    "choice_ptr": "*i16", "best_ptr": "*fp32", "c_ptr": "*fp64", "centroids_ptr": "*fp32", "pivots_ptr": "*fp32",
    "unit_ptr": "*fp32", "doubt_ptr": "*i8", "check_ptr": "*i32", "iterations_ptr": "*i64",
}  # fmt: skip
SIZES = {"K": "i32", "count": "i32", "stride_cells": "i32", "max_iter": "i32"}


def kernel(name, signature, constexprs, **options):
    pointers = tuple(arg for arg, kind in signature.items() if kind.startswith("*"))
    return offline.Kernel(P + name, signature, constexprs, pointers, **options)


def assign(levels, packed, dtype="tl.float32"):
    signature = {
        **TILES, "pivots_ptr": "*fp32", "centroids_ptr": "*fp32", "unit_ptr": "*fp32", "error_ptr": "*fp64", "K": "i32"
    }  # fmt: skip
    flags = {"DTYPE": dtype, "LEVELS": levels, "TILE": 4096, "PACKED": packed, "ERROR": packed, "WEIGHTED": False}
    return kernel("assign:assign_kernel", signature, flags, num_warps=4 if packed else 8)


def count(dtype, weighted):
    signature = {
        **TILES, "frame_ptr": "*fp32", "middle_ptr": "*i32", "largest_ptr": "*i32", "status_ptr": "*i32", "bins_ptr": "*i64",
        "ends_ptr": "*i64", "bins": "i32",
    }  # fmt: skip
    flags = {"DTYPE": dtype, "BITS": 11, "TILE": 4096, "WEIGHTED": weighted, "ENDS": False}
    return kernel("kmeans:count_kernel", signature, flags, num_warps=8)


def solve(levels):
    signature = {"frame_ptr": "*fp32", "status_ptr": "*i32", "bins_ptr": "*i64", "ends_ptr": "*i64", **SOLVE}
    signature |= {"bins": "i32", **SIZES}
    flags = {"DTYPE": "tl.float32", "BITS": 11 if levels <= 4 else 12, "WEIGHTED": False, "LEVELS": levels}
    flags |= {"WIDTH": 128 if levels <= 5 else 64, "GROUPS": 2048 if levels <= 4 else 4096}
    flags |= {"CHUNK": 1024, "SPLITS": 8, "PART": triton_kmeans.PART}
    return kernel("kmeans:solve_kernel", signature, flags, num_warps=8, maxnreg=255)


def rows(size):
    signature = {"table_ptr": "*i64", "status_ptr": "*i32", **SOLVE, "problems": "i32", **SIZES}
    flags = {"DTYPE": "tl.float32", "WEIGHTED": True, "SIZE": size, "LEVELS": 4, "WIDTH": 128, "GROUPS": size // 16}
    flags |= {"CHUNK": 1024, "SPLITS": 8, "PART": kmeans_rows.PART}
    return kernel("kmeans_rows:rows_kernel", signature, flags, num_warps=8, maxnreg=255)


def update(levels, fused):
    flags = {"DTYPE": "tl.float32", "LEVELS": levels, "TILE": 4096, "STEP": 512 if levels <= 4 else 32, "WEIGHTED": False}
    signature = {**TILES, "pivots_ptr": "*fp32", "sums_ptr": "*fp64"}
    return kernel("update:update_kernel", signature, {**flags, "FUSED": fused}, num_warps=4 if levels <= 4 else 1)


# name: kernel, registers and bytes of shared memory at most on either architecture
BUDGETS = {
    "assign, K=16": (assign(4, False), 80, 4096),
    "assign, K=256": (assign(8, False), 80, 4096),
    "assign, K=256, bf16": (assign(8, False, "tl.bfloat16"), 80, 4096),
    "labels, K=16, packed, with errors": (assign(4, True), 168, 4096),
    "labels, K=256, packed, with errors": (assign(8, True), 168, 4096),
    "histogram": (count("tl.float32", False), 255, 1024),
    "histogram, bf16": (count("tl.bfloat16", False), 128, 1024),
    "histogram, weights": (count("tl.float32", True), 255, 1024),
    "solve, K=16": (solve(4), 255, 16384),
    "solve, K=256": (solve(8), 255, 32768),
    "rows of 1024": (rows(1024), 255, 16384),
    "rows of 16384": (rows(16384), 255, 49152),
    "update, K=16": (update(4, False), 255, 4096),
    "update, K=256": (update(8, False), 255, 16384),
    "fused step, K=16": (update(4, True), 255, 4096),
    "fused step, K=256": (update(8, True), 255, 16384),
}


def stretches(built):
    """The code cut at its branches."""
    found, current = [], []
    for _, text in built.sass:
        current.append(text)
        if re.search(r"\b(BRA|EXIT|RET)\b", text):
            found.append(current)
            current = []
    return found


def whole_path(built):
    """Instructions of the longest stretch that reads values 16 bytes at a time: the path of whole aligned tiles."""
    return max(len(one) for one in stretches(built) if any(re.search(r"LDG\S*\.128", text) for text in one))


def loop(built):
    """Instructions of the longest loop without a loop in it."""
    return max(map(len, built.innermost_loops()))


def everything(built):
    return len(built.sass)


# name: what is counted, values that a thread handles in it, instructions a value at most on sm_80 and sm_90. An fp32 pass stays
# bound by memory up to 39 on an H100. All of the histogram's code counts here, also what runs only for values far out.
INSTRUCTIONS = {
    "assign, K=16": (whole_path, 16, 20, 20),
    "assign, K=256": (whole_path, 16, 39, 39),
    "assign, K=256, bf16": (whole_path, 16, 41, 41),
    "labels, K=16, packed, with errors": (whole_path, 32, 26, 26),
    "labels, K=256, packed, with errors": (whole_path, 32, 49, 50),
    "histogram": (everything, 16, 98, 106),
    "histogram, bf16": (everything, 16, 40, 47),
    "histogram, weights": (everything, 16, 135, 143),
    "update, K=16": (loop, 4, 97, 98),
    "update, K=256": (loop, 1, 715, 680),
    "fused step, K=16": (loop, 4, 113, 115),
    "fused step, K=256": (loop, 1, 1000, 875),
}
# Of the kernels that solve, the whole code: a problem's size does not say how often a part of it runs.
CODE = {"solve, K=16": (10200, 9700), "solve, K=256": (10000, 9600), "rows of 1024": (7300, 6600), "rows of 16384": (10200, 8500)}


@pytest.mark.parametrize("architecture", offline.ARCHITECTURES)
def test_budgets(architecture):
    built = dict(zip(BUDGETS, offline.compile_all([one for one, _, _ in BUDGETS.values()], architecture), strict=True))
    measured = {name: (one.registers, one.shared, one.spills) for name, one in built.items()}
    for name, (_, registers, shared) in BUDGETS.items():
        assert measured[name][2] == 0, (name, measured)
        assert measured[name][0] <= registers, (name, measured)
        assert measured[name][1] <= shared, (name, measured)
    counts = {name: counted(built[name]) / values for name, (counted, values, *_) in INSTRUCTIONS.items()}
    codes = {name: len(built[name].sass) for name in CODE}
    print(f"sm_{architecture}", measured, counts, codes, sep="\n")
    at = offline.ARCHITECTURES.index(architecture)
    for name, (_, _, *most) in INSTRUCTIONS.items():
        assert counts[name] <= most[at], (name, counts)
    for name, most in CODE.items():
        assert codes[name] <= most[at], (name, codes)

"""The Triton kernels of the linear layer compiled without a GPU for sm_80, 90, 100 and 120: what the code generator made of them.

A weight costs instructions three times: to decode it, to carry it to the tensor core, and its share of loads and loop. BUDGETS
holds the code to what it was counted to be, so that a new Triton that generates worse code is seen.
"""

import re

import offline
import pytest

from kmq_kernels.triton_kernels.codebook_linear import PLAN_FP32, PLAN_INPUT_GRAD, PLAN_INPUT_GRAD_FP32, PLANS

DTYPES = {"fp16": "tl.float16", "bf16": "tl.bfloat16", "fp32": "tl.float32"}
MODULE = "kmq_kernels.triton_kernels.codebook_linear"
# (architecture, bits) -> most instructions in the loop for each weight: (decoding, all of the loop), narrowest tile.
# Decoding is PRMT, LOP3 and right shifts, which share one pipe of 64 lanes a clock. Multiplications by which 3-bit selectors are
# built run in another: they count in the second number.
BUDGETS = {
    (80, 1): (1.6, 5.5), (80, 2): (1.6, 4.5), (80, 3): (1.6, 5.2), (80, 4): (3.0, 5.0),
    (90, 1): (1.6, 4.3), (90, 2): (1.6, 4.3), (90, 3): (1.6, 4.0), (90, 4): (3.0, 5.6),
    (100, 1): (1.6, 5.5), (100, 2): (1.6, 5.7), (100, 3): (1.6, 6.3), (100, 4): (3.0, 7.2),
    (120, 1): (1.6, 4.5), (120, 2): (1.6, 3.1), (120, 3): (1.6, 5.1), (120, 4): (3.0, 5.0),
}  # fmt: skip


def linear(tile, bits, dtype="fp16", shared=True, lookup=True, tail=False, partial=False):
    pointer = f"*{dtype}"
    sizes = dict.fromkeys(["M", "OUT", "IN", "stride", "blocks_per_piece", "group_rows"], "i32")
    signature = {"input": pointer, "packed": "*u8", "codebook": pointer, "bias": "*fp32", "out": "*fp32" if partial else pointer}
    constexprs = {
        "BITS": bits, "SHARED": shared, "HAS_BIAS": True, "PARTIAL": partial, "TAIL": tail, "WEIGHT_ROWS": tile.weight_rows,
        "INPUT_ROWS": tile.input_rows, "DTYPE": DTYPES[dtype], "PRECISION": "ieee", "LOOKUP": lookup,
    }  # fmt: skip
    aligned = ("input", "packed", "codebook", "bias", "out", "OUT", "stride") + (() if tail else ("IN",))
    name = f"{MODULE}:linear_kernel"
    return offline.Kernel(name, {**signature, **sizes}, constexprs, aligned, tile.num_warps, tile.num_stages, tile.registers)


def input_grad(tile, bits, dtype, shared):
    pointer = f"*{dtype}"
    signature = {"grad": pointer, "packed": "*u8", "codebook": pointer, "out": "*fp32"}
    constexprs = {
        "BITS": bits, "SHARED": shared, "PARTIAL": True, "WEIGHT_ROWS": tile.weight_rows, "INPUT_ROWS": tile.input_rows,
        "DTYPE": DTYPES[dtype], "PRECISION": "ieee", "LOOKUP": bits <= 4 and dtype != "fp32",
    }  # fmt: skip
    sizes = dict.fromkeys(["M", "OUT", "IN", "rows_per_piece", "group_rows"], "i32")
    aligned = (*signature, "OUT", "IN")
    name = f"{MODULE}:input_grad_kernel"
    return offline.Kernel(name, {**signature, **sizes}, constexprs, aligned, tile.num_warps, tile.num_stages)


def plan(architecture):
    return PLANS[architecture // 10, 0]


def loop_of(compiled, tile):
    """The main loop, and how many weights a thread decodes in it."""
    return compiled.product_loop(), tile.weight_rows * 128 / (32 * tile.num_warps)


def count(body, pattern):
    return sum(bool(re.search(pattern, line)) for line in body)


def check_tensor_cores(architecture, body):
    if architecture == 90:
        # The left operand of wgmma is a register (R..), the right one a descriptor (gdesc).
        products = [line for line in body if "HGMMA" in line]
        assert products
        assert all(re.search(r"HGMMA\S* R\d+, R\d+, gdesc", line) for line in products), products
    elif architecture == 100:
        assert count(body, r"UTCHMMA")
    else:
        assert count(body, r"HMMA\.16816")


def check_lookup(architecture, widths):
    tile = plan(architecture)[16]
    for bits, compiled in zip(widths, offline.compile_all([linear(tile, bits) for bits in widths], architecture), strict=True):
        body, weights = loop_of(compiled, tile)
        assert compiled.spills == 0
        assert compiled.registers <= 128
        assert compiled.shared <= offline.SHARED[architecture]
        assert not count(body, r"\bI2F")
        decoding, everything = BUDGETS[architecture, bits]
        assert count(body, r"\b(PRMT|LOP3|SHF\.R)") / weights <= decoding, bits
        assert len(body) / weights <= everything, bits
        # Packed words and input are copied to shared memory 16 bytes at a time; of the 1-bit plane a tile has 8 for each thread.
        wide = count(body, r"LDGSTS\S*\.128")
        assert wide >= 2
        assert count(body, r"\bLDG(STS)?\b") - wide <= bits % 2, bits
        check_tensor_cores(architecture, body)


@pytest.mark.parametrize("architecture", offline.ARCHITECTURES)
def test_the_lookup_decoder_is_within_budget(architecture):
    check_lookup(architecture, (1, 2, 3, 4))


@pytest.mark.parametrize("architecture", offline.NEWER)
def test_the_lookup_decoder_is_within_budget_on_blackwell(architecture):
    check_lookup(architecture, (4,))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", offline.NEWER)
def test_every_lookup_decoder_is_within_budget_on_blackwell(architecture):
    check_lookup(architecture, (1, 2, 3, 4))


@pytest.mark.parametrize(
    "architecture", [*offline.ARCHITECTURES, *(pytest.param(n, marks=pytest.mark.slow) for n in offline.NEWER)]
)
def test_no_plan_spills(architecture):
    """The narrowest and the widest tile, at widths that need many registers: a codebook for each row, a tail, partial sums."""
    tiles = [*plan(architecture).values()][:: len(plan(architecture)) - 1]
    kernels = [linear(tile, 4, "bf16", shared=False, partial=True) for tile in tiles]
    kernels += [linear(tile, 7, lookup=False, tail=True) for tile in tiles]
    for kernel, tile, compiled in zip(kernels, tiles * 2, offline.compile_all(kernels, architecture), strict=True):
        body, _ = loop_of(compiled, tile)
        assert compiled.spills == 0, kernel
        assert compiled.registers <= 255, kernel
        assert compiled.shared <= offline.SHARED[architecture], kernel
        assert not count(body, r"\bI2F"), kernel
        check_tensor_cores(architecture, body)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [*offline.ARCHITECTURES, *offline.NEWER])
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_width_compiles(architecture, bits):
    """Every tile with one codebook and one for each row, with and without a tail. bf16 differs from fp16 in one instruction."""
    tiles = [*plan(architecture).values()][::-1]
    kernels = [linear(tile, bits, "fp16", s, bits <= 4, t) for tile in tiles for s in (True, False) for t in (True, False)]
    kernels.append(linear(tiles[0], bits, "bf16", False, bits <= 4, True))
    kernels += [linear(PLAN_FP32[16], bits, "fp32", shared, lookup=False) for shared in (True, False)]
    kernels += [input_grad(PLAN_INPUT_GRAD[64], bits, "fp16", shared) for shared in (True, False)]
    for kernel, compiled in zip(kernels, offline.compile_all(kernels, architecture), strict=True):
        assert compiled.spills == 0, kernel
        assert compiled.registers <= 255, kernel
        assert compiled.shared <= offline.SHARED[architecture], kernel


@pytest.mark.parametrize(
    "architecture", [*offline.ARCHITECTURES, *(pytest.param(n, marks=pytest.mark.slow) for n in offline.NEWER)]
)
def test_input_grad(architecture):
    """Every tile, a shared codebook and one for each row."""
    kernels = [input_grad(tile, 4, "bf16", shared) for tile in PLAN_INPUT_GRAD.values() for shared in (True, False)]
    kernels += [input_grad(PLAN_INPUT_GRAD_FP32[16], bits, "fp32", shared) for bits, shared in ((8, False), (4, True))]
    for kernel, compiled in zip(kernels, offline.compile_all(kernels, architecture), strict=True):
        assert compiled.spills == 0, kernel
        assert compiled.registers <= 255, kernel
        assert compiled.shared <= 99 * 1024, kernel  # of the device with the least
        assert kernel.signature["grad"] == "*fp32" or compiled.count(offline.PRODUCT), kernel
        assert not compiled.count(r"\bI2F\.F"), kernel

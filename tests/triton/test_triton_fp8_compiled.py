"""fp8_linear compiled without a GPU for sm_89, 90, 100 and 120: which tensor cores, how many instructions, no spills."""

import re

import offline
import pytest

from kmq_kernels.triton_kernels.fp8_linear import PLANS

MODULE = "kmq_kernels.triton_kernels.fp8_linear"
ARCHITECTURES = (89, 90, 100, 120)
PRODUCTS = {89: "QMMA.16832", 90: "QGMMA.64x", 100: "UTCQMMA", 120: "QMMA.16832"}
# bits -> most instructions in the loop for each weight, narrowest tile: decoding (PRMT, LOP3, right shifts), and all of the loop.
BUDGETS = {1: (0.6, 3.6), 2: (0.6, 2.8), 3: (0.9, 3.6), 4: (1.6, 4.3), 5: (3.5, 7), 6: (6.7, 12), 7: (7.5, 15.5), 8: (7.5, 15.5)}


def fp8(tile, bits, shared=True, partial=False, dtype="fp16"):
    signature = {
        "input": "*i8", "packed": "*u8", "table": "*i32", "input_scale": "*fp32", "table_scale": "*fp32", "bias": "*fp32",
        "out": "*fp32" if partial else f"*{dtype}",
    }  # fmt: skip
    sizes = dict.fromkeys(["M", "OUT", "IN", "stride", "blocks_per_piece", "group_rows"], "i32")
    constexprs = {
        "BITS": bits, "SHARED": shared, "HAS_BIAS": True, "PARTIAL": partial, "WEIGHT_ROWS": tile.weight_rows,
        "INPUT_ROWS": tile.input_rows, "DTYPE": "tl.float32", "LOOKUP": bits <= 6,
    }  # fmt: skip
    aligned = (*signature, "OUT", "stride", "IN")
    return offline.Kernel(
        f"{MODULE}:fp8_linear_kernel", {**signature, **sizes}, constexprs, aligned, tile.num_warps, tile.num_stages
    )


def quantize(bits, dtype):
    signature = {"input": f"*{dtype}", "out": "*i8", "scale": "*fp32", "IN": "i32", "stride": "i32"}
    return offline.Kernel(f"{MODULE}:quantize_rows_kernel", signature, {"BITS": bits, "BLOCKS": 8}, tuple(signature))


def tiles(architecture):
    return [*PLANS[max(known for known in PLANS if known <= divmod(architecture, 10))].values()]


def check(kernels, architecture):
    for kernel, built in zip(kernels, offline.compile_all(kernels, architecture), strict=True):
        assert built.spills == 0, kernel
        assert built.registers <= 255, kernel
        assert built.shared <= offline.SHARED[architecture], kernel
        if "BITS" in kernel.constexprs and "LOOKUP" in kernel.constexprs:
            body = built.product_loop()
            products = [line for line in body if re.search(offline.PRODUCT, line)]
            assert products, kernel
            assert all(PRODUCTS[architecture] in line for line in products), products
            assert not any(re.search(r"\bF2F|\bI2F|HADD2|F2FP", line) for line in body), kernel  # nothing passes through 16 bits
            if kernel.constexprs["INPUT_ROWS"] == 16 and kernel.constexprs["SHARED"]:
                weights = kernel.constexprs["WEIGHT_ROWS"] * 128 / (32 * kernel.num_warps)
                decoding = sum(bool(re.search(r"\b(PRMT|LOP3|SHF\.R)", line)) for line in body) / weights
                most = BUDGETS[kernel.constexprs["BITS"]]
                assert decoding <= most[0], (kernel, decoding)
                assert len(body) / weights <= most[1], (kernel, len(body) / weights)
        else:
            rounds = {text.split()[0] for _, text in built.sass if "E4M3" in text or ".F16.F32" in text}
            assert rounds == {"F2FP.SATFINITE.E4M3.F32.PACK_AB_MERGE_C"}, (kernel, rounds)  # from fp32, not by way of fp16


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiled_offline(architecture):
    """The common width on the narrowest and the widest tile, and the rounding of the input."""
    narrow, *_, wide = tiles(architecture)
    check([fp8(narrow, 4), fp8(wide, 3), quantize(4, "fp16")], architecture)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_width_compiles(architecture, bits):
    kernels = [fp8(tile, bits) for tile in tiles(architecture)]
    kernels += [fp8(tile, bits, shared=False, partial=True) for tile in tiles(architecture)[::2] if bits <= 4 or bits > 6]
    check([*kernels, quantize(bits, "fp32"), quantize(bits, "bf16")], architecture)

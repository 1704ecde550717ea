"""The Triton forms of codebook_linear_grad and codebook_embedding_grad: against brute force, and what they compile to."""

import offline
import pytest
import test_codebook_embedding_grad as embedding
import test_codebook_linear_grad as linear
import torch

from kmq_kernels.triton_kernels import codebook_embedding_grad, codebook_linear_grad

HALF = (torch.float32, torch.bfloat16, torch.float16)  # fp64 stays with the reference


# Wide indices with 16-bit values take a minute: their widening is seen with narrow ones.
WIDTHS = [
    *(pytest.param(bits, dtype) for bits in range(1, 9) for dtype in (HALF if bits <= 4 else HALF[:1])),
    *(pytest.param(bits, dtype, marks=pytest.mark.slow) for bits in range(5, 9) for dtype in HALF[1:]),
]


def bits_of(bits: int, full: tuple) -> tuple:
    """The interpreter takes a pass for each centroid: wide indices get one small shape."""
    return full if bits <= 4 else full[-1:]


@pytest.mark.parametrize(("bits", "dtype"), WIDTHS)
def test_linear_grad_against_brute_force(bits, dtype, device):
    for M, OUT, IN in bits_of(bits, ((1, 1, 1), (70, 66, 150), (7, 5, 60))):
        grad_output, input, index, packed = linear.problem(M, OUT, IN, bits, dtype)
        for group_rows in {1, min(8, OUT), OUT}:
            out = codebook_linear_grad.codebook_linear_grad(
                grad_output.to(device), input.to(device), packed.to(device), -(-OUT // group_rows), 2**bits, group_rows
            )
            linear.assert_sums(out.cpu(), grad_output, input, index, bits, group_rows)


@pytest.mark.parametrize("tile", [codebook_linear_grad.TILE, codebook_linear_grad.TILE_GROUPED, codebook_linear_grad.TILE_FP32])
@pytest.mark.parametrize("pieces", [1, 3])
def test_linear_grad_tiles_and_pieces(tile, pieces, device):
    for books, group_rows in ((1, 140), (18, 8)):
        grad_output, input, index, packed = linear.problem(300, 140, 260, 2, torch.float16)
        arguments = (grad_output.to(device), input.to(device), packed.to(device), books, 4, group_rows, tile, pieces)
        out = codebook_linear_grad.fused_linear_grad(*arguments)
        assert torch.equal(out, codebook_linear_grad.fused_linear_grad(*arguments))
        linear.assert_sums(out.cpu(), grad_output, input, index, 2, group_rows)


def test_linear_grad_of_nothing_and_of_nan(device):
    _, _, index, packed = linear.problem(1, 20, 30, 4, torch.float32)
    empty = torch.empty(2, 0, 20, device=device), torch.empty(2, 0, 30, device=device)
    assert not codebook_linear_grad.codebook_linear_grad(*empty, packed.to(device), 1, 16, 20).any()
    index[:, 0], index[:, 1:] = 3, torch.clamp(index[:, 1:], 4)
    packed = linear.kmq.pack(index, 4).to(device)
    input = torch.ones(5, 30, device=device)
    input[:, 0] = torch.nan
    out = codebook_linear_grad.codebook_linear_grad(torch.ones(5, 20, device=device), input, packed, 1, 16, 20)
    assert out[0, 3].isnan()
    assert out.isnan().sum() == 1
    assert not out[0, :3].any()


@pytest.mark.parametrize(("bits", "dtype"), WIDTHS)
def test_embedding_grad_against_brute_force(bits, dtype, device):
    for rows, cols, count in bits_of(bits, ((1, 1, 1), (40, 600, 70), (30, 100, 30))):
        grad_output, ids, index, packed = embedding.problem(rows, cols, count, bits, dtype)
        for padding_idx in (-1, int(ids[0])) if bits in (3, 4) else (int(ids[0]),):
            grad_output[ids == padding_idx] = torch.nan
            for group_rows in {min(8, rows), rows}:
                books = -(-rows // group_rows)
                arguments = (packed.to(device), books, 2**bits, group_rows, padding_idx)
                out = codebook_embedding_grad.codebook_embedding_grad(grad_output.to(device), ids.to(device), *arguments)
                clean = torch.where(ids[:, None] == padding_idx, 0.0, grad_output)
                embedding.assert_sums(out.cpu(), clean, ids, index, bits, group_rows, padding_idx)


def test_embedding_grad_takes_int32_and_no_ids(device):
    grad_output, ids, index, packed = embedding.problem(30, 20, 12, 3, torch.float32)
    call = codebook_embedding_grad.codebook_embedding_grad
    out = call(grad_output.view(3, 4, 20).to(device), ids.int().view(3, 4).to(device), packed.to(device), 4, 8, 8, -1)
    embedding.assert_sums(out.cpu(), grad_output, ids, index, 3, 8, -1)
    nothing = torch.empty(0, 20, device=device), torch.empty(0, dtype=torch.int64, device=device)
    none = call(*nothing, packed.to(device), 4, 8, 8, -1)
    assert not none.any()


def kernels() -> list[offline.Kernel]:
    module = "kmq_kernels.triton_kernels."
    sizes = dict.fromkeys(("M", "OUT", "IN", "rows_per_piece"), "i32")
    found = []
    for dtype, shared, tile in (
        ("bf16", True, codebook_linear_grad.TILE),
        ("bf16", False, codebook_linear_grad.TILE_GROUPED),
        ("fp32", True, codebook_linear_grad.TILE_FP32),
        ("fp32", False, codebook_linear_grad.TILE_FP32),
    ):
        signature = {"grad": "*" + dtype, "input": "*" + dtype, "packed": "*u8", "partial": "*fp32", **sizes}
        constants = {"BITS": 4, "SHARED": shared, "ROWS": tile.rows, "COLS": tile.cols, "STEP": tile.step}
        constants |= {"WIDEN": False, "PRECISION": "tf32" if dtype == "fp32" else "ieee"}
        aligned = ("grad", "input", "packed", "partial", "OUT", "IN")
        name = module + "codebook_linear_grad:linear_grad_kernel"
        found.append(offline.Kernel(name, signature, constants, aligned, tile.num_warps, tile.num_stages))
    module += "codebook_embedding_grad:"
    for shared in (True, False):
        signature = {"grad": "*bf16", "ids": "*i64", "packed": "*u8", "partial": "*fp32"}
        signature |= dict.fromkeys(("count", "rows", "cols", "padding_idx"), "i32")
        constants = {"BITS": 4, "SHARED": shared, "POSITIONS": codebook_embedding_grad.POSITIONS}
        constants["BLOCKS"] = codebook_embedding_grad.BLOCKS
        aligned = ("grad", "packed", "partial", "cols")
        found.append(offline.Kernel(module + "embedding_grad_kernel", signature, constants, aligned))
    signature = {"partial": "*fp32", "order": "*i64", "starts": "*i64", "out": "*fp32", "count": "i32", "pieces": "i32"}
    found.append(offline.Kernel(module + "sum_segments_kernel", signature, {"BITS": 4}))
    return found


@pytest.mark.parametrize("architecture", offline.ARCHITECTURES)
def test_compiled_offline(architecture):
    asked = kernels()
    for kernel, built in zip(asked, offline.compile_all(asked, architecture), strict=True):
        text = f"{kernel.kernel} {kernel.constexprs} sm_{architecture}: {built.registers} registers, {built.spills} spills"
        assert built.spills == 0, text
        assert built.registers <= 255, text
        assert built.shared <= 100 * 1024, text  # two programs a multiprocessor of sm_90
        assert built.count("LDG|LDGSTS") > 0
        if kernel.kernel.endswith("linear_grad_kernel"):
            assert built.count("GMMA" if architecture == 90 and kernel.signature["grad"] == "*bf16" else "MMA") > 0, text
            # Nothing of the weight gradient is stored: the stores are those of sums.
            assert built.count("STG.E.128|STG.E.64") == 0, text

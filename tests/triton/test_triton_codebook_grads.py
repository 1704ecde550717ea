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


@pytest.mark.parametrize("tile", [codebook_linear_grad.TILE, codebook_linear_grad.TILE_GROUPED, codebook_linear_grad.TILE_SMALL])
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


def linear_kernel(bits: int, dtype: str, shared: bool, whole: bool = True, precision: str = "ieee") -> offline.Kernel:
    """The kernel as it is launched. whole: OUT and IN are multiples of 16."""
    tile = codebook_linear_grad.TILE if shared else codebook_linear_grad.TILE_GROUPED
    if dtype == "fp32" or not whole:
        tile = codebook_linear_grad.TILE_SMALL
    signature = {"grad": "*" + dtype, "input": "*" + dtype, "packed": "*u8", "partial": "*fp32"}
    aligned = (*signature, "rows_per_piece", *(("OUT", "IN") if whole else ()))
    signature |= dict.fromkeys(("M", "OUT", "IN", "rows_per_piece"), "i32")
    constants = {"BITS": bits, "SHARED": shared, "ROWS": tile.rows, "COLS": tile.cols, "STEP": tile.step}
    constants |= {"WIDEN": False, "PRECISION": precision}
    name = "kmq_kernels.triton_kernels.codebook_linear_grad:linear_grad_kernel"
    return offline.Kernel(name, signature, constants, aligned, tile.num_warps, tile.num_stages)


def embedding_kernel(bits: int, dtype: str, shared: bool, whole: bool = True) -> offline.Kernel:
    signature = {"grad": "*" + dtype, "ids": "*i64", "packed": "*u8", "partial": "*fp32"}
    aligned = ("grad", "packed", "partial", *(("cols",) if whole else ()))
    signature |= dict.fromkeys(("count", "rows", "cols", "padding_idx"), "i32")
    constants = {"BITS": bits, "SHARED": shared, "POSITIONS": codebook_embedding_grad.POSITIONS}
    constants["BLOCKS"] = codebook_embedding_grad.BLOCKS
    name = "kmq_kernels.triton_kernels.codebook_embedding_grad:embedding_grad_kernel"
    return offline.Kernel(name, signature, constants, aligned, codebook_embedding_grad.NUM_WARPS)


def segments_kernel(bits: int) -> offline.Kernel:
    signature = {"partial": "*fp32", "order": "*i64", "starts": "*i64", "out": "*fp32", "count": "i32", "pieces": "i32"}
    name = "kmq_kernels.triton_kernels.codebook_embedding_grad:sum_segments_kernel"
    return offline.Kernel(name, signature, {"BITS": bits})


def check_compiled(asked: list[offline.Kernel], architecture: int) -> None:
    for kernel, built in zip(asked, offline.compile_all(asked, architecture), strict=True):
        text = f"{kernel.kernel} {kernel.signature} {kernel.constexprs} sm_{architecture}: {built.registers} registers, "
        text += f"{built.spills} spills, {built.shared} bytes"
        assert built.spills == 0, text
        assert built.registers <= 255, text
        assert built.shared <= 100 * 1024, text  # two programs a multiprocessor of sm_90
        assert built.count("LDG|LDGSTS") > 0
        if kernel.kernel.endswith("linear_grad_kernel"):
            whole, half = "IN" in kernel.aligned, kernel.signature["grad"] != "*fp32"
            tensor_cores = "GMMA" if architecture == 90 and whole and half else "MMA"
            assert (kernel.constexprs["PRECISION"] == "ieee" and not half) or built.count(tensor_cores) > 0, text
            # Nothing of the weight gradient is stored: the stores are those of sums.
            assert built.count("STG.E.128|STG.E.64") == 0, text


@pytest.mark.parametrize("architecture", offline.ARCHITECTURES)
def test_compiled_offline(architecture):
    """Widths of one, two and three planes."""
    asked = [linear_kernel(bits, "bf16", True) for bits in (3, 4, 7)]
    asked += [linear_kernel(bits, "bf16", False) for bits in (4, 6)]
    asked += [linear_kernel(7, "fp16", shared, whole) for shared, whole in ((True, True), (False, False))]
    asked += [linear_kernel(4, "fp32", shared, precision="tf32") for shared in (True, False)]
    asked += [embedding_kernel(bits, "bf16", shared) for bits, shared in ((4, True), (4, False), (7, True))]
    check_compiled([*asked, segments_kernel(4)], architecture)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", offline.ARCHITECTURES)
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_width_compiles(architecture, bits):
    asked = [linear_kernel(bits, "fp32", shared, precision="tf32") for shared in (True, False)]
    for dtype in ("bf16", "fp16", "fp32"):
        for shared in (True, False):
            for whole in (True, False):
                asked += [linear_kernel(bits, dtype, shared, whole), embedding_kernel(bits, dtype, shared, whole)]
    check_compiled([*asked, segments_kernel(bits)], architecture)


def at_an_odd_address(packed):
    """The same bytes as a view that begins three bytes into its storage."""
    whole = packed.new_empty(packed.numel() + 3)
    view = whole[3:].view(packed.shape).copy_(packed)
    assert view.data_ptr() % 16
    return view


def test_a_packed_view_at_an_odd_address_is_copied(device, monkeypatch):
    """Kernels load four bytes and more at once, which on a device must begin at multiples of their size."""
    seen = []
    for module, name in ((codebook_linear_grad, "linear_grad_kernel"), (codebook_embedding_grad, "embedding_grad_kernel")):
        kernel = getattr(module, name)

        def grid(size, kernel=kernel):
            def launch(*arguments, **options):
                seen.extend(a.data_ptr() % 16 for a in arguments if isinstance(a, torch.Tensor) and a.dtype == torch.uint8)
                kernel[size](*arguments, **options)

            return launch

        monkeypatch.setattr(module, name, type("Kernel", (), {"__getitem__": lambda self, size, grid=grid: grid(size)})())
    grad_output, input, index, packed = linear.problem(20, 30, 40, 3, torch.float32)
    odd = at_an_odd_address(packed.to(device))
    out = codebook_linear_grad.codebook_linear_grad(grad_output.to(device), input.to(device), odd, 1, 8, 30)
    linear.assert_sums(out.cpu(), grad_output, input, index, 3, 30)
    ids = torch.arange(20, device=device)
    straight, crooked = (
        codebook_embedding_grad.codebook_embedding_grad(input.to(device), ids, where, 1, 8, 30, -1)
        for where in (packed.to(device), odd)
    )
    assert torch.equal(straight, crooked)
    assert seen == [0, 0, 0]

"""dequantize: packed indices and codebook -> weight, bound by writing it; and the same for rows gathered by ids."""

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..packing import BLOCK
from .decode import LANES, decode, load_planes

UNITS = 32  # blocks of 128 columns that a program takes


@triton.jit
def decode_rows_kernel(
    ids, packed, codebook, out, count, rows, cols, group_rows,
    BITS: tl.constexpr, SHARED: tl.constexpr, GATHER: tl.constexpr, UNITS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """out[i] = decoded row i, or with GATHER decoded row ids[i], for i < count. A unit is one block of one row.

    An id out of range stops the kernel with an assertion, and reads row 0 or the last row until then.
    """
    blocks = tl.cdiv(cols, 128)
    unit = tl.program_id(0).to(tl.int64) * UNITS + tl.arange(0, UNITS)
    i = unit // blocks
    block = unit % blocks
    if GATHER:
        row = tl.load(ids + i, mask=i < count, other=0).to(tl.int64)
        tl.device_assert((row >= 0) & (row < rows), "ids: expected values in [0, rows)")
        row = tl.maximum(tl.minimum(row, rows - 1), 0)
    else:
        row = tl.minimum(i, rows - 1)
    K: tl.constexpr = 2**BITS
    book = codebook if SHARED else codebook + (row // group_rows * K)[:, None]
    planes = load_planes(packed + ((row * blocks + block) * (16 * BITS))[:, None], BITS, False)
    column = (block * 128)[:, None] + tl.arange(0, LANES)[None, :]
    for j in tl.static_range(8):
        weight = decode(planes, book, j, BITS, DTYPE)
        tl.store(out + i[:, None] * cols + column, weight, mask=(i[:, None] < count) & (column < cols))
        column += LANES


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Makes the device of `tensor` the current one; nothing for the CPU, where the interpreter runs the kernel."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def kernel_dtype(dtype: torch.dtype) -> tl.dtype:
    """Triton's name of a dtype."""
    return getattr(tl, str(dtype).removeprefix("torch."))


def interpreted_bf16(tensor: Tensor) -> bool:
    """Whether a kernel would meet bf16 in Triton's interpreter, which computes and rounds it wrongly."""
    return tensor.dtype == torch.bfloat16 and not tensor.is_cuda


def aligned(packed: Tensor) -> Tensor:
    """`packed`, contiguous, with rows that begin at multiples of 16 bytes: copied where it is a view that is not."""
    packed = packed.contiguous()
    return packed if packed.data_ptr() % 16 == 0 else packed.clone()


def programs(rows: int, cols: int) -> int:
    """Programs for the blocks of a (rows, cols) matrix."""
    return triton.cdiv(rows * triton.cdiv(cols, BLOCK), UNITS)


def decode_rows(
    ids: Tensor | None,
    packed: Tensor,
    codebook: Tensor,
    cols: int,
    group_rows: int,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """Rows `ids` (flat; None for all) of the weight, (rows, cols) in `dtype`, written to `out` where it is given."""
    count = packed.shape[0] if ids is None else ids.numel()
    if out is None:
        out = torch.empty(count, cols, device=packed.device, dtype=dtype)
    if out.numel() == 0:
        return out
    with on_device(packed):
        decode_rows_kernel[(programs(count, cols),)](
            ids, aligned(packed), codebook.contiguous(), out, count, packed.shape[0], cols, group_rows,
            BITS=codebook.shape[1].bit_length() - 1, SHARED=codebook.shape[0] == 1, GATHER=ids is not None, UNITS=UNITS,
            DTYPE=kernel_dtype(dtype), debug=ids is not None, sanitize_overflow=False,
        )  # fmt: skip
    return out


def dequantize(packed: Tensor, codebook: Tensor, cols: int, group_rows: int) -> Tensor:
    """The weight (rows, cols) in the codebook's dtype; see `kmq_kernels.ops.dequantize`."""
    return decode_rows(None, packed, codebook, cols, group_rows, codebook.dtype)

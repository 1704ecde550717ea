"""codebook_embedding_grad: sums grad_output by the indices of the rows that the batch asked for, and touches no others.

One codebook: a program sums a few positions into (K,), and a sum of fixed order adds the programs up. Several codebooks: a
program sums each of its positions into (K,); the positions are sorted by codebook, and one program a codebook adds them in order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .codebook_linear_grad import index_tile
from .dequantize import aligned, on_device

POSITIONS = 32  # of a program
BLOCKS = 4  # of 128 columns, that a program takes one after the other
NUM_WARPS = 8


@triton.jit
def embedding_grad_kernel(
    grad, ids, packed, partial, count, rows, cols, padding_idx,
    BITS: tl.constexpr, SHARED: tl.constexpr, POSITIONS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """partial (column pieces, programs, K) with SHARED, else (column pieces, count, K).

    An id out of range stops the kernel with an assertion, and reads row 0 or the last row until then.
    """
    i = tl.program_id(0).to(tl.int64) * POSITIONS + tl.arange(0, POSITIONS)
    piece = tl.program_id(1)
    K: tl.constexpr = 2**BITS
    id = tl.load(ids + i, mask=i < count, other=0).to(tl.int64)
    tl.device_assert((id >= 0) & (id < rows), "ids: expected values in [0, rows)")
    row = tl.maximum(tl.minimum(id, rows - 1), 0)
    taken = (i < count) & (id != padding_idx)
    row_ptr = packed + row[:, None] * (tl.cdiv(cols, 128) * (16 * BITS))
    grad_ptr = grad + i[:, None] * cols
    first = piece * (BLOCKS * 128)
    last = tl.minimum(first + BLOCKS * 128, cols)
    k = tl.arange(0, K)
    if SHARED:  # noqa: SIM108, the two have different types
        total = tl.zeros((K,), tl.float32)
    else:
        total = tl.zeros((POSITIONS, K), tl.float32)
    for start in range(first, last, 128):
        column = start + tl.arange(0, 128)
        inside = taken[:, None] & (column < cols)[None, :]
        x = tl.load(grad_ptr + column[None, :], mask=inside, other=0.0).to(tl.float32)
        index = tl.where(inside, index_tile(row_ptr + start // 128 * (16 * BITS), 0, 8, BITS), K)
        for entry in range(K):
            members = tl.where(index == entry, x, 0.0)
            if SHARED:
                total += tl.where(k == entry, tl.sum(members), 0.0)
            else:
                total += tl.where((k == entry)[None, :], tl.sum(members, 1)[:, None], 0.0)
    if SHARED:
        tl.store(partial + (piece.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * K + k, total)
    else:
        tl.store(partial + (piece * count + i)[:, None] * K + k[None, :], total, mask=(i < count)[:, None])


@triton.jit
def sum_segments_kernel(partial, order, starts, out, count, pieces, BITS: tl.constexpr):
    """out[g] = the sum of partial[piece, order[i]] for i from starts[g] to starts[g + 1], in that order."""
    g = tl.program_id(0).to(tl.int64)
    K: tl.constexpr = 2**BITS
    k = tl.arange(0, K)
    total = tl.zeros((K,), tl.float64)
    for i in range(tl.load(starts + g), tl.load(starts + g + 1)):
        at = partial + tl.load(order + i) * K + k
        for _ in range(pieces):
            total += tl.load(at).to(tl.float64)
            at += count * K
    tl.store(out + g * K + k, total.to(tl.float32))


def codebook_embedding_grad(
    grad_output: Tensor, ids: Tensor, packed: Tensor, num_codebooks: int, num_centroids: int, group_rows: int, padding_idx: int
) -> Tensor:
    """codebook_grad of the scatter of grad_output to rows `ids`; see `kmq_kernels.reference.codebook_embedding_grad`.

    Accumulated in fp32; bitwise the same on every run.
    """
    cols, shared, bits = grad_output.shape[-1], num_codebooks == 1, num_centroids.bit_length() - 1
    grad, flat = grad_output.reshape(-1, cols).contiguous(), ids.reshape(-1).contiguous()
    count = flat.numel()
    if grad.numel() == 0:
        return torch.zeros(num_codebooks, num_centroids, device=grad.device)
    programs, pieces = triton.cdiv(count, POSITIONS), triton.cdiv(cols, BLOCKS * 128)
    partial = torch.empty(pieces, programs if shared else count, num_centroids, device=grad.device, dtype=torch.float32)
    with on_device(grad):
        embedding_grad_kernel[(programs, pieces)](
            grad, flat, aligned(packed), partial, count, packed.shape[0], cols, padding_idx,
            BITS=bits, SHARED=shared, POSITIONS=POSITIONS, BLOCKS=BLOCKS, debug=True, sanitize_overflow=False,
            num_warps=NUM_WARPS,
        )  # fmt: skip
        if shared:
            return partial.sum((0, 1), dtype=torch.float64).float()[None]
        group, order = torch.sort(flat.div(group_rows, rounding_mode="floor"), stable=True)
        starts = torch.searchsorted(group, torch.arange(num_codebooks + 1, device=grad.device, dtype=group.dtype))
        out = torch.empty(num_codebooks, num_centroids, device=grad.device, dtype=torch.float32)
        sum_segments_kernel[(num_codebooks,)](partial, order, starts, out, count, pieces, BITS=bits)
    return out

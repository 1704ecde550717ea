"""Every op in plain torch: the specification. Short and obvious, runs on any device, deterministic, not fast.

Shapes: values (B, N), centroids (B, K) ascending, assignments (B, N) uint8; packed (rows, row_bytes) uint8, see packing.py;
codebook (G, K), K = 2**bits. Row r of a weight uses codebook r // group_rows, so G = ceil(rows / group_rows).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .packing import pack, unpack

__all__ = [
    "assign", "codebook_embedding", "codebook_embedding_grad", "codebook_grad", "codebook_linear", "codebook_linear_grad",
    "codebook_linear_input_grad", "dequantize", "pack", "unpack", "update",
]  # fmt: skip


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a value of `dtype` is computed with: fp64 stays, everything narrower becomes fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def assign(values: Tensor, centroids: Tensor) -> Tensor:
    """Nearest centroid of each value, (B, N) uint8: `searchsorted` of the midpoints, a tie goes to the lower index."""
    midpoints = (centroids[:, 1:] + centroids[:, :-1]) / 2  # [B, K - 1]
    return torch.searchsorted(midpoints.contiguous(), values.to(centroids.dtype).contiguous()).to(torch.uint8)


def update(values: Tensor, assignments: Tensor, num_centroids: int, sample_weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sums of weight * value and of weight per cluster, both (B, K) fp64."""
    weight = torch.ones_like(values, dtype=torch.float64) if sample_weight is None else sample_weight.double()
    weighted = weight * values.double()
    members = [assignments == k for k in range(num_centroids)]
    sums = torch.stack([torch.where(m, weighted, 0.0).sum(1) for m in members], 1)
    weights = torch.stack([torch.where(m, weight, 0.0).sum(1) for m in members], 1)
    return sums, weights


def _row_codebook(rows: int, group_rows: int, device: torch.device) -> Tensor:
    return torch.arange(rows, device=device).div(group_rows, rounding_mode="floor")


def dequantize(packed: Tensor, codebook: Tensor, cols: int, group_rows: int) -> Tensor:
    """weight (rows, cols) in the codebook's dtype: weight[r, c] = codebook[r // group_rows, index[r, c]]."""
    index = unpack(packed, codebook.shape[1].bit_length() - 1, cols).int()
    if codebook.shape[0] == 1:
        return codebook[0][index]
    return codebook[_row_codebook(packed.shape[0], group_rows, packed.device)[:, None], index]


def codebook_linear(input: Tensor, packed: Tensor, codebook: Tensor, bias: Tensor | None, group_rows: int) -> Tensor:
    """input (..., IN) @ weight.T + bias -> (..., OUT), computed in fp32 (fp64 for fp64 input), rounded once to input's dtype."""
    compute = wide(input.dtype)
    weight = dequantize(packed, codebook, input.shape[-1], group_rows).to(compute)
    return F.linear(input.to(compute), weight, None if bias is None else bias.to(compute)).to(input.dtype)


def codebook_linear_input_grad(grad_output: Tensor, packed: Tensor, codebook: Tensor, cols: int, group_rows: int) -> Tensor:
    """grad_output (..., OUT) @ weight -> (..., IN), in grad_output's dtype."""
    compute = wide(grad_output.dtype)
    weight = dequantize(packed, codebook, cols, group_rows).to(compute)
    return (grad_output.to(compute) @ weight).to(grad_output.dtype)


def codebook_embedding(ids: Tensor, packed: Tensor, codebook: Tensor, cols: int, group_rows: int, padding_idx: int) -> Tensor:
    """Rows `ids` (any shape, int32 or int64) of the weight -> (*ids.shape, cols) in the codebook's dtype.

    `padding_idx` matters to the gradient only, as in torch.nn.functional.embedding; -1 is none.
    """
    flat = ids.reshape(-1)
    if flat.numel() and (int(flat.min()) < 0 or int(flat.max()) >= packed.shape[0]):
        raise IndexError(f"ids: expected values in [0, {packed.shape[0]}), got {int(flat.min())} to {int(flat.max())}")
    index = unpack(packed[flat], codebook.shape[1].bit_length() - 1, cols).int()
    book = flat.div(group_rows, rounding_mode="floor")
    return codebook[book[:, None], index].view(*ids.shape, cols)


def codebook_grad(grad: Tensor, packed: Tensor, num_codebooks: int, num_centroids: int, group_rows: int) -> Tensor:
    """Gradient (rows, cols) of the weight -> gradient (G, K) of its codebook: the sum over the members of each centroid.

    The chain rule of dequantize, accumulated in fp64; returned in fp32 (fp64 for an fp64 gradient). A centroid without
    members gets 0.
    """
    index = unpack(packed, num_centroids.bit_length() - 1, grad.shape[1])
    missing = num_codebooks * group_rows - grad.shape[0]  # rows that the last group lacks
    grad64 = F.pad(grad.double(), (0, 0, 0, missing)).view(num_codebooks, -1)
    index = F.pad(index, (0, 0, 0, missing)).view(num_codebooks, -1)
    sums = [torch.where(index == k, grad64, 0.0).sum(1) for k in range(num_centroids)]
    return torch.stack(sums, 1).to(wide(grad.dtype))


def codebook_linear_grad(
    grad_output: Tensor, input: Tensor, packed: Tensor, num_codebooks: int, num_centroids: int, group_rows: int
) -> Tensor:
    """codebook_grad of grad_output.T @ input, from grad_output (..., OUT) and input (..., IN)."""
    compute = wide(torch.promote_types(grad_output.dtype, input.dtype))
    grad = grad_output.reshape(-1, grad_output.shape[-1]).to(compute).T @ input.reshape(-1, input.shape[-1]).to(compute)
    return codebook_grad(grad, packed, num_codebooks, num_centroids, group_rows)


def codebook_embedding_grad(
    grad_output: Tensor, ids: Tensor, packed: Tensor, num_codebooks: int, num_centroids: int, group_rows: int, padding_idx: int
) -> Tensor:
    """codebook_grad of the scatter of grad_output (*ids.shape, cols) to rows `ids`; rows of `padding_idx` give nothing."""
    cols = grad_output.shape[-1]
    flat = ids.reshape(-1)
    grad = torch.where((flat == padding_idx)[:, None], 0.0, grad_output.reshape(-1, cols).double())
    index = unpack(packed[flat], num_centroids.bit_length() - 1, cols)
    book = flat.div(group_rows, rounding_mode="floor")
    out = grad.new_zeros(num_codebooks, num_centroids)
    for g in book.unique().tolist():
        rows = book == g
        out[g] = torch.stack([torch.where(index[rows] == k, grad[rows], 0.0).sum() for k in range(num_centroids)])
    return out.to(wide(grad_output.dtype))

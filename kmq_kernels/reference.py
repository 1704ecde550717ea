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
    "codebook_linear_input_grad", "dequantize", "int8_codebook", "int8_linear", "pack", "sparse_embedding",
    "sparse_embedding_grad", "sparse_linear", "sparse_linear_grad", "sparse_linear_input_grad", "unpack", "update",
]  # fmt: skip


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a value of `dtype` is computed with: fp64 stays, everything narrower becomes fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def assign(values: Tensor, centroids: Tensor) -> Tensor:
    """Nearest centroid of each value, (B, N) uint8: `searchsorted` of the midpoints, a tie goes to the lower index, NaN to 0."""
    above, below = centroids[:, 1:], centroids[:, :-1]
    middle = (above + below) / 2
    midpoints = torch.where(middle.isinf(), above / 2 + below / 2, middle)  # [B, K - 1]
    found = torch.searchsorted(midpoints.contiguous(), values.to(centroids.dtype).contiguous())
    return torch.where(values.isnan(), 0, found).to(torch.uint8)


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


INT8_COLS = 32768  # more columns could overflow an integer sum


INT8_LIMIT = 127  # of the magnitudes in a table


def int8_codebook(packed: Tensor, codebook: Tensor, cols: int, group_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """table (G, K) int8 and scale (G,) fp32 with codebook ~ scale * table, and row_sum (rows,) int32 of the integers.

    Of some scales tried, the one with the least sum over the weights of squared errors, and a tenth of the square of a row's
    sum of them, which inputs see whose mean is not zero. Where entries of at most a 4096th of a codebook's weights, or of one,
    are at least twice as large as all others, those more than 1.4 times as large get 0: they are left to the outliers.
    """
    bits = codebook.shape[1].bit_length() - 1
    index = unpack(packed, bits, cols).long()
    book = _row_codebook(packed.shape[0], group_rows, packed.device)
    counts = torch.zeros(packed.shape[0], codebook.shape[1], dtype=torch.float64, device=packed.device)
    counts.scatter_add_(1, index, torch.ones_like(index, dtype=torch.float64))
    members = torch.zeros(codebook.shape, dtype=torch.float64, device=packed.device).index_add_(0, book, counts)  # [G, K]
    limit, c = INT8_LIMIT, codebook.double()
    finite = c.isfinite().all(1, keepdim=True)
    c = torch.where(finite, c, 0.0)
    used = torch.where(members > 0, c.abs(), 0.0)
    most = used.amax(1, keepdim=True)  # [G, 1]
    beyond = ((used[:, None, :] >= used[:, :, None]) * members[:, None, :]).sum(2)  # weights that are as large or larger
    rest = torch.where(beyond <= (members.sum(1, keepdim=True) / 4096).clamp_min(1), 0.0, used).amax(1, keepdim=True)
    leave = (rest > 0) & (2 * rest <= most)
    most = torch.where(leave & (used > 1.4 * rest), 0.0, used).amax(1, keepdim=True)
    left_out = leave & (c.abs() > most)
    members = torch.where(left_out, 0.0, members)
    table, best = torch.zeros_like(c), torch.full_like(most, torch.inf)
    rows = book.bincount(minlength=len(codebook))[:, None]  # of each codebook
    squares, total = ((members * c * x).sum(1, keepdim=True) for x in (c, 1.0))
    scale = torch.where(most > 0, most / limit, 0.0)
    candidates = min(max(1024 // codebook.shape[1], 8), 64)
    for i in range(candidates):
        t = (c * (limit * (1 - 0.5 * i / candidates)) / most.clamp_min(1e-300)).round().clamp(-limit, limit)
        product, square, count = ((members * x * t).sum(1, keepdim=True) for x in (c, t, 1.0))
        fitted = product / square.clamp_min(1e-300)
        cost = squares - fitted * product + 0.1 * (total - fitted * count).square() / rows
        t = torch.where(left_out, 0.0, t)
        better = (square > 0) & (cost < best)
        best = torch.where(better, cost, best)
        table = torch.where(better, t, table)
        scale = torch.where(better, fitted, scale)
    scale = torch.where(finite, scale, torch.nan)
    row_sum = (counts * table[book]).sum(1)
    return table.to(torch.int8), scale[:, 0].float(), row_sum.to(torch.int32)


INT8_HALVINGS = 4  # of the step of a row


def int8_round(input: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of `input` (M, IN) as integers q (M, IN) int32 and a step (M,) fp32: input ~ step * q. Not finite: NaN, zeros.

    The step (max - min) / 255, taken over the row and 0, puts a row into 8 bits. It is halved, up to INT8_HALVINGS times, while
    few numbers lie outside a window of 256 steps, which begins at the least, but at most 128 below zero. A number e steps outside
    costs ceil(e / 256) products more than its own; of the columns 16 f + l of a block of 128, those of one l whose f are all even
    or all odd share these on each side. At most max(2, blocks) may be needed, which is a 32nd of all products.
    """
    x = F.pad(input.float(), (0, -input.shape[1] % 128 or (128 if input.shape[1] == 0 else 0)))
    blocks = x.shape[1] // 128
    finite = x.isfinite().all(1)
    x = torch.where(finite[:, None], x, 0.0)
    high, low = x.amax(1).clamp_min(0), x.amin(1).clamp_max(0)
    step = high / 255 - low / 255
    zero = ~(step >= 1e-36)
    step = torch.where(zero, 1.0, step)
    inverse, open_ = 1 / step, ~zero
    first = (low * inverse).round()
    halved = torch.zeros_like(open_)
    for _ in range(INT8_HALVINGS):
        begin = (low * (inverse * 2)).round().clamp_min(-128)
        q = (x * (inverse * 2)[:, None]).round()
        groups = [(q - begin[:, None] - 255).clamp_min(0), (begin[:, None] - q).clamp_min(0)]
        cost = sum((g.view(-1, blocks, 4, 2, 16).amax(2) / 256).ceil().sum((1, 2, 3)) for g in groups)
        open_ = open_ & (cost <= max(2, blocks))
        halved |= open_
        inverse, step = torch.where(open_, inverse * 2, inverse), torch.where(open_, step / 2, step)
        first = torch.where(open_, begin, first)
    q = (x * inverse[:, None]).round()
    q = torch.where(halved[:, None], q, torch.minimum(torch.maximum(q, first[:, None]), first[:, None] + 255))
    q = torch.where(zero[:, None], 0.0, q)[:, : input.shape[1]]
    return q.to(torch.int32), torch.where(finite, torch.where(zero, 0.0, step), torch.nan)


def int8_linear(
    input: Tensor,
    packed: Tensor,
    table: Tensor,
    factor: Tensor,
    row_sum: Tensor,
    bias: Tensor | None,
    group_rows: int,
    outlier_index: Tensor | None,
    outlier_delta: Tensor | None,
    activation: str,
) -> Tensor:
    """activation(factor * (q @ t.T) * step + outliers + bias), q and step being those of `int8_round`.

    t is the table (G, K) int8 at the indices. Integer sums are exact (here in fp64, whose integers reach further). A row that is
    not finite gives NaN. `row_sum` is for implementations that multiply what is above the least of a row.
    """
    x = input.float()
    q, step = int8_round(x.reshape(-1, x.shape[-1]))
    weight = dequantize(packed, table, input.shape[-1], group_rows).double()
    out = (q.double() @ weight.T).float() * step[:, None] * factor.float()
    out = out.view(*input.shape[:-1], packed.shape[0])
    if outlier_index is not None and outlier_delta is not None:
        out = out + sparse_linear(x, outlier_index, outlier_delta.float(), packed.shape[0])
    if bias is not None:
        out = out + bias.float()
    return activate(out, activation).to(input.dtype)


ACTIVATIONS = ("none", "gelu", "gelu_tanh", "relu", "silu")


def activate(x: Tensor, activation: str) -> Tensor:
    """One of ACTIVATIONS of x."""
    if activation == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    return x if activation == "none" else getattr(F, activation)(x)


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


# A sparse weight (rows, cols): `index` (n,) int32, ascending flat positions, and `values` (n,). Sums run along segments of
# neighbouring entries or in a dense product, both in a fixed order; no atomics on any device.

_FEW_ROWS = 64  # of an input: up to here gathering the entries is cheaper than a dense product


def _dense(index: Tensor, values: Tensor, rows: int, cols: int) -> Tensor:
    return values.new_zeros(rows * cols).index_put((index.long(),), values).view(rows, cols)


def _segment_sums(terms: Tensor, segment: Tensor, segments: int) -> Tensor:
    """Sums (segments, M) of the rows of terms (n, M) whose `segment` (n,), ascending, is alike."""
    ends = torch.searchsorted(segment.contiguous(), torch.arange(segments + 1, device=segment.device))
    return torch.segment_reduce(terms.contiguous(), "sum", offsets=ends, axis=0, unsafe=True)


def sparse_linear(input: Tensor, index: Tensor, values: Tensor, rows: int) -> Tensor:
    """input (..., cols) @ sparse.T -> (..., rows), computed in fp32 (fp64 for fp64 input), rounded once to input's dtype."""
    cols, compute = input.shape[-1], wide(input.dtype)
    x, v = input.reshape(-1, cols).to(compute), values.to(compute)
    if x.shape[0] > _FEW_ROWS:
        out = x @ _dense(index, v, rows, cols).T
    else:
        row, col = index.long().div(cols, rounding_mode="floor"), index.long() % cols
        out = _segment_sums(x.T[col] * v[:, None], row, rows).T
    return out.contiguous().view(*input.shape[:-1], rows).to(input.dtype)


def sparse_linear_input_grad(grad_output: Tensor, index: Tensor, values: Tensor, cols: int) -> Tensor:
    """grad_output (..., rows) @ sparse -> (..., cols), in grad_output's dtype."""
    rows, compute = grad_output.shape[-1], wide(grad_output.dtype)
    grad, v = grad_output.reshape(-1, rows).to(compute), values.to(compute)
    if grad.shape[0] > _FEW_ROWS:
        out = grad @ _dense(index, v, rows, cols)
    else:
        col, order = (index.long() % cols).sort(stable=True)
        row = index.long()[order].div(cols, rounding_mode="floor")
        out = _segment_sums(grad.T[row] * v[order][:, None], col, cols).T
    return out.contiguous().view(*grad_output.shape[:-1], cols).to(grad_output.dtype)


def sparse_linear_grad(grad_output: Tensor, input: Tensor, index: Tensor) -> Tensor:
    """Gradient (n,) of the sparse values: the entries at `index` of grad_output.T @ input, in fp32 (fp64 for fp64)."""
    rows, cols = grad_output.shape[-1], input.shape[-1]
    compute = wide(torch.promote_types(grad_output.dtype, input.dtype))
    grad, x = grad_output.reshape(-1, rows).to(compute), input.reshape(-1, cols).to(compute)
    if x.shape[0] > _FEW_ROWS:
        return (grad.T @ x).view(-1)[index.long()]
    row, col = index.long().div(cols, rounding_mode="floor"), index.long() % cols
    return (grad.T[row] * x.T[col]).sum(1)


def _entries_of(ids: Tensor, index: Tensor, cols: int) -> tuple[Tensor, Tensor]:
    """For flat row numbers (T,): which of them, and which entry of the sparse weight, for every entry in one of these rows."""
    wide_index, start = index.long().contiguous(), ids.long() * cols
    first, last = torch.searchsorted(wide_index, start), torch.searchsorted(wide_index, start + cols)
    count = last - first
    which = torch.repeat_interleave(count)
    entry = torch.arange(len(which), device=ids.device) - (count.cumsum(0) - count - first)[which]
    return which, entry


def sparse_embedding(ids: Tensor, index: Tensor, values: Tensor, cols: int, padding_idx: int) -> Tensor:
    """Rows `ids` (any shape) of the sparse weight -> (*ids.shape, cols) in the dtype of values.

    `padding_idx` matters to the gradient only.
    """
    flat = ids.reshape(-1)
    which, entry = _entries_of(flat, index, cols)
    out = values.new_zeros(len(flat), cols)
    return out.index_put((which, index.long()[entry] % cols), values[entry]).view(*ids.shape, cols)


def sparse_embedding_grad(grad_output: Tensor, ids: Tensor, index: Tensor, padding_idx: int) -> Tensor:
    """Gradient (n,) of the sparse values from grad_output (*ids.shape, cols), in fp32 (fp64); `padding_idx` gives nothing."""
    cols, flat = grad_output.shape[-1], ids.reshape(-1)
    which, entry = _entries_of(flat, index, cols)
    terms = grad_output.reshape(-1, cols)[which, index.long()[entry] % cols].to(wide(grad_output.dtype))
    entry, order = entry.sort(stable=True)
    terms = torch.where(flat[which[order]] == padding_idx, 0.0, terms[order])
    return _segment_sums(terms[:, None], entry, len(index))[:, 0]

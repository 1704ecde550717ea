"""The ops of namespace `kmq`: schema, checks, fake, autograd and registration of each, and the functions people call.

The reference is registered as the default of every op; the C++ extension and the Triton launchers take over the devices and
ops they have. This is the only file that knows the dispatcher.
"""

import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor

from . import packing, reference

_library = torch.library.Library("kmq", "DEF")
_ops = torch.ops.kmq

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _define(schema: str) -> None:
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, getattr(reference, name), "CompositeExplicitAutograd")


# Checks: one sentence each, naming the argument, what was expected and what was given.


def _expect_float(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in _FLOATS:
        raise TypeError(f"{name}: expected a floating-point tensor (fp32, fp64, bf16 or fp16), got {tensor.dtype}")


def _expect_dim(name: str, tensor: Tensor, dim: int, shape: str) -> None:
    if tensor.dim() != dim:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")


def _expect_same_device(name: str, tensor: Tensor, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(f"{name}: expected a tensor on {other.device} like the others, got one on {tensor.device}")


def _expect_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits: expected 1 to 8, got {bits}")


def _expect_centroids(num_centroids: int, most: int = 256) -> None:
    if not 1 <= num_centroids <= most:
        raise ValueError(f"num_centroids: expected 1 to {most}, got {num_centroids}")


def _expect_packed(packed: Tensor, cols: int, num_centroids: int) -> None:
    """The packed matrix fits `cols` columns of log2(num_centroids) bits."""
    bits = num_centroids.bit_length() - 1
    if num_centroids != 2**bits or not 1 <= bits <= 8:
        raise ValueError(f"num_centroids: expected a power of two from 2 to 256, got {num_centroids}")
    if packed.dtype != torch.uint8:
        raise TypeError(f"packed: expected uint8, got {packed.dtype}")
    _expect_dim("packed", packed, 2, "(rows, row_bytes)")
    expected = packing.row_bytes(cols, bits)
    if packed.shape[1] != expected:
        raise ValueError(f"packed: expected {expected} bytes a row for {cols} columns of {bits} bits, got {packed.shape[1]}")


def _expect_codebook(packed: Tensor, codebook: Tensor, cols: int, group_rows: int) -> None:
    _expect_float("codebook", codebook)
    _expect_dim("codebook", codebook, 2, "(G, K)")
    _expect_packed(packed, cols, codebook.shape[1])
    _expect_same_device("codebook", codebook, packed)
    _expect_groups(packed, codebook.shape[0], group_rows)


def _expect_groups(packed: Tensor, num_codebooks: int, group_rows: int) -> None:
    rows = packed.shape[0]
    if group_rows < 1 or -(-rows // group_rows) != num_codebooks:
        raise ValueError(f"group_rows: {num_codebooks} codebooks for {rows} rows do not fit groups of {group_rows} rows")


def _group_rows(packed: Tensor, num_codebooks: int, group_rows: int | None) -> int:
    """`group_rows` as given, else the even split of the rows over the codebooks."""
    if group_rows is not None:
        return group_rows
    if num_codebooks < 1:
        raise ValueError(f"codebook: expected at least one codebook, got {num_codebooks}")
    rows = packed.shape[0] if packed.dim() else 0
    return max(1, -(-rows // num_codebooks))


# assign


_define("assign(Tensor values, Tensor centroids) -> Tensor")


def _check_assign(values: Tensor, centroids: Tensor) -> None:
    _expect_float("values", values)
    _expect_float("centroids", centroids)
    _expect_dim("values", values, 2, "(B, N)")
    _expect_dim("centroids", centroids, 2, "(B, K)")
    _expect_centroids(centroids.shape[1])
    _expect_same_device("centroids", centroids, values)
    if centroids.shape[0] != values.shape[0]:
        raise ValueError(f"centroids: expected one row for each of the {values.shape[0]} problems, got {centroids.shape[0]}")


@torch.library.register_fake("kmq::assign")
def _(values: Tensor, centroids: Tensor) -> Tensor:
    _check_assign(values, centroids)
    return torch.empty_like(values, dtype=torch.uint8, memory_format=torch.contiguous_format)


def assign(values: Tensor, centroids: Tensor) -> Tensor:
    """Index of the nearest centroid of each value: `searchsorted` of the midpoints, a tie goes to the lower index.

    values: (B, N) fp32, fp64, bf16 or fp16. centroids: (B, K) ascending, K from 1 to 256, fp32 or fp64.
    Returns assignments (B, N) uint8. Raises TypeError or ValueError for other shapes or dtypes.
    """
    _check_assign(values, centroids)
    return _ops.assign(values, centroids)


# update


_define("update(Tensor values, Tensor assignments, int num_centroids, Tensor? sample_weight=None) -> (Tensor, Tensor)")


def _check_update(values: Tensor, assignments: Tensor, num_centroids: int, sample_weight: Tensor | None) -> None:
    _expect_float("values", values)
    _expect_dim("values", values, 2, "(B, N)")
    _expect_centroids(num_centroids)
    if assignments.dtype != torch.uint8 or assignments.shape != values.shape:
        raise ValueError(f"assignments: expected uint8 {tuple(values.shape)}, got {assignments.dtype} {tuple(assignments.shape)}")
    if sample_weight is not None:
        _expect_float("sample_weight", sample_weight)
        if sample_weight.shape != values.shape:
            raise ValueError(f"sample_weight: expected shape {tuple(values.shape)}, got {tuple(sample_weight.shape)}")


@torch.library.register_fake("kmq::update")
def _(values: Tensor, assignments: Tensor, num_centroids: int, sample_weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    _check_update(values, assignments, num_centroids, sample_weight)
    sums = values.new_empty(values.shape[0], num_centroids, dtype=torch.float64)
    return sums, torch.empty_like(sums)


def update(
    values: Tensor, assignments: Tensor, num_centroids: int, sample_weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Sums of weight * value and of weight over the members of each cluster: the two halves of a Lloyd update.

    values: (B, N) floating point; assignments: (B, N) uint8 below num_centroids; sample_weight: (B, N) or None for ones.
    Returns (sums, weights), both (B, K) fp64. Raises TypeError or ValueError for other shapes or dtypes.
    """
    _check_update(values, assignments, num_centroids, sample_weight)
    return _ops.update(values, assignments, num_centroids, sample_weight)


# kmeans: no reference. Its plain form is clustering.py itself, which asks `has_kernel` first.


_library.define(
    "kmeans(Tensor[] values, Tensor?[] sample_weight, int[] num_centroids, int[] group_rows, bool packed,"
    " str algorithm, str init, int max_iter, float tol, int seed)"
    " -> (Tensor[] labels, Tensor[] centroids, Tensor[] inertia, Tensor[] n_iter, Tensor[] bound, int[] faults)"
)
_KMEANS_FAULTS = (
    "",
    "{name}: NaN or Inf among the values; clustering needs finite values",
    "sample_weight of {name}: NaN or Inf among the weights",
    "sample_weight of {name}: negative weights; use squares or absolute values",
    "sample_weight of {name}: all weights are zero; leave it out to weigh all values alike",
)


def has_kernel(op: str, key: str) -> bool:
    """Whether `op` has an implementation of its own under the dispatch key "CPU" or "CUDA"."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"kmq::{op}", key)


def kmeans(
    values: list[Tensor],
    sample_weight: list[Tensor | None],
    num_centroids: list[int],
    group_rows: list[int],
    packed: bool,
    algorithm: str,
    init: str,
    max_iter: int,
    tol: float,
    seed: int,
    names: list[str],
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Clusters matrices (rows, cols) of fp32, bf16 or fp16 on one device; group_rows rows share one problem, G for each matrix.

    Returns, for each matrix, labels (packed, or (rows, cols) uint8), centroids (G, K) fp32, inertia, n_iter and bound (G,).
    clustering.py has checked shapes and options; raises ValueError where the values of a matrix cannot be clustered.
    """
    *out, faults = _ops.kmeans(
        values, sample_weight, num_centroids, group_rows, packed, algorithm, init, max_iter, tol, seed & (2**63 - 1)
    )
    for name, fault in zip(names, faults, strict=True):
        if fault:
            raise ValueError(_KMEANS_FAULTS[fault].format(name=name))
    return tuple(out)


def _kmeans_cuda(
    values: list[Tensor],
    sample_weight: list[Tensor | None],
    num_centroids: list[int],
    group_rows: list[int],
    packed: bool,
    algorithm: str,
    init: str,
    max_iter: int,
    tol: float,
    seed: int,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[int]]:
    """kmq::kmeans on a GPU: "optimal" in Triton; what its histograms cannot resolve, and other algorithms, on the CPU."""
    from .triton_kernels import kmeans as triton_kmeans

    if algorithm == "optimal":
        *out, faults = triton_kmeans.kmeans(values, sample_weight, num_centroids, group_rows, packed, max_iter)
        left = [i for i, fault in enumerate(faults) if fault == triton_kmeans.UNRESOLVED_FAULT]
    else:
        out, faults, left = [[values[0]] * len(values) for _ in range(5)], [0] * len(values), list(range(len(values)))
    if left:
        weights = [sample_weight[i] for i in left]
        *again, left_faults = _ops.kmeans(
            [values[i].cpu() for i in left], [None if weight is None else weight.cpu() for weight in weights],
            [num_centroids[i] for i in left], [group_rows[i] for i in left], packed, algorithm, init, max_iter, tol, seed,
        )  # fmt: skip
        for n, i in enumerate(left):
            faults[i] = left_faults[n]
            for part, solved in zip(out, again, strict=True):
                part[i] = solved[n].to(values[i].device)
    return out[0], out[1], out[2], out[3], out[4], faults


# pack, unpack


_define("pack(Tensor assignments, int bits) -> Tensor")


def _check_pack(assignments: Tensor, bits: int) -> None:
    _expect_bits(bits)
    if assignments.dtype != torch.uint8 or assignments.dim() < 1:
        raise TypeError(f"assignments: expected uint8 (..., cols), got {assignments.dtype} {tuple(assignments.shape)}")


@torch.library.register_fake("kmq::pack")
def _(assignments: Tensor, bits: int) -> Tensor:
    _check_pack(assignments, bits)
    return assignments.new_empty((*assignments.shape[:-1], packing.row_bytes(assignments.shape[-1], bits)))


def pack(assignments: Tensor, bits: int) -> Tensor:
    """Bit-packs the last dimension of `assignments`; the layout is drawn in packing.py.

    assignments: (..., cols) uint8, each below 2**bits; bits: 1 to 8.
    Returns packed (..., ceil(cols / 128) * 16 * bits) uint8. Raises TypeError for another dtype and ValueError for bits
    outside 1 to 8 or an assignment that does not fit.
    """
    _check_pack(assignments, bits)
    if assignments.numel() and bits < 8 and int(assignments.max()) >= 2**bits:
        raise ValueError(f"assignments: expected values below {2**bits} for {bits} bits, got {int(assignments.max())}")
    return _ops.pack(assignments, bits)


_define("unpack(Tensor packed, int bits, int numel) -> Tensor")


def _check_unpack(packed: Tensor, bits: int, numel: int) -> None:
    _expect_bits(bits)
    if packed.dtype != torch.uint8 or packed.dim() < 1:
        raise TypeError(f"packed: expected uint8 (..., row_bytes), got {packed.dtype} {tuple(packed.shape)}")
    expected = packing.row_bytes(numel, bits)
    if numel < 0 or packed.shape[-1] != expected:
        raise ValueError(f"packed: expected {expected} bytes a row for {numel} indices of {bits} bits, got {packed.shape[-1]}")


@torch.library.register_fake("kmq::unpack")
def _(packed: Tensor, bits: int, numel: int) -> Tensor:
    _check_unpack(packed, bits, numel)
    return packed.new_empty((*packed.shape[:-1], numel))


def unpack(packed: Tensor, bits: int, numel: int) -> Tensor:
    """Inverse of `pack`: packed (..., row_bytes) uint8 -> assignments (..., numel) uint8.

    numel: indices in the last dimension (of one row). Raises TypeError for another dtype and ValueError where the number of
    bytes in a row does not fit `bits` and `numel`.
    """
    _check_unpack(packed, bits, numel)
    return _ops.unpack(packed, bits, numel)


# dequantize


_define("dequantize(Tensor packed, Tensor codebook, int cols, int group_rows) -> Tensor")


@torch.library.register_fake("kmq::dequantize")
def _(packed: Tensor, codebook: Tensor, cols: int, group_rows: int) -> Tensor:
    _expect_codebook(packed, codebook, cols, group_rows)
    return codebook.new_empty(packed.shape[0], cols)


def _save_dequantize(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    packed, codebook, _, group_rows = inputs
    ctx.save_for_backward(packed)
    ctx.codebook_shape, ctx.codebook_dtype, ctx.group_rows = codebook.shape, codebook.dtype, group_rows


def _grad_dequantize(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (packed,) = ctx.saved_tensors
    grad_codebook = _ops.codebook_grad(grad, packed, *ctx.codebook_shape, ctx.group_rows)
    return None, grad_codebook.to(ctx.codebook_dtype), None, None


torch.library.register_autograd("kmq::dequantize", _grad_dequantize, setup_context=_save_dequantize)


def dequantize(packed: Tensor, codebook: Tensor, cols: int, *, group_rows: int | None = None) -> Tensor:
    """The weight (rows, cols) that packed indices and codebook stand for, in the codebook's dtype; differentiable in codebook.

    packed: (rows, row_bytes) uint8; codebook: (G, K) floating point, K = 2**bits; cols: columns of the weight;
    group_rows: rows that share a codebook, default ceil(rows / G). Raises TypeError or ValueError where these do not fit.
    """
    group_rows = _group_rows(packed, codebook.shape[0], group_rows)
    _expect_codebook(packed, codebook, cols, group_rows)
    return _ops.dequantize(packed, codebook, cols, group_rows)


# codebook_grad


_define("codebook_grad(Tensor grad, Tensor packed, int num_codebooks, int num_centroids, int group_rows) -> Tensor")


def _check_codebook_grad(grad: Tensor, packed: Tensor, num_codebooks: int, num_centroids: int, group_rows: int) -> None:
    _expect_float("grad", grad)
    _expect_dim("grad", grad, 2, "(rows, cols)")
    _expect_packed(packed, grad.shape[1], num_centroids)
    _expect_same_device("grad", grad, packed)
    _expect_groups(packed, num_codebooks, group_rows)
    if grad.shape[0] != packed.shape[0]:
        raise ValueError(f"grad: expected {packed.shape[0]} rows like packed, got {grad.shape[0]}")


@torch.library.register_fake("kmq::codebook_grad")
def _(grad: Tensor, packed: Tensor, num_codebooks: int, num_centroids: int, group_rows: int) -> Tensor:
    _check_codebook_grad(grad, packed, num_codebooks, num_centroids, group_rows)
    return grad.new_empty(num_codebooks, num_centroids, dtype=reference.wide(grad.dtype))


def codebook_grad(
    grad: Tensor, packed: Tensor, num_centroids: int, *, num_codebooks: int = 1, group_rows: int | None = None
) -> Tensor:
    """Scatter-adds a weight gradient into its codebook: out[g, k] = sum of grad over the weights that use centroid k.

    grad: (rows, cols) floating point; packed: (rows, row_bytes) uint8; num_centroids: K = 2**bits; num_codebooks: G;
    group_rows: rows that share a codebook, default ceil(rows / G). Returns (G, K), fp32 (fp64 for an fp64 gradient);
    a centroid without members gets 0. Bitwise the same on every run. Raises TypeError or ValueError where these do not fit.
    """
    group_rows = _group_rows(packed, num_codebooks, group_rows)
    _check_codebook_grad(grad, packed, num_codebooks, num_centroids, group_rows)
    return _ops.codebook_grad(grad, packed, num_codebooks, num_centroids, group_rows)


# codebook_linear and its two gradients


_define("codebook_linear(Tensor input, Tensor packed, Tensor codebook, Tensor? bias, int group_rows) -> Tensor")
_define("codebook_linear_input_grad(Tensor grad_output, Tensor packed, Tensor codebook, int cols, int group_rows) -> Tensor")
_define(
    "codebook_linear_grad(Tensor grad_output, Tensor input, Tensor packed,"
    " int num_codebooks, int num_centroids, int group_rows) -> Tensor"
)


def _check_codebook_linear(input: Tensor, packed: Tensor, codebook: Tensor, bias: Tensor | None, group_rows: int) -> None:
    _expect_float("input", input)
    if input.dim() < 1:
        raise ValueError(f"input: expected shape (..., IN), got {tuple(input.shape)}")
    _expect_same_device("input", input, packed)
    _expect_codebook(packed, codebook, input.shape[-1], group_rows)
    if bias is not None:
        _expect_float("bias", bias)
        if bias.shape != packed.shape[:1]:
            raise ValueError(f"bias: expected shape ({packed.shape[0]},), got {tuple(bias.shape)}")


@torch.library.register_fake("kmq::codebook_linear")
def _(input: Tensor, packed: Tensor, codebook: Tensor, bias: Tensor | None, group_rows: int) -> Tensor:
    _check_codebook_linear(input, packed, codebook, bias, group_rows)
    return input.new_empty(*input.shape[:-1], packed.shape[0])


@torch.library.register_fake("kmq::codebook_linear_input_grad")
def _(grad_output: Tensor, packed: Tensor, codebook: Tensor, cols: int, group_rows: int) -> Tensor:
    _expect_codebook(packed, codebook, cols, group_rows)
    return grad_output.new_empty(*grad_output.shape[:-1], cols)


@torch.library.register_fake("kmq::codebook_linear_grad")
def _(grad_output: Tensor, input: Tensor, packed: Tensor, num_codebooks: int, num_centroids: int, group_rows: int) -> Tensor:
    _expect_packed(packed, input.shape[-1], num_centroids)
    _expect_groups(packed, num_codebooks, group_rows)
    dtype = reference.wide(torch.promote_types(grad_output.dtype, input.dtype))
    return input.new_empty(num_codebooks, num_centroids, dtype=dtype)


def _save_codebook_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, packed, codebook, bias, group_rows = inputs
    ctx.save_for_backward(input if ctx.needs_input_grad[2] else None, packed, codebook)
    ctx.cols, ctx.group_rows = input.shape[-1], group_rows
    ctx.bias_dtype = None if bias is None else bias.dtype


def _grad_codebook_linear(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    input, packed, codebook = ctx.saved_tensors
    grad_input = grad_codebook = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_input = _ops.codebook_linear_input_grad(grad, packed, codebook, ctx.cols, ctx.group_rows)
    if ctx.needs_input_grad[2]:
        grad_codebook = _ops.codebook_linear_grad(grad, input, packed, *codebook.shape, ctx.group_rows).to(codebook.dtype)
    if ctx.needs_input_grad[3]:
        rows = grad.reshape(-1, grad.shape[-1])
        grad_bias = rows.sum(0, dtype=reference.wide(grad.dtype)).to(ctx.bias_dtype)
    return grad_input, None, grad_codebook, grad_bias, None


torch.library.register_autograd("kmq::codebook_linear", _grad_codebook_linear, setup_context=_save_codebook_linear)
_codebook_linear = _ops.codebook_linear.default


def codebook_linear(
    input: Tensor, packed: Tensor, codebook: Tensor, bias: Tensor | None = None, *, group_rows: int | None = None
) -> Tensor:
    """input @ dequantize(packed, codebook).T + bias; differentiable in input, codebook and bias.

    input: (..., IN) floating point; packed: (OUT, row_bytes) uint8; codebook: (G, K) floating point, K = 2**bits;
    bias: (OUT,) or None; group_rows: rows that share a codebook, default ceil(OUT / G).
    Returns (..., OUT) in the dtype of input, accumulated in fp32 (fp64 for fp64 input). On CUDA a codebook wider than the input
    is rounded to the input's dtype first, as torch.autocast rounds a weight, and fp32 follows torch's setting for TF32.
    Raises TypeError or ValueError where these do not fit.
    """
    group_rows = _group_rows(packed, codebook.shape[0], group_rows)
    _check_codebook_linear(input, packed, codebook, bias, group_rows)
    return _ops.codebook_linear(input, packed, codebook, bias, group_rows)


def codebook_linear_of_layer(
    input: Tensor, packed: Tensor, codebook: Tensor, bias: Tensor | None, cols: int, group_rows: int
) -> Tensor:
    """As `codebook_linear` with the parameters of one layer, which fit each other and `cols`: only `input` is checked.

    A layer of few columns computes in 10 us and less, of which all checks together took a quarter.
    """
    if input.dtype not in _FLOATS or input.dim() < 1 or input.shape[-1] != cols or input.device != packed.device:
        _check_codebook_linear(input, packed, codebook, bias, group_rows)
        raise ValueError(f"input: expected {cols} columns, got {input.shape[-1]}")
    return _codebook_linear(input, packed, codebook, bias, group_rows)


# codebook_embedding and its gradient


_define(
    "codebook_embedding(Tensor ids, Tensor packed, Tensor codebook, int cols, int group_rows, int padding_idx) -> Tensor"
)
_define(
    "codebook_embedding_grad(Tensor grad_output, Tensor ids, Tensor packed,"
    " int num_codebooks, int num_centroids, int group_rows, int padding_idx) -> Tensor"
)


def _check_codebook_embedding(ids: Tensor, packed: Tensor, codebook: Tensor, cols: int, group_rows: int) -> None:
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"ids: expected int64 or int32, got {ids.dtype}")
    _expect_same_device("ids", ids, packed)
    _expect_codebook(packed, codebook, cols, group_rows)


@torch.library.register_fake("kmq::codebook_embedding")
def _(ids: Tensor, packed: Tensor, codebook: Tensor, cols: int, group_rows: int, padding_idx: int) -> Tensor:
    _check_codebook_embedding(ids, packed, codebook, cols, group_rows)
    return codebook.new_empty(*ids.shape, cols)


@torch.library.register_fake("kmq::codebook_embedding_grad")
def _(
    grad_output: Tensor, ids: Tensor, packed: Tensor, num_codebooks: int, num_centroids: int, group_rows: int, padding_idx: int
) -> Tensor:
    _expect_packed(packed, grad_output.shape[-1], num_centroids)
    _expect_groups(packed, num_codebooks, group_rows)
    return grad_output.new_empty(num_codebooks, num_centroids, dtype=reference.wide(grad_output.dtype))


def _save_codebook_embedding(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ids, packed, codebook, _, group_rows, padding_idx = inputs
    ctx.save_for_backward(ids, packed)
    ctx.codebook_shape, ctx.codebook_dtype = codebook.shape, codebook.dtype
    ctx.group_rows, ctx.padding_idx = group_rows, padding_idx


def _grad_codebook_embedding(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    ids, packed = ctx.saved_tensors
    out = _ops.codebook_embedding_grad(grad, ids, packed, *ctx.codebook_shape, ctx.group_rows, ctx.padding_idx)
    return None, None, out.to(ctx.codebook_dtype), None, None, None


torch.library.register_autograd("kmq::codebook_embedding", _grad_codebook_embedding, setup_context=_save_codebook_embedding)


def codebook_embedding(
    ids: Tensor,
    packed: Tensor,
    codebook: Tensor,
    cols: int,
    *,
    group_rows: int | None = None,
    padding_idx: int | None = None,
) -> Tensor:
    """Rows `ids` of dequantize(packed, codebook), without decoding the others; differentiable in codebook.

    ids: any shape, int64 or int32, each in [0, rows); packed: (rows, row_bytes) uint8; codebook: (G, K) floating point;
    cols: columns of the weight; group_rows: rows that share a codebook, default ceil(rows / G); padding_idx: the row that
    takes no part in the gradient. Returns (*ids.shape, cols) in the codebook's dtype.
    Raises IndexError for an id out of range (on CUDA an assertion stops the kernel, as for torch.nn.functional.embedding, and the
    error comes with the next synchronization), TypeError or ValueError where the rest does not fit.
    """
    group_rows = _group_rows(packed, codebook.shape[0], group_rows)
    _check_codebook_embedding(ids, packed, codebook, cols, group_rows)
    return _ops.codebook_embedding(ids, packed, codebook, cols, group_rows, -1 if padding_idx is None else padding_idx)


# sparse_linear and sparse_embedding: the few values of a weight that are kept exactly, and their gradients


_define("sparse_linear(Tensor input, Tensor index, Tensor values, int rows) -> Tensor")
_define("sparse_linear_input_grad(Tensor grad_output, Tensor index, Tensor values, int cols) -> Tensor")
_define("sparse_linear_grad(Tensor grad_output, Tensor input, Tensor index) -> Tensor")
_define("sparse_embedding(Tensor ids, Tensor index, Tensor values, int cols, int padding_idx) -> Tensor")
_define("sparse_embedding_grad(Tensor grad_output, Tensor ids, Tensor index, int padding_idx) -> Tensor")


def _check_sparse(index: Tensor, values: Tensor) -> None:
    if index.dtype != torch.int32 or index.dim() != 1:
        raise TypeError(f"index: expected int32 (n,), got {index.dtype} {tuple(index.shape)}")
    _expect_float("values", values)
    _expect_same_device("values", values, index)
    if values.shape != index.shape:
        raise ValueError(f"values: expected shape {tuple(index.shape)} like index, got {tuple(values.shape)}")


@torch.library.register_fake("kmq::sparse_linear")
def _(input: Tensor, index: Tensor, values: Tensor, rows: int) -> Tensor:
    _check_sparse(index, values)
    return input.new_empty(*input.shape[:-1], rows)


@torch.library.register_fake("kmq::sparse_linear_input_grad")
def _(grad_output: Tensor, index: Tensor, values: Tensor, cols: int) -> Tensor:
    return grad_output.new_empty(*grad_output.shape[:-1], cols)


@torch.library.register_fake("kmq::sparse_linear_grad")
def _(grad_output: Tensor, input: Tensor, index: Tensor) -> Tensor:
    dtype = reference.wide(torch.promote_types(grad_output.dtype, input.dtype))
    return input.new_empty(index.shape, dtype=dtype)


def _save_sparse_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, index, values, _ = inputs
    ctx.save_for_backward(input if ctx.needs_input_grad[2] else None, index, values)
    ctx.cols = input.shape[-1]


def _grad_sparse_linear(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    input, index, values = ctx.saved_tensors
    grad_input = grad_values = None
    if ctx.needs_input_grad[0]:
        grad_input = _ops.sparse_linear_input_grad(grad, index, values, ctx.cols)
    if ctx.needs_input_grad[2]:
        grad_values = _ops.sparse_linear_grad(grad, input, index).to(values.dtype)
    return grad_input, None, grad_values, None


torch.library.register_autograd("kmq::sparse_linear", _grad_sparse_linear, setup_context=_save_sparse_linear)


def sparse_linear(input: Tensor, index: Tensor, values: Tensor, rows: int) -> Tensor:
    """input @ sparse.T for the weight (rows, cols) that is `values` at the flat positions `index` and zero elsewhere.

    input: (..., cols) floating point; index: (n,) int32, ascending, each below rows * cols; values: (n,) floating point.
    Returns (..., rows) in the dtype of input; differentiable in input and values. The same on every run.
    Raises TypeError or ValueError where these do not fit.
    """
    _expect_float("input", input)
    _check_sparse(index, values)
    _expect_same_device("input", input, index)
    return _ops.sparse_linear(input, index, values, rows)


@torch.library.register_fake("kmq::sparse_embedding")
def _(ids: Tensor, index: Tensor, values: Tensor, cols: int, padding_idx: int) -> Tensor:
    _check_sparse(index, values)
    return values.new_empty(*ids.shape, cols)


@torch.library.register_fake("kmq::sparse_embedding_grad")
def _(grad_output: Tensor, ids: Tensor, index: Tensor, padding_idx: int) -> Tensor:
    return grad_output.new_empty(index.shape, dtype=reference.wide(grad_output.dtype))


def _save_sparse_embedding(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ids, index, values, _, padding_idx = inputs
    ctx.save_for_backward(ids, index)
    ctx.dtype, ctx.padding_idx = values.dtype, padding_idx


def _grad_sparse_embedding(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    grad_values = _ops.sparse_embedding_grad(grad, *ctx.saved_tensors, ctx.padding_idx)
    return None, None, grad_values.to(ctx.dtype), None, None


torch.library.register_autograd("kmq::sparse_embedding", _grad_sparse_embedding, setup_context=_save_sparse_embedding)


def sparse_embedding(ids: Tensor, index: Tensor, values: Tensor, cols: int, *, padding_idx: int | None = None) -> Tensor:
    """Rows `ids` of the weight (rows, cols) that is `values` at the flat positions `index` and zero elsewhere.

    ids: any shape, int64 or int32, each in [0, rows); index, values: see sparse_linear; padding_idx: the row that takes no part
    in the gradient. Returns (*ids.shape, cols) in the dtype of values, differentiable in values.
    Raises TypeError or ValueError where these do not fit.
    """
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"ids: expected int64 or int32, got {ids.dtype}")
    _check_sparse(index, values)
    _expect_same_device("ids", ids, index)
    return _ops.sparse_embedding(ids, index, values, cols, -1 if padding_idx is None else padding_idx)


# Implementations beside the reference


def _load_extension() -> Any:
    """The C++ extension, None where it was not built; one that is present but broken raises."""
    if importlib.util.find_spec("kmq_kernels._C") is None:
        return None
    return importlib.import_module("kmq_kernels._C")


_extension = _load_extension()

# Ops with a Triton launcher of the same name and signature: op -> file in triton_kernels/.
_TRITON: dict[str, str] = {
    "codebook_linear": "codebook_linear",
    "codebook_linear_input_grad": "codebook_linear",
    "codebook_linear_grad": "codebook_linear_grad",
    "codebook_embedding": "codebook_embedding",
    "codebook_embedding_grad": "codebook_embedding_grad",
    "dequantize": "dequantize",
    "pack": "pack",
    "unpack": "pack",
    "assign": "assign",
    "update": "update",
}


def _register_triton(op: str, file: str) -> None:
    """Has `op` run its Triton launcher on CUDA tensors; triton is imported at the first call."""

    def run(*arguments: Any) -> Any:
        if any(isinstance(argument, Tensor) and argument.dtype == torch.float64 for argument in arguments):
            return getattr(reference, op)(*arguments)  # tensor cores and shared memory are laid out for 32 bits
        return getattr(importlib.import_module(f".triton_kernels.{file}", __package__), op)(*arguments)

    _library.impl(op, run, "CUDA")


_has_triton = importlib.util.find_spec("triton") is not None
if _has_triton:
    for _op, _file in _TRITON.items():
        _register_triton(_op, _file)
    if has_kernel("kmeans", "CPU"):  # which takes over what the GPU leaves
        _library.impl("kmeans", _kmeans_cuda, "CUDA")

OPS = (
    "assign", "update", "kmeans", "pack", "unpack", "dequantize",
    "codebook_linear", "codebook_linear_input_grad", "codebook_linear_grad",
    "codebook_embedding", "codebook_embedding_grad", "codebook_grad",
    "sparse_linear", "sparse_linear_input_grad", "sparse_linear_grad", "sparse_embedding", "sparse_embedding_grad",
)  # fmt: skip


def _cuda_implementation(op: str) -> str:
    if op in _TRITON:
        return "Triton (fp64: plain torch)" if _has_triton else "plain torch: triton is not installed"
    if op == "kmeans":
        return "Triton, and C++ on the CPU" if has_kernel(op, "CUDA") else "NumPy: needs triton and the extension"
    return "CUDA C++" if has_kernel(op, "CUDA") else "plain torch"


def build_info() -> dict[str, Any]:
    """Which implementation each op has on each device, and why.

    Returns {"version", "torch", "extension": facts of the compiled extension or the reason there is none,
    "ops": {op: {"cpu": ..., "cuda": ...}}}.
    """
    from . import __version__

    if _extension is None:
        facts: Any = "not built: the package was installed without a C++ compiler, or the sources are used in place"
    else:
        facts = _extension.build_facts()
    implementations = {}
    for op in OPS:
        implementations[op] = {
            "cpu": f"C++ ({facts['cpu_path']})" if has_kernel(op, "CPU") else "plain torch",
            "cuda": _cuda_implementation(op),
        }
    return {"version": __version__, "torch": torch.__version__, "extension": facts, "ops": implementations}

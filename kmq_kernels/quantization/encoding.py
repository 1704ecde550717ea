"""A weight as codebook, packed indices, row factors and exactly kept values: what stands for it, how many bytes, what error."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..clustering import ClusteredMatrix, cluster_matrices
from ..packing import row_bytes
from .config import KMQConfig


class EncodedWeight(NamedTuple):
    """What a CodebookModule stores of a weight (rows, cols), under the same names, and its error.

    codebook (G, K) fp32; packed (rows, row_bytes) uint8; row_scale (rows,) fp32 or None; outlier_index (n,) int32 ascending and
    outlier_values (n,) fp32, or None. error: the sum of importance * (weight - decoded)**2, importance 1 where none was given.
    bias: what stands for the layer's bias, in its dtype; None where that stays.
    """

    codebook: Tensor
    packed: Tensor
    row_scale: Tensor | None
    outlier_index: Tensor | None
    outlier_values: Tensor | None
    error: float
    bias: Tensor | None = None


def decode(encoded: EncodedWeight, cols: int, group_rows: int) -> Tensor:
    """The weight (rows, cols) fp32 that it stands for."""
    weight = ops.dequantize(encoded.packed, encoded.codebook, cols, group_rows=group_rows)
    if encoded.row_scale is not None:
        weight = weight * encoded.row_scale[:, None]
    if encoded.outlier_index is not None and encoded.outlier_values is not None:
        weight.view(-1)[encoded.outlier_index.long()] = encoded.outlier_values
    return weight


def encoded_shapes(rows: int, cols: int, bits: int, config: KMQConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the codebook and the packed indices of a weight (rows, cols) with `bits` bits, by name."""
    codebooks = -(-rows // config.rows_per_codebook(rows))
    return {"codebook": (codebooks, 2**bits), "packed": (rows, row_bytes(cols, bits))}


def decode_rows(encoded: EncodedWeight, rows: Tensor, cols: int, group_rows: int) -> Tensor:
    """Some rows of `decode`, (len(rows), cols). rows: int64, each once."""
    books = encoded.codebook[rows.div(group_rows, rounding_mode="floor")]
    weight = ops.dequantize(encoded.packed[rows], books, cols, group_rows=1)
    if encoded.row_scale is not None:
        weight = weight * encoded.row_scale[rows, None]
    if encoded.outlier_index is not None and encoded.outlier_values is not None:
        place = torch.full((len(encoded.packed),), -1, device=rows.device)
        place[rows] = torch.arange(len(rows), device=rows.device)
        index = encoded.outlier_index.long()
        row = place[index.div(cols, rounding_mode="floor")]
        weight[row[row >= 0], (index % cols)[row >= 0]] = encoded.outlier_values[row >= 0]
    return weight


def encoded_bytes(rows: int, cols: int, bits: int, config: KMQConfig, itemsize: int = 4) -> int:
    """Bytes of all that is stored of a weight (rows, cols) with `bits` bits; itemsize: bytes of a floating-point value."""
    shapes = encoded_shapes(rows, cols, bits, config)
    scale = rows * itemsize if config.row_scale else 0
    exact = config.outlier_count(rows * cols) * (4 + itemsize)
    return math.prod(shapes["packed"]) + math.prod(shapes["codebook"]) * itemsize + scale + exact


def encode_weights(
    weights: Sequence[Tensor],
    bits: Sequence[int],
    config: KMQConfig,
    *,
    importance: Sequence[Tensor | None] | None = None,
    names: Sequence[str] | None = None,
    on_done: Callable[[int], None] | None = None,
) -> list[EncodedWeight]:
    """Encodes weights as the config says, each with its own number of bits.

    weights: matrices (rows, cols), floating point. importance: for each a matrix like the weight, not negative, or None; it
    weighs the error, the choice of outliers and, for scheme "kmeans", the clustering. names: what errors call the weights.
    on_done(i) is called when weight i is finished. Raises like `cluster_matrices`; nothing is modified.
    """
    given = [None] * len(weights) if importance is None else list(importance)
    called = [f"weights[{i}]" for i in range(len(weights))] if names is None else list(names)
    if config.outlier_fraction or config.row_scale:
        encoded = []
        for i, (weight, width, weigh, name) in enumerate(zip(weights, bits, given, called, strict=True)):
            encoded.append(_encode_split(weight, width, config, weigh, name))
            if on_done is not None:
                on_done(i)
        return encoded
    usable = [
        weigh if weigh is None else _usable(weigh, config.rows_per_codebook(weight.shape[0]))
        for weight, weigh in zip(weights, given, strict=True)
    ]
    clustered = _cluster(weights, bits, config, usable, called, on_done)
    encoded = []
    for weight, weigh, used, result in zip(weights, given, usable, clustered, strict=True):
        error = float(result.inertia.sum())
        if weigh is not None and (config.scheme == "linear" or used is not weigh):  # clustered with other weights
            error = _error(weight, _decode(result, config, weight.shape), weigh)
        encoded.append(EncodedWeight(result.codebook, result.packed, None, None, None, error))
    return encoded


def _cluster(
    weights: Sequence[Tensor],
    bits: Sequence[int],
    config: KMQConfig,
    importance: Sequence[Tensor | None],
    names: Sequence[str],
    on_done: Callable[[int], None] | None = None,
) -> list[ClusteredMatrix]:
    return cluster_matrices(
        weights,
        bits,
        group_rows=[config.rows_per_codebook(weight.shape[0]) for weight in weights],
        scheme=config.scheme,
        algorithm=config.algorithm,
        init=config.init,
        max_iter=config.max_iter,
        tol=config.tol,
        seed=config.seed,
        sample_weight=None if config.scheme == "linear" else importance,
        names=names,
        on_done=on_done,
    )


def _usable(importance: Tensor, group_rows: int) -> Tensor:
    """The importance, with ones for every group of rows that has none at all: its codebook is free, but has to be one."""
    rows = importance.shape[0]
    group = torch.arange(rows, device=importance.device).div(group_rows, rounding_mode="floor")
    total = torch.zeros(-(-rows // group_rows), dtype=torch.float64, device=importance.device)
    total.index_add_(0, group, importance.sum(1, dtype=torch.float64))
    idle = (total == 0)[group]
    return importance if not bool(idle.any()) else torch.where(idle[:, None], 1.0, importance)


def _decode(result: ClusteredMatrix, config: KMQConfig, shape: Sequence[int]) -> Tensor:
    return ops.dequantize(result.packed, result.codebook, shape[1], group_rows=config.rows_per_codebook(shape[0]))


def _error(weight: Tensor, decoded: Tensor, importance: Tensor | None) -> float:
    error = (weight.float() - decoded).square_()
    return float((error if importance is None else error * importance).sum(dtype=torch.float64))


def _encode_split(weight: Tensor, bits: int, config: KMQConfig, importance: Tensor | None, name: str) -> EncodedWeight:
    """With outliers or row factors. The outliers weigh nothing in the clustering; a row is divided by its root mean square, and
    its values weigh the square of it, so that the clustering minimises the error of the weight itself."""
    if not weight.numel() or not bool(torch.isfinite(weight).all()):
        raise ValueError(f"{name}: expected finite values, at least one; got {tuple(weight.shape)} with NaN or Inf or nothing")
    rows = weight.shape[0]
    wide = weight.detach().float()
    kept = torch.ones_like(wide) if importance is None else importance.float()
    outliers = _outliers(wide, kept, config.outlier_count(wide.numel()))
    kept = kept.clone().view(-1).index_fill_(0, outliers, 0.0).view_as(wide)
    inside = torch.ones_like(wide).view(-1).index_fill_(0, outliers, 0.0).view_as(wide)
    group_rows = config.rows_per_codebook(rows)
    scale = None
    values, weigh = wide, kept
    if config.row_scale:
        scale = ((wide.square() * inside).sum(1) / inside.sum(1).clamp_min(1)).sqrt()
        scale = torch.where(scale > 0, scale, 1.0)
        values, weigh = wide / scale[:, None], kept * scale[:, None].square()
    if config.scheme == "linear" and len(outliers):
        result = _linear_without(values, inside, bits, config, name)
    else:
        (result,) = _cluster([values], [bits], config, [_usable(weigh, group_rows)], [name])
    decoded = _decode(result, config, weight.shape)
    if scale is not None:
        # The best factor for the indices as they are: least squares.
        best = (kept * wide * decoded).sum(1) / (kept * decoded.square()).sum(1)
        scale = torch.where(best.isfinite(), best, scale)
        decoded = decoded * scale[:, None]
    index = exact = None
    if len(outliers):
        index, exact = outliers.int(), wide.view(-1)[outliers]
        decoded.view(-1)[outliers] = exact
    return EncodedWeight(result.codebook, result.packed, scale, index, exact, _error(wide, decoded, importance))


def _outliers(weight: Tensor, importance: Tensor, count: int) -> Tensor:
    """Ascending flat positions (count,) of the values that add most to the weighted squared deviation from the mean."""
    share = (weight - weight.mean()).square() * importance
    return share.view(-1).topk(count).indices.sort().values


def _linear_without(values: Tensor, inside: Tensor, bits: int, config: KMQConfig, name: str) -> ClusteredMatrix:
    """Equal bins over the range of the values that are `inside` (1, others 0), each represented by the mean of these."""
    rows = values.shape[0]
    group_rows = config.rows_per_codebook(rows)
    pieces = []
    for start in range(0, rows, group_rows):
        part, mask = values[start : start + group_rows], inside[start : start + group_rows] > 0
        some = part[mask] if bool(mask.any()) else part.reshape(-1)
        pieces.append(part.clamp(some.min(), some.max()))
    (result,) = _cluster([torch.cat(pieces)], [bits], config, [None], [name])
    books = {"num_codebooks": result.codebook.shape[0], "group_rows": group_rows}
    sums = ops.codebook_grad((values * inside).double(), result.packed, 2**bits, **books)
    counts = ops.codebook_grad(inside.double(), result.packed, 2**bits, **books)
    means = (sums / counts.clamp_min(1)).float()
    return result._replace(codebook=torch.where(counts > 0, means, result.codebook))

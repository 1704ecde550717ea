"""Brute force in float64, independent of the package: what the tests compare with."""

import itertools
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

# k-means in one dimension


def partition_cost(x, w, edges):
    """Weighted squared error of the sorted points, each interval of `edges` around its own mean."""
    cost = 0.0
    for i, j in itertools.pairwise(edges):
        mean = np.average(x[i:j], weights=w[i:j])
        cost += float(np.sum(w[i:j] * (x[i:j] - mean) ** 2))
    return cost


def kmeans_every_partition(values, num_centroids, weight=None):
    """The optimum, by trying every partition of the distinct values into intervals."""
    x, w = distinct(values, weight)
    if len(x) <= num_centroids:
        return 0.0
    cuts = itertools.combinations(range(1, len(x)), num_centroids - 1)
    return min(partition_cost(x, w, (0, *cut, len(x))) for cut in cuts)


def kmeans_optimum(values, num_centroids, weight=None):
    """The optimum, by the textbook dynamic program over all pairs of distinct values: O(K n^2)."""
    x, w = distinct(values, weight)
    n = len(x)
    if n <= num_centroids:
        return 0.0
    x = x - np.average(x, weights=w)
    total, first, second = (np.concatenate([[0.0], np.cumsum(v)]) for v in (w, w * x, w * x * x))
    best = np.full(n + 1, np.inf)
    best[0] = 0.0
    i = np.arange(n + 1)
    for _ in range(num_centroids):
        layer = np.full(n + 1, np.inf)
        for j in range(1, n + 1):
            before = i[:j]
            sums = first[j] - first[before]
            cost = second[j] - second[before] - sums * sums / (total[j] - total[before])
            layer[j] = np.min(best[:j] + cost)
        best = layer
    return float(best[n])


def kmeans_optimum_in_fractions(values, num_centroids, weight):
    """The same for a few values and weights of any size: costs are exact, and rounded once."""
    x, w = (part.tolist() for part in distinct(values, weight))
    n = len(x)
    if n <= num_centroids:
        return 0.0
    total, first, second = [Fraction(0)], [Fraction(0)], [Fraction(0)]
    for value, mass in zip(map(Fraction, x), map(Fraction, w), strict=True):
        total.append(total[-1] + mass)
        first.append(first[-1] + mass * value)
        second.append(second[-1] + mass * value * value)
    cost = np.full((n + 1, n + 1), np.inf)
    for i, j in itertools.combinations(range(n + 1), 2):
        cost[i, j] = second[j] - second[i] - (first[j] - first[i]) ** 2 / (total[j] - total[i])
    best = np.full(n + 1, np.inf)
    best[0] = 0.0
    for _ in range(num_centroids):
        best = np.min(best[:, None] + cost, axis=0)
    return float(best[n])


def distinct(values, weight=None):
    """Sorted distinct values that have a positive weight, and the weight of each, in float64."""
    values = np.asarray(values, np.float64)
    weight = np.ones_like(values) if weight is None else np.asarray(weight, np.float64)
    used = weight > 0
    x, inverse = np.unique(values[used], return_inverse=True)
    w = np.zeros(len(x))
    np.add.at(w, inverse, weight[used])
    return x, w


def cluster_sums(grad: np.ndarray, index: np.ndarray, num_centroids: int, group_rows: int) -> np.ndarray:
    """(G, K) float64: out[r // group_rows, index[r, c]] += grad[r, c], one after the other."""
    rows = grad.shape[0]
    out = np.zeros((-(-rows // group_rows), num_centroids))
    book = np.broadcast_to((np.arange(rows) // group_rows)[:, None], index.shape)
    np.add.at(out, (book.ravel(), index.ravel()), grad.astype(np.float64).ravel())
    return out


def linear_weight_grad(grad_output: np.ndarray, input: np.ndarray) -> np.ndarray:
    """(OUT, IN) float64 from (M, OUT) and (M, IN)."""
    return np.einsum("mo,mi->oi", grad_output.astype(np.float64), input.astype(np.float64))


def embedding_weight_grad(grad_output: np.ndarray, ids: np.ndarray, rows: int, padding_idx: int) -> np.ndarray:
    """(rows, cols) float64 from (N, cols) and ids (N,); the row padding_idx gets nothing."""
    out = np.zeros((rows, grad_output.shape[1]))
    for position, row in enumerate(ids):
        if row != padding_idx:
            out[row] += grad_output[position].astype(np.float64)
    return out


def packed_bytes(assignments: np.ndarray, bits: int) -> np.ndarray:
    """The packed rows of (rows, cols) indices, bit by bit from the drawing in packing.py."""
    widths = {1: [1], 2: [2], 3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 2], 7: [4, 2, 1], 8: [4, 4]}[bits]
    rows, cols = assignments.shape
    blocks = -(-cols // 128)
    out = np.zeros((rows, blocks * 16 * bits), np.uint8)
    for col in range(cols):
        start, low = col // 128 * 16 * bits, 0
        field, lane = divmod(col % 128, 16)
        for width in widths:
            value = assignments[:, col] >> low & (1 << width) - 1
            byte, shift = divmod(field * width, 8)
            out[:, start + lane * width + byte] |= (value << shift).astype(np.uint8)
            start, low = start + 16 * width, low + width
    return out


def weight64(assignments: Tensor, codebook: Tensor, group_rows: int) -> Tensor:
    """weight[r, c] = codebook[r // group_rows, assignments[r, c]], float64."""
    rows = [codebook[r // group_rows].double()[assignments[r].long()] for r in range(assignments.shape[0])]
    return torch.stack(rows) if rows else codebook.new_zeros(assignments.shape, dtype=torch.float64)


def linear64(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """input (M, IN) @ weight (OUT, IN).T + bias in float64."""
    out = torch.from_numpy(np.einsum("mi,oi->mo", input.double().numpy(), weight.double().numpy()))
    return out if bias is None else out + bias.double()


def relative_rms(got: Tensor, expected: Tensor) -> float:
    """Root mean square of got - expected over that of expected; 0 for empty tensors."""
    if expected.numel() == 0:
        return 0.0
    error = (got.double() - expected).square().mean().sqrt()
    return float(error / expected.square().mean().sqrt().clamp_min(1e-300))

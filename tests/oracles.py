"""Independent float64 brute force for the tests: numpy loops over the definition, sharing nothing with the package."""

import numpy as np


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

"""The op kmeans: whole matrices clustered by a compiled engine. It has no reference: its plain form is the wing clustering."""

from torch import Tensor

from ._define import has_kernel, has_triton, kmq, library

# kmeans: no reference. Its plain form is clustering.py itself, which asks `has_kernel` first.


library.define(
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
    *out, faults = kmq.kmeans(
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
    """kmq::kmeans on a GPU: "optimal" in Triton; what its histograms cannot resolve or count, other algorithms: on the CPU."""
    from ..triton_kernels import kmeans as triton_kmeans

    if algorithm == "optimal":
        *out, faults = triton_kmeans.kmeans(values, sample_weight, num_centroids, group_rows, packed, max_iter)
        left = [i for i, fault in enumerate(faults) if fault == triton_kmeans.UNRESOLVED_FAULT]
    else:
        out, faults, left = [[values[0]] * len(values) for _ in range(5)], [0] * len(values), list(range(len(values)))
    if left:
        weights = [sample_weight[i] for i in left]
        *again, left_faults = kmq.kmeans(
            [values[i].cpu() for i in left], [None if weight is None else weight.cpu() for weight in weights],
            [num_centroids[i] for i in left], [group_rows[i] for i in left], packed, algorithm, init, max_iter, tol, seed,
        )  # fmt: skip
        for n, i in enumerate(left):
            faults[i] = left_faults[n]
            for part, solved in zip(out, again, strict=True):
                part[i] = solved[n].to(values[i].device)
    return out[0], out[1], out[2], out[3], out[4], faults


if has_triton and has_kernel("kmeans", "CPU"):  # the C++ engine takes over what the GPU leaves
    library.impl("kmeans", _kmeans_cuda, "CUDA")

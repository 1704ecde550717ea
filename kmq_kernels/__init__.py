"""K-means quantization of BERT-family models: codebooks of 2**bits values and packed indices, fast on CPU and GPU."""

__version__ = "0.1.0"

from .clustering import ClusteredMatrix, KMeansResult, cluster_matrices, kmeans, linear_codebook
from .ops import (
    build_info,
    codebook_embedding,
    codebook_grad,
    codebook_linear,
    pack,
    unpack,
)

__all__ = [
    "ClusteredMatrix",
    "KMeansResult",
    "__version__",
    "build_info",
    "cluster_matrices",
    "codebook_embedding",
    "codebook_grad",
    "codebook_linear",
    "kmeans",
    "linear_codebook",
    "pack",
    "unpack",
]

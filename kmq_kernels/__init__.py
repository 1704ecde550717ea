"""K-means quantization of BERT-family models: codebooks of 2**bits values and packed indices, fast on CPU and GPU."""

__version__ = "0.1.0"

from .ops import (
    build_info,
    codebook_embedding,
    codebook_grad,
    codebook_linear,
    pack,
    unpack,
)

__all__ = ["__version__", "build_info", "codebook_embedding", "codebook_grad", "codebook_linear", "pack", "unpack"]

"""K-means quantization of BERT-family models: codebooks of 2**bits values and packed indices, fast on CPU and GPU."""

__version__ = "0.1.0"

from .clustering import KMeansResult, kmeans, linear_codebook
from .hf import load
from .layers import CodebookEmbedding, CodebookLinear, DecodeAhead, optimize_
from .ops import build_info, codebook_embedding, codebook_grad, codebook_linear, pack, unpack
from .quantization import KMQConfig, dequantize_, quantize_

__all__ = [
    "CodebookEmbedding",
    "CodebookLinear",
    "DecodeAhead",
    "KMQConfig",
    "KMeansResult",
    "__version__",
    "build_info",
    "codebook_embedding",
    "codebook_grad",
    "codebook_linear",
    "dequantize_",
    "kmeans",
    "linear_codebook",
    "load",
    "optimize_",
    "pack",
    "quantize_",
    "unpack",
]

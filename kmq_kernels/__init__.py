"""K-means quantization of BERT-family models: codebooks of 2**bits values and packed indices, fast on CPU and GPU.

Names are imported on their first use. Importing the package is enough for torch to have its ops and for transformers to read
packed checkpoints: both come with torch and transformers, whenever these are imported.
"""

from typing import TYPE_CHECKING

from .imports import on_first_use, when_loaded

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import hf as hf
    from . import layers as layers
    from . import ops as ops
    from . import packing as packing
    from . import quantization as quantization
    from . import sensitivity as sensitivity
    from .clustering import KMeansResult
    from .clustering.kmeans import kmeans, linear_codebook  # through the doors mypy finds the modules kmeans and load
    from .hf.load import load
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

__getattr__, __dir__ = on_first_use(
    __name__,
    {
        "clustering": ("KMeansResult", "kmeans", "linear_codebook"),
        "hf": ("load",),
        "layers": ("CodebookEmbedding", "CodebookLinear", "DecodeAhead", "optimize_"),
        "ops": ("build_info", "codebook_embedding", "codebook_grad", "codebook_linear", "pack", "unpack"),
        "quantization": ("KMQConfig", "dequantize_", "quantize_"),
    },
    modules=("clustering", "hf", "layers", "ops", "packing", "quantization", "sensitivity"),
)

when_loaded("torch", f"{__name__}.ops")
# transformers' registry of quantizers imports all of them and what they stand on (half a second or more, 57 MB), which most
# commands never use: ours goes there when from_pretrained, or anybody, imports it.
when_loaded("transformers.quantizers.auto", f"{__name__}.hf.quantizer")
when_loaded("peft.tuners.lora", f"{__name__}.hf.peft")

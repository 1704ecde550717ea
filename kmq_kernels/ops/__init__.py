"""The ops of namespace `kmq`, one file a family: schema, checks, fake, autograd and registration of each, and the
functions people call.

The reference is registered as the default of every op; the C++ extension and the Triton launchers take over the devices and
ops they have. _define.py alone knows the dispatcher."""

from ._define import has_kernel
from ._info import OPS, build_info
from .assign import assign, update
from .clustering import kmeans
from .codes import dequantize, pack, unpack
from .embedding import codebook_embedding, codebook_embedding_of_layer, padding_row
from .encoder import compile_encoder, has_compiled_encoder
from .gradients import codebook_grad
from .int8 import INT8_COLS, int8_codebook, int8_linear
from .linear import codebook_linear, codebook_linear_of_layer
from .sparse import sparse_embedding, sparse_linear

__all__ = [
    "INT8_COLS",
    "OPS",
    "assign",
    "build_info",
    "codebook_embedding",
    "codebook_embedding_of_layer",
    "codebook_grad",
    "codebook_linear",
    "codebook_linear_of_layer",
    "compile_encoder",
    "dequantize",
    "has_compiled_encoder",
    "has_kernel",
    "int8_codebook",
    "int8_linear",
    "kmeans",
    "pack",
    "padding_row",
    "sparse_embedding",
    "sparse_linear",
    "unpack",
    "update",
]

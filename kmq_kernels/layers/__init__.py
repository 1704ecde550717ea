"""Layers whose weight is a trainable codebook and packed indices into it, and what runs them faster."""

from .codebook import INDICES, STORED, CodebookModule
from .decode_ahead import DecodeAhead
from .embedding import CodebookEmbedding
from .linear import CodebookConv1D, CodebookLinear, CodebookPointwise
from .moving import settle, start_moving, stop_moving
from .optimize import optimize_

__all__ = [
    "INDICES",
    "STORED",
    "CodebookConv1D",
    "CodebookEmbedding",
    "CodebookLinear",
    "CodebookModule",
    "CodebookPointwise",
    "DecodeAhead",
    "optimize_",
    "settle",
    "start_moving",
    "stop_moving",
]

"""Layers whose weight is a trainable codebook and packed indices into it, and what runs them faster."""

from .codebook import STORED, CodebookModule
from .decode_ahead import DecodeAhead
from .embedding import CodebookEmbedding
from .linear import CodebookLinear
from .optimize import optimize_

__all__ = ["STORED", "CodebookEmbedding", "CodebookLinear", "CodebookModule", "DecodeAhead", "optimize_"]

"""CodebookEmbedding."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .. import ops
from .codebook import CodebookModule


class CodebookEmbedding(CodebookModule):
    """Rows of a codebook weight (num_embeddings, embedding_dim); only the rows asked for are decoded.

    num_embeddings, embedding_dim, padding_idx: as in torch.nn.Embedding. bits, group_rows, grad_reduction, row_scale,
    outliers: as in CodebookLinear. The output has the codebook's dtype.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        bits: int = 4,
        *,
        padding_idx: int | None = None,
        group_rows: int | None = None,
        grad_reduction: str = "sum",
        row_scale: bool = False,
        outliers: int = 0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        group_rows = group_rows or max(num_embeddings, 1)
        super().__init__(num_embeddings, embedding_dim, bits, group_rows, grad_reduction, device, dtype, row_scale, outliers)
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx

    def forward(self, ids: Tensor) -> Tensor:
        codebook = self.trained_codebook()
        out = ops.codebook_embedding(
            ids, self.packed, codebook, self.cols, group_rows=self.group_rows, padding_idx=self.padding_idx
        )
        if self.row_scale is not None:
            out = out * F.embedding(ids, self.row_scale[:, None], self.padding_idx)
        if (added := self._added(codebook)) is not None:
            out = out + ops.sparse_embedding(ids, *added, self.cols, padding_idx=self.padding_idx)
        return out

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"num_embeddings={self.num_embeddings}, embedding_dim={self.embedding_dim}{padding}, {self._extra()}"

"""What CodebookLinear and CodebookEmbedding share: a weight that is a trainable codebook and packed indices into it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import ops, packing
from .decoded import LOADED, LOST, guard

STORED = ("codebook", "packed", "row_scale", "outlier_index", "outlier_values")
# Those that do not train. They are buffers: what goes over parameters() (an optimizer, an average of weights, a loop that
# unfreezes) must not meet them.
INDICES = {"packed": torch.uint8, "outlier_index": torch.int32}


class CodebookModule(nn.Module):
    """A weight (rows, cols) kept as `codebook` (G, K), trainable, and `packed` (rows, row_bytes) uint8, fixed.

    Row r uses codebook r // group_rows. With grad_reduction "mean" the gradient of a centroid is divided by the number of its
    members; with "sum" it is the chain rule's. Where asked for, `row_scale` (rows,) multiplies the decoded rows, and
    `outlier_values` (n,) stand at the ascending flat positions `outlier_index` (n,) int32 instead of what is decoded there.
    Both train like a bias: a factor, or a value that stands for one weight, needs no other treatment than that weight had.
    `replaces` is the plain layer whose place it took, without its tensors: what dequantize_ gives back. `latent` (rows, cols) is
    there only while assignments move, see `moving`; it is no part of the stored weight, nor of a state dict.
    """

    codebook: nn.Parameter
    packed: Tensor
    row_scale: nn.Parameter | None
    outlier_index: Tensor | None
    outlier_values: nn.Parameter | None
    replaces: nn.Module | None = None
    latent: nn.Parameter | None

    def __init__(
        self,
        rows: int,
        cols: int,
        bits: int,
        group_rows: int,
        grad_reduction: str,
        device: Any,
        dtype: Any,
        row_scale: bool,
        outliers: int,
    ) -> None:
        super().__init__()
        if not 1 <= bits <= 8:
            raise ValueError(f"bits: expected 1 to 8, got {bits}")
        if group_rows < 1:
            raise ValueError(f"group_rows: expected at least 1, got {group_rows}")
        if grad_reduction not in ("sum", "mean"):
            raise ValueError(f"grad_reduction: expected 'sum' or 'mean', got {grad_reduction!r}")
        if not 0 <= outliers <= max(rows * cols, 0):
            raise ValueError(f"outliers: expected 0 to {rows * cols} of a weight of {rows} x {cols}, got {outliers}")
        if outliers and rows * cols > 2**31 - 1:
            raise ValueError(f"outliers: their positions are int32, got a weight of {rows} x {cols}")
        self.rows, self.cols, self.bits, self.group_rows, self.grad_reduction = rows, cols, bits, group_rows, grad_reduction
        self.codebook = nn.Parameter(torch.zeros(-(-rows // group_rows), 2**bits, device=device, dtype=dtype))
        self.register_buffer("packed", torch.zeros(rows, packing.row_bytes(cols, bits), device=device, dtype=torch.uint8))
        self.row_scale = nn.Parameter(torch.ones(rows, device=device, dtype=dtype)) if row_scale else None
        self.register_buffer("outlier_index", torch.zeros(outliers, device=device, dtype=torch.int32) if outliers else None)
        self.outlier_values = nn.Parameter(torch.zeros(outliers, device=device, dtype=dtype)) if outliers else None
        self.latent = None
        self._inverse_counts: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """The weight decoded, in the shape that the plain layer has it, differentiable in the codebook.

        It costs a decode at every access. Writing into it raises RuntimeError: the layer has no such tensor.
        """
        weight = guard(self._shaped(self.decoded()))
        if getattr(self.codebook, LOADED, False):
            setattr(weight, LOADED, True)
        return weight

    @staticmethod
    def _shaped(weight: Tensor) -> Tensor:
        """(rows, cols) as the plain layer stores it."""
        return weight

    def decoded(self) -> Tensor:
        """The weight (rows, cols), differentiable in the codebook: a new tensor."""
        # from_pretrained looks at it before all is loaded
        if self.packed is None or any(part.is_meta for part in self.stored().values()):
            return torch.empty(self.rows, self.cols, device="meta", dtype=self.codebook.dtype)
        weight = ops.dequantize(self.packed, self.trained_codebook(), self.cols, group_rows=self.group_rows)
        if self.row_scale is not None:
            weight = weight * self.row_scale[:, None]
        if self.outlier_values is not None and self.outlier_index is not None:
            flat = weight.reshape(-1).index_put((self.outlier_index.long(),), self.outlier_values)
            weight = flat.view(self.rows, self.cols)
        return weight

    def _added(self, codebook: Tensor) -> tuple[Tensor, Tensor] | None:
        """What is added to the decoded weight, sparse: outlier_index and (n,) differences; None without outliers.

        A codebook has no zero to leave out, so a place with an exact value decodes to its nearest centroid, too. The
        difference takes this back, and with it the gradient that the centroid got from there.
        """
        if self.outlier_values is None or self.outlier_index is None:
            return None
        index = self.outlier_index.long()
        row, col = index.div(self.cols, rounding_mode="floor"), index % self.cols
        centroid = packing.take(self.packed, self.bits, row, col)
        decoded = codebook[row.div(self.group_rows, rounding_mode="floor"), centroid]
        if self.row_scale is not None:
            decoded = decoded * self.row_scale[row]
        return self.outlier_index, self.outlier_values - decoded

    def stored(self) -> dict[str, Tensor]:
        """The parameters and buffers that make up the weight, by name: what a checkpoint holds, and what tied modules share."""
        return {name: getattr(self, name) for name in STORED if getattr(self, name) is not None}

    def trained_codebook(self) -> Tensor:
        """The codebook, with its gradient divided by the cluster sizes where grad_reduction is "mean"."""
        if self.grad_reduction == "sum" or not (self.codebook.requires_grad and torch.is_grad_enabled()):
            return self.codebook
        if self._inverse_counts is None or self._inverse_counts.device != self.codebook.device:
            ones = torch.ones(self.rows, self.cols, device=self.codebook.device)
            groups, centroids = self.codebook.shape
            counts = ops.codebook_grad(ones, self.packed, centroids, num_codebooks=groups, group_rows=self.group_rows)
            self._inverse_counts = counts.clamp_min(1).reciprocal()
        fixed = self.codebook.detach()
        return fixed + (self.codebook - fixed) * self._inverse_counts.to(self.codebook.dtype)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise AttributeError(LOST)
        if name in INDICES and isinstance(value, Tensor):
            if value.dtype != INDICES[name]:
                raise TypeError(f"{name}: expected {INDICES[name]}, got {value.dtype}")
            if isinstance(value, nn.Parameter):
                value = value.detach()
        super().__setattr__(name, value)

    def _apply(self, fn: Any, recurse: bool = True) -> CodebookModule:
        """As for parameters, and unlike buffers elsewhere: a tensor stays the same object, so that tied layers stay tied."""
        before = {name: self._buffers.get(name) for name in INDICES}
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            now = self._buffers.get(name)
            if tensor is None or now is None or now is tensor:
                continue
            if torch._has_compatible_shallow_copy_type(tensor, now):
                tensor.data = now
                self._buffers[name] = tensor
        self._inverse_counts = None
        return self

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing: Any, unexpected: Any, errors: list[str]
    ) -> None:
        self._inverse_counts = None  # the cluster sizes belong to the packed indices
        for name, dtype in INDICES.items():
            given = state_dict.get(prefix + name)
            if isinstance(given, Tensor) and given.dtype != dtype:  # it would be rounded without a word
                errors.append(f"{prefix}{name}: expected {dtype}, got {given.dtype}")
                return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        missing[:] = [name for name in missing if name != f"{prefix}latent"]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.pop(f"{prefix}latent", None)

    def _extra(self) -> str:
        scale = "" if self.row_scale is None else ", row_scale=True"
        outliers = "" if self.outlier_values is None else f", outliers={len(self.outlier_values)}"
        return f"bits={self.bits}, codebooks={self.codebook.shape[0]}{scale}{outliers}"

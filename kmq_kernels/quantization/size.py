"""What a model takes, quantized or not."""

from __future__ import annotations

import dataclasses

from torch import nn

from ..layers import CodebookModule


@dataclasses.dataclass(frozen=True)
class ModelSize:
    """What a model takes: `weights` counts the values it stands for, each shared one once; bytes are those of the state dict.

    codebook_bytes: codebooks and row factors; outlier_bytes: exactly kept values and their positions.
    """

    weights: int
    quantized_weights: int
    index_bytes: int
    codebook_bytes: int
    outlier_bytes: int
    other_bytes: int

    @property
    def total_bytes(self) -> int:
        """Bytes of all parameters."""
        return self.index_bytes + self.codebook_bytes + self.outlier_bytes + self.other_bytes

    @property
    def bits_per_weight(self) -> float:
        """Bits per value the model stands for, with codebooks and everything that stays in floating point."""
        return 8 * self.total_bytes / max(self.weights, 1)

    @property
    def ratio(self) -> float:
        """How many times smaller than the same model in fp32."""
        return 4 * self.weights / max(self.total_bytes, 1)


def model_size(model: nn.Module) -> ModelSize:
    """Counts the parameters of a model, quantized or not; a parameter that stands at several places counts once."""
    found: dict[int, CodebookModule] = {}
    for module in model.modules():
        if isinstance(module, CodebookModule):
            found.setdefault(id(module.packed), module)
    parts = [(name, parameter) for module in found.values() for name, parameter in module.stored().items()]
    stored = {id(parameter) for _, parameter in parts}
    others = [p for p in model.parameters() if id(p) not in stored]
    quantized = sum(module.rows * module.cols for module in found.values())

    def taken(*kinds: str) -> int:
        return sum(p.numel() * p.element_size() for name, p in parts if name in kinds)

    return ModelSize(
        weights=quantized + sum(p.numel() for p in others),
        quantized_weights=quantized,
        index_bytes=taken("packed"),
        codebook_bytes=taken("codebook", "row_scale"),
        outlier_bytes=taken("outlier_index", "outlier_values"),
        other_bytes=sum(p.numel() * p.element_size() for p in others),
    )

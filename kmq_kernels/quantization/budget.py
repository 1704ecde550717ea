"""The bits of every module, found so that the model meets a budget."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Sequence

from torch import Tensor, nn

from . import allocation
from ._progress import weight_bar
from .config import KMQConfig
from .encoding import encoded_bytes
from .plan import plan
from .weights import Weight, as_matrix


@dataclasses.dataclass(frozen=True)
class Budget:
    """What the budget of a config leaves to decide, whatever the values of the weights are.

    parameters: names of the weights that may get any bits, in the order of the model. patterns: for each a pattern for
    `module_bits` that matches its module only. costs: bytes of each at 1 to 8 bits. room: bytes that all of them may take
    together. whole: bytes of the budget, with everything else.
    """

    parameters: tuple[str, ...]
    patterns: tuple[str, ...]
    costs: tuple[tuple[int, ...], ...]
    room: int
    whole: int

    @property
    def fewest_bits(self) -> int:
        """See `allocation.fewest_bits`."""
        return allocation.fewest_bits(self.costs, self.room)

    def _choices(self) -> list[tuple[int, ...]]:
        return [row[self.fewest_bits - 1 :] for row in self.costs]

    def uniform(self) -> list[int]:
        """Bits of each weight: the most that all of them can have."""
        costs = self._choices()
        fitting = (c for c in range(len(costs[0])) if sum(row[c] for row in costs) <= self.room)
        return [self.fewest_bits + max(fitting)] * len(costs)

    def least_error(self, curves: Sequence[Sequence[float]]) -> list[int]:
        """Bits of each weight: those of the least total error. curves: its error at 1 to 8 bits, see `distortion_curves`."""
        least = self.fewest_bits
        choice = allocation.least_error(self._choices(), [curve[least - 1 :] for curve in curves], self.room)
        return [least + c for c in choice]

    def by_eigenvalue(self, eigenvalues: Sequence[float]) -> list[int]:
        """Bits of each weight: more for a larger eigenvalue."""
        return [self.fewest_bits + c for c in allocation.by_eigenvalue(self._choices(), eigenvalues, self.room)]

    def resolved(self, config: KMQConfig, bits: Sequence[int]) -> KMQConfig:
        """The config that says the bits found, in `module_bits`."""
        if config.allocation == "uniform":
            config = dataclasses.replace(config, bits=bits[0])  # what the layers have
        found = dict(zip(self.patterns, bits, strict=True))
        return dataclasses.replace(config, module_bits={**(config.module_bits or {}), **found})

    def unused(self, config: KMQConfig, bits: Sequence[int]) -> str | None:
        """A sentence, where bits that are the same for all weights leave a quarter of the budget or more."""
        left = self.room - sum(row[b - 1] for row, b in zip(self.costs, bits, strict=True))
        if config.allocation != "uniform" or bits[0] >= 8 or not left > self.whole / 4 > 0:
            return None
        argument = "size" if config.size else "bits_per_weight"
        of = f"{left / 1e6:.2f} of {self.whole / 1e6:.2f} MB" if self.whole >= 1e6 else f"{left:,} of {self.whole:,} bytes"
        sentence = f"{argument}: {bits[0]} bits for all weights leave {of} unused; allocation 'distortion'"
        return f"{sentence} (--allocation distortion) spends them where they help"


def _exactly(name: str, model: nn.Module) -> str:
    """A pattern for `module_bits` that matches this module only, in the model and in its base model."""
    prefix = getattr(model, "base_model_prefix", "")
    optional = f"(?:{re.escape(prefix)}\\.)?" if prefix else ""
    return f"^{optional}{re.escape(name.removeprefix(f'{prefix}.'))}$"


def check_budget(model: nn.Module, config: KMQConfig) -> None:
    """Raises BudgetError, with the smallest possible, where the model cannot meet the config's budget; looks at shapes only."""
    if config.has_budget:
        find_budget(model, config, plan(model, config).quantized)


def find_budget(model: nn.Module, config: KMQConfig, weights: list[Weight], beside: int = 0) -> Budget:
    """What is to decide for the config's budget; looks at shapes only, so that the model may be on the meta device.

    weights: those that are quantized. beside: bytes that the files take beside tensors and one header, for a `size`.
    Raises BudgetError, with the smallest possible, where the model cannot meet it.
    """
    free = [weight for weight in weights if not weight.given]

    def cost(weight: Weight, bits: int) -> int:
        rows, cols = weight.tensor.shape
        return encoded_bytes(rows, cols, bits, config, weight.source.element_size())

    quantized = {id(original) for weight in weights for original in weight.originals}
    others = [p for p in model.parameters() if id(p) not in quantized]
    taken = sum(p.numel() * p.element_size() for p in others)
    taken += sum(cost(weight, weight.bits or 0) for weight in weights if weight.given)
    if config.size is not None:
        taken += _header_bound(model, weights, config) + beside
        whole = config.size
    elif config.bits_per_weight is not None:
        whole = int(config.bits_per_weight * sum(p.numel() for p in model.parameters()) / 8)
    else:
        whole = taken + sum(cost(weight, config.bits) for weight in free)
    costs = tuple(tuple(cost(weight, bits) for bits in allocation.BITS) for weight in free)
    least = taken + sum(row[0] for row in costs)
    if whole < least:
        raise _too_small(config, least, model)
    patterns = tuple(_exactly(weight.name, model) for weight in free)
    return Budget(tuple(weight.parameter for weight in free), patterns, costs, whole - taken, whole)


def allocate_bits(
    model: nn.Module,
    config: KMQConfig,
    weights: list[Weight],
    importance: dict[str, Tensor],
    eigenvalues: dict[str, float] | None,
    progress: bool | None,
) -> KMQConfig:
    """Gives every weight that had no bits of its own those with which the model meets the budget; the config that says so."""
    budget = find_budget(model, config, weights)
    free = [weight for weight in weights if not weight.given]
    if not free:
        return config
    if config.allocation == "uniform":
        bits = budget.uniform()
    elif config.allocation == "hessian":
        missing = [weight.name for weight in free if weight.name not in (eigenvalues or {})]
        if eigenvalues is None or missing:
            raise ValueError(f"eigenvalues: allocation 'hessian' needs one for every module, none for {missing[0]}")
        bits = budget.by_eigenvalue([eigenvalues[weight.name] for weight in free])
    else:
        with weight_bar("distortion at 1 to 8 bits", [weight.tensor for weight in free], progress) as bar:
            curves = allocation.distortion_curves(
                [weight.tensor.contiguous() for weight in free],
                config,
                importance=[as_matrix(weight, importance) for weight in free] if config.allocation == "fisher" else None,
                names=[weight.parameter for weight in free],
                on_done=lambda i: bar.update(free[i].tensor.numel()) and None,
            )
        bits = budget.least_error(curves.tolist())
    for weight, found in zip(free, bits, strict=True):
        weight.bits = found
    if (sentence := budget.unused(config, bits)) is not None:
        warnings.warn(sentence, stacklevel=3)
    return budget.resolved(config, bits)


def _too_small(config: KMQConfig, least: int, model: nn.Module) -> allocation.BudgetError:
    if config.size is not None:
        return allocation.BudgetError(f"size: the smallest possible for this model is {least} bytes, got {config.size}")
    smallest = 8 * least / sum(p.numel() for p in model.parameters())
    return allocation.BudgetError(
        f"bits_per_weight: the smallest possible for this model is {smallest:.4f}, got {config.bits_per_weight}"
    )


def _header_bound(model: nn.Module, weights: list[Weight], config: KMQConfig) -> int:
    """Bytes that the header of the safetensors file can take at most."""
    digits = len(str(sum(p.numel() * p.element_size() for p in model.parameters())))
    fixed = len('"":{"dtype":"BF16","shape":[],"data_offsets":[,]},') + 2 * digits
    stored = 2 + config.row_scale + 2 * (config.outlier_fraction > 0)
    total = 128  # length field, metadata, padding
    names = {weight.parameter for weight in weights}
    for name, parameter in model.named_parameters():
        parts = stored if name in names else 1
        total += parts * (len(name) + len("outlier_values") + fixed + len(str(list(parameter.shape))))
    return total

"""KMQConfig: everything that says how a model is quantized, one dataclass, stored in config.json."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Literal, get_args

from transformers.utils.quantization_config import QuantizationConfigMixin

from .clustering import Algorithm, Init, Scheme

QUANT_METHOD = "kmq"

Granularity = Literal["tensor", "row", "group"]
GradReduction = Literal["sum", "mean"]

PRESETS: dict[str, dict[str, Any]] = {
    # The source's method as written: see README, "Where the method comes from".
    "paper": {
        "scheme": "kmeans",
        "granularity": "tensor",
        "algorithm": "lloyd",
        "init": "k-means++",
        "max_iter": 3,
        "tol": 0.0,
        "grad_reduction": "mean",
    }
}


def name_matches(pattern: str, name: str) -> bool:
    """Whether the regular expression `pattern` matches whole components of the dotted module name, anywhere in it.

    "classifier" matches "classifier" and "classifier.dense", not "pre_classifier".
    """
    return re.search(rf"(?:^|\.)(?:{pattern})(?:\.|$)", name) is not None


@dataclasses.dataclass(repr=False)
class KMQConfig(QuantizationConfigMixin):
    """How a model is quantized.

    bits: 1 to 8, bits of an index; a codebook has 2**bits values.
    scheme: "kmeans", or "linear" (equal bins over [min, max], each represented by the mean of its members).
    granularity: "tensor" (one codebook a weight), "row" (one a row) or "group" (one for each `group_rows` rows).
    skip: patterns (regular expressions over whole components of module names) of modules to leave as they are, beside the
        classification layer, which is left in any case. After quantization: the resolved names of all that was left.
    module_bits: {pattern: bits} for modules that get other bits; the first pattern that matches counts. A module matched
        here is quantized even where it is the classification layer.
    preset: "paper" sets scheme, granularity, algorithm, init, max_iter, tol and grad_reduction to the source's method.
    algorithm, init, max_iter, tol, seed: see `kmeans`.
    grad_reduction: gradient of a centroid in fine-tuning, from those of its members: "sum" (the chain rule) or "mean".

    Raises ValueError with a sentence for any value outside these.
    """

    bits: int = 4
    scheme: Scheme = "kmeans"
    granularity: Granularity = "tensor"
    group_rows: int = 8
    skip: list[str] | None = None
    module_bits: dict[str, int] | None = None
    preset: str | None = None
    algorithm: Algorithm = "optimal"
    init: Init = "k-means++"
    max_iter: int = 300
    tol: float = 0.0
    seed: int = 0
    grad_reduction: GradReduction = "sum"
    quant_method: str = QUANT_METHOD  # type: ignore[assignment]  # the base class knows its own methods only

    def __post_init__(self) -> None:
        if self.preset is not None:
            self._expect("preset", tuple(PRESETS))
            defaults = {field.name: field.default for field in dataclasses.fields(self)}
            for name, value in PRESETS[self.preset].items():
                if getattr(self, name) not in (defaults[name], value):
                    raise ValueError(f"{name}: preset {self.preset!r} sets {value!r}, got {getattr(self, name)!r} as well")
                setattr(self, name, value)
        self._expect("scheme", get_args(Scheme))
        self._expect("granularity", get_args(Granularity))
        self._expect("algorithm", get_args(Algorithm))
        self._expect("init", get_args(Init))
        self._expect("grad_reduction", get_args(GradReduction))
        self._expect("quant_method", (QUANT_METHOD,))
        self._expect_integer("bits", self.bits, 1, 8)
        self._expect_integer("group_rows", self.group_rows, 1, None)
        self._expect_integer("max_iter", self.max_iter, 1, None)
        for pattern, bits in (self.module_bits or {}).items():
            self._expect_pattern("module_bits", pattern)
            self._expect_integer(f"module_bits[{pattern!r}]", bits, 1, 8)
        for pattern in self.skip or []:
            self._expect_pattern("skip", pattern)
        if not self.tol >= 0:
            raise ValueError(f"tol: expected a number not below 0, got {self.tol}")

    def _expect(self, name: str, known: tuple[str, ...]) -> None:
        if getattr(self, name) not in known:
            raise ValueError(f"{name}: expected one of {', '.join(map(repr, known))}, got {getattr(self, name)!r}")

    @staticmethod
    def _expect_integer(name: str, value: object, least: int, most: int | None) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or value < least or (most is not None and value > most):
            span = f"an integer from {least} to {most}" if most is not None else f"an integer not below {least}"
            raise ValueError(f"{name}: expected {span}, got {value!r}")

    @staticmethod
    def _expect_pattern(name: str, pattern: str) -> None:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{name}: {pattern!r} is not a regular expression: {error}") from None

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """From the `quantization_config` of a config.json; a key that this version does not know is an error."""
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(config_dict) - known):
            raise ValueError(f"quantization_config: unknown keys {', '.join(unknown)}; was it written by a newer version?")
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for config.json."""
        return dataclasses.asdict(self)

    def bits_for(self, name: str) -> tuple[int, bool]:
        """Bits of the module `name`, and whether `module_bits` says so."""
        for pattern, bits in (self.module_bits or {}).items():
            if name_matches(pattern, name):
                return bits, True
        return self.bits, False

    def rows_per_codebook(self, rows: int) -> int:
        """Rows of a weight with `rows` rows that share a codebook."""
        return {"tensor": max(rows, 1), "row": 1, "group": self.group_rows}[self.granularity]

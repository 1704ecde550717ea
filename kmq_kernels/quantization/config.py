"""KMQConfig: everything that says how a model is quantized, one dataclass, stored in config.json."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any, Literal, get_args

import numpy as np
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..clustering import Algorithm, Init, Scheme
from ..files import parse_size

QUANT_METHOD = "kmq"

Granularity = Literal["tensor", "row", "group"]
GradReduction = Literal["sum", "mean"]
Allocation = Literal["uniform", "distortion", "fisher", "hessian"]
Weighting = Literal["none", "fisher"]
Objective = Literal["weights", "output"]

# The systems that the source compares, see docs/finetune.md, "Many configurations side by side".
PRESETS: dict[str, dict[str, Any]] = {
    # The source's method as written: see docs/index.md, "Where the method comes from".
    "paper": {
        "scheme": "kmeans",
        "granularity": "tensor",
        "algorithm": "lloyd",
        "init": "k-means++",
        "max_iter": 3,
        "tol": 0.0,
        "objective": "weights",
        "grad_reduction": "mean",
    },
    "linear": {"scheme": "linear", "granularity": "tensor"},
    "int8": {"scheme": "linear", "granularity": "tensor", "bits": 8},
    "hessian": {"scheme": "linear", "granularity": "tensor", "allocation": "hessian"},
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
    preset: a system of the source; it sets what makes it up. "paper": the source's own method (scheme, granularity, algorithm,
        init, max_iter, tol, grad_reduction); "linear": equal bins; "int8": linear at 8 bits; "hessian": linear, with more bits
        for modules with larger Hessian eigenvalues.
    allocation: bits of each module: "uniform" (the largest `bits` for all that the budget allows), or chosen to meet a budget:
        "distortion" (least squared error), "fisher" (least error weighted with the Fisher diagonal, which then weighs the
        clustering, too), "hessian" (more bits to larger eigenvalues). A module gets 1 bit only where the budget has no room for
        2 bits in every one. Modules in `module_bits` keep the bits given there. After quantization the choice stands there, too.
    bits_per_weight, size: the budget, at most one of them: bits per weight of the model or bytes of its weight file (a number, or
        a text such as "8MB" or "10MiB"), with codebooks and everything left in floating point. Default: the size that `bits` for
        all would have.
    weighting: "fisher" weighs each value in the clustering with its entry of the Fisher diagonal, see `sensitivity`.
    objective: what the clustering minimises: the squared error of the "weights", or of each layer's "output" on unlabelled texts,
        layer after layer, which `quantize_` and `kmq quantize` then need (scheme "kmeans"). Fisher weights then weigh rows.
    outlier_fraction: share of each weight, below 0.5, that is kept exactly, as sparse values: those that add most to the
        squared deviation from the mean, weighted where the clustering is.
    row_scale: a factor for each row, so that rows of different spread can share a codebook (granularity "tensor", "group").
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
    allocation: Allocation = "uniform"
    bits_per_weight: float | None = None
    size: int | None = None
    weighting: Weighting = "none"
    objective: Objective = "weights"
    outlier_fraction: float = 0.0
    row_scale: bool = False
    quant_method: str = QUANT_METHOD  # type: ignore[assignment]  # the base class knows its own methods only

    def __new__(cls, *args: Any, **kwargs: Any) -> KMQConfig:
        """Notes which values are given: one that is given is never overruled by a preset, be it the default's."""
        config = super().__new__(cls)
        names = [field.name for field in dataclasses.fields(cls)]
        config.__dict__["_given"] = {*names[: len(args)], *kwargs}
        return config

    def __post_init__(self) -> None:
        given = self.__dict__.pop("_given")
        self._plain_values()
        if self.preset is not None:
            self._expect("preset", tuple(PRESETS))
            for name, value in PRESETS[self.preset].items():
                if name in given and getattr(self, name) != value:
                    raise ValueError(f"{name}: preset {self.preset!r} sets {value!r}, got {getattr(self, name)!r} as well")
                setattr(self, name, value)
        self._expect("scheme", get_args(Scheme))
        self._expect("granularity", get_args(Granularity))
        self._expect("algorithm", get_args(Algorithm))
        self._expect("init", get_args(Init))
        self._expect("grad_reduction", get_args(GradReduction))
        self._expect("allocation", get_args(Allocation))
        self._expect("weighting", get_args(Weighting))
        self._expect("objective", get_args(Objective))
        self._expect("quant_method", (QUANT_METHOD,))
        self._expect_integer("bits", self.bits, 1, 8)
        self._expect_integer("group_rows", self.group_rows, 1, None)
        self._expect_integer("max_iter", self.max_iter, 1, None)
        self._expect_integer("seed", self.seed, 0, None)
        for name in ("tol", "outlier_fraction", "bits_per_weight"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float, type(None) if name == "bits_per_weight" else float)):
                raise ValueError(f"{name}: expected a number, got {value!r}")
        if not isinstance(self.row_scale, bool):
            raise ValueError(f"row_scale: expected True or False, got {self.row_scale!r}")
        if self.skip is not None and not isinstance(self.skip, (list, tuple)):
            raise ValueError(f"skip: expected a list of patterns, got {self.skip!r}")
        if self.module_bits is not None and not isinstance(self.module_bits, dict):
            raise ValueError(f"module_bits: expected a dict of patterns and bits, got {self.module_bits!r}")
        self.skip = None if self.skip is None else list(self.skip)  # JSON knows no other
        for pattern, bits in (self.module_bits or {}).items():
            self._expect_pattern("module_bits", pattern)
            self._expect_integer(f"module_bits[{pattern!r}]", bits, 1, 8)
        for pattern in self.skip or []:
            self._expect_pattern("skip", pattern)
        if not self.tol >= 0:
            raise ValueError(f"tol: expected a number not below 0, got {self.tol}")
        if self.bits_per_weight is not None and self.size is not None:
            raise ValueError("size: expected either size or bits_per_weight as the budget, got both")
        if self.bits_per_weight is not None and not 0 < self.bits_per_weight < math.inf:
            raise ValueError(f"bits_per_weight: expected a number above 0, got {self.bits_per_weight}")
        if isinstance(self.size, (str, float)):
            self.size = parse_size("size", self.size)
        if self.size is not None:
            self._expect_integer("size", self.size, 1, None)
        if not 0 <= self.outlier_fraction < 0.5:
            raise ValueError(f"outlier_fraction: expected a number from 0 to below 0.5, got {self.outlier_fraction}")
        if self.row_scale and self.granularity == "row":
            raise ValueError("row_scale: expected granularity 'tensor' or 'group'; a row with its own codebook needs no scale")
        if self.weighting == "fisher" and self.scheme == "linear":
            raise ValueError("weighting: the linear scheme takes no weights, expected 'none'")

        if self.objective == "output" and self.scheme == "linear":
            raise ValueError("objective: 'output' moves centroids, and bins of equal width do not move; expected scheme 'kmeans'")

    def _plain_values(self) -> None:
        """NumPy's numbers as Python's, which JSON can hold."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, np.generic):
                setattr(self, field.name, value.item())
        if isinstance(self.module_bits, dict):
            bits = self.module_bits.items()
            self.module_bits = {key: value.item() if isinstance(value, np.generic) else value for key, value in bits}

    def _expect(self, name: str, known: tuple[str, ...]) -> None:
        if not isinstance(getattr(self, name), str) or getattr(self, name) not in known:
            raise ValueError(f"{name}: expected one of {', '.join(map(repr, known))}, got {getattr(self, name)!r}")

    @staticmethod
    def _expect_integer(name: str, value: object, least: int, most: int | None) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or value < least or (most is not None and value > most):
            span = f"an integer from {least} to {most}" if most is not None else f"an integer not below {least}"
            raise ValueError(f"{name}: expected {span}, got {value!r}")

    @staticmethod
    def _expect_pattern(name: str, pattern: str) -> None:
        if not isinstance(pattern, str):
            raise ValueError(f"{name}: expected patterns as strings, got {pattern!r}")
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{name}: {pattern!r} is not a regular expression: {error}") from None

    @classmethod
    def of(cls, config: KMQConfig | dict[str, Any]) -> KMQConfig:
        """`config` itself, or from a dict of fields."""
        if isinstance(config, cls):
            return config
        if not isinstance(config, dict):
            raise ValueError(f"config: expected a KMQConfig or a dict of its fields, got {type(config).__name__}")
        return cls.from_dict(config)

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

    @property
    def has_budget(self) -> bool:
        """Whether the bits of the modules have to be found for a budget."""
        return self.allocation != "uniform" or self.bits_per_weight is not None or self.size is not None

    @property
    def needs_fisher(self) -> bool:
        """Whether quantization needs the Fisher diagonal of the model."""
        return self.weighting == "fisher" or self.allocation == "fisher"

    def outlier_count(self, numel: int) -> int:
        """How many values of a weight with `numel` values are kept exactly."""
        return int(self.outlier_fraction * numel)

    def rows_per_codebook(self, rows: int) -> int:
        """Rows of a weight with `rows` rows that share a codebook."""
        return {"tensor": max(rows, 1), "row": 1, "group": self.group_rows}[self.granularity]

"""How a model is quantized: configuration, which weights, their bits, encoding; quantize_ and dequantize_."""

from .allocation import BITS, BudgetError, by_eigenvalue, distortion_curves, least_error
from .budget import Budget, check_budget, find_budget
from .config import PRESETS, QUANT_METHOD, KMQConfig, name_matches
from .encoding import EncodedWeight, encode_weights, encoded_bytes, encoded_shapes
from .heads import classification_layers
from .marking import described, mark_quantized
from .modes import evaluating
from .objective import encode_for_outputs
from .plan import Plan, plan, refuse_unmatched, remarks
from .quantize import quantize_
from .size import ModelSize, model_size
from .swap import dequantize_, join_indices, part_indices, swap, swap_empty
from .weights import Weight, kind_of

__all__ = [
    "BITS",
    "PRESETS",
    "QUANT_METHOD",
    "Budget",
    "BudgetError",
    "EncodedWeight",
    "KMQConfig",
    "ModelSize",
    "Plan",
    "Weight",
    "by_eigenvalue",
    "check_budget",
    "classification_layers",
    "dequantize_",
    "described",
    "distortion_curves",
    "encode_for_outputs",
    "encode_weights",
    "encoded_bytes",
    "encoded_shapes",
    "evaluating",
    "find_budget",
    "join_indices",
    "kind_of",
    "least_error",
    "mark_quantized",
    "model_size",
    "name_matches",
    "part_indices",
    "plan",
    "quantize_",
    "refuse_unmatched",
    "remarks",
    "swap",
    "swap_empty",
]

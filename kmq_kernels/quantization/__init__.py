"""How a model is quantized: configuration, which weights, their bits, encoding; quantize_ and dequantize_."""

from .allocation import BITS, BudgetError, by_eigenvalue, distortion_curves, least_error
from .budget import check_budget
from .config import PRESETS, QUANT_METHOD, KMQConfig, name_matches
from .encoding import encode_weights, encoded_bytes
from .marking import described, mark_quantized
from .plan import HEADS, Plan, Weight, plan
from .quantize import quantize_
from .size import ModelSize, model_size
from .swap import dequantize_, swap, swap_empty

__all__ = [
    "BITS",
    "HEADS",
    "PRESETS",
    "QUANT_METHOD",
    "BudgetError",
    "KMQConfig",
    "ModelSize",
    "Plan",
    "Weight",
    "by_eigenvalue",
    "check_budget",
    "dequantize_",
    "described",
    "distortion_curves",
    "encode_weights",
    "encoded_bytes",
    "least_error",
    "mark_quantized",
    "model_size",
    "name_matches",
    "plan",
    "quantize_",
    "swap",
    "swap_empty",
]

"""The transformers integration: from_pretrained quantizes while loading and reloads packed checkpoints; `load` checks first.

quantizer.py puts itself into transformers' registry; the package has it imported when the registry is."""

from .card import MODEL_CARD
from .classes import base_classes, check_sizes, config_content, find_class, model_config, model_dtype, on_meta
from .load import checkpoint_files, load
from .names import Matched, kept_names, match

__all__ = [
    "MODEL_CARD",
    "Matched",
    "base_classes",
    "check_sizes",
    "checkpoint_files",
    "config_content",
    "find_class",
    "kept_names",
    "load",
    "match",
    "model_config",
    "model_dtype",
    "on_meta",
]

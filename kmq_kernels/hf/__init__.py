"""The transformers integration: from_pretrained quantizes while loading and reloads packed checkpoints; `load` checks first.

quantizer.py puts itself into transformers' registry; the package has it imported when the registry is."""

from .. import __version__
from .card import SENTENCE_CONFIG, Facts, Quality, card, hub_id, sentence_class, source_card, with_requirement
from .classes import base_classes, check_sizes, config_content, find_class, model_config, model_dtype, on_meta
from .load import checkpoint_files, load
from .names import Matched, kept_names, match
from .save import save_card

__all__ = [
    "SENTENCE_CONFIG",
    "Facts",
    "Matched",
    "Quality",
    "__version__",
    "base_classes",
    "card",
    "check_sizes",
    "checkpoint_files",
    "config_content",
    "find_class",
    "hub_id",
    "kept_names",
    "load",
    "match",
    "model_config",
    "model_dtype",
    "on_meta",
    "save_card",
    "sentence_class",
    "source_card",
    "with_requirement",
]

"""The transformers integration: from_pretrained quantizes while loading and reloads packed checkpoints; `load` checks first."""

from .card import MODEL_CARD
from .load import checkpoint_files, load
from .registration import register_when_used

__all__ = ["MODEL_CARD", "checkpoint_files", "load"]

register_when_used()

"""Checkpoints of any size, quantized as a stream, and checked."""

from ..files import MANIFEST, DamagedError, find_source
from .curves import CURVES
from .plan import in_child, make_plan
from .quantize import choose_device, decide, quantize_checkpoint
from .ranks import LeadFailed, RankDied, Ranks
from .verify import verify_checkpoint

__all__ = [
    "CURVES",
    "MANIFEST",
    "DamagedError",
    "LeadFailed",
    "RankDied",
    "Ranks",
    "choose_device",
    "decide",
    "find_source",
    "in_child",
    "make_plan",
    "quantize_checkpoint",
    "verify_checkpoint",
]

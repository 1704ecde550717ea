"""Checkpoints of any size, quantized as a stream, and checked."""

from ..files import MANIFEST, DamagedError
from .plan import find_source, in_child, make_plan
from .quantize import choose_device, quantize_checkpoint
from .ranks import LeadFailed, RankDied, Ranks
from .verify import verify_checkpoint

__all__ = [
    "MANIFEST",
    "DamagedError",
    "LeadFailed",
    "RankDied",
    "Ranks",
    "choose_device",
    "find_source",
    "in_child",
    "make_plan",
    "quantize_checkpoint",
    "verify_checkpoint",
]

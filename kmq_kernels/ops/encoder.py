"""The compiled encoder: not an op, since it keeps its weights from one call to the next; see layers/encoder.py."""

from typing import Any

from ._define import compiled_extension


def has_compiled_encoder() -> bool:
    """Whether the extension was built."""
    return compiled_extension is not None


def compile_encoder(facts: dict[str, Any]) -> Any:
    """An encoder of the described parts, with `run(ids, mask)`: ids (batch, length) int64, or None, for each of its embeddings,
    mask (batch, length) bool or None -> states (batch, length, hidden) fp32, zeros where the mask is False.
    """
    if compiled_extension is None:
        raise RuntimeError("compile_encoder: the extension was not built, see build_info()")
    return compiled_extension.Encoder(facts)

"""The compiled encoder: not an op, since it keeps its weights from one call to the next; see layers/encoder.py."""

from typing import Any

from torch import Tensor

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


def tensor_states(tensors: list[Tensor]) -> Any:
    """Versions and addresses of tensors, to be compared with those of another time: equal unless one was written or replaced.

    Raises RuntimeError for a tensor made under torch.inference_mode, which has no version.
    """
    if compiled_extension is None:
        return [(tensor._version, tensor.data_ptr()) for tensor in tensors]
    return compiled_extension.tensor_states(tensors)

"""The only file that knows the dispatcher: how an op is defined, and which implementations take it over where."""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import reference

library = torch.library.Library("kmq", "DEF")
kmq = torch.ops.kmq

# Ops with a Triton launcher of the same name and signature: op -> file in triton_kernels/.
TRITON_LAUNCHERS: dict[str, str] = {
    "codebook_linear": "codebook_linear",
    "codebook_linear_input_grad": "codebook_linear",
    "codebook_linear_grad": "codebook_linear_grad",
    "codebook_embedding": "codebook_embedding",
    "codebook_embedding_grad": "codebook_embedding_grad",
    "dequantize": "dequantize",
    "pack": "pack",
    "unpack": "pack",
    "assign": "assign",
    "update": "update",
}


has_triton = importlib.util.find_spec("triton") is not None


def define(schema: str) -> None:
    """Defines an op: the function of its name in reference.py is its default, its Triton launcher runs on CUDA tensors."""
    name = schema.partition("(")[0]
    library.define(schema)
    library.impl(name, getattr(reference, name), "CompositeExplicitAutograd")
    if has_triton and name in TRITON_LAUNCHERS:
        library.impl(name, _launcher(name), "CUDA")


def _launcher(op: str) -> Callable[..., Any]:
    """Runs the op's Triton launcher; triton is imported at the first call."""

    def run(*arguments: Any) -> Any:
        if any(isinstance(argument, Tensor) and argument.dtype == torch.float64 for argument in arguments):
            return getattr(reference, op)(*arguments)  # tensor cores and shared memory are laid out for 32 bits
        module = importlib.import_module(f"kmq_kernels.triton_kernels.{TRITON_LAUNCHERS[op]}")
        return getattr(module, op)(*arguments)

    return run


def has_kernel(op: str, key: str) -> bool:
    """Whether `op` has an implementation of its own under the dispatch key "CPU" or "CUDA"."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"kmq::{op}", key)


def _load_extension() -> Any:
    """The C++ extension, None where it was not built; one that is present but broken raises."""
    if importlib.util.find_spec("kmq_kernels._C") is None:
        return None
    return importlib.import_module("kmq_kernels._C")


compiled_extension = _load_extension()

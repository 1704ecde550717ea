"""DecodedWeight: what `.weight` of a codebook layer gives. It reads like any tensor, and a write into it raises."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

LOADED = "_is_hf_initialized"  # transformers' mark for what was loaded and is not made anew
LOST = (
    "weight: it is decoded anew from `codebook` and `packed` at every access, so what is written into it, its flags and its"
    " hooks would be lost; change or freeze the codebook, use dequantize_ first, or take a clone()"
)


class DecodedWeight(Tensor):
    """A decoded weight that refuses in-place operations, also through views and `.data`; results of operations are plain.

    torch has no tensor that cannot be written: flags of its storage stop readers such as numpy() as well, and inference tensors
    cannot take part in autograd.
    """

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Runs `func` on plain tensors, unless it writes into one of this class."""
        kwargs = dict(kwargs or {})
        target = args[0] if args else next(iter(kwargs.values()), None)
        if (_writes(func) and _holds(target)) or _holds(kwargs.get("out")):
            raise RuntimeError(LOST)
        with torch._C.DisableTorchFunctionSubclass():
            given: list[Tensor] = []
            marks: dict[str, bool] = {}

            def plain(value: Any) -> Any:
                if not isinstance(value, DecodedWeight):
                    return value
                marks.update({name: mark for name, mark in vars(value).items() if name == LOADED})
                given.append(value.as_subclass(Tensor))
                return given[-1]

            args, kwargs = tree_map(plain, tuple(args)), tree_map(plain, kwargs)
            result = func(*args, **kwargs)
            if func is Tensor.numpy:
                result.flags.writeable = False
                return result

            def guarded(value: Any) -> Any:
                views = type(value) is Tensor and any(torch._C._is_alias_of(value, one) for one in given)  # type: ignore[attr-defined]
                if not views:
                    return value
                view = value.as_subclass(DecodedWeight)
                vars(view).update(marks)
                return view

            return tree_map(guarded, result)


def _writes(func: Callable[..., Any]) -> bool:
    """Whether `func` changes its first argument, by torch's convention of names; setting a property counts, and so do hooks."""
    name = getattr(func, "__name__", "")
    if name.startswith("__"):
        return name in ("__set__", "__setitem__") or (name.startswith("__i") and name in _IN_PLACE)
    return name.endswith("_") or name.startswith("register_")


_IN_PLACE = frozenset(
    f"__i{name}__"
    for name in (
        "add",
        "sub",
        "mul",
        "matmul",
        "truediv",
        "floordiv",
        "div",
        "mod",
        "pow",
        "and",
        "or",
        "xor",
        "lshift",
        "rshift",
    )
)


def _holds(value: Any) -> bool:
    return isinstance(value, DecodedWeight) or (isinstance(value, (tuple, list)) and any(map(_holds, value)))


def guard(weight: Tensor) -> Tensor:
    """`weight` as a DecodedWeight; as it is where torch traces, transforms or fakes, which write nothing into it."""
    if type(weight) is not Tensor or weight.is_meta or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return weight
    if torch._C._functorch.is_functorch_wrapped_tensor(weight):
        return weight
    return weight.as_subclass(DecodedWeight)

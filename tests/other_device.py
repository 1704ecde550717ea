"""Tensors with values that say they are on another device: an operation that mixes them with tensors of the CPU fails as it does
on a machine with a GPU. The values are computed on the CPU, so whole programs run; which kernel a GPU would take is not tested.

    with OtherDevice() as other:
        model.to(DEVICE)  # other.moved counts the tensors that went there

The device is called "meta": autograd asks the others for a stream, which a build without CUDA does not have.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("meta")
# Operations that take an index or a source on the CPU beside tensors on a GPU.
MIXED = {"aten::copy_", "aten::_to_copy", "aten::index.Tensor", "aten::index_put_", "aten::_index_put_impl_"}


class There(torch.Tensor):
    """A tensor on the other device; its `value` is on the CPU."""

    @staticmethod
    def __new__(cls, value):
        strides, offset = value.stride(), value.storage_offset()
        return torch.Tensor._make_wrapper_subclass(cls, value.shape, strides, offset, dtype=value.dtype, device=DEVICE)

    def __init__(self, value):
        self.value = value

    is_meta = False  # it has values

    def tolist(self):
        return self.value.tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})


def dispatch(func, args, kwargs):
    """Checks the devices, computes on the values, and says where the result is."""
    tensors = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, torch.Tensor)]
    there = [each for each in tensors if isinstance(each, There)]
    name = func.name()
    if there and not {name, name.partition(".")[0]} & MIXED:
        stranger = next((each for each in tensors if not isinstance(each, There) and each.dim() > 0), None)
        if stranger is not None:
            places = [(tuple(each.shape), str(each.device)) for each in tensors]
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, got {places}")
    asked = kwargs.get("device")
    goes = bool(there) if asked is None else torch.device(asked) == DEVICE
    kwargs = {key: value for key, value in kwargs.items() if key != "device"}
    plain, named = tree_map(lambda each: each.value if isinstance(each, There) else each, (args, kwargs))
    result = func(*plain, **named)
    if not goes or name == "aten::_local_scalar_dense":
        return result
    known = {id(each.value): each for each in there}
    return tree_map(lambda each: known.get(id(each), There(each)) if isinstance(each, torch.Tensor) else each, result)


class OtherDevice(TorchDispatchMode):
    """While it is active, tensors can be made on, and moved to, DEVICE."""

    def __enter__(self):
        self.moved = 0
        self._autocast, torch.is_autocast_enabled = torch.is_autocast_enabled, lambda *device: False
        self._tensor, torch.tensor = torch.tensor, self._made
        return super().__enter__()

    def __exit__(self, *error):
        torch.is_autocast_enabled, torch.tensor = self._autocast, self._tensor
        return super().__exit__(*error)

    def _made(self, *args, device=None, **kwargs):
        """torch.tensor, which makes tensors where no mode sees it."""
        made = self._tensor(*args, **kwargs)
        return made if device is None else made.to(device)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.name() == "aten::_to_copy" and kwargs.get("device") == DEVICE and not isinstance(args[0], There):
            self.moved += 1
        return dispatch(func, args, kwargs)

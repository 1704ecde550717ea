"""The weights of a model that could be quantized: which layers have each, and what keeps one from being quantized."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any, NamedTuple, cast

from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]
from torch.nn.utils import parametrize

from ..layers import CodebookConv1D, CodebookEmbedding, CodebookLinear, CodebookModule, CodebookPointwise
from .computed import computed_by, hook_tensors, resolved
from .encoding import EncodedWeight


class Kind(NamedTuple):
    """A class of plain layers, the class that takes their place, and how the stored weight is a matrix (rows, cols)."""

    plain: type[nn.Module]
    packed: type[CodebookModule]
    matrix: Callable[[Tensor], Tensor]
    standard: frozenset[str]  # attributes that every such layer has


def _as_it_is(weight: Tensor) -> Tensor:
    return weight


def _transposed(weight: Tensor) -> Tensor:
    return weight.t()


def _flat(weight: Tensor) -> Tensor:
    return weight.flatten(1)


def _standard(plain: type[nn.Module], *unlisted: str) -> frozenset[str]:
    """Attributes that every layer of a class has. No layer is made to look: that draws random numbers, or imports a compiler."""
    listed = [name for kind in plain.__mro__ for name in getattr(kind, "__constants__", ())]
    return frozenset([*vars(nn.Module()), *listed, *unlisted])


_LINEAR = Kind(nn.Linear, CodebookLinear, _as_it_is, _standard(nn.Linear))
_EMBEDDING = Kind(nn.Embedding, CodebookEmbedding, _as_it_is, _standard(nn.Embedding))
_OF_CONV = ("transposed", "_reversed_padding_repeated_twice")
_POINTWISE = Kind(nn.Conv1d, CodebookPointwise, _flat, _standard(nn.Conv1d, *_OF_CONV))


def kind_of(module: nn.Module) -> Kind | None:
    """The kind of a layer, subclasses included; None for what is no such layer."""
    kind = next((kind for kind in (_LINEAR, _EMBEDDING, _POINTWISE) if isinstance(module, kind.plain)), None)
    library = sys.modules.get("transformers.pytorch_utils")  # where nobody has imported it, no layer is of its class
    if kind is None and library is not None and isinstance(module, library.Conv1D):
        return Kind(library.Conv1D, CodebookConv1D, _transposed, frozenset(vars(nn.Module())) | {"nf", "nx"})
    return kind


@dataclasses.dataclass
class Weight:
    """One weight on its way: `find_weights` makes the record, `plan` decides, a budget may change `bits`, encoding fills
    `encoded`, the swap ends it."""

    kind: Kind
    modules: dict[str, nn.Module]  # all layers that have it, by name; the first name stands for it
    source: Tensor  # as the layers have it
    computed: str = ""  # what computes it, where it is not a parameter
    bits: int | None = None  # None: it stays as it is
    left: str = ""  # why it stays
    given: bool = False  # whether `module_bits` says the bits
    encoded: EncodedWeight | None = None

    @property
    def name(self) -> str:
        """The name that stands for it: of the first layer that has it."""
        return next(iter(self.modules))

    @property
    def rows(self) -> int:
        """Rows of that matrix: outputs of a linear layer, entries of an embedding."""
        return self.tensor.shape[0]

    @property
    def cols(self) -> int:
        """Its columns."""
        return self.tensor.shape[1]

    @property
    def transposed(self) -> bool:
        """Whether the layers store it (cols, rows)."""
        return self.kind.packed is CodebookConv1D

    @property
    def parameter(self) -> str:
        """What errors call it."""
        return f"{self.name}.weight"

    @property
    def originals(self) -> list[Tensor]:
        """The parameters that it is or that it is computed from."""
        if not self.computed:
            return [self.source]
        named = {name: p for module in self.modules.values() for name, p in module.named_parameters() if name != "bias"}
        return list(named.values())

    @property
    def tensor(self) -> Tensor:
        """The weight as a matrix (rows, cols)."""
        return self.kind.matrix(self.source.detach())


def as_matrix(weight: Weight, importance: dict[str, Tensor]) -> Tensor | None:
    """The importance of its values as a matrix (rows, cols), None where there is none."""
    given = importance.get(weight.name)
    if given is None:
        return None
    if given.shape != weight.source.shape:
        expected, got = tuple(weight.source.shape), tuple(given.shape)
        raise ValueError(f"sample_weight of {weight.parameter}: expected shape {expected}, got {got}")
    return weight.kind.matrix(given).contiguous()


def find_weights(model: nn.Module) -> list[Weight]:
    """A record a weight, in the order of the model; `left` is set where the layer or the weight is one that must stay.

    Layers that share a weight, by identity or (on the meta device) by transformers' list of ties, are in one record.
    """
    found: dict[int, Weight] = {}
    shared = _places(model)
    adapters = _adapter_names(model)
    for name, module in model.named_modules(remove_duplicate=False):
        kind = kind_of(module)
        if kind is None:
            continue
        computed = computed_by(module)
        weight = module._parameters.get("weight")
        if weight is None and not computed:
            continue  # another library keeps it under another name
        key = id(module) if weight is None else id(weight)
        if key not in found:
            found[key] = Weight(kind, {}, cast(Tensor, resolved(module)) if weight is None else weight, computed)
        record = found[key]
        record.modules[name] = module
        record.left = record.left or _reason(module, kind, record.kind)
    by_name = {name: weight for weight in found.values() for name in weight.modules}
    for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        one, other = (by_name.get(key.removesuffix(".weight")) for key in (source, target))
        if one is not None and other is not None and one is not other and target.endswith(".weight"):
            one.modules.update(other.modules)
            one.left = one.left or other.left
            by_name.update(dict.fromkeys(other.modules, one))
    weights = list({id(weight): weight for weight in by_name.values()}.values())
    for weight in weights:
        own = tuple(f"{name}." for name in weight.modules)
        beside = [place for one in weight.originals for place in shared.get(id(one), ()) if not place.startswith(own)]
        if beside and not weight.left:
            weight.left = f"shared with {beside[0]}, which is no such layer"
        if all(name in adapters for name in weight.modules):
            weight.left = ADAPTER
    return weights


ADAPTER = "of an adapter"
OWN_CLASS = "of a class with methods of its own"

# What a subclass may define and still be the layer it inherits from.
_HARMLESS = {
    "__init__", "__module__", "__doc__", "__qualname__", "__annotations__", "__annotate__", "__annotate_func__", "__constants__",
    "__firstlineno__", "__static_attributes__", "__parameters__", "__orig_bases__", "__dict__", "__weakref__", "__slots__",
    "extra_repr", "__repr__", "reset_parameters", "_init_weights",
}  # fmt: skip


def plain_class(module: nn.Module) -> type[nn.Module]:
    """Its class, without what torch.nn.utils.parametrize put over it."""
    return type(module).__mro__[1] if parametrize.is_parametrized(module) else type(module)


def _reason(module: nn.Module, kind: Kind, first: Kind) -> str:
    """Why a layer must stay as it is, "" where it can be quantized."""
    weight = module._parameters.get("weight")
    if isinstance(weight, UninitializedTensorMixin):
        return "not initialized yet: run a batch through the model first"
    cls = plain_class(module)
    between = cls.__mro__[: cls.__mro__.index(kind.plain)]
    if any(name not in _HARMLESS for one in between for name in vars(one)):
        return OWN_CLASS
    if kind.matrix is not first.matrix:
        return "shared by layers that store it differently"
    if isinstance(module, nn.Embedding):
        if module.max_norm is not None:
            return "an embedding with max_norm, which changes its weight in forward"
        if module.sparse:
            return "an embedding with sparse gradients, which a codebook does not have"
    if isinstance(module, nn.Conv1d):
        if module.kernel_size != (1,) or module.stride != (1,) or module.groups != 1:
            return "a convolution that is grouped, strided or wider than 1"
        if module.padding not in ((0,), "valid", "same"):
            return "a convolution with padding"
    if weight is not None:
        if type(weight) not in PLAIN_TENSORS:
            return f"of a weight that is a {type(weight).__name__}"
        if not weight.is_floating_point() or weight.element_size() < 2:
            return f"of a weight that is {str(weight.dtype).removeprefix('torch.')}"
        if weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None):
            return "with a hook on the gradient of the weight"
    if any(not _of_torch(hook) for hooks in map(vars(module).get, _STATE_HOOKS) for hook in (hooks or {}).values()):
        return "with a hook on its state dict"
    own = {*module._parameters, *module._buffers} - {"weight", "bias"} - hook_tensors(module)
    own |= module._modules.keys() - {"parametrizations"}
    if parametrize.is_parametrized(module):
        own |= set(module.parametrizations) - {"weight", "bias"}  # type: ignore[arg-type]  # a ModuleDict
    if own:
        return f"with tensors or layers of its own ({min(own)})"
    if "forward" in vars(module):
        return "with a forward put on it (as accelerate does for offloading)"
    clash = next((name for name in own_attributes(module, kind) if hasattr(kind.packed, name) or name in ATTRIBUTES), None)
    return f"with an attribute {clash} that the quantized layer has, too" if clash else ""


_STATE_HOOKS = ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")


def _of_torch(hook: Any) -> bool:
    """Whether it belongs to one of torch's norms of weights, which is resolved."""
    inner = getattr(hook, "hook", hook)
    return (getattr(inner, "__module__", None) or type(inner).__module__).startswith("torch.nn.utils.")


PLAIN_TENSORS: tuple[type, ...] = (nn.Parameter, Tensor)  # what another class of tensor means by its values is not known

# Attributes that codebook modules have by themselves.
ATTRIBUTES = frozenset(
    {"rows", "cols", "bits", "group_rows", "grad_reduction", "ahead", "_inverse_counts", "bias", *CodebookModule.__annotations__}
)


def own_attributes(module: nn.Module, kind: Kind) -> dict[str, Any]:
    """What somebody has put on a layer: attributes that such a layer does not have by itself."""
    known = kind.standard | hook_tensors(module)
    return {name: value for name, value in vars(module).items() if name not in known}


def _places(model: nn.Module) -> dict[int, list[str]]:
    """Names of each parameter, by identity."""
    places: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places.setdefault(id(parameter), []).append(name)
    return places


# Libraries of adapters, where their modules are defined, and the children that belong to the model they are put on.
_ADAPTER_CODE = ("peft.", "adapters.methods.", "adapters.heads.", "adapters.composition")
_NOT_ADAPTED = ("base_model", "base_layer", "original_module", "model")


def _adapter_names(model: nn.Module) -> set[str]:
    """Names of all modules that another library trains and saves beside the model."""
    modules = dict(model.named_modules(remove_duplicate=False))
    inside: dict[str, bool] = {"": False}
    for name in modules:
        if not name:
            continue
        parent, _, child = name.rpartition(".")
        if f"{type(modules[parent]).__module__}.".startswith(_ADAPTER_CODE):
            inside[name] = child not in _NOT_ADAPTED
        else:
            inside[name] = inside[parent] or child.startswith("lora_")
    return {name for name, is_adapter in inside.items() if is_adapter}

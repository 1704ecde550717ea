"""optimize_: the fastest way to run a packed encoder on this CPU.

A known encoder (see encoder.py) gets a class of the same name whose forward tries the compiled code and else is the ordinary one;
for int8, so does every packed linear layer outside of one. Parameters and their names stay as they are: nothing stored changes.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import threading
import warnings
import weakref
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import ops
from .encoder import Unlike, describe, known, known_class, pooled
from .encoder_weights import Watched, integer_form_of, packed_layers
from .fp8 import compute_as_before, compute_in_fp8
from .linear import CodebookLinear

_COMPUTES = ("float", "int8", "fp8")


class Int8CodebookLinear(CodebookLinear):
    """A CodebookLinear that computes in integers where nothing is differentiated: on the CPU, in evaluation, no gradients."""

    def forward(self, input: Tensor) -> Tensor:
        if (
            self.training
            or torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or input.dtype not in (torch.float32, torch.bfloat16, torch.float16)
            or input.device.type != "cpu"
            or self.packed.device.type != "cpu"
            or self.cols > ops.INT8_COLS
        ):
            return super().forward(input)
        if torch.is_autocast_enabled("cpu"):
            input = input.to(torch.get_autocast_dtype("cpu"))
        form = integer_form_of(self)
        return ops.int8_linear(input, self.packed, bias=self.bias, group_rows=self.group_rows, **form._asdict())


class _Plan:
    """The compiled form of an encoder, or the reason why there is none, as long as nothing about its modules changes."""

    def __init__(self, model: nn.Module, compute: str) -> None:
        self.watched = Watched(model.modules())  # before the weights are read: a change meanwhile is seen next time
        self.encoder: Any = None
        self.reason: str | None = None
        try:
            self.encoder = ops.compile_encoder(describe(model, compute))
        except Unlike as error:
            self.reason = str(error)
        self.dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


_plans: weakref.WeakKeyDictionary[nn.Module, _Plan] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def _plan_of(model: nn.Module, compute: str) -> _Plan:
    plan = _plans.get(model)
    if plan is None or not plan.watched.same():
        with _lock:
            plan = _plans[model] = _Plan(model, compute)
    return plan


def _global_hooks() -> bool:
    module = torch.nn.modules.module
    return bool(module._global_forward_hooks or module._global_forward_pre_hooks)


def _run(model: Any, compute: str, ids: tuple[str, ...], outputs: str, given: dict[str, Any]) -> Any:
    """The output of the encoder in one call, None where the ordinary forward has to run."""
    if torch.compiler.is_compiling() or model.training or torch.is_autocast_enabled("cpu") or _global_hooks():
        return None
    config, mask = model.config, given.pop("attention_mask", None)
    tensors = [given.pop(name, None) for name in ids]
    if given.pop("return_dict", None) is False or not getattr(config, "return_dict", True):
        return None
    for name in ("output_attentions", "output_hidden_states"):
        asked = given.pop(name, None)
        if getattr(config, name, False) if asked is None else asked:
            return None
    if any(value is not None and value is not False for value in given.values()) or not _usual(tensors):
        return None
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.shape != tensors[0].shape or mask.device.type != "cpu":
            return None
        mask = mask.bool()
        if not bool(mask[:, 0].all()):  # heads take the first state, and a text without a token has none
            return None
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in model.parameters()):
        warnings.warn(
            "optimize_: gradients are being recorded, so the ordinary forward runs; call the model under torch.inference_mode()",
            stacklevel=4,
        )
        return None
    plan = _plan_of(model, compute)
    if plan.encoder is None or not plan.watched.plain():
        return None
    states = plan.encoder.run(tensors, mask)
    if states.dtype != plan.dtype:
        states = states.to(plan.dtype)
    made = getattr(importlib.import_module("transformers.modeling_outputs"), outputs)
    return made(last_hidden_state=states, **pooled(model, states))


def _usual(ids: list[Any]) -> bool:
    """Whether ids are integers (batch, length) on the CPU, or absent, the first ones excepted; one row stands for the batch."""
    first = ids[0]
    if not isinstance(first, Tensor) or first.dim() != 2 or first.numel() == 0:
        return False
    for tensor in ids:
        if tensor is None:
            continue
        if tensor.dtype not in (torch.int64, torch.int32) or tensor.device.type != "cpu" or tensor.dim() != 2:
            return False
        if tensor.shape[1] != first.shape[1] or tensor.shape[0] not in (1, first.shape[0]):
            return False
    return True


class FastEncoder:
    """Mixed into the class of an encoder: a forward that runs it in one call where it can."""

    ordinary: type[nn.Module]
    compute: str


@functools.cache
def _fast(cls: Any, compute: str) -> type:
    """The class of a known encoder that computes fast; it goes by the name of the ordinary one."""
    names = tuple(inspect.signature(cls.forward).parameters)[1:]
    found = known_class(cls)
    assert found is not None
    _, ids, outputs = found

    @functools.wraps(cls.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if len(args) <= len(names):
            out = _run(self, compute, ids, outputs, {**dict(zip(names, args, strict=False)), **kwargs})
            if out is not None:
                return out
        return cls.forward(self, *args, **kwargs)

    def reduce(self: Any, protocol: Any) -> Any:
        return _empty, (cls, compute), self.__dict__

    facts = {"forward": forward, "__reduce_ex__": reduce, "ordinary": cls, "compute": compute, "__doc__": cls.__doc__}
    facts |= {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (FastEncoder, cls), facts)


def _empty(cls: type, compute: str) -> Any:
    """For pickle and deepcopy: an object of the fast class, to be filled."""
    fast: Any = _fast(cls, compute)
    return fast.__new__(fast)


def optimize_(model: Any, compute: str | None = "float") -> Any:
    """Makes a packed model run as fast as this CPU allows, in place, for inference; nothing that is stored changes.

    model: a torch module, or anything with modules inside such as a SentenceTransformer or CrossEncoder, whose linear layers were
    packed by `quantize_`. compute: "float" computes in fp32; "int8" rounds codebooks, and the inputs of linear layers row by row,
    to 8 bits (`ops.int8_linear`; what it costs and gains: results/encoders_cpu_int8.md); None undoes it. These two are for the
    CPU. "fp8" is for CUDA devices from compute capability 8.9:
    packed linear layers multiply E4M3 numbers, inputs rounded row by row and each codebook with one scale, an error of 2 to 4 per
    cent of a layer's output; layers stay as they are in training mode, while gradients are recorded and under torch.compile.

    BERT, RoBERTa, XLM-RoBERTa, CamemBERT, ELECTRA, DistilBERT, ALBERT, MPNet and ModernBERT encoders of transformers, and models
    around them, run in one call of compiled code, which computes tokens only: states of places that the attention mask leaves out
    are zeros. In other models, int8 makes the packed linear layers compute in integers; a warning says what stays as it was.

    The ordinary forward runs in training mode, while gradients are recorded, under torch.compile, torch.export and autocast,
    with hooks, for output_attentions, output_hidden_states, inputs_embeds, masks of more than two dimensions or that leave out a
    text's first place, and on other devices. Weights may change between calls, also by steps of a torch.optim.Optimizer; only
    writes that autograd does not count, through `.data` or by kernels of one's own, are not seen.

    Returns the model. Raises ValueError for another `compute`, or a model without packed layers; RuntimeError where the extension
    was not built.
    """
    if compute is not None and compute not in _COMPUTES:
        raise ValueError(f"compute: expected 'float', 'int8', 'fp8' or None, got {compute!r}")
    root = model if isinstance(model, nn.Module) else getattr(model, "model", None)  # a CrossEncoder of older releases has one
    if not isinstance(root, nn.Module):
        raise TypeError(f"model: expected a torch module, or an object with one as `model`, got {type(model).__name__}")
    if compute is not None and not packed_layers(root):
        raise ValueError("model: expected packed layers; quantize_ makes them")
    if compute == "fp8":
        _restore(root)
        compute_in_fp8(root)
        return model
    if compute is not None and not ops.has_compiled_encoder():
        raise RuntimeError("optimize_: the extension was not built, see build_info()")
    _restore(root)
    if compute is not None:
        _speed_up(root, compute)
    return model


def _restore(root: nn.Module) -> None:
    compute_as_before(root)
    for module in root.modules():
        if isinstance(module, FastEncoder):
            module.__class__ = module.ordinary  # type: ignore[assignment]  # the class that this one was made of
        elif type(module) is Int8CodebookLinear:
            module.__class__ = CodebookLinear  # type: ignore[assignment]  # whose subclass it is


def _speed_up(root: nn.Module, compute: str) -> None:
    inside: set[nn.Module] = set()  # what runs within compiled encoders
    reasons = []
    for module in root.modules():
        if known(module) is None or module in inside:
            continue
        plan = _plans[module] = _Plan(module, compute)
        if plan.reason is not None:
            reasons.append(f"{type(module).__name__}: {plan.reason}")
            continue
        module.__class__ = _fast(cast(Any, type(module)), compute)
        pooler = getattr(module, "pooler", None)
        inside |= set(module.modules()) - (set(pooler.modules()) if isinstance(pooler, nn.Module) else set())
    if compute == "int8":
        for module in root.modules():
            if type(module) is CodebookLinear and module not in inside:
                module.__class__ = Int8CodebookLinear
    if not inside:
        kept = "its packed linear layers compute in integers, all else" if compute == "int8" else "everything"
        why = f" ({'; '.join(dict.fromkeys(reasons))})" if reasons else ""
        warnings.warn(f"optimize_: no encoder that runs in one call was found{why}: {kept} stays as it was", stacklevel=3)

"""Which weights of a model are quantized, and with how many bits; what is said about those that are not."""

from __future__ import annotations

import dataclasses
import difflib
import warnings
from collections.abc import Iterator

from torch import nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

from ..layers import CodebookModule
from .config import KMQConfig, name_matches
from .foreign import ELSEWHERE, HELD, REDUCERS, held_elsewhere, read_elsewhere
from .heads import classification_layers
from .weights import OWN_CLASS, Weight, find_weights, kind_of

SKIPPED = "named in `skip`"
TIED = "sharing a weight with a layer named in `skip`"
HEAD = "a classification layer"
SHARE = 0.05  # of the matrix weights: what is said when more than this stays
NAMED = 3  # layers that a sentence names before it counts the rest


@dataclasses.dataclass
class Plan:
    """Every weight of a model that could be quantized, in the order of the model, and what becomes of it."""

    weights: list[Weight]
    unmatched: list[str]  # patterns of the configuration that match no such layer

    @property
    def quantized(self) -> list[Weight]:
        """Those that are."""
        return [weight for weight in self.weights if weight.bits is not None]

    @property
    def left(self) -> list[str]:
        """Names of the layers that stay as they are."""
        return [name for weight in self.weights if weight.bits is None for name in weight.modules]


def plan(model: nn.Module, config: KMQConfig) -> Plan:
    """Decides from names, types and attributes (the model may be on the meta device) which weights are quantized and how.

    Raises ValueError where `model` is itself a layer, which nobody could replace in place, and where `module_bits` gives layers
    that share a weight different bits.
    """
    if kind_of(model) is not None or isinstance(model, CodebookModule):
        raise ValueError(
            f"model: a {type(model).__name__} by itself cannot be replaced in place; put it in a module, such as nn.Sequential"
        )
    weights, heads = find_weights(model), classification_layers(model)
    prefix = getattr(model, "base_model_prefix", "")
    prefix = prefix if isinstance(prefix, str) and prefix and not hasattr(model, prefix) else ""

    def names(layer: str) -> list[str]:
        """What patterns can match: in a base model also the name that a layer has below a task's class."""
        return [layer, f"{prefix}.{layer}"] if prefix else [layer]

    elsewhere, held = read_elsewhere(model), held_elsewhere(model)
    for weight in weights:
        if not elsewhere.isdisjoint(weight.modules):
            weight.left = weight.left or ELSEWHERE
        if not held.isdisjoint(weight.modules):
            weight.left = weight.left or HELD
        if weight.left:
            continue
        given = {layer: bits for layer in weight.modules for bits, said in map(config.bits_for, names(layer)[::-1]) if said}
        if len(set(given.values())) > 1:
            (one, bits), (other, others) = list(given.items())[:2]
            raise ValueError(f"module_bits: {one} and {other} share a weight, got {bits} bits for one and {others} for the other")
        skipped = [any(name_matches(p, name) for p in config.skip or [] for name in names(layer)) for layer in weight.modules]
        if given:
            weight.bits, weight.given = next(iter(given.values())), True
        elif any(skipped):
            weight.left = SKIPPED if all(skipped) else TIED
        elif heads.issuperset(weight.modules):
            weight.left = HEAD  # one tied to an embedding goes with the embedding
        else:
            weight.bits = config.bits
    known = [name for weight in weights for layer in weight.modules for name in names(layer)]
    patterns = [*(config.skip or []), *(config.module_bits or {})]
    return Plan(weights, [pattern for pattern in patterns if not any(name_matches(pattern, name) for name in known)])


def refuse_unmatched(chosen: Plan, config: KMQConfig, model: str) -> None:
    """Raises ValueError for a pattern of the configuration that matches no layer, with the names that are nearest to it.

    model: what the sentence calls the model.
    """
    if not chosen.unmatched:
        return
    pattern = chosen.unmatched[0]
    names = [name for weight in chosen.weights for name in weight.modules]
    parts = dict.fromkeys(part for name in names for part in name.split(".") if not part.isdecimal())
    near = difflib.get_close_matches(pattern, [*parts, *names], n=3, cutoff=0.5)
    nearest = f"; nearest: {', '.join(near)}" if near else f"; its layers are {_list(names)}"
    argument = "skip" if pattern in (config.skip or []) else "module_bits"
    raise ValueError(f"{argument}: {pattern!r} matches no embedding or linear layer of {model}{nearest}")


def remarks(model: nn.Module, chosen: Plan) -> list[str]:
    """Sentences about what the caller may not expect: patterns without a match, layers that stay, norms that are resolved."""
    said = []
    if chosen.unmatched:
        said.append(f"skip, module_bits: {_list(map(repr, chosen.unmatched))} matches no embedding or linear layer of the model")
    reasons: dict[str, list[str]] = {}
    for weight in chosen.weights:
        if weight.left not in ("", SKIPPED, HEAD, OWN_CLASS):
            reasons.setdefault(weight.left, []).extend(weight.modules)
    if reasons:
        parts = [f"{_list(layers)} ({reason})" for reason, layers in reasons.items()]
        said.append(f"layers that stay as they are: {'; '.join(parts)}")
    if resolved := {name: weight.computed for weight in chosen.quantized if weight.computed for name in weight.modules}:
        said.append(f"{_list(resolved)}: the weight is quantized as {next(iter(resolved.values()))} gives it, which is then gone")
    if share := _share_left(model, chosen):
        said.append(share)
    wrapped = [type(module).__name__ for module in model.modules() if type(module).__name__ in REDUCERS]
    if wrapped:
        said.append(f"{wrapped[0]}: it was built on the weights that are replaced now and does not reduce the gradients of")
        said[-1] += " codebooks; to train, quantize the model before it is wrapped"
    return said


def warn(model: nn.Module, chosen: Plan) -> None:
    """Says the remarks, each as one warning, at the caller of quantize_."""
    for sentence in remarks(model, chosen):
        warnings.warn(sentence, stacklevel=3)


def _list(names: Iterator[str] | list[str] | dict[str, str]) -> str:
    """The first few, and how many more."""
    every = list(names)
    more = f" and {len(every) - NAMED} more" if len(every) > NAMED else ""
    return ", ".join(every[:NAMED]) + more


def _share_left(model: nn.Module, chosen: Plan) -> str:
    """What share of the values in matrices stays as it is, and where; "" where it is small or asked for by `skip`."""
    done = {id(original) for weight in chosen.quantized for original in weight.originals}
    asked = {id(original) for weight in chosen.weights if weight.left == SKIPPED for original in weight.originals}
    sizes: dict[str, int] = {}
    total = 0
    seen = set()
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is None or id(parameter) in seen or _dim(parameter) < 2:
                continue
            seen.add(id(parameter))
            total += parameter.numel()
            if id(parameter) not in done | asked:
                called = f"{name} ({type(module).__name__})"
                sizes[called] = sizes.get(called, 0) + parameter.numel()
    left = sum(sizes.values())
    if left <= SHARE * total:
        return ""
    return f"{left / total:.0%} of the matrix weights stay in floating point: {_list(sorted(sizes, key=sizes.__getitem__)[::-1])}"


def _dim(parameter: nn.Parameter) -> int:
    uninitialized = isinstance(parameter, UninitializedTensorMixin)
    return 0 if uninitialized or not parameter.is_floating_point() else parameter.dim()

"""What the compiled encoder and the integer linear layer make of the stored parameters, and when it has to be made again."""

from __future__ import annotations

import functools
import operator
import threading
import weakref
from collections.abc import Iterable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from .. import ops, packing
from .codebook import CodebookModule
from .embedding import CodebookEmbedding
from .linear import CodebookLinear

# Attributes of modules, beside their tensors, that the compiled code has taken over or takes for usual.
SETTINGS = ("eps", "scaling", "padding_idx", "approximate", "num_attention_heads", "attention_head_size", "n_heads")


class Watched:
    """Modules, their parameters, buffers and settings as they were; `same()` says whether nothing about them has changed since.

    In-place writes are seen by the version that autograd counts, so those through `.data` are not, as autograd does not see them.
    Fused optimizers do not count theirs, so a step of any torch.optim.Optimizer that has one of the parameters is noted, too.
    Parameters made under torch.inference_mode have no version: they never count as the same.
    """

    _alive: ClassVar[weakref.WeakSet[Watched]] = weakref.WeakSet()
    _alive_lock = threading.Lock()

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._modules = [module.__dict__ for module in modules]
        self._children = _Members([module["_modules"] for module in self._modules])
        self._stored = _Members([module[kind] for module in self._modules for kind in ("_parameters", "_buffers")])
        self._settings = _Members(self._modules, SETTINGS)
        self._tensors = [tensor for tensor in self._stored.values if tensor is not None]
        self._tracked = not any(tensor.is_inference() for tensor in self._tensors)
        self._states = self._state() if self._tracked else []
        self._ids = frozenset(map(id, self._tensors))
        self._stepped = False
        _watch_optimizers()
        with self._alive_lock:
            self._alive.add(self)

    def _state(self) -> list[Any]:
        return [tensor._version for tensor in self._tensors] + [tensor.data_ptr() for tensor in self._tensors]

    def same(self) -> bool:
        known = self._children.same() and self._stored.same() and self._settings.same()
        return known and self._tracked and not self._stepped and self._state() == self._states

    @classmethod
    def note_step(cls, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """What has a parameter of the optimizer is not the same any more."""
        with cls._alive_lock:
            alive = list(cls._alive)
        trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]} if alive else set()
        for watched in alive:
            if not watched._stepped and not trained.isdisjoint(watched._ids):
                watched._stepped = True

    def plain(self) -> bool:
        """Whether the modules are in evaluation mode and have neither hooks nor a forward method of their own."""
        return not any(
            module["training"] or module["_forward_hooks"] or module["_forward_pre_hooks"] or "forward" in module
            for module in self._modules
        )


@functools.cache
def _watch_optimizers() -> None:
    register_optimizer_step_post_hook(Watched.note_step)


class _Members:
    """The values of some dictionaries as they were, all or those of some names. Written for speed: asked before every call."""

    def __init__(self, owners: list[dict[str, Any]], names: tuple[str, ...] | None = None) -> None:
        self._owners, self._sizes = ([], []) if names else (owners, [len(owner) for owner in owners])
        members = [(owner, name, value) for owner in owners for name, value in owner.items() if names is None or name in names]
        self._owner_of = [owner for owner, _, _ in members]
        self._names = [name for _, name, _ in members]
        self.values = [value for _, _, value in members]

    def same(self) -> bool:
        now = map(dict.get, self._owner_of, self._names)
        return list(map(len, self._owners)) == self._sizes and all(map(operator.is_, now, self.values))


class IntegerForm(NamedTuple):
    """Arguments of ops.int8_linear, by their names there."""

    table: Tensor
    factor: Tensor
    row_sum: Tensor
    outlier_index: Tensor | None
    outlier_delta: Tensor | None


def _weights_at(layer: CodebookLinear, entries: Tensor) -> tuple[Tensor, Tensor]:
    """Positions (n,) int32, ascending, and values (n,) fp32 of the weights whose entry (G, K) of the codebook is marked."""
    positions, values = [], []
    for book in entries.any(1).nonzero().flatten().tolist():
        begin, end = book * layer.group_rows, min((book + 1) * layer.group_rows, layer.rows)
        index = ops.unpack(layer.packed[begin:end], layer.bits, layer.cols).long()
        row, col = entries[book][index].nonzero(as_tuple=True)
        value = layer.codebook[book].float()[index[row, col]]
        positions.append((begin + row) * layer.cols + col)
        values.append(value if layer.row_scale is None else value * layer.row_scale[begin + row].float())
    return torch.cat(positions).int(), torch.cat(values)


@torch.no_grad()
def integer_form(layer: CodebookLinear) -> IntegerForm:
    """The weight of a layer in integers; its outliers as what is missing from the integers."""
    table, scale, row_sum = ops.int8_codebook(layer.packed, layer.codebook, layer.cols, group_rows=layer.group_rows)
    factor = scale.repeat_interleave(layer.group_rows)[: layer.rows]
    if layer.row_scale is not None:
        factor = factor * layer.row_scale.float()
    index: Tensor | None = layer.outlier_index
    values: Tensor | None = layer.outlier_values
    # What the table leaves out; a stored outlier stands above its codebook's entry.
    left_out = (table == 0) & (layer.codebook.abs() > 64 * scale[:, None])
    if left_out.any():
        found, entries = _weights_at(layer, left_out)
        if index is not None and values is not None:
            new = ~torch.isin(found, index)
            found, entries = torch.cat([index, found[new]]), torch.cat([values.float(), entries[new]])
        index, order = found.sort()
        values = entries[order]
    delta = None
    if index is not None and values is not None:
        row, col = index.long().div(layer.cols, rounding_mode="floor"), index.long() % layer.cols
        book = row.div(layer.group_rows, rounding_mode="floor")
        integers = table[book, packing.take(layer.packed, layer.bits, row, col)]
        delta = values.float() - integers * factor[row]
    return IntegerForm(table, factor, row_sum, index, delta)


_forms: weakref.WeakKeyDictionary[CodebookLinear, tuple[Watched, IntegerForm]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def integer_form_of(layer: CodebookLinear) -> IntegerForm:
    """As `integer_form`, kept until a parameter of the layer changes."""
    kept = _forms.get(layer)
    if kept is None or not kept[0].same():
        with _lock:
            watched = Watched([layer])  # before it is read: a change meanwhile is seen next time
            kept = _forms[layer] = (watched, integer_form(layer))
    return kept[1]


def describe_linear(layer: CodebookLinear, compute: str) -> dict[str, Any]:
    """A linear layer as the compiled encoder takes it."""
    facts: dict[str, Any] = dict.fromkeys(
        ("codebook", "table", "factor", "row_sum", "row_scale", "bias", "outlier_index", "outlier_delta")
    )
    facts |= {"packed": layer.packed.detach(), "group_rows": layer.group_rows}
    if layer.bias is not None:
        facts["bias"] = layer.bias.detach()
    if compute == "int8" and layer.cols <= ops.INT8_COLS:
        return facts | integer_form_of(layer)._asdict()
    facts["codebook"] = layer.codebook.detach()
    if layer.row_scale is not None:
        facts["row_scale"] = layer.row_scale.detach()
    with torch.no_grad():
        added = layer._added(layer.codebook.float())
    if added is not None:
        facts["outlier_index"], facts["outlier_delta"] = added
    return facts


def describe_embedding(module: nn.Module, ids: str) -> dict[str, Any] | None:
    """An embedding as the compiled encoder takes it, None for one that it does not know. ids: given, columns or counted."""
    facts: dict[str, Any] = {"ids": ids, "dense": None}
    if type(module) is nn.Embedding:
        return None if module.max_norm is not None else facts | {"dense": module.weight.detach()}
    if type(module) is not CodebookEmbedding:
        return None
    names = ("packed", "codebook", "row_scale", "outlier_index", "outlier_values")
    stored = {name: None if (tensor := getattr(module, name)) is None else tensor.detach() for name in names}
    return facts | stored | {"cols": module.cols, "group_rows": module.group_rows}


def packed_layers(model: nn.Module) -> list[CodebookModule]:
    return [module for module in model.modules() if isinstance(module, CodebookModule)]

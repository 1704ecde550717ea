"""Forward passes over calibration batches: what reaches a layer, with or without what stands for weights so far."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..files import one_line
from .weights import Weight

Batch = dict[str, Any]
HELD_OUT, MOST_HELD_OUT = 5, 8  # every fifth batch, but no more than so many


_WRONG = (TypeError, ValueError, AttributeError, LookupError, RuntimeError)


class _Enough(Exception):
    """What was asked of a forward pass is there."""


def read_batches(batches: Iterable[Batch] | None) -> tuple[list[Batch], list[Batch]]:
    """The batches to fit to and those to judge by (every fifth, or eight), without labels; few batches are cut into smaller ones.

    Raises ValueError where there is none, or one that is no dictionary of tensors.
    """
    if batches is None:
        raise ValueError("calibration: objective 'output' needs batches of unlabelled texts, got none")
    given = []
    for batch in batches:
        if not isinstance(batch, Mapping) or not all(isinstance(value, Tensor) for value in batch.values()):
            wanted = "dictionaries of the model's arguments, such as input_ids and attention_mask"
            raise ValueError(f"calibration: expected {wanted}, got {type(batch).__name__}")
        kept = {name: value for name, value in batch.items() if name not in ("labels", "label")}
        if _length(kept) != 0:
            given.append(kept)
    if not given:
        raise ValueError("calibration: expected at least one batch of texts, got none")
    while len(given) < HELD_OUT and max(map(_length, given)) > 1:
        i = max(range(len(given)), key=lambda i: _length(given[i]))
        half = _length(given[i]) // 2
        given[i : i + 1] = [
            {name: value[part] for name, value in given[i].items()} for part in (slice(None, half), slice(half, None))
        ]
    apart = max(HELD_OUT, -(-len(given) // MOST_HELD_OUT))
    judged = given[apart - 1 :: apart] or given[-1:]
    fitted = [batch for batch in given if not any(batch is other for other in judged)]
    return fitted or given, judged


def _length(batch: Batch) -> int:
    """Texts in a batch; 1 where that cannot be told."""
    lengths = {value.shape[0] if value.dim() else -1 for value in batch.values()}
    return lengths.pop() if len(lengths) == 1 and min(lengths) >= 0 else 1


def token_weights(batch: Batch, shape: torch.Size) -> Tensor | None:
    """A weight (tokens,) for each vector of an activation (..., width): 0 for padding, so that every text weighs 1.

    None where the activation has not one vector a token.
    """
    mask = batch.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or shape[:-1] != mask.shape:
        return None
    weight = mask.float()
    return (weight / weight.sum(1, keepdim=True).clamp_min(1)).reshape(-1)


def layers_of(weight: Weight) -> list[nn.Module]:
    """The layers that have a weight, each once; of one that an embedding and a linear layer share, those of its own kind."""
    layers = {id(module): module for module in weight.modules.values() if isinstance(module, weight.kind.plain)}
    return list(layers.values())


class Group(NamedTuple):
    """Weights whose layers get the same inputs, and how many times they are called in a forward pass.

    norm: where there is one such layer, called once, the normalization that gets its output with something added.
    """

    weights: list[Weight]
    calls: int
    norm: nn.Module | None = None

    @property
    def layers(self) -> list[nn.Module]:
        """The layers of the first weight; they get what those of the others get."""
        return layers_of(self.weights[0])


class Passes:
    """Forward passes of a model over batches, with or without what stands for its weights.

    stand_in: what a weight is replaced with, if it is: its value as the layer stores it, or those rows of it that an embedding
    asks for, and the bias or None. It is asked when a layer runs, so that one decoded weight is in memory at a time. A pass ends
    where all that was asked of it is there. What the layers of a stack (an nn.ModuleList whose members run one after the other)
    give is kept where it takes less memory than the model (twice that for a moment), so that the layers before the one in work
    are not computed again.
    """

    def __init__(
        self,
        model: nn.Module,
        fitted: list[Batch],
        judged: list[Batch],
        stand_in: Callable[[Weight, Tensor | None], tuple[Tensor, Tensor | None] | None],
    ) -> None:
        self.model, self.device = model, next(model.parameters()).device
        self.batches = [{name: value.to(self.device) for name, value in batch.items()} for batch in (*fitted, *judged)]
        self.fitted = range(len(fitted))
        self.judged = range(len(fitted), len(self.batches))
        self._stand_in = stand_in
        self._weights: list[Weight] = []
        self.uncalled: list[Weight] = []  # whose layers do not run; the model may read them all the same
        self._stack: list[nn.Module] = []
        self._passed = 0
        self._kept: dict[tuple[int, bool], Any] = {}

    def groups(self, weights: list[Weight]) -> list[Group]:
        """The weights whose layers run, in the order in which they first do.

        Raises ValueError where the model does not take the batches.
        """
        self._weights = weights
        of = {id(module): i for i, weight in enumerate(weights) for module in layers_of(weight)}
        stacks = [module for module in self.model.modules() if isinstance(module, nn.ModuleList) and len(module) > 1]
        watched = [module for module in self.model.modules() if id(module) in of or _is_norm(module)]
        watched += [module for stack in stacks for module in stack]
        calls: list[tuple[nn.Module, Any]] = []  # the inputs, too: an id stands for one tensor only while that lives

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            calls.append((module, _first(args, kwargs)))

        hooks = [module.register_forward_pre_hook(before, with_kwargs=True) for module in {id(m): m for m in watched}.values()]
        self._run(0, False, hooks)
        self._look_up(next((module for module, _ in calls if id(module) in of and not isinstance(module, nn.Embedding)), None))
        for stack in stacks:
            run = [module for module, _ in calls if any(module is one for one in stack)]
            in_order = len(run) == len(stack) and all(a is b for a, b in zip(run, stack, strict=True))
            if in_order and not any("forward" in vars(module) for module in stack):
                self._stack = list(stack)
                break
        inputs: dict[int, list[int]] = {}
        for module, given in calls:
            if id(module) in of:
                inputs.setdefault(of[id(module)], []).append(id(given))
        self.uncalled = [weight for i, weight in enumerate(weights) if i not in inputs]
        found: dict[tuple[Any, ...], Group] = {}
        for i, ids in inputs.items():
            group = found.setdefault((weights[i].kind.plain, *ids), Group([], len(ids)))
            group.weights.append(weights[i])
        return [group._replace(norm=self._norm(group, [module for module, _ in calls])) for group in found.values()]

    def _look_up(self, first: nn.Module | None) -> None:
        """Runs every batch as far as `first`, before any work, for ids that have no embedding and texts that are too long."""

        def before(module: nn.Module, args: Any) -> None:
            raise _Enough

        for number in range(1, len(self.batches)):
            self._run(number, False, [] if first is None else [first.register_forward_pre_hook(before)])

    def _norm(self, group: Group, order: list[nn.Module]) -> nn.Module | None:
        """The next normalization, if its input is the output of the group's layer and something added: seen from one pass more,
        in which the output is another."""
        if len(group.weights) > 1 or group.calls > 1:
            return None
        layer = next(module for module in group.layers if any(module is one for one in order))
        norm = next((module for module in order[order.index(layer) :] if _is_norm(module)), None)
        if norm is None or order.count(norm) > 1:
            return None
        seen: list[Tensor] = []

        def after(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            seen.append(torch.linspace(-1, 1, output.shape[-1], device=output.device, dtype=output.dtype) * len(seen))
            return output + seen[-1]

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            seen.append(_first(args, kwargs))
            raise _Enough

        for _ in range(2):
            hooks = [layer.register_forward_hook(after), norm.register_forward_pre_hook(before, with_kwargs=True)]
            self._run(0, False, hooks)
        (_, plain, added, moved) = seen
        if plain.shape != moved.shape or plain.shape[-1:] != added.shape:
            return None
        scale = float(plain.abs().max()) + float(added.abs().max())
        return norm if float((moved - plain - added).abs().max()) <= 1e-3 * scale else None

    def output(self, number: int, replaced: bool) -> Any:
        """What the model gives for a batch."""
        return self._run(number, replaced, [])

    def inputs(self, number: int, replaced: bool, group: Group) -> tuple[list[Tensor], Tensor | None]:
        """What reaches the layers of a group with a batch, one a call; and what is added to the output before the norm."""
        seen: list[Tensor] = []
        outputs: list[Tensor] = []

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            seen.append(_first(args, kwargs))
            if len(seen) == group.calls + (group.norm is not None):
                raise _Enough

        hooks = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in group.layers]
        if group.norm is not None:
            hooks += [
                layer.register_forward_hook(lambda module, args, output: outputs.append(output.clone())) for layer in group.layers
            ]
            hooks.append(group.norm.register_forward_pre_hook(before, with_kwargs=True))
        self._run(number, replaced, hooks)
        added = seen[-1] - outputs[0] if outputs and len(seen) > group.calls else None
        return seen[: group.calls], added

    def advance(self, group: Group) -> None:
        """Goes on to a group: computes what the layers of the stack before it give, for the passes to come."""
        inside = [i for i, block in enumerate(self._stack) if any(module is group.layers[0] for module in block.modules())]
        wanted = [(number, True) for number in range(len(self.batches))] + [(number, False) for number in self.fitted]
        while inside and self._passed < inside[0]:
            kept = self._given(wanted)
            if kept is None or not self._takes(kept):
                self._stack = self._stack[: self._passed]
                return

    def forget(self) -> None:
        """Goes back to the beginning: what stands for weights is about to be another."""
        self._passed, self._kept = 0, {}

    def _given(self, wanted: list[tuple[int, bool]]) -> dict[tuple[int, bool], Any] | None:
        """What the next layer of the stack gives for batches without and with what stands for weights, or None where that would
        take more memory than the model."""
        kept: dict[tuple[int, bool], Any] = {}
        left = sum(p.numel() * p.element_size() for p in self.model.parameters())
        for one in wanted:
            kept[one] = self._block(*one)
            left -= _bytes(kept[one])
            if left < 0:
                return None
        return kept

    def _takes(self, kept: dict[tuple[int, bool], Any]) -> bool:
        """Keeps what the next layer gives, if that is all that the others need of it and of those before it."""
        before, wanted = (self._kept, self._passed), self.output(0, False)
        self._kept, self._passed = kept, self._passed + 1
        if all(_same(wanted, self.output(0, False)) for _ in range(2)):  # twice: nothing may write into what is kept
            return True
        self._kept, self._passed = before
        return False

    def _block(self, number: int, replaced: bool) -> Any:
        """What the next layer of the stack gives."""
        given: list[Any] = []

        def after(module: nn.Module, args: Any, output: Any) -> None:
            given.append(output)
            raise _Enough

        self._run(number, replaced, [self._stack[self._passed].register_forward_hook(after)])
        return given[0]

    @torch.no_grad()
    def _run(self, number: int, replaced: bool, hooks: list[Any]) -> Any:
        passed = self._stack[: self._passed]
        try:
            for block in passed:
                vars(block)["forward"] = lambda *args, **kwargs: self._kept[number, replaced]
            with self._replaced() if replaced else self._taken(), contextlib.suppress(_Enough):
                return self.model(**self.batches[number])
        finally:
            for block in passed:
                del vars(block)["forward"]
            for hook in hooks:
                hook.remove()

    @contextlib.contextmanager
    def _taken(self) -> Iterator[None]:
        """Raises ValueError where the model does not take the batch; that memory does not suffice stays what it is."""
        try:
            yield
        except _WRONG as error:
            if isinstance(error, torch.OutOfMemoryError) or "memory" in str(error):
                raise
            name = type(self.model).__name__
            raise ValueError(f"calibration: {name} does not take these batches ({one_line(error)})") from None

    @contextlib.contextmanager
    def _replaced(self) -> Iterator[None]:
        """Layers compute with what stands for their weights."""
        originals: dict[nn.Parameter | Tensor, Tensor] = {}
        throughout = [(weight.source, weight.source.data) for weight in self.uncalled]
        hooks = []

        def put(parameter: Tensor, value: Tensor) -> None:
            originals.setdefault(parameter, parameter.data)
            parameter.data = value

        def back(module: nn.Module | None = None, args: Any = None, output: Any = None) -> None:
            for parameter, value in originals.items():
                parameter.data = value
            originals.clear()

        def enters(weight: Weight) -> Any:
            def before(module: nn.Module, args: Any) -> None:
                found = self._stand_in(weight, None)
                if found is not None:
                    put(weight.source, found[0])
                    if found[1] is not None:
                        put(cast(nn.Parameter, module.bias), found[1])

            return before

        def embeds(weight: Weight) -> Any:
            def after(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
                rows, places = _first(args, kwargs).unique(return_inverse=True)
                found = self._stand_in(weight, rows)
                return output if found is None else found[0][places]

            return after

        try:
            for weight in self.uncalled:
                if (found := self._stand_in(weight, None)) is not None:
                    weight.source.data = found[0]
            for weight in self._weights:
                for module in {id(module): module for module in weight.modules.values()}.values():
                    if isinstance(module, nn.Embedding):
                        hooks.append(module.register_forward_hook(embeds(weight), with_kwargs=True, prepend=True))
                        continue
                    hooks.append(module.register_forward_pre_hook(enters(weight)))
                    hooks.append(module.register_forward_hook(back))
            yield
        finally:
            back()
            for parameter, value in throughout:
                parameter.data = value
            for hook in hooks:
                hook.remove()


def _is_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith(("LayerNorm", "RMSNorm"))


def _first(args: Any, kwargs: Any) -> Any:
    return args[0] if args else next(iter(kwargs.values()))


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return sum(map(_bytes, parts))


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, Mapping):
        return all(_same(value, other.get(name)) for name, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(_same(a, b) for a, b in zip(one, other, strict=True))
    return True

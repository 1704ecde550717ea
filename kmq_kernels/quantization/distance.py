"""How far the outputs of a model are from those that are wanted, and how much they move with the output of an embedding."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .calibration import Batch, token_weights

log = logging.getLogger(__name__)

TOKENS = 1024  # most in one backward pass, for which what every layer computed is in memory


def first_tensor(output: Any) -> Tensor:
    """The first floating-point tensor of an output: logits, or the last hidden states."""
    if isinstance(output, Tensor):
        return output
    for value in output.values() if isinstance(output, Mapping) else output:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    raise ValueError("calibration: the model gives no floating-point tensor")


def distance(output: Any, wanted: Tensor, batch: Batch) -> float:
    """Squared distance of an output from the one that is wanted, as a share of its square; of texts also that of their means."""
    total = 0.0
    for one, other in zip(_parts(first_tensor(output), batch), _parts(wanted, batch), strict=True):
        value = (one - other).square().sum(dtype=torch.float64) / other.square().sum(dtype=torch.float64).clamp_min(1e-30)
        total += float(value)
    return total if total == total else float("inf")


def gradient_moments(model: nn.Module, batches: Iterable[Batch], layers: list[nn.Module]) -> dict[int, Tensor]:
    """For each embedding the second moments (cols, cols) fp64 of gradients by the vectors that it gives, by its id.

    A gradient is that of the outputs with random signs, so that d' M d is, up to a factor and in the mean, what an error d of
    such a vector adds to `distance` (Hutchinson 1990). Deterministic. Hooks of the model run, those of backward passes, too. A
    layer has none where it moves nothing; nor has any where the model cannot be differentiated, or wants whole batches. Memory
    that does not suffice is an error.
    """
    trains = [parameter for parameter in model.parameters() if parameter.requires_grad and not parameter.is_inference()]
    draw = torch.Generator().manual_seed(0)
    moments: dict[int, Tensor] = {}
    given: list[tuple[int, Tensor]] = []

    def after(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        given.append((id(module), output.detach().requires_grad_()))
        return given[-1][1].clone()

    hooks = [layer.register_forward_hook(after, prepend=True) for layer in layers]
    try:
        for parameter in trains:
            parameter.requires_grad_(False)
        for batch, share in _pieces(batches):
            given.clear()
            with torch.inference_mode(False), torch.enable_grad():
                parts = _parts(first_tensor(model(**batch)), batch)
                total = torch.stack([_signed(part, draw) / part.detach().norm().clamp_min(1e-30) for part in parts]).sum()
                found = torch.autograd.grad(total, [leaf for _, leaf in given], allow_unused=True)
            for (key, _), gradient in zip(given, found, strict=True):
                if gradient is not None:
                    vectors = gradient.reshape(-1, gradient.shape[-1]).double()
                    moments[key] = moments.get(key, 0.0) + share * (vectors.t() @ vectors)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # of a model that anyone may have written
        log.info("no gradients for embeddings: %s", error)
        return {}
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in trains:
            parameter.requires_grad_(True)
    return {key: value for key, value in moments.items() if bool(value.isfinite().all()) and float(value.trace()) > 0}


def _signed(part: Tensor, draw: torch.Generator) -> Tensor:
    """The sum of the values with random signs."""
    signs = torch.randint(0, 2, part.shape, generator=draw, dtype=torch.int8).to(part.device)
    return ((2 * signs - 1) * part).sum()


def _parts(output: Tensor, batch: Batch) -> list[Tensor]:
    """What of an output counts: its tokens, so that every text weighs 1, and the mean of each text; else all of it."""
    weight = token_weights(batch, output.shape)
    if weight is None:
        return [output.float()]
    weight = weight.view(output.shape[0], -1, 1)
    return [output.float() * weight.sqrt(), (output.float() * weight).sum(1)]


def _pieces(batches: Iterable[Batch]) -> Iterator[tuple[Batch, float]]:
    """The batches in pieces of at most TOKENS tokens, or of one text, each with its share of the batch's texts."""
    for batch in batches:
        firsts = [value.shape[0] for value in batch.values() if value.dim()]
        texts = max(firsts, key=lambda first: (firsts.count(first), first), default=1)
        some = {name for name, value in batch.items() if value.dim() and value.shape[0] == texts}
        tokens = max((_positions(batch[name][0]) for name in some), default=1)
        step = min(texts, max(1, TOKENS // max(1, tokens)))
        for first in range(0, texts, step):
            rows = slice(first, min(first + step, texts))
            piece = {name: value[rows] if name in some else value for name, value in batch.items()}
            yield piece, (rows.stop - rows.start) / texts


def _positions(text: Tensor) -> int:
    """Ids of a text, or vectors."""
    return text[..., 0].numel() if text.is_floating_point() and text.dim() else text.numel()

"""Assignments that move: a latent weight beside a codebook layer, whose nearest centroids are the layer's indices.

The gradient of the quantized weight goes to the centroids by the chain rule, and to the latent weight as if nothing had been
rounded (straight-through, Bengio et al. 2013, https://arxiv.org/abs/1308.3432). After a step of the optimizer `settle` chooses
the nearest centroids anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import ops


class _StraightThrough(torch.autograd.Function):
    """The first argument, with its gradient also given to the second."""

    @staticmethod
    def forward(ctx: Any, quantized: Tensor, latent: Tensor) -> Tensor:
        ctx.dtype = latent.dtype
        return quantized.view_as(quantized)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], grads[0].to(ctx.dtype)


def straight_through(quantized: Tensor, latent: Tensor) -> Tensor:
    """`quantized`, whose gradient goes to both; of one shape, any floating dtypes."""
    return cast(Tensor, _StraightThrough.apply(quantized, latent))


def nearest(values: Tensor, codebook: Tensor, group_rows: int) -> Tensor:
    """Assignments (rows, cols) uint8: the nearest centroid of each value in its row's codebook, whose order may be any.

    values: (rows, cols) fp32; codebook: (G, K) floating point; row r belongs to codebook r // group_rows.
    """
    rows, cols = values.shape
    centroids, order = codebook.detach().float().sort(dim=1)
    whole = rows // group_rows * group_rows  # the last group may have fewer rows
    parts = []
    for first, last in ((0, whole), (whole, rows)):
        if first < last:
            books = slice(first // group_rows, -(-last // group_rows))
            count = books.stop - books.start
            found = ops.assign(values[first:last].reshape(count, -1), centroids[books])
            if not bool((order[books, 1:] > order[books, :-1]).all()):
                found = order[books].to(torch.uint8).gather(1, found.long())
            parts.append(found.view(last - first, cols))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


ROWS = 4096  # a weight's at a time, where more would take several times its memory


def within_cells(values: Tensor, module: Any, share: float) -> Tensor:
    """`values` (rows, cols) fp32, each moved to where the nearest centroid is that of its index in `module` (or equal): no more
    than `share` (0 to 1) of the way from that centroid to the border of its cell. A row whose factor is 0 stays as it is."""
    made = torch.empty_like(values)
    centroids, order = module.codebook.detach().float().sort(dim=1)
    half = share / 2 * (centroids[:, 1:] - centroids[:, :-1])
    end = torch.full_like(centroids[:, :1], torch.inf)
    low, high = torch.cat([-end, centroids[:, 1:] - half], 1), torch.cat([centroids[:, :-1] + half, end], 1)
    place = order.argsort(1)  # of each index among the sorted centroids
    for first in range(0, module.rows, ROWS):
        rows = slice(first, min(first + ROWS, module.rows))
        book = torch.arange(rows.start, rows.stop, device=values.device) // module.group_rows
        factor = 1.0 if module.row_scale is None else module.row_scale.detach()[rows, None].float()
        at = place[book].gather(1, ops.unpack(module.packed[rows], module.bits, module.cols).long())
        inside = (values[rows] / factor).clamp(low[book].gather(1, at), high[book].gather(1, at)) * factor
        made[rows] = torch.where(inside.isfinite(), inside, values[rows])
    return made


def settle(modules: Iterable[Any]) -> None:
    """Gives every codebook module with a latent weight the indices of the centroids that are nearest to it."""
    modules, done = list(modules), set()
    with torch.no_grad():
        for module in modules:
            if module.latent is None or id(module.packed) in done:
                continue
            done.add(id(module.packed))
            values = module.latent if module.row_scale is None else module.latent / module.row_scale[:, None].float()
            module.packed.copy_(ops.pack(nearest(values, module.codebook, module.group_rows), module.bits))
    for module in modules:
        module._inverse_counts = None  # cluster sizes


def start_moving(modules: Mapping[str, Any], weights: Mapping[str, Tensor], share: float | None = None) -> list[nn.Parameter]:
    """Puts a latent weight on every codebook module that trains, and returns these parameters.

    modules: by name; those that share their indices share the latent weight. weights: where it begins, (rows, cols) by name
    of the module, any floating dtype; elsewhere it begins at the decoded weight. share: the decoded weights stay at first,
    and it begins `within_cells`; None: it begins at the weight, and the indices become those of the nearest centroids. It is
    fp32, the gradient and AdamW's two moments beside it are, too: 16 bytes for each weight.
    Raises ValueError where a weight has another shape than its module or is not finite.
    """
    latents: dict[int, nn.Parameter] = {}
    for name, module in modules.items():
        if not module.codebook.requires_grad:
            continue
        if id(module.packed) not in latents:
            start = weights.get(name)
            with torch.no_grad():
                values = module.decoded() if start is None else start.detach()
                if values.shape != (module.rows, module.cols):
                    given, expected = tuple(values.shape), (module.rows, module.cols)
                    raise ValueError(f"{name}: expected a weight of shape {expected} to begin at, got {given}")
                if not bool(torch.isfinite(values).all()):
                    raise ValueError(f"{name}: the weight to begin at holds NaN or Inf")
                values = values.to(module.codebook.device, torch.float32)
                values = values if share is None else within_cells(values, module, share)
            latents[id(module.packed)] = nn.Parameter(values.clone(memory_format=torch.contiguous_format))
        module.latent = latents[id(module.packed)]
    settle(modules.values())
    return list(latents.values())


def stop_moving(modules: Iterable[Any]) -> None:
    """Takes the latent weights away; indices and codebooks stay as they are."""
    for module in modules:
        module.latent = None

"""How many bits each module gets for a budget: the least total error that fits, exactly, or more bits to larger eigenvalues."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

from .config import KMQConfig
from .encoding import encode_weights

BITS = tuple(range(1, 9))

Array = npt.NDArray[np.float64]


class BudgetError(ValueError):
    """A budget that no allocation meets."""


def distortion_curves(
    weights: Sequence[Tensor],
    config: KMQConfig,
    *,
    importance: Sequence[Tensor | None] | None = None,
    names: Sequence[str] | None = None,
    on_done: Callable[[int], None] | None = None,
) -> Array:
    """Error of every weight at 1 to 8 bits, (len(weights), 8) fp64: sum of importance * (weight - decoded)**2.

    The arguments are those of `encode_weights`, without bits.
    """
    curves = np.empty((len(weights), len(BITS)))
    for i, weight in enumerate(weights):
        given = None if importance is None else [importance[i]] * len(BITS)
        called = None if names is None else [names[i]] * len(BITS)
        encoded = encode_weights([weight] * len(BITS), BITS, config, importance=given, names=called)
        curves[i] = [entry.error for entry in encoded]
        if on_done is not None:
            on_done(i)
    return curves


def fewest_bits(costs: Sequence[Sequence[int]], budget: int) -> int:
    """The fewest bits that a module should get: 2 where the budget has room for 2 bits in every module, else 1.

    A squared error stands for a loss only where it is small. What 1 bit leaves, about 0.4 of a weight's variance, is not: it
    costs more than any figure at the unchanged weights tells. costs: (modules, 8) bytes at 1 to 8 bits.
    """
    return 2 if sum(row[1] for row in costs) <= budget else 1


def _expect_budget(costs: npt.NDArray[np.int64], budget: int) -> None:
    least = int(costs.min(1).sum())
    if budget < least:
        raise BudgetError(f"budget: the smallest possible is {least} bytes, got {budget}")


def _lagrangian(costs: Array, errors: Array, budget: int) -> tuple[float, npt.NDArray[np.int64]]:
    """The price of a byte that gives the best lower bound, and the best choice found on the way that fits.

    The bound as a function of the price is concave; its slope is the cost of the cheapest choices less the budget.
    """

    def cheapest(price: float) -> npt.NDArray[np.int64]:
        total = errors + price * costs
        # Of choices that are worth the same, the smaller one.
        return np.where(total <= total.min(1, keepdims=True), costs, np.inf).argmin(1)

    rows = np.arange(len(costs))
    best = np.where(costs <= costs.min(1, keepdims=True), errors, np.inf).argmin(1)
    low, high = 0.0, 1.0
    while costs[rows, cheapest(high)].sum() > budget and high < 1e300:
        high *= 16.0
    for _ in range(200):
        price = (low + high) / 2
        choice = cheapest(price)
        if costs[rows, choice].sum() <= budget:
            high = price
            if errors[rows, choice].sum() < errors[rows, best].sum():
                best = choice
        else:
            low = price
        if high - low <= 1e-15 * high:
            break
    return high, best


def _exchange(costs: Array, errors: Array, budget: int, choice: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Improves a choice that fits, one module at a time, as long as something gets better."""
    rows = np.arange(len(costs))
    choice = choice.copy()
    while True:
        room = budget - costs[rows, choice].sum()
        gain = errors[rows, choice][:, None] - errors
        extra = costs - costs[rows, choice][:, None]
        gain = np.where(extra <= room, gain, -np.inf)
        i, b = np.unravel_index(int(gain.argmax()), gain.shape)
        if not gain[i, b] > 0:
            return choice
        choice[i] = b


def least_error(costs: Sequence[Sequence[int]], errors: Sequence[Sequence[float]], budget: int) -> list[int]:
    """For every module the number of its choice: the total of `errors` is the least among all with total `costs` <= budget.

    costs: (modules, choices) bytes; errors: (modules, choices), not negative. Exact: a multiple-choice knapsack, solved by a
    dynamic program over the undominated (bytes, error) pairs of the modules so far. A pair is dropped when even the Lagrangian
    lower bound of everything that can follow it is above the best total known, so few are left. Raises BudgetError where no
    choice fits, with the smallest budget that would.
    """
    if not len(costs):
        return []
    cost_table, error_table = np.asarray(costs, np.int64), np.asarray(errors, np.float64)
    if cost_table.ndim != 2 or cost_table.shape != error_table.shape:
        raise ValueError(f"errors: expected the shape of costs {cost_table.shape}, got {error_table.shape}")
    if not (np.isfinite(error_table).all() and (error_table >= 0).all()):
        raise ValueError("errors: expected finite numbers, none negative")
    _expect_budget(cost_table, budget)
    if not error_table.any():
        return [int(c) for c in cost_table.argmin(1)]
    scaled = error_table / error_table.max()  # so that the price has a sane size
    wide = cost_table.astype(np.float64)
    price, start = _lagrangian(wide, scaled, budget)
    start = _exchange(wide, scaled, budget, start)
    rows = np.arange(len(wide))
    best = float(scaled[rows, start].sum())
    reduced = (scaled + price * wide).min(1)
    rest = np.concatenate([np.cumsum(reduced[::-1])[::-1], [0.0]])  # bound of the modules from i on, priced
    cheapest = np.concatenate([np.cumsum(cost_table.min(1)[::-1])[::-1], [0]])
    slack = 1e-12 * max(best, 1e-300)

    spent, error = np.zeros(1, np.int64), np.zeros(1)
    trail = []
    for i in range(len(wide)):
        allowed = [b for b in range(wide.shape[1]) if not _dominated(cost_table[i], scaled[i], b)]
        new_spent = (spent[:, None] + cost_table[i, allowed]).ravel()
        new_error = (error[:, None] + scaled[i, allowed]).ravel()
        bound = new_error + price * (new_spent - budget) + rest[i + 1]
        fits = np.flatnonzero((new_spent + cheapest[i + 1] <= budget) & (bound <= best + slack))
        order = fits[np.lexsort((new_error[fits], new_spent[fits]))]
        least = np.minimum.accumulate(np.concatenate([[np.inf], new_error[order]]))
        order = order[new_error[order] < least[:-1]]
        spent, error = new_spent[order], new_error[order]
        trail.append((order // len(allowed), np.asarray(allowed)[order % len(allowed)]))
    if not len(error):  # rounding alone can drop the best known: then it is the best
        return [int(c) for c in start]
    state = int(error.argmin())
    choice = [0] * len(trail)
    for i in range(len(trail) - 1, -1, -1):
        before, taken = trail[i]
        choice[i] = int(taken[state])
        state = int(before[state])
    return choice


def _dominated(costs: npt.NDArray[np.int64], errors: Array, b: int) -> bool:
    """Whether another choice costs no more and is no worse (of equal ones, the first stays)."""
    no_worse = (costs <= costs[b]) & (errors <= errors[b])
    better = no_worse & ((costs < costs[b]) | (errors < errors[b]))
    return bool(better.any() or no_worse[:b].any())


def by_eigenvalue(costs: Sequence[Sequence[int]], eigenvalues: Sequence[float], budget: int) -> list[int]:
    """For every module the number of its choice, from 0 for the fewest bits on by one bit each, more for a larger eigenvalue.

    With b bits the error of a weight falls like 4**-b, and the loss by at most eigenvalue * error / 2; equal shares of all
    modules need bits = c + log2(eigenvalue) / 2. c grows until nothing more fits the budget; no module ever has more bits than
    one with a larger eigenvalue. eigenvalues: of the Hessian of each module, at least 0. Raises BudgetError like `least_error`.
    """
    table = np.asarray(costs, np.int64)
    _expect_budget(table, budget)
    values = np.asarray(eigenvalues, np.float64)
    choice = np.zeros(len(table), np.int64)
    spent = int(table[:, 0].sum())
    steps = []
    for i, value in enumerate(eigenvalues):
        height = 0.5 * math.log2(max(value, 1e-30))
        steps += [(b + 0.5 - height, i, b) for b in range(1, table.shape[1])]
    for _, i, b in sorted(steps):
        more = int(table[i, b] - table[i, choice[i]])
        # A step that does not fit is left out; what follows stays below a module that missed one.
        if b == choice[i] + 1 and spent + more <= budget and (choice[values > values[i]] >= b).all():
            choice[i], spent = b, spent + more
    return [int(c) for c in choice]

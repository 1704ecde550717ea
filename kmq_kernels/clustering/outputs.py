"""A matrix clustered for what it does to inputs: codebook and assignments of least squared error of the outputs.

With the inputs of a layer as the rows of X and the outputs that are wanted as the rows of Y, the squared error of a decoded
weight Q is, up to a constant, tr(Q H Q') - 2 tr(Q B') with H = X'X (cols, cols) and B = Y'X (rows, cols). Two steps in turns,
neither of which ever raises it:

- assignments: coordinate descent, one column of all rows at a time, each value to the centroid nearest to its optimum;
- codebooks: least squares for the assignments as they are. The normal equations of each codebook (K x K) are solved by conjugate
  gradients, whose products are those of H with a decoded weight, so that no matrix of them is built.

So does LNQ (Kim et al. 2025) with a codebook a row. The descent starts from what error feedback gives (GPTQ, Frantar et al. 2022,
with the nearest centroid in place of the nearest point of a grid), or from the clusters given, whichever is better.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops

ROUNDS = 3  # of descent and least squares
_BLOCK = 64  # columns between two updates of all the others
_STEPS = 12  # of conjugate gradients


class Clusters(NamedTuple):
    """A weight in clusters: codebook (G, K) ascending, codes (rows, cols) uint8.

    scale: factors (rows,) of the decoded rows, or None. exact: values (rows, cols) of the places that are free, or None.
    """

    codebook: Tensor
    codes: Tensor
    scale: Tensor | None = None
    exact: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class OutputProblem:
    """What is to be clustered for its outputs.

    gram: H (cols, cols) fp32, positive definite; linear: B (rows, cols) fp32. bits: 1 to 8; row r uses codebook r // group_rows.
    row_weight: weights (rows,) of the errors of the rows, which count where rows share a codebook. free: places (rows, cols) bool
    whose values are bound to no codebook.
    """

    gram: Tensor
    linear: Tensor
    bits: int
    group_rows: int
    row_weight: Tensor | None = None
    free: Tensor | None = None

    def decoded(self, clusters: Clusters) -> Tensor:
        """The weight (rows, cols) fp32 that the clusters stand for."""
        out = self._unit(ops.pack(clusters.codes, self.bits), clusters.codebook)
        if clusters.scale is not None:
            out = out * clusters.scale[:, None]
        return out if clusters.exact is None else out + clusters.exact

    def error(self, clusters: Clusters) -> float:
        """The squared error of the outputs, weighted by row, less the constant."""
        weight = self.decoded(clusters)
        rows = (weight * (weight @ self.gram - 2 * self.linear)).sum(1, dtype=torch.float64)
        return float((rows if self.row_weight is None else rows * self.row_weight).sum())

    def _unit(self, packed: Tensor, codebook: Tensor) -> Tensor:
        """The decoded rows before their factors, nothing at the free places."""
        out = ops.dequantize(packed, codebook, self.gram.shape[0], group_rows=self.group_rows)
        return out if self.free is None else out.masked_fill(self.free, 0.0)

    def _entries(self, clusters: Clusters) -> tuple[Tensor, Tensor]:
        """The values that each row can take, (K, rows) ascending, and the borders between them, (K - 1, rows)."""
        books = clusters.codebook.repeat_interleave(self.group_rows, 0)[: len(clusters.codes)]
        if clusters.scale is not None:
            books = books * clusters.scale[:, None]
        books = books.t().contiguous()
        return books, (books[1:] + books[:-1]) / 2


def fit_outputs(problem: OutputProblem, start: Clusters, rounds: int = ROUNDS) -> Clusters:
    """Clusters of a smaller error of the outputs than `start`, or `start` where there are none; deterministic."""
    found = _solve(problem, start)
    fed = _solve(problem, _feed_back(problem, start))
    if problem.error(fed) < problem.error(found):
        found = fed
    for _ in range(rounds):
        found = _solve(problem, _descend(problem, found))
    return found if problem.error(found) < problem.error(start) else start


def _nearest(values: Tensor, books: Tensor, borders: Tensor) -> tuple[Tensor, Tensor]:
    """For a value of each row (rows,) the code, int64, and the value of the nearest entry; a tie goes to the lower one."""
    if len(borders) < 16:
        codes = (values > borders).sum(0)
    else:
        codes = torch.searchsorted(borders.t().contiguous(), values[:, None]).squeeze(1)
    return codes, books.gather(0, codes[None])[0]


def _feed_back(problem: OutputProblem, start: Clusters) -> Clusters:
    """Assignments by error feedback: what a column adds in error, those after it take back; columns of large inputs first."""
    order = problem.gram.diagonal().argsort(descending=True, stable=True)
    flipped = order.flip(0)
    # H = R R' with R upper triangular, so H^-1 = U'U with U its inverse.
    lower = torch.linalg.cholesky(problem.gram.double()[flipped][:, flipped]).flip(0, 1)
    eye = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    upper = torch.linalg.solve_triangular(lower, eye, upper=True).float()
    wanted = upper.t() @ (upper @ problem.linear.t()[order])  # the best real weight, (cols, rows)
    books, borders = problem._entries(start)
    codes = torch.zeros(wanted.shape, dtype=torch.uint8, device=wanted.device)
    free = None if problem.free is None else problem.free.t()[order]
    values = torch.zeros_like(wanted)
    for first in range(0, len(wanted), _BLOCK):
        end = min(first + _BLOCK, len(wanted))
        part, block = wanted[first:end], upper[first:end, first:end]
        errors = torch.zeros_like(part)
        for j in range(end - first):
            codes[first + j], value = _nearest(part[j], books, borders)
            if free is not None:
                value = torch.where(free[first + j], part[j], value)
            values[first + j] = value
            errors[j] = (part[j] - value) / block[j, j]
            part[j + 1 :].addr_(block[j, j + 1 :], errors[j], alpha=-1)
        wanted[end:].addmm_(upper[first:end, end:].t(), errors, alpha=-1)
    back = order.argsort()
    exact = None if problem.free is None else torch.where(problem.free, values[back].t(), 0.0)
    return start._replace(codes=codes[back].t().contiguous(), exact=exact)


def _descend(problem: OutputProblem, clusters: Clusters) -> Clusters:
    """One round over the columns: in each, every row takes the entry nearest to what is best while all others stay."""
    books, borders = problem._entries(clusters)
    gram, diagonal = problem.gram, problem.gram.diagonal().tolist()
    values = problem.decoded(clusters).t().contiguous()
    gradient = gram @ values - problem.linear.t()
    codes = clusters.codes.t().contiguous()
    free = None if problem.free is None else problem.free.t().contiguous()
    for first in range(0, len(values), _BLOCK):
        end = min(first + _BLOCK, len(values))
        part, block = gradient[first:end], gram[first:end, first:end]
        change = torch.zeros_like(part)
        for j in range(end - first):
            best = values[first + j] - part[j] / diagonal[first + j]
            codes[first + j], value = _nearest(best, books, borders)
            if free is not None:
                value = torch.where(free[first + j], best, value)
            change[j] = value - values[first + j]
            part[j + 1 :].addr_(block[j, j + 1 :], change[j])
        values[first:end] += change
        gradient[end:].addmm_(gram[end:, first:end], change)
    exact = None if free is None else torch.where(free, values, 0.0).t().contiguous()
    return clusters._replace(codes=codes.t().contiguous(), exact=exact)


def _solve(problem: OutputProblem, clusters: Clusters) -> Clusters:
    """The codebooks, then the factors, of least error for the assignments as they are; the codebooks in order again."""
    groups, count = clusters.codebook.shape
    cols = problem.gram.shape[0]
    packed = ops.pack(clusters.codes, problem.bits)
    scale = torch.ones(len(packed), 1, device=packed.device) if clusters.scale is None else clusters.scale[:, None]
    weigh = scale if problem.row_weight is None else scale * problem.row_weight[:, None]

    def scatter(gradient: Tensor) -> Tensor:
        gradient = gradient * weigh
        if problem.free is not None:
            gradient = gradient.masked_fill(problem.free, 0.0)
        return ops.codebook_grad(gradient, packed, count, num_codebooks=groups, group_rows=problem.group_rows)

    def divided(value: Tensor, by: Tensor) -> Tensor:
        return torch.where(by > 0, value / by.clamp_min(1e-30), 0.0)

    diagonal = scatter(problem.gram.diagonal() * scale)
    book = clusters.codebook.clone()
    residual = scatter(problem.linear - problem.decoded(clusters) @ problem.gram)
    step = direction = divided(residual, diagonal)
    fit = (residual * step).sum(1, keepdim=True)
    for _ in range(min(_STEPS, count)):
        product = scatter((problem._unit(packed, direction) * scale) @ problem.gram)
        length = divided(fit, (direction * product).sum(1, keepdim=True))
        book += length * direction
        residual = residual - length * product
        step = divided(residual, diagonal)
        before, fit = fit, (residual * step).sum(1, keepdim=True)
        direction = step + divided(fit, before) * direction
    order = book.argsort(dim=1, stable=True)
    places = order.argsort(dim=1).float()
    codes = ops.dequantize(packed, places, cols, group_rows=problem.group_rows).to(torch.uint8)
    found = clusters._replace(codebook=book.gather(1, order), codes=codes)
    return found if clusters.scale is None else found._replace(scale=_factors(problem, found))


def _factors(problem: OutputProblem, clusters: Clusters) -> Tensor:
    """The factors (rows,) of least error; a row whose best factor is not above 0 keeps the one that it has."""
    unit = problem._unit(ops.pack(clusters.codes, problem.bits), clusters.codebook)
    aim = problem.linear if clusters.exact is None else problem.linear - clusters.exact @ problem.gram
    best = (unit * aim).sum(1) / (unit * (unit @ problem.gram)).sum(1)
    assert clusters.scale is not None
    return torch.where(best.isfinite() & (best > 0), best, clusters.scale)

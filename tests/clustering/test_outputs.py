"""Clusters of least squared error of the outputs, against float64 brute force and normal equations that are built."""

import itertools

import pytest
import torch

from kmq_kernels import ops
from kmq_kernels.clustering import Clusters, OutputProblem, cluster_matrices, fit_outputs
from kmq_kernels.clustering.outputs import _descend, _feed_back, _solve


def _problem(rows, cols, bits, group_rows, *, free=0.0, weighted=False, seed=0):
    """A problem whose inputs go together, and the k-means clusters of its weight."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * cols, cols, generator=generator) @ torch.randn(cols, cols, generator=generator) / cols**0.5
    weight = torch.randn(rows, cols, generator=generator)
    y = x @ weight.t() + 0.1 * torch.randn(len(x), rows, generator=generator)
    (result,) = cluster_matrices([weight], [bits], group_rows=[group_rows])
    places = torch.rand(rows, cols, generator=generator) < free if free else None
    row_weight = torch.rand(rows, generator=generator) + 0.1 if weighted else None
    problem = OutputProblem(x.t() @ x, y.t() @ x, bits, group_rows, row_weight, places)
    exact = None if places is None else torch.where(places, weight, 0.0)
    return problem, Clusters(result.codebook, ops.unpack(result.packed, bits, cols), None, exact), x.double(), y.double()


def _loss(problem, weight, x, y):
    """Squared error of the outputs in float64, weighted by row, from the inputs themselves."""
    rows = (x @ weight.double().t() - y).square().sum(0)
    return float(rows.sum() if problem.row_weight is None else rows @ problem.row_weight.double())


KINDS = [("tensor", 6, 10, 2, 6), ("row", 5, 70, 3, 1), ("group, the last one short", 7, 33, 1, 3), ("5 bits", 4, 150, 5, 4)]


@pytest.mark.parametrize(("kind", "rows", "cols", "bits", "group_rows"), KINDS)
@pytest.mark.parametrize("options", [{}, {"free": 0.1}, {"weighted": True}, {"scaled": True}])
def test_every_step_lowers_the_error_of_the_outputs(kind, rows, cols, bits, group_rows, options):
    scaled = options.get("scaled", False)
    problem, start, x, y = _problem(
        rows, cols, bits, group_rows, **{name: value for name, value in options.items() if name != "scaled"}
    )
    if scaled:
        start = start._replace(scale=torch.linspace(0.5, 2.0, rows))
    constant = _loss(problem, torch.zeros(rows, cols), x, y)
    losses = [_loss(problem, problem.decoded(start), x, y)]
    assert problem.error(start) + constant == pytest.approx(losses[0], rel=1e-4)
    state = start
    for step in (_solve, _descend, _solve, _descend):
        state = step(problem, state)
        losses.append(_loss(problem, problem.decoded(state), x, y))
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(losses)), (kind, losses)
    assert (state.codebook[:, 1:] >= state.codebook[:, :-1]).all()
    found = fit_outputs(problem, start)
    assert _loss(problem, problem.decoded(found), x, y) < 0.9 * losses[0]
    again = fit_outputs(problem, start)
    assert all(one is None or torch.equal(one, other) for one, other in zip(found, again, strict=True))


@pytest.mark.parametrize("group_rows", [1, 2, 5])
def test_codebooks_are_those_of_the_normal_equations(group_rows):
    problem, start, x, y = _problem(5, 24, 2, group_rows, weighted=True)
    found = _solve(problem, start)
    codes = start.codes.long()
    for group in range(len(found.codebook)):
        rows = range(group * group_rows, min((group + 1) * group_rows, 5))
        a, b = torch.zeros(4, 4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
        for row in rows:
            chosen = torch.nn.functional.one_hot(codes[row], 4).double()
            a += problem.row_weight[row].double() * chosen.t() @ (x.t() @ x) @ chosen
            b += problem.row_weight[row].double() * chosen.t() @ (x.t() @ y)[:, row]
        best = torch.linalg.lstsq(a, b).solution.sort().values
        assert torch.allclose(found.codebook[group].double(), best, rtol=1e-3, atol=1e-3)


def test_descent_ends_where_no_single_change_helps():
    problem, state, x, y = _problem(3, 12, 2, 3)
    for _ in range(30):
        state = _descend(problem, state)
    reached = _loss(problem, problem.decoded(state), x, y)
    for row, col, code in itertools.product(range(3), range(12), range(4)):
        codes = state.codes.clone()
        codes[row, col] = code
        assert _loss(problem, problem.decoded(state._replace(codes=codes)), x, y) >= reached * (1 - 1e-6)


def test_found_is_near_the_best_of_all():
    # One row, one bit, 8 columns: all 256 assignments, each with the codebook of its normal equations.
    problem, start, x, y = _problem(1, 8, 1, 1, seed=3)
    best = float("inf")
    for choice in itertools.product((0, 1), repeat=8):
        chosen = torch.nn.functional.one_hot(torch.tensor(choice), 2).double()
        book = torch.linalg.lstsq(x @ chosen, y).solution[:, 0]
        best = min(best, _loss(problem, (chosen @ book)[None], x, y))
    found = _loss(problem, problem.decoded(fit_outputs(problem, start)), x, y)
    assert best * (1 - 1e-6) <= found <= 1.2 * best


def test_error_feedback_is_rounding_where_inputs_do_not_go_together():
    weight = torch.randn(4, 20, generator=torch.Generator().manual_seed(1))
    scale = torch.rand(20, generator=torch.Generator().manual_seed(2)) + 0.5
    problem = OutputProblem(scale.diag(), weight * scale, 3, 4)
    (result,) = cluster_matrices([weight], [3], group_rows=[4])
    start = Clusters(result.codebook, ops.unpack(result.packed, 3, 20))
    assert torch.equal(_feed_back(problem, start).codes, start.codes)

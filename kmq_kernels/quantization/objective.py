"""Objective "output": weights encoded, layer after layer, so that the outputs of the model on unlabelled texts stay near.

The layers that share an input (query, key, value) are one group. For each group, in the order in which they run,

1. the inputs of its layers are taken twice, from the model as it is and from the one whose weights so far are replaced. Their
   second moments say what is wanted: from the inputs that it gets, the outputs of the unquantized layer on the unquantized ones
   (and half of what is missing in what is added to them before a normalization);
2. each weight is clustered for that (see clustering/outputs.py), and its bias takes over the difference of the mean outputs;
3. the outputs of the whole model for texts that were not used in 1 and 2 are computed with this result and with plain clustering,
   the weights to come as they are, and the nearer of the two is kept.

Embeddings, which have no inputs, are clustered for what their errors do to the outputs of the model, which second moments of
gradients say, with their rows weighted by how often the texts have them. At the end the whole model is compared with one of plain
clusters, on the same held-out texts; where that is nearer, it is taken.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..clustering import Clusters, OutputProblem, fit_outputs
from ..terminal import draws_bars
from ._progress import weight_bar
from .calibration import Batch, Group, Passes, layers_of, read_batches, token_weights
from .config import KMQConfig
from .distance import distance, first_tensor, gradient_moments
from .encoding import EncodedWeight, decode, decode_rows, encode_weights
from .modes import evaluating
from .weights import Weight

log = logging.getLogger(__name__)

DAMPING = 0.1  # of the mean square of an input, added to that of each: texts are few, and inputs go together
ROUNDING = 1e-3  # of the mean square of an input: least that is taken for how much inputs differ
UNSEEN = 1.0  # occurrences that a word has beside those in the texts
ADDED = 0.5  # share of an error in what is added to the output that a layer is to take back
SHARED = 1 << 25  # values that share a codebook: an embedding of more is not clustered for outputs, which takes 9 copies of them
AT_ONCE = 1 << 22  # values that are clustered for outputs at once, where more of them share no codebook


@dataclasses.dataclass
class _Moments:
    """Means over the tokens of a group's inputs: x of the model so far, y of the model as it is, and their products.

    r: by how much what is added to the outputs is less in the model so far. tokens: how many there were.
    """

    xx: Tensor
    yx: Tensor
    x: Tensor
    y: Tensor
    rx: Tensor | None
    r: Tensor | None
    tokens: int


def encode_for_outputs(
    model: nn.Module,
    chosen: list[Weight],
    config: KMQConfig,
    calibration: Iterable[Batch],
    *,
    importance: list[Tensor | None] | None = None,
    finished: Mapping[str, EncodedWeight] | None = None,
    on_group: Callable[[dict[str, EncodedWeight]], None] | None = None,
    progress: bool | None = None,
) -> list[EncodedWeight]:
    """What stands for each weight of `chosen`, found on the texts of `calibration`; the model is as it was afterwards.

    calibration: batches, dictionaries of the model's arguments; every fifth, or eight in all, is held out to judge by.
    importance: see `encode_weights`; the rows of a linear layer are weighted with its mean. finished: what an earlier call
    gave on_group, by name of the weight; it is taken as it is. on_group is called after each group with what stands for its
    weights. progress: see `quantize_`. Raises ValueError where there are no batches or the model does not take them, and,
    naming the layer, for inputs that are NaN or Inf.
    """
    fitted, judged = read_batches(calibration)
    if any(batch is other for batch in fitted for other in judged):
        warnings.warn("calibration: one text is all there is, so it judges what was fitted to it; give more", stacklevel=4)
    given: list[Tensor | None] = [None] * len(chosen) if importance is None else importance
    if any(
        weigh is not None and config.rows_per_codebook(weight.rows) == 1 and not issubclass(weight.kind.plain, nn.Embedding)
        for weight, weigh in zip(chosen, given, strict=True)
    ):
        said = "weighting: with a codebook a row, objective 'output' takes Fisher weights for embeddings alone"
        warnings.warn(said, stacklevel=4)
    names = [weight.parameter for weight in chosen]
    matrices = [weight.tensor.contiguous() for weight in chosen]
    plain = encode_weights(matrices, [weight.bits or 0 for weight in chosen], config, importance=given, names=names)
    del matrices
    with _prepared(model):
        return _Search(model, chosen, config, fitted, judged, given, plain)(dict(finished or {}), on_group, progress)


class _Search:
    """One search for what stands for the weights of a model: what is known, and what stands for them so far."""

    def __init__(
        self,
        model: nn.Module,
        chosen: list[Weight],
        config: KMQConfig,
        fitted: list[Batch],
        judged: list[Batch],
        importance: list[Tensor | None],
        plain: list[EncodedWeight],
    ) -> None:
        self.chosen, self.config = chosen, config
        self.plain = {weight.name: encoded for weight, encoded in zip(chosen, plain, strict=True)}
        self.importance = {weight.name: given for weight, given in zip(chosen, importance, strict=True)}
        self.now: dict[str, EncodedWeight] = {}  # what stands for weights in the passes
        self.model, self.passes = model, Passes(model, fitted, judged, self._stand_in)
        self.tokens: dict[str, int] = {}  # that a weight was fitted to
        self.wanted: list[Tensor] = []  # the outputs of the model as it is for the texts to judge by

    def _stand_in(self, weight: Weight, rows: Tensor | None) -> tuple[Tensor, Tensor | None] | None:
        """What stands for a weight so far, or for some rows of it: see `Passes`."""
        encoded = self.now.get(weight.name)
        if encoded is None:
            return None
        group_rows = self.config.rows_per_codebook(weight.rows)
        if rows is not None:
            return decode_rows(encoded, rows, weight.cols, group_rows).to(weight.source.dtype), None
        matrix = decode(encoded, weight.cols, group_rows).to(weight.source.dtype)
        return matrix.t() if weight.transposed else matrix.view(weight.source.shape), encoded.bias

    def __call__(
        self,
        finished: dict[str, EncodedWeight],
        on_group: Callable[[dict[str, EncodedWeight]], None] | None,
        progress: bool | None,
    ) -> list[EncodedWeight]:
        passes = self.passes
        groups = passes.groups([weight for weight in self.chosen if not weight.computed])
        self.now = {weight.name: self.plain[weight.name] for weight in passes.uncalled}
        self.wanted = [first_tensor(passes.output(number, False)) for number in passes.judged]
        few: list[str] = []
        shown = draws_bars() if progress is None else progress
        with weight_bar("clustering for outputs", [weight.tensor for weight in self.chosen], shown) as bar:
            for group in groups:
                passes.advance(group)
                names = [weight.name for weight in group.weights]
                if all(name in finished for name in names):
                    found = {name: finished[name] for name in names}
                else:
                    found = self._group(group, few)
                    if on_group is not None:
                        on_group(found)
                self.now.update(found)
                bar.update(sum(weight.tensor.numel() for weight in group.weights))
        if few:
            more = f" and {len(few) - 1} more" if len(few) > 1 else ""
            warnings.warn(f"calibration: fewer tokens than columns for {few[0]}{more}; more texts would tell more", stacklevel=5)
        passes.forget()
        result = {**self.plain, **self.now}
        self.now = result
        with_outputs = self._distance()
        self.now = self.plain
        if not with_outputs <= self._distance():
            warnings.warn(
                "objective: plain clusters are nearer to the model's outputs on held-out texts as a whole, so they are taken",
                stacklevel=5,
            )
            result = self.plain
        return [result[weight.name] for weight in self.chosen]

    def _distance(self) -> float:
        """How far the outputs for the texts to judge by are from those of the model as it is."""
        total = 0.0
        for number, wanted in zip(self.passes.judged, self.wanted, strict=True):
            total += distance(self.passes.output(number, True), wanted, self.passes.batches[number])
        return total

    def _group(self, group: Group, few: list[str]) -> dict[str, EncodedWeight]:
        """What stands for the weights of a group; names of those that are fitted to few tokens are added to `few`."""
        embeds = issubclass(group.weights[0].kind.plain, nn.Embedding)
        found = self._embeddings(group) if embeds else self._linear(group)
        plain = {weight.name: self.plain[weight.name] for weight in group.weights}
        before = self.now
        self.now = {**before, **found}
        ours = self._distance()
        self.now = {**before, **plain}
        theirs = self._distance()
        self.now = before
        log.info("%s: distance of the outputs %.4g, with plain clusters %.4g", group.weights[0].name, ours, theirs)
        if not ours < theirs:
            return plain
        few += [weight.name for weight in group.weights if self.tokens.get(weight.name, weight.cols) < weight.cols]
        return found

    @functools.cached_property
    def _gradients(self) -> dict[int, Tensor]:
        """Second moments of gradients of the outputs by what embeddings give: see `gradient_moments`."""
        embeddings = [
            layer for weight in self.chosen if issubclass(weight.kind.plain, nn.Embedding) for layer in layers_of(weight)
        ]
        passes = self.passes
        return gradient_moments(self.model, (passes.batches[number] for number in passes.fitted), embeddings)

    def _embeddings(self, group: Group) -> dict[str, EncodedWeight]:
        """Rows weighted by how often they occur; their errors by what these do to the outputs, or, where that is not known or
        takes too much memory, by the gain of the normalization that follows."""
        rows = group.weights[0].rows
        passes = self.passes
        count = torch.full((rows,), UNSEEN, device=passes.device)
        for number in passes.fitted:
            for ids in passes.inputs(number, True, group)[0]:
                mask = passes.batches[number].get("attention_mask")
                if mask is not None and mask.dim() == 2 and ids.shape in (mask.shape, (1, mask.shape[1])):
                    ids = ids.expand(mask.shape)[mask > 0]
                count += torch.bincount(ids.reshape(-1), minlength=rows)
        gain = getattr(group.norm, "weight", None)
        found = {}
        for weight in group.weights:
            seen = [self._gradients[id(layer)] for layer in layers_of(weight) if id(layer) in self._gradients]
            shared = self.config.rows_per_codebook(rows) * weight.cols
            weigh = self.importance[weight.name]
            if weigh is None and seen and shared <= SHARED:
                moments = torch.stack(seen).sum(0)
                gram = (moments / moments.diagonal().mean()).float()
                gram.diagonal().add_(DAMPING)
                found[weight.name] = self._clustered_embedding(weight, gram, count / count.mean())
                continue
            if weigh is None:
                ones = torch.ones(weight.cols, device=count.device)
                follows = ones if gain is None or gain.shape != ones.shape else gain.detach().float().square()
                weigh = count[:, None] * follows
            (found[weight.name],) = encode_weights(
                [weight.tensor.contiguous()], [weight.bits or 0], self.config, importance=[weigh], names=[weight.parameter]
            )
        return found

    def _clustered_embedding(self, weight: Weight, gram: Tensor, often: Tensor) -> EncodedWeight:
        matrix = weight.tensor.float()
        weigh = gram.diagonal() * often[:, None]
        return self._clustered(weight, matrix, weigh, gram, lambda rows: matrix[rows] @ gram, often)

    def _linear(self, group: Group) -> dict[str, EncodedWeight]:
        """Fitted to what reaches the layers."""
        moments = self._moments(group)
        self.tokens.update({weight.name: moments.tokens for weight in group.weights})
        return {weight.name: self._fitted(weight, moments) for weight in group.weights}

    def _moments(self, group: Group) -> _Moments:
        """What reaches the layers, from passes with and without what stands for the weights so far."""
        passes, cols, rows = self.passes, group.weights[0].cols, group.weights[0].rows
        zeros = functools.partial(torch.zeros, device=passes.device)
        xx, yx, x_sum, y_sum = zeros(cols, cols), zeros(cols, cols), zeros(cols), zeros(cols)
        rx, r_sum = (None, None) if group.norm is None else (zeros(rows, cols), zeros(rows))
        tokens, total = 0, 0.0
        for number in passes.fitted:
            (ys, added_y), (xs, added_x) = (passes.inputs(number, replaced, group) for replaced in (False, True))
            if [y.shape for y in ys] != [x.shape for x in xs]:  # the model sends other tokens there, or none
                continue
            for y, x in zip(ys, xs, strict=True):
                y, x = (self._vectors(value, group) for value in (y, x))
                weight = token_weights(passes.batches[number], x.shape)
                weight = torch.ones(x.shape[:-1].numel(), device=x.device) if weight is None else weight
                tokens, total = tokens + int((weight > 0).sum()), total + float(weight.sum())
                y, x = (value.reshape(-1, cols).float() for value in (y, x))
                weighted = x * weight[:, None]
                xx += weighted.t() @ x
                yx += y.t() @ weighted
                x_sum += weighted.sum(0)
                y_sum += weight @ y
                if rx is not None and r_sum is not None and added_y is not None and added_x is not None:
                    less = ADDED * self._vectors(added_y - added_x, group).reshape(-1, rows).float()
                    rx += less.t() @ weighted
                    r_sum += weight @ less
        if not all(bool(torch.isfinite(part).all()) for part in (xx, yx)):
            raise ValueError(f"calibration: NaN or Inf in the inputs of {group.weights[0].name}")
        share = 1 / max(total, 1e-30)
        rx, r_sum = (None if part is None else part * share for part in (rx, r_sum))
        return _Moments(xx * share, yx * share, x_sum * share, y_sum * share, rx, r_sum, tokens)

    @staticmethod
    def _vectors(value: Tensor, group: Group) -> Tensor:
        """(..., width): a convolution has its channels before the positions."""
        return value.transpose(-1, -2) if isinstance(group.layers[0], nn.Conv1d) else value

    def _fitted(self, weight: Weight, moments: _Moments) -> EncodedWeight:
        """The weight clustered for the outputs that are wanted from such inputs, and its bias."""
        matrix = weight.tensor.float()
        bias: Tensor | None = _own_bias(weight, self.model)
        linear = matrix @ moments.yx
        aim = matrix @ moments.y  # the mean output that is wanted, less the bias
        if moments.rx is not None and moments.r is not None:
            linear, aim = linear + moments.rx, aim + moments.r
        gram = moments.xx.clone()
        if bias is not None:  # it takes over the means
            gram -= torch.outer(moments.x, moments.x)
            linear -= torch.outer(aim, moments.x)
        # Of inputs that hardly differ, what rounding leaves is no covariance.
        damping = DAMPING * max(float(gram.diagonal().mean()), ROUNDING * float(moments.xx.diagonal().mean())) + 1e-12
        gram.diagonal().add_(damping)
        linear += damping * matrix
        wanted = torch.cholesky_solve(linear.t().double(), torch.linalg.cholesky(gram.double())).t().float().contiguous()
        weigh = gram.diagonal().expand_as(matrix)
        given, row_weight = self.importance[weight.name], None
        if given is not None:
            row_weight = given.float().mean(1)
            row_weight = row_weight / row_weight.mean().clamp_min(1e-30)
            weigh = weigh * row_weight[:, None]
        encoded = self._clustered(weight, wanted, weigh, gram, linear.__getitem__, row_weight)
        if bias is None:
            return encoded
        outputs = decode(encoded, weight.cols, self.config.rows_per_codebook(weight.rows)) @ moments.x
        return encoded._replace(bias=(bias.detach().float() + aim - outputs).to(bias.dtype))

    def _clustered(
        self,
        weight: Weight,
        wanted: Tensor,
        weigh: Tensor,
        gram: Tensor,
        linear: Callable[[slice], Tensor],
        row_weight: Tensor | None,
    ) -> EncodedWeight:
        """A weight clustered for its outputs, see `OutputProblem`; some rows after the others where they share no codebook.
        linear: B of some rows. It begins at `wanted`, clustered with importance `weigh`."""
        bits, group_rows = weight.bits or 0, self.config.rows_per_codebook(weight.rows)
        (start,) = encode_weights(
            [wanted.contiguous()], [bits], self.config, importance=[weigh.contiguous()], names=[weight.parameter]
        )
        free = exact = None
        if start.outlier_index is not None and start.outlier_values is not None:
            index = start.outlier_index.long()
            free = torch.zeros(wanted.numel(), dtype=torch.bool, device=wanted.device).index_fill_(0, index, True).view_as(wanted)
            exact = torch.zeros_like(wanted).view(-1).index_copy_(0, index, start.outlier_values).view_as(wanted)
        step = max(1, AT_ONCE // (group_rows * weight.cols)) * group_rows
        found: list[tuple[Tensor | None, ...]] = []
        error = 0.0
        for rows in (slice(first, first + step) for first in range(0, weight.rows, step)):
            places, values, scale, weights = (
                None if value is None else value[rows] for value in (free, exact, start.row_scale, row_weight)
            )
            problem = OutputProblem(gram, linear(rows), bits, group_rows, weights, places)
            book = start.codebook[rows.start // group_rows : -(-rows.stop // group_rows)]
            begun = Clusters(book, ops.unpack(start.packed[rows], bits, weight.cols), scale, values)
            clusters = fit_outputs(problem, begun)
            decoded = problem.decoded(clusters)
            error += float((weight.tensor[rows].float() - decoded).square().sum(dtype=torch.float64))
            values = None if clusters.exact is None or places is None else clusters.exact[places]
            found.append((clusters.codebook, ops.pack(clusters.codes, bits), clusters.scale, values))
        codebook, packed, scale, values = (_joined(parts) for parts in zip(*found, strict=True))
        return EncodedWeight(codebook, packed, scale, start.outlier_index, values, error)


def _joined(parts: tuple[Any, ...]) -> Any:
    """Rows one after the other, or None where they are None."""
    return None if parts[0] is None else torch.cat(parts)


def _own_bias(weight: Weight, model: nn.Module) -> nn.Parameter | None:
    """The bias that can take over a difference of means: that of the one layer that has the weight, and of no other."""
    modules = list({id(module): module for module in weight.modules.values()}.values())
    bias = modules[0]._parameters.get("bias")
    if len(modules) > 1 or bias is None:
        return None
    places = sum(parameter is bias for _, parameter in model.named_parameters(remove_duplicate=False))
    return bias if places == len(weight.modules) else None


@contextmanager
def _prepared(model: nn.Module) -> Iterator[None]:
    """Eval mode, and products of fp32 values as exact as fp32; afterwards as it was."""
    with evaluating(model), _full_precision():
        yield


@contextmanager
def _full_precision() -> Iterator[None]:
    """What `torch.set_float32_matmul_precision` allows, 8 or 11 bits of each factor, is less than second moments need."""
    # torch sets mkldnn.matmul when it is imported, so type checkers do not see it.
    backends: tuple[Any, ...] = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    precisions = [backend.fp32_precision for backend in backends]
    if not {"bf16", "tf32"}.intersection(precisions):
        yield
        return
    try:
        overall = torch.get_float32_matmul_precision()
    except RuntimeError:  # there is none where backends were set one by one
        overall = "highest"
    try:
        torch.set_float32_matmul_precision("highest")
        yield
    finally:
        torch.set_float32_matmul_precision(overall)
        for backend, precision in zip(backends, precisions, strict=True):
            backend.fp32_precision = "none"  # which is that of all, so that one that was inherited stays inherited
            if backend.fp32_precision != precision:
                backend.fp32_precision = precision

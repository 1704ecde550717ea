"""How much the loss depends on each weight: the Fisher diagonal, and the largest Hessian eigenvalue of each module.

Both work on batches, a batch at a time, and keep what is done in a safetensors file: an interrupted computation goes on from
there, and a finished one is read. The file says what it was made of. Another model's file is refused. A file of other batches,
another loss, more batches than are asked for, other settings or another version of this package is no part of what is asked for:
it is computed anew, and a warning says so. The batches are known by their content, the loss by its value and its gradient on
the first batch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import logging
import math
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm

from . import __version__
from .files import locked, one_line, publish_file
from .quantization import KMQConfig, evaluating, plan
from .terminal import draws_bars

logger = logging.getLogger(__name__)

Batch = dict[str, Any]
Loss = Callable[[nn.Module, Batch], Tensor]


class SensitivityError(ValueError):
    """Data or a file that no sensitivity can be had from, with the reason in one sentence."""


def model_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The loss that a transformers model computes of a batch with labels."""
    if not isinstance(batch, Mapping):
        wanted = "dictionaries of the model's arguments, such as input_ids and labels"
        raise SensitivityError(f"batches: expected {wanted}, got {type(batch).__name__}")
    try:
        loss = model(**batch).loss
    except (TypeError, AttributeError) as error:
        raise SensitivityError(f"batches: {type(model).__name__} does not take them ({one_line(error)})") from None
    if loss is None:
        raise SensitivityError("batches: the model gives no loss; expected batches with labels")
    return loss


def fisher_diagonal(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    config: KMQConfig | None = None,
    num_batches: int | None = None,
    loss: Loss = model_loss,
    path: str | Path | None = None,
    save_every: int = 32,
    progress: bool | None = None,
) -> dict[str, Tensor]:
    """Mean over batches of the squared gradient of every weight that `config` quantizes, {module name: (rows, cols) fp32}.

    batches: keyword arguments for the model, on any device; the same ones in the same order where a computation is to go on.
    num_batches: stop after so many, default all. loss: a scalar of a batch; with batches of one text the result is the empirical
    Fisher diagonal, with larger ones it tends to that over the batch size near a minimum. path: file to keep the sums in, written
    every `save_every` batches. progress: a progress bar; None shows one that appears when it takes longer than two seconds.
    The model is used in eval mode and left as it was. Raises SensitivityError where there is no batch, for a gradient that is
    not finite (naming the batch), for a file of other weights, and where another process is computing the same file.
    """
    weights = _weights(model, config)
    sums = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
    with _Store(path, "fisher", {}, model, weights).opened() as store, _prepared(model, weights):
        probe = lambda batch: _gradients(model, weights, batch, loss, 0, create_graph=False)  # noqa: E731
        done, rest, kept = store.resume(batches, num_batches, probe)
        sums |= {name: kept[name].to(weight.device) for name, weight in weights.items() if name in kept}
        begun = done
        with _bar("Fisher diagonal", batches, num_batches, done, progress) as bar:
            for batch in itertools.islice(rest, None if num_batches is None else num_batches - done):
                value, gradients = _gradients(model, weights, batch, loss, done, create_graph=False)
                store.add(batch, value, gradients)  # before they are squared in place
                for name, gradient in gradients.items():
                    if gradient is not None:
                        sums[name] += gradient.float().square_()
                done += 1
                bar.update()
                if done % save_every == 0:
                    store.write(done, sums)
        if not done:
            raise SensitivityError("batches: expected at least one batch, the data loader gave none")
        if done > begun:
            store.write(done, sums)
    return {name: total / done for name, total in sums.items()}


DAMPING = 1.0


def importance(fisher: dict[str, Tensor], damping: float = DAMPING) -> dict[str, Tensor]:
    """The Fisher diagonal as `sample_weight` of `quantize_`: fisher + damping * its mean over the weight.

    The damping stands for what the batches did not show, such as rows of tokens that did not occur. Names and shapes stay.
    """
    return {name: values + damping * values.mean(dtype=torch.float64).float() for name, values in fisher.items()}


def hessian_eigenvalues(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    config: KMQConfig | None = None,
    num_batches: int | None = None,
    loss: Loss = model_loss,
    iterations: int = 10,
    tol: float = 0.02,
    seed: int = 0,
    path: str | Path | None = None,
    progress: bool | None = None,
) -> dict[str, float]:
    """Sensitivity of every module that `config` quantizes by the largest eigenvalue of the Hessian of the loss in its weight.

    Power iteration on Hessian-vector products, at most `iterations` a batch, until the eigenvalue (the one of largest size)
    changes by less than `tol` of itself. As in Q-BERT (Shen et al. 2020) the value of a module is |mean| + standard deviation
    of the eigenvalues over the batches, so that a module whose curvature varies counts as sensitive. Returns
    {module name: value}. The other arguments, the file and the errors are those of `fisher_diagonal`.
    """
    if iterations < 1:
        raise ValueError(f"iterations: expected at least 1, got {iterations}")
    weights = _weights(model, config)
    found = {name: torch.zeros(0, dtype=torch.float64) for name in weights}
    settings = {"iterations": iterations, "tol": tol, "seed": seed}
    with _Store(path, "hessian", settings, model, weights).opened() as store, _prepared(model, weights):
        probe = lambda batch: _gradients(model, weights, batch, loss, 0, create_graph=False)  # noqa: E731
        done, rest, kept = store.resume(batches, num_batches, probe)
        found |= kept
        with _bar("Hessian eigenvalues", batches, num_batches, done, progress, len(weights)) as bar:
            for batch in itertools.islice(rest, None if num_batches is None else num_batches - done):
                with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
                    value, gradients = _gradients(model, weights, batch, loss, done, create_graph=True)
                store.add(batch, value, gradients)
                for name, gradient in gradients.items():
                    generator = torch.Generator().manual_seed(seed)
                    largest = 0.0 if gradient is None else _largest(gradient, weights[name], iterations, tol, generator)
                    if largest != largest:
                        raise SensitivityError(f"batch {done}: NaN or Inf in a Hessian-vector product of {name}.weight")
                    found[name] = torch.cat([found[name], torch.tensor([largest], dtype=torch.float64)])
                    bar.update()
                del gradients, gradient
                done += 1
                store.write(done, found)
        if not done:
            raise SensitivityError("batches: expected at least one batch, the data loader gave none")
    return _sensitivities(found)


def _sensitivities(found: dict[str, Tensor]) -> dict[str, float]:
    return {name: float(values.mean().abs() + values.std(correction=0)) for name, values in found.items()}


def _largest(gradient: Tensor, weight: Tensor, iterations: int, tol: float, generator: torch.Generator) -> float:
    """The eigenvalue of largest size of the block of the Hessian that `weight` has; nan where it is not finite."""
    vector = torch.randn(weight.shape, generator=generator, dtype=torch.float32).to(weight.device, weight.dtype)
    vector /= vector.norm()
    value = 0.0
    for _ in range(iterations):
        if not gradient.requires_grad:  # the loss is linear in it
            return 0.0
        (product,) = torch.autograd.grad(gradient, weight, vector, retain_graph=True, allow_unused=True)
        if product is None:
            return 0.0
        before, value = value, float((product.double() * vector.double()).sum())
        size = float(product.norm())
        if not size < float("inf"):
            return float("nan")
        if size == 0.0 or abs(value - before) <= tol * abs(value):
            return value
        vector = product / size
    return value


def _weights(model: nn.Module, config: KMQConfig | None) -> dict[str, Tensor]:
    weights = plan(model, config or KMQConfig()).quantized
    if not weights:
        raise SensitivityError("model: it has no embedding or linear layer to quantize (or is quantized already)")
    for weight in weights:
        if weight.computed:
            raise SensitivityError(
                f"{weight.parameter}: {weight.computed} computes it, so it has no gradient of its own; add it to skip"
            )
    return {weight.name: weight.source for weight in weights}


def _gradients(
    model: nn.Module, weights: dict[str, Tensor], batch: Batch, loss: Loss, number: int, create_graph: bool
) -> tuple[float, dict[str, Tensor | None]]:
    """The loss, and the gradient of each weight, None for one that the loss does not depend on."""
    value = loss(model, _moved(batch, next(iter(weights.values())).device))
    gradients = torch.autograd.grad(value, list(weights.values()), create_graph=create_graph, allow_unused=True)
    for name, gradient in zip(weights, gradients, strict=True):
        if gradient is not None and not bool(torch.isfinite(gradient.detach()).all()):
            raise SensitivityError(f"batch {number}: NaN or Inf in the gradient of {name}.weight")
    return float(value.detach()), dict(zip(weights, gradients, strict=True))


def _moved(content: Any, device: torch.device) -> Any:
    """The tensors of a batch on a device."""
    if isinstance(content, Tensor):
        return content.to(device)
    if isinstance(content, dict):
        return {name: _moved(value, device) for name, value in content.items()}
    if type(content) in (list, tuple):
        return type(content)(_moved(value, device) for value in content)
    return content


@contextlib.contextmanager
def _prepared(model: nn.Module, weights: dict[str, Tensor]) -> Iterator[None]:
    """Eval mode and gradients for these weights only; afterwards as it was."""
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    wanted = {id(weight) for weight in weights.values()}
    try:
        for parameter in trained:
            parameter.requires_grad_(id(parameter) in wanted)
        with evaluating(model):
            yield
    finally:
        for parameter, was in trained.items():
            parameter.requires_grad_(was)


def _bar(title: str, batches: Any, num_batches: int | None, done: int, progress: bool | None, each: int = 1) -> Any:
    count = len(batches) if hasattr(batches, "__len__") else None
    total = num_batches if count is None else min(count, num_batches or count)
    delay = 2.0 if progress is None else 0.0
    show = progress if progress is not None else draws_bars()
    steps = None if total is None else total * each
    return tqdm(total=steps, initial=done * each, desc=title, delay=delay, leave=False, disable=not show)


def _bytes_of(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def _fingerprint(model: nn.Module, weights: dict[str, Tensor]) -> str:
    """A digest of the names of `weights` and of every value of the model: says which model a file was made for."""
    digest = hashlib.sha256(json.dumps(list(weights)).encode())
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        digest.update(_bytes_of(tensor))
    return digest.hexdigest()


# Where a model is from, and what its forward notes by itself.
_NO_MAKE = ("_name_or_path", "transformers_version", "problem_type")


def _make(model: nn.Module) -> str:
    """A digest of the modules and the configuration: the same values compute something else in other ones."""
    config = getattr(model, "config", None)
    facts = config.to_dict() if config is not None and hasattr(config, "to_dict") else {}
    facts = {key: value for key, value in facts.items() if key not in _NO_MAKE}
    return hashlib.sha256(f"{model!r}{json.dumps(facts, sort_keys=True, default=str)}".encode()).hexdigest()


def _update(digest: Any, content: Any) -> None:
    """Adds the content of a batch to a digest."""
    if isinstance(content, Tensor):
        digest.update(f"tensor {tuple(content.shape)} {content.dtype};".encode())
        digest.update(_bytes_of(content))
    elif isinstance(content, dict):
        for name, value in content.items():
            digest.update(f"{name!r}:".encode())
            _update(digest, value)
    elif type(content) in (list, tuple):
        digest.update(f"{len(content)} of them;".encode())
        for value in content:
            _update(digest, value)
    else:
        digest.update(pickle.dumps(content, protocol=4))


_LOSS_TOLERANCE = 1e-5  # what other kernels or threads make of the same loss differs by less, relatively


@dataclasses.dataclass
class _Store:
    """The file of a computation, if it has one: what is done, and what it was done with."""

    path: str | Path | None
    kind: str
    settings: dict[str, Any]
    model: nn.Module
    weights: dict[str, Tensor]
    data: Any = dataclasses.field(default_factory=hashlib.sha256)  # of the batches so far
    first: tuple[float, float] | None = None  # loss of the first batch, and the norm of its gradient
    mark: str = ""

    @contextlib.contextmanager
    def opened(self) -> Iterator[_Store]:
        """Keeps other processes from the file."""
        if self.path is None:
            yield self
            return
        path = self.path = Path(self.path)
        self.mark = _fingerprint(self.model, self.weights)
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
        refusal = SensitivityError(f"{path}: another process is computing it")
        with locked(path.with_name(f".{path.name}.lock"), lambda: refusal):
            yield self

    def add(self, batch: Batch, loss: float, gradients: dict[str, Tensor | None]) -> None:
        """Takes note of a batch that is done."""
        if self.path is not None:
            _update(self.data, batch)
            self.first = self.first or (loss, _norm(gradients))

    def write(self, done: int, tensors: dict[str, Tensor]) -> None:
        """Whole or not at all."""
        if self.path is None:
            return
        assert self.first is not None
        metadata = {
            "format": "pt",
            "kmq_sensitivity": self.kind,
            "kmq_kernels": __version__,
            "weights": self.mark,
            "make": _make(self.model),
            "batches": str(done),
            "data": self.data.hexdigest(),
            "first": json.dumps(self.first),
            "settings": json.dumps(self.settings),
        }
        with publish_file(Path(self.path)) as partial:
            save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, partial, metadata=metadata)

    def resume(
        self,
        batches: Iterable[Batch],
        num_batches: int | None,
        probe: Callable[[Batch], tuple[float, dict[str, Tensor | None]]],
    ) -> tuple[int, Iterator[Batch], dict[str, Tensor]]:
        """How many batches are done, an iterator over the others, and the tensors so far.

        probe: loss and gradients of a batch. Raises SensitivityError for a file of another model.
        """
        rest = iter(batches)
        if self.path is None or not Path(self.path).is_file():
            return 0, rest, {}
        metadata, tensors = self._read(Path(self.path))
        done = int(metadata["batches"])
        other = self._other(metadata, num_batches)
        seen: list[Batch] = []
        if other is None:
            once = rest is batches  # nothing can be read again
            passed = 0
            for batch in itertools.islice(rest, done):
                _update(self.data, batch)
                passed += 1
                if once or not seen:
                    seen.append(batch)
            if passed < done or self.data.hexdigest() != metadata["data"]:
                other = "of other batches"
            elif not self._same_loss(*probe(seen[0]), json.loads(metadata["first"])):
                other = "with another loss"
            else:
                return done, rest, tensors
            rest = itertools.chain(seen, rest) if once else iter(batches)
        logger.warning("%s: it was made %s; it is computed anew", self.path, other)
        self.data, self.first = hashlib.sha256(), None
        return 0, rest, {}

    def _read(self, path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
        """Metadata and tensors of a file that was made for this model."""
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
        except (SafetensorError, OSError) as error:
            raise SensitivityError(f"{path}: not a complete safetensors file ({error})") from None
        if metadata.get("kmq_sensitivity") != self.kind:
            raise SensitivityError(f"{path}: it holds no sensitivity of kind {self.kind!r}")
        for name, weight in self.weights.items() if self.kind == "fisher" else ():
            if name not in tensors or tensors[name].shape != weight.shape:
                shape = tuple(tensors[name].shape) if name in tensors else "no such tensor"
                raise SensitivityError(
                    f"{path}: it is of another model: {name} has shape {tuple(weight.shape)}, the file {shape}"
                )
        if "data" in metadata and metadata.get("weights") != self.mark:
            raise SensitivityError(f"{path}: it was made for other weights than this model's; remove it or choose another file")
        return metadata, tensors

    def _other(self, metadata: dict[str, str], num_batches: int | None) -> str | None:
        """In which way a file is not a part of what is asked for, as far as can be said without the batches."""
        done = int(metadata["batches"])
        if "data" not in metadata:
            return "by a version that noted no batches"
        if metadata["kmq_kernels"] != __version__:
            return f"by version {metadata['kmq_kernels']}, this is {__version__}"
        if metadata["make"] != _make(self.model):
            return "with another configuration of the model, and so another loss"
        if num_batches is not None and done > num_batches:
            return f"of {done} batches, {num_batches} are asked for"
        if json.loads(metadata["settings"]) != self.settings:
            return f"with {metadata['settings']}, this asks for {json.dumps(self.settings)}"
        return None

    def _same_loss(self, loss: float, gradients: dict[str, Tensor | None], first: list[float]) -> bool:
        self.first = (first[0], first[1])
        found = (loss, _norm(gradients))
        return all(math.isclose(a, b, rel_tol=_LOSS_TOLERANCE, abs_tol=1e-12) for a, b in zip(found, self.first, strict=True))


def _norm(gradients: dict[str, Tensor | None]) -> float:
    squares = [gradient.detach().double().square().sum().cpu() for gradient in gradients.values() if gradient is not None]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0

"""How much the loss depends on each weight: the Fisher diagonal, and the largest Hessian eigenvalue of each module.

Both work on batches, a batch at a time, and keep what is done in a safetensors file: an interrupted computation goes on from
there, and a finished one is read. The file says which weights it was made for; other weights are refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm

from .quantization import KMQConfig, plan

Batch = dict[str, Any]
Loss = Callable[[nn.Module, Batch], Tensor]


class SensitivityError(ValueError):
    """Data or a file that no sensitivity can be had from, with the reason in one sentence."""


def model_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The loss that a transformers model computes of a batch with labels."""
    loss = model(**batch).loss
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

    batches: keyword arguments for the model; the same ones in the same order where a computation is to go on. num_batches: stop
    after so many, default all. loss: a scalar of a batch; with batches of one text the result is the empirical Fisher diagonal,
    with larger ones it tends to that over the batch size near a minimum. path: file to keep the sums in, written every
    `save_every` batches. progress: a progress bar; None shows one that appears when it takes longer than two seconds.
    The model is used in eval mode and left as it was. Raises SensitivityError where there is no batch, for a gradient that is
    not finite (naming the batch) and for a file of other weights.
    """
    weights = _weights(model, config)
    mark = _fingerprint(weights)
    done, sums = 0, {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
    if path is not None and Path(path).is_file():
        done, sums = _read(Path(path), "fisher", mark, weights)
        if num_batches is not None and done >= num_batches:
            return {name: total / done for name, total in sums.items()}
    with _prepared(model, weights), _bar("Fisher diagonal", batches, num_batches, done, progress) as bar:
        for number, batch in _remaining(batches, done, num_batches):
            gradients = _gradients(model, weights, batch, loss, number, create_graph=False)
            for name, gradient in gradients.items():
                if gradient is not None:
                    sums[name] += gradient.float().square_()
            done = number + 1
            bar.update()
            if path is not None and done % save_every == 0:
                _write(Path(path), "fisher", mark, done, sums)
    if not done:
        raise SensitivityError("batches: expected at least one batch, the data loader gave none")
    if path is not None:
        _write(Path(path), "fisher", mark, done, sums)
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
    mark = _fingerprint(weights)
    done, found = 0, {name: torch.zeros(0, dtype=torch.float64) for name in weights}
    if path is not None and Path(path).is_file():
        done, found = _read(Path(path), "hessian", mark, None)
        if num_batches is not None and done >= num_batches:
            return _sensitivities(found)
    with _prepared(model, weights), _bar("Hessian eigenvalues", batches, num_batches, done, progress, len(weights)) as bar:
        for number, batch in _remaining(batches, done, num_batches):
            with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
                gradients = _gradients(model, weights, batch, loss, number, create_graph=True)
            for name, gradient in gradients.items():
                generator = torch.Generator().manual_seed(seed)
                value = 0.0 if gradient is None else _largest(gradient, weights[name], iterations, tol, generator)
                if value != value:
                    raise SensitivityError(f"batch {number}: NaN or Inf in a Hessian-vector product of {name}.weight")
                found[name] = torch.cat([found[name], torch.tensor([value], dtype=torch.float64)])
                bar.update()
            del gradients
            done = number + 1
            if path is not None:
                _write(Path(path), "hessian", mark, done, found)
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
    return {weight.name: weight.tensor for weight in weights}


def _gradients(
    model: nn.Module, weights: dict[str, Tensor], batch: Batch, loss: Loss, number: int, create_graph: bool
) -> dict[str, Tensor | None]:
    """The gradient of each weight, None for one that the loss does not depend on."""
    gradients = torch.autograd.grad(loss(model, batch), list(weights.values()), create_graph=create_graph, allow_unused=True)
    for name, gradient in zip(weights, gradients, strict=True):
        if gradient is not None and not bool(torch.isfinite(gradient.detach()).all()):
            raise SensitivityError(f"batch {number}: NaN or Inf in the gradient of {name}.weight")
    return dict(zip(weights, gradients, strict=True))


@contextlib.contextmanager
def _prepared(model: nn.Module, weights: dict[str, Tensor]) -> Iterator[None]:
    """Eval mode and gradients for these weights only; afterwards as it was."""
    training = {module: module.training for module in model.modules()}
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    wanted = {id(weight) for weight in weights.values()}
    try:
        model.eval()
        for parameter in trained:
            parameter.requires_grad_(id(parameter) in wanted)
        yield
    finally:
        for module, was in training.items():
            module.training = was
        for parameter, was in trained.items():
            parameter.requires_grad_(was)


def _remaining(batches: Iterable[Batch], done: int, num_batches: int | None) -> Iterator[tuple[int, Batch]]:
    return itertools.islice(enumerate(batches), done, num_batches)


def _bar(title: str, batches: Any, num_batches: int | None, done: int, progress: bool | None, each: int = 1) -> Any:
    count = len(batches) if hasattr(batches, "__len__") else None
    total = num_batches if count is None else min(count, num_batches or count)
    delay = 2.0 if progress is None else 0.0
    return tqdm(
        total=None if total is None else total * each, initial=done * each, desc=title, delay=delay, disable=progress is False
    )


def _fingerprint(weights: dict[str, Tensor]) -> str:
    """A digest of names, shapes and values: says which weights a file was made for."""
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in weights.items():
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype};".encode())
        digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _write(path: Path, kind: str, mark: str, done: int, tensors: dict[str, Tensor]) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        metadata = {"format": "pt", "kmq_sensitivity": kind, "weights": mark, "batches": str(done)}
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, partial, metadata=metadata)
        with partial.open("rb") as handle:
            os.fsync(handle.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _read(path: Path, kind: str, mark: str, weights: dict[str, Tensor] | None) -> tuple[int, dict[str, Tensor]]:
    """Batches done and the tensors of a file that was made for the weights that `mark` stands for."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    except (SafetensorError, OSError) as error:
        raise SensitivityError(f"{path}: not a complete safetensors file ({error})") from None
    if metadata.get("kmq_sensitivity") != kind:
        raise SensitivityError(f"{path}: it holds no sensitivity of kind {kind!r}")
    for name, weight in (weights or {}).items():
        if name not in tensors or tensors[name].shape != weight.shape:
            shape = tuple(tensors[name].shape) if name in tensors else "no such tensor"
            raise SensitivityError(f"{path}: it is of another model: {name} has shape {tuple(weight.shape)}, the file {shape}")
    if metadata.get("weights") != mark:
        raise SensitivityError(f"{path}: it was made for other weights than this model's; remove it or choose another file")
    if weights is not None:
        tensors = {name: tensors[name].to(weight.device) for name, weight in weights.items()}
    return int(metadata["batches"]), tensors

"""What a quantized checkpoint will hold, decided from headers and config.json: tensors, bits, shards.

The model is built on the meta device, so that names, ties, classes and the choice of layers are those of transformers and
`quantize_`; no weight is read. The order of the output and the borders of its shards depend on the model and the shard size
alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import pickle
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from .. import __version__, ops
from ..files import (
    DTYPE_NAMES,
    WEIGHTS,
    CheckpointError,
    StoredTensor,
    file_record,
    files_below,
    files_left_out,
    side_files,
    stored_tensors,
)
from ..hf import hub_id, kept_names, model_dtype
from ..quantization import Budget, KMQConfig, Plan, encoded_shapes, find_budget, plan, refuse_unmatched, remarks, swap

SHARD_BYTES = 256_000_000
T = TypeVar("T")


class Output(NamedTuple):
    """A tensor of the output."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its size in a file."""
        return math.prod(self.shape) * self.dtype.itemsize


class Unit(NamedTuple):
    """One stored tensor and what it becomes: itself (`bits` None, one output) or a codebook and packed indices."""

    name: str
    source: StoredTensor
    dtype: torch.dtype  # of the model: what from_pretrained would cast the tensor to
    bits: int | None
    group_rows: int
    transposed: bool  # stored (cols, rows), as transformers' Conv1D does
    outputs: tuple[Output, ...]

    @property
    def nbytes(self) -> int:
        """Bytes it takes in the output."""
        return sum(output.nbytes for output in self.outputs)

    @property
    def work(self) -> int:
        """Bytes to read."""
        return self.source.nbytes

    def at_bits(self, bits: int, config: KMQConfig) -> Unit:
        """The same with other bits."""
        rows = next(output.shape[0] for output in self.outputs if output.name.endswith(".packed"))
        shapes = encoded_shapes(rows, math.prod(self.source.shape) // max(rows, 1), bits, config)
        outputs = (output._replace(shape=shapes.get(output.name.rpartition(".")[2], output.shape)) for output in self.outputs)
        return self._replace(bits=bits, outputs=tuple(outputs))


class Shard(NamedTuple):
    """A file of the output."""

    name: str
    units: tuple[Unit, ...]

    @property
    def tensors(self) -> list[tuple[str, str, tuple[int, ...], int]]:
        """What `header_bytes` needs."""
        return [(o.name, DTYPE_NAMES[o.dtype], o.shape, o.nbytes) for unit in self.units for o in unit.outputs]

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(unit.nbytes for unit in self.units)

    @property
    def work(self) -> int:
        """Bytes to read: what the ranks share out."""
        return sum(unit.source.nbytes for unit in self.units)


@dataclasses.dataclass(frozen=True)
class StreamPlan:
    """Everything about the output but its weights.

    left_out: tensors of the checkpoint that the model class does not have. files_left_out: files that are the whole model in
    another format. remarks: what a warning of quantize_ would say. budget: what is to decide before anything is written, from
    the error of each weight at 1 to 8 bits; `at_bits` decides it.
    """

    source: Path
    model_class: str
    dtype: torch.dtype
    shards: tuple[Shard, ...]
    left_out: tuple[str, ...]
    files_left_out: tuple[str, ...]
    remarks: tuple[str, ...]
    config: KMQConfig  # as asked for
    config_json: str  # of the output, the quantization config resolved
    parameters: int
    shard_bytes: int
    root: Path  # links of the source may lead anywhere below
    side_files: dict[str, str]  # SHA-256 of everything in the source that comes along, by its path in there
    budget: Budget | None = None  # its parameters are names of units
    base_model: str | None = None  # id on the hub of the source
    undecided: StreamPlan | None = None  # the plan before its budget was decided

    @property
    def units(self) -> list[Unit]:
        """All units, in the order of the output."""
        return [unit for shard in self.shards for unit in shard.units]

    def request(self, device: str) -> dict[str, Any]:
        """What, together with the values of the source's tensors, determines the bytes of every shard of the output.

        "layout" stands for what config.json and transformers' renamings make of the tensors.
        """
        if self.undecided is not None:  # the bits follow from the values
            return self.undecided.request(device)
        files: dict[str, list[str]] = {}
        for unit in self.units:
            files.setdefault(unit.source.file.name, []).append(repr(unit.source[1:]))
        placed = [(shard.name, unit) for shard in self.shards for unit in shard.units]
        layout = [repr((name, unit.name, unit.source.name, *unit[2:])) for name, unit in placed]
        return {
            "kmq_kernels": __version__,
            "model_class": self.model_class,
            "quantization": self.config.to_dict(),
            "shard_bytes": self.shard_bytes,
            "engine": device if device != "cpu" or ops.has_kernel("kmeans", "CPU") else "cpu, plain",
            "source": {name: _digest("\n".join(sorted(tensors)).encode()) for name, tensors in sorted(files.items())},
            "base_model": self.base_model,
            "layout": {"config.json": _digest("\n".join(layout).encode())},
        }

    @property
    def measured(self) -> list[Unit]:
        """The units whose bits the budget leaves to decide, in its order."""
        units = {unit.name: unit for unit in self.units}
        return [units[name] for name in self.budget.parameters] if self.budget is not None else []

    def at_bits(self, bits: Sequence[int]) -> StreamPlan:
        """The plan with the bits of the `measured` units decided."""
        assert self.budget is not None
        found = dict(zip(self.budget.parameters, bits, strict=True))
        units = [unit.at_bits(found[unit.name], self.config) if unit.name in found else unit for unit in self.units]
        content = json.loads(self.config_json)
        resolved = self.budget.resolved(KMQConfig.from_dict(content["quantization_config"]), bits)
        content["quantization_config"] = resolved.to_dict()
        return dataclasses.replace(
            self,
            shards=_shards(units, self.shard_bytes),
            config_json=json.dumps(content, indent=2, sort_keys=True) + "\n",
            budget=None,
            undecided=self,
        )


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def in_child(work: Callable[[], T]) -> T:
    """Result of `work`, done in a process of its own: the model classes it imports (150 MB) do not stay in memory here.

    Done in this process where there are other threads, with which a fork is not safe. Raises what `work` raises.
    """
    if threading.active_count() > 1 or not hasattr(os, "fork"):
        return work()
    sys.stdout.flush()
    sys.stderr.flush()
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            try:
                answer = pickle.dumps((True, work()))
            except Exception as error:
                answer = pickle.dumps((False, error))
            with open(send, "wb") as pipe:
                pipe.write(answer)
        finally:
            os._exit(0)
    os.close(send)
    with open(receive, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    if not answer or status:
        raise CheckpointError(f"the process that reads config.json and headers ended early (status {status})")
    done, value = pickle.loads(answer)
    if not done:
        raise value
    return value


def make_plan(
    source: Path,
    config: KMQConfig,
    *,
    model_class: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    root: Path | None = None,
    base_model: str | None = None,
) -> StreamPlan:
    """Decides what `quantize_checkpoint` will do; reads headers and config.json only.

    source: folder of a transformers model in safetensors. model_class: name of a class of transformers; default the one
    config.json names, or the base model where the checkpoint holds nothing more. root: links out of it are refused, default
    source. base_model: id on the hub of the source, for the card; default that of a snapshot in the hub's cache. Raises
    CheckpointError with a sentence for anything that cannot be read safely or would not load completely.
    """
    from . import model as models  # not above: it takes 150 MB, and the process that streams does without

    if shard_bytes < 1:
        raise ValueError(f"shard_bytes: expected at least 1, got {shard_bytes}")
    if config.needs_fisher or config.allocation == "hessian":
        weighs = config.allocation in ("uniform", "distortion")
        argument, value = ("weighting", config.weighting) if weighs else ("allocation", config.allocation)
        raise ValueError(
            f"{argument}: {value!r} needs data, which a checkpoint does not bring; `kmq run MODEL --task TASK` takes it"
        )
    if source.is_dir():
        files_below(source, root)
    stored = stored_tensors(source)
    files = side_files(source, root or source)
    dtype = model_dtype(source, stored)
    model, sources, left_out = models.build_model(source, stored, model_class, dtype)
    kept = kept_names(model)
    chosen = plan(model, config)
    if not chosen.quantized:
        raise CheckpointError(f"{source}: {type(model).__name__} has no embedding or linear layer to quantize")
    if computed := next((weight for weight in chosen.quantized if weight.computed), None):
        raise CheckpointError(
            f"{source}: {computed.computed} computes {computed.parameter}, and no tensor of the checkpoint is it;"
            " load the model and use quantize_, or skip the layer"
        )
    refuse_unmatched(chosen, config, type(model).__name__)
    said = remarks(model, chosen)
    resolved, budget = config, None
    if config.has_budget:
        parts = 2 + config.row_scale + 2 * (config.outlier_fraction > 0)
        matrices = {weight.parameter for weight in chosen.quantized}
        beside = _beside(config.size or 0, shard_bytes, {n: parts if n in matrices else 1 for n in model.state_dict()})
        budget = find_budget(model, config, chosen.quantized, beside)
        budget = dataclasses.replace(budget, parameters=tuple(kept[name] for name in budget.parameters))
        if config.allocation == "uniform" or not budget.parameters:
            resolved = _uniform(budget, chosen, config, said)
            budget = None
    weights = {kept[weight.parameter]: weight for weight in chosen.quantized}
    dense = model.state_dict(keep_vars=True)
    modules = swap(model, chosen.quantized, config)
    units = []
    for name in dict.fromkeys(kept[name] for name in dense if kept[name] in sources):
        tensor, shape = sources[name], tuple(dense[name].shape)
        if tensor.shape != shape:
            raise CheckpointError(f"{tensor.file}: {tensor.name} has shape {tensor.shape}, config.json asks for {shape}")
        if name not in weights:
            output = Output(name, dense[name].dtype, shape)
            units.append(Unit(name, tensor, output.dtype, None, 0, False, (output,)))
            continue
        if not tensor.torch_dtype.is_floating_point or tensor.torch_dtype.itemsize < 2:
            raise CheckpointError(f"{tensor.file}: {tensor.name} is {tensor.dtype}; F64, F32, F16 or BF16 can be quantized")
        weight = weights[name]
        module, prefix = modules[weight.name], name.removesuffix("weight")
        outputs = tuple(
            Output(f"{prefix}{part}", parameter.dtype, tuple(parameter.shape)) for part, parameter in module.stored().items()
        )
        dtype_of_model, group_rows = dense[name].dtype, module.group_rows
        units.append(Unit(name, tensor, dtype_of_model, weight.bits, group_rows, weight.transposed, outputs))
    units.sort(key=lambda unit: _natural(unit.outputs[0].name))
    resolved = dataclasses.replace(resolved, skip=chosen.left)
    if file_record(source / "config.json")["sha256"] != files["config.json"]:
        raise CheckpointError(f"{source / 'config.json'}: it changed while it was read; give the same command again")
    return StreamPlan(
        source=source,
        model_class=type(model).__name__,
        dtype=dtype,
        shards=_shards(units, shard_bytes),
        left_out=tuple(left_out),
        files_left_out=tuple(files_left_out(source, root or source)),
        remarks=tuple(said),
        config=config,
        config_json=models.config_json(model, resolved, dtype),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        shard_bytes=shard_bytes,
        root=root or source,
        side_files=files,
        budget=budget,
        base_model=base_model or hub_id(str(source)),
    )


def _uniform(budget: Budget, chosen: Plan, config: KMQConfig, said: list[str]) -> KMQConfig:
    """Gives all weights that may get any bits the same, as many as the budget allows; the config that says so."""
    free = [weight for weight in chosen.quantized if not weight.given]
    if not free:
        return config
    bits = budget.uniform()
    for weight, found in zip(free, bits, strict=True):
        weight.bits = found
    if (sentence := budget.unused(config, bits)) is not None:
        said.append(sentence)
    return budget.resolved(config, bits)


def _beside(size: int, shard_bytes: int, parts: dict[str, int]) -> int:
    """Bytes that files of `size` bytes together take at most beside tensors and one header: further headers, and the index.

    parts: how many tensors of the output a tensor of the model becomes, by name.
    """
    if size <= shard_bytes:  # then it is one file
        return 0
    files = 2 * size // shard_bytes + 1  # two that follow one another hold more than `shard_bytes`
    entry = len('    "": "-00001-of-00001.safetensors",\n') + len(WEIGHTS) + 8
    return 64 * files + 256 + sum(count * (len(name) + len("outlier_values") + entry) for name, count in parts.items())


def _natural(name: str) -> list[tuple[Any, ...]]:
    """Layer 10 comes after layer 9: the order in which save_pretrained fills its files."""
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in name.split(".")]


def _shards(units: list[Unit], shard_bytes: int) -> tuple[Shard, ...]:
    """Filled in order; a codebook stays with its indices, and a unit larger than a shard is one of its own."""
    files: list[list[Unit]] = [[]]
    size = 0
    for unit in units:
        if files[-1] and size + unit.nbytes > shard_bytes:
            files.append([])
            size = 0
        files[-1].append(unit)
        size += unit.nbytes
    if len(files) == 1:
        return (Shard(WEIGHTS, tuple(units)),)
    stem = WEIGHTS.removesuffix(".safetensors")
    return tuple(Shard(f"{stem}-{i:05d}-of-{len(files):05d}.safetensors", tuple(members)) for i, members in enumerate(files, 1))

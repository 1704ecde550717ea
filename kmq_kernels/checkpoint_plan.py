"""What a quantized checkpoint will hold, decided from headers and config.json: tensors, bits, shards.

The model is built on the meta device, so that names, ties, classes and the choice of layers are those of transformers and
`quantize_`; no weight is read. The order of the output and the borders of its shards depend on the model and the shard size
alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import pickle
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import transformers
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from . import __version__, ops
from .config import KMQConfig
from .quantize import plan, swap_empty
from .tensor_files import (
    DTYPE_NAMES,
    OTHER_WEIGHTS,
    WEIGHTS,
    CheckpointError,
    StoredTensor,
    files_below,
    open_regular,
    read_json,
    stored_tensors,
)

SHARD_BYTES = 256_000_000
_CHUNK = 8 << 20
T = TypeVar("T")


_REPO_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def find_source(model: str, revision: str | None = None) -> tuple[Path, Path | None]:
    """The folder of a model, and the `root` for `make_plan`: `model` itself, or what huggingface_hub downloads for a hub id.

    Raises CheckpointError where there is neither.
    """
    path = Path(model)
    if path.exists() or not _REPO_ID.fullmatch(model):
        return path, None
    from huggingface_hub import snapshot_download

    unread = [f"*{suffix}" for suffix in OTHER_WEIGHTS if suffix != ".safetensors"]
    try:
        folder = Path(snapshot_download(model, revision=revision, ignore_patterns=unread))
    except Exception as error:  # no network, no such model, no permission: each has its own class
        raise CheckpointError(f"{model}: no such folder, and the hub does not give it ({_one_line(error)})") from None
    return folder, folder.parent.parent  # the files of a snapshot are links into the cache of the repository


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
    outputs: tuple[Output, ...]

    @property
    def nbytes(self) -> int:
        """Bytes it takes in the output."""
        return sum(output.nbytes for output in self.outputs)


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
    """Everything about the output but its weights. `left_out`: tensors of the checkpoint that the model class does not have."""

    source: Path
    model_class: str
    dtype: torch.dtype
    shards: tuple[Shard, ...]
    left_out: tuple[str, ...]
    config: KMQConfig  # as asked for
    config_json: str  # of the output, the quantization config resolved
    parameters: int
    shard_bytes: int
    root: Path  # links of the source may lead anywhere below

    @property
    def units(self) -> list[Unit]:
        """All units, in the order of the output."""
        return [unit for shard in self.shards for unit in shard.units]

    def request(self, device: str) -> dict[str, Any]:
        """What makes two runs the same: with it, the bytes of every file of the output are determined."""
        files: dict[str, list[str]] = {}
        for unit in self.units:
            files.setdefault(unit.source.file.name, []).append(repr(unit.source[1:]))
        return {
            "kmq_kernels": __version__,
            "model_class": self.model_class,
            "quantization": self.config.to_dict(),
            "shard_bytes": self.shard_bytes,
            "engine": device if device != "cpu" or ops.has_kernel("kmeans", "CPU") else "cpu, plain",
            "source": {name: _digest("\n".join(sorted(tensors)).encode()) for name, tensors in sorted(files.items())},
        }


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
) -> StreamPlan:
    """Decides what `quantize_checkpoint` will do; reads headers and config.json only.

    source: folder of a transformers model in safetensors. model_class: name of a class of transformers; default the one
    config.json names, or the base model where the checkpoint holds nothing more. root: links out of it are refused, default
    source. Raises CheckpointError with a sentence for anything that cannot be read safely or would not load completely.
    """
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes: expected at least 1, got {shard_bytes}")
    if config.has_budget or config.needs_fisher:
        raise ValueError("allocation: a stream knows no sensitivities and no whole model; expected bits or module_bits")
    if source.is_dir():
        files_below(source, root)
    stored = stored_tensors(source)
    dtype = _dtype(source, stored)
    model, sources, left_out = _skeleton(source, stored, model_class, dtype)
    kept = _kept_names(model)
    chosen = plan(model, config)
    if not chosen.bits:
        raise CheckpointError(f"{source}: {type(model).__name__} has no embedding or linear layer to quantize")
    weights: dict[str, tuple[str, int]] = {}  # kept name of a weight -> the name that stands for it in `chosen`, bits
    for name, bits in chosen.bits.items():
        weights[kept[f"{name}.weight"]] = (name, bits)
    dense = model.state_dict(keep_vars=True)
    modules = swap_empty(model, config)
    units = []
    for name in dict.fromkeys(kept[name] for name in dense if kept[name] in sources):
        tensor, shape = sources[name], tuple(dense[name].shape)
        if tensor.shape != shape:
            raise CheckpointError(f"{tensor.file}: {tensor.name} has shape {tensor.shape}, config.json asks for {shape}")
        if name not in weights:
            output = Output(name, dense[name].dtype, shape)
            units.append(Unit(name, tensor, output.dtype, None, 0, (output,)))
            continue
        if not tensor.torch_dtype.is_floating_point or tensor.torch_dtype.itemsize < 2:
            raise CheckpointError(f"{tensor.file}: {tensor.name} is {tensor.dtype}; F64, F32, F16 or BF16 can be quantized")
        member, bits = weights[name]
        module, prefix = modules[member], name.removesuffix("weight")
        outputs = tuple(
            Output(f"{prefix}{part}", parameter.dtype, tuple(parameter.shape)) for part, parameter in module.stored().items()
        )
        units.append(Unit(name, tensor, dense[name].dtype, bits, module.group_rows, outputs))
    units.sort(key=lambda unit: _natural(unit.outputs[0].name))
    resolved = dataclasses.replace(config, skip=chosen.left)
    return StreamPlan(
        source=source,
        model_class=type(model).__name__,
        dtype=dtype,
        shards=_shards(units, shard_bytes),
        left_out=tuple(left_out),
        config=config,
        config_json=_config_json(model, resolved, dtype),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        shard_bytes=shard_bytes,
        root=root or source,
    )


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
    return tuple(
        Shard(f"{stem}-{i:05d}-of-{len(files):05d}.safetensors", tuple(members)) for i, members in enumerate(files, 1)
    )


def _model_config(source: Path) -> Any:
    content = read_json(source / "config.json")
    if not isinstance(content, dict):
        raise CheckpointError(f"{source / 'config.json'}: not the configuration of a model")
    if content.get("quantization_config") is not None:
        raise CheckpointError(f"{source}: it is quantized already; start from the model in floating point")
    try:
        return transformers.AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a stranger's config.json can fail anywhere in there
        raise CheckpointError(f"{source / 'config.json'}: transformers cannot read it ({_one_line(error)})") from None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _dtype(source: Path, stored: dict[str, StoredTensor]) -> torch.dtype:
    """As from_pretrained decides: config.json, else the first floating-point tensor."""
    content = read_json(source / "config.json")
    named = None
    if isinstance(content, dict):
        named = content.get("dtype") or content.get("torch_dtype")
    if named is not None:
        dtype = getattr(torch, named, None) if isinstance(named, str) else None
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
            raise CheckpointError(f"{source / 'config.json'}: dtype {named!r} is not one a model can have")
        return dtype
    floating = (t.torch_dtype for t in stored.values() if t.torch_dtype.is_floating_point and t.torch_dtype.itemsize > 1)
    return next(floating, torch.float32)


# Fields of config.json that say how often modules repeat, and those that say how large something is.
_REPEATED = re.compile(r"layers?$|_groups?(_num)?$|blocks?$|experts?$")
_SIZES = re.compile(r"size|dim|hidden|position|embeddings|vocab|labels")


def _check_config(source: Path, content: Any, stored: dict[str, StoredTensor], depth: int = 0) -> None:
    """A config.json that asks for far more than the checkpoint holds is refused before anything is built from it."""
    if not isinstance(content, dict) or depth > 4:
        return
    weights = sum(math.prod(tensor.shape) for tensor in stored.values())
    for name, value in content.items():
        _check_config(source, value, stored, depth + 1)
        if type(value) is not int:
            continue
        if _REPEATED.search(name) and value > max(len(stored), 64):
            raise CheckpointError(f"{source / 'config.json'}: {name} is {value}, the checkpoint has {len(stored)} tensors")
        if _SIZES.search(name) and value > max(weights, 1 << 20):
            raise CheckpointError(f"{source / 'config.json'}: {name} is {value}, the checkpoint has {weights} weights")


def _classes(config: Any, model_class: str | None, source: Path) -> list[Any]:
    names = [model_class] if model_class else list(config.architectures or [])[:1]
    found = []
    for name in names:
        known = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
        if not (isinstance(known, type) and issubclass(known, transformers.PreTrainedModel)):
            raise CheckpointError(f"{source}: transformers has no model class {name}")
        found.append(known)
    if model_class is None:
        base = transformers.AutoModel._model_mapping.get(type(config), None)
        for known in base if isinstance(base, (tuple, list)) else [base]:
            if known is not None and known not in found:
                found.append(known)
    if not found:
        raise CheckpointError(f"{source}: config.json names no architecture, and transformers has no base model for it")
    return found


def _on_meta(model_class: Any, config: Any, dtype: torch.dtype) -> Any:
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            return model_class(config)
    finally:
        torch.set_default_dtype(default)


def _skeleton(
    source: Path, stored: dict[str, StoredTensor], model_class: str | None, dtype: torch.dtype
) -> tuple[Any, dict[str, StoredTensor], list[str]]:
    """The model on the meta device, the stored tensor of each of its tensors (by the name that is kept), and what is left out.

    The first class that the checkpoint fills is taken: a folder whose config.json names a masked language model, but which
    holds only the encoder, is an encoder.
    """
    _check_config(source, read_json(source / "config.json"), stored)
    missing: list[str] = []
    for known in _classes(config := _model_config(source), model_class, source):
        try:
            model = _on_meta(known, config, dtype)
        except Exception as error:
            raise CheckpointError(f"{source}: config.json does not describe a {known.__name__} ({_one_line(error)})") from None
        named, left_out = _match(model, stored)
        _untie(model, named)
        kept = _kept_names(model)
        sources: dict[str, StoredTensor] = {}
        for name, tensor in named.items():  # of tied tensors that are both there, the one that is kept counts
            if name == kept[name] or kept[name] not in named:
                sources.setdefault(kept[name], tensor)
        absent = [name for name, _ in model.named_parameters(remove_duplicate=False) if kept[name] not in sources]
        if not absent:
            return model, sources, left_out
        missing = missing or [known.__name__, *absent]
    count = f" and {len(missing) - 2} more" if len(missing) > 2 else ""
    raise CheckpointError(
        f"{source}: {missing[0]} needs {missing[1]}{count}, which the checkpoint does not hold; --model-class names another class"
    )


def _match(model: Any, stored: dict[str, StoredTensor]) -> tuple[dict[str, StoredTensor], list[str]]:
    """The stored tensor for each name of the model, by transformers' own renaming, and the names that no tensor of it has."""
    conversions = get_model_conversion_mapping(model)
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    names = model.state_dict()
    found: dict[str, StoredTensor] = {}
    left_out = []
    ignored = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []]
    for key, tensor in sorted(stored.items()):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, names)
        if name not in names and key in names:
            name, pattern = key, None
        if name not in names:
            if not any(entry.search(key) for entry in ignored) and not key.endswith("embeddings.position_ids"):
                left_out.append(key)
            continue
        if pattern is not None:
            raise CheckpointError(
                f"{tensor.file}: transformers joins or splits {key} while loading {type(model).__name__}; save the model again"
                " with save_pretrained(save_original_format=False) first"
            )
        if name in found:
            raise CheckpointError(f"{tensor.file}: {found[name].name} and {key} are both {name} of {type(model).__name__}")
        found[name] = tensor
    return found, left_out


def _untie(model: Any, named: dict[str, StoredTensor]) -> None:
    """As from_pretrained: weights that config.json ties, but the checkpoint holds twice and differently, are not tied."""
    for target, other in list(getattr(model, "all_tied_weights_keys", {}).items()):
        if target in named and other in named and not _same_content(named[target], named[other]):
            model.all_tied_weights_keys.pop(target)
            parent, _, parameter = target.rpartition(".")
            module = model.get_submodule(parent)
            setattr(module, parameter, nn.Parameter(torch.empty_like(getattr(module, parameter))))


def _same_content(one: StoredTensor, other: StoredTensor) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    with open_regular(one.file) as a, open_regular(other.file) as b:
        for at in range(0, one.nbytes, _CHUNK):
            count = min(_CHUNK, one.nbytes - at)
            if os.pread(a.fileno(), count, one.begin + at) != os.pread(b.fileno(), count, other.begin + at):
                return False
    return True


def _kept_names(model: Any) -> dict[str, str]:
    """For each tensor of the model, the name under which save_pretrained keeps it: of tied tensors, one that is not a target."""
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    tensors = model.state_dict(keep_vars=True)
    groups: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        groups.setdefault(id(tensor), []).append(name)
    for target, source in tied.items():
        if target not in tensors or source not in tensors:
            continue
        into, group = groups[id(tensors[source])], groups[id(tensors[target])]
        if into is not group:
            into.extend(group)
            for name in group:
                groups[id(tensors[name])] = into
    kept = {}
    for group in groups.values():
        free = [name for name in sorted(group) if name not in tied]
        name = free[0] if free else sorted(group)[-1]
        kept.update(dict.fromkeys(group, name))
    return kept


def _config_json(model: Any, resolved: KMQConfig, dtype: torch.dtype) -> str:
    """config.json as save_pretrained would write it after quantize_."""
    config = model.config
    config.dtype = str(dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    config.quantization_config = resolved
    return config.to_json_string()

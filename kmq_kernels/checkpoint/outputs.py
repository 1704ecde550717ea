"""Objective "output" of a checkpoint: what stands for its weights, found with the whole model in memory, group after group.

OUT/.kmq/outputs/source.json         SHA-256 of every tensor of the source, noted before anything is read for good
OUT/.kmq/outputs/NAME.safetensors    what stands for the weights of a finished group, called by its first weight
OUT/.kmq/outputs.safetensors         all of it, under the names of the output: the stream takes the tensors from here
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from ..files import CheckpointError, read_json
from ..hf import find_class, kept_names, model_config
from ..quantization import EncodedWeight, KMQConfig, encode_for_outputs, plan
from .plan import StreamPlan
from .stream import STATE, tensor_digests, write_file

_PARTS = ("codebook", "packed", "row_scale", "outlier_index", "outlier_values", "bias")
Batch = dict[str, Any]


def batches_digest(batches: list[Batch]) -> str:
    """SHA-256 of the content of batches."""
    digest = hashlib.sha256()
    for batch in batches:
        for name, value in sorted(batch.items()):
            digest.update(f"{name} {tuple(value.shape)} {value.dtype};".encode())
            digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()


def output_tensors(
    plan_: StreamPlan, out: Path, batches: list[Batch], device: str, on_group: Callable[[list[str]], None]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of the output that stand for weights, and biases that changed, by name; and the SHA-256 of all of the source.

    on_group: called with the names of weights that are found. Raises CheckpointError where the source is not what an earlier run
    began with, and what `encode_for_outputs` raises.
    """
    state = out / STATE
    folder, everything = state / "outputs", state / "outputs.safetensors"
    folder.mkdir(exist_ok=True)
    digests = tensor_digests([unit.source for unit in plan_.units])
    _same_source(plan_, out, folder / "source.json", digests)
    if (found := _read(everything)) is not None:
        return found, digests
    config = model_config(plan_.source)
    model = find_class(plan_.model_class, config, plan_.source).from_pretrained(plan_.source, dtype=plan_.dtype).to(device)
    settled = KMQConfig.from_dict(json.loads(plan_.config_json)["quantization_config"])  # with the bits that a budget found
    chosen = plan(model, settled).quantized
    names = {weight.parameter: weight.name for weight in chosen}
    finished = _finished(folder, names, device)
    on_group(list(finished))

    def keep(group: dict[str, EncodedWeight]) -> None:
        write_file(folder / f"{next(iter(group))}.safetensors", save(_named(group)), state)
        on_group(list(group))

    encoded = encode_for_outputs(model, chosen, settled, batches, finished=finished, on_group=keep, progress=False)
    kept = kept_names(model)
    results = {}
    for weight, result in zip(chosen, encoded, strict=True):
        prefix = kept[weight.parameter].removesuffix("weight")
        for part, tensor in _parts(result).items():
            results[kept[f"{weight.name}.bias"] if part == "bias" else f"{prefix}{part}"] = tensor
    write_file(everything, save(results), state)
    return results, digests


def _same_source(plan_: StreamPlan, out: Path, path: Path, digests: dict[str, str]) -> None:
    """Refuses a source that holds another tensor than the one this was begun with."""
    if not path.is_file():
        write_file(path, json.dumps(digests).encode(), path.parent.parent)
        return
    before = read_json(path)
    for unit in plan_.units:
        if not isinstance(before, dict) or before.get(unit.source.name) != digests.get(unit.source.name):
            what = f"another {unit.source.file.name} than this ({unit.source.name} has other values)"
            raise CheckpointError(f"{out}: it was begun from {what}; choose another folder or remove it")


def _parts(encoded: EncodedWeight) -> dict[str, Tensor]:
    every = {part: getattr(encoded, part) for part in _PARTS}
    return {part: tensor.detach().cpu().contiguous() for part, tensor in every.items() if tensor is not None}


def _named(group: dict[str, EncodedWeight]) -> dict[str, Tensor]:
    return {f"{name}.{part}": tensor for name, encoded in group.items() for part, tensor in _parts(encoded).items()}


def _finished(folder: Path, names: dict[str, str], device: str) -> dict[str, EncodedWeight]:
    """What earlier runs found, by name of the weight; a file that cannot be read counts as not there."""
    found: dict[str, dict[str, Tensor]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in (_read(path) or {}).items():
            weight, _, part = name.rpartition(".")
            found.setdefault(weight, {})[part] = tensor.to(device)
    known = set(names.values())
    return {name: _encoded(parts) for name, parts in found.items() if name in known}


def _encoded(parts: dict[str, Tensor]) -> EncodedWeight:
    scale, index, values, bias = (parts.get(part) for part in _PARTS[2:])
    return EncodedWeight(parts["codebook"], parts["packed"], scale, index, values, 0.0, bias)


def _read(path: Path) -> dict[str, Tensor] | None:
    try:
        return load_file(path) if path.is_file() else None
    except (SafetensorError, OSError):
        return None

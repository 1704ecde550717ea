"""Safetensors files of strangers: headers, indexes and folders read with every number checked; headers written.

A file is the length of its header (8 bytes, little-endian), the header (JSON: name -> dtype, shape, data_offsets), and the
tensors one after the other without a gap. Nothing here reads tensor data, and nothing is allocated because a file asks for it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .json import parse_json, read_json
from .opening import CheckpointError, open_regular, read_exactly

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

# In the order in which safetensors ranks them: a file holds the tensors of the last dtype first.
DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_RANKS = {name: rank for rank, name in enumerate(DTYPES)}

_MAX_HEADER = 100_000_000  # bytes, the limit of the format

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
OTHER_WEIGHTS = (*PICKLES, ".safetensors", ".h5", ".msgpack", ".onnx", ".ot", ".tflite", ".gguf", ".npz")


class StoredTensor(NamedTuple):
    """A tensor in a file: `begin` counts from the first byte of the file."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    nbytes: int

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch names it."""
        return DTYPES[self.dtype]

    def rows(self, first: int, end: int) -> StoredTensor:
        """Rows `first` to `end` (not included) of it, which lie together in the file, as a tensor called NAME[first:end]."""
        width = self.nbytes // max(self.shape[0], 1)
        shape = (end - first, *self.shape[1:])
        return StoredTensor(
            self.file, f"{self.name}[{first}:{end}]", self.dtype, shape, self.begin + first * width, (end - first) * width
        )


def stored_part(stored: dict[str, StoredTensor], name: str) -> StoredTensor | None:
    """The tensor of that name, or the rows of one that `StoredTensor.rows` gives that name."""
    if name in stored:
        return stored[name]
    found = re.fullmatch(r"(.+)\[(\d+):(\d+)\]", name)
    whole = stored.get(found[1]) if found else None
    if found is None or whole is None or not whole.shape or not int(found[2]) <= int(found[3]) <= whole.shape[0]:
        return None
    return whole.rows(int(found[2]), int(found[3]))


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, in the order of its header, every number checked against the size of the file.

    Raises CheckpointError with a sentence for anything that is not exactly a complete file of the format.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        start = read_exactly(file, 8)
        length = int.from_bytes(start, "little")
        if size < 8 or length > size - 8:
            looks = "; it looks like a pickle" if start[:2] in (b"PK", b"\x80\x02", b"\x80\x04") else ""
            header = f", its header would take {length}" if size >= 8 else ""
            raise CheckpointError(f"{path}: not a complete safetensors file: it has {size} bytes{header}{looks}")
        if length > _MAX_HEADER:
            raise CheckpointError(f"{path}: a header of {length} bytes, expected at most {_MAX_HEADER}")
        text = read_exactly(file, length)
    try:
        if len(text) < length:
            raise ValueError("it ends early")
        header = parse_json(text, size)
        if not isinstance(header, dict):
            raise ValueError("not an object of tensors")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("__metadata__ is not a table of strings")
        tensors = {name: _stored(path, name, entry, 8 + length) for name, entry in header.items()}
        end = 8 + length
        for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.begin, tensor.nbytes)):
            if tensor.begin != end:
                kind = "overlaps the one before it" if tensor.begin < end else f"leaves a gap of {tensor.begin - end} bytes"
                raise ValueError(f"{tensor.name!r} {kind}")
            end += tensor.nbytes
        if end != size:
            raise ValueError(f"its tensors end at byte {end}, the file at {size}")
    except ValueError as error:
        raise CheckpointError(f"{path}: not a complete safetensors file: {error}") from None
    return tensors


def _integers(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _stored(path: Path, name: str, entry: Any, data: int) -> StoredTensor:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name!r} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{name!r} has the dtype {dtype!r}, which is not known")
    if not _integers(shape) or len(shape) > 64:
        raise ValueError(f"{name!r} has no valid shape")
    if not _integers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{name!r} has no valid data_offsets")
    begin, end = offsets
    expected = 0 if 0 in shape else DTYPES[dtype].itemsize
    for extent in shape if expected else ():
        expected *= extent
        if expected > end - begin:
            break
    if expected != end - begin:
        raise ValueError(f"{name!r} has {end - begin} bytes, which shape {shape} of {dtype} does not take")
    return StoredTensor(path, name, dtype, tuple(shape), data + begin, end - begin)


def header_bytes(tensors: Sequence[tuple[str, str, tuple[int, ...], int]]) -> tuple[bytes, dict[str, int]]:
    """The start of a safetensors file and where in the file each tensor goes, as `safetensors.torch.save_file` would write it.

    tensors: (name, dtype, shape, bytes) of each.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at: dict[str, int] = {}
    end = 0
    for name, dtype, shape, nbytes in sorted(tensors, key=lambda tensor: (-_RANKS[tensor[1]], tensor[0].encode())):
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + nbytes]}
        at[name] = end
        end += nbytes
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, {name: 8 + len(text) + begin for name, begin in at.items()}


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, by its index where it has one.

    Raises CheckpointError where one is missing, where an index names files outside the folder, or where only pickles are.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such model folder")
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: the folder has no config.json")
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
        reason = f"{folder}: the folder has no weights ({WEIGHTS} or {INDEX})"
        if pickles:
            reason += f"; {pickles[0]} is a pickle, which can run any code and is not read: where you trust it, convert it with"
            reason += " AutoModel.from_pretrained(folder).save_pretrained(new_folder)"
        raise CheckpointError(reason)
    return sorted({folder / name for name in _weight_map(folder).values()})


def _weight_map(folder: Path) -> dict[str, str]:
    path = folder / INDEX
    content = read_json(path, "an index of safetensors files")
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{path}: not an index of safetensors files (no weight_map of names)")
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name or name.startswith(".") or "\0" in name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{path}: {name!r} is not the name of a file in this folder")
        if not (folder / name).is_file():
            raise CheckpointError(f"{path}: names {name}, which is not there")
    return weight_map


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a model folder by name.

    Raises CheckpointError where files and index do not agree, or where two files hold the same name.
    """
    files = weight_files(folder)
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in read_header(file).items():
            if name in tensors:
                raise CheckpointError(f"{folder}: {name} is in {tensors[name].file.name} and in {file.name}")
            tensors[name] = tensor
    if files != [folder / WEIGHTS]:
        for name, file_name in _weight_map(folder).items():
            if name not in tensors:
                raise CheckpointError(f"{folder / INDEX}: names {name}, which none of its files holds")
            if tensors[name].file.name != file_name:
                raise CheckpointError(f"{folder / INDEX}: {name} is not in {file_name} but in {tensors[name].file.name}")
    return tensors

"""Which files of a model folder come along beside the weights that are quantized."""

from __future__ import annotations

from pathlib import Path

from .content import file_record
from .opening import files_below
from .tensors import INDEX, OTHER_WEIGHTS, PICKLES, weight_files

_TORCH = (*PICKLES, ".safetensors")  # in a subfolder: the weights of a module of its own, such as 2_Dense

# What huggingface_hub need not download, out of `files_left_out`. "*" matches "/" there, too: some names are given whole.
NOT_DOWNLOADED = (
    "pytorch_model*.bin",
    "consolidated*.pt*",
    "*.onnx_data",
    "openvino/*",
    *(f"*{suffix}" for suffix in OTHER_WEIGHTS if suffix not in _TORCH),
)


def _split(source: Path, root: Path) -> tuple[list[Path], list[Path]]:
    read = set(weight_files(source))
    kept: list[Path] = []
    left: list[Path] = []
    for path in files_below(source, root):
        beside = path.parent == source
        if path in read or (beside and path.name == INDEX):
            continue
        export = path.suffix in OTHER_WEIGHTS and (beside or path.suffix not in _TORCH)
        export = export or path.suffix == ".onnx_data" or (beside and path.name.endswith(".index.json"))
        openvino = path.suffix in (".bin", ".xml") and path.with_suffix(".xml").is_file() and path.with_suffix(".bin").is_file()
        (left if export or openvino else kept).append(path)
    return kept, left


def side_files(source: Path, root: Path) -> dict[str, str]:
    """SHA-256 of every file of a model folder but the weights that are read and those left out, by its path in there.

    Weights in a subfolder belong to a module of their own, as a Dense layer of sentence-transformers; they are among these.
    """
    return {str(path.relative_to(source)): file_record(path)["sha256"] for path in _split(source, root)[0]}


def files_left_out(source: Path, root: Path) -> list[str]:
    """What stands for the whole model once more: the other weight files beside config.json, and exports for other engines."""
    return [str(path.relative_to(source)) for path in _split(source, root)[1]]

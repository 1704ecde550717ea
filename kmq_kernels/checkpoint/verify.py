"""Folders checked: every file against the manifest, every header of safetensors against its file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..files import (
    MANIFEST,
    CheckpointError,
    files_below,
    read_header,
    read_json,
    read_manifest,
    side_files,
    stored_part,
    stored_tensors,
    verify_files,
)
from .stream import STATE, tensor_digests


def verify_checkpoint(out: Path, source: Path | None = None, root: Path | None = None) -> dict[str, Any]:
    """Checks a model folder: every file against the manifest, where it has one, every header and the index in any case.

    source: the folder that `quantize_checkpoint` is said to have made it from; every tensor and every file of it that was read
    is compared with the checksums noted then. root: as for `make_plan`. Returns {"files": checked against a checksum,
    "tensors": ..., "bytes": ..., "source_tensors": compared with the source, 0 without one}, those of modules in subfolders
    included. Raises DamagedError where a file
    is not as it was made, CheckpointError where the folder is unfinished or no valid checkpoint, or made from another source.
    """
    if (out / STATE).is_dir():
        raise CheckpointError(f"{out}: unfinished; the command that began it goes on from there")
    manifest: dict[str, Any] = {"files": {}}
    if (out / MANIFEST).is_file():
        verify_files(out)
        manifest = read_manifest(out)
    elif source is not None:
        raise CheckpointError(f"{out}: it has no {MANIFEST}, so what it was made from is not known")
    tensors = list(stored_tensors(out).values())
    read_json(out / "config.json")
    for path in files_below(out):
        if path.suffix == ".safetensors" and path.parent != out:
            tensors += read_header(path).values()
    return {
        "files": len(manifest["files"]),
        "tensors": len(tensors),
        "bytes": sum(tensor.nbytes for tensor in tensors),
        "source_tensors": 0 if source is None else _check_source(out, manifest, source, root or source),
    }


def _check_source(out: Path, manifest: dict[str, Any], source: Path, root: Path) -> int:
    """The number of tensors compared; raises CheckpointError where the source is another one than the manifest knows."""
    noted = manifest_source(out, manifest)
    stored = stored_tensors(source)
    parts = (stored_part(stored, name) for name in noted["tensors"])
    found = tensor_digests(part for part in parts if part is not None)
    files = side_files(source, root)
    differ = [name for name, digest in noted["tensors"].items() if found.get(name) != digest]
    differ += sorted(name for name in {**files, **noted["files"]} if files.get(name) != noted["files"].get(name))
    if differ:
        more = f" and {len(differ) - 1} more" if len(differ) > 1 else ""
        raise CheckpointError(f"{out}: it was made from another source than {source}, which has another {differ[0]}{more}")
    return len(noted["tensors"])


def manifest_source(out: Path, manifest: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Checksums of what an output was made from: "tensors" by name, "files" beside the weights by path."""
    source = manifest.get("source")
    tables = [source.get("tensors"), source.get("files")] if isinstance(source, dict) else []
    if len(tables) != 2 or not all(isinstance(table, dict) for table in tables):
        noted = "it was made by a version that noted no checksums of its source"
        raise CheckpointError(f"{out}: {noted}; choose another folder or remove it")
    return manifest["source"]

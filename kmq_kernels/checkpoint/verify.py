"""Folders checked against the checksums of their manifest."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..files import CheckpointError, file_record, open_regular, read_json, stored_tensors
from .plan import side_files
from .stream import STATE, tensor_digests

MANIFEST = "kmq_manifest.json"
DAMAGED = 5  # exit code: files do not match their checksums


class DamagedError(CheckpointError):
    """Files that do not match their checksums."""

    exit_code = DAMAGED


def check_files(out: Path, files: dict[str, dict[str, Any]]) -> list[str]:
    """Sentences about the files that are not as recorded; several are read at a time."""

    def check(name: str) -> str | None:
        path = out / name
        if path.is_symlink() or not path.is_file():
            return f"{name} is missing"
        with open_regular(path) as file, contextlib.suppress(OSError, AttributeError):
            # What this process has just written is in the page cache; what counts is on the disk.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        found = file_record(path)
        if found["bytes"] != files[name]["bytes"]:
            return f"{name} has {found['bytes']} bytes, not {files[name]['bytes']}"
        return None if found["sha256"] == files[name]["sha256"] else f"{name} does not match its checksum"

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        return [sentence for sentence in pool.map(check, files) if sentence]


def verify_checkpoint(out: Path, source: Path | None = None, root: Path | None = None) -> dict[str, Any]:
    """Checks a model folder: every file against the manifest, where it has one, every header and the index in any case.

    source: the folder that `quantize_checkpoint` is said to have made it from; every tensor and every file of it that was read
    is compared with the checksums noted then. root: as for `make_plan`. Returns {"files": checked against a checksum,
    "tensors": ..., "bytes": ..., "source_tensors": compared with the source, 0 without one}. Raises DamagedError where a file
    is not as it was made, CheckpointError where the folder is unfinished or no valid checkpoint, or made from another source.
    """
    if (out / STATE).is_dir():
        raise CheckpointError(f"{out}: unfinished; the command that began it goes on from there")
    manifest: dict[str, Any] = {"files": {}}
    if (out / MANIFEST).is_file():
        manifest = read_manifest(out)
        if wrong := check_files(out, manifest["files"]):
            more = f", and {len(wrong) - 1} more files are not as they were made" if len(wrong) > 1 else ""
            raise DamagedError(f"{out}: {wrong[0]}{more}")
    elif source is not None:
        raise CheckpointError(f"{out}: it has no {MANIFEST}, so what it was made from is not known")
    tensors = stored_tensors(out)
    read_json(out / "config.json")
    return {
        "files": len(manifest["files"]),
        "tensors": len(tensors),
        "bytes": sum(tensor.nbytes for tensor in tensors.values()),
        "source_tensors": 0 if source is None else _check_source(out, manifest, source, root or source),
    }


def _check_source(out: Path, manifest: dict[str, Any], source: Path, root: Path) -> int:
    """The number of tensors compared; raises CheckpointError where the source is another one than the manifest knows."""
    noted = manifest_source(out, manifest)
    stored = stored_tensors(source)
    found = tensor_digests(stored[name] for name in noted["tensors"] if name in stored)
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


def read_manifest(out: Path) -> dict[str, Any]:
    manifest = read_json(out / MANIFEST, "a manifest")
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or not all(_is_record(name, record) for name, record in files.items()):
        raise DamagedError(f"{out / MANIFEST}: not a manifest of this package")
    if manifest.pop("sha256", None) != manifest_digest(manifest):
        raise DamagedError(f"{out / MANIFEST}: it does not match its own checksum")
    return manifest


def manifest_digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _is_record(name: str, record: Any) -> bool:
    path = Path(name)
    inside = bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\0" not in name
    return inside and isinstance(record, dict) and set(record) == {"bytes", "sha256"}

"""Manifests: the size and checksum of every file of a folder, in a file that has a checksum of its own."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .content import file_record
from .json import read_json
from .opening import CheckpointError, open_regular
from .tensors import weight_files

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


def verify_files(folder: Path) -> int:
    """Checks every file that the manifest of a model folder names, and says how many.

    Raises DamagedError where one has changed, and where the folder has weights that the manifest does not name.
    """
    files: dict[str, dict[str, Any]] = read_manifest(folder)["files"]
    if wrong := check_files(folder, files):
        more = f", and {len(wrong) - 1} more files are not as they were made" if len(wrong) > 1 else ""
        raise DamagedError(f"{folder}: {wrong[0]}{more}")
    for path in (*weight_files(folder), folder / "config.json"):
        if str(path.relative_to(folder)) not in files:
            raise DamagedError(f"{folder}: {path.name} is not in the manifest")
    return len(files)


def read_manifest(out: Path) -> dict[str, Any]:
    """The manifest of a folder, its own checksum checked and taken out."""
    manifest = read_json(out / MANIFEST, "a manifest")
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or not all(_is_record(name, record) for name, record in files.items()):
        raise DamagedError(f"{out / MANIFEST}: not a manifest of this package")
    if manifest.pop("sha256", None) != manifest_digest(manifest):
        raise DamagedError(f"{out / MANIFEST}: it does not match its own checksum")
    return manifest


def manifest_digest(manifest: dict[str, Any]) -> str:
    """The checksum of a manifest that does not hold it yet."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _is_record(name: str, record: Any) -> bool:
    path = Path(name)
    inside = bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\0" not in name
    return inside and isinstance(record, dict) and set(record) == {"bytes", "sha256"}

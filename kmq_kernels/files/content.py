"""The content of files by their checksums."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from .opening import open_regular


def file_record(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file, {"bytes": ..., "sha256": ...}."""
    digest, size = hashlib.sha256(), 0
    buffer = bytearray(1 << 20)
    with open_regular(path) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
            size += count
    return {"bytes": size, "sha256": digest.hexdigest()}

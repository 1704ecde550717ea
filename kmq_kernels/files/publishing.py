"""Files and folders that appear under their name only when they are complete."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .json import dump_json
from .locking import locked
from .opening import CheckpointError


def sync(path: Path) -> None:
    """Has the disk keep what was written to a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def publish(folder: Path) -> Iterator[Path]:
    """A folder to write into that becomes `folder` only when the block ends well; else nothing is left of it.

    Files in it get the permissions that the umask leaves, whatever they were written with (safetensors: 0600). Raises
    CheckpointError where another process is writing that folder, and where it exists and is not empty.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name(f".{folder.name}.lock"), lambda: CheckpointError(f"{folder}: another process is writing it")):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise CheckpointError(f"{folder}: it exists; choose another folder or remove it")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            yield partial
            mode = partial.stat().st_mode & 0o666
            for file in partial.rglob("*"):
                if file.is_file():
                    file.chmod(mode)
                    sync(file)
            os.replace(partial, folder)
            sync(folder.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


@contextlib.contextmanager
def publish_file(path: Path) -> Iterator[Path]:
    """A path to write a file to that becomes `path` only when the block ends well: the old file or the whole new one.

    The path is this call's own, so that two processes never write into one another's file. Its permissions are those that the
    umask leaves, as in `publish`.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.touch()
        mode = partial.stat().st_mode
        yield partial
        partial.chmod(mode)
        sync(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file that is either the old one or the whole new one; what is not finite becomes null."""
    with publish_file(path) as partial:
        partial.write_text(dump_json(content, indent=2) + "\n")

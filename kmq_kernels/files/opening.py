"""Files of strangers opened as what they are: nothing but regular files, nothing outside the folder."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from io import FileIO
from pathlib import Path


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, with the reason in one sentence."""


def one_line(error: BaseException) -> str:
    """What an error says, for use in a sentence."""
    return " ".join(str(error).split())[:300] or type(error).__name__


@contextlib.contextmanager
def open_regular(path: Path) -> Iterator[FileIO]:
    """Opens a regular file for reading; anything else (a FIFO would wait for ever) raises CheckpointError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be opened: {os.strerror(error.errno or 0)}") from None
    with open(descriptor, "rb", buffering=0) as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise CheckpointError(f"{path}: not a regular file")
        yield file


def read_exactly(file: FileIO, count: int) -> bytes:
    """`count` bytes of a raw file, which may give less at a time."""
    parts = []
    while count and (part := file.read(count)):
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def cache_of(folder: Path) -> Path | None:
    """The folder of a repository in the hub's cache, where `folder` is a snapshot of it, whose files are links to blobs there."""
    whole = folder.absolute()
    is_snapshot = whole.parent.name == "snapshots" and whole.parents[1].name.startswith("models--")
    return whole.parents[1] if is_snapshot else None


def files_below(folder: Path, root: Path | None = None) -> list[Path]:
    """All files of a model folder, hidden ones and those of hidden folders left out, sorted.

    Raises CheckpointError where a link leads out of `root` (default: the folder), or for anything that is no file or folder.
    """
    limit = (root or folder).resolve()
    found: list[Path] = []
    pending = [folder]
    while pending:
        try:
            entries = sorted(os.scandir(pending.pop()), key=lambda entry: entry.name)
        except OSError as error:
            raise CheckpointError(f"{folder}: cannot be read: {os.strerror(error.errno or 0)}") from None
        for entry in entries:
            if entry.name.startswith("."):
                continue
            path = Path(entry.path)
            if entry.is_symlink():
                try:
                    target = path.resolve(strict=True)
                except (OSError, RuntimeError):
                    lost = "its blob is missing in the hub's cache; download the model again" if cache_of(folder) else ""
                    raise CheckpointError(f"{path}: {lost or 'a link that leads nowhere'}") from None
                if not target.is_relative_to(limit):
                    raise CheckpointError(f"{path}: a link out of the folder, to {target}; copy the files (cp -rL) to use them")
                if target.is_dir():
                    raise CheckpointError(f"{path}: a link to a folder")
            if entry.is_dir(follow_symlinks=False):
                pending.append(path)
            elif stat.S_ISREG(path.stat().st_mode):
                found.append(path)
            else:
                raise CheckpointError(f"{path}: neither a file nor a folder")
    return sorted(found)

"""Where a model is: in a folder, or on the hub, which is asked once, for a limited time, and not at all where that is no use."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

from .opening import CheckpointError, cache_of, one_line

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def looks_local(model: str) -> bool:
    """Whether `model` can only be meant as a path: it is no hub id, or the folder before its slash is there."""
    return not _HUB_ID.fullmatch(model) or ("/" in model and Path(model).parent.is_dir())


def model_folder(model: str, revision: str | None = None) -> Path | None:
    """The folder of `model`: itself, or where the hub's cache has it; None for a hub id that the hub has and the cache has not.

    A path that is not there is never asked of the hub, HF_HUB_OFFLINE is honoured, and the hub gets one question with the time
    limit that HF_HUB_ETAG_TIMEOUT sets (default 10 seconds). Raises CheckpointError where there is no such model.
    """
    path = Path(model).expanduser()
    if path.exists():
        return path
    if looks_local(model):
        raise CheckpointError(f"{model}: no such model folder{_nearest(path)}")
    from huggingface_hub import HfApi, constants, snapshot_download

    if constants.HF_HUB_OFFLINE:
        reason = "the hub does not give it (HF_HUB_OFFLINE is set, and the cache does not have it)"
    else:
        try:
            HfApi().model_info(model, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
            return None
        except Exception as error:  # no network, no such model, no permission: each has its own class
            reason = f"the hub does not give it ({one_line(error)})"
    try:
        return Path(snapshot_download(model, revision=revision, local_files_only=True))
    except Exception:
        raise CheckpointError(f"{model}: no such model folder, and {reason}{_nearest(path)}") from None


def find_source(model: str, revision: str | None = None) -> tuple[Path, Path | None]:
    """The folder of a model, `model` itself or what huggingface_hub downloads for a hub id, and what its links may not lead out
    of (None: the folder).

    Raises CheckpointError where there is neither.
    """
    path = Path(model)
    if path.exists() or looks_local(model):
        return path, cache_of(path)
    from huggingface_hub import snapshot_download

    from .beside import NOT_DOWNLOADED  # which imports torch

    folder = model_folder(model, revision)
    try:
        folder = folder or Path(snapshot_download(model, revision=revision, ignore_patterns=list(NOT_DOWNLOADED)))
    except Exception as error:  # no network, no such model, no permission: each has its own class
        raise CheckpointError(f"{model}: no such folder, and the hub does not give it ({one_line(error)})") from None
    return folder, folder.parent.parent  # the files of a snapshot are links into the cache of the repository


def _nearest(path: Path) -> str:
    """What lies beside the path under a similar name."""
    try:
        beside = [entry for entry in os.listdir(path.parent) if (path.parent / entry).is_dir()]
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name, beside, n=3)
    return f"; nearest in that folder: {', '.join(near)}" if near else ""

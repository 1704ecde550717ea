"""What a run reads, known by its content: the rows of every data set, the files of the model."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash

from ..files import INDEX, OTHER_WEIGHTS, WEIGHTS, CheckpointError, file_record, one_line, weight_files
from ..tasks import Task, Texts

_ROWS = 4096  # at a time


def data_digests(task: Task | Texts) -> dict[str, str]:
    """SHA-256 of the rows of the training set and of every evaluation set, in their order, by the name of the set."""
    pairs = {"pairs": task.pairs} if isinstance(task, Texts) and task.pairs is not None else {}
    return {name: _rows_digest(split) for name, split in {"train": task.train, **task.evaluation, **pairs}.items()}


def _rows_digest(split: Any) -> str:
    digest = hashlib.sha256(json.dumps({name: str(kind) for name, kind in split.features.items()}).encode())
    for start in range(0, len(split), _ROWS):
        digest.update(json.dumps(split[start : start + _ROWS], sort_keys=True).encode())
    return digest.hexdigest()


def model_digests(source: str) -> dict[str, str]:
    """SHA-256 of every file that a model is loaded from, tokenizer included, by name; of a hub id the commit, which is one.

    Raises CheckpointError where there is neither a folder nor a model of the hub.
    """
    folder = Path(source)
    if folder.is_dir():
        return {path.name: file_record(path)["sha256"] for path in _model_files(folder)}
    try:
        commit = extract_commit_hash(cached_file(source, "config.json"), None)
    except OSError as error:  # no network, no such model, no permission
        raise CheckpointError(f"{source}: no such model folder, and the hub does not give it ({one_line(error)})") from None
    return {"commit": str(commit)}


def _model_files(folder: Path) -> list[Path]:
    pickles = sorted(folder.glob("*.bin"))
    safe = (folder / WEIGHTS).is_file() or (folder / INDEX).is_file()
    weights = pickles if pickles and not safe else weight_files(folder)
    beside = [path for path in sorted(folder.iterdir()) if path.is_file() and path.suffix not in (*OTHER_WEIGHTS, ".md")]
    return [*weights, *(path for path in beside if not path.name.startswith("."))]


def task_facts(task: Task | Texts) -> dict[str, Any]:
    """What of a request says which task it is, with the checksums of its rows."""
    labels = task.label_names
    return {
        "task": task.name,
        "num_labels": task.num_labels,
        "labels": None if labels is None else list(labels),
        "data": data_digests(task),
        "rows": {"train": len(task.train), **{name: len(split) for name, split in task.evaluation.items()}},
    }


def changed_file(folder: Path, noted: dict[str, str]) -> str | None:
    """The name of a file of a folder that is not as it was noted."""
    for name, digest in noted.items():
        if not (folder / name).is_file() or file_record(folder / name)["sha256"] != digest:
            return name
    return None


def difference(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """In words the first thing in which two requests are not the same; None where they are."""
    if "model_files" not in before:
        return "it was begun by a version that noted no checksums"
    theirs, ours = _flat(before), _flat(now)
    for name in {**theirs, **ours}:
        if theirs.get(name) == ours.get(name):
            continue
        kind, _, what = name.partition(" ")
        if kind in ("model_files", "teacher_files"):
            return f"the {kind.partition('_')[0]}'s {what} was another one"
        if kind == "data":
            return f"the rows of the {what} set were others"
        return f"{name} was {theirs.get(name)!r}, now it is {ours.get(name)!r}"
    return None


def _flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in content.items():
        found |= _flat(value, f"{prefix}{name} ") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found

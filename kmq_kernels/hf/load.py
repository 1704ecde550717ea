"""load: a model folder, quantized or not, checked before anything is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers

from ..files import CheckpointError, stored_tensors, weight_files


def checkpoint_files(path: Path) -> list[Path]:
    """The safetensors files of a model folder; raises CheckpointError where one is missing or damaged or the index is wrong."""
    stored_tensors(path)
    return weight_files(path)


def load(path: str | Path, **kwargs: Any) -> Any:
    """Loads a model folder, quantized or not, with the class its config.json names; kwargs go to from_pretrained.

    Importing this package is what lets transformers read packed checkpoints; loading through here makes sure it was imported,
    and checks that the files are complete before anything is built. Raises CheckpointError with a sentence otherwise.
    """
    path = Path(path)
    checkpoint_files(path)
    config = transformers.AutoConfig.from_pretrained(path)
    names = config.architectures or []
    model_class = getattr(transformers, names[0], None) if names else transformers.AutoModel
    if model_class is None:
        raise CheckpointError(f"{path}: transformers has no model class {names[0]}")
    return model_class.from_pretrained(path, **kwargs)

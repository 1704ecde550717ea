"""The transformers integration: from_pretrained quantizes while loading and reloads packed checkpoints; kmq.load checks first.

transformers' registry of quantizers imports all of them and what they stand on (half a second or more, 57 MB), which most
commands never use. So importing this package puts KMQQuantizer there only when somebody imports the registry, as
from_pretrained does.
"""

from __future__ import annotations

import importlib.abc
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import transformers

from .tensor_files import CheckpointError, stored_tensors, weight_files

MODEL_CARD = """\
---
library_name: kmq_kernels
tags: [kmq, quantized]
---
A model quantized with `kmq_kernels`: {summary}.

Import the package before loading, or transformers cannot read the packed weights and starts from random ones:

```python
import kmq_kernels as kmq

model = kmq.load("path/to/this/folder")
# or, once kmq_kernels is imported:
# AutoModelForSequenceClassification.from_pretrained("path/to/this/folder")
```
"""

_REGISTRY = "transformers.quantizers.auto"


class _Registration(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the registry where everybody else does, and registers KMQQuantizer as soon as it is loaded."""

    _loader: Any  # the registry's own

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != _REGISTRY:
            return None
        others = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in others if spec is not None), None)
        if spec is not None:
            self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        _register()
        sys.meta_path.remove(self)


def _register() -> None:
    from . import hf_quantizer  # noqa: F401  # it registers itself


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


if _REGISTRY in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _Registration())

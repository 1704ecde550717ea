"""The transformers integration: from_pretrained quantizes while loading and reloads packed checkpoints; kmq.load checks first.

transformers' registry of quantizers imports all of them and what they stand on (half a second or more, 57 MB), which most
commands never use. So importing this package puts KMQQuantizer there only when somebody imports the registry, as
from_pretrained does.
"""

from __future__ import annotations

import importlib.abc
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

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
    from . import quantizer  # noqa: F401  # it registers itself


def register_when_used() -> None:
    """Registers KMQQuantizer now where the registry is loaded, else as soon as somebody loads it."""
    if _REGISTRY in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _Registration())

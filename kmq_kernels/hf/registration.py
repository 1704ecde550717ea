"""KMQQuantizer put into transformers' registry of quantizers as soon as somebody imports that.

The registry imports all quantizers and what they stand on (half a second or more, 57 MB), which most commands never use. So
importing this package puts KMQQuantizer there only when somebody imports the registry, as from_pretrained does.
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

    _loader: Any = None  # the registry's own
    _asking = False

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != _REGISTRY or self._asking:  # another finder that asks all others, as this one does, would go on for ever
            return None
        self._asking = True
        try:
            for finder in list(sys.meta_path):
                # Python, too, passes over a finder of the old kind, which has find_module only.
                find = getattr(finder, "find_spec", None)
                spec = find(fullname, path, target) if find is not None and finder is not self else None
                if spec is not None:
                    self._loader, spec.loader = spec.loader, self
                    return spec
        finally:
            self._asking = False
        return None

    def __getattr__(self, name: str) -> Any:  # get_source and others, for who looks at the specification only
        if name.startswith("__") or self._loader is None:
            raise AttributeError(name)
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec) if hasattr(self._loader, "create_module") else None

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        if hasattr(self._loader, "exec_module"):
            self._loader.exec_module(module)
        else:
            self._loader.load_module(_REGISTRY)
        _register()
        if self in sys.meta_path:
            sys.meta_path.remove(self)


def _register() -> None:
    from . import quantizer  # noqa: F401  # it registers itself


def register_when_used() -> None:
    """Registers KMQQuantizer now where the registry is loaded, else as soon as somebody loads it."""
    if _REGISTRY in sys.modules:
        _register()
    elif not any(type(finder).__qualname__ == _Registration.__qualname__ for finder in sys.meta_path):  # also one before a reload
        sys.meta_path.insert(0, _Registration())

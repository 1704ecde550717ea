"""What is imported when: public names on their first use, and modules of ours as soon as somebody else's is loaded.

torch takes a second to import and transformers another; a command line that only prints its help needs neither.
"""

from __future__ import annotations

import importlib.abc
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def on_first_use(
    package: str, homes: Mapping[str, Sequence[str]], modules: Sequence[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` for the package named `package`: each name is imported from its home on its first use.

    homes: {module below the package: its names}; a name must not be that of a module of the package, which would stand in its
    place once it is imported. modules: modules below the package that count as attributes of it.
    """
    home_of = {name: home for home, names in homes.items() for name in names}

    def get(name: str) -> Any:
        if name in modules:
            return import_module(f"{package}.{name}")
        if name not in home_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(f"{package}.{home_of[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *home_of, *modules})

    return get, names


class _Follower(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds one module where everybody else does, and imports ours as soon as it is loaded."""

    _loader: Any = None  # the module's own
    _asking = False

    def __init__(self, other: str, ours: str) -> None:
        self._other, self._ours = other, ours

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != self._other or self._asking:  # another finder that asks all others, as this one does, would not end
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
            self._loader.load_module(self._other)
        import_module(self._ours)
        if self in sys.meta_path:
            sys.meta_path.remove(self)


def when_loaded(other: str, ours: str) -> None:
    """Imports the module `ours` now where `other` is loaded, else as soon as somebody loads that."""
    if other in sys.modules:
        import_module(ours)
    elif not any(vars(finder).get("_ours") == ours for finder in sys.meta_path if hasattr(finder, "__dict__")):  # before a reload
        sys.meta_path.insert(0, _Follower(other, ours))

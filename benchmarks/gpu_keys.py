"""Keys of Triton's cache that do not depend on which kernels a process asked for before.

A key holds the global constants that a kernel and all that it calls read. Triton 3.6 lists those of a called function only where
that function has a key already, so one kernel has different keys in different processes. Triton 3.8 makes the key of what is
called first; `steady_keys` has older ones do that, too.
"""

import functools
from typing import Any


@functools.cache
def steady_keys() -> None:
    """To be called before a first launch, where keys are made and where they are looked for. Does it once."""
    from triton.runtime.jit import DependenciesFinder

    update = DependenciesFinder._update_hash

    def called_first(self: Any, func: Any) -> None:
        func.cache_key  # noqa: B018  # a property: reading it makes the key, and `func` keeps it
        update(self, func)

    DependenciesFinder._update_hash = called_first

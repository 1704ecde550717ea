"""Numbers of bytes as people write them."""

from __future__ import annotations

import re

_UNITS = {"": 1, **{f"{letter}{i}": (1024 if i else 1000) ** (k + 1) for k, letter in enumerate("KMGT") for i in ("", "I")}}
_SIZE = re.compile(r"(\d[\d_]*(?:\.\d+)?(?:E\+?\d+)?)\s*([KMGT]?I?)B?", re.IGNORECASE)


def parse_size(name: str, size: object) -> int:
    """A number of bytes: an integer, 8e6, or a text such as "8MB", "1.5 GB" (decimal), "10MiB" (binary), "8_000_000", "8e6".

    Raises ValueError, naming the argument `name`, for anything else and for less than one byte.
    """
    found = _SIZE.fullmatch(str(size).strip()) if not isinstance(size, bool) else None
    unit = _UNITS.get(found[2].upper()) if found else None
    value = float(found[1].replace("_", "")) * unit if found and unit else 0.0
    if value < 1 or value >= 1 << 63 or not value.is_integer():
        raise ValueError(f"{name}: expected a size such as 500MB, 2GB, 10MiB or 8_000_000, got {size!r}")
    return int(value)

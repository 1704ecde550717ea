"""A progress bar over weights."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from ..terminal import draws_bars


def weight_bar(title: str, weights: list[Tensor], progress: bool | None) -> Any:
    total = sum(weight.numel() for weight in weights)
    show = progress if progress is not None else total > 50_000_000 and draws_bars()
    return tqdm(total=total, desc=title, unit="w", unit_scale=True, leave=False, disable=not show)

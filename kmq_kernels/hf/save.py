"""What `save_pretrained` of a packed model writes beside weights and configuration: the card, and who must be imported first."""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

from ..files import read_json
from ..layers import CodebookModule
from ..quantization import KMQConfig, model_size
from .card import Facts, Quality, card, hub_id, require, source_card, write_card


def save_card(
    model: Any,
    folder: Path,
    *,
    quality: Quality | None = None,
    source: str | None = None,
    base_model: str | None = None,
    made_by: str = "save_pretrained",
) -> None:
    """Writes the card of a packed model into the folder that it was saved to.

    source: folder or hub id of the model in floating point, default what it was loaded from. base_model: its id on the hub,
    default the source where that is one.
    """
    modules = {id(module.packed): module for module in model.modules() if isinstance(module, CodebookModule)}
    size = model_size(model)
    source = source or getattr(model.config, "_name_or_path", "") or ""
    given = model.config.quantization_config
    config = KMQConfig.from_dict(given) if isinstance(given, dict) else given
    itemsize = next((module.codebook.element_size() for module in modules.values()), 4)
    facts = Facts(
        bits=dict(collections.Counter(module.bits for module in modules.values())),
        scheme=config.scheme,
        weights=size.weights,
        bytes_before=size.weights * itemsize,
        bytes_after=size.total_bytes,
        made_by=made_by,
    )
    known = require(folder, read_json)
    base = base_model or hub_id(source)
    before = source_card(source)
    write_card(folder, card(facts, base_model=base, source_card=before, quality=quality, sentence_class=known))

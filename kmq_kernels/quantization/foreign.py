"""Layers of modules that another library writes and reads by itself, where a codebook would not be found again."""

from __future__ import annotations

import sys

from torch import nn

ELSEWHERE = "of a module that sentence-transformers reads by itself"


def read_elsewhere(model: nn.Module) -> set[str]:
    """Names of the layers in modules of sentence-transformers that are no transformers model, such as Dense.

    Each module of a SentenceTransformer is saved in a folder of its own. That of a transformers model is read with
    from_pretrained, which knows codebooks; the others are read into plain layers.
    """
    found: set[str] = set()
    if "sentence_transformers" not in sys.modules:
        return found
    library = sys.modules.get("transformers.modeling_utils")
    inside: dict[str, bool] = {}
    for name, module in model.named_modules():
        above = inside.get(name.rpartition(".")[0], False) if name else False
        if library is not None and isinstance(module, library.PreTrainedModel):
            inside[name] = False
        elif f"{type(module).__module__}.".startswith("sentence_transformers."):
            inside[name] = True
        else:
            inside[name] = above
        if inside[name]:
            found.add(name)
    return found

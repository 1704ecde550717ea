"""Which weights of a model are quantized, and with how many bits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from torch import nn

from .config import KMQConfig, name_matches

# The classification layers of the architectures, by name: what maps features to classes, labels, spans or the vocabulary.
# A pooler, DistilBERT's pre_classifier and the transform before a vocabulary decoder are ordinary linear layers.
HEADS = (
    "classifier",  # BERT, ALBERT, DistilBERT, DeBERTa; with its dense and out_proj in RoBERTa, ELECTRA, MPNet
    "score",
    "qa_outputs",
    "sop_classifier",  # ALBERT
    r"cls\.seq_relationship",  # BERT
    r"(?:cls\.)?predictions\.decoder",  # BERT, ALBERT
    r"lm_head\.decoder",  # RoBERTa, MPNet
    "vocab_projector",  # DistilBERT
    "generator_lm_head",  # ELECTRA
    r"discriminator_predictions\.dense_prediction",  # ELECTRA
    "lm_head",
)


def _quantizable(module: nn.Module) -> bool:
    """A plain linear or embedding layer: a subclass with a forward of its own may use its weight in ways not known here."""
    plain = (nn.Linear.forward, nn.Embedding.forward)
    return isinstance(module, (nn.Linear, nn.Embedding)) and type(module).forward in plain


def _weights(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules(remove_duplicate=False):
        if _quantizable(module):
            yield name, module


@dataclasses.dataclass
class Plan:
    """What becomes of each weight: `members` are the modules (by name) that share it, the first name stands for it."""

    bits: dict[str, int]  # weight -> bits
    members: dict[str, list[str]]  # weight -> names of all modules with this weight
    left: list[str]  # names of the layers that stay as they are


def plan(model: nn.Module, config: KMQConfig) -> Plan:
    """Decides from names and types alone (the model may be on the meta device) which weights are quantized and how."""
    groups: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in _weights(model):
        groups.setdefault(id(module.weight), []).append((name, module))
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    by_name = {name: group for group in groups.values() for name, _ in group}
    for target, source in tied.items():  # tied by name: on the meta device they are not one tensor yet
        one, other = (by_name.get(key.removesuffix(".weight")) for key in (source, target))
        if one is not None and other is not None and one is not other:
            one.extend(other)
            by_name.update({name: one for name, _ in other})
    result = Plan({}, {}, [])
    seen = set()
    for group in by_name.values():
        if id(group) in seen:
            continue
        seen.add(id(group))
        names = [name for name, _ in group]
        explicit = [bits for bits, said in map(config.bits_for, names) if said]
        skip = config.skip or []
        if explicit:
            bits: int | None = explicit[0]
        elif any(name_matches(pattern, name) for pattern in skip for name in names):
            bits = None
        else:  # a classification layer tied to an embedding goes with the embedding
            heads = [any(name_matches(head, name) for head in HEADS) for name in names]
            bits = None if all(heads) else config.bits
        if bits is None:
            result.left.extend(names)
            continue
        for name, module in group:
            if isinstance(module, nn.Embedding) and module.max_norm is not None:
                raise ValueError(f"{name}: an embedding with max_norm changes its weight in forward and cannot be quantized")
        result.bits[names[0]] = bits
        result.members[names[0]] = names
    return result

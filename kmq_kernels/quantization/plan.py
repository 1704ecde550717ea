"""Which weights of a model are quantized, and with how many bits: one record a weight, which the later steps carry on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import cast

from torch import Tensor, nn

from .config import KMQConfig, name_matches
from .encoding import EncodedWeight

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


@dataclasses.dataclass
class Weight:
    """One weight on its way: `plan` makes the record, a budget may change `bits`, encoding fills `encoded`, the swap ends it."""

    modules: dict[str, nn.Module]  # all layers that have it, by name; the first name stands for it
    bits: int | None = None  # None: it stays as it is
    left: str = ""  # why it stays
    given: bool = False  # whether `module_bits` says the bits
    encoded: EncodedWeight | None = None

    @property
    def name(self) -> str:
        """The name that stands for it: of the first layer that has it."""
        return next(iter(self.modules))

    @property
    def tensor(self) -> Tensor:
        """The weight itself, (rows, cols)."""
        return cast(Tensor, next(iter(self.modules.values())).weight)

    @property
    def parameter(self) -> str:
        """What errors call it."""
        return f"{self.name}.weight"


@dataclasses.dataclass
class Plan:
    """Every weight of a model that could be quantized, in the order of the model, and what becomes of it."""

    weights: list[Weight]

    @property
    def quantized(self) -> list[Weight]:
        """Those that are."""
        return [weight for weight in self.weights if weight.bits is not None]

    @property
    def left(self) -> list[str]:
        """Names of the layers that stay as they are."""
        return [name for weight in self.weights if weight.bits is None for name in weight.modules]


def _quantizable(module: nn.Module) -> bool:
    """A plain linear or embedding layer: a subclass with a forward of its own may use its weight in ways not known here."""
    plain = (nn.Linear.forward, nn.Embedding.forward)
    return isinstance(module, (nn.Linear, nn.Embedding)) and type(module).forward in plain


def _weights(model: nn.Module) -> Iterator[Weight]:
    """A record a weight; layers that share it, by identity or (on the meta device) by transformers' list of ties, are one."""
    found: dict[int, Weight] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if _quantizable(module):
            found.setdefault(id(module.weight), Weight({})).modules[name] = module
    by_name = {name: weight for weight in found.values() for name in weight.modules}
    for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        one, other = (by_name.get(key.removesuffix(".weight")) for key in (source, target))
        if one is not None and other is not None and one is not other:
            one.modules.update(other.modules)
            by_name.update(dict.fromkeys(other.modules, one))
    return iter({id(weight): weight for weight in by_name.values()}.values())


def plan(model: nn.Module, config: KMQConfig) -> Plan:
    """Decides from names and types alone (the model may be on the meta device) which weights are quantized and how."""
    weights = []
    for weight in _weights(model):
        weights.append(weight)
        explicit = [bits for bits, said in map(config.bits_for, weight.modules) if said]
        if explicit:
            weight.bits, weight.given = explicit[0], True
        elif any(name_matches(pattern, name) for pattern in config.skip or [] for name in weight.modules):
            weight.left = "skip"
            continue
        elif all(any(name_matches(head, name) for head in HEADS) for name in weight.modules):
            weight.left = "a classification layer"  # one tied to an embedding goes with the embedding
            continue
        else:
            weight.bits = config.bits
        for name, module in weight.modules.items():
            if isinstance(module, nn.Embedding) and module.max_norm is not None:
                raise ValueError(f"{name}: an embedding with max_norm changes its weight in forward and cannot be quantized")
    return Plan(weights)

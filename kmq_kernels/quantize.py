"""quantize_ and dequantize_: a model's embeddings and linear layers to codebook modules, in place, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .clustering import cluster_matrices
from .config import QUANT_METHOD, KMQConfig, name_matches
from .modules import CodebookEmbedding, CodebookLinear, CodebookModule

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


def _empty_like(module: nn.Module, bits: int, config: KMQConfig) -> CodebookModule:
    weight = cast(Tensor, module.weight)
    options: dict[str, Any] = {
        "group_rows": config.rows_per_codebook(weight.shape[0]),
        "grad_reduction": config.grad_reduction,
        "device": weight.device,
        "dtype": weight.dtype,
    }
    new: CodebookModule
    if isinstance(module, nn.Embedding):
        new = CodebookEmbedding(module.num_embeddings, module.embedding_dim, bits, padding_idx=module.padding_idx, **options)
    else:
        linear = cast(nn.Linear, module)
        new = CodebookLinear(linear.in_features, linear.out_features, bits, bias=linear.bias is not None, **options)
        new.bias = linear.bias
    return new.train(module.training)


def _replace(model: nn.Module, modules: dict[str, nn.Module]) -> None:
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)


def swap_empty(model: nn.Module, config: KMQConfig) -> dict[str, CodebookModule]:
    """Puts empty codebook modules (zeros, or meta) in place of the layers that `plan` names; returns them by name."""
    chosen = plan(model, config)
    new: dict[str, nn.Module] = {}
    made: dict[int, CodebookModule] = {}  # a module that stands at several places stays one module
    for weight, bits in chosen.bits.items():
        first: CodebookModule | None = None
        for name in chosen.members[weight]:
            old = model.get_submodule(name)
            if id(old) not in made:
                made[id(old)] = _empty_like(old, bits, config)
                if first is None:
                    first = made[id(old)]
                made[id(old)].codebook, made[id(old)].packed = first.codebook, first.packed
            new[name] = made[id(old)]
    _replace(model, new)
    _retie(model, set(new), packed=True)
    return cast("dict[str, CodebookModule]", new)


def _retie(model: nn.Module, names: set[str], packed: bool) -> None:
    """transformers ties parameters by name: X.weight becomes X.codebook and X.packed, or back."""
    forms: tuple[tuple[str, ...], ...] = (("weight",), ("codebook", "packed"))
    old, new = forms if packed else forms[::-1]
    for attribute in ("all_tied_weights_keys", "_tied_weights_keys"):
        keys = getattr(model, attribute, None)
        if not isinstance(keys, dict):
            continue
        renamed = {}
        for target, source in keys.items():
            module, _, parameter = target.rpartition(".")
            if parameter not in old or not any(name == module or name.endswith(f".{module}") for name in names):
                renamed[target] = source
                continue
            for name in new:
                renamed[f"{module}.{name}"] = f"{source.rpartition('.')[0]}.{name}"
        setattr(model, attribute, renamed)


def quantize_(
    model: nn.Module, config: KMQConfig, *, sample_weight: dict[str, Tensor] | None = None, progress: bool | None = None
) -> KMQConfig:
    """Clusters every embedding and linear weight except the classification layer, and swaps in codebook modules, in place.

    model: any torch module; a transformers model can be saved with `save_pretrained` afterwards. config: see KMQConfig.
    sample_weight: importance of each weight, {module name: (rows, cols) not negative}, default all equal.
    progress: a progress bar; None shows one where the work is long.
    Returns the config with `skip` resolved to the layers that were left. A weight that several modules share is clustered
    once and stays shared. Raises ValueError naming the parameter for NaN, Inf or an empty weight, or where the model is
    quantized already; the model is then as it was.
    """
    if any(isinstance(module, CodebookModule) for module in model.modules()):
        raise ValueError("model: it is quantized already; use dequantize_ first")
    chosen = plan(model, config)
    if not chosen.bits:
        raise ValueError("model: it has no embedding or linear layer to quantize")
    names = list(chosen.bits)
    unknown = set(sample_weight or {}) - set(names)
    if unknown:
        raise ValueError(f"sample_weight: {sorted(unknown)[0]} is not a weight that is quantized")
    weights = [cast(Tensor, model.get_submodule(name).weight).detach() for name in names]
    show = progress if progress is not None else sum(w.numel() for w in weights) > 50_000_000
    with tqdm(total=sum(w.numel() for w in weights), desc="clustering", unit="w", unit_scale=True, disable=not show) as bar:
        clustered = cluster_matrices(
            weights,
            [chosen.bits[name] for name in names],
            group_rows=[config.rows_per_codebook(w.shape[0]) for w in weights],
            scheme=config.scheme,
            algorithm=config.algorithm,
            init=config.init,
            max_iter=config.max_iter,
            tol=config.tol,
            seed=config.seed,
            sample_weight=None if sample_weight is None else [sample_weight.get(name) for name in names],
            names=[f"{name}.weight" for name in names],
            on_done=lambda i: bar.update(weights[i].numel()) and None,
        )
    modules = swap_empty(model, config)
    with torch.no_grad():
        for name, result in zip(names, clustered, strict=True):
            modules[name].codebook.copy_(result.codebook)
            modules[name].packed.copy_(result.packed)
    resolved = dataclasses.replace(config, skip=chosen.left)
    if hasattr(model, "hf_quantizer") or hasattr(model, "save_pretrained"):
        _mark_quantized(model, resolved)
    return resolved


def _mark_quantized(model: Any, config: KMQConfig) -> None:
    """What from_pretrained would set, so that save_pretrained and Trainer treat the model as quantized."""
    from transformers.quantizers import AutoHfQuantizer

    model.config.quantization_config = config
    model.hf_quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)
    model.is_quantized = True
    model.quantization_method = QUANT_METHOD


def dequantize_(model: nn.Module) -> nn.Module:
    """Swaps plain linear and embedding layers with the decoded weights back in, in place; returns the model.

    The weights keep their 2**bits distinct values. Layers that shared codebook and indices share their weight again.
    """
    new: dict[str, nn.Module] = {}
    made: dict[int, nn.Module] = {}
    weights: dict[int, nn.Parameter] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, CodebookModule):
            continue
        if id(module) not in made:
            with torch.no_grad():
                weight = weights.setdefault(id(module.packed), nn.Parameter(module.weight.detach().clone()))
            made[id(module)] = _plain(module, weight).train(module.training)
        new[name] = made[id(module)]
    _replace(model, new)
    _retie(model, set(new), packed=False)
    config = getattr(model, "config", None)
    if new and getattr(config, "quantization_config", None) is not None:
        del cast(Any, config).quantization_config
        model.hf_quantizer = None  # type: ignore[assignment]  # a class attribute of PreTrainedModel
        model.is_quantized = False  # type: ignore[assignment]
    return model


def _plain(module: CodebookModule, weight: nn.Parameter) -> nn.Module:
    plain: nn.Module
    if isinstance(module, CodebookEmbedding):
        plain = nn.Embedding(module.num_embeddings, module.embedding_dim, padding_idx=module.padding_idx, device="meta")
    else:
        linear = cast(CodebookLinear, module)
        plain = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        plain.bias = linear.bias  # type: ignore[assignment]
    plain.weight = weight  # type: ignore[assignment]
    return plain


@dataclasses.dataclass(frozen=True)
class ModelSize:
    """What a model takes: `weights` counts the values it stands for, each shared one once; bytes are those of the state dict."""

    weights: int
    quantized_weights: int
    index_bytes: int
    codebook_bytes: int
    other_bytes: int

    @property
    def total_bytes(self) -> int:
        """Bytes of all parameters."""
        return self.index_bytes + self.codebook_bytes + self.other_bytes

    @property
    def bits_per_weight(self) -> float:
        """Bits per value the model stands for, with codebooks and everything that stays in floating point."""
        return 8 * self.total_bytes / max(self.weights, 1)

    @property
    def ratio(self) -> float:
        """How many times smaller than the same model in fp32."""
        return 4 * self.weights / max(self.total_bytes, 1)


def model_size(model: nn.Module) -> ModelSize:
    """Counts the parameters of a model, quantized or not; a parameter that stands at several places counts once."""
    indices: dict[int, CodebookModule] = {}
    codebooks: set[int] = set()
    for module in model.modules():
        if isinstance(module, CodebookModule):
            indices.setdefault(id(module.packed), module)
            codebooks.add(id(module.codebook))
    others = [p for p in model.parameters() if id(p) not in indices and id(p) not in codebooks]
    quantized = sum(module.rows * module.cols for module in indices.values())
    return ModelSize(
        weights=quantized + sum(p.numel() for p in others),
        quantized_weights=quantized,
        index_bytes=sum(module.packed.numel() for module in indices.values()),
        codebook_bytes=sum(p.numel() * p.element_size() for p in model.parameters() if id(p) in codebooks),
        other_bytes=sum(p.numel() * p.element_size() for p in others),
    )

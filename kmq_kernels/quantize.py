"""quantize_ and dequantize_: a model's embeddings and linear layers to codebook modules, in place, and back."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from . import allocation
from .config import QUANT_METHOD, KMQConfig, name_matches
from .encoding import encode_weights, encoded_bytes
from .modules import STORED, CodebookEmbedding, CodebookLinear, CodebookModule

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
        "row_scale": config.row_scale,
        "outliers": config.outlier_count(weight.numel()),
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
                for part, parameter in first.stored().items():
                    setattr(made[id(old)], part, parameter)
            new[name] = made[id(old)]
    _replace(model, new)
    _retie(model, new)
    return cast("dict[str, CodebookModule]", new)


def _retie(model: nn.Module, new: dict[str, nn.Module]) -> None:
    """transformers ties parameters by name: X.weight becomes X.codebook, X.packed, ... for a codebook module X, or back."""
    for attribute in ("all_tied_weights_keys", "_tied_weights_keys"):
        keys = getattr(model, attribute, None)
        if not isinstance(keys, dict):
            continue
        renamed = {}
        for target, source in keys.items():
            owner, _, parameter = target.rpartition(".")
            module = next((m for name, m in new.items() if name == owner or name.endswith(f".{owner}")), None)
            if module is None or parameter not in ("weight", *STORED):
                renamed[target] = source
                continue
            for name in module.stored() if isinstance(module, CodebookModule) else ("weight",):
                renamed[f"{owner}.{name}"] = f"{source.rpartition('.')[0]}.{name}"
        setattr(model, attribute, renamed)


def quantize_(
    model: nn.Module,
    config: KMQConfig,
    *,
    sample_weight: dict[str, Tensor] | None = None,
    eigenvalues: dict[str, float] | None = None,
    progress: bool | None = None,
) -> KMQConfig:
    """Clusters every embedding and linear weight except the classification layer, and swaps in codebook modules, in place.

    model: any torch module; a transformers model can be saved with `save_pretrained` afterwards. config: see KMQConfig.
    sample_weight: importance of each weight, {module name: (rows, cols) not negative}, default all equal; allocation and
    weighting "fisher" need it, see `sensitivity.importance`. eigenvalues: largest one of the Hessian of each weight,
    {module name: value}, for allocation "hessian". progress: a progress bar; None shows one where the work is long.
    Returns the config with `skip` resolved to the layers that were left and, where there was a budget, `module_bits` to the
    bits chosen. A weight that several modules share is clustered once and stays shared. Raises ValueError naming the parameter
    for NaN, Inf or an empty weight, where the model is quantized already, where the config needs figures that were not given,
    and BudgetError for a budget that cannot be met, with the smallest possible; the model is then as it was.
    """
    if any(isinstance(module, CodebookModule) for module in model.modules()):
        raise ValueError("model: it is quantized already; use dequantize_ first")
    chosen = plan(model, config)
    if not chosen.bits:
        raise ValueError("model: it has no embedding or linear layer to quantize")
    unknown = (set(sample_weight or {}) | set(eigenvalues or {})) - set(chosen.bits)
    if unknown:
        what = "sample_weight" if unknown & set(sample_weight or {}) else "eigenvalues"
        raise ValueError(f"{what}: {sorted(unknown)[0]} is not a weight that is quantized")
    if config.needs_fisher and sample_weight is None:
        raise ValueError("sample_weight: allocation and weighting 'fisher' need the Fisher diagonal, got none")
    if config.has_budget:
        config = _allocated(model, config, chosen, sample_weight or {}, eigenvalues, progress)
        chosen = plan(model, config)
    names = list(chosen.bits)
    weights = [cast(Tensor, model.get_submodule(name).weight).detach() for name in names]
    with _bar("clustering", weights, progress) as bar:
        encoded = encode_weights(
            weights,
            [chosen.bits[name] for name in names],
            config,
            importance=None if sample_weight is None else [sample_weight.get(name) for name in names],
            names=[f"{name}.weight" for name in names],
            on_done=lambda i: bar.update(weights[i].numel()) and None,
        )
    modules = swap_empty(model, config)
    with torch.no_grad():
        for name, result in zip(names, encoded, strict=True):
            for part, parameter in modules[name].stored().items():
                parameter.copy_(getattr(result, part))
    resolved = dataclasses.replace(config, skip=chosen.left)
    if hasattr(model, "hf_quantizer") or hasattr(model, "save_pretrained"):
        _mark_quantized(model, resolved)
    return resolved


def _bar(title: str, weights: list[Tensor], progress: bool | None) -> Any:
    total = sum(weight.numel() for weight in weights)
    show = progress if progress is not None else total > 50_000_000
    return tqdm(total=total, desc=title, unit="w", unit_scale=True, disable=not show)


def _exactly(name: str, model: nn.Module) -> str:
    """A pattern for `module_bits` that matches this module only, in the model and in its base model."""
    prefix = getattr(model, "base_model_prefix", "")
    optional = f"(?:{re.escape(prefix)}\\.)?" if prefix else ""
    return f"^{optional}{re.escape(name.removeprefix(f'{prefix}.'))}$"


def check_budget(model: nn.Module, config: KMQConfig) -> None:
    """Raises BudgetError, with the smallest possible, where the model cannot meet the config's budget; looks at shapes only."""
    if config.has_budget:
        _budget(model, config, plan(model, config))


def _budget(model: nn.Module, config: KMQConfig, chosen: Plan) -> tuple[list[str], list[list[int]], int]:
    """The weights that may get any bits, what each costs at 1 to 8 bits, and what all of them may cost together."""
    fixed = {name for name, members in chosen.members.items() if any(config.bits_for(m)[1] for m in members)}
    free = [name for name in chosen.bits if name not in fixed]
    weights = {name: cast(Tensor, model.get_submodule(name).weight) for name in chosen.bits}

    def cost(name: str, bits: int) -> int:
        rows, cols = weights[name].shape
        return encoded_bytes(rows, cols, bits, config, weights[name].element_size())

    quantized = {id(weight) for weight in weights.values()}
    others = [p for p in model.parameters() if id(p) not in quantized]
    taken = sum(p.numel() * p.element_size() for p in others) + sum(cost(name, chosen.bits[name]) for name in fixed)
    if config.size is not None:
        taken += _header_bound(model, chosen, config)
        budget = config.size
    elif config.bits_per_weight is not None:
        budget = int(config.bits_per_weight * sum(p.numel() for p in model.parameters()) / 8)
    else:
        budget = taken + sum(cost(name, config.bits) for name in free)
    costs = [[cost(name, bits) for bits in allocation.BITS] for name in free]
    least = taken + sum(row[0] for row in costs)
    if budget < least:
        raise _too_small(config, least, model)
    return free, costs, budget - taken


def _allocated(
    model: nn.Module,
    config: KMQConfig,
    chosen: Plan,
    importance: dict[str, Tensor],
    eigenvalues: dict[str, float] | None,
    progress: bool | None,
) -> KMQConfig:
    """The config with the bits of every module that had none of its own, so that the model meets the budget."""
    free, costs, budget = _budget(model, config, chosen)
    if not free:
        return config
    least = allocation.fewest_bits(costs, budget)
    costs = [row[least - 1 :] for row in costs]
    if config.allocation == "uniform":
        choice = [max(c for c in range(len(costs[0])) if sum(row[c] for row in costs) <= budget)] * len(free)
    elif config.allocation == "hessian":
        missing = [name for name in free if name not in (eigenvalues or {})]
        if eigenvalues is None or missing:
            raise ValueError(f"eigenvalues: allocation 'hessian' needs one for every module, none for {missing[0]}")
        choice = allocation.by_eigenvalue(costs, [eigenvalues[name] for name in free], budget)
    else:
        weights = [cast(Tensor, model.get_submodule(name).weight).detach() for name in free]
        with _bar("distortion at 1 to 8 bits", weights, progress) as bar:
            curves = allocation.distortion_curves(
                weights,
                config,
                importance=[importance.get(name) for name in free] if config.allocation == "fisher" else None,
                names=[f"{name}.weight" for name in free],
                on_done=lambda i: bar.update(weights[i].numel()) and None,
            )
        choice = allocation.least_error(costs, curves[:, least - 1 :].tolist(), budget)
    found = {_exactly(name, model): least + c for name, c in zip(free, choice, strict=True)}
    return dataclasses.replace(config, module_bits={**(config.module_bits or {}), **found})


def _too_small(config: KMQConfig, least: int, model: nn.Module) -> allocation.BudgetError:
    if config.size is not None:
        return allocation.BudgetError(f"size: the smallest possible for this model is {least} bytes, got {config.size}")
    smallest = 8 * least / sum(p.numel() for p in model.parameters())
    return allocation.BudgetError(
        f"bits_per_weight: the smallest possible for this model is {smallest:.4f}, got {config.bits_per_weight}"
    )


def _header_bound(model: nn.Module, chosen: Plan, config: KMQConfig) -> int:
    """Bytes that the header of the safetensors file can take at most."""
    digits = len(str(sum(p.numel() * p.element_size() for p in model.parameters())))
    fixed = len('"":{"dtype":"BF16","shape":[],"data_offsets":[,]},') + 2 * digits
    stored = 2 + config.row_scale + 2 * (config.outlier_fraction > 0)
    total = 128  # length field, metadata, padding
    for name, parameter in model.named_parameters():
        parts = stored if name.removesuffix(".weight") in chosen.bits else 1
        total += parts * (len(name) + len("outlier_values") + fixed + len(str(list(parameter.shape))))
    return total


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
    _retie(model, new)
    config = getattr(model, "config", None)
    if new and getattr(config, "quantization_config", None) is not None:
        del cast(Any, config).quantization_config
        model.hf_quantizer = None  # type: ignore[assignment]  # a class attribute of PreTrainedModel
        model.is_quantized = False  # type: ignore[assignment]  # a class attribute, too
    return model


def _plain(module: CodebookModule, weight: nn.Parameter) -> nn.Module:
    plain: nn.Module
    if isinstance(module, CodebookEmbedding):
        plain = nn.Embedding(module.num_embeddings, module.embedding_dim, padding_idx=module.padding_idx, device="meta")
    else:
        linear = cast(CodebookLinear, module)
        plain = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        plain.bias = linear.bias  # type: ignore[assignment]  # None is allowed, torch's annotation says otherwise
    plain.weight = weight  # type: ignore[assignment]  # nn.Module's attributes are Tensor or Module to mypy
    return plain


@dataclasses.dataclass(frozen=True)
class ModelSize:
    """What a model takes: `weights` counts the values it stands for, each shared one once; bytes are those of the state dict.

    codebook_bytes: codebooks and row factors; outlier_bytes: exactly kept values and their positions.
    """

    weights: int
    quantized_weights: int
    index_bytes: int
    codebook_bytes: int
    outlier_bytes: int
    other_bytes: int

    @property
    def total_bytes(self) -> int:
        """Bytes of all parameters."""
        return self.index_bytes + self.codebook_bytes + self.outlier_bytes + self.other_bytes

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
    found: dict[int, CodebookModule] = {}
    for module in model.modules():
        if isinstance(module, CodebookModule):
            found.setdefault(id(module.packed), module)
    parts = [(name, parameter) for module in found.values() for name, parameter in module.stored().items()]
    stored = {id(parameter) for _, parameter in parts}
    others = [p for p in model.parameters() if id(p) not in stored]
    quantized = sum(module.rows * module.cols for module in found.values())

    def taken(*kinds: str) -> int:
        return sum(p.numel() * p.element_size() for name, p in parts if name in kinds)

    return ModelSize(
        weights=quantized + sum(p.numel() for p in others),
        quantized_weights=quantized,
        index_bytes=taken("packed"),
        codebook_bytes=taken("codebook", "row_scale"),
        outlier_bytes=taken("outlier_index", "outlier_values"),
        other_bytes=sum(p.numel() * p.element_size() for p in others),
    )

"""Encoders that the compiled code runs in one call: what they are made of, by architecture.

A description names every module of an encoder of transformers and what it does there. Anything out of the ordinary (a layer that
is not packed, an activation that is not known, a decoder) raises Unlike, with a sentence, and the encoder then runs as ever.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .encoder_weights import describe_embedding, describe_linear
from .linear import CodebookLinear

# Classes of transformers' activations, and of torch's.
_ACTIVATIONS = {
    "GELUActivation": "gelu",
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "ReLU": "relu",
    "SiLUActivation": "silu",
    "SiLU": "silu",
}


class Unlike(Exception):
    """Why an encoder cannot run in one call; one sentence."""


class Maker:
    """Turns modules into what the compiled encoder takes, for one kind of arithmetic."""

    def __init__(self, compute: str) -> None:
        self.compute = compute

    def linear(self, module: nn.Module) -> dict[str, Any]:
        if not isinstance(module, CodebookLinear) or module.codebook.dtype == torch.float64:
            raise Unlike(f"a linear layer is {type(module).__name__}, not packed in fp32, bf16 or fp16")
        return describe_linear(module, self.compute)

    def embedding(self, module: nn.Module, ids: str = "given") -> dict[str, Any]:
        facts = describe_embedding(module, ids)
        if facts is None:
            raise Unlike(f"an embedding is {type(module).__name__}, which the compiled code does not know")
        return facts

    def norm(self, module: nn.Module) -> tuple[Tensor, Tensor | None, float]:
        if type(module) is not nn.LayerNorm or module.weight is None or len(module.normalized_shape) != 1:
            raise Unlike(f"a normalization is {type(module).__name__}, which the compiled code does not know")
        return module.weight.detach(), None if module.bias is None else module.bias.detach(), module.eps


def _activation(module: Any) -> str:
    name = type(module).__name__
    if name == "GELU" and isinstance(module, nn.GELU):
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    if name not in _ACTIVATIONS:
        raise Unlike(f"its activation is {name}, which the compiled code does not know")
    return _ACTIVATIONS[name]


def _facts(hidden: int, heads: int, **given: Any) -> dict[str, Any]:
    """The facts of an encoder, those given and the usual ones."""
    usual = {"norm_first": False, "gated": False, "padding": -1, "projection": None, "final_norm": None, "relative_bias": None}
    return {"hidden": hidden, "heads": heads, **usual, **given}


def _layer(qkv: list[Any], out: Any, up: Any, down: Any, middle: int, attention_norm: Any, output_norm: Any) -> dict[str, Any]:
    return {
        "qkv": qkv,
        "out": out,
        "up": up,
        "down": down,
        "middle": middle,
        "attention_norm": attention_norm,
        "output_norm": output_norm,
        "rotary": None,
        "window": 0,
    }


def _expect_usual_buffers(embeddings: Any) -> None:
    """The ids that an embedding takes where none are given are those which the compiled code takes: the columns, and zeros."""
    ids = getattr(embeddings, "position_ids", None)
    if ids is not None and not torch.equal(ids[0], torch.arange(ids.shape[1], device=ids.device)):
        raise Unlike("its position_ids are not 0, 1, 2, ...")
    types = getattr(embeddings, "token_type_ids", None)
    if types is not None and bool(types.any()):
        raise Unlike("its token_type_ids are not zeros")


def _bert(model: Any, make: Maker) -> dict[str, Any]:
    """BERT, RoBERTa, XLM-RoBERTa, CamemBERT and ELECTRA."""
    if model.config.is_decoder or model.config.add_cross_attention:
        raise Unlike("it is a decoder")
    embeddings = model.embeddings
    _expect_usual_buffers(embeddings)
    counted = hasattr(embeddings, "padding_idx")  # positions count the tokens that are not padding
    layers = [
        _layer(
            [make.linear(getattr(layer.attention.self, name)) for name in ("query", "key", "value")],
            make.linear(layer.attention.output.dense),
            make.linear(layer.intermediate.dense),
            make.linear(layer.output.dense),
            layer.intermediate.dense.out_features,
            make.norm(layer.attention.output.LayerNorm),
            make.norm(layer.output.LayerNorm),
        )
        for layer in model.encoder.layer
    ]
    activations = {_activation(layer.intermediate.intermediate_act_fn) for layer in model.encoder.layer}
    return _facts(
        model.config.hidden_size,
        model.config.num_attention_heads,
        activation=_only(activations),
        padding=embeddings.padding_idx if counted else -1,
        embeddings=[
            make.embedding(embeddings.word_embeddings),
            make.embedding(embeddings.token_type_embeddings),
            make.embedding(embeddings.position_embeddings, "counted" if counted else "columns"),
        ],
        embedding_norm=make.norm(embeddings.LayerNorm),
        projection=make.linear(model.embeddings_project) if hasattr(model, "embeddings_project") else None,
        layers=layers,
        order=list(range(len(layers))),
    )


def _only(activations: set[str]) -> str:
    if len(activations) != 1:
        raise Unlike(f"its layers have {len(activations)} activations")
    return activations.pop()


def _distilbert(model: Any, make: Maker) -> dict[str, Any]:
    _expect_usual_buffers(model.embeddings)
    layers = [
        _layer(
            [make.linear(getattr(layer.attention, name)) for name in ("q_lin", "k_lin", "v_lin")],
            make.linear(layer.attention.out_lin),
            make.linear(layer.ffn.lin1),
            make.linear(layer.ffn.lin2),
            layer.ffn.lin1.out_features,
            make.norm(layer.sa_layer_norm),
            make.norm(layer.output_layer_norm),
        )
        for layer in model.transformer.layer
    ]
    return _facts(
        model.config.dim,
        model.config.n_heads,
        activation=_only({_activation(layer.ffn.activation) for layer in model.transformer.layer}),
        embeddings=[
            make.embedding(model.embeddings.word_embeddings),
            make.embedding(model.embeddings.position_embeddings, "columns"),
        ],
        embedding_norm=make.norm(model.embeddings.LayerNorm),
        layers=layers,
        order=list(range(len(layers))),
    )


def _albert(model: Any, make: Maker) -> dict[str, Any]:
    _expect_usual_buffers(model.embeddings)
    groups = model.encoder.albert_layer_groups
    modules = [layer for group in groups for layer in group.albert_layers]
    layers = [
        _layer(
            [make.linear(getattr(layer.attention, name)) for name in ("query", "key", "value")],
            make.linear(layer.attention.dense),
            make.linear(layer.ffn),
            make.linear(layer.ffn_output),
            layer.ffn.out_features,
            make.norm(layer.attention.LayerNorm),
            make.norm(layer.full_layer_layer_norm),
        )
        for layer in modules
    ]
    config, inner = model.config, len(groups[0].albert_layers)
    group_of = [int(i / (config.num_hidden_layers / config.num_hidden_groups)) for i in range(config.num_hidden_layers)]
    return _facts(
        config.hidden_size,
        config.num_attention_heads,
        activation=_only({_activation(layer.activation) for layer in modules}),
        embeddings=[
            make.embedding(model.embeddings.word_embeddings),
            make.embedding(model.embeddings.token_type_embeddings),
            make.embedding(model.embeddings.position_embeddings, "columns"),
        ],
        embedding_norm=make.norm(model.embeddings.LayerNorm),
        projection=make.linear(model.encoder.embedding_hidden_mapping_in),
        layers=layers,
        order=[group * inner + i for group in group_of for i in range(inner)],
    )


def _mpnet(model: Any, make: Maker) -> dict[str, Any]:
    embeddings, encoder = model.embeddings, model.encoder
    _expect_usual_buffers(embeddings)
    layers = [
        _layer(
            [make.linear(getattr(layer.attention.attn, name)) for name in ("q", "k", "v")],
            make.linear(layer.attention.attn.o),
            make.linear(layer.intermediate.dense),
            make.linear(layer.output.dense),
            layer.intermediate.dense.out_features,
            make.norm(layer.attention.LayerNorm),
            make.norm(layer.output.LayerNorm),
        )
        for layer in encoder.layer
    ]
    reach = model.config.max_position_embeddings - 1
    with torch.no_grad():
        bucket = encoder.relative_position_bucket(torch.arange(-reach, reach + 1))  # of key - query
        relative = encoder.relative_attention_bias(bucket).T.float()
    return _facts(
        model.config.hidden_size,
        model.config.num_attention_heads,
        activation=_only({_activation(layer.intermediate.intermediate_act_fn) for layer in encoder.layer}),
        padding=embeddings.padding_idx,
        embeddings=[
            make.embedding(embeddings.word_embeddings),
            make.embedding(embeddings.position_embeddings, "counted"),
        ],
        embedding_norm=make.norm(embeddings.LayerNorm),
        layers=layers,
        order=list(range(len(layers))),
        relative_bias=relative.contiguous(),
    )


def _modernbert(model: Any, make: Maker) -> dict[str, Any]:
    config, rotary = model.config, model.rotary_emb
    tables = {}
    for kind in set(config.layer_types):
        if rotary.rope_type.get(kind) != "default":
            raise Unlike(f"its rotary embedding is {rotary.rope_type.get(kind)}, which the compiled code does not know")
        position = torch.arange(config.max_position_embeddings)[None]
        cosine, sine = rotary(torch.zeros(1, 1, 1), position, kind)
        half = cosine.shape[-1] // 2
        tables[kind] = torch.cat([cosine[0, :, :half], sine[0, :, :half]], 1)
    layers = []
    for layer in model.layers:
        first = isinstance(layer.attn_norm, nn.Identity)
        one = _layer(
            [make.linear(layer.attn.Wqkv)],
            make.linear(layer.attn.Wo),
            make.linear(layer.mlp.Wi),
            make.linear(layer.mlp.Wo),
            layer.mlp.Wo.in_features,
            None if first else make.norm(layer.attn_norm),
            make.norm(layer.mlp_norm),
        )
        window = config.sliding_window if layer.attention_type == "sliding_attention" else 0
        layers.append(one | {"rotary": tables[layer.attention_type], "window": window})
    return _facts(
        config.hidden_size,
        config.num_attention_heads,
        activation=_only({_activation(layer.mlp.act) for layer in model.layers}),
        norm_first=True,
        gated=True,
        embeddings=[make.embedding(model.embeddings.tok_embeddings)],
        embedding_norm=make.norm(model.embeddings.norm),
        layers=layers,
        order=list(range(len(layers))),
        final_norm=make.norm(model.final_norm),
    )


# Class of transformers -> its description, the ids that its embeddings take by the names of its forward, and its outputs.
_Known = tuple[Callable[[Any, Maker], dict[str, Any]], tuple[str, ...], str]
_BERT_IDS = ("input_ids", "token_type_ids", "position_ids")
_BERT: _Known = (_bert, _BERT_IDS, "BaseModelOutputWithPoolingAndCrossAttentions")
KNOWN: dict[str, _Known] = {
    "BertModel": _BERT,
    "RobertaModel": _BERT,
    "XLMRobertaModel": _BERT,
    "CamembertModel": _BERT,
    "ElectraModel": (_bert, _BERT_IDS, "BaseModelOutputWithPastAndCrossAttentions"),
    "DistilBertModel": (_distilbert, ("input_ids", "position_ids"), "BaseModelOutput"),
    "AlbertModel": (_albert, _BERT_IDS, "BaseModelOutputWithPooling"),
    "MPNetModel": (_mpnet, ("input_ids", "position_ids"), "BaseModelOutputWithPooling"),
    "ModernBertModel": (_modernbert, ("input_ids",), "BaseModelOutput"),
}


def known_class(cls: type) -> _Known | None:
    """What there is for this class of transformers, None for any other class."""
    return KNOWN.get(cls.__name__) if cls.__module__.startswith("transformers.models.") else None


def known(model: nn.Module) -> _Known | None:
    """As `known_class`, of the class of a model."""
    return known_class(type(model))


def describe(model: nn.Module, compute: str) -> dict[str, Any]:
    """The encoder as the compiled code takes it. Raises Unlike."""
    found = known(model)
    if found is None:
        raise Unlike(f"{type(model).__name__} is not an encoder that the compiled code knows")
    if any(parameter.device.type != "cpu" for parameter in model.parameters()):
        raise Unlike("it is not on the CPU")
    facts = found[0](model, Maker(compute))
    size = facts["hidden"] // facts["heads"]
    for module in model.modules():
        scale = getattr(module, "scaling", None)
        if isinstance(scale, float) and abs(scale * size**0.5 - 1) > 1e-6:
            raise Unlike(f"its attention is scaled by {scale:g}, the compiled code's by {size**-0.5:g}")
        if getattr(module, "attention_head_size", size) != size:
            raise Unlike(f"its attention heads have a size of {module.attention_head_size}, not {size}")
    return facts


def pooled(model: Any, states: Tensor) -> dict[str, Tensor | None]:
    """What the model makes of its first state, by the name of the output."""
    if type(model).__name__ == "AlbertModel":
        first = None if model.pooler is None else model.pooler_activation(model.pooler(states[:, 0]))
        return {"pooler_output": first}
    if not hasattr(model, "pooler"):
        return {}
    return {"pooler_output": None if model.pooler is None else model.pooler(states)}

"""A small random model of every type that transformers knows, from its default configuration with every size turned down."""

import dataclasses
import inspect
import re

import torch
import transformers
from transformers.models.auto import modeling_auto

# What a number of a configuration becomes, by the end of its name; the first that matches counts.
_SIZES = [
    (r"(pad|bos|eos|cls|sep|mask|unk|decoder_start|.*)_token_(id|index)$|.*_token_idx$", lambda value: min(value, 5)),
    (r"(text_|src_|tgt_|entity_|codebook_|audio_)?vocab_size(_.*)?$|num_embeddings$|n_codes$", lambda _: 96),
    (r"codebook_size$", lambda _: 64),
    (r".*(num|n)_.*layers?$|.*layers?_num$|num_.*blocks$|depth$|n_layer$|layers$|.*_layers$", lambda value: min(value, 2)),
    (r".*kv_heads$|.*key_value_heads$|.*num_kv.*", lambda _: 4),
    (r".*heads?$|.*num_head$|n_head$", lambda _: 4),
    (r"head_dim$|.*_head_dim$|d_kv$|kv_channels$|attention_head_size$|d_head$", lambda _: 8),
    (r".*(intermediate|ffn|feed_forward|inner|d_ff|mlp).*(size|dim)?$", lambda _: 48),
    (r"(max_)?.*position.*|max_seq.*|n_positions|n_ctx|seq_length", lambda value: min(value, 64)),
    (r"image_size$|input_size$|img_size$", lambda _: 32),
    (r"patch_size$", lambda _: 8),
    (r"num_experts$|num_local_experts$|n_routed_experts$|moe_num_experts$", lambda _: 4),
    (r".*(hidden|model|embed|projection|d_).*(size|dim|channels)?$|n_embd$|dim$|.*_dim$|.*_size$", lambda v: min(v, 32)),
]


# Families whose sizes depend on one another in ways of their own.
_OWN = {
    "esm": {"vocab_size": 96, "pad_token_id": 1, "mask_token_id": 4},
    "funnel": {"block_sizes": [1, 1], "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 48, "block_repeats": [1, 1]},
    "mobilebert": {"embedding_size": 16},  # its decoder has a row for each of what the hidden size is larger
    "reformer": {"axial_pos_embds": False, "hidden_size": 32, "feed_forward_size": 48},
    "squeezebert": {
        "hidden_size": 32,
        "embedding_size": 32,
        "q_groups": 4,
        "k_groups": 4,
        "v_groups": 4,
        "post_attention_groups": 1,
    },
    "xlnet": {"d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 48},
    "swin": {"embed_dim": 24, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4},
}  # fmt: skip


def _small(name, value):
    """The value that a field has in a small configuration, None where it stays."""
    if type(value) is not int or value <= 0:
        return None
    return next((small(value) for pattern, small in _SIZES if re.fullmatch(pattern, name)), None)


def small_config(kind):
    """The default configuration of a model type with its sizes turned down, also those of the models inside."""
    return _shrunk(transformers.CONFIG_MAPPING[kind], _OWN.get(kind, {}))


def _shrunk(config_class, own):
    default = config_class()
    options = {name: small for name, value in vars(default).items() if (small := _small(name, value)) is not None}
    for name in getattr(config_class, "sub_configs", None) or {}:
        inner = getattr(default, name, None)
        if isinstance(inner, transformers.PreTrainedConfig):
            options[name] = _shrunk(type(inner), {}).to_dict()
    # Made anew, so that what follows from the sizes (the kinds of the layers, a list with one entry a layer) follows again.
    known = set(inspect.signature(config_class.__init__).parameters) | {f.name for f in _fields(config_class)}
    config = config_class(**{name: value for name, value in {**options, **own}.items() if name in known or name in own})
    return type(config).from_dict(config.to_dict())


def _fields(config_class):
    return dataclasses.fields(config_class) if dataclasses.is_dataclass(config_class) else ()


def kinds():
    """Every model type that has a base model, sorted."""
    return sorted(kind for kind in modeling_auto.MODEL_MAPPING_NAMES if kind in transformers.CONFIG_MAPPING)


def build(kind, auto="AutoModel", most=3_000_000):
    """A small model of a type, of an Auto class, in eval mode; None where its small configuration describes none.

    That is where sizes of a family hang together in ways that `_SIZES` does not know, where a package is missing that the
    family needs, or where more than `most` weights are left.
    """
    try:
        config = small_config(kind)
        with torch.device("meta"):
            model = getattr(transformers, auto).from_config(config)
        if sum(p.numel() for p in model.parameters()) > most:
            return None
        torch.manual_seed(1)
        return getattr(transformers, auto).from_config(small_config(kind)).eval()
    except Exception:
        return None

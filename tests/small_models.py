"""A small random model of every type that transformers knows, from its default configuration with every size turned down."""

import re

import torch
import transformers

# What a number of a configuration becomes, by the end of its name; the first that matches counts.
_SIZES = [
    (r"(pad|bos|eos|cls|sep|mask|unk|decoder_start|.*)_token_(id|index)$|.*_token_idx$", lambda value: min(value, 5)),
    (r"(text_|src_|tgt_|entity_|codebook_|audio_)?vocab_size(_.*)?$|num_embeddings$|n_codes$|codebook_size$", lambda _: 96),
    (r".*(num|n)_.*layers?$|.*layers?_num$|num_.*blocks$|depth$|n_layer$|layers$|.*_layers$", lambda value: min(value, 2)),
    (r".*kv_heads$|.*key_value_heads$|.*num_kv.*", lambda _: 2),
    (r".*heads?$|.*num_head$|n_head$", lambda _: 4),
    (r"head_dim$|.*_head_dim$|d_kv$|kv_channels$|attention_head_size$|d_head$", lambda _: 8),
    (r".*(intermediate|ffn|feed_forward|inner|d_ff|mlp).*(size|dim)?$", lambda _: 48),
    (r"(max_)?.*position.*|max_seq.*|n_positions|n_ctx|seq_length", lambda value: min(value, 64)),
    (r"image_size$|input_size$|img_size$", lambda _: 32),
    (r"patch_size$", lambda _: 8),
    (r"num_experts$|num_local_experts$|n_routed_experts$|moe_num_experts$", lambda _: 4),
    (r".*(hidden|model|embed|projection|d_).*(size|dim|channels)?$|n_embd$|dim$|.*_dim$|.*_size$", lambda v: min(v, 32)),
]


def small_config(kind, seen=None):
    """The default configuration of a model type with its sizes turned down, also those of the models inside."""
    config = transformers.CONFIG_MAPPING[kind]()
    _shrink(config)
    return config


def _shrink(config):
    for name, value in list(vars(config).items()):
        if isinstance(value, transformers.PreTrainedConfig):
            _shrink(value)
        elif type(value) is int and value > 0:
            for pattern, small in _SIZES:
                if re.fullmatch(pattern, name):
                    setattr(config, name, small(value))
                    break


def build(kind, most=3_000_000):
    """A small model of a type, as its Auto class builds it; raises where the turned-down configuration describes none."""
    config = small_config(kind)
    auto = transformers.AutoModel
    with torch.device("meta"):
        size = sum(p.numel() for p in auto.from_config(config).parameters())
    if size > most:
        raise ValueError(f"{size} weights, expected at most {most}")
    torch.manual_seed(1)
    return auto.from_config(config).eval()

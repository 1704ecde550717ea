#!/usr/bin/env bash
# transformers 5.23.0: save_pretrained(state_dict=...) of a model with a quantizer saves the model's own values, without a word.
# HfQuantizer.get_state_dict_and_metadata returns None, which takes the place of the state dict that was given.
# Seen (2026-11): an average of weights that was given is not what is in the file. Fails if that changes.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q transformers==5.23.0 torch==2.13.0
"$dir/venv/bin/python" - "$dir" <<'PYTHON'
import sys

import torch
import transformers
from safetensors.torch import load_file
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin


class Nothing(HfQuantizer):
    """A quantizer that quantizes nothing."""

    is_trainable = True

    def is_serializable(self):
        return True


config = transformers.BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
saved = {}
for quantized in (False, True):
    model = transformers.BertModel(config)
    if quantized:
        model.hf_quantizer = Nothing(QuantizationConfigMixin(quant_method="nothing"))
    given = {name: torch.full_like(tensor, 7) for name, tensor in model.state_dict().items()}
    model.save_pretrained(sys.argv[1], state_dict=given)
    saved[quantized] = bool((load_file(f"{sys.argv[1]}/model.safetensors")["pooler.dense.weight"] == 7).all())
    print(f"quantized {quantized}: what was given is in the file: {saved[quantized]}")
sys.exit(not (saved[False] and not saved[True]))
PYTHON

#!/usr/bin/env bash
# torch 2.13.0: the plain mean of AveragedModel(model, use_buffers=True) is of integer buffers in their own type, silently. Of uint8, which
# packed and quantized weights are, differences wrap round: the mean of 255 and 245 becomes 122 (of 0 and 10 it is 5, which is
# right). Counters in int64 are cut to whole numbers at every update: after 0, 1, 2, 3 the mean is 0, where it is 1.5.
# Seen (2026-12). Fails if that changes.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q torch==2.13.0 numpy==2.3.5
"$dir/venv/bin/python" - <<'PYTHON'
import sys

import torch
from torch.optim.swa_utils import AveragedModel

model = torch.nn.Module()
model.weight = torch.nn.Parameter(torch.zeros(1))
model.register_buffer("packed", torch.tensor([0, 255], dtype=torch.uint8))
model.register_buffer("counter", torch.tensor(0))
averaged = AveragedModel(model, use_buffers=True)
with torch.no_grad():
    for step in range(4):
        model.weight.fill_(step)
        model.counter.fill_(step)
        model.packed.copy_(torch.tensor([10 * step, 255 - 10 * step]))
        averaged.update_parameters(model)
        if step == 1:
            packed = averaged.module.packed.tolist()
counter, weight = averaged.module.counter.item(), averaged.module.weight.item()
print(f"torch {torch.__version__}: means of 0, 10 and of 255, 245 in uint8: {packed}")
print(f"means of 0, 1, 2, 3: {weight} of the parameter, {counter} of the int64 counter")
sys.exit(not (packed == [5, 122] and counter == 0 and weight == 1.5))
PYTHON

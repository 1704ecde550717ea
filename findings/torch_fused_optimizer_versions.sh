#!/usr/bin/env bash
# torch 2.13.0: optimizers with fused=True write their parameters without counting it in the version that autograd checks; without it they
# count. So a backward through a graph that was recorded before the step, which raises RuntimeError else, silently takes the
# new weights: for w * (w * x) at w = 3 the gradient by x is 9, and after a step of SGD to w = 2 it gives 4. Whatever keeps something
# made of weights and asks `_version` whether they have changed keeps it too long.
# Seen (2026-12, CPU). Fails if that changes.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q torch==2.13.0 numpy==2.3.5
"$dir/venv/bin/python" - <<'PYTHON'
import sys

import torch

seen = {}
for kind in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW):
    for fused in (False, True):
        w, x = torch.nn.Parameter(torch.tensor([3.0])), torch.tensor([1.0], requires_grad=True)
        loss = (w * (w * x)).sum()
        w.grad = torch.ones(1)
        before = w._version
        kind([w], lr=1.0, fused=fused).step()
        try:
            (gradient,) = torch.autograd.grad(loss, x)
            result = gradient.item()
        except RuntimeError as error:
            result = type(error).__name__
        seen[kind.__name__, fused] = (w._version > before, result)
        print(f"torch {torch.__version__} {kind.__name__} fused={fused}: w 3 -> {w.item():g}, counted {w._version > before}, "
              f"gradient of w*w*x by x, recorded before: {result}")
counted = all(seen[name, fused][0] != fused for name, fused in seen)
silent = all((result == "RuntimeError") != fused for (_, fused), (_, result) in seen.items())
sys.exit(not (counted and silent))
PYTHON

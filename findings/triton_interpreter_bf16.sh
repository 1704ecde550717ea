#!/usr/bin/env bash
# Triton 3.8.0 under TRITON_INTERPRET=1 holds bf16 as 16-bit integers: loads, stores and casts are right, arithmetic works on the
# bit patterns and says nothing. The same kernel that widens to fp32 first is right.
# Seen (2026-11): 1.5 + 2.25 = nan; widened first 3.75. Fails if that changes.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q torch==2.13.0
"$dir/venv/bin/pip" install -q triton==3.8.0 numpy==2.3.5
cat > "$dir/add.py" <<'PYTHON'
import sys

import torch
import triton
import triton.language as tl


@triton.jit
def add(a_ptr, b_ptr, out_ptr, WIDE: tl.constexpr):
    a, b = tl.load(a_ptr), tl.load(b_ptr)
    if WIDE:
        a, b = a.to(tl.float32), b.to(tl.float32)
    tl.store(out_ptr, (a + b).to(tl.bfloat16))


a, b = torch.tensor([1.5], dtype=torch.bfloat16), torch.tensor([2.25], dtype=torch.bfloat16)
results = []
for wide in (False, True):
    out = torch.zeros(1, dtype=torch.bfloat16)
    add[(1,)](a, b, out, WIDE=wide)
    results.append(float(out))
print(f"triton {triton.__version__}, interpreter, bf16: 1.5 + 2.25 = {results[0]}, widened first {results[1]}")
sys.exit(not (results[0] != 3.75 and results[1] == 3.75))
PYTHON
TRITON_INTERPRET=1 "$dir/venv/bin/python" "$dir/add.py"

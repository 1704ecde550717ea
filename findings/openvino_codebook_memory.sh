#!/usr/bin/env bash
# OpenVINO 2026.4.1 on a CPU: a MatMul whose weight is Gather(16-entry table, 4-bit indices) takes an eighth of the file, but once
# compiled no less memory than the same MatMul with its fp32 weight: the indices are widened and a decoded weight is kept.
# Seen (2026-11), 12 weights of 1024 x 1024: files of 49,152 and 6,148 KB; resident growth +109.5 MB fp32, +113.8 MB codebook.
# Fails where the codebook takes less than 0.8 of fp32's growth.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q openvino==2026.4.1 numpy==2.4.6
cat > "$dir/grow.py" <<'PYTHON'
import gc
import os
import sys

import numpy as np
import openvino as ov
import openvino.opset13 as ops

LAYERS, SIZE = 12, 1024
kept = []  # ov.Tensor shares the memory of the array it is made of


def model(kind):
    random = np.random.default_rng(0)
    x = source = ops.parameter([-1, SIZE], np.float32)
    for _ in range(LAYERS):
        if kind == "fp32":
            weight = ops.constant(random.standard_normal((SIZE, SIZE), np.float32) * 0.03)
        else:
            table = ops.constant(np.sort(random.standard_normal(16)).astype(np.float32) * 0.03)
            packed = random.integers(0, 256, SIZE * SIZE // 2, np.uint8)
            kept.append(packed)
            indices = ops.constant(ov.Tensor(packed, ov.Shape([SIZE, SIZE]), ov.Type.u4))
            weight = ops.gather(table, ops.convert(indices, np.int32), ops.constant(np.int32(0)))
        x = ops.matmul(x, weight, False, True)
    return ov.Model([x], [source])


def resident():
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


path = sys.argv[2]
if sys.argv[1] == "save":
    ov.save_model(model(sys.argv[3]), path, compress_to_fp16=False)
else:
    core = ov.Core()
    core.compile_model(ov.Model([ops.relu(p := ops.parameter([1], np.float32))], [p]), "CPU")  # the plugin itself
    before = resident()
    compiled = core.compile_model(path, "CPU")
    compiled(np.ones((8, SIZE), np.float32))
    print(resident() - before)
PYTHON
for kind in fp32 codebook; do "$dir/venv/bin/python" "$dir/grow.py" save "$dir/$kind.xml" $kind; done
fp32=$("$dir/venv/bin/python" "$dir/grow.py" run "$dir/fp32.xml")
codebook=$("$dir/venv/bin/python" "$dir/grow.py" run "$dir/codebook.xml")
echo "openvino 2026.4.1: files $(du -k "$dir/fp32.bin" | cut -f1) and $(du -k "$dir/codebook.bin" | cut -f1) KB; compiled and run once: fp32 +$fp32 MB, codebook +$codebook MB"
"$dir/venv/bin/python" -c "import sys; sys.exit(not float(sys.argv[2]) > 0.8 * float(sys.argv[1]))" "$fp32" "$codebook"

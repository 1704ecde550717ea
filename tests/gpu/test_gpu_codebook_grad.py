"""The logic of benchmarks/gpu_codebook_grad.py on the CPU with tiny sizes: Triton's interpreter stands for the device."""

import json

import pytest
import torch

from benchmarks import gpu_codebook_grad as benchmark

CPU = torch.device("cpu")


def test_rows():
    rows = benchmark.grad_rows(CPU, [(40, 130)], [torch.float32, torch.bfloat16], (2, 4), 2)
    assert len(rows) == 4
    fused = benchmark.linear_grad_rows(CPU, [(20, 30)], 16, [torch.float16], (2,), 2)
    assert [row["name"] for row in fused] == ["cuBLAS", "kmq 2 bits"]
    assert fused[0]["times_cublas"] == 1
    for row in [*rows, *fused]:
        assert row["us"] > 0
        assert row["error"] <= 1e-5
    assert json.loads(json.dumps(rows + fused)) == rows + fused


def test_a_wrong_result_is_not_timed():
    ones = torch.ones(4, 4)
    with pytest.raises(SystemExit, match="not timed"):
        benchmark.check("x", torch.ones(1, 2), torch.ones(1, 2), ones, ones, torch.zeros(4, 4, dtype=torch.uint8), 2)

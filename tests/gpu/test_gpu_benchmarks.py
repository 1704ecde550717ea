"""The logic of the benchmarks that `make gpu` runs, on the CPU with tiny sizes: Triton's interpreter stands for the device."""

import json

import pytest
import torch

from benchmarks import gpu_codebook_linear as benchmark

CPU = torch.device("cpu")


def test_linear_rows(capsys):
    with torch.inference_mode():
        rows = benchmark.linear_rows(CPU, [(20, 130)], [1, 20], [4], 1, torch.float16)
    names = {row["name"] for row in rows}
    assert {"cuBLAS", "kmq 4 bits", "kmq 4 bits, fused", "kmq 4 bits, decoded"} <= names
    assert json.loads(json.dumps(rows)) == rows
    for row in rows:
        assert row["us"] > 0
        assert row["us_p10"] <= row["us"] <= row["us_p90"]
        assert row["percent_of_bandwidth"] > 0
        assert row["layers"] == benchmark.ring_length(20, 130, 4, benchmark.L2_ON_A_CPU)
        if row["name"] == "cuBLAS":
            assert row["times_as_fast_as_cublas"] == 1
        if row["name"].startswith("kmq"):
            assert row["error"] <= benchmark.TOLERANCE[torch.float16]
    assert "% of bandwidth" in capsys.readouterr().out


def test_a_wrong_result_is_not_timed(monkeypatch):
    real = benchmark.ours

    def wrong(bits, weights):
        layers, dense = real(bits, weights)
        return layers, dense + 1

    monkeypatch.setattr(benchmark, "ours", wrong)
    with pytest.raises(SystemExit, match="not timed"):
        benchmark.linear_rows(CPU, [(20, 130)], [1], [4], 1, torch.float16)


def test_ring_is_larger_than_the_cache():
    l2 = 50 * 2**20
    for OUT, IN in benchmark.GPU_LINEARS:
        length = benchmark.ring_length(OUT, IN, 2, l2)
        assert length * OUT * IN * 2 <= benchmark.MOST_BYTES
        assert length * OUT * IN * 2 / 8 >= 2 * l2


def test_encoder_rows():
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 50}
    with torch.inference_mode():
        rows = benchmark.encoder_rows(CPU, [2], 5, 2, **size)
    assert [row["name"] for row in rows] == ["cuBLAS", "kmq 4 bits", "kmq 4 bits, decoded ahead"]
    assert rows[0]["times_as_fast_as_cublas"] == 1


def test_ahead_rows(monkeypatch):
    with torch.inference_mode():
        rows = benchmark.ahead_rows(CPU, [(20, 130)], [3], 4, 1, torch.float32)
    assert [row["name"] for row in rows] == ["cuBLAS", "kmq 4 bits", "kmq 4 bits, decoded ahead"]
    assert all(row["us"] > 0 and row["chain"] == 2 for row in rows)
    monkeypatch.setattr(benchmark.torch, "equal", lambda *_: False)
    with torch.inference_mode(), pytest.raises(SystemExit, match="not the bits of the op"):
        benchmark.ahead_rows(CPU, [(20, 130)], [3], 4, 1, torch.float32)

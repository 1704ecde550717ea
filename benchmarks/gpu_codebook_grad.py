"""codebook_grad on a CUDA device in percent of the bandwidth of a copy, and the form fused into the weight-gradient GEMM beside
that GEMM in cuBLAS; run by `make gpu`, or alone:

    python -m benchmarks.gpu_codebook_grad          # all shapes; prints a line and a row for each figure

Results are checked before anything is timed, and must repeat bit for bit. One timing is the replay of a CUDA graph over a ring of
inputs larger than twice the L2 cache; contenders stand in one loop in shuffled order.
"""

import math
import random
import sys
from functools import partial
from typing import Any

import torch
from torch import Tensor

import kmq_kernels as kmq
from benchmarks.gpu_codebook_linear import L2_ON_A_CPU, bandwidth, compared, replayable
from benchmarks.gpu_keys import steady_keys
from benchmarks.gpu_steps import emit
from benchmarks.shapes import BERT_BASE, BERT_BASE_LINEARS

BITS = (2, 3, 4, 8)


def check(name: str, out: Tensor, again: Tensor, weight_grad: Tensor, magnitude: Tensor, index: Tensor, K: int) -> float:
    """The largest error in units of the sum of magnitudes, in float64; ends the program where it or a second result is wrong."""
    flat = index.flatten().long()
    expected, scale = (torch.zeros(K, dtype=torch.float64, device=flat.device).scatter_add_(0, flat, g.flatten().double())
                       for g in (weight_grad, magnitude))  # fmt: skip
    error = float(((out[0].double() - expected).abs() / scale.clamp_min(1e-300)).max())
    if not error <= 1e-5 or not torch.equal(out, again):
        raise SystemExit(f"{name}: error {error:.2e}, repeated bit for bit: {torch.equal(out, again)}; not timed")
    return error


def l2_bytes(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else L2_ON_A_CPU


def grad_rows(
    device: torch.device, shapes: list[tuple[int, int]], dtypes: list[torch.dtype], widths: tuple[int, ...], repeats: int
) -> list[dict[str, Any]]:
    """codebook_grad of a given gradient."""
    rows = []
    copied = bandwidth(device) if device.type == "cuda" else bandwidth(device, 2**20)
    for OUT, IN in shapes:
        for dtype in dtypes:
            runs, moved, errors = {}, {}, {}
            length = max(2, math.ceil(2 * l2_bytes(device) / (OUT * IN * dtype.itemsize)))
            grads = [torch.randn(OUT, IN, device=device).to(dtype) for _ in range(length)]
            for bits in widths:
                index = torch.randint(0, 2**bits, (OUT, IN), dtype=torch.uint8, device=device)
                packed = kmq.pack(index, bits)
                calls = [partial(kmq.codebook_grad, grad, packed, 2**bits) for grad in grads]
                name = f"{OUT}x{IN} {dtype} {bits} bits"
                errors[name] = check(name, calls[0](), calls[0](), grads[0], grads[0].abs(), index, 2**bits)
                runs[name], moved[name] = replayable(calls, device), OUT * IN * dtype.itemsize + packed.nbytes
            base = next(iter(runs))
            for name, figures in compared(runs, base, length, repeats, device).items():
                del figures["times_as_fast_as_cublas"]  # no such thing here
                percent = 100 * moved[name] / (figures["us"] / 1e6) / copied
                row = {"op": "codebook_grad", "name": name, "error": errors[name], **figures}
                rows.append(emit({**row, "percent_of_copy_bandwidth": percent}))
                print(f"codebook_grad {name:32} {row['us']:9.1f} us   {percent:5.1f} % of the bandwidth of a copy", flush=True)
    return rows


def linear_grad_rows(
    device: torch.device, shapes: list[tuple[int, int]], M: int, dtypes: list[torch.dtype], widths: tuple[int, ...], repeats: int
) -> list[dict[str, Any]]:
    """The fused form of a linear layer, beside the GEMM that makes the weight gradient."""
    from kmq_kernels.triton_kernels.codebook_linear_grad import codebook_linear_grad

    rows = []
    for OUT, IN in shapes:
        for dtype in dtypes:
            length = max(2, math.ceil(2 * l2_bytes(device) / (M * (OUT + IN) * dtype.itemsize)))
            grads = [torch.randn(M, OUT, device=device).to(dtype) for _ in range(length)]
            inputs = [torch.randn(M, IN, device=device).to(dtype) for _ in range(length)]
            pairs = list(zip(grads, inputs, strict=True))
            runs, errors = {"cuBLAS": replayable([partial(torch.matmul, g.T, x) for g, x in pairs], device)}, {"cuBLAS": 0.0}
            left, right = grads[0].double().T, inputs[0].double()
            weight_grad, magnitude = left @ right, left.abs() @ right.abs()
            for bits in widths:
                index = torch.randint(0, 2**bits, (OUT, IN), dtype=torch.uint8, device=device)
                packed = kmq.pack(index, bits)
                calls = [partial(codebook_linear_grad, g, x, packed, 1, 2**bits, OUT) for g, x in pairs]
                name = f"kmq {bits} bits"
                errors[name] = check(name, calls[0](), calls[0](), weight_grad, magnitude, index, 2**bits)
                runs[name] = replayable(calls, device)
            for name, figures in compared(runs, "cuBLAS", length, repeats, device).items():
                slower = 1 / figures["times_as_fast_as_cublas"]
                row = {"op": "codebook_linear_grad", "OUT": OUT, "IN": IN, "M": M, "dtype": str(dtype), "name": name}
                rows.append(emit({**row, "error": errors[name], "times_cublas": slower, **figures}))
                what = f"codebook_linear_grad {OUT}x{IN} M={M} {dtype} {name:12}"
                print(f"{what} {figures['us']:9.1f} us   {slower:5.2f} of cuBLAS", flush=True)
    return rows


@torch.inference_mode()
def rows() -> list[dict[str, Any]]:
    """All figures of this benchmark, for the result file."""
    device = torch.device("cuda")
    random.seed(0)
    torch.manual_seed(0)
    large = [(3072, 768), max(BERT_BASE)]
    found = grad_rows(device, large, [torch.float32, torch.bfloat16], BITS, 41)
    return found + linear_grad_rows(device, BERT_BASE_LINEARS, 2048, [torch.bfloat16, torch.float16], BITS, 41)


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("gpu_codebook_grad: torch finds no CUDA device here")
    steady_keys()
    rows()

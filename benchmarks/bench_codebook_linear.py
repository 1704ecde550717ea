"""codebook_linear on the CPU against torch's fp32 linear and the 4-bit kernels of other packages.

    python benchmarks/bench_codebook_linear.py [--bits 4] [--m 1 16] [--repeats 41] [--json out.json]

One process; every repeat times all implementations once, in shuffled order. `cold`: each call takes the next of a ring of weights
whose fp32 form is larger than four times the last-level cache (every implementation has the same number of layers); `hot`: always
the same weight. Each ratio is the median over repeats of (time of torch fp32) / (time of the implementation) in one repeat.
Results are checked against float64 before anything is timed. A peer's weight has its own format: its error is against its own
dequantized weight where it offers that, and its time is what counts.
"""

import argparse
import importlib.metadata
import json
import os
import random
import statistics
import time
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from shapes import BERT_BASE_LINEARS, LINEAR_M
from torch import Tensor

import kmq_kernels as kmq

TOLERANCE = 1e-6  # relative RMS error against float64 of the dequantized weight
RING_BYTES = 4 * 32 * 2**20


def ours(bits: int, weights: list[Tensor]) -> tuple[str, list[Callable[[Tensor, Tensor], Tensor]], list[Tensor]]:
    layers, dense = [], []
    for weight in weights:
        assignments = torch.randint(0, 2**bits, weight.shape, dtype=torch.uint8)
        codebook = torch.randn(1, 2**bits).sort().values / 10
        packed = kmq.pack(assignments, bits)
        layers.append(lambda x, b, p=packed, c=codebook: kmq.codebook_linear(x, p, c, b))
        dense.append(codebook[0][assignments.int()])
    return f"kmq {bits} bits", layers, dense


def bitsandbytes(weights: list[Tensor]) -> tuple[str, list[Callable[[Tensor, Tensor], Tensor]], list[Tensor]]:
    import bitsandbytes as bnb

    layers, dense = [], []
    for weight in weights:
        quantized, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", blocksize=64)
        layers.append(lambda x, b, q=quantized, s=state: bnb.matmul_4bit(x, q.t(), quant_state=s, bias=b))
        dense.append(bnb.functional.dequantize_4bit(quantized, state))
    return f"bitsandbytes {importlib.metadata.version('bitsandbytes')} NF4", layers, dense


def torchao(weights: list[Tensor]) -> tuple[str, list[Callable[[Tensor, Tensor], Tensor]], list[Tensor]]:
    from torchao.dtypes import Int4CPULayout
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    layers, dense = [], []
    for weight in weights:
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight.data = weight.clone()
        quantize_(linear, Int4WeightOnlyConfig(group_size=64, layout=Int4CPULayout(), version=1))
        layers.append(lambda x, b, w=linear.weight: F.linear(x, w, b))
        dense.append(linear.weight.dequantize().float())
    return f"torchao {importlib.metadata.version('torchao')} int4", layers, dense


PEERS = [bitsandbytes, torchao]


def usable(peer: Callable, weights: list[Tensor]) -> tuple | None:
    """What `peer` made of the weights, None (and the reason in print) where it is not installed or cannot run here."""
    try:
        name, layers, dense = peer(weights)
        OUT, IN = weights[0].shape
        layers[0](torch.randn(1, IN), torch.randn(OUT))
    except Exception as error:
        print(f"{peer.__name__}: skipped, {type(error).__name__}: {str(error).partition(chr(10))[0]}")
        return None
    return name, layers, dense


def relative_rms(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt())


def ratios(layers: dict[str, list], indices: Iterable[int], input: Tensor, bias: Tensor) -> dict[str, dict[str, float]]:
    times: dict[str, list[float]] = {name: [] for name in layers}
    for index in indices:
        for name in random.sample(list(layers), len(layers)):
            layer = layers[name][index % len(layers[name])]
            start = time.perf_counter()
            layer(input, bias)
            times[name].append(time.perf_counter() - start)
    base = times["torch fp32"]
    return {
        name: {"us": statistics.median(t) * 1e6, "ratio": statistics.median(b / o for b, o in zip(base, t, strict=True))}
        for name, t in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="*", default=list(range(1, 9)))
    parser.add_argument("--m", type=int, nargs="*", default=LINEAR_M)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=41)
    parser.add_argument("--json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    random.seed(0)
    conditions = {
        "threads": args.threads,
        "torch": torch.__version__,
        "load": os.getloadavg()[0],
        "build": kmq.build_info()["extension"],
    }
    print(conditions)
    rows = []
    for OUT, IN in BERT_BASE_LINEARS:
        weights = [torch.randn(OUT, IN) / 10 for _ in range(-(-RING_BYTES // (OUT * IN * 4)) + 1)]
        contenders = {"torch fp32": ([lambda x, b, w=w: F.linear(x, w, b) for w in weights], weights[:1])}
        for bits in args.bits:
            name, layers, dense = ours(bits, weights)
            contenders[name] = (layers, dense[:1])
        for peer in PEERS:
            found = usable(peer, weights)
            if found:
                contenders[found[0]] = (found[1], found[2][:1])
        calls = {name: layers for name, (layers, _) in contenders.items()}
        bias = torch.randn(OUT)
        for M in args.m:
            input = torch.randn(M, IN)
            errors = {}
            with torch.inference_mode():
                for name, (layers, dense) in contenders.items():
                    expected = F.linear(input.double(), dense[0].double(), bias.double())
                    errors[name] = relative_rms(layers[0](input, bias), expected)
                    if name.startswith("kmq") and errors[name] > TOLERANCE:
                        raise SystemExit(f"{name} at M={M}, {OUT}x{IN}: error {errors[name]:.2e}, not timed")
                cold = ratios(calls, range(args.repeats), input, bias)
                hot = ratios(calls, [0] * args.repeats, input, bias)
            for name in calls:
                row = {"OUT": OUT, "IN": IN, "M": M, "name": name, "error": errors[name], "cold": cold[name], "hot": hot[name]}
                rows.append(row)
                print(
                    f"{OUT}x{IN} M={M:<4} {name:28} cold {row['cold']['us']:9.1f} us {row['cold']['ratio']:6.2f}x"
                    f"   hot {row['hot']['us']:9.1f} us {row['hot']['ratio']:6.2f}x   error {row['error']:.1e}",
                    flush=True,
                )
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"conditions": conditions, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()

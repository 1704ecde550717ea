"""codebook_grad on the CPU beside a sum() of the gradient and torch's scatter_add_, index_add_ and bincount.

The peers get their indices unpacked to int64 beforehand. Every result is checked before it is timed; all run in one process, in
shuffled order, and a ratio is the median of the ratios of neighbours. `--json FILE` writes the table.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

import kmq_kernels as kmq

SHAPES = ((768, 768), (3072, 768), (30522, 768))


def contenders(grad: Tensor, packed: Tensor, wide: Tensor, flat: Tensor, K: int) -> dict[str, Callable[[], Tensor]]:
    return {
        "sum": grad.sum,
        "codebook_grad": lambda: kmq.codebook_grad(grad, packed, K)[0],
        "scatter_add_": lambda: torch.zeros(K).scatter_add_(0, wide, flat),
        "index_add_": lambda: torch.zeros(K).index_add_(0, wide, flat),
        "bincount": lambda: torch.bincount(wide, flat, K),
    }


def measure(functions: dict, repeats: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in random.sample(list(functions.items()), len(functions)):
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=int, nargs="+", default=[4])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    random.seed(0)
    table = []
    for rows, cols in SHAPES:
        grad = torch.randn(rows, cols)
        for bits in arguments.bits:
            K = 2**bits
            index = torch.randint(0, K, (rows, cols), dtype=torch.uint8)
            packed, flat, wide = kmq.pack(index, bits), grad.view(-1), index.view(-1).long()
            functions = contenders(grad, packed, wide, flat, K)
            expected = torch.zeros(K, dtype=torch.float64).scatter_add_(0, wide, flat.double())
            scale = torch.zeros(K, dtype=torch.float64).scatter_add_(0, wide, flat.double().abs())
            error = ((functions["codebook_grad"]().double() - expected).abs() / scale).max().item()
            if not error < 1e-6:
                raise SystemExit(f"codebook_grad: relative error {error} at {rows}x{cols}, {bits} bits")
            seconds = measure(functions, arguments.repeats)
            for name, times in seconds.items():
                ratio = statistics.median(a / b for a, b in zip(times, seconds["codebook_grad"], strict=True))
                us = statistics.median(times) * 1e6
                table.append({"shape": [rows, cols], "bits": bits, "what": name, "us": us, "ratio": ratio})
                print(f"{rows}x{cols} {bits} bits  {name:14} {us:10.0f} us   {ratio:7.2f} x codebook_grad")
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"threads": arguments.threads, "torch": torch.__version__, "rows": table}, file, indent=1)


if __name__ == "__main__":
    main()

"""The figures that a stranger asks for first, in the order of their worth; each part is a step of `make gpu`.

    python -m benchmarks.gpu_headline PART            # linear, clustering, passes, fp8, gradients or encoder, on a CUDA device
    python -m benchmarks.gpu_headline PART --dry-run  # tiny sizes in Triton's interpreter: the logic, on the CPU

Results are checked before anything is timed, and each row is emitted as soon as it is measured.
"""

import argparse
import os
import random
import sys
from collections.abc import Callable

import torch

from benchmarks.gpu_keys import steady_keys

SQUARES = [(4096, 4096), (8192, 8192)]
WIDTHS = [4, 3, 2, 8]
LINEAR_M = [1, 16, 4096]
REPEATS = 21  # of each timing; the spread is in the row


def linear(device: torch.device, small: bool) -> None:
    """codebook_linear beside cuBLAS in one loop, layers from memory."""
    from benchmarks import gpu_codebook_linear as benchmark

    shapes, sizes, widths = ([(20, 130)], [1, 20], [4]) if small else (SQUARES, LINEAR_M, WIDTHS)
    for shape in shapes:
        for M in sizes:  # one at a time: a cut keeps the rest
            benchmark.linear_rows(device, [shape], [M], widths, 1 if small else REPEATS, torch.float16, peers=())


def clustering(device: torch.device, small: bool) -> None:
    """Whole models over two passes at the bandwidth of a copy."""
    from benchmarks import gpu_kmeans as benchmark

    clock = benchmark.Clock(device.type)
    benchmark.model_rows(clock, benchmark.bandwidth_of(clock, small), small)


def passes(device: torch.device, small: bool) -> None:
    """`assign` and the fused step over the bandwidth of a copy."""
    from benchmarks import gpu_kmeans as benchmark

    clock = benchmark.Clock(device.type)
    benchmark.pass_rows(clock, benchmark.bandwidth_of(clock, small), small)


def fp8(device: torch.device, small: bool) -> None:
    """fp8_linear beside cuBLAS in fp16, and cuBLAS in fp8."""
    from benchmarks import gpu_codebook_linear as benchmark

    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        print("fp8: the tensor cores of this device do not take E4M3")
        return
    shapes, sizes, widths = ([(20, 130)], [3], [4]) if small else (SQUARES, LINEAR_M, WIDTHS)
    for shape in shapes:
        for M in sizes:
            peers = () if small else (benchmark.scaled_mm,)
            benchmark.linear_rows(device, [shape], [M], widths, 1 if small else REPEATS, torch.float16, peers, in_fp8=True)


def gradients(device: torch.device, small: bool) -> None:
    """codebook_grad over the bandwidth of a copy, and the form fused into the GEMM beside cuBLAS."""
    from benchmarks import gpu_codebook_grad as benchmark

    shapes, widths, repeats = ([(40, 130)], (4,), 1) if small else ([(4096, 4096), (3072, 768)], (4, 3, 2, 8), REPEATS)
    benchmark.grad_rows(device, shapes, [torch.float32, torch.bfloat16], widths, repeats)
    shapes, M = ([(20, 30)], 16) if small else ([(3072, 768)], 2048)
    benchmark.linear_grad_rows(device, shapes, M, [torch.float16 if small else torch.bfloat16], (2 if small else 4,), repeats)


def encoder(device: torch.device, small: bool) -> None:
    """BERT-base, fp16 and packed."""
    from benchmarks import gpu_codebook_linear as benchmark

    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 50}
    if small:
        benchmark.encoder_rows(device, [2], 5, 1, **size)
    else:
        benchmark.encoder_rows(device, [1, 32], 128, REPEATS)


PARTS: dict[str, Callable[[torch.device, bool], None]] = {
    "linear": linear, "clustering": clustering, "passes": passes, "fp8": fp8, "gradients": gradients, "encoder": encoder,
}  # fmt: skip


@torch.inference_mode()
def run(part: str, device: torch.device, small: bool) -> None:
    steady_keys()
    random.seed(0)
    torch.manual_seed(0)
    PARTS[part](device, small)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes in Triton's interpreter, on the CPU")
    options = parser.parse_args()
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
    elif not torch.cuda.is_available():
        sys.exit("gpu_headline: torch finds no CUDA device here; --dry-run tries the parts on the CPU")
    run(options.part, torch.device("cpu" if options.dry_run else "cuda"), options.dry_run)


if __name__ == "__main__":
    main()

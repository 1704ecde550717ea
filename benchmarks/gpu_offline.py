"""Tables of what the compiler makes of the linear kernels, without a GPU: instructions, shared memory, registers, by chip.

    python -m benchmarks.gpu_offline                         # sm_80, 89, 90, 100, 120 and all widths; minutes
    python -m benchmarks.gpu_offline --arch 90 --bits 4 3    # a part of it

The main loop of a kernel is what runs around products of matrices; a weight's share is its instructions over the weights that a
thread decodes in it. These are counts in compiled code and not times.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "triton")]

import offline  # noqa: E402
import test_triton_fp8_compiled as fp8_kernels  # noqa: E402
import test_triton_linear_compiled as linear_kernels  # noqa: E402

from kmq_kernels.triton_kernels import codebook_linear, fp8_linear  # noqa: E402

ARCHITECTURES = (80, 89, 90, 100, 120)


def tiles_of(plans: dict[tuple[int, int], dict[int, Any]], architecture: int) -> list[Any]:
    """The narrowest and the widest tile of the plan for an architecture."""
    tiles = [*plans[max(known for known in plans if known <= divmod(architecture, 10))].values()]
    return [tiles[0], tiles[-1]]


def row(architecture: int, kind: str, bits: int, tile: Any, built: Any) -> str:
    body = built.product_loop()
    weights = tile.weight_rows * 128 / (32 * tile.num_warps)
    decoding = sum(bool(re.search(r"\b(PRMT|LOP3|SHF\.R)", line)) for line in body) / weights
    product = sorted({found[0] for line in body if (found := re.search(offline.PRODUCT, line))})
    cells = [
        f"sm_{architecture}", kind, bits, f"{tile.weight_rows}x{tile.input_rows}", f"{decoding:.2f}",
        f"{len(body) / weights:.2f}", ", ".join(product), built.registers, f"{built.shared / 1024:.0f}", built.spills,
    ]  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHITECTURES), choices=ARCHITECTURES)
    parser.add_argument("--bits", type=int, nargs="+", default=list(range(1, 9)), choices=range(1, 9))
    options = parser.parse_args()
    print("| chip | operands | bits | tile | decoding | whole loop | product | registers | shared, KB | spills |")
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    for architecture in options.arch:
        asked = [
            ("fp16", bits, tile, linear_kernels.linear(tile, bits, lookup=bits <= 4))
            for bits in options.bits
            for tile in tiles_of(codebook_linear.PLANS, architecture)
        ]
        if divmod(architecture, 10) >= fp8_linear.NEEDED:
            asked += [
                ("fp8", bits, tile, fp8_kernels.fp8(tile, bits))
                for bits in options.bits
                for tile in tiles_of(fp8_linear.PLANS, architecture)
            ]
        asked.sort(key=lambda one: one[1])
        built = offline.compile_all([kernel for *_, kernel in asked], architecture)
        for (kind, bits, tile, _), one in zip(asked, built, strict=True):
            print(row(architecture, kind, bits, tile, one), flush=True)


if __name__ == "__main__":
    main()

"""Every kernel once, on the device, against plain float64: what `make gpu` runs before it times anything.

    python -m benchmarks.gpu_smoke            # a row for each check; exit code 1 where one is wrong
    python -m benchmarks.gpu_smoke --dry-run  # in Triton's interpreter, on tiny sizes

The expectation of a check is made from the indices and values themselves, never from what another kernel wrote.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_keys import steady_keys
from benchmarks.gpu_steps import emit

Check = Callable[[], tuple[float, float]]  # the error, and the most that it may be
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
ROUNDING = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 2**-24}


def relative_rms(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt().clamp_min(1e-300))


def different(got: Tensor, expected: Tensor) -> float:
    """The number of elements that are not the same; all of them where shapes differ."""
    return float((got != expected).sum()) if got.shape == expected.shape else float(expected.numel())


class Problem:
    """A weight (OUT, IN) of `bits` bits, a codebook for each group_rows rows: indices, packed rows and float64 values."""

    def __init__(self, device: torch.device, OUT: int, IN: int, bits: int, group_rows: int, dtype: torch.dtype) -> None:
        from kmq_kernels import packing

        self.OUT, self.IN, self.bits, self.group_rows = OUT, IN, bits, group_rows
        self.index = torch.randint(0, 2**bits, (OUT, IN), dtype=torch.uint8, device=device)
        self.packed = packing.pack(self.index, bits)
        self.codebook = torch.randn(-(-OUT // group_rows), 2**bits, device=device).to(dtype)
        book = torch.arange(OUT, device=device) // group_rows
        self.weight = self.codebook.double()[book[:, None], self.index.long()]

    def sums(self, weight_grad: Tensor) -> Tensor:
        """(G, K) float64: the gradient of the weight summed by codebook and index."""
        book = torch.arange(self.OUT, device=self.index.device) // self.group_rows
        at = book[:, None] * 2**self.bits + self.index.long()
        out = torch.zeros(self.codebook.numel(), dtype=torch.float64, device=self.index.device)
        return out.index_add_(0, at.reshape(-1), weight_grad.double().reshape(-1)).view(self.codebook.shape)


def code_checks(device: torch.device, rows: int, cols: int, widths: tuple[int, ...]) -> Iterator[tuple[str, Check]]:
    """pack, unpack, dequantize, codebook_embedding."""
    from kmq_kernels.triton_kernels import codebook_embedding, dequantize, pack

    for bits in widths:
        one = Problem(device, rows, cols, bits, rows, torch.float32)
        grouped = Problem(device, rows, cols, bits, 8, torch.float16)
        ids = torch.randint(0, rows, (3, 5), device=device)
        yield f"pack {bits}", lambda one=one, bits=bits: (different(pack.pack(one.index, bits), one.packed), 0)
        yield f"unpack {bits}", lambda one=one, bits=bits: (different(pack.unpack(one.packed, bits, cols), one.index), 0)
        for name, p in (("", one), (" grouped", grouped)):
            weight = p.weight.to(p.codebook.dtype)
            yield f"dequantize {bits}{name}", lambda p=p, weight=weight: (
                different(dequantize.dequantize(p.packed, p.codebook, cols, p.group_rows), weight), 0,
            )  # fmt: skip
            yield (
                f"codebook_embedding {bits}{name}",
                lambda p=p, weight=weight, ids=ids: (
                    different(
                        codebook_embedding.codebook_embedding(ids, p.packed, p.codebook, cols, p.group_rows, -1), weight[ids]
                    ),
                    0,
                ),
            )


def linear_checks(
    device: torch.device, OUT: int, IN: int, sizes: tuple[int, ...], widths: tuple[int, ...], dtypes: tuple[str, ...]
) -> Iterator[tuple[str, Check]]:
    """codebook_linear and both gradients: every width in fp16, the other types at 4 bits, all regimes of M."""
    from kmq_kernels.triton_kernels import codebook_linear, codebook_linear_grad

    for bits in widths:
        for name in dtypes if bits == 4 else dtypes[:1]:
            dtype = DTYPES[name]
            for groups, group_rows in (("", OUT), (" grouped", 8)):
                p = Problem(device, OUT, IN, bits, group_rows, dtype)
                bias = torch.randn(OUT, device=device).to(dtype)
                for M in sizes if bits == 4 else sizes[:1]:
                    x, grad = torch.randn(M, IN, device=device).to(dtype), torch.randn(M, OUT, device=device).to(dtype)
                    what = f"{bits} {name} M={M}{groups}"
                    limit = 2 * ROUNDING[dtype] + 1e-6

                    def forward(p: Problem = p, x: Tensor = x, bias: Tensor = bias, limit: float = limit) -> tuple[float, float]:
                        out = codebook_linear.codebook_linear(x, p.packed, p.codebook, bias, p.group_rows)
                        return relative_rms(out, x.double() @ p.weight.T + bias.double()), limit

                    def back(p: Problem = p, grad: Tensor = grad, limit: float = limit) -> tuple[float, float]:
                        out = codebook_linear.codebook_linear_input_grad(grad, p.packed, p.codebook, IN, p.group_rows)
                        return relative_rms(out, grad.double() @ p.weight), limit

                    def sums(p: Problem = p, grad: Tensor = grad, x: Tensor = x) -> tuple[float, float]:
                        books, centroids = p.codebook.shape
                        run = codebook_linear_grad.codebook_linear_grad
                        out = run(grad, x, p.packed, books, centroids, p.group_rows)
                        if not torch.equal(out, run(grad, x, p.packed, books, centroids, p.group_rows)):
                            return float("inf"), 0
                        scale = p.sums(grad.double().abs().T @ x.double().abs())
                        return float(((out - p.sums(grad.double().T @ x.double())).abs() / scale.clamp_min(1e-300)).max()), 1e-5

                    yield f"codebook_linear {what}", forward
                    yield f"codebook_linear_input_grad {what}", back
                    yield f"codebook_linear_grad {what}", sums


def fp8_checks(
    device: torch.device, OUT: int, IN: int, sizes: tuple[int, ...], widths: tuple[int, ...]
) -> Iterator[tuple[str, Check]]:
    """fp8_linear beside the product of what was rounded to E4M3, upcast; and that beside the product without rounding."""
    from kmq_kernels.triton_kernels import fp8_linear

    for bits in widths:
        for groups, group_rows in (("", OUT), (" grouped", 8)):
            p = Problem(device, OUT, IN, bits, group_rows, torch.float32)
            table, scale = fp8_linear.round_codebook(p.codebook)
            rounded = table[:, : 2**bits].view(torch.float8_e4m3fn).double() * scale.double()
            weight = rounded[torch.arange(OUT, device=device)[:, None] // group_rows, p.index.long()]
            for M in sizes if bits == 4 else sizes[:1]:
                x = torch.randn(M, IN, device=device)
                per_scale = 448.0 / x.abs().amax(1, keepdim=True)
                upcast = (x * per_scale).to(torch.float8_e4m3fn).double() * x.abs().amax(1, keepdim=True).double() / 448

                def product(
                    p: Problem = p, x: Tensor = x, upcast: Tensor = upcast, table: Tensor = table, scale: Tensor = scale,
                    weight: Tensor = weight, bits: int = bits,
                ) -> tuple[float, float]:  # fmt: skip
                    out = fp8_linear.fp8_linear(x, p.packed, table, scale, None, bits, p.group_rows)
                    expected = upcast @ weight.T
                    if relative_rms(expected, x.double() @ p.weight.T) > 0.06:
                        return float("inf"), 0
                    return relative_rms(out, expected), 2e-3  # tensor cores of Hopper add with 14 bits; ties of the rounding

                yield f"fp8_linear {bits} M={M}{groups}", product


def gradient_checks(device: torch.device, rows: int, cols: int) -> Iterator[tuple[str, Check]]:
    """codebook_grad, which is CUDA C++ where it was built, and codebook_embedding_grad."""
    import kmq_kernels as kmq
    from kmq_kernels.triton_kernels import codebook_embedding_grad

    for groups, group_rows in (("", rows), (" grouped", 8)):
        for name in ("fp32", "bf16"):
            p = Problem(device, rows, cols, 3, group_rows, torch.float32)
            grad = torch.randn(rows, cols, device=device).to(DTYPES[name])

            def all_of_it(p: Problem = p, grad: Tensor = grad) -> tuple[float, float]:
                out = kmq.codebook_grad(grad, p.packed, 8, num_codebooks=len(p.codebook), group_rows=p.group_rows)
                return float(((out - p.sums(grad)).abs() / p.sums(grad.abs()).clamp_min(1e-300)).max()), 1e-5

            ids = torch.randint(0, rows, (40,), device=device)
            some = torch.randn(40, cols, device=device).to(DTYPES[name])

            def rows_of_it(p: Problem = p, ids: Tensor = ids, some: Tensor = some) -> tuple[float, float]:
                run = codebook_embedding_grad.codebook_embedding_grad
                out = run(some, ids, p.packed, len(p.codebook), 8, p.group_rows, 1)
                scattered, sizes = (
                    torch.zeros(rows, cols, dtype=torch.float64, device=device).index_add_(0, ids, g.double())
                    for g in (some * (ids != 1)[:, None], some.abs())
                )
                return float(((out - p.sums(scattered)).abs() / p.sums(sizes).clamp_min(1e-300)).max()), 1e-5

            yield f"codebook_grad {name}{groups}", all_of_it
            yield f"codebook_embedding_grad {name}{groups}", rows_of_it


def cluster_checks(device: torch.device, numel: int, counts: tuple[int, ...]) -> Iterator[tuple[str, Check]]:
    """assign, update, the fused step, and kmeans by histogram and by rows."""
    from kmq_kernels.triton_kernels import kmeans
    from kmq_kernels.triton_kernels.assign import assign, assign_ragged
    from kmq_kernels.triton_kernels.update import step, update

    for num_centroids in counts:
        for name in ("fp32", "bf16"):
            values = torch.randn(2, numel, device=device).to(DTYPES[name])
            centroids = torch.randn(2, num_centroids, device=device).sort(1).values
            middle = (centroids[:, 1:] + centroids[:, :-1]) / 2
            label = torch.searchsorted(middle, values.float()).to(torch.uint8)
            at = label.long() + num_centroids * torch.arange(2, device=device)[:, None]
            sums, sizes = (
                torch.zeros(2 * num_centroids, dtype=torch.float64, device=device).index_add_(0, at.view(-1), v.double().view(-1))
                for v in (values, values.abs())
            )

            def labels(values: Tensor = values, centroids: Tensor = centroids, label: Tensor = label) -> tuple[float, float]:
                return different(assign(values, centroids), label), 0

            def packed(values: Tensor = values, centroids: Tensor = centroids, label: Tensor = label) -> tuple[float, float]:
                from kmq_kernels import packing

                (out,) = assign_ragged([values[:1]], centroids[:1], packed=True)
                return different(out, packing.pack(label[:1], centroids.shape[1].bit_length() - 1)), 0

            def added(
                values: Tensor = values, label: Tensor = label, sums: Tensor = sums, sizes: Tensor = sizes, K: int = num_centroids
            ) -> tuple[float, float]:
                out = update(values, label, K)[0].view(-1)
                return float(((out - sums).abs() / sizes.clamp_min(1e-300)).max()), 2e-6

            def both(
                values: Tensor = values, centroids: Tensor = centroids, label: Tensor = label, sums: Tensor = sums,
                sizes: Tensor = sizes,
            ) -> tuple[float, float]:  # fmt: skip
                out, added, _ = step(values, centroids)
                if not torch.equal(out, label):
                    return float("inf"), 0
                return float(((added.view(-1) - sums).abs() / sizes.clamp_min(1e-300)).max()), 2e-6

            what = f"K={num_centroids} {name}"
            yield from ((f"assign {what}", labels), (f"assign packed {what}", packed))
            yield from ((f"update {what}", added), (f"step {what}", both))
    for what, shape, rows, weighted, dtype in (
        ("kmeans, histogram", (1, numel), 1, False, torch.float32),
        ("kmeans, histogram bf16", (1, numel), 1, False, torch.bfloat16),
        ("kmeans, histogram weighted", (1, numel), 1, True, torch.float32),
        ("kmeans, rows", (4, 512), 1, False, torch.float32),
    ):
        values = torch.randn(shape, device=device).to(dtype)
        weight = torch.rand(shape, device=device) if weighted else None

        def solved(values: Tensor = values, weight: Tensor | None = weight, rows: int = rows) -> tuple[float, float]:
            labels, centroids, inertia, *_, faults = kmeans.kmeans([values], [weight], [4], [rows], False, 300)
            if any(faults):
                return float("inf"), 0
            book, wide = centroids[0].double(), values.double()
            near = (wide[:, :, None] - book[:, None, :]).square().min(2)
            mass = torch.ones_like(wide) if weight is None else weight.double()
            wrong = different(labels[0].long(), near.indices)
            if wrong > 1e-5 * values.numel():  # ties and rounding of fp32 midpoints
                return float("inf"), 0
            expected = (near.values * mass).sum(1)
            moved = 0.0  # centroids that are the means of their members stand still
            for k in range(4):
                here = (near.indices == k) * mass
                mean = (here * wide).sum(1) / here.sum(1).clamp_min(1e-300)
                moved = max(moved, float((mean - book[:, k]).abs().max()))
            error = float(((inertia[0].double() - expected).abs() / expected.clamp_min(1e-300)).max())
            return max(error, moved / 100), 1e-5

        yield what, solved


def checks(device: torch.device, small: bool) -> Iterator[tuple[str, Check]]:
    """(name, check) for all kernels; `small`: sizes that the interpreter takes."""
    if small:
        yield from code_checks(device, 5, 130, (3, 8))
        yield from linear_checks(device, 20, 130, (3,), (4, 7), ("fp16",))
        yield from fp8_checks(device, 20, 130, (3,), (4,))
        yield from gradient_checks(device, 20, 130)
        yield from cluster_checks(device, 1000, (4,))
        return
    widths = (4, 3, 2, 8, 1, 5, 6, 7)
    yield from linear_checks(device, 768, 768, (16, 1, 64, 300, 2000), widths, ("fp16", "bf16", "fp32"))
    yield from linear_checks(device, 100, 1000, (5,), (3, 8), ("fp16",))  # tails in every direction
    yield from code_checks(device, 3000, 768, widths)
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9):
        yield from fp8_checks(device, 768, 1000, (16, 1, 300), widths)
    yield from gradient_checks(device, 3000, 768)
    yield from cluster_checks(device, 200_000, (16, 256))


@torch.inference_mode()
def run(device: torch.device, small: bool) -> list[dict[str, Any]]:
    """A row for each check: its error beside the most it may be, whether it is ok, and its milliseconds with all compiling."""
    steady_keys()
    torch.manual_seed(0)
    rows = []
    for name, check in checks(device, small):
        begin = time.perf_counter()
        try:
            error, limit = check()
            row: dict[str, Any] = {"check": name, "error": error, "limit": limit, "ok": error <= limit}
        except Exception as fault:  # the others are of interest, too; after an error of the device they fail quickly
            row = {"check": name, "ok": False, "failed": f"{type(fault).__name__}: {fault}"[:300]}
        rows.append(emit({**row, "ms": round(1000 * (time.perf_counter() - begin), 1)}))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes in Triton's interpreter, on the CPU")
    parser.add_argument("--small", action="store_true", help="the tiny sizes on the device: for a sanitizer")
    options = parser.parse_args()
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
    elif not torch.cuda.is_available():
        sys.exit("gpu_smoke: torch finds no CUDA device here; --dry-run tries the checks on the CPU")
    rows = run(torch.device("cpu" if options.dry_run else "cuda"), options.dry_run or options.small)
    wrong = [row["check"] for row in rows if not row["ok"]]
    print(f"{len(rows) - len(wrong)} of {len(rows)} checks passed" + (f"; wrong: {', '.join(wrong)}" if wrong else ""))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())

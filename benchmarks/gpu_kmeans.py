"""The clustering part of `make gpu`: whole models, `assign` and the fused step, checked and then timed on a CUDA device.

Rows are emitted for the result file as they are measured. Times are medians of CUDA events, with the second-level cache flushed
before each. A model is its shapes filled with Student-t values. The floor of a model is two passes at the bandwidth of a copy
measured in the same run: 9 bytes a value for fp32 (read twice, one byte written).
"""

import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import kmq_kernels as kmq
from benchmarks.gpu_keys import steady_keys
from benchmarks.gpu_steps import emit
from benchmarks.shapes import BERT_BASE, BERT_LARGE, SEVEN_B
from kmq_kernels.triton_kernels.assign import assign
from kmq_kernels.triton_kernels.kmeans import Plan
from kmq_kernels.triton_kernels.kmeans.rows import SMALL
from kmq_kernels.triton_kernels.update import step

Row = dict[str, Any]


class Clock:
    """Times calls: CUDA events behind a flushed cache; on the CPU, where only the logic is tried, a wall clock."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.flush = torch.empty(1 << 26 if device == "cuda" else 1, dtype=torch.float32, device=device)

    def seconds(self, call: Callable[[], object], repeats: int = 7) -> float:
        """Median of `repeats` calls after one that is not counted."""
        call()
        times = []
        for _ in range(repeats):
            self.flush.zero_()
            if self.device == "cuda":
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                begin.record()
                call()
                end.record()
                end.synchronize()
                times.append(begin.elapsed_time(end) / 1e3)
            else:
                start = time.perf_counter()
                call()
                times.append(time.perf_counter() - start)
        return statistics.median(times)


def model_values(shapes: list[tuple[int, int]], device: str, dtype: torch.dtype) -> list[Tensor]:
    """Matrices of the given shapes: Student-t with 5 degrees of freedom, as heavy in the tails as trained weights."""
    torch.manual_seed(0)
    out = []
    for rows, cols in shapes:
        normal = torch.randn(rows, cols, device=device)
        squares = sum(torch.randn(rows, cols, device=device).square_() for _ in range(5))
        out.append((normal * (squares / 5).rsqrt() * 0.032).to(dtype))
    return out


def copy_bandwidth(clock: Clock, numel: int) -> float:
    """Bytes a second, read and written, of a copy."""
    source = torch.empty(numel, device=clock.device)
    target = torch.empty_like(source)
    return 2 * source.numel() * source.element_size() / clock.seconds(lambda: target.copy_(source))


def inertia_of(values: Tensor, centroids: Tensor) -> float:
    """Squared error of the nearest centroids, in fp64, apart from the engine's own."""
    middle = (centroids[1:] + centroids[:-1]) / 2
    flat, total = values.reshape(-1), 0.0
    for chunk in flat.split(1 << 24):
        label = torch.searchsorted(middle, chunk.float().contiguous())
        total += float((chunk.double() - centroids.double()[label]).square().sum())
    return total


def optimum_of(values: Tensor, num_centroids: int) -> float:
    """The optimum, from the CPU's engine: exact on up to 2**20 values, else "optimal", which is within 1e-5 of it at K = 16."""
    flat = values.reshape(-1).float().cpu()
    algorithm = "exact" if flat.numel() <= 1 << 20 else "optimal"
    return float(kmq.kmeans(flat, num_centroids, algorithm=algorithm).inertia)


def check_plan(plan: Plan, num_centroids: int, checked: int) -> list[float]:
    """Inertia over optimum of the first matrices; raises where labels or inertia are wrong."""
    if int(plan.status.max()):
        raise AssertionError(f"status {plan.status.tolist()}: a problem was not solved")
    bits = num_centroids.bit_length() - 1
    ratios = []
    for i in range(min(checked, len(plan.values))):
        values, centroids = plan.values[i], plan.centroids[i]
        labels = kmq.unpack(plan.labels[i], bits, values.shape[1])
        middle = (centroids[1:] + centroids[:-1]) / 2
        if not torch.equal(labels, torch.searchsorted(middle, values.float().contiguous()).to(torch.uint8)):
            raise AssertionError(f"matrix {i}: labels are not those of the nearest centroids")
        inertia = inertia_of(values, centroids)
        if abs(inertia - float(plan.inertia[i])) > 1e-5 * inertia:
            raise AssertionError(f"matrix {i}: inertia {float(plan.inertia[i])}, computed afresh {inertia}")
        ratios.append(inertia / optimum_of(values, num_centroids))
    return ratios


def whole_model(
    name: str,
    shapes: list[tuple[int, int]],
    num_centroids: int,
    clock: Clock,
    bandwidth: float,
    dtype: torch.dtype,
    checked: int = 3,
) -> tuple[Row, list[Tensor]]:
    """One codebook a matrix: checked, then timed, eagerly and (on a device) as a CUDA graph."""
    values = model_values(shapes, clock.device, dtype)
    plans = []
    for small in (False, True):
        part = [matrix for matrix in values if (matrix.numel() <= SMALL) == small]
        if part:
            groups = [len(matrix) for matrix in part]
            plans.append(Plan(part, None, num_centroids, groups, packed=True, small=small))

    def launch() -> None:
        for plan in plans:
            plan.launch()

    launch()
    ratios = [ratio for plan in plans for ratio in check_plan(plan, num_centroids, checked)]
    numel = sum(matrix.numel() for matrix in values)
    floor = numel * (2 * values[0].element_size() + 1) / bandwidth
    seconds = clock.seconds(launch)
    row: Row = {
        "what": "whole-model solve", "model": name, "dtype": str(dtype), "num_centroids": num_centroids, "values": numel,
        "seconds": seconds, "two_pass_floor_seconds": floor, "times_the_floor": seconds / floor,
        "inertia_over_optimum": max(ratios), "waves": sum(len(plan.waves) for plan in plans),
    }  # fmt: skip
    if clock.device == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            launch()
        row["graph_seconds"] = clock.seconds(graph.replay)
        row["graph_times_the_floor"] = row["graph_seconds"] / floor
    return emit(row), values


def assign_rows(clock: Clock, bandwidth: float, numel: int) -> list[Row]:
    """`assign` in per cent of copy bandwidth: 5 bytes a value for fp32, 3 for 16 bits."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for num_centroids in (4, 16, 256):
            values = torch.randn(1, numel, device=clock.device).to(dtype)
            centroids = torch.randn(1, num_centroids, device=clock.device).sort(1).values
            expected = torch.searchsorted((centroids[:, 1:] + centroids[:, :-1]) / 2, values.float()).to(torch.uint8)
            if not torch.equal(assign(values, centroids), expected):
                raise AssertionError(f"assign, K = {num_centroids}, {dtype}: wrong labels")
            seconds = clock.seconds(lambda values=values, centroids=centroids: assign(values, centroids))
            share = numel * (values.element_size() + 1) / seconds / bandwidth
            row = {"what": "assign", "dtype": str(dtype), "num_centroids": num_centroids, "values": numel, "seconds": seconds}
            rows.append(emit({**row, "percent_of_copy_bandwidth": 100 * share}))
    return rows


def step_rows(clock: Clock, bandwidth: float, numel: int) -> list[Row]:
    """A Lloyd step in one read, labels and sums, in per cent of copy bandwidth: 5 bytes a value for fp32."""
    rows = []
    for num_centroids in (16, 256):
        values = torch.randn(1, numel, device=clock.device)
        centroids = torch.randn(1, num_centroids, device=clock.device).sort(1).values
        labels, sums, counts = step(values, centroids)
        again = step(values, centroids)
        if not all(torch.equal(a, b) for a, b in zip((labels, sums, counts), again, strict=True)):
            raise AssertionError(f"step, K = {num_centroids}: other bits on a second run")
        expected = torch.zeros_like(sums[0]).index_add_(0, labels[0].long(), values[0].double())
        size = torch.zeros_like(sums[0]).index_add_(0, labels[0].long(), values[0].double().abs())
        if not torch.equal(labels, assign(values, centroids)) or bool(((sums[0] - expected).abs() > 2e-6 * size).any()):
            raise AssertionError(f"step, K = {num_centroids}: wrong labels or sums")
        if not torch.equal(counts[0], torch.bincount(labels[0], minlength=num_centroids).double()):
            raise AssertionError(f"step, K = {num_centroids}: wrong counts")
        seconds = clock.seconds(lambda values=values, centroids=centroids: step(values, centroids))
        share = numel * 5 / seconds / bandwidth
        row = {"what": "fused step", "num_centroids": num_centroids, "values": numel, "seconds": seconds}
        rows.append(emit({**row, "percent_of_copy_bandwidth": 100 * share}))
    return rows


def torch_lloyd(values: Tensor, centroids: Tensor, iterations: int) -> Tensor:
    """Lloyd in plain torch: bucketize, scatter-add."""
    flat = values.reshape(-1).float()
    for _ in range(iterations):
        label = torch.bucketize(flat, (centroids[1:] + centroids[:-1]) / 2)
        sums = torch.zeros_like(centroids).index_add_(0, label, flat)
        counts = torch.zeros_like(centroids).index_add_(0, label, torch.ones_like(flat))
        centroids = torch.where(counts > 0, sums / counts.clamp(min=1), centroids).sort().values
    return centroids


def _flash_kmeans(values: Tensor, centroids: Tensor, iterations: int) -> Tensor:
    from flash_kmeans import batch_kmeans_Euclid

    x, start = values.reshape(1, -1, 1), centroids.to(values.dtype).view(1, -1, 1)
    _, found, _ = batch_kmeans_Euclid(x, centroids.numel(), max_iters=iterations, tol=-1.0, init_centroids=start)
    return found.reshape(-1).float().sort().values


def _faiss(values: Tensor, centroids: Tensor, iterations: int) -> Tensor:
    import faiss

    K = centroids.numel()
    job = faiss.Kmeans(1, K, niter=iterations, gpu=True, max_points_per_centroid=1 << 30)
    job.train(values.reshape(-1, 1).float().cpu().numpy(), init_centroids=centroids.cpu().numpy().reshape(K, 1))
    return torch.from_numpy(job.centroids.reshape(-1)).to(values.device).sort().values


def _cuvs(values: Tensor, centroids: Tensor, iterations: int) -> Tensor:
    from cuvs.cluster import kmeans as cuvs_kmeans

    params = cuvs_kmeans.KMeansParams(n_clusters=centroids.numel(), max_iter=iterations, init_method="Array", tol=1e-12)
    found, _, _ = cuvs_kmeans.fit(params, values.reshape(-1, 1).float(), centroids.reshape(-1, 1).float())
    return torch.as_tensor(found, device=values.device).reshape(-1).float().sort().values


PEERS: dict[str, tuple[str | None, Callable[[Tensor, Tensor, int], Tensor]]] = {
    "torch Lloyd": (None, torch_lloyd),
    "flash-kmeans": ("flash_kmeans", _flash_kmeans),
    "faiss": ("faiss", _faiss),
    "cuVS": ("cuvs", _cuvs),
}


def peer_rows(values: Tensor, num_centroids: int, clock: Clock, iterations: tuple[int, ...] = (25, 100, 400)) -> list[Row]:
    """Peers on one matrix from the quantiles as start: fixed iterations, each with its inertia over the optimum, beside ours."""
    sample = values.reshape(-1)[: 1 << 20].float().sort().values
    at = ((torch.arange(num_centroids, device=values.device) + 0.5) / num_centroids * len(sample)).long()
    start, optimum = sample[at], optimum_of(values, num_centroids)
    plan = Plan([values], None, num_centroids, [len(values)], packed=False, small=values.numel() <= SMALL)
    plan.launch()
    ours = {"seconds": clock.seconds(plan.launch), "inertia_over_optimum": inertia_of(values, plan.centroids[0]) / optimum}
    common = {"what": "one matrix", "values": values.numel(), "num_centroids": num_centroids}
    rows: list[Row] = [emit({**common, "peer": "kmq", **ours})]
    for peer, (module, run) in PEERS.items():
        if module is not None and importlib.util.find_spec(module) is None:
            rows.append(emit({**common, "peer": peer, "skipped": "not installed"}))
            continue
        for count in iterations:
            try:
                ratio = inertia_of(values, run(values, start, count)) / optimum
                seconds = clock.seconds(lambda run=run, count=count: run(values, start, count), repeats=3)
            except Exception as error:  # a peer that fails here must not cost us the other rows
                failed = f"{type(error).__name__}: {error}"[:200]
                rows.append(emit({**common, "peer": peer, "iterations": count, "failed": failed}))
                break
            equal = ratio <= 1.001 * ours["inertia_over_optimum"]
            entry = {"iterations": count, "seconds": seconds, "inertia_over_optimum": ratio, "reached_our_inertia": equal}
            rows.append(emit({**common, "peer": peer, **entry, "times_ours": seconds / ours["seconds"]}))
            if equal:
                break
    return rows


def bandwidth_of(clock: Clock, small: bool) -> float:
    """That of a copy, emitted as a row."""
    bandwidth = copy_bandwidth(clock, 1 << (10 if small else 28))
    emit({"what": "copy", "bytes_per_second": bandwidth})
    return bandwidth


def model_rows(clock: Clock, bandwidth: float, small: bool) -> list[Row]:
    """Whole models, the largest last."""
    if small:
        return [whole_model("tiny", [(24, 130), (3, 70)], 2, clock, bandwidth, torch.float32)[0]]
    rows = [whole_model("BERT-base", BERT_BASE, 16, clock, bandwidth, torch.float32)[0]]
    rows.append(whole_model("BERT-large", BERT_LARGE, 16, clock, bandwidth, torch.float32)[0])
    if torch.cuda.mem_get_info()[0] > 40e9:
        torch.cuda.empty_cache()
        rows.append(whole_model("7B", SEVEN_B, 16, clock, bandwidth, torch.bfloat16, checked=1)[0])
    return rows


def pass_rows(clock: Clock, bandwidth: float, small: bool) -> list[Row]:
    """`assign` and the fused step."""
    numel = 1000 if small else 1 << 27
    return assign_rows(clock, bandwidth, numel) + step_rows(clock, bandwidth, numel)


def rows(device: str = "cuda", small: bool = False) -> list[Row]:
    """BERT-base at 16 and 256 centroids, and one of its matrices beside the peers. `small`: tiny sizes, to try the logic."""
    clock = Clock(device)
    bandwidth = bandwidth_of(clock, small)
    out: list[Row] = []
    for num_centroids in (2,) if small else (16, 256):
        shapes = [(24, 130), (3, 70)] if small else BERT_BASE
        row, values = whole_model("tiny" if small else "BERT-base", shapes, num_centroids, clock, bandwidth, torch.float32)
        out += [row, *peer_rows(values[1 if small else 3], num_centroids, clock, (2,) if small else (25, 100, 400))]
    return out


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("gpu_kmeans: torch finds no CUDA device here")
    steady_keys()
    with torch.inference_mode():
        rows()

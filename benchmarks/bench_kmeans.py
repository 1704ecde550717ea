"""Clustering against its peers, on the weights of a model.

    python benchmarks/bench_kmeans.py [--weights model.safetensors] [--json out.json] [--quick]

Ours and a peer run in one process, taking turns; each pair is checked before it is timed, and the inertia of each over the
optimum (algorithm "exact") stands beside its time. Peers run on one or two matrices of the model: their time for the model is
extrapolated by the number of weights, and marked so. Times are medians; ratios are medians of paired ratios.
"""

import argparse
import ctypes
import importlib
import json
import os
import platform
import statistics
import time
from pathlib import Path

import numpy as np
import shapes
import torch

import kmq_kernels as kmq
from kmq_kernels.clustering import cluster_matrices

os.environ.setdefault("NUMBA_NUM_THREADS", str(torch.get_num_threads()))


def load(path, quick):
    if path:
        from safetensors.torch import load_file

        matrices = {name: t for name, t in load_file(path).items() if t.dim() == 2}
        for name, t in matrices.items():
            if not t.is_floating_point():
                print(f"left out: {name}, {tuple(t.shape)} of {t.dtype}")
        return {name: t for name, t in matrices.items() if t.is_floating_point()}
    generator = torch.Generator().manual_seed(0)
    chosen = shapes.MPNET_BASE[1:14] if quick else shapes.MPNET_BASE
    out = {}
    for i, shape in enumerate(chosen):  # Student-t with 5 degrees of freedom: heavier tails than most weights have
        normal = torch.randn(shape, generator=generator)
        chi2 = sum(torch.randn(shape, generator=generator) ** 2 for _ in range(5))
        out[f"synthetic.{i}"] = 0.03 * normal / (chi2 / 5).sqrt()
    return out


def last_level_cache():
    """Bytes of the largest cache, None where the system does not say."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(path.read_text().strip()[:-1]) * 1024 for path in sizes), default=None)


def once(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def taking_turns(calls, rounds):
    """Times in rounds ABAB..., after one round to warm up; {name: [seconds]}."""
    for call in calls.values():
        call()
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(once(call))
    return times


def inertia(values, centroids, weight=None):
    """Of the best assignment to these centroids, in fp64."""
    c = torch.sort(torch.as_tensor(np.array(centroids, np.float64)).reshape(-1)).values
    x = values.double()
    error = (x - c[torch.searchsorted((c[1:] + c[:-1]) / 2, x)]) ** 2
    return float((error if weight is None else error * weight.double()).sum())


def peers(values, k, weight):
    """Name -> function that clusters and labels the values and returns centroids, or the reason why it is left out."""
    x = values.numpy()
    w = None if weight is None else weight.numpy()
    out = {}

    def add(name, module, make, left_out=None):
        if left_out:
            out[name] = left_out
            return
        try:
            out[name] = make(importlib.import_module(module))
        except ImportError as error:
            out[name] = f"not installed ({error})"

    large = len(x) * k > 2_000_000
    minutes = len(x) * k > 20_000_000
    add("flash1dkmeans", "flash1dkmeans", lambda m: lambda: m.kmeans_1d(x, k, sample_weights=w, random_state=0)[0])
    add(
        "scikit-learn", "sklearn.cluster",
        lambda m: lambda: m.KMeans(k, n_init=1, random_state=0).fit(x[:, None], sample_weight=w).cluster_centers_,
        f"takes a minute a run at {len(x)} values, k={k}" if minutes else None,
    )  # fmt: skip
    weights_missing = "takes no weights" if weight is not None else None
    too_large = f"takes minutes or more memory than there is at {len(x)} values, k={k}" if large else None
    add("kmeans1d", "kmeans1d", lambda m: lambda: m.cluster(x, k).centroids, weights_missing or too_large)
    add("ckwrap", "ckwrap", lambda m: lambda: m.ckmeans(x, k).centers, weights_missing or too_large)

    def faiss(m):
        def run():
            trained = m.Kmeans(1, k, niter=25, max_points_per_centroid=10**9, seed=1)
            trained.train(x[:, None], weights=w)
            trained.index.search(x[:, None], 1)
            return trained.centroids

        return run

    add("faiss", "faiss", faiss)
    add("flash-kmeans", "flash_kmeans", lambda m: "needs a CUDA device")
    return out


def bandwidth(weights, rounds):
    total = sum(t.numel() * t.element_size() for t in weights)
    buffer = torch.cat([t.reshape(-1) for t in weights])
    buffer.sum()
    return total / min(once(buffer.sum) for _ in range(rounds))


def extra_memory(call):
    """Peak of the resident set during a call above where it stood before, in bytes; None where /proc does not tell."""
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not clear.exists():
        return None

    def field(name):
        line = next(line for line in status.read_text().splitlines() if line.startswith(name))
        return int(line.split()[1]) * 1024

    ctypes.CDLL(None).malloc_trim(0)  # what earlier calls left on the heap would hide what this one needs
    clear.write_text("5")
    before = field("VmRSS")
    call()
    return field("VmHWM") - before


def model_table(weights, rounds, report):
    total = sum(t.numel() for t in weights)
    rate = bandwidth(weights, rounds)
    two_reads = 2 * 4 * total / rate
    print(f"\n{len(weights)} matrices, {total / 1e6:.1f}M weights")
    print(f"memory is read at {rate / 1e9:.1f} GB/s: two reads {two_reads * 1e3:.0f} ms")
    print(f"{'':22}{'s':>8}{'x two reads':>13}{'MB beyond output':>18}{'% of weights':>14}")
    calls = {}
    groups = [t.shape[0] for t in weights]
    for bits in (1, 2, 4, 6, 8):
        calls[f"k={2**bits}"] = lambda bits=bits: cluster_matrices(weights, [bits] * len(weights), group_rows=groups)
    fisher = [torch.randn(t.shape, generator=torch.Generator().manual_seed(1)) ** 2 * 1e-6 for t in weights]
    calls["k=16 weighted"] = lambda: cluster_matrices(weights, [4] * len(weights), group_rows=groups, sample_weight=fisher)
    times = taking_turns(calls, rounds)
    report["bandwidth"], report["model"] = rate, {}
    print(f"from k=2 to k=256 the time grows {statistics.median(times['k=256']) / statistics.median(times['k=2']):.2f} times")
    for name, call in calls.items():
        seconds = statistics.median(times[name])
        output = sum(m.packed.numel() for m in call())
        extra = extra_memory(call)
        beyond = None if extra is None else max(0, extra - output)
        report["model"][name] = {"seconds": times[name], "two_reads": seconds / two_reads, "extra_bytes": beyond}
        memory = "" if beyond is None else f"{beyond / 1e6:>18.1f}{100 * beyond / (4 * total):>14.1f}"
        print(f"{name:22}{seconds:>8.3f}{seconds / two_reads:>13.1f}{memory}")
    whole_model(weights, fisher, calls, report)
    return {name: statistics.median(values) for name, values in times.items()}


def whole_model(weights, fisher, calls, report):
    """flash1dkmeans, the fastest peer, on every matrix: once, since it takes seconds, between two runs of ours."""
    try:
        flash = importlib.import_module("flash1dkmeans").kmeans_1d
    except ImportError as error:
        print(f"flash1dkmeans on all matrices: skipped, {error}")
        return
    values = [t.reshape(-1).numpy() for t in weights]
    squares = [t.reshape(-1).numpy() for t in fisher]
    for name, k, w in (("k=16", 16, None), ("k=256", 256, None), ("k=16 weighted", 16, squares)):
        flash(values[-1], k, sample_weights=None if w is None else w[-1], random_state=0)  # compiles

        def peer(k=k, w=w):
            for i, x in enumerate(values):
                flash(x, k, sample_weights=None if w is None else w[i], random_state=0)

        calls[name]()
        before, theirs, after = once(calls[name]), once(peer), once(calls[name])
        report["model"][name]["flash1dkmeans"] = {"ours": [before, after], "seconds": theirs}
        print(f"{name:22}flash1dkmeans on all matrices {theirs:.1f} s, {2 * theirs / (before + after):.0f} x ours")


def peer_table(name, values, k, weight, total, ours_total, rounds, report):
    label = f"{name}, {values.numel()} values, k={k}{', weighted' if weight is not None else ''}"
    print(f"\n{label}")
    print(f"{'':16}{'ms':>10}{'inertia/opt':>14}{'x ours':>10}{'model, s (extrapolated)':>26}{'x ours':>9}")
    optimum = float(kmq.kmeans(values, k, sample_weight=weight, algorithm="exact").inertia)
    result = kmq.kmeans(values, k, sample_weight=weight)
    midpoints = (result.centroids[1:] + result.centroids[:-1]) / 2
    if not torch.equal(result.assignments.long(), torch.searchsorted(midpoints, values)):
        raise SystemExit("assignments are not the nearest centroids: nothing is timed")
    rows = report.setdefault("peers", {}).setdefault(label, {})
    rows["kmq"] = {"inertia_ratio": float(result.inertia) / optimum, "bound": float(result.bound)}
    print(f"{'kmq bound':16}{'':10}{float(result.bound):>14.5f}")
    for peer, run in peers(values, k, weight).items():
        if isinstance(run, str):
            print(f"{peer:16}   skipped: {run}")
            rows[peer] = {"skipped": run}
            continue
        run()  # compiles, where the peer compiles
        calls = {"kmq": lambda: kmq.kmeans(values, k, sample_weight=weight), peer: run}
        slow = once(run) > 3
        times = taking_turns(calls, 1 if slow else rounds)
        ratio = statistics.median(b / a for a, b in zip(*times.values(), strict=True))
        quality = inertia(values, run(), weight) / optimum
        seconds = statistics.median(times[peer])
        model = seconds * total / values.numel()
        rows[peer] = {"seconds": times[peer], "inertia_ratio": quality, "ratio": ratio, "model_seconds": model}
        rows["kmq"]["seconds"] = times["kmq"]
        ours = statistics.median(times["kmq"]) * 1e3
        print(f"{'kmq':16}{ours:>10.2f}{rows['kmq']['inertia_ratio']:>14.6f}{1:>10}{ours_total:>26.3f}")
        print(f"{peer:16}{seconds * 1e3:>10.2f}{quality:>14.6f}{ratio:>10.0f}{model:>26.1f}{model / ours_total:>9.0f}")


def rows_table(matrix, rounds, report):
    print(f"\none codebook for each row of {tuple(matrix.shape)}, k=16")
    ours = lambda: kmq.kmeans(matrix, 16)  # noqa: E731
    some = min(64, len(matrix))
    ours_some = float(ours().inertia[:some].sum())
    optimum = float(kmq.kmeans(matrix[:some], 16, algorithm="exact").inertia.sum())
    try:
        flash = importlib.import_module("flash1dkmeans").kmeans_1d
    except ImportError as error:
        print(f"kmq {statistics.median(taking_turns({'kmq': ours}, rounds)['kmq']) * 1e3:.1f} ms; flash1dkmeans skipped: {error}")
        return
    x = matrix[:some].numpy()
    quality = sum(inertia(matrix[i], flash(x[i], 16, random_state=0)[0]) for i in range(some)) / optimum
    times = taking_turns({"kmq": ours, "flash": lambda: [flash(row, 16, random_state=0) for row in x]}, rounds)
    scale = len(matrix) / some
    ratio = statistics.median(scale * b / a for a, b in zip(times["kmq"], times["flash"], strict=True))
    print(f"kmq            {statistics.median(times['kmq']) * 1e3:9.1f} ms   inertia/opt {ours_some / optimum:.6f}")
    flash_ms = scale * statistics.median(times["flash"]) * 1e3
    print(f"flash1dkmeans  {flash_ms:9.1f} ms   inertia/opt {quality:.6f}   {ratio:.0f} x (from {some} rows)")
    report["rows"] = {"seconds": times, "ratio": ratio, "inertia_ratio": ours_some / optimum, "flash_inertia_ratio": quality}


def distributions(n):
    generator = torch.Generator().manual_seed(3)
    normal = torch.randn(n, generator=generator)
    uniform = torch.rand(n, generator=generator)
    chi2 = sum(torch.randn(n, generator=generator) ** 2 for _ in range(5))
    outliers = normal.clone()
    outliers[n // 3], outliers[n // 2] = 1e4, -1e4
    return {
        "Gaussian": normal,
        "Student-t, 5": normal / (chi2 / 5).sqrt(),
        "Laplace": normal.sign() * -uniform.clamp(min=1e-9).log(),
        "50 % zeros": torch.where(uniform < 0.5, 0.0, normal),
        "two far outliers": outliers,
        "three values": torch.tensor([-0.5, 0.1, 0.7])[(uniform * 3).long().clamp(max=2)],
        "constant": torch.full((n,), 0.3),
        "quantized, 300 levels": torch.linspace(-1, 1, 300)[(uniform * 300).long().clamp(max=299)],
    }


def quality_table(weights, n, report):
    """scikit-learn takes minutes for many centroids: there all are compared on 50,000 of the values too."""
    print("\ninertia over the optimum")
    print(f"{'':38}{'k':>5}{'kmq':>15}{'bound':>15}{'flash1dkmeans':>15}{'scikit-learn':>15}")
    picked = [i for i, t in enumerate(weights) if 100_000 < t.numel() < 3_000_000][:: max(1, len(weights) // 6)][:5]
    data = {f"matrix {i} {tuple(weights[i].shape)}": weights[i].reshape(-1) for i in picked} | distributions(n)
    for name, whole in data.items():
        for k, fewer in ((4, False), (16, False), (64, False), (64, True), (256, False), (256, True)):
            values = whole[:: len(whole) // 50_000][:50_000].clone() if fewer else whole
            optimum = float(kmq.kmeans(values, k, algorithm="exact").inertia)
            result = kmq.kmeans(values, k)

            def over(cost, optimum=optimum):
                return cost / optimum if optimum > 0 else (1.0 if cost == 0 else float("inf"))

            found = {"kmq": over(float(result.inertia)), "bound": float(result.bound)}
            for peer in ("flash1dkmeans", "scikit-learn"):
                run = peers(values, k, None)[peer]
                few = len(values.unique()) < k or (peer == "scikit-learn" and k > 16 and not fewer)
                found[peer] = None if isinstance(run, str) or few else over(inertia(values, run()))
            title = f"{name}, 50,000" if fewer else name
            report.setdefault("quality", {})[f"{title}, k={k}"] = found
            shown = ["-" if value is None else f"{value:.9f}" for value in found.values()]
            cells = "".join(f"{text:>{width}}" for text, width in zip(shown, (15, 15, 15, 15), strict=True))
            print(f"{title:38}{k:>5}{cells}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", help="a safetensors file; without it, seeded synthetic matrices of the shapes of MPNet-base")
    parser.add_argument("--json", help="write all figures to this file")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="fewer matrices and rounds, no quality table")
    parser.add_argument("--only", choices=("times", "quality"), help="one half of the benchmark")
    args = parser.parse_args()
    rounds = 2 if args.quick else args.rounds
    named = load(args.weights, args.quick)
    weights = [t.float().contiguous() for t in named.values()]
    report = {
        "build": kmq.build_info()["extension"], "machine": platform.processor() or platform.machine(), "load": os.getloadavg(),
        "threads": torch.get_num_threads(), "weights": args.weights or "synthetic", "versions": {"torch": torch.__version__},
    }  # fmt: skip
    report["last_level_cache"] = last_level_cache()
    cache = "unknown" if report["last_level_cache"] is None else f"{report['last_level_cache'] / 1e6:.0f} MB"
    print(f"path {report['build']['cpu_path']}, last-level cache {cache}")
    print(f"{report['machine']}, {report['threads']} threads, load {report['load'][0]:.1f}, weights: {report['weights']}")
    if args.only != "quality":
        time_tables(named, weights, rounds, report)
    if not args.quick and args.only != "times":
        quality_table(weights, 300_000, report)
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1))


def time_tables(named, weights, rounds, report):
    total = sum(t.numel() for t in weights)
    ours = model_table(weights, rounds, report)
    name, matrix = next((n, t) for n, t in zip(named, weights, strict=True) if 500_000 < t.numel() < 3_000_000)
    values = matrix.reshape(-1)
    fisher = torch.randn(values.shape, generator=torch.Generator().manual_seed(2)) ** 2 * 1e-6
    peer_table(name, values, 16, None, total, ours["k=16"], rounds, report)
    peer_table(name, values, 256, None, total, ours["k=256"], rounds, report)
    peer_table(name, values, 16, fisher, total, ours["k=16 weighted"], rounds, report)
    peer_table(name, values[:20_000].clone(), 16, None, total, ours["k=16"], rounds, report)
    rows_table(next((t for t in weights if t.shape == (3072, 768)), weights[-1]), rounds, report)


if __name__ == "__main__":
    main()

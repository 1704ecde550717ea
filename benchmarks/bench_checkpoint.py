"""`kmq quantize` on generated BERT-like checkpoints: speed beside disk and clustering alone, peak memory, growth with the size.

    python benchmarks/bench_checkpoint.py --folder /big/disk --gb 1 --gb 3 --gb 6 --gb 12

For each size a checkpoint of fp32 encoder layers in 20 files is generated as a stream (weights normal, fixed seed), then, with
nothing of it in the page cache: the files are read once (before and after each run), the clustering engine runs on tensors in
memory, and the command runs in a process of its own. The share is the speed of a run, without the start-up of the process, over
that of the slower of disk (the mean of the two readings around it) and clustering. The readings wait as long after the page
cache was emptied as the run does, which starts up meanwhile: a virtual machine gives free memory back to its host, and getting it
again for the page cache can take longer than the disk does. `--at-once` reads without that wait: a faster disk to compare with.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import BertConfig, BertModel

from kmq_kernels.clustering import cluster_matrices
from kmq_kernels.files import header_bytes

HIDDEN, INTERMEDIATE, VOCABULARY, FILES = 2560, 10240, 30522, 20
START_UP = 4.0  # seconds from emptying the page cache until the command reads


def generate(folder, gigabytes):
    """Writes a checkpoint of about so many GB, a file at a time."""
    layer = 4 * (4 * HIDDEN**2 + 2 * HIDDEN * INTERMEDIATE)
    layers = max(1, round((gigabytes * 1e9 - 4 * VOCABULARY * HIDDEN) / layer))
    sizes = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE}
    config = BertConfig(num_hidden_layers=layers, num_attention_heads=20, **sizes)
    config.architectures, config.dtype = ["BertModel"], "float32"
    with torch.device("meta"):
        tensors = [(name, tuple(tensor.shape)) for name, tensor in BertModel(config).state_dict().items()]
    size = sum(4 * math.prod(shape) for _, shape in tensors)
    files, filled = [[]], 0
    for name, shape in tensors:
        if filled >= size * len(files) / FILES:
            files.append([])
        files[-1].append((name, "F32", shape, 4 * math.prod(shape)))
        filled += 4 * math.prod(shape)
    folder.mkdir(parents=True)
    weight_map = {}
    for i, entries in enumerate(files, 1):
        file_name = f"model-{i:05d}-of-{len(files):05d}.safetensors"
        start, at = header_bytes(entries)
        with open(folder / file_name, "wb") as file:
            file.write(start)
            for name, _, shape, _ in sorted(entries, key=lambda entry: at[entry[0]]):
                file.write(torch.randn(shape).mul_(0.04).numpy().data)
                weight_map[name] = file_name
            file.flush()
            os.fsync(file.fileno())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(config.to_json_string())


def forget(folder):
    """Drops the files of a folder from the page cache."""
    for path in folder.glob("*.safetensors"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk_rate(folder, wait):
    """Bytes a second of reading all files once, one after the other, with the kernel's own read-ahead."""
    forget(folder)
    time.sleep(wait)
    buffer, total, begin = bytearray(8 << 20), 0, time.perf_counter()
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total += count
    rate = total / (time.perf_counter() - begin)
    forget(folder)
    return rate


def cluster_rate(bits):
    """Bytes of fp32 weights a second: the shapes of a layer and of the embedding, in memory, the best of three."""
    shapes = [(HIDDEN, HIDDEN)] * 4 + [(INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)]
    weights = [torch.randn(shape).mul_(0.04) for shape in shapes]
    best = math.inf
    for _ in range(3):
        begin = time.perf_counter()
        cluster_matrices(weights, [bits] * len(shapes), group_rows=[shape[0] for shape in shapes])
        best = min(best, time.perf_counter() - begin)
    return sum(weight.nbytes for weight in weights) / best


def others(since=None):
    """Processor seconds of all others on this machine, and the clock; or the processors that they used since then."""
    with open("/proc/stat") as file:
        ticks = [int(word) for word in file.readline().split()[1:]]
    own = sum(os.times()[:4])
    now = (sum(ticks[:3] + ticks[5:8]) / os.sysconf("SC_CLK_TCK") - own, time.perf_counter())
    return now if since is None else (now[0] - since[0]) / (now[1] - since[1])


def run(folder, out, bits):
    """Seconds of the command in a process of its own, start-up and all, and its summary."""
    shutil.rmtree(out, ignore_errors=True)
    forget(folder)
    command = [sys.executable, "-m", "kmq_kernels.cli", "quantize", str(folder), "-o", str(out), "--bits", str(bits), "--json"]
    begin = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - begin
    if done.returncode != 0:
        sys.exit(done.stderr)
    return seconds, json.loads(done.stdout)


def measure(folder, out, bits, repeat, wait):
    """One row of the table: `repeat` runs, each between two readings of the disk."""
    since, clustering = others(), cluster_rate(bits)
    disk, runs, shares = [disk_rate(folder, wait)], [], []
    for _ in range(repeat):
        runs.append(run(folder, out, bits))
        disk.append(disk_rate(folder, wait))
        summary = runs[-1][1]
        shares.append(summary["bytes_before"] / summary["times"]["total"] / min(sum(disk[-2:]) / 2, clustering))
    subprocess.run([sys.executable, "-m", "kmq_kernels.cli", "verify", str(out)], check=True, capture_output=True)
    shutil.rmtree(out)
    return {
        "bytes": runs[0][1]["bytes_before"],
        "disk": disk,
        "clustering": clustering,
        "shares": shares,
        "command": statistics.median(seconds for seconds, _ in runs),
        "times": {key: statistics.median(s["times"][key] for _, s in runs) for key in runs[0][1]["times"]},
        "peak": max(summary["peak_bytes"] for _, summary in runs),
        "others": others(since),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where checkpoints are generated, removed after use")
    parser.add_argument("--gb", type=float, action="append", help="size; may be repeated; default 1")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=1, help="runs of each size")
    parser.add_argument("--at-once", action="store_true", help="read the disk at once after its cache was emptied")
    parser.add_argument("--generate", action="store_true", help="only generate")
    parser.add_argument("--keep", action="store_true", help="keep what was generated")
    options = parser.parse_args()
    torch.manual_seed(0)
    for gigabytes in options.gb or [1]:
        folder = options.folder / f"checkpoint-{gigabytes:g}"
        if not folder.exists():
            generate(folder, gigabytes)
        if options.generate:
            continue
        row = measure(folder, options.folder / "out", options.bits, options.repeat, 0 if options.at_once else START_UP)
        seconds, disk = row["times"]["total"], ", ".join(f"{rate / 1e6:.0f}" for rate in row["disk"])
        shares = f"{statistics.median(row['shares']):.2f} ({min(row['shares']):.2f} to {max(row['shares']):.2f})"
        print(
            f"{row['bytes'] / 1e9:6.2f} GB  {seconds:6.2f} s ({row['command']:.2f} with start-up)"
            f"  {row['bytes'] / seconds / 1e6:6.0f} MB/s  disk alone {disk}  clustering alone {row['clustering'] / 1e6:.0f}"
            f"  share {shares}  peak {row['peak'] / 1e6:.0f} MB",
            flush=True,
        )
        times = ", ".join(f"{name} {value:.2f}" for name, value in row["times"].items())
        print(f"    seconds: {times}; processors used by others meanwhile: {row['others']:.2f}", flush=True)
        if not options.keep:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()

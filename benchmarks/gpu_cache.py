"""Compiles, without a GPU, what `make gpu` launches in its smoke and headline steps, into a Triton cache that travels with it.

    python -m benchmarks.gpu_cache --arch 90               # record the launches, compile what is missing, count hits and misses
    python -m benchmarks.gpu_cache --arch 90 --record      # only the launches and their keys
    python -m benchmarks.gpu_cache                         # on the device: the same for the architecture that is there

A key of Triton's cache is a hash of the kernel's source, the types, alignment and special values of its arguments, its options,
the architecture, and of Triton itself: its files, its compiled library, its ptxas. So run this with the Triton and the minor
version of Python that the device has. (Triton 3.6 makes a key from what the process did before, too: see gpu_keys.py.) The
launches are those of the benchmarks, on a device that is pretended (gpu_mock.py).

An entry is the machine code and its description, without the stages before it. Triton lists the files of an entry by absolute
paths, and compiles afresh where they do not exist: `settle` writes the list anew where the folder is now.
"""

import argparse
import concurrent.futures
import contextlib
import importlib
import io
import json
import multiprocessing
import os
import random
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.gpu_keys import steady_keys

ROOT = Path(__file__).parent.parent
CACHES = ROOT / "build" / "triton-cache"
INDEX = "launches.json"
KEPT = {".cubin", ".json", ".so"}  # what a launch needs of an entry


@dataclass(frozen=True)
class Launch:
    """A kernel and what it was specialized for, in the words of Triton's `JITFunction.preload`."""

    module: str
    function: str
    specialization: str


def folder_for(architecture: int) -> Path:
    """Where the cache for an architecture and the Triton that is here lies."""
    import triton

    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    return CACHES / f"sm_{architecture}-triton-{triton.__version__}-python-{python}"


def _once(call: Callable[[], Any]) -> float:
    """In the place of a measurement."""
    call()
    return 1.0


def steps() -> dict[str, Callable[[], Any]]:
    """What is launched, by the name of the part: the very functions of the steps, in which nothing is timed."""
    from benchmarks import gpu_codebook_grad, gpu_codebook_linear, gpu_headline, gpu_kmeans, gpu_smoke

    device = torch.device("cuda")

    def quietly(run: Callable[[], Any]) -> Callable[[], Any]:
        def body() -> None:
            figures = {"us": 1.0, "us_p10": 1.0, "us_p90": 1.0, "times_as_fast_as_cublas": 1.0}
            random.seed(0)
            with contextlib.ExitStack() as stack:
                for module in (gpu_codebook_linear, gpu_codebook_grad):
                    replaced = {
                        "bandwidth": lambda *_: 1.0,
                        "replayable": lambda calls, _: _once(calls[0]),
                        "compared": lambda runs, *_: {name: dict(figures) for name in runs},
                    }
                    for name, value in replaced.items():
                        stack.enter_context(mock.patch.object(module, name, value))
                stack.enter_context(mock.patch.object(gpu_kmeans.Clock, "seconds", lambda _, call, repeats=1: _once(call)))
                stack.enter_context(mock.patch.object(gpu_kmeans, "optimum_of", return_value=1.0))
                stack.enter_context(mock.patch.object(torch.cuda, "CUDAGraph", mock.MagicMock))
                stack.enter_context(mock.patch.object(torch.cuda, "graph", return_value=contextlib.nullcontext()))
                stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
                stack.enter_context(torch.inference_mode())
                run()

        return body

    found = {"smoke": quietly(lambda: gpu_smoke.run(device, small=False))}
    for part, body in gpu_headline.PARTS.items():
        if part != "encoder":  # a model of transformers, whose layers are those of the part `linear`
            found[part] = quietly(lambda body=body: body(device, False))
    return found


def record(architecture: int, parts: dict[str, Callable[[], Any]]) -> tuple[list[Launch], dict[str, int]]:
    """The different launches of all parts, and how many of them each part is the first to make; nothing is compiled."""
    import triton

    from benchmarks.gpu_mock import pretended

    steady_keys()
    seen: dict[Launch, None] = {}

    def note(**call: Any) -> bool:
        seen[Launch(call["fn"].module, call["fn"].name, call["compile"]["specialization_data"])] = None
        return True

    counts = {}
    with pretended(architecture), mock.patch.object(triton.knobs.runtime, "jit_cache_hook", note):
        for part, body in parts.items():
            before = len(seen)
            body()
            counts[part] = len(seen) - before
    return list(seen), counts


def replay(architecture: int, parts: dict[str, Callable[[], Any]], folder: Path, launchers: bool) -> tuple[int, int, int]:
    """Launches of all parts by Triton's own way from a call to a kernel: hits and misses of the cache, and kernels launched.

    What is missing is compiled then and there.
    """
    import triton

    from benchmarks.gpu_mock import pretended

    steady_keys()
    found = {True: 0, False: 0}

    def listen(*, cache_hit: bool, **_: Any) -> None:
        found[cache_hit] += 1

    with (
        mock.patch.object(triton.knobs.cache, "dir", str(folder)),
        mock.patch.object(triton.knobs.compilation, "listener", listen),
        pretended(architecture, launchers) as driver,
    ):
        for body in parts.values():
            body()
    return found[True], found[False], driver.launched


def _processor_seconds() -> float:
    """Of this process and of those it waited for, such as ptxas; whatever else the machine does counts little."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


_compile_here: Callable[[Launch], tuple[bool, float]]


def _begin(architecture: int, folder: str, launchers: bool) -> None:
    """In a process of the pool: a pretended device for its life."""
    global _compile_here
    import triton

    from benchmarks.gpu_mock import pretended

    torch.set_num_threads(1)
    steady_keys()
    triton.knobs.cache.dir = folder
    hit = [False]

    def listen(*, cache_hit: bool, **_: Any) -> None:
        hit[0] = cache_hit

    triton.knobs.compilation.listener = listen
    block = pretended(architecture, launchers)
    block.__enter__()

    def run(launch: Launch) -> tuple[bool, float]:
        function = getattr(importlib.import_module(launch.module), launch.function)
        start = _processor_seconds()
        kernel = function.preload(launch.specialization)
        kernel._init_handles()  # also builds its launcher
        return hit[0], _processor_seconds() - start

    _compile_here = run
    _compile_here.block = block  # type: ignore[attr-defined]  # kept open


def _compile(launch: Launch) -> tuple[bool, float]:
    return _compile_here(launch)


def compile_all(launches: list[Launch], architecture: int, folder: Path, jobs: int, launchers: bool) -> list[tuple[bool, float]]:
    """Compiles what the cache lacks in `jobs` processes; for each launch whether it was there, and its seconds of a processor."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        min(jobs, max(len(launches), 1)), context, _begin, (architecture, str(folder), launchers)
    ) as pool:
        return list(pool.map(_compile, launches))


def prune(folder: Path) -> None:
    """Leaves of each entry what a launch needs."""
    for path in folder.glob("*/*"):
        if path.is_file() and path.suffix not in KEPT:
            path.unlink()


def settle(folder: Path) -> int:
    """Tells Triton where the files of each entry are now; the number of kernels."""
    lists = list(folder.glob("*/__grp__*.json"))
    for path in lists:
        here = {file.name: str(file) for file in path.parent.iterdir() if file != path and file.suffix in KEPT}
        fresh = path.with_name(f"{path.name}.{os.getpid()}.part")
        fresh.write_text(json.dumps({"child_paths": here}))
        fresh.replace(path)
    return len(lists)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def build(architecture: int, jobs: int, parts: dict[str, Callable[[], Any]], folder: Path) -> dict[str, Any]:
    """Brings the cache of an architecture up to date; the facts of it, which are also written into the folder."""
    import triton

    start = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    settle(folder)
    launches, counts = record(architecture, parts)
    recorded = time.perf_counter()
    results = compile_all(launches, architecture, folder, jobs, launchers=True)
    compiled = time.perf_counter()
    missing = [seconds for hit, seconds in results if not hit]
    index = folder / INDEX
    # What compiling took of a processor, the first time: that is what a device is spared.
    known = json.loads(index.read_text())["compile_seconds"] if index.exists() else {}
    for launch, (hit, seconds) in zip(launches, results, strict=True):
        if not hit:
            known[key_of(launch)] = round(seconds, 3)
    prune(folder)
    settle(folder)
    wanted = {key_of(launch) for launch in launches}
    facts = {
        "architecture": architecture, "triton": triton.__version__, "python": sys.version.split()[0],
        "kernels": len(launches), "new_in_each_part": counts, "hits": len(launches) - len(missing), "misses": len(missing),
        "record_seconds": round(recorded - start, 1), "seconds": round(compiled - start, 1), "jobs": jobs,
        "compiled_now_seconds": round(sum(missing), 1),
        "compile_seconds_of_all": round(sum(seconds for key, seconds in known.items() if key in wanted), 1),
        "bytes": size_of(folder),
    }  # fmt: skip
    index.write_text(json.dumps({**facts, "compile_seconds": {key: known[key] for key in sorted(wanted & set(known))}}, indent=1))
    return facts


def key_of(launch: Launch) -> str:
    """A short name for a launch."""
    import hashlib

    text = json.dumps(
        {name: value for name, value in json.loads(launch.specialization).items() if name not in ("options", "target")}
    )
    return f"{launch.function}-{hashlib.sha256((launch.module + text).encode()).hexdigest()[:12]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, help="90, 100, ...; by default that of the device that is here")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile (default: one a processor)")
    parser.add_argument("--record", action="store_true", help="list the launches and compile nothing")
    parser.add_argument("--count", action="store_true", help="launch all of it on the pretended device and count hits and misses")
    options = parser.parse_args()
    from benchmarks.gpu_mock import CHIPS
    from benchmarks.gpu_steps import emit

    architecture = options.arch
    if architecture is None:
        if not torch.cuda.is_available():
            sys.exit("gpu_cache: torch finds no CUDA device here; name an architecture, such as --arch 90")
        major, minor = torch.cuda.get_device_capability()
        architecture = 10 * major + minor
    if architecture not in CHIPS:
        sys.exit(f"--arch: expected one of {', '.join(map(str, CHIPS))}, got {architecture}")
    if options.record:
        launches, counts = record(architecture, steps())
        for launch in launches:
            print(key_of(launch))
        print(f"{len(launches)} different launches; new in each part: {counts}")
        return 0
    folder = folder_for(architecture)
    if options.count:
        settle(folder)
        hits, misses, launched = replay(architecture, steps(), folder, launchers=False)
        emit({"what": "replay", "hits": hits, "misses": misses, "kernels_launched": launched})
        return int(misses > 0)
    facts = build(architecture, options.jobs, steps(), folder)
    emit({"what": "cache", "folder": str(folder.relative_to(ROOT)), **facts})
    return 0


if __name__ == "__main__":
    sys.exit(main())

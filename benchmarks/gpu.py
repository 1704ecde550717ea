"""`make gpu`: on a CUDA machine, what its minutes are worth most for comes first, inside a time box.

    python benchmarks/gpu.py                 # 480 seconds; writes benchmarks/results/<gpu>.json and <gpu>.log beside it
    python benchmarks/gpu.py --seconds 3600  # the steps have limits of their own; the box only ends them earlier
    python benchmarks/gpu.py --dry-run       # the steps in their order on the CPU, with stand-ins for what needs a device

In order: the kernels' cache, the build, correctness, the headline figures, the tests, peers and all shapes, the sanitizer, slow
tests. Needs no network and nothing but what a CUDA PyTorch install has (torch, triton, transformers, pytest, a compiler, nvcc).
`make gpu-cache` compiles most kernels beforehand, on a machine without a GPU.
"""

import argparse
import importlib.util
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.gpu_steps import ROOT, Result, Step, faults, run

SECONDS = 480
DRY = 20  # the limits of a dry run, in those of a device
HEADLINES = {"linear": 75, "clustering": 60, "passes": 30, "fp8": 60, "gradients": 40, "encoder": 40}  # and seconds at most


@dataclass(frozen=True)
class Goal:
    """A figure that is asked of a device. rows: of a step, those that count; met where `figure` of each is within `bound`."""

    name: str
    step: str
    rows: Callable[[dict[str, Any]], bool]
    figure: str
    bound: float
    at_least: bool
    source: str


def _linear(bits: int, M: int, name: str = "kmq {} bits", side: int = 8192) -> Callable[[dict[str, Any]], bool]:
    return lambda row: (row.get("OUT"), row.get("M"), row.get("name")) == (side, M, name.format(bits))


_HUMMING = "Humming on H100 at n = k = 8192, fp16, M = 1 (inclusionAI/humming#2)"
_COUNTED = "bytes and instructions counted, see the README"
GOALS = [
    *(
        Goal(f"{bits} bits, 8192x8192, M=1, times cuBLAS", "headline linear", _linear(bits, 1), "times_as_fast_as_cublas", bound,
             True, _HUMMING)
        for bits, bound in ((4, 2.16), (3, 2.43), (2, 2.60), (8, 1.42))
    ),
    *(
        Goal(f"4 bits, 8192x8192, M={M}, times cuBLAS", "headline linear", _linear(4, M), "times_as_fast_as_cublas", bound, True,
             _COUNTED)
        for M, bound in ((16, 2.0), (4096, 0.93))
    ),
    Goal("4 bits in fp8, 8192x8192, M=4096, times cuBLAS in fp16", "headline fp8", _linear(4, 4096, "kmq {} bits, fp8"),
         "times_as_fast_as_cublas", 1.0, True, "twice the rate of the tensor cores, less what decoding takes"),
    Goal("whole-model solve, times the floor of two passes", "headline clustering",
         lambda row: row.get("what") == "whole-model solve", "graph_times_the_floor", 2.0, False, _COUNTED),
    Goal("whole-model solve, inertia over the optimum", "headline clustering",
         lambda row: row.get("what") == "whole-model solve", "inertia_over_optimum", 1.0001, False, "the tests, at 16 centroids"),
    Goal("assign, per cent of the bandwidth of a copy", "headline passes", lambda row: row.get("what") == "assign",
         "percent_of_copy_bandwidth", 80, True, _COUNTED),
    Goal("codebook_grad, per cent of the bandwidth of a copy", "headline gradients",
         lambda row: row.get("op") == "codebook_grad", "percent_of_copy_bandwidth", 80, True, _COUNTED),
]  # fmt: skip


def judged(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Each goal as met, missed or not measured, with the worst figure of those that count."""
    found = []
    for goal in GOALS:
        step = content["steps"].get(goal.step, {"rows": [], "state": "not run"})
        values = [row[goal.figure] for row in step["rows"] if goal.rows(row) and goal.figure in row]
        fact: dict[str, Any] = {"goal": goal.name, "bound": goal.bound, "at_least": goal.at_least, "source": goal.source}
        if values and not content["dry_run"]:
            worst = min(values) if goal.at_least else max(values)
            met = worst >= goal.bound if goal.at_least else worst <= goal.bound
            fact.update(figure=worst, of=len(values), verdict="met" if met else "missed")
        else:
            fact["verdict"] = "not measured"
        found.append(fact)
    return found


def _tests(python: str, marks: str) -> list[str]:
    parallel = ["-n", "4"] if importlib.util.find_spec("xdist") is not None else []  # of one device, all its memory
    return [python, "-m", "pytest", "tests", "-vv", "--maxfail=20", *parallel, "-m", marks]


def device_steps(python: str, architecture: int) -> list[Step]:
    module = [python, "-m"]
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    headline = [Step(f"headline {part}", [*module, "benchmarks.gpu_headline", part], limit) for part, limit in HEADLINES.items()]
    return [
        Step("cache", [*module, "benchmarks.gpu_cache", "--arch", str(architecture)], 90),
        Step("build", [python, "setup.py", "-q", "build_ext", "--inplace", f"-j{os.cpu_count() or 1}"], 120),
        Step("smoke", [*module, "benchmarks.gpu_smoke"], 60, checks=True),
        *headline,
        Step("tests", _tests(python, "gpu and not slow"), 150),
        Step("peers, linear", [*module, "benchmarks.gpu_codebook_linear"], 240),
        Step("peers, clustering", [*module, "benchmarks.gpu_kmeans"], 120),
        Step("all shapes, gradients", [*module, "benchmarks.gpu_codebook_grad"], 120),
        Step("sanitizer", [sanitizer, "--error-exitcode", "9", *module, "benchmarks.gpu_smoke", "--small"], 300, checks=True),
        Step("slow tests", _tests(python, "gpu and slow"), 1200),
    ]


def dry_steps(python: str) -> list[Step]:
    """The same names in the same order: what needs a device or changes the tree has a stand-in, the rest runs on tiny sizes.

    The limits are much longer, and only end what hangs: on a busy machine a process may get no processor for minutes.
    """
    say = "from kmq_kernels import build_info; print(build_info()['extension'])"
    standing: dict[str, list[str]] = {
        "cache": [python, "-m", "benchmarks.gpu_cache", "--arch", "90", "--record"],
        "build": [python, "-c", say],
        "sanitizer": [python, "-m", "benchmarks.gpu_smoke", "--dry-run"],
    }
    listed = ("tests", "slow tests")  # pytest finds those that a device would run
    peers = {"peers, linear": "linear", "peers, clustering": "clustering", "all shapes, gradients": "gradients"}
    steps = []
    for step in device_steps(python, 90):
        if step.name in standing:
            command = standing[step.name]
        elif step.name in listed:
            command = [part for part in step.command if part not in ("-n", "4")] + ["--collect-only", "-p", "no:cacheprovider"]
        elif step.name in peers:
            command = [python, "-m", "benchmarks.gpu_headline", peers[step.name], "--dry-run"]
        else:
            command = [*step.command, "--dry-run"]
        # The cache compiles; also where whoever asks for a dry run has set the interpreter.
        environment = {"TRITON_INTERPRET": "0" if step.name == "cache" else "1"}
        if step.name in listed:
            environment["KMQ_LIST_AS_ON_CUDA"] = "1"
        steps.append(replace(step, command=command, limit=step.limit * DRY, environment=environment))
    return steps


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for all steps together (default: {SECONDS})")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with stand-ins for what needs a device")
    parser.add_argument("-o", "--output", type=Path, help="result file (default: benchmarks/results/<gpu>.json)")
    options = parser.parse_args()
    if not options.seconds > 0:
        parser.error(f"--seconds: expected more than 0, got {options.seconds:g}")
    import torch
    import triton

    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    facts: dict[str, Any] = {
        "dry_run": options.dry_run, "seconds": options.seconds, "torch": torch.__version__, "cuda": torch.version.cuda,
        "triton": triton.__version__, "python": platform.python_version(), "processors": os.cpu_count(),
    }  # fmt: skip
    if options.dry_run:
        facts |= {"gpu": None}
        steps, name = dry_steps(sys.executable), "dry-run"
    else:
        if not torch.cuda.is_available():
            print("make gpu: torch finds no CUDA device here; --dry-run tries the steps on the CPU", file=sys.stderr)
            return 1
        from benchmarks.gpu_cache import folder_for

        major, minor = torch.cuda.get_device_capability()
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "gpu": torch.cuda.get_device_name(), "capability": [major, minor], "memory": properties.total_memory,
            "multiprocessors": properties.multi_processor_count, "l2_bytes": properties.L2_cache_size,
        }  # fmt: skip
        environment |= {"KMQ_CUDA": "1", "TRITON_CACHE_DIR": str(folder_for(10 * major + minor)), "TRITON_INTERPRET": "0"}
        environment.setdefault("TORCH_CUDA_ARCH_LIST", f"{major}.{minor}")
        steps, name = device_steps(sys.executable, 10 * major + minor), torch.cuda.get_device_name()
    file = re.sub(r"\W+", "-", name).strip("-").lower()
    path = options.output or (ROOT / "build" if options.dry_run else ROOT / "benchmarks" / "results") / f"{file}.json"
    result = Result(path, facts, steps)
    passed = run(steps, options.seconds, environment, result, path.with_suffix(".log"))
    result.content["goals"] = judged(result.content)
    result.write()
    for goal in result.content["goals"]:
        print(f"{goal['verdict']:12}  {goal['goal']}" + (f": {goal['figure']:.4g}" if "figure" in goal else ""))
    wrong = faults(json.loads(path.read_text()))
    for sentence in wrong:
        print(f"result file: {sentence}", file=sys.stderr)
    print(f"written: {path}, {path.with_suffix('.log').name}")
    return int(not passed or bool(wrong))


if __name__ == "__main__":
    sys.exit(main())

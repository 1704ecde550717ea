"""`make gpu`: on a CUDA machine, builds with CUDA, runs the tests marked `gpu`, and writes benchmarks/results/<gpu>.json.

Needs no network and nothing but what a CUDA PyTorch install has (torch, triton, transformers, a compiler, nvcc).
"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Modules beside this one; rows() of each gives entries of the result file.
BENCHMARKS = ("gpu_kmeans", "gpu_codebook_linear", "gpu_codebook_grad")


def main() -> int:
    """Exit code 0 where the build, every test and every benchmark passed. The result file is written after each of them."""
    import torch

    if not torch.cuda.is_available():
        print("make gpu: torch finds no CUDA device here", file=sys.stderr)
        return 1
    environment = {**os.environ, "KMQ_CUDA": "1", "PYTHONPATH": str(ROOT)}
    major, minor = torch.cuda.get_device_capability()
    environment.setdefault("TORCH_CUDA_ARCH_LIST", f"{major}.{minor}")
    tests = [sys.executable, "-m", "pytest", "tests", "-m"]
    steps = {
        "build": [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        "tests": [*tests, "gpu and not slow"],
        **{module: _benchmark(module) for module in BENCHMARKS},  # a process each: a device error does not reach the others
        "slow tests": [*tests, "gpu and slow"],
    }
    facts: dict[str, object] = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "driver_capability": [major, minor],
    }
    name = re.sub(r"\W+", "-", torch.cuda.get_device_name()).strip("-").lower()
    return int(not run(steps, environment, facts, ROOT / "benchmarks" / "results" / f"{name}.json"))


def _benchmark(module: str) -> list[str]:
    return [sys.executable, "-c", f"import json; from benchmarks import {module}; print(json.dumps({module}.rows()))"]


def run(steps: dict[str, list[str]], environment: dict[str, str], facts: dict[str, object], result: Path) -> bool:
    """Runs the steps in their order, adds to `facts` what became of each, and writes them to `result` each time."""
    passed = True
    result.parent.mkdir(exist_ok=True)
    for name, command in steps.items():
        start = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        out, errors = done.stdout.strip().splitlines(), done.stderr.strip().splitlines()
        fact: dict[str, object] = {"exit": done.returncode, "seconds": round(time.perf_counter() - start, 1)}
        if name in BENCHMARKS:
            fact["rows"] = json.loads(out[-1]) if done.returncode == 0 else errors[-5:]
            print(name, json.dumps(fact, indent=1), flush=True)
        else:
            fact["summary"] = out[-1:] or errors[-1:]
            print(name, done.stdout[-8000:], done.stderr[-8000:], sep="\n", flush=True)
        facts[name] = fact
        passed &= done.returncode == 0
        result.write_text(json.dumps(facts, indent=2) + "\n")
    print(f"written: {result}")
    return passed


if __name__ == "__main__":
    sys.exit(main())

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
    """Exit code 0 where the build, every test and every benchmark passed."""
    import torch

    if not torch.cuda.is_available():
        print("make gpu: torch finds no CUDA device here", file=sys.stderr)
        return 1
    environment = {**os.environ, "KMQ_CUDA": "1", "PYTHONPATH": str(ROOT)}
    major, minor = torch.cuda.get_device_capability()
    environment.setdefault("TORCH_CUDA_ARCH_LIST", f"{major}.{minor}")
    steps = {
        "build": [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        "tests": [sys.executable, "-m", "pytest", "-m", "gpu", "tests"],
    }
    facts: dict[str, object] = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "driver_capability": [major, minor],
    }
    failed = False
    for name, command in steps.items():
        start = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        print(done.stdout[-8000:], done.stderr[-8000:], sep="\n")
        facts[name] = {
            "exit": done.returncode,
            "seconds": round(time.perf_counter() - start, 1),
            "summary": done.stdout.strip().splitlines()[-1:] or done.stderr.strip().splitlines()[-1:],
        }
        failed |= done.returncode != 0
    for module in BENCHMARKS:  # each in a process of its own: a device error in one does not reach the others
        start = time.perf_counter()
        code = f"import json; from benchmarks import {module}; print(json.dumps({module}.rows()))"
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        lines = done.stdout.strip().splitlines()
        facts[module] = {
            "exit": done.returncode,
            "seconds": round(time.perf_counter() - start, 1),
            "rows": json.loads(lines[-1]) if done.returncode == 0 else done.stderr.strip().splitlines()[-5:],
        }
        print(json.dumps(facts[module], indent=1))
        failed |= done.returncode != 0
    name = re.sub(r"\W+", "-", torch.cuda.get_device_name()).strip("-").lower()
    result = ROOT / "benchmarks" / "results" / f"{name}.json"
    result.parent.mkdir(exist_ok=True)
    result.write_text(json.dumps(facts, indent=2) + "\n")
    print(f"written: {result}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

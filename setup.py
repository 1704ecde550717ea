"""Builds the extension kmq_kernels._C: C++ only, or C++ and CUDA. The one build decision is made here.

CUDA sources are built where torch was built for CUDA and knows a CUDA toolkit (CUDA_HOME). KMQ_CUDA=1 demands them and fails
without; KMQ_CUDA=0 leaves them out. TORCH_CUDA_ARCH_LIST and MAX_JOBS are honoured.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup


def toolkit() -> str | None:
    """Root of the CUDA toolkit of the nvcc on the PATH. That may be a script which starts the real one, so nvcc is asked."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    shown = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    found = re.search(r"^#\$ TOP=(.+)$", shown, re.MULTILINE)
    return os.path.realpath(found[1]) if found else None


# PyTorch takes the folder above nvcc's for the toolkit unless it is told.
if not (os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")) and (root := toolkit()):
    os.environ["CUDA_HOME"] = root

try:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
except ImportError:
    sys.exit(
        "kmq_kernels builds against the PyTorch that you run: install torch, then use\n    pip install --no-build-isolation ."
    )

ROOT = Path(__file__).parent
# The newest that the toolkit knows also goes in as PTX, which later devices compile for themselves.
DEFAULT_ARCHS = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")


def default_archs(nvcc: str) -> str:
    """The architectures of DEFAULT_ARCHS that this nvcc knows, for TORCH_CUDA_ARCH_LIST."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    known = {f"{number[:-1]}.{number[-1]}" for number in re.findall(r"compute_(\d+)", listed)}
    taken = [arch for arch in DEFAULT_ARCHS if arch in known]
    if not taken:
        sys.exit(f"TORCH_CUDA_ARCH_LIST: {nvcc} knows none of {', '.join(DEFAULT_ARCHS)}; name one that it knows")
    return ";".join([*taken[:-1], f"{taken[-1]}+PTX"])


def wants_cuda() -> bool:
    switch = os.environ.get("KMQ_CUDA", "")
    if switch not in ("", "0", "1"):
        sys.exit(f"KMQ_CUDA: expected 0, 1 or nothing, got {switch!r}")
    possible = torch.version.cuda is not None and CUDA_HOME is not None
    if switch == "1" and not possible:
        missing = "this torch was built without CUDA" if torch.version.cuda is None else "no CUDA toolkit was found"
        sys.exit(f"KMQ_CUDA=1, but {missing}")
    return possible and switch != "0"


def sources(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))


# No -march or -mavx2 here: a kernel that needs AVX2 says so at the function and is chosen at run time. Contraction of a * b + c
# is off so that the scalar and vector paths round alike. PyTorch's headers need C++20 from 2.14 on.
cxx = ["-O3", "-std=c++20", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-psabi"]
# Python's own flags ask for debug information, 36 MB of it. Symbols stay: tests find the kernels by their names. Who wants to
# debug builds with CXXFLAGS=-g (or CFLAGS).
if not any(re.search(r"(^|\s)-g", os.environ.get(name, "")) for name in ("CFLAGS", "CXXFLAGS")):
    cxx.append("-g0")
# at::parallel_for runs serially in a file compiled without OpenMP. Only the compiler is told: the runtime is the one torch loads.
if sys.platform == "linux":
    cxx.append("-fopenmp")
cpp_sources = ["csrc/bindings.cpp", *sources("csrc/cpu/**/*.cpp")]
if wants_cuda():
    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        os.environ["TORCH_CUDA_ARCH_LIST"] = default_archs(str(Path(CUDA_HOME) / "bin" / "nvcc"))
    cuda = torch.version.cuda
    extension = CUDAExtension(
        "kmq_kernels._C",
        [*cpp_sources, *sources("csrc/cuda/*.cu")],
        extra_compile_args={"cxx": [*cxx, f'-DKMQ_CUDA="{cuda}"'], "nvcc": ["-O3", "-std=c++17", "-lineinfo"]},
    )
else:
    extension = CppExtension("kmq_kernels._C", cpp_sources, extra_compile_args={"cxx": cxx})

setup(ext_modules=[extension], cmdclass={"build_ext": BuildExtension.with_options(use_ninja=True)})

"""codebook_grad.cu: executed on the CPU against brute force, compiled by nvcc without spills, and run on a device."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import oracles
import pytest
import torch
from test_codebook_grad import DTYPES, assert_sums, problem

import kmq_kernels as kmq

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "csrc" / "cuda" / "codebook_grad.cu"
NVCC = shutil.which("nvcc")
SHAPES = ((1, 1), (9, 130), (20, 388))
GROUPS = (1, 8, 1 << 20)

ENTRY = """
extern "C" int64_t workspace(const uint8_t* packed, int64_t rows, int64_t cols, int bits, int64_t books, int64_t group_rows) {
  return kmq::cuda::codebook_grad_workspace({packed, rows, cols, bits}, books, group_rows);
}
extern "C" void run(const void* grad, int dtype, const uint8_t* packed, int64_t rows, int64_t cols, int bits, int64_t books,
                    int64_t group_rows, double* work, void* out) {
  kmq::cuda::codebook_grad(grad, kmq::Dtype(dtype), {packed, rows, cols, bits}, books, group_rows, work, out, nullptr);
}
"""


def cuda_include() -> Path | None:
    if NVCC is None:
        return None
    shown = subprocess.run([NVCC, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    found = [Path(match) for match in re.findall(r'-I"?([^"\s]+)"?', shown)]
    return next((path for path in found if (path / "cuda_runtime.h").exists()), None)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    include, compiler = cuda_include(), shutil.which("g++")
    if include is None or compiler is None:
        pytest.skip("needs the CUDA headers of an nvcc, and g++")
    folder = tmp_path_factory.mktemp("cuda_on_cpu")
    source, library = folder / "kernel.cpp", folder / "kernel.so"
    subprocess.run([sys.executable, ROOT / "tests" / "cuda_on_cpu.py", SOURCE, "-o", source], check=True)
    text = source.read_text().replace('"../kmq.h"', f'"{ROOT / "csrc" / "kmq.h"}"')
    source.write_text(text + ENTRY)
    command = [compiler, "-std=c++17", "-O1", "-w", "-I", str(include), "-include", str(ROOT / "tests" / "cuda_on_cpu.h")]
    built = subprocess.run([*command, "-shared", "-fPIC", str(source), "-o", str(library)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-3000:]
    loaded = ctypes.CDLL(str(library))
    loaded.workspace.restype = ctypes.c_int64
    return loaded


def run(library: ctypes.CDLL, grad: torch.Tensor, packed: torch.Tensor, bits: int, group_rows: int, seed: int) -> torch.Tensor:
    rows, cols = grad.shape
    books = -(-rows // group_rows)
    number = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}[grad.dtype]
    shape = [ctypes.c_void_p(packed.data_ptr()), *map(ctypes.c_int64, (rows, cols)), ctypes.c_int(bits)]
    shape += map(ctypes.c_int64, (books, group_rows))
    work = torch.full((library.workspace(*shape),), torch.nan, dtype=torch.float64)
    wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
    out = torch.full((books, 2**bits), torch.nan, dtype=wide)
    os.environ["EMU_SEED"] = str(seed)
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (work, out)]
    library.run(ctypes.c_void_p(grad.data_ptr()), ctypes.c_int(number), *shape, *pointers)
    return out


@pytest.mark.parametrize("bits", range(1, 9))
def test_emulated_against_brute_force(emulated: ctypes.CDLL, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMU_SEED", "0")
    for dtype in DTYPES if bits in (3, 8) else DTYPES[:1]:
        for rows, cols in SHAPES if dtype == torch.float32 else SHAPES[1:2]:
            for group in GROUPS:
                group_rows = min(group, rows)
                grad, index, packed = problem(rows, cols, bits, dtype)
                assert_sums(run(emulated, grad, packed, bits, group_rows, 0), grad, index, 2**bits, group_rows)


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_emulated_bits_do_not_depend_on_the_order_of_threads(
    emulated: ctypes.CDLL, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMU_SEED", "0")
    for group_rows in (8, 50):
        grad, _, packed = problem(50, 388, bits, torch.float32)
        outs = [run(emulated, grad, packed, bits, group_rows, seed) for seed in (0, 1, 2, 3)]
        assert all(torch.equal(outs[0], out) for out in outs)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_nvcc_compiles_without_spills(architecture: str, tmp_path: Path) -> None:
    if NVCC is None:
        pytest.skip("nvcc was not found")
    command = [NVCC, "-std=c++17", "-O3", f"-arch={architecture}", "-Xptxas", "-v", "-c", str(SOURCE)]
    built = subprocess.run([*command, "-o", str(tmp_path / "kernel.o")], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    report = built.stdout + built.stderr
    spills = [int(count) for count in re.findall(r"(\d+) bytes spill", report)]
    assert len(spills) >= 2 * 34  # stores and loads of 4 dtypes x 8 widths, and of the second stage
    assert not any(spills), report


@pytest.mark.gpu
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_device(bits: int, dtype: torch.dtype) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    assert kmq.build_info()["ops"]["codebook_grad"]["cuda"] == "CUDA C++"
    for rows, cols in (*SHAPES, (3072, 768), (1025, 1023)):
        for group in GROUPS:
            group_rows = min(group, rows)
            grad, index, packed = problem(rows, cols, bits, dtype)
            arguments = (grad.cuda(), packed.cuda(), -(-rows // group_rows), 2**bits, group_rows)
            out = torch.ops.kmq.codebook_grad(*arguments)
            assert torch.equal(out, torch.ops.kmq.codebook_grad(*arguments))
            assert_sums(out.cpu(), grad, index, 2**bits, group_rows)


def test_oracle_counts_members() -> None:
    index = np.array([[0, 1], [1, 1], [0, 0]], dtype=np.uint8)
    assert oracles.cluster_sums(np.ones((3, 2)), index, 2, 2).tolist() == [[1, 3], [2, 0]]

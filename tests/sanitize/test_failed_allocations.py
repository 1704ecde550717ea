"""Allocations of the extension that fail inside torch's own parallel regions: an error in Python, and nothing else."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kmq_kernels import ops

CODE = """
import ctypes, json, sys, torch
import kmq_kernels as kmq
failing = ctypes.CDLL(sys.argv[1])
failing.arm.argtypes, failing.left.restype = [ctypes.c_long], ctypes.c_long
torch.set_num_threads(2)
g = torch.Generator().manual_seed(0)
packed = kmq.pack(torch.randint(0, 16, (1024, 256), dtype=torch.uint8, generator=g), 4)
codebook, x = torch.randn(1, 16, generator=g), torch.randn(200, 256, generator=g)
grad, ids = torch.randn(200, 1024, generator=g), torch.randint(0, 1024, (5000,), generator=g)
large, small = torch.randn(42, 400, generator=g), torch.randn(16, 200, generator=g)
ops = torch.ops.kmq
calls = {
    "codebook_linear": lambda: [kmq.codebook_linear(x.bfloat16(), packed, codebook)],
    "codebook_linear, few rows": lambda: [kmq.codebook_linear(x[:3], packed, codebook)],
    "codebook_linear_input_grad": lambda: [ops.codebook_linear_input_grad(grad.half(), packed, codebook, 256, 1024)],
    "codebook_linear_grad": lambda: [ops.codebook_linear_grad(grad, x, packed, 1, 16, 1024)],
    "codebook_embedding_grad": lambda: [ops.codebook_embedding_grad(large.new_ones(5000, 256), ids, packed, 1, 16, 1024, -1)],
    "assign": lambda: [ops.assign(large.view(2, -1), codebook.sort(1).values.expand(2, 16))],
    "kmeans": lambda: [part for r in kmq.kmeans([large.view(-1), small], 8) for part in (r.centroids, r.assignments)],
}
threads_failed = 0
for name, call in calls.items():
    failed, n, expected = 0, 1, None
    while True:
        failing.arm(n)
        try:
            got, thrown = call(), False
        except (MemoryError, RuntimeError) as error:
            assert "bad_alloc" in str(error) or isinstance(error, MemoryError), error
            thrown = True
        reached = failing.left() == 0
        failing.arm(0)
        again = call()
        expected = again if expected is None else expected
        for one, other in zip(again if thrown else got, expected, strict=True):
            assert torch.equal(one, other), (name, n)
        failed += thrown
        if not reached:
            break
        n += 1
    assert failed > 0, name
    threads_failed += failed
print(json.dumps(threads_failed))
"""


@pytest.mark.skipif(not ops.has_kernel("kmeans", "CPU"), reason="the extension is not built")
@pytest.mark.skipif(not sys.platform.startswith("linux") or shutil.which("c++") is None, reason="needs a C++ compiler on Linux")
def test_every_allocation_of_the_extension_may_fail(tmp_path):
    source = Path(__file__).parent / "preload" / "failing_new.cpp"
    library = tmp_path / "failing_new.so"
    subprocess.run(["c++", "-std=c++20", "-O1", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True)
    environment = {"LD_PRELOAD": str(library), "PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(library)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 40

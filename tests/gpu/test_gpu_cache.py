"""The cache that travels: the keys of what is compiled without a device are those of the launches on it."""

import json
import re
import subprocess
import sys
import textwrap

import pytest

from benchmarks.gpu_mock import CHIPS
from kmq_kernels.triton_kernels import codebook_linear, fp8_linear

# A step that launches three kernels, one of them twice, by the package's own launchers.
STEP = """
import json, sys
from pathlib import Path
import torch
from benchmarks import gpu_cache
from kmq_kernels.triton_kernels import dequantize, pack
folder = Path({folder!r})

def body():
    index = torch.randint(0, 16, (64, 256), dtype=torch.uint8, device="cuda")
    assert index.is_cuda and int(index.max()) == 0
    packed = pack.pack(index, 4)
    assert packed.shape == (64, 128)
    again = pack.pack(index[1:], 4)  # 63 rows: no multiple of 16, so another kernel to Triton
    for codebook in (torch.randn(1, 16, device="cuda"), torch.randn(1, 16, device="cuda")):
        weight = dequantize.dequantize(packed, codebook, 256, 64)
    assert weight.shape == (64, 256) and bool((weight == weight).all()) is False

parts = {{"step": body}}
"""


def run(folder, code, run_python):
    return run_python(textwrap.dedent(STEP.format(folder=str(folder))) + code, TRITON_INTERPRET="0")


def test_keys_made_without_a_device_are_found_where_the_folder_went(tmp_path, run_python):
    facts = run(tmp_path / "here", "print(json.dumps(gpu_cache.build(90, 1, parts, folder)))", run_python)
    assert (facts["kernels"], facts["hits"], facts["misses"]) == (3, 0, 3)
    assert facts["bytes"] < 500_000
    files = {path.suffix for path in (tmp_path / "here").glob("*/*")}
    assert files == {".cubin", ".json"}
    (tmp_path / "here").rename(tmp_path / "there")
    settled = "gpu_cache.settle(folder)\nprint(json.dumps(gpu_cache.replay(90, parts, folder, False)))"
    assert run(tmp_path / "there", settled, run_python) == [3, 0, 4]
    # Triton takes an entry whose list of files names the old place for none.
    lists = list((tmp_path / "there").glob("*/__grp__*"))
    assert len(lists) == 3
    lists[0].write_text(lists[0].read_text().replace("there", "here"))
    assert run(tmp_path / "there", settled.partition("\n")[2], run_python) == [2, 1, 4]
    again = run(tmp_path / "there", "print(json.dumps(gpu_cache.build(90, 1, parts, folder)))", run_python)
    assert (again["hits"], again["misses"]) == (3, 0)
    assert again["compile_seconds_of_all"] >= facts["compiled_now_seconds"] > 0


# The keys of all kernels, made in the order of their names or backwards; and names of which a kernel reads two values.
KEYS = """
import importlib, json, pkgutil
import triton
import kmq_kernels.triton_kernels as package
from benchmarks.gpu_keys import steady_keys
steady_keys()
modules = [importlib.import_module(one.name) for one in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]
found = {{
    name + " of " + module.__name__: one for module in modules for name, one in vars(module).items()
    if isinstance(one, triton.JITFunction)
}}
keys = {{name: found[name].cache_key for name in sorted(found, reverse={backwards})}}
twice = [
    (name, read) for name, one in found.items() for read in sorted({{read for read, _ in one.used_global_vals}})
    if len({{str(value) for (other, _), (value, _) in one.used_global_vals.items() if other == read}}) > 1
]
print(json.dumps([keys, twice]))
"""


def test_keys_do_not_depend_on_what_a_process_did_before(run_python):
    """Triton 3.6 also puts constants of one name in an order that no process repeats: no kernel reads two of different values."""
    (keys, twice), (others, _) = (run_python(KEYS.format(backwards=way), TRITON_INTERPRET="0") for way in (False, True))
    assert len(keys) > 60
    assert keys == others
    assert twice == []


def test_the_chips_are_those_that_have_plans():
    for architecture in CHIPS:
        major, minor = divmod(architecture, 10)
        assert (major, minor) in codebook_linear.PLANS or architecture == 89
        assert (major, minor) in fp8_linear.PLANS or architecture == 80


def test_an_unknown_architecture_is_refused_in_a_sentence():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_cache", "--arch", "70"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.strip() == "--arch: expected one of 80, 89, 90, 100, 120, got 70"


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [90, 100, 120])
def test_all_launches_of_smoke_and_headline_are_listed(architecture):
    """The whole list is made, and every kernel of the package is in it."""
    command = [sys.executable, "-m", "benchmarks.gpu_cache", "--arch", str(architecture), "--record"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    *names, summary = done.stdout.splitlines()
    assert int(summary.split()[0]) == len(names) == len(set(names))
    counts = json.loads(re.search(r"\{.*\}", summary)[0].replace("'", '"'))
    assert counts["smoke"] > 200
    kernels = {name.rpartition("-")[0] for name in names}
    assert kernels == {
        "add_tiles_kernel", "assign_kernel", "count_kernel", "decode_rows_kernel", "embedding_grad_kernel", "finish_kernel",
        "fp8_linear_kernel", "input_grad_kernel", "linear_grad_kernel", "linear_kernel", "look_kernel", "mark_kernel",
        "pack_kernel", "quantize_rows_kernel", "rows_kernel", "sample_half_kernel", "sample_kernel", "solve_kernel",
        "split_kernel", "sum_pieces_kernel", "sum_segments_kernel", "unpack_kernel", "update_kernel", "weight_kernel",
        "zoom_kernel",
    }  # fmt: skip

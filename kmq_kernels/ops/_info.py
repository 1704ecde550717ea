"""Which implementation each op has here, and why."""

from typing import Any

import torch

from ._define import TRITON_LAUNCHERS, compiled_extension, has_kernel, has_triton

OPS = (
    "assign", "update", "kmeans", "pack", "unpack", "dequantize",
    "codebook_linear", "codebook_linear_input_grad", "codebook_linear_grad",
    "int8_codebook", "int8_linear",
    "codebook_embedding", "codebook_embedding_grad", "codebook_grad",
    "sparse_linear", "sparse_linear_input_grad", "sparse_linear_grad", "sparse_embedding", "sparse_embedding_grad",
)  # fmt: skip


def _cuda_implementation(op: str) -> str:
    if op in TRITON_LAUNCHERS:
        return "Triton (fp64: plain torch)" if has_triton else "plain torch: triton is not installed"
    if op == "kmeans":
        return "Triton, and C++ on the CPU" if has_kernel(op, "CUDA") else "NumPy: needs triton and the extension"
    return "CUDA C++" if has_kernel(op, "CUDA") else "plain torch"


def build_info() -> dict[str, Any]:
    """Which implementation each op has on each device, and why.

    Returns {"version", "torch", "extension": facts of the compiled extension or the reason there is none,
    "ops": {op: {"cpu": ..., "cuda": ...}}}.
    """
    from .. import __version__

    if compiled_extension is None:
        facts: Any = "not built: the package was installed without a C++ compiler, or the sources are used in place"
    else:
        facts = compiled_extension.build_facts()
    implementations = {}
    for op in OPS:
        implementations[op] = {
            "cpu": f"C++ ({facts['cpu_path']})" if has_kernel(op, "CPU") else "plain torch",
            "cuda": _cuda_implementation(op),
        }
    return {"version": __version__, "torch": torch.__version__, "extension": facts, "ops": implementations}

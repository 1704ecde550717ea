"""What a figure needs beside it: layers, memory, versions, machine."""

from __future__ import annotations

import contextlib
import platform
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from ..layers import CodebookModule

HISTOGRAM_BINS = 120


def layer_facts(model: Any, original: Any = None) -> list[dict[str, Any]]:
    """What there is to know of every embedding and linear layer, as plain values.

    Of a weight in floating point its histogram; of a quantized one bits, bytes, the first codebook, and, with the `original`
    model it came from (on any device), its error: the share of the squared deviation from the mean that is lost.
    """
    layers = []
    for name, module in model.named_modules():
        if isinstance(module, CodebookModule):
            stored = module.stored()
            layer = {
                "name": name,
                "shape": [module.rows, module.cols],
                "bits": module.bits,
                "codebooks": module.codebook.shape[0],
                "bytes": sum(p.numel() * p.element_size() for p in stored.values()),
                "outliers": 0 if module.outlier_values is None else len(module.outlier_values),
                "row_scale": module.row_scale is not None,
                "centroids": [float(f"{c:.6g}") for c in module.codebook[0].tolist()],
            }
            if original is not None:
                weight = original.get_submodule(name).weight.detach().double()
                ours = module.weight.detach().to(weight.device).double()
                share = (weight - ours).square().sum() / (weight - weight.mean()).square().sum().clamp_min(1e-300)
                layer["error"] = float(share)
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            weight = module.weight.detach().float()
            low, high = float(weight.min()), float(weight.max())
            counts = weight.flatten().histc(HISTOGRAM_BINS, low, high) if high > low else torch.tensor([weight.numel()])
            layer = {
                "name": name,
                "shape": list(weight.shape),
                "bytes": weight.numel() * module.weight.element_size(),
                "histogram": {"low": low, "high": high, "counts": [int(c) for c in counts.tolist()]},
            }
        else:
            continue
        layers.append(layer)
    return layers


def reset_peak_memory() -> None:
    """Lets the peak of the resident memory start anew, where the system can."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int | None:
    """Peak bytes since the reset: of the device's allocator on CUDA, else of the process; None where nothing tells."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None


def versions() -> dict[str, Any]:
    """Versions and machine facts that a figure needs beside it."""
    from .. import __version__

    return {
        "kmq_kernels": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "processor": _processor(),
        **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()

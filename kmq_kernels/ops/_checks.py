"""Checks of arguments: one sentence each, naming the argument, what was expected and what was given."""

import torch
from torch import Tensor

from .. import packing

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


# Checks: one sentence each, naming the argument, what was expected and what was given.


def expect_float(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name}: expected a floating-point tensor (fp32, fp64, bf16 or fp16), got {tensor.dtype}")


def expect_dim(name: str, tensor: Tensor, dim: int, shape: str) -> None:
    if tensor.dim() != dim:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")


def expect_same_device(name: str, tensor: Tensor, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(f"{name}: expected a tensor on {other.device} like the others, got one on {tensor.device}")


def expect_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits: expected 1 to 8, got {bits}")


def expect_centroids(num_centroids: int, most: int = 256) -> None:
    if not 1 <= num_centroids <= most:
        raise ValueError(f"num_centroids: expected 1 to {most}, got {num_centroids}")


def expect_packed(packed: Tensor, cols: int, num_centroids: int) -> None:
    """The packed matrix fits `cols` columns of log2(num_centroids) bits."""
    num_centroids = int(num_centroids)  # torch.jit.trace has a tensor here
    bits = num_centroids.bit_length() - 1
    if num_centroids != 2**bits or not 1 <= bits <= 8:
        raise ValueError(f"num_centroids: expected a power of two from 2 to 256, got {num_centroids}")
    if packed.dtype != torch.uint8:
        raise TypeError(f"packed: expected uint8, got {packed.dtype}")
    expect_dim("packed", packed, 2, "(rows, row_bytes)")
    expected = packing.row_bytes(cols, bits)
    if packed.shape[1] != expected:
        raise ValueError(f"packed: expected {expected} bytes a row for {cols} columns of {bits} bits, got {packed.shape[1]}")


def expect_codebook(packed: Tensor, codebook: Tensor, cols: int, group_rows: int) -> None:
    expect_float("codebook", codebook)
    expect_dim("codebook", codebook, 2, "(G, K)")
    expect_packed(packed, cols, codebook.shape[1])
    expect_same_device("codebook", codebook, packed)
    expect_groups(packed, codebook.shape[0], group_rows)


def expect_groups(packed: Tensor, num_codebooks: int, group_rows: int) -> None:
    rows = packed.shape[0]
    if group_rows < 1 or -(-rows // group_rows) != num_codebooks:
        raise ValueError(f"group_rows: {num_codebooks} codebooks for {rows} rows do not fit groups of {group_rows} rows")


def even_group_rows(packed: Tensor, num_codebooks: int, group_rows: int | None) -> int:
    """`group_rows` as given, else the even split of the rows over the codebooks."""
    if group_rows is not None:
        return group_rows
    if num_codebooks < 1:
        raise ValueError(f"codebook: expected at least one codebook, got {num_codebooks}")
    rows = packed.shape[0] if packed.dim() else 0
    return max(1, -(-rows // num_codebooks))

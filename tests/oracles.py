"""Independent float64 brute force, written from the definitions and not from reference.py."""

import numpy as np
import torch
from torch import Tensor


def packed_bytes(assignments: np.ndarray, bits: int) -> np.ndarray:
    """The packed rows of (rows, cols) indices, bit by bit from the drawing in packing.py."""
    widths = {1: [1], 2: [2], 3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 2], 7: [4, 2, 1], 8: [4, 4]}[bits]
    rows, cols = assignments.shape
    blocks = -(-cols // 128)
    out = np.zeros((rows, blocks * 16 * bits), np.uint8)
    for col in range(cols):
        start, low = col // 128 * 16 * bits, 0
        field, lane = divmod(col % 128, 16)
        for width in widths:
            value = assignments[:, col] >> low & (1 << width) - 1
            byte, shift = divmod(field * width, 8)
            out[:, start + lane * width + byte] |= (value << shift).astype(np.uint8)
            start, low = start + 16 * width, low + width
    return out


def weight64(assignments: Tensor, codebook: Tensor, group_rows: int) -> Tensor:
    """weight[r, c] = codebook[r // group_rows, assignments[r, c]], float64."""
    rows = [codebook[r // group_rows].double()[assignments[r].long()] for r in range(assignments.shape[0])]
    return torch.stack(rows) if rows else codebook.new_zeros(assignments.shape, dtype=torch.float64)


def linear64(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """input (M, IN) @ weight (OUT, IN).T + bias in float64."""
    out = torch.from_numpy(np.einsum("mi,oi->mo", input.double().numpy(), weight.double().numpy()))
    return out if bias is None else out + bias.double()


def relative_rms(got: Tensor, expected: Tensor) -> float:
    """Root mean square of got - expected over that of expected; 0 for empty tensors."""
    if expected.numel() == 0:
        return 0.0
    error = (got.double() - expected).square().mean().sqrt()
    return float(error / expected.square().mean().sqrt().clamp_min(1e-300))

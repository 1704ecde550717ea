"""The one bit layout of assignments.

A matrix of indices (rows, cols) with `bits` bits an index is stored as `packed`, uint8 (rows, row_bytes(cols, bits)).
Each row is cut into blocks of 128 columns (the last one padded with index 0); a block takes exactly 16 * bits bytes.

The bits of an index are spread over planes 4, 2 or 1 bits wide, the low bits in the first plane:

    bits     1    2    3      4    5      6      7        8
    planes   1    2    2+1    4    4+1    4+2    4+2+1    4+4

A plane p bits wide stores a block as 16 lanes; lane c is a little-endian integer of 8 * p bits (p bytes), and its p-bit
field j (counted from the least significant bit) belongs to column 16 * j + c of the block:

    4-bit plane, 64 bytes       lane 0             lane 1             ...  lane 15
    field (bits 4j .. 4j+3)     7 6 5 4 3 2 1 0    7 6 5 4 3 2 1 0         7 6 5 4 3 2 1 0
    column of field j           16j                16j + 1            ...  16j + 15

    block of 3-bit indices, 48 bytes:   [ 2-bit plane: 16 lanes of 2 bytes ][ 1-bit plane: 16 lanes of 1 byte ]

So field j of all lanes is 16 neighbouring columns: one k-step of a tensor core, two AVX2 registers of decoded floats.
"""

import torch
from torch import Tensor

BLOCK = 128  # columns per block
LANES = 16
FIELDS = BLOCK // LANES

PLANES: dict[int, tuple[int, ...]] = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (4, 4)}


def row_bytes(cols: int, bits: int) -> int:
    """Bytes of one packed row of `cols` indices."""
    return -(-cols // BLOCK) * LANES * bits


def pack(assignments: Tensor, bits: int) -> Tensor:
    """Packs the last dimension: uint8 (..., cols) with values below 2**bits -> uint8 (..., row_bytes(cols, bits))."""
    *batch, cols = assignments.shape
    blocks = -(-cols // BLOCK)
    padded = assignments.new_zeros((*batch, blocks * BLOCK))
    padded[..., :cols] = assignments
    fields = padded.view(*batch, blocks, FIELDS, LANES)
    out, shift = [], 0
    for width in PLANES[bits]:
        per_byte = 8 // width
        plane = (fields >> shift) & (2**width - 1)
        plane = plane.view(*batch, blocks, width, per_byte, LANES)
        lane_bytes = plane[..., 0, :]
        for field in range(1, per_byte):
            lane_bytes = lane_bytes | (plane[..., field, :] << (field * width))
        out.append(lane_bytes.transpose(-1, -2).reshape(*batch, blocks, LANES * width))
        shift += width
    return torch.cat(out, -1).reshape(*batch, blocks * LANES * bits)


def unpack(packed: Tensor, bits: int, numel: int) -> Tensor:
    """Inverse of `pack`: uint8 (..., row_bytes(numel, bits)) -> uint8 (..., numel)."""
    *batch, width_bytes = packed.shape
    blocks = width_bytes // (LANES * bits)
    stored = packed.reshape(*batch, blocks, LANES * bits)
    fields = packed.new_zeros((*batch, blocks, FIELDS, LANES))
    start = shift = 0
    for width in PLANES[bits]:
        per_byte = 8 // width
        lanes = stored[..., start : start + LANES * width].reshape(*batch, blocks, LANES, width)
        lane_bytes = lanes.transpose(-1, -2)  # (..., blocks, byte of the lane, lane)
        plane = torch.stack([(lane_bytes >> (field * width)) & (2**width - 1) for field in range(per_byte)], -2)
        fields |= plane.reshape(*batch, blocks, FIELDS, LANES) << shift
        start += LANES * width
        shift += width
    return fields.reshape(*batch, blocks * BLOCK)[..., :numel].contiguous()


def take(packed: Tensor, bits: int, row: Tensor, col: Tensor) -> Tensor:
    """The indices at single places: packed (rows, row_bytes), row and col (n,) int64 -> (n,) int64."""
    field, lane = (col % BLOCK).div(LANES, rounding_mode="floor"), col % LANES
    block = col.div(BLOCK, rounding_mode="floor") * LANES * bits
    out = torch.zeros_like(col)
    start = shift = 0
    for width in PLANES[bits]:
        per_byte = 8 // width
        byte = packed[row, block + start + lane * width + field.div(per_byte, rounding_mode="floor")].long()
        out |= ((byte >> (field % per_byte * width)) & (2**width - 1)) << shift
        start += LANES * width
        shift += width
    return out
